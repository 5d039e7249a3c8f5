//! CSC as the source writes it, in candle's tensor operations: quadratic in the pixels, for tests and for reading.

use candle_core::{Device, Result, Tensor};

use super::Task;
use super::unit::EPSILON;

/// Equations 1 to 5, image by image, mean over the batch.
pub(super) fn csc(student_nchw: &Tensor, task: &Task) -> Result<Tensor> {
    let mut loss = Tensor::zeros((), student_nchw.dtype(), &Device::Cpu)?;
    for image in 0..task.n {
        let valid = Tensor::from_slice(task.valid(image), (1, task.m), &Device::Cpu)?;
        let similarity = |logits_nchw: &Tensor| pair_similarity(&logits_nchw.get(image)?.flatten_from(1)?, &valid);
        // Equation 5: the squared Euclidean norm of the difference, over the number of pairs.
        let difference = (similarity(&task.teacher)? - similarity(student_nchw)?)?;
        // A tensor, since candle gives no gradient at all through a product with the number 0.
        let scale = Tensor::new(task.scales[image], &Device::Cpu)?.to_dtype(student_nchw.dtype())?;
        loss = (loss + (difference.sqr()?.sum_all()? * scale)?)?;
    }
    Ok(loss)
}

/// Equations 1 to 4 for one image `[c, m]`: the similarity of each pair of pixels, `[m, m]`.
fn pair_similarity(logits_cm: &Tensor, valid: &Tensor) -> Result<Tensor> {
    let c = logits_cm.dim(0)?;
    let valid = valid.broadcast_as(logits_cm.dims())?.contiguous()?;
    let z = valid.where_cond(logits_cm, &logits_cm.zeros_like()?)?;
    // Equation 1. A pixel without direction is 0, and its norm is replaced by 1 to keep the square root smooth.
    let squares = z.sqr()?.sum_keepdim(0)?;
    let directed = squares.gt(EPSILON * EPSILON)?;
    let norm = directed.where_cond(&squares, &squares.ones_like()?)?.sqrt()?;
    let f = z.broadcast_div(&norm)?.broadcast_mul(&directed.to_dtype(z.dtype())?)?;
    // Equations 2 and 3: the products with every circular shift along the classes, one below the other: M [c^2, m].
    let shifted = |s: usize| match s {
        0 => Ok(f.clone()),
        s => Tensor::cat(&[f.narrow(0, s, c - s)?, f.narrow(0, 0, s)?], 0),
    };
    let products = (0..c).map(|s| &f * shifted(s)?).collect::<Result<Vec<_>>>()?;
    let m = Tensor::cat(&products, 0)?;
    // Equation 4.
    m.t()?.matmul(&m)
}
