//! Soft Dice loss of several classes.

use candle_core::Tensor;
use rayon::prelude::*;
use segdistill_ops::{block_sums, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, pixel_runs};
use crate::mask::logits_dims;
use crate::softmax::{RUN, probabilities};
use crate::targets::read_targets;

const LOSS: &str = "dice";

/// What the sum over classes is divided by, in [`dice`](crate::dice()). Classes without a valid pixel in the batch add
/// nothing either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiceNormaliser {
    /// The number of classes that have a valid pixel in the batch.
    #[default]
    PresentClasses,
    /// All classes, as smp's code does.
    AllClasses,
}

/// Settings of [`dice`](crate::dice()).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dice {
    /// Added to both parts of each class's fraction, in pixels, at least 0.
    pub smooth: f64,
    /// What the sum over classes is divided by.
    pub normaliser: DiceNormaliser,
}

impl Dice {
    /// smp's `DiceLoss("multiclass")` as it stands: no smoothing, the mean over all classes.
    pub fn smp() -> Self {
        Self { smooth: 0.0, normaliser: DiceNormaliser::AllClasses }
    }
}

/// Soft Dice loss: how little the predicted and the labelled share of each class overlap, over the batch.
///
/// `L = 1/N * sum_{k present} (1 - (I_k + s) / ((P_k + T_k)/2 + s))` with `I_k = sum_{i in V, y_i = k} p_k(i)`,
/// `P_k = sum_{i in V} p_k(i)`, `T_k = |{i in V: y_i = k}|`, `p = softmax(z)` over the classes and `s` the smoothing. The
/// sums run over the valid pixels of the whole batch, so that a batch is not the mean of its images. A class is present
/// where `T_k > 0`; `N` is the number of present classes, or `c` ([`DiceNormaliser`]).
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type, in [0, 1]
/// # Gradient
/// Exact, through the softmax, also from a present class's share at pixels labelled otherwise; 0 at pixels that do not
/// count. With no valid pixel value and gradient are 0.
/// # Errors
/// `Shape` when the grids differ (nothing is resized here); `DType`; `Label` for a label outside `0..c` at a valid
/// pixel; `Mask` for a mask value above 1; `Config` unless the smoothing is finite and at least 0.
/// # Source
/// Milletari et al. 2016, without their squares; smp's `DiceLoss(mode="multiclass", from_logits=True)`, whose value and
/// gradient [`Dice::smp`] has. Its `eps` bounds a denominator that is at least 1/2 for a present class: it never acts.
/// DIFFERENCE: by default the mean is over the present classes, so that a crop with few classes weighs as much as one
/// with many. Memory: one map of the logits' size. Values do not depend on the number of threads. Logits on another
/// device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{Dice, dice, valid_mask};
/// // Undecided between two classes, of which one is labelled: I = 1, P = 1, T = 2.
/// let logits = Tensor::zeros((1, 2, 1, 2), DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[[[1u8, 1]]], &Device::Cpu)?;
/// let loss = dice(&logits, &labels, &valid_mask(&labels, 255)?, &Dice::default())?;
/// assert!((loss.to_scalar::<f32>()? - 1.0 / 3.0).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn dice(logits_nchw: &Tensor, labels_nhw: &Tensor, valid_nhw: &Tensor, cfg: &Dice) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    let targets = read_targets(LOSS, labels_nhw, valid_nhw, dims)?;
    if !(cfg.smooth.is_finite() && cfg.smooth >= 0.0) {
        return Err(LossError::config(
            format!("{LOSS}: smooth is {}", cfg.smooth),
            "give a finite number of pixels of at least 0; 0 adds nothing",
        ));
    }
    graded(logits_nchw, Overlap { dims, targets, cfg: *cfg })
}

struct Overlap {
    dims: [usize; 4],
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    cfg: Dice,
}

/// Sums over the valid pixels, for one class.
#[derive(Clone, Copy, Default)]
struct Sums {
    predicted: f64,
    labelled: f64,
    both: f64,
}

impl HostLoss for Overlap {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, logits: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let [n, c, h, w] = self.dims;
        let m = h * w;
        let read = |image: usize, start: usize, rows: &[&mut [T]]| {
            let mut sums = vec![Sums::default(); c];
            vectorised(
                #[inline(always)]
                || {
                    for (sums, row) in sums.iter_mut().zip(rows) {
                        [sums.predicted] = block_sums([&**row], |[p]| [p]);
                    }
                },
            );
            for (i, target) in self.targets[image * m + start..][..rows[0].len()].iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    sums[class].both += rows[class][i].wide();
                    sums[class].labelled += 1.0;
                }
            }
            sums
        };
        let (mut map, runs) = probabilities(logits, [n, c, m], &self.targets, read);
        let mut sums = vec![Sums::default(); c];
        for run in &runs {
            for (sum, part) in sums.iter_mut().zip(run) {
                sum.predicted += part.predicted;
                sum.labelled += part.labelled;
                sum.both += part.both;
            }
        }
        let present = sums.iter().filter(|sum| sum.labelled > 0.0).count();
        let classes = match self.cfg.normaliser {
            DiceNormaliser::PresentClasses => present.max(1) as f64,
            DiceNormaliser::AllClasses => c as f64,
        };
        let smooth = self.cfg.smooth;
        let mut value = 0.0;
        // The gradient for a probability of a class: `every` at each pixel, `own` besides where it is labelled.
        let (mut every, mut own) = (vec![T::zero(); c], vec![T::zero(); c]);
        for (class, sum) in sums.iter().enumerate().filter(|(_, sum)| sum.labelled > 0.0) {
            let half = (sum.predicted + sum.labelled) / 2.0 + smooth;
            let score = (sum.both + smooth) / half;
            value += (1.0 - score) / classes;
            every[class] = T::narrow(score / (2.0 * half * classes));
            own[class] = T::narrow(-1.0 / (half * classes));
        }
        if with_grad {
            self.to_gradient(&mut map, &every, &own);
        } else {
            map.clear();
        }
        Ok(Graded { value, grad: map })
    }
}

impl Overlap {
    /// Turns probabilities into the gradient for logits: `p_c (g_c - sum_k p_k g_k)` with `g_c = every_c + [c = y] own_c`.
    fn to_gradient<T: Real>(&self, map: &mut [T], every: &[T], own: &[T]) {
        let [_, c, h, w] = self.dims;
        let m = h * w;
        pixel_runs(map, c, m, RUN).into_par_iter().for_each(|mut run| {
            let len = run.len();
            let targets = &self.targets[run.image * m + run.start..][..len];
            let rows = &mut run.rows;
            // p_y own_y, and 0 where the pixel does not count.
            let labelled = |(i, target): (usize, &Option<u8>)| match target.map(usize::from) {
                Some(class) => rows[class][i] * own[class],
                None => T::zero(),
            };
            let labelled: Vec<T> = targets.iter().enumerate().map(labelled).collect();
            let mut mean = labelled.clone();
            vectorised(
                #[inline(always)]
                || {
                    for (row, &every) in rows.iter().zip(every) {
                        for (mean, &p) in mean.iter_mut().zip(&**row) {
                            *mean += p * every;
                        }
                    }
                    for (row, &every) in rows.iter_mut().zip(every) {
                        for (p, &mean) in row.iter_mut().zip(&mean) {
                            *p *= every - mean;
                        }
                    }
                },
            );
            for (i, target) in targets.iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    rows[class][i] += labelled[i];
                }
            }
        });
    }
}
