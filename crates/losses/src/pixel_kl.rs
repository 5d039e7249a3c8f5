//! Kullback-Leibler divergence between the two networks' class distributions, pixel by pixel; its kernel also serves
//! [`crate::soft_cross_entropy`], which has the same gradient.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid};

/// Pixels of one task: the exponentials of a dozen classes, of both networks, stay in a core's cache.
const RUN: usize = 512;

/// What the sum over pixels is divided by, in [`pixel_kl`](crate::pixel_kl()) and
/// [`soft_cross_entropy`](crate::soft_cross_entropy()).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KlNormaliser {
    /// The number of valid pixels of the whole batch, as in CIRKD's code.
    #[default]
    MeanPixel,
    /// `h w`, the pixels of one image: the sum of the images' means, as in SKD's code. It grows with the batch.
    ImageSum,
}

/// Settings of [`pixel_kl`](crate::pixel_kl()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PixelKl {
    /// Temperature `T` that both networks' logits are divided by, above 0.
    pub temperature: f64,
    /// What the sum over pixels is divided by.
    pub normaliser: KlNormaliser,
}

impl Default for PixelKl {
    fn default() -> Self {
        Self::cirkd()
    }
}

impl PixelKl {
    /// CIRKD's pixel-wise term, weighed 1 there: temperature 1, mean over pixels.
    pub fn cirkd() -> Self {
        Self { temperature: 1.0, normaliser: KlNormaliser::MeanPixel }
    }

    /// SKD's pixel-wise term, weighed 10 there: temperature 1, summed over the images. SKD's code takes the cross entropy
    /// instead, whose gradient is the same ([`SoftCrossEntropy::skd`](crate::SoftCrossEntropy::skd)).
    pub fn skd() -> Self {
        Self { temperature: 1.0, normaliser: KlNormaliser::ImageSum }
    }
}

/// Kullback-Leibler divergence of the student's class distribution from the teacher's, pixel by pixel.
///
/// `L = T^2/Z * sum_{i in V} sum_c p_t(c|i) * (log p_t(c|i) - log p_s(c|i))` with `p = softmax(z / T)` over the classes,
/// in nats. `Z` is the number of valid pixels of the batch ([`KlNormaliser::MeanPixel`]) or `h w`
/// ([`KlNormaliser::ImageSum`]). The teacher is the target: the divergence is `KL(teacher || student)`.
///
/// # Shapes
/// - `student_logits_nchw`, `teacher_logits_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `valid_nhw`: `[n, h, w]` u8 on the logits' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `T/Z * (p_s - p_t)` to the student, 0 at pixels that do not count; the teacher is detached here. `T^2` keeps its size
/// about the same for every temperature. With no valid pixel value and gradient are 0.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1; `Config` unless the temperature is finite and above 0.
/// # Source
/// Hinton et al. 2015, section 2; CIRKD `losses/kd.py`; SKD (Liu et al. 2019), which prints
/// `KL(student || teacher)` and means, as its code does, the teacher as target. DIFFERENCE: both codes count void
/// pixels. Under `ImageSum` the divisor stays `h w`, so that a pixel that counts gets the gradient it gets there. SKD's
/// paper has the mean over one image, not the sum over the batch: divide by `n` for it. Values do not depend on the
/// number of threads. Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{PixelKl, pixel_kl};
/// // The teacher is sure of the first class, the student undecided between two.
/// let student = Tensor::new(&[[[[0f32]], [[0.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[50f32]], [[0.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 1), DType::U8, &Device::Cpu)?;
/// let loss = pixel_kl(&student, &teacher, &valid, &PixelKl::default())?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn pixel_kl(
    student_logits_nchw: &Tensor,
    teacher_logits_nchw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &PixelKl,
) -> Result<Tensor> {
    let PixelKl { temperature, normaliser } = *cfg;
    soft_targets::<true>(student_logits_nchw, teacher_logits_nchw, valid_nhw, temperature, normaliser)
}

/// Refuses a temperature that nothing can be divided by.
pub(crate) fn check_temperature(loss: &'static str, temperature: f64) -> Result<()> {
    if temperature.is_finite() && temperature > 0.0 {
        return Ok(());
    }
    Err(LossError::config(
        format!("{loss}: temperature is {temperature}"),
        "give a finite temperature above 0; 1 leaves the logits as they are",
    ))
}

/// The divergence, or without `ENTROPY` of the teacher the cross entropy, at every pixel.
pub(crate) fn soft_targets<const ENTROPY: bool>(
    student_nchw: &Tensor,
    teacher_nchw: &Tensor,
    valid_nhw: &Tensor,
    temperature: f64,
    normaliser: KlNormaliser,
) -> Result<Tensor> {
    let loss = SoftTargets::<ENTROPY>::NAME;
    let [n, c, h, w] = pair_dims(loss, ["student_logits_nchw", "teacher_logits_nchw"], student_nchw, teacher_nchw)?;
    check_temperature(loss, temperature)?;
    let valid = read_valid(loss, valid_nhw, [n, h, w])?;
    let pixels = match normaliser {
        KlNormaliser::MeanPixel => valid.iter().filter(|&&v| v == 1).count().max(1),
        KlNormaliser::ImageSum => h * w,
    };
    let teacher = teacher_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_nchw, SoftTargets::<ENTROPY> { n, c, m: h * w, teacher, valid, temperature, pixels: pixels as f64 })
}

struct SoftTargets<const ENTROPY: bool> {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    temperature: f64,
    /// What the sum over pixels is divided by.
    pixels: f64,
}

impl<const ENTROPY: bool> SoftTargets<ENTROPY> {
    /// The sum over the valid pixels from `start` of an image; `rows` become the gradient of its `T^2 / pixels`-fold.
    fn run<'a, T: Real>(
        &self,
        [student, teacher]: [&'a [T]; 2],
        image: usize,
        start: usize,
        rows: &mut [&mut [T]],
    ) -> f64 {
        let (c, m, len) = (self.c, self.m, rows[0].len());
        let valid = &self.valid[image * m + start..][..len];
        let row = |map: &'a [T], channel: usize| &map[(image * c + channel) * m + start..][..len];
        let cold = T::narrow(1.0 / self.temperature);
        let step = T::narrow(self.temperature / self.pixels);
        let mut peaks = [row(student, 0).to_vec(), row(teacher, 0).to_vec()];
        let mut sums = [vec![T::zero(); len], vec![T::zero(); len]];
        let mut apart = vec![T::zero(); len];
        let mut teachers = vec![T::zero(); c * len];
        vectorised(
            #[inline(always)]
            || {
                for (peak, map) in peaks.iter_mut().zip([student, teacher]) {
                    for channel in 1..c {
                        for (p, &z) in peak.iter_mut().zip(row(map, channel)) {
                            *p = if z > *p { z } else { *p };
                        }
                    }
                }
                let [peak_s, peak_t] = peaks.each_ref().map(|p| &p[..len]);
                let [sum_s, sum_t] = sums.each_mut().map(|s| &mut s[..len]);
                let apart = &mut apart[..len];
                for channel in 0..c {
                    let (z_s, z_t) = (row(student, channel), row(teacher, channel));
                    let (e_s, e_t) = (&mut rows[channel][..len], &mut teachers[channel * len..][..len]);
                    for i in 0..len {
                        let (a_s, a_t) = ((z_s[i] - peak_s[i]) * cold, (z_t[i] - peak_t[i]) * cold);
                        let (s, t) = (a_s.exp(), a_t.exp());
                        sum_s[i] += s;
                        sum_t[i] += t;
                        // sum_c p_t (log p_t - log p_s), or -sum_c p_t log p_s, but for the logarithms of the sums.
                        apart[i] += t * if ENTROPY { a_t - a_s } else { T::zero() - a_s };
                        (e_s[i], e_t[i]) = (s, t);
                    }
                }
                for i in 0..len {
                    let (s, t) = (sum_s[i], sum_t[i]);
                    let logs = if ENTROPY { s.ln() - t.ln() } else { s.ln() };
                    apart[i] = apart[i] / t + logs;
                    (sum_s[i], sum_t[i]) = (step / s, step / t);
                }
                for (channel, grad) in rows.iter_mut().enumerate() {
                    let (grad, e_t) = (&mut grad[..len], &teachers[channel * len..][..len]);
                    for i in 0..len {
                        let value = grad[i] * sum_s[i] - e_t[i] * sum_t[i];
                        // A choice, not a product: the logits of a void pixel may be anything, NaN included.
                        grad[i] = if valid[i] == 1 { value } else { T::zero() };
                    }
                }
            },
        );
        apart.iter().zip(valid).filter(|&(_, &v)| v == 1).map(|(a, _)| a.wide()).sum()
    }
}

impl<const ENTROPY: bool> HostLoss for SoftTargets<ENTROPY> {
    const NAME: &'static str = if ENTROPY { "pixel_kl" } else { "soft_cross_entropy" };

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, c, m, .. } = *self;
        with_slice(&self.teacher, |teacher: &[T]| {
            let maps = [student, teacher];
            let (grad, sums): (Vec<T>, Vec<f64>) = if with_grad {
                pixel_runs([n, c, m], RUN, |image, start, rows| self.run(maps, image, start, rows))
            } else {
                let n_runs = m.div_ceil(RUN);
                let sums = (0..n * n_runs).into_par_iter().map(|at| {
                    let (image, start) = (at / n_runs, at % n_runs * RUN);
                    let len = RUN.min(m - start);
                    let mut scratch = vec![T::zero(); c * len];
                    self.run(maps, image, start, &mut scratch.chunks_mut(len).collect::<Vec<_>>())
                });
                (Vec::new(), sums.collect())
            };
            let factor = self.temperature * self.temperature / self.pixels;
            Ok(Graded { value: factor * sums.iter().sum::<f64>(), grad })
        })
    }
}
