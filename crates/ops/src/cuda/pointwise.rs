//! Kernels that work element by element, or pixel by pixel.

use candle_core::{CudaStorage, Layout, Result, Tensor};

use super::{Real, SUM_THREADS, launch, per_block, per_element, size, stored, tensor, uninit, view, with_view};
use crate::cpu::{check_float, for_float};

/// Sum of the squares of a tensor's elements, in f64.
///
/// # Shapes
/// - `tensor`: any, f32 or f64, on a CUDA device
/// - returns `[]`, f64, on the device, outside any graph; nothing waits for it
/// # Gradient
/// None.
/// # Errors
/// `Config` for another element type; `Candle` for a tensor that is not on a CUDA device.
pub fn square_sum(tensor: &Tensor) -> crate::error::Result<Tensor> {
    check_float("square_sum", &[tensor])?;
    Ok(for_float!("square_sum", tensor.dtype(), T => partial_squares::<T>(&tensor.contiguous()?))?.sum_all()?)
}

/// Sums of squares of parts of a tensor.
fn partial_squares<T: Real>(of: &Tensor) -> Result<Tensor> {
    /// Blocks that fill a large device; with fewer elements fewer.
    const BLOCKS: usize = 512;
    with_view::<T, _>("square_sum", of, |device, x| {
        let len = of.elem_count();
        let blocks = len.div_ceil(SUM_THREADS as usize).clamp(1, BLOCKS);
        let (n, mut partial, config) = (size(len)?, uninit::<f64>(device, blocks)?, per_block(blocks)?);
        // SAFETY: squares(u32 len, const T* x, double* partial): `len` elements, a partial sum a block.
        unsafe { launch!(device, T, "squares", config, &n, &x, &mut partial) };
        Ok(self::tensor(device, partial, blocks))
    })
}

/// `min(max(x, 0), ceiling)`; NaN stays NaN.
pub(crate) fn rectify<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    ceiling: f64,
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, layout.shape().elem_count());
    let (n, ceiling, mut out) = (size(len)?, T::from_f64(ceiling), uninit::<T>(device, len)?);
    // SAFETY: rectify(u32 len, T ceiling, const T* x, T* out), both of `len` elements.
    unsafe { launch!(device, T, "rectify", per_element(len)?, &n, &ceiling, &x, &mut out) };
    Ok(stored(device, out))
}

/// Its gradient, from the result; a `ceiling` of NaN is none.
pub(crate) fn rectify_grad<T: Real>(op: &'static str, result: &Tensor, grad: &Tensor, ceiling: f64) -> Result<Tensor> {
    with_view::<T, _>(op, result, |device, y| {
        with_view::<T, _>(op, grad, |_, g| {
            let len = grad.elem_count();
            let (n, ceiling, mut out) = (size(len)?, T::from_f64(ceiling), uninit::<T>(device, len)?);
            // SAFETY: rectify_grad(u32 len, T ceiling, const T* result, const T* grad, T* out), each of `len` elements.
            unsafe { launch!(device, T, "rectify_grad", per_element(len)?, &n, &ceiling, &y, &g, &mut out) };
            Ok(tensor(device, out, grad.shape()))
        })
    })
}

/// `x * scale` where the bit of `keep` is 1, else 0.
pub(crate) fn keep_scaled<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    keep: &[u64],
    scale: f64,
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, layout.shape().elem_count());
    if keep.len() * 64 < len {
        candle_core::bail!("{op}: {} words of mask for {len} elements", keep.len());
    }
    let (n, scale, mut out) = (size(len)?, T::from_f64(scale), uninit::<T>(device, len)?);
    let keep = device.clone_htod(keep)?;
    // SAFETY: keep_scaled(u32 len, T scale, const u64* keep, const T* x, T* out): a bit of `keep` for each of `len`.
    unsafe { launch!(device, T, "keep_scaled", per_element(len)?, &n, &scale, &keep, &x, &mut out) };
    Ok(stored(device, out))
}

/// `dst = factors[0] * dst + factors[1] * x + factors[2] * y`, in place.
pub(crate) fn combine<T: Real>(
    op: &'static str,
    (dst, dst_layout): (&mut CudaStorage, &Layout),
    (x, x_layout): (&CudaStorage, &Layout),
    (y, y_layout): (&CudaStorage, &Layout),
    factors: [f64; 3],
) -> Result<()> {
    let device = dst.device.clone();
    let (x, y) = (view::<T>(op, x, x_layout)?, view::<T>(op, y, y_layout)?);
    let Some((start, end)) = dst_layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op }.bt());
    };
    let len = end - start;
    if x_layout.shape().elem_count() != len || y_layout.shape().elem_count() != len {
        candle_core::bail!("{op}: {:?} and {:?} for {:?}", x_layout.shape(), y_layout.shape(), dst_layout.shape());
    }
    let mut dst = dst.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
    let (n, [a, b, c]) = (size(len)?, factors.map(T::from_f64));
    // SAFETY: combine(u32 len, T a, T b, T c, const T* x, const T* y, T* out), each of `len` elements as checked.
    unsafe { launch!(&device, T, "combine", per_element(len)?, &n, &a, &b, &c, &x, &y, &mut dst) };
    Ok(())
}

/// Log-softmax over the channels of `[n, c, m]`.
pub(crate) fn log_softmax<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    [n, c, m]: [usize; 3],
) -> Result<CudaStorage> {
    let (device, x) = (&x.device, view::<T>(op, x, layout)?);
    let mut out = uninit::<T>(device, n * c * m)?;
    let (pixels, channels, plane) = (size(n * m)?, size(c)?, size(m)?);
    size(n * c * m)?;
    // SAFETY: log_softmax(u32 len, u32 c, u32 m, const T* x, T* out): `len` pixels of `c` channels each.
    unsafe { launch!(device, T, "log_softmax", per_element(n * m)?, &pixels, &channels, &plane, &x, &mut out) };
    Ok(stored(device, out))
}

/// Its gradient, from the result.
pub(crate) fn log_softmax_grad<T: Real>(
    op: &'static str,
    result: &Tensor,
    grad: &Tensor,
    [n, c, m]: [usize; 3],
) -> Result<Tensor> {
    with_view::<T, _>(op, result, |device, y| {
        with_view::<T, _>(op, grad, |_, g| {
            let mut out = uninit::<T>(device, n * c * m)?;
            let (pixels, channels, plane) = (size(n * m)?, size(c)?, size(m)?);
            let config = per_element(n * m)?;
            // SAFETY: log_softmax_grad(u32 len, u32 c, u32 m, const T* result, const T* grad, T* out): `len` pixels of
            // `c` channels each.
            unsafe { launch!(device, T, "log_softmax_grad", config, &pixels, &channels, &plane, &y, &g, &mut out) };
            Ok(tensor(device, out, grad.shape()))
        })
    })
}
