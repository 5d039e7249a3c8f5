//! Channel and spatial correlation (CSC): the student should find the same pixels alike as the teacher does.
//!
//! Three forms of one number: [`letter`] as the source writes it, [`direct`] over pixel pairs, [`linear`] over class
//! pairs. `docs/methods.md` derives one from the other.

use candle_core::{DType, Device, Tensor};
use segdistill_ops::graph;

use crate::error::Result;
use crate::mask::{pair_dims, read_valid};

mod direct;
mod letter;
mod linear;
mod unit;

const LOSS: &str = "csc";

/// How [`csc`] is computed; the value is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CscForm {
    /// `Direct` for small maps, `Linear` for the others, by size alone.
    #[default]
    Auto,
    /// Equations 1 to 5 of the source, one candle operation after the other, with candle's own gradient. Time
    /// `c^2 m^2` and several `[m, m]` matrices in memory for `m = h w` pixels: an oracle for tests and for reading,
    /// never for training.
    Letter,
    /// Squared cosines of all pixel pairs, tile by tile: time `c m^2`, memory linear in `m`. Computed in f64.
    Direct,
    /// Gram matrices over the `c (c + 1) / 2` class pairs: time `c^4 m`, memory linear in `m`.
    Linear,
}

/// Settings of [`csc`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Csc {
    /// How the number is computed.
    pub form: CscForm,
}

/// Channel and spatial correlation loss: squared difference of the two networks' pixel-pair similarities.
///
/// `L = 1/n * sum_images 1/V^2 * sum_{x,y in V} (S^t_xy - S^s_xy)^2` with `S_xy = (f_x . f_y)^2`, `f_x = z_x / ||z_x||`
/// over the classes: each similarity is a squared cosine in [0, 1]. `V` is the number of valid pixels of the image,
/// `h w` where all are: the loss is the mean over the pairs that count, void or not. An image without valid pixels adds
/// 0, and is counted in `n`.
///
/// # Shapes
/// - `student_logits_nchw`, `teacher_logits_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `valid_nhw`: `[n, h, w]` u8 on the logits' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// Reaches the student only: the teacher is detached here. Exact in each form. A pixel that does not count moves
/// nothing, whatever its logits. A pixel whose norm is at most 1e-12 (PyTorch's `normalize` epsilon) has `f = 0`, is
/// like no pixel, and gets gradient 0. The loss is blind to the sign and length of a pixel's logits, and its gradient
/// vanishes between orthogonal pixels: it complements a supervised term and does not replace one. It is blind, too, to
/// an orthogonal map over the classes: a student whose logits are the teacher's with two classes exchanged has loss 0
/// and gradient 0, up to rounding.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1.
/// # Source
/// KR102191351B1 (Park and Heo, Sensors 2020, 20, 4616), equations 1 to 5. The normaliser of equation 5 is not known;
/// the mean over pixel pairs is our reading. DIFFERENCE: read without void pixels that mean is `1/(h w)^2`, and so the
/// project first wrote it; with void pixels, `V < h w`, we divide by `V^2`, so that an image's weight does not sink
/// with its labelled share. Without void pixels the two are equal; otherwise ours is `(h w / V)^2` times the other.
/// Values do not depend on the number of threads. Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use segdistill_losses::{Csc, csc};
/// // Two pixels: orthogonal for the student, equal for the teacher, so two of four pairs differ by 1.
/// let student = Var::new(&[[[[1f32, 0.0]], [[0.0, 2.0]]]], &Device::Cpu)?;
/// let teacher = Tensor::new(&[[[[3f32, 1.0]], [[0.0, 0.0]]]], &Device::Cpu)?;
/// let valid = Tensor::ones((1, 1, 2), DType::U8, &Device::Cpu)?;
/// let loss = csc(&student, &teacher, &valid, &Csc::default())?;
/// assert_eq!(loss.to_scalar::<f32>()?, 0.5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn csc(
    student_logits_nchw: &Tensor,
    teacher_logits_nchw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &Csc,
) -> Result<Tensor> {
    let names = ["student_logits_nchw", "teacher_logits_nchw"];
    let [n, c, h, w] = pair_dims(LOSS, names, student_logits_nchw, teacher_logits_nchw)?;
    let valid = read_valid(LOSS, valid_nhw, [n, h, w])?;
    let scales = valid.chunks(h * w).map(|image| scale(image, n)).collect();
    let teacher = teacher_logits_nchw.detach().to_device(&Device::Cpu)?.contiguous()?;
    let task = Task { n, c, m: h * w, teacher, valid, scales };
    let student = student_logits_nchw.to_device(&Device::Cpu)?.contiguous()?;
    let wide = student.dtype() == DType::F64;
    let loss = match resolve(cfg.form, c, h * w) {
        CscForm::Letter => letter::csc(&student, &task)?,
        CscForm::Direct if wide => graph::apply1(&student, direct::Direct::<f64>::new(task))?,
        CscForm::Direct => graph::apply1(&student, direct::Direct::<f32>::new(task))?,
        _ if wide => graph::apply1(&student, linear::Linear::<f64>::new(task))?,
        _ => graph::apply1(&student, linear::Linear::<f32>::new(task))?,
    };
    Ok(loss.to_device(student_logits_nchw.device())?)
}

/// Weight of an image's pixel pairs in the mean: `1 / (n V^2)`, 0 where nothing is valid.
fn scale(valid: &[u8], n: usize) -> f64 {
    let count = valid.iter().filter(|&&v| v == 1).count() as f64;
    if count > 0.0 { 1.0 / (n as f64 * count * count) } else { 0.0 }
}

fn resolve(form: CscForm, c: usize, m: usize) -> CscForm {
    match form {
        CscForm::Auto if m <= direct_limit(c) => CscForm::Direct,
        CscForm::Auto => CscForm::Linear,
        chosen => chosen,
    }
}

/// Largest number of pixels for which the direct form is at least as fast. Counting operations gives `3 k^2 / c`;
/// measured on two cores, value and gradient, the forms meet at 0.3 to 0.6 `k^2 / c` for 11, 12 and 19 classes, since
/// the direct form computes in f64 and touches each pair.
fn direct_limit(c: usize) -> usize {
    let k = class_pairs(c);
    k * k / (2 * c)
}

/// Unordered pairs of classes, equal ones included: `c (c + 1) / 2`.
fn class_pairs(c: usize) -> usize {
    c * (c + 1) / 2
}

/// What is known before the student's logits are read.
struct Task {
    n: usize,
    c: usize,
    /// Pixels of an image.
    m: usize,
    /// `[n, c, h, w]`, on the host, contiguous, without graph.
    teacher: Tensor,
    /// `n * m` values, 0 or 1.
    valid: Vec<u8>,
    /// Weight of each image's sum over pixel pairs.
    scales: Vec<f64>,
}

impl Task {
    /// The mask of one image.
    fn valid(&self, image: usize) -> &[u8] {
        &self.valid[image * self.m..][..self.m]
    }

    /// The logits of one image, `[c, m]`.
    fn image<'a, T>(&self, logits: &'a [T], image: usize) -> &'a [T] {
        &logits[image * self.c * self.m..][..self.c * self.m]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_chooses_the_form() {
        assert_eq!(resolve(CscForm::Auto, 11, 12 * 15), CscForm::Direct);
        assert_eq!(resolve(CscForm::Auto, 11, 45 * 60), CscForm::Linear);
        assert_eq!(resolve(CscForm::Auto, 19, 512 * 1024), CscForm::Linear);
        assert_eq!(resolve(CscForm::Letter, 19, 512 * 1024), CscForm::Letter);
    }

    #[test]
    fn pairs_of_an_image_weigh_one_in_sum() {
        assert_eq!(scale(&[1, 0, 1, 1], 2) * 9.0, 0.5);
        assert_eq!(scale(&[0, 0], 2), 0.0);
    }
}
