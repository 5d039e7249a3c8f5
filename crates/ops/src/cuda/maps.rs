//! Pooling and resizing: every thread gathers one element, forward and backward, so that no sum depends on timing.

use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage, Tensor};

use super::{Real, launch, per_element, size, stored, tensor, uninit, view, with_view};
use crate::pool::{Bin, Pool2dConfig};
use crate::resize::Tap;

/// `Pool` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Pool {
    h: u32,
    w: u32,
    oh: u32,
    ow: u32,
    kh: u32,
    kw: u32,
    sh: u32,
    sw: u32,
    ph: u32,
    pw: u32,
}

// SAFETY: ten u32 in the order of the kernels' struct, without padding.
unsafe impl DeviceRepr for Pool {}

impl Pool {
    fn new([_, _, h, w]: [usize; 4], [oh, ow]: [usize; 2], cfg: Pool2dConfig) -> Result<Self> {
        let Pool2dConfig { kernel, stride, padding, .. } = cfg;
        Ok(Self {
            h: size(h)?,
            w: size(w)?,
            oh: size(oh)?,
            ow: size(ow)?,
            kh: size(kernel[0])?,
            kw: size(kernel[1])?,
            sh: size(stride[0])?,
            sw: size(stride[1])?,
            ph: size(padding[0])?,
            pw: size(padding[1])?,
        })
    }
}

/// `Grid` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Grid {
    h: u32,
    w: u32,
    oh: u32,
    ow: u32,
}

// SAFETY: four u32 in the order of the kernels' struct, without padding.
unsafe impl DeviceRepr for Grid {}

impl Grid {
    fn new([_, _, h, w]: [usize; 4], [oh, ow]: [usize; 2]) -> Result<Self> {
        Ok(Self { h: size(h)?, w: size(w)?, oh: size(oh)?, ow: size(ow)? })
    }
}

/// Maximum of every window.
pub(crate) fn max_pool<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    dims: [usize; 4],
    out_hw: [usize; 2],
    cfg: Pool2dConfig,
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, dims[0] * dims[1] * out_hw[0] * out_hw[1]);
    let (n, pool, lowest) = (size(len)?, Pool::new(dims, out_hw, cfg)?, T::from_f64(f64::NEG_INFINITY));
    let (mut out, no_places) = (uninit::<T>(device, len)?, 0u64);
    let config = per_element(len)?;
    // SAFETY: max_pool(u32 len, Pool p, T lowest, const T* x, T* out, u32* place): `len` windows over planes of `x`, a
    // null pointer for the places.
    unsafe { launch!(device, T, "max_pool", config, &n, &pool, &lowest, &x, &mut out, &no_places) };
    Ok(stored(device, out))
}

/// Where the maxima of [`max_pool`] lie in their planes, u32.
pub(crate) fn max_pool_places<T: Real>(
    op: &'static str,
    x: &Tensor,
    dims: [usize; 4],
    out_hw: [usize; 2],
    cfg: Pool2dConfig,
) -> Result<Tensor> {
    let windows = dims[0] * dims[1] * out_hw[0] * out_hw[1];
    with_view::<T, _>(op, x, |device, x| {
        let (pool, lowest) = (Pool::new(dims, out_hw, cfg)?, T::from_f64(f64::NEG_INFINITY));
        // SAFETY: the kernel below writes every element.
        let mut places = unsafe { device.alloc::<u32>(windows)? };
        let (n, no_maxima, config) = (size(windows)?, 0u64, per_element(windows)?);
        // SAFETY: as in `max_pool`, with a null pointer for the maxima.
        unsafe { launch!(device, T, "max_pool", config, &n, &pool, &lowest, &x, &no_maxima, &mut places) };
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(places, device.clone()));
        let shape = (dims[0], dims[1], out_hw[0], out_hw[1]);
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    })
}

/// Gradient of [`max_pool`]: the maxima are looked for again, then gathered.
pub(crate) fn max_pool_grad<T: Real>(
    op: &'static str,
    x: &Tensor,
    grad: &Tensor,
    dims: [usize; 4],
    out_hw: [usize; 2],
    cfg: Pool2dConfig,
) -> Result<Tensor> {
    with_view::<T, _>(op, x, |device, x_view| {
        with_view::<T, _>(op, grad, |_, g| {
            let (len, windows) = (x.elem_count(), grad.elem_count());
            let (pool, lowest) = (Pool::new(dims, out_hw, cfg)?, T::from_f64(f64::NEG_INFINITY));
            // SAFETY: the kernel below writes every element before the one after it reads them.
            let mut places = unsafe { device.alloc::<u32>(windows)? };
            let (n_windows, no_maxima, config) = (size(windows)?, 0u64, per_element(windows)?);
            // SAFETY: as in `max_pool`, with a null pointer for the maxima.
            unsafe {
                launch!(device, T, "max_pool", config, &n_windows, &pool, &lowest, &x_view, &no_maxima, &mut places)
            };
            let (n, mut dx) = (size(len)?, uninit::<T>(device, len)?);
            // SAFETY: max_pool_grad(u32 len, Pool p, const u32* place, const T* grad, T* dx): `len` inputs, and places
            // and gradients of every window.
            unsafe { launch!(device, T, "max_pool_grad", per_element(len)?, &n, &pool, &places, &g, &mut dx) };
            Ok(tensor(device, dx, x.shape()))
        })
    })
}

/// Bins on the device: start, end and divisor of each.
fn upload_bins(device: &CudaDevice, bins: &[Bin]) -> Result<CudaSlice<u32>> {
    let mut flat = Vec::with_capacity(3 * bins.len());
    for bin in bins {
        flat.extend([size(bin.start)?, size(bin.end)?, size(bin.span)?]);
    }
    device.clone_htod(&flat)
}

/// For each of `len` inputs the outputs `first..end` that may read it, where output `o` reads only within
/// `reads(o).0 ..= reads(o).1`.
fn upload_ranges(
    device: &CudaDevice,
    len: usize,
    n_outputs: usize,
    reads: impl Fn(usize) -> (usize, usize),
) -> Result<CudaSlice<u32>> {
    device.clone_htod(&ranges(len, n_outputs, reads)?)
}

pub(super) fn ranges(len: usize, n_outputs: usize, reads: impl Fn(usize) -> (usize, usize)) -> Result<Vec<u32>> {
    let mut flat = vec![0; 2 * len];
    for o in 0..n_outputs {
        let (low, high) = reads(o);
        for at in low..=high.min(len.saturating_sub(1)) {
            if flat[2 * at + 1] == 0 {
                flat[2 * at] = size(o)?;
            }
            flat[2 * at + 1] = size(o + 1)?;
        }
    }
    Ok(flat)
}

/// Means over rectangles.
pub(crate) fn mean_pool<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    dims: [usize; 4],
    rows: &[Bin],
    cols: &[Bin],
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, dims[0] * dims[1] * rows.len() * cols.len());
    let (n, grid) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?);
    let (rows, cols, mut out) = (upload_bins(device, rows)?, upload_bins(device, cols)?, uninit::<T>(device, len)?);
    // SAFETY: mean_pool(u32 len, Grid g, const u32* rows, const u32* cols, const T* x, T* out): three numbers a bin, bins
    // within the planes of `x`.
    unsafe { launch!(device, T, "mean_pool", per_element(len)?, &n, &grid, &rows, &cols, &x, &mut out) };
    Ok(stored(device, out))
}

/// Gradient of [`mean_pool`].
pub(crate) fn mean_pool_grad<T: Real>(
    op: &'static str,
    x: &Tensor,
    grad: &Tensor,
    dims: [usize; 4],
    rows: &[Bin],
    cols: &[Bin],
) -> Result<Tensor> {
    with_view::<T, _>(op, grad, |device, g| {
        let len = x.elem_count();
        let (n, grid) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?);
        let reach = |bins: &[Bin], axis: usize| {
            // A bin that lies in the padding alone covers nothing; the kernel leaves it out again.
            upload_ranges(device, dims[axis], bins.len(), |o| (bins[o].start, bins[o].end.max(1) - 1))
        };
        let (row_range, col_range) = (reach(rows, 2)?, reach(cols, 3)?);
        let (rows, cols, mut dx) = (upload_bins(device, rows)?, upload_bins(device, cols)?, uninit::<T>(device, len)?);
        let config = per_element(len)?;
        // SAFETY: mean_pool_grad(u32 len, Grid g, const u32* rows, const u32* cols, const u32* row_range, const u32*
        // col_range, const T* grad, T* dx): three numbers a bin, two a row or column of the input.
        unsafe {
            launch!(device, T, "mean_pool_grad", config, &n, &grid, &rows, &cols, &row_range, &col_range, &g, &mut dx)
        };
        Ok(tensor(device, dx, x.shape()))
    })
}

/// Neighbours and weights of the outputs of an axis, on the device.
fn upload_taps<T: Real>(device: &CudaDevice, taps: &[Tap]) -> Result<(CudaSlice<u32>, CudaSlice<T>)> {
    let (mut places, mut weights) = (Vec::with_capacity(2 * taps.len()), Vec::with_capacity(2 * taps.len()));
    for tap in taps {
        places.extend([size(tap.low)?, size(tap.high)?]);
        weights.extend([T::from_f64(tap.low_weight), T::from_f64(tap.high_weight)]);
    }
    Ok((device.clone_htod(&places)?, device.clone_htod(&weights)?))
}

/// Linear interpolation along both axes.
pub(crate) fn bilinear<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    dims: [usize; 4],
    rows: &[Tap],
    cols: &[Tap],
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, dims[0] * dims[1] * rows.len() * cols.len());
    let (n, grid, mut out) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?, uninit::<T>(device, len)?);
    let ((rows, row_weights), (cols, col_weights)) = (upload_taps::<T>(device, rows)?, upload_taps::<T>(device, cols)?);
    let config = per_element(len)?;
    // SAFETY: bilinear(u32 len, Grid g, const u32* rows, const T* row_weights, const u32* cols, const T* col_weights,
    // const T* x, T* out): two neighbours and two weights an output, neighbours within the planes of `x`.
    unsafe {
        launch!(device, T, "bilinear", config, &n, &grid, &rows, &row_weights, &cols, &col_weights, &x, &mut out)
    };
    Ok(stored(device, out))
}

/// Gradient of [`bilinear`].
pub(crate) fn bilinear_grad<T: Real>(
    op: &'static str,
    x: &Tensor,
    grad: &Tensor,
    dims: [usize; 4],
    rows: &[Tap],
    cols: &[Tap],
) -> Result<Tensor> {
    with_view::<T, _>(op, grad, |device, g| {
        let len = x.elem_count();
        let (n, grid, mut dx) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?, uninit::<T>(device, len)?);
        let reach =
            |taps: &[Tap], axis: usize| upload_ranges(device, dims[axis], taps.len(), |o| (taps[o].low, taps[o].high));
        let (row_range, col_range) = (reach(rows, 2)?, reach(cols, 3)?);
        let (rows, row_weights) = upload_taps::<T>(device, rows)?;
        let (cols, col_weights) = upload_taps::<T>(device, cols)?;
        let config = per_element(len)?;
        // SAFETY: bilinear_grad(u32 len, Grid g, const u32* rows, const T* row_weights, const u32* cols, const T*
        // col_weights, const u32* row_range, const u32* col_range, const T* grad, T* dx): as in `bilinear`, and two
        // numbers a row or column of the input.
        unsafe {
            launch!(
                device,
                T,
                "bilinear_grad",
                config,
                &n,
                &grid,
                &rows,
                &row_weights,
                &cols,
                &col_weights,
                &row_range,
                &col_range,
                &g,
                &mut dx
            )
        };
        Ok(tensor(device, dx, x.shape()))
    })
}

/// Input rows or columns of the outputs of an axis, on the device.
fn upload_indices(device: &CudaDevice, indices: &[usize]) -> Result<CudaSlice<u32>> {
    let flat: Vec<u32> = indices.iter().map(|&i| size(i)).collect::<Result<_>>()?;
    device.clone_htod(&flat)
}

/// Copies of one input pixel each.
pub(crate) fn nearest<T: Real>(
    op: &'static str,
    x: &CudaStorage,
    layout: &Layout,
    dims: [usize; 4],
    rows: &[usize],
    cols: &[usize],
) -> Result<CudaStorage> {
    let (device, x, len) = (&x.device, view::<T>(op, x, layout)?, dims[0] * dims[1] * rows.len() * cols.len());
    let (n, grid, mut out) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?, uninit::<T>(device, len)?);
    let (rows, cols) = (upload_indices(device, rows)?, upload_indices(device, cols)?);
    // SAFETY: nearest(u32 len, Grid g, const u32* rows, const u32* cols, const T* x, T* out): an input row or column for
    // each of the output's, within the planes of `x`.
    unsafe { launch!(device, T, "nearest", per_element(len)?, &n, &grid, &rows, &cols, &x, &mut out) };
    Ok(stored(device, out))
}

/// Gradient of [`nearest`].
pub(crate) fn nearest_grad<T: Real>(
    op: &'static str,
    x: &Tensor,
    grad: &Tensor,
    dims: [usize; 4],
    rows: &[usize],
    cols: &[usize],
) -> Result<Tensor> {
    with_view::<T, _>(op, grad, |device, g| {
        let len = x.elem_count();
        let (n, grid, mut dx) = (size(len)?, Grid::new(dims, [rows.len(), cols.len()])?, uninit::<T>(device, len)?);
        let reach = |indices: &[usize], axis: usize| {
            upload_ranges(device, dims[axis], indices.len(), |o| (indices[o], indices[o]))
        };
        let (row_range, col_range) = (reach(rows, 2)?, reach(cols, 3)?);
        let config = per_element(len)?;
        // SAFETY: nearest_grad(u32 len, Grid g, const u32* row_range, const u32* col_range, const T* grad, T* dx): two
        // numbers a row or column of the input.
        unsafe { launch!(device, T, "nearest_grad", config, &n, &grid, &row_range, &col_range, &g, &mut dx) };
        Ok(tensor(device, dx, x.shape()))
    })
}
