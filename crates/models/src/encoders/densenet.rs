//! DenseNet-169 (Huang et al. 2017), torchvision's layout and names, without the classifier.
//!
//! Each layer of a block sees what all layers before it gave. Between blocks a transition halves the channels and the
//! grid. The graph of a training step keeps each block's output alone ([`DenseBlock`]). The dilated variants are
//! SSNet's (Zeng et al. 2019): a transition that would step beyond the output stride keeps its convolution and loses
//! its pooling, and the 3x3 convolutions of the blocks behind are dilated by what was saved.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Init, Mode, Pool2dConfig, Scope, avg_pool2d, max_pool2d};

use super::{
    Collector, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted, pooled,
};
use crate::error::Result;
use crate::layers::{BnRelu, Conv2d, ConvBn, ConvShape, DenseBlock, DenseLayerShape};
use crate::spec::{Tap, scaled};

const STEM_POOL: Pool2dConfig = Pool2dConfig { kernel: [3, 3], stride: [2, 2], padding: [1, 1], ceil_mode: false };
const HALVING: Pool2dConfig = Pool2dConfig { kernel: [2, 2], stride: [2, 2], padding: [0, 0], ceil_mode: false };
const NAMES: [&str; 5] = ["stem", "transition1", "transition2", "transition3", "norm5"];
const NORM: BatchNormConfig = BatchNormConfig { eps: 1e-5, momentum: 0.1 };
/// torchvision's for this network; for its others it is fan-out.
const INIT: Init = Init::KaimingFanIn;
/// Channels of a layer's 1x1 convolution, in growth rates.
const BOTTLENECK: usize = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
struct StageShape {
    layers: Vec<DenseLayerShape>,
    /// The transition's convolution; none behind the last block.
    transition: Option<ConvShape>,
    /// Whether the transition's pooling is there.
    pooled: bool,
}

impl StageShape {
    fn n_out(&self) -> usize {
        // No block is ever empty.
        self.layers.last().map_or(0, |layer| layer.narrow.n_in + layer.grow.n_out)
    }
}

/// A DenseNet before it has weights.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `stem` of 64 channels at stride 2, `transition1` to `transition3` of 128, 256 and 640
/// channels at strides 4, 8 and 16, taken between a transition's convolution and its pooling, and `norm5` of 1664
/// channels at 32, after its ReLU; the output stride at most. The stem rounds sizes up, the transitions down. Channels
/// times the width multiplier, which scales growth rate and stem.
/// # Source
/// Huang et al. 2017, table 1; torchvision's `densenet169`; taps and dilation of SSNet (Zeng et al. 2019). DIFFERENCE:
/// segmentation_models.pytorch hands out the maps before a transition's convolution; SSNet's deepest map has no ReLU
/// behind it, torchvision's classifier sees it with one; no global pooling and no classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseNetPlan {
    output_stride: usize,
    stem: ConvShape,
    /// Of the stages that are built.
    stages: Vec<StageShape>,
}

impl DenseNetPlan {
    /// DenseNet-169: blocks of 6, 12, 32 and 32 layers, growth rate 32.
    pub fn densenet169(options: EncoderOptions) -> Self {
        let growth = scaled(32, options.width);
        let stem = ConvShape::new(3, scaled(64, options.width), 7).strided(2);
        let (mut channels, mut dilation) = (stem.n_out, 1);
        let n_layers = [6, 12, 32, 32];
        let stage = |i: usize| {
            let layer = |k: usize| DenseLayerShape {
                narrow: ConvShape::new(channels + k * growth, BOTTLENECK * growth, 1),
                grow: ConvShape::new(BOTTLENECK * growth, growth, 3).dilated(dilation),
            };
            let layers = (0..n_layers[i]).map(layer).collect();
            channels += n_layers[i] * growth;
            let last = i + 1 == n_layers.len();
            let pooled = !last && (8 << i) <= options.output_stride;
            let transition = (!last).then(|| ConvShape::new(channels, channels / 2, 1));
            channels /= 2;
            dilation *= if last || pooled { 1 } else { 2 };
            StageShape { layers, transition, pooled }
        };
        let stages = (0..options.depth.clamp(1, 5) - 1).map(stage).collect();
        Self { output_stride: options.output_stride, stem, stages }
    }
}

impl EncoderPlan for DenseNetPlan {
    fn taps(&self) -> Vec<Tap> {
        let out = |stage: &StageShape| stage.transition.map_or(stage.n_out(), |conv| conv.n_out);
        let channels = std::iter::once(self.stem.n_out).chain(self.stages.iter().map(out));
        let tap =
            |(i, channels): (usize, usize)| Tap { name: NAMES[i], channels, stride: (2 << i).min(self.output_stride) };
        channels.enumerate().map(tap).collect()
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn n_parameters(&self) -> usize {
        let stage = |stage: &StageShape| {
            let end = match stage.transition {
                Some(conv) => BnRelu::n_parameters(conv.n_in) + conv.n_parameters(),
                None => BnRelu::n_parameters(stage.n_out()),
            };
            end + stage.layers.iter().map(DenseLayerShape::n_parameters).sum::<usize>()
        };
        ConvBn::n_parameters(self.stem) + self.stages.iter().map(stage).sum::<usize>()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut macs, mut hw) = self.stem.macs(hw)?;
        let mut sizes = vec![hw];
        if !self.stages.is_empty() {
            hw = pooled(STEM_POOL, hw)?;
        }
        for stage in &self.stages {
            for layer in &stage.layers {
                macs += layer.macs(hw)?;
            }
            if let Some(conv) = &stage.transition {
                macs += conv.macs(hw)?.0;
            }
            sizes.push(hw);
            // Behind the last stage that is built there is no pooling either.
            if stage.pooled && sizes.len() <= self.stages.len() {
                hw = pooled(HALVING, hw)?;
            }
        }
        Ok(EncoderTrace { macs, sizes, ..EncoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let at = scope.pp("features");
        let stage = |(i, shape): (usize, &StageShape)| -> Result<Stage> {
            let block = DenseBlock::new(&shape.layers, INIT, NORM, &at.pp(format_args!("denseblock{}", i + 1)))?;
            let end = at.pp(format_args!("transition{}", i + 1));
            let (norm, conv) = match shape.transition {
                Some(conv) => (end.pp("norm"), Some(Conv2d::with_init(conv, INIT, &end.pp("conv"))?)),
                None => (at.pp("norm5"), None),
            };
            Ok(Stage { block, norm: BnRelu::new(shape.n_out(), NORM, &norm)?, conv, pooled: shape.pooled })
        };
        Ok(Box::new(DenseNet {
            stem: ConvBn::with_init(self.stem, INIT, NORM, &at.pp("conv0"), &at.pp("norm0"))?,
            stages: self.stages.iter().enumerate().map(stage).collect::<Result<_>>()?,
        }))
    }
}

struct Stage {
    block: DenseBlock,
    norm: BnRelu,
    conv: Option<Conv2d>,
    pooled: bool,
}

struct DenseNet {
    stem: ConvBn,
    stages: Vec<Stage>,
}

impl Encoder for DenseNet {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = self.stem.forward_act(images_nchw, None, true, mode)?;
        maps.offer(0, &x);
        if !self.stages.is_empty() {
            x = max_pool2d(&x, STEM_POOL)?;
        }
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.block.forward(&x, mode)?;
            x = stage.norm.forward(&x, mode)?;
            if let Some(conv) = &stage.conv {
                x = conv.forward(&x)?;
            }
            maps.offer(i + 1, &x);
            if stage.pooled && i + 1 < self.stages.len() {
                x = avg_pool2d(&x, HALVING)?;
            }
        }
        Ok(maps.finish())
    }
}
