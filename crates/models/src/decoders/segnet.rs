//! SegNet's decoder (Badrinarayanan et al. 2017): the encoder mirrored, each pooling undone at the places where its maxima
//! lay, convolutions between.
//!
//! Names of its tensors: `blocks.{0..}.{0..}`, from the deepest on, with `conv` and, where the encoder normalises, `bn`;
//! `classifier`, the last convolution.
//!
//! A pooling's size is kept with its indices, so that odd sizes come back as they were.

use std::collections::BTreeMap;

use segdistill_ops::{Init, Mode, OpsError, Scope, max_unpool2d};

use super::{Decoder, DecoderPlan, DecoderTrace};
use crate::encoders::{EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, ConvShape, ConvStyle, StyledConv};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, Tap};

/// A SegNet decoder before it has weights.
struct Plan {
    /// Place of the deepest map among the encoder's taps, and its stride.
    high: usize,
    style: ConvStyle,
    /// Convolutions behind each unpooling, from the deepest on.
    blocks: Vec<Vec<ConvShape>>,
    classifier: ConvShape,
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let pools = encoder.pools();
    let taps = encoder.taps();
    let matching = pools.last() == taps.last().map(|tap| &tap.channels);
    if pools.is_empty() || !matching {
        let hint = "SegNet undoes each pooling by its indices and mirrors the blocks between; take vgg16-bn (as published) or vgg16";
        return Err(ModelError::setting(
            "encoder",
            &spec.encoder,
            "one made of 2x2 max poolings whose indices it keeps",
            hint,
        ));
    }
    let style = encoder.conv_style();
    // As VGG16 has them: two convolutions before each of the first two poolings, three before the others. The last one
    // of a block leads to the channels of the block above; at the top that is the classifier.
    let block = |(i, &channels): (usize, &usize)| {
        let n_convs = if i < 2 { 2 } else { 3 };
        let mut convs = vec![style.shape(channels, channels, 3); n_convs - 1];
        convs.extend(i.checked_sub(1).map(|above| style.shape(channels, pools[above], 3)));
        convs
    };
    Ok(Box::new(Plan {
        high: taps.len() - 1,
        style,
        blocks: pools.iter().enumerate().map(block).rev().collect(),
        classifier: ConvShape::new(pools[0], spec.n_classes, 3).with_bias(),
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        vec![(self.high, "high")]
    }

    fn needs_pools(&self) -> bool {
        true
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "decoder", channels: self.classifier.n_in, stride: 1 }]
    }

    fn logits_stride(&self) -> usize {
        1
    }

    fn n_parameters(&self) -> usize {
        let blocks = self.blocks.iter().flatten().map(|conv| self.style.n_parameters(*conv)).sum::<usize>();
        blocks + self.classifier.n_parameters()
    }

    fn trace(&self, image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let mut macs = self.classifier.macs(image_hw)?.0;
        for (block, &hw) in self.blocks.iter().zip(encoder.pool_sizes.iter().rev()) {
            for conv in block {
                macs += conv.macs(hw)?.0;
            }
        }
        Ok(DecoderTrace { macs, sizes: vec![image_hw], logits_hw: image_hw, ..DecoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let blocks = scope.pp("blocks");
        let block = |(i, convs): (usize, &Vec<ConvShape>)| {
            let at = blocks.pp(i);
            let conv = |(j, shape): (usize, &ConvShape)| StyledConv::new(*shape, self.style, &at.pp(j));
            convs.iter().enumerate().map(conv).collect()
        };
        Ok(Box::new(SegNet {
            blocks: self.blocks.iter().enumerate().map(block).collect::<Result<_>>()?,
            // No normalisation follows: with fan-out of a few classes the first logits would be an order too large.
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
        }))
    }
}

struct SegNet {
    blocks: Vec<Vec<StyledConv>>,
    classifier: Conv2d,
}

impl Decoder for SegNet {
    fn forward(&self, encoder: EncoderOutput, _image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let pools = encoder.pools.clone();
        if pools.len() != self.blocks.len() {
            let what = format!("an encoder kept {} poolings, its decoder undoes {}", pools.len(), self.blocks.len());
            return Err(OpsError::config(what, "an encoder hands out every pooling it publishes").into());
        }
        let [high] = encoder.into_maps()?;
        let mut x = high.clone();
        for (block, pool) in self.blocks.iter().zip(pools.iter().rev()) {
            x = max_unpool2d(&x, &pool.indices, pool.hw)?;
            for conv in block {
                x = conv.forward(&x, mode)?;
            }
        }
        let logits_nchw = self.classifier.forward(&x)?;
        let features = BTreeMap::from([("high", high), ("decoder", x)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw: None, features })
    }
}
