//! Convolution: its numbers and the layer.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Tensor};
use segdistill_ops::{Conv2dConfig, FusedConv2d, Init, OpsError, ParamKind, Scope, conv2d};

use crate::error::Result;

/// A square convolution before it has weights, padded so that stride 1 keeps the size (`dilation * (kernel - 1) / 2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Input channels.
    pub n_in: usize,
    /// Output channels.
    pub n_out: usize,
    /// Kernel side, odd, in taps.
    pub kernel: usize,
    /// Step of the output grid, in pixels.
    pub stride: usize,
    /// Distance between taps, in pixels.
    pub dilation: usize,
    /// Whether each channel is convolved alone (`n_in == n_out` groups).
    pub depthwise: bool,
    /// Whether a bias is added.
    pub bias: bool,
}

impl ConvShape {
    /// A dense convolution of stride 1 without bias.
    pub fn new(n_in: usize, n_out: usize, kernel: usize) -> Self {
        Self { n_in, n_out, kernel, stride: 1, dilation: 1, depthwise: false, bias: false }
    }

    /// A depthwise convolution of stride 1 without bias.
    pub fn depthwise(channels: usize, kernel: usize) -> Self {
        Self { depthwise: true, ..Self::new(channels, channels, kernel) }
    }

    /// The same with another stride.
    pub fn strided(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// The same with another dilation.
    pub fn dilated(self, dilation: usize) -> Self {
        Self { dilation, ..self }
    }

    /// The same with a bias.
    pub fn with_bias(self) -> Self {
        Self { bias: true, ..self }
    }

    /// Geometry as the operation takes it, products in f32.
    pub fn config(&self) -> Conv2dConfig {
        Conv2dConfig {
            stride: [self.stride; 2],
            padding: [self.dilation * (self.kernel - 1) / 2; 2],
            dilation: [self.dilation; 2],
            groups: if self.depthwise { self.n_in } else { 1 },
            ..Conv2dConfig::default()
        }
    }

    /// `[n_out, n_in / groups, kernel, kernel]`.
    pub fn weight_shape(&self) -> [usize; 4] {
        [self.n_out, if self.depthwise { 1 } else { self.n_in }, self.kernel, self.kernel]
    }

    /// Trained elements.
    pub fn n_parameters(&self) -> usize {
        self.weight_shape().iter().product::<usize>() + if self.bias { self.n_out } else { 0 }
    }

    /// Output height and width for input `[h, w]`.
    ///
    /// # Errors
    /// `Ops(Shape)` when the input is empty.
    pub fn output_hw(&self, hw: [usize; 2]) -> Result<[usize; 2]> {
        let fitting = if hw.contains(&0) { None } else { self.config().output_hw(hw, [self.kernel; 2]) };
        let shape_error =
            || OpsError::shape("conv2d", format!("input {hw:?}"), "at least one row and column", "use a larger image");
        Ok(fitting.ok_or_else(shape_error)?)
    }

    /// Multiply-accumulates of one image of size `[h, w]` (the bias counts none), and the output size.
    ///
    /// `out_h * out_w * n_out * n_in / groups * kernel^2`: taps that fall on padding are counted, as is usual.
    ///
    /// # Errors
    /// As [`ConvShape::output_hw`].
    pub fn macs(&self, hw: [usize; 2]) -> Result<(u64, [usize; 2])> {
        let out = self.output_hw(hw)?;
        let taps: usize = self.weight_shape().iter().product();
        Ok((out[0] as u64 * out[1] as u64 * taps as u64, out))
    }
}

/// A convolution; parameters `weight` and, where it has one, `bias`. Its products have the precision of the scope it was
/// built in.
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
    /// For inference, from its first use on.
    fused: OnceLock<Arc<FusedConv2d>>,
}

impl Conv2d {
    /// Builds it in `scope`, weights from Kaiming's normal distribution (fan-out), bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: ConvShape, scope: &Scope) -> Result<Self> {
        // Of one group of a depthwise convolution fan-in and fan-out are the same number, k^2; the store's fan-out
        // would count all groups.
        let init = if shape.depthwise { Init::KaimingFanIn } else { Init::KaimingFanOut };
        Self::with_init(shape, init, scope)
    }

    /// Builds it in `scope` with weights from `init`, bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn with_init(shape: ConvShape, init: Init, scope: &Scope) -> Result<Self> {
        let weight = scope.get("weight", &shape.weight_shape(), ParamKind::Weight, init)?;
        let bias = match shape.bias {
            true => Some(scope.get("bias", &[shape.n_out], ParamKind::Bias, Init::Constant(0.0))?),
            false => None,
        };
        let config = Conv2dConfig { precision: scope.precision(), ..shape.config() };
        Ok(Self { weight, bias, config, fused: OnceLock::new() })
    }

    /// Convolves.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, sizes as [`ConvShape::output_hw`]
    /// # Gradient
    /// Reaches input, weight and bias.
    /// # Errors
    /// `Ops(Shape)` when the channels differ; `Ops(Config)` for bf16 products of f64 tensors or on a CPU without them.
    pub fn forward(&self, x_nchw: &Tensor) -> Result<Tensor> {
        Ok(conv2d(x_nchw, &self.weight, self.bias.as_ref(), self.config)?)
    }

    /// `act(conv(x) + residual)` without a graph, `act` being ReLU or nothing.
    pub(super) fn infer(&self, x_nchw: &Tensor, residual_nchw: Option<&Tensor>, relu: bool) -> Result<Tensor> {
        let new = || Arc::new(FusedConv2d::new(self.weight.clone(), self.bias.clone(), self.config));
        Ok(self.fused.get_or_init(new).forward(x_nchw, residual_nchw, relu)?)
    }

    /// Its weight.
    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The same convolution, which has no bias, with another weight.
    pub(super) fn over(&self, weight: Tensor) -> Self {
        Self { weight, bias: None, config: self.config, fused: OnceLock::new() }
    }

    /// The convolution that gives `scale * conv(x) + shift`, formed in f64, in the weights' type.
    ///
    /// `scale_c` and `shift_c`: `[n_out]`, f64.
    pub(super) fn scaled(&self, scale_c: &Tensor, shift_c: &Tensor) -> Result<Self> {
        let dtype = self.weight.dtype();
        let weight = self.weight.to_dtype(DType::F64)?.broadcast_mul(&scale_c.reshape(((), 1, 1, 1))?)?;
        let bias = match &self.bias {
            Some(bias) => ((bias.to_dtype(DType::F64)? * scale_c)? + shift_c)?,
            None => shift_c.clone(),
        };
        Ok(Self {
            weight: weight.to_dtype(dtype)?,
            bias: Some(bias.to_dtype(dtype)?),
            config: self.config,
            fused: OnceLock::new(),
        })
    }
}
