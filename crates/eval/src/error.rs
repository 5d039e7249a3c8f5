//! The error of this crate: what was found, what was expected, and the way out.

use std::path::{Path, PathBuf};

/// Result of an evaluation step.
pub type Result<T> = std::result::Result<T, EvalError>;

/// What can go wrong while predicting, counting, tabulating or drawing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// Two maps, matrices or tensors that do not fit each other.
    #[error("{what}: found {found}, expected {expected}\n  hint: {hint}")]
    Shape {
        /// What was being done.
        what: &'static str,
        /// What was passed.
        found: String,
        /// What fits.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A ground-truth label that is neither a class nor void.
    #[error(
        "label {value} at pixel {index}, expected 0..{n_classes} or void {void}\n  hint: map the labels of the data set \
         onto class indices first"
    )]
    Label {
        /// Position in the row-major map.
        index: usize,
        /// Value found there.
        value: u8,
        /// Number of classes.
        n_classes: usize,
        /// Value that marks an uncounted pixel.
        void: u8,
    },
    /// A prediction that is no class.
    #[error(
        "prediction {value} at pixel {index}, expected 0..{n_classes}\n  hint: predictions are class indices, one byte a \
         pixel; `add_abstaining` takes void predictions too"
    )]
    Prediction {
        /// Position in the row-major map.
        index: usize,
        /// Value found there.
        value: u8,
        /// Number of classes.
        n_classes: usize,
    },
    /// A logit that is NaN or infinite.
    #[error(
        "logit {value} of class {class} at row {row}, column {column} of image {image}\n  hint: the network has diverged \
         or its weights are damaged"
    )]
    NonFinite {
        /// Image within the batch.
        image: usize,
        /// Class channel.
        class: usize,
        /// Row on the logits' grid.
        row: usize,
        /// Column on the logits' grid.
        column: usize,
        /// Value found there.
        value: f32,
    },
    /// A setting outside its range.
    #[error("{what}\n  hint: {hint}")]
    Config {
        /// Setting and value.
        what: String,
        /// The way out.
        hint: &'static str,
    },
    /// A table file whose content does not fit.
    #[error("cannot use table `{path}`: {why}\n  hint: expected a file written by this program, whole and unchanged")]
    Table {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// A file that could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Polars refused.
    #[error(transparent)]
    Polars(#[from] polars::error::PolarsError),
    /// Candle refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl EvalError {
    /// A [`EvalError::Shape`].
    pub fn shape(
        what: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        hint: &'static str,
    ) -> Self {
        Self::Shape { what, found: found.into(), expected: expected.into(), hint }
    }

    /// A [`EvalError::Config`].
    pub fn config(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Config { what: what.into(), hint }
    }

    /// A [`EvalError::Table`].
    pub fn table(path: &Path, why: impl Into<String>) -> Self {
        Self::Table { path: path.to_path_buf(), why: why.into() }
    }
}
