//! DeepLabV3+ (Chen et al. 2018): atrous spatial pyramid pooling and a decoder on the encoder's fine map.
//!
//! It is built from the taps an encoder publishes and never asks the encoder's name. Names of its tensors:
//! `decoder.aspp.{0..4}` (1x1, the three dilated 3x3, image pooling), `decoder.project`, `decoder.low`,
//! `decoder.fuse.{0,1}`, `decoder.classifier`; inside, `conv`/`bn`, or `conv_dw`/`bn_dw`/`conv_pw`/`bn_pw` where
//! separable.
//!
//! Two conventions of bilinear resizing meet here, as is common practice in PyTorch. *Inside* the decoder (image pooling
//! to the pyramid's grid, the deep map to the fine one) corners are aligned (`align_corners = true`): both grids come
//! from strided convolutions, which sample from the first pixel on. The logits leave at stride 4, as they are; whoever
//! compares them with labels brings them to the labels' size by pixel centres (`align_corners = false`). That is done
//! in the same way by training (`train`, before cross entropy) and by evaluation and prediction (`eval`), so that a
//! network is judged on the very map it was trained on.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use segdistill_ops::{
    BatchNormConfig, Init, Mode, ParamStore, Scope, adaptive_avg_pool2d, batch_norm, concat_channels, dropout,
    resize_bilinear,
};

use crate::encoders::{Encoder, EncoderOptions, EncoderPlan, EncoderTaps, Normalisation, plan as encoder_plan};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, ConvBn, ConvBnRelu, ConvShape, SeparableConv, SeparableShape};
use crate::segmenter::{SegOutput, Segmenter};
use crate::spec::{MAX_SIDE, MIN_SIDE, ModelInfo, ModelSpec, Tap, scaled};

/// Dilation of the pyramid's 3x3 convolutions at output stride 16; at 8 twice as much.
const RATES_AT_16: [usize; 3] = [6, 12, 18];
/// Channels the fine map is reduced to before `width`, few enough not to outweigh the deep map's.
const LOW_CHANNELS: usize = 48;
const NORM: BatchNormConfig = BatchNormConfig { eps: 1e-5, momentum: 0.1 };

/// A 3x3 convolution of the decoder, dense or separable.
#[derive(Clone, Copy)]
enum Conv3x3Shape {
    Dense(ConvShape),
    Separable(SeparableShape),
}

impl Conv3x3Shape {
    fn new(n_in: usize, n_out: usize, dilation: usize, separable: bool) -> Self {
        match separable {
            true => Self::Separable(SeparableShape::new(n_in, n_out, 3).dilated(dilation)),
            false => Self::Dense(ConvShape::new(n_in, n_out, 3).dilated(dilation)),
        }
    }

    fn n_parameters(&self) -> usize {
        match self {
            Self::Dense(shape) => ConvBn::n_parameters(*shape),
            Self::Separable(shape) => shape.n_parameters(),
        }
    }

    fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        Ok(match self {
            Self::Dense(shape) => shape.macs(hw)?.0,
            Self::Separable(shape) => shape.macs(hw)?.0,
        })
    }

    fn build(&self, scope: &Scope) -> Result<Conv3x3> {
        Ok(match self {
            Self::Dense(shape) => Conv3x3::Dense(conv_bn_relu(*shape, scope)?),
            Self::Separable(shape) => Conv3x3::Separable(SeparableConv::new(*shape, NORM, true, scope)?),
        })
    }
}

enum Conv3x3 {
    Dense(ConvBnRelu),
    Separable(SeparableConv),
}

impl Conv3x3 {
    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self {
            Self::Dense(conv) => conv.forward(x_nchw, mode),
            Self::Separable(conv) => conv.forward(x_nchw, mode),
        }
    }
}

fn conv_bn_relu(shape: ConvShape, scope: &Scope) -> Result<ConvBnRelu> {
    ConvBnRelu::new(shape, NORM, &scope.pp("conv"), &scope.pp("bn"))
}

/// A DeepLabV3+ before it has weights.
pub(crate) struct DeepLabPlan {
    spec: ModelSpec,
    encoder: Box<dyn EncoderPlan>,
    taps: EncoderTaps,
    /// Branch 0 of the pyramid.
    pointwise: ConvShape,
    /// Branches 1 to 3.
    dilated: [Conv3x3Shape; 3],
    /// Branch 4.
    pooled: ConvShape,
    project: ConvShape,
    low: ConvShape,
    fuse: [Conv3x3Shape; 2],
    classifier: ConvShape,
}

impl DeepLabPlan {
    pub(crate) fn new(spec: &ModelSpec) -> Result<Self> {
        spec.validate()?;
        let options = EncoderOptions { output_stride: spec.output_stride, width: spec.width };
        let encoder = encoder_plan(&spec.encoder, options)?;
        let taps = encoder.taps();
        let separable = encoder.prefers_separable();
        let d = scaled(spec.decoder_channels, spec.width);
        let d_low = scaled(LOW_CHANNELS, spec.width);
        let d_high = taps.high.channels;
        let dilated = RATES_AT_16.map(|rate| Conv3x3Shape::new(d_high, d, rate * 16 / taps.high.stride, separable));
        Ok(Self {
            spec: spec.clone(),
            encoder,
            pointwise: ConvShape::new(d_high, d, 1),
            dilated,
            pooled: ConvShape::new(d_high, d, 1),
            project: ConvShape::new(5 * d, d, 1),
            low: ConvShape::new(taps.low.channels, d_low, 1),
            fuse: [Conv3x3Shape::new(d + d_low, d, 1, separable), Conv3x3Shape::new(d, d, 1, separable)],
            classifier: ConvShape::new(d, spec.n_classes, 1).with_bias(),
            taps,
        })
    }

    pub(crate) fn info(&self) -> ModelInfo {
        let Normalisation { mean, std } = self.encoder.normalisation();
        let d = self.classifier.n_in;
        let own = [
            Tap { name: "aspp", channels: d, stride: self.taps.high.stride },
            Tap { name: "decoder", channels: d, stride: self.taps.low.stride },
        ];
        let dense: usize =
            [self.pointwise, self.pooled, self.project, self.low].into_iter().map(ConvBn::n_parameters).sum();
        let threes: usize = self.dilated.iter().chain(&self.fuse).map(Conv3x3Shape::n_parameters).sum();
        ModelInfo {
            spec: self.spec.clone(),
            n_parameters: self.encoder.n_parameters() + dense + threes + self.classifier.n_parameters(),
            output_stride: self.taps.high.stride,
            logits_stride: self.taps.low.stride,
            taps: [self.taps.low.clone(), self.taps.high.clone()].into_iter().chain(own).collect(),
            mean,
            std,
        }
    }

    pub(crate) fn macs(&self, hw: [usize; 2]) -> Result<u64> {
        if hw.iter().any(|side| !(MIN_SIDE..=MAX_SIDE).contains(side)) {
            return Err(input_error(&self.spec, format!("{} x {} pixels", hw[0], hw[1])));
        }
        let trace = self.encoder.trace(hw)?;
        let (low_hw, high_hw) = (trace.low_hw, trace.high_hw);
        let mut macs = trace.macs + self.pointwise.macs(high_hw)?.0 + self.pooled.macs([1, 1])?.0;
        for conv in &self.dilated {
            macs += conv.macs(high_hw)?;
        }
        macs += self.project.macs(high_hw)?.0 + self.low.macs(low_hw)?.0;
        for conv in &self.fuse {
            macs += conv.macs(low_hw)?;
        }
        Ok(macs + self.classifier.macs(low_hw)?.0)
    }

    pub(crate) fn build(&self, store: &ParamStore) -> Result<DeepLab> {
        let info = self.info();
        let encoder = self.encoder.build(&store.root().pp("encoder"))?;
        let at = store.root().pp("decoder");
        let (aspp, fuse) = (at.pp("aspp"), at.pp("fuse"));
        let dropout_name = at.pp("dropout").path().to_string();
        Ok(DeepLab {
            normalisation: ImageNormalisation::new(&info, store.dtype(), store.device())?,
            dtype: store.dtype(),
            encoder,
            pointwise: conv_bn_relu(self.pointwise, &aspp.pp(0))?,
            dilated: [
                self.dilated[0].build(&aspp.pp(1))?,
                self.dilated[1].build(&aspp.pp(2))?,
                self.dilated[2].build(&aspp.pp(3))?,
            ],
            pooled: conv_bn_relu(self.pooled, &aspp.pp(4))?,
            project: conv_bn_relu(self.project, &at.pp("project"))?,
            low: conv_bn_relu(self.low, &at.pp("low"))?,
            fuse: [self.fuse[0].build(&fuse.pp(0))?, self.fuse[1].build(&fuse.pp(1))?],
            // No normalisation follows: with fan-out of a few classes the first logits would be an order too large.
            classifier: Conv2d::with_init(self.classifier, Init::Xavier, &at.pp("classifier"))?,
            dropout_name,
            info,
        })
    }
}

fn input_error(spec: &ModelSpec, found: String) -> ModelError {
    ModelError::Input {
        model: format!("{}-{}", spec.name, spec.encoder),
        found,
        expected: format!("[n, 3, h, w] with h and w from {MIN_SIDE} to {MAX_SIDE}"),
        hint: "any such size will do, a multiple of the stride is not needed; resize or pad smaller images",
    }
}

/// `(rgb - mean) / std` of images: what batch normalisation is in evaluation, with constants, in one pass.
struct ImageNormalisation {
    mean_c: Tensor,
    inverse_std_c: Tensor,
    zero_c: Tensor,
    /// `1 - EPS`, so that the variance and what is added to it make exactly 1.
    var_c: Tensor,
}

impl ImageNormalisation {
    /// 2^-20: `1 - EPS` has an exact value in every float type of at least 20 bits.
    const EPS: f64 = 1.0 / 1_048_576.0;

    fn new(info: &ModelInfo, dtype: DType, device: &Device) -> Result<Self> {
        let constant = |values: [f64; 3]| -> Result<Tensor> {
            Ok(Tensor::from_slice(&values, 3, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
        };
        Ok(Self {
            mean_c: constant(info.mean)?,
            inverse_std_c: constant(info.std.map(f64::recip))?,
            zero_c: constant([0.0; 3])?,
            var_c: constant([1.0 - Self::EPS; 3])?,
        })
    }

    fn forward(&self, images_nchw: &Tensor) -> segdistill_ops::Result<Tensor> {
        let cfg = BatchNormConfig { eps: Self::EPS, momentum: 0.0 };
        batch_norm(images_nchw, &self.inverse_std_c, &self.zero_c, &self.mean_c, &self.var_c, cfg, Mode::Eval)
    }
}

/// A DeepLabV3+ with weights.
pub(crate) struct DeepLab {
    info: ModelInfo,
    normalisation: ImageNormalisation,
    dtype: DType,
    encoder: Box<dyn Encoder>,
    pointwise: ConvBnRelu,
    dilated: [Conv3x3; 3],
    pooled: ConvBnRelu,
    project: ConvBnRelu,
    low: ConvBnRelu,
    fuse: [Conv3x3; 2],
    classifier: Conv2d,
    dropout_name: String,
}

impl DeepLab {
    fn normalised(&self, images_nchw: &Tensor) -> Result<Tensor> {
        let sides = MIN_SIDE..=MAX_SIDE;
        match *images_nchw.dims() {
            [n, 3, h, w] if n > 0 && sides.contains(&h) && sides.contains(&w) => {}
            _ => return Err(input_error(&self.info.spec, format!("{:?}", images_nchw.dims()))),
        }
        Ok(self.normalisation.forward(&images_nchw.to_dtype(self.dtype)?)?)
    }

    fn pyramid(&self, high_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let (_, _, h, w) = high_nchw.dims4()?;
        let branches = {
            let image = self.pooled.forward(&adaptive_avg_pool2d(high_nchw, [1, 1])?, mode)?;
            let branches = [
                self.pointwise.forward(high_nchw, mode)?,
                self.dilated[0].forward(high_nchw, mode)?,
                self.dilated[1].forward(high_nchw, mode)?,
                self.dilated[2].forward(high_nchw, mode)?,
                resize_bilinear(&image, [h, w], true)?,
            ];
            concat_channels(&branches.each_ref())?
        };
        self.project.forward(&branches, mode)
    }
}

impl Segmenter for DeepLab {
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput> {
        let maps = self.encoder.forward(&self.normalised(images_nchw)?, mode)?;
        let aspp = self.pyramid(&maps.high_nchw, mode)?;

        // Without a graph each map is gone as soon as the next one is there.
        let joined = {
            let dropped = dropout(&aspp, self.info.spec.dropout, mode, &self.dropout_name)?;
            let low = self.low.forward(&maps.low_nchw, mode)?;
            let (_, _, h, w) = low.dims4()?;
            // The convolutions sample at whole multiples of their stride, from the first pixel on: aligned corners fit
            // that exactly for sizes 1 + k * stride and closely for others.
            concat_channels(&[&resize_bilinear(&dropped, [h, w], true)?, &low])?
        };
        let fused = self.fuse[0].forward(&joined, mode)?;
        drop(joined);
        let decoder = self.fuse[1].forward(&fused, mode)?;
        drop(fused);
        let logits_nchw = self.classifier.forward(&decoder)?;

        let features =
            BTreeMap::from([("low", maps.low_nchw), ("high", maps.high_nchw), ("aspp", aspp), ("decoder", decoder)]);
        Ok(SegOutput { logits_nchw, aux_logits_nchw: None, features })
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }
}
