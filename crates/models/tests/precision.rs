//! Networks of bf16 products beside the same networks of f32 products.

mod support;

use std::io::Write;

use candle_core::{DType, Device, Tensor};
use segdistill_models::{Frozen, ModelError, ModelSpec, build};
use segdistill_ops::testing::relative_error;
use segdistill_ops::{Mode, OpsError, ParamStore, Precision};
use support::{filled, images};

/// Whether this processor has bf16; says so on stderr, past the test harness, when it has not.
fn has_bf16(test: &str) -> bool {
    let found = Precision::Bf16.on_cpu();
    if let Err(why) = &found {
        std::io::stderr().write_all(format!("skipped: {test}: {why}\n").as_bytes()).unwrap();
    }
    found.is_ok()
}

/// Weights of the formula for the network of `spec`, in a new store; `kernel` changes those of convolutions.
fn store_of(spec: &ModelSpec, precision: Precision, kernel: fn(Tensor) -> Tensor) -> (ParamStore, Tensor) {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu).with_precision(precision);
    let model = build(spec, &store).unwrap();
    for p in store.named() {
        let shape = p.tensor.dims();
        let values = Tensor::from_vec(filled(&p.name, shape, None), shape, &Device::Cpu).unwrap();
        let values = values.to_dtype(DType::F32).unwrap();
        p.var.unwrap().set(&if shape.len() == 4 { kernel(values) } else { values }).unwrap();
    }
    // Running statistics: a batch's own would also carry the rounding of every other image and pixel.
    let logits = model.forward(&images("images", &[2, 3, 64, 96], DType::F32), Mode::Eval).unwrap().logits_nchw;
    (store, logits)
}

#[test]
fn logits_are_those_of_f32_to_bf16s_rounding() {
    if !has_bf16("logits_are_those_of_f32_to_bf16s_rounding") {
        return;
    }
    for encoder in ["resnet18", "resnet34", "xception65"] {
        let spec = ModelSpec { width: 0.25, ..ModelSpec::deeplabv3plus(encoder, 7) };
        let (store, exact) = store_of(&spec, Precision::F32, |w| w);
        let (rounded_store, rounded) = store_of(&spec, Precision::Bf16, |w| w);
        let apart = relative_error(&rounded, &exact).unwrap();
        // Sums of many products average the rounding of their factors out and layers add it up: Xception65 has more than
        // twice as many as ResNet-34.
        let allowed = if encoder == "xception65" { 6e-2 } else { 2e-2 };
        assert!(apart < allowed, "{}: logits are {apart:.1e} from f32", spec.encoder);

        // One of every two factors rounded, by f32 kernels: both together are about as far from the exact products.
        let round = |w: Tensor| w.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        let (_, half) = store_of(&spec, Precision::F32, round);
        let of_weights = relative_error(&half, &exact).unwrap();
        let ratio = apart / of_weights;
        assert!((0.5..3.0).contains(&ratio), "{}: {apart:.1e}, rounded weights alone {of_weights:.1e}", spec.encoder);

        let frozen = |store: &ParamStore| {
            let network = Frozen::new(&spec, store.tensors(), DType::F32, &Device::Cpu).unwrap();
            let logits = network.forward(&images("images", &[1, 3, 64, 96], DType::F32)).unwrap().logits_nchw;
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(frozen(&rounded_store), frozen(&store), "{}: evaluation knows no precision", spec.encoder);
    }
}

#[test]
fn every_gradient_points_where_that_of_f32_does() {
    if !has_bf16("every_gradient_points_where_that_of_f32_does") {
        return;
    }
    let spec = ModelSpec { width: 0.25, ..ModelSpec::deeplabv3plus("resnet18", 7) };
    let gradients = |precision| -> Vec<(String, Tensor)> {
        let (store, logits) = store_of(&spec, precision, |w| w);
        let found = logits.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        store.named().into_iter().filter_map(|p| Some((p.name, found.get(&p.tensor)?.clone()))).collect()
    };
    let (exact, rounded) = (gradients(Precision::F32), gradients(Precision::Bf16));
    assert_eq!(exact.len(), rounded.len());
    let dot = |a: &Tensor, b: &Tensor| {
        let product = (a.to_dtype(DType::F64).unwrap() * b.to_dtype(DType::F64).unwrap()).unwrap();
        product.sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    for ((name, exact), (other, rounded)) in exact.iter().zip(&rounded) {
        assert_eq!((name, rounded.dtype()), (other, DType::F32), "gradients are f32");
        let cosine = dot(exact, rounded) / (dot(exact, exact) * dot(rounded, rounded)).sqrt();
        assert!(cosine > 0.99, "{name}: cosine {cosine}");
    }
}

#[test]
fn f64_networks_refuse_bf16() {
    let spec = ModelSpec { width: 0.125, ..ModelSpec::deeplabv3plus("resnet18", 7) };
    let store = ParamStore::trainable(0, DType::F64, &Device::Cpu).with_precision(Precision::Bf16);
    let model = build(&spec, &store).unwrap();
    let error = model.forward(&images("images", &[1, 3, 64, 96], DType::F64), Mode::Eval).unwrap_err();
    assert!(matches!(error, ModelError::Ops(OpsError::Config { .. })), "{error}");
    assert!(error.to_string().contains("bf16 products for F64"), "{error}");
}
