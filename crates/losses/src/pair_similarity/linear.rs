//! The sum over pairs of nodes as one over pairs of channels.
//!
//! With the unit vectors of an image as columns of `F_s [d_s, m]` and `F_t [d_t, m]`, and `G` the products
//! `F_s F_s^T`, `F_s F_t^T`, `F_t F_t^T`,
//! `sum_ij (a^s_ij - a^t_ij)^2 = ||G_ss||^2 - 2 ||G_st||^2 + ||G_tt||^2` and
//! `dL/dF_s = 4 (G_ss F_s - G_st F_t)`: all of it is in the Gram matrix of `F_s` above `F_t`.
//!
//! Networks that agree leave little of these parts. Products of f32, summed over blocks in f64, are exact to some 1e-9
//! of the parts; where the difference is below [`NARROWEST`] of them, all is done again in f64, which leaves 1e-15.

use rayon::prelude::*;
use segdistill_ops::{MatMut, MatRef};

use super::Image;
use crate::host::Real;
use crate::nodes::Units;

/// Nodes of a block.
const BLOCK: usize = 512;
/// Blocks that one task adds up before sums are combined.
const BLOCKS_PER_TASK: usize = 8;
/// Rows of the Gram matrix that are formed at once, from the diagonal on.
const STRIP: usize = 128;
/// Share of the difference in its parts down to which f32 gives it.
const NARROWEST: f64 = 1e-2;

/// One image's share of the loss, and its gradient `[d_s, m]` unless `grad` is empty.
pub(super) fn evaluate<T: Real>(image: &Image<'_, T>, grad: &mut [T]) -> f64 {
    let narrow = computed_in::<T, T>(image, grad, if T::DTYPE == candle_core::DType::F64 { 0.0 } else { NARROWEST });
    narrow.unwrap_or_else(|| computed_in::<T, f64>(image, grad, 0.0).expect("of a bound of 0 nothing falls short"))
}

/// `None` where the difference is below `narrowest` of its parts.
fn computed_in<T: Real, C: Real>(image: &Image<'_, T>, grad: &mut [T], narrowest: f64) -> Option<f64> {
    let (v, d) = (image.nodes.len(), image.student.len() / image.m);
    let starts: Vec<usize> = (0..v).step_by(BLOCK).collect();
    let blocks: Vec<Units<C>> = starts.into_par_iter().map(|start| image.units(start, BLOCK.min(v - start))).collect();
    let all = d + image.teacher.len() / image.m;
    let gram = gram(&blocks, all);
    // ||G_ss||^2, ||G_st||^2 and ||G_tt||^2, from the part right of the diagonal.
    let mut squares = [0.0; 3];
    for i in 0..all {
        for j in i..all {
            let twice = if i == j || (i < d && j >= d) { 1.0 } else { 2.0 };
            squares[usize::from(i >= d) + usize::from(j >= d)] += twice * gram[i * all + j] * gram[i * all + j];
        }
    }
    let [ss, st, tt] = squares;
    // Rounding can leave less than nothing where the networks agree. NaN stays.
    let sum = (ss + tt - 2.0 * st).clamp(0.0, f64::INFINITY);
    if sum < narrowest * (ss + tt) {
        return None;
    }
    if !grad.is_empty() {
        // [G_ss, -G_st]
        let at = |i: usize, j: usize| if i <= j { gram[i * all + j] } else { gram[j * all + i] };
        let factors: Vec<C> = (0..d * all)
            .map(|k| (k / all, k % all))
            .map(|(i, j)| C::narrow(if j < d { at(i, j) } else { -at(i, j) }))
            .collect();
        let grads: Vec<Vec<C>> = blocks
            .par_iter()
            .map(|units| {
                let mut grad_f = vec![C::zero(); d * units.len];
                C::product(
                    MatMut::row_major(&mut grad_f, d, units.len),
                    MatRef::row_major(&factors, d, all),
                    MatRef::row_major(&units.f, all, units.len),
                );
                units.chain(&mut grad_f, 4.0 * image.scale);
                grad_f
            })
            .collect();
        grad.par_chunks_mut(image.m).enumerate().for_each(|(channel, row)| {
            for (units, grad) in blocks.iter().zip(&grads) {
                units.spread(image.nodes, grad, channel, row);
            }
        });
    }
    Some(image.scale * sum)
}

/// The Gram matrix `[all, all]` of the rows of all blocks, right of the diagonal, halved down to tasks at borders that
/// depend on sizes only. What it holds left of the diagonal means nothing.
fn gram<C: Real>(blocks: &[Units<C>], all: usize) -> Vec<f64> {
    let n_tasks = blocks.len().div_ceil(BLOCKS_PER_TASK);
    if n_tasks > 1 {
        let (left, right) = blocks.split_at(n_tasks / 2 * BLOCKS_PER_TASK);
        let (mut left, right) = rayon::join(|| gram(left, all), || gram(right, all));
        for (sum, value) in left.iter_mut().zip(right) {
            *sum += value;
        }
        return left;
    }
    let mut sums = vec![0.0; all * all];
    let mut product = vec![C::zero(); STRIP.min(all) * all];
    for units in blocks {
        for first in (0..all).step_by(STRIP) {
            let (rows, cols) = (STRIP.min(all - first), all - first);
            let part = &units.f[first * units.len..];
            let product = &mut product[..rows * cols];
            C::product(
                MatMut::row_major(product, rows, cols),
                MatRef::row_major(part, rows, units.len),
                MatRef::row_major(part, cols, units.len).transposed(),
            );
            for (row, values) in product.chunks(cols).enumerate() {
                for (sum, value) in sums[(first + row) * all + first..][..cols].iter_mut().zip(values) {
                    *sum += value.wide();
                }
            }
        }
    }
    sums
}
