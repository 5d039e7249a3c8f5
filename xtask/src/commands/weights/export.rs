//! `weights export`: a model of ours in the names of another library.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use clap::Args;
use serde_json::json;

use segdistill_eval::table::write_atomic;
use segdistill_models::weights::{Exported, export, export_encoder, layout, read};
use segdistill_train::checkpoint::{sha256_hex, to_safetensors};

use super::import::UNUSED;
use crate::exit::{UNAVAILABLE, USAGE, coded, usage};
use crate::run_folder::{FinalConfig, model_card, model_place, read_final};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask weights export runs/cityscapes/csc+ce/seed-0 --layout smp --out exported
  python -c \"import segmentation_models_pytorch as smp; smp.from_pretrained('exported')\"

Writes model.safetensors with every tensor of the library's state dict, config.json with the arguments of its constructor,
and a model card. Networks are exported at full width, in the structure of the library: for smp's DeepLabV3+, DeepLabV3 and
PSPNet, train with layout = \"smp\".")]
pub(crate) struct Export {
    /// Stage folder of a run, or a folder that `weights import` wrote, of a network or an encoder alone
    #[arg(value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Whose names: smp, torchvision, transformers, cirkd
    #[arg(long, value_name = "LAYOUT")]
    pub(crate) layout: String,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Print what was written as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Export) -> Result<()> {
    if args.out.exists() && (!args.out.is_dir() || fs_err::read_dir(&args.out)?.next().is_some()) {
        return Err(usage!("`{}` is there already\n  hint: choose a new or empty --out folder", args.out.display()));
    }
    let library = layout(&args.layout).map_err(|e| coded(USAGE, e))?;
    if let Some((name, tensors)) = encoder_in(&args.model)? {
        return encoder(args, &name, &tensors, library.name());
    }
    // Verified against its digest, and whole.
    let config = read_final(&args.model, &Device::Cpu)?.config;
    let place = model_place(&args.model);
    let tensors = read(place.join("model.safetensors"), &Device::Cpu)?;
    let unused = place.join(UNUSED);
    let dormant = match unused.is_file() {
        true => read(&unused, &Device::Cpu).with_context(|| format!("`{}`", unused.display()))?,
        false => BTreeMap::new(),
    };
    let exported = export(&tensors, &dormant, &config.model, &args.layout).map_err(|e| coded(USAGE, e))?;
    fs_err::create_dir_all(&args.out)?;
    write_atomic(&args.out.join("model.safetensors"), &to_safetensors(&exported.tensors)?)?;
    let card = card(&config, library.name(), library.align_corners(), &exported);
    write_atomic(&args.out.join("README.md"), card.as_bytes())?;
    // Last, so that a folder with it is whole.
    write_atomic(&args.out.join("config.json"), &serde_json::to_vec_pretty(&exported.config)?)?;
    if args.json {
        let value = json!({
            "out": args.out, "layout": args.layout, "n_tensors": exported.tensors.len(),
            "n_filled": exported.n_filled, "config": exported.config,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!(
            "{} in layout {}: {} tensors into {}",
            config.model.full_name(),
            args.layout,
            exported.tensors.len(),
            args.out.display()
        );
        if exported.n_filled > 0 {
            println!("  {} of them never run and filled with constants", exported.n_filled);
        }
    }
    Ok(())
}

/// Name and tensors of an encoder that `weights import` wrote, if the folder holds one; verified against its digest.
fn encoder_in(folder: &Path) -> Result<Option<(String, BTreeMap<String, Tensor>)>> {
    let Ok(config) = fs_err::read(folder.join("config.json")) else { return Ok(None) };
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    let (Some("encoder"), Some(name)) = (config["role"].as_str(), config["encoder"].as_str()) else { return Ok(None) };
    let path = folder.join("model.safetensors");
    let found = sha256_hex(&fs_err::read(&path).map_err(|e| coded(UNAVAILABLE, e))?);
    if config["sha256"] != found.as_str() {
        anyhow::bail!(
            "`{}` has sha256 {found}, expected {}\n  hint: the file was changed or cut; import it again",
            path.display(),
            config["sha256"]
        );
    }
    Ok(Some((name.to_string(), read(&path, &Device::Cpu)?)))
}

/// An encoder alone: its tensors in the library's names, without the classifier.
fn encoder(args: &Export, name: &str, tensors: &BTreeMap<String, Tensor>, library: &str) -> Result<()> {
    let tensors = export_encoder(tensors, name, library).map_err(|e| coded(USAGE, e))?;
    fs_err::create_dir_all(&args.out)?;
    write_atomic(&args.out.join("model.safetensors"), &to_safetensors(&tensors)?)?;
    let card = format!(
        "# {name}\n\nAn encoder in the names of {library}, exported by segdistill. The classifier is not in it: load it \
         with `strict=False`.\n"
    );
    write_atomic(&args.out.join("README.md"), card.as_bytes())?;
    if args.json {
        let value = json!({ "out": args.out, "layout": library, "encoder": name, "n_tensors": tensors.len() });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!("{name} in layout {library}: {} tensors into {}", tensors.len(), args.out.display());
        println!("  the classifier is not in it: load it with strict=False");
    }
    Ok(())
}

/// The model card: what the hub reads first, then our own, then what differs there.
fn card(config: &FinalConfig, library: &str, align_corners: Option<bool>, exported: &Exported) -> String {
    let name = if library == "smp" { "segmentation-models-pytorch" } else { library };
    let mut out = format!(
        "---\nlibrary_name: {name}\npipeline_tag: image-segmentation\ntags:\n- semantic-segmentation\n---\n{}",
        model_card(config)
    );
    out += &format!("| names | layout {library}: load with `strict=True` |\n");
    if exported.n_filled > 0 {
        out += &format!(
            "| unused | {} tensors of stages that never run are constants, there to be loaded |\n",
            exported.n_filled
        );
    }
    if align_corners.is_some_and(|theirs| theirs != config.align_corners) {
        let (ours, theirs) = match config.align_corners {
            true => ("with corners aligned", "by pixel centres"),
            false => ("by pixel centres", "with corners aligned"),
        };
        out += &format!(
            "| enlarging | logits were enlarged {ours} when this was measured; {library} does it {theirs} |\n"
        );
    }
    out
}
