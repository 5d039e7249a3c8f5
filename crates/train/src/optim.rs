//! Stochastic gradient descent with momentum, in place, with decay by parameter kind.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, DType, InplaceOp3, Layout, Storage, Tensor};
use rayon::prelude::*;

use segdistill_ops::{NamedParam, ParamKind, ParamStore};

use crate::config::OptimConfig;
use crate::error::{Result, TrainError};

/// Elements a rayon task takes: large enough to amortise the task, small enough to share one big layer.
const CHUNK: usize = 1 << 15;

/// SGD with momentum, as PyTorch computes it:
/// `d = g + wd * w; v = m * v + d; w -= lr * (nesterov ? d + m * v : v)`, with `v` starting at `d`.
///
/// # Source
/// Sutskever et al. 2013; `torch.optim.SGD` with dampening 0.
#[derive(Debug)]
pub struct Sgd {
    params: Vec<NamedParam>,
    velocity: BTreeMap<String, Tensor>,
    cfg: OptimConfig,
}

impl Sgd {
    /// An optimizer over the trainable tensors of `store`; buffers get no state.
    ///
    /// # Errors
    /// `Candle` when the state cannot be allocated.
    pub fn new(store: &ParamStore, cfg: OptimConfig) -> Result<Self> {
        let params: Vec<NamedParam> = store.named().into_iter().filter(|p| p.kind != ParamKind::Buffer).collect();
        let mut velocity = BTreeMap::new();
        for p in &params {
            velocity.insert(p.name.clone(), p.tensor.zeros_like()?.detach());
        }
        Ok(Self { params, velocity, cfg })
    }

    /// The parameters this optimizer moves, sorted by name.
    pub fn params(&self) -> &[NamedParam] {
        &self.params
    }

    /// Momentum buffers by parameter name, for the checkpoint.
    pub fn state(&self) -> &BTreeMap<String, Tensor> {
        &self.velocity
    }

    /// Takes the momentum buffers of a checkpoint, whole or not at all.
    ///
    /// # Errors
    /// `Config` listing the names or shapes that differ.
    pub fn load_state(&mut self, state: BTreeMap<String, Tensor>) -> Result<()> {
        let shapes = |m: &BTreeMap<String, Tensor>| -> Vec<_> {
            m.iter().map(|(k, t)| (k.clone(), t.dims().to_vec())).collect()
        };
        let (found, expected) = (shapes(&state), shapes(&self.velocity));
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
        for (name, velocity) in &self.velocity {
            velocity.slice_set(&state[name].to_dtype(velocity.dtype())?, 0, 0)?;
        }
        Ok(())
    }

    /// One step at `lr` with gradients scaled by `scale` (1, or the clipping factor).
    ///
    /// # Errors
    /// `Config` when `grads` does not follow the order of [`Sgd::params`].
    pub fn step(&mut self, grads: &[Tensor], lr: f64, scale: f64) -> Result<()> {
        if grads.len() != self.params.len() {
            let what = format!("{} gradients for {} parameters", grads.len(), self.params.len());
            return Err(TrainError::config(what, "pass one gradient a parameter"));
        }
        for (p, grad) in self.params.iter().zip(grads) {
            let decayed = self.cfg.decay_all || p.kind == ParamKind::Weight;
            let decay = if decayed { self.cfg.weight_decay } else { 0.0 };
            let velocity = &self.velocity[&p.name];
            let grad = grad.contiguous()?;
            let momentum = self.cfg.momentum;
            velocity.inplace_op3(&grad, &p.tensor, &Velocity { momentum, scale, decay })?;
            p.tensor.inplace_op3(velocity, &grad, &Move { lr, momentum, scale, decay, nesterov: self.cfg.nesterov })?;
        }
        Ok(())
    }
}

/// `v = m * v + scale * g + decay * w`.
struct Velocity {
    momentum: f64,
    scale: f64,
    decay: f64,
}

/// `w -= lr * v`, or `w -= lr * (scale * g + decay * w + m * v)`.
struct Move {
    lr: f64,
    momentum: f64,
    scale: f64,
    decay: f64,
    nesterov: bool,
}

fn zip3<T, F>(a: (&mut [T], &Layout), b: (&[T], &Layout), c: (&[T], &Layout), f: F) -> candle_core::Result<()>
where
    T: Send + Sync + Copy,
    F: Fn(&mut T, T, T) + Sync,
{
    let range = |l: &Layout| {
        l.contiguous_offsets().ok_or_else(|| candle_core::Error::Msg("SGD needs contiguous tensors".into()))
    };
    let ((a0, a1), (b0, b1), (c0, c1)) = (range(a.1)?, range(b.1)?, range(c.1)?);
    let (b, c) = (&b.0[b0..b1], &c.0[c0..c1]);
    a.0[a0..a1].par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).zip(c.par_chunks(CHUNK)).for_each(|((a, b), c)| {
        for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
            f(a, *b, *c);
        }
    });
    Ok(())
}

fn not_float() -> candle_core::Error {
    candle_core::Error::Msg("SGD takes f32 or f64 tensors of one type".into())
}

impl InplaceOp3 for Velocity {
    fn name(&self) -> &'static str {
        "sgd-velocity"
    }

    fn cpu_fwd(
        &self,
        velocity: &mut CpuStorage,
        lv: &Layout,
        grad: &CpuStorage,
        lg: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
    ) -> candle_core::Result<()> {
        match (velocity, grad, weight) {
            (CpuStorage::F32(v), CpuStorage::F32(g), CpuStorage::F32(w)) => {
                let (m, s, d) = (self.momentum as f32, self.scale as f32, self.decay as f32);
                zip3((v, lv), (g, lg), (w, lw), |v, g, w| *v = m * *v + (s * g + d * w))
            }
            (CpuStorage::F64(v), CpuStorage::F64(g), CpuStorage::F64(w)) => {
                let (m, s, d) = (self.momentum, self.scale, self.decay);
                zip3((v, lv), (g, lg), (w, lw), |v, g, w| *v = m * *v + (s * g + d * w))
            }
            _ => Err(not_float()),
        }
    }
}

impl InplaceOp3 for Move {
    fn name(&self) -> &'static str {
        "sgd-move"
    }

    fn cpu_fwd(
        &self,
        weight: &mut CpuStorage,
        lw: &Layout,
        velocity: &CpuStorage,
        lv: &Layout,
        grad: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<()> {
        match (weight, velocity, grad) {
            (CpuStorage::F32(w), CpuStorage::F32(v), CpuStorage::F32(g)) => {
                let (r, m, s, d) = (self.lr as f32, self.momentum as f32, self.scale as f32, self.decay as f32);
                if self.nesterov {
                    zip3((w, lw), (v, lv), (g, lg), |w, v, g| *w -= r * (s * g + d * *w + m * v))
                } else {
                    zip3((w, lw), (v, lv), (g, lg), |w, v, _| *w -= r * v)
                }
            }
            (CpuStorage::F64(w), CpuStorage::F64(v), CpuStorage::F64(g)) => {
                let (r, m, s, d) = (self.lr, self.momentum, self.scale, self.decay);
                if self.nesterov {
                    zip3((w, lw), (v, lv), (g, lg), |w, v, g| *w -= r * (s * g + d * *w + m * v))
                } else {
                    zip3((w, lw), (v, lv), (g, lg), |w, v, _| *w -= r * v)
                }
            }
            _ => Err(not_float()),
        }
    }
}

/// Sum of squares of one tensor in f64, in fixed chunks: the same bits for any number of threads.
fn square_sum(tensor: &Tensor) -> Result<f64> {
    fn sum<T: Copy + Sync + Into<f64>>(values: &[T]) -> f64 {
        let partial: Vec<f64> = values
            .par_chunks(CHUNK)
            .map(|c| {
                c.iter().fold(0.0, |s, v| {
                    let v: f64 = (*v).into();
                    s + v * v
                })
            })
            .collect();
        partial.iter().sum()
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().ok_or_else(not_float)?;
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => Ok(sum(&v[start..end])),
        Storage::Cpu(CpuStorage::F64(v)) => Ok(sum(&v[start..end])),
        _ => {
            drop(storage);
            Ok(tensor.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
        }
    }
}

/// Euclidean norm of all gradients together; NaN or infinite when one element is.
///
/// # Errors
/// `Candle` when a tensor cannot be read.
pub fn global_norm(grads: &[Tensor]) -> Result<f64> {
    let mut total = 0.0;
    for grad in grads {
        total += square_sum(grad)?;
    }
    Ok(total.sqrt())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use segdistill_ops::{Init, testing::assert_close};

    use super::*;

    fn cfg(nesterov: bool) -> OptimConfig {
        OptimConfig {
            lr: 0.1,
            momentum: 0.9,
            nesterov,
            weight_decay: 0.01,
            decay_all: false,
            poly_power: 0.9,
            warmup_steps: 0,
            clip_norm: 0.0,
        }
    }

    /// Three steps of `torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=N)` in f64 from
    /// w = [1, -2] with gradients [0.5, 1], [-1, 0.25], [2, -3]; printed by `tests/fixtures/make_sgd.py`.
    #[test]
    fn follows_pytorch() -> Result<()> {
        for (nesterov, expected) in [(false, PLAIN), (true, NESTEROV)] {
            let store = ParamStore::trainable(0, DType::F64, &Device::Cpu);
            let w = store.root().get("w", &[2], ParamKind::Weight, Init::Constant(0.0))?;
            let b = store.root().get("b", &[1], ParamKind::Bias, Init::Constant(1.0))?;
            w.slice_set(&Tensor::new(&[1f64, -2.0], &Device::Cpu)?, 0, 0)?;
            let mut sgd = Sgd::new(&store, cfg(nesterov))?;
            for g in [[0.5f64, 1.0], [-1.0, 0.25], [2.0, -3.0]] {
                sgd.step(&[Tensor::new(&[0f64], &Device::Cpu)?, Tensor::new(&g, &Device::Cpu)?], 0.1, 1.0)?;
            }
            assert_close(&w, &Tensor::new(&expected, &Device::Cpu)?, 1e-14, "same arithmetic in f64");
            assert_close(&b, &Tensor::new(&[1f64], &Device::Cpu)?, 0.0, "a bias is not decayed");
        }
        Ok(())
    }
    const PLAIN: [f64; 2] = [0.848984749, -2.0068846979999995];
    const NESTEROV: [f64; 2] = [0.7111684581909999, -1.824460438182];

    #[test]
    fn norm_is_euclidean_and_sees_nan() -> Result<()> {
        let t = |v: &[f32]| Tensor::new(v, &Device::Cpu).expect("tensor");
        assert!((global_norm(&[t(&[3.0]), t(&[0.0, 4.0])])? - 5.0).abs() < 1e-12);
        assert!(global_norm(&[t(&[1.0, f32::NAN])])?.is_nan());
        Ok(())
    }

    #[test]
    fn state_is_taken_whole_or_not_at_all() -> Result<()> {
        let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
        store.root().get("w", &[2], ParamKind::Weight, Init::Constant(1.0))?;
        let mut sgd = Sgd::new(&store, cfg(false))?;
        let wrong = BTreeMap::from([("w".to_string(), Tensor::zeros(3, DType::F32, &Device::Cpu)?)]);
        let message = sgd.load_state(wrong).expect_err("shape differs").to_string();
        assert!(message.contains("w [3]") && message.contains("w [2]"), "{message}");
        Ok(())
    }
}
