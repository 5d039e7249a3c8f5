//! The error of this crate: what was found, what was expected, and the way out.

use std::path::PathBuf;

use segdistill_ops::OpsError;

/// Result of building or running a network.
pub type Result<T> = std::result::Result<T, ModelError>;

/// What can go wrong in describing, building or running a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A network or encoder that is not in the catalogue.
    #[error("unknown {what} `{found}`, known: {}\n  hint: names are lower case; a network and its encoder are written NETWORK-ENCODER", .known.join(", "))]
    Unknown {
        /// What was looked for: `model` or `encoder`.
        what: &'static str,
        /// The name asked for.
        found: String,
        /// Every name there is.
        known: Vec<&'static str>,
    },
    /// A setting of a [`ModelSpec`](crate::ModelSpec) outside its range.
    #[error("{setting} is {found}, expected {expected}\n  hint: {hint}")]
    Setting {
        /// Field of the spec.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The range.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },
    /// An input that is no batch of RGB images of a usable size.
    #[error("{model}: input is {found}, expected {expected}\n  hint: {hint}")]
    Input {
        /// The network.
        model: String,
        /// What was passed.
        found: String,
        /// What the network takes.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A weight file that is not what it says, is damaged, or would do harm; nothing of it was taken.
    #[error("cannot read weights `{}`, {at}: {why}\n  hint: {hint}", path.display())]
    File {
        /// File.
        path: PathBuf,
        /// Where in it.
        at: String,
        /// What is wrong there.
        why: String,
        /// The way out.
        hint: &'static str,
    },
    /// A layout of names that has none for what is asked of it.
    #[error("layout `{layout}` {why}\n  hint: {hint}")]
    Layout {
        /// Layout.
        layout: String,
        /// What it lacks.
        why: String,
        /// The way out.
        hint: String,
    },
    /// Weights of another library that do not fit the network; nothing was taken.
    #[error("{0}")]
    Fit(Box<crate::weights::Misfit>),
    /// Weights whose library was told to build another network than there is here; nothing was taken.
    #[error("`{}` says of its network what {model} is not: {}\n  hint: such a network cannot be imported; train it anew with the expected settings", path.display(), .differences.join("; "))]
    Settings {
        /// File with the settings.
        path: PathBuf,
        /// The network here.
        model: String,
        /// Every setting that differs, found and expected.
        differences: Vec<String>,
    },
    /// A weight file that cannot be written.
    #[error("cannot write weights `{path}`: {why}\n  hint: the folder must exist and have room for the file")]
    Write {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// An operation or the parameter store refused; a wrong set of weights is
    /// [`OpsError::Mismatch`](segdistill_ops::OpsError::Mismatch).
    #[error(transparent)]
    Ops(#[from] OpsError),
}

impl ModelError {
    pub(crate) fn setting(
        setting: &'static str,
        found: impl std::fmt::Display,
        expected: &'static str,
        hint: &'static str,
    ) -> Self {
        Self::Setting { setting, found: found.to_string(), expected, hint }
    }
}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> Self {
        Self::Ops(OpsError::Candle(error))
    }
}
