//! What one stage trains: plain data, serialised into the plan and into every checkpoint.

use serde::{Deserialize, Serialize};

use segdistill_models::ModelSpec;
use segdistill_ops::Precision;

use crate::error::{Result, TrainError};
use crate::terms::{TermConfig, TermKind};

/// One network trained once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Folder name and report label of the objective: `teacher`, `ce`, `csc+ce`, ...
    pub method: String,
    /// Network.
    pub model: ModelSpec,
    /// Seed of the initial weights, the data order, the augmentation and dropout.
    pub seed: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Images a step.
    pub batch_size: usize,
    /// Optimizer and schedule.
    pub optim: OptimConfig,
    /// Terms of the objective, in report order.
    pub terms: Vec<TermConfig>,
    /// Image sizes and augmentation.
    pub input: InputConfig,
    /// Weights of the classes in the cross entropy.
    pub class_weighting: ClassWeighting,
    /// Steps between two evaluations on val (and a checkpoint after each).
    pub eval_every: u64,
    /// Precision of the products in training's convolutions. Weights, optimizer, losses, evaluation and a teacher's
    /// outputs are f32 whatever it says.
    #[serde(default, with = "PrecisionName")]
    pub precision: Precision,
}

/// How a [`Precision`] is written in recipes, plans and checkpoints: `"f32"` or `"bf16"`.
///
/// For fields of that type, as `#[serde(with = "PrecisionName")]`; `ops` itself knows no serde.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Precision", rename_all = "lowercase")]
pub enum PrecisionName {
    /// `"f32"`
    F32,
    /// `"bf16"`
    Bf16,
}

/// SGD and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Momentum in [0, 1).
    pub momentum: f64,
    /// Nesterov's form of the momentum.
    pub nesterov: bool,
    /// L2 decay of weights; norms and biases are left out unless `decay_all`.
    pub weight_decay: f64,
    /// Decay norms and biases too, as PyTorch does by default.
    pub decay_all: bool,
    /// Exponent of the polynomial decay.
    pub poly_power: f64,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Upper bound of the global gradient norm; 0 switches clipping off.
    pub clip_norm: f64,
}

/// Sizes in pixels as `[height, width]`, and augmentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// Images are shrunk to this size before anything else, in training and evaluation.
    pub size: [usize; 2],
    /// Training crop.
    pub crop: [usize; 2],
    /// Smallest and largest random scale.
    pub scale: [f64; 2],
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Half-width of the random brightness factor around 1; contrast and saturation take the same.
    pub jitter: f64,
    /// Loader threads.
    pub workers: usize,
}

/// Class weights of the cross entropy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassWeighting {
    /// All 1.
    None,
    /// Square root of median(frequency) / frequency, from the training labels.
    SqrtMedianFrequency,
    /// median(frequency) / frequency, from the training labels (SegNet).
    MedianFrequency,
    /// 1 / ln(1.02 + share of the labelled pixels), from the training labels (ENet).
    Enet,
}

fn check(ok: bool, what: impl FnOnce() -> String, hint: &'static str) -> Result<()> {
    if ok { Ok(()) } else { Err(TrainError::config(what(), hint)) }
}

impl Stage {
    /// Checks every range that can be checked without data or weights.
    ///
    /// # Errors
    /// `Config` naming the first setting outside its range.
    pub fn validate(&self) -> Result<()> {
        let (o, i) = (&self.optim, &self.input);
        check(self.steps > 0, || "steps = 0".into(), "train for at least one step")?;
        check(self.batch_size > 0, || "batch_size = 0".into(), "use at least one image a step")?;
        check(self.eval_every > 0, || "eval_every = 0".into(), "evaluate at least once in the run")?;
        check(o.lr > 0.0 && o.lr.is_finite(), || format!("optim.lr = {}", o.lr), "use a positive learning rate")?;
        check(
            (0.0..1.0).contains(&o.momentum),
            || format!("optim.momentum = {}", o.momentum),
            "use 0 <= momentum < 1",
        )?;
        check(
            o.weight_decay >= 0.0 && o.weight_decay.is_finite(),
            || format!("optim.weight_decay = {}", o.weight_decay),
            "use 0 or more",
        )?;
        check(
            o.poly_power > 0.0 && o.poly_power.is_finite(),
            || format!("optim.poly_power = {}", o.poly_power),
            "0.9 is usual",
        )?;
        check(
            o.clip_norm >= 0.0 && o.clip_norm.is_finite(),
            || format!("optim.clip_norm = {}", o.clip_norm),
            "0 switches clipping off",
        )?;
        let warm = || format!("optim.warmup_steps = {} of {} steps", o.warmup_steps, self.steps);
        check(o.warmup_steps < self.steps, warm, "warm up for less than the whole run")?;
        let sizes = || format!("input.size = {:?}, input.crop = {:?}", i.size, i.crop);
        check(i.size.iter().chain(&i.crop).all(|s| *s >= 32), sizes, "networks of stride 16 need at least 32 pixels")?;
        let scale = || format!("input.scale = {:?}", i.scale);
        check(i.scale[0] > 0.0 && i.scale[0] <= i.scale[1], scale, "use 0 < smallest <= largest")?;
        check((0.0..=1.0).contains(&i.flip), || format!("input.flip = {}", i.flip), "a probability")?;
        check((0.0..1.0).contains(&i.jitter), || format!("input.jitter = {}", i.jitter), "use 0 <= jitter < 1")?;
        crate::stage::transform(self).check()?;
        check(!self.terms.is_empty(), || "objective has no term".into(), "add a term such as { loss = \"ce\" }")?;
        for (k, t) in self.terms.iter().enumerate() {
            let name = t.loss.name();
            let weight = || format!("weight of `{name}` = {}", t.weight);
            check(t.weight >= 0.0 && t.weight.is_finite(), weight, "use a weight of 0 or more")?;
            let twice = || format!("term `{name}` appears twice");
            check(self.terms[..k].iter().all(|u| u.loss.name() != name), twice, "add the weights into one term")?;
            t.loss.validate()?;
        }
        // Every parameter of a network must learn, and only what exists can be a term.
        let has_aux = self.terms.iter().any(|t| t.loss == TermKind::Aux {} && t.weight > 0.0);
        let aux =
            || format!("model.aux = {}, term `aux` {}", self.model.aux, if has_aux { "given" } else { "missing" });
        check(has_aux == self.model.aux, aux, "an auxiliary head and its term come together, or neither does")?;
        check(self.terms.iter().any(|t| t.weight > 0.0), || "every term has weight 0".into(), "give one a weight")
    }

    /// Whether a term of the objective compares with a teacher.
    pub fn needs_teacher(&self) -> bool {
        self.terms.iter().any(|t| t.weight > 0.0 && t.loss.needs_teacher())
    }
}
