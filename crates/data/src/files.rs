//! Data sets of image and label files: pairs of pictures, read and checked one sample at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::classes::ClassTable;
use crate::codec::{read_image, read_labels, size_text};
use crate::error::{DataError, Result};
use crate::manifest::Manifest;
use crate::pairs::{Pair, read_pairs, split_files};
use crate::sample::{Dataset, Sample, Split};

/// A split on disk, of any data set whose manifest describes files.
///
/// Opening pairs images with label files, by the lines of a list or by their names; pictures are read when asked for.
/// Samples keep the order of the list, or are sorted by name. That the number of samples is the published one is the
/// business of [`check`](crate::check::check), so that a part of the data can be used too.
///
/// # Example
/// ```no_run
/// use segdistill_data::{Cityscapes, Dataset, Split};
/// let val = Cityscapes::open("cityscapes".as_ref(), Split::Val)?;
/// assert_eq!(val.sample_name(0), "frankfurt_000000_000294");
/// assert_eq!(val.sample(0)?.labels.hw(), [1024, 2048]);
/// # Ok::<(), segdistill_data::DataError>(())
/// ```
#[derive(Clone, Debug)]
pub struct LabelledFiles {
    manifest: Manifest,
    split: Split,
    pairs: Vec<Pair>,
}

/// CamVid in the SegNet split: list files, folders of images and of label files.
#[derive(Clone, Copy, Debug)]
pub struct CamVid;

impl CamVid {
    /// Opens a split under `root`, which is the folder with `train.txt` or a folder that holds it as `camvid`.
    ///
    /// # Errors
    /// As [`LabelledFiles::open`].
    pub fn open(root: &Path, split: Split) -> Result<LabelledFiles> {
        LabelledFiles::open(Manifest::named("camvid")?, root, split)
    }
}

/// Cityscapes with fine labels: `leftImg8bit` and `gtFine`, a folder a split, a folder a city.
///
/// Label files hold label ids (`*_gtFine_labelIds.png`); after loading they are the 19 classes of the benchmark, in the
/// order of its train ids. Labels of test are withheld by the publishers: its files are there and hold void only.
#[derive(Clone, Copy, Debug)]
pub struct Cityscapes;

impl Cityscapes {
    /// Opens a split under `root`, which is the folder with `leftImg8bit` and `gtFine` or a folder that holds it as
    /// `cityscapes`.
    ///
    /// # Errors
    /// As [`LabelledFiles::open`].
    pub fn open(root: &Path, split: Split) -> Result<LabelledFiles> {
        LabelledFiles::open(Manifest::named("cityscapes")?, root, split)
    }
}

impl LabelledFiles {
    /// Opens a split of the data set that `manifest` describes, in the folder `root` or the data set's folder in it.
    ///
    /// # Errors
    /// `Absent` when the folder or the split is not there; `List` naming file and line, or `Pair` naming the file, for
    /// what makes no usable pair, for a sample named twice or in another split too, and for an empty split; `Manifest`
    /// when it describes no files.
    pub fn open(manifest: Manifest, root: &Path, split: Split) -> Result<Self> {
        split_files(&manifest, split)?;
        let dir = manifest.locate(root)?;
        let found = read_pairs(&manifest, &dir, split)?;
        if let Some(problem) = found.problems.into_iter().next() {
            return Err(problem);
        }
        if found.pairs.is_empty() {
            return Err(manifest.empty(split, found.path));
        }
        for other in manifest.splits.keys().filter(|other| **other != split) {
            // What is broken in another split does not concern this one; a sample in both does.
            let Ok(others) = read_pairs(&manifest, &dir, *other) else { continue };
            let others: BTreeMap<&str, &Pair> = others.pairs.iter().map(|pair| (pair.name.as_str(), pair)).collect();
            let shared = found.pairs.iter().find_map(|pair| Some((pair, others.get(pair.name.as_str())?)));
            if let Some((pair, twin)) = shared {
                let twin = match twin.place.line {
                    Some(line) => format!("on line {line}"),
                    None => format!("as `{}`", twin.image.display()),
                };
                let what = format!("`{}`, which {other} has too {twin}", pair.name);
                return Err(pair.place.error(what, "samples of one split only", "remove it from one of the splits"));
            }
        }
        Ok(Self { manifest, split, pairs: found.pairs })
    }

    /// Whether anything of `split` is under `root`: its list file, its images or its label files.
    pub fn has_split(manifest: &Manifest, root: &Path, split: Split) -> bool {
        let found = manifest.locate(root).and_then(|dir| Ok(split_files(manifest, split)?.are_in(&dir)));
        found.unwrap_or(false)
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

impl Dataset for LabelledFiles {
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
