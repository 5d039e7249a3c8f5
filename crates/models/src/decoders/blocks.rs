//! Convolution blocks that several decoders share.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Scope};

use crate::error::Result;
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape, SeparableConv, SeparableShape};

pub(super) const NORM: BatchNormConfig = BatchNormConfig { eps: 1e-5, momentum: 0.1 };

/// Convolution, normalisation and ReLU, named `conv` and `bn`.
pub(super) fn conv_bn_relu(shape: ConvShape, scope: &Scope) -> Result<ConvBnRelu> {
    ConvBnRelu::new(shape, NORM, &scope.pp("conv"), &scope.pp("bn"))
}

/// How a decoder's 3x3 convolutions are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Conv3x3Kind {
    /// One convolution, normalisation, ReLU.
    Dense,
    /// Depthwise and pointwise, each with normalisation and ReLU.
    Separable,
    /// Depthwise and pointwise with nothing between, then normalisation and ReLU: segmentation_models.pytorch's.
    BareSeparable,
}

/// A 3x3 convolution of a decoder before it has weights, with its normalisations and ReLUs.
#[derive(Clone, Copy)]
pub(super) enum Conv3x3Shape {
    Dense(ConvShape),
    Separable(SeparableShape),
    BareSeparable(SeparableShape),
}

impl Conv3x3Shape {
    pub(super) fn new(n_in: usize, n_out: usize, dilation: usize, kind: Conv3x3Kind) -> Self {
        let separable = SeparableShape::new(n_in, n_out, 3).dilated(dilation);
        match kind {
            Conv3x3Kind::Dense => Self::Dense(ConvShape::new(n_in, n_out, 3).dilated(dilation)),
            Conv3x3Kind::Separable => Self::Separable(separable),
            Conv3x3Kind::BareSeparable => Self::BareSeparable(separable),
        }
    }

    pub(super) fn n_parameters(&self) -> usize {
        match self {
            Self::Dense(shape) => ConvBn::n_parameters(*shape),
            Self::Separable(shape) => shape.n_parameters(),
            Self::BareSeparable(shape) => shape.depthwise.n_parameters() + ConvBn::n_parameters(shape.pointwise),
        }
    }

    pub(super) fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        Ok(match self {
            Self::Dense(shape) => shape.macs(hw)?.0,
            Self::Separable(shape) | Self::BareSeparable(shape) => shape.macs(hw)?.0,
        })
    }

    pub(super) fn build(&self, scope: &Scope) -> Result<Conv3x3> {
        Ok(match self {
            Self::Dense(shape) => Conv3x3::Dense(conv_bn_relu(*shape, scope)?),
            Self::Separable(shape) => Conv3x3::Separable(SeparableConv::new(*shape, NORM, true, scope)?),
            Self::BareSeparable(shape) => Conv3x3::BareSeparable {
                depthwise: Conv2d::new(shape.depthwise, &scope.pp("conv_dw"))?,
                pointwise: ConvBnRelu::new(shape.pointwise, NORM, &scope.pp("conv_pw"), &scope.pp("bn_pw"))?,
            },
        })
    }
}

/// A [`Conv3x3Shape`] with weights.
pub(super) enum Conv3x3 {
    Dense(ConvBnRelu),
    Separable(SeparableConv),
    BareSeparable { depthwise: Conv2d, pointwise: ConvBnRelu },
}

impl Conv3x3 {
    pub(super) fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Dense(conv) => conv.forward(x_nchw, mode),
            Self::Separable(conv) => conv.forward(x_nchw, mode),
            Self::BareSeparable { depthwise, pointwise } => pointwise.forward(&depthwise.forward(x_nchw)?, mode),
        }
    }
}
