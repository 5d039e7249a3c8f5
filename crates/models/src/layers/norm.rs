//! Batch normalisation and the convolutions it follows.

use candle_core::Tensor;
use segdistill_ops::{BatchNormConfig, Init, Mode, ParamKind, Scope, batch_norm, relu};

use super::conv::{Conv2d, ConvShape};
use crate::error::Result;

/// Batch normalisation; parameters `weight` and `bias`, buffers `running_mean` and `running_var`.
///
/// `y = (x - mean) / sqrt(var + eps) * weight + bias` for each channel, see [`segdistill_ops::batch_norm`].
///
/// # Shapes
/// The four tensors are `[c]`; maps are `[n, c, h, w]`.
/// # Gradient
/// Reaches input, `weight` and `bias`; the running statistics are buffers and get none.
/// # Source
/// Ioffe and Szegedy 2015; PyTorch `torch.nn.BatchNorm2d`. DIFFERENCE: no `num_batches_tracked`, nothing reads it.
#[derive(Clone, Debug)]
pub struct BatchNorm2d {
    gamma_c: Tensor,
    beta_c: Tensor,
    running_mean_c: Tensor,
    running_var_c: Tensor,
    config: BatchNormConfig,
}

impl BatchNorm2d {
    /// Builds it in `scope`: scale 1, shift 0, running mean 0, running variance 1.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(channels: usize, config: BatchNormConfig, scope: &Scope) -> Result<Self> {
        let vector = |name, kind, value| scope.get(name, &[channels], kind, Init::Constant(value));
        Ok(Self {
            gamma_c: vector("weight", ParamKind::Norm, 1.0)?,
            beta_c: vector("bias", ParamKind::Norm, 0.0)?,
            running_mean_c: vector("running_mean", ParamKind::Buffer, 0.0)?,
            running_var_c: vector("running_var", ParamKind::Buffer, 1.0)?,
            config,
        })
    }

    /// Normalises each channel; in training by the batch's statistics, which move the running ones.
    ///
    /// # Shapes
    /// `[n, c, h, w]` to the same
    /// # Gradient
    /// Reaches input, scale and shift; in training through the batch's statistics too.
    /// # Errors
    /// `Ops(Shape)` when the channels differ, or in training when a channel has a single value.
    /// # Source
    /// As [`BatchNorm2d`].
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        let (mean, var) = (&self.running_mean_c, &self.running_var_c);
        Ok(batch_norm(x_nchw, &self.gamma_c, &self.beta_c, mean, var, self.config, mode)?)
    }
}

/// Convolution and batch normalisation, no activation.
#[derive(Clone, Debug)]
pub struct ConvBn {
    conv: Conv2d,
    bn: BatchNorm2d,
}

impl ConvBn {
    /// Builds the two in their scopes, which differ in name from network to network.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, config: BatchNormConfig, conv: &Scope, bn: &Scope) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(shape, conv)?, bn: BatchNorm2d::new(shape.n_out, config, bn)? })
    }

    /// `BN(conv(x))`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches the input and the parameters of both; a bias of the convolution would get 0 in training, since the
    /// normalisation takes it away again.
    /// # Errors
    /// `Ops(Shape)` when the channels differ, or in training when a channel has a single value.
    /// # Source
    /// Ioffe and Szegedy 2015, section 3.2: between convolution and activation, the bias left out.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.bn.forward(&self.conv.forward(x_nchw)?, mode)
    }

    /// Trained elements of such a pair.
    pub fn n_parameters(shape: ConvShape) -> usize {
        shape.n_parameters() + 2 * shape.n_out
    }
}

/// Convolution, batch normalisation, ReLU.
#[derive(Clone, Debug)]
pub struct ConvBnRelu(ConvBn);

impl ConvBnRelu {
    /// Builds convolution and normalisation in their scopes.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, config: BatchNormConfig, conv: &Scope, bn: &Scope) -> Result<Self> {
        Ok(Self(ConvBn::new(shape, config, conv, bn)?))
    }

    /// `max(BN(conv(x)), 0)`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches the input and the parameters of both, 0 where the output is 0.
    /// # Errors
    /// As [`ConvBn::forward`].
    /// # Source
    /// As [`ConvBn::forward`].
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(relu(&self.0.forward(x_nchw, mode)?)?)
    }
}
