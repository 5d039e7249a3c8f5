//! Cross entropy of class logits and labels, fused over the map.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::error::{LossError, Result};
use crate::host::{Real, pixel_runs, slice, with_slice};
use crate::mask::{logits_dims, place, read_map, read_valid};

const LOSS: &str = "cross_entropy";
/// Pixels of one task.
const RUN: usize = 4096;

/// Settings of [`cross_entropy`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// One weight a class, finite and not negative; `None` weighs all classes 1.
    pub class_weights: Option<Vec<f64>>,
}

/// Cross entropy with the labelled class, averaged over the valid pixels of the whole batch.
///
/// `L = sum_{i in V} w_{y_i} * (log sum_c exp z_c(i) - z_{y_i}(i)) / sum_{i in V} w_{y_i}`, in nats. The exponentials
/// are taken relative to the largest logit of a pixel, so that no finite logit overflows.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `w_{y_i} * (softmax(z(i))_c - [c = y_i]) / sum w` to the logits, 0 at pixels that do not count. Where the weights
/// of the counted pixels sum to 0 (no valid pixel, say), value and gradient are 0; PyTorch gives NaN there.
/// # Errors
/// `Shape` when the grids differ (nothing is resized here); `DType`; `Label` for a label outside `0..c` at a valid
/// pixel; `Mask` for a mask value above 1; `Config` for weights of the wrong number, negative or not finite.
/// # Source
/// The weighted mean of PyTorch's `nn.CrossEntropyLoss(weight, ignore_index)`, checked against its values and
/// gradients. Values do not depend on the number of threads. Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use segdistill_losses::{CrossEntropy, cross_entropy, valid_mask};
/// let logits = Tensor::zeros((1, 4, 1, 2), candle_core::DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[[[2u8, 255]]], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &labels, &valid_mask(&labels, 255)?, &CrossEntropy::default())?;
/// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn cross_entropy(
    logits_nchw: &Tensor,
    labels_nhw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &CrossEntropy,
) -> Result<Tensor> {
    let [n, c, h, w] = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    let grid = [n, h, w];
    let labels = read_map(LOSS, "labels_nhw", labels_nhw, grid)?;
    let valid = read_valid(LOSS, valid_nhw, grid)?;
    let class_weights = match &cfg.class_weights {
        None => vec![1.0; c],
        Some(weights) => checked_weights(weights, c)?,
    };
    let mut targets = Vec::with_capacity(labels.len());
    let mut total_weight = 0.0;
    for (at, (&label, &counted)) in labels.iter().zip(&valid).enumerate() {
        if counted == 0 {
            targets.push(None);
            continue;
        }
        let Some(weight) = class_weights.get(usize::from(label)) else {
            let [image, row, column] = place(at, grid);
            return Err(LossError::Label { image, row, column, value: label, n_classes: c });
        };
        total_weight += weight;
        targets.push(Some(label));
    }
    let batch = Batch { n, c, m: h * w, targets, class_weights, total_weight };
    let logits = logits_nchw.to_device(&Device::Cpu)?.contiguous()?;
    let loss = match logits.dtype() {
        DType::F64 => logits.apply_op1(Fused::<f64> { batch, statistics: OnceLock::new() })?,
        _ => logits.apply_op1(Fused::<f32> { batch, statistics: OnceLock::new() })?,
    };
    Ok(loss.to_device(logits_nchw.device())?)
}

fn checked_weights(weights: &[f64], c: usize) -> Result<Vec<f64>> {
    const HINT: &str = "give one finite weight of at least 0 for each class of the logits";
    if weights.len() != c {
        return Err(LossError::config(format!("class_weights has {} weights, expected {c}", weights.len()), HINT));
    }
    match weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        Some(class) => Err(LossError::config(format!("class_weights[{class}] is {}", weights[class]), HINT)),
        None => Ok(weights.to_vec()),
    }
}

/// What is known before the logits are read.
struct Batch {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    class_weights: Vec<f64>,
    total_weight: f64,
}

/// The softmax of each counted pixel, up to the exponentials: `softmax_c = exp(z_c - peak) / sum`.
struct Statistics<T> {
    peak: Vec<T>,
    sum: Vec<T>,
}

struct Fused<T> {
    batch: Batch,
    statistics: OnceLock<Statistics<T>>,
}

impl<T: Real> Fused<T> {
    fn forward(&self, logits: &[T]) -> (f64, Statistics<T>) {
        let Batch { n, c, m, targets, class_weights, total_weight } = &self.batch;
        let (c, m) = (*c, *m);
        let mut peak = vec![T::zero(); n * m];
        let mut sum = vec![T::zero(); n * m];
        // The runs of an image start anew at each image, so that an item's runs do not depend on its neighbours.
        let pieces: Vec<_> =
            pixel_runs(&mut peak, 1, m, RUN).into_iter().zip(pixel_runs(&mut sum, 1, m, RUN)).collect();
        let partial: Vec<f64> = pieces
            .into_par_iter()
            .map(|(mut peaks, mut sums)| {
                let (start, len) = (peaks.start, peaks.len());
                let row = |channel: usize| &logits[(peaks.image * c + channel) * m + start..][..len];
                let targets = &targets[peaks.image * m + start..][..len];
                let (peak, sum) = (&mut *peaks.rows[0], &mut *sums.rows[0]);
                peak.copy_from_slice(row(0));
                for channel in 1..c {
                    for (p, &z) in peak.iter_mut().zip(row(channel)) {
                        *p = if z > *p { z } else { *p };
                    }
                }
                for channel in 0..c {
                    for ((s, &p), &z) in sum.iter_mut().zip(&*peak).zip(row(channel)) {
                        *s += (z - p).exp();
                    }
                }
                let mut loss = 0.0;
                for (i, target) in targets.iter().enumerate() {
                    if let Some(class) = target.map(usize::from) {
                        let margin = peak[i] - row(class)[i];
                        loss += class_weights[class] * (margin.wide() + sum[i].wide().ln());
                    }
                }
                loss
            })
            .collect();
        let loss = if *total_weight > 0.0 { partial.iter().sum::<f64>() / *total_weight } else { 0.0 };
        (loss, Statistics { peak, sum })
    }

    fn backward(&self, logits: &[T], statistics: &Statistics<T>, grad_loss: f64) -> Vec<T> {
        let Batch { n, c, m, targets, class_weights, total_weight } = &self.batch;
        let (c, m) = (*c, *m);
        let mut grad = vec![T::zero(); n * c * m];
        if *total_weight <= 0.0 {
            return grad;
        }
        pixel_runs(&mut grad, c, m, RUN).into_par_iter().for_each(|mut run| {
            let (image, start, len) = (run.image, run.start, run.len());
            let at = image * m + start;
            let targets = &targets[at..][..len];
            let peak = &statistics.peak[at..][..len];
            // A pixel's factor is its share of the mean over its sum of exponentials.
            let factors: Vec<T> = targets
                .iter()
                .zip(&statistics.sum[at..][..len])
                .map(|(target, sum)| match target {
                    Some(class) => {
                        T::narrow(grad_loss * class_weights[usize::from(*class)] / (total_weight * sum.wide()))
                    }
                    None => T::zero(),
                })
                .collect();
            for (channel, row) in run.rows.iter_mut().enumerate() {
                let z = &logits[(image * c + channel) * m + start..][..len];
                for i in 0..len {
                    // Not multiplied out for void pixels: their logits may be anything, NaN included.
                    if targets[i].is_some() {
                        row[i] = factors[i] * (z[i] - peak[i]).exp();
                    }
                }
            }
            for (i, target) in targets.iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    run.rows[class][i] -= T::narrow(grad_loss * class_weights[class] / total_weight);
                }
            }
        });
        grad
    }
}

impl<T: Real> CustomOp1 for Fused<T> {
    fn name(&self) -> &'static str {
        LOSS
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (loss, statistics) = self.forward(slice(storage, layout)?);
        // A second forward of the same operation cannot happen, and would store the same numbers.
        let _ = self.statistics.set(statistics);
        Ok((T::to_cpu_storage_owned(vec![T::narrow(loss)]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad_loss = grad_loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let statistics = self.statistics.get().expect("the forward pass stored its statistics");
        let grad = with_slice(logits, |z| Ok(self.backward(z, statistics, grad_loss)))?;
        Ok(Some(Tensor::from_vec(grad, logits.dims(), &Device::Cpu)?))
    }
}
