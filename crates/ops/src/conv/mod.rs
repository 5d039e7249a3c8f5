//! Two-dimensional convolution with exact gradients for every size.
//!
//! `dense` multiplies packed strips of pixels, `depthwise` works on planes; both are tasks on rayon whose number and
//! order depend on the shapes alone, so the bits do not depend on the threads. What does not live here: transposed and
//! one-dimensional convolution, and any weight.

mod dense;
mod depthwise;
mod geometry;
mod pack;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{self, Element, check_cpu_float, for_float, slice_of, with_slice};
use crate::error::Result;
use geometry::Geometry;

const OP: &str = "conv2d";

/// Geometry of a convolution; per axis `[height, width]`, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dConfig {
    /// Step of the output grid.
    pub stride: [usize; 2],
    /// Zeros added on both sides.
    pub padding: [usize; 2],
    /// Distance between kernel taps.
    pub dilation: [usize; 2],
    /// Number of channel groups; equal to the input channels for a depthwise convolution.
    pub groups: usize,
}

impl Default for Conv2dConfig {
    fn default() -> Self {
        Self { stride: [1, 1], padding: [0, 0], dilation: [1, 1], groups: 1 }
    }
}

impl Conv2dConfig {
    /// Output height and width for input `[h, w]` and kernel `[kh, kw]`: `(h + 2 p - d (k - 1) - 1) / s + 1`, floored.
    ///
    /// `None` when the dilated kernel is larger than the padded input, a stride is 0 or the kernel is empty.
    pub fn output_hw(&self, hw: [usize; 2], kernel: [usize; 2]) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let span = self.dilation[i].checked_mul(kernel[i].checked_sub(1)?)?.checked_add(1)?;
            let padded = self.padding[i].checked_mul(2)?.checked_add(hw[i])?;
            padded.checked_sub(span)?.checked_div(self.stride[i])?.checked_add(1)
        };
        Some([side(0)?, side(1)?])
    }
}

/// Convolution (cross-correlation, as every framework calls it) of maps with a kernel.
///
/// `out[n, o, y, x] = bias[o] +
/// sum_{i, a, b} weight[o, i, a, b] * in[n, g c + i, s_h y - p_h + d_h a, s_w x - p_w + d_w b]`
/// with `c = c_in / groups`, `g = o / (c_out / groups)`, and zeros outside the map.
///
/// # Shapes
/// - `x_nchw`: `[n, c_in, h, w]`; `weight`: `[c_out, c_in / groups, kh, kw]`; `bias`: `[c_out]`; f32 or f64, any
///   strides
/// - returns `[n, c_out, oh, ow]`, `[oh, ow]` being [`Conv2dConfig::output_hw`]
/// # Gradient
/// Exact for every size, stride, dilation and group count. Arguments that no variable stands behind get none, and cost
/// none: the gradient of the image batch or of a frozen weight is not computed.
/// # Errors
/// `Shape` when channels, groups, kernel or bias do not fit the input; `Config` for a stride, dilation or group count
/// of 0, a type other than f32 and f64, or a tensor that is not on the CPU.
/// # Source
/// Dumoulin and Visin 2016 (sizes); the strips are the implicit GEMM of Chetlur et al. 2014 (cuDNN).
pub fn conv2d(x_nchw: &Tensor, weight: &Tensor, bias: Option<&Tensor>, cfg: Conv2dConfig) -> Result<Tensor> {
    let geometry = Geometry::new(x_nchw, weight, bias, cfg)?;
    let op = Convolution { geometry };
    let (x, weight) = (x_nchw.contiguous()?, weight.contiguous()?);
    match bias {
        None => {
            check_cpu_float(OP, &[&x, &weight])?;
            Ok(x.apply_op2(&weight, op)?)
        }
        Some(bias) => {
            check_cpu_float(OP, &[&x, &weight, bias])?;
            Ok(x.apply_op3(&weight, &bias.contiguous()?, op)?)
        }
    }
}

struct Convolution {
    geometry: Geometry,
}

impl Convolution {
    fn forward(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let g = &self.geometry;
        let out = for_float!(OP, x.dtype(), T => {
            let (x, w) = (slice_of::<T>(OP, x, lx)?, slice_of::<T>(OP, w, lw)?);
            let bias = bias.map(|(b, lb)| slice_of::<T>(OP, b, lb)).transpose()?;
            let y = if g.is_depthwise() { depthwise::forward(g, x, w, bias) } else { dense::forward(g, x, w, bias) };
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((out, Shape::from_dims(&g.output_shape())))
    }

    /// Gradients of input and weight, each only where a variable stands behind it.
    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let g = &self.geometry;
        for_float!(OP, x.dtype(), T => with_slice::<T, _>(OP, grad, |dy| {
            let dx = if x.track_op() {
                let dx = with_slice::<T, _>(OP, w, |w| {
                    Ok(if g.is_depthwise() { depthwise::input_grad(g, dy, w) } else { dense::input_grad(g, dy, w) })
                })?;
                Some(Tensor::from_vec(dx, x.shape(), x.device())?)
            } else {
                None
            };
            let dw = if w.track_op() {
                let dw = with_slice::<T, _>(OP, x, |x| {
                    Ok(if g.is_depthwise() { depthwise::weight_grad(g, dy, x) } else { dense::weight_grad(g, dy, x) })
                })?;
                Some(Tensor::from_vec(dw, w.shape(), w.device())?)
            } else {
                None
            };
            Ok((dx, dw))
        }))
    }
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, lx), (w, lw), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, w, &grad.contiguous()?)
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((x, lx), (w, lw), Some((b, lb)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw) = self.backward(x, w, &grad)?;
        let db = if b.track_op() {
            let db = for_float!(OP, grad.dtype(), T => with_slice::<T, _>(OP, &grad, |dy| {
                Tensor::from_vec(channel_sums(&self.geometry, dy), b.shape(), b.device())
            }))?;
            Some(db)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

/// `db[o] = sum_{n, y, x} dy[n, o, y, x]`: 16 running sums within a block of pixels, f64 across blocks.
fn channel_sums<T: Element>(g: &Geometry, dy: &[T]) -> Vec<T> {
    const BLOCK: usize = 4096;
    let m = g.oh * g.ow;
    let mut sums = vec![T::ZERO; g.c_out];
    sums.par_iter_mut().enumerate().for_each(|(o, sum)| {
        cpu::vectorised(
            #[inline(always)]
            || {
                let mut total = 0.0;
                for i in 0..g.n {
                    for block in dy[(i * g.c_out + o) * m..][..m].chunks(BLOCK) {
                        let mut lanes = [T::ZERO; 16];
                        let chunks = block.chunks_exact(16);
                        for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
                            *lane += v;
                        }
                        for chunk in chunks {
                            for (lane, &v) in lanes.iter_mut().zip(chunk) {
                                *lane += v;
                            }
                        }
                        total += lanes.iter().map(|v| v.to_f64()).sum::<f64>();
                    }
                }
                *sum = T::from_f64(total);
            },
        );
    });
    sums
}
