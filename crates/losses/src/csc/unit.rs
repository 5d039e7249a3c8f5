//! Equation 1: pixels as unit vectors over the classes, and the way back for gradients.

use crate::host::Real;

/// Norms up to this are taken as 0: the pixel has no direction. PyTorch's `normalize` has the same number.
pub(super) const EPSILON: f64 = 1e-12;

/// Unit vectors of consecutive pixels, one row a class, in f64 so that the difference of two networks that nearly
/// agree keeps its digits.
pub(super) struct Units {
    /// Pixels.
    pub(super) len: usize,
    /// `[c, len]`: `z / ||z||`, 0 where the pixel does not count or has no direction.
    pub(super) f: Vec<f64>,
    /// `[len]`: `1 / ||z||`, 0 where `f` is.
    pub(super) inverse_norm: Vec<f64>,
}

impl Units {
    /// Pixels `start..start + len` of an image `[c, m]`.
    pub(super) fn new<T: Real>(logits_cm: &[T], valid: &[u8], start: usize, len: usize) -> Self {
        let m = valid.len();
        let valid = &valid[start..start + len];
        let mut f = Vec::with_capacity(logits_cm.len() / m * len);
        let mut inverse_norm = vec![0.0; len];
        for row in logits_cm.chunks(m) {
            for ((sum, z), &counted) in inverse_norm.iter_mut().zip(&row[start..start + len]).zip(valid) {
                // A choice, not a product: the logits of a void pixel may be anything, NaN included.
                let z = if counted == 1 { z.wide() } else { 0.0 };
                *sum += z * z;
                f.push(z);
            }
        }
        for value in &mut inverse_norm {
            let norm = value.sqrt();
            // NaN fails the comparison and goes on, to be seen in the loss.
            *value = if norm <= EPSILON { 0.0 } else { 1.0 / norm };
        }
        for row in f.chunks_mut(len) {
            for (z, &inverse) in row.iter_mut().zip(&inverse_norm) {
                *z *= inverse;
            }
        }
        Self { len, f, inverse_norm }
    }

    /// The row of one class.
    pub(super) fn row(&self, class: usize) -> &[f64] {
        &self.f[class * self.len..][..self.len]
    }

    /// Writes `scale * dL/dz` from `dL/df` (`[c, stride]`, its first `len` columns):
    /// `dL/dz = (dL/df - f (f . dL/df)) / ||z||`.
    pub(super) fn chain<T: Real>(&self, grad_f: &[f64], stride: usize, scale: f64, grad_rows: &mut [&mut [T]]) {
        let mut along = vec![0.0; self.len];
        for (class, grad) in grad_f.chunks(stride).enumerate() {
            for ((along, f), g) in along.iter_mut().zip(self.row(class)).zip(grad) {
                *along += f * g;
            }
        }
        for ((class, grad), out) in grad_f.chunks(stride).enumerate().zip(grad_rows) {
            let f = self.row(class);
            for i in 0..self.len {
                out[i] = T::narrow(scale * (grad[i] - f[i] * along[i]) * self.inverse_norm[i]);
            }
        }
    }
}
