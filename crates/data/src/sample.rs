//! What a data set hands out: pictures, label maps, samples, and the interface all data sets share.

use serde::{Deserialize, Serialize};

use crate::classes::ClassTable;
use crate::error::{DataError, Result};

/// An 8-bit colour picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height * width * 3` bytes, row by row, interleaved.
    pub rgb: Vec<u8>,
}

impl RgbImage {
    /// A picture of one colour.
    pub fn filled(height: usize, width: usize, color: [u8; 3]) -> Self {
        Self { height, width, rgb: color.repeat(height * width) }
    }

    /// `[height, width]`.
    pub fn hw(&self) -> [usize; 2] {
        [self.height, self.width]
    }

    /// Colour at a place.
    ///
    /// # Panics
    /// Outside the picture.
    pub fn at(&self, row: usize, column: usize) -> [u8; 3] {
        let i = (row * self.width + column) * 3;
        [self.rgb[i], self.rgb[i + 1], self.rgb[i + 2]]
    }
}

/// A class id for each pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelMap {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height * width` ids, row by row: `0..n_classes` or [`VOID`](crate::classes::VOID).
    pub ids: Vec<u8>,
}

impl LabelMap {
    /// A map of one id.
    pub fn filled(height: usize, width: usize, id: u8) -> Self {
        Self { height, width, ids: vec![id; height * width] }
    }

    /// `[height, width]`.
    pub fn hw(&self) -> [usize; 2] {
        [self.height, self.width]
    }
}

/// One picture with its labels, of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Picture.
    pub image: RgbImage,
    /// Its labels.
    pub labels: LabelMap,
    /// Name, unique within the data set.
    pub name: String,
}

impl Sample {
    /// Errors unless the labels have the size of the image.
    ///
    /// # Errors
    /// `PairSize`.
    pub fn check_sizes(&self) -> Result<()> {
        if self.image.hw() == self.labels.hw() {
            return Ok(());
        }
        Err(DataError::PairSize {
            image: self.name.clone(),
            image_hw: self.image.hw(),
            label: format!("labels of {}", self.name),
            label_hw: self.labels.hw(),
        })
    }
}

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// What is learnt from.
    Train,
    /// What is selected on.
    Val,
    /// What is reported once.
    Test,
}

impl Split {
    /// Every split, in order.
    pub const ALL: [Self; 3] = [Self::Train, Self::Val, Self::Test];
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Train => "train",
            Self::Val => "val",
            Self::Test => "test",
        })
    }
}

impl std::str::FromStr for Split {
    type Err = DataError;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|split| split.to_string() == s)
            .ok_or_else(|| DataError::config(format!("unknown split `{s}`"), "the splits are train, val and test"))
    }
}

/// A split of a data set: samples by index.
///
/// `sample(i)` gives the same sample each time, from any thread.
pub trait Dataset: Send + Sync {
    /// Number of samples.
    fn len(&self) -> usize;
    /// Whether there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The sample at `index`.
    ///
    /// # Errors
    /// `Index` past the end; what reading or drawing meets.
    fn sample(&self, index: usize) -> Result<Sample>;
    /// Classes of the labels.
    fn classes(&self) -> &ClassTable;
    /// Name of the data set, as in its manifest: `camvid`, `street-scenes`.
    fn id(&self) -> &str;
    /// Which split this is.
    fn split(&self) -> Split;
    /// Name of the sample at `index`, without reading it.
    fn sample_name(&self, index: usize) -> String;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_written_and_read_alike() {
        for split in Split::ALL {
            assert_eq!(split.to_string().parse::<Split>().unwrap(), split);
        }
        let error = "valid".parse::<Split>().unwrap_err().to_string();
        assert!(error.contains("`valid`") && error.contains("train, val and test"), "{error}");
    }
}
