//! Softmax over the classes of a map, run of pixels by run of pixels, and the way back through it.

use rayon::prelude::*;
use segdistill_ops::{pixel_runs, vectorised};

use crate::host::{self, Real};

/// Pixels of one task: the logits of a dozen classes stay in a level 2 cache.
pub(crate) const RUN: usize = 2048;

/// Largest of `c` rows at each pixel, and the sum of exponentials relative to it, which `sum` gets added. Call it under
/// [`vectorised`].
#[inline(always)]
pub(crate) fn peaks_and_sums<'a, T: Real>(
    row: impl Fn(usize) -> &'a [T],
    c: usize,
    scale: T,
    peak: &mut [T],
    sum: &mut [T],
) {
    peak.copy_from_slice(row(0));
    for channel in 1..c {
        for (p, &z) in peak.iter_mut().zip(row(channel)) {
            *p = if z > *p { z } else { *p };
        }
    }
    for channel in 0..c {
        for ((s, &p), &z) in sum.iter_mut().zip(&*peak).zip(row(channel)) {
            *s += ((z - p) * scale).exp();
        }
    }
}

/// `softmax(z)` over the classes of `[n, c, m]` logits, 0 at pixels that do not count, whatever their logits; and what
/// `read` makes of each run, given its image, first pixel and rows: by image, then by run.
pub(crate) fn probabilities<T: Real, R: Send>(
    logits: &[T],
    [n, c, m]: [usize; 3],
    targets: &[Option<u8>],
    read: impl Fn(usize, usize, &[&mut [T]]) -> R + Sync,
) -> (Vec<T>, Vec<R>) {
    pixel_runs([n, c, m], RUN, |image, start, rows| {
        let len = rows[0].len();
        let row = |channel: usize| &logits[(image * c + channel) * m + start..][..len];
        let counted = &targets[image * m + start..][..len];
        let mut peak = row(0).to_vec();
        let mut sum = vec![T::zero(); len];
        vectorised(
            #[inline(always)]
            || {
                for channel in 1..c {
                    for (p, &z) in peak.iter_mut().zip(row(channel)) {
                        *p = if z > *p { z } else { *p };
                    }
                }
                for (channel, out) in rows.iter_mut().enumerate() {
                    for (((out, s), &p), &z) in out.iter_mut().zip(&mut sum).zip(&peak).zip(row(channel)) {
                        *out = (z - p).exp();
                        *s += *out;
                    }
                }
                for s in &mut sum {
                    *s = T::one() / *s;
                }
                for out in rows.iter_mut() {
                    for ((out, &s), target) in out.iter_mut().zip(&sum).zip(counted) {
                        // A choice, not a product: the logits of a void pixel may be anything, NaN included.
                        *out = if target.is_some() { *out * s } else { T::zero() };
                    }
                }
            },
        );
        read(image, start, rows)
    })
}

/// Turns a gradient for probabilities into one for logits: `g_c <- p_c (g_c - sum_k p_k g_k)` at each pixel.
pub(crate) fn through_softmax<T: Real>(grad: &mut [T], probabilities: &[T], [c, m]: [usize; 2]) {
    host::pixel_runs(grad, c, m, RUN).into_par_iter().for_each(|mut run| {
        let len = run.len();
        let mut mean = vec![T::zero(); len];
        let p = |channel: usize| &probabilities[(run.image * c + channel) * m + run.start..][..len];
        let rows = &mut run.rows;
        vectorised(
            #[inline(always)]
            || {
                for (channel, g) in rows.iter().enumerate() {
                    for ((mean, &p), &g) in mean.iter_mut().zip(p(channel)).zip(&**g) {
                        *mean += p * g;
                    }
                }
                for (channel, g) in rows.iter_mut().enumerate() {
                    for ((g, &p), &mean) in g.iter_mut().zip(p(channel)).zip(&mean) {
                        *g = p * (*g - mean);
                    }
                }
            },
        );
    });
}
