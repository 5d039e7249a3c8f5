//! A value together with its derivative along one direction of the input.
//!
//! Both are made of operations that can be differentiated, so that the gradient of the derivative with respect to the
//! weights is an ordinary backward pass.

use candle_core::{DType, Tensor};
use segdistill_ops::{Conv2dConfig, Init, ParamKind, Scope, conv2d};

use crate::error::Result;

/// `f(x)`, and `d/dt f(x + t v)` at 0 where a direction is followed.
#[derive(Clone, Debug)]
pub(super) struct Dual {
    value: Tensor,
    tangent: Option<Tensor>,
}

impl Dual {
    /// A value that no direction is followed from.
    pub(super) fn constant(value: Tensor) -> Self {
        Self { value, tangent: None }
    }

    /// A value and its derivative, of one shape.
    pub(super) fn new(value: Tensor, tangent: Tensor) -> Self {
        Self { value, tangent: Some(tangent) }
    }

    /// The value.
    pub(super) fn value(self) -> Tensor {
        self.value
    }

    /// The derivative.
    pub(super) fn tangent(self) -> Option<Tensor> {
        self.tangent
    }

    /// Height and width of a map.
    pub(super) fn hw(&self) -> Result<[usize; 2]> {
        let (_, _, h, w) = self.value.dims4()?;
        Ok([h, w])
    }

    /// A linear function: the same for both.
    pub(super) fn linear(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { value: f(&self.value)?, tangent: self.tangent.as_ref().map(f).transpose()? })
    }

    /// A function that is linear in each of its two arguments.
    pub(super) fn product(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let tangent = match (&self.tangent, &other.tangent) {
            (None, None) => None,
            (Some(dx), None) => Some(f(dx, &other.value)?),
            (None, Some(dy)) => Some(f(&self.value, dy)?),
            (Some(dx), Some(dy)) => Some((f(dx, &other.value)? + f(&self.value, dy)?)?),
        };
        Ok(Self { value: f(&self.value, &other.value)?, tangent })
    }

    /// `x + y`.
    pub(super) fn plus(&self, other: &Self) -> Result<Self> {
        let tangent = match (&self.tangent, &other.tangent) {
            (Some(dx), Some(dy)) => Some((dx + dy)?),
            (dx, dy) => dx.clone().or_else(|| dy.clone()),
        };
        Ok(Self { value: (&self.value + &other.value)?, tangent })
    }

    /// `x` where it is above 0, `slope x` elsewhere.
    pub(super) fn leaky_rectified(&self, slope: f64) -> Result<Self> {
        let x = self.value.detach();
        let positive = x.gt(&x.zeros_like()?)?;
        let slopes = positive.where_cond(&x.ones_like()?, &x.ones_like()?.affine(slope, 0.0)?)?;
        self.linear(|x| Ok((x * &slopes)?))
    }

    /// `exp(z_j) / sum_k exp(z_k)` over the second of three axes, for each of the last.
    pub(super) fn softmax_columns(&self) -> Result<Self> {
        let columns = self.value.unsqueeze(3)?;
        let value = segdistill_ops::log_softmax(&columns)?.squeeze(3)?.exp()?;
        let Some(dz) = &self.tangent else { return Ok(Self::constant(value)) };
        let weighted = (&value * dz)?;
        let tangent = (&weighted - value.broadcast_mul(&weighted.sum_keepdim(1)?)?)?;
        Ok(Self::new(value, tangent))
    }
}

/// Convolution with bias, over tensors that may be anything.
#[derive(Clone, Debug)]
pub(super) struct Affine {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

impl Affine {
    /// Weight drawn as PyTorch's default draws it, with the same variance, bias 0; `sizes`: input and output channels.
    pub(super) fn new([n_in, n_out]: [usize; 2], kernel: usize, scope: &Scope) -> Result<Self> {
        let init = Init::Normal(default_deviation(n_in * kernel * kernel));
        Ok(Self {
            weight: scope.get("weight", &[n_out, n_in, kernel, kernel], ParamKind::Weight, init)?,
            bias: scope.get("bias", &[n_out], ParamKind::Bias, Init::Constant(0.0))?,
        })
    }

    pub(super) fn detached(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.detach() }
    }

    /// The leading taps of the kernel.
    pub(super) fn cropped(&self, [h, w]: [usize; 2]) -> Result<Self> {
        Ok(Self { weight: self.weight.narrow(2, 0, h)?.narrow(3, 0, w)?, bias: self.bias.clone() })
    }

    pub(super) fn forward(&self, x: &Dual, cfg: Conv2dConfig) -> Result<Dual> {
        let value = conv2d(&x.value, &self.weight, Some(&self.bias), cfg)?;
        let tangent = x.tangent.as_ref().map(|dx| conv2d(dx, &self.weight, None, cfg)).transpose()?;
        Ok(Dual { value, tangent })
    }
}

/// Standard deviation of the uniform distribution within `1 / sqrt(fan_in)`, PyTorch's default for a convolution.
pub(super) fn default_deviation(fan_in: usize) -> f64 {
    (1.0 / (3.0 * fan_in as f64)).sqrt()
}

/// The elements of a small tensor, in f64.
pub(super) fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
