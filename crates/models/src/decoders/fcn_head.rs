//! The plain head: one 3x3 convolution on the deepest map and a classifier, torchvision's FCN on a dilated ResNet.
//!
//! Names of its tensors: `head.conv`, `head.bn`, `head.classifier`, and `aux` where an auxiliary head is trained.

use std::collections::BTreeMap;

use segdistill_ops::{Mode, Scope};

use super::aux::{AuxHead, AuxShape};
use super::{Decoder, DecoderPlan, DecoderTrace, middle};
use crate::encoders::{EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::Result;
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap};

struct Plan {
    /// Places of the auxiliary head's map and of the deepest among the encoder's taps.
    mid: usize,
    high: usize,
    stride: usize,
    head: AuxShape,
    aux: Option<AuxShape>,
    dropout: f64,
}

pub(super) fn options(_spec: &ModelSpec, options: EncoderOptions) -> EncoderOptions {
    EncoderOptions { gradual: true, ..options }
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let taps = encoder.taps();
    let (mid, high) = (middle(encoder), taps.len() - 1);
    let shape = |tap: &Tap| AuxShape::new(tap.channels, tap.channels / 4, spec.n_classes, false);
    Ok(Box::new(Plan {
        mid,
        high,
        stride: taps[high].stride,
        head: shape(&taps[high]),
        aux: spec.aux.then(|| shape(&taps[mid])),
        dropout: spec.dropout,
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        let mid = self.aux.is_some().then_some((self.mid, "mid"));
        mid.into_iter().chain([(self.high, "high")]).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "decoder", channels: self.head.channels(), stride: self.stride }]
    }

    fn logits_stride(&self) -> usize {
        self.stride
    }

    fn n_parameters(&self) -> usize {
        self.head.n_parameters() + self.aux.as_ref().map_or(0, AuxShape::n_parameters)
    }

    fn trace(&self, _image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let hw = encoder.sizes[self.high];
        Ok(DecoderTrace {
            macs: self.head.macs(hw)?,
            aux_macs: self.aux.as_ref().map_or(Ok(0), |aux| aux.macs(encoder.sizes[self.mid]))?,
            sizes: vec![hw],
            logits_hw: hw,
        })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        Ok(Box::new(FcnHead {
            head: self.head.build(self.dropout, &scope.pp("head"))?,
            aux: self.aux.as_ref().map(|aux| aux.build(self.dropout, &scope.pp("aux"))).transpose()?,
        }))
    }
}

struct FcnHead {
    head: AuxHead,
    aux: Option<AuxHead>,
}

impl Decoder for FcnHead {
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
        let (logits_nchw, decoder) = self.head.forward_with_map(&high, mode)?;
        features.extend([("high", high), ("decoder", decoder)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw, features })
    }
}
