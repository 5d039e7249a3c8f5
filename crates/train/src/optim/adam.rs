//! Adam: steps scaled by running moments of the gradient.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use segdistill_ops::{NamedParam, ParamKind, combine_in_place};

use crate::error::{Result, TrainError};
use crate::optim::{Optimizer, check_gradients, trainable};

/// Settings of [`Adam`]; the learning rate is given with each step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// Decay of the first and of the second moment, each in [0, 1).
    pub betas: [f64; 2],
    /// Added to the root of the second moment, above 0.
    pub eps: f64,
    /// Added to the gradient, times the weight; biases and norms are left out.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    /// The settings of the paper.
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Adam, as PyTorch computes it:
/// `d = g + wd * w; m = b1 * m + (1 - b1) * d; v = b2 * v + (1 - b2) * d^2;`
/// `w -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)` at the t-th step, from 1.
///
/// # Source
/// Kingma and Ba 2015; `torch.optim.Adam`. DIFFERENCE: PyTorch's decays every parameter it is given, this one neither biases
/// nor norms.
#[derive(Debug)]
pub struct Adam {
    params: Vec<NamedParam>,
    /// Both moments of every parameter, and the number of steps.
    state: BTreeMap<String, Tensor>,
    cfg: AdamConfig,
}

/// Name of the number of steps in the state; those of moments have a dot.
const STEPS: &str = "steps";

fn moments(name: &str) -> [String; 2] {
    [format!("first.{name}"), format!("second.{name}")]
}

impl Adam {
    /// An optimizer over the trainable ones of `params`, whose names differ; buffers get no state.
    ///
    /// # Errors
    /// `Config` for a setting outside its range; `Candle` when the state cannot be allocated.
    pub fn over(params: Vec<NamedParam>, cfg: AdamConfig) -> Result<Self> {
        let AdamConfig { betas, eps, weight_decay } = cfg;
        let positive = eps > 0.0 && eps.is_finite() && weight_decay >= 0.0 && weight_decay.is_finite();
        if !positive || betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            return Err(TrainError::config(format!("{cfg:?}"), "use 0 <= betas < 1, eps > 0 and weight_decay >= 0"));
        }
        let params = trainable(params);
        let mut state = BTreeMap::from([(STEPS.to_string(), Tensor::zeros(1, DType::F64, &Device::Cpu)?)]);
        for p in &params {
            for name in moments(&p.name) {
                state.insert(name, p.tensor.zeros_like()?.detach());
            }
        }
        Ok(Self { params, state, cfg })
    }
}

impl Optimizer for Adam {
    fn params(&self) -> &[NamedParam] {
        &self.params
    }

    fn state(&self) -> &BTreeMap<String, Tensor> {
        &self.state
    }

    fn step(&mut self, grads: &[Tensor], lr: f64, scale: f64) -> Result<()> {
        check_gradients(&self.params, grads)?;
        let AdamConfig { betas: [b1, b2], eps, weight_decay } = self.cfg;
        let steps = &self.state[STEPS];
        let t = steps.to_vec1::<f64>()?[0] + 1.0;
        steps.slice_set(&Tensor::new(&[t], &Device::Cpu)?, 0, 0)?;
        let (bias1, bias2) = (1.0 - b1.powf(t), 1.0 - b2.powf(t));
        for (p, grad) in self.params.iter().zip(grads) {
            let (weight, grad) = (&p.tensor, grad.detach().contiguous()?);
            let decay = if p.kind == ParamKind::Weight { weight_decay } else { 0.0 };
            let direction = if decay == 0.0 && scale == 1.0 { grad } else { grad.copy()? };
            if decay != 0.0 || scale != 1.0 {
                combine_in_place(&direction, weight, weight, [scale, decay, 0.0])?;
            }
            let [first, second] = moments(&p.name).map(|name| &self.state[&name]);
            let squares = direction.sqr()?;
            combine_in_place(first, &direction, &direction, [b1, 1.0 - b1, 0.0])?;
            combine_in_place(second, &squares, &squares, [b2, 1.0 - b2, 0.0])?;
            let root = ((second.sqrt()? * bias2.sqrt().recip())? + eps)?;
            let change = first.div(&root)?;
            combine_in_place(weight, &change, &change, [1.0, -lr / bias1, 0.0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use segdistill_ops::{Init, ParamStore, testing::assert_close};

    use super::*;

    fn store(start: &[f64], device: &Device) -> Result<ParamStore> {
        let store = ParamStore::trainable(0, DType::F64, device);
        let w = store.root().get("w", &[start.len()], ParamKind::Weight, Init::Constant(0.0))?;
        w.slice_set(&Tensor::new(start, device)?, 0, 0)?;
        Ok(store)
    }

    const GRADIENTS: [[f64; 2]; 3] = [[0.5, 1.0], [-1.0, 0.25], [2.0, -3.0]];

    /// Three steps of `torch.optim.Adam([w], lr=0.1, betas=(0.9, 0.99), weight_decay=D)` in f64 from w = [1, -2];
    /// printed by `tests/fixtures/make_optim.py`.
    #[test]
    fn follows_pytorch() -> Result<()> {
        for device in segdistill_ops::testing::devices() {
            for (weight_decay, expected) in [(0.0, PLAIN), (0.01, DECAYED)] {
                let store = store(&[1.0, -2.0], &device)?;
                let cfg = AdamConfig { betas: [0.9, 0.99], weight_decay, ..AdamConfig::default() };
                let mut adam = Adam::over(store.named(), cfg)?;
                for g in GRADIENTS {
                    // A gradient scaled is another gradient.
                    let doubled = Tensor::new(&g.map(|g| 2.0 * g), &device)?;
                    adam.step(&[doubled], 0.1, 0.5)?;
                }
                let w = &store.named()[0].tensor;
                assert_close(w, &Tensor::new(&expected, &Device::Cpu)?, 1e-13, "same arithmetic in f64");
            }
        }
        Ok(())
    }
    const PLAIN: [f64; 2] = [0.8947302434042463, -2.1437922781417895];
    const DECAYED: [f64; 2] = [0.89305625109765, -2.141943845833021];

    #[test]
    fn what_is_loaded_goes_on_to_the_same_bits() -> Result<()> {
        let run = |cut: usize| -> Result<Vec<f64>> {
            let store = store(&[1.0, -2.0], &Device::Cpu)?;
            let mut adam = Adam::over(store.named(), AdamConfig::default())?;
            for (at, g) in GRADIENTS.iter().enumerate() {
                if at == cut {
                    let saved = adam.state().iter().map(|(name, t)| Ok((name.clone(), t.copy()?)));
                    let saved = saved.collect::<Result<BTreeMap<String, Tensor>>>()?;
                    adam = Adam::over(store.named(), AdamConfig::default())?;
                    adam.load_state(saved)?;
                }
                adam.step(&[Tensor::new(g, &Device::Cpu)?], 0.1, 1.0)?;
            }
            Ok(store.named()[0].tensor.to_vec1::<f64>()?)
        };
        let whole = run(usize::MAX)?;
        assert_eq!(run(1)?, whole);
        assert_eq!(run(2)?, whole);
        Ok(())
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        for cfg in [
            AdamConfig { betas: [1.0, 0.9], ..AdamConfig::default() },
            AdamConfig { eps: 0.0, ..AdamConfig::default() },
            AdamConfig { weight_decay: f64::NAN, ..AdamConfig::default() },
        ] {
            let error = Adam::over(Vec::new(), cfg).expect_err("out of range").to_string();
            assert!(error.contains("hint"), "{error}");
        }
    }
}
