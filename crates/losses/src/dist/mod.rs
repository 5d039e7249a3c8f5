//! DIST: the student should rank classes within a pixel, and pixels within a class, as the teacher does.
//!
//! Two walks over the maps. The first takes each pixel's correlation and each class's moments; the second, which knows
//! the moments, forms the softmaxes again and with them the gradient, so that no map of probabilities is stored.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid};
use crate::pixel_kl::check_temperature;

mod correlation;
use correlation::{Correlation, Moments};

const LOSS: &str = "dist";
/// Pixels of one task: the probabilities of a dozen classes, of both networks, stay in a core's cache.
const RUN: usize = 512;

/// Settings of [`dist`](crate::dist()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dist {
    /// Weight of the relation between the classes of a pixel (the authors' beta), at least 0.
    pub inter: f64,
    /// Weight of the relation between the pixels of a class (the authors' gamma), at least 0.
    pub intra: f64,
    /// Temperature `T` that both networks' logits are divided by, above 0.
    pub temperature: f64,
}

impl Default for Dist {
    /// The authors' setting on Cityscapes: all 1.
    fn default() -> Self {
        Self { inter: 1.0, intra: 1.0, temperature: 1.0 }
    }
}

/// Correlation of the two networks' probabilities, over the classes of each pixel and over the pixels of each class.
///
/// `L = inter * (1 - 1/N * sum_{i in V} r(s_i, t_i)) + intra * (1 - 1/c * sum_k r(s^k, t^k))`. The rows `s_i` and columns
/// `s^k` are those of one matrix `[N, c]`, `softmax(z / T)` of the `N` valid pixels of the whole batch, and
/// `r(x, y) = x' . y' / (||x'|| ||y'|| + 1e-8)` with `x' = x - mean(x)` is Pearson's correlation. A row or column of
/// equal numbers has `r = 0`; a batch without valid pixels has `L = 0`. Since columns run over the batch, a batch is not
/// the mean of its images.
///
/// # Shapes
/// - `student_logits_nchw`, `teacher_logits_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `valid_nhw`: `[n, h, w]` u8 on the logits' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// Exact, to the student only: the teacher is detached here. 0 at pixels that do not count. A row or column of the
/// student whose numbers are all equal gets none. The loss is blind to a row's or column's scale and mean: it
/// complements a supervised term and does not replace one.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1; `Config` unless the temperature is finite and above 0, the weights
/// finite and at least 0.
/// # Source
/// Huang et al. 2022 (DIST); DIST_KD `segmentation/losses/dist_kd.py`, whose matrix, too, is the whole batch's
/// and whose temperature is 1; there is no factor `T^2` here. DIFFERENCE: void pixels are rows there. DIFFERENCE: the
/// gradient of a student's row of equal numbers is the teacher's row times 1e8 there, which a head that starts at 0
/// would see at every pixel. Values do not depend on the number of threads. Logits on another device are brought to the
/// host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{Dist, dist};
/// // Two pixels of two classes, which the student takes for each other: each correlation is -1, and each term 2.
/// let student = Tensor::new(&[[[[3f32, -3.0]], [[-3.0, 3.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[-1f32, 1.0]], [[1.0, -1.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = dist(&student, &teacher, &valid, &Dist::default())?;
/// assert!((loss.to_scalar::<f32>()? - 4.0).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn dist(
    student_logits_nchw: &Tensor,
    teacher_logits_nchw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &Dist,
) -> Result<Tensor> {
    let names = ["student_logits_nchw", "teacher_logits_nchw"];
    let [n, c, h, w] = pair_dims(LOSS, names, student_logits_nchw, teacher_logits_nchw)?;
    check_temperature(LOSS, cfg.temperature)?;
    for (name, weight) in [("inter", cfg.inter), ("intra", cfg.intra)] {
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(LossError::config(
                format!("{LOSS}: {name} is {weight}"),
                "give a finite weight of at least 0; 0 leaves the relation out",
            ));
        }
    }
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let pixels = valid.iter().filter(|&&v| v == 1).count() as f64;
    let teacher = teacher_logits_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_logits_nchw, Relations { n, c, m: h * w, teacher, valid, pixels, cfg: *cfg })
}

struct Relations {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    /// Pixels that count, in the batch.
    pixels: f64,
    cfg: Dist,
}

/// How a class's correlation pulls at the student's probabilities, for all pixels alike:
/// `along * (t - mean t) - against * (s - mean s)`.
struct Pull<T> {
    along: T,
    against: T,
    mean: [T; 2],
}

/// Consecutive pixels of one image, as probabilities.
struct Block<T> {
    /// `[c, len]` each of student and teacher, 0 at pixels that do not count.
    probabilities: [Vec<T>; 2],
    /// `[len]`: 1 where a pixel counts, 0 elsewhere.
    counted: Vec<T>,
    /// Correlation of each pixel; all 0 where it does not count.
    rows: Vec<Correlation>,
}

impl Relations {
    fn block<T: Real>(&self, maps: [&[T]; 2], image: usize, start: usize, len: usize) -> Block<T> {
        let (c, m) = (self.c, self.m);
        let valid = &self.valid[image * m + start..][..len];
        let cold = T::narrow(1.0 / self.cfg.temperature);
        let counted: Vec<T> = valid.iter().map(|&v| if v == 1 { T::one() } else { T::zero() }).collect();
        let mut probabilities = [vec![T::zero(); c * len], vec![T::zero(); c * len]];
        let mut peak = vec![T::zero(); len];
        let mut sum = vec![T::zero(); len];
        let mut products = [vec![T::zero(); len], vec![T::zero(); len], vec![T::zero(); len]];
        vectorised(
            #[inline(always)]
            || {
                for (p, map) in probabilities.iter_mut().zip(maps) {
                    let row = |channel: usize| &map[(image * c + channel) * m + start..][..len];
                    peak.copy_from_slice(row(0));
                    for channel in 1..c {
                        for (peak, &z) in peak.iter_mut().zip(row(channel)) {
                            *peak = if z > *peak { z } else { *peak };
                        }
                    }
                    sum.fill(T::zero());
                    for (channel, p) in p.chunks_mut(len).enumerate() {
                        for (((p, &z), &peak), sum) in p.iter_mut().zip(row(channel)).zip(&peak).zip(&mut sum) {
                            *p = ((z - peak) * cold).exp();
                            *sum += *p;
                        }
                    }
                    for sum in &mut sum {
                        *sum = T::one() / *sum;
                    }
                    for p in p.chunks_mut(len) {
                        for ((p, &share), &v) in p.iter_mut().zip(&sum).zip(valid) {
                            // A choice, not a product: the logits of a void pixel may be anything, NaN included.
                            *p = if v == 1 { *p * share } else { T::zero() };
                        }
                    }
                }
                // A pixel's probabilities sum to 1.
                let mean = T::one() / T::narrow(c as f64);
                let [xx, yy, xy] = products.each_mut().map(|p| &mut p[..len]);
                let [s, t] = &probabilities;
                for (s, t) in s.chunks(len).zip(t.chunks(len)) {
                    for i in 0..len {
                        let (x, y) = (s[i] - mean, t[i] - mean);
                        xx[i] += x * x;
                        yy[i] += y * y;
                        xy[i] += x * y;
                    }
                }
            },
        );
        let [xx, yy, xy] = &products;
        let rows = (0..len).map(|i| {
            let counted = counted[i].wide();
            Correlation::new(xx[i].wide() * counted, yy[i].wide(), xy[i].wide())
        });
        let rows = rows.collect();
        Block { probabilities, counted, rows }
    }

    /// Moments of each class over the whole batch, and the sum of the pixels' correlations.
    fn moments<T: Real>(&self, maps: [&[T]; 2]) -> (Vec<Moments>, f64) {
        let (c, m) = (self.c, self.m);
        let n_runs = m.div_ceil(RUN);
        let runs = (0..self.n * n_runs).into_par_iter().map(|at| {
            let (image, start) = (at / n_runs, at % n_runs * RUN);
            let len = RUN.min(m - start);
            let block = self.block(maps, image, start, len);
            let Some(first) = block.counted.iter().position(|&v| v == T::one()) else {
                return (vec![Moments::default(); c], 0.0);
            };
            let [s, t] = &block.probabilities;
            let classes = s.chunks(len).zip(t.chunks(len)).map(|(s, t)| Moments::of_block(s, t, &block.counted, first));
            (classes.collect(), block.rows.iter().map(|row| row.r).sum())
        });
        let runs: Vec<(Vec<Moments>, f64)> = runs.collect();
        let mut total = vec![Moments::default(); c];
        for (classes, _) in &runs {
            total.iter_mut().zip(classes).for_each(|(total, class)| *total = total.with(*class));
        }
        (total, runs.iter().map(|(_, r)| r).sum())
    }

    /// Turns `rows` into the gradient of the loss at pixels from `start` of an image.
    fn backward<T: Real>(&self, maps: [&[T]; 2], pulls: &[Pull<T>], image: usize, start: usize, rows: &mut [&mut [T]]) {
        let len = rows[0].len();
        let Block { probabilities: [s, t], rows: correlations, .. } = self.block(maps, image, start, len);
        let weight = -self.cfg.inter / self.pixels;
        let [along, against] = [|r: &Correlation| r.along, |r: &Correlation| r.against]
            .map(|part| correlations.iter().map(|r| T::narrow(weight * part(r))).collect::<Vec<T>>());
        let mut total = vec![T::zero(); len];
        let mean = T::one() / T::narrow(self.c as f64);
        let cold = T::narrow(1.0 / self.cfg.temperature);
        vectorised(
            #[inline(always)]
            || {
                let (along, against, total) = (&along[..len], &against[..len], &mut total[..len]);
                for (((grad, s), t), pull) in rows.iter_mut().zip(s.chunks(len)).zip(t.chunks(len)).zip(pulls) {
                    let (grad, s, t) = (&mut grad[..len], &s[..len], &t[..len]);
                    for i in 0..len {
                        let row = along[i] * (t[i] - mean) - against[i] * (s[i] - mean);
                        let column = pull.along * (t[i] - pull.mean[1]) - pull.against * (s[i] - pull.mean[0]);
                        grad[i] = row + column;
                        total[i] += s[i] * grad[i];
                    }
                }
                for (grad, s) in rows.iter_mut().zip(s.chunks(len)) {
                    for ((grad, &s), &total) in grad.iter_mut().zip(s).zip(&*total) {
                        *grad = cold * s * (*grad - total);
                    }
                }
            },
        );
    }
}

impl HostLoss for Relations {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, c, m, pixels, cfg, .. } = self;
        with_slice(&self.teacher, |teacher: &[T]| {
            if *pixels == 0.0 {
                return Ok(Graded {
                    value: 0.0,
                    grad: if with_grad { vec![T::zero(); n * c * m] } else { Vec::new() },
                });
            }
            let maps = [student, teacher];
            let (classes, row_sum) = self.moments(maps);
            let columns = classes.iter().map(|class| {
                let [xx, yy, xy] = class.centred;
                // Rounding may leave a square just below 0.
                Correlation::new(if xx < 0.0 { 0.0 } else { xx }, if yy < 0.0 { 0.0 } else { yy }, xy)
            });
            let columns: Vec<Correlation> = columns.collect();
            let column_sum: f64 = columns.iter().map(|column| column.r).sum();
            let classes_total = *c as f64;
            let value = cfg.inter * (1.0 - row_sum / pixels) + cfg.intra * (1.0 - column_sum / classes_total);
            if !with_grad {
                return Ok(Graded { value, grad: Vec::new() });
            }
            let weight = -cfg.intra / classes_total;
            let pull = |(column, class): (&Correlation, &Moments)| Pull {
                along: T::narrow(weight * column.along),
                against: T::narrow(weight * column.against),
                mean: class.mean.map(T::narrow),
            };
            let pulls: Vec<Pull<T>> = columns.iter().zip(&classes).map(pull).collect();
            let (grad, _) = pixel_runs([*n, *c, *m], RUN, |image, start, rows| {
                self.backward(maps, &pulls, image, start, rows);
            });
            Ok(Graded { value, grad })
        })
    }
}
