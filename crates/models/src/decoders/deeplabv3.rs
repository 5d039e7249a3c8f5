//! DeepLabV3 (Chen et al. 2017): atrous spatial pyramid pooling on the deepest map and a 3x3 convolution.
//!
//! Names of its tensors: `aspp.{0..4}` (1x1, the three dilated 3x3, image pooling), `project`, `fuse`, `classifier`, and
//! `aux` where an auxiliary head is trained.
//!
//! The three layouts have one structure and differ in its numbers. `paper` is CIRKD's, the network this project distils
//! into: 256 channels on encoders of 1024 channels and more, 128 on narrower ones, rates 6, 12, 18 at output stride 16
//! and twice that at 8, an auxiliary head on the map before the last stage, MobileNetV2 without its last expansion.
//! `smp` and `torchvision` have 256 channels on every encoder and rates 12, 24, 36 at every output stride; torchvision
//! has the auxiliary head too. A dilated stage begins with the dilation of the stage before in `paper` and `torchvision`.
//!
//! Dropout falls on the pyramid's output, in the paper layout before the classifier too. DIFFERENCE: CIRKD has 0.5 at the
//! one place and 0.1 at the other, here both have the spec's.

use std::collections::BTreeMap;

use segdistill_ops::{Init, Mode, Scope, dropout};

use super::aspp::{Aspp, AsppShape};
use super::aux::{AuxHead, AuxShape};
use super::blocks::{Conv3x3Kind, conv_bn_relu};
use super::{Decoder, DecoderPlan, DecoderTrace, middle};
use crate::encoders::{EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::Result;
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, PAPER, Tap, scaled};

/// Dilation of the pyramid's 3x3 convolutions at output stride 8; in the paper layout half of it at 16.
const RATES_AT_8: [usize; 3] = [12, 24, 36];

struct Plan {
    /// Place of the auxiliary head's map among the encoder's taps, and of the deepest.
    mid: usize,
    high: usize,
    stride: usize,
    aspp: AsppShape,
    fuse: ConvShape,
    classifier: ConvShape,
    aux: Option<AuxShape>,
    dropout: f64,
    /// Whether dropout falls before the classifier too.
    dropout_twice: bool,
    align_corners: bool,
}

pub(super) fn options(spec: &ModelSpec, options: EncoderOptions) -> EncoderOptions {
    EncoderOptions { gradual: spec.layout != "smp", expansion: spec.layout != PAPER, ..options }
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let paper = spec.layout == PAPER;
    let taps = encoder.taps();
    let (mid, high) = (middle(encoder), taps.len() - 1);
    let deepest = &taps[high];
    // The published encoder's channels decide, not the scaled ones: width scales every channel alike.
    let wide = deepest.channels as f64 >= 1024.0 * spec.width;
    let base = if paper && !wide { spec.decoder_channels / 2 } else { spec.decoder_channels };
    let d = scaled(base, spec.width);
    let rates = if paper { RATES_AT_8.map(|rate| rate * 8 / deepest.stride) } else { RATES_AT_8 };
    let n_mid = taps[mid].channels;
    Ok(Box::new(Plan {
        mid,
        high,
        stride: deepest.stride,
        aspp: AsppShape::new(deepest.channels, d, rates, Conv3x3Kind::Dense),
        fuse: ConvShape::new(d, d, 3),
        classifier: ConvShape::new(d, spec.n_classes, 1).with_bias(),
        aux: spec.aux.then(|| AuxShape::new(n_mid, n_mid / 4, spec.n_classes, false)),
        dropout: spec.dropout,
        dropout_twice: paper,
        align_corners: spec.layout != "torchvision",
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        let mid = self.aux.is_some().then_some((self.mid, "mid"));
        mid.into_iter().chain([(self.high, "high")]).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        let tap = |name| Tap { name, channels: self.fuse.n_out, stride: self.stride };
        vec![tap("aspp"), tap("decoder")]
    }

    fn logits_stride(&self) -> usize {
        self.stride
    }

    fn align_corners(&self) -> bool {
        self.align_corners
    }

    fn n_parameters(&self) -> usize {
        let aux = self.aux.as_ref().map_or(0, AuxShape::n_parameters);
        self.aspp.n_parameters() + ConvBn::n_parameters(self.fuse) + self.classifier.n_parameters() + aux
    }

    fn trace(&self, _image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let hw = encoder.sizes[self.high];
        Ok(DecoderTrace {
            macs: self.aspp.macs(hw)? + self.fuse.macs(hw)?.0 + self.classifier.macs(hw)?.0,
            aux_macs: self.aux.as_ref().map_or(Ok(0), |aux| aux.macs(encoder.sizes[self.mid]))?,
            sizes: vec![hw; 2],
            logits_hw: hw,
        })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        Ok(Box::new(DeepLabV3 {
            aspp: self.aspp.build(scope)?,
            fuse: conv_bn_relu(self.fuse, &scope.pp("fuse"))?,
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
            aux: self.aux.as_ref().map(|aux| aux.build(self.dropout, &scope.pp("aux"))).transpose()?,
            dropout: self.dropout,
            dropout_twice: self.dropout_twice,
            dropout_names: ["dropout.0", "dropout.1"].map(|name| scope.pp(name).path().to_string()),
        }))
    }
}

struct DeepLabV3 {
    aspp: Aspp,
    fuse: ConvBnRelu,
    classifier: Conv2d,
    aux: Option<AuxHead>,
    dropout: f64,
    dropout_twice: bool,
    dropout_names: [String; 2],
}

impl Decoder for DeepLabV3 {
    fn forward(&self, encoder: EncoderOutput, _image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let mut features = BTreeMap::new();
        let (aux_logits_nchw, high) = match &self.aux {
            None => {
                let [high] = encoder.into_maps()?;
                (None, high)
            }
            Some(aux) => {
                let [mid, high] = encoder.into_maps()?;
                let logits = mode.is_train().then(|| aux.forward(&mid, mode)).transpose()?;
                features.insert("mid", mid);
                (logits, high)
            }
        };
        let aspp = self.aspp.forward(&high, mode)?;
        let decoder = self.fuse.forward(&dropout(&aspp, self.dropout, mode, &self.dropout_names[0])?, mode)?;
        let logits_nchw = match self.dropout_twice {
            true => self.classifier.forward(&dropout(&decoder, self.dropout, mode, &self.dropout_names[1])?)?,
            false => self.classifier.forward(&decoder)?,
        };
        features.extend([("high", high), ("aspp", aspp), ("decoder", decoder)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw, features })
    }
}
