//! Batch normalisation and the convolutions it follows.

use candle_core::{DType, Tensor};
use segdistill_ops::{BatchNormConfig, Init, Mode, OpsError, ParamKind, Scope, batch_norm_act, relu, relu6};

use super::conv::{Conv2d, ConvShape};
use crate::error::{ModelError, Result};

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
        self.forward_act(x_nchw, None, false, mode)
    }

    /// `act(BN(x) + residual)` in one operation, `act` being ReLU or nothing.
    fn forward_act(&self, x_nchw: &Tensor, residual_nchw: Option<&Tensor>, relu: bool, mode: Mode) -> Result<Tensor> {
        let (mean, var) = (&self.running_mean_c, &self.running_var_c);
        Ok(batch_norm_act(x_nchw, &self.gamma_c, &self.beta_c, mean, var, residual_nchw, relu, self.config, mode)?)
    }

    /// Scale and shift.
    pub(super) fn scale_and_shift(&self) -> [&Tensor; 2] {
        [&self.gamma_c, &self.beta_c]
    }

    /// The same with another scale and shift; with `still` nothing it does in training moves its running statistics.
    pub(super) fn over(&self, gamma_c: Tensor, beta_c: Tensor, still: bool) -> Result<Self> {
        // In training the statistics are only written.
        let statistics = |t: &Tensor| if still { t.copy() } else { Ok(t.clone()) };
        let (running_mean_c, running_var_c) = (statistics(&self.running_mean_c)?, statistics(&self.running_var_c)?);
        Ok(Self { gamma_c, beta_c, running_mean_c, running_var_c, config: self.config })
    }

    /// `(scale, shift)` of `y = x * scale + shift`, which this is in evaluation: `scale = weight / sqrt(var + eps)`,
    /// `shift = bias - mean * scale`; `[c]` each, f64.
    fn affine(&self) -> Result<(Tensor, Tensor)> {
        let wide = |t: &Tensor| t.detach().to_dtype(DType::F64);
        let std = (wide(&self.running_var_c)? + self.config.eps)?.sqrt()?;
        let scale = (wide(&self.gamma_c)? / std)?;
        let shift = (wide(&self.beta_c)? - (wide(&self.running_mean_c)? * &scale)?)?;
        Ok((scale, shift))
    }
}

/// Convolution and batch normalisation, in training two layers, over a frozen store one.
///
/// Over plain tensors (a frozen store) the normalisation is folded into the convolution when the layer is built:
/// `W' = W * s`, `b' = bias - mean * s` with `s = weight / sqrt(var + eps)` for each output channel, formed in f64. Such
/// a layer only evaluates.
#[derive(Clone, Debug)]
pub struct ConvBn(Form);

#[derive(Clone, Debug)]
enum Form {
    Trained { conv: Conv2d, bn: BatchNorm2d },
    Folded(Conv2d),
}

impl ConvBn {
    /// Builds the two in their scopes, which differ in name from network to network.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, config: BatchNormConfig, conv: &Scope, bn: &Scope) -> Result<Self> {
        Self::of(Conv2d::new(shape, conv)?, shape.n_out, config, conv.is_frozen(), bn)
    }

    /// As [`ConvBn::new`], the convolution's weights from `init`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn with_init(shape: ConvShape, init: Init, config: BatchNormConfig, conv: &Scope, bn: &Scope) -> Result<Self> {
        Self::of(Conv2d::with_init(shape, init, conv)?, shape.n_out, config, conv.is_frozen(), bn)
    }

    fn of(conv: Conv2d, channels: usize, config: BatchNormConfig, frozen: bool, bn: &Scope) -> Result<Self> {
        let bn = BatchNorm2d::new(channels, config, bn)?;
        if !frozen {
            return Ok(Self(Form::Trained { conv, bn }));
        }
        let (scale_c, shift_c) = bn.affine()?;
        Ok(Self(Form::Folded(conv.scaled(&scale_c, &shift_c)?)))
    }

    /// The two layers; `None` over a frozen store, where they are one.
    pub(super) fn parts(&self) -> Option<(&Conv2d, &BatchNorm2d)> {
        match &self.0 {
            Form::Trained { conv, bn } => Some((conv, bn)),
            Form::Folded(_) => None,
        }
    }

    /// As if it had been built over a store that can be trained.
    pub(super) fn of_parts(conv: Conv2d, bn: BatchNorm2d) -> Self {
        Self(Form::Trained { conv, bn })
    }

    /// `BN(conv(x))`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches the input and the parameters of both; a bias of the convolution would get 0 in training, since the
    /// normalisation takes it away again. Folded there is none.
    /// # Errors
    /// `Ops(Shape)` when the channels differ, or in training when a channel has a single value; `Ops(Config)` for
    /// training over a frozen store.
    /// # Source
    /// Ioffe and Szegedy 2015, section 3.2: between convolution and activation, the bias left out.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        self.forward_act(x_nchw, None, false, mode)
    }

    /// `act(BN(conv(x)) + residual)`, `act` being ReLU with `relu`, else nothing; without a residual nothing is added.
    ///
    /// # Shapes
    /// As [`ConvBn::forward`]; `residual_nchw`: of the result's shape
    /// # Gradient
    /// As [`ConvBn::forward`], and the residual's; 0 where the rectified output is 0.
    /// # Errors
    /// As [`ConvBn::forward`]; `Ops(Shape)` for a residual of another shape.
    /// # Source
    /// As [`ConvBn::forward`], and He et al. 2016 for the residual.
    pub fn forward_act(
        &self,
        x_nchw: &Tensor,
        residual_nchw: Option<&Tensor>,
        relu: bool,
        mode: Mode,
    ) -> Result<Tensor> {
        match &self.0 {
            Form::Trained { conv, bn } => bn.forward_act(&conv.forward(x_nchw)?, residual_nchw, relu, mode),
            Form::Folded(conv) if !mode.is_train() => conv.infer(x_nchw, residual_nchw, relu),
            Form::Folded(_) => Err(cannot_train()),
        }
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
        self.0.forward_act(x_nchw, None, true, mode)
    }
}

/// Convolution, batch normalisation, ReLU6.
#[derive(Clone, Debug)]
pub struct ConvBnRelu6(ConvBn);

impl ConvBnRelu6 {
    /// Builds convolution and normalisation in their scopes.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, config: BatchNormConfig, conv: &Scope, bn: &Scope) -> Result<Self> {
        Ok(Self(ConvBn::new(shape, config, conv, bn)?))
    }

    /// `min(max(BN(conv(x)), 0), 6)`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches the input and the parameters of both, 0 where the output is 0 or 6.
    /// # Errors
    /// As [`ConvBn::forward`].
    /// # Source
    /// Sandler et al. 2018 (MobileNetV2), section 3; else as [`ConvBn::forward`].
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        Ok(relu6(&self.0.forward(x_nchw, mode)?)?)
    }
}

/// Batch normalisation and ReLU before a convolution, where there is none behind to fold into.
///
/// Over a frozen store it stays an operation of its own, and only evaluates.
#[derive(Clone, Debug)]
pub struct BnRelu {
    bn: BatchNorm2d,
    frozen: bool,
}

impl BnRelu {
    /// Builds it in `scope`, as [`BatchNorm2d::new`].
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(channels: usize, config: BatchNormConfig, scope: &Scope) -> Result<Self> {
        Ok(Self { bn: BatchNorm2d::new(channels, config, scope)?, frozen: scope.is_frozen() })
    }

    pub(super) fn bn(&self) -> &BatchNorm2d {
        &self.bn
    }

    /// As if it had been built over a store that can be trained.
    pub(super) fn of_bn(bn: BatchNorm2d) -> Self {
        Self { bn, frozen: false }
    }

    /// `max(BN(x), 0)`.
    ///
    /// # Shapes
    /// `[n, c, h, w]` to the same
    /// # Gradient
    /// Reaches input, scale and shift, 0 where the output is 0.
    /// # Errors
    /// As [`BatchNorm2d::forward`]; `Ops(Config)` for training over a frozen store.
    /// # Source
    /// He et al. 2016 (Identity mappings), the order of DenseNet.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        if self.frozen && mode.is_train() {
            return Err(cannot_train());
        }
        self.bn.forward_act(x_nchw, None, true, mode)
    }

    /// Trained elements.
    pub fn n_parameters(channels: usize) -> usize {
        2 * channels
    }
}

/// Convolution and ReLU without a normalisation; over a frozen store one operation, which only evaluates.
#[derive(Clone, Debug)]
pub struct ConvRelu {
    conv: Conv2d,
    frozen: bool,
}

impl ConvRelu {
    /// Builds it in `scope`: Kaiming's normal distribution (fan-out), bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, scope: &Scope) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(shape, scope)?, frozen: scope.is_frozen() })
    }

    /// `max(conv(x), 0)`.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches input, weight and bias, 0 where the output is 0. Over a frozen store there is none.
    /// # Errors
    /// As [`Conv2d::forward`]; `Ops(Config)` for training over a frozen store.
    /// # Source
    /// Simonyan and Zisserman 2015, section 2.1.
    pub fn forward(&self, x_nchw: &Tensor, mode: Mode) -> Result<Tensor> {
        match self.frozen {
            false => Ok(relu(&self.conv.forward(x_nchw)?)?),
            true if !mode.is_train() => self.conv.infer(x_nchw, None, true),
            true => Err(cannot_train()),
        }
    }
}

fn cannot_train() -> ModelError {
    OpsError::config(
        "a network over a frozen store cannot train: its normalisations are folded into the convolutions",
        "run it in Mode::Eval, or build it over ParamStore::trainable and load the weights",
    )
    .into()
}
