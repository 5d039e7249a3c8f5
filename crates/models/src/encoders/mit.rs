//! Mix Transformer (Xie et al. 2021), SegFormer's encoder, with segmentation_models.pytorch's names.
//!
//! Four stages: overlapping patches, blocks of attention with smaller maps of keys and values, a normalisation.

use candle_core::Tensor;
use segdistill_ops::{Mode, Scope, to_maps};

use super::{Collector, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted};
use crate::error::Result;
use crate::layers::{LayerNorm, MixBlock, MixBlockShape, PatchEmbedding, PatchShape};
use crate::spec::{Tap, scaled};

const HEADS: [usize; 4] = [1, 2, 5, 8];
const REDUCTIONS: [usize; 4] = [8, 4, 2, 1];
const NAMES: [&str; 4] = ["stage1", "stage2", "stage3", "stage4"];
/// Hidden features of a block's feed-forward network for each of its features.
const MLP_RATIO: usize = 4;
/// Added to the variance of the normalisation that ends a stage.
const EPS: f64 = 1e-6;

#[derive(Clone, Debug, PartialEq)]
struct StageShape {
    patches: PatchShape,
    blocks: Vec<MixBlockShape>,
}

/// A Mix Transformer before it has weights.
///
/// Stochastic depth rises linearly from 0 at the first block to [`EncoderOptions::drop_path`] at the last. An output
/// stride below 32 keeps the last patches from stepping; nothing is dilated, since attention sees the whole map anyway.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `stage1` to `stage4` of 32, 64, 160, 256 (b0) or 64, 128, 320, 512 channels at strides 4, 8,
/// 16, 32, each grid rounded up. A width multiplier scales the features of a head, 32 or 64, to multiples of 8.
/// # Source
/// Xie et al. 2021, table 6; names of segmentation_models.pytorch. Normalisations add 1e-6, those of patches and of
/// reduced keys 1e-5, as published. DIFFERENCE to transformers: 1e-5 everywhere there.
#[derive(Clone, Debug, PartialEq)]
pub struct MitPlan {
    stages: Vec<StageShape>,
    wide: bool,
}

impl MitPlan {
    /// MiT-b0: 2, 2, 2, 2 blocks of 32 features a head.
    pub fn b0(options: EncoderOptions) -> Self {
        Self::new(32, [2, 2, 2, 2], options)
    }

    /// MiT-b1: 2, 2, 2, 2 blocks of 64 features a head, as all that follow.
    pub fn b1(options: EncoderOptions) -> Self {
        Self::new(64, [2, 2, 2, 2], options)
    }

    /// MiT-b2: 3, 4, 6, 3 blocks.
    pub fn b2(options: EncoderOptions) -> Self {
        Self::new(64, [3, 4, 6, 3], options)
    }

    /// MiT-b3: 3, 4, 18, 3 blocks.
    pub fn b3(options: EncoderOptions) -> Self {
        Self::new(64, [3, 4, 18, 3], options)
    }

    /// MiT-b4: 3, 8, 27, 3 blocks.
    pub fn b4(options: EncoderOptions) -> Self {
        Self::new(64, [3, 8, 27, 3], options)
    }

    /// MiT-b5: 3, 6, 40, 3 blocks.
    pub fn b5(options: EncoderOptions) -> Self {
        Self::new(64, [3, 6, 40, 3], options)
    }

    fn new(head: usize, n_blocks: [usize; 4], options: EncoderOptions) -> Self {
        let head = scaled(head, options.width);
        let total: usize = n_blocks.iter().sum();
        // Stage i has stride 4 << i: the first exists from depth 2 on.
        let n_stages = options.depth.saturating_sub(1).clamp(1, 4);
        let (mut n_in, mut stride, mut block) = (3, 1, 0);
        let stages = (0..n_stages)
            .map(|i| {
                let features = head * HEADS[i];
                let published = if i == 0 { 4 } else { 2 };
                let step = if stride * published > options.output_stride { 1 } else { published };
                let patches = PatchShape { n_in, n_out: features, kernel: if i == 0 { 7 } else { 3 }, stride: step };
                let blocks = (block..block + n_blocks[i])
                    .map(|at| MixBlockShape {
                        features,
                        heads: HEADS[i],
                        reduction: REDUCTIONS[i],
                        hidden: features * MLP_RATIO,
                        drop_path: options.drop_path * at as f64 / (total - 1) as f64,
                    })
                    .collect();
                (n_in, stride, block) = (features, stride * step, block + n_blocks[i]);
                StageShape { patches, blocks }
            })
            .collect();
        Self { stages, wide: total > 8 }
    }
}

impl EncoderPlan for MitPlan {
    fn taps(&self) -> Vec<Tap> {
        let mut stride = 1;
        let tap = |(stage, name): (&StageShape, &'static str)| {
            stride *= stage.patches.stride;
            Tap { name, channels: stage.patches.n_out, stride }
        };
        self.stages.iter().zip(NAMES).map(tap).collect()
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn decoder_channels(&self) -> usize {
        if self.wide { 768 } else { 256 }
    }

    fn n_parameters(&self) -> usize {
        let stage = |stage: &StageShape| {
            let blocks: usize = stage.blocks.iter().map(MixBlockShape::n_parameters).sum();
            stage.patches.n_parameters() + blocks + LayerNorm::n_parameters(stage.patches.n_out)
        };
        self.stages.iter().map(stage).sum()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut trace, mut hw) = (EncoderTrace::default(), hw);
        for stage in &self.stages {
            let (macs, grid) = stage.patches.macs(hw)?;
            trace.macs += macs;
            hw = grid;
            for block in &stage.blocks {
                let (macs, attention_macs) = block.macs(hw)?;
                trace.macs += macs;
                trace.attention_macs += attention_macs;
            }
            trace.sizes.push(hw);
        }
        Ok(trace)
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let stage = |(i, shape): (usize, &StageShape)| -> Result<Stage> {
            let at = scope.pp(format!("block{i}"));
            let block = |(j, shape): (usize, &MixBlockShape)| MixBlock::new(*shape, &at.pp(j));
            Ok(Stage {
                patches: PatchEmbedding::new(shape.patches, &scope.pp(format!("patch_embed{i}")))?,
                blocks: shape.blocks.iter().enumerate().map(block).collect::<Result<_>>()?,
                norm: LayerNorm::new(shape.patches.n_out, EPS, &scope.pp(format!("norm{i}")))?,
            })
        };
        Ok(Box::new(Mit { stages: (1..).zip(&self.stages).map(stage).collect::<Result<_>>()? }))
    }
}

struct Stage {
    patches: PatchEmbedding,
    blocks: Vec<MixBlock>,
    norm: LayerNorm,
}

struct Mit {
    stages: Vec<Stage>,
}

impl Encoder for Mit {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut found = Collector::new(wanted);
        let mut map = images_nchw.clone();
        for (i, stage) in self.stages.iter().enumerate() {
            let (mut tokens, hw) = stage.patches.forward(&map)?;
            for block in &stage.blocks {
                tokens = block.forward(&tokens, hw, mode)?;
            }
            map = to_maps(&stage.norm.forward(&tokens)?, hw)?;
            found.offer(i, &map);
        }
        Ok(found.finish())
    }
}
