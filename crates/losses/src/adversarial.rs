//! The two sides of the game with a discriminator, as functions of its scores.
//!
//! The discriminator and the gradient of its penalty are the business of the crate of models.

use candle_core::{DType, Tensor};
use segdistill_ops::relu;

use crate::error::{LossError, Result};

/// Loss of a Wasserstein discriminator without its penalty: `L = mean_i D(s_i) - mean_i D(t_i)`.
///
/// # Shapes
/// - `student_scores_n`, `teacher_scores_n`: `[n]`, f32 or f64, of one type; the numbers of images may differ
/// - returns `[]`
/// # Gradient
/// Reaches both: `1/n` to the student's scores, `-1/n` to the teacher's. Both are the discriminator's.
/// # Errors
/// `Shape` when a tensor is no vector or empty; `DType`.
/// # Source
/// Liu et al. 2019 (SKD), section 3.2; Arjovsky et al. 2017. SKD's code adds 10 times the gradient penalty and weighs the
/// sum by 0.1.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let [student, teacher] = [Tensor::new(&[0.5f32, 1.5], &Device::Cpu)?, Tensor::new(&[3f32, 4.0], &Device::Cpu)?];
/// assert_eq!(segdistill_losses::wgan_critic(&student, &teacher)?.to_scalar::<f32>()?, -2.5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn wgan_critic(student_scores_n: &Tensor, teacher_scores_n: &Tensor) -> Result<Tensor> {
    check("wgan_critic", &[("student_scores_n", student_scores_n), ("teacher_scores_n", teacher_scores_n)])?;
    Ok((student_scores_n.mean_all()? - teacher_scores_n.mean_all()?)?)
}

/// What the student loses to a Wasserstein discriminator: `L = -mean_i D(s_i)`.
///
/// # Shapes
/// - `student_scores_n`: `[n]`, f32 or f64
/// - returns `[]`
/// # Gradient
/// `-1/n` to each score, and through the discriminator to the student's map.
/// # Errors
/// As [`wgan_critic`].
/// # Source
/// As [`wgan_critic`]; SKD's code weighs it by 0.1.
pub fn wgan_student(student_scores_n: &Tensor) -> Result<Tensor> {
    check("wgan_student", &[("student_scores_n", student_scores_n)])?;
    Ok(student_scores_n.mean_all()?.neg()?)
}

/// Loss of a discriminator with margins: `L = mean_i max(1 - D(t_i), 0) + mean_i max(1 + D(s_i), 0)`.
///
/// # Shapes
/// As [`wgan_critic`]
/// # Gradient
/// Reaches both, where a score is on the wrong side of its margin; on the margin it is 0.
/// # Errors
/// As [`wgan_critic`].
/// # Source
/// Lim and Ye 2017, as the code of Yang et al. 2022 (CIRKD) trains SKD's discriminator, weighed by 0.1.
pub fn hinge_critic(student_scores_n: &Tensor, teacher_scores_n: &Tensor) -> Result<Tensor> {
    check("hinge_critic", &[("student_scores_n", student_scores_n), ("teacher_scores_n", teacher_scores_n)])?;
    let teacher = margin(&teacher_scores_n.affine(-1.0, 1.0)?)?;
    Ok((teacher + margin(&student_scores_n.affine(1.0, 1.0)?)?)?)
}

/// What the student loses to a discriminator with margins: `L = -mean_i D(s_i)`, as [`wgan_student`].
///
/// # Shapes
/// As [`wgan_student`]
/// # Gradient
/// As [`wgan_student`].
/// # Errors
/// As [`wgan_critic`].
/// # Source
/// As [`hinge_critic`], weighed by 0.001 there.
pub fn hinge_student(student_scores_n: &Tensor) -> Result<Tensor> {
    check("hinge_student", &[("student_scores_n", student_scores_n)])?;
    Ok(student_scores_n.mean_all()?.neg()?)
}

/// How far the slopes of a score are from 1: `P = mean_i (|g_i| - 1)^2`.
///
/// `g_i` is the gradient of the score with respect to map i. This is the function of the slopes alone; a penalty whose
/// gradient reaches the discriminator behind them is `Discriminator::gradient_penalty` of the crate of models.
///
/// # Shapes
/// - `slopes_n`: `[n]`, f32 or f64, the Euclidean norms
/// - returns `[]`
/// # Gradient
/// `2/n (|g_i| - 1)` to each slope.
/// # Errors
/// As [`wgan_critic`].
/// # Source
/// Gulrajani et al. 2017, equation 3; weighed by 10 there and in SKD.
pub fn gradient_penalty(slopes_n: &Tensor) -> Result<Tensor> {
    check("gradient_penalty", &[("slopes_n", slopes_n)])?;
    Ok(slopes_n.affine(1.0, -1.0)?.sqr()?.mean_all()?)
}

/// `mean_i max(x_i, 0)`.
fn margin(x_n: &Tensor) -> Result<Tensor> {
    let positive = relu(x_n).map_err(|error| match error {
        segdistill_ops::OpsError::Candle(error) => LossError::Candle(error),
        other => LossError::Candle(candle_core::Error::Msg(other.to_string())),
    })?;
    Ok(positive.mean_all()?)
}

fn check(loss: &'static str, scores: &[(&'static str, &Tensor)]) -> Result<()> {
    let dtype = scores[0].1.dtype();
    for &(tensor, t) in scores {
        if !matches!(t.dtype(), DType::F32 | DType::F64) || t.dtype() != dtype {
            let (found, expected) = (t.dtype(), "f32 or f64, one type for all");
            return Err(LossError::DType { loss, tensor, found, expected, hint: "convert the scores first" });
        }
        if t.rank() != 1 || t.elem_count() == 0 {
            let hint = "average the scores of an image's windows first";
            return Err(LossError::shape(loss, format!("{tensor} {:?}", t.dims()), "[n], one number an image", hint));
        }
    }
    Ok(())
}
