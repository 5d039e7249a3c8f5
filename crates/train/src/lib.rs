//! Training of segmentation networks: objective, optimizer, schedule, loop, checkpoints, and the evaluation of a
//! network on a data set that training and the `eval` command share.
//!
//! One stage is one network trained once: [`Stage`] says what, [`run_stage`] does it, on one page, and tells an
//! [`Observer`] what happens. A teacher enters as a [`segdistill_models::Frozen`], which records no graph.
//!
//! What does not live here: loss formulas, network structures, image files, the command line. Nothing here prints.
//!
//! # Example
//! Two steps of a small network on drawn scenes:
//! ```
//! use std::sync::{Arc, atomic::AtomicBool};
//! use candle_core::Device;
//! use segdistill_data::{Split, StreetScenes, StreetScenesConfig};
//! use segdistill_models::ModelSpec;
//! use segdistill_train::{
//!     ClassWeighting, InputConfig, Observer, OptimConfig, Stage, StageData, StepRecord, TermConfig, TermKind, run_stage,
//! };
//!
//! struct Losses(Vec<f64>);
//! impl Observer for Losses {
//!     fn on_step(&mut self, record: &StepRecord) {
//!         self.0.push(record.loss);
//!     }
//! }
//!
//! let scenes = StreetScenesConfig { height: 32, width: 48, seed: 0, variety: 0.5, n_train: 4, n_val: 2, n_test: 2 };
//! let stage = Stage {
//!     method: "ce".into(),
//!     model: ModelSpec { width: 0.125, ..ModelSpec::deeplabv3plus("resnet18", 11) },
//!     seed: 0,
//!     steps: 2,
//!     batch_size: 2,
//!     optim: OptimConfig {
//!         lr: 0.02,
//!         momentum: 0.9,
//!         nesterov: true,
//!         weight_decay: 1e-4,
//!         decay_all: false,
//!         poly_power: 0.9,
//!         warmup_steps: 0,
//!         clip_norm: 0.0,
//!     },
//!     terms: vec![TermConfig { loss: TermKind::ce(), weight: 1.0, schedule: Default::default() }],
//!     input: InputConfig { size: [32, 48], crop: [32, 48], scale: [1.0, 1.0], flip: 0.5, jitter: 0.1, workers: 1 },
//!     class_weighting: ClassWeighting::None,
//!     eval_every: 2,
//!     precision: Default::default(),
//! };
//! let folder = std::env::temp_dir().join(format!("segdistill-example-{}", std::process::id()));
//! let stop = AtomicBool::new(false);
//! let val = StreetScenes::new(scenes.clone(), Split::Val)?;
//! let train = Arc::new(StreetScenes::new(scenes, Split::Train)?);
//! let start = Default::default();
//! let data = StageData { train, val: &val, teacher: None, start: &start, device: &Device::Cpu, stop: &stop };
//! let mut losses = Losses(Vec::new());
//! let outcome = run_stage(&stage, &folder, &data, false, &mut losses)?;
//! assert_eq!((losses.0.len(), outcome.best.0), (2, 2));
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod checkpoint;
mod config;
mod cost;
mod critic;
mod error;
mod evaluate;
mod maps;
mod memory;
mod metrics_log;
mod objective;
mod optim;
mod schedule;
mod stage;
mod step;
mod terms;

pub use config::{ClassWeighting, InputConfig, OptimConfig, PrecisionName, Stage};
pub use cost::step_seconds;
pub use error::{Result, TrainError};
pub use evaluate::{Evaluation, ImageResult, evaluate, image_tensor};
pub use memory::{Entry, MemoryBank};
pub use metrics_log::{read_metrics, read_validation};
pub use objective::{Objective, Setting, TermValue};
pub use optim::{Adam, AdamConfig, Optimizer, Sgd, global_norm};
pub use schedule::{PolySchedule, WeightSchedule};
pub use stage::{Observer, StageData, StageOutcome, StepRecord, ValRecord, run_stage};
pub use step::{Pair, StepInputs, at_grid};
pub use terms::{
    AceRule, CriticForm, CriticOptimizer, KdNormaliser, Nodes, PairForm, ScheduleConfig, Taps, TermConfig, TermKind,
};

/// The README's example, compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
