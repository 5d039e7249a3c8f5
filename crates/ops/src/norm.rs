//! Batch normalisation, alone or with the addition and the rectifier that follow it.
//!
//! The operation and its place in the graph live here, the loops over memory in `cpu`.

mod cpu;

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor, WithDType};

use crate::cpu::{check_float, for_float, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::gemm::Element;
use crate::graph;
use crate::mode::Mode;
use crate::planes::dims_nchw;
use cpu::{Gradients, Kernel, Moments};

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
/// (divided by m - 1). `Eval` takes the running statistics and changes nothing. Of f32 maps, blocks of a few thousand
/// elements are summed in f32 around their own mean and joined in f64: the statistics carry no error of the mean's size.
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
/// other element types, or for a device without kernels.
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
    batch_norm_act(x_nchw, gamma_c, beta_c, running_mean_c, running_var_c, None, false, cfg, mode)
}

/// [`batch_norm`] with what usually follows it, in the same passes over memory: `act(batch_norm(x) + residual)`.
///
/// `act` is `max(y, 0)` with `relu`, else nothing; without a residual nothing is added. Forward reads x twice (the second
/// time from cache where a channel fits) and writes the result once; backward reads x, result and gradient twice and
/// writes each gradient once. The graph keeps x and the result, nothing in between.
///
/// # Shapes
/// - those of [`batch_norm`]; `residual_nchw`: `[n, c, h, w]`, of the same type
/// - returns `[n, c, h, w]`
/// # Gradient
/// That of the composition, with [`relu`](crate::relu)'s: 0 where the result is 0. The residual gets what passed the
/// rectifier.
/// # Errors
/// Those of [`batch_norm`]; `Shape` when the residual's shape is not that of x.
/// # Source
/// Ioffe and Szegedy 2015, and the order of He et al. 2016: normalisation, sum, rectifier.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_ops::{BatchNormConfig, Mode, batch_norm_act};
/// # fn main() -> segdistill_ops::Result<()> {
/// let x = Tensor::new(&[[[[-2f32, 4.0]]]], &Device::Cpu)?;
/// let [one, zero] = [1f32, 0.0].map(|v| Tensor::new(&[v], &Device::Cpu).expect("a tensor of one value"));
/// let cfg = BatchNormConfig { eps: 1e-12, ..BatchNormConfig::default() };
/// // Mean 0, variance 1: x itself, plus x, at least 0.
/// let y = batch_norm_act(&x, &one, &zero, &zero, &one, Some(&x), true, cfg, Mode::Eval)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.0, 8.0]);
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_act(
    x_nchw: &Tensor,
    gamma_c: &Tensor,
    beta_c: &Tensor,
    running_mean_c: &Tensor,
    running_var_c: &Tensor,
    residual_nchw: Option<&Tensor>,
    relu: bool,
    cfg: BatchNormConfig,
    mode: Mode,
) -> Result<Tensor> {
    let tensors = [x_nchw, gamma_c, beta_c, running_mean_c, running_var_c, residual_nchw.unwrap_or(x_nchw)];
    check_float(NAME, &tensors)?;
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
    if let Some(residual) = residual_nchw.filter(|r| r.dims() != x_nchw.dims()) {
        return Err(OpsError::shape(
            NAME,
            format!("residual {:?} for x {:?}", residual.dims(), x_nchw.dims()),
            format!("residual {:?}", x_nchw.dims()),
            "project the residual to the channels and the grid of x first",
        ));
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
    let kernel = Kernel { n, c, hw: h * w, eps: cfg.eps, batch: mode.is_train(), relu };
    let op = BatchNorm { kernel, statistics: saved.clone() };
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
    }
    #[cfg(feature = "cuda")]
    if x_nchw.device().is_cuda() {
        let tensors = [x_nchw, gamma_c, beta_c, running_mean_c, running_var_c];
        let BatchNormConfig { eps, momentum } = cfg;
        return crate::cuda::batch_norm_act(tensors, residual_nchw, relu, eps, momentum, mode.is_train());
    }
    if !mode.is_train() {
        let values = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.detach().to_dtype(DType::F64)?.to_vec1()?) };
        let (means, variances) = (values(running_mean_c)?, values(running_var_c)?);
        let given = means.into_iter().zip(variances).map(|(mean, variance)| Moments { mean, variance }).collect();
        saved.set(given).expect("the cell was made above");
    }
    let x_nchw = x_nchw.contiguous()?;
    let out = match residual_nchw {
        None => graph::apply3(&x_nchw, &gamma_c.contiguous()?, &beta_c.contiguous()?, op)?,
        Some(residual) => {
            // An operation has three arguments at most: scale and shift go as one.
            graph::apply3_stacked(&x_nchw, [gamma_c, beta_c], &residual.contiguous()?, WithResidual(op))?
        }
    };
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

/// Arguments x, gamma and beta.
struct BatchNorm {
    kernel: Kernel,
    /// Of each channel; the running ones from the start, or the batch's once the forward pass formed them.
    statistics: Arc<OnceLock<Vec<Moments>>>,
}

impl BatchNorm {
    fn forward<T: Element>(&self, x: &[T], gamma: &[T], beta: &[T], residual: Option<&[T]>) -> Vec<T> {
        let (out, statistics) = self.kernel.forward(x, gamma, beta, residual, self.statistics.get().map(Vec::as_slice));
        if let Some(statistics) = statistics {
            // Only the first forward pass of an op finds the cell empty.
            let _ = self.statistics.set(statistics);
        }
        out
    }

    fn backward<T: Element>(&self, x: &[T], gamma: &[T], result: &[T], grad: &[T], residual: bool) -> Gradients<T> {
        let statistics = self.statistics.get().expect("the forward pass set the statistics");
        self.kernel.backward(x, gamma, result, grad, residual, statistics)
    }
}

/// A gradient as a tensor, where a variable stands behind its argument.
fn tracked<T: WithDType>(of: &Tensor, values: Vec<T>) -> candle_core::Result<Option<Tensor>> {
    of.track_op().then(|| Tensor::from_vec(values, of.shape(), of.device())).transpose()
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
            let out = self.forward(slice_of::<T>(NAME, x, layout)?, gamma, beta, None);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => with_slice::<T, _>(NAME, x, |x_values| {
            let Gradients { x: dx, gamma: dgamma, beta: dbeta, .. } = with_slice::<T, _>(NAME, gamma, |gamma| {
                with_slice::<T, _>(NAME, result, |y| {
                    with_slice::<T, _>(NAME, &grad, |g| Ok(self.backward(x_values, gamma, y, g, false)))
                })
            })?;
            Ok((tracked(x, dx)?, tracked(gamma, dgamma)?, tracked(beta, dbeta)?))
        }))
    }
}

/// Arguments x, gamma and beta as `[2, c]`, and the residual.
struct WithResidual(BatchNorm);

impl CustomOp3 for WithResidual {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        affine: &CpuStorage,
        affine_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let (gamma, beta) = slice_of::<T>(NAME, affine, affine_layout)?.split_at(self.0.kernel.c);
            let residual = slice_of::<T>(NAME, residual, residual_layout)?;
            let out = self.0.forward(slice_of::<T>(NAME, x, layout)?, gamma, beta, Some(residual));
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        affine: &Tensor,
        residual: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => with_slice::<T, _>(NAME, x, |x_values| {
            let gradients = with_slice::<T, _>(NAME, affine, |affine| {
                let gamma = &affine[..self.0.kernel.c];
                with_slice::<T, _>(NAME, result, |y| {
                    with_slice::<T, _>(NAME, &grad, |g| Ok(self.0.backward(x_values, gamma, y, g, residual.track_op())))
                })
            })?;
            // Where nothing is rectified, the residual's gradient is the result's as it stands.
            let d_residual = match gradients.residual {
                Some(values) => tracked(residual, values)?,
                None => residual.track_op().then(|| grad.clone()),
            };
            let d_affine = [gradients.gamma, gradients.beta].concat();
            Ok((tracked(x, gradients.x)?, tracked(affine, d_affine)?, d_residual))
        }))
    }
}
