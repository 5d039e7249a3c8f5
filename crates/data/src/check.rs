//! Checks a copy of a data set against its manifest: pairs, sizes, label values, counts, samples in two splits.
//!
//! Every problem is listed, not only the first; a damaged file does not end the check.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::classes::VOID;
use crate::codec::size_text;
use crate::error::{DataError, Result};
use crate::files::read_pair;
use crate::manifest::{Manifest, Pairing, Source};
use crate::pairs::{Pair, Place, read_pairs};
use crate::sample::{Dataset, Split};
use crate::street::{StreetScenes, StreetScenesConfig};

/// Whether a split is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitStatus {
    /// Its list file is there, or it is drawn.
    Present,
    /// This copy of the data set does not have it.
    Absent,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// File, or the data root.
    pub file: String,
    /// Place in it: a line, a pixel, or the whole.
    pub place: String,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
    /// The way out.
    pub hint: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}`, {}: found {}, expected {}\n  hint: {}",
            self.file, self.place, self.found, self.expected, self.hint
        )
    }
}

/// What the check of one split found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SplitReport {
    /// Split.
    pub split: Split,
    /// Whether it is there.
    pub status: SplitStatus,
    /// Images listed (of drawn data: drawn).
    pub n_images: usize,
    /// Images whose label file could be read and names no class at any pixel.
    pub n_unlabelled: usize,
    /// Everything wrong with it.
    pub problems: Vec<Problem>,
}

/// What the check of a data set found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Data set.
    pub dataset: String,
    /// A report for each split asked for.
    pub splits: Vec<SplitReport>,
}

impl CheckReport {
    /// Whether no split has a problem and at least one is present. An absent split is reported, not a problem.
    pub fn is_ok(&self) -> bool {
        self.splits.iter().all(|s| s.problems.is_empty())
            && self.splits.iter().any(|s| s.status == SplitStatus::Present)
    }
}

/// Drawn scenes that are looked at in each split: all come from one program, so a few stand for the rest.
const N_DRAWN: usize = 8;

/// Checks the named splits of a data set under `root`.
///
/// Each listed pair is decoded whole. For drawn data `root` is not looked at.
pub fn check(root: &Path, manifest: &Manifest, splits: &[Split]) -> CheckReport {
    let reports = match (manifest.source, manifest.locate(root)) {
        (Source::Drawn, _) => splits.iter().map(|split| check_drawn(manifest, *split)).collect(),
        (Source::Files, Ok(dir)) => check_files(&dir, manifest, splits),
        (Source::Files, Err(error)) => {
            let problems = vec![problem(&error, &[root])];
            let absent = |split: &Split| SplitReport {
                split: *split,
                status: SplitStatus::Absent,
                n_images: 0,
                n_unlabelled: 0,
                problems: problems.clone(),
            };
            splits.iter().map(absent).collect()
        }
    };
    CheckReport { dataset: manifest.id.clone(), splits: reports }
}

fn check_files(dir: &Path, manifest: &Manifest, splits: &[Split]) -> Vec<SplitReport> {
    // Name -> where it was first seen, over every split there is: a sample in two splits spoils both.
    let mut seen: BTreeMap<String, (Split, Place)> = BTreeMap::new();
    let mut reports: BTreeMap<Split, SplitReport> = BTreeMap::new();
    for split in manifest.splits.keys().copied() {
        let asked = splits.contains(&split);
        let mut report =
            SplitReport { split, status: SplitStatus::Present, n_images: 0, n_unlabelled: 0, problems: Vec::new() };
        let found = match read_pairs(manifest, dir, split) {
            Ok(found) => found,
            Err(DataError::Absent { .. }) => {
                reports.insert(split, SplitReport { status: SplitStatus::Absent, ..report });
                continue;
            }
            Err(error) => {
                let files = manifest.splits[&split].files.as_ref();
                let looked_for = files.map_or(dir.into(), |files| dir.join(files.first_looked_for()));
                report.problems.push(problem(&error, &[&looked_for]));
                reports.insert(split, report);
                continue;
            }
        };
        report.n_images = found.n_promised;
        report.problems.extend(found.problems.iter().map(|error| problem(error, &[&found.path])));
        let expected = manifest.splits[&split].count;
        if report.n_images != expected {
            report.problems.push(Problem {
                file: found.path.display().to_string(),
                place: whole(manifest, split).into(),
                found: format!("{} pairs", report.n_images),
                expected: format!("{expected}, as published"),
                hint: "numbers from another split cannot be compared with published ones; obtain it again".into(),
            });
        }
        let mut read = if asked { read_all(manifest, &found.pairs) } else { Vec::new() }.into_iter();
        for pair in &found.pairs {
            let here = (split, pair.place.clone());
            if let Some(there) = seen.get(&pair.name) {
                report.problems.push(shared(&pair.name, &here, there));
                // The earlier split is spoilt as much, and may be the only one asked for.
                if let Some(earlier) = reports.get_mut(&there.0) {
                    earlier.problems.push(shared(&pair.name, there, &here));
                }
            }
            seen.entry(pair.name.clone()).or_insert(here);
            match read.next() {
                Some(Err(error)) => report.problems.push(problem(&error, &[&pair.image, &pair.label])),
                Some(Ok(seen)) => {
                    report.n_unlabelled += usize::from(!seen.is_labelled);
                    if seen.hw != manifest.image_hw {
                        report.problems.push(Problem {
                            file: pair.image.display().to_string(),
                            place: "whole picture".into(),
                            found: size_text(seen.hw),
                            expected: size_text(manifest.image_hw),
                            hint: "the published pictures have one size; was this copy resized?".into(),
                        });
                    }
                }
                None => {}
            }
        }
        let withheld = manifest.splits[&split].labels_withheld;
        if !withheld && report.n_unlabelled > 0 && report.n_unlabelled == report.n_images {
            report.problems.push(Problem {
                file: found.path.display().to_string(),
                place: whole(manifest, split).into(),
                found: "no pixel of any class in any label file".into(),
                expected: "labels to learn from and to score".into(),
                hint: "are these the label files of this split?".into(),
            });
        }
        reports.insert(split, report);
    }
    let unknown = |split: Split| SplitReport {
        split,
        status: SplitStatus::Absent,
        n_images: 0,
        n_unlabelled: 0,
        problems: Vec::new(),
    };
    splits.iter().map(|split| reports.get(split).cloned().unwrap_or_else(|| unknown(*split))).collect()
}

/// What a pair shows once it is read.
struct Seen {
    hw: [usize; 2],
    /// Whether any pixel belongs to a class.
    is_labelled: bool,
}

/// Reads every pair, on as many threads as the machine offers; results in the order of the pairs.
fn read_all(manifest: &Manifest, pairs: &[Pair]) -> Vec<Result<Seen>> {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let read = |pair: &Pair| {
        let sample = read_pair(manifest, &pair.image, &pair.label, &pair.name)?;
        Ok(Seen { hw: sample.image.hw(), is_labelled: sample.labels.ids.iter().any(|id| *id != VOID) })
    };
    std::thread::scope(|scope| {
        let shares = pairs.chunks(pairs.len().div_ceil(n_threads).max(1));
        let threads: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter().map(read).collect::<Vec<_>>())).collect();
        let joined = threads.into_iter().map(|t| t.join());
        joined.flat_map(|j| j.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

fn check_drawn(manifest: &Manifest, split: Split) -> SplitReport {
    let [height, width] = manifest.image_hw;
    let n = |split| manifest.splits.get(&split).map_or(0, |s| s.count);
    let cfg = StreetScenesConfig {
        height,
        width,
        seed: 0,
        variety: 1.0,
        n_train: n(Split::Train),
        n_val: n(Split::Val),
        n_test: n(Split::Test),
    };
    let mut report =
        SplitReport { split, status: SplitStatus::Present, n_images: n(split), n_unlabelled: 0, problems: Vec::new() };
    let drawn = StreetScenes::new(cfg, split).and_then(|scenes| {
        (0..scenes.len().min(N_DRAWN)).try_for_each(|i| {
            let sample = scenes.sample(i)?;
            sample.check_sizes()
        })
    });
    if let Err(error) = drawn {
        report.problems.push(problem(&error, &[Path::new(&manifest.id)]));
    }
    report
}

/// What stands for all of a split: its list, or its folder.
fn whole(manifest: &Manifest, split: Split) -> &'static str {
    match manifest.splits[&split].files.as_ref().map(|files| &files.pairing) {
        Some(Pairing::List(_)) => "whole list",
        _ => "whole folder",
    }
}

/// A sample named `here` and `there`, as a problem of `here`.
fn shared(name: &str, here: &(Split, Place), there: &(Split, Place)) -> Problem {
    let (other, place) = there;
    Problem {
        file: here.1.file.display().to_string(),
        place: here.1.to_string(),
        found: format!("`{name}`, which {other} has too (`{}`, {place})", place.file.display()),
        expected: "each sample in one split".into(),
        hint: "scores on samples that were learnt from mean nothing; remove it from one split".into(),
    }
}

/// An error as a problem. `files` are those that were being read: the one that the error speaks of is named, the first
/// when it says nothing of them.
fn problem(error: &DataError, files: &[&Path]) -> Problem {
    let make = |file: String, place: &str, found: String, expected: String, hint: &str| Problem {
        file,
        place: place.into(),
        found,
        expected,
        hint: hint.into(),
    };
    match error {
        DataError::Image { path, why, hint } => {
            make(path.display().to_string(), "whole file", why.clone(), "a picture that can be decoded".into(), hint)
        }
        DataError::LabelFormat { path, found, hint } => {
            make(path.display().to_string(), "whole file", found.clone(), "8-bit single-channel class ids".into(), hint)
        }
        DataError::LabelValue { path, row, column, found, expected, hint } => make(
            path.display().to_string(),
            &format!("row {row}, column {column}"),
            format!("label {found}"),
            expected.clone(),
            hint,
        ),
        DataError::PairSize { image, image_hw, label, label_hw } => make(
            label.clone(),
            "whole picture",
            size_text(*label_hw),
            format!("{}, as its image `{image}`", size_text(*image_hw)),
            "labels are never resized on reading; use the label file that belongs to the image",
        ),
        DataError::List { list, line, found, expected, hint } => {
            make(list.display().to_string(), &format!("line {line}"), found.clone(), expected.clone(), hint)
        }
        DataError::Pair { path, found, expected, hint } => make(
            path.display().to_string(),
            if path.is_dir() { "whole folder" } else { "whole file" },
            found.clone(),
            expected.clone(),
            hint,
        ),
        DataError::Absent { root, why, hint, .. } => {
            make(root.display().to_string(), "whole folder", why.clone(), "the data set".into(), hint)
        }
        other => {
            let text = other.to_string();
            let spoken_of = files.iter().find(|f| text.contains(&f.display().to_string())).or(files.first());
            let file = spoken_of.map(|f| f.display().to_string()).unwrap_or_default();
            let (what, hint) = text.split_once("\n  hint: ").unwrap_or((&text, "see the message"));
            match other {
                // The reason alone: the message around it names the file once more.
                DataError::Io(_) => {
                    let why = what.split_once(&format!("`{file}`: ")).map_or(what, |(_, why)| why).to_string();
                    make(file, "whole file", why, "a file that can be read".into(), hint)
                }
                _ => make(file, "whole", what.to_string(), "no error".into(), hint),
            }
        }
    }
}
