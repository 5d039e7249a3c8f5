//! Batch normalisation in training by cuDNN: statistics over images and pixels, saved for the way back.

use candle_core::cuda::cudarc::cudnn::sys;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, Result};

use super::super::Real;
use super::{TensorShape, data_types, failed, one_and_zero, with_handle};

/// The mode that sums over images and pixels; its persistent sibling is faster in places, and may overflow.
const MODE: sys::cudnnBatchNormMode_t = sys::cudnnBatchNormMode_t::CUDNN_BATCHNORM_SPATIAL;

/// `out`, mean and `1 / sqrt(biased variance + eps)` from `[x, gamma, beta]` over `[n, c, m]`.
pub(in super::super) fn batch_norm_train<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    [n, c, m]: [usize; 3],
    eps: f64,
    [x, gamma, beta]: [&CudaView<'_, T>; 3],
    [out, mean, inverse_std]: [&mut CudaSlice<T>; 3],
) -> Result<()> {
    let (data, sums) = data_types(T::DTYPE)?;
    let [one, zero] = one_and_zero(sums);
    let (maps, channels) = (TensorShape::new(data, [n, c, m, 1])?, TensorShape::new(sums, [1, c, 1, 1])?);
    with_handle(device, |handle| {
        let stream = &handle.stream;
        let ((x, _x), (gamma, _gamma), (beta, _beta)) =
            (x.device_ptr(stream), gamma.device_ptr(stream), beta.device_ptr(stream));
        let ((out, _out), (mean, _mean), (inverse_std, _inverse_std)) =
            (out.device_ptr_mut(stream), mean.device_ptr_mut(stream), inverse_std.device_ptr_mut(stream));
        // SAFETY: handle and descriptors are alive; `x` and `out` hold `n c m` elements of the described type, the
        // others `c`; running statistics may be absent, both together, and are kept by `blend_*`.
        unsafe {
            sys::cudnnBatchNormalizationForwardTraining(
                handle.raw,
                MODE,
                one,
                zero,
                maps.0,
                x as *const _,
                maps.0,
                out as *mut _,
                channels.0,
                gamma as *const _,
                beta as *const _,
                0.0,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                eps,
                mean as *mut _,
                inverse_std as *mut _,
            )
        }
        .result()
        .map_err(|e| failed(op, e))
    })
}

/// Gradients of x, gamma and beta from `[x, gamma, grad, mean, inverse_std]`.
pub(in super::super) fn batch_norm_train_grad<T: Real>(
    op: &'static str,
    device: &CudaDevice,
    [n, c, m]: [usize; 3],
    eps: f64,
    [x, gamma, grad, mean, inverse_std]: [&CudaView<'_, T>; 5],
    [dx, dgamma, dbeta]: [&mut CudaSlice<T>; 3],
) -> Result<()> {
    let (data, sums) = data_types(T::DTYPE)?;
    let [one, zero] = one_and_zero(sums);
    let (maps, channels) = (TensorShape::new(data, [n, c, m, 1])?, TensorShape::new(sums, [1, c, 1, 1])?);
    with_handle(device, |handle| {
        let stream = &handle.stream;
        let ((x, _x), (gamma, _gamma), (grad, _grad)) =
            (x.device_ptr(stream), gamma.device_ptr(stream), grad.device_ptr(stream));
        let ((mean, _mean), (inverse_std, _inverse_std)) = (mean.device_ptr(stream), inverse_std.device_ptr(stream));
        let ((dx, _dx), (dgamma, _dgamma), (dbeta, _dbeta)) =
            (dx.device_ptr_mut(stream), dgamma.device_ptr_mut(stream), dbeta.device_ptr_mut(stream));
        // SAFETY: handle and descriptors are alive; `x`, `grad` and `dx` hold `n c m` elements of the described type,
        // the others `c`; mean and inverse deviation are those of the forward pass with the same eps.
        unsafe {
            sys::cudnnBatchNormalizationBackward(
                handle.raw,
                MODE,
                one,
                zero,
                one,
                zero,
                maps.0,
                x as *const _,
                maps.0,
                grad as *const _,
                maps.0,
                dx as *mut _,
                channels.0,
                gamma as *const _,
                dgamma as *mut _,
                dbeta as *mut _,
                eps,
                mean as *const _,
                inverse_std as *const _,
            )
        }
        .result()
        .map_err(|e| failed(op, e))
    })
}
