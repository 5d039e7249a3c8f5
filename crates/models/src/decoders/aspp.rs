//! Atrous spatial pyramid pooling, of DeepLabV3 and DeepLabV3+.

use candle_core::Tensor;
use segdistill_ops::{Mode, Scope, adaptive_avg_pool2d, concat_channels, resize_bilinear};

use super::blocks::{Conv3x3, Conv3x3Kind, Conv3x3Shape, conv_bn_relu};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu, ConvShape};

/// The pyramid before it has weights: a 1x1 and three dilated 3x3 convolutions beside image pooling, concatenated and
/// projected, each with normalisation and ReLU.
///
/// # Source
/// Chen et al. 2017 (DeepLabv3), section 3.3.
pub(super) struct AsppShape {
    /// Branch 0.
    pointwise: ConvShape,
    /// Branches 1 to 3.
    dilated: [Conv3x3Shape; 3],
    /// Branch 4.
    pooled: ConvShape,
    project: ConvShape,
}

impl AsppShape {
    pub(super) fn new(n_in: usize, d: usize, rates: [usize; 3], kind: Conv3x3Kind) -> Self {
        Self {
            pointwise: ConvShape::new(n_in, d, 1),
            dilated: rates.map(|rate| Conv3x3Shape::new(n_in, d, rate, kind)),
            pooled: ConvShape::new(n_in, d, 1),
            project: ConvShape::new(5 * d, d, 1),
        }
    }

    pub(super) fn n_parameters(&self) -> usize {
        let dense = [self.pointwise, self.pooled, self.project].map(ConvBn::n_parameters);
        dense.iter().sum::<usize>() + self.dilated.iter().map(Conv3x3Shape::n_parameters).sum::<usize>()
    }

    pub(super) fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        let mut macs = self.pointwise.macs(hw)?.0 + self.pooled.macs([1, 1])?.0 + self.project.macs(hw)?.0;
        for conv in &self.dilated {
            macs += conv.macs(hw)?;
        }
        Ok(macs)
    }

    /// Names its parts `aspp.{0..4}` and `project` below `scope`.
    pub(super) fn build(&self, scope: &Scope) -> Result<Aspp> {
        let at = scope.pp("aspp");
        Ok(Aspp {
            pointwise: conv_bn_relu(self.pointwise, &at.pp(0))?,
            dilated: [
                self.dilated[0].build(&at.pp(1))?,
                self.dilated[1].build(&at.pp(2))?,
                self.dilated[2].build(&at.pp(3))?,
            ],
            pooled: conv_bn_relu(self.pooled, &at.pp(4))?,
            project: conv_bn_relu(self.project, &scope.pp("project"))?,
        })
    }
}

/// The pyramid with weights.
pub(super) struct Aspp {
    pointwise: ConvBnRelu,
    dilated: [Conv3x3; 3],
    pooled: ConvBnRelu,
    project: ConvBnRelu,
}

impl Aspp {
    pub(super) fn forward(&self, high_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let (_, _, h, w) = high_nchw.dims4()?;
        let branches = {
            let image = self.pooled.forward(&adaptive_avg_pool2d(high_nchw, [1, 1])?, mode)?;
            let branches = [
                self.pointwise.forward(high_nchw, mode)?,
                self.dilated[0].forward(high_nchw, mode)?,
                self.dilated[1].forward(high_nchw, mode)?,
                self.dilated[2].forward(high_nchw, mode)?,
                resize_bilinear(&image, [h, w], true)?,
            ];
            concat_channels(&branches.each_ref())?
        };
        self.project.forward(&branches, mode)
    }
}
