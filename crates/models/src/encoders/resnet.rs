//! ResNet-18 and -34 (He et al. 2016), torchvision's layout and names, without the classifier.
//!
//! Output strides 16 and 8 follow segmentation_models.pytorch: a stage that would step beyond the output stride keeps
//! stride 1 and every 3x3 convolution of it is dilated by what was saved. (torchvision's `replace_stride_with_dilation`
//! differs in the stage's first block and does not exist for these two networks.)

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Pool2dConfig, Scope, max_pool2d};

use super::{Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTaps, EncoderTrace, Normalisation};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu, ConvShape};
use crate::spec::{Tap, scaled};

const STEM_POOL: Pool2dConfig = Pool2dConfig { kernel: [3, 3], stride: [2, 2], padding: [1, 1], ceil_mode: false };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BlockShape {
    conv1: ConvShape,
    conv2: ConvShape,
    downsample: Option<ConvShape>,
}

impl BlockShape {
    fn convs(&self) -> impl Iterator<Item = ConvShape> {
        [Some(self.conv1), Some(self.conv2), self.downsample].into_iter().flatten()
    }

    fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        let (first, inner_hw) = self.conv1.macs(hw)?;
        let (second, out_hw) = self.conv2.macs(inner_hw)?;
        let skip = self.downsample.map_or(Ok(0), |conv| conv.macs(hw).map(|(macs, _)| macs))?;
        Ok((first + second + skip, out_hw))
    }
}

/// A ResNet of basic blocks before it has weights.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `low` `[n, 64, ceil(h / 4), ceil(w / 4)]` and `high` `[n, 512, ceil(h / s), ceil(w / s)]`
/// at output stride `s`, channels times the width multiplier
/// # Source
/// He et al. 2016, section 4.1 and table 1; names and stem of torchvision's `resnet18` and `resnet34`, dilation of
/// segmentation_models.pytorch. DIFFERENCE: no global pooling and no classifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResNetPlan {
    output_stride: usize,
    stem: ConvShape,
    stages: [Vec<BlockShape>; 4],
}

impl ResNetPlan {
    /// ResNet-18: 2, 2, 2, 2 blocks.
    pub fn resnet18(options: EncoderOptions) -> Self {
        Self::new([2, 2, 2, 2], options)
    }

    /// ResNet-34: 3, 4, 6, 3 blocks.
    pub fn resnet34(options: EncoderOptions) -> Self {
        Self::new([3, 4, 6, 3], options)
    }

    fn new(n_blocks: [usize; 4], options: EncoderOptions) -> Self {
        let channels = |base| scaled(base, options.width);
        let stem = ConvShape::new(3, channels(64), 7).strided(2);
        let mut n_in = stem.n_out;
        let stages = std::array::from_fn(|i| {
            let n_out = channels(64 << i);
            let published_stride = 4 << i;
            let step = if i == 0 { 1 } else { 2 };
            let (stride, dilation) = match published_stride > options.output_stride {
                true => (1, published_stride / options.output_stride),
                false => (step, 1),
            };
            let block = |b| {
                let (n_in, stride) = if b == 0 { (n_in, stride) } else { (n_out, 1) };
                BlockShape {
                    conv1: ConvShape::new(n_in, n_out, 3).strided(stride).dilated(dilation),
                    conv2: ConvShape::new(n_out, n_out, 3).dilated(dilation),
                    // Decided by the published network, so that neither dilation nor width changes the tensors.
                    downsample: (b == 0 && i > 0).then(|| ConvShape::new(n_in, n_out, 1).strided(stride)),
                }
            };
            let blocks = (0..n_blocks[i]).map(block).collect();
            n_in = n_out;
            blocks
        });
        Self { output_stride: options.output_stride, stem, stages }
    }

    fn channels(&self, stage: usize) -> usize {
        // Stages are never empty: both public constructors give each two blocks or more.
        self.stages[stage].last().map_or(0, |block| block.conv2.n_out)
    }
}

impl EncoderPlan for ResNetPlan {
    fn taps(&self) -> EncoderTaps {
        EncoderTaps {
            low: Tap { name: "low", channels: self.channels(0), stride: 4 },
            high: Tap { name: "high", channels: self.channels(3), stride: self.output_stride },
        }
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] }
    }

    fn prefers_separable(&self) -> bool {
        false
    }

    fn n_parameters(&self) -> usize {
        let blocks = self.stages.iter().flatten().flat_map(BlockShape::convs);
        std::iter::once(self.stem).chain(blocks).map(ConvBn::n_parameters).sum()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut macs, hw) = self.stem.macs(hw)?;
        // Pooling halves as a 3x3 convolution of stride 2 does.
        let mut hw = ConvShape::depthwise(self.stem.n_out, 3).strided(2).output_hw(hw)?;
        let mut low_hw = hw;
        for (i, stage) in self.stages.iter().enumerate() {
            for block in stage {
                let (block_macs, out_hw) = block.macs(hw)?;
                macs += block_macs;
                hw = out_hw;
            }
            if i == 0 {
                low_hw = hw;
            }
        }
        Ok(EncoderTrace { macs, low_hw, high_hw: hw })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let config = BatchNormConfig::default();
        let stem = ConvBnRelu::new(self.stem, config, &scope.pp("conv1"), &scope.pp("bn1"))?;
        let stage = |i: usize| -> Result<Vec<BasicBlock>> {
            let at = scope.pp(format_args!("layer{}", i + 1));
            self.stages[i].iter().enumerate().map(|(b, shape)| BasicBlock::new(shape, &at.pp(b))).collect()
        };
        Ok(Box::new(ResNet { stem, stages: [stage(0)?, stage(1)?, stage(2)?, stage(3)?] }))
    }
}

struct BasicBlock {
    conv1: ConvBnRelu,
    conv2: ConvBn,
    downsample: Option<ConvBn>,
}

impl BasicBlock {
    fn new(shape: &BlockShape, scope: &Scope) -> Result<Self> {
        let config = BatchNormConfig::default();
        let skip = scope.pp("downsample");
        let downsample = shape.downsample.map(|conv| ConvBn::new(conv, config, &skip.pp(0), &skip.pp(1)));
        Ok(Self {
            conv1: ConvBnRelu::new(shape.conv1, config, &scope.pp("conv1"), &scope.pp("bn1"))?,
            conv2: ConvBn::new(shape.conv2, config, &scope.pp("conv2"), &scope.pp("bn2"))?,
            downsample: downsample.transpose()?,
        })
    }

    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let skip = self.downsample.as_ref().map(|skip| skip.forward(x_nchw, mode)).transpose()?;
        let inner = self.conv1.forward(x_nchw, mode)?;
        self.conv2.forward_act(&inner, Some(skip.as_ref().unwrap_or(x_nchw)), true, mode)
    }
}

struct ResNet {
    stem: ConvBnRelu,
    stages: [Vec<BasicBlock>; 4],
}

impl Encoder for ResNet {
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<EncoderOutput> {
        let x = max_pool2d(&self.stem.forward(images_nchw, mode)?, STEM_POOL)?;
        let run = |x: Tensor, stage: &[BasicBlock]| stage.iter().try_fold(x, |x, block| block.forward(&x, mode));
        let low_nchw = run(x, &self.stages[0])?;
        let high_nchw = self.stages[1..].iter().try_fold(low_nchw.clone(), |x, stage| run(x, stage))?;
        Ok(EncoderOutput { low_nchw, high_nchw })
    }
}
