//! The error of this crate: what was found, where, what was expected, and the way out.

use std::path::PathBuf;

/// Result of reading, drawing or transforming data.
pub type Result<T> = std::result::Result<T, DataError>;

/// What can go wrong between a file and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder that cannot be opened, read or written; the message names the path.
    #[error("{0}\n  hint: does it exist, and may this user read it?")]
    Io(#[from] std::io::Error),
    /// A picture that cannot be decoded: truncated, damaged, of another kind or beyond the limits.
    #[error("cannot decode `{path}`: {why}\n  hint: {hint}")]
    Image {
        /// File.
        path: PathBuf,
        /// Reason.
        why: String,
        /// The way out.
        hint: &'static str,
    },
    /// A label picture whose pixels are not 8-bit class ids.
    #[error("`{path}` holds {found}, expected 8-bit single-channel class ids\n  hint: {hint}")]
    LabelFormat {
        /// File.
        path: PathBuf,
        /// Colour type, depth and size.
        found: String,
        /// The way out.
        hint: &'static str,
    },
    /// A label value outside the table.
    #[error("label {found} at row {row}, column {column} of `{path}`, expected {expected}\n  hint: {hint}")]
    LabelValue {
        /// File.
        path: PathBuf,
        /// Row of the first such pixel, from 0.
        row: usize,
        /// Column of the first such pixel, from 0.
        column: usize,
        /// Value in the file.
        found: u8,
        /// Values of the table.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// Image and labels of different sizes.
    #[error(
        "`{label}` is {label_w}x{label_h}, but its image `{image}` is {image_w}x{image_h} (width x height)\n  \
         hint: labels are never resized on reading; use the label file that belongs to the image",
        label_h = .label_hw[0], label_w = .label_hw[1], image_h = .image_hw[0], image_w = .image_hw[1]
    )]
    PairSize {
        /// Image file or name.
        image: String,
        /// Height and width of the image.
        image_hw: [usize; 2],
        /// Label file or name.
        label: String,
        /// Height and width of the labels.
        label_hw: [usize; 2],
    },
    /// A line of a list file that names no usable pair.
    #[error("`{list}`, line {line}: {found}, expected {expected}\n  hint: {hint}")]
    List {
        /// List file.
        list: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What stands there.
        found: String,
        /// What should.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A file or folder that makes no usable pair, where files are paired by name.
    #[error("`{path}`: {found}, expected {expected}\n  hint: {hint}")]
    Pair {
        /// Image, label file or folder.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
        /// What should be.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A split that this copy of the data set does not have.
    #[error("{what} is not under `{root}`: {why}\n  hint: {hint}")]
    Absent {
        /// Data set, or one of its splits.
        what: String,
        /// Data root.
        root: PathBuf,
        /// What is missing.
        why: String,
        /// The way out.
        hint: String,
    },
    /// A manifest that does not hold together.
    #[error("manifest `{name}`: {why}\n  hint: {hint}")]
    Manifest {
        /// Which manifest.
        name: String,
        /// What is wrong, with the place.
        why: String,
        /// The way out.
        hint: &'static str,
    },
    /// A data set name nobody knows.
    #[error("unknown data set `{found}`, known: {known}\n  hint: pick one of the known names")]
    Unknown {
        /// Name as given.
        found: String,
        /// Every name there is.
        known: String,
    },
    /// A setting outside its range.
    #[error("{what}\n  hint: {hint}")]
    Config {
        /// Setting and value.
        what: String,
        /// The way out.
        hint: &'static str,
    },
    /// An index past the end.
    #[error("sample {index} of {id} {split}, which has {len}\n  hint: indices run from 0 to {last}", last = .len.saturating_sub(1))]
    Index {
        /// Data set.
        id: String,
        /// Split.
        split: String,
        /// Index asked for.
        index: usize,
        /// Number of samples.
        len: usize,
    },
    /// Pictures that must agree in size and do not.
    #[error("{what}: found {found}, expected {expected}\n  hint: {hint}")]
    Shape {
        /// What was being done.
        what: String,
        /// What was passed.
        found: String,
        /// What fits.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// A sample that could not be made, on its way through the loader.
    #[error("step {step}, sample `{name}`: {why}")]
    Sample {
        /// Step of the batch that wanted it.
        step: u64,
        /// Sample.
        name: String,
        /// Reason; a panic of the data set or the transform is told as one.
        why: String,
    },
    /// Candle refused.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl DataError {
    /// A [`DataError::Config`].
    pub fn config(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Config { what: what.into(), hint }
    }
}
