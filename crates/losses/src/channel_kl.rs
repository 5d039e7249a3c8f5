//! Channel-wise distillation (CWD): in each channel, where the student's map is active should be where the teacher's is.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{block_sums, pixel_runs, vectorised};

use crate::error::Result;
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid};
use crate::pixel_kl::check_temperature;

const LOSS: &str = "channel_kl";
/// Pixels whose exponentials are summed in the map's type, lane by lane, before f64 takes over.
const BLOCK: usize = 1024;
/// Lanes of the search for a row's largest value.
const LANES: usize = 32;

/// Settings of [`channel_kl`](crate::channel_kl()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChannelKl {
    /// Temperature `T` that both networks' maps are divided by, above 0.
    pub temperature: f64,
}

impl Default for ChannelKl {
    fn default() -> Self {
        Self::cwd()
    }
}

impl ChannelKl {
    /// The authors' setting on logits, weighed 3 there, and CIRKD's re-run on logits (3) and features (50):
    /// temperature 4.
    pub fn cwd() -> Self {
        Self { temperature: 4.0 }
    }

    /// The setting on logits of mmrazor, weighed 5 there: temperature 1.
    pub fn mmrazor() -> Self {
        Self { temperature: 1.0 }
    }
}

/// Kullback-Leibler divergence between the two networks' distributions over positions, channel by channel.
///
/// `L = T^2/(n c) * sum_images sum_c sum_{i in V} p_t(i|c) * (log p_t(i|c) - log p_s(i|c))` with `p = softmax(z / T)`
/// over the valid positions `V` of an image, in nats. The maps may be logits or features, the student's brought to the
/// teacher's channels by a layer of its own. The teacher is the target: the divergence is `KL(teacher || student)`. An
/// image without valid pixels adds 0, and is counted in `n`.
///
/// # Shapes
/// - `student_nchw`, `teacher_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `valid_nhw`: `[n, h, w]` u8 on the maps' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the maps' type
/// # Gradient
/// `T/(n c) * (p_s - p_t)` to the student, 0 at pixels that do not count; the teacher is detached here. It sums to 0
/// over the positions of a channel.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1; `Config` unless the temperature is finite and above 0.
/// # Source
/// Shu et al. 2021 (CWD); CIRKD `losses/cwd.py`; mmrazor `losses/cwd.py`. DIFFERENCE: those softmaxes run
/// over void positions too. CIRKD's takes the logarithm of a rounded softmax, which is minus infinity where that is 0;
/// here the logarithm never leaves the exponent. Values do not depend on the number of threads. Maps on another device
/// are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{ChannelKl, channel_kl};
/// // Two positions: the teacher's channel lives in the first, the student's in both alike.
/// let student = Tensor::new(&[[[[0f32, 0.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[50f32, 0.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = channel_kl(&student, &teacher, &valid, &ChannelKl::mmrazor())?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn channel_kl(student_nchw: &Tensor, teacher_nchw: &Tensor, valid_nhw: &Tensor, cfg: &ChannelKl) -> Result<Tensor> {
    let [n, c, h, w] = pair_dims(LOSS, ["student_nchw", "teacher_nchw"], student_nchw, teacher_nchw)?;
    check_temperature(LOSS, cfg.temperature)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let teacher = teacher_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_nchw, Channels { n, c, m: h * w, teacher, valid, temperature: cfg.temperature })
}

struct Channels {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    temperature: f64,
}

impl Channels {
    /// The divergence of one channel of one image; `grad`, unless empty, becomes the gradient of its `T^2/(n c)`-fold.
    fn row<T: Real>(&self, student: &[T], teacher: &[T], valid: &[u8], grad: &mut [T]) -> f64 {
        if !valid.contains(&1) {
            return 0.0;
        }
        let cold = T::narrow(1.0 / self.temperature);
        let step = self.temperature / (self.n * self.c) as f64;
        vectorised(
            #[inline(always)]
            || {
                let (peak_s, peak_t) = (largest(student, valid), largest(teacher, valid));
                let mut sums = [0.0; 3];
                let (mut s, mut t, mut apart) = ([T::zero(); BLOCK], [T::zero(); BLOCK], [T::zero(); BLOCK]);
                for start in (0..valid.len()).step_by(BLOCK) {
                    let len = BLOCK.min(valid.len() - start);
                    let (z_s, z_t) = (&student[start..][..len], &teacher[start..][..len]);
                    let valid = &valid[start..][..len];
                    let (s, t, apart) = (&mut s[..len], &mut t[..len], &mut apart[..len]);
                    for i in 0..len {
                        let (a_s, a_t) = ((z_s[i] - peak_s) * cold, (z_t[i] - peak_t) * cold);
                        let (e_s, e_t) = (a_s.exp(), a_t.exp());
                        // A choice, not a product: a void pixel may hold anything, NaN included.
                        let counted = valid[i] == 1;
                        s[i] = if counted { e_s } else { T::zero() };
                        t[i] = if counted { e_t } else { T::zero() };
                        apart[i] = if counted { a_t - a_s } else { T::zero() };
                    }
                    let block = block_sums(
                        [&*s, &*t, &*apart],
                        #[inline(always)]
                        |[s, t, apart]| [s, t, t * apart],
                    );
                    sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
                    if !grad.is_empty() {
                        grad[start..][..len].copy_from_slice(s);
                    }
                }
                let [sum_s, sum_t, apart] = sums;
                let (share_s, share_t) = (T::narrow(step / sum_s), T::narrow(step / sum_t));
                for ((grad, &z), &v) in grad.iter_mut().zip(teacher).zip(valid) {
                    let e_t = ((z - peak_t) * cold).exp();
                    let value = *grad * share_s - e_t * share_t;
                    *grad = if v == 1 { value } else { T::zero() };
                }
                apart / sum_t + (sum_s.ln() - sum_t.ln())
            },
        )
    }
}

/// The largest of the values that count; NaN is passed over, and seen in the sums.
#[inline(always)]
fn largest<T: Real>(values: &[T], valid: &[u8]) -> T {
    let lowest = T::narrow(f64::NEG_INFINITY);
    let mut lanes = [lowest; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    let (valid_chunks, valid_rest) = valid.as_chunks::<LANES>();
    for (z, v) in chunks.iter().zip(valid_chunks) {
        for i in 0..LANES {
            let z = if v[i] == 1 { z[i] } else { lowest };
            lanes[i] = if z > lanes[i] { z } else { lanes[i] };
        }
    }
    let rest = rest.iter().zip(valid_rest).filter(|&(_, &v)| v == 1).map(|(z, _)| *z);
    rest.chain(lanes).fold(lowest, |most, z| if z > most { z } else { most })
}

impl HostLoss for Channels {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, c, m, .. } = *self;
        with_slice(&self.teacher, |teacher: &[T]| {
            let row = |at: usize, grad: &mut [T]| {
                self.row(&student[at * m..][..m], &teacher[at * m..][..m], &self.valid[at / c * m..][..m], grad)
            };
            let (grad, rows): (Vec<T>, Vec<f64>) = if with_grad {
                pixel_runs([n * c, 1, m], m, |at, _, rows| row(at, rows[0]))
            } else {
                (Vec::new(), (0..n * c).into_par_iter().map(|at| row(at, &mut [])).collect())
            };
            let factor = self.temperature * self.temperature / (n * c) as f64;
            Ok(Graded { value: factor * rows.iter().sum::<f64>(), grad })
        })
    }
}
