//! What the tests of every crate compare with: one tolerance rule and one finite-difference check.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor, Var};

use crate::device::open_cuda;
use crate::error::{OpsError, Result};

/// Devices that a test's body runs on: the CPU, and in a build with feature `cuda` the first CUDA device.
///
/// Where such a build finds none, that is said on standard error, once a process, past the test harness.
pub fn devices() -> Vec<Device> {
    static CUDA: OnceLock<Option<Device>> = OnceLock::new();
    let cuda = CUDA.get_or_init(|| {
        if !cfg!(feature = "cuda") {
            return None;
        }
        let device = open_cuda(0);
        let line = match &device {
            Ok(_) => "tests run on the CPU and on cuda:0".to_string(),
            Err(why) => format!("skipped on cuda:0, run on the CPU alone: {why}"),
        };
        // Unlike `eprintln`, this reaches the terminal of a test that passes.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
        device.ok()
    });
    std::iter::once(Device::Cpu).chain(cuda.clone()).collect()
}

/// [`devices`] that have convolutions: of CUDA only in a build with feature `cudnn`.
pub fn devices_with_convolution() -> Vec<Device> {
    devices().into_iter().filter(|device| device.is_cpu() || cfg!(feature = "cudnn")).collect()
}

/// Panics unless `|found - expected| <= tolerance * max(1, |expected|)` for every element.
///
/// `reason` says where the tolerance comes from.
///
/// # Panics
/// On the first element outside the tolerance, or when the shapes differ.
pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, reason: &str) {
    assert_eq!(found.dims(), expected.dims(), "shapes");
    let values = |t: &Tensor| {
        let t = t.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.flatten_all());
        t.and_then(|t| t.to_vec1::<f64>()).expect("readable tensor")
    };
    for (i, (f, e)) in values(found).iter().zip(values(expected)).enumerate() {
        let bound = tolerance * e.abs().max(1.0);
        assert!((f - e).abs() <= bound, "element {i}: found {f}, expected {e}, allowed {bound:.3e} ({reason})");
    }
}

/// Relative distance `max |found - expected| / max |expected|`, computed in f64 on the host.
///
/// # Shapes
/// Both of one shape, any; of empty tensors the distance is 0. With `expected` all 0 the distance is 0 if `found` is,
/// else at least `max |found| / 2.2e-308`.
/// # Gradient
/// None.
/// # Errors
/// `Shape` when the shapes differ; `Candle` when a tensor cannot be read. A NaN or infinity in either tensor is no
/// error: the distance is infinite then, and no bound holds.
pub fn relative_error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    if found.dims() != expected.dims() {
        return Err(OpsError::shape(
            "relative_error",
            format!("{:?}", found.dims()),
            format!("{:?}", expected.dims()),
            "compare tensors of one shape",
        ));
    }
    // On the host: candle's maximum passes over NaN.
    let values = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (found, expected) = (values(found)?, values(expected)?);
    if found.iter().chain(&expected).any(|v| !v.is_finite()) {
        return Ok(f64::INFINITY);
    }
    let distance = found.iter().zip(&expected).fold(0.0, |most: f64, (f, e)| most.max((f - e).abs()));
    let size = expected.iter().fold(f64::MIN_POSITIVE, |most, e| most.max(e.abs()));
    Ok(distance / size)
}

/// A tensor of f64 values from a seeded stream, uniform in [-1, 1).
pub fn random_f64(seed: u64, name: &str, shape: &[usize]) -> Tensor {
    let mut stream = crate::rng::Stream::new(seed, name, &[]);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| stream.uniform(-1.0, 1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("shape holds the values")
}

/// Checks the gradient of `sum(weight * f(inputs))` against central differences in f64, for every input.
///
/// `weight` is a fixed random tensor of the output's shape, so that no gradient error can cancel in a plain sum.
/// At most `max_probes` elements of each input are probed, spread over it, each moved by `1e-5` to either side.
///
/// # Shapes
/// `inputs` of any shapes, f64, on one device; `f` gives one f64 tensor of any shape there.
/// # Gradient
/// None of its own.
/// # Errors
/// What `f` refuses; `Candle` when an input is not f64.
/// # Panics
/// When a gradient is absent or off by more than `tolerance * max(1, |expected|)`.
/// # Example
/// ```
/// use segdistill_ops::testing::{check_gradient, random_f64};
/// let x = random_f64(0, "x", &[2, 3]);
/// check_gradient(&[x], |inputs| Ok(inputs[0].sqr()?), 6, 1e-8)?;
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn check_gradient(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    max_probes: usize,
    tolerance: f64,
) -> Result<()> {
    let step = 1e-5;
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<std::result::Result<_, _>>()?;
    let leaves: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&leaves)?;
    let weight = random_f64(17, "check_gradient", out.dims()).to_device(out.device())?;
    let grads = (&out * &weight)?.sum_all()?.backward()?;
    let loss = |tensors: &[Tensor]| -> Result<f64> { Ok((f(tensors)? * &weight)?.sum_all()?.to_scalar::<f64>()?) };
    for (i, input) in inputs.iter().enumerate() {
        let grad = grads.get(&leaves[i]).unwrap_or_else(|| panic!("input {i} got no gradient"));
        assert_eq!(grad.dims(), input.dims(), "gradient shape of input {i}");
        let grad = grad.flatten_all()?.to_vec1::<f64>()?;
        let values = input.flatten_all()?.to_vec1::<f64>()?;
        let stride = values.len().div_ceil(max_probes).max(1);
        for k in (0..values.len()).step_by(stride) {
            let shifted = |by: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[k] += by;
                let mut tensors: Vec<Tensor> = inputs.to_vec();
                tensors[i] = Tensor::from_vec(moved, input.dims(), input.device())?;
                loss(&tensors)
            };
            let expected = (shifted(step)? - shifted(-step)?) / (2.0 * step);
            assert!(
                (grad[k] - expected).abs() <= tolerance * expected.abs().max(1.0),
                "input {i}, element {k}: gradient {}, central difference {expected}",
                grad[k]
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(found: &[f64], expected: &[f64]) -> f64 {
        let tensor = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
        relative_error(&tensor(found), &tensor(expected)).unwrap()
    }

    #[test]
    fn the_relative_error_is_the_largest_distance_over_the_largest_size() {
        assert_eq!(error(&[1.0, -3.0, 4.0], &[1.0, -4.0, 4.5]), 1.0 / 4.5);
        assert_eq!(error(&[0.0, 0.0], &[0.0, 0.0]), 0.0);
        assert!(error(&[0.0, 1e-9], &[0.0, 0.0]) > 1e200);
        let narrow = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let wide = Tensor::new(&[1f64, 4.0], &Device::Cpu).unwrap();
        assert_eq!(relative_error(&narrow, &wide).unwrap(), 0.5);
        assert!(matches!(relative_error(&narrow, &wide.get(0).unwrap()), Err(OpsError::Shape { .. })));
    }

    #[test]
    fn the_relative_error_sees_what_is_not_finite() {
        // At the start, in the middle and at the end: a maximum that skips NaN sees it in one of them at most.
        for place in 0..3 {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut values = [1.0, 2.0, 3.0];
                values[place] = bad;
                assert_eq!(error(&values, &[1.0, 2.0, 3.0]), f64::INFINITY, "{bad} found at {place}");
                assert_eq!(error(&[1.0, 2.0, 3.0], &values), f64::INFINITY, "{bad} expected at {place}");
                assert_eq!(error(&values, &values), f64::INFINITY, "{bad} in both");
            }
        }
    }
}
