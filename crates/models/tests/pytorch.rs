//! Forward and backward against PyTorch: torchvision's and timm's encoders under an independent decoder, see
//! `fixtures/make_deeplab.py`.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use segdistill_models::{ModelSpec, weights};
use segdistill_ops::{Mode, ParamKind};
use support::{fill, filled_network, images, values};

struct Tolerance {
    /// In evaluation.
    eval: f64,
    /// In training: normalising some seventy times by statistics of few values magnifies rounding.
    train: f64,
    gradients: f64,
    /// A gradient smaller than this share of the largest one is measured by that share.
    floor: f64,
    /// What rounding may leave of a gradient that is zero, as a share of the largest one.
    zero: f64,
}

/// Only the order of summation differs.
const F64: Tolerance = Tolerance { eval: 1e-12, train: 1e-11, gradients: 1e-9, floor: 0.0, zero: 1e-12 };
/// The bounds the project asks for.
const F32: Tolerance = Tolerance { eval: 1e-4, train: 1e-4, gradients: 1e-3, floor: 1e-2, zero: 1e-4 };
/// In f32 one value that rounding carries across a ReLU's kink moves gradients by a hundredth and logits hardly. It does
/// so to PyTorch as well: its own float32 lies up to 8e-5 (logits) and 2.3e-2 (gradients) from its float64 in the cases
/// that are not calm. Their gradients are held to [`Case::f32_gradients`] there, by norm: a flip moves few elements far.
const F32_NEAR_KINKS: Tolerance = Tolerance { eval: 1e-4, train: 3e-4, gradients: f64::NAN, floor: 1e-2, zero: 1e-4 };

/// A case of the script's `CASES`.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    encoder: &'static str,
    width: f64,
    output_stride: usize,
    shape: [usize; 4],
    images: &'static str,
    calm: Option<f64>,
    /// Largest relative distance of a gradient in f32: 1e-3 where the case is calm, else three times what was measured.
    f32_gradients: f64,
}

/// `max |found - expected| / max |expected|`.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "number of elements");
    assert!(found.iter().all(|v| v.is_finite()), "not finite");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let apart = largest(&mut found.iter().zip(expected).map(|(f, e)| (f - e).abs()));
    apart / largest(&mut expected.iter().map(|e| e.abs()))
}

/// `||found - expected|| / ||expected||`.
fn norm_distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "number of elements");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / norm(&mut expected.iter().copied())
}

/// At most `most` elements, those that `samples` of the script keeps.
fn samples(tensor: &Tensor, most: usize) -> Vec<f64> {
    let values = values(tensor);
    let step = (values.len().div_ceil(most)..).find(|step| step % 2 != 0 && step % 3 != 0).unwrap();
    values.iter().step_by(step).copied().collect()
}

fn check(case: Case, dtype: DType) {
    let Case { name: case, encoder, width, output_stride, shape, images: images_name, calm, f32_gradients } = case;
    let bound = match (dtype, calm) {
        (DType::F64, _) => F64,
        (_, Some(_)) => Tolerance { gradients: f32_gradients, ..F32 },
        (_, None) => Tolerance { gradients: f32_gradients, ..F32_NEAR_KINKS },
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/deeplab.safetensors");
    let prefix = format!("{case}/");
    let expected: BTreeMap<String, Vec<f64>> = weights::read(path, &Device::Cpu)
        .unwrap()
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), values(t))))
        .collect();
    assert_eq!(expected.len(), 15, "tensors of the fixture");

    let spec = ModelSpec { width, output_stride, dropout: 0.0, ..ModelSpec::deeplabv3plus(encoder, 5) };
    let (store, model) = filled_network(&spec, dtype, calm);
    let input = images(images_name, &shape, dtype);
    let near = |what: &str, found: &[f64], bound: f64| {
        let apart = distance(found, &expected[what]);
        assert!(apart <= bound, "{case} {dtype:?}, {what}: {apart:.3e} from PyTorch, allowed {bound:.0e}");
        apart
    };

    let logits = model.forward(&input, Mode::Eval).unwrap().logits_nchw;
    let eval = near("eval_logits", &samples(&logits, 400), bound.eval);
    let logits = model.forward(&input, Mode::Train { seed: 0, step: 0 }).unwrap().logits_nchw;
    let train = near("train_logits", &samples(&logits, 400), bound.train);

    let direction = Tensor::from_vec(fill("loss", logits.dims()), logits.dims(), &Device::Cpu).unwrap();
    let loss = (&logits * direction.to_dtype(dtype).unwrap()).unwrap().mean_all().unwrap();
    let gradients = loss.backward().unwrap();
    let (mut buffers, mut norms, mut products, mut worst) = (Vec::new(), Vec::new(), Vec::new(), 0f64);
    for p in store.named() {
        let along = |t: &Tensor| -> f64 {
            fill(&format!("along/{}", p.name), t.dims()).iter().zip(values(t)).map(|(a, b)| a * b).sum()
        };
        if p.kind == ParamKind::Buffer {
            buffers.push(along(&p.tensor));
            continue;
        }
        let gradient = gradients.get(&p.tensor).unwrap_or_else(|| panic!("no gradient for {}", p.name));
        norms.push(values(gradient).iter().map(|v| v * v).sum::<f64>().sqrt());
        products.push(along(gradient));
        let key = format!("gradient/{}", p.name);
        if expected.contains_key(&key) {
            let (found, expected) = (samples(gradient, 120), &expected[&key]);
            let near_kinks = dtype == DType::F32 && calm.is_none();
            let apart = if near_kinks { norm_distance(&found, expected) } else { distance(&found, expected) };
            // Nearly all taps of the pyramid's dilated kernels lie outside these small maps: a dozen samples differ
            // from 0, and one flip is a large share of them. The whole gradient's norm and product are held below.
            let few = near_kinks && p.name == "decoder.aspp.2.conv_dw.weight";
            let allowed = if few { 0.6 } else { bound.gradients };
            assert!(apart <= allowed, "{case} {dtype:?}, {key}: {apart:.3e} from PyTorch, allowed {allowed:.0e}");
            if few {
                continue;
            }
            worst = worst.max(apart);
        }
    }
    near("buffer_products", &buffers, bound.train);
    // Every gradient by itself: a wrong one may be small beside the largest. The fixed direction has elements of mean
    // square 1/3, so its product with a gradient is measured by that gradient's norm.
    let (all_norms, all_products) = (&expected["gradient_norms"], &expected["gradient_products"]);
    assert_eq!((norms.len(), products.len()), (all_norms.len(), all_products.len()));
    let largest = all_norms.iter().copied().fold(0.0, f64::max);
    let names = store.named().into_iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.name);
    for (i, name) in names.enumerate() {
        let norm = all_norms[i];
        if norm < 1e-12 * largest {
            // A shift that the next normalisation takes away again: its gradient is zero but for rounding.
            assert!(norms[i] <= bound.zero * largest, "{case} {dtype:?}, {name}: {:.3e}, expected 0", norms[i]);
            continue;
        }
        let apart =
            (norms[i] - norm).abs().max((products[i] - all_products[i]).abs()) / norm.max(bound.floor * largest);
        assert!(apart <= bound.gradients, "{case} {dtype:?}, {name}: {apart:.3e} from PyTorch, norm {norm:.3e}");
        worst = worst.max(apart);
    }
    println!("{case} {dtype:?}: logits {eval:.1e} (eval) {train:.1e} (train), gradients {worst:.1e}");
}

#[test]
fn resnet18_at_output_stride_8() {
    let case = Case {
        name: "resnet18_os8",
        encoder: "resnet18",
        width: 0.5,
        output_stride: 8,
        shape: [3, 3, 64, 96],
        images: "images",
        calm: None,
        f32_gradients: 2e-2,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn resnet34_of_a_quarter_width() {
    let case = Case {
        name: "resnet34_quarter",
        encoder: "resnet34",
        width: 0.25,
        output_stride: 16,
        shape: [3, 3, 65, 97],
        images: "images",
        calm: None,
        f32_gradients: 2e-4,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn resnet34_in_full() {
    let case = Case {
        name: "resnet34_full",
        encoder: "resnet34",
        width: 1.0,
        output_stride: 16,
        shape: [3, 3, 65, 97],
        images: "images",
        calm: None,
        f32_gradients: 5e-2,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn resnet34_far_from_kinks() {
    let case = Case {
        name: "resnet34_calm",
        encoder: "resnet34",
        width: 0.25,
        output_stride: 16,
        shape: [4, 3, 33, 49],
        images: "images/2",
        calm: Some(0.3),
        f32_gradients: 1e-3,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn resnet34_in_full_far_from_kinks() {
    let case = Case {
        name: "resnet34_full_calm",
        encoder: "resnet34",
        width: 1.0,
        output_stride: 16,
        shape: [8, 3, 33, 49],
        images: "images/2",
        calm: Some(0.3),
        f32_gradients: 1e-3,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn xception65_of_a_quarter_width() {
    let case = Case {
        name: "xception65_quarter",
        encoder: "xception65",
        width: 0.25,
        output_stride: 16,
        shape: [3, 3, 64, 90],
        images: "images",
        calm: None,
        f32_gradients: 9e-2,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn xception65_at_output_stride_8() {
    let case = Case {
        name: "xception65_os8",
        encoder: "xception65",
        width: 0.125,
        output_stride: 8,
        shape: [3, 3, 65, 97],
        images: "images",
        calm: None,
        f32_gradients: 9e-2,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn xception65_in_full() {
    let case = Case {
        name: "xception65_full",
        encoder: "xception65",
        width: 1.0,
        output_stride: 16,
        shape: [3, 3, 65, 97],
        images: "images",
        calm: None,
        f32_gradients: 9e-2,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}

#[test]
fn xception65_far_from_kinks() {
    let case = Case {
        name: "xception65_calm",
        encoder: "xception65",
        width: 0.125,
        output_stride: 16,
        shape: [4, 3, 33, 49],
        images: "images/0",
        calm: Some(0.1),
        f32_gradients: 1e-3,
    };
    check(case, DType::F64);
    check(case, DType::F32);
}
