//! Optimizers: what moves the weights, one tensor of state beside each where the rule needs it.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Storage, Tensor};
use rayon::prelude::*;

use segdistill_ops::{Element, NamedParam, ParamKind, vectorised};

use crate::error::{Result, TrainError};

mod adam;
mod sgd;

pub use adam::{Adam, AdamConfig};
pub use sgd::Sgd;

/// Elements a rayon task takes: large enough to amortise the task, small enough to share one big layer.
const CHUNK: usize = 1 << 15;

/// A rule that moves parameters along their gradients.
pub trait Optimizer {
    /// The parameters it moves, sorted by name.
    fn params(&self) -> &[NamedParam];

    /// Its state by name, for the checkpoint.
    fn state(&self) -> &BTreeMap<String, Tensor>;

    /// One step at `lr` with gradients scaled by `scale` (1, or the clipping factor).
    ///
    /// # Errors
    /// `Config` when `grads` does not follow the order of [`Optimizer::params`].
    fn step(&mut self, grads: &[Tensor], lr: f64, scale: f64) -> Result<()>;

    /// Gradients in the order of [`Optimizer::params`]; every one of these must have one.
    ///
    /// # Errors
    /// `NoGradient` naming those that have none.
    fn gradients(&self, found: &GradStore) -> Result<Vec<Tensor>> {
        let gradients: Vec<Option<Tensor>> = self.params().iter().map(|p| found.get(&p.tensor).cloned()).collect();
        if gradients.iter().any(Option::is_none) {
            let unreached =
                self.params().iter().zip(&gradients).filter(|(_, g)| g.is_none()).map(|(p, _)| p.name.clone());
            return Err(TrainError::NoGradient { parameters: unreached.collect() });
        }
        Ok(gradients.into_iter().flatten().collect())
    }

    /// Takes the state of a checkpoint, whole or not at all.
    ///
    /// # Errors
    /// `Config` listing the names or shapes that differ.
    fn load_state(&mut self, state: BTreeMap<String, Tensor>) -> Result<()> {
        let shapes = |m: &BTreeMap<String, Tensor>| -> Vec<_> {
            m.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect()
        };
        let (found, expected) = (shapes(&state), shapes(self.state()));
        if found != expected {
            let differing: Vec<String> = found
                .iter()
                .filter(|f| !expected.contains(f))
                .chain(expected.iter().filter(|e| !found.contains(e)))
                .map(|(name, shape)| format!("{name} {shape:?}"))
                .collect();
            return Err(TrainError::config(
                format!("optimizer state does not fit the network: {}", differing.join(", ")),
                "resume with the network the run was started with",
            ));
        }
        for (name, own) in self.state() {
            own.slice_set(&state[name].to_device(own.device())?.to_dtype(own.dtype())?, 0, 0)?;
        }
        Ok(())
    }
}

/// Those of `params` that learn, sorted by name.
fn trainable(params: Vec<NamedParam>) -> Vec<NamedParam> {
    let mut params: Vec<NamedParam> = params.into_iter().filter(|p| p.kind != ParamKind::Buffer).collect();
    params.sort_by(|a, b| a.name.cmp(&b.name));
    params
}

/// Refuses gradients that are not those of `params`, in their order.
fn check_gradients(params: &[NamedParam], grads: &[Tensor]) -> Result<()> {
    if grads.len() != params.len() {
        let what = format!("{} gradients for {} parameters", grads.len(), params.len());
        return Err(TrainError::config(what, "pass one gradient a parameter"));
    }
    if let Some((p, grad)) = params.iter().zip(grads).find(|(p, grad)| p.tensor.dims() != grad.dims()) {
        let what = format!("gradient {:?} of `{}` {:?}", grad.dims(), p.name, p.tensor.dims());
        return Err(TrainError::config(what, "pass each parameter's own gradient, in the order of `params`"));
    }
    Ok(())
}

/// Sum of squares of one tensor in f64, in fixed chunks: the same bits for any number of threads.
fn square_sum(tensor: &Tensor) -> Result<f64> {
    fn sum<T: Element>(values: &[T]) -> f64 {
        const LANES: usize = 16;
        let partial = values.par_chunks(CHUNK).map(|chunk| {
            vectorised(
                #[inline(always)]
                || {
                    let mut lanes = [0.0; LANES];
                    let whole = chunk.chunks_exact(LANES);
                    for (lane, v) in lanes.iter_mut().zip(whole.remainder()) {
                        *lane += v.to_f64() * v.to_f64();
                    }
                    for values in whole {
                        for (lane, v) in lanes.iter_mut().zip(values) {
                            *lane += v.to_f64() * v.to_f64();
                        }
                    }
                    lanes.iter().sum::<f64>()
                },
            )
        });
        partial.collect::<Vec<f64>>().iter().sum()
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().ok_or_else(no_norm)?;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => Ok(sum(&v[start..end])),
        Storage::Cpu(CpuStorage::F64(v)) => Ok(sum(&v[start..end])),
        _ => Err(no_norm().into()),
    }
}

/// [`square_sum`] as a scalar on the tensor's device.
fn square_sum_on_device(tensor: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() {
        return Ok(segdistill_ops::cuda::square_sum(tensor)?);
    }
    Ok(tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?)
}

/// Euclidean norm of all gradients together; NaN or infinite when one element is.
///
/// # Errors
/// `Candle` when a tensor cannot be read.
pub fn global_norm(grads: &[Tensor]) -> Result<f64> {
    let mut total = 0.0;
    let mut elsewhere = Vec::new();
    for grad in grads {
        match grad.device().is_cpu() {
            true => total += square_sum(grad)?,
            false => elsewhere.push(square_sum_on_device(grad)?),
        }
    }
    if !elsewhere.is_empty() {
        // One wait for the device, not one a tensor.
        total += Tensor::stack(&elsewhere, 0)?.to_vec1::<f64>()?.iter().sum::<f64>();
    }
    Ok(total.sqrt())
}

fn no_norm() -> candle_core::Error {
    candle_core::Error::Msg("a norm needs contiguous tensors of f32 or f64".into())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn norm_is_euclidean_and_sees_nan() -> Result<()> {
        let t = |v: &[f32]| Tensor::new(v, &Device::Cpu).expect("tensor");
        assert!((global_norm(&[t(&[3.0]), t(&[0.0, 4.0])])? - 5.0).abs() < 1e-12);
        assert!(global_norm(&[t(&[1.0, f32::NAN])])?.is_nan());
        // Every element counts, whichever lane or task it falls to.
        let n = CHUNK + 37;
        let ones = Tensor::ones(n, DType::F32, &Device::Cpu)?;
        assert_eq!(global_norm(&[ones])?, (n as f64).sqrt());
        Ok(())
    }
}
