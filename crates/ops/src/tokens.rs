//! Between maps and tokens: the transposition of every image's matrix of channels and pixels.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, check_float, for_float, init, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::{dims_nchw, grouped};

/// Rows of the result that a task writes: what it reads of a row of the source is whole cache lines.
const ROWS: usize = 32;

/// A map's pixels as tokens, in row-major order: `tokens[n, y w + x, c] = maps[n, c, y, x]`.
///
/// # Shapes
/// - `maps_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, h w, c]`, contiguous
/// # Gradient
/// That of the result, put back: [`to_maps`].
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for another element type or a device without kernels.
/// # Source
/// PyTorch `maps.flatten(2).transpose(1, 2)`, copied.
pub fn to_tokens(maps_nchw: &Tensor) -> Result<Tensor> {
    let op = "to_tokens";
    check_float(op, &[maps_nchw])?;
    let [n, c, h, w] = dims_nchw(op, maps_nchw)?;
    swapped(maps_nchw, [n, c, h * w], &[n, h * w, c])
}

/// Tokens as a map: what [`to_tokens`] undoes.
///
/// # Shapes
/// - `tokens_nld`: `[n, hw[0] hw[1], d]`, f32 or f64
/// - returns `[n, d, hw[0], hw[1]]`, contiguous
/// # Gradient
/// That of the result, as tokens.
/// # Errors
/// `Shape` unless rank 3 without empty axes, as many tokens as pixels; `Config` for another element type or a device
/// without kernels.
/// # Source
/// PyTorch `tokens.transpose(1, 2).unflatten(2, hw)`, copied.
pub fn to_maps(tokens_nld: &Tensor, hw: [usize; 2]) -> Result<Tensor> {
    let op = "to_maps";
    check_float(op, &[tokens_nld])?;
    match *tokens_nld.dims() {
        [n, l, d] if n * l * d > 0 && l == hw[0] * hw[1] => swapped(tokens_nld, [n, l, d], &[n, d, hw[0], hw[1]]),
        ref dims => Err(OpsError::shape(
            op,
            format!("{dims:?} for a map of {hw:?}"),
            format!("[n, {}, d], no axis empty", hw[0] * hw[1]),
            "a token for each pixel",
        )),
    }
}

/// `x`, looked at as `[n, a, b]`, to `[n, b, a]`, copied, looked at as `shape`.
fn swapped(x: &Tensor, dims: [usize; 3], shape: &[usize]) -> Result<Tensor> {
    let x = x.contiguous()?;
    if !x.device().is_cpu() {
        return Ok(x.reshape(&dims[..])?.transpose(1, 2)?.contiguous()?.reshape(shape)?);
    }
    Ok(graph::apply1(&x, Swap { dims, shape: Shape::from_dims(shape) })?)
}

struct Swap {
    dims: [usize; 3],
    /// Of the result.
    shape: Shape,
}

impl Swap {
    fn run<T: Element>(&self, x: &[T]) -> Vec<T> {
        let [n, a, b] = self.dims;
        let blocks = b.div_ceil(ROWS);
        let owner = |image: usize, piece: usize| image * blocks + piece;
        let mut out: Vec<T> = Vec::with_capacity(n * a * b);
        // Blocks of rows of the result, which never reach over an image.
        let pieces = grouped(&mut out.spare_capacity_mut()[..n * a * b], a * b, ROWS * a, n * blocks, owner);
        pieces.into_par_iter().enumerate().for_each(|(task, pieces)| {
            let (x, first) = (&x[task / blocks * a * b..][..a * b], task % blocks * ROWS);
            for out in pieces {
                let out = init(out, T::ZERO);
                for (i, row) in x.chunks_exact(b).enumerate() {
                    for (out, &v) in out[i..].iter_mut().step_by(a).zip(&row[first..]) {
                        *out = v;
                    }
                }
            }
        });
        // SAFETY: the pieces cover the vector, each went to one task, and `init` wrote every element of it.
        unsafe { out.set_len(n * a * b) };
        out
    }
}

impl CustomOp1 for Swap {
    fn name(&self) -> &'static str {
        "swap"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(self.name(), x.dtype(), T => {
            let out = self.run(slice_of::<T>(self.name(), x, layout)?);
            Ok((T::to_cpu_storage_owned(out), self.shape.clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let [n, a, b] = self.dims;
        let back = Swap { dims: [n, b, a], shape: x.shape().clone() };
        for_float!(self.name(), grad.dtype(), T => {
            let dx = with_slice::<T, _>(self.name(), &grad, |g| Ok(back.run(g)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
