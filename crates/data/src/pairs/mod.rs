//! Which image belongs to which label file: pairs of files, from a list file or from a tree of folders.

mod list;
mod tree;

use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};
use crate::manifest::{Manifest, Pairing, SplitFiles};
use crate::sample::Split;

/// An image and its label file.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// Name of the sample: the image's file name without its ending.
    pub(crate) name: String,
    pub(crate) image: PathBuf,
    pub(crate) label: PathBuf,
    pub(crate) place: Place,
}

/// Where a pair is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// List file, or the image itself where files are paired by name.
    pub(crate) file: PathBuf,
    /// Line in the list file, from 1.
    pub(crate) line: Option<usize>,
}

impl Place {
    /// An error at this place.
    pub(crate) fn error(&self, found: String, expected: &str, hint: &'static str) -> DataError {
        let expected = expected.into();
        match self.line {
            Some(line) => DataError::List { list: self.file.clone(), line, found, expected, hint },
            None => DataError::Pair { path: self.file.clone(), found, expected, hint },
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}"),
            None => f.write_str("whole file"),
        }
    }
}

/// The pairs of a split, and an error for each line or file that makes none.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// List file, or folder of the images.
    pub(crate) path: PathBuf,
    /// Samples that the list or the folder promises, those without a usable pair too.
    pub(crate) n_promised: usize,
    /// In the order of the list, or sorted by name.
    pub(crate) pairs: Vec<Pair>,
    pub(crate) problems: Vec<DataError>,
}

/// Files of a split as the manifest has them.
pub(crate) fn split_files(manifest: &Manifest, split: Split) -> Result<&SplitFiles> {
    manifest.splits.get(&split).and_then(|s| s.files.as_ref()).ok_or_else(|| DataError::Manifest {
        name: manifest.id.clone(),
        why: format!("names no files for split {split}"),
        hint: "ask for a split that the manifest lists",
    })
}

/// Pairs the files of a split in the data set's folder `dir`.
///
/// # Errors
/// `Absent` when nothing of the split is there; `List` or `Pair` for a list or a folder that is of no use as a whole.
pub(crate) fn read_pairs(manifest: &Manifest, dir: &Path, split: Split) -> Result<Pairs> {
    let files = split_files(manifest, split)?;
    if !files.are_in(dir) {
        return Err(DataError::Absent {
            what: format!("split {split} of {}", manifest.id),
            root: dir.into(),
            why: format!("`{}` is not there", dir.join(files.first_looked_for()).display()),
            hint: manifest.obtain.clone(),
        });
    }
    match &files.pairing {
        Pairing::List(list) => list::read(&dir.join(list), dir, files),
        Pairing::Suffixes { image, label } => {
            tree::read([&dir.join(&files.images), &dir.join(&files.labels)], [image, label])
        }
    }
}
