//! The losses where their logits are on another device: value and gradient are the CPU's.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{map, random_mask, value_and_grad};
use segdistill_losses::{CrossEntropy, Csc, cross_entropy, csc};
use segdistill_ops::testing::{devices, random_f64, relative_error};

const SHAPE: [usize; 4] = [2, 5, 37, 41];

/// Logits whose void pixels hold NaN, and the map of the others.
fn logits(name: &str, valid: &Tensor, dtype: DType) -> Tensor {
    let [n, c, h, w] = SHAPE;
    let counted = valid.unsqueeze(1).unwrap().broadcast_as((n, c, h, w)).unwrap();
    let nan = Tensor::full(f64::NAN, &SHAPE, &Device::Cpu).unwrap();
    let values = (random_f64(1, name, &SHAPE) * 7.0).unwrap();
    counted.where_cond(&values, &nan).unwrap().to_dtype(dtype).unwrap()
}

/// Compares `loss` on every device with the CPU.
fn compare(dtype: DType, logits: &Tensor, loss: impl Fn(&Tensor) -> segdistill_losses::Result<Tensor>) {
    let (expected, expected_grad) = value_and_grad(logits, 3.0, &loss);
    assert!(expected.is_finite() && expected != 0.0);
    for device in devices() {
        let (found, grad) = value_and_grad(&logits.to_device(&device).unwrap(), 3.0, &loss);
        assert!(grad.device().same_device(&device), "the gradient is where the logits are");
        let allowed = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
        assert!((found - expected).abs() <= allowed * expected.abs(), "{found} on {device:?}, {expected} on the CPU");
        let error = relative_error(&grad, &expected_grad).unwrap();
        assert!(error <= allowed, "gradient off by {error:.1e} on {device:?}");
    }
}

#[test]
fn cross_entropy_is_the_same_on_every_device() {
    let [n, c, h, w] = SHAPE;
    let valid = random_mask(5, n, h, w, 0.7);
    let labels = map(n, h, w, |i, y, x| ((i + 3 * y + x) % c) as u8);
    let weights = || Some(vec![1.0, 0.0, 2.0, 0.5, 3.0]);
    for (class_weights, label_smoothing) in [(None, 0.0), (weights(), 0.0), (weights(), 0.1)] {
        let cfg = CrossEntropy { class_weights, label_smoothing };
        for dtype in [DType::F64, DType::F32] {
            compare(dtype, &logits("student", &valid, dtype), |z| cross_entropy(z, &labels, &valid, &cfg));
        }
    }
}

#[test]
fn cross_entropy_of_nothing_is_0_on_every_device() {
    let [n, _, h, w] = SHAPE;
    let valid = map(n, h, w, |_, _, _| 0);
    for device in devices() {
        let logits = logits("student", &valid, DType::F32).to_device(&device).unwrap();
        let loss = |z: &Tensor| cross_entropy(z, &valid, &valid, &CrossEntropy::default());
        let (value, grad) = value_and_grad(&logits, 1.0, loss);
        assert_eq!(value, 0.0);
        assert!(common::elements(&grad).iter().all(|g| *g == 0.0));
    }
}

#[test]
fn csc_is_the_same_on_every_device() {
    let [n, _, h, w] = SHAPE;
    let valid = random_mask(6, n, h, w, 0.7);
    for dtype in [DType::F64, DType::F32] {
        let teacher = logits("teacher", &valid, dtype);
        compare(dtype, &logits("student", &valid, dtype), |z| {
            csc(z, &teacher.to_device(z.device())?, &valid, &Csc::default())
        });
    }
}
