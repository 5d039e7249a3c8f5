//! Cross entropy of class logits and labels, fused over the map.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use segdistill_ops::{graph, pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::host::{Real, slice, with_slice};
use crate::mask::{logits_dims, place, read_map, read_valid};

const LOSS: &str = "cross_entropy";
/// Pixels of one task: the logits of a dozen classes stay in a level 2 cache.
const RUN: usize = 2048;

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
/// gradients. Values do not depend on the number of threads. On CUDA the map stays on
/// the device, its targets are prepared on the host.
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
    #[cfg(feature = "cuda")]
    if logits_nchw.device().is_cuda() {
        let targets: Vec<i16> = targets.iter().map(|target| target.map_or(-1, i16::from)).collect();
        return segdistill_ops::cuda::cross_entropy(logits_nchw, &targets, &class_weights, total_weight)
            .map_err(LossError::from_ops);
    }
    let batch = Batch { n, c, m: h * w, targets, class_weights, total_weight };
    let logits = logits_nchw.to_device(&Device::Cpu)?.contiguous()?;
    let loss = match logits.dtype() {
        DType::F64 => graph::apply1(&logits, Fused::<f64> { batch, statistics: OnceLock::new() })?,
        _ => graph::apply1(&logits, Fused::<f32> { batch, statistics: OnceLock::new() })?,
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

struct Fused<T> {
    batch: Batch,
    /// Largest logit and sum of exponentials of each pixel, `[n, 2, m]`: `softmax_c = exp(z_c - peak) / sum`.
    statistics: OnceLock<Vec<T>>,
}

impl<T: Real> Fused<T> {
    fn forward(&self, logits: &[T]) -> (f64, Vec<T>) {
        let Batch { n, c, m, targets, class_weights, total_weight } = &self.batch;
        let (c, m) = (*c, *m);
        let (statistics, partial) = pixel_runs([*n, 2, m], RUN, |image, start, rows| {
            let [peak, sum] = rows else { unreachable!("two rows were asked for") };
            let len = peak.len();
            let row = |channel: usize| &logits[(image * c + channel) * m + start..][..len];
            let mut logs = vec![T::zero(); len];
            vectorised(
                #[inline(always)]
                || {
                    peak.copy_from_slice(row(0));
                    for channel in 1..c {
                        for (p, &z) in peak.iter_mut().zip(row(channel)) {
                            *p = if z > *p { z } else { *p };
                        }
                    }
                    for channel in 0..c {
                        for ((s, &p), &z) in sum.iter_mut().zip(&**peak).zip(row(channel)) {
                            *s += (z - p).exp();
                        }
                    }
                    for (log, &s) in logs.iter_mut().zip(&**sum) {
                        *log = s.ln();
                    }
                },
            );
            let mut loss = 0.0;
            for (i, target) in targets[image * m + start..][..len].iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    let margin = peak[i] - row(class)[i];
                    loss += class_weights[class] * (margin.wide() + logs[i].wide());
                }
            }
            loss
        });
        let loss = if *total_weight > 0.0 { partial.iter().sum::<f64>() / *total_weight } else { 0.0 };
        (loss, statistics)
    }

    fn backward(&self, logits: &[T], statistics: &[T], grad_loss: f64) -> Vec<T> {
        let Batch { n, c, m, targets, class_weights, total_weight } = &self.batch;
        let (c, m) = (*c, *m);
        if *total_weight <= 0.0 {
            return vec![T::zero(); *n * c * m];
        }
        // What a counted pixel of a class adds to the mean.
        let shares: Vec<f64> = class_weights.iter().map(|weight| grad_loss * weight / total_weight).collect();
        let fill = |image: usize, start: usize, rows: &mut [&mut [T]]| {
            let len = rows[0].len();
            let row = |k: usize| &statistics[(image * 2 + k) * m + start..][..len];
            let (peak, sum) = (row(0), row(1));
            let targets = &targets[image * m + start..][..len];
            let factor = |(target, sum): (&Option<u8>, &T)| match target {
                Some(class) => T::narrow(shares[usize::from(*class)] / sum.wide()),
                None => T::zero(),
            };
            let factors: Vec<T> = targets.iter().zip(sum).map(factor).collect();
            vectorised(
                #[inline(always)]
                || {
                    for (channel, row) in rows.iter_mut().enumerate() {
                        let z = &logits[(image * c + channel) * m + start..][..len];
                        for (((g, &z), &p), &factor) in row.iter_mut().zip(z).zip(peak).zip(&factors) {
                            let value = factor * (z - p).exp();
                            // Not multiplied out for void pixels: their logits may be anything, NaN included.
                            *g = if factor == T::zero() { T::zero() } else { value };
                        }
                    }
                },
            );
            for (i, target) in targets.iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    rows[class][i] -= T::narrow(shares[class]);
                }
            }
        };
        pixel_runs([*n, c, m], RUN, fill).0
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
