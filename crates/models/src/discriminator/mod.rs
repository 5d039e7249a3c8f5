//! The network that tells a teacher's maps from a student's, for distillation as a game of two.
//!
//! [`Discriminator::forward`] scores maps; [`Discriminator::gradient_penalty`] holds the slope of the score near 1 and
//! has a gradient of its own, which is one of second order. The losses of the two players are functions of the scores and
//! live in the crate of losses; when who moves is the business of training.

mod attention;
mod dual;
mod penalty;
mod spectral;

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Conv2dConfig, Init, Mode, ParamKind, Scope, batch_norm};
use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};
use crate::spec::{check_width, scaled};
use attention::SelfAttention;
use dual::{Affine, Dual};
use spectral::SpectralConv;

/// Channels of the four convolutions before `width`.
const CHANNELS: [usize; 4] = [64, 128, 256, 512];
/// Side of every kernel but those of the attention, in taps.
const KERNEL: usize = 4;
/// Slope below 0 of the rectifiers.
const SLOPE: f64 = 0.1;

/// A discriminator as a configuration writes it.
///
/// # Example
/// ```
/// use segdistill_models::DiscriminatorSpec;
/// let spec = DiscriminatorSpec { n_classes: 19, condition: false, width: 1.0 };
/// assert_eq!((spec.in_channels(), spec.n_parameters()), (19, 3_191_721));
/// assert!(DiscriminatorSpec { width: 0.0, ..spec }.validate().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscriminatorSpec {
    /// Channels of the logits it scores: 2 to 255.
    pub n_classes: usize,
    /// Whether it sees the image too: three more channels behind the logits, resized to their grid by the caller.
    pub condition: bool,
    /// Multiplier of every channel count but the input's, in (0, 4]; products are rounded to multiples of 8, at least 8.
    pub width: f64,
}

impl DiscriminatorSpec {
    /// Channels of the maps it takes: classes, and RGB where it is conditioned.
    pub fn in_channels(&self) -> usize {
        self.n_classes + if self.condition { 3 } else { 0 }
    }

    /// Trained elements.
    pub fn n_parameters(&self) -> usize {
        let channels = self.channels();
        let last = channels[3];
        let convs = self.steps().map(|[n_in, n_out]| n_in * n_out * KERNEL * KERNEL + n_out);
        let attention = channels[2..].iter().map(|&c| SelfAttention::n_parameters(c));
        2 * self.in_channels() + convs.sum::<usize>() + attention.sum::<usize>() + last * KERNEL * KERNEL + 1
    }

    /// Checks every field.
    ///
    /// # Errors
    /// `Setting` for a value outside its range.
    pub fn validate(&self) -> Result<()> {
        if !(2..=255).contains(&self.n_classes) {
            let hint = "count the classes without void";
            return Err(ModelError::setting("n_classes", self.n_classes, "2 to 255", hint));
        }
        check_width(self.width)
    }

    fn channels(&self) -> [usize; 4] {
        CHANNELS.map(|base| scaled(base, self.width))
    }

    /// Input and output channels of the four convolutions.
    fn steps(&self) -> impl Iterator<Item = [usize; 2]> {
        let channels = self.channels();
        let first = self.in_channels();
        (0..4).map(move |i| [if i == 0 { first } else { channels[i - 1] }, channels[i]])
    }
}

/// Scores of logit maps: high for the teacher's, low for the student's, once it is trained.
///
/// Batch normalisation of the input; four convolutions 4x4 of stride 2 with spectral normalisation and a leaky rectifier
/// of slope 0.1; self-attention behind the third and the fourth; a convolution 4x4 to one channel. A map of 65 x 65 has
/// one score; of a larger one the scores of all windows are averaged.
///
/// Names: `norm`, `conv1` to `conv4` (with the buffers `weight_u` and `weight_v`), `attention1`, `attention2` (`query`,
/// `key`, `value`, `gamma`), `score`. Convolutions are drawn with the variance of PyTorch's default, `1 / (3 fan_in)`,
/// biases and `gamma` start from 0. Products are f32 (or f64), whatever the precision of the store.
///
/// # Shapes
/// Maps are `[n, in_channels, h, w]`, h and w at least 8; scores are `[n]`.
/// # Source
/// Liu et al. 2019 (SKD), section 3.2, the layers as in its code; Zhang et al. 2019 (SAGAN); Miyato et al. 2018.
/// DIFFERENCE: that code takes maps of 65 x 65 alone. Here an axis that has shrunk to one row stays at one (the
/// convolution pads it by 2), and where the last map is smaller than the last kernel only the kernel's leading taps are
/// read, as if the map were padded with zeros behind. Weights are drawn from a normal distribution, there from a uniform
/// one, and biases from 0.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_models::{Discriminator, DiscriminatorSpec};
/// use segdistill_ops::{Mode, ParamStore};
/// # fn main() -> segdistill_models::Result<()> {
/// let spec = DiscriminatorSpec { n_classes: 11, condition: false, width: 0.25 };
/// let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
/// let discriminator = Discriminator::new(&store.root(), &spec)?;
/// let teacher = Tensor::ones((2, 11, 24, 32), DType::F32, &Device::Cpu)?;
/// let student = (&teacher * 0.5)?;
/// let mode = Mode::Train { seed: 0, step: 0 };
/// assert_eq!(discriminator.forward(&student, mode)?.dims(), [2]);
/// let penalty = discriminator.gradient_penalty(&student, &teacher, 0, 0)?;
/// assert!(penalty.to_scalar::<f32>()? >= 0.0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Discriminator {
    spec: DiscriminatorSpec,
    norm: InputNorm,
    convs: Vec<SpectralConv>,
    attention: Vec<SelfAttention>,
    score: Affine,
}

/// Batch normalisation of the input.
#[derive(Clone, Debug)]
struct InputNorm {
    gamma_c: Tensor,
    beta_c: Tensor,
    running_mean_c: Tensor,
    running_var_c: Tensor,
}

/// Weights of one pass: of the convolutions those divided by their spectral norm.
struct Weights {
    convs: Vec<Affine>,
    attention: Vec<SelfAttention>,
    score: Affine,
}

impl Discriminator {
    /// Smallest height and width of the maps it scores.
    pub const MIN_SIDE: usize = 8;

    /// Builds it in `scope`; tensors are a function of (seed, name).
    ///
    /// # Errors
    /// As [`DiscriminatorSpec::validate`]; `Ops(Config)` when the names are taken.
    pub fn new(scope: &Scope, spec: &DiscriminatorSpec) -> Result<Self> {
        spec.validate()?;
        let channels = spec.channels();
        let convs = spec.steps().enumerate();
        let convs = convs.map(|(i, sizes)| SpectralConv::new(sizes, &scope.pp(format!("conv{}", i + 1))));
        let attention = channels[2..].iter().enumerate();
        let attention = attention.map(|(i, &c)| SelfAttention::new(c, &scope.pp(format!("attention{}", i + 1))));
        Ok(Self {
            norm: InputNorm::new(spec.in_channels(), &scope.pp("norm"))?,
            convs: convs.collect::<Result<_>>()?,
            attention: attention.collect::<Result<_>>()?,
            score: Affine::new([channels[3], 1], KERNEL, &scope.pp("score"))?,
            spec: spec.clone(),
        })
    }

    /// What it was built from.
    pub fn spec(&self) -> &DiscriminatorSpec {
        &self.spec
    }

    /// Scores of a batch.
    ///
    /// In training the input is normalised by the batch's statistics, which move the running ones, and every spectral
    /// norm makes one step of power iteration before it is used; in evaluation nothing moves.
    ///
    /// # Shapes
    /// - `maps_nchw`: `[n, in_channels, h, w]`, of the weights' type: logits, and behind them RGB where it is conditioned
    /// - returns `[n]`: the mean over the windows of the last map
    /// # Gradient
    /// Reaches the maps and every parameter; through the spectral norms too, whose singular vectors are constants.
    /// # Errors
    /// `Input` for other channels or a side below 8.
    /// # Source
    /// As [`Discriminator`].
    pub fn forward(&self, maps_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.check(maps_nchw)?;
        let x = self.norm.forward(maps_nchw, mode)?;
        Ok(self.weights(mode)?.scores(Dual::constant(x))?.value())
    }

    fn check(&self, maps_nchw: &Tensor) -> Result<()> {
        let channels = self.spec.in_channels();
        if let [n, c, h, w] = *maps_nchw.dims()
            && n > 0
            && c == channels
            && h.min(w) >= Self::MIN_SIDE
        {
            return Ok(());
        }
        Err(ModelError::Input {
            model: "discriminator".into(),
            found: format!("{:?}", maps_nchw.dims()),
            expected: format!("[n, {channels}, h, w] with h and w at least {}", Self::MIN_SIDE),
            hint: "it takes logits and, where it is conditioned, RGB on their grid; train on larger crops",
        })
    }

    /// The weights of the next pass; in training every power iteration makes a step.
    fn weights(&self, mode: Mode) -> Result<Weights> {
        Ok(Weights {
            convs: self.convs.iter().map(|conv| conv.normalised(mode)).collect::<Result<_>>()?,
            attention: self.attention.clone(),
            score: self.score.clone(),
        })
    }
}

impl InputNorm {
    fn new(channels: usize, scope: &Scope) -> Result<Self> {
        let vector = |name, kind, value| scope.get(name, &[channels], kind, Init::Constant(value));
        Ok(Self {
            gamma_c: vector("weight", ParamKind::Norm, 1.0)?,
            beta_c: vector("bias", ParamKind::Norm, 0.0)?,
            running_mean_c: vector("running_mean", ParamKind::Buffer, 0.0)?,
            running_var_c: vector("running_var", ParamKind::Buffer, 1.0)?,
        })
    }

    fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let cfg = BatchNormConfig::default();
        let (mean, var) = (&self.running_mean_c, &self.running_var_c);
        Ok(batch_norm(x_nchw, &self.gamma_c, &self.beta_c, mean, var, cfg, mode)?)
    }

    /// The same with other scale and shift, which moves no running statistics.
    fn still(&self, gamma_c: Tensor, beta_c: Tensor) -> Result<Self> {
        let (running_mean_c, running_var_c) = (self.running_mean_c.copy()?, self.running_var_c.copy()?);
        Ok(Self { gamma_c, beta_c, running_mean_c, running_var_c })
    }
}

impl Weights {
    /// The same as constants.
    fn detached(&self) -> Self {
        Self {
            convs: self.convs.iter().map(Affine::detached).collect(),
            attention: self.attention.iter().map(SelfAttention::detached).collect(),
            score: self.score.detached(),
        }
    }

    /// `[n]` scores of a normalised map, and their tangent.
    fn scores(&self, x: Dual) -> Result<Dual> {
        let mut x = x;
        for (i, conv) in self.convs.iter().enumerate() {
            x = conv.forward(&x, halving(x.hw()?))?.leaky_rectified(SLOPE)?;
            if i >= 2 {
                x = self.attention[i - 2].forward(&x)?;
            }
        }
        let [h, w] = x.hw()?;
        let score = self.score.cropped([h.min(KERNEL), w.min(KERNEL)])?;
        score.forward(&x, Conv2dConfig::default())?.linear(|map| Ok(map.flatten_from(1)?.mean(1)?))
    }
}

/// Geometry of a convolution that halves each axis, rounded down, but keeps at least one row.
fn halving(hw: [usize; 2]) -> Conv2dConfig {
    Conv2dConfig { stride: [2, 2], padding: hw.map(|side| if side == 1 { 2 } else { 1 }), ..Conv2dConfig::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_counts() {
        let spec = |n_classes, condition| DiscriminatorSpec { n_classes, condition, width: 1.0 };
        assert_eq!(spec(19, false).n_parameters(), 3_191_721);
        assert_eq!(spec(19, true).n_parameters(), 3_194_799);
        assert_eq!(spec(19, true).in_channels(), 22);
    }

    #[test]
    fn every_side_is_halved_down_to_one() {
        for (side, expected) in [(65, [32, 16, 8, 4]), (64, [32, 16, 8, 4]), (12, [6, 3, 1, 1]), (8, [4, 2, 1, 1])] {
            let mut hw = [side, 65];
            let found = [0; 4].map(|_| {
                hw = halving(hw).output_hw(hw, [KERNEL; 2]).expect("every size has an output");
                hw[0]
            });
            assert_eq!(found, expected, "{side}");
        }
    }

    #[test]
    fn settings_are_checked() {
        let good = DiscriminatorSpec { n_classes: 19, condition: true, width: 1.0 };
        for (field, spec) in [
            ("n_classes", DiscriminatorSpec { n_classes: 1, ..good.clone() }),
            ("n_classes", DiscriminatorSpec { n_classes: 256, ..good.clone() }),
            ("width", DiscriminatorSpec { width: f64::NAN, ..good.clone() }),
            ("width", DiscriminatorSpec { width: 4.5, ..good }),
        ] {
            let text = spec.validate().unwrap_err().to_string();
            assert!(text.starts_with(field) && text.contains("hint: "), "{text}");
        }
    }
}
