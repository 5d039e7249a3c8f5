//! Pixel relations across images (CIRKD, Yang et al., CVPR 2022): the student's distribution of similarities over other
//! pixels should be the teacher's.
//!
//! [`mini_batch`] compares with the pixels of the same batch, [`memory`] with vectors kept from earlier ones. No memory
//! is kept here: that is training state.

mod memory;
mod mini_batch;

pub use memory::{MemoryContrast, memory_contrast};
pub use mini_batch::{MiniBatchContrast, cirkd_mini_batch};

use crate::error::{LossError, Result};

/// Exponents of f32 below 80 leave no result out of range, nor a sum of many; beyond, f64 takes over, up to 600.
const WIDEST: [f64; 2] = [80.0, 600.0];

fn check_temperature(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(LossError::config(format!("{name} is {value}, expected a finite number above 0"), "CIRKD takes 0.1"))
}

/// Refuses logits whose range (`2 / temperature` between cosines) no exponential holds.
fn check_range(range: f64) -> Result<()> {
    if range <= WIDEST[1] || range.is_nan() {
        return Ok(());
    }
    Err(LossError::config(
        format!("the temperature spreads similarities over {range:.0}, expected at most {}", WIDEST[1]),
        "raise the temperature, CIRKD takes 0.1; below 1/300 a softmax of cosines is a maximum",
    ))
}

/// Values on a side of a fixed-size inner loop, whatever the processor: sums are added up in one order.
const LANES: usize = 16;

/// What a row of similarities sums to.
#[derive(Clone, Copy, Default)]
struct RowSums {
    /// Exponentials of the student.
    student: f64,
    /// Exponentials of the teacher.
    teacher: f64,
    /// The teacher's exponentials times the difference of the similarities, teacher less student.
    gap: f64,
}

impl RowSums {
    /// `KL(t || s)` of the row in nats, of logits that are similarities times `rate`.
    fn divergence(&self, rate: f64) -> f64 {
        rate * self.gap / self.teacher + self.student.ln() - self.teacher.ln()
    }
}
