//! VGG16 with and without batch normalisation (Simonyan and Zisserman 2015), torchvision's layout and names, without
//! the classifier.
//!
//! Thirteen 3x3 convolutions with bias in five stages, a 2x2 max pooling at the end of each. Poolings round down, as
//! torchvision's (Caffe's, on which FCN and SegNet were built, round up); their indices can be had for unpooling.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Pool2dConfig, Scope, max_pool2d, max_pool2d_with_indices};

use super::{
    Collector, ConvStyle, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Pooling,
    Wanted, pooled,
};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu, ConvRelu, ConvShape};
use crate::spec::{Tap, scaled};

const HALVING: Pool2dConfig = Pool2dConfig { kernel: [2, 2], stride: [2, 2], padding: [0, 0], ceil_mode: false };
/// In the place of a halving that the output stride forbids.
const KEEPING: Pool2dConfig = Pool2dConfig { kernel: [3, 3], stride: [1, 1], padding: [1, 1], ceil_mode: false };
const NAMES: [&str; 5] = ["pool1", "pool2", "pool3", "pool4", "pool5"];

#[derive(Clone, Debug, PartialEq, Eq)]
struct StageShape {
    convs: Vec<ConvShape>,
    pool: Pool2dConfig,
}

/// A VGG16 before it has weights.
///
/// At output stride 16 the last pooling, at 8 the last two are 3x3 of stride 1, and the convolutions behind are dilated
/// by what was saved: of an encoder at stride 8 those of the fifth stage by 2.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `pool1` to `pool5` of 64, 128, 256, 512, 512 channels at strides 2, 4, 8, 16 and 32, the
/// output stride at most; each halving rounds down. Channels times the width multiplier.
/// # Source
/// Simonyan and Zisserman 2015, table 1, configuration D; torchvision's `vgg16` and `vgg16_bn`. Dilation as DeepLab's
/// LargeFOV (Chen et al. 2015, section 3.1). DIFFERENCE: no fully connected layers; LargeFOV's first three poolings are
/// 3x3 of stride 2, here 2x2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VggPlan {
    output_stride: usize,
    norm: bool,
    /// Of the stages that are built.
    stages: Vec<StageShape>,
}

impl VggPlan {
    /// VGG16: each convolution is followed by a ReLU.
    pub fn vgg16(options: EncoderOptions) -> Self {
        Self::new(false, options)
    }

    /// VGG16 with batch normalisation between each convolution and its ReLU; the convolutions keep their bias.
    pub fn vgg16_bn(options: EncoderOptions) -> Self {
        Self::new(true, options)
    }

    fn new(norm: bool, options: EncoderOptions) -> Self {
        let published = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)];
        let (mut n_in, mut dilation) = (3, 1);
        let stage = |(i, &(base, n_convs)): (usize, &(usize, usize))| {
            let n_out = scaled(base, options.width);
            let conv = |k| ConvShape::new(if k == 0 { n_in } else { n_out }, n_out, 3).dilated(dilation).with_bias();
            let convs = (0..n_convs).map(conv).collect();
            let kept = (2 << i) > options.output_stride;
            n_in = n_out;
            dilation *= if kept { 2 } else { 1 };
            StageShape { convs, pool: if kept { KEEPING } else { HALVING } }
        };
        let stages = published[..options.depth.clamp(1, 5)].iter().enumerate().map(stage).collect();
        Self { output_stride: options.output_stride, norm, stages }
    }

    fn channels(&self) -> impl Iterator<Item = usize> {
        // No stage is ever empty.
        self.stages.iter().map(|stage| stage.convs.last().map_or(0, |conv| conv.n_out))
    }
}

impl EncoderPlan for VggPlan {
    fn taps(&self) -> Vec<Tap> {
        let tap =
            |(i, channels): (usize, usize)| Tap { name: NAMES[i], channels, stride: (2 << i).min(self.output_stride) };
        self.channels().enumerate().map(tap).collect()
    }

    fn pools(&self) -> Vec<usize> {
        match self.stages.iter().all(|stage| stage.pool == HALVING) {
            true => self.channels().collect(),
            false => Vec::new(),
        }
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn conv_style(&self) -> ConvStyle {
        if self.norm { ConvStyle::BiasNorm } else { ConvStyle::Bias }
    }

    fn n_parameters(&self) -> usize {
        let convs = self.stages.iter().flat_map(|stage| &stage.convs);
        convs.map(|conv| if self.norm { ConvBn::n_parameters(*conv) } else { conv.n_parameters() }).sum()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut trace, mut hw) = (EncoderTrace::default(), hw);
        let with_indices = !self.pools().is_empty();
        for stage in &self.stages {
            for conv in &stage.convs {
                let (macs, out_hw) = conv.macs(hw)?;
                trace.macs += macs;
                hw = out_hw;
            }
            if with_indices {
                trace.pool_sizes.push(hw);
            }
            hw = pooled(stage.pool, hw)?;
            trace.sizes.push(hw);
        }
        Ok(trace)
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let at = scope.pp("features");
        // torchvision numbers every layer of one sequence: convolution, normalisation, ReLU, pooling.
        let mut place = 0;
        let mut stages = Vec::with_capacity(self.stages.len());
        for shape in &self.stages {
            let mut convs = Vec::with_capacity(shape.convs.len());
            for conv in &shape.convs {
                convs.push(match self.norm {
                    true => {
                        let config = BatchNormConfig::default();
                        Conv::Normed(ConvBnRelu::new(*conv, config, &at.pp(place), &at.pp(place + 1))?)
                    }
                    false => Conv::Plain(ConvRelu::new(*conv, &at.pp(place))?),
                });
                place += if self.norm { 3 } else { 2 };
            }
            place += 1;
            stages.push(Stage { convs, pool: shape.pool });
        }
        Ok(Box::new(Vgg { stages }))
    }
}

enum Conv {
    Plain(ConvRelu),
    Normed(ConvBnRelu),
}

impl Conv {
    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Plain(conv) => conv.forward(x_nchw, mode),
            Self::Normed(conv) => conv.forward(x_nchw, mode),
        }
    }
}

struct Stage {
    convs: Vec<Conv>,
    pool: Pool2dConfig,
}

struct Vgg {
    stages: Vec<Stage>,
}

impl Encoder for Vgg {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = images_nchw.clone();
        for (i, stage) in self.stages.iter().enumerate() {
            x = stage.convs.iter().try_fold(x, |x, conv| conv.forward(&x, mode))?;
            x = match maps.wants_pools() {
                true => {
                    let (_, _, h, w) = x.dims4()?;
                    let (maxima, indices) = max_pool2d_with_indices(&x, stage.pool)?;
                    maps.keep_pool(Pooling { indices, hw: [h, w] });
                    maxima
                }
                false => max_pool2d(&x, stage.pool)?,
            };
            maps.offer(i, &x);
        }
        Ok(maps.finish())
    }
}
