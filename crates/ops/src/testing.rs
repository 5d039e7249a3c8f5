//! What the tests of every crate compare with: one tolerance rule and one finite-difference check.

use candle_core::{DType, Device, Tensor, Var};

use crate::error::Result;

/// Panics unless `|found - expected| <= tolerance * max(1, |expected|)` for every element.
///
/// `reason` says where the tolerance comes from.
///
/// # Panics
/// On the first element outside the tolerance, or when the shapes differ.
pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, reason: &str) {
    assert_eq!(found.dims(), expected.dims(), "shapes");
    let values = |t: &Tensor| {
        t.to_dtype(DType::F64).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1::<f64>()).expect("readable tensor")
    };
    for (i, (f, e)) in values(found).iter().zip(values(expected)).enumerate() {
        let bound = tolerance * e.abs().max(1.0);
        assert!((f - e).abs() <= bound, "element {i}: found {f}, expected {e}, allowed {bound:.3e} ({reason})");
    }
}

/// Relative distance `max |a - b| / max |b|`.
pub fn relative_error(found: &Tensor, expected: &Tensor) -> Result<f64> {
    let (found, expected) = (found.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    let distance = (found - &expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    let size = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    Ok(distance / size.max(f64::MIN_POSITIVE))
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
/// At most `max_probes` elements of each input are probed, spread over it.
///
/// # Panics
/// When a gradient is absent or off by more than `tolerance * max(1, |expected|)`.
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
    let weight = random_f64(17, "check_gradient", out.dims());
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
                tensors[i] = Tensor::from_vec(moved, input.dims(), &Device::Cpu)?;
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
