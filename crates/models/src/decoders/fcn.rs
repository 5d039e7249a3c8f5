//! FCN-32s, -16s and -8s (Long et al. 2015): VGG's classifier as convolutions, its scores enlarged by transposed
//! convolutions that start as bilinear interpolation, the scores of finer maps added on the way.
//!
//! Names of its tensors: `fc6`, `fc7`, `score`; `skips.{0,1}`, the scores of the maps of stride 16 and 8; `ups.{0..}`, the
//! transposed convolutions from the deepest on, the last of which leads to the image's grid.
//!
//! Caffe pads the image by 100 pixels and crops every map to the one it meets. Here `fc6` is padded by 3, so that the
//! grids stay those of the encoder, and every enlarged map is fitted to its target from the first pixel on: rows beyond
//! a multiple come by output padding, rows too many are left out. Sizes and numbers of weights are the published ones.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, Scope, add, dropout};

use super::{Decoder, DecoderPlan, DecoderTrace};
use crate::encoders::{EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, ConvRelu, ConvShape, ConvTranspose2d, TransposedShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap, scaled};

/// Channels of the two convolutions that were fully connected layers, before `width`.
const HIDDEN: usize = 4096;
/// Feature names of the maps whose scores are added, from the finest on, and of the deepest.
const NAMES: [&str; 3] = ["skip8", "skip16", "high"];

/// An FCN decoder before it has weights.
struct Plan {
    /// Places among the encoder's taps and strides, from the finest on.
    inputs: Vec<(usize, usize)>,
    fc6: ConvShape,
    fc7: ConvShape,
    score: ConvShape,
    /// From the deepest on.
    skips: Vec<ConvShape>,
    ups: Vec<TransposedShape>,
    dropout: f64,
}

pub(super) fn plan_32s(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    plan(spec, encoder, 32)
}

pub(super) fn plan_16s(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    plan(spec, encoder, 16)
}

pub(super) fn plan_8s(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    plan(spec, encoder, 8)
}

/// The network whose last step is from stride `finest` to the image's grid.
fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan, finest: usize) -> Result<Box<dyn DecoderPlan>> {
    let taps = encoder.taps();
    let stages: Vec<(usize, usize)> = encoder.stages().into_iter().map(|at| (at, taps[at].stride)).collect();
    let wanted: Vec<usize> = [8, 16, 32].into_iter().filter(|&stride| stride >= finest).collect();
    let inputs: Vec<(usize, usize)> = stages.into_iter().filter(|(_, stride)| wanted.contains(stride)).collect();
    if !inputs.iter().map(|&(_, stride)| stride).eq(wanted) {
        let hint = "vgg16 is the published one";
        return Err(ModelError::setting("encoder", &spec.encoder, "stages of stride 8, 16 and 32", hint));
    }
    let channels = |&(at, _): &(usize, usize)| taps[at].channels;
    let (hidden, classes) = (scaled(HIDDEN, spec.width), spec.n_classes);
    let score = |n_in| ConvShape::new(n_in, classes, 1).with_bias();
    let up = |stride: usize| TransposedShape {
        n_in: classes,
        n_out: classes,
        kernel: 2 * stride,
        stride,
        padding: stride / 2,
        bias: false,
    };
    let (skips, high) = inputs.split_at(inputs.len() - 1);
    Ok(Box::new(Plan {
        fc6: ConvShape::new(high.first().map_or(0, channels), hidden, 7).with_bias(),
        fc7: ConvShape::new(hidden, hidden, 1).with_bias(),
        score: score(hidden),
        skips: skips.iter().rev().map(channels).map(score).collect(),
        ups: skips.iter().map(|_| up(2)).chain([up(finest)]).collect(),
        dropout: spec.dropout,
        inputs,
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        let names = &NAMES[NAMES.len() - self.inputs.len()..];
        self.inputs.iter().map(|&(at, _)| at).zip(names.iter().copied()).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "fc7", channels: self.fc7.n_out, stride: 32 }]
    }

    fn logits_stride(&self) -> usize {
        1
    }

    fn n_parameters(&self) -> usize {
        let convs = [self.fc6, self.fc7, self.score];
        let ups: usize = self.ups.iter().map(TransposedShape::n_parameters).sum();
        ups + convs.iter().chain(&self.skips).map(ConvShape::n_parameters).sum::<usize>()
    }

    fn trace(&self, image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let grids: Vec<[usize; 2]> = self.inputs.iter().rev().map(|&(at, _)| encoder.sizes[at]).collect();
        let mut macs = 0;
        for conv in [self.fc6, self.fc7, self.score] {
            macs += conv.macs(grids[0])?.0;
        }
        for (skip, &hw) in self.skips.iter().zip(&grids[1..]) {
            macs += skip.macs(hw)?.0;
        }
        for (up, &hw) in self.ups.iter().zip(&grids) {
            macs += up.macs(hw);
        }
        Ok(DecoderTrace { macs, sizes: vec![grids[0]], logits_hw: image_hw, ..DecoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let (skips, ups) = (scope.pp("skips"), scope.pp("ups"));
        // Scores of finer maps start at 0, so that they begin as refinements of what is there.
        let zero = Init::Constant(0.0);
        let skip = |(i, shape): (usize, &ConvShape)| Conv2d::with_init(*shape, zero, &skips.pp(i));
        let up = |(i, shape): (usize, &TransposedShape)| {
            Ok(Up { stride: shape.stride, conv: ConvTranspose2d::with_init(*shape, Init::Bilinear, &ups.pp(i))? })
        };
        Ok(Box::new(Fcn {
            fc6: ConvRelu::new(self.fc6, &scope.pp("fc6"))?,
            fc7: ConvRelu::new(self.fc7, &scope.pp("fc7"))?,
            // No normalisation follows: with fan-out of a few classes the first logits would be an order too large.
            score: Conv2d::with_init(self.score, Init::Xavier, &scope.pp("score"))?,
            skips: self.skips.iter().enumerate().map(skip).collect::<Result<_>>()?,
            ups: self.ups.iter().enumerate().map(up).collect::<Result<_>>()?,
            dropout: self.dropout,
            dropout_names: ["dropout6", "dropout7"].map(|name| scope.pp(name).path().to_string()),
        }))
    }
}

/// A step up.
struct Up {
    stride: usize,
    conv: ConvTranspose2d,
}

impl Up {
    /// The enlarged map on the grid `hw`, from the first pixel on.
    fn forward(&self, x_nchw: &Tensor, hw: [usize; 2]) -> Result<Tensor> {
        let (_, _, h, w) = x_nchw.dims4()?;
        let beyond = |side: usize, small: usize| side.saturating_sub(small * self.stride);
        let mut y = self.conv.forward(x_nchw, [beyond(hw[0], h), beyond(hw[1], w)])?;
        for (axis, side) in [(2, hw[0]), (3, hw[1])] {
            if y.dims()[axis] > side {
                y = y.narrow(axis, 0, side)?;
            }
        }
        Ok(y)
    }
}

struct Fcn {
    fc6: ConvRelu,
    fc7: ConvRelu,
    score: Conv2d,
    skips: Vec<Conv2d>,
    ups: Vec<Up>,
    dropout: f64,
    dropout_names: [String; 2],
}

impl Decoder for Fcn {
    fn forward(&self, encoder: EncoderOutput, image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let mut maps = encoder.maps_nchw;
        let names = &NAMES[NAMES.len() - maps.len()..];
        let mut features: BTreeMap<_, _> = names.iter().copied().zip(maps.iter().cloned()).collect();
        maps.reverse();

        let [name6, name7] = &self.dropout_names;
        let hidden = dropout(&self.fc6.forward(&maps[0], mode)?, self.dropout, mode, name6)?;
        let fc7 = self.fc7.forward(&hidden, mode)?;
        let mut scores = self.score.forward(&dropout(&fc7, self.dropout, mode, name7)?)?;
        features.insert("fc7", fc7);
        for (i, up) in self.ups.iter().enumerate() {
            scores = match self.skips.get(i) {
                Some(skip) => {
                    let (_, _, h, w) = maps[i + 1].dims4()?;
                    add(&up.forward(&scores, [h, w])?, &skip.forward(&maps[i + 1])?)?
                }
                None => up.forward(&scores, image_hw)?,
            };
        }
        Ok(SegOutput { logits_nchw: scores.contiguous()?, aux_logits_nchw: None, features })
    }
}
