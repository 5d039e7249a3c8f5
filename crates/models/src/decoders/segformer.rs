//! SegFormer's decoder (Xie et al. 2021): every stage through one linear layer, brought to the finest grid and mixed.
//!
//! Names of its tensors: `mlp_stage.{0..}.linear`, 0 being the deepest stage, `fuse_stage.0` and `.1` (convolution and
//! normalisation), `classifier`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, Scope, concat_channels, dropout, resize_bilinear, to_maps, to_tokens};

use super::blocks::NORM;
use super::{Decoder, DecoderPlan, DecoderTrace};
use crate::encoders::{EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape, Linear, LinearShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap, scaled};

/// Names of the stages among the features, from the image on.
const STAGES: [&str; 4] = ["stage1", "stage2", "stage3", "high"];

/// Stochastic depth is the encoder's dropout: both published values are 0.1.
pub(super) fn options(spec: &ModelSpec, options: EncoderOptions) -> EncoderOptions {
    EncoderOptions { drop_path: spec.dropout, ..options }
}

/// A SegFormer decoder before it has weights.
struct Plan {
    /// Place and stride of each stage among the encoder's taps, from the image on.
    stages: Vec<(usize, usize)>,
    /// One a stage, from the image on.
    linears: Vec<LinearShape>,
    fuse: ConvShape,
    classifier: ConvShape,
    dropout: f64,
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let taps = encoder.taps();
    // The four stages of stride 4 and more; an encoder's finer ones cost much and say little.
    let stages: Vec<(usize, usize)> = encoder.stages().into_iter().map(|at| (at, taps[at].stride)).collect();
    let stages: Vec<(usize, usize)> = stages.into_iter().filter(|&(_, stride)| stride >= 4).collect();
    if stages.len() != STAGES.len() {
        let hint = "mit-b0 is the published one; ResNets and VGG16 have such stages, too";
        return Err(ModelError::setting("encoder", &spec.encoder, "four stages of stride 4 to 32", hint));
    }
    let d = scaled(spec.decoder_channels, spec.width);
    Ok(Box::new(Plan {
        linears: stages.iter().map(|&(at, _)| LinearShape { n_in: taps[at].channels, n_out: d }).collect(),
        fuse: ConvShape::new(stages.len() * d, d, 1),
        classifier: ConvShape::new(d, spec.n_classes, 1).with_bias(),
        dropout: spec.dropout,
        stages,
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        self.stages.iter().map(|&(at, _)| at).zip(STAGES).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "decoder", channels: self.fuse.n_out, stride: self.stages[0].1 }]
    }

    fn logits_stride(&self) -> usize {
        self.stages[0].1
    }

    fn n_parameters(&self) -> usize {
        let linears: usize = self.linears.iter().map(LinearShape::n_parameters).sum();
        linears + ConvBn::n_parameters(self.fuse) + self.classifier.n_parameters()
    }

    fn trace(&self, _image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let fine_hw = encoder.sizes[self.stages[0].0];
        let mut macs = self.fuse.macs(fine_hw)?.0 + self.classifier.macs(fine_hw)?.0;
        for (linear, &(at, _)) in self.linears.iter().zip(&self.stages) {
            macs += linear.macs(encoder.sizes[at].iter().product());
        }
        Ok(DecoderTrace { macs, sizes: vec![fine_hw], logits_hw: fine_hw, ..DecoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let (stages, fuse) = (scope.pp("mlp_stage"), scope.pp("fuse_stage"));
        let n = self.linears.len();
        let linear = |(i, shape): (usize, &LinearShape)| Linear::new(*shape, &stages.pp(n - 1 - i).pp("linear"));
        Ok(Box::new(SegFormer {
            linears: self.linears.iter().enumerate().map(linear).collect::<Result<_>>()?,
            fuse: ConvBnRelu::new(self.fuse, NORM, &fuse.pp(0), &fuse.pp(1))?,
            // No normalisation follows: with fan-out of a few classes the first logits would be an order too large.
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
            dropout: self.dropout,
            dropout_name: scope.pp("dropout").path().to_string(),
        }))
    }
}

struct SegFormer {
    linears: Vec<Linear>,
    fuse: ConvBnRelu,
    classifier: Conv2d,
    dropout: f64,
    dropout_name: String,
}

impl SegFormer {
    /// A stage's map through its linear layer, on the grid `fine_hw`.
    fn projected(&self, linear: &Linear, map_nchw: &Tensor, fine_hw: [usize; 2]) -> Result<Tensor> {
        let (_, _, h, w) = map_nchw.dims4()?;
        let map = to_maps(&linear.forward(&to_tokens(map_nchw)?)?, [h, w])?;
        Ok(resize_bilinear(&map, fine_hw, false)?)
    }
}

impl Decoder for SegFormer {
    fn forward(&self, encoder: EncoderOutput, _image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let maps: [Tensor; STAGES.len()] = encoder.into_maps()?;
        let (_, _, h, w) = maps[0].dims4()?;
        let project = |(linear, map): (&Linear, &Tensor)| self.projected(linear, map, [h, w]);
        let projected = self.linears.iter().zip(&maps).rev().map(project).collect::<Result<Vec<_>>>()?;
        let fused = self.fuse.forward(&concat_channels(&projected.iter().collect::<Vec<_>>())?, mode)?;
        let logits_nchw = self.classifier.forward(&dropout(&fused, self.dropout, mode, &self.dropout_name)?)?;
        let mut features: BTreeMap<_, _> = STAGES.into_iter().zip(maps).collect();
        features.insert("decoder", fused);
        Ok(SegOutput { logits_nchw, aux_logits_nchw: None, features })
    }
}
