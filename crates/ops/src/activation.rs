//! Rectifiers with PyTorch's gradient at the kinks.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::Result;
use crate::graph;
use crate::planes::CHUNK;

/// `max(x, 0)`, element by element; NaN stays NaN.
///
/// # Shapes
/// Any shape, f32 or f64; returns the same.
/// # Gradient
/// 1 where `x > 0`, else 0: at exactly 0 it is 0, as in PyTorch (candle's own gives 1).
/// # Errors
/// `Config` for another element type or a device without kernels.
/// # Source
/// PyTorch `torch.nn.functional.relu`.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> segdistill_ops::Result<()> {
/// let y = segdistill_ops::relu(&Tensor::new(&[-1.0f32, 0.0, 2.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
/// # Ok(())
/// # }
/// ```
pub fn relu(x: &Tensor) -> Result<Tensor> {
    rectify(x, Rectifier { name: "relu", ceiling: None })
}

/// `min(max(x, 0), 6)`, element by element; NaN stays NaN.
///
/// # Shapes
/// Any shape, f32 or f64; returns the same.
/// # Gradient
/// 1 where `0 < x < 6`, else 0: at exactly 0 and 6 it is 0, as in PyTorch.
/// # Errors
/// `Config` for another element type or a device without kernels.
/// # Source
/// PyTorch `torch.nn.functional.relu6`.
pub fn relu6(x: &Tensor) -> Result<Tensor> {
    rectify(x, Rectifier { name: "relu6", ceiling: Some(6.0) })
}

fn rectify(x: &Tensor, op: Rectifier) -> Result<Tensor> {
    check_float(op.name, &[x])?;
    Ok(graph::apply1(&x.contiguous()?, op)?)
}

struct Rectifier {
    name: &'static str,
    ceiling: Option<f64>,
}

impl Rectifier {
    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let ceiling = T::from_f64(self.ceiling.unwrap_or(f64::INFINITY));
        par_chunks(x.len(), CHUNK, |i, out| {
            vectorised(|| {
                // Comparisons with NaN are false, so that NaN takes the last branch and passes.
                for (out, &x) in out.iter_mut().zip(&x[i * CHUNK..]) {
                    let floored = if x <= T::ZERO { T::ZERO } else { x };
                    *out = if floored >= ceiling { ceiling } else { floored };
                }
            });
        })
    }

    /// From the result alone: it lies on a bound exactly where the input lies on or beyond it.
    fn backward<T: Element>(&self, result: &[T], grad: &[T]) -> Vec<T> {
        // For relu even an infinite result keeps its gradient.
        let ceiling = T::from_f64(self.ceiling.unwrap_or(f64::NAN));
        par_chunks(grad.len(), CHUNK, |i, out| {
            let range = i * CHUNK..;
            vectorised(|| {
                for ((out, &y), &g) in out.iter_mut().zip(&result[range.clone()]).zip(&grad[range]) {
                    *out = if (y <= T::ZERO) | (y >= ceiling) { T::ZERO } else { g };
                }
            });
        })
    }
}

impl CustomOp1 for Rectifier {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(self.name, x.dtype(), T => {
            let out = self.forward(slice_of::<T>(self.name, x, layout)?);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let ceiling = self.ceiling.unwrap_or(f64::INFINITY);
        let out = for_float!(self.name, x.dtype(), T => cuda::rectify::<T>(self.name, x, layout, ceiling))?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let ceiling = self.ceiling.unwrap_or(f64::NAN);
            let out = for_float!(self.name, grad.dtype(), T => {
                cuda::rectify_grad::<T>(self.name, result, &grad, ceiling)
            });
            return out.map(Some);
        }
        for_float!(self.name, grad.dtype(), T => {
            let out = with_slice::<T, _>(self.name, result, |y| {
                with_slice::<T, _>(self.name, &grad, |g| Ok(self.backward(y, g)))
            })?;
            Ok(Some(Tensor::from_vec(out, grad.shape(), grad.device())?))
        })
    }
}
