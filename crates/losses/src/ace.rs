//! Adaptive cross entropy (ACE): the target of a pixel lies between its label and the teacher's distribution.

use candle_core::{Device, Tensor};
use segdistill_ops::{pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::pair_dims;
use crate::pixel_kl::check_temperature;
use crate::softmax::peaks_and_sums;
use crate::targets::{checked_weights, read_targets, total_weight};

const LOSS: &str = "ace";
/// Pixels of one task: the exponentials of a dozen classes, of both networks, stay in a core's cache.
const RUN: usize = 512;

/// The share `a` of the teacher's distribution in the target of a pixel, in [`ace`](crate::ace()).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum AceTarget {
    /// 1 where the teacher is right, no class having a larger logit than the labelled one; 0 elsewhere.
    #[default]
    TeacherWhereRight,
    /// `alpha` at every pixel, right or wrong.
    Blend {
        /// Share of the teacher, in [0, 1].
        alpha: f64,
    },
    /// The teacher's probability of the labelled class: from 0 where it is surely wrong to 1 where it is surely right.
    Confidence,
}

/// Settings of [`ace`](crate::ace()).
#[derive(Clone, Debug, PartialEq)]
pub struct Ace {
    /// How much of the teacher a pixel's target takes.
    pub target: AceTarget,
    /// Temperature `T` that the teacher's logits are divided by, above 0; the student's are not.
    pub temperature: f64,
    /// One weight a class, of the labelled one, finite and not negative; `None` weighs all classes 1.
    pub class_weights: Option<Vec<f64>>,
}

impl Default for Ace {
    fn default() -> Self {
        Self { target: AceTarget::default(), temperature: 1.0, class_weights: None }
    }
}

/// Adaptive cross entropy: cross entropy with a target between label and teacher, so that a teacher's errors are not
/// taught.
///
/// `L = -sum_{i in V} w_{y_i} * sum_c q_c(i) * log p_c(i) / sum_{i in V} w_{y_i}` in nats, with `p = softmax(z_s)`,
/// `q(i) = a(i) * softmax(z_t(i) / T) + (1 - a(i)) * onehot(y_i)` and `a` as [`AceTarget`] says. With `a = 0` everywhere
/// it is [`cross_entropy`](crate::cross_entropy()); with `a = 1`, `T = 1` and no class weights it is
/// [`soft_cross_entropy`](crate::soft_cross_entropy()) averaged over the valid pixels.
///
/// # Shapes
/// - `student_logits_nchw`, `teacher_logits_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8 on the logits' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `w_{y_i} * (p(i) - q(i)) / sum w` to the student, 0 at pixels that do not count; the teacher is detached here, and so
/// is the target. No factor `T^2`: the student has no temperature. Where the weights of the counted pixels sum to 0,
/// value and gradient are 0. It is a supervised term: it takes the place of cross entropy, not a place beside it.
/// # Errors
/// `Shape` when student, teacher, labels and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Label` for a label outside `0..c` at a valid pixel; `Mask` for a mask value above 1; `Config` unless
/// the temperature is finite and above 0, `alpha` in [0, 1], and for weights of the wrong number, negative or not finite.
/// # Source
/// Park and Heo, Sensors 2020, 20, 4616. Its rule is not public: the abstract only says that the labels' one-hot vectors
/// and the teacher's probability map are adaptively combined in the target, against wrong knowledge of the teacher.
/// All three variants are our interpretation: `TeacherWhereRight` is the plainest reading of that motive, `Blend` the
/// usual combination without adaptation, `Confidence` the soft form of the first. A teacher with several largest logits,
/// the labelled one among them, counts as right, so that the order of classes does not matter. Values do not depend on
/// the number of threads. Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{Ace, CrossEntropy, ace, cross_entropy, valid_mask};
/// // The teacher is wrong at the only pixel: what remains is the label.
/// let student = Tensor::new(&[[[[0.5f32]], [[-1.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[3f32]], [[1.0]]]], &Device::Cpu)?;
/// let labels = Tensor::new(&[[[1u8]]], &Device::Cpu)?;
/// let valid = valid_mask(&labels, 255)?;
/// let loss = ace(&student, &teacher, &labels, &valid, &Ace::default())?.to_scalar::<f32>()?;
/// let label = cross_entropy(&student, &labels, &valid, &CrossEntropy::default())?.to_scalar::<f32>()?;
/// assert!((loss - label).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn ace(
    student_logits_nchw: &Tensor,
    teacher_logits_nchw: &Tensor,
    labels_nhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &Ace,
) -> Result<Tensor> {
    let names = ["student_logits_nchw", "teacher_logits_nchw"];
    let dims @ [n, c, h, w] = pair_dims(LOSS, names, student_logits_nchw, teacher_logits_nchw)?;
    check_temperature(LOSS, cfg.temperature)?;
    if let AceTarget::Blend { alpha } = cfg.target
        && !(0.0..=1.0).contains(&alpha)
    {
        return Err(LossError::config(
            format!("{LOSS}: alpha is {alpha}"),
            "give the teacher's share of the target, from 0 to 1",
        ));
    }
    let targets = read_targets(LOSS, labels_nhw, valid_nhw, dims)?;
    let class_weights = checked_weights("class_weights", cfg.class_weights.as_deref(), c)?;
    let total_weight = total_weight(&targets, &class_weights);
    let scale = if total_weight > 0.0 { 1.0 / total_weight } else { 0.0 };
    let weights = class_weights.iter().map(|weight| weight * scale).collect();
    let teacher = teacher_logits_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    let (target, temperature) = (cfg.target, cfg.temperature);
    graded(student_logits_nchw, Adaptive { n, c, m: h * w, teacher, targets, weights, target, temperature })
}

struct Adaptive {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    /// What a pixel of each class is multiplied by in the sum.
    weights: Vec<f64>,
    target: AceTarget,
    temperature: f64,
}

impl Adaptive {
    /// The share of the teacher where the labelled class lies `margin` below its largest logit and has `probability`.
    fn share(&self, margin: f64, probability: f64) -> f64 {
        match self.target {
            AceTarget::TeacherWhereRight => f64::from(u8::from(margin <= 0.0)),
            AceTarget::Blend { alpha } => alpha,
            AceTarget::Confidence => probability,
        }
    }

    /// The loss of the pixels from `start` of an image; `rows` become its gradient.
    fn run<'a, T: Real>(&self, maps: [&'a [T]; 2], image: usize, start: usize, rows: &mut [&mut [T]]) -> f64 {
        let (c, m, len) = (self.c, self.m, rows[0].len());
        let targets = &self.targets[image * m + start..][..len];
        let row = |map: &'a [T], channel: usize| &map[(image * c + channel) * m + start..][..len];
        let [student, teacher] = maps;
        let cold = T::narrow(1.0 / self.temperature);
        let mut peaks = [vec![T::zero(); len], vec![T::zero(); len]];
        let mut sums = [vec![T::zero(); len], vec![T::zero(); len]];
        let mut logs = vec![T::zero(); len];
        // sum_c exp((z_t - peak_t) / T) * (peak_s - z_s)
        let mut apart = vec![T::zero(); len];
        vectorised(
            #[inline(always)]
            || {
                let ([peak_s, peak_t], [sum_s, sum_t]) = (peaks.each_mut(), sums.each_mut());
                peaks_and_sums(|channel| row(student, channel), c, T::one(), peak_s, sum_s);
                peaks_and_sums(|channel| row(teacher, channel), c, cold, peak_t, sum_t);
                let (peak_s, peak_t, apart) = (&peak_s[..len], &peak_t[..len], &mut apart[..len]);
                for channel in 0..c {
                    let (z_s, z_t) = (row(student, channel), row(teacher, channel));
                    for i in 0..len {
                        apart[i] += ((z_t[i] - peak_t[i]) * cold).exp() * (peak_s[i] - z_s[i]);
                    }
                }
                for (log, s) in logs.iter_mut().zip(&*sum_s) {
                    *log = s.ln();
                }
            },
        );
        let [peak_s, peak_t] = &peaks;
        let [sum_s, sum_t] = &mut sums;
        let mut loss = 0.0;
        // The label's part of the target, weighted; from here on the sums hold what exponentials are multiplied by.
        let mut hits = vec![T::zero(); len];
        for (i, target) in targets.iter().enumerate() {
            let Some(class) = target.map(usize::from) else { continue };
            let margin = peak_t[i] - row(teacher, class)[i];
            let probability = ((T::zero() - margin) * cold).exp() / sum_t[i];
            let (share, weight) = (self.share(margin.wide(), probability.wide()), self.weights[class]);
            let to_label = (peak_s[i] - row(student, class)[i]).wide();
            let to_teacher = apart[i].wide() / sum_t[i].wide();
            loss += weight * (logs[i].wide() + share * to_teacher + (1.0 - share) * to_label);
            sum_s[i] = T::narrow(weight / sum_s[i].wide());
            sum_t[i] = T::narrow(weight * share / sum_t[i].wide());
            hits[i] = T::narrow(weight * (1.0 - share));
        }
        let (sum_s, sum_t) = (&sum_s[..len], &sum_t[..len]);
        let (peak_s, peak_t) = (&peak_s[..len], &peak_t[..len]);
        vectorised(
            #[inline(always)]
            || {
                for (channel, grad) in rows.iter_mut().enumerate() {
                    let (z_s, z_t, grad) = (row(student, channel), row(teacher, channel), &mut grad[..len]);
                    for i in 0..len {
                        let (s, t) = ((z_s[i] - peak_s[i]).exp(), ((z_t[i] - peak_t[i]) * cold).exp());
                        let value = s * sum_s[i] - t * sum_t[i];
                        // A choice, not a product: the logits of a void pixel may be anything, NaN included.
                        grad[i] = if targets[i].is_some() { value } else { T::zero() };
                    }
                }
            },
        );
        for (i, target) in targets.iter().enumerate() {
            if let Some(class) = target.map(usize::from) {
                rows[class][i] -= hits[i];
            }
        }
        loss
    }
}

impl HostLoss for Adaptive {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let Self { n, c, m, .. } = *self;
        with_slice(&self.teacher, |teacher: &[T]| {
            let run =
                |image: usize, start: usize, rows: &mut [&mut [T]]| self.run([student, teacher], image, start, rows);
            let (mut grad, sums) = pixel_runs([n, c, m], RUN, run);
            if !with_grad {
                grad.clear();
            }
            Ok(Graded { value: sums.iter().sum(), grad })
        })
    }
}
