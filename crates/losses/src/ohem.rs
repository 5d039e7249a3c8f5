//! Cross entropy over the hardest pixels only.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::cross_entropy::Batch;
use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::Real;
use crate::mask::logits_dims;
use crate::softmax::RUN;
use crate::targets::{checked_weights, read_targets};

const LOSS: &str = "ohem_cross_entropy";

/// Settings of [`ohem_cross_entropy`].
#[derive(Clone, Debug, PartialEq)]
pub struct Ohem {
    /// Pixels are hard whose probability of the labelled class is below it, in [0, 1].
    pub threshold: f64,
    /// Pixels of the batch that are kept at least, the hardest ones; all where fewer count.
    pub min_kept: usize,
    /// One weight a class, finite and not negative; `None` weighs all classes 1.
    pub class_weights: Option<Vec<f64>>,
}

impl Default for Ohem {
    /// OCNet's and mmsegmentation's setting: 0.7 and 100,000 pixels.
    fn default() -> Self {
        Self { threshold: 0.7, min_kept: 100_000, class_weights: None }
    }
}

impl Ohem {
    /// HRNet's setting on Cityscapes: 0.9 and 131,072 pixels.
    pub fn hrnet() -> Self {
        Self { threshold: 0.9, min_kept: 131_072, class_weights: None }
    }
}

/// Cross entropy over the hardest pixels of the batch (online hard example mining).
///
/// `L = sum_{i in K} w_{y_i} * -log p_{y_i}(i) / sum_{i in K} w_{y_i}` with `p = softmax(z)` over the classes, in nats. A
/// valid pixel is in `K` where `p_{y_i}(i) < threshold`, or where `p_{y_i}(i) <= q`, `q` being the `min_kept`-th smallest
/// of these probabilities in the batch, or the largest where fewer pixels are valid. So at least `min_kept` pixels are
/// kept, all where there are fewer, and pixels that equal the last one kept are kept too: no order among equals, and
/// hence no chance, decides. With `min_kept = 0` the threshold alone chooses. Class weights do not enter the choice.
/// Probabilities are compared in the logits' type: in f32, all above `1 - 2^-25` are equal.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// That of [`cross_entropy`](crate::cross_entropy()) over `K`, 0 at all other pixels; the choice itself has none. Where
/// `K` is empty or weighs nothing, value and gradient are 0.
/// # Errors
/// `Shape` when the grids differ (nothing is resized here); `DType`; `Label` for a label outside `0..c` at a valid
/// pixel; `Mask` for a mask value above 1; `Config` for weights of the wrong number, negative or not finite, and for a
/// threshold outside [0, 1].
/// # Source
/// Shrivastava et al. 2016 for the idea; the pixel form is that of the public PSPNet, OCNet and HRNet programs. They
/// differ among themselves: OCNet's keeps `p <= max(threshold, q)` and weighs the mean as here; HRNet's and
/// mmsegmentation's keep `p < max(threshold, q')` with the next larger `q'`, which is the same set unless probabilities
/// are equal or `min_kept` reaches the number of valid pixels, where they lose the easiest one. DIFFERENCE: HRNet's
/// divides the weighted sum by the number of kept pixels; mmsegmentation's `min_kept` is multiplied by the images of the
/// batch. Takes time linear in `n h w`. Values do not depend on the number of threads. Logits on another device are
/// brought to the host.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use segdistill_losses::{Ohem, ohem_cross_entropy, valid_mask};
/// // The second pixel is certain and right: only the first, undecided one is kept.
/// let logits = Tensor::new(&[[[[0f32, 20.0]], [[0.0, 0.0]]]], &Device::Cpu)?;
/// let labels = Tensor::new(&[[[0u8, 0]]], &Device::Cpu)?;
/// let cfg = Ohem { min_kept: 1, ..Ohem::default() };
/// let loss = ohem_cross_entropy(&logits, &labels, &valid_mask(&labels, 255)?, &cfg)?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn ohem_cross_entropy(logits_nchw: &Tensor, labels_nhw: &Tensor, valid_nhw: &Tensor, cfg: &Ohem) -> Result<Tensor> {
    let dims = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    let targets = read_targets(LOSS, labels_nhw, valid_nhw, dims)?;
    let class_weights = checked_weights("class_weights", cfg.class_weights.as_deref(), dims[1])?;
    if !(0.0..=1.0).contains(&cfg.threshold) {
        return Err(LossError::config(
            format!("{LOSS}: threshold is {}", cfg.threshold),
            "give a probability from 0 to 1; 1 keeps every pixel that is not certain",
        ));
    }
    let (threshold, min_kept) = (cfg.threshold, cfg.min_kept);
    graded(logits_nchw, Hardest { dims, targets, class_weights, threshold, min_kept })
}

struct Hardest {
    dims: [usize; 4],
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    class_weights: Vec<f64>,
    threshold: f64,
    min_kept: usize,
}

impl Hardest {
    /// Largest probability that `min_kept` keeps whatever the threshold; below 0 where it keeps none.
    fn kept_anyway(&self, probabilities: &[f64]) -> f64 {
        let mut valid: Vec<f64> =
            probabilities.iter().zip(&self.targets).filter(|(_, target)| target.is_some()).map(|(p, _)| *p).collect();
        match self.min_kept.min(valid.len()) {
            0 => -1.0,
            kept => *valid.select_nth_unstable_by(kept - 1, f64::total_cmp).1,
        }
    }
}

impl HostLoss for Hardest {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, logits: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let [n, c, h, w] = self.dims;
        let m = h * w;
        let all = Batch::new([n, c, h, w], self.targets.clone(), self.class_weights.clone(), 0.0);
        let (_, statistics) = all.forward(logits);
        // Margin below the largest logit, and sum of exponentials, of a pixel that counts.
        let margin_and_sum = |at: usize, class: u8| {
            let (image, pixel) = (at / m, at % m);
            let statistic = |k: usize| statistics[(image * 2 + k) * m + pixel];
            (statistic(0) - logits[(image * c + usize::from(class)) * m + pixel], statistic(1))
        };
        let mut probabilities = vec![0.0; n * m];
        let tasks = probabilities.par_chunks_mut(RUN).zip(self.targets.par_chunks(RUN)).enumerate();
        tasks.for_each(|(task, (probabilities, targets))| {
            for (i, (probability, target)) in probabilities.iter_mut().zip(targets).enumerate() {
                if let Some(class) = *target {
                    let (margin, sum) = margin_and_sum(task * RUN + i, class);
                    *probability = ((T::zero() - margin).exp() / sum).wide();
                }
            }
        });
        let anyway = self.kept_anyway(&probabilities);
        // Not below the threshold is easy, and NaN is not: it shall be seen in the loss.
        let easy = |p: f64| p >= self.threshold && p > anyway;
        let targets: Vec<Option<u8>> =
            self.targets.iter().zip(&probabilities).map(|(target, p)| target.filter(|_| !easy(*p))).collect();
        let kept = Batch::new([n, c, h, w], targets, self.class_weights.clone(), 0.0);
        let value = kept.mean(|at, class| {
            let (margin, sum) = margin_and_sum(at, class);
            margin.wide() + sum.ln().wide()
        });
        let grad = if with_grad { kept.backward(logits, &statistics, 1.0) } else { Vec::new() };
        Ok(Graded { value, grad })
    }
}
