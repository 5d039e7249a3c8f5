//! `eval`: a finished stage on a split, or label images made by anything.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use segdistill_data::preview::read_labels;
use segdistill_data::{LabelMap, Manifest, Split};
use segdistill_eval::table::ResultRow;
use segdistill_eval::{Confusion, Scores, Summary};

use crate::cli::Eval;
use crate::exit::{DATA, UNAVAILABLE, coded, usage};
use crate::pipeline::{evaluate_into, write_evaluation};
use crate::progress::Progress;
use crate::recipe::{DataPlan, Plan};
use crate::report_page;
use crate::run_folder::read_final;

/// Runs the command.
pub(crate) fn run(args: &Eval) -> Result<()> {
    let summary = match (&args.model, &args.predictions, &args.labels, &args.dataset) {
        (Some(model), ..) => of_model(args, model)?,
        (None, Some(predictions), Some(labels), Some(dataset)) => of_images(args, predictions, labels, dataset)?,
        _ => {
            return Err(usage!(
                "nothing to evaluate\n  hint: --model DIR, or --predictions DIR --labels DIR --dataset NAME"
            ));
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print_scores(&summary);
    }
    Ok(())
}

fn of_model(args: &Eval, model: &Path) -> Result<Summary> {
    let device = super::device(&super::device_name(&args.device), args.device.tf32)?;
    let split = args.split.as_deref().unwrap_or("val");
    let split: Split = split.parse().map_err(|e| usage!("{e}"))?;
    let network = read_final(model, &device)?;
    let data = data_of(model, args.data_root.clone())?;
    let dataset = super::need_split(&data, split)?;
    if dataset.id() != network.config.dataset {
        return Err(usage!(
            "the model was trained on {}, the plan's data set is {}",
            network.config.dataset,
            dataset.id()
        ));
    }
    let place = args.out.as_deref();
    let summary = evaluate_into(&network, dataset.as_ref(), &device, place, &format!("eval {split}"), &[], &|| Ok(()))?;
    if let Some(out) = place {
        let page = report_page::write_single(&summary, out, &network.config.palette)?;
        eprintln!("report: {}", page.display());
    }
    Ok(summary)
}

/// The data of the run a stage folder belongs to: the plan.toml above it.
pub(crate) fn data_of(stage: &Path, root: Option<PathBuf>) -> Result<DataPlan> {
    let full = fs_err::canonicalize(stage).map_err(|e| coded(UNAVAILABLE, e))?;
    let plan = full.ancestors().map(|a| a.join("plan.toml")).find(|p| p.is_file()).ok_or_else(|| {
        let why = anyhow::anyhow!(
            "no plan.toml above `{}`\n  hint: name a stage folder inside a run folder",
            stage.display()
        );
        coded(UNAVAILABLE, why)
    })?;
    match Plan::read(&plan)?.data {
        DataPlan::Files { dataset, root: planned } => {
            let root = super::data_root(&dataset, root.or(Some(planned)))?;
            Ok(DataPlan::Files { dataset, root })
        }
        drawn => {
            if root.is_some() {
                return Err(usage!(
                    "street-scenes draws its images: a data root is not used\n  hint: take out --data-root"
                ));
            }
            Ok(drawn)
        }
    }
}

/// Label PNGs of a folder, by name.
fn label_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs_err::read_dir(dir).map_err(|e| coded(UNAVAILABLE, e))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Ids of a label image of the data set.
fn labels_of(path: &Path, manifest: &Manifest) -> Result<LabelMap> {
    let raw = read_labels(path).and_then(|raw| manifest.ids_from_labels(raw, path));
    raw.map_err(|e| coded(DATA, e))
}

fn of_images(args: &Eval, predictions: &Path, labels: &Path, dataset: &str) -> Result<Summary> {
    let manifest = Manifest::named(dataset).map_err(|e| coded(crate::exit::USAGE, e))?;
    let files = label_files(labels)?;
    if files.is_empty() {
        let why =
            anyhow::anyhow!("`{}` holds no PNG\n  hint: --labels names a folder of label images", labels.display());
        return Err(coded(UNAVAILABLE, why));
    }
    if !predictions.is_dir() {
        let why = anyhow::anyhow!(
            "`{}` is not a folder\n  hint: --predictions names a folder of label images",
            predictions.display()
        );
        return Err(coded(UNAVAILABLE, why));
    }
    let name = |p: &Path| p.file_name().map(|n| n.to_os_string());
    let labelled: std::collections::BTreeSet<_> = files.iter().map(|f| name(f)).collect();
    if let Some(extra) = label_files(predictions)?.iter().find(|p| !labelled.contains(&name(p))) {
        let why = anyhow::anyhow!(
            "`{}` has no label image in `{}`\n  hint: one prediction a label image, under the same name",
            extra.display(),
            labels.display()
        );
        return Err(coded(DATA, why));
    }
    let classes = &manifest.classes;
    let mut confusion = Confusion::new(classes.n_classes());
    let mut progress = Progress::new("scoring", files.len() as u64, "images");
    let mut label_hw = [0, 0];
    for (done, file) in files.iter().enumerate() {
        let truth = labels_of(file, &manifest)?;
        let made = predictions.join(file.file_name().unwrap_or_default());
        if !made.is_file() {
            let why = anyhow::anyhow!(
                "`{}` has no prediction: `{}` is not there\n  hint: one PNG of class ids a label image, under the same name",
                file.display(),
                made.display()
            );
            return Err(coded(DATA, why));
        }
        let predicted = labels_of(&made, &manifest)?;
        if (predicted.height, predicted.width) != (truth.height, truth.width) {
            let why = anyhow::anyhow!(
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
        label_hw = [truth.height, truth.width];
        confusion
            .add_abstaining(&truth.ids, &predicted.ids, segdistill_data::classes::VOID)
            .with_context(|| format!("`{}`", made.display()))
            .map_err(|e| coded(DATA, e))?;
        progress.set(done as u64 + 1, String::new);
    }
    progress.finish();
    let (class_names, palette) = crate::run_folder::class_lists(classes);
    let scores = confusion.scores();
    let summary = Summary {
        stage: "label images".to_string(),
        dataset: manifest.id.clone(),
        label_hw,
        mode: "label images as given; void in a prediction counts as a miss".to_string(),
        class_names,
        result: ResultRow::new(
            "images",
            "predictions",
            "",
            args.split.as_deref().unwrap_or("images"),
            0,
            &scores,
            files.len(),
        ),
        scores,
    };
    if let Some(out) = &args.out {
        write_evaluation(&summary, &confusion, out)?;
        let page = report_page::write_single(&summary, out, &palette)?;
        eprintln!("report: {}", page.display());
    }
    Ok(summary)
}

fn percent(value: Option<f64>) -> String {
    value.filter(|v| v.is_finite()).map_or("-".to_string(), |v| format!("{:.2}", 100.0 * v))
}

fn print_scores(summary: &Summary) {
    let s: &Scores = &summary.scores;
    println!("{:<16} {:>8}", "class", "IoU %");
    for (name, iou) in summary.class_names.iter().zip(&s.iou) {
        println!("{name:<16} {:>8}", percent(*iou));
    }
    let row = &summary.result;
    println!("\nmIoU {} % over {} of {} classes present", percent(Some(s.miou)), s.n_classes_present, s.iou.len());
    println!(
        "pixel accuracy {} %, mean accuracy {} %, frequency-weighted IoU {} %",
        percent(Some(s.pixel_accuracy)),
        percent(Some(s.mean_accuracy)),
        percent(Some(s.fw_iou))
    );
    let [h, w] = summary.label_hw;
    println!(
        "{} images of {}, split {}, scored at {h}x{w} ({})",
        row.n_images, summary.dataset, row.split, summary.mode
    );
}
