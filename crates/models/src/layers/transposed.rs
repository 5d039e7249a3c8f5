//! Transposed convolution: its numbers and the layer.

use candle_core::Tensor;
use segdistill_ops::{ConvTranspose2dConfig, Init, OpsError, ParamKind, Scope, conv_transpose2d};

use crate::error::Result;

/// A square transposed convolution before it has weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransposedShape {
    /// Input channels.
    pub n_in: usize,
    /// Output channels.
    pub n_out: usize,
    /// Kernel side, in pixels of the output.
    pub kernel: usize,
    /// How many times finer the output grid is.
    pub stride: usize,
    /// Rows and columns cut off the output on every side.
    pub padding: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl TransposedShape {
    fn config(&self, output_padding: [usize; 2]) -> ConvTranspose2dConfig {
        ConvTranspose2dConfig {
            stride: [self.stride; 2],
            padding: [self.padding; 2],
            output_padding,
            ..ConvTranspose2dConfig::default()
        }
    }

    /// `[n_in, n_out, kernel, kernel]`.
    pub fn weight_shape(&self) -> [usize; 4] {
        [self.n_in, self.n_out, self.kernel, self.kernel]
    }

    /// Trained elements.
    pub fn n_parameters(&self) -> usize {
        self.weight_shape().iter().product::<usize>() + if self.bias { self.n_out } else { 0 }
    }

    /// Output height and width for input `[h, w]` and no output padding.
    ///
    /// # Errors
    /// `Ops(Shape)` when nothing is left.
    pub fn output_hw(&self, hw: [usize; 2]) -> Result<[usize; 2]> {
        let fitting = self.config([0, 0]).output_hw(hw, [self.kernel; 2]);
        let shape_error = || {
            let found = format!("input {hw:?}");
            OpsError::shape("conv_transpose2d", found, "a map larger than the padding", "use a larger image")
        };
        Ok(fitting.ok_or_else(shape_error)?)
    }

    /// Multiply-accumulates of one image of size `[h, w]` (the bias counts none): every input pixel meets every weight
    /// once, `h * w * n_in * n_out * kernel^2`. What padding cuts off again is counted, as is usual.
    pub fn macs(&self, hw: [usize; 2]) -> u64 {
        let weights: usize = self.weight_shape().iter().product();
        hw[0] as u64 * hw[1] as u64 * weights as u64
    }
}

/// A transposed convolution; parameters `weight` and, where it has one, `bias`.
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    weight: Tensor,
    bias: Option<Tensor>,
    shape: TransposedShape,
    precision: segdistill_ops::Precision,
}

impl ConvTranspose2d {
    /// Builds it in `scope`: weights from Xavier's uniform distribution, bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn new(shape: TransposedShape, scope: &Scope) -> Result<Self> {
        Self::with_init(shape, Init::Xavier, scope)
    }

    /// Builds it in `scope` with weights from `init`, bias 0.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    pub fn with_init(shape: TransposedShape, init: Init, scope: &Scope) -> Result<Self> {
        let weight = scope.get("weight", &shape.weight_shape(), ParamKind::Weight, init)?;
        let bias = match shape.bias {
            true => Some(scope.get("bias", &[shape.n_out], ParamKind::Bias, Init::Constant(0.0))?),
            false => None,
        };
        Ok(Self { weight, bias, shape, precision: scope.precision() })
    }

    /// Convolves; `output_padding` rows and columns are added at the far side, below the stride.
    ///
    /// # Shapes
    /// `[n, n_in, h, w]` to `[n, n_out, h', w']`, [`TransposedShape::output_hw`] and the output padding
    /// # Gradient
    /// Reaches input, weight and bias.
    /// # Errors
    /// `Ops(Shape)` when the channels differ; `Ops(Config)` for an output padding of the stride or more.
    pub fn forward(&self, x_nchw: &Tensor, output_padding: [usize; 2]) -> Result<Tensor> {
        let config = ConvTranspose2dConfig { precision: self.precision, ..self.shape.config(output_padding) };
        Ok(conv_transpose2d(x_nchw, &self.weight, self.bias.as_ref(), config)?)
    }
}
