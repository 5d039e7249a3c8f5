//! `weights inspect`: what a weight file holds, without reading a number of it.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use segdistill_models::weights::{Misfit, import_check, layouts, our_name, spec_of};

use super::source::Source;
use crate::exit::{USAGE, coded};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask weights inspect resnet18.pth
  cargo xtask weights inspect model.safetensors --model unet-resnet34     does it fit, and in whose names?
  cargo xtask weights inspect checkpoint.pth --key ema --all --json")]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) source: Source,
    /// What the names to hold against it begin with; default: what they all share is found
    #[arg(long, requires = "model", value_name = "PREFIX")]
    pub(crate) prefix: Option<String>,
    /// Network or encoder to hold it against, in every layout
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// List every tensor; default: the first 20
    #[arg(long)]
    pub(crate) all: bool,
    /// Print as JSON on stdout, every tensor included
    #[arg(long)]
    pub(crate) json: bool,
}

/// Lines of tensors without `--all`.
const FEW: usize = 20;

/// Runs the command.
pub(crate) fn run(args: &Inspect) -> Result<()> {
    let (file, _) = args.source.open()?;
    let file = match &args.prefix {
        Some(prefix) => file.below(prefix).map_err(|e| coded(USAGE, e))?,
        None => file,
    };
    let fits = args.model.as_deref().map(|model| fits(&file, &our_name(model))).transpose()?;
    let mut by_type: BTreeMap<&str, usize> = BTreeMap::new();
    let mut n_floats = 0usize;
    for tensor in file.tensors().values() {
        *by_type.entry(tensor.dtype.name()).or_default() += 1;
        if tensor.dtype.is_float() {
            n_floats += tensor.shape.iter().product::<usize>();
        }
    }
    if args.json {
        let value = json!({
            "file": file.path(), "format": file.format(), "key": file.key(), "others": file.others(),
            "n_tensors": file.tensors().len(), "n_floats": n_floats, "types": by_type,
            "tensors": file.tensors(), "fits": fits,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("{}: {}", file.path().display(), file.format().name());
    if !file.key().is_empty() {
        println!("state dict at `{}`", file.key());
    }
    let types: Vec<String> = by_type.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
    println!("{} tensors ({}), {n_floats} numbers", file.tensors().len(), types.join(", "));
    for (name, tensor) in file.tensors().iter().take(if args.all { usize::MAX } else { FEW }) {
        println!("  {:<60} {:<5} {:?}", name.escape_debug().to_string(), tensor.dtype.name(), tensor.shape);
    }
    if !args.all && file.tensors().len() > FEW {
        println!("  ... and {} more (--all)", file.tensors().len() - FEW);
    }
    for other in file.others() {
        println!("  no tensor: {other}");
    }
    for (layout, verdict) in fits.into_iter().flatten() {
        println!("{layout}: {}", verdict.summary);
        if let Some(cause) = verdict.misfit.and_then(|misfit| misfit.cause) {
            println!("  {cause}");
        }
    }
    Ok(())
}

/// Whether a file fits a network in one layout.
#[derive(Debug, serde::Serialize)]
struct Verdict {
    fits: bool,
    summary: String,
    /// Every difference, where it does not.
    misfit: Option<Misfit>,
}

/// Whether the file fits `model` in each layout that has names for it.
fn fits(file: &segdistill_models::weights::WeightFile, model: &str) -> Result<BTreeMap<String, Verdict>> {
    let mut out = BTreeMap::new();
    for layout in layouts() {
        if !layout.networks().iter().any(|name| name == model) {
            continue;
        }
        let misfit = import_check(file, model, layout.name()).map_err(|e| coded(USAGE, e))?;
        let summary = match &misfit {
            None => match spec_of(file, model, layout.name()) {
                Ok((spec, _)) => format!("fits, {} classes", spec.n_classes),
                Err(_) => "fits, an encoder".to_string(),
            },
            Some(misfit) => misfit.counts(),
        };
        out.insert(layout.name().to_string(), Verdict { fits: misfit.is_none(), summary, misfit });
    }
    if out.is_empty() {
        let known: Vec<String> = layouts().iter().flat_map(|l| l.networks()).collect();
        let mut known = known;
        known.sort();
        known.dedup();
        return Err(crate::exit::usage!("no layout has names for `{model}`, known: {}", known.join(", ")));
    }
    Ok(out)
}
