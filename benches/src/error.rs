//! The error of this crate: what was found, what was expected, and the way out.

use std::path::PathBuf;

use segdistill_losses::LossError;
use segdistill_models::ModelError;
use segdistill_ops::OpsError;
use segdistill_train::TrainError;

/// Result of a benchmark.
pub type Result<T> = std::result::Result<T, BenchError>;

/// What can go wrong in preparing, checking, timing or recording a case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// Something asked for that does not exist or cannot work: the caller changes the command.
    #[error("{what}\n  hint: {hint}")]
    Usage {
        /// What was asked for, and what was expected.
        what: String,
        /// The way out.
        hint: String,
    },
    /// An answer that is not the right one: nothing is timed.
    #[error("{case}: {what}\n  hint: a wrong answer is not timed; run the tests of the crate that computes it")]
    Wrong {
        /// Name of the case.
        case: String,
        /// Found and expected.
        what: String,
    },
    /// A process that measures died, hung or said what it should not.
    #[error("{side}: {what}\n  hint: {hint}")]
    Process {
        /// Which process.
        side: String,
        /// What happened, with its last words.
        what: String,
        /// The way out.
        hint: String,
    },
    /// A record that cannot be read.
    #[error("`{path}`: {why}\n  hint: name a file that `bench --json FILE` wrote")]
    Record {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// A file or a pipe.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// An operation refused.
    #[error(transparent)]
    Ops(#[from] OpsError),
    /// A network refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A loss refused.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// A training step refused.
    #[error(transparent)]
    Train(#[from] TrainError),
}

impl BenchError {
    pub(crate) fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: hint.into() }
    }

    pub(crate) fn wrong(case: &str, what: impl Into<String>) -> Self {
        Self::Wrong { case: case.to_string(), what: what.into() }
    }
}

impl From<candle_core::Error> for BenchError {
    fn from(error: candle_core::Error) -> Self {
        Self::Ops(OpsError::Candle(error))
    }
}
