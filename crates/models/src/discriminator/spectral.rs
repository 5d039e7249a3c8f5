//! Convolutions divided by the largest singular value of their weight.

use candle_core::Tensor;
use segdistill_ops::{Init, Mode, ParamKind, Scope};

use super::KERNEL;
use super::dual::{Affine, host};
use crate::error::Result;

/// Added to no norm but taken instead of a smaller one.
const LEAST_NORM: f64 = 1e-12;

/// A convolution with weight `W / sigma`, `sigma = u^T W v`, where `W` is a matrix with one row for each output channel
/// and `u`, `v` are its singular vectors, followed by power iteration.
///
/// # Source
/// Miyato et al. 2018, algorithm 1; PyTorch `torch.nn.utils.spectral_norm` (one iteration, both vectors kept).
#[derive(Clone, Debug)]
pub(super) struct SpectralConv {
    raw: Affine,
    u: Tensor,
    v: Tensor,
}

impl SpectralConv {
    /// The vectors start from a seeded draw and one iteration, so that evaluation has a norm before any training.
    pub(super) fn new(sizes: [usize; 2], scope: &Scope) -> Result<Self> {
        let [n_in, n_out] = sizes;
        let vector = |name, len| scope.get(name, &[len], ParamKind::Buffer, Init::Normal(1.0));
        let (u, v) = (vector("weight_u", n_out)?, vector("weight_v", n_in * KERNEL * KERNEL)?);
        let conv = Self { raw: Affine::new(sizes, KERNEL, scope)?, u, v };
        if !scope.is_frozen() {
            conv.iterate()?;
        }
        Ok(conv)
    }

    /// `[n_out, n_in * 16]`.
    fn matrix(&self) -> Result<Tensor> {
        Ok(self.raw.weight.flatten_from(1)?)
    }

    /// One step of power iteration; returns the new vectors, which share nothing with the buffers, as columns.
    fn iterate(&self) -> Result<[Tensor; 2]> {
        let matrix = self.matrix()?.detach();
        let v = unit(&matrix.t()?.contiguous()?.matmul(&self.u.unsqueeze(1)?)?)?;
        let u = unit(&matrix.matmul(&v)?)?;
        // The buffers are no part of any graph: earlier passes keep the vectors they were made with.
        self.u.slice_set(&u.flatten_all()?, 0, 0)?;
        self.v.slice_set(&v.flatten_all()?, 0, 0)?;
        Ok([u, v])
    }

    /// The convolution of the next pass.
    pub(super) fn normalised(&self, mode: Mode) -> Result<Affine> {
        let [u, v] = match mode.is_train() {
            true => self.iterate()?,
            false => [self.u.copy()?.unsqueeze(1)?, self.v.copy()?.unsqueeze(1)?],
        };
        let sigma = (self.matrix()?.matmul(&v)? * u)?.sum_all()?;
        Ok(Affine { weight: self.raw.weight.broadcast_div(&sigma)?, bias: self.raw.bias.clone() })
    }
}

/// A column of length 1 in the same direction.
fn unit(column: &Tensor) -> Result<Tensor> {
    let norm = host(column)?.iter().map(|v| v * v).sum::<f64>().sqrt();
    Ok((column / norm.max(LEAST_NORM))?)
}
