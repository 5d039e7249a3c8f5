//! Binary cross entropy of each class against the rest.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use segdistill_ops::{block_sums, pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::graded::{Graded, HostLoss, graded};
use crate::host::{Real, with_slice};
use crate::mask::{logits_dims, place, read_valid, same_dtype};
use crate::softmax::RUN;
use crate::targets::checked_weights;

const LOSS: &str = "binary_cross_entropy";

/// Settings of [`binary_cross_entropy`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BinaryCrossEntropy {
    /// For each class, what its positive part is multiplied by, finite and not negative; `None` takes 1 for all.
    pub positive_weights: Option<Vec<f64>>,
}

/// Binary cross entropy of logits and targets, class by class, averaged over classes and valid pixels of the batch.
///
/// `L = 1/(c |V|) * sum_{i in V} sum_k (-w_k t_k(i) log s(z_k(i)) - (1 - t_k(i)) log(1 - s(z_k(i))))` in nats, with
/// `s(z) = 1/(1 + e^-z)`, formed so that no finite logit overflows. Classes do not compete: any number of them may be on
/// at a pixel.
///
/// # Shapes
/// - `logits_nchw`, `targets_nchw`: `[n, c, h, w]`, equal, f32 or f64; targets in [0, 1] where valid
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `((1 - t) s(z) - w t (1 - s(z))) / (c |V|)` to the logits, 0 at pixels that do not count; the targets are detached
/// here. With no valid pixel value and gradient are 0.
/// # Errors
/// `Shape` when logits, targets and mask differ (nothing is resized here); `DType`, also when the targets' type differs;
/// `Target` for a target outside [0, 1] at a valid pixel; `Mask` for a mask value above 1; `Config` for weights of the
/// wrong number, negative or not finite.
/// # Source
/// PyTorch's `nn.BCEWithLogitsLoss(pos_weight)` over the valid pixels. Values do not depend on the number of threads.
/// Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{BinaryCrossEntropy, binary_cross_entropy};
/// let logits = Tensor::zeros((1, 3, 2, 2), DType::F32, &Device::Cpu)?;
/// let valid = Tensor::ones((1, 2, 2), DType::U8, &Device::Cpu)?;
/// let loss = binary_cross_entropy(&logits, &logits.ones_like()?, &valid, &BinaryCrossEntropy::default())?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn binary_cross_entropy(
    logits_nchw: &Tensor,
    targets_nchw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &BinaryCrossEntropy,
) -> Result<Tensor> {
    let dims @ [n, c, h, w] = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    if targets_nchw.dims() != dims {
        return Err(LossError::shape(
            LOSS,
            format!("targets_nchw {:?}", targets_nchw.dims()),
            format!("{dims:?}, the shape of the logits"),
            "give one map of targets for each class, on the logits' grid",
        ));
    }
    same_dtype(LOSS, "targets_nchw", logits_nchw, targets_nchw)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let positive_weights = checked_weights("positive_weights", cfg.positive_weights.as_deref(), c)?;
    let targets = targets_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    let pixels = valid.iter().filter(|&&v| v == 1).count();
    let scale = 1.0 / (pixels * c).max(1) as f64;
    let wrong = match targets.dtype() {
        candle_core::DType::F64 => with_slice(&targets, |t: &[f64]| Ok(outside(t, &valid, c, h * w)))?,
        _ => with_slice(&targets, |t: &[f32]| Ok(outside(t, &valid, c, h * w)))?,
    };
    if let Some((class, at, value)) = wrong {
        let [image, row, column] = place(at, [n, h, w]);
        return Err(LossError::Target { image, class, row, column, value });
    }
    graded(logits_nchw, Each { dims: [n, c, h * w], targets, valid, positive_weights, scale })
}

/// Class, pixel of the batch and value of the first target outside [0, 1] at a valid pixel.
fn outside<T: Real>(targets: &[T], valid: &[u8], c: usize, m: usize) -> Option<(usize, usize, f64)> {
    targets.par_chunks(m).enumerate().find_map_first(|(plane, targets)| {
        let first = plane / c * m;
        let valid = &valid[first..][..m];
        let bad = |(t, &v): (&T, &u8)| (v == 1) & !((*t >= T::zero()) & (*t <= T::one()));
        // Without a way out of the loop it is vector code; the place is looked for where there is one.
        let any = vectorised(
            #[inline(always)]
            || targets.iter().zip(valid).fold(false, |any, pair| any | bad(pair)),
        );
        let at = if any { targets.iter().zip(valid).position(bad)? } else { return None };
        Some((plane % c, first + at, targets[at].wide()))
    })
}

struct Each {
    dims: [usize; 3],
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    targets: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    positive_weights: Vec<f64>,
    /// What the sum is multiplied by.
    scale: f64,
}

impl HostLoss for Each {
    const NAME: &'static str = LOSS;

    fn evaluate<T: Real>(&self, logits: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
        let [n, c, m] = self.dims;
        let scale = T::narrow(self.scale);
        let fill = |targets: &[T], image: usize, start: usize, rows: &mut [&mut [T]]| {
            let mut sum = 0.0;
            let mut losses = vec![T::zero(); rows[0].len()];
            for (class, row) in rows.iter_mut().enumerate() {
                let len = row.len();
                let at = (image * c + class) * m + start;
                let (z, t) = (&logits[at..][..len], &targets[at..][..len]);
                let valid = &self.valid[image * m + start..][..len];
                let (one, weight) = (T::one(), T::narrow(self.positive_weights[class]));
                let (losses, row) = (&mut losses[..len], &mut row[..len]);
                sum += vectorised(
                    #[inline(always)]
                    || {
                        for (((loss, grad), &z), &t) in losses.iter_mut().zip(&mut *row).zip(z).zip(t) {
                            let size = if z < T::zero() { T::zero() - z } else { z };
                            let e = (T::zero() - size).exp();
                            let u = one + e;
                            // log(1 + e), corrected for what `1 + e` lost.
                            let log = u.ln() + (e - (u - one)) / u;
                            let (small, large) = (e / u, one / u);
                            let (on, off) = if z < T::zero() { (small, large) } else { (large, small) };
                            let (minus_log_on, minus_log_off) =
                                if z < T::zero() { (log + size, log) } else { (log, log + size) };
                            *loss = weight * t * minus_log_on + (one - t) * minus_log_off;
                            *grad = ((one - t) * on - weight * t * off) * scale;
                        }
                        // In a loop of its own, or neither is vector code. A choice, not a product: the logits of a
                        // void pixel may be anything, NaN included.
                        for ((loss, grad), &valid) in losses.iter_mut().zip(&mut *row).zip(valid) {
                            *loss = if valid == 1 { *loss } else { T::zero() };
                            *grad = if valid == 1 { *grad } else { T::zero() };
                        }
                        block_sums([&*losses], |[loss]| [loss])[0]
                    },
                );
            }
            sum
        };
        with_slice(&self.targets, |targets: &[T]| {
            let (mut grad, sums) = pixel_runs([n, c, m], RUN, |image, start, rows| fill(targets, image, start, rows));
            if !with_grad {
                grad.clear();
            }
            Ok(Graded { value: self.scale * sums.iter().sum::<f64>(), grad })
        })
    }
}
