//! What the supervised losses read before the logits: the labelled class of each pixel that counts, class weights.

use candle_core::Tensor;

use crate::error::{LossError, Result};
use crate::mask::{place, read_map, read_valid};

/// The labelled class of each pixel, `None` where the pixel does not count; row-major.
pub(crate) fn read_targets(
    loss: &'static str,
    labels_nhw: &Tensor,
    valid_nhw: &Tensor,
    [n, c, h, w]: [usize; 4],
) -> Result<Vec<Option<u8>>> {
    let grid = [n, h, w];
    let labels = read_map(loss, "labels_nhw", labels_nhw, grid)?;
    let valid = read_valid(loss, valid_nhw, grid)?;
    let mut targets = Vec::with_capacity(labels.len());
    for (at, (&label, &counted)) in labels.iter().zip(&valid).enumerate() {
        if counted == 1 && usize::from(label) >= c {
            let [image, row, column] = place(at, grid);
            return Err(LossError::Label { image, row, column, value: label, n_classes: c });
        }
        targets.push((counted == 1).then_some(label));
    }
    Ok(targets)
}

/// One weight a class, `None` being 1 for each.
pub(crate) fn checked_weights(name: &'static str, weights: Option<&[f64]>, c: usize) -> Result<Vec<f64>> {
    const HINT: &str = "give one finite weight of at least 0 for each class of the logits";
    let Some(weights) = weights else { return Ok(vec![1.0; c]) };
    if weights.len() != c {
        return Err(LossError::config(format!("{name} has {} weights, expected {c}", weights.len()), HINT));
    }
    match weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        Some(class) => Err(LossError::config(format!("{name}[{class}] is {}", weights[class]), HINT)),
        None => Ok(weights.to_vec()),
    }
}

/// Sum of the weights of the pixels that count.
pub(crate) fn total_weight(targets: &[Option<u8>], class_weights: &[f64]) -> f64 {
    let mut counts = vec![0u64; class_weights.len()];
    for class in targets.iter().flatten() {
        counts[usize::from(*class)] += 1;
    }
    counts.iter().zip(class_weights).map(|(&count, weight)| count as f64 * weight).sum()
}
