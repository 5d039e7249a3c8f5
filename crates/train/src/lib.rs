//! Training of segmentation networks: objective, optimizer, schedule, loop, checkpoints, and the evaluation of a
//! network on a data set that training and the `eval` command share.
//!
//! One stage is one network trained once: [`Stage`] says what, [`run_stage`] does it, on one page, and tells an
//! [`Observer`] what happens. A teacher enters as a [`segdistill_models::Frozen`], which records no graph.
//!
//! What does not live here: loss formulas, network structures, image files, the command line. Nothing here prints.
#![forbid(unsafe_code)]

pub mod checkpoint;
mod config;
mod error;
mod evaluate;
mod metrics_log;
mod objective;
mod optim;
mod schedule;
mod stage;
mod step;

pub use config::{ClassWeighting, InputConfig, OptimConfig, ScheduleConfig, Stage, TermConfig, TermKind};
pub use error::{Result, TrainError};
pub use evaluate::{Evaluation, ImageResult, evaluate, image_tensor};
pub use metrics_log::{read_metrics, read_validation};
pub use objective::{Objective, TermValue};
pub use optim::{Sgd, global_norm};
pub use schedule::{PolySchedule, WeightSchedule};
pub use stage::{Observer, StageData, StageOutcome, StepRecord, ValRecord, run_stage};
pub use step::{StepInputs, valid_at_grid};
