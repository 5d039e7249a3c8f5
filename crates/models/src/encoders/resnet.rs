//! ResNet-18, -34, -50 and -101 (He et al. 2016), torchvision's layout and names, without the classifier.
//!
//! A stage that would step beyond the output stride keeps stride 1 and is dilated by what was saved: every 3x3
//! convolution of it, as segmentation_models.pytorch and SKD have it, or all but those that see the stage before
//! (`gradual`), as torchvision's `replace_stride_with_dilation` and CIRKD have it. Both have the same weights and costs.
//!
//! The deep stem is CIRKD's and SKD's: three 3x3 convolutions of 64, 64 and 128 channels for the single 7x7, named
//! `conv1`, `bn1` to `conv3`, `bn3`. (timm's "d" stems have 32, 32 and 64 channels and other names.)

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Pool2dConfig, Scope, max_pool2d};

use super::{
    Collector, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted, pooled,
};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu, ConvShape};
use crate::spec::{Tap, scaled};

const STEM_POOL: Pool2dConfig = Pool2dConfig { kernel: [3, 3], stride: [2, 2], padding: [1, 1], ceil_mode: false };
const NAMES: [&str; 5] = ["stem", "layer1", "layer2", "layer3", "layer4"];

/// What the members of the family differ in.
#[derive(Clone, Copy)]
struct Family {
    n_blocks: [usize; 4],
    bottleneck: bool,
    deep_stem: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct BlockShape {
    /// Two (basic block) or three (bottleneck), in order.
    convs: Vec<ConvShape>,
    downsample: Option<ConvShape>,
}

impl BlockShape {
    fn n_parameters(&self) -> usize {
        self.convs.iter().copied().chain(self.downsample).map(ConvBn::n_parameters).sum()
    }

    fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        let skip = self.downsample.map_or(Ok(0), |conv| conv.macs(hw).map(|(macs, _)| macs))?;
        self.convs.iter().try_fold((skip, hw), |(total, hw), conv| {
            let (macs, out_hw) = conv.macs(hw)?;
            Ok((total + macs, out_hw))
        })
    }
}

/// A ResNet before it has weights.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `stem` at stride 2, `layer1` at stride 4, `layer2`, `layer3` and `layer4` at strides 8, 16 and
/// 32, the output stride at most; sizes rounded up. Channels are 64, 64, 128, 256, 512 (ResNet-18 and -34) or 64, 256,
/// 512, 1024, 2048, the deep stem's 128, times the width multiplier.
/// # Source
/// He et al. 2016, section 4.1 and table 1; names and plain stem of torchvision, dilation as the module says, the stride
/// of a bottleneck in its 3x3 convolution. DIFFERENCE: no global pooling and no classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResNetPlan {
    output_stride: usize,
    /// One convolution, or three where it is deep; the first has stride 2.
    stem: Vec<ConvShape>,
    pool: Pool2dConfig,
    /// Of the stages that are built.
    stages: Vec<Vec<BlockShape>>,
}

impl ResNetPlan {
    /// ResNet-18: 2, 2, 2, 2 basic blocks.
    pub fn resnet18(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [2, 2, 2, 2], bottleneck: false, deep_stem: false }, options)
    }

    /// ResNet-34: 3, 4, 6, 3 basic blocks.
    pub fn resnet34(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 6, 3], bottleneck: false, deep_stem: false }, options)
    }

    /// ResNet-50: 3, 4, 6, 3 bottlenecks.
    pub fn resnet50(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 6, 3], bottleneck: true, deep_stem: false }, options)
    }

    /// ResNet-101: 3, 4, 23, 3 bottlenecks.
    pub fn resnet101(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 23, 3], bottleneck: true, deep_stem: false }, options)
    }

    /// ResNet-18 with the deep stem.
    pub fn resnet18_deep(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [2, 2, 2, 2], bottleneck: false, deep_stem: true }, options)
    }

    /// ResNet-34 with the deep stem.
    pub fn resnet34_deep(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 6, 3], bottleneck: false, deep_stem: true }, options)
    }

    /// ResNet-50 with the deep stem.
    pub fn resnet50_deep(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 6, 3], bottleneck: true, deep_stem: true }, options)
    }

    /// ResNet-101 with the deep stem.
    pub fn resnet101_deep(options: EncoderOptions) -> Self {
        Self::new(Family { n_blocks: [3, 4, 23, 3], bottleneck: true, deep_stem: true }, options)
    }

    fn new(family: Family, options: EncoderOptions) -> Self {
        let channels = |base| scaled(base, options.width);
        let stem = match family.deep_stem {
            false => vec![ConvShape::new(3, channels(64), 7).strided(2)],
            true => vec![
                ConvShape::new(3, channels(64), 3).strided(2),
                ConvShape::new(channels(64), channels(64), 3),
                ConvShape::new(channels(64), channels(128), 3),
            ],
        };
        let expansion = if family.bottleneck { 4 } else { 1 };
        let mut published_in = if family.deep_stem { 128 } else { 64 };
        let mut dilation_before = 1;
        let stage = |i: usize| {
            let (base, published_out) = (64 << i, (64 << i) * expansion);
            let published_stride = 4 << i;
            let step = if i == 0 { 1 } else { 2 };
            let (stride, dilation) = match published_stride > options.output_stride {
                true => (1, published_stride / options.output_stride),
                false => (step, 1),
            };
            let first_dilation = if options.gradual { dilation_before } else { dilation };
            let block = |b: usize| {
                let first = b == 0;
                let n_in = channels(if first { published_in } else { published_out });
                let (d, d_out) = (channels(base), channels(published_out));
                let (stride, seeing) = if first { (stride, first_dilation) } else { (1, dilation) };
                let convs = match family.bottleneck {
                    true => vec![
                        ConvShape::new(n_in, d, 1),
                        ConvShape::new(d, d, 3).strided(stride).dilated(seeing),
                        ConvShape::new(d, d_out, 1),
                    ],
                    false => vec![
                        ConvShape::new(n_in, d, 3).strided(stride).dilated(seeing),
                        ConvShape::new(d, d, 3).dilated(dilation),
                    ],
                };
                // Decided by the published network, so that neither dilation nor width changes the tensors.
                let projected = first && (i > 0 || published_in != published_out);
                BlockShape { convs, downsample: projected.then(|| ConvShape::new(n_in, d_out, 1).strided(stride)) }
            };
            let blocks = (0..family.n_blocks[i]).map(block).collect();
            published_in = published_out;
            dilation_before = dilation;
            blocks
        };
        let stages = (0..options.depth.clamp(1, 5) - 1).map(stage).collect();
        let pool = Pool2dConfig { ceil_mode: options.ceil_pool, ..STEM_POOL };
        Self { output_stride: options.output_stride, stem, pool, stages }
    }
}

impl EncoderPlan for ResNetPlan {
    fn taps(&self) -> Vec<Tap> {
        // Neither the stem nor a stage or block is ever empty.
        let stem = self.stem.last().map_or(0, |conv| conv.n_out);
        let out = |stage: &Vec<BlockShape>| stage.last().and_then(|b| b.convs.last()).map_or(0, |conv| conv.n_out);
        let channels = std::iter::once(stem).chain(self.stages.iter().map(out));
        let tap = |(i, channels): (usize, usize)| Tap {
            name: NAMES[i],
            channels,
            stride: (2usize << i).min(self.output_stride),
        };
        channels.enumerate().map(tap).collect()
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn n_parameters(&self) -> usize {
        let stem: usize = self.stem.iter().copied().map(ConvBn::n_parameters).sum();
        stem + self.stages.iter().flatten().map(BlockShape::n_parameters).sum::<usize>()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut macs, mut hw) = (0, hw);
        for conv in &self.stem {
            let (more, out_hw) = conv.macs(hw)?;
            macs += more;
            hw = out_hw;
        }
        let mut sizes = vec![hw];
        if !self.stages.is_empty() {
            hw = pooled(self.pool, hw)?;
        }
        for stage in &self.stages {
            for block in stage {
                let (more, out_hw) = block.macs(hw)?;
                macs += more;
                hw = out_hw;
            }
            sizes.push(hw);
        }
        Ok(EncoderTrace { macs, sizes, ..EncoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let config = BatchNormConfig::default();
        let stem = |(i, shape): (usize, &ConvShape)| {
            let part = |kind: &str| scope.pp(format_args!("{kind}{}", i + 1));
            ConvBnRelu::new(*shape, config, &part("conv"), &part("bn"))
        };
        let stage = |(i, shapes): (usize, &Vec<BlockShape>)| -> Result<Vec<Block>> {
            let at = scope.pp(NAMES[i + 1]);
            shapes.iter().enumerate().map(|(b, shape)| Block::new(shape, &at.pp(b))).collect()
        };
        Ok(Box::new(ResNet {
            stem: self.stem.iter().enumerate().map(stem).collect::<Result<_>>()?,
            pool: self.pool,
            stages: self.stages.iter().enumerate().map(stage).collect::<Result<_>>()?,
        }))
    }
}

struct Block {
    /// All but the last, each with its ReLU.
    inner: Vec<ConvBnRelu>,
    last: ConvBn,
    downsample: Option<ConvBn>,
}

impl Block {
    fn new(shape: &BlockShape, scope: &Scope) -> Result<Self> {
        let config = BatchNormConfig::default();
        let skip = scope.pp("downsample");
        let downsample = shape.downsample.map(|conv| ConvBn::new(conv, config, &skip.pp(0), &skip.pp(1)));
        let part = |kind: &str, i: usize| scope.pp(format_args!("{kind}{}", i + 1));
        let n_inner = shape.convs.len() - 1;
        let inner = shape.convs[..n_inner].iter().enumerate();
        let inner = inner.map(|(i, conv)| ConvBnRelu::new(*conv, config, &part("conv", i), &part("bn", i)));
        Ok(Self {
            inner: inner.collect::<Result<_>>()?,
            last: ConvBn::new(shape.convs[n_inner], config, &part("conv", n_inner), &part("bn", n_inner))?,
            downsample: downsample.transpose()?,
        })
    }

    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let skip = self.downsample.as_ref().map(|skip| skip.forward(x_nchw, mode)).transpose()?;
        let inner = self.inner.iter().try_fold(x_nchw.clone(), |x, conv| conv.forward(&x, mode))?;
        self.last.forward_act(&inner, Some(skip.as_ref().unwrap_or(x_nchw)), true, mode)
    }
}

struct ResNet {
    stem: Vec<ConvBnRelu>,
    pool: Pool2dConfig,
    stages: Vec<Vec<Block>>,
}

impl Encoder for ResNet {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = self.stem.iter().try_fold(images_nchw.clone(), |x, conv| conv.forward(&x, mode))?;
        maps.offer(0, &x);
        if !self.stages.is_empty() {
            x = max_pool2d(&x, self.pool)?;
        }
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.iter().try_fold(x, |x, block| block.forward(&x, mode))?;
            maps.offer(i + 1, &x);
        }
        Ok(maps.finish())
    }
}
