//! Layer normalisation over the last dimension.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, Shared, check_float, for_float, init, par_chunks, slice_of, vectorised, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;
use crate::linear::add_up;
use crate::planes::block_sums;

const NAME: &str = "layer_norm";
/// Rows of a task.
const ROWS: usize = 64;

/// Normalises every row: `y = (x - mean) / sqrt(var + eps) * gamma + beta`, mean and biased variance over the last
/// dimension.
///
/// The variance is summed around the mean: it carries no error of the mean's size.
///
/// # Shapes
/// - `x`: `[.., d]`, f32 or f64; `gamma_d`, `beta_d`: `[d]`, of the same type
/// - returns `[.., d]`
/// # Gradient
/// Reaches `x`, through mean and variance too, `gamma` and `beta`, whichever are tracked.
/// # Errors
/// `Shape` when `x` is empty or has no dimension, or `gamma` or `beta` do not fit; `Config` when `eps <= 0`, for mixed or
/// other element types, or a device without kernels.
/// # Source
/// Ba et al. 2016; PyTorch `torch.nn.functional.layer_norm`. (candle's own gives no gradient.)
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f64, 3.0]], &Device::Cpu)?;
/// let (gamma, beta) = (Tensor::new(&[1f64, 2.0], &Device::Cpu)?, Tensor::new(&[0f64, 5.0], &Device::Cpu)?);
/// let y = segdistill_ops::layer_norm(&x, &gamma, &beta, 1e-12)?.to_vec2::<f64>()?;
/// assert!((y[0][0] + 1.0).abs() < 1e-9 && (y[0][1] - 7.0).abs() < 1e-9);
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn layer_norm(x: &Tensor, gamma_d: &Tensor, beta_d: &Tensor, eps: f64) -> Result<Tensor> {
    check_float(NAME, &[x, gamma_d, beta_d])?;
    let d = x.dims().last().copied().unwrap_or(0);
    if x.elem_count() == 0 || d == 0 {
        return Err(OpsError::shape(
            NAME,
            format!("{:?}", x.dims()),
            "[.., d], no axis empty",
            "pass rows to normalise",
        ));
    }
    for (what, t) in [("gamma", gamma_d), ("beta", beta_d)] {
        if t.dims() != [d] {
            return Err(OpsError::shape(
                NAME,
                format!("{what} {:?} for x {:?}", t.dims(), x.dims()),
                format!("{what} [{d}]"),
                "one value for each element of the last dimension",
            ));
        }
    }
    if eps.is_nan() || eps <= 0.0 {
        return Err(OpsError::config(
            format!("{NAME}: eps is {eps}, expected above 0"),
            "1e-5 is PyTorch's default, 1e-6 usual in transformers",
        ));
    }
    if !x.device().is_cpu() {
        // Composed of operations of candle whose gradients are right.
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
        return Ok(centred.broadcast_div(&deviation)?.broadcast_mul(gamma_d)?.broadcast_add(beta_d)?);
    }
    let op = LayerNorm { d, eps };
    Ok(graph::apply3(&x.contiguous()?, &gamma_d.contiguous()?, &beta_d.contiguous()?, op)?)
}

struct LayerNorm {
    d: usize,
    eps: f64,
}

impl LayerNorm {
    /// Mean of a row, what rounding it left, and `1 / sqrt(var + eps)`.
    #[inline(always)]
    fn moments<T: Element>(&self, row: &[T]) -> (T, T, T) {
        let d = self.d as f64;
        let [sum] = block_sums([row], |[x]| [x]);
        let mean = T::from_f64(sum / d);
        // The mean as rounded leaves a rest, which matters where the mean is far larger than the spread.
        let [rest, squares] = block_sums([row], |[x]| [x - mean, (x - mean) * (x - mean)]);
        let rest = rest / d;
        let variance = (squares / d - rest * rest).max(0.0);
        (mean, T::from_f64(rest), T::from_f64(1.0 / (variance + self.eps).sqrt()))
    }

    fn forward<T: Element>(&self, x: &[T], gamma: &[T], beta: &[T]) -> Vec<T> {
        let d = self.d;
        par_chunks(x.len(), ROWS * d, |task, out| {
            vectorised(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(d).zip(x[task * ROWS * d..].chunks_exact(d)) {
                        let (mean, rest, scale) = self.moments(x);
                        for (((out, &x), &gamma), &beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
                            *out = (x - mean - rest) * scale * gamma + beta;
                        }
                    }
                },
            );
        })
    }

    /// Gradients of x, gamma and beta. With `u = g gamma` and `y` the normalised row:
    /// `dx = (u - mean(u) - y mean(u y)) / sqrt(var + eps)`.
    fn backward<T: Element>(&self, x: &[T], gamma: &[T], grad: &[T]) -> [Vec<T>; 3] {
        let (d, len) = (self.d, x.len());
        let mut dx: Vec<T> = Vec::with_capacity(len);
        let shared = Shared::new(&mut dx.spare_capacity_mut()[..len]);
        let partial: Vec<(Vec<f64>, Vec<f64>)> = (0..len.div_ceil(ROWS * d))
            .into_par_iter()
            .map(|task| {
                let range = task * ROWS * d..len.min((task + 1) * ROWS * d);
                // SAFETY: the rows of a task are its own.
                let dx = init(unsafe { shared.part(range.clone()) }, T::ZERO);
                let (mut dgamma, mut dbeta) = (vec![0.0; d], vec![0.0; d]);
                let (mut u, mut y) = (vec![T::ZERO; d], vec![T::ZERO; d]);
                let rows =
                    dx.chunks_exact_mut(d).zip(x[range.clone()].chunks_exact(d)).zip(grad[range].chunks_exact(d));
                vectorised(
                    #[inline(always)]
                    || {
                        for ((dx, x), g) in rows {
                            let (mean, rest, scale) = self.moments(x);
                            for i in 0..d {
                                y[i] = (x[i] - mean - rest) * scale;
                                u[i] = g[i] * gamma[i];
                                dgamma[i] += (g[i] * y[i]).to_f64();
                                dbeta[i] += g[i].to_f64();
                            }
                            let sums = block_sums([&u[..], &y[..]], |[u, y]| [u, u * y]);
                            let [mean_u, mean_uy] = sums.map(|sum| T::from_f64(sum / d as f64));
                            for i in 0..d {
                                dx[i] = (u[i] - mean_u - y[i] * mean_uy) * scale;
                            }
                        }
                    },
                );
                (dgamma, dbeta)
            })
            .collect();
        // SAFETY: the tasks cover every row, and each initialised its rows.
        unsafe { dx.set_len(len) };
        let (dgamma, dbeta): (Vec<Vec<f64>>, Vec<Vec<f64>>) = partial.into_iter().unzip();
        [dx, add_up(&dgamma, d), add_up(&dbeta, d)]
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        gamma: &CpuStorage,
        lg: &Layout,
        beta: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = for_float!(NAME, x.dtype(), T => {
            let (gamma, beta) = (slice_of::<T>(NAME, gamma, lg)?, slice_of::<T>(NAME, beta, lb)?);
            Ok(T::to_cpu_storage_owned(self.forward(slice_of::<T>(NAME, x, lx)?, gamma, beta)))
        })?;
        Ok((out, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => {
            let [dx, dgamma, dbeta] = with_slice::<T, _>(NAME, x, |x| with_slice::<T, _>(NAME, gamma, |gamma| {
                with_slice::<T, _>(NAME, &grad, |g| Ok(self.backward(x, gamma, g)))
            }))?;
            let tensor = |values: Vec<T>, of: &Tensor| {
                of.track_op().then(|| Tensor::from_vec(values, of.shape(), of.device())).transpose()
            };
            Ok((tensor(dx, x)?, tensor(dgamma, gamma)?, tensor(dbeta, beta)?))
        })
    }
}
