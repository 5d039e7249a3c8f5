//! The Gaussian error linear unit, exact.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};

use crate::cpu::{check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
use crate::error::Result;
use crate::graph;
use crate::math::Transcendental;
use crate::planes::CHUNK;

const NAME: &str = "gelu";

/// `x * Phi(x)`, `Phi(x) = (1 + erf(x / sqrt 2)) / 2` being the normal distribution function; NaN stays NaN.
///
/// # Shapes
/// Any shape, f32 or f64; returns the same.
/// # Gradient
/// `Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi)`.
/// # Errors
/// `Config` for another element type or a device without kernels.
/// # Source
/// Hendrycks and Gimpel 2016; PyTorch `torch.nn.functional.gelu(approximate="none")`. In f32 the distribution function is
/// a polynomial near 0 and beyond it formula 7.1.26 of Abramowitz and Stegun 1964, together within 1.2e-7.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let y = segdistill_ops::gelu(&Tensor::new(&[0f64, 1.0, -40.0], &Device::Cpu)?)?.to_vec1::<f64>()?;
/// assert!(y[0] == 0.0 && (y[1] - 0.841_344_746_068_542_9).abs() < 1e-15 && y[2] == 0.0);
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    check_float(NAME, &[x])?;
    if !x.device().is_cpu() {
        // candle's own, erf and gradient, is right there.
        return Ok(x.gelu_erf()?);
    }
    Ok(graph::apply1(&x.contiguous()?, Gelu)?)
}

/// The normal distribution.
trait Normal: Transcendental {
    /// Distribution function and density.
    fn normal(self) -> (Self, Self);
}

impl Normal for f64 {
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let phi = 0.5 * candle_core::cpu::erf::erfc_f64(-self * std::f64::consts::FRAC_1_SQRT_2);
        (phi, (-0.5 * self * self).exp() * DENSITY)
    }
}

/// `1 / sqrt(2 pi)`
const DENSITY: f64 = 0.398_942_280_401_432_7;

impl Normal for f32 {
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        // erfc z = t (a1 + t (a2 + ..)) e^(-z^2), t = 1 / (1 + p z), z = |x| / sqrt 2.
        const A: [f32; 5] = [0.254_829_6, -0.284_496_72, 1.421_413_8, -1.453_152_1, 1.061_405_4];
        // Near 0, Phi(x) = 1/2 + x q(x^2), q the polynomial through Chebyshev's points of [0, 1.75], within 3e-8 of it.
        const Q: [f32; 6] =
            [0.398_942_26, -0.066_490_11, 0.009_971_7, -0.001_182_704_3, 0.000_110_157_48, -0.000_006_571_288];
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.327_591_1 * z);
        let tail = ((((A[4] * t + A[3]) * t + A[2]) * t + A[1]) * t + A[0]) * t;
        let u = self * self;
        let e = Transcendental::exp(-0.5 * u);
        let upper = 0.5 * tail * e;
        let far = if self < 0.0 { upper } else { 1.0 - upper };
        let near = 0.5 + self * (((((Q[5] * u + Q[4]) * u + Q[3]) * u + Q[2]) * u + Q[1]) * u + Q[0]);
        (if u < 1.75 { near } else { far }, e * DENSITY as f32)
    }
}

struct Gelu;

impl Gelu {
    fn forward<T: Normal>(x: &[T]) -> Vec<T> {
        par_chunks(x.len(), CHUNK, |i, out| {
            vectorised(|| {
                for (out, &x) in out.iter_mut().zip(&x[i * CHUNK..]) {
                    *out = x * x.normal().0;
                }
            });
        })
    }

    fn backward<T: Normal>(x: &[T], grad: &[T]) -> Vec<T> {
        par_chunks(x.len(), CHUNK, |i, out| {
            let range = i * CHUNK..;
            vectorised(|| {
                for ((out, &x), &g) in out.iter_mut().zip(&x[range.clone()]).zip(&grad[range]) {
                    let (phi, density) = x.normal();
                    *out = g * (phi + x * density);
                }
            });
        })
    }
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let out = Self::forward(slice_of::<T>(NAME, x, layout)?);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => {
            let out = with_slice::<T, _>(NAME, x, |x| {
                with_slice::<T, _>(NAME, &grad, |g| Ok(Self::backward(x, g)))
            })?;
            Ok(Some(Tensor::from_vec(out, grad.shape(), grad.device())?))
        })
    }
}
