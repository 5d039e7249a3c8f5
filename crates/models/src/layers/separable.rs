//! Depthwise separable convolution.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Scope};

use super::conv::ConvShape;
use super::norm::ConvBn;
use crate::error::Result;

/// A separable convolution before it has weights: depthwise `kernel x kernel`, then pointwise 1x1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeparableShape {
    /// The depthwise part, which carries stride and dilation.
    pub depthwise: ConvShape,
    /// The pointwise part.
    pub pointwise: ConvShape,
}

impl SeparableShape {
    /// From `n_in` to `n_out` channels, stride 1, dilation 1.
    pub fn new(n_in: usize, n_out: usize, kernel: usize) -> Self {
        Self { depthwise: ConvShape::depthwise(n_in, kernel), pointwise: ConvShape::new(n_in, n_out, 1) }
    }

    /// The same with another stride.
    pub fn strided(self, stride: usize) -> Self {
        Self { depthwise: self.depthwise.strided(stride), ..self }
    }

    /// The same with another dilation.
    pub fn dilated(self, dilation: usize) -> Self {
        Self { depthwise: self.depthwise.dilated(dilation), ..self }
    }

    /// Trained elements, both normalisations included.
    pub fn n_parameters(&self) -> usize {
        ConvBn::n_parameters(self.depthwise) + ConvBn::n_parameters(self.pointwise)
    }

    /// Multiply-accumulates of one image of size `[h, w]`, and the output size.
    ///
    /// # Errors
    /// As [`ConvShape::output_hw`].
    pub fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        let (depthwise, hw) = self.depthwise.macs(hw)?;
        let (pointwise, hw) = self.pointwise.macs(hw)?;
        Ok((depthwise + pointwise, hw))
    }
}

/// Depthwise and pointwise convolution, each with its own batch normalisation; timm's names `conv_dw`, `bn_dw`,
/// `conv_pw`, `bn_pw`.
#[derive(Clone, Debug)]
pub struct SeparableConv {
    depthwise: ConvBn,
    pointwise: ConvBn,
    relu: bool,
}

impl SeparableConv {
    /// Builds it in `scope`; `relu` says whether a ReLU follows each of the two normalisations.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: SeparableShape, config: BatchNormConfig, relu: bool, scope: &Scope) -> Result<Self> {
        let part = |conv, bn, shape| ConvBn::new(shape, config, &scope.pp(conv), &scope.pp(bn));
        Ok(Self {
            depthwise: part("conv_dw", "bn_dw", shape.depthwise)?,
            pointwise: part("conv_pw", "bn_pw", shape.pointwise)?,
            relu,
        })
    }

    /// `act(BN(pointwise(act(BN(depthwise(x))))))`, `act` being ReLU or nothing.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`] of the depthwise part
    /// # Gradient
    /// Reaches the input and every parameter. Without ReLU the shift of the first normalisation gets 0 in training:
    /// the second one takes it away again.
    /// # Errors
    /// As [`ConvBn::forward`].
    /// # Source
    /// Chen et al. 2018 (DeepLabv3+), section 3.2: normalisation and ReLU also between the two parts.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.forward_act(x_nchw, None, self.relu, mode)
    }

    /// [`SeparableConv::forward`] with its end chosen by the caller:
    /// `end(BN(pointwise(act(BN(depthwise(x))))) + residual)`, `end` being ReLU with `relu`, else nothing.
    ///
    /// # Shapes
    /// As [`SeparableConv::forward`]; `residual_nchw`: of the result's shape
    /// # Gradient
    /// As [`SeparableConv::forward`], and the residual's.
    /// # Errors
    /// As [`ConvBn::forward_act`].
    /// # Source
    /// As [`SeparableConv::forward`].
    pub fn forward_act(
        &self,
        x_nchw: &Tensor,
        residual_nchw: Option<&Tensor>,
        relu: bool,
        mode: Mode,
    ) -> Result<Tensor> {
        let inner = self.depthwise.forward_act(x_nchw, None, self.relu, mode)?;
        self.pointwise.forward_act(&inner, residual_nchw, relu, mode)
    }
}
