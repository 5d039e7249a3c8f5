//! Recipes: TOML as written (`Recipe`), and what will run once everything is known to fit (`Plan`).
//!
//! `base.toml` holds every key with its default; it is the list of known keys, so that an unknown one is found with the
//! nearest known beside it. A recipe `extends` another; `--set` comes last.

mod layers;
mod plan;
mod start;
mod vary;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Deserialize;
use toml::Value;

use segdistill_data::Manifest;
use segdistill_models::ModelSpec;
use segdistill_ops::Precision;
use segdistill_train::{
    ClassWeighting, InputConfig, OptimConfig, PrecisionName, ScheduleConfig, Stage, TermConfig, TermKind,
};

use crate::cli::RecipeArgs;
use crate::exit::usage;

pub(crate) use plan::{DataPlan, Expect, Plan};
pub(crate) use start::{Fills, Pinned, Start, whole};
pub(crate) use vary::{Variant, Variation};

/// A recipe as written, merged with what it extends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    name: String,
    description: String,
    dataset: String,
    methods: Vec<String>,
    seeds: Vec<u64>,
    data: DataKeys,
    teacher: TeacherKeys,
    student: ModelKeys,
    train: TrainKeys,
    optim: OptimConfig,
    input: InputConfig,
    objectives: BTreeMap<String, ObjectiveKeys>,
    expect: Expect,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DataKeys {
    root: String,
    height: usize,
    width: usize,
    train: usize,
    val: usize,
    test: usize,
    seed: u64,
    variety: f64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelKeys {
    model: String,
    name: String,
    encoder: String,
    layout: String,
    aux: bool,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
    weights: String,
    encoder_weights: String,
    weights_revision: String,
    weights_sha256: String,
    new_classifier: bool,
}

impl ModelKeys {
    /// The network asked for; `role` is the table the keys are in.
    fn spec(&self, role: &str, written: &[String], n_classes: usize) -> Result<ModelSpec> {
        let (name, encoder) = match self.model.as_str() {
            "" => (self.name.clone(), self.encoder.clone()),
            model => {
                let parts = ["name", "encoder"].map(|key| format!("{role}.{key}"));
                if let Some(key) = parts.iter().find(|key| written.contains(key)) {
                    return Err(usage!(
                        "`{role}.model` and `{key}` are both set\n  hint: `{role}.model` is network and encoder in one, such as fcn8s-vgg16; take one out"
                    ));
                }
                let named = ModelSpec::named(model, n_classes).map_err(|e| usage!("{role}.model = `{model}`: {e}"))?;
                (named.name, named.encoder)
            }
        };
        Ok(ModelSpec {
            name,
            encoder,
            n_classes,
            width: self.width,
            output_stride: self.output_stride,
            dropout: self.dropout,
            decoder_channels: self.decoder_channels,
            layout: self.layout.clone(),
            aux: self.aux,
        })
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TeacherKeys {
    model: String,
    name: String,
    encoder: String,
    layout: String,
    aux: bool,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
    seed: u64,
    steps: u64,
    lr: f64,
    weights: String,
    encoder_weights: String,
    weights_revision: String,
    weights_sha256: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrainKeys {
    steps: u64,
    batch_size: usize,
    eval_every: u64,
    class_weighting: ClassWeighting,
    #[serde(with = "PrecisionName")]
    precision: Precision,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectiveKeys {
    terms: Vec<TermConfig>,
    /// Terms for data sets on which the source has other weights.
    #[serde(default)]
    on: BTreeMap<String, TermKeys>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TermKeys {
    terms: Vec<TermConfig>,
}

impl ObjectiveKeys {
    /// Terms on a data set.
    fn terms(&self, dataset: &str) -> &[TermConfig] {
        self.on.get(dataset).map_or(&self.terms, |on| &on.terms)
    }
}

/// Every objective that compares with a teacher, besides the cross entropy.
const ALL: &str = "all";
/// The objective that teachers are trained with and gains are measured against.
const BASELINE: &str = "ce";

/// Data sets without a reader here, for which sources give weights of their own.
const PUBLISHED: [&str; 3] = ["ade20k", "coco-stuff", "voc"];

/// A recipe and the keys its user wrote, as opposed to those of embedded recipes.
struct Read {
    recipe: Recipe,
    written: Vec<String>,
}

impl Recipe {
    /// Reads the recipe that `args` name and applies their changes.
    fn read(args: &RecipeArgs) -> Result<Read> {
        let precision = args.precision.iter().map(|name| format!("train.precision={name}"));
        let settings: Vec<String> = args.set.iter().cloned().chain(precision).collect();
        let merged = layers::merge_all(&args.recipe, &settings)?;
        let recipe = Value::Table(merged.table).try_into::<Recipe>();
        // Without a text to point into, what is left of a message is what is wrong and the key, each on its line.
        let recipe =
            recipe.map_err(|e| usage!("recipe `{}`: {}", args.recipe, e.to_string().trim().replace('\n', " ")))?;
        let mut recipe = recipe;
        recipe.check_data_sets()?;
        recipe.prefer_written(&merged.written);
        Ok(Read { recipe, written: merged.written })
    }

    /// Refuses terms for a data set that nobody knows: a slip of the pen would leave them unused.
    fn check_data_sets(&self) -> Result<()> {
        let known: Vec<&str> = Manifest::known().into_iter().chain(PUBLISHED).collect();
        for (name, objective) in &self.objectives {
            if let Some(unknown) = objective.on.keys().find(|id| !known.contains(&id.as_str())) {
                let near = layers::nearest(unknown, known.iter().copied());
                let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                return Err(usage!(
                    "[objectives.{name}.on.{unknown}]: unknown data set, known: {}{near}\n  hint: terms for every data set \
                     stand in [objectives.{name}]",
                    known.join(", ")
                ));
            }
        }
        Ok(())
    }

    /// The methods asked for, `all` written out: the baseline, then every objective that compares with a teacher, each
    /// once where two names mean the same.
    fn methods(&self, asked: &[String]) -> Vec<String> {
        let all = || {
            let mut names = vec![BASELINE];
            let mut seen: Vec<&[TermConfig]> = Vec::new();
            for (name, objective) in &self.objectives {
                let terms = objective.terms(&self.dataset);
                let distils = terms.iter().any(|term| term.weight > 0.0 && term.loss.needs_teacher());
                if distils && !seen.contains(&terms) {
                    seen.push(terms);
                    names.push(name);
                }
            }
            names
        };
        let one = |name: &String| match name.as_str() {
            ALL => all().into_iter().map(str::to_string).collect(),
            _ => vec![name.clone()],
        };
        let mut methods: Vec<String> = Vec::new();
        for name in asked {
            // What `all` brings stands once, however else it was asked for; a name given twice is the caller's to see.
            let brought = one(name).into_iter().filter(|m| name != ALL || !methods.contains(m)).collect::<Vec<_>>();
            methods.extend(brought);
        }
        methods
    }

    /// Lets terms that somebody wrote stand for every data set, unless some were written for this one too.
    fn prefer_written(&mut self, written: &[String]) {
        for (name, objective) in &mut self.objectives {
            let own = format!("objectives.{name}.terms");
            let here = format!("objectives.{name}.on.{}.terms", self.dataset);
            if written.contains(&own) && !written.contains(&here) {
                objective.on.remove(&self.dataset);
            }
        }
    }

    /// The stage that trains `model`; with an auxiliary head its loss joins the objective unless a term names it.
    fn stage(&self, method: &str, model: ModelSpec, seed: u64, mut terms: Vec<TermConfig>) -> Stage {
        if model.aux && terms.iter().all(|term| term.loss != TermKind::Aux {}) {
            let schedule = ScheduleConfig::Constant;
            terms.push(TermConfig { loss: TermKind::Aux {}, weight: TermKind::AUX_WEIGHT, schedule });
        }
        Stage {
            method: method.to_string(),
            model,
            seed,
            steps: self.train.steps,
            batch_size: self.train.batch_size,
            optim: self.optim.clone(),
            terms,
            input: self.input.clone(),
            class_weighting: self.train.class_weighting,
            eval_every: self.train.eval_every,
            precision: self.train.precision,
        }
    }

    fn student_model(&self, written: &[String], n_classes: usize) -> Result<ModelSpec> {
        self.student.spec("student", written, n_classes)
    }

    fn teacher_stage(&self, written: &[String], n_classes: usize) -> Result<Stage> {
        let t = &self.teacher;
        let model = ModelKeys {
            model: t.model.clone(),
            name: t.name.clone(),
            encoder: t.encoder.clone(),
            layout: t.layout.clone(),
            aux: t.aux,
            width: t.width,
            output_stride: t.output_stride,
            dropout: t.dropout,
            decoder_channels: t.decoder_channels,
            weights: String::new(),
            encoder_weights: t.encoder_weights.clone(),
            weights_revision: t.weights_revision.clone(),
            weights_sha256: t.weights_sha256.clone(),
            new_classifier: false,
        };
        let ce = self
            .objectives
            .get(BASELINE)
            .ok_or_else(|| usage!("[objectives.ce] is missing\n  hint: the teacher is trained with it"))?;
        let mut stage =
            self.stage("teacher", model.spec("teacher", written, n_classes)?, t.seed, ce.terms(&self.dataset).to_vec());
        if !(t.lr >= 0.0 && t.lr.is_finite()) {
            return Err(usage!("teacher.lr = {}\n  hint: a positive learning rate, or 0 to take optim.lr", t.lr));
        }
        if stage.needs_teacher() {
            return Err(usage!(
                "[objectives.ce] compares with a teacher, and the teacher is trained with it\n  hint: give the comparing objective another name"
            ));
        }
        if t.steps > 0 {
            stage.steps = t.steps;
        }
        if t.lr > 0.0 {
            stage.optim.lr = t.lr;
        }
        Ok(stage)
    }

    /// Weights the teacher is, instead of being trained, and which bytes of that name.
    fn teacher_weights(&self) -> Result<Option<(PathBuf, Pinned)>> {
        if self.teacher.weights.is_empty() {
            return Ok(None);
        }
        let Some(start) = self.teacher_start()? else { return Ok(None) };
        start::exists("teacher", &start.from)?;
        Ok(Some((PathBuf::from(start.from), start.pinned)))
    }

    fn teacher_start(&self) -> Result<Option<Start>> {
        let t = &self.teacher;
        let pinned = Pinned::of("teacher", &t.weights_revision, &t.weights_sha256)?;
        Start::of("teacher", [&t.weights, &t.encoder_weights], false, pinned)
    }

    /// Weights that teacher and students start from when they are trained.
    fn starts(&self) -> Result<[Option<Start>; 2]> {
        let s = &self.student;
        let teacher = self.teacher_start()?.filter(|_| self.teacher.weights.is_empty());
        let pinned = Pinned::of("student", &s.weights_revision, &s.weights_sha256)?;
        let student = Start::of("student", [&s.weights, &s.encoder_weights], s.new_classifier, pinned)?;
        for (role, start) in [("teacher", &teacher), ("student", &student)] {
            if let Some(start) = start {
                start::exists(role, &start.from)?;
            }
        }
        Ok([teacher, student])
    }
}
