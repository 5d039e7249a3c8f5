//! The loops of batch normalisation over CPU memory.
//!
//! A channel is walked in parts of at most [`PART`] elements of its planes: part by part, within a part image by image,
//! within an image block by block. Sums join in that order, so that one task a channel and one task a part give the same
//! bits.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::cpu::vectorised;
use crate::gemm::Element;
use crate::planes::{block_sums, grouped};

/// Elements of a plane that a task takes where channels are too few to occupy the threads.
const PART: usize = 32 * 1024;
/// Elements of a block, whose sums are formed in the element type while it lies in the innermost cache.
const BLOCK: usize = 4096;
/// Elements below which a task of its own does not pay.
const SMALL: usize = 16 * 1024;
/// Channels a thread should have to choose from; with fewer, parts are tasks.
const CHANNELS_A_THREAD: usize = 4;

/// Mean and biased variance of a channel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moments {
    pub(super) mean: f64,
    pub(super) variance: f64,
}

/// Number, mean and sum of squared distances from the mean.
#[derive(Clone, Copy, Default)]
struct Spread {
    count: f64,
    mean: f64,
    sum: f64,
}

impl Spread {
    /// Of one block: its mean to rounding, then sums around that, which the error of that mean does not reach.
    #[inline(always)]
    fn of<T: Element>(block: &[T]) -> Self {
        let count = block.len() as f64;
        let [sum] = block_sums([block], |[x]| [x]);
        let pivot = T::from_f64(sum / count);
        let [first, second] = block_sums([block], |[x]| {
            let d = x - pivot;
            [d, d * d]
        });
        let shift = first / count;
        // Rounding may carry the difference below 0; NaN is kept.
        let sum = second - first * shift;
        Self { count, mean: pivot.to_f64() + shift, sum: if sum < 0.0 { 0.0 } else { sum } }
    }

    #[inline(always)]
    fn join(self, other: Self) -> Self {
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        let share = other.count / count;
        Self {
            count,
            mean: self.mean + delta * share,
            sum: self.sum + other.sum + delta * delta * (self.count * share),
        }
    }

    fn moments(self) -> Moments {
        Moments { mean: self.mean, variance: self.sum / self.count }
    }
}

/// Gradients of the arguments.
pub(super) struct Gradients<T> {
    pub(super) x: Vec<T>,
    pub(super) gamma: Vec<T>,
    pub(super) beta: Vec<T>,
    pub(super) residual: Option<Vec<T>>,
}

/// Sizes and settings of one operation.
pub(super) struct Kernel {
    pub(super) n: usize,
    pub(super) c: usize,
    pub(super) hw: usize,
    pub(super) eps: f64,
    /// Whether the statistics are the batch's: formed by the forward pass, differentiated by the backward pass.
    pub(super) batch: bool,
    pub(super) relu: bool,
}

/// Memory of an output that one part of a channel fills: one piece an image.
type Pieces<'a, T> = Vec<&'a mut [MaybeUninit<T>]>;

impl Kernel {
    fn len(&self) -> usize {
        self.n * self.c * self.hw
    }

    fn n_parts(&self) -> usize {
        self.hw.div_ceil(PART)
    }

    /// Whether parts are tasks of their own. The numbers do not depend on it.
    fn splits(&self) -> bool {
        self.n_parts() > 1 && self.c < CHANNELS_A_THREAD * rayon::current_num_threads()
    }

    fn inverse_std(&self, s: Moments) -> f64 {
        1.0 / (s.variance + self.eps).sqrt()
    }

    /// The elements of image `i`, channel `c` in `part`.
    #[inline(always)]
    fn piece<'a, T>(&self, x: &'a [T], i: usize, c: usize, part: usize) -> &'a [T] {
        let plane = &x[(i * self.c + c) * self.hw..][..self.hw];
        &plane[part * PART..self.hw.min((part + 1) * PART)]
    }

    /// `f` of every channel, a task a part, joined in order.
    fn by_parts<R: Send + Sync + Copy>(
        &self,
        f: impl Fn(usize, usize) -> R + Sync,
        join: impl Fn(R, R) -> R,
    ) -> Vec<R> {
        let parts = self.n_parts();
        let all: Vec<R> = (0..self.c * parts).into_par_iter().map(|k| f(k / parts, k % parts)).collect();
        let channel = |parts: &[R]| parts[1..].iter().fold(parts[0], |sum, &part| join(sum, part));
        all.chunks(parts).map(channel).collect()
    }

    fn channels_a_task(&self) -> usize {
        SMALL.div_ceil(self.n * self.hw)
    }

    /// The pieces of an output, a list for every task of [`Kernel::fill`].
    fn pieces<'a, T>(&self, memory: &'a mut [MaybeUninit<T>]) -> Vec<Pieces<'a, T>> {
        let parts = self.n_parts();
        grouped(memory, self.hw, PART, self.c * parts, |plane, piece| plane % self.c * parts + piece)
    }

    /// What belongs to the parts, channel by channel.
    fn by_channel<P>(&self, of_parts: Vec<P>) -> Vec<Vec<P>> {
        let mut of_parts = of_parts.into_iter();
        (0..self.c).map(|_| of_parts.by_ref().take(self.n_parts()).collect()).collect()
    }

    /// The spread of `part` of channel `c`.
    fn spread<T: Element>(&self, x: &[T], c: usize, part: usize) -> Spread {
        vectorised(
            #[inline(always)]
            || {
                let mut all: Option<Spread> = None;
                for i in 0..self.n {
                    for block in self.piece(x, i, c, part).chunks(BLOCK) {
                        let block = Spread::of(block);
                        all = Some(all.map_or(block, |sum| sum.join(block)));
                    }
                }
                all.unwrap_or_default()
            },
        )
    }

    /// The result, and the batch's statistics unless some were `given`.
    pub(super) fn forward<T: Element>(
        &self,
        x: &[T],
        gamma: &[T],
        beta: &[T],
        residual: Option<&[T]>,
        given: Option<&[Moments]>,
    ) -> (Vec<T>, Option<Vec<Moments>>) {
        let mut out = Vec::with_capacity(self.len());
        let memory = &mut out.spare_capacity_mut()[..self.len()];
        let write = |s: Moments, c: usize, part: usize, pieces: Pieces<'_, T>| {
            let (mean, shift) = (T::from_f64(s.mean), beta[c]);
            let slope = T::from_f64(self.inverse_std(s) * gamma[c].to_f64());
            for (i, out) in pieces.into_iter().enumerate() {
                let x = self.piece(x, i, c, part);
                let residual = residual.map(|r| self.piece(r, i, c, part));
                normalise(out, x, residual, self.relu, [mean, slope, shift]);
            }
        };
        let parts = self.n_parts();
        let statistics = if let (None, false) = (given, self.splits()) {
            // A channel is normalised as soon as its statistics are known, while it lies in a near cache.
            let task = |(c, channel): (usize, Vec<Pieces<'_, T>>)| {
                let all = (1..parts).fold(self.spread(x, c, 0), |sum, part| sum.join(self.spread(x, c, part)));
                let s = all.moments();
                channel.into_iter().enumerate().for_each(|(part, pieces)| write(s, c, part, pieces));
                s
            };
            let channels = self.by_channel(self.pieces(memory)).into_par_iter().enumerate();
            Some(channels.with_min_len(self.channels_a_task()).map(task).collect::<Vec<Moments>>())
        } else {
            let formed: Option<Vec<Moments>> = given.is_none().then(|| {
                let spreads = self.by_parts(|c, part| self.spread(x, c, part), Spread::join);
                spreads.into_iter().map(Spread::moments).collect()
            });
            let s = given.or(formed.as_deref()).unwrap_or_default();
            let tasks = self.pieces(memory).into_par_iter().enumerate().with_min_len(self.channels_a_task());
            tasks.for_each(|(k, pieces)| write(s[k / parts], k / parts, k % parts, pieces));
            formed
        };
        // SAFETY: the pieces cover the memory, and `normalise` wrote every element of each.
        unsafe { out.set_len(self.len()) };
        (out, statistics)
    }

    /// `sum g` and `sum g * (x - mean)` over `part` of channel `c`, g being what passes the rectifier.
    fn sums<T: Element>(&self, [x, y, g]: [&[T]; 3], s: Moments, c: usize, part: usize) -> [f64; 2] {
        vectorised(
            #[inline(always)]
            || {
                let mean = T::from_f64(s.mean);
                let mut sums = [0.0; 2];
                for i in 0..self.n {
                    let blocks = |a| self.piece(a, i, c, part).chunks(BLOCK);
                    for ((x, g), y) in blocks(x).zip(blocks(g)).zip(blocks(y)) {
                        let [level, tilt] = if self.relu {
                            block_sums([x, g, y], |[x, g, y]| {
                                let g = passed(g, y);
                                [g, g * (x - mean)]
                            })
                        } else {
                            block_sums([x, g], |[x, g]| [g, g * (x - mean)])
                        };
                        sums[0] += level;
                        sums[1] += tilt;
                    }
                }
                // The mean was rounded to the element type above: what that took from each distance is known.
                [sums[0], sums[1] + (mean.to_f64() - s.mean) * sums[0]]
            },
        )
    }

    /// Gradients of x, gamma and beta, and if `residual` asks the residual's, unless it is `grad` itself for want of a
    /// rectifier. With `xc = x - mean`, `s = 1 / std` and g what
    /// passes the rectifier: `dbeta = sum g`, `dgamma = s * sum g * xc`, and
    /// `dx = gamma * s * (g - [dbeta / m + xc * s * dgamma / m])`, the bracket in training only.
    pub(super) fn backward<T: Element>(
        &self,
        x: &[T],
        gamma: &[T],
        result: &[T],
        grad: &[T],
        residual: bool,
        statistics: &[Moments],
    ) -> Gradients<T> {
        let residual = residual && self.relu;
        let m = (self.n * self.hw) as f64;
        let parts = self.n_parts();
        let reading = |c: usize, part: usize| self.sums([x, result, grad], statistics[c], c, part);
        let join = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
        let writing = |sums: [f64; 2], c: usize, part: usize, (dx, dr): (Pieces<'_, T>, Option<Pieces<'_, T>>)| {
            let s = statistics[c];
            let inverse_std = self.inverse_std(s);
            let slope = inverse_std * gamma[c].to_f64();
            let (level, tilt) = match self.batch {
                true => (slope * sums[0] / m, slope * inverse_std * inverse_std * sums[1] / m),
                false => (0.0, 0.0),
            };
            let factors = [s.mean, slope, level, tilt].map(T::from_f64);
            let mut dr = dr.map(Vec::into_iter);
            for (i, dx) in dx.into_iter().enumerate() {
                let dr = dr.as_mut().and_then(Iterator::next);
                let [x, y, g] = [x, result, grad].map(|a| self.piece(a, i, c, part));
                distribute(dx, x, self.relu.then_some((y, dr)), g, factors);
            }
        };

        let mut dx = Vec::with_capacity(self.len());
        let mut dr = Vec::with_capacity(if residual { self.len() } else { 0 });
        let dx_pieces = self.pieces(&mut dx.spare_capacity_mut()[..self.len()]);
        let dr_pieces: Vec<Option<Pieces<'_, T>>> = match residual {
            true => self.pieces(&mut dr.spare_capacity_mut()[..self.len()]).into_iter().map(Some).collect(),
            false => (0..dx_pieces.len()).map(|_| None).collect(),
        };
        let pieces: Vec<_> = dx_pieces.into_iter().zip(dr_pieces).collect();
        let sums = if self.splits() {
            let sums = self.by_parts(reading, join);
            let tasks = pieces.into_par_iter().enumerate();
            tasks.for_each(|(k, pieces)| writing(sums[k / parts], k / parts, k % parts, pieces));
            sums
        } else {
            let channels = self.by_channel(pieces).into_par_iter().enumerate();
            let task = |(c, channel): (usize, Vec<_>)| {
                let sums = (1..parts).fold(reading(c, 0), |sum, part| join(sum, reading(c, part)));
                channel.into_iter().enumerate().for_each(|(part, pieces)| writing(sums, c, part, pieces));
                sums
            };
            channels.with_min_len(self.channels_a_task()).map(task).collect()
        };
        // SAFETY: the pieces cover the memory, and `distribute` wrote every element of each.
        unsafe { dx.set_len(self.len()) };
        if residual {
            // SAFETY: as above.
            unsafe { dr.set_len(self.len()) };
        }
        let inverse_std = |c: usize| self.inverse_std(statistics[c]);
        Gradients {
            x: dx,
            gamma: sums.iter().enumerate().map(|(c, sum)| T::from_f64(sum[1] * inverse_std(c))).collect(),
            beta: sums.iter().map(|sum| T::from_f64(sum[0])).collect(),
            residual: residual.then_some(dr),
        }
    }
}

/// The gradient that passes a rectifier whose result is `y`. Comparisons with NaN are false: there it passes.
#[inline(always)]
fn passed<T: Element>(g: T, y: T) -> T {
    if y <= T::ZERO { T::ZERO } else { g }
}

/// `max(y, 0)`; NaN stays NaN.
#[inline(always)]
fn rectified<T: Element>(y: T) -> T {
    if y <= T::ZERO { T::ZERO } else { y }
}

/// Writes `out = act((x - mean) * slope + shift + residual)`, all of it.
///
/// # Panics
/// When a slice is shorter than `out`.
fn normalise<T: Element>(
    out: &mut [MaybeUninit<T>],
    x: &[T],
    residual: Option<&[T]>,
    relu: bool,
    [mean, slope, shift]: [T; 3],
) {
    let len = out.len();
    let each = out.iter_mut().zip(&x[..len]);
    // The mean first: `x * slope + shift'` would cancel where the mean is large beside the spread.
    vectorised(
        #[inline(always)]
        || match (residual, relu) {
            (None, false) => {
                for (out, &x) in each {
                    out.write((x - mean) * slope + shift);
                }
            }
            (None, true) => {
                for (out, &x) in each {
                    out.write(rectified((x - mean) * slope + shift));
                }
            }
            (Some(r), false) => {
                for ((out, &x), &r) in each.zip(&r[..len]) {
                    out.write((x - mean) * slope + shift + r);
                }
            }
            (Some(r), true) => {
                for ((out, &x), &r) in each.zip(&r[..len]) {
                    out.write(rectified((x - mean) * slope + shift + r));
                }
            }
        },
    );
}

/// Writes `dx = g * slope - level - (x - mean) * tilt`, all of it. Where there is a rectifier, `rectifier` is its result
/// and the memory for what passes it, if that is wanted, which is written whole too; g is what passes.
///
/// # Panics
/// When a slice is shorter than `dx`.
fn distribute<T: Element>(
    dx: &mut [MaybeUninit<T>],
    x: &[T],
    rectifier: Option<(&[T], Option<&mut [MaybeUninit<T>]>)>,
    g: &[T],
    [mean, slope, level, tilt]: [T; 4],
) {
    let len = dx.len();
    let each = dx.iter_mut().zip(&x[..len]).zip(&g[..len]);
    vectorised(
        #[inline(always)]
        || match rectifier {
            None => {
                for ((dx, &x), &g) in each {
                    dx.write(g * slope - level - (x - mean) * tilt);
                }
            }
            Some((y, None)) => {
                for (((dx, &x), &g), &y) in each.zip(&y[..len]) {
                    dx.write(passed(g, y) * slope - level - (x - mean) * tilt);
                }
            }
            Some((y, Some(dr))) => {
                for ((((dx, &x), &g), &y), dr) in each.zip(&y[..len]).zip(&mut dr[..len]) {
                    let g = passed(g, y);
                    dr.write(g);
                    dx.write(g * slope - level - (x - mean) * tilt);
                }
            }
        },
    );
}
