//! Bilinear and nearest resize with backward, by any factor, larger or smaller.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::dims_nchw;

/// Resizes maps by linear interpolation along both axes.
///
/// An output pixel `o` of an axis reads the input at `(o + 1/2) * in / out - 1/2`, at least 0 (pixels have their centres
/// half a pixel in), or with `align_corners` at `o * (in - 1) / (out - 1)` (corner pixels on corner pixels; 0 for a single output).
/// Shrinking reads two neighbours as well: nothing is smoothed first. The size of the input returns the input itself.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, out_hw[0], out_hw[1]]`
/// # Gradient
/// The transposed interpolation: every input pixel gets what it gave, times the same weights.
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for an output side of 0, another element type or a device
/// without kernels.
/// # Source
/// PyTorch `torch.nn.functional.interpolate(mode="bilinear", antialias=False)` with `size` given. DIFFERENCE: weights
/// are formed in f64 for f32 maps too; they agree to f32 rounding.
pub fn resize_bilinear(x_nchw: &Tensor, out_hw: [usize; 2], align_corners: bool) -> Result<Tensor> {
    let axis = |len: usize, out: usize| linear_axis(len, out, align_corners);
    resize(x_nchw, out_hw, "resize_bilinear", axis, |dims, rows, cols| Bilinear { dims, rows, cols })
}

/// Resizes maps by repeating or leaving out pixels: output `o` of an axis is input `floor(o * in / out)`.
///
/// The size of the input returns the input itself.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, out_hw[0], out_hw[1]]`
/// # Gradient
/// Every input pixel gets the sum over its copies.
/// # Errors
/// Those of [`resize_bilinear`].
/// # Source
/// PyTorch `torch.nn.functional.interpolate(mode="nearest")` with `size` given. Like there the index is formed in f32,
/// which for some sizes (2 to 82) gives the pixel before the one of exact arithmetic.
pub fn resize_nearest(x_nchw: &Tensor, out_hw: [usize; 2]) -> Result<Tensor> {
    resize(x_nchw, out_hw, "resize_nearest", nearest_axis, |dims, rows, cols| Nearest { dims, rows, cols })
}

/// Repeats every pixel `factor` times along both axes, by whole numbers; `factor` is 1 or more.
pub(crate) fn repeat(x_nchw: &Tensor, factor: usize, name: &'static str) -> Result<Tensor> {
    let [_, _, h, w] = dims_nchw(name, x_nchw)?;
    let axis = |_: usize, out: usize| (0..out).map(|o| o / factor).collect();
    resize(x_nchw, [h * factor, w * factor], name, axis, |dims, rows, cols| Nearest { dims, rows, cols })
}

fn resize<A, Op: CustomOp1 + Send + Sync + 'static>(
    x_nchw: &Tensor,
    out_hw: [usize; 2],
    name: &'static str,
    axis: impl Fn(usize, usize) -> A,
    op: impl Fn([usize; 4], A, A) -> Op,
) -> Result<Tensor> {
    check_float(name, &[x_nchw])?;
    let dims = dims_nchw(name, x_nchw)?;
    if out_hw.contains(&0) {
        return Err(OpsError::config(
            format!("{name}: output size is {out_hw:?}"),
            "ask for at least one pixel a side",
        ));
    }
    if out_hw == dims[2..] {
        return Ok(x_nchw.clone());
    }
    let op = op(dims, axis(dims[2], out_hw[0]), axis(dims[3], out_hw[1]));
    Ok(graph::apply1(&x_nchw.contiguous()?, op)?)
}

/// Two neighbours of an output pixel and their weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tap {
    pub(crate) low: usize,
    pub(crate) high: usize,
    pub(crate) low_weight: f64,
    pub(crate) high_weight: f64,
}

fn linear_axis(len: usize, out: usize, align_corners: bool) -> Vec<Tap> {
    let scale = match (align_corners, out) {
        (true, 1) => 0.0,
        (true, _) => (len - 1) as f64 / (out - 1) as f64,
        (false, _) => len as f64 / out as f64,
    };
    let tap = |o: usize| {
        let at = if align_corners { o as f64 * scale } else { ((o as f64 + 0.5) * scale - 0.5).max(0.0) };
        let low = (at as usize).min(len - 1);
        let high_weight = (at - low as f64).clamp(0.0, 1.0);
        Tap { low, high: (low + 1).min(len - 1), low_weight: 1.0 - high_weight, high_weight }
    };
    (0..out).map(tap).collect()
}

fn nearest_axis(len: usize, out: usize) -> Vec<usize> {
    let scale = len as f32 / out as f32;
    (0..out).map(|o| ((o as f32 * scale) as usize).min(len - 1)).collect()
}

struct Bilinear {
    dims: [usize; 4],
    rows: Vec<Tap>,
    cols: Vec<Tap>,
}

/// Taps of the columns in the element type, so that inner loops convert nothing.
fn typed<T: Element>(taps: &[Tap]) -> Vec<(u32, u32, T, T)> {
    let typed = |t: &Tap| (t.low as u32, t.high as u32, T::from_f64(t.low_weight), T::from_f64(t.high_weight));
    taps.iter().map(typed).collect()
}

impl Bilinear {
    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        let cols = typed::<T>(&self.cols);
        par_chunks(n * c * oh * ow, oh * ow, |p, out| {
            let x = &x[p * h * w..][..h * w];
            // Rows already interpolated along w; output rows come in order, so two are enough.
            let (mut low, mut high) = (vec![T::ZERO; ow], vec![T::ZERO; ow]);
            let (mut low_row, mut high_row) = (usize::MAX, usize::MAX);
            vectorised(|| {
                let stretch = |y: usize, into: &mut [T]| {
                    let row = &x[y * w..][..w];
                    for (into, &(a, b, wa, wb)) in into.iter_mut().zip(&cols) {
                        *into = row[a as usize] * wa + row[b as usize] * wb;
                    }
                };
                for (out, tap) in out.chunks_mut(ow).zip(&self.rows) {
                    if tap.low != low_row {
                        if tap.low == high_row {
                            std::mem::swap(&mut low, &mut high);
                            high_row = usize::MAX;
                        } else {
                            stretch(tap.low, &mut low);
                        }
                        low_row = tap.low;
                    }
                    if tap.high != high_row {
                        stretch(tap.high, &mut high);
                        high_row = tap.high;
                    }
                    let (wl, wh) = (T::from_f64(tap.low_weight), T::from_f64(tap.high_weight));
                    for ((out, &l), &h) in out.iter_mut().zip(&low).zip(&high) {
                        *out = l * wl + h * wh;
                    }
                }
            });
        })
    }

    fn backward<T: Element>(&self, grad: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        let cols = typed::<T>(&self.cols);
        par_chunks(n * c * h * w, h * w, |p, dx| {
            let grad = &grad[p * oh * ow..][..oh * ow];
            // Gradients of input rows at the output's width; a row is folded along w once no further output reads it.
            let (mut low, mut high) = (vec![T::ZERO; ow], vec![T::ZERO; ow]);
            let (mut low_row, mut high_row) = (self.rows[0].low, self.rows[0].high);
            vectorised(|| {
                let mut fold = |y: usize, from: &mut [T]| {
                    let row = &mut dx[y * w..][..w];
                    for (from, &(a, b, wa, wb)) in from.iter_mut().zip(&cols) {
                        row[a as usize] += *from * wa;
                        row[b as usize] += *from * wb;
                        *from = T::ZERO;
                    }
                };
                for (grad, tap) in grad.chunks(ow).zip(&self.rows) {
                    if tap.low != low_row {
                        fold(low_row, &mut low);
                        if tap.low == high_row {
                            std::mem::swap(&mut low, &mut high);
                        } else {
                            fold(high_row, &mut high);
                        }
                        (low_row, high_row) = (tap.low, tap.high);
                    }
                    let (wl, wh) = (T::from_f64(tap.low_weight), T::from_f64(tap.high_weight));
                    for ((low, high), &g) in low.iter_mut().zip(&mut high).zip(grad) {
                        *low += g * wl;
                        *high += g * wh;
                    }
                }
                fold(low_row, &mut low);
                fold(high_row, &mut high);
            });
        })
    }
}

struct Nearest {
    dims: [usize; 4],
    rows: Vec<usize>,
    cols: Vec<usize>,
}

impl Nearest {
    fn forward<T: Element>(&self, x: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        par_chunks(n * c * oh * ow, oh * ow, |p, out| {
            for oy in 0..oh {
                if oy > 0 && self.rows[oy] == self.rows[oy - 1] {
                    out.copy_within((oy - 1) * ow..oy * ow, oy * ow);
                    continue;
                }
                let row = &x[(p * h + self.rows[oy]) * w..][..w];
                for (out, &at) in out[oy * ow..][..ow].iter_mut().zip(&self.cols) {
                    *out = row[at];
                }
            }
        })
    }

    fn backward<T: Element>(&self, grad: &[T]) -> Vec<T> {
        let ([n, c, h, w], oh, ow) = (self.dims, self.rows.len(), self.cols.len());
        par_chunks(n * c * h * w, h * w, |p, dx| {
            for (grad, &y) in grad[p * oh * ow..][..oh * ow].chunks(ow).zip(&self.rows) {
                let row = &mut dx[y * w..][..w];
                for (&g, &at) in grad.iter().zip(&self.cols) {
                    row[at] += g;
                }
            }
        })
    }
}

/// Both operations are linear maps of planes: one body serves them.
macro_rules! plane_op {
    ($op:ty, $name:literal, $forward:ident, $backward:ident) => {
        impl CustomOp1 for $op {
            fn name(&self) -> &'static str {
                $name
            }

            fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
                for_float!($name, x.dtype(), T => {
                    let out = self.forward(slice_of::<T>($name, x, layout)?);
                    let shape = Shape::from((self.dims[0], self.dims[1], self.rows.len(), self.cols.len()));
                    Ok((T::to_cpu_storage_owned(out), shape))
                })
            }

            #[cfg(feature = "cuda")]
            fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
                let out = for_float!($name, x.dtype(), T => {
                    cuda::$forward::<T>($name, x, layout, self.dims, &self.rows, &self.cols)
                })?;
                Ok((out, Shape::from((self.dims[0], self.dims[1], self.rows.len(), self.cols.len()))))
            }

            fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
                let grad = grad.contiguous()?;
                #[cfg(feature = "cuda")]
                if grad.device().is_cuda() {
                    let dx = for_float!($name, grad.dtype(), T => {
                        cuda::$backward::<T>($name, x, &grad, self.dims, &self.rows, &self.cols)
                    });
                    return dx.map(Some);
                }
                for_float!($name, grad.dtype(), T => {
                    let dx = with_slice::<T, _>($name, &grad, |g| Ok(self.backward(g)))?;
                    Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
                })
            }
        }
    };
}
plane_op!(Bilinear, "resize_bilinear", bilinear, bilinear_grad);
plane_op!(Nearest, "resize_nearest", nearest, nearest_grad);
