//! The discriminator beside the student: what it tells the student, and how it learns.
//!
//! Its structure and its penalty are `models`', the two sides' losses are `losses`'.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use segdistill_losses::{hinge_critic, hinge_student, wgan_critic, wgan_student};
use segdistill_models::{Discriminator, DiscriminatorSpec};
use segdistill_ops::{Mode, ParamStore, concat_channels, graph, masked, resize_bilinear};

use crate::config::OptimConfig;
use crate::error::{Result, TrainError};
use crate::objective::Setting;
use crate::optim::{Adam, AdamConfig, Optimizer, Sgd, global_norm};
use crate::schedule::PolySchedule;
use crate::step::Pair;
use crate::terms::{CriticForm, CriticOptimizer};

/// Settings of a discriminator's training.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CriticConfig {
    pub(crate) form: CriticForm,
    /// Whether it sees the image besides the logits.
    pub(crate) condition: bool,
    /// Weight of its loss.
    pub(crate) weight: f64,
    /// Weight of the gradient penalty within it.
    pub(crate) penalty: f64,
    pub(crate) optimizer: CriticOptimizer,
    pub(crate) lr: f64,
    pub(crate) width: f64,
}

/// A discriminator and its optimizer.
///
/// Each step it first judges the student's maps ([`Critic::judge`]); after the student's own step it learns from the same
/// maps ([`Critic::step`]), once.
pub(crate) struct Critic {
    cfg: CriticConfig,
    store: ParamStore,
    network: Discriminator,
    optimizer: Box<dyn Optimizer>,
    schedule: PolySchedule,
    seed: u64,
    /// What it was last shown: the student's and the teacher's maps, void set to 0, with the image where it is seen.
    shown: Option<[Tensor; 2]>,
}

/// Prefix of the optimizer's state among the tensors of the checkpoint.
const OPTIMIZER: &str = "optimizer.";
/// Decay of Adam's moments in CIRKD's code.
const BETAS: [f64; 2] = [0.9, 0.99];

impl Critic {
    /// A discriminator of `n_classes` logits, drawn from the seed.
    pub(crate) fn new(cfg: CriticConfig, n_classes: usize, setting: &Setting<'_>) -> Result<Self> {
        let store = ParamStore::trainable(setting.seed, DType::F32, setting.device);
        let spec = DiscriminatorSpec { n_classes, condition: cfg.condition, width: cfg.width };
        let network = Discriminator::new(&store.root().pp("discriminator"), &spec)?;
        let optim = OptimConfig {
            lr: cfg.lr,
            nesterov: false,
            weight_decay: 0.0,
            warmup_steps: 0,
            clip_norm: 0.0,
            ..setting.optim.clone()
        };
        let schedule = PolySchedule::new(&optim, setting.steps);
        let optimizer: Box<dyn Optimizer> = match cfg.optimizer {
            CriticOptimizer::Sgd => Box::new(Sgd::new(&store, optim)?),
            CriticOptimizer::Adam => {
                Box::new(Adam::over(store.named(), AdamConfig { betas: BETAS, ..AdamConfig::default() })?)
            }
        };
        Ok(Self { cfg, store, network, optimizer, schedule, seed: setting.seed, shown: None })
    }

    /// What the discriminator reads: a network's logits, 0 where no label counts, and the image on their grid.
    fn input(&self, logits_nchw: &Tensor, pair: &Pair, images_nchw: &Tensor) -> Result<Tensor> {
        let logits = masked(logits_nchw, &pair.valid_nhw)?;
        if !self.cfg.condition {
            return Ok(logits);
        }
        let (_, _, h, w) = logits.dims4()?;
        let images = resize_bilinear(images_nchw, [h, w], false)?.to_dtype(logits.dtype())?;
        Ok(concat_channels(&[&logits, &images])?)
    }

    /// The student's side of the game: a scalar whose gradient reaches the student's logits alone.
    pub(crate) fn judge(&mut self, pair: &Pair, images_nchw: &Tensor, step: u64) -> Result<Tensor> {
        let mode = Mode::Train { seed: self.seed, step };
        let student = self.input(&pair.student_nchw.detach(), pair, images_nchw)?;
        let teacher = self.input(&pair.teacher_nchw, pair, images_nchw)?;
        self.shown = Some([student, teacher]);
        graph::scalar(&pair.student_nchw, |logits| -> Result<Tensor> {
            let scores = self.network.forward(&self.input(logits, pair, images_nchw)?, mode)?;
            Ok(match self.cfg.form {
                CriticForm::WganGp => wgan_student(&scores)?,
                CriticForm::Hinge => hinge_student(&scores)?,
            })
        })
    }

    /// One step of the discriminator on what it was last shown, of `samples`; its loss, or nothing when it was shown nothing.
    pub(crate) fn step(&mut self, step: u64, samples: &[String]) -> Result<Option<f64>> {
        let Some([student, teacher]) = self.shown.take() else { return Ok(None) };
        let mode = Mode::Train { seed: self.seed, step };
        let scores = [self.network.forward(&student, mode)?, self.network.forward(&teacher, mode)?];
        let mut loss = match self.cfg.form {
            CriticForm::WganGp => wgan_critic(&scores[0], &scores[1])?,
            CriticForm::Hinge => hinge_critic(&scores[0], &scores[1])?,
        };
        if self.cfg.form == CriticForm::WganGp && self.cfg.penalty > 0.0 {
            let penalty = self.network.gradient_penalty(&student, &teacher, self.seed, step)?;
            loss = (loss + (penalty * self.cfg.penalty)?)?;
        }
        let loss = (loss * self.cfg.weight)?;
        let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        if !value.is_finite() {
            return Err(TrainError::NonFiniteLoss {
                term: "holistic, the discriminator's own".into(),
                value,
                step,
                samples: samples.to_vec(),
            });
        }
        let gradients = self.optimizer.gradients(&graph::backward(loss)?)?;
        if !global_norm(&gradients)?.is_finite() {
            let bad = |g: &Tensor| !global_norm(std::slice::from_ref(g)).is_ok_and(f64::is_finite);
            let named = self.optimizer.params().iter().zip(&gradients).find(|(_, g)| bad(g));
            return Err(TrainError::NonFiniteGradient {
                parameter: named.map_or("the discriminator", |(p, _)| p.name.as_str()).into(),
                terms: vec!["holistic".into()],
                step,
                samples: samples.to_vec(),
            });
        }
        self.optimizer.step(&gradients, self.schedule.at(step), 1.0)?;
        Ok(Some(value))
    }

    /// Weights, buffers and the optimizer's state, for the checkpoint.
    pub(crate) fn state(&self) -> BTreeMap<String, Tensor> {
        let moments =
            self.optimizer.state().iter().map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor.clone()));
        self.store.tensors().into_iter().chain(moments).collect()
    }

    /// Takes the state of a checkpoint.
    pub(crate) fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let (mut weights, mut moments) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in state {
            match name.strip_prefix(OPTIMIZER) {
                Some(name) => moments.insert(name.to_string(), tensor.clone()),
                None => weights.insert(name.clone(), tensor.clone()),
            };
        }
        self.store.load(&weights)?;
        self.optimizer.load_state(moments)
    }
}
