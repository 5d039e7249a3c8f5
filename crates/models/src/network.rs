//! A network: an encoder, a decoder and the normalisation before them.

use candle_core::{DType, Device, Tensor};
use segdistill_ops::{BatchNormConfig, Mode, ParamStore, batch_norm};

use crate::decoders::{self, Decoder, DecoderPlan};
use crate::encoders::{self, Encoder, EncoderPlan, Normalisation, Wanted};
use crate::error::{ModelError, Result};
use crate::segmenter::{PyramidMap, SegOutput, Segmenter, Trace};
use crate::spec::{MAX_SIDE, MIN_SIDE, ModelInfo, ModelSpec};

/// A network before it has weights.
pub(crate) struct NetworkPlan {
    spec: ModelSpec,
    encoder: Box<dyn EncoderPlan>,
    decoder: Box<dyn DecoderPlan>,
}

impl NetworkPlan {
    pub(crate) fn new(spec: &ModelSpec) -> Result<Self> {
        spec.validate()?;
        let network = decoders::entry(&spec.name)?;
        let encoder = encoders::plan(&spec.encoder, network.encoder_options(spec))?;
        let decoder = (network.plan)(spec, encoder.as_ref())?;
        Ok(Self { spec: spec.clone(), encoder, decoder })
    }

    pub(crate) fn info(&self) -> ModelInfo {
        let Normalisation { mean, std } = self.encoder.normalisation();
        let taps = self.encoder.taps();
        let named = |(i, name): (usize, &'static str)| crate::Tap { name, ..taps[i].clone() };
        ModelInfo {
            spec: self.spec.clone(),
            n_parameters: self.encoder.n_parameters() + self.decoder.n_parameters(),
            output_stride: taps.last().map_or(1, |tap| tap.stride),
            logits_stride: self.decoder.logits_stride(),
            align_corners: self.decoder.align_corners(),
            taps: self.decoder.inputs().into_iter().map(named).chain(self.decoder.taps()).collect(),
            mean,
            std,
        }
    }

    pub(crate) fn trace(&self, hw: [usize; 2]) -> Result<Trace> {
        if hw.iter().any(|side| !(MIN_SIDE..=MAX_SIDE).contains(side)) {
            return Err(input_error(&self.spec, format!("{} x {} pixels", hw[0], hw[1])));
        }
        let encoder = self.encoder.trace(hw)?;
        let decoder = self.decoder.trace(hw, &encoder)?;
        let inputs = self.decoder.inputs().into_iter().map(|(i, _)| encoder.sizes[i]);
        Ok(Trace {
            macs: encoder.macs + decoder.macs,
            aux_macs: decoder.aux_macs,
            attention_macs: encoder.attention_macs,
            tap_sizes: inputs.chain(decoder.sizes).collect(),
            logits_hw: decoder.logits_hw,
        })
    }

    pub(crate) fn pyramid(&self, hw: [usize; 2]) -> Result<Vec<PyramidMap>> {
        self.trace(hw)?;
        let inputs = self.decoder.inputs();
        let read_as = |place: usize| inputs.iter().find(|(i, _)| *i == place).map(|(_, name)| *name);
        let sizes = self.encoder.trace(hw)?.sizes;
        let n_unpooled = if self.decoder.needs_pools() { self.encoder.pools().len() } else { 0 };
        let maps = self.encoder.taps().into_iter().zip(sizes).enumerate();
        Ok(maps.map(|(i, (tap, hw))| PyramidMap { tap, hw, read_as: read_as(i), unpooled: i < n_unpooled }).collect())
    }

    pub(crate) fn build(&self, store: &ParamStore) -> Result<Network> {
        let info = self.info();
        let taps = self.decoder.inputs().into_iter().map(|(i, _)| i).collect();
        Ok(Network {
            normalisation: ImageNormalisation::new(&info, store.dtype(), store.device())?,
            dtype: store.dtype(),
            wanted: Wanted { taps, pools: self.decoder.needs_pools() },
            encoder: self.encoder.build(&store.root().pp("encoder"))?,
            decoder: self.decoder.build(&store.root().pp("decoder"))?,
            info,
        })
    }
}

fn input_error(spec: &ModelSpec, found: String) -> ModelError {
    ModelError::Input {
        model: spec.full_name(),
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

/// A network with weights.
pub(crate) struct Network {
    info: ModelInfo,
    normalisation: ImageNormalisation,
    dtype: DType,
    wanted: Wanted,
    encoder: Box<dyn Encoder>,
    decoder: Box<dyn Decoder>,
}

impl Network {
    /// Height and width of a batch of images, checked.
    fn size(&self, images_nchw: &Tensor) -> Result<[usize; 2]> {
        let sides = MIN_SIDE..=MAX_SIDE;
        match *images_nchw.dims() {
            [n, 3, h, w] if n > 0 && sides.contains(&h) && sides.contains(&w) => Ok([h, w]),
            _ => Err(input_error(&self.info.spec, format!("{:?}", images_nchw.dims()))),
        }
    }
}

impl Segmenter for Network {
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput> {
        let hw = self.size(images_nchw)?;
        let normalised = self.normalisation.forward(&images_nchw.to_dtype(self.dtype)?)?;
        let maps = self.encoder.forward(&normalised, &self.wanted, mode)?;
        drop(normalised);
        self.decoder.forward(maps, hw, mode)
    }

    fn forward_normalised(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput> {
        let hw = self.size(images_nchw)?;
        let maps = self.encoder.forward(&images_nchw.to_dtype(self.dtype)?, &self.wanted, mode)?;
        self.decoder.forward(maps, hw, mode)
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }
}
