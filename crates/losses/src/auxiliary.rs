//! The sum of a main loss and those of auxiliary heads.

use candle_core::Tensor;

use crate::error::{LossError, Result};

const LOSS: &str = "with_auxiliary";

/// A main loss and those of auxiliary heads, each with its weight.
///
/// `L = main + sum_i w_i * auxiliary_i`. PSPNet and the distillation papers that train like it (SKD, CIRKD) take one
/// auxiliary head with weight 0.4, and leave it out of the network that is kept.
///
/// # Shapes
/// - `main` and every auxiliary loss: `[]`, of one type
/// - returns `[]` of that type
/// # Gradient
/// 1 to the main loss, `w_i` to the auxiliary ones. A loss of weight 0 is left out, whatever its value.
/// # Errors
/// `Shape` when a loss is no scalar; `Config` for a weight that is negative or not finite; `Candle` when the types differ.
/// # Source
/// Zhao et al. 2017 (PSPNet), section 3.3.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let loss = |value: f32| Tensor::new(value, &Device::Cpu);
/// let sum = segdistill_losses::with_auxiliary(loss(2.0)?, &[(loss(0.5)?, 0.4)])?;
/// assert_eq!(sum.to_scalar::<f32>()?, 2.2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn with_auxiliary(main: Tensor, auxiliary: &[(Tensor, f64)]) -> Result<Tensor> {
    for loss in std::iter::once(&main).chain(auxiliary.iter().map(|(loss, _)| loss)) {
        if loss.rank() != 0 {
            return Err(LossError::shape(
                LOSS,
                format!("a loss {:?}", loss.dims()),
                "scalars []",
                "pass what a loss function returned",
            ));
        }
    }
    let mut sum = main;
    for (at, (loss, weight)) in auxiliary.iter().enumerate() {
        if !(weight.is_finite() && *weight >= 0.0) {
            return Err(LossError::config(
                format!("{LOSS}: weight {at} is {weight}"),
                "give a finite weight of at least 0; 0.4 is the usual one",
            ));
        }
        if *weight > 0.0 {
            sum = (sum + (loss * *weight)?)?;
        }
    }
    Ok(sum)
}
