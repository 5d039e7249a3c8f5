//! The contracting path of U-Net (Ronneberger et al. 2015), padded so that no convolution changes the size.
//!
//! Five levels of two 3x3 convolutions with ReLU, 64 to 1024 channels, 2x2 max pooling between them. Three variants: with
//! biases and no normalisation, as published; with batch normalisation and no bias; with both.
//!
//! Names of its tensors: `level{0..4}.{0,1}.conv` and, where it normalises, `.bn`.

use candle_core::Tensor;
use segdistill_ops::{Mode, Pool2dConfig, Scope, max_pool2d};

use super::{
    Collector, ConvStyle, Encoder, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace, Normalisation, Wanted,
    pooled,
};
use crate::error::Result;
use crate::layers::{ConvShape, StyledConv};
use crate::spec::{Tap, scaled};

const POOL: Pool2dConfig = Pool2dConfig { kernel: [2, 2], stride: [2, 2], padding: [0, 0], ceil_mode: false };
const NAMES: [&str; 5] = ["level0", "level1", "level2", "level3", "level4"];

/// U-Net's contracting path before it has weights.
///
/// # Shapes
/// Images `[n, 3, h, w]` to `level0` to `level4` of 64, 128, 256, 512 and 1024 channels, times the width multiplier, at
/// strides 1 to 16; sizes rounded down
/// # Source
/// Ronneberger et al. 2015, section 2 and figure 1. DIFFERENCE: padded, three input channels, no dropout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UNetPlan {
    style: ConvStyle,
    levels: Vec<[ConvShape; 2]>,
}

impl UNetPlan {
    /// The path with convolutions of `style`. It is never dilated: of the options it reads width and depth.
    pub fn new(style: ConvStyle, options: EncoderOptions) -> Self {
        let mut n_in = 3;
        let mut level = |i: usize| {
            let d = scaled(64 << i, options.width);
            let convs = [style.shape(n_in, d, 3), style.shape(d, d, 3)];
            n_in = d;
            convs
        };
        Self { style, levels: (0..options.depth.clamp(1, 5)).map(&mut level).collect() }
    }
}

impl EncoderPlan for UNetPlan {
    fn taps(&self) -> Vec<Tap> {
        let tap =
            |(i, level): (usize, &[ConvShape; 2])| Tap { name: NAMES[i], channels: level[1].n_out, stride: 1 << i };
        self.levels.iter().enumerate().map(tap).collect()
    }

    fn normalisation(&self) -> Normalisation {
        Normalisation::IMAGENET
    }

    fn conv_style(&self) -> ConvStyle {
        self.style
    }

    fn n_parameters(&self) -> usize {
        self.levels.iter().flatten().map(|shape| self.style.n_parameters(*shape)).sum()
    }

    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace> {
        let mut trace = EncoderTrace::default();
        let mut hw = hw;
        for (i, level) in self.levels.iter().enumerate() {
            if i > 0 {
                hw = pooled(POOL, hw)?;
            }
            for conv in level {
                trace.macs += conv.macs(hw)?.0;
            }
            trace.sizes.push(hw);
        }
        Ok(trace)
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>> {
        let level = |(i, shapes): (usize, &[ConvShape; 2])| -> Result<[StyledConv; 2]> {
            let at = scope.pp(NAMES[i]);
            let conv = |k: usize| StyledConv::new(shapes[k], self.style, &at.pp(k));
            Ok([conv(0)?, conv(1)?])
        };
        Ok(Box::new(UNet { levels: self.levels.iter().enumerate().map(level).collect::<Result<_>>()? }))
    }
}

struct UNet {
    levels: Vec<[StyledConv; 2]>,
}

impl Encoder for UNet {
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput> {
        let mut maps = Collector::new(wanted);
        let mut x = images_nchw.clone();
        for (i, [first, second]) in self.levels.iter().enumerate() {
            if i > 0 {
                x = max_pool2d(&x, POOL)?;
            }
            x = second.forward(&first.forward(&x, mode)?, mode)?;
            maps.offer(i, &x);
        }
        Ok(maps.finish())
    }
}
