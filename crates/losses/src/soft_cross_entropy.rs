//! Cross entropy with the teacher's class distribution as its target, pixel by pixel.

use candle_core::Tensor;

use crate::error::Result;
use crate::pixel_kl::{KlNormaliser, soft_targets};

/// Settings of [`soft_cross_entropy`](crate::soft_cross_entropy()).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftCrossEntropy {
    /// Temperature `T` that both networks' logits are divided by, above 0.
    pub temperature: f64,
    /// What the sum over pixels is divided by.
    pub normaliser: KlNormaliser,
}

impl Default for SoftCrossEntropy {
    fn default() -> Self {
        Self::skd()
    }
}

impl SoftCrossEntropy {
    /// SKD's pixel-wise term, weighed 10 there: temperature 1, summed over the images.
    pub fn skd() -> Self {
        Self { temperature: 1.0, normaliser: KlNormaliser::ImageSum }
    }
}

/// Cross entropy of the student with the teacher's class distribution, pixel by pixel.
///
/// `L = -T^2/Z * sum_{i in V} sum_c p_t(c|i) * log p_s(c|i)` with `p = softmax(z / T)` over the classes, in nats. `Z` is
/// `h w` ([`KlNormaliser::ImageSum`]) or the number of valid pixels of the batch ([`KlNormaliser::MeanPixel`]). It is
/// [`pixel_kl`](crate::pixel_kl()) plus the teacher's entropy, which no student moves.
///
/// # Shapes
/// - `student_logits_nchw`, `teacher_logits_nchw`: `[n, c, h, w]`, equal, f32 or f64
/// - `valid_nhw`: `[n, h, w]` u8 on the logits' grid, 1 where counted, 0 elsewhere
/// - returns `[]` of the logits' type
/// # Gradient
/// `T/Z * (p_s - p_t)` to the student, that of [`pixel_kl`](crate::pixel_kl()); 0 at pixels that do not count. The
/// teacher is detached here. With no valid pixel value and gradient are 0.
/// # Errors
/// `Shape` when student, teacher and mask differ (nothing is resized here); `DType`, also when the two networks'
/// types differ; `Mask` for a mask value above 1; `Config` unless the temperature is finite and above 0.
/// # Source
/// SKD (Liu et al. 2019), the pixel-wise criterion of its code: temperature 1, summed over the batch, divided by `h w`.
/// DIFFERENCE: void pixels count there; the divisor stays `h w` here, so that a pixel that counts gets the gradient it
/// gets there. Values do not depend on the number of threads. Logits on another device are brought to the host.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_losses::{SoftCrossEntropy, soft_cross_entropy};
/// // Where both are undecided between two classes, the teacher's entropy remains.
/// let logits = Tensor::zeros((1, 2, 3, 4), DType::F32, &Device::Cpu)?;
/// let valid = Tensor::ones((1, 3, 4), DType::U8, &Device::Cpu)?;
/// let loss = soft_cross_entropy(&logits, &logits, &valid, &SoftCrossEntropy::default())?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn soft_cross_entropy(
    student_logits_nchw: &Tensor,
    teacher_logits_nchw: &Tensor,
    valid_nhw: &Tensor,
    cfg: &SoftCrossEntropy,
) -> Result<Tensor> {
    let SoftCrossEntropy { temperature, normaliser } = *cfg;
    soft_targets::<false>(student_logits_nchw, teacher_logits_nchw, valid_nhw, temperature, normaliser)
}
