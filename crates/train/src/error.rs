//! What stops a training, with the place and the way out.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TrainError>;

/// Reasons for which a stage ends early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting outside its range.
    #[error("{what}\n  hint: {hint}")]
    Config {
        /// Setting and value.
        what: String,
        /// The way out.
        hint: &'static str,
    },
    /// A loss term is NaN or infinite.
    #[error(
        "loss term `{term}` is {value} at step {step}, samples {}\n  hint: lower `optim.lr`, lengthen `optim.warmup_steps` or set `optim.clip_norm`; the last good checkpoint is untouched",
        samples.join(", ")
    )]
    NonFiniteLoss {
        /// Name of the term.
        term: String,
        /// Its value.
        value: f64,
        /// Step, from 0.
        step: u64,
        /// Samples of the batch.
        samples: Vec<String>,
    },
    /// A gradient is NaN or infinite.
    #[error(
        "gradient of `{parameter}` is not finite at step {step} (from loss terms {}), samples {}\n  hint: lower `optim.lr` or set `optim.clip_norm`; the last good checkpoint is untouched",
        terms.join(", "), samples.join(", ")
    )]
    NonFiniteGradient {
        /// First parameter, by name, whose gradient is bad.
        parameter: String,
        /// Terms whose own gradient is bad; all, when only their sum is.
        terms: Vec<String>,
        /// Step, from 0.
        step: u64,
        /// Samples of the batch.
        samples: Vec<String>,
    },
    /// A logit of an evaluation is NaN or infinite.
    #[error(
        "logit {value} of class {class} on {split}{}: the network has diverged or its weights are damaged\n  hint: lower `optim.lr`, lengthen `optim.warmup_steps` or set `optim.clip_norm`; the last good checkpoint is untouched",
        step.map_or(String::new(), |step| format!(" after step {step}"))
    )]
    NonFiniteLogit {
        /// Its value.
        value: f32,
        /// Its class.
        class: usize,
        /// Split it was met on.
        split: String,
        /// Steps done, while training goes on.
        step: Option<u64>,
    },
    /// Trainable parameters that the loss does not reach.
    #[error("no gradient reached {} of the trainable parameters: {}\n  hint: every layer that is built must be used by the forward pass", parameters.len(), parameters.join(", "))]
    NoGradient {
        /// Their names.
        parameters: Vec<String>,
    },
    /// The stop flag was raised; a checkpoint was written first.
    #[error("stopped at step {step} after writing `{checkpoint}`\n  hint: go on with `--resume`")]
    Interrupted {
        /// Steps done.
        step: u64,
        /// Checkpoint folder.
        checkpoint: PathBuf,
    },
    /// A checkpoint that cannot be used.
    #[error("checkpoint `{path}`: {why}\n  hint: {hint}")]
    Checkpoint {
        /// File or folder.
        path: PathBuf,
        /// Reason.
        why: String,
        /// The way out.
        hint: &'static str,
    },
    /// A file could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// From `ops`.
    #[error(transparent)]
    Ops(#[from] segdistill_ops::OpsError),
    /// From `data`.
    #[error(transparent)]
    Data(#[from] segdistill_data::DataError),
    /// From `models`.
    #[error(transparent)]
    Model(#[from] segdistill_models::ModelError),
    /// From `losses`.
    #[error(transparent)]
    Loss(#[from] segdistill_losses::LossError),
    /// From `eval`.
    #[error(transparent)]
    Eval(#[from] segdistill_eval::EvalError),
    /// From candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl TrainError {
    /// Whether the numbers of a training ran away: another objective of the same plan may train all the same.
    pub fn diverged(&self) -> bool {
        matches!(self, Self::NonFiniteLoss { .. } | Self::NonFiniteGradient { .. } | Self::NonFiniteLogit { .. })
    }

    /// A [`TrainError::Config`].
    pub fn config(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Config { what: what.into(), hint }
    }
}
