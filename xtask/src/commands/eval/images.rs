//! Label images made by anything, scored against label files of a data set.
//!
//! Label files and predictions hold the same values, those of the data set's label files, so that what `predict` writes,
//! what a benchmark's server takes and what is scored here are one format; `--train-ids` reads predictions otherwise.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use segdistill_data::classes::VOID;
use segdistill_data::preview::read_labels;
use segdistill_data::{LabelMap, Manifest};
use segdistill_eval::table::ResultRow;
use segdistill_eval::{Confusion, Summary};

use crate::cli::Eval;
use crate::exit::{DATA, UNAVAILABLE, USAGE, coded, usage};
use crate::pipeline::{nothing_to_score, write_evaluation};
use crate::progress::Progress;
use crate::report_page;

/// Scores the label images of a folder.
pub(super) fn score(args: &Eval, predictions: &Path, labels: &Path, dataset: &str) -> Result<Summary> {
    let manifest = Manifest::named(dataset).map_err(|e| coded(USAGE, e))?;
    if args.train_ids && !manifest.labels_differ_from_ids() {
        return Err(usage!(
            "--train-ids changes nothing for {dataset}\n  hint: its label files hold class ids already"
        ));
    }
    let pairs = pairs(&manifest, predictions, labels)?;
    let classes = &manifest.classes;
    let mut confusion = Confusion::new(classes.n_classes());
    let mut progress = Progress::new("scoring", pairs.len() as u64, "images");
    let mut label_hw = [0, 0];
    let mut seems_train_ids = manifest.labels_differ_from_ids() && !args.train_ids;
    for (done, [file, made]) in pairs.iter().enumerate() {
        let truth = ids_of(read(file)?, file, &manifest)?;
        let raw = read(made)?;
        seems_train_ids &= raw.ids.iter().all(|v| usize::from(*v) < classes.n_classes() || *v == VOID);
        // Train ids are the ids that are counted; what is none of them is refused by the count.
        let predicted = if args.train_ids { raw } else { ids_of(raw, made, &manifest)? };
        if predicted.hw() != truth.hw() {
            let why = anyhow!(
                "`{}` is {}x{}, its label `{}` is {}x{}\n  hint: predictions are scored at label resolution; nothing is resized here",
                made.display(),
                predicted.height,
                predicted.width,
                file.display(),
                truth.height,
                truth.width
            );
            return Err(coded(DATA, why));
        }
        label_hw = truth.hw();
        confusion
            .add_abstaining(&truth.ids, &predicted.ids, VOID)
            .with_context(|| format!("`{}`", made.display()))
            .map_err(|e| coded(DATA, e))?;
        progress.set(done as u64 + 1, String::new);
    }
    progress.finish();
    let (class_names, palette) = crate::run_folder::class_lists(classes);
    let scores = confusion.scores();
    if scores.n_pixels == 0 {
        return Err(nothing_to_score(&format!("the label files in `{}`", labels.display())));
    }
    if seems_train_ids {
        log::warn!(
            "no prediction holds a value above {}: these look like train ids, scored here as label ids; --train-ids scores them as train ids",
            classes.n_classes() - 1
        );
    }
    let ids = if args.train_ids { ", read as train ids" } else { "" };
    let split = args.split.as_deref().unwrap_or("images");
    let summary = Summary {
        stage: "label images".to_string(),
        dataset: manifest.id.clone(),
        label_hw,
        mode: format!("label images as given{ids}; void in a prediction counts as a miss"),
        class_names,
        result: ResultRow::new("images", "predictions", "", split, 0, &scores, pairs.len()),
        scores,
    };
    if let Some(out) = &args.out {
        write_evaluation(&summary, &confusion, out)?;
        let page = report_page::write_single(&summary, out, &palette)?;
        eprintln!("report: {}", page.display());
    }
    Ok(summary)
}

fn read(path: &Path) -> Result<LabelMap> {
    read_labels(path).map_err(|e| coded(DATA, e))
}

/// Ids of the values of a label file.
fn ids_of(raw: LabelMap, path: &Path, manifest: &Manifest) -> Result<LabelMap> {
    manifest.ids_from_labels(raw, path).map_err(|e| coded(DATA, e))
}

/// Each label file with its one prediction.
///
/// Files have the same name. Of a data set that pairs files by name, both folders may hold folders, label files are told
/// by their ending, and a prediction's name is the sample's, alone or with more after a `_`.
fn pairs(manifest: &Manifest, predictions: &Path, labels: &Path) -> Result<Vec<[PathBuf; 2]>> {
    let suffix = manifest.label_suffix();
    let label_files = by_sample(labels, suffix)?;
    if label_files.is_empty() {
        let what = suffix.map_or("PNG".to_string(), |suffix| format!("file that ends in `{suffix}`"));
        let why = anyhow!("`{}` holds no {what}\n  hint: --labels names a folder of label images", labels.display());
        return Err(coded(UNAVAILABLE, why));
    }
    if !predictions.is_dir() {
        let why = anyhow!(
            "`{}` is not a folder\n  hint: --predictions names a folder of label images",
            predictions.display()
        );
        return Err(coded(UNAVAILABLE, why));
    }
    let mut made: BTreeMap<&str, PathBuf> = BTreeMap::new();
    for path in pngs(predictions, suffix.is_some())?.into_iter().filter(|path| !is_overlay(path)) {
        let sample = sample_of(&path, suffix.is_some(), &label_files).ok_or_else(|| {
            let why = anyhow!(
                "`{}` has no label image in `{}`\n  hint: one prediction a label image, under the same name",
                path.display(),
                labels.display()
            );
            coded(DATA, why)
        })?;
        if let Some(other) = made.insert(sample, path.clone()) {
            let why = anyhow!(
                "`{}` and `{}` are both predictions of `{sample}`\n  hint: one prediction a label image",
                other.display(),
                path.display()
            );
            return Err(coded(DATA, why));
        }
    }
    let pair = |(sample, file): (&String, &PathBuf)| {
        let made = made.get(sample.as_str()).ok_or_else(|| {
            let why = anyhow!(
                "`{}` has no prediction: `{}` is not there\n  hint: one PNG a label image, under the same name",
                file.display(),
                predictions.join(format!("{sample}.png")).display()
            );
            coded(DATA, why)
        })?;
        Ok([file.clone(), made.clone()])
    };
    label_files.iter().map(pair).collect()
}

/// Label files by the name of their sample; with a `suffix`, those that end in it, in the folders of the folder too.
fn by_sample(labels: &Path, suffix: Option<&str>) -> Result<BTreeMap<String, PathBuf>> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in pngs(labels, suffix.is_some())? {
        let sample = match suffix {
            Some(suffix) => file_name(&path).strip_suffix(suffix).map(str::to_string),
            None => Some(stem(&path)),
        };
        let Some(sample) = sample else { continue };
        if let Some(other) = found.insert(sample.clone(), path.clone()) {
            let why = anyhow!(
                "`{}` and `{}` are both label images of `{sample}`\n  hint: --labels names the folder of one split",
                other.display(),
                path.display()
            );
            return Err(coded(DATA, why));
        }
    }
    Ok(found)
}

/// The sample that a prediction is of: the one of its name, else with `longer` names the longest that a `_` follows.
fn sample_of<'a>(prediction: &Path, longer: bool, samples: &'a BTreeMap<String, PathBuf>) -> Option<&'a str> {
    let name = stem(prediction);
    let shorter = name.rmatch_indices('_').map(|(end, _)| &name[..end]).filter(|_| longer);
    let found = std::iter::once(name.as_str()).chain(shorter).find_map(|name| samples.get_key_value(name));
    found.map(|(sample, _)| sample.as_str())
}

/// Whether `path` is the overlay that `predict` writes beside a label image.
fn is_overlay(path: &Path) -> bool {
    stem(path).strip_suffix("_overlay").is_some_and(|name| path.with_file_name(format!("{name}.png")).is_file())
}

/// PNGs of a folder, sorted, hidden ones left out; with `deep`, those of its folders too.
fn pngs(folder: &Path, deep: bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs_err::read_dir(folder).map_err(|e| coded(UNAVAILABLE, e))? {
        let entry = entry?;
        let path = entry.path();
        if file_name(&path).starts_with('.') {
            continue;
        }
        // Of the entry itself: a link to a folder is not followed, so that no walk goes in circles.
        if entry.file_type()?.is_dir() {
            if deep {
                files.extend(pngs(&path, deep)?);
            }
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}
