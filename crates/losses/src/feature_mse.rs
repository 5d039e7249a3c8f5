//! Squared distance between two networks' features: hints (FitNet) and masked generation (MGD).

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{block_sums, pixel_runs, vectorised};

use crate::error::Result;
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{pair_dims, read_valid};

const LOSS: &str = "feature_mse";
/// Pixels whose squares are summed in the map's type, lane by lane, before f64 takes over.
const BLOCK: usize = 1024;

/// What the sum of squares is divided by, in [`feature_mse`](crate::feature_mse()).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MseNormaliser {
    /// The valid pixels of the whole batch times the channels, as in CIRKD's code for FitNet.
    #[default]
    Mean,
    /// The number of images, as in MGD's code. The loss grows with the map and its channels.
    SumPerImage,
}

/// Settings of [`feature_mse`](crate::feature_mse()).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureMse {
    /// What the sum of squares is divided by.
    pub normaliser: MseNormaliser,
}

impl FeatureMse {
    /// FitNet's hint as CIRKD's code has it, weighed 10 there: the mean over pixels and channels.
    pub fn fitnet() -> Self {
        Self { normaliser: MseNormaliser::Mean }
    }

    /// MGD's distance, weighed 2e-5 there: the sum over pixels and channels, averaged over images. The student's map is
    /// what the generator made of its masked features.
    pub fn mgd() -> Self {
        Self { normaliser: MseNormaliser::SumPerImage }
    }
}

/// Squared distance between the two networks' features, averaged or summed over pixels and channels.
///
/// `L = 1/Z * sum_{i in V} sum_k (F^s_k(i) - F^t_k(i))^2`. `Z` is `|V| d`, with the valid pixels of the batch
/// ([`MseNormaliser::Mean`]), or `n` ([`MseNormaliser::SumPerImage`]).
///
/// # Shapes
/// - `student_ndhw`, `teacher_ndhw`: `[n, d, h, w]`, equal, f32 or f64; a layer of its own brings the student to the
///   teacher's channels
/// - `valid_nhw`: `[n, h, w]` u8 on the maps' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the maps' type
/// # Gradient
/// `2/Z * (F^s - F^t)` to the student, 0 at pixels that do not count; the teacher is detached here. With no valid pixel
/// value and gradient are 0.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1.
/// # Source
/// FitNet: Romero et al. 2015, equation 3; CIRKD `losses/fitnet.py`. MGD: Yang et al. 2022, equation 6. DIFFERENCE:
/// the public codes know no void pixels and count all; here void pixels are left out of the sums, and of `|V|`. The
/// paper of FitNet has half the sum over one map; the mean is the code's. Values do not depend on the number of
/// threads. Maps on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{FeatureMse, feature_mse};
/// // Two channels at two pixels; one of the four numbers differs, by 2.
/// let student = Tensor::new(&[[[[1f32, 2.0]], [[3.0, 4.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[1f32, 2.0]], [[3.0, 6.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// assert_eq!(feature_mse(&student, &teacher, &valid, &FeatureMse::fitnet())?.to_scalar::<f32>()?, 1.0);
/// assert_eq!(feature_mse(&student, &teacher, &valid, &FeatureMse::mgd())?.to_scalar::<f32>()?, 4.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn feature_mse(
    student_ndhw: &Tensor,
    teacher_ndhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &FeatureMse,
) -> Result<Tensor> {
    let [n, d, h, w] = pair_dims(LOSS, ["student_ndhw", "teacher_ndhw"], student_ndhw, teacher_ndhw)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let counted = valid.iter().filter(|&&v| v == 1).count();
    let divisor = match cfg.normaliser {
        MseNormaliser::Mean => counted.max(1) * d,
        MseNormaliser::SumPerImage => n,
    };
    let teacher = teacher_ndhw.detach().to_device(&Device::Cpu)?.contiguous()?;
    graded(student_ndhw, Squares { n, d, m: h * w, teacher, valid, divisor: divisor as f64 })
}

struct Squares {
    n: usize,
    d: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, d, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    /// What the sum of squares is divided by.
    divisor: f64,
}

impl Squares {
    /// The sum of squares of one channel of one image; `grad`, unless empty, becomes the gradient of its share.
    fn plane<T: Real>(&self, student: &[T], teacher: &[T], valid: &[u8], grad: &mut [T]) -> f64 {
        let step = T::narrow(2.0 / self.divisor);
        vectorised(
            #[inline(always)]
            || {
                let (mut sum, mut gaps) = (0.0, [T::zero(); BLOCK]);
                for start in (0..valid.len()).step_by(BLOCK) {
                    let len = BLOCK.min(valid.len() - start);
                    let (s, t, v) = (&student[start..][..len], &teacher[start..][..len], &valid[start..][..len]);
                    let gaps = &mut gaps[..len];
                    for i in 0..len {
                        let gap = s[i] - t[i];
                        // A choice, not a product: a void pixel may hold anything, NaN included.
                        gaps[i] = if v[i] == 1 { gap } else { T::zero() };
                    }
                    let [squares] = block_sums(
                        [&*gaps],
                        #[inline(always)]
                        |[gap]| [gap * gap],
                    );
                    sum += squares;
                    if !grad.is_empty() {
                        for (g, &gap) in grad[start..][..len].iter_mut().zip(&*gaps) {
                            *g = step * gap;
                        }
                    }
                }
                sum
            },
        )
    }
}

impl HostLoss for Squares {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, d, m, .. } = *self;
        with_slice(&self.teacher, |teacher: &[T]| {
            let plane = |at: usize, grad: &mut [T]| {
                self.plane(&student[at * m..][..m], &teacher[at * m..][..m], &self.valid[at / d * m..][..m], grad)
            };
            let (grad, sums): (Vec<T>, Vec<f64>) = if with_grad {
                pixel_runs([n * d, 1, m], m, |at, _, rows| plane(at, rows[0]))
            } else {
                (Vec::new(), (0..n * d).into_par_iter().map(|at| plane(at, &mut [])).collect())
            };
            Ok(Graded { value: sums.iter().sum::<f64>() / self.divisor, grad })
        })
    }
}
