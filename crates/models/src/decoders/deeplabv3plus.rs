//! DeepLabV3+ (Chen et al. 2018): atrous spatial pyramid pooling and a decoder on the encoder's fine map.
//!
//! Names of its tensors: `aspp.{0..4}` (1x1, the three dilated 3x3, image pooling), `project`, `low`, `fuse.{0,1}`,
//! `classifier`, in the smp layout `refine` too; inside, `conv`/`bn`, or `conv_dw`/`bn_dw`/`conv_pw`/`bn_pw` where
//! separable.
//!
//! The `paper` layout has rates 6, 12, 18 (at output stride 8 twice as much), separable convolutions where the encoder
//! has them, two 3x3 convolutions after the concatenation. The `smp` layout, segmentation_models.pytorch's, has rates 12,
//! 24, 36 at either stride, separable convolutions without anything between their two parts everywhere, one of them
//! after the pyramid and one after the concatenation; its fine map is the encoder's second stage.
//!
//! Two conventions of bilinear resizing meet here, as is common practice in PyTorch. *Inside* the decoder (image pooling
//! to the pyramid's grid, the deep map to the fine one) corners are aligned (`align_corners = true`): both grids come
//! from strided convolutions, which sample from the first pixel on. The logits leave at stride 4, as they are; whoever
//! compares them with labels brings them to the labels' size by pixel centres (`align_corners = false`). That is done
//! in the same way by training (`train`, before cross entropy) and by evaluation and prediction (`eval`), so that a
//! network is judged on the very map it was trained on.

use std::collections::BTreeMap;

use segdistill_ops::{Init, Mode, Scope, concat_channels, dropout, resize_bilinear};

use super::aspp::{Aspp, AsppShape};
use super::blocks::{Conv3x3, Conv3x3Kind, Conv3x3Shape, conv_bn_relu};
use super::{Decoder, DecoderPlan, DecoderTrace};
use crate::encoders::{EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::Result;
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap, scaled};

/// Dilation of the pyramid's 3x3 convolutions at output stride 16; at 8 twice as much.
const RATES_AT_16: [usize; 3] = [6, 12, 18];
/// The smp layout's, at either stride.
const SMP_RATES: [usize; 3] = [12, 24, 36];
/// Channels the fine map is reduced to before `width`, few enough not to outweigh the deep map's.
const LOW_CHANNELS: usize = 48;

/// A DeepLabV3+ decoder before it has weights.
struct Plan {
    /// Places of the two maps among the encoder's taps.
    inputs: [usize; 2],
    strides: [usize; 2],
    aspp: AsppShape,
    /// The smp layout's convolution after the pyramid.
    refine: Option<Conv3x3Shape>,
    low: ConvShape,
    fuse: Vec<Conv3x3Shape>,
    classifier: ConvShape,
    dropout: f64,
    align_corners: bool,
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let smp = spec.layout == "smp";
    let taps = encoder.taps();
    let high_at = taps.len() - 1;
    // The second stage: the deepest of stride 4, whatever was dilated.
    let low_at = if smp { encoder.stages()[1] } else { encoder.low_level() };
    let (low, high) = (&taps[low_at], &taps[high_at]);
    let kind = match (smp, encoder.prefers_separable()) {
        (true, _) => Conv3x3Kind::BareSeparable,
        (false, true) => Conv3x3Kind::Separable,
        (false, false) => Conv3x3Kind::Dense,
    };
    let rates = if smp { SMP_RATES } else { RATES_AT_16.map(|rate| rate * 16 / high.stride) };
    let d = scaled(spec.decoder_channels, spec.width);
    let d_low = scaled(LOW_CHANNELS, spec.width);
    let joined = Conv3x3Shape::new(d + d_low, d, 1, kind);
    let second = Conv3x3Shape::new(d, d, 1, kind);
    Ok(Box::new(Plan {
        inputs: [low_at, high_at],
        strides: [low.stride, high.stride],
        aspp: AsppShape::new(high.channels, d, rates, kind),
        refine: smp.then_some(second),
        low: ConvShape::new(low.channels, d_low, 1),
        fuse: if smp { vec![joined] } else { vec![joined, second] },
        classifier: ConvShape::new(d, spec.n_classes, 1).with_bias(),
        dropout: spec.dropout,
        align_corners: smp,
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        self.inputs.into_iter().zip(["low", "high"]).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        let [low, high] = self.strides;
        let channels = self.classifier.n_in;
        vec![Tap { name: "aspp", channels, stride: high }, Tap { name: "decoder", channels, stride: low }]
    }

    fn logits_stride(&self) -> usize {
        self.strides[0]
    }

    fn align_corners(&self) -> bool {
        self.align_corners
    }

    fn n_parameters(&self) -> usize {
        let threes: usize = self.refine.iter().chain(&self.fuse).map(Conv3x3Shape::n_parameters).sum();
        self.aspp.n_parameters() + threes + ConvBn::n_parameters(self.low) + self.classifier.n_parameters()
    }

    fn trace(&self, _image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let [low_hw, high_hw] = self.inputs.map(|i| encoder.sizes[i]);
        let mut macs = self.aspp.macs(high_hw)? + self.low.macs(low_hw)?.0 + self.classifier.macs(low_hw)?.0;
        if let Some(conv) = &self.refine {
            macs += conv.macs(high_hw)?;
        }
        for conv in &self.fuse {
            macs += conv.macs(low_hw)?;
        }
        Ok(DecoderTrace { macs, sizes: vec![high_hw, low_hw], logits_hw: low_hw, ..DecoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let fuse = scope.pp("fuse");
        Ok(Box::new(DeepLabV3Plus {
            aspp: self.aspp.build(scope)?,
            refine: self.refine.map(|shape| shape.build(&scope.pp("refine"))).transpose()?,
            low: conv_bn_relu(self.low, &scope.pp("low"))?,
            fuse: self.fuse.iter().enumerate().map(|(i, s)| s.build(&fuse.pp(i))).collect::<Result<_>>()?,
            // No normalisation follows: with fan-out of a few classes the first logits would be an order too large.
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
            dropout: self.dropout,
            dropout_name: scope.pp("dropout").path().to_string(),
        }))
    }
}

struct DeepLabV3Plus {
    aspp: Aspp,
    refine: Option<Conv3x3>,
    low: ConvBnRelu,
    fuse: Vec<Conv3x3>,
    classifier: Conv2d,
    dropout: f64,
    dropout_name: String,
}

impl Decoder for DeepLabV3Plus {
    fn forward(&self, encoder: EncoderOutput, _image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let [low_nchw, high_nchw] = encoder.into_maps()?;
        let aspp = self.aspp.forward(&high_nchw, mode)?;

        // Without a graph each map is gone as soon as the next one is there.
        let mut x = {
            let mut deep = dropout(&aspp, self.dropout, mode, &self.dropout_name)?;
            if let Some(refine) = &self.refine {
                deep = refine.forward(&deep, mode)?;
            }
            let low = self.low.forward(&low_nchw, mode)?;
            let (_, _, h, w) = low.dims4()?;
            // The convolutions sample at whole multiples of their stride, from the first pixel on: aligned corners fit
            // that exactly for sizes 1 + k * stride and closely for others.
            concat_channels(&[&resize_bilinear(&deep, [h, w], true)?, &low])?
        };
        for conv in &self.fuse {
            x = conv.forward(&x, mode)?;
        }
        let logits_nchw = self.classifier.forward(&x)?;

        let features = BTreeMap::from([("low", low_nchw), ("high", high_nchw), ("aspp", aspp), ("decoder", x)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw: None, features })
    }
}
