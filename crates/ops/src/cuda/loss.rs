//! Cross entropy fused over the map, for the crate of losses, which holds no unsafe code.

use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::{Real, SUM_THREADS, launch, per_block, per_element, size, stored, tensor, uninit, view, with_view};
use crate::cpu::for_float;
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::dims_nchw;

const NAME: &str = "cross_entropy";

/// Weighted mean of the negative log-likelihoods of a map's pixels, on a CUDA device.
///
/// `L = sum_i w_{y_i} * (log sum_c exp z_c(i) - z_{y_i}(i)) / total_weight` over the pixels with a target.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, f32 or f64, on a CUDA device
/// - `targets`: `n * h * w` classes, row-major; below 0 where the pixel does not count
/// - `class_weights`: `c` factors; `total_weight`: what the sum is divided by; 0 makes value and gradient 0
/// - returns `[]` of the logits' type
/// # Gradient
/// `w_{y_i} / total_weight * (softmax(z(i))_c - [c = y_i])` to the logits, 0 at pixels that do not count, whatever
/// their logits.
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for targets or weights of the wrong number, a target beyond the
/// classes, another element type, or logits that are not on a CUDA device.
/// # Source
/// The CPU's is `segdistill_losses::cross_entropy`, which calls this one for logits on a CUDA device.
pub fn cross_entropy(
    logits_nchw: &Tensor,
    targets: &[i16],
    class_weights: &[f64],
    total_weight: f64,
) -> Result<Tensor> {
    let [n, c, h, w] = dims_nchw(NAME, logits_nchw)?;
    let beyond = targets.iter().any(|&t| usize::try_from(t).is_ok_and(|t| t >= c));
    if targets.len() != n * h * w || class_weights.len() != c || beyond {
        return Err(OpsError::config(
            format!(
                "{NAME}: {} targets and {} weights for logits {:?}{}",
                targets.len(),
                class_weights.len(),
                logits_nchw.dims(),
                if beyond { ", a target beyond the classes" } else { "" }
            ),
            "give a class of the logits for each pixel, below 0 where none counts, and a weight for each class",
        ));
    }
    if !logits_nchw.device().is_cuda() || !matches!(logits_nchw.dtype(), DType::F32 | DType::F64) {
        return Err(OpsError::config(
            format!("{NAME}: logits are {:?} on {:?}", logits_nchw.dtype(), logits_nchw.device().location()),
            "this is the CUDA form for f32 and f64, segdistill_losses::cross_entropy takes every device",
        ));
    }
    let device = logits_nchw.device().as_cuda_device()?;
    let (targets, weights) = (device.clone_htod(targets)?, device.clone_htod(class_weights)?);
    let op = CrossEntropy { n, c, m: h * w, targets, weights, total_weight };
    Ok(graph::apply1(&logits_nchw.contiguous()?, op)?)
}

struct CrossEntropy {
    n: usize,
    c: usize,
    m: usize,
    targets: CudaSlice<i16>,
    weights: CudaSlice<f64>,
    total_weight: f64,
}

impl CrossEntropy {
    fn forward<T: Real>(&self, logits: &CudaStorage, layout: &Layout) -> candle_core::Result<CudaStorage> {
        let (device, z) = (&logits.device, view::<T>(NAME, logits, layout)?);
        let n_blocks = (self.n * self.m).div_ceil(SUM_THREADS as usize);
        let (pixels, c, m) = (size(self.n * self.m)?, size(self.c)?, size(self.m)?);
        size(self.n * self.c * self.m)?;
        let (mut partial, config) = (uninit::<f64>(device, n_blocks)?, per_block(n_blocks)?);
        let (targets, weights) = (&self.targets, &self.weights);
        // SAFETY: cross_entropy(u32 len, u32 c, u32 m, const T* logits, const short* targets, const double* weights,
        // double* partial): `len` pixels with a target each below `c`, a partial sum a block.
        unsafe { launch!(device, T, "cross_entropy", config, &pixels, &c, &m, &z, targets, weights, &mut partial) };
        let (count, total, mut loss) = (size(n_blocks)?, self.total_weight, uninit::<T>(device, 1)?);
        // SAFETY: cross_entropy_mean(u32 n_partial, double total_weight, const double* partial, T* loss).
        unsafe { launch!(device, T, "cross_entropy_mean", per_block(1)?, &count, &total, &partial, &mut loss) };
        Ok(stored(device, loss))
    }

    fn backward<T: Real>(&self, logits: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Tensor> {
        with_view::<T, _>(NAME, logits, |device, z| {
            with_view::<T, _>(NAME, grad_loss, |_, g| {
                let (pixels, c, m) = (size(self.n * self.m)?, size(self.c)?, size(self.m)?);
                let (total, mut grad) = (self.total_weight, uninit::<T>(device, self.n * self.c * self.m)?);
                let (targets, weights, config) = (&self.targets, &self.weights, per_element(self.n * self.m)?);
                // SAFETY: cross_entropy_grad(u32 len, u32 c, u32 m, double total_weight, const T* logits, const short*
                // targets, const double* weights, const T* grad_loss, T* grad): as in the forward pass, one gradient of
                // the loss, one element of `grad` for each logit.
                unsafe {
                    launch!(
                        device,
                        T,
                        "cross_entropy_grad",
                        config,
                        &pixels,
                        &c,
                        &m,
                        &total,
                        &z,
                        targets,
                        weights,
                        &g,
                        &mut grad
                    )
                };
                Ok(tensor(device, grad, logits.shape()))
            })
        })
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("{NAME}: the CUDA form got logits on the CPU")
    }

    fn cuda_fwd(&self, logits: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let loss = for_float!(NAME, logits.dtype(), T => self.forward::<T>(logits, layout))?;
        Ok((loss, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad_loss = grad_loss.contiguous()?;
        for_float!(NAME, logits.dtype(), T => self.backward::<T>(logits, &grad_loss)).map(Some)
    }
}
