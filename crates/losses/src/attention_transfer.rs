//! Attention transfer (AT): the student should look where the teacher looks.

use candle_core::{Device, Tensor};
use segdistill_ops::{pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{grid_dims, logits_dims, read_valid, same_dtype};

const LOSS: &str = "attention_transfer";
/// Pixels of one task: their sums stay in a core's first cache while the channels pass by.
const RUN: usize = 1024;
/// Norms of attention maps up to this one give no direction: the epsilon of PyTorch's `normalize`.
const EPSILON: f64 = 1e-12;

/// Settings of [`attention_transfer`](crate::attention_transfer()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionTransfer {
    /// Power `p` of a feature's size in the attention map, at least 1.
    pub power: f64,
}

impl Default for AttentionTransfer {
    fn default() -> Self {
        Self::squares()
    }
}

impl AttentionTransfer {
    /// The authors' choice, and CIRKD's, weighed 10,000 there: power 2.
    pub fn squares() -> Self {
        Self { power: 2.0 }
    }
}

/// Squared distance between the two networks' attention maps, averaged over the valid pixels of the batch.
///
/// `L = 1/|V| * sum_images sum_{i in V} (Q^s(i) - Q^t(i))^2` with `Q = a / ||a||_2` over the valid pixels of an image and
/// `a(i) = 1/d * sum_k |F_k(i)|^p` over its channels. `|V|` counts the valid pixels of the batch. A network's maps are
/// unit vectors of its own: neither the size of its features nor the number of its channels matters. An image without
/// valid pixels adds 0.
///
/// # Shapes
/// - `student_ndhw`, `teacher_ndhw`: `[n, _, h, w]`, f32 or f64, each with channels of its own
/// - `valid_nhw`: `[n, h, w]` u8 on the maps' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the maps' type
/// # Gradient
/// With `q = 2/|V| * (Q^s - Q^t)`: `p/d * |F_k|^(p-1) * sign(F_k) * (q - Q^s (Q^s . q)) / ||a^s||` to the student, 0 at
/// pixels that do not count; the teacher is detached here. An image whose `||a||` is at most 1e-12 (features of 0, say)
/// has `Q = 0`, and gradient 0 if it is the student's. With no valid pixel value and gradient are 0.
/// # Errors
/// `Shape` when batch or grid of student, teacher and mask differ (nothing is resized here); `DType`, also when the two
/// networks' types differ; `Mask` for a mask value above 1; `Config` unless the power is finite and at least 1.
/// # Source
/// Zagoruyko and Komodakis 2017, section 3.1; CIRKD `losses/at.py`. The paper prints `||Q^s - Q^t||_p` per image; the
/// mean of squares is the code's. DIFFERENCE: both count void pixels, in the norm too. Values do not depend on the
/// number of threads; sums are taken in f64. Maps on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{AttentionTransfer, attention_transfer};
/// // Two pixels: the student looks at the first only, the teacher, with two channels, at the second.
/// let student = Tensor::new(&[[[[3f32, 0.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[0f32, 1.0]], [[0.0, -2.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = attention_transfer(&student, &teacher, &valid, &AttentionTransfer::default())?;
/// assert_eq!(loss.to_scalar::<f32>()?, 1.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn attention_transfer(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &AttentionTransfer,
) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "student_ndhw", student_ndhw)?;
    let [n, d_student, h, w] = dims;
    let [_, d_teacher, ..] = grid_dims(LOSS, "teacher_ndhw", teacher_ndhw, dims)?;
    same_dtype(LOSS, "teacher_ndhw", student_ndhw, teacher_ndhw)?;
    let power = cfg.power;
    if !(power.is_finite() && power >= 1.0) {
        return Err(LossError::config(
            format!("{LOSS}: power is {power}"),
            "give a finite power of at least 1, below it the gradient has no bound at 0; the authors take 2",
        ));
    }
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let pixels = valid.iter().filter(|&&v| v == 1).count().max(1) as f64;
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_ndhw, Attention { n, d: [d_student, d_teacher], m: h * w, teacher, valid, power, pixels })
}

struct Attention {
    n: usize,
    /// Channels of student and teacher.
    d: [usize; 2],
    /// Pixels of an image.
    m: usize,
    /// `[n, d_t, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    power: f64,
    /// Valid pixels of the batch, at least 1.
    pixels: f64,
}

impl Attention {
    /// `a` of student and teacher, `[n, 2, m]`, 0 at pixels that do not count.
    fn maps<T: Real>(&self, features: [&[T]; 2]) -> Vec<f64> {
        let Self { n, m, .. } = *self;
        let fill = |image: usize, start: usize, rows: &mut [&mut [f64]]| {
            let valid = &self.valid[image * m + start..][..rows[0].len()];
            for ((row, map), d) in rows.iter_mut().zip(features).zip(self.d) {
                let planes = (0..d).map(|k| &map[(image * d + k) * m + start..][..valid.len()]);
                vectorised(
                    #[inline(always)]
                    || {
                        if self.power == 2.0 {
                            planes.for_each(|plane| {
                                row.iter_mut().zip(plane).for_each(|(a, f)| *a += f.wide() * f.wide())
                            });
                        } else {
                            let power = |f: f64| f.abs().powf(self.power);
                            planes.for_each(|plane| row.iter_mut().zip(plane).for_each(|(a, f)| *a += power(f.wide())));
                        }
                        for (a, &v) in row.iter_mut().zip(valid) {
                            // A choice, not a product: a void pixel may hold anything, NaN included.
                            *a = if v == 1 { *a / d as f64 } else { 0.0 };
                        }
                    },
                );
            }
        };
        pixel_runs([n, 2, m], RUN, fill).0
    }
}

/// Divides by the norm, which it returns; a map without direction becomes 0.
fn normalise(a: &mut [f64]) -> f64 {
    let norm = a.iter().map(|a| a * a).sum::<f64>().sqrt();
    a.iter_mut().for_each(|a| *a = if norm <= EPSILON { 0.0 } else { *a / norm });
    norm
}

impl HostLoss for Attention {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, d: [d, _], m, power, pixels, .. } = *self;
        let mut maps = with_slice(&self.teacher, |teacher: &[T]| Ok(self.maps([student, teacher])))?;
        let mut value = 0.0;
        // For each pixel dL/da, times p / d.
        let mut steps = Vec::with_capacity(n * m);
        for image in maps.chunks_mut(2 * m) {
            let (s, t) = image.split_at_mut(m);
            let norm = normalise(s);
            normalise(t);
            let gaps = || s.iter().zip(&*t).map(|(s, t)| s - t);
            value += gaps().map(|gap| gap * gap).sum::<f64>() / pixels;
            let along: f64 = s.iter().zip(gaps()).map(|(s, gap)| s * gap).sum();
            let scale = if norm <= EPSILON { 0.0 } else { 2.0 / pixels / norm * power / d as f64 };
            steps.extend(s.iter().zip(gaps()).map(|(s, gap)| scale * (gap - s * along)));
        }
        if !with_grad {
            return Ok(Graded { value, grad: Vec::new() });
        }
        let fill = |at: usize, _: usize, rows: &mut [&mut [T]]| {
            let pixels = at / d * m..(at / d + 1) * m;
            let (steps, valid) = (&steps[pixels.clone()], &self.valid[pixels]);
            let (grad, features) = (&mut rows[0][..m], &student[at * m..][..m]);
            // The derivative of |f|^p over p; at 0, where |f| has none, 0.
            let slope = |f: f64| if f == 0.0 { 0.0 } else { f.abs().powf(power - 1.0).copysign(f) };
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..m {
                        let f = features[i].wide();
                        let value = if power == 2.0 { steps[i] * f } else { steps[i] * slope(f) };
                        grad[i] = if valid[i] == 1 { T::narrow(value) } else { T::zero() };
                    }
                },
            );
        };
        Ok(Graded { value, grad: pixel_runs([n * d, 1, m], m, fill).0 })
    }
}
