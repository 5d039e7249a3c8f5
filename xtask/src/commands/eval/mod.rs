//! `eval`: a finished stage on a split, or label images made by anything.

mod images;

use std::path::{Path, PathBuf};

use anyhow::Result;

use segdistill_data::Split;
use segdistill_eval::{Scores, Summary};

use crate::cli::Eval;
use crate::exit::{UNAVAILABLE, coded, usage};
use crate::pipeline::{Evaluating, evaluate_into};
use crate::recipe::{DataPlan, Plan};
use crate::report_page;
use crate::run_folder::read_final;

/// Runs the command.
pub(crate) fn run(args: &Eval) -> Result<()> {
    let summary = match (&args.model, &args.predictions, &args.labels, &args.dataset) {
        (Some(model), ..) => of_model(args, model)?,
        (None, Some(predictions), Some(labels), Some(dataset)) => images::score(args, predictions, labels, dataset)?,
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
    let dataset = super::need_labelled_split(&data, split)?;
    if dataset.id() != network.config.dataset {
        return Err(usage!(
            "the model was trained on {}, the plan's data set is {}",
            network.config.dataset,
            dataset.id()
        ));
    }
    let place = args.out.as_deref();
    let how = Evaluating { place, label: &format!("eval {split}"), ..Evaluating::default() };
    let summary = evaluate_into(&network, dataset.as_ref(), &device, &how, &|| Ok(()))?;
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
