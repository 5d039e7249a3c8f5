//! The error of this crate: what was found, what was expected, and the way out.

/// Result of a loss function.
pub type Result<T> = std::result::Result<T, LossError>;

/// What can go wrong in a loss function.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// Shapes that do not fit the loss; nothing is resized here.
    #[error("{loss}: found {found}, expected {expected}\n  hint: {hint}")]
    Shape {
        /// Loss.
        loss: &'static str,
        /// What was passed.
        found: String,
        /// What the loss takes.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A tensor of a type that the loss does not compute in.
    #[error("{loss}: `{tensor}` is {found:?}, expected {expected}\n  hint: {hint}")]
    DType {
        /// Loss.
        loss: &'static str,
        /// Argument.
        tensor: &'static str,
        /// What was passed.
        found: candle_core::DType,
        /// What the loss takes.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },
    /// A label that is no class, at a pixel that counts.
    #[error(
        "label {value} at row {row}, column {column} of image {image}, expected 0..{n_classes}\n  \
         hint: mark void pixels with `valid_mask`, and map the data set's ids to 0..{n_classes} when loading"
    )]
    Label {
        /// Image in the batch.
        image: usize,
        /// Row.
        row: usize,
        /// Column.
        column: usize,
        /// The label found.
        value: u8,
        /// Classes the logits have.
        n_classes: usize,
    },
    /// A mask value that is neither 0 nor 1.
    #[error(
        "valid mask holds {value} at row {row}, column {column} of image {image}, expected 0 or 1\n  \
         hint: build the mask with `valid_mask`, labels are not a mask"
    )]
    Mask {
        /// Image in the batch.
        image: usize,
        /// Row.
        row: usize,
        /// Column.
        column: usize,
        /// The value found.
        value: u8,
    },
    /// A target outside [0, 1], at a pixel that counts.
    #[error(
        "target {value} of class {class} at row {row}, column {column} of image {image}, expected 0 to 1\n  \
         hint: targets are probabilities; leave pixels out with the mask"
    )]
    Target {
        /// Image in the batch.
        image: usize,
        /// Class.
        class: usize,
        /// Row.
        row: usize,
        /// Column.
        column: usize,
        /// The target found.
        value: f64,
    },
    /// A setting outside its range.
    #[error("{what}\n  hint: {hint}")]
    Config {
        /// Setting and value.
        what: String,
        /// The way out.
        hint: &'static str,
    },
    /// Candle refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl LossError {
    /// A [`LossError::Shape`].
    pub fn shape(
        loss: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
        hint: &'static str,
    ) -> Self {
        Self::Shape { loss, found: found.into(), expected: expected.into(), hint }
    }
    /// What an operation refused after the loss had checked its arguments.
    #[cfg(feature = "cuda")]
    pub(crate) fn from_ops(error: segdistill_ops::OpsError) -> Self {
        match error {
            segdistill_ops::OpsError::Candle(error) => Self::Candle(error),
            other => Self::Candle(candle_core::Error::Msg(other.to_string())),
        }
    }
    /// A [`LossError::Config`].
    pub fn config(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Config { what: what.into(), hint }
    }
}
