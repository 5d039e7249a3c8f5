//! Batch normalisation.

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_cpu_float, for_float, slice_of, vectorised, with_slice};
use crate::error::{OpsError, Result};
use crate::mode::Mode;
use crate::planes::{dims_nchw, par_groups, sum_of, sum_pairs};

const NAME: &str = "batch_norm";

/// Settings of a batch normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNormConfig {
    /// Added to the variance; positive.
    pub eps: f64,
    /// Share of the new statistics in the running ones (PyTorch's meaning, 0.1), in [0, 1].
    pub momentum: f64,
}

impl Default for BatchNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1 }
    }
}

/// Normalises every channel: `y = (x - mean) / sqrt(var + eps) * gamma + beta`.
///
/// `Train` takes mean and biased variance of the batch over (n, h, w), m elements a channel, and moves the running
/// statistics: `running = (1 - momentum) * running + momentum * batch`, where the batch's variance is the unbiased one
/// (divided by m - 1). `Eval` takes the running statistics and changes nothing. Statistics are formed in f64 whatever
/// the element type.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64; the four others: `[c]`, of the same type
/// - `running_mean_c`, `running_var_c`: outside the graph; in `Train` written in place, so that every tensor sharing
///   their storage (the store's variable) sees the new values
/// - returns `[n, c, h, w]`
/// # Gradient
/// Reaches `x`, `gamma` and `beta`, whichever are tracked; in `Train` through the batch statistics too. None reaches the
/// running statistics. With plain tensors no graph is recorded.
/// # Errors
/// `Shape` when ranks or channel counts differ, or in `Train` when m = 1 (the unbiased variance does not exist);
/// `Config` when `eps <= 0`, when `momentum` lies outside [0, 1], for running statistics inside a graph, for mixed or
/// other element types, or for tensors that are not on the CPU.
/// # Source
/// Ioffe and Szegedy 2015; PyTorch `torch.nn.functional.batch_norm`. Partial variances merge as in Chan et al. 1979.
pub fn batch_norm(
    x_nchw: &Tensor,
    gamma_c: &Tensor,
    beta_c: &Tensor,
    running_mean_c: &Tensor,
    running_var_c: &Tensor,
    cfg: BatchNormConfig,
    mode: Mode,
) -> Result<Tensor> {
    check_cpu_float(NAME, &[x_nchw, gamma_c, beta_c, running_mean_c, running_var_c])?;
    let [n, c, h, w] = dims_nchw(NAME, x_nchw)?;
    for (what, t) in
        [("gamma", gamma_c), ("beta", beta_c), ("running_mean", running_mean_c), ("running_var", running_var_c)]
    {
        if t.dims() != [c] {
            return Err(OpsError::shape(
                NAME,
                format!("{what} {:?} for x {:?}", t.dims(), x_nchw.dims()),
                format!("{what} [{c}]"),
                "one value for each channel of x",
            ));
        }
    }
    if !(cfg.eps > 0.0 && (0.0..=1.0).contains(&cfg.momentum)) {
        return Err(OpsError::config(
            format!(
                "batch_norm: eps is {}, momentum {}, expected eps > 0 and momentum in 0..=1",
                cfg.eps, cfg.momentum
            ),
            "PyTorch's defaults are eps 1e-5 and momentum 0.1 (TensorFlow's momentum 0.9)",
        ));
    }
    let saved = Arc::new(OnceLock::new());
    let m = n * h * w;
    let op = BatchNorm { n, c, hw: h * w, eps: cfg.eps, batch: mode.is_train(), statistics: saved.clone() };
    if mode.is_train() {
        if m == 1 {
            return Err(OpsError::shape(
                NAME,
                format!("{:?}, one element a channel", x_nchw.dims()),
                "more than one element a channel in training",
                "use a larger batch or map: a single element has no variance",
            ));
        }
        if running_mean_c.track_op() || running_var_c.track_op() {
            return Err(OpsError::config(
                "batch_norm: running statistics are part of a graph",
                "take them from the store as ParamKind::Buffer, or detach them",
            ));
        }
    } else {
        let values = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.detach().to_dtype(DType::F64)?.to_vec1()?) };
        let (means, variances) = (values(running_mean_c)?, values(running_var_c)?);
        let given = means.into_iter().zip(variances).map(|(mean, variance)| Moments { mean, variance }).collect();
        saved.set(given).expect("the cell was made above");
    }
    let out = x_nchw.contiguous()?.apply_op3(&gamma_c.contiguous()?, &beta_c.contiguous()?, op)?;
    if mode.is_train() {
        let moments: &Vec<Moments> = saved.get().expect("the forward pass above set the statistics");
        let unbiased = m as f64 / (m - 1) as f64;
        blend(running_mean_c, cfg.momentum, moments.iter().map(|s| s.mean))?;
        blend(running_var_c, cfg.momentum, moments.iter().map(|s| s.variance * unbiased))?;
    }
    Ok(out)
}

/// `running = (1 - momentum) * running + momentum * new`, in place.
fn blend(running: &Tensor, momentum: f64, new: impl Iterator<Item = f64>) -> Result<()> {
    let old: Vec<f64> = running.to_dtype(DType::F64)?.to_vec1()?;
    let blended: Vec<f64> = old.iter().zip(new).map(|(old, new)| (1.0 - momentum) * old + momentum * new).collect();
    let blended = Tensor::from_vec(blended, running.shape(), running.device())?.to_dtype(running.dtype())?;
    // With f64 statistics `to_dtype` above is the identity on a fresh tensor: the storages never coincide.
    Ok(running.slice_set(&blended, 0, 0)?)
}

/// Mean and biased variance of a channel.
#[derive(Clone, Copy, Debug)]
struct Moments {
    mean: f64,
    variance: f64,
}

struct BatchNorm {
    n: usize,
    c: usize,
    hw: usize,
    eps: f64,
    /// Whether the statistics are the batch's (formed by the forward pass, differentiated by the backward pass).
    batch: bool,
    statistics: Arc<OnceLock<Vec<Moments>>>,
}

/// Elements of a block whose mean and spread are formed in the innermost cache, before blocks are merged.
const BLOCK: usize = 4096;

/// Mean and biased variance over the planes of a channel: two passes inside a block, blocks merged in order.
#[inline(always)]
fn moments<'a, T: Element>(planes: impl Iterator<Item = &'a [T]>) -> Moments {
    let (mut count, mut mean, mut spread) = (0.0, 0.0, 0.0);
    for block in planes.flat_map(|plane| plane.chunks(BLOCK)) {
        let n = block.len() as f64;
        let block_mean = sum_of(block, T::to_f64) / n;
        let block_spread = sum_of(block, |x| (x.to_f64() - block_mean) * (x.to_f64() - block_mean));
        let (total, delta) = (count + n, block_mean - mean);
        spread += block_spread + delta * delta * (count * n / total);
        mean += delta * (n / total);
        count = total;
    }
    Moments { mean, variance: spread / count }
}

impl BatchNorm {
    fn inverse_std(&self, s: Moments) -> f64 {
        1.0 / (s.variance + self.eps).sqrt()
    }

    /// Plane of image `i` in channel `c`.
    fn plane<'a, T>(&self, x: &'a [T], i: usize, c: usize) -> &'a [T] {
        &x[(i * self.c + c) * self.hw..][..self.hw]
    }

    fn forward<T: Element>(&self, x: &[T], gamma: &[T], beta: &[T]) -> Vec<T> {
        let given = self.statistics.get();
        let (out, statistics) = self.channels(|c, out: &mut [&mut [T]]| {
            vectorised(|| {
                let s = match given {
                    Some(given) => given[c],
                    None => moments((0..self.n).map(|i| self.plane(x, i, c))),
                };
                let (mean, beta) = (T::from_f64(s.mean), beta[c]);
                let slope = T::from_f64(self.inverse_std(s) * gamma[c].to_f64());
                for (i, out) in out.iter_mut().enumerate() {
                    for (out, &x) in out.iter_mut().zip(self.plane(x, i, c)) {
                        // The mean first: `x * slope + shift` would cancel where the mean is large beside the spread.
                        *out = (x - mean) * slope + beta;
                    }
                }
                s
            })
        });
        // Only the first forward pass of an op finds the cell empty.
        let _ = self.statistics.set(statistics);
        out
    }

    /// `fill(channel, planes of the channel, one an image)`, a task a channel.
    fn channels<T: Element, R: Send>(&self, fill: impl Fn(usize, &mut [&mut [T]]) -> R + Sync) -> (Vec<T>, Vec<R>) {
        par_groups(self.n * self.c * self.hw, self.hw, self.hw, self.c, |plane, _| plane % self.c, fill)
    }

    /// Gradients of x, gamma and beta. With `xc = x - mean`, `s = 1 / std`:
    /// `dbeta = sum g`, `dgamma = s * sum g * xc`, and `dx = gamma * s * (g - [dbeta / m + xc * s * dgamma / m])`, the
    /// bracket in training only.
    fn backward<T: Element>(&self, x: &[T], gamma: &[T], grad: &[T]) -> (Vec<T>, Vec<T>, Vec<T>) {
        let statistics = self.statistics.get().expect("the forward pass set the statistics");
        let m = (self.n * self.hw) as f64;
        let (dx, sums) = self.channels(|c, out: &mut [&mut [T]]| {
            vectorised(|| {
                let (mean, inverse_std) = (statistics[c].mean, self.inverse_std(statistics[c]));
                let (mut sum_g, mut sum_g_xc) = (0.0, 0.0);
                for i in 0..self.n {
                    let (x, g) = (self.plane(x, i, c), self.plane(grad, i, c));
                    sum_g += sum_of(g, T::to_f64);
                    sum_g_xc += sum_pairs(x, g, |x, g| (x.to_f64() - mean) * g.to_f64());
                }
                let slope = inverse_std * gamma[c].to_f64();
                let (level, tilt) = if self.batch {
                    (slope * sum_g / m, slope * inverse_std * inverse_std * sum_g_xc / m)
                } else {
                    (0.0, 0.0)
                };
                let (mean, slope, level, tilt) =
                    (T::from_f64(mean), T::from_f64(slope), T::from_f64(level), T::from_f64(tilt));
                for (i, out) in out.iter_mut().enumerate() {
                    let (x, g) = (self.plane(x, i, c), self.plane(grad, i, c));
                    for ((out, &x), &g) in out.iter_mut().zip(x).zip(g) {
                        *out = g * slope - level - (x - mean) * tilt;
                    }
                }
                (T::from_f64(sum_g_xc * inverse_std), T::from_f64(sum_g))
            })
        });
        let (dgamma, dbeta) = sums.into_iter().unzip();
        (dx, dgamma, dbeta)
    }
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gamma: &CpuStorage,
        gamma_layout: &Layout,
        beta: &CpuStorage,
        beta_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let gamma = slice_of::<T>(NAME, gamma, gamma_layout)?;
            let beta = slice_of::<T>(NAME, beta, beta_layout)?;
            let out = self.forward(slice_of::<T>(NAME, x, layout)?, gamma, beta);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => {
            let (dx, dgamma, dbeta) = with_slice::<T, _>(NAME, x, |x| {
                with_slice::<T, _>(NAME, gamma, |gamma| {
                    with_slice::<T, _>(NAME, &grad, |g| Ok(self.backward(x, gamma, g)))
                })
            })?;
            let tracked = |of: &Tensor, values: Vec<T>| {
                of.track_op().then(|| Tensor::from_vec(values, of.shape(), of.device())).transpose()
            };
            Ok((tracked(x, dx)?, tracked(gamma, dgamma)?, tracked(beta, dbeta)?))
        })
    }
}
