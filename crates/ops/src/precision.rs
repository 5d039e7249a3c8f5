//! What the factors of a product are rounded to.

use crate::error::{OpsError, Result};
use crate::kernels::bf16_kernels;

/// Precision of the products inside convolutions; weights, maps and sums are f32 whatever it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Factors as they are.
    #[default]
    F32,
    /// Factors rounded to bf16 (8 bits of mantissa, to nearest, ties to even), products summed in f32. Depthwise
    /// convolutions, which read and write more than they multiply, stay f32, and so do norms, losses and reductions.
    Bf16,
}

impl Precision {
    /// Every precision, the default first.
    pub const ALL: [Precision; 2] = [Precision::F32, Precision::Bf16];

    /// Name in recipes, plans and reports: `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// What carries it out on the CPU: the name of the kernels.
    ///
    /// # Errors
    /// `Config` for bf16 on a processor without instructions for it.
    pub fn on_cpu(self) -> Result<&'static str> {
        use crate::kernels::Kernels;
        match self {
            Precision::F32 => Ok(f32::kernel().name),
            Precision::Bf16 => bf16_kernels().first().map(|kernel| kernel.name).ok_or_else(|| {
                OpsError::config(
                    format!(
                        "bf16: this processor has neither AMX-BF16 nor AVX-512-BF16 (its f32 kernels are {})",
                        f32::kernel().name
                    ),
                    "use precision f32, which is no slower here",
                )
            }),
        }
    }
}
