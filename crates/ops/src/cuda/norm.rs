//! Batch normalisation: cuDNN in training where it is built in, kernels for everything else.

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, InplaceOp1, Layout, Result, Shape, Tensor};

use super::{Real, launch, per_block, per_element, size, stored, tensor, uninit, view, with_view};
use crate::cpu::for_float;
use crate::graph;

const NAME: &str = "batch_norm";

/// `batch_norm_act` on a CUDA device; the arguments are checked. Addition and rectifier are operations of their own.
pub(crate) fn batch_norm_act(
    [x_nchw, gamma_c, beta_c, running_mean_c, running_var_c]: [&Tensor; 5],
    residual_nchw: Option<&Tensor>,
    relu: bool,
    eps: f64,
    momentum: f64,
    train: bool,
) -> crate::error::Result<Tensor> {
    let (n, c, h, w) = x_nchw.dims4()?;
    let moments = Arc::new(OnceLock::new());
    if !train {
        let of_running = for_float!(NAME, x_nchw.dtype(), T => {
            Moments::of_running::<T>(running_mean_c, running_var_c, eps)
        })?;
        moments.set(of_running).expect("the cell was made above");
    }
    let op = BatchNorm { sizes: [n, c, h * w], eps, batch: train, moments: moments.clone() };
    let mut y = graph::apply3(&x_nchw.contiguous()?, &gamma_c.contiguous()?, &beta_c.contiguous()?, op)?;
    if train {
        let moments: &Moments = moments.get().expect("the forward pass above set the moments");
        let blend = |spread| Blend { momentum, eps, nm: n * h * w, spread, moments: moments.clone() };
        running_mean_c.inplace_op1(&blend(false))?;
        running_var_c.inplace_op1(&blend(true))?;
    }
    if let Some(residual) = residual_nchw {
        y = (y + residual)?;
    }
    if relu { crate::activation::relu(&y) } else { Ok(y) }
}

struct BatchNorm {
    /// Images, channels, pixels.
    sizes: [usize; 3],
    eps: f64,
    /// Whether the moments are the batch's.
    batch: bool,
    moments: Arc<OnceLock<Moments>>,
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        candle_core::bail!("{NAME}: the CUDA form got maps on the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        gamma: &CudaStorage,
        gamma_layout: &Layout,
        beta: &CudaStorage,
        beta_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, moments) = for_float!(NAME, x.dtype(), T => forward::<T>(
            (x, layout),
            (gamma, gamma_layout),
            (beta, beta_layout),
            self.sizes,
            self.eps,
            self.moments.get(),
        ))?;
        // Only the first forward pass of an op in training finds the cell empty.
        let _ = self.moments.set(moments);
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let moments = self.moments.get().expect("the forward pass set the moments");
        let grad = grad.contiguous()?;
        let (dx, dgamma, dbeta) = for_float!(NAME, x.dtype(), T => {
            backward::<T>(x, gamma, &grad, moments, self.sizes, self.eps, self.batch)
        })?;
        let wanted = |of: &Tensor, gradient| of.track_op().then_some(gradient);
        Ok((wanted(x, dx), wanted(gamma, dgamma), wanted(beta, dbeta)))
    }
}

/// `running = (1 - momentum) * running + momentum * new`, in place.
struct Blend {
    momentum: f64,
    eps: f64,
    /// Elements of a channel.
    nm: usize,
    /// Whether the running variance is meant, else the mean.
    spread: bool,
    moments: Moments,
}

impl InplaceOp1 for Blend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        candle_core::bail!("{NAME}: the CUDA form got running statistics on the CPU")
    }

    fn cuda_fwd(&self, running: &mut CudaStorage, layout: &Layout) -> Result<()> {
        for_float!(NAME, running.dtype(), T => match self.spread {
            false => blend_mean::<T>((running, layout), self.momentum, &self.moments),
            true => blend_variance::<T>((running, layout), self.momentum, self.eps, self.nm, &self.moments),
        })
    }
}

/// Mean and `1 / sqrt(variance + eps)` of each channel, `[c]` each, in the type of the maps, on their device.
#[derive(Clone, Debug)]
struct Moments {
    mean: Tensor,
    inverse_std: Tensor,
}

impl Moments {
    /// Those of running statistics, copied: a later training step changes them not.
    fn of_running<T: Real>(mean: &Tensor, variance: &Tensor, eps: f64) -> Result<Self> {
        let (mean, variance) = (mean.detach().copy()?, variance.detach().contiguous()?);
        let inverse_std = with_view::<T, _>(NAME, &variance, |device, var| {
            let c = variance.elem_count();
            let (n, mut out) = (size(c)?, uninit::<T>(device, c)?);
            // SAFETY: inverse_std(u32 len, double eps, const T* variance, T* out), both of `len` elements.
            unsafe { launch!(device, T, "inverse_std", per_element(c)?, &n, &eps, &var, &mut out) };
            Ok(tensor(device, out, c))
        })?;
        Ok(Self { mean, inverse_std })
    }
}

/// `(x - mean) * inverse_std * gamma + beta` over `[n, c, m]`, with `given` moments or those of the batch, which come back.
fn forward<T: Real>(
    (x, x_layout): (&CudaStorage, &Layout),
    (gamma, gamma_layout): (&CudaStorage, &Layout),
    (beta, beta_layout): (&CudaStorage, &Layout),
    [n, c, m]: [usize; 3],
    eps: f64,
    given: Option<&Moments>,
) -> Result<(CudaStorage, Moments)> {
    let device = &x.device;
    let x = view::<T>(NAME, x, x_layout)?;
    let (gamma, beta) = (view::<T>(NAME, gamma, gamma_layout)?, view::<T>(NAME, beta, beta_layout)?);
    let len = n * c * m;
    let mut out = uninit::<T>(device, len)?;
    let moments = match given {
        Some(given) => given.clone(),
        #[cfg(feature = "cudnn")]
        None => {
            let (mut mean, mut inverse_std) = (uninit::<T>(device, c)?, uninit::<T>(device, c)?);
            super::cudnn::batch_norm_train(
                NAME,
                device,
                [n, c, m],
                eps,
                [&x, &gamma, &beta],
                [&mut out, &mut mean, &mut inverse_std],
            )?;
            let moments = Moments { mean: tensor(device, mean, c), inverse_std: tensor(device, inverse_std, c) };
            return Ok((stored(device, out), moments));
        }
        #[cfg(not(feature = "cudnn"))]
        None => {
            let (mut mean, mut inverse_std) = (uninit::<T>(device, c)?, uninit::<T>(device, c)?);
            let (all, channels, plane, config) = (size(n * m)?, size(c)?, size(m)?, per_block(c)?);
            // SAFETY: moments(u32 nm, u32 c, u32 m, double eps, const T* x, T* mean, T* inverse_std): `nm` elements in
            // each of `c` channels.
            unsafe {
                launch!(device, T, "moments", config, &all, &channels, &plane, &eps, &x, &mut mean, &mut inverse_std)
            };
            Moments { mean: tensor(device, mean, c), inverse_std: tensor(device, inverse_std, c) }
        }
    };
    with_view::<T, _>(NAME, &moments.mean, |_, mean| {
        with_view::<T, _>(NAME, &moments.inverse_std, |_, inverse_std| {
            let (total, channels, plane, config) = (size(len)?, size(c)?, size(m)?, per_element(len)?);
            // SAFETY: normalise(u32 len, u32 c, u32 m, const T* x, const T* mean, const T* inverse_std, const T* gamma,
            // const T* beta, T* out): `len` elements in planes of `m`, `c` of the others.
            unsafe {
                launch!(
                    device,
                    T,
                    "normalise",
                    config,
                    &total,
                    &channels,
                    &plane,
                    &x,
                    &mean,
                    &inverse_std,
                    &gamma,
                    &beta,
                    &mut out
                )
            };
            Ok(())
        })
    })?;
    Ok((stored(device, out), moments))
}

/// Gradients of x, gamma and beta; through the moments where they are those of the `batch`.
#[cfg_attr(not(feature = "cudnn"), expect(unused_variables, reason = "cuDNN alone asks for eps again"))]
fn backward<T: Real>(
    x: &Tensor,
    gamma: &Tensor,
    grad: &Tensor,
    moments: &Moments,
    [n, c, m]: [usize; 3],
    eps: f64,
    batch: bool,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (gamma, shape) = (gamma.contiguous()?, x.shape().clone());
    let with = |t: &Tensor, f: &mut dyn FnMut(super::CudaView<'_, T>) -> Result<()>| {
        with_view::<T, _>(NAME, t, |_, view| f(view))
    };
    let device = x.device().as_cuda_device()?.clone();
    let len = n * c * m;
    let (mut dx, mut dgamma, mut dbeta) =
        (uninit::<T>(&device, len)?, uninit::<T>(&device, c)?, uninit::<T>(&device, c)?);
    with(x, &mut |x| {
        with(&gamma, &mut |gamma| {
            with(grad, &mut |g| {
                with(&moments.mean, &mut |mean| {
                    with(&moments.inverse_std, &mut |inverse_std| {
                        #[cfg(feature = "cudnn")]
                        if batch {
                            return super::cudnn::batch_norm_train_grad(
                                NAME,
                                &device,
                                [n, c, m],
                                eps,
                                [&x, &gamma, &g, &mean, &inverse_std],
                                [&mut dx, &mut dgamma, &mut dbeta],
                            );
                        }
                        let (all, channels, plane, config) = (size(n * m)?, size(c)?, size(m)?, per_block(c)?);
                        // SAFETY: norm_sums(u32 nm, u32 c, u32 m, const T* x, const T* grad, const T* mean, const T*
                        // inverse_std, T* dgamma, T* dbeta): `nm` elements in each of `c` channels.
                        unsafe {
                            launch!(
                                &device,
                                T,
                                "norm_sums",
                                config,
                                &all,
                                &channels,
                                &plane,
                                &x,
                                &g,
                                &mean,
                                &inverse_std,
                                &mut dgamma,
                                &mut dbeta
                            )
                        };
                        let (total, through, config) = (size(len)?, u32::from(batch), per_element(len)?);
                        // SAFETY: norm_grad(u32 len, u32 c, u32 m, u32 nm, u32 batch, const T* x, const T* grad, const
                        // T* mean, const T* inverse_std, const T* gamma, const T* dgamma, const T* dbeta, T* dx): `len`
                        // elements in planes of `m`, `c` of the others.
                        unsafe {
                            launch!(
                                &device,
                                T,
                                "norm_grad",
                                config,
                                &total,
                                &channels,
                                &plane,
                                &all,
                                &through,
                                &x,
                                &g,
                                &mean,
                                &inverse_std,
                                &gamma,
                                &dgamma,
                                &dbeta,
                                &mut dx
                            )
                        };
                        Ok(())
                    })
                })
            })
        })
    })?;
    Ok((tensor(&device, dx, shape), tensor(&device, dgamma, c), tensor(&device, dbeta, c)))
}

/// `running = (1 - momentum) * running + momentum * mean`, in place.
fn blend_mean<T: Real>((running, layout): (&mut CudaStorage, &Layout), momentum: f64, moments: &Moments) -> Result<()> {
    with_view::<T, _>(NAME, &moments.mean, |device, mean| {
        let (start, end) = whole(layout, moments)?;
        let (c, config) = (size(end - start)?, per_element(end - start)?);
        let mut running = running.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
        // SAFETY: blend_mean(u32 c, double momentum, const T* mean, T* running), both of `c` elements.
        unsafe { launch!(device, T, "blend_mean", config, &c, &momentum, &mean, &mut running) };
        Ok(())
    })
}

/// `running = (1 - momentum) * running + momentum * variance`, in place, with the unbiased variance of a batch of `nm`
/// elements a channel.
fn blend_variance<T: Real>(
    (running, layout): (&mut CudaStorage, &Layout),
    momentum: f64,
    eps: f64,
    nm: usize,
    moments: &Moments,
) -> Result<()> {
    with_view::<T, _>(NAME, &moments.inverse_std, |device, inverse_std| {
        let (start, end) = whole(layout, moments)?;
        let (c, config, unbias) = (size(end - start)?, per_element(end - start)?, nm as f64 / (nm - 1) as f64);
        let mut running = running.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
        // SAFETY: blend_variance(u32 c, double momentum, double eps, double unbias, const T* inverse_std, T* running),
        // both of `c` elements.
        unsafe {
            launch!(device, T, "blend_variance", config, &c, &momentum, &eps, &unbias, &inverse_std, &mut running)
        };
        Ok(())
    })
}

/// Where running statistics lie: as many as there are moments, without gaps.
fn whole(layout: &Layout, moments: &Moments) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some((start, end)) if end - start == moments.mean.elem_count() => Ok((start, end)),
        _ => Err(candle_core::Error::RequiresContiguous { op: NAME }.bt()),
    }
}
