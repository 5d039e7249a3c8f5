//! Max, average and adaptive average pooling.
//!
//! The way back up, unpooling, lives in `unpool`.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::dims_nchw;

/// Geometry of a pooling window; per axis `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2dConfig {
    /// Window.
    pub kernel: [usize; 2],
    /// Step.
    pub stride: [usize; 2],
    /// Padding on both sides (minus infinity for max, zeros counted for average).
    pub padding: [usize; 2],
    /// Whether the last, partly covered window counts (PyTorch's rule).
    pub ceil_mode: bool,
}

impl Pool2dConfig {
    /// Output height and width for input `[h, w]`: `(h + 2 p - k) / s + 1`, floored, or rounded up in `ceil_mode` as
    /// long as the last window starts inside the input or its leading padding.
    ///
    /// `None` when a kernel or stride is 0, the padding exceeds half the kernel, or the window does not fit.
    pub fn output_hw(&self, hw: [usize; 2]) -> Option<[usize; 2]> {
        let side = |i: usize| {
            let (k, s, p) = (self.kernel[i], self.stride[i], self.padding[i]);
            if k == 0 || s == 0 || p > k / 2 {
                return None;
            }
            let room = (hw[i] + 2 * p).checked_sub(k);
            if !self.ceil_mode {
                return Some(room? / s + 1);
            }
            // A window larger than the padded input still counts when rounding up brings the quotient to 0.
            let last = match room {
                Some(room) => room.div_ceil(s),
                None if k - (hw[i] + 2 * p) < s => 0,
                None => return None,
            };
            Some(if last * s >= hw[i] + p { last } else { last + 1 })
        };
        Some([side(0)?, side(1)?]).filter(|out| out[0] > 0 && out[1] > 0)
    }

    fn checked_output_hw(&self, op: &'static str, hw: [usize; 2]) -> Result<[usize; 2]> {
        self.output_hw(hw).ok_or_else(|| {
            OpsError::shape(
                op,
                format!("{self:?} on a map of {hw:?}"),
                "stride >= 1, padding at most half the kernel, kernel within the padded map",
                "shrink the kernel, or feed a larger map",
            )
        })
    }
}

/// Maximum of every window; padding never wins, NaN always does.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, oh, ow]` by [`Pool2dConfig::output_hw`]
/// # Gradient
/// The whole gradient of a window goes to its maximum, the first in row-major order among equals (the last NaN), as in
/// PyTorch; overlapping windows add. The maximum is looked for again in the backward pass: cheaper than keeping indices.
/// # Errors
/// `Shape` unless rank 4 without empty axes, or for a window that does not fit; `Config` for another element type or a
/// device without kernels.
/// # Source
/// PyTorch `torch.nn.functional.max_pool2d`.
pub fn max_pool2d(x_nchw: &Tensor, cfg: Pool2dConfig) -> Result<Tensor> {
    let op = "max_pool2d";
    check_float(op, &[x_nchw])?;
    let [n, c, h, w] = dims_nchw(op, x_nchw)?;
    let out_hw = cfg.checked_output_hw(op, [h, w])?;
    Ok(graph::apply1(&x_nchw.contiguous()?, MaxPool { dims: [n, c, h, w], out_hw, cfg })?)
}

/// [`max_pool2d`], and where each maximum lies: what max unpooling needs.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns maxima and indices, both `[n, c, oh, ow]` by [`Pool2dConfig::output_hw`]; an index is the place
///   `y * w + x` in its plane, u32
/// # Gradient
/// That of [`max_pool2d`]; the indices are no part of any graph. Where an index points, the gradient goes.
/// # Errors
/// Those of [`max_pool2d`]; `Shape` for planes of 2^32 pixels and more.
/// # Source
/// PyTorch `torch.nn.functional.max_pool2d(return_indices=True)`, there with i64 indices.
pub fn max_pool2d_with_indices(x_nchw: &Tensor, cfg: Pool2dConfig) -> Result<(Tensor, Tensor)> {
    let op = "max_pool2d_with_indices";
    check_float(op, &[x_nchw])?;
    let dims = dims_nchw(op, x_nchw)?;
    let out_hw = cfg.checked_output_hw(op, [dims[2], dims[3]])?;
    if u32::try_from(dims[2] * dims[3]).is_err() {
        let found = format!("a plane of {} pixels", dims[2] * dims[3]);
        return Err(OpsError::shape(op, found, "fewer than 2^32", "pool a smaller map"));
    }
    let x = x_nchw.contiguous()?;
    let pool = MaxPool { dims, out_hw, cfg };
    let shape = (dims[0], dims[1], out_hw[0], out_hw[1]);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let indices = for_float!(op, x.dtype(), T => cuda::max_pool_places::<T>(op, &x, dims, out_hw, cfg))?;
        return Ok((graph::apply1(&x, pool)?, indices));
    }
    let indices = for_float!(op, x.dtype(), T => with_slice::<T, _>(op, &x, |values| Ok(pool.places(values))))?;
    let indices = Tensor::from_vec(indices, shape, x.device())?;
    Ok((graph::apply1(&x, pool)?, indices))
}

/// Mean of every window; padding counts as zeros, but what `ceil_mode` adds beyond it does not count.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, oh, ow]` by [`Pool2dConfig::output_hw`]
/// # Gradient
/// Each window's gradient spreads evenly over it; overlapping windows add.
/// # Errors
/// Those of [`max_pool2d`].
/// # Source
/// PyTorch `torch.nn.functional.avg_pool2d` with `count_include_pad=True`.
pub fn avg_pool2d(x_nchw: &Tensor, cfg: Pool2dConfig) -> Result<Tensor> {
    let op = "avg_pool2d";
    check_float(op, &[x_nchw])?;
    let dims = dims_nchw(op, x_nchw)?;
    let (hw, out_hw) = ([dims[2], dims[3]], cfg.checked_output_hw(op, [dims[2], dims[3]])?);
    let bins = |axis: usize| {
        let (k, s, p, len) = (cfg.kernel[axis], cfg.stride[axis], cfg.padding[axis], hw[axis]);
        let bin = |i: usize| {
            let (start, end) = (i * s, (i * s + k).min(len + 2 * p));
            Bin { start: start.saturating_sub(p), end: end.saturating_sub(p).min(len), span: end - start }
        };
        (0..out_hw[axis]).map(bin).collect()
    };
    Ok(graph::apply1(&x_nchw.contiguous()?, MeanPool { name: op, dims, rows: bins(0), cols: bins(1) })?)
}

/// Means over a grid of `out_hw` bins that cover the map.
///
/// Bin `i` of an axis is `floor(i * len / out) .. ceil((i + 1) * len / out)`; `[1, 1]` is global average pooling. Bins
/// overlap where `out` does not divide `len`, and repeat elements where it is larger.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, out_hw[0], out_hw[1]]`
/// # Gradient
/// Each bin's gradient spreads evenly over it; overlapping bins add.
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for an output side of 0, another element type or a device
/// without kernels.
/// # Source
/// PyTorch `torch.nn.functional.adaptive_avg_pool2d`.
pub fn adaptive_avg_pool2d(x_nchw: &Tensor, out_hw: [usize; 2]) -> Result<Tensor> {
    let op = "adaptive_avg_pool2d";
    check_float(op, &[x_nchw])?;
    let dims = dims_nchw(op, x_nchw)?;
    if out_hw.contains(&0) {
        return Err(OpsError::config(format!("{op}: output size is {out_hw:?}"), "ask for at least one bin a side"));
    }
    let bins = |axis: usize| {
        let (len, out): (usize, usize) = (dims[2 + axis], out_hw[axis]);
        let bin = |i: usize| {
            let (start, end) = (i * len / out, ((i + 1) * len).div_ceil(out));
            Bin { start, end, span: end - start }
        };
        (0..out).map(bin).collect()
    };
    Ok(graph::apply1(&x_nchw.contiguous()?, MeanPool { name: op, dims, rows: bins(0), cols: bins(1) })?)
}

/// Max pooling of `[n, c, h, w]` maps.
struct MaxPool {
    dims: [usize; 4],
    out_hw: [usize; 2],
    cfg: Pool2dConfig,
}

impl MaxPool {
    /// Length of the buffer that [`MaxPool::row`] takes.
    fn scratch_len(&self) -> usize {
        let stride = self.cfg.stride[1];
        if stride == 1 { 0 } else { stride * self.dims[3].div_ceil(stride) }
    }

    /// Maxima of one output row into `best`; with `ARG`, their taps into `arg`.
    ///
    /// Tap `a` of output `ox` is the element at `a + ox * sw - pw` of the plane.
    #[inline(always)]
    fn row<T: Element, const ARG: bool>(
        &self,
        plane: &[T],
        oy: usize,
        best: &mut [T],
        arg: &mut [u32],
        scratch: &mut [T],
    ) {
        let ([_, _, h, w], [kh, kw], [sh, sw], [ph, pw]) =
            (self.dims, self.cfg.kernel, self.cfg.stride, self.cfg.padding);
        let rows = (oy * sh).saturating_sub(ph)..(oy * sh + kh).saturating_sub(ph).min(h);
        best.fill(T::from_f64(f64::NEG_INFINITY));
        if ARG {
            // A window of nothing but minus infinity gives its gradient to its first element.
            for (ox, arg) in arg.iter_mut().enumerate() {
                *arg = (rows.start * w + pw.saturating_sub(ox * sw)) as u32;
            }
        }
        for y in rows {
            let row = &plane[y * w..][..w];
            // Elements p, p + sw, p + 2 sw, ... side by side in phase p, so that every tap reads a plain slice.
            let phase_len = w.div_ceil(sw);
            match sw {
                1 => {}
                2 => split_phases::<T, 2>(row, scratch, phase_len),
                _ => {
                    for (p, phase) in scratch.chunks_mut(phase_len).enumerate() {
                        for (to, &x) in phase.iter_mut().zip(row[p.min(w)..].iter().step_by(sw)) {
                            *to = x;
                        }
                    }
                }
            }
            let phases: &[T] = if sw == 1 { row } else { scratch };
            for kx in 0..kw {
                // Outputs whose tap kx lies inside the row: 0 <= ox * sw + kx - pw < w.
                let first = pw.saturating_sub(kx).div_ceil(sw);
                let end = (w + pw).saturating_sub(kx).div_ceil(sw).min(best.len());
                if first >= end {
                    continue;
                }
                let x = first * sw + kx - pw;
                let values = &phases[x % sw * phase_len + x / sw..][..end - first];
                if ARG {
                    take_tap(&mut best[first..end], &mut arg[first..end], values, (y * w + kx) as u32);
                } else {
                    for (best, &v) in best[first..end].iter_mut().zip(values) {
                        *best = if beats(v, *best) { v } else { *best };
                    }
                }
            }
        }
    }

    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let ([n, c, h, w], [oh, ow]) = (self.dims, self.out_hw);
        par_chunks(n * c * oh * ow, oh * ow, |p, out| {
            let mut scratch = vec![T::ZERO; self.scratch_len()];
            vectorised(|| {
                for (oy, best) in out.chunks_mut(ow).enumerate() {
                    self.row::<T, false>(&x[p * h * w..][..h * w], oy, best, &mut [], &mut scratch);
                }
            });
        })
    }

    /// Where the maxima lie in their planes.
    fn places<T: Element>(&self, x: &[T]) -> Vec<u32> {
        let ([n, c, h, w], [oh, ow]) = (self.dims, self.out_hw);
        let mut out = vec![0; n * c * oh * ow];
        out.par_chunks_mut(oh * ow).enumerate().for_each(|(p, out)| {
            let (mut best, mut scratch) = (vec![T::ZERO; ow], vec![T::ZERO; self.scratch_len()]);
            vectorised(|| {
                for (oy, arg) in out.chunks_mut(ow).enumerate() {
                    self.row::<T, true>(&x[p * h * w..][..h * w], oy, &mut best, arg, &mut scratch);
                    for (ox, arg) in arg.iter_mut().enumerate() {
                        *arg = (*arg as usize + ox * self.cfg.stride[1] - self.cfg.padding[1]) as u32;
                    }
                }
            });
        });
        out
    }

    fn backward<T: Element>(&self, x: &[T], grad: &[T]) -> Vec<T> {
        let ([n, c, h, w], [oh, ow]) = (self.dims, self.out_hw);
        par_chunks(n * c * h * w, h * w, |p, dx| {
            let (mut best, mut arg, mut scratch) =
                (vec![T::ZERO; ow], vec![0u32; ow], vec![T::ZERO; self.scratch_len()]);
            vectorised(|| {
                for (oy, g) in grad[p * oh * ow..][..oh * ow].chunks(ow).enumerate() {
                    self.row::<T, true>(&x[p * h * w..][..h * w], oy, &mut best, &mut arg, &mut scratch);
                    for (ox, (&tap, &g)) in arg.iter().zip(g).enumerate() {
                        dx[tap as usize + ox * self.cfg.stride[1] - self.cfg.padding[1]] += g;
                    }
                }
            });
        })
    }
}

/// Whether `v` replaces the maximum so far: when strictly larger (the first of equals stays); a NaN always, for good.
#[inline(always)]
#[allow(clippy::eq_op)]
fn beats<T: Element>(v: T, best: T) -> bool {
    (v > best) | (v != v)
}

/// Lets the values of one tap replace the maxima so far, and the tap with them.
///
/// A function, so that its arguments are known not to overlap: that alone makes the loop a vector loop.
#[inline(always)]
fn take_tap<T: Element>(best: &mut [T], arg: &mut [u32], values: &[T], tap: u32) {
    for ((best, arg), &v) in best.iter_mut().zip(arg).zip(values) {
        let wins = beats(v, *best);
        *best = if wins { v } else { *best };
        // A mask instead of a branch, which random maps would mispredict every other time.
        let mask = u32::from(wins).wrapping_neg();
        *arg = (tap & mask) | (*arg & !mask);
    }
}

/// Every `STEP`-th element of a row side by side, one phase after the other.
#[inline(always)]
fn split_phases<T: Element, const STEP: usize>(row: &[T], phases: &mut [T], phase_len: usize) {
    let whole = row.chunks_exact(STEP);
    for (p, &x) in whole.remainder().iter().enumerate() {
        phases[(p + 1) * phase_len - 1] = x;
    }
    for (p, phase) in phases.chunks_mut(phase_len).enumerate() {
        for (to, group) in phase.iter_mut().zip(whole.clone()) {
            *to = group[p];
        }
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(self.name(), x.dtype(), T => {
            let out = self.forward(slice_of::<T>(self.name(), x, layout)?);
            let shape = Shape::from((self.dims[0], self.dims[1], self.out_hw[0], self.out_hw[1]));
            Ok((T::to_cpu_storage_owned(out), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let out = for_float!(self.name(), x.dtype(), T => {
            cuda::max_pool::<T>(self.name(), x, layout, self.dims, self.out_hw, self.cfg)
        })?;
        Ok((out, Shape::from((self.dims[0], self.dims[1], self.out_hw[0], self.out_hw[1]))))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let dx = for_float!(self.name(), grad.dtype(), T => {
                cuda::max_pool_grad::<T>(self.name(), x, &grad, self.dims, self.out_hw, self.cfg)
            });
            return dx.map(Some);
        }
        for_float!(self.name(), grad.dtype(), T => {
            let dx = with_slice::<T, _>(self.name(), x, |x| {
                with_slice::<T, _>(self.name(), &grad, |g| Ok(self.backward(x, g)))
            })?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}

/// Elements `start..end` of an axis, with the divisor this axis contributes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bin {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) span: usize,
}

/// Means over rectangles, the product of a bin of rows and a bin of columns.
struct MeanPool {
    name: &'static str,
    dims: [usize; 4],
    rows: Vec<Bin>,
    cols: Vec<Bin>,
}

impl MeanPool {
    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        par_chunks(n * c * oh * ow, oh * ow, |p, out| {
            let x = &x[p * h * w..][..h * w];
            let mut column_sums = vec![0.0; w];
            vectorised(|| {
                for (out, rows) in out.chunks_mut(ow).zip(&self.rows) {
                    column_sums.fill(0.0);
                    for row in x[rows.start * w..rows.end * w].chunks(w) {
                        for (sum, &x) in column_sums.iter_mut().zip(row) {
                            *sum += x.to_f64();
                        }
                    }
                    for (out, cols) in out.iter_mut().zip(&self.cols) {
                        let sum: f64 = column_sums[cols.start..cols.end].iter().sum();
                        *out = T::from_f64(sum / (rows.span * cols.span) as f64);
                    }
                }
            });
        })
    }

    fn backward<T: Element>(&self, grad: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        par_chunks(n * c * h * w, h * w, |p, dx| {
            let mut row_gradient = vec![0.0; w];
            vectorised(|| {
                for (grad, rows) in grad[p * oh * ow..][..oh * ow].chunks(ow).zip(&self.rows) {
                    row_gradient.fill(0.0);
                    for (&g, cols) in grad.iter().zip(&self.cols) {
                        let share = g.to_f64() / (rows.span * cols.span) as f64;
                        for sum in &mut row_gradient[cols.start..cols.end] {
                            *sum += share;
                        }
                    }
                    for dx in dx[rows.start * w..rows.end * w].chunks_mut(w) {
                        for (dx, &g) in dx.iter_mut().zip(&row_gradient) {
                            *dx += T::from_f64(g);
                        }
                    }
                }
            });
        })
    }
}

impl CustomOp1 for MeanPool {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(self.name, x.dtype(), T => {
            let out = self.forward(slice_of::<T>(self.name, x, layout)?);
            let shape = Shape::from((self.dims[0], self.dims[1], self.rows.len(), self.cols.len()));
            Ok((T::to_cpu_storage_owned(out), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let out = for_float!(self.name, x.dtype(), T => {
            cuda::mean_pool::<T>(self.name, x, layout, self.dims, &self.rows, &self.cols)
        })?;
        Ok((out, Shape::from((self.dims[0], self.dims[1], self.rows.len(), self.cols.len()))))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let dx = for_float!(self.name, grad.dtype(), T => {
                cuda::mean_pool_grad::<T>(self.name, x, &grad, self.dims, &self.rows, &self.cols)
            });
            return dx.map(Some);
        }
        for_float!(self.name, grad.dtype(), T => {
            let dx = with_slice::<T, _>(self.name, &grad, |g| Ok(self.backward(g)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
