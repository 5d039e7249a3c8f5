//! Two-dimensional convolution with exact gradients for every size.
//!
//! `dense` multiplies packed strips of pixels, `winograd` tiles of them where that takes fewer products (f32, 3x3, stride
//! 1), `depthwise` works on planes; all are tasks on rayon whose number and order depend on the shapes alone, so the bits
//! do not depend on the threads. `transposed` turns a convolution around, on the same kernels. `on_cuda` hands tensors on a
//! GPU to cuDNN. What does not live here: one-dimensional convolution, and any weight.

mod dense;
mod depthwise;
mod geometry;
#[cfg(feature = "cuda")]
mod on_cuda;
mod pack;
mod packed;
mod transposed;
mod winograd;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{self, Element, check_float, for_float, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;
use crate::kernels::Kernels;
use crate::precision::Precision;
use geometry::Geometry;
pub use packed::FusedConv2d;
use packed::Panels;
pub use transposed::{ConvTranspose2dConfig, conv_transpose2d};

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
    /// What the factors of dense convolutions are rounded to.
    pub precision: Precision,
}

impl Default for Conv2dConfig {
    fn default() -> Self {
        Self { stride: [1, 1], padding: [0, 0], dilation: [1, 1], groups: 1, precision: Precision::F32 }
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
/// of 0, a type other than f32 and f64, a device without convolutions (CUDA without feature `cudnn`), bf16 products of
/// f64 tensors or on a processor without instructions for them.
/// # Source
/// Dumoulin and Visin 2016 (sizes); the strips are the implicit GEMM of Chetlur et al. 2014 (cuDNN); the tiles are
/// Winograd's F(2x2, 3x3) as in Lavin and Gray 2016.
pub fn conv2d(x_nchw: &Tensor, weight: &Tensor, bias: Option<&Tensor>, cfg: Conv2dConfig) -> Result<Tensor> {
    let geometry = Geometry::new(x_nchw, weight, bias, cfg)?;
    let op = Convolution { geometry };
    let (x, weight) = (x_nchw.contiguous()?, weight.contiguous()?);
    match bias {
        None => {
            check(OP, &[&x, &weight], cfg.precision)?;
            Ok(graph::apply2(&x, &weight, op)?)
        }
        Some(bias) => {
            check(OP, &[&x, &weight, bias], cfg.precision)?;
            Ok(graph::apply3(&x, &weight, &bias.contiguous()?, op)?)
        }
    }
}

/// `max(conv(x) + bias + residual, 0)`, or without the maximum, in one pass and without a graph: for inference.
///
/// # Shapes
/// As [`conv2d`]; `residual`: that of the result
/// # Gradient
/// None: whatever stands behind the arguments, the result is a plain tensor.
/// # Errors
/// As [`conv2d`]; `Shape` when the residual's shape is not the result's.
/// # Source
/// As [`conv2d`]. With batch normalisation folded into weight and bias this is a whole residual block's end.
pub fn conv2d_fused(
    x_nchw: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual_nchw: Option<&Tensor>,
    relu: bool,
    cfg: Conv2dConfig,
) -> Result<Tensor> {
    fused(x_nchw, weight, bias, residual_nchw, relu, cfg, None)
}

/// [`conv2d_fused`], with the weight's panels when they are kept.
fn fused(
    x_nchw: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    residual_nchw: Option<&Tensor>,
    relu: bool,
    cfg: Conv2dConfig,
    panels: Option<&Panels>,
) -> Result<Tensor> {
    let g = Geometry::new(x_nchw, weight, bias, cfg)?;
    let given: Vec<&Tensor> = [Some(x_nchw), Some(weight), bias, residual_nchw].into_iter().flatten().collect();
    check(OP, &given, cfg.precision)?;
    if let Some(residual) = residual_nchw
        && residual.dims() != g.output_shape()
    {
        return Err(OpsError::shape(
            OP,
            format!("residual {:?}", residual.dims()),
            format!("{:?}", g.output_shape()),
            "the residual is added to the result, element by element",
        ));
    }
    if x_nchw.device().is_cuda() {
        let mut y = conv2d(&x_nchw.detach(), &weight.detach(), bias.map(Tensor::detach).as_ref(), cfg)?;
        if let Some(residual) = residual_nchw {
            y = (y + residual.detach())?;
        }
        return if relu { crate::activation::relu(&y) } else { Ok(y) };
    }
    let contiguous = |t: &Tensor| t.detach().contiguous();
    let (x, weight) = (contiguous(x_nchw)?, contiguous(weight)?);
    let (bias, residual) = (bias.map(contiguous).transpose()?, residual_nchw.map(contiguous).transpose()?);
    /// Calls `f` with the elements of a tensor that may be absent.
    fn with_optional<T: Element, R>(
        tensor: Option<&Tensor>,
        f: impl FnOnce(Option<&[T]>) -> candle_core::Result<R>,
    ) -> candle_core::Result<R> {
        match tensor {
            Some(tensor) => with_slice::<T, _>(OP, tensor, |t| f(Some(t))),
            None => f(None),
        }
    }
    let out = for_float!(OP, x.dtype(), T => with_slice::<T, _>(OP, &x, |x| with_slice::<T, _>(OP, &weight, |w| {
        with_optional(bias.as_ref(), |bias| with_optional(residual.as_ref(), |residual| {
            let y = forward(&g, x, w, Epilogue { bias, residual, relu }, panels);
            Tensor::from_vec(y, &g.output_shape(), x_nchw.device())
        }))
    })))?;
    Ok(out)
}

/// What is done to a sum before it is stored: `act(sum + bias + residual)`.
#[derive(Clone, Copy)]
struct Epilogue<'a, T> {
    /// `[c_out]`
    bias: Option<&'a [T]>,
    /// `[n, c_out, oh, ow]`
    residual: Option<&'a [T]>,
    /// Whether negative results become 0.
    relu: bool,
}

impl<T> Epilogue<'_, T> {
    fn none() -> Self {
        Self { bias: None, residual: None, relu: false }
    }
}

fn forward<T: Kernels>(
    g: &Geometry,
    x: &[T],
    weight: &[T],
    epilogue: Epilogue<'_, T>,
    panels: Option<&Panels>,
) -> Vec<T> {
    match g.is_depthwise() {
        true => depthwise::forward(g, x, weight, epilogue),
        false => dense::forward(g, x, weight, epilogue, panels),
    }
}

/// Refuses tensors that no convolution of this build takes.
fn check(op: &'static str, tensors: &[&Tensor], precision: Precision) -> Result<()> {
    check_float(op, tensors)?;
    if precision == Precision::Bf16 {
        if tensors[0].dtype() != DType::F32 {
            return Err(OpsError::config(
                format!("{op}: bf16 products for {:?}, expected F32", tensors[0].dtype()),
                "bf16 products are summed in f32: use f32 tensors, or precision f32",
            ));
        }
        if tensors[0].device().is_cpu() {
            precision.on_cpu()?;
        }
    }
    if tensors[0].device().is_cuda() && !cfg!(feature = "cudnn") {
        return Err(OpsError::config(
            format!("{op}: no convolution for {:?} in this build", tensors[0].device().location()),
            "CUDA convolutions are cuDNN's: build with --features cuda,cudnn, or use the CPU",
        ));
    }
    Ok(())
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
            Ok(T::to_cpu_storage_owned(forward(g, x, w, Epilogue { bias, ..Epilogue::none() }, None)))
        })?;
        Ok((out, Shape::from_dims(&g.output_shape())))
    }

    /// Gradients of input and weight, each only where a variable stands behind it.
    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            return self.cuda_backward(x, w, grad);
        }
        let g = &self.geometry;
        for_float!(OP, x.dtype(), T => with_slice::<T, _>(OP, grad, |dy| {
            let (dx, dw) = with_slice::<T, _>(OP, x, |x_values| with_slice::<T, _>(OP, w, |w_values| {
                let (for_dw, for_dx) = (w.track_op().then_some(x_values), x.track_op().then_some(w_values));
                Ok(if g.is_depthwise() {
                    depthwise::backward(g, dy, for_dw, for_dx)
                } else {
                    (for_dx.map(|w| dense::input_grad(g, dy, w)), for_dw.map(|x| dense::weight_grad(g, dy, x)))
                })
            }))?;
            let tensor = |values: Option<Vec<T>>, like: &Tensor| {
                values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
            };
            let (dx, dw) = (tensor(dx, x)?, tensor(dw, w)?);
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda_forward((x, lx), (w, lw), None)
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda_forward((x, lx), (w, lw), Some((b, lb)))
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
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let db = b.track_op().then(|| self.cuda_bias_grad(&grad)).transpose()?;
            return Ok((dx, dw, db));
        }
        let db = if b.track_op() {
            let db = for_float!(OP, grad.dtype(), T => with_slice::<T, _>(OP, &grad, |dy| {
                Tensor::from_vec(channel_sums(self.geometry.output_shape(), dy), b.shape(), b.device())
            }))?;
            Some(db)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

/// `db[o] = sum_{n, y, x} dy[n, o, y, x]`: 16 running sums within a block of pixels, f64 across blocks.
fn channel_sums<T: Element>([n, c, h, w]: [usize; 4], dy: &[T]) -> Vec<T> {
    const BLOCK: usize = 4096;
    let m = h * w;
    let mut sums = vec![T::ZERO; c];
    sums.par_iter_mut().enumerate().for_each(|(o, sum)| {
        cpu::vectorised(
            #[inline(always)]
            || {
                let mut total = 0.0;
                for i in 0..n {
                    for block in dy[(i * c + o) * m..][..m].chunks(BLOCK) {
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
