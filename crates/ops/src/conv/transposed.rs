//! Transposed convolution: the input gradient of a convolution, taken as an operation of its own.
//!
//! The kernels are those of [`conv2d`](super::conv2d): what is a gradient there is the forward pass here, and the other
//! way round. No arithmetic lives here but the bias.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use super::geometry::{Geometry, rank4};
use super::{Epilogue, channel_sums, check, dense, depthwise, forward};
use crate::cpu::{Element, check_bias, for_float, slice_of, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{OpsError, Result};
use crate::graph;
use crate::kernels::Kernels;
use crate::precision::Precision;

const OP: &str = "conv_transpose2d";

/// Geometry of a transposed convolution; per axis `[height, width]`, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTranspose2dConfig {
    /// Distance of neighbouring input pixels in the output.
    pub stride: [usize; 2],
    /// Rows and columns cut off the output on both sides.
    pub padding: [usize; 2],
    /// Rows and columns added to the output's far side: which of the sizes is meant that a convolution of this stride
    /// brings down to the input's. Below the stride.
    pub output_padding: [usize; 2],
    /// Distance between kernel taps.
    pub dilation: [usize; 2],
    /// Number of channel groups.
    pub groups: usize,
    /// What the factors of dense convolutions are rounded to.
    pub precision: Precision,
}

impl Default for ConvTranspose2dConfig {
    fn default() -> Self {
        Self {
            stride: [1, 1],
            padding: [0, 0],
            output_padding: [0, 0],
            dilation: [1, 1],
            groups: 1,
            precision: Precision::F32,
        }
    }
}

impl ConvTranspose2dConfig {
    /// Output height and width for input `[h, w]` and kernel `[kh, kw]`:
    /// `(h - 1) s - 2 p + d (k - 1) + 1 + output_padding`.
    ///
    /// `None` when nothing would be left, or an input or kernel side is 0.
    pub fn output_hw(&self, hw: [usize; 2], kernel: [usize; 2]) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let spread = hw[i].checked_sub(1)?.checked_mul(self.stride[i])?;
            let span = self.dilation[i].checked_mul(kernel[i].checked_sub(1)?)?.checked_add(1)?;
            let whole = spread.checked_add(span)?.checked_add(self.output_padding[i])?;
            whole.checked_sub(self.padding[i].checked_mul(2)?).filter(|&side| side > 0)
        };
        Some([side(0)?, side(1)?])
    }
}

/// Transposed convolution: every input pixel lays the kernel, times its value, onto the output.
///
/// `out[n, g c + j, s_h y - p_h + d_h a, s_w x - p_w + d_w b] = bias[g c + j] +` the sum over `i` in group `g`, `a` and
/// `b` of `weight[i, j, a, b] * in[n, i, y, x]`, with `c = c_out / groups`. It is the transpose of
/// [`conv2d`](crate::conv2d) with the same weight, stride, padding and dilation: `<conv_t(x), y> = <x, conv(y)>`.
///
/// # Shapes
/// - `x_nchw`: `[n, c_in, h, w]`; `weight`: `[c_in, c_out / groups, kh, kw]`; `bias`: `[c_out]`; f32 or f64, any strides
/// - returns `[n, c_out, oh, ow]`, `[oh, ow]` being [`ConvTranspose2dConfig::output_hw`]
/// # Gradient
/// Exact for every size, stride, dilation and group count: a convolution of the gradient for the input. Arguments that no
/// variable stands behind get none, and cost none.
/// # Errors
/// `Shape` when channels, groups, kernel or bias do not fit the input, or nothing of the output is left; `Config` for a
/// stride, dilation or group count of 0, an output padding that reaches the stride, and those of
/// [`conv2d`](crate::conv2d) about types and devices.
/// # Source
/// Dumoulin and Visin 2016, chapter 4; PyTorch `torch.nn.functional.conv_transpose2d`. DIFFERENCE: an output padding from
/// the stride up to the dilation is refused: no convolution has that size.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_ops::{ConvTranspose2dConfig, conv_transpose2d};
/// # fn main() -> segdistill_ops::Result<()> {
/// // Upsampling by 2 as U-Net does it: every pixel becomes a square of four.
/// let x = Tensor::new(&[[[[1f32, 2.0]]]], &Device::Cpu)?;
/// let weight = Tensor::ones((1, 1, 2, 2), DType::F32, &Device::Cpu)?;
/// let y = conv_transpose2d(&x, &weight, None, ConvTranspose2dConfig { stride: [2, 2], ..Default::default() })?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]);
/// # Ok(())
/// # }
/// ```
pub fn conv_transpose2d(
    x_nchw: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    cfg: ConvTranspose2dConfig,
) -> Result<Tensor> {
    let adjoint = adjoint(x_nchw, weight, bias, cfg)?;
    let given: Vec<&Tensor> = [Some(x_nchw), Some(weight), bias].into_iter().flatten().collect();
    check(OP, &given, cfg.precision)?;
    let y = graph::apply2(&x_nchw.contiguous()?, &weight.contiguous()?, Transposed { adjoint })?;
    match bias {
        None => Ok(y),
        // With its own place in the graph, on any device: few networks give a transposed convolution a bias.
        Some(bias) if !y.device().is_cpu() => Ok(y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?),
        Some(bias) => Ok(graph::apply2(&y, &bias.contiguous()?, AddBias { dims: adjoint.input_shape() })?),
    }
}

/// The convolution whose transpose is asked for: it leads from the output's grid to the input's.
fn adjoint(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, cfg: ConvTranspose2dConfig) -> Result<Geometry> {
    let ConvTranspose2dConfig { stride, padding, output_padding, dilation, groups, precision } = cfg;
    let ([n, c_in, h, w], [c_weight, c_group, kh, kw]) = (rank4(OP, x, "x")?, rank4(OP, weight, "weight")?);
    if groups == 0 || stride.contains(&0) || dilation.contains(&0) {
        return Err(OpsError::config(
            format!("{OP}: stride {stride:?}, dilation {dilation:?}, groups {groups}, expected 1 or more"),
            "1 is the plain transposed convolution",
        ));
    }
    if (0..2).any(|i| output_padding[i] >= stride[i]) {
        return Err(OpsError::config(
            format!("{OP}: output padding {output_padding:?} for stride {stride:?}, expected less than the stride"),
            "it chooses among the sizes that the stride leaves open",
        ));
    }
    if c_in == 0 || c_in != c_weight || c_in % groups != 0 {
        return Err(OpsError::shape(
            OP,
            format!("weight {:?} for {c_in} input channels in {groups} groups", weight.dims()),
            format!("weight [{c_in}, c_out / groups, {kh}, {kw}], groups that divide {c_in}"),
            "a transposed convolution's weight has the input channels first",
        ));
    }
    let c_out = c_group * groups;
    if c_out == 0 || h == 0 || w == 0 {
        return Err(OpsError::shape(
            OP,
            format!("x {:?}, weight {:?}", x.dims(), weight.dims()),
            "at least one pixel and one output channel",
            "only the batch may be empty",
        ));
    }
    check_bias(OP, bias, c_out)?;
    let Some([oh, ow]) = cfg.output_hw([h, w], [kh, kw]) else {
        return Err(OpsError::shape(
            OP,
            format!("kernel [{kh}, {kw}] with dilation {dilation:?} on [{h}, {w}], {padding:?} cut off both sides"),
            "a kernel of at least one tap and at least one pixel left",
            "cut off less, or use a larger kernel or map",
        ));
    };
    let (c_in, c_out, h, w, oh, ow) = (c_out, c_in, oh, ow, h, w);
    Ok(Geometry { n, c_in, h, w, c_out, kh, kw, oh, ow, stride, padding, dilation, groups, precision })
}

/// Arguments x and weight.
struct Transposed {
    adjoint: Geometry,
}

impl Transposed {
    fn forward<T: Kernels>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let g = &self.adjoint;
        match g.is_depthwise() {
            true => depthwise::backward(g, x, None, Some(weight)).0.expect("asked for"),
            false => dense::input_grad(g, x, weight),
        }
    }

    fn weight_grad<T: Kernels>(&self, x: &[T], grad: &[T]) -> Vec<T> {
        let g = &self.adjoint;
        match g.is_depthwise() {
            true => depthwise::backward(g, x, Some(grad), None).1.expect("asked for"),
            false => dense::weight_grad(g, x, grad),
        }
    }
}

impl CustomOp2 for Transposed {
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
        let out = for_float!(OP, x.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.forward(slice_of::<T>(OP, x, lx)?, slice_of::<T>(OP, w, lw)?)))
        })?;
        Ok((out, Shape::from_dims(&self.adjoint.input_shape())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let y = cuda::convolve_transposed(OP, &super::on_cuda::sizes(&self.adjoint), (x, lx), (w, lw))?;
        Ok((y, Shape::from_dims(&self.adjoint.input_shape())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let sizes = super::on_cuda::sizes(&self.adjoint);
            let dx = x.track_op().then(|| cuda::output(OP, &sizes, &grad, w)).transpose()?;
            let dw = w.track_op().then(|| cuda::weight_grad(OP, &sizes, &grad, x)).transpose()?;
            return Ok((dx, dw));
        }
        for_float!(OP, grad.dtype(), T => with_slice::<T, _>(OP, &grad, |dy| {
            let dx = match x.track_op() {
                true => Some(with_slice::<T, _>(OP, w, |w| {
                    Tensor::from_vec(forward(&self.adjoint, dy, w, Epilogue::none(), None), x.shape(), x.device())
                })?),
                false => None,
            };
            let dw = match w.track_op() {
                true => Some(with_slice::<T, _>(OP, x, |x| {
                    Tensor::from_vec(self.weight_grad(x, dy), w.shape(), w.device())
                })?),
                false => None,
            };
            Ok((dx, dw))
        }))
    }
}

/// `y[n, c, ..] + bias[c]`.
struct AddBias {
    dims: [usize; 4],
}

impl AddBias {
    fn forward<T: Element>(&self, y: &[T], bias: &[T]) -> Vec<T> {
        let [_, c, h, w] = self.dims;
        let mut out = y.to_vec();
        out.par_chunks_mut(h * w).enumerate().for_each(|(plane, out)| {
            let bias = bias[plane % c];
            out.iter_mut().for_each(|v| *v += bias);
        });
        out
    }
}

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        ly: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = for_float!(OP, y.dtype(), T => {
            Ok(T::to_cpu_storage_owned(self.forward(slice_of::<T>(OP, y, ly)?, slice_of::<T>(OP, b, lb)?)))
        })?;
        Ok((out, ly.shape().clone()))
    }

    fn bwd(
        &self,
        y: &Tensor,
        b: &Tensor,
        _sum: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let db = match b.track_op() {
            true => Some(for_float!(OP, grad.dtype(), T => with_slice::<T, _>(OP, &grad, |dy| {
                Tensor::from_vec(channel_sums(self.dims, dy), b.shape(), b.device())
            }))?),
            false => None,
        };
        Ok((y.track_op().then_some(grad), db))
    }
}
