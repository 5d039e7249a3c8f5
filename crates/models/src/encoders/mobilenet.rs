//! MobileNetV2 (Sandler et al. 2018), torchvision's layout and names, without the classifier.
//!
//! A stem, seventeen inverted residuals (pointwise expansion, depthwise 3x3, linear pointwise projection; ReLU6 behind
//! the first two) and a last pointwise expansion to 1280 channels.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Scope};

use super::{Collector, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu6, ConvShape};
use crate::spec::{Tap, scaled};

/// Expansion, channels, repetitions and stride of the published stages.
const PUBLISHED: [(usize, usize, usize, usize); 7] =
    [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];
/// torchvision's places of the modules whose maps are handed out; the last one is the last expansion, or the block
/// before it where there is none.
const NAMES: [&str; 5] = ["features1", "features3", "features6", "features13", "features18"];
const TAPPED: [usize; 5] = [1, 3, 6, 13, 18];
const LAST_BLOCK: (usize, &str) = (17, "features17");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BlockShape {
    expand: Option<ConvShape>,
    depthwise: ConvShape,
    project: ConvShape,
    /// Decided by the published network: dilation adds no residual where a stride was.
    residual: bool,
}

impl BlockShape {
    fn convs(&self) -> impl Iterator<Item = ConvShape> {
        [self.expand, Some(self.depthwise), Some(self.project)].into_iter().flatten()
    }
}

/// A MobileNetV2 before it has weights.
///
/// A stage that would step beyond the output stride keeps stride 1; its depthwise convolutions are dilated by what was
/// saved (at stride 8: from the 64-channel stage on by 2, from the 160-channel stage on by 4), the first of the stage
/// too unless `gradual`.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `features1`, `features3`, `features6`, `features13` and `features18` of 16, 24, 32, 96 and
/// 1280 channels at strides 2, 4, 8, 16 and 32, the output stride at most; sizes rounded up. Without `expansion` the
/// last is `features17` of 320 channels. Channels times the width multiplier.
/// # Source
/// Sandler et al. 2018, table 2; names and taps of torchvision's `mobilenet_v2` and segmentation_models.pytorch.
/// Without `expansion` and with `gradual`: CIRKD's. DIFFERENCE: the width multiplier rounds as everywhere here and
/// applies to the 1280 channels too; no global pooling and no classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MobileNetV2Plan {
    output_stride: usize,
    stem: ConvShape,
    /// Of the blocks that are built.
    blocks: Vec<BlockShape>,
    last: Option<ConvShape>,
}

impl MobileNetV2Plan {
    /// MobileNetV2 of multiplier 1: seventeen inverted residuals.
    pub fn mobilenetv2(options: EncoderOptions) -> Self {
        let channels = |base| scaled(base, options.width);
        let stem = ConvShape::new(3, channels(32), 3).strided(2);
        let (mut n_in, mut stride, mut dilation) = (stem.n_out, 2, 1);
        let mut blocks = Vec::new();
        for (factor, base, n, step) in PUBLISHED {
            let (before, kept) = (dilation, stride * step > options.output_stride);
            match kept {
                true => dilation *= step,
                false => stride *= step,
            }
            for b in 0..n {
                let first = b == 0;
                let (n_out, hidden) = (channels(base), factor * n_in);
                let taken = if first && !kept { step } else { 1 };
                let seeing = if first && options.gradual { before } else { dilation };
                blocks.push(BlockShape {
                    expand: (factor > 1).then(|| ConvShape::new(n_in, hidden, 1)),
                    depthwise: ConvShape::depthwise(hidden, 3).strided(taken).dilated(seeing),
                    project: ConvShape::new(hidden, n_out, 1),
                    residual: !first,
                });
                n_in = n_out;
            }
        }
        let depth = options.depth.clamp(1, 5);
        blocks.truncate(TAPPED[depth - 1]);
        let last = (depth == 5 && options.expansion).then(|| ConvShape::new(n_in, channels(1280), 1));
        Self { output_stride: options.output_stride, stem, blocks, last }
    }

    fn convs(&self) -> impl Iterator<Item = ConvShape> {
        let blocks = self.blocks.iter().flat_map(BlockShape::convs);
        std::iter::once(self.stem).chain(blocks).chain(self.last)
    }

    /// Modules whose maps are handed out, by torchvision's place, and the maps' names.
    fn tapped(&self) -> Vec<(usize, &'static str)> {
        let n_modules = 1 + self.blocks.len() + usize::from(self.last.is_some());
        let published = TAPPED.into_iter().zip(NAMES).filter(|(place, _)| *place < n_modules);
        let cut = (n_modules == LAST_BLOCK.0 + 1).then_some(LAST_BLOCK);
        published.chain(cut).collect()
    }
}

impl EncoderPlan for MobileNetV2Plan {
    fn taps(&self) -> Vec<Tap> {
        let channels = |place: usize| match (self.blocks.get(place - 1), self.last) {
            (Some(block), _) => block.project.n_out,
            (None, last) => last.map_or(0, |conv| conv.n_out),
        };
        let tap = |(i, (place, name)): (usize, (usize, &'static str))| Tap {
            name,
            channels: channels(place),
            stride: (2 << i).min(self.output_stride),
        };
        self.tapped().into_iter().enumerate().map(tap).collect()
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn n_parameters(&self) -> usize {
        self.convs().map(ConvBn::n_parameters).sum()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let tapped = self.tapped();
        let (mut macs, mut hw) = self.stem.macs(hw)?;
        let mut sizes = Vec::with_capacity(tapped.len());
        let modules = self.blocks.iter().map(|block| block.convs().collect()).chain(self.last.map(|conv| vec![conv]));
        for (i, convs) in modules.enumerate() {
            let convs: Vec<ConvShape> = convs;
            for conv in convs {
                let (more, out_hw) = conv.macs(hw)?;
                macs += more;
                hw = out_hw;
            }
            if tapped.iter().any(|(place, _)| *place == i + 1) {
                sizes.push(hw);
            }
        }
        Ok(EncoderTrace { macs, sizes, ..EncoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let at = scope.pp("features");
        let config = BatchNormConfig::default();
        let outer = |shape, place: usize| {
            let at = at.pp(place);
            ConvBnRelu6::new(shape, config, &at.pp(0), &at.pp(1))
        };
        let block = |(i, shape): (usize, &BlockShape)| Block::new(shape, &at.pp(i + 1).pp("conv"));
        Ok(Box::new(MobileNetV2 {
            stem: outer(self.stem, 0)?,
            blocks: self.blocks.iter().enumerate().map(block).collect::<Result<_>>()?,
            last: self.last.map(|shape| outer(shape, 1 + self.blocks.len())).transpose()?,
            tapped: self.tapped().into_iter().map(|(place, _)| place).collect(),
        }))
    }
}

struct Block {
    /// Expansion, where there is one, and depthwise convolution.
    inner: Vec<ConvBnRelu6>,
    project: ConvBn,
    residual: bool,
}

impl Block {
    fn new(shape: &BlockShape, scope: &Scope) -> Result<Self> {
        let config = BatchNormConfig::default();
        let rectified = shape.expand.into_iter().chain([shape.depthwise]).enumerate();
        let inner = rectified.map(|(i, conv)| {
            let at = scope.pp(i);
            ConvBnRelu6::new(conv, config, &at.pp(0), &at.pp(1))
        });
        let inner = inner.collect::<Result<Vec<_>>>()?;
        let place = inner.len();
        let project = ConvBn::new(shape.project, config, &scope.pp(place), &scope.pp(place + 1))?;
        Ok(Self { inner, project, residual: shape.residual })
    }

    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let inner = self.inner.iter().try_fold(x_nchw.clone(), |x, conv| conv.forward(&x, mode))?;
        self.project.forward_act(&inner, self.residual.then_some(x_nchw), false, mode)
    }
}

struct MobileNetV2 {
    stem: ConvBnRelu6,
    blocks: Vec<Block>,
    last: Option<ConvBnRelu6>,
    /// torchvision's places of the modules whose maps are handed out.
    tapped: Vec<usize>,
}

impl Encoder for MobileNetV2 {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = self.stem.forward(images_nchw, mode)?;
        let mut tap = 0;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, mode)?;
            if self.tapped.contains(&(i + 1)) {
                maps.offer(tap, &x);
                tap += 1;
            }
        }
        if let Some(last) = &self.last {
            maps.offer(tap, &last.forward(&x, mode)?);
        }
        Ok(maps.finish())
    }
}
