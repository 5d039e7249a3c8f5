//! CamVid as published in list files: pairs of PNGs, read and checked one sample at a time.

use std::path::{Path, PathBuf};

use crate::classes::ClassTable;
use crate::codec::{read_image, read_labels, size_text};
use crate::error::{DataError, Result};
use crate::manifest::Manifest;
use crate::pairs::{Pair, read_list, split_files};
use crate::sample::{Dataset, Sample, Split};

/// A split of CamVid on disk.
///
/// Opening reads the list files and looks for each file; pictures are read when asked for. Samples keep the order of the
/// list. That the number of samples is the published one is the business of [`check`](crate::check::check), so that a
/// part of the data can be used too.
#[derive(Clone, Debug)]
pub struct CamVid {
    manifest: Manifest,
    split: Split,
    pairs: Vec<Pair>,
}

impl CamVid {
    /// Opens a split under `root`, which is the folder with `train.txt` or a folder that holds it as `camvid`.
    ///
    /// # Errors
    /// `Absent` when the folder or the split's list is not there; `List` naming file and line for a line that names no
    /// usable pair, a file twice, a missing file, or a sample that another split has too, and for an empty list.
    pub fn open(root: &Path, split: Split) -> Result<Self> {
        Self::with_manifest(Manifest::named("camvid")?, root, split)
    }

    /// Opens a split of any data set laid out the same way, described by its own manifest.
    ///
    /// # Errors
    /// As [`CamVid::open`]; `Manifest` when it describes no files.
    pub fn with_manifest(manifest: Manifest, root: &Path, split: Split) -> Result<Self> {
        split_files(&manifest, split)?;
        let dir = manifest.locate(root)?;
        let list = read_list(&manifest, &dir, split)?;
        if let Some(problem) = list.problems.into_iter().next() {
            return Err(problem);
        }
        let list_error = |line, found, expected: &str, hint: &'static str| DataError::List {
            list: list.path.clone(),
            line,
            found,
            expected: expected.into(),
            hint,
        };
        if list.pairs.is_empty() {
            return Err(list_error(1, "no pair".into(), "at least one", "the list file is empty; obtain it again"));
        }
        for other in manifest.splits.keys().filter(|other| **other != split) {
            // Broken lines of another split do not concern this one; a sample in both does.
            let Ok(other_list) = read_list(&manifest, &dir, *other) else { continue };
            if let Some((pair, twin)) =
                list.pairs.iter().find_map(|p| other_list.pairs.iter().find(|q| q.name == p.name).map(|q| (p, q)))
            {
                let found = format!("`{}`, which {other} has too on line {}", pair.name, twin.line);
                return Err(list_error(
                    pair.line,
                    found,
                    "samples of one split only",
                    "remove it from one of the lists",
                ));
            }
        }
        Ok(Self { manifest, split, pairs: list.pairs })
    }

    /// Whether `root` holds the list file of `split`.
    pub fn has_split(root: &Path, split: Split) -> bool {
        Manifest::named("camvid")
            .and_then(|m| Ok(m.locate(root)?.join(&split_files(&m, split)?.list).is_file()))
            .unwrap_or(false)
    }

    /// The manifest this split was opened with.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Image file and label file of a sample.
    ///
    /// # Panics
    /// Past the end.
    pub fn paths(&self, index: usize) -> (PathBuf, PathBuf) {
        (self.pairs[index].image.clone(), self.pairs[index].label.clone())
    }
}

impl Dataset for CamVid {
    fn len(&self) -> usize {
        self.pairs.len()
    }

    fn sample(&self, index: usize) -> Result<Sample> {
        let pair = self.pairs.get(index).ok_or_else(|| DataError::Index {
            id: self.manifest.id.clone(),
            split: self.split.to_string(),
            index,
            len: self.pairs.len(),
        })?;
        read_pair(&self.manifest, &pair.image, &pair.label, &pair.name)
    }

    fn classes(&self) -> &ClassTable {
        &self.manifest.classes
    }

    fn id(&self) -> &str {
        &self.manifest.id
    }

    fn split(&self) -> Split {
        self.split
    }

    fn sample_name(&self, index: usize) -> String {
        self.pairs.get(index).map_or_else(|| format!("#{index}"), |pair| pair.name.clone())
    }
}

/// Reads one pair of files into a sample of checked sizes and ids.
pub(crate) fn read_pair(manifest: &Manifest, image: &Path, label: &Path, name: &str) -> Result<Sample> {
    let picture = read_image(image)?;
    let raw = read_labels(label).map_err(|error| match error {
        // Two faults at once: the second is said too, so that mending the first does not just bring up the next.
        DataError::LabelFormat { path, found, hint } if !found.ends_with(&size_text(picture.hw())) => {
            let found = format!("{found}, with an image of {}", size_text(picture.hw()));
            DataError::LabelFormat { path, found, hint }
        }
        other => other,
    })?;
    if picture.hw() != raw.hw() {
        return Err(DataError::PairSize {
            image: image.display().to_string(),
            image_hw: picture.hw(),
            label: label.display().to_string(),
            label_hw: raw.hw(),
        });
    }
    Ok(Sample { image: picture, labels: manifest.ids_from_labels(raw, label)?, name: name.into() })
}
