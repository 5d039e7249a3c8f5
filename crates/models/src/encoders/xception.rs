//! Aligned Xception-41 and -65 (Chen et al. 2018, figure 4), timm's layout and names, without the classifier.
//!
//! Two stem convolutions, three entry blocks, eight or sixteen middle blocks, two exit blocks; each block is three separable
//! convolutions, the stride sits in the third. In all but the last block a ReLU precedes each separable convolution and
//! none is inside it; the last block has no skip and its ReLUs follow both parts of each convolution. Normalisation
//! constant 1e-3.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Mode, Scope, relu};

use super::{Collector, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted};
use crate::error::Result;
use crate::layers::{ConvBn, ConvBnRelu, ConvShape, SeparableConv, SeparableShape};
use crate::spec::{Tap, scaled};

const NORM: BatchNormConfig = BatchNormConfig { eps: 1e-3, momentum: 0.1 };
/// Maps it hands out, shallow to deep. All but `low` end a published stage: `entry1` to `entry3` and `exit1` are what the
/// second convolution of a strided block gives, after its ReLU; `exit2` is the last block's output. `low` is `entry2`
/// before the ReLU.
const NAMES: [&str; 6] = ["entry1", "low", "entry2", "entry3", "exit1", "exit2"];
/// Place of the fine map among the taps, and the block that holds it.
const LOW: usize = 1;
const LOW_BLOCK: usize = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    Identity,
    Projection(ConvShape),
    /// The last block: no skip, ReLU inside the convolutions instead of before them.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BlockShape {
    convs: [SeparableShape; 3],
    skip: Skip,
}

impl BlockShape {
    fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        let mut total = match self.skip {
            Skip::Projection(conv) => conv.macs(hw)?.0,
            Skip::Identity | Skip::None => 0,
        };
        let mut at = hw;
        for conv in &self.convs {
            let (macs, out) = conv.macs(at)?;
            total += macs;
            at = out;
        }
        Ok((total, at))
    }
}

/// An aligned Xception before it has weights.
///
/// # Source
/// Chen et al. 2018 (DeepLabv3+), figure 4; names of timm's `xception65`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XceptionPlan {
    output_stride: usize,
    stem: [ConvShape; 2],
    blocks: Vec<BlockShape>,
}

impl XceptionPlan {
    /// Xception-41: eight middle blocks.
    ///
    /// Strides, shapes and source as [`XceptionPlan::xception65`].
    pub fn xception41(options: EncoderOptions) -> Self {
        Self::new(8, options)
    }

    /// Xception-65: sixteen middle blocks.
    ///
    /// A block that would step beyond the output stride keeps stride 1; the blocks after it are dilated by what was
    /// saved. Output stride 16: dilation 2 in the last block. Output stride 8: 2 from the first middle block on, 4 in
    /// the last.
    ///
    /// # Shapes
    /// Images `[n, 3, h, w]` to `entry1` of 128 channels at stride 2, `low` and `entry2` of 256 at 4, `entry3` of 728 at
    /// 8, `exit1` of 1024 at 16 and `exit2` of 2048 at 32, the output stride at most; sizes rounded up, channels times
    /// the width multiplier
    /// # Source
    /// Chen et al. 2018 (DeepLabv3+), figure 4; timm's `xception65` and its taps. DIFFERENCE: `low` is taken before the
    /// ReLU where timm's tap (`entry2`) lies after it, as DeepLab's own code does; no global pooling and no classifier.
    pub fn xception65(options: EncoderOptions) -> Self {
        Self::new(16, options)
    }

    fn new(n_middle: usize, options: EncoderOptions) -> Self {
        let entry = [([128; 3], 2), ([256; 3], 2), ([728; 3], 2)];
        let middle = std::iter::repeat_n(([728; 3], 1), n_middle);
        let exit = [([728, 1024, 1024], 2), ([1536, 1536, 2048], 1)];
        let published: Vec<([usize; 3], usize)> = entry.into_iter().chain(middle).chain(exit).collect();

        let channels = |base| scaled(base, options.width);
        let stem = [ConvShape::new(3, channels(32), 3).strided(2), ConvShape::new(channels(32), channels(64), 3)];
        let (mut n_in, mut stride, mut dilation) = (stem[1].n_out, 2, 1);
        let mut blocks = Vec::with_capacity(published.len());
        for (i, &(base, step)) in published.iter().enumerate() {
            let taken = if stride * step > options.output_stride { 1 } else { step };
            let outs = base.map(channels);
            let separable = |k: usize| {
                let from = if k == 0 { n_in } else { outs[k - 1] };
                let step = if k == 2 { taken } else { 1 };
                SeparableShape::new(from, outs[k], 3).strided(step).dilated(dilation)
            };
            // Decided by the published network, so that neither dilation nor width changes the tensors.
            let skip = match (i + 1 == published.len(), step) {
                (true, _) => Skip::None,
                (false, 1) => Skip::Identity,
                (false, _) => Skip::Projection(ConvShape::new(n_in, outs[2], 1).strided(taken)),
            };
            blocks.push(BlockShape { convs: std::array::from_fn(separable), skip });
            n_in = outs[2];
            stride *= taken;
            dilation *= step / taken;
        }
        Self { output_stride: options.output_stride, stem, blocks }
    }

    /// Blocks whose second convolution gives a tap: `entry1`, `entry2`, `entry3` and `exit1`.
    fn tapped_blocks(&self) -> [usize; 4] {
        [0, LOW_BLOCK, 2, self.blocks.len() - 2]
    }
}

impl EncoderPlan for XceptionPlan {
    fn taps(&self) -> Vec<Tap> {
        let out = |block: usize, k: usize| self.blocks[block].convs[k].pointwise.n_out;
        let [entry1, entry2, entry3, exit1] = self.tapped_blocks().map(|block| out(block, 1));
        let channels = [entry1, entry2, entry2, entry3, exit1, out(self.blocks.len() - 1, 2)];
        let strides = [2, 4, 4, 8, 16, 32].map(|stride: usize| stride.min(self.output_stride));
        let tap = |i: usize| Tap { name: NAMES[i], channels: channels[i], stride: strides[i] };
        (0..NAMES.len()).map(tap).collect()
    }

    fn stages(&self) -> Vec<usize> {
        (0..NAMES.len()).filter(|&i| i != LOW).collect()
    }

    fn low_level(&self) -> usize {
        LOW
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation { mean: [0.5; 3], std: [0.5; 3] }
    }

    fn prefers_separable(&self) -> bool {
        true
    }

    fn n_parameters(&self) -> usize {
        let stem: usize = self.stem.iter().copied().map(ConvBn::n_parameters).sum();
        let block = |block: &BlockShape| {
            let skip = if let Skip::Projection(conv) = block.skip { ConvBn::n_parameters(conv) } else { 0 };
            skip + block.convs.iter().map(SeparableShape::n_parameters).sum::<usize>()
        };
        stem + self.blocks.iter().map(block).sum::<usize>()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let (mut macs, mut hw) = (0, hw);
        for conv in &self.stem {
            let (more, out) = conv.macs(hw)?;
            macs += more;
            hw = out;
        }
        let mut sizes = Vec::with_capacity(NAMES.len());
        for (i, block) in self.blocks.iter().enumerate() {
            // Only a block's third convolution is strided.
            if self.tapped_blocks().contains(&i) {
                sizes.push(hw);
            }
            if i == LOW_BLOCK {
                sizes.push(hw);
            }
            let (more, out) = block.macs(hw)?;
            macs += more;
            hw = out;
        }
        sizes.push(hw);
        Ok(EncoderTrace { macs, sizes, ..EncoderTrace::default() })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let stem = |i: usize| {
            let at = scope.pp("stem").pp(i);
            ConvBnRelu::new(self.stem[i], NORM, &at.pp("conv"), &at.pp("bn"))
        };
        let stem = [stem(0)?, stem(1)?];
        let at = scope.pp("blocks");
        let block = |(i, shape)| Block::new(shape, &at.pp(i));
        let blocks = self.blocks.iter().enumerate().map(block).collect::<Result<Vec<_>>>()?;
        Ok(Box::new(Xception { stem, blocks, tapped: self.tapped_blocks() }))
    }
}

struct Block {
    convs: [SeparableConv; 3],
    shape: BlockShape,
    projection: Option<ConvBn>,
}

impl Block {
    fn new(shape: &BlockShape, scope: &Scope) -> Result<Self> {
        let relu_inside = shape.skip == Skip::None;
        let stack = scope.pp("stack");
        let conv =
            |k: usize| SeparableConv::new(shape.convs[k], NORM, relu_inside, &stack.pp(format_args!("conv{}", k + 1)));
        let projection = match shape.skip {
            Skip::Projection(conv) => {
                let at = scope.pp("shortcut");
                Some(ConvBn::new(conv, NORM, &at.pp("conv"), &at.pp("bn"))?)
            }
            Skip::Identity | Skip::None => None,
        };
        Ok(Self { convs: [conv(0)?, conv(1)?, conv(2)?], shape: *shape, projection })
    }

    /// The block's output and what its second convolution gave, after the ReLU that follows it and, where `plain` asks
    /// for it, before.
    fn forward(&self, x_nchw: &Tensor, plain: bool, mode: Mode) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let [first, second, third] = &self.convs;
        if self.shape.skip == Skip::None {
            let mid = second.forward(&first.forward(x_nchw, mode)?, mode)?;
            return Ok((third.forward(&mid, mode)?, mid, None));
        }
        // The ReLU before a convolution is formed at the end of the one before it, where nobody else looks between.
        let mid = second.forward_act(&first.forward_act(&relu(x_nchw)?, None, true, mode)?, None, !plain, mode)?;
        let rectified = if plain { relu(&mid)? } else { mid.clone() };
        let projected = self.projection.as_ref().map(|projection| projection.forward(x_nchw, mode)).transpose()?;
        let out = third.forward_act(&rectified, Some(projected.as_ref().unwrap_or(x_nchw)), false, mode)?;
        Ok((out, rectified, plain.then_some(mid)))
    }
}

struct Xception {
    stem: [ConvBnRelu; 2],
    blocks: Vec<Block>,
    tapped: [usize; 4],
}

impl Encoder for Xception {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = self.stem[1].forward(&self.stem[0].forward(images_nchw, mode)?, mode)?;
        let mut tap = 0;
        for (i, block) in self.blocks.iter().enumerate() {
            // As DeepLab's `entry_flow/block2/.../separable_conv2_pointwise`; timm's tap lies one ReLU later.
            let (out, rectified, low) = block.forward(&x, i == LOW_BLOCK && maps.wants(LOW), mode)?;
            if i == LOW_BLOCK {
                if let Some(low) = low {
                    maps.offer(LOW, &low);
                }
                tap += 1;
            }
            if self.tapped.contains(&i) {
                maps.offer(tap, &rectified);
                tap += 1;
            }
            x = out;
        }
        maps.offer(tap, &x);
        Ok(maps.finish())
    }
}
