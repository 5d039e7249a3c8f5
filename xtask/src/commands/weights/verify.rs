//! `weights verify`: does a model reach the mIoU it states?

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use segdistill_data::manifest::Source;
use segdistill_data::{Manifest, Split};

use crate::cli::DeviceArgs;
use crate::commands::eval::data_of;
use crate::commands::{data_root, device, device_name, need_labelled_split};
use crate::exit::{OUT_OF_BAND, USAGE, coded, usage};
use crate::pipeline::{Evaluating, evaluate_into};
use crate::recipe::DataPlan;
use crate::run_folder::read_final;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask weights verify runs/camvid-quick/teacher
  cargo xtask weights verify imported --dataset camvid --data-root ../shared/camvid --miou 0.70
  cargo xtask weights verify teacher --dataset camvid --split test --miou 0.6984 --tolerance 0.005 --json
  cargo xtask weights verify segformer --dataset cityscapes --data-root DIR

Exit code 5 when the mIoU lies further from the stated one than the tolerance.")]
pub(crate) struct Verify {
    /// Stage folder of a run, or a folder that `weights import` wrote
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Data set; default: the run's own
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// Folder of the data set; default: the run's own, else $SEGDISTILL_DATA_DIR/NAME
    #[arg(long, value_name = "DIR")]
    pub(crate) data_root: Option<PathBuf>,
    /// Split to evaluate: train, val, test
    #[arg(long, default_value = "val", value_name = "SPLIT")]
    pub(crate) split: String,
    /// mIoU it should reach, a fraction; default on val: the one the model states
    #[arg(long, value_name = "MIOU")]
    pub(crate) miou: Option<f64>,
    /// Largest difference that passes, a fraction
    #[arg(long, default_value_t = 0.002, value_name = "F")]
    pub(crate) tolerance: f64,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the outcome as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Verify) -> Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance <= 1.0) || args.miou.is_some_and(|m| !(0.0..=1.0).contains(&m)) {
        return Err(usage!("--miou and --tolerance are fractions from 0 to 1, not percent"));
    }
    let device = device(&device_name(&args.device), args.device.tf32)?;
    let split: Split = args.split.parse().map_err(|e| usage!("{e}"))?;
    let model = read_final(&args.model, &device)?;
    let config = &model.config;
    let on_val = (split == Split::Val).then(|| config.val_miou.or(config.stated_miou)).flatten();
    let Some(stated) = args.miou.or(on_val) else {
        return Err(usage!(
            "`{}` states no mIoU on {split}\n  hint: --miou gives the one to verify",
            args.model.display()
        ));
    };
    let data = match args.dataset.as_deref() {
        None if config.dataset.is_empty() => {
            return Err(usage!("`{}` names no data set\n  hint: --dataset NAME", args.model.display()));
        }
        None if config.role == "imported" => plan_of(&config.dataset, args.data_root.clone())?,
        None => data_of(&args.model, args.data_root.clone())?,
        Some(id) => plan_of(id, args.data_root.clone())?,
    };
    let dataset = need_labelled_split(&data, split)?;
    let n_classes = dataset.classes().n_classes();
    if n_classes != config.model.n_classes || (!config.dataset.is_empty() && config.dataset != dataset.id()) {
        return Err(usage!(
            "the model predicts {} classes{}, {} has {n_classes}\n  hint: verify it on the data it was trained on",
            config.model.n_classes,
            if config.dataset.is_empty() { String::new() } else { format!(" of {}", config.dataset) },
            dataset.id()
        ));
    }
    let label = format!("verify {split}");
    let how = Evaluating { label: &label, ..Evaluating::default() };
    let summary = evaluate_into(&model, dataset.as_ref(), &device, &how, &|| Ok(()))?;
    let miou = summary.scores.miou;
    let difference = miou - stated;
    let within = difference.abs() <= args.tolerance;
    if args.json {
        let value = json!({
            "model": args.model, "dataset": dataset.id(), "split": split.to_string(), "stated_miou": stated,
            "miou": miou, "difference": difference, "tolerance": args.tolerance, "within": within,
            "n_images": dataset.len(), "mode": summary.mode,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!("{} of {}, {} images: mIoU {miou:.4}, stated {stated:.4}", split, dataset.id(), dataset.len());
    }
    if within {
        return Ok(());
    }
    let why = anyhow::anyhow!(
        "mIoU {miou:.4} on {split} is {difference:+.4} from the stated {stated:.4}, more than {}\n  hint: other image sizes, class orders and normalisations are the usual reasons",
        args.tolerance
    );
    Err(coded(OUT_OF_BAND, why))
}

/// The data set `id` in its folder.
fn plan_of(id: &str, root: Option<PathBuf>) -> Result<DataPlan> {
    let manifest = Manifest::named(id).map_err(|e| coded(USAGE, e))?;
    match manifest.source {
        Source::Files => Ok(DataPlan::Files { dataset: manifest.id, root: data_root(id, root)? }),
        Source::Drawn => Err(usage!(
            "data set {id} cannot be verified on alone\n  hint: drawn scenes belong to a run; leave --dataset out"
        )),
    }
}
