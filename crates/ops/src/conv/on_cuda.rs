//! The convolution where its tensors are on a CUDA device.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Result, Shape, Tensor};

use super::geometry::Geometry;
use super::{Convolution, OP};
use crate::cpu::for_float;
use crate::cuda::{self, Sizes};
use crate::precision::Precision;

pub(super) fn sizes(g: &Geometry) -> Sizes {
    Sizes {
        x: [g.n, g.c_in, g.h, g.w],
        weight: [g.c_out, g.c_in_group(), g.kh, g.kw],
        y: g.output_shape(),
        stride: g.stride,
        padding: g.padding,
        dilation: g.dilation,
        groups: g.groups,
        // Depthwise convolutions read and write more than they multiply: they stay f32, as on the CPU.
        bf16: g.precision == Precision::Bf16 && !g.is_depthwise(),
    }
}

impl Convolution {
    pub(super) fn cuda_forward(
        &self,
        x: (&CudaStorage, &Layout),
        weight: (&CudaStorage, &Layout),
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let sizes = sizes(&self.geometry);
        let y = for_float!(OP, x.0.dtype(), T => cuda::convolve::<T>(OP, &sizes, x, weight, bias))?;
        Ok((y, Shape::from_dims(&sizes.y)))
    }

    /// Gradients of input and weight, each only where a variable stands behind it.
    pub(super) fn cuda_backward(
        &self,
        x: &Tensor,
        w: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = sizes(&self.geometry);
        let dx = x.track_op().then(|| cuda::input_grad(OP, &sizes, w, grad)).transpose()?;
        let dw = w.track_op().then(|| cuda::weight_grad(OP, &sizes, x, grad)).transpose()?;
        Ok((dx, dw))
    }

    pub(super) fn cuda_bias_grad(&self, grad: &Tensor) -> Result<Tensor> {
        let [n, c, oh, ow] = self.geometry.output_shape();
        for_float!(OP, grad.dtype(), T => cuda::channel_sums::<T>(OP, grad, [n, c, oh * ow]))
    }
}
