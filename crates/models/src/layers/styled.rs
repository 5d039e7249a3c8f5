//! A convolution with ReLU, normalised or not: for networks that come in both kinds.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Scope};

use super::conv::ConvShape;
use super::norm::{ConvBn, ConvBnRelu, ConvRelu};
use crate::error::Result;

/// How a network's convolutions are made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvStyle {
    /// A bias and no normalisation.
    Bias,
    /// Batch normalisation and no bias.
    Norm,
    /// A bias, then batch normalisation.
    BiasNorm,
}

impl ConvStyle {
    /// A dense convolution of stride 1 in this style.
    pub fn shape(self, n_in: usize, n_out: usize, kernel: usize) -> ConvShape {
        ConvShape { bias: self != Self::Norm, ..ConvShape::new(n_in, n_out, kernel) }
    }

    /// Trained elements of a convolution in this style, its normalisation's included.
    pub fn n_parameters(self, shape: ConvShape) -> usize {
        if self == Self::Bias { shape.n_parameters() } else { ConvBn::n_parameters(shape) }
    }
}

/// A convolution in one of the styles, and ReLU; named `conv` and, where it normalises, `bn`.
#[derive(Clone, Debug)]
pub enum StyledConv {
    /// Without normalisation.
    Plain(ConvRelu),
    /// With it.
    Normalised(ConvBnRelu),
}

impl StyledConv {
    /// Builds it in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, style: ConvStyle, scope: &Scope) -> Result<Self> {
        let conv = scope.pp("conv");
        Ok(match style {
            ConvStyle::Bias => Self::Plain(ConvRelu::new(shape, &conv)?),
            _ => Self::Normalised(ConvBnRelu::new(shape, BatchNormConfig::default(), &conv, &scope.pp("bn"))?),
        })
    }

    /// `max(conv(x), 0)`, or `max(BN(conv(x)), 0)`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches the input and every parameter, 0 where the output is 0.
    /// # Errors
    /// As [`ConvRelu::forward`] and [`ConvBnRelu::forward`].
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Plain(conv) => conv.forward(x_nchw, mode),
            Self::Normalised(conv) => conv.forward(x_nchw, mode),
        }
    }
}
