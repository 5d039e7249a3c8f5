//! The objective: a weighted, scheduled sum of loss terms (equation 6 of the patent is `csc` and `ce`), with what the terms
//! own: adapters that are trained with the student, memories, a discriminator.
//!
//! None of what is owned reaches the finished student; all of it is checkpointed and resumed.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use segdistill_models::adapter::{Align, MgdGenerator, ProjectionHead};
use segdistill_models::{Discriminator, ModelInfo, trace};
use segdistill_ops::{Mode, NamedParam, ParamStore};

use crate::checkpoint::Parts;
use crate::config::OptimConfig;
use crate::critic::{Critic, CriticConfig};
use crate::error::{Result, TrainError};
use crate::maps::keep_mask;
use crate::memory::{Entry, MemoryBank};
use crate::schedule::WeightSchedule;
use crate::step::StepInputs;
use crate::terms::{Taps, TermConfig, TermKind};

mod losses;

/// What an objective is built for.
#[derive(Clone, Debug)]
pub struct Setting<'a> {
    /// Steps of the run, over which weights move.
    pub steps: u64,
    /// Seed of adapters, memories, masks and discriminator.
    pub seed: u64,
    /// Weights of the classes in the supervised terms.
    pub class_weights: Option<Vec<f64>>,
    /// Optimizer of the student, whose momentum and decay exponent the discriminator's takes over.
    pub optim: &'a OptimConfig,
    /// The student.
    pub student: &'a ModelInfo,
    /// The teacher, where there is one.
    pub teacher: Option<&'a ModelInfo>,
    /// Where everything runs.
    pub device: &'a Device,
}

/// A sum of loss terms, each with a weight and its schedule.
pub struct Objective {
    terms: Vec<Term>,
    class_weights: Option<Vec<f64>>,
    n_classes: usize,
    seed: u64,
    /// Parameters of the adapters.
    adapters: ParamStore,
    /// Modules that terms of the same maps share, by name.
    shared: BTreeMap<String, Shared>,
    critic: Option<Critic>,
}

struct Term {
    name: String,
    kind: TermKind,
    weight: WeightSchedule,
    /// Student's and teacher's map.
    taps: [String; 2],
    own: Own,
    /// Name of the shared module it goes through.
    shared: Option<String>,
}

/// What several terms go through.
enum Shared {
    /// CIRKD's memory terms compare what it makes of the student's features.
    Head(ProjectionHead),
    /// MGD and Af-DCD compare what it makes of them, masked to this share.
    Generator(MgdGenerator, f64),
}

impl Shared {
    fn forward(&self, student_ndhw: &Tensor, mode: Mode, seed: u64, step: u64) -> Result<Tensor> {
        match self {
            Self::Head(head) => Ok(head.forward(student_ndhw, mode)?),
            Self::Generator(generator, masked) => {
                let keep = keep_mask(student_ndhw, *masked, seed, step)?;
                Ok(generator.forward(student_ndhw, &keep)?)
            }
        }
    }
}

/// What a term owns.
enum Own {
    Nothing,
    Align(Align),
    Memory(Box<MemoryBank>),
}

impl Own {
    fn align(&self) -> Option<&Align> {
        match self {
            Self::Align(align) => Some(align),
            _ => None,
        }
    }
}

/// One term at one step.
#[derive(Clone, Debug)]
pub struct TermValue {
    /// Name of the term, as in metrics.csv.
    pub name: String,
    /// Weight at this step.
    pub weight: f64,
    /// Unweighted loss, a scalar in the graph; `None` when the weight is 0 and nothing was computed.
    pub loss: Option<Tensor>,
}

const ADAPTERS: &str = "adapters";
const CRITIC: &str = "critic";
const MEMORY: &str = "memory";

/// Channels of a network's map, and its name where `penultimate` was asked for.
fn resolve(info: &ModelInfo, whose: &str, tap: &str) -> Result<(String, usize)> {
    let known = || info.taps.iter().map(|t| t.name.to_string()).collect::<Vec<_>>().join(", ");
    let found = match tap {
        Taps::LOGITS => return Ok((tap.to_string(), info.spec.n_classes)),
        Taps::PENULTIMATE => info.taps.last(),
        _ => info.taps.iter().find(|t| t.name == tap),
    };
    let missing = || {
        let what = format!("the {whose} has no map `{tap}`, known: logits, penultimate, {}", known());
        TrainError::config(what, "`cargo xtask models describe NAME` lists the maps of a network")
    };
    found.map(|t| (t.name.to_string(), t.channels)).ok_or_else(missing)
}

/// Height and width of the map `tap` of a crop of images.
fn grid_of(info: &ModelInfo, tap: &str, crop: [usize; 2]) -> Result<[usize; 2]> {
    let trace = trace(&info.spec, crop)?;
    let (name, _) = resolve(info, "student", tap)?;
    let at = info.taps.iter().position(|t| t.name == name);
    Ok(at.map_or(trace.logits_hw, |at| trace.tap_sizes[at]))
}

impl Objective {
    /// The objective of `terms`, with everything they own built from the seed.
    ///
    /// # Errors
    /// `Config` when a term compares with a teacher and there is none, and for a map a network does not have; what the
    /// adapters report.
    pub fn new(terms: &[TermConfig], setting: &Setting<'_>) -> Result<Self> {
        let n_classes = setting.student.spec.n_classes;
        let mut objective = Self {
            terms: Vec::with_capacity(terms.len()),
            class_weights: setting.class_weights.clone(),
            n_classes,
            seed: setting.seed,
            adapters: ParamStore::trainable(setting.seed, DType::F32, setting.device),
            shared: BTreeMap::new(),
            critic: None,
        };
        for config in terms {
            let term = objective.built(config, setting)?;
            objective.terms.push(term);
        }
        Ok(objective)
    }

    /// Checks terms against the networks they are for, without building anything: the maps they name are there, channels
    /// divide into groups, and the maps of a `crop` of images are large enough.
    ///
    /// # Errors
    /// As [`Objective::new`].
    pub fn check(terms: &[TermConfig], student: &ModelInfo, teacher: &ModelInfo, crop: [usize; 2]) -> Result<()> {
        for term in terms.iter().filter(|term| term.weight != 0.0) {
            let name = term.loss.name();
            let least = |map: &str, least: usize| -> Result<()> {
                let [h, w] = grid_of(student, map, crop)?;
                let what = format!("term `{name}`: the student's map `{map}` of a crop of {crop:?} is {h} x {w}");
                match h.min(w) < least {
                    true => Err(TrainError::config(
                        format!("{what}, expected at least {least} x {least}"),
                        "crop larger images, or compare maps of a finer grid",
                    )),
                    false => Ok(()),
                }
            };
            match &term.loss {
                TermKind::Holistic { .. } => least(Taps::LOGITS, Discriminator::MIN_SIDE)?,
                TermKind::AfDcd { tap, pooling, patch, .. } => least(tap.student(), pooling * patch)?,
                _ => {}
            }
            let Some(taps) = term.loss.taps() else { continue };
            resolve(student, "student", taps.student())?;
            let (map, channels) = resolve(teacher, "teacher", taps.teacher())?;
            if let TermKind::AfDcd { groups, .. } = &term.loss
                && channels % groups != 0
            {
                let what =
                    format!("term `af-dcd`: {channels} channels of the teacher's map `{map}` in {groups} groups");
                return Err(TrainError::config(what, "set `groups` to a number that divides the channels"));
            }
        }
        Ok(())
    }

    fn built(&mut self, config: &TermConfig, setting: &Setting<'_>) -> Result<Term> {
        let kind = config.loss.clone();
        kind.validate()?;
        let name = kind.name();
        let weight = WeightSchedule::new(config.weight, config.schedule, setting.steps);
        let logits = || [Taps::LOGITS.to_string(), Taps::LOGITS.to_string()];
        if config.weight == 0.0 || !kind.needs_teacher() {
            return Ok(Term { name, kind, weight, taps: logits(), own: Own::Nothing, shared: None });
        }
        let teacher = setting.teacher.ok_or_else(|| {
            TrainError::config(
                format!("term `{name}` has no teacher"),
                "give the stage a teacher, or take the term out",
            )
        })?;
        let (mut taps, mut from, mut to) = (logits(), self.n_classes, self.n_classes);
        if let Some(asked) = kind.taps() {
            let (student, student_channels) = resolve(setting.student, "student", asked.student())?;
            let (teacher, teacher_channels) = resolve(teacher, "teacher", asked.teacher())?;
            (taps, from, to) = ([student, teacher], student_channels, teacher_channels);
        }
        let scope = self.adapters.root().pp(&name);
        let mut shared = None;
        let own = match &kind {
            TermKind::Cwd { .. } if taps.iter().all(|tap| tap == Taps::LOGITS) => Own::Nothing,
            TermKind::Cwd { .. } | TermKind::Fitnet { .. } => Own::Align(Align::new(&scope, from, to)?),
            TermKind::Mgd { masked, enhanced, .. } | TermKind::AfDcd { masked, enhanced, .. } => {
                let form = if *enhanced { "enhanced-generator" } else { "generator" };
                let module = format!("{form}-{masked}-{}", taps.join("-")).replace('.', "_");
                if !self.shared.contains_key(&module) {
                    let scope = self.adapters.root().pp(&module);
                    let generator = match enhanced {
                        true => MgdGenerator::enhanced(&scope, from, to)?,
                        false => MgdGenerator::new(&scope, from, to)?,
                    };
                    self.shared.insert(module.clone(), Shared::Generator(generator, *masked));
                }
                shared = Some(module);
                Own::Nothing
            }
            TermKind::CirkdPixel { slots, .. } | TermKind::CirkdRegion { slots, .. } => {
                let module = format!("projection-{}", taps.join("-"));
                if !self.shared.contains_key(&module) {
                    let head = ProjectionHead::new(&self.adapters.root().pp(&module), from, to)?;
                    self.shared.insert(module.clone(), Shared::Head(head));
                }
                shared = Some(module);
                let entry = match &kind {
                    TermKind::CirkdPixel { pixels_an_image, .. } => Entry::Pixels(*pixels_an_image),
                    _ => Entry::Region,
                };
                Own::Memory(Box::new(MemoryBank::new(entry, self.n_classes, *slots, to, setting.seed)?))
            }
            TermKind::Holistic { form, condition, critic_weight, penalty, optimizer, lr, width } => {
                let cfg = CriticConfig {
                    form: *form,
                    condition: *condition,
                    weight: *critic_weight,
                    penalty: penalty.unwrap_or(10.0),
                    optimizer: *optimizer,
                    lr: *lr,
                    width: *width,
                };
                self.critic = Some(Critic::new(cfg, self.n_classes, setting)?);
                Own::Nothing
            }
            _ => Own::Nothing,
        };
        Ok(Term { name, kind, weight, taps, own, shared })
    }

    /// Names of the terms, in order.
    pub fn names(&self) -> Vec<String> {
        self.terms.iter().map(|t| t.name.clone()).collect()
    }

    /// Whether a discriminator is trained beside the student.
    pub fn has_critic(&self) -> bool {
        self.critic.is_some()
    }

    /// Adapters' tensors, which one optimizer moves together with the student's; their names start with `adapters.`.
    pub fn params(&self) -> Vec<NamedParam> {
        let prefixed = |p: NamedParam| NamedParam { name: format!("{ADAPTERS}.{}", p.name), ..p };
        self.adapters.named().into_iter().map(prefixed).collect()
    }

    /// Every term at `step`; memories take in the step's features, before they are compared with.
    ///
    /// # Errors
    /// `Config` when a term needs a teacher and the inputs have none; what the losses report.
    pub fn terms(&mut self, inputs: &StepInputs, step: u64) -> Result<Vec<TermValue>> {
        let mode = Mode::Train { seed: self.seed, step };
        // What a shared module makes of the student's features, by its name: formed once a step.
        let mut formed: BTreeMap<String, Tensor> = BTreeMap::new();
        let mut values = Vec::with_capacity(self.terms.len());
        let mut terms = std::mem::take(&mut self.terms);
        for term in &mut terms {
            let weight = term.weight.at(step);
            let loss = match weight {
                0.0 => Ok(None),
                _ => self.loss(term, inputs, mode, step, &mut formed).map(Some),
            };
            values.push(loss.map(|loss| TermValue { name: term.name.clone(), weight, loss }));
        }
        self.terms = terms;
        values.into_iter().collect()
    }

    /// One step of the discriminator on the maps its term last saw, of `samples`; its loss, if there is one.
    ///
    /// # Errors
    /// `NonFiniteLoss` and what the operations report.
    pub fn train_critic(&mut self, step: u64, samples: &[String]) -> Result<Option<f64>> {
        self.critic.as_mut().map(|critic| critic.step(step, samples)).transpose().map(Option::flatten)
    }

    /// Everything the terms own, for the checkpoint.
    ///
    /// # Errors
    /// `Candle` when a tensor cannot be made.
    pub fn state(&self) -> Result<Parts> {
        let mut parts = Parts::new();
        let adapters = self.adapters.tensors();
        if !adapters.is_empty() {
            parts.insert(ADAPTERS.to_string(), adapters);
        }
        if let Some(critic) = &self.critic {
            parts.insert(CRITIC.to_string(), critic.state());
        }
        for term in &self.terms {
            if let Own::Memory(memory) = &term.own {
                parts.insert(format!("{MEMORY}-{}", term.name), memory.state()?);
            }
        }
        Ok(parts)
    }

    /// Takes the state of a checkpoint.
    ///
    /// # Errors
    /// `Config` when it is that of another objective.
    pub fn load_state(&mut self, parts: &Parts) -> Result<()> {
        let part = |name: &str| {
            parts.get(name).ok_or_else(|| {
                TrainError::config(
                    format!("the checkpoint has no {name}.safetensors, which the objective needs"),
                    "resume with the objective the run was started with",
                )
            })
        };
        if !self.adapters.named().is_empty() {
            self.adapters.load(part(ADAPTERS)?)?;
        }
        if let Some(critic) = &mut self.critic {
            critic.load_state(part(CRITIC)?)?;
        }
        for term in &mut self.terms {
            if let Own::Memory(memory) = &mut term.own {
                memory.load_state(part(&format!("{MEMORY}-{}", term.name))?)?;
            }
        }
        Ok(())
    }
}
