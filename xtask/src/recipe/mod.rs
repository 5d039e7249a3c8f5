//! Recipes: TOML as written (`Recipe`), and what will run once everything is known to fit (`Plan`).
//!
//! `base.toml` holds every key with its default; it is the list of known keys, so that an unknown one is found with the
//! nearest known beside it. A recipe `extends` another; `--set` comes last.

mod layers;
mod plan;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use serde::Deserialize;
use toml::Value;

use segdistill_models::ModelSpec;
use segdistill_ops::Precision;
use segdistill_train::{ClassWeighting, InputConfig, OptimConfig, PrecisionName, Stage, TermConfig};

use crate::cli::RecipeArgs;
use crate::exit::{UNAVAILABLE, coded, usage};

pub(crate) use plan::{DataPlan, Expect, Plan};

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
    name: String,
    encoder: String,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TeacherKeys {
    name: String,
    encoder: String,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
    seed: u64,
    steps: u64,
    lr: f64,
    weights: String,
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
}

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
        Ok(Read { recipe, written: merged.written })
    }

    fn stage(&self, method: &str, model: &ModelKeys, n_classes: usize, seed: u64, terms: Vec<TermConfig>) -> Stage {
        Stage {
            method: method.to_string(),
            model: ModelSpec {
                name: model.name.clone(),
                encoder: model.encoder.clone(),
                n_classes,
                width: model.width,
                output_stride: model.output_stride,
                dropout: model.dropout,
                decoder_channels: model.decoder_channels,
            },
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

    fn teacher_stage(&self, n_classes: usize) -> Result<Stage> {
        let t = &self.teacher;
        let model = ModelKeys {
            name: t.name.clone(),
            encoder: t.encoder.clone(),
            width: t.width,
            output_stride: t.output_stride,
            dropout: t.dropout,
            decoder_channels: t.decoder_channels,
        };
        let ce = self
            .objectives
            .get("ce")
            .ok_or_else(|| usage!("[objectives.ce] is missing\n  hint: the teacher is trained with it"))?;
        let mut stage = self.stage("teacher", &model, n_classes, t.seed, ce.terms.clone());
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

    fn teacher_weights(&self) -> Result<Option<PathBuf>> {
        if self.teacher.weights.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&self.teacher.weights);
        if !path.is_file() {
            let why = anyhow::anyhow!(
                "teacher weights `{}` are not there\n  hint: `teacher.weights` names a .safetensors file, or is empty to train the teacher",
                path.display()
            );
            return Err(coded(UNAVAILABLE, why));
        }
        Ok(Some(path))
    }
}
