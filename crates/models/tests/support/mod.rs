//! What the tests of this crate share: the formula that fills weights and images on both sides, and a built network.

#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use segdistill_models::{ModelSpec, Segmenter, build};
use segdistill_ops::ParamStore;

/// Uniform in [-1, 1) on 24 bits: splitmix64 of the element number, started at the FNV-1a hash of the name; the twin of
/// `fill` in `fixtures/make_deeplab.py`.
pub(crate) fn fill(name: &str, shape: &[usize]) -> Vec<f64> {
    let hash = |h: u64, byte: u8| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
    let value = |k: u64| {
        let z = start.wrapping_add(k.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0
    };
    (1..=shape.iter().product::<usize>() as u64).map(value).collect()
}

/// The value of a tensor by its name and shape, with `calm` far from every ReLU's kink; the twin of `filled` in
/// `fixtures/make_deeplab.py`.
pub(crate) fn filled(name: &str, shape: &[usize], calm: Option<f64>) -> Vec<f64> {
    let mut values = fill(name, shape);
    if let (Some(scale), [_]) = (calm, shape) {
        if name.ends_with("weight") {
            values.iter_mut().for_each(|v| *v = scale * (1.0 + 0.1 * *v));
            return values;
        }
        if name.ends_with("bias") && name != "decoder.classifier.bias" {
            values.iter_mut().for_each(|v| *v = 0.5 * v.signum() + 0.5 * *v);
            return values;
        }
    }
    let (shift, gain) = match name {
        _ if name.ends_with("running_mean") => (0.0, 0.1),
        _ if name.ends_with("running_var") => (1.0, 0.3),
        _ if shape.len() == 1 && name.ends_with("weight") => (1.0, 0.1),
        _ if shape.len() == 1 => (0.0, 0.1),
        _ => (0.0, (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt()),
    };
    values.iter_mut().for_each(|v| *v = shift + gain * *v);
    values
}

/// RGB images in [0, 1) from the formula.
pub(crate) fn images(name: &str, shape: &[usize], dtype: DType) -> Tensor {
    let values = fill(name, shape).iter().map(|u| (u + 1.0) / 2.0).collect();
    Tensor::from_vec::<_, f64>(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// A network with every tensor from the formula, so that running statistics are not the trivial ones.
pub(crate) fn filled_network(spec: &ModelSpec, dtype: DType, calm: Option<f64>) -> (ParamStore, Box<dyn Segmenter>) {
    let store = ParamStore::trainable(0, dtype, &Device::Cpu);
    let model = build(spec, &store).unwrap();
    for p in store.named() {
        let values = Tensor::from_vec(filled(&p.name, p.tensor.dims(), calm), p.tensor.dims(), &Device::Cpu).unwrap();
        p.var.unwrap().set(&values.to_dtype(dtype).unwrap()).unwrap();
    }
    (store, model)
}

/// All elements in f64.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
