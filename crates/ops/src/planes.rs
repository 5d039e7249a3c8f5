//! Walking `[n, c, h, w]` maps plane by plane on several threads.
//!
//! Pieces and the order of every sum depend on shapes alone, never on the number of threads.

use std::mem::MaybeUninit;

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

/// `memory` cut into planes of `plane_len`, each plane into pieces of `piece_len` (the last one shorter), and the pieces
/// dealt out: `group(plane, piece)` in `0..n_groups` names the owner, who gets its pieces in memory order.
pub(crate) fn grouped<T>(
    memory: &mut [T],
    plane_len: usize,
    piece_len: usize,
    n_groups: usize,
    group: impl Fn(usize, usize) -> usize,
) -> Vec<Vec<&mut [T]>> {
    let mut groups: Vec<Vec<_>> = (0..n_groups).map(|_| Vec::new()).collect();
    for (p, plane) in memory.chunks_mut(plane_len).enumerate() {
        for (i, piece) in plane.chunks_mut(piece_len).enumerate() {
            groups[group(p, i)].push(piece);
        }
    }
    groups
}

/// An output of maps `[n, c, m]`, written by one task for each run of `run` pixels (the last of an image shorter).
///
/// `fill(image, start, rows)` gets the `c` channel rows of pixels `start..start + rows[0].len()` of `image`, zeroed; its
/// results are handed back by image, then by run. The runs depend on the sizes alone, and an item's runs not on its
/// neighbours in the batch.
///
/// # Panics
/// When an argument but `n` is 0.
pub fn pixel_runs<T: Element, R: Send>(
    [n, c, m]: [usize; 3],
    run: usize,
    fill: impl Fn(usize, usize, &mut [&mut [T]]) -> R + Sync,
) -> (Vec<T>, Vec<R>) {
    let len = n * c * m;
    let n_runs = m.div_ceil(run);
    let mut out = Vec::with_capacity(len);
    let owner = |plane: usize, piece: usize| plane / c * n_runs + piece;
    let groups = grouped(&mut out.spare_capacity_mut()[..len], m, run, n * n_runs, owner);
    let task = |(g, rows): (usize, Vec<&mut [MaybeUninit<T>]>)| {
        let mut rows: Vec<&mut [T]> = rows.into_iter().map(|row| init(row, T::ZERO)).collect();
        fill(g / n_runs, g % n_runs * run, &mut rows)
    };
    let results = groups.into_par_iter().enumerate().map(task).collect();
    // SAFETY: the pieces cover `..len`, each went to one group, and each group's task initialised its pieces.
    unsafe { out.set_len(len) };
    (out, results)
}

/// Lanes of a sum: fixed, so that wide and narrow processors add in one order.
pub(crate) const LANES: usize = 32;

/// `sum_i f(a_i, b_i, ..)` for `K` functions at once: 32 partial sums each in the element type, added up in f64.
///
/// Meant for blocks of a few thousand elements: a lane adds a few hundred values at most before f64 takes over. The
/// order of the sums depends on the length alone. Call it under [`vectorised`](crate::vectorised).
#[inline(always)]
pub fn block_sums<T: Element, const N: usize, const K: usize>(
    arrays: [&[T]; N],
    f: impl Fn([T; N]) -> [T; K],
) -> [f64; K] {
    let len = arrays[0].len();
    let chunks = arrays.map(|a| a[..len].as_chunks::<LANES>());
    let mut lanes = [[T::ZERO; LANES]; K];
    for at in 0..len / LANES {
        let chunk = chunks.map(|(whole, _)| &whole[at]);
        for i in 0..LANES {
            let values = f(chunk.map(|a| a[i]));
            for k in 0..K {
                lanes[k][i] += values[k];
            }
        }
    }
    let rest = len % LANES;
    if rest > 0 {
        // Filled up, so that lanes have constant numbers and stay in registers.
        let chunk = chunks.map(|(_, tail)| {
            let mut full = [T::ZERO; LANES];
            full[..rest].copy_from_slice(tail);
            full
        });
        for i in 0..LANES {
            let values = f(chunk.each_ref().map(|a| a[i]));
            for k in 0..K {
                lanes[k][i] += if i < rest { values[k] } else { T::ZERO };
            }
        }
    }
    lanes.map(|lanes| {
        let mut sums = [0.0; LANES];
        for i in 0..LANES {
            sums[i] = lanes[i].to_f64();
        }
        for half in [16, 8, 4, 2, 1] {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
        }
        sums[0]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_a_map_once() {
        let (n, c, m, run) = (3, 2, 7, 3);
        let (map, results) = pixel_runs([n, c, m], run, |image, start, rows: &mut [&mut [f64]]| {
            for (channel, row) in rows.iter_mut().enumerate() {
                for (i, value) in row.iter_mut().enumerate() {
                    *value += (1000 * image + 100 * channel + start + i) as f64;
                }
            }
            (image, start, rows[0].len())
        });
        let expected: Vec<f64> =
            (0..n * c * m).map(|k| (1000 * (k / (c * m)) + 100 * (k / m % c) + k % m) as f64).collect();
        assert_eq!(map, expected);
        assert_eq!(results[..4], [(0, 0, 3), (0, 3, 3), (0, 6, 1), (1, 0, 3)]);
        assert_eq!(results.len(), 9);
        assert!(pixel_runs::<f64, ()>([0, c, m], run, |_, _, _| ()).0.is_empty());
    }

    #[test]
    fn block_sums_take_every_element_once() {
        // Powers of two: any element left out or taken twice shows, whatever the order.
        for len in [1, 31, 32, 33, 50] {
            let a: Vec<f64> = (0..len).map(|i| f64::from(i).exp2()).collect();
            let b = vec![2.0; a.len()];
            let [first, second] = block_sums([&a, &b], |[a, b]| [a, b]);
            assert_eq!(first, f64::from(len).exp2() - 1.0);
            assert_eq!(second, f64::from(2 * len));
        }
    }
}
