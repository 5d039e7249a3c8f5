//! Cross entropy of class logits and labels, fused over the map.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;
use segdistill_ops::{graph, pixel_runs, vectorised};

use crate::error::{LossError, Result};
use crate::host::{Real, slice, with_slice};
use crate::mask::logits_dims;
use crate::softmax::{RUN, peaks_and_sums};
use crate::targets::{checked_weights, read_targets, total_weight};

const LOSS: &str = "cross_entropy";

/// Settings of [`cross_entropy`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// One weight a class, finite and not negative; `None` weighs all classes 1.
    pub class_weights: Option<Vec<f64>>,
    /// Share `e` of the target that is spread evenly over all classes, in [0, 1).
    pub label_smoothing: f64,
}

/// Cross entropy with the labelled class, averaged over the valid pixels of the whole batch.
///
/// `L = sum_{i in V} w_{y_i} * (log sum_c exp z_c(i) - z_{y_i}(i)) / sum_{i in V} w_{y_i}`, in nats. The exponentials
/// are taken relative to the largest logit of a pixel, so that no finite logit overflows.
///
/// Label smoothing `e` takes the share `1 - e` of that, and adds
/// `e/c * sum_{i in V} sum_k w_k * (log sum_c exp z_c(i) - z_k(i)) / sum_{i in V} w_{y_i}`: each class of the spread
/// target has its own weight, and the divisor stays that of the labelled classes.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64
/// - `labels_nhw`: `[n, h, w]` u8 in `0..c` where valid; never read elsewhere
/// - `valid_nhw`: `[n, h, w]` u8, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `w_{y_i} * (softmax(z(i))_c - [c = y_i]) / sum w` to the logits, 0 at pixels that do not count; the share `1 - e` of
/// that and `e/c * (softmax(z(i))_c * sum_k w_k - w_c) / sum w` with label smoothing. Where the weights of the counted
/// pixels sum to 0 (no valid pixel, say), value and gradient are 0; PyTorch gives NaN there.
/// # Errors
/// `Shape` when the grids differ (nothing is resized here); `DType`; `Label` for a label outside `0..c` at a valid
/// pixel; `Mask` for a mask value above 1; `Config` for weights of the wrong number, negative or not finite, and for a
/// label smoothing outside [0, 1).
/// # Source
/// The weighted mean of PyTorch's `nn.CrossEntropyLoss(weight, ignore_index, label_smoothing)`, checked against its
/// values and gradients; label smoothing is from Szegedy et al. 2016, section 7. Values do not depend on the number of
/// threads. On CUDA the map stays on the device, its targets are prepared on the host; with label smoothing it is
/// brought to the host.
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
    let dims = logits_dims(LOSS, "logits_nchw", logits_nchw)?;
    let targets = read_targets(LOSS, labels_nhw, valid_nhw, dims)?;
    let class_weights = checked_weights("class_weights", cfg.class_weights.as_deref(), dims[1])?;
    if !(0.0..1.0).contains(&cfg.label_smoothing) {
        return Err(LossError::config(
            format!("label_smoothing is {}", cfg.label_smoothing),
            "give a share of at least 0 and below 1; 0 keeps the labels as they are",
        ));
    }
    let batch = Batch::new(dims, targets, class_weights, cfg.label_smoothing);
    #[cfg(feature = "cuda")]
    if logits_nchw.device().is_cuda() && batch.label_smoothing == 0.0 {
        let targets: Vec<i16> = batch.targets.iter().map(|target| target.map_or(-1, i16::from)).collect();
        return segdistill_ops::cuda::cross_entropy(logits_nchw, &targets, &batch.class_weights, batch.total_weight)
            .map_err(LossError::from_ops);
    }
    let logits = logits_nchw.to_device(&Device::Cpu)?.contiguous()?;
    let loss = match logits.dtype() {
        DType::F64 => graph::apply1(&logits, Fused::<f64> { batch, statistics: OnceLock::new() })?,
        _ => graph::apply1(&logits, Fused::<f32> { batch, statistics: OnceLock::new() })?,
    };
    Ok(loss.to_device(logits_nchw.device())?)
}

/// What is known before the logits are read.
pub(crate) struct Batch {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// The class of each pixel that counts.
    targets: Vec<Option<u8>>,
    class_weights: Vec<f64>,
    label_smoothing: f64,
    total_weight: f64,
}

impl Batch {
    pub(crate) fn new(
        [n, c, h, w]: [usize; 4],
        targets: Vec<Option<u8>>,
        class_weights: Vec<f64>,
        label_smoothing: f64,
    ) -> Self {
        let total_weight = total_weight(&targets, &class_weights);
        Self { n, c, m: h * w, targets, class_weights, label_smoothing, total_weight }
    }

    /// The loss, and the largest logit and sum of exponentials of each pixel, `[n, 2, m]`:
    /// `softmax_c = exp(z_c - peak) / sum`.
    pub(crate) fn forward<T: Real>(&self, logits: &[T]) -> (f64, Vec<T>) {
        let Self { n, c, m, targets, class_weights, label_smoothing, total_weight } = self;
        let (c, m) = (*c, *m);
        let (hit, miss) = (1.0 - label_smoothing, label_smoothing / c as f64);
        let sum_of_weights: f64 = class_weights.iter().sum();
        let (statistics, partial) = pixel_runs([*n, 2, m], RUN, |image, start, rows| {
            let [peak, sum] = rows else { unreachable!("two rows were asked for") };
            let len = peak.len();
            let row = |channel: usize| &logits[(image * c + channel) * m + start..][..len];
            let mut logs = vec![T::zero(); len];
            // sum_k w_k * (peak - z_k), for the share of the target that is spread over the classes.
            let mut spread = vec![T::zero(); if miss > 0.0 { len } else { 0 }];
            vectorised(
                #[inline(always)]
                || {
                    peaks_and_sums(row, c, T::one(), peak, sum);
                    for (log, &s) in logs.iter_mut().zip(&**sum) {
                        *log = s.ln();
                    }
                    if miss > 0.0 {
                        for (channel, weight) in class_weights.iter().enumerate() {
                            let weight = T::narrow(*weight);
                            for ((spread, &p), &z) in spread.iter_mut().zip(&**peak).zip(row(channel)) {
                                *spread += weight * (p - z);
                            }
                        }
                    }
                },
            );
            let mut loss = 0.0;
            for (i, target) in targets[image * m + start..][..len].iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    let margin = peak[i] - row(class)[i];
                    loss += hit * class_weights[class] * (margin.wide() + logs[i].wide());
                    if miss > 0.0 {
                        loss += miss * (spread[i].wide() + sum_of_weights * logs[i].wide());
                    }
                }
            }
            loss
        });
        let loss = if *total_weight > 0.0 { partial.iter().sum::<f64>() / *total_weight } else { 0.0 };
        (loss, statistics)
    }

    /// Weighted mean of `f(pixel of the batch, class)` over the pixels that count.
    pub(crate) fn mean(&self, f: impl Fn(usize, u8) -> f64 + Sync) -> f64 {
        let sums: Vec<f64> = self
            .targets
            .par_chunks(RUN)
            .enumerate()
            .map(|(task, targets)| {
                let counted = targets.iter().enumerate().filter_map(|(i, target)| target.map(|class| (i, class)));
                counted.map(|(i, class)| self.class_weights[usize::from(class)] * f(task * RUN + i, class)).sum()
            })
            .collect();
        if self.total_weight > 0.0 { sums.iter().sum::<f64>() / self.total_weight } else { 0.0 }
    }

    /// The gradient of the `grad_loss`-fold, from the statistics that [`Self::forward`] gave.
    pub(crate) fn backward<T: Real>(&self, logits: &[T], statistics: &[T], grad_loss: f64) -> Vec<T> {
        let Self { n, c, m, targets, class_weights, label_smoothing, total_weight } = self;
        let (c, m) = (*c, *m);
        if *total_weight <= 0.0 {
            return vec![T::zero(); *n * c * m];
        }
        let share = |weight: f64| grad_loss * weight / total_weight;
        // What a counted pixel of a class adds to the mean: for its label, and for every class alike.
        let hits: Vec<f64> = class_weights.iter().map(|weight| (1.0 - label_smoothing) * share(*weight)).collect();
        let misses: Vec<f64> = class_weights.iter().map(|weight| label_smoothing / c as f64 * share(*weight)).collect();
        let all_misses: f64 = misses.iter().sum();
        let fill = |image: usize, start: usize, rows: &mut [&mut [T]]| {
            let len = rows[0].len();
            let row = |k: usize| &statistics[(image * 2 + k) * m + start..][..len];
            let (peak, sum) = (row(0), row(1));
            let targets = &targets[image * m + start..][..len];
            let factor = |(target, sum): (&Option<u8>, &T)| match target {
                Some(class) => T::narrow((hits[usize::from(*class)] + all_misses) / sum.wide()),
                None => T::zero(),
            };
            let factors: Vec<T> = targets.iter().zip(sum).map(factor).collect();
            vectorised(
                #[inline(always)]
                || {
                    for ((channel, row), miss) in rows.iter_mut().enumerate().zip(&misses) {
                        let z = &logits[(image * c + channel) * m + start..][..len];
                        let miss = T::narrow(*miss);
                        for (((g, &z), &p), &factor) in row.iter_mut().zip(z).zip(peak).zip(&factors) {
                            let value = factor * (z - p).exp() - miss;
                            // Not multiplied out for void pixels: their logits may be anything, NaN included.
                            *g = if factor == T::zero() { T::zero() } else { value };
                        }
                    }
                },
            );
            for (i, target) in targets.iter().enumerate() {
                if let Some(class) = target.map(usize::from) {
                    rows[class][i] -= T::narrow(hits[class]);
                }
            }
        };
        pixel_runs([*n, c, m], RUN, fill).0
    }
}

struct Fused<T> {
    batch: Batch,
    /// What [`Batch::forward`] gave.
    statistics: OnceLock<Vec<T>>,
}

impl<T: Real> CustomOp1 for Fused<T> {
    fn name(&self) -> &'static str {
        LOSS
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (loss, statistics) = self.batch.forward(slice(storage, layout)?);
        // A second forward of the same operation cannot happen, and would store the same numbers.
        let _ = self.statistics.set(statistics);
        Ok((T::to_cpu_storage_owned(vec![T::narrow(loss)]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad_loss = grad_loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let statistics = self.statistics.get().expect("the forward pass stored its statistics");
        let grad = with_slice(logits, |z| Ok(self.batch.backward(z, statistics, grad_loss)))?;
        Ok(Some(Tensor::from_vec(grad, logits.dims(), &Device::Cpu)?))
    }
}
