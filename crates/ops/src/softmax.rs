//! Log-softmax over channels.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, slice_of, vectorised, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::Result;
use crate::graph;
use crate::math::Transcendental;
use crate::planes::{dims_nchw, pixel_runs};

const NAME: &str = "log_softmax";
/// Pixels of a task: a few hundred channels of them stay in a level 2 cache.
const PIXELS: usize = 512;

/// `y_c = x_c - m - ln sum_k exp(x_k - m)` per pixel, with `m = max_k x_k` over channels: no logits overflow.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, h, w]`, in nats
/// # Gradient
/// `dx_c = g_c - exp(y_c) * sum_k g_k`.
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for another element type or a device without kernels.
/// # Source
/// PyTorch `torch.nn.functional.log_softmax(x, dim=1)`.
pub fn log_softmax(x_nchw: &Tensor) -> Result<Tensor> {
    check_float(NAME, &[x_nchw])?;
    let [n, c, h, w] = dims_nchw(NAME, x_nchw)?;
    Ok(graph::apply1(&x_nchw.contiguous()?, LogSoftmax { n, c, hw: h * w })?)
}

struct LogSoftmax {
    n: usize,
    c: usize,
    hw: usize,
}

impl LogSoftmax {
    /// Runs `fill(offset of the block in channel 0, channels of the block)` over blocks of pixels.
    fn blocks<T: Element>(&self, fill: impl Fn(usize, &mut [&mut [T]]) + Sync) -> Vec<T> {
        let task = |image, start, channels: &mut [&mut [T]]| fill(image * self.c * self.hw + start, channels);
        pixel_runs([self.n, self.c, self.hw], PIXELS, task).0
    }

    fn forward<T: Transcendental>(&self, x: &[T]) -> Vec<T> {
        self.blocks(|start, out| {
            let pixels = out[0].len();
            let channel = |c: usize| &x[start + c * self.hw..][..pixels];
            vectorised(|| {
                let mut top = channel(0).to_vec();
                for c in 1..self.c {
                    for (top, &x) in top.iter_mut().zip(channel(c)) {
                        *top = if x > *top { x } else { *top };
                    }
                }
                let mut total = vec![T::ZERO; pixels];
                for c in 0..self.c {
                    for ((total, &top), &x) in total.iter_mut().zip(&top).zip(channel(c)) {
                        *total += (x - top).exp();
                    }
                }
                for total in &mut total {
                    *total = total.ln();
                }
                for c in 0..self.c {
                    for (((out, &x), &top), &total) in out[c].iter_mut().zip(channel(c)).zip(&top).zip(&total) {
                        // Subtracted one after the other: their sum could round away a small logarithm.
                        *out = (x - top) - total;
                    }
                }
            });
        })
    }

    fn backward<T: Transcendental>(&self, result: &[T], grad: &[T]) -> Vec<T> {
        self.blocks(|start, out| {
            let pixels = out[0].len();
            vectorised(|| {
                let mut total = vec![T::ZERO; pixels];
                for c in 0..self.c {
                    for (total, &g) in total.iter_mut().zip(&grad[start + c * self.hw..]) {
                        *total += g;
                    }
                }
                for c in 0..self.c {
                    let at = start + c * self.hw;
                    for (((out, &y), &g), &total) in out[c].iter_mut().zip(&result[at..]).zip(&grad[at..]).zip(&total) {
                        *out = g - y.exp() * total;
                    }
                }
            });
        })
    }
}

impl CustomOp1 for LogSoftmax {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let out = self.forward(slice_of::<T>(NAME, x, layout)?);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let sizes = [self.n, self.c, self.hw];
        let out = for_float!(NAME, x.dtype(), T => cuda::log_softmax::<T>(NAME, x, layout, sizes))?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let sizes = [self.n, self.c, self.hw];
            let out = for_float!(NAME, grad.dtype(), T => cuda::log_softmax_grad::<T>(NAME, result, &grad, sizes));
            return out.map(Some);
        }
        for_float!(NAME, grad.dtype(), T => {
            let out = with_slice::<T, _>(NAME, result, |y| {
                with_slice::<T, _>(NAME, &grad, |g| Ok(self.backward(y, g)))
            })?;
            Ok(Some(Tensor::from_vec(out, grad.shape(), grad.device())?))
        })
    }
}
