//! A head of one convolution and a classifier: as auxiliary head on a middle map, trained beside the network's own and
//! left out in evaluation, and as the whole decoder of the plain FCN.

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, Scope, dropout};

use super::blocks::conv_bn_relu;
use crate::error::Result;
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape};

/// A 3x3 convolution with normalisation and ReLU, dropout, and a 1x1 classifier, before they have weights.
///
/// # Source
/// Zhao et al. 2017 (PSPNet), section 3.3: a loss on the map before the last stage helps a deep network to learn.
pub(super) struct AuxShape {
    conv: ConvShape,
    classifier: ConvShape,
}

impl AuxShape {
    /// From `n_in` channels over `d` to `n_classes`; `bias` says whether the 3x3 convolution has one.
    pub(super) fn new(n_in: usize, d: usize, n_classes: usize, bias: bool) -> Self {
        let conv = ConvShape { bias, ..ConvShape::new(n_in, d, 3) };
        Self { conv, classifier: ConvShape::new(d, n_classes, 1).with_bias() }
    }

    pub(super) fn n_parameters(&self) -> usize {
        ConvBn::n_parameters(self.conv) + self.classifier.n_parameters()
    }

    pub(super) fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        Ok(self.conv.macs(hw)?.0 + self.classifier.macs(hw)?.0)
    }

    /// Channels before the classifier.
    pub(super) fn channels(&self) -> usize {
        self.conv.n_out
    }

    /// Names its parts `conv`, `bn` and `classifier` in `scope`.
    pub(super) fn build(&self, dropout: f64, scope: &Scope) -> Result<AuxHead> {
        Ok(AuxHead {
            conv: conv_bn_relu(self.conv, scope)?,
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
            dropout,
            dropout_name: scope.pp("dropout").path().to_string(),
        })
    }
}

/// The head with weights.
pub(super) struct AuxHead {
    conv: ConvBnRelu,
    classifier: Conv2d,
    dropout: f64,
    dropout_name: String,
}

impl AuxHead {
    pub(super) fn forward(&self, map_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(self.forward_with_map(map_nchw, mode)?.0)
    }

    /// The logits, and the map they are read from.
    pub(super) fn forward_with_map(&self, map_nchw: &Tensor, mode: Mode) -> Result<(Tensor, Tensor)> {
        let x = self.conv.forward(map_nchw, mode)?;
        let logits = self.classifier.forward(&dropout(&x, self.dropout, mode, &self.dropout_name)?)?;
        Ok((logits, x))
    }
}
