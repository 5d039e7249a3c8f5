//! U-Net's expanding path (Ronneberger et al. 2015), and the one segmentation_models.pytorch gives to any encoder.
//!
//! On a pyramid that starts at stride 1, as U-Net's own contracting path publishes, the decoder is the paper's: up from
//! the deepest map by a 2x2 transposed convolution of stride 2 that halves the channels, concatenated behind the map of
//! that size, two 3x3 convolutions in the encoder's style, and so on to stride 1; a 1x1 classifier. An odd side, which
//! pooling rounded down, is met by output padding.
//!
//! On a pyramid that starts at stride 2, and in the `smp` layout, it is smp's: enlarged by the nearest pixel to the
//! next map's size, concatenated before it, two 3x3 convolutions with normalisation; channels halve from
//! `decoder_channels` (256) to a sixteenth of it; the last step to stride 1 has no map to join; a 3x3 classifier.
//!
//! Names of its tensors: `up{i}` (the transposed convolution), `block{i}.{0,1}`, from the deepest on, and `classifier`.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, Scope, concat_channels, resize_nearest};

use super::{Decoder, DecoderPlan, DecoderTrace};
use crate::encoders::{ConvStyle, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, ConvShape, ConvTranspose2d, StyledConv, TransposedShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap, scaled};

/// Feature names of the maps that are joined, by the logarithm of their stride.
const NAMES: [&str; 6] = ["skip1", "skip2", "skip4", "skip8", "skip16", "skip32"];

/// One step up.
#[derive(Clone, Copy)]
struct StepShape {
    /// The transposed convolution; `None` where the nearest pixel enlarges.
    up: Option<TransposedShape>,
    block: [ConvShape; 2],
}

struct Plan {
    style: ConvStyle,
    /// Places of the maps among the encoder's taps, shallow to deep, and their strides.
    inputs: Vec<(usize, usize)>,
    /// From the deepest on; those beyond the shallowest map have no map to join.
    steps: Vec<StepShape>,
    classifier: ConvShape,
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let taps = encoder.taps();
    let stages = encoder.stages();
    let strides: Vec<usize> = stages.iter().map(|&i| taps[i].stride).collect();
    if strides.len() < 2 || strides[0] > 2 || strides.windows(2).any(|pair| pair[1] != 2 * pair[0]) {
        let hint = "U-Net joins maps of every stride from 1 or 2 on; segformer and deeplabv3plus need fewer";
        return Err(ModelError::setting("encoder", &spec.encoder, "one whose stages double their stride", hint));
    }
    let classic = strides[0] == 1 && spec.layout != "smp";
    let channels: Vec<usize> = stages.iter().map(|&i| taps[i].channels).collect();
    let style = if classic { encoder.conv_style() } else { ConvStyle::Norm };
    let n_steps = if classic || strides[0] == 1 { stages.len() - 1 } else { stages.len() };
    let mut n_in = channels[stages.len() - 1];
    let step = |i: usize| {
        // Joined with the map one shallower each time.
        let n_skip = stages.len().checked_sub(2 + i).map_or(0, |k| channels[k]);
        let (up, d) = match classic {
            true => {
                let up = TransposedShape { n_in, n_out: n_in / 2, kernel: 2, stride: 2, padding: 0, bias: true };
                (Some(up), n_skip)
            }
            false => (None, scaled((spec.decoder_channels >> i).max(1), spec.width)),
        };
        let joined = up.map_or(n_in, |up| up.n_out) + n_skip;
        n_in = d;
        StepShape { up, block: [style.shape(joined, d, 3), style.shape(d, d, 3)] }
    };
    let steps: Vec<StepShape> = (0..n_steps).map(step).collect();
    Ok(Box::new(Plan {
        style,
        inputs: stages.into_iter().zip(strides).collect(),
        steps,
        classifier: ConvShape::new(n_in, spec.n_classes, if classic { 1 } else { 3 }).with_bias(),
    }))
}

impl Plan {
    /// Height and width after each step.
    fn sizes(&self, image_hw: [usize; 2], encoder: &EncoderTrace) -> Vec<[usize; 2]> {
        let skips = self.inputs.iter().rev().skip(1).map(|&(i, _)| encoder.sizes[i]);
        skips.chain([image_hw]).take(self.steps.len()).collect()
    }
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        let deepest = self.inputs.len() - 1;
        let name = |k: usize, stride: usize| if k == deepest { "high" } else { NAMES[stride.ilog2() as usize] };
        self.inputs.iter().enumerate().map(|(k, &(i, stride))| (i, name(k, stride))).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "decoder", channels: self.classifier.n_in, stride: 1 }]
    }

    fn logits_stride(&self) -> usize {
        1
    }

    fn n_parameters(&self) -> usize {
        let step = |step: &StepShape| {
            let convs = step.block.iter().map(|shape| self.style.n_parameters(*shape)).sum::<usize>();
            step.up.map_or(0, |up| up.n_parameters()) + convs
        };
        self.steps.iter().map(step).sum::<usize>() + self.classifier.n_parameters()
    }

    fn trace(&self, image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let mut from = encoder.sizes[self.inputs[self.inputs.len() - 1].0];
        let mut macs = 0;
        for (step, hw) in self.steps.iter().zip(self.sizes(image_hw, encoder)) {
            macs += step.up.map_or(0, |up| up.macs(from));
            for conv in step.block {
                macs += conv.macs(hw)?.0;
            }
            from = hw;
        }
        macs += self.classifier.macs(from)?.0;
        Ok(DecoderTrace { macs, sizes: vec![from], logits_hw: from, ..DecoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let step = |(i, shape): (usize, &StepShape)| -> Result<Step> {
            let up = shape.up.map(|up| ConvTranspose2d::new(up, &scope.pp(format_args!("up{i}"))));
            let at = scope.pp(format_args!("block{i}"));
            let conv = |k: usize| StyledConv::new(shape.block[k], self.style, &at.pp(k));
            Ok(Step { up: up.transpose()?, block: [conv(0)?, conv(1)?] })
        };
        Ok(Box::new(UNet {
            names: self.inputs().into_iter().map(|(_, name)| name).collect(),
            steps: self.steps.iter().enumerate().map(step).collect::<Result<_>>()?,
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
        }))
    }
}

struct Step {
    up: Option<ConvTranspose2d>,
    block: [StyledConv; 2],
}

struct UNet {
    names: Vec<&'static str>,
    steps: Vec<Step>,
    classifier: Conv2d,
}

fn size(map_nchw: &Tensor) -> Result<[usize; 2]> {
    let (_, _, h, w) = map_nchw.dims4()?;
    Ok([h, w])
}

impl Decoder for UNet {
    fn forward(&self, encoder: EncoderOutput, image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let maps = encoder.maps_nchw;
        let mut x = maps[maps.len() - 1].clone();
        let skips = maps.iter().rev().skip(1).map(Some).chain(std::iter::repeat(None));
        for (step, skip) in self.steps.iter().zip(skips) {
            let hw = skip.map_or(Ok(image_hw), size)?;
            let joined = match &step.up {
                Some(up) => {
                    let [h, w] = size(&x)?;
                    // Pooling rounded an odd side down.
                    let x = up.forward(&x, [hw[0].saturating_sub(2 * h), hw[1].saturating_sub(2 * w)])?;
                    skip.map_or(Ok(x.clone()), |skip| concat_channels(&[skip, &x]))?
                }
                None => {
                    let x = resize_nearest(&x, hw)?;
                    skip.map_or(Ok(x.clone()), |skip| concat_channels(&[&x, skip]))?
                }
            };
            x = step.block[1].forward(&step.block[0].forward(&joined, mode)?, mode)?;
        }
        let logits_nchw = self.classifier.forward(&x)?;
        let mut features: BTreeMap<_, _> = self.names.iter().copied().zip(maps).collect();
        features.insert("decoder", x);
        Ok(SegOutput { logits_nchw, aux_logits_nchw: None, features })
    }
}
