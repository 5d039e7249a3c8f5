//! Stochastic gradient descent with momentum, in place, with decay by parameter kind.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};
use rayon::prelude::*;

use segdistill_ops::{Element, NamedParam, ParamKind, ParamStore, combine_in_place, vectorised};

use crate::config::OptimConfig;
use crate::error::Result;
use crate::optim::{CHUNK, Optimizer, check_gradients, trainable};

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
        Self::over(store.named(), cfg)
    }

    /// An optimizer over the trainable ones of `params`, whose names differ; buffers get no state.
    ///
    /// # Errors
    /// As [`Sgd::new`].
    pub fn over(params: Vec<NamedParam>, cfg: OptimConfig) -> Result<Self> {
        let params = trainable(params);
        let mut velocity = BTreeMap::new();
        for p in &params {
            velocity.insert(p.name.clone(), p.tensor.zeros_like()?.detach());
        }
        Ok(Self { params, velocity, cfg })
    }
}

impl Optimizer for Sgd {
    fn params(&self) -> &[NamedParam] {
        &self.params
    }

    fn state(&self) -> &BTreeMap<String, Tensor> {
        &self.velocity
    }

    fn step(&mut self, grads: &[Tensor], lr: f64, scale: f64) -> Result<()> {
        check_gradients(&self.params, grads)?;
        for (p, grad) in self.params.iter().zip(grads) {
            let decayed = self.cfg.decay_all || p.kind == ParamKind::Weight;
            let decay = if decayed { self.cfg.weight_decay } else { 0.0 };
            let grad = grad.contiguous()?;
            let rule = Rule { lr, momentum: self.cfg.momentum, scale, decay, nesterov: self.cfg.nesterov };
            if !p.tensor.device().is_cpu() {
                rule.apply_in_two(&self.velocity[&p.name], &p.tensor, &grad)?;
                continue;
            }
            self.velocity[&p.name].inplace_op1(&Step { weight: &p.tensor, grad: &grad, rule })?;
        }
        Ok(())
    }
}

/// `d = scale * g + decay * w; v = m * v + d; w -= lr * (nesterov ? d + m * v : v)`.
#[derive(Clone, Copy)]
struct Rule {
    lr: f64,
    momentum: f64,
    scale: f64,
    decay: f64,
    nesterov: bool,
}

impl Rule {
    /// Velocity and weight on any device, a pass each.
    fn apply_in_two(&self, velocity: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<()> {
        let Rule { lr, momentum, scale, decay, nesterov } = *self;
        combine_in_place(velocity, grad, weight, [momentum, scale, decay])?;
        let factors = match nesterov {
            true => [1.0 - lr * decay, -lr * momentum, -lr * scale],
            false => [1.0, -lr, 0.0],
        };
        Ok(combine_in_place(weight, velocity, grad, factors)?)
    }

    /// Velocity and weight in one pass over memory.
    fn apply<T: Element>(&self, velocity: &mut [T], weight: &mut [T], grad: &[T]) {
        let [lr, momentum, scale, decay] = [self.lr, self.momentum, self.scale, self.decay].map(T::from_f64);
        let chunks = velocity.par_chunks_mut(CHUNK).zip(weight.par_chunks_mut(CHUNK)).zip(grad.par_chunks(CHUNK));
        chunks.for_each(|((v, w), g)| {
            let each = v.iter_mut().zip(w).zip(g);
            vectorised(
                #[inline(always)]
                || {
                    if self.nesterov {
                        for ((v, w), &g) in each {
                            let d = scale * g + decay * *w;
                            *v = momentum * *v + d;
                            *w -= lr * (d + momentum * *v);
                        }
                    } else {
                        for ((v, w), &g) in each {
                            *v = momentum * *v + (scale * g + decay * *w);
                            *w -= lr * *v;
                        }
                    }
                },
            );
        });
    }
}

/// One step of one parameter. An operation in place writes one tensor: this one writes the velocity and starts
/// [`Move`], which holds on to it and writes the weight.
struct Step<'a> {
    weight: &'a Tensor,
    grad: &'a Tensor,
    rule: Rule,
}

/// The inner half of [`Step`].
struct Move<'a> {
    velocity: RefCell<Elements<'a>>,
    rule: Rule,
}

enum Elements<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

fn range(layout: &Layout) -> candle_core::Result<std::ops::Range<usize>> {
    let offsets = layout.contiguous_offsets();
    offsets.map(|(start, end)| start..end).ok_or_else(|| candle_core::Error::Msg("SGD needs contiguous tensors".into()))
}

fn not_float() -> candle_core::Error {
    candle_core::Error::Msg("SGD takes f32 or f64 tensors of one type".into())
}

impl InplaceOp1 for Step<'_> {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(&self, velocity: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let velocity = match velocity {
            CpuStorage::F32(v) => Elements::F32(&mut v[range(layout)?]),
            CpuStorage::F64(v) => Elements::F64(&mut v[range(layout)?]),
            _ => return Err(not_float()),
        };
        self.weight.inplace_op2(self.grad, &Move { velocity: RefCell::new(velocity), rule: self.rule })
    }
}

impl InplaceOp2 for Move<'_> {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(&self, weight: &mut CpuStorage, lw: &Layout, grad: &CpuStorage, lg: &Layout) -> candle_core::Result<()> {
        let (lw, lg) = (range(lw)?, range(lg)?);
        match (&mut *self.velocity.borrow_mut(), weight, grad) {
            (Elements::F32(v), CpuStorage::F32(w), CpuStorage::F32(g)) => self.rule.apply(v, &mut w[lw], &g[lg]),
            (Elements::F64(v), CpuStorage::F64(w), CpuStorage::F64(g)) => self.rule.apply(v, &mut w[lw], &g[lg]),
            _ => return Err(not_float()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
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
    /// w = [1, -2] with gradients [0.5, 1], [-1, 0.25], [2, -3]; printed by `tests/fixtures/make_optim.py`.
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
    fn a_step_writes_every_element_of_velocity_and_weight() -> Result<()> {
        // Two tasks and a rest; numbers that f32 holds, so that the definition gives the same bits.
        let n = 2 * CHUNK + 5;
        let ramp = |k: usize| Tensor::from_iter((0..n).map(|i| ((i * k) % 64) as f32 / 64.0), &Device::Cpu);
        let (start, grad) = (ramp(3)?, ramp(7)?);
        for nesterov in [false, true] {
            let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
            let w = store.root().get("w", &[n], ParamKind::Weight, Init::Constant(0.0))?;
            w.slice_set(&start, 0, 0)?;
            let cfg = OptimConfig { momentum: 0.5, weight_decay: 0.25, ..cfg(nesterov) };
            let mut sgd = Sgd::new(&store, cfg)?;
            let (mut expected_w, mut expected_v) = (start.to_vec1::<f32>()?, vec![0f32; n]);
            for _ in 0..2 {
                sgd.step(std::slice::from_ref(&grad), 0.125, 0.5)?;
                for (i, g) in grad.to_vec1::<f32>()?.into_iter().enumerate() {
                    let d = 0.5 * g + 0.25 * expected_w[i];
                    expected_v[i] = 0.5 * expected_v[i] + d;
                    expected_w[i] -= 0.125 * if nesterov { d + 0.5 * expected_v[i] } else { expected_v[i] };
                }
            }
            assert_eq!(w.to_vec1::<f32>()?, expected_w);
            assert_eq!(sgd.state()["w"].to_vec1::<f32>()?, expected_v);
        }
        Ok(())
    }

    #[test]
    fn two_passes_on_any_device_give_what_one_pass_gives() -> Result<()> {
        for device in segdistill_ops::testing::devices() {
            for nesterov in [false, true] {
                let n = CHUNK + 5;
                let random = |name: &str| segdistill_ops::testing::random_f64(3, name, &[n]);
                let (start, grad) = (random("w"), random("g"));
                let rule = Rule { lr: 0.1, momentum: 0.9, scale: 0.7, decay: 0.01, nesterov };
                let [w, v] = [&start, &start].map(|t| t.to_device(&device).and_then(|t| t.copy()));
                let (w, v) = (w?, v?);
                rule.apply_in_two(&v, &w, &grad.to_device(&device)?)?;
                let (mut one_w, mut one_v) = (start.to_vec1::<f64>()?, start.to_vec1::<f64>()?);
                rule.apply(&mut one_v, &mut one_w, &grad.to_vec1::<f64>()?);
                assert_close(&v, &Tensor::new(one_v, &Device::Cpu)?, 1e-14, "the same arithmetic in f64");
                assert_close(&w, &Tensor::new(one_w, &Device::Cpu)?, 1e-14, "the same arithmetic in f64");
            }
        }
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
