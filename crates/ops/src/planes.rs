//! Walking `[n, c, h, w]` maps plane by plane on several threads.
//!
//! Pieces and the order of every sum depend on shapes alone, never on the number of threads.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::cpu::{Element, init};
use crate::error::{OpsError, Result};

/// Elements of a chunk of an element-wise kernel: small enough for a level 2 cache, large enough to pay for a task.
pub(crate) const CHUNK: usize = 16 * 1024;

/// `[n, c, h, w]` of a map without empty axes.
///
/// # Errors
/// `Shape` for another rank or an axis of length 0.
pub(crate) fn dims_nchw(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    match *x.dims() {
        [n, c, h, w] if n * c * h * w > 0 => Ok([n, c, h, w]),
        ref dims => Err(OpsError::shape(
            op,
            format!("{dims:?}"),
            "[n, c, h, w], no axis empty",
            "add a batch axis with unsqueeze(0), or look for the step that emptied the map",
        )),
    }
}

/// An output of `len` elements, written by one task a group, each task holding every piece of its group.
///
/// The output is cut into planes of `plane_len`, each plane into pieces of `piece_len` (the last one shorter);
/// `group(plane, piece)` in `0..n_groups` names the owner. A task gets its pieces zeroed, in memory order, and its
/// result is handed back in group order.
pub(crate) fn par_groups<T: Element, R: Send>(
    len: usize,
    plane_len: usize,
    piece_len: usize,
    n_groups: usize,
    group: impl Fn(usize, usize) -> usize,
    fill: impl Fn(usize, &mut [&mut [T]]) -> R + Sync,
) -> (Vec<T>, Vec<R>) {
    let mut out = Vec::with_capacity(len);
    let mut groups: Vec<Vec<_>> = (0..n_groups).map(|_| Vec::new()).collect();
    for (p, plane) in out.spare_capacity_mut()[..len].chunks_mut(plane_len).enumerate() {
        for (i, piece) in plane.chunks_mut(piece_len).enumerate() {
            groups[group(p, i)].push(piece);
        }
    }
    let task = |(g, pieces): (usize, Vec<_>)| {
        let mut pieces: Vec<&mut [T]> = pieces.into_iter().map(|piece| init(piece, T::ZERO)).collect();
        fill(g, &mut pieces)
    };
    let results = groups.into_par_iter().enumerate().map(task).collect();
    // SAFETY: the chunks cover `..len`, each was pushed to one group, and each group's task initialised its pieces.
    unsafe { out.set_len(len) };
    (out, results)
}

/// Lanes of a sum: fixed, so that wide and narrow processors add in one order.
const LANES: usize = 16;

/// `sum_i f(a_i, b_i)` in f64, over `LANES` partial sums.
#[inline(always)]
pub(crate) fn sum_pairs<T: Element>(a: &[T], b: &[T], f: impl Fn(T, T) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (heads_a, heads_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (tail_a, tail_b) = (heads_a.remainder(), heads_b.remainder());
    for (a, b) in heads_a.zip(heads_b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for ((lane, &a), &b) in lanes.iter_mut().zip(tail_a).zip(tail_b) {
        *lane += f(a, b);
    }
    lanes.iter().sum()
}

/// `sum_i f(a_i)` in f64, in the order of [`sum_pairs`].
#[inline(always)]
pub(crate) fn sum_of<T: Element>(a: &[T], f: impl Fn(T) -> f64) -> f64 {
    sum_pairs(a, a, |a, _| f(a))
}
