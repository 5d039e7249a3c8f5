//! The error of this crate: what was found, what was expected, and the way out.

use std::path::PathBuf;

/// Result of an operation.
pub type Result<T> = std::result::Result<T, OpsError>;

/// One tensor whose shape differs from the model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeDifference {
    /// Dotted tensor name.
    pub name: String,
    /// Shape in the file or map.
    pub found: Vec<usize>,
    /// Shape the model has.
    pub expected: Vec<usize>,
}

/// One tensor whose element type holds no weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DTypeDifference {
    /// Dotted tensor name.
    pub name: String,
    /// Type in the file or map.
    pub found: candle_core::DType,
    /// Types that are taken.
    pub expected: &'static str,
}

/// Every difference between a set of tensors and the model that should take them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Names the model needs and the set lacks, sorted.
    pub missing: Vec<String>,
    /// Names in the set that the model does not know, sorted.
    pub unexpected: Vec<String>,
    /// Tensors of another shape, sorted by name.
    pub shapes: Vec<ShapeDifference>,
    /// Tensors of a type that is no float, sorted by name.
    pub dtypes: Vec<DTypeDifference>,
    /// Tensors that hold NaN or infinity once they have the model's type, sorted.
    pub non_finite: Vec<String>,
}

impl Mismatch {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.n_tensors() == 0
    }

    fn n_tensors(&self) -> usize {
        let named = [&self.missing, &self.unexpected, &self.non_finite].map(Vec::len).iter().sum::<usize>();
        named + self.shapes.len() + self.dtypes.len()
    }
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tensors differ from the model", self.n_tensors())?;
        for d in &self.shapes {
            write!(f, "\n  shape       {}: found {:?}, expected {:?}", d.name, d.found, d.expected)?;
        }
        for d in &self.dtypes {
            write!(f, "\n  type        {}: found {:?}, expected {}", d.name, d.found, d.expected)?;
        }
        for name in &self.missing {
            write!(f, "\n  missing     {name}")?;
        }
        for name in &self.unexpected {
            write!(f, "\n  unexpected  {name}")?;
        }
        for name in &self.non_finite {
            write!(f, "\n  not finite  {name}")?;
        }
        Ok(())
    }
}

/// What can go wrong in an operation or in the parameter store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpsError {
    /// Shapes that do not fit the operation.
    #[error("{op}: found {found}, expected {expected}\n  hint: {hint}")]
    Shape {
        /// Operation.
        op: &'static str,
        /// What was passed.
        found: String,
        /// What the operation takes.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A setting outside its range.
    #[error("{what}\n  hint: {hint}")]
    Config {
        /// Setting and value.
        what: String,
        /// The way out.
        hint: &'static str,
    },
    /// Weights that do not fit the model; the model is unchanged.
    #[error("{0}\n  hint: the weights must come from the same network, width and class count")]
    Mismatch(Box<Mismatch>),
    /// A weight file that cannot be read.
    #[error("cannot read weights `{path}`: {why}\n  hint: expected a .safetensors file, whole and unchanged")]
    Weights {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// Candle refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl OpsError {
    /// A [`OpsError::Shape`].
    pub fn shape(op: &'static str, found: impl Into<String>, expected: impl Into<String>, hint: &'static str) -> Self {
        Self::Shape { op, found: found.into(), expected: expected.into(), hint }
    }
    /// A [`OpsError::Config`].
    pub fn config(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Config { what: what.into(), hint }
    }
}
