//! Whole steps of DeepLabV3+: what `train` does in a step, inference, and the optimizer alone.
//!
//! Weights, images and labels come from the shared formula, so that the first step's loss and gradient norm are those
//! of the peer. Dropout is off on both sides: the two would not draw the same mask, and it costs next to nothing.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use segdistill_data::{Batch, classes::VOID};
use segdistill_models::{Frozen, ModelSpec, Segmenter, build};
use segdistill_ops::{Mode, ParamKind, ParamStore, graph};
use segdistill_train::{
    Objective, OptimConfig, Optimizer, ScheduleConfig, Setting, Sgd, StepInputs, TermConfig, TermKind, global_norm,
};

use super::{Answer, Workload, products, sizes};
use crate::case::Precision;
use crate::error::{BenchError, Result};
use crate::fill::{filled, images, labels, parameter};

/// Small, so that hundreds of steps on one batch stay finite; the peer has the same.
const OPTIM: OptimConfig = OptimConfig {
    lr: 1e-4,
    momentum: 0.9,
    nesterov: false,
    weight_decay: 1e-4,
    decay_all: false,
    poly_power: 0.9,
    warmup_steps: 0,
    clip_norm: 0.0,
};

fn spec(encoder: &str, classes: usize) -> ModelSpec {
    ModelSpec { dropout: 0.0, ..ModelSpec::deeplabv3plus(encoder, classes) }
}

/// A trainable network filled by the formula.
fn network(spec: &ModelSpec, precision: Precision) -> Result<(ParamStore, Box<dyn Segmenter>)> {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu).with_precision(products(precision)?);
    let model = build(spec, &store)?;
    for p in store.named() {
        if let Some(var) = p.var {
            var.set(&parameter(&p.name, p.tensor.dims())?)?;
        }
    }
    Ok((store, model))
}

/// The same tensors alone. Names and shapes come from a network over a store of nothing, whose zeros are never touched:
/// what is measured afterwards holds no second network.
fn tensors(spec: &ModelSpec) -> Result<BTreeMap<String, Tensor>> {
    let store = ParamStore::frozen(BTreeMap::new(), DType::F32, &Device::Cpu)?;
    build(spec, &store)?;
    store.named().into_iter().map(|p| Ok((p.name.clone(), parameter(&p.name, p.tensor.dims())?))).collect()
}

/// A training step.
pub(super) struct TrainStep {
    name: String,
    model: Box<dyn Segmenter>,
    objective: Objective,
    sgd: Sgd,
    batch: Batch,
    step: u64,
}

impl TrainStep {
    pub(super) fn new(
        name: String,
        encoder: &str,
        input: [usize; 4],
        classes: usize,
        precision: Precision,
    ) -> Result<Self> {
        let (store, model) = network(&spec(encoder, classes), precision)?;
        let term = TermConfig { loss: TermKind::ce(), weight: 1.0, schedule: ScheduleConfig::Constant };
        let [n, _, h, w] = input;
        let batch = Batch {
            images_nchw: images(&input)?,
            labels_nhw: labels(&[n, h, w], classes, VOID)?,
            names: (0..n).map(|i| format!("formula-{i}")).collect(),
        };
        Ok(Self {
            name,
            objective: Objective::new(
                &[term],
                &Setting {
                    steps: 1,
                    seed: 0,
                    class_weights: None,
                    optim: &OPTIM,
                    student: model.info(),
                    teacher: None,
                    device: &Device::Cpu,
                },
            )?,
            model,
            sgd: Sgd::new(&store, OPTIM)?,
            batch,
            step: 0,
        })
    }

    /// Loss and gradient norm of a step, which is taken.
    fn step(&mut self) -> Result<(f64, f64)> {
        let mode = Mode::Train { seed: 0, step: self.step };
        let inputs = StepInputs::forward(self.model.as_ref(), None, &self.batch, mode)?;
        let terms = self.objective.terms(&inputs, 0)?;
        // Nothing of the forward pass is held while the gradients are formed, as in training.
        drop(inputs);
        let loss = terms.into_iter().find_map(|t| t.loss);
        let loss = loss.ok_or_else(|| BenchError::wrong(&self.name, "no loss"))?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        let store = graph::backward(loss)?;
        let none = |name: &str| BenchError::wrong(&self.name, format!("no gradient of {name}"));
        let of = |p: &segdistill_ops::NamedParam| store.get(&p.tensor).cloned().ok_or_else(|| none(&p.name));
        let grads = self.sgd.params().iter().map(of).collect::<Result<Vec<Tensor>>>()?;
        let norm = global_norm(&grads)?;
        self.sgd.step(&grads, OPTIM.lr, 1.0)?;
        self.step += 1;
        if !(value.is_finite() && norm.is_finite()) {
            return Err(BenchError::wrong(
                &self.name,
                format!("loss {value} and gradient norm {norm} at step {}", self.step),
            ));
        }
        Ok((value, norm))
    }
}

impl Workload for TrainStep {
    fn answer(&mut self) -> Result<Answer> {
        let (loss, norm) = self.step()?;
        Ok(Answer::from([("loss".to_string(), loss), ("grad-norm".to_string(), norm)]))
    }

    fn run(&mut self) -> Result<()> {
        self.step()?;
        Ok(())
    }
}

/// A forward pass of a frozen network.
pub(super) struct Inference {
    name: String,
    model: Frozen,
    images_nchw: Tensor,
    /// What the check builds the training graph from.
    spec: ModelSpec,
}

impl Inference {
    pub(super) fn new(name: String, encoder: &str, input: [usize; 4], classes: usize) -> Result<Self> {
        let spec = spec(encoder, classes);
        let model = Frozen::new(&spec, tensors(&spec)?, DType::F32, &Device::Cpu)?;
        Ok(Self { name, model, images_nchw: images(&input)?, spec })
    }
}

impl Workload for Inference {
    fn answer(&mut self) -> Result<Answer> {
        let logits = self.model.forward(&self.images_nchw)?.logits_nchw;
        // The same weights through the graph that training evaluates with.
        let (_store, model) = network(&self.spec, Precision::F32)?;
        let expected = model.forward(&self.images_nchw, Mode::Eval)?.logits_nchw;
        let apart = segdistill_ops::testing::relative_error(&logits, &expected)?;
        if !(apart <= 1e-4) {
            let what = format!("logits are {apart:.1e} from those of the training graph, allowed 1e-4");
            return Err(BenchError::wrong(&self.name, what));
        }
        sizes(&self.name, [("logits".to_string(), &logits)])
    }

    fn run(&mut self) -> Result<()> {
        self.model.forward(&self.images_nchw)?;
        Ok(())
    }
}

/// The optimizer alone, over all parameters of a network.
pub(super) struct SgdStep {
    name: String,
    sgd: Sgd,
    grads: Vec<Tensor>,
}

impl SgdStep {
    pub(super) fn new(name: String, encoder: &str, classes: usize) -> Result<Self> {
        let (store, _) = network(&spec(encoder, classes), Precision::F32)?;
        let sgd = Sgd::new(&store, OPTIM)?;
        let grad = |p: &segdistill_ops::NamedParam| filled(&format!("grad/{}", p.name), p.tensor.dims(), 1.0);
        let grads = sgd.params().iter().map(grad).collect::<Result<Vec<_>>>()?;
        Ok(Self { name, sgd, grads })
    }

    fn first_elements(&self) -> Result<Vec<f64>> {
        let first = |p: &segdistill_ops::NamedParam| -> Result<f64> {
            Ok(f64::from(p.tensor.flatten_all()?.get(0)?.to_scalar::<f32>()?))
        };
        self.sgd.params().iter().map(first).collect()
    }
}

impl Workload for SgdStep {
    fn answer(&mut self) -> Result<Answer> {
        let before = self.first_elements()?;
        self.run()?;
        let after = self.first_elements()?;
        // The first step: the velocity is the decayed gradient.
        let mut moved = 0.0;
        for (i, p) in self.sgd.params().iter().enumerate() {
            let grad = f64::from(self.grads[i].flatten_all()?.get(0)?.to_scalar::<f32>()?);
            let decay = if p.kind == ParamKind::Weight { OPTIM.weight_decay } else { 0.0 };
            let step = OPTIM.lr * (grad + decay * before[i]);
            let (found, expected) = (after[i], before[i] - step);
            if !((found - expected).abs() <= 1e-6 * expected.abs().max(OPTIM.lr)) {
                let what = format!("first element of {} is {found:.9e}, expected {expected:.9e}", p.name);
                return Err(BenchError::wrong(&self.name, what));
            }
            moved += step * step;
        }
        Ok(Answer::from([("step".to_string(), moved.sqrt())]))
    }

    fn run(&mut self) -> Result<()> {
        Ok(self.sgd.step(&self.grads, OPTIM.lr, 1.0)?)
    }
}
