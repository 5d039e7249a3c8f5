//! Convolution on CUDA: cuDNN does the work, this file the types around it.

use candle_core::{CudaStorage, Layout, Result, Tensor};

use super::{Real, launch, per_block, size, tensor, uninit, with_view};
#[cfg(feature = "cudnn")]
use super::{per_element, view};

/// Sizes of a convolution that fit one another, and how its products are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sizes {
    /// `[n, c_in, h, w]`
    pub(crate) x: [usize; 4],
    /// `[c_out, c_in / groups, kh, kw]`
    pub(crate) weight: [usize; 4],
    /// `[n, c_out, oh, ow]`
    pub(crate) y: [usize; 4],
    pub(crate) stride: [usize; 2],
    pub(crate) padding: [usize; 2],
    pub(crate) dilation: [usize; 2],
    pub(crate) groups: usize,
    /// Whether f32 operands are rounded to bf16 and multiplied on tensor cores, sums in f32.
    pub(crate) bf16: bool,
}

/// `conv(x, w) + bias`.
#[cfg(feature = "cudnn")]
pub(crate) fn convolve<T: Real>(
    op: &'static str,
    sizes: &Sizes,
    x: (&CudaStorage, &Layout),
    weight: (&CudaStorage, &Layout),
    bias: Option<(&CudaStorage, &Layout)>,
) -> Result<CudaStorage> {
    let mut y = super::cudnn::convolution(op, super::cudnn::Pass::Forward, sizes, x, weight)?;
    if let Some((bias, layout)) = bias {
        let [n, c, oh, ow] = sizes.y;
        let (len, bias) = (n * c * oh * ow, view::<T>(op, bias, layout)?);
        if len > 0 {
            let device = y.device.clone();
            let (total, channels, plane) = (size(len)?, size(c)?, size(oh * ow)?);
            let (out, config) = (y.as_cuda_slice_mut::<T>()?, per_element(len)?);
            // SAFETY: add_bias(u32 len, u32 c, u32 m, const T* bias, T* y): `c` biases, `len` elements in planes of `m`.
            unsafe { launch!(&device, T, "add_bias", config, &total, &channels, &plane, &bias, out) };
        }
    }
    Ok(y)
}

/// Gradient of the input.
#[cfg(feature = "cudnn")]
pub(crate) fn input_grad(op: &'static str, sizes: &Sizes, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
    super::cudnn::convolution_grad(op, super::cudnn::Pass::InputGrad, sizes, weight, grad)
}

/// The input gradient as a forward pass: `y` is what the convolution of `sizes` gives out, the result what it takes.
#[cfg(feature = "cudnn")]
pub(crate) fn convolve_transposed(
    op: &'static str,
    sizes: &Sizes,
    y: (&CudaStorage, &Layout),
    weight: (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    super::cudnn::convolution(op, super::cudnn::Pass::InputGrad, sizes, weight, y)
}

/// `conv(x, w)` for the tensors of a backward pass.
#[cfg(feature = "cudnn")]
pub(crate) fn output(op: &'static str, sizes: &Sizes, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    super::cudnn::convolution_grad(op, super::cudnn::Pass::Forward, sizes, x, weight)
}

/// Gradient of the weight.
#[cfg(feature = "cudnn")]
pub(crate) fn weight_grad(op: &'static str, sizes: &Sizes, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    super::cudnn::convolution_grad(op, super::cudnn::Pass::WeightGrad, sizes, x, grad)
}

/// What a build without cuDNN answers; `conv2d` refuses before, with the way out.
#[cfg(not(feature = "cudnn"))]
mod absent {
    use super::*;

    fn refuse<R>(op: &'static str) -> Result<R> {
        candle_core::bail!("{op}: built without the feature cudnn")
    }

    pub(crate) fn convolve<T: Real>(
        op: &'static str,
        _sizes: &Sizes,
        _x: (&CudaStorage, &Layout),
        _weight: (&CudaStorage, &Layout),
        _bias: Option<(&CudaStorage, &Layout)>,
    ) -> Result<CudaStorage> {
        refuse(op)
    }

    pub(crate) fn convolve_transposed(
        op: &'static str,
        _sizes: &Sizes,
        _y: (&CudaStorage, &Layout),
        _weight: (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        refuse(op)
    }

    pub(crate) fn output(op: &'static str, _: &Sizes, _: &Tensor, _: &Tensor) -> Result<Tensor> {
        refuse(op)
    }

    pub(crate) fn input_grad(op: &'static str, _: &Sizes, _: &Tensor, _: &Tensor) -> Result<Tensor> {
        refuse(op)
    }

    pub(crate) fn weight_grad(op: &'static str, _: &Sizes, _: &Tensor, _: &Tensor) -> Result<Tensor> {
        refuse(op)
    }
}
#[cfg(not(feature = "cudnn"))]
pub(crate) use absent::{convolve, convolve_transposed, input_grad, output, weight_grad};

/// Sums over images and pixels of `[n, c, m]`: the gradient of a bias.
pub(crate) fn channel_sums<T: Real>(op: &'static str, grad: &Tensor, [n, c, m]: [usize; 3]) -> Result<Tensor> {
    with_view::<T, _>(op, grad, |device, g| {
        let mut sums = uninit::<T>(device, c)?;
        let (all, channels, plane) = (size(n * m)?, size(c)?, size(m)?);
        // SAFETY: channel_sums(u32 nm, u32 c, u32 m, const T* x, T* out): `nm` elements in each of `c` channels.
        unsafe { launch!(device, T, "channel_sums", per_block(c)?, &all, &channels, &plane, &g, &mut sums) };
        Ok(tensor(device, sums, c))
    })
}
