//! Pearson's correlation from sums, and the sums of one class gathered block by block.

use segdistill_ops::{block_sums, vectorised};

use crate::host::Real;

/// Added to the product of the norms, as the authors do.
const EPSILON: f64 = 1e-8;
/// Norms up to this are taken as 0: all numbers are equal, and there is no direction.
const NO_DIRECTION: f64 = 1e-12;

/// Correlation of two centred vectors, and how it moves with the first: `dr/dx = along * y - against * x`.
pub(super) struct Correlation {
    pub(super) r: f64,
    pub(super) along: f64,
    pub(super) against: f64,
}

impl Correlation {
    /// From `x . x`, `y . y` and `x . y`.
    #[inline(always)]
    pub(super) fn new(xx: f64, yy: f64, xy: f64) -> Self {
        let (x, y) = (xx.sqrt(), yy.sqrt());
        let along = 1.0 / (x * y + EPSILON);
        let r = xy * along;
        // Chosen without a branch: it is taken for every pixel. NaN fails the comparison and goes on, to be seen.
        let still = x <= NO_DIRECTION;
        let against = r * along * y / x;
        Self {
            r: if still { 0.0 } else { r },
            along: if still { 0.0 } else { along },
            against: if still { 0.0 } else { against },
        }
    }
}

/// What is known of one class over some pixels.
#[derive(Clone, Copy, Default)]
pub(super) struct Moments {
    count: f64,
    /// Means of student and teacher.
    pub(super) mean: [f64; 2],
    /// Sums of products of what remains without the means: student's squares, teacher's squares, mixed.
    pub(super) centred: [f64; 3],
}

impl Moments {
    /// Of both sets of pixels together.
    pub(super) fn with(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let apart = [0, 1].map(|k| other.mean[k] - self.mean[k]);
        let share = other.count / count;
        let spread = self.count * share;
        let products = [apart[0] * apart[0], apart[1] * apart[1], apart[0] * apart[1]];
        Self {
            count,
            mean: [0, 1].map(|k| self.mean[k] + apart[k] * share),
            centred: [0, 1, 2].map(|k| self.centred[k] + other.centred[k] + spread * products[k]),
        }
    }

    /// Moments of one class over a block. Products are summed in the maps' type, of what remains without the block's mean;
    /// the mean is taken from what remains without the first pixel's, so that equal numbers leave exactly 0.
    pub(super) fn of_block<T: Real>(s: &[T], t: &[T], counted: &[T], first: usize) -> Self {
        vectorised(
            #[inline(always)]
            || {
                let (s0, t0) = (s[first], t[first]);
                let [count, sum_s, sum_t] = block_sums(
                    [counted, s, t],
                    #[inline(always)]
                    |[v, s, t]| [v, v * (s - s0), v * (t - t0)],
                );
                let (s_mid, t_mid) = (T::narrow(s0.wide() + sum_s / count), T::narrow(t0.wide() + sum_t / count));
                let [x, y, xx, yy, xy] = block_sums(
                    [counted, s, t],
                    #[inline(always)]
                    |[v, s, t]| {
                        let (x, y) = (v * (s - s_mid), v * (t - t_mid));
                        [x, y, x * x, y * y, x * y]
                    },
                );
                Self {
                    count,
                    mean: [s_mid.wide() + x / count, t_mid.wide() + y / count],
                    centred: [xx - x * x / count, yy - y * y / count, xy - x * y / count],
                }
            },
        )
    }
}
