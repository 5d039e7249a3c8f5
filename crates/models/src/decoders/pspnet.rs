//! PSPNet (Zhao et al. 2017): average pooling to grids of 1, 2, 3 and 6 cells a side beside the deepest map.
//!
//! Names of its tensors: `pyramid.{0..3}` (one a grid), `fuse`, `classifier`, and `aux` where an auxiliary head is
//! trained.
//!
//! - `paper`, CIRKD's: each grid reduced to a quarter of the deepest map's channels by a 1x1 convolution with
//!   normalisation and ReLU, enlarged bilinearly and concatenated after that map; a 3x3 convolution to that quarter;
//!   dropout; a 1x1 classifier. The auxiliary head on the map before the last stage has a quarter of *its* channels.
//! - `skd`: the grids before the map, the auxiliary head with a quarter of the *deepest* map's channels and a bias under
//!   its normalisation, and a ResNet whose first pooling rounds up. DIFFERENCE: SKD's normalisations inside the pyramid
//!   are followed by a leaky ReLU of slope 0.01, here by ReLU as in the paper.
//! - `smp`, segmentation_models.pytorch's: on the first three stages alone (stride 8), the grids before the map, the grid
//!   of one cell with a bias instead of normalisation, a 1x1 convolution to twice `decoder_channels` (512 as published), a 3x3
//!   classifier.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, Scope, adaptive_avg_pool2d, concat_channels, dropout, relu, resize_bilinear};

use super::aux::{AuxHead, AuxShape};
use super::blocks::conv_bn_relu;
use super::{Decoder, DecoderPlan, DecoderTrace, middle};
use crate::encoders::{EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::Result;
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, PAPER, Tap, scaled};

/// Cells a side of each grid.
const GRIDS: [usize; 4] = [1, 2, 3, 6];

struct Plan {
    mid: usize,
    high: usize,
    stride: usize,
    grids: [ConvShape; 4],
    /// Whether the enlarged grids come after the map when they are concatenated.
    map_first: bool,
    fuse: ConvShape,
    classifier: ConvShape,
    aux: Option<AuxShape>,
    dropout: f64,
}

pub(super) fn options(spec: &ModelSpec, options: EncoderOptions) -> EncoderOptions {
    match spec.layout.as_str() {
        "smp" => EncoderOptions { output_stride: 32, depth: 3, ..options },
        "skd" => EncoderOptions { ceil_pool: true, expansion: false, ..options },
        _ => EncoderOptions { gradual: true, expansion: false, ..options },
    }
}

pub(super) fn plan(spec: &ModelSpec, encoder: &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>> {
    let smp = spec.layout == "smp";
    let taps = encoder.taps();
    let (mid, high) = (middle(encoder), taps.len() - 1);
    let deepest = &taps[high];
    let quarter = deepest.channels / 4;
    let grid = |cells: usize| {
        let shape = ConvShape::new(deepest.channels, quarter, 1);
        if smp && cells == 1 { shape.with_bias() } else { shape }
    };
    let joined = deepest.channels + GRIDS.len() * quarter;
    let d = if smp { scaled(2 * spec.decoder_channels, spec.width) } else { quarter };
    let aux = || match spec.layout.as_str() {
        "skd" => AuxShape::new(taps[mid].channels, quarter, spec.n_classes, true),
        _ => AuxShape::new(taps[mid].channels, taps[mid].channels / 4, spec.n_classes, false),
    };
    Ok(Box::new(Plan {
        mid,
        high,
        stride: deepest.stride,
        grids: GRIDS.map(grid),
        map_first: spec.layout == PAPER,
        fuse: ConvShape::new(joined, d, if smp { 1 } else { 3 }),
        classifier: ConvShape::new(d, spec.n_classes, if smp { 3 } else { 1 }).with_bias(),
        aux: spec.aux.then(aux),
        dropout: spec.dropout,
    }))
}

impl DecoderPlan for Plan {
    fn inputs(&self) -> Vec<(usize, &'static str)> {
        let mid = self.aux.is_some().then_some((self.mid, "mid"));
        mid.into_iter().chain([(self.high, "high")]).collect()
    }

    fn taps(&self) -> Vec<Tap> {
        vec![Tap { name: "decoder", channels: self.fuse.n_out, stride: self.stride }]
    }

    fn logits_stride(&self) -> usize {
        self.stride
    }

    fn align_corners(&self) -> bool {
        true
    }

    fn n_parameters(&self) -> usize {
        let grid = |shape: &ConvShape| if shape.bias { shape.n_parameters() } else { ConvBn::n_parameters(*shape) };
        let aux = self.aux.as_ref().map_or(0, AuxShape::n_parameters);
        let own = ConvBn::n_parameters(self.fuse) + self.classifier.n_parameters();
        self.grids.iter().map(grid).sum::<usize>() + own + aux
    }

    fn trace(&self, _image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace> {
        let hw = encoder.sizes[self.high];
        let mut macs = self.fuse.macs(hw)?.0 + self.classifier.macs(hw)?.0;
        for (shape, cells) in self.grids.iter().zip(GRIDS) {
            macs += shape.macs([cells; 2])?.0;
        }
        Ok(DecoderTrace {
            macs,
            aux_macs: self.aux.as_ref().map_or(Ok(0), |aux| aux.macs(encoder.sizes[self.mid]))?,
            sizes: vec![hw],
            logits_hw: hw,
        })
    }

    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>> {
        let at = scope.pp("pyramid");
        let grid = |(i, shape): (usize, &ConvShape)| match shape.bias {
            true => Ok(Grid::Plain(Conv2d::new(*shape, &at.pp(i).pp("conv"))?)),
            false => Ok(Grid::Normalised(conv_bn_relu(*shape, &at.pp(i))?)),
        };
        Ok(Box::new(PspNet {
            grids: self.grids.iter().enumerate().map(grid).collect::<Result<_>>()?,
            map_first: self.map_first,
            fuse: conv_bn_relu(self.fuse, &scope.pp("fuse"))?,
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &scope.pp("classifier"))?,
            aux: self.aux.as_ref().map(|aux| aux.build(self.dropout, &scope.pp("aux"))).transpose()?,
            dropout: self.dropout,
            dropout_name: scope.pp("dropout").path().to_string(),
        }))
    }
}

enum Grid {
    Normalised(ConvBnRelu),
    Plain(Conv2d),
}

impl Grid {
    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Normalised(conv) => conv.forward(x_nchw, mode),
            Self::Plain(conv) => Ok(relu(&conv.forward(x_nchw)?)?),
        }
    }
}

struct PspNet {
    grids: Vec<Grid>,
    map_first: bool,
    fuse: ConvBnRelu,
    classifier: Conv2d,
    aux: Option<AuxHead>,
    dropout: f64,
    dropout_name: String,
}

impl PspNet {
    /// The map beside its enlarged grids.
    fn pyramid(&self, high_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let (_, _, h, w) = high_nchw.dims4()?;
        let mut parts = Vec::with_capacity(1 + GRIDS.len());
        for (grid, cells) in self.grids.iter().zip(GRIDS) {
            let reduced = grid.forward(&adaptive_avg_pool2d(high_nchw, [cells; 2])?, mode)?;
            parts.push(resize_bilinear(&reduced, [h, w], true)?);
        }
        parts.insert(if self.map_first { 0 } else { parts.len() }, high_nchw.clone());
        Ok(concat_channels(&parts.iter().collect::<Vec<_>>())?)
    }
}

impl Decoder for PspNet {
    fn forward(&self, encoder: EncoderOutput, _image_hw: [usize; 2], mode: Mode) -> Result<SegOutput> {
        let mut features = BTreeMap::new();
        let (aux_logits_nchw, high) = match &self.aux {
            None => {
                let [high] = encoder.into_maps()?;
                (None, high)
            }
            Some(aux) => {
                let [mid, high] = encoder.into_maps()?;
                let logits = mode.is_train().then(|| aux.forward(&mid, mode)).transpose()?;
                features.insert("mid", mid);
                (logits, high)
            }
        };
        let decoder = self.fuse.forward(&self.pyramid(&high, mode)?, mode)?;
        let logits_nchw = self.classifier.forward(&dropout(&decoder, self.dropout, mode, &self.dropout_name)?)?;
        features.extend([("high", high), ("decoder", decoder)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw, features })
    }
}
