//! `weights import`: a file of another library as a model folder of ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device};
use clap::Args;
use serde_json::json;

use segdistill_data::Manifest;
use segdistill_eval::table::write_atomic;
use segdistill_models::encoders::{self, EncoderOptions};
use segdistill_models::weights::{
    ImportOptions, Imported, WeightFile, import, import_encoder, layout, our_name, spec_of,
};
use segdistill_models::{Frozen, ModelSpec, info, macs};
use segdistill_train::checkpoint::{sha256_hex, to_safetensors};

use super::source::{self, Source};
use crate::commands::models::nearest;
use crate::exit::{USAGE, coded, usage};
use crate::hub::registry::NamedWeights;
use crate::run_folder::{FinalConfig, class_lists, write_model};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask weights import model.safetensors --model deeplabv3plus-resnet34 --layout smp --out imported
  cargo xtask weights import checkpoint.pth --model deeplabv3-resnet101-deep --dataset cityscapes --out teacher
  cargo xtask weights import smp-hub/segformer-b0-1024x1024-city-160k --model segformer-mit-b0 --out teacher
  cargo xtask weights import resnet34.pth --model resnet34 --out encoder           an encoder alone
  cargo xtask weights import model.safetensors --model unet-resnet34 --classes 11 --new-classifier 0 --out start

Everything fits or nothing is written: missing, unexpected and misshapen tensors are listed. The number of classes and the
decoder's channels are read off the file; output stride, rates and the like no tensor shows: a config.json that smp's
save_pretrained left beside the file is read and must agree, without one it is printed what was assumed. The folder holds model.safetensors, config.json and a model card; predict,
weights verify and weights export take it, and recipes as teacher.weights or student.weights.")]
pub(crate) struct Import {
    #[command(flatten)]
    pub(crate) source: Source,
    /// What the names to take begin with, such as model. or student.; default: what they all share is found
    #[arg(long, value_name = "PREFIX")]
    pub(crate) prefix: Option<String>,
    /// Network with its encoder, such as unet-resnet34, or an encoder alone, such as mit-b2
    #[arg(long, value_name = "NAME")]
    pub(crate) model: String,
    /// Whose names the tensors have: torchvision, timm, smp, transformers, cirkd; auto takes the one that fits
    #[arg(long, default_value = "auto", value_name = "LAYOUT")]
    pub(crate) layout: String,
    /// Classes the network must have; default: those of the file
    #[arg(long, value_name = "N")]
    pub(crate) classes: Option<usize>,
    /// For a file of another number of classes: take all but the classifier and draw that anew from this seed
    #[arg(long, requires = "classes", value_name = "SEED")]
    pub(crate) new_classifier: Option<u64>,
    /// Output stride of the encoder; default: the library's
    #[arg(long, value_name = "N")]
    pub(crate) output_stride: Option<usize>,
    /// Data set whose class names, colours and image size the model has
    #[arg(long, value_name = "NAME")]
    pub(crate) dataset: Option<String>,
    /// Size images are resized to before the network; default: the data set's, else 512x512
    #[arg(long, value_name = "HxW")]
    pub(crate) input_size: Option<String>,
    /// mIoU on val as published, a fraction, for `weights verify`
    #[arg(long, value_name = "MIOU")]
    pub(crate) stated_miou: Option<f64>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Print what was written as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// File beside the weights for tensors the network never runs, kept for export.
pub(super) const UNUSED: &str = "unused.safetensors";

/// Runs the command.
pub(crate) fn run(args: &Import) -> Result<()> {
    if args.out.exists() && (!args.out.is_dir() || fs_err::read_dir(&args.out)?.next().is_some()) {
        return Err(usage!("`{}` is there already\n  hint: choose a new or empty --out folder", args.out.display()));
    }
    if args.stated_miou.is_some_and(|miou| !(0.0..=1.0).contains(&miou)) {
        return Err(usage!("--stated-miou is a fraction from 0 to 1"));
    }
    let (file, named) = args.source.open()?;
    let mut file = match &args.prefix {
        Some(prefix) => file.below(prefix).map_err(|e| coded(USAGE, e))?,
        None => file,
    };
    let layout_name = source::layout(&args.layout, named);
    let model = our_name(&args.model);
    if encoders::names().contains(&model.as_str()) && ModelSpec::named(&model, 2).is_err() {
        return encoder(args, &model, &mut file, layout_name);
    }
    known(&model)?;
    let (mut spec, found) = spec_of(&file, &model, layout_name).map_err(|e| coded(USAGE, e))?;
    let file_classes = spec.n_classes;
    spec.n_classes = args.classes.unwrap_or(spec.n_classes);
    spec.output_stride = args.output_stride.unwrap_or(spec.output_stride);
    let about = info(&spec).map_err(|e| coded(USAGE, e))?;
    if let Some(stride) = args.output_stride.filter(|stride| *stride != about.output_stride) {
        return Err(usage!(
            "--output-stride {stride} is not used: {} always has {}\n  hint: take it out",
            spec.full_name(),
            about.output_stride
        ));
    }
    let options = ImportOptions { new_classifier: args.new_classifier };
    let mut imported = import(&mut file, &spec, found.name(), options).map_err(|e| coded(USAGE, e))?;
    if args.output_stride.is_some() {
        imported.assumed.retain(|key, _| !key.ends_with("output_stride"));
    }
    // Built once, so that a folder is written only for weights that run.
    Frozen::new(&spec, imported.tensors.clone(), DType::F32, &Device::Cpu).map_err(|e| coded(USAGE, e))?;

    let classes = Classes::of(args, &spec)?;
    let input_size = match &args.input_size {
        Some(text) => crate::commands::models::parse_size(text)?,
        None => classes.image_hw,
    };
    let origin = format!(
        "{} of layout {}, sha256 {}{}",
        name_of(file.path(), named),
        found.name(),
        sha256_hex(&fs_err::read(file.path())?),
        if args.new_classifier.is_some() && file_classes != spec.n_classes { ", classifier drawn anew" } else { "" }
    );
    let mut config = FinalConfig {
        role: "imported".to_string(),
        method: "as published".to_string(),
        seed: 0,
        model: spec.clone(),
        dataset: classes.dataset,
        classes: classes.names,
        palette: classes.palette,
        input_size,
        params: about.n_parameters,
        macs: macs(&spec, input_size).map_err(|e| coded(USAGE, e))?,
        best_step: 0,
        val_miou: None,
        stated_miou: args.stated_miou.or(named.and_then(|row| row.miou)),
        align_corners: layout(found.name())?.align_corners().unwrap_or(about.align_corners),
        origin,
        sha256: String::new(),
    };
    fs_err::create_dir_all(&args.out)?;
    if !imported.dormant.is_empty() {
        write_atomic(&args.out.join(UNUSED), &to_safetensors(&imported.dormant)?)?;
    }
    write_model(&args.out, &mut config, &imported.tensors)?;
    report(args, &imported, file.others(), &spec.full_name(), json!({ "classes": spec.n_classes, "model": spec }))
}

/// Refuses a name that is neither a network nor an encoder, naming the nearest of both.
fn known(name: &str) -> Result<()> {
    let is_network = |name: &str| segdistill_models::networks().iter().any(|n| n.name == name);
    if ModelSpec::named(name, 2).is_ok() || name.split_once('-').is_some_and(|(network, _)| is_network(network)) {
        return Ok(());
    }
    let networks: Vec<&str> = segdistill_models::networks().iter().map(|n| n.name).collect();
    let encoders = encoders::names();
    let all = networks.iter().chain(&encoders).copied();
    let hint = nearest(name, all).map(|n| format!("; the nearest is `{n}`")).unwrap_or_default();
    Err(usage!(
        "unknown network or encoder `{name}`, networks: {}; encoders: {}\n  hint: a network is written \
         NETWORK-ENCODER, an encoder alone by its name{hint}",
        networks.join(", "),
        encoders.join(", ")
    ))
}

/// What a file is called in records: its name on the hub or its file name, no path of this machine.
fn name_of(path: &Path, named: Option<&NamedWeights>) -> String {
    match named {
        Some(row) => format!("`{}` from {}", row.name, row.repo),
        None => format!("`{}`", path.file_name().unwrap_or_default().to_string_lossy()),
    }
}

/// An encoder alone: weights to start training from.
fn encoder(args: &Import, name: &str, file: &mut WeightFile, layout_name: &str) -> Result<()> {
    let only_networks = [
        ("--classes", args.classes.is_some()),
        ("--dataset", args.dataset.is_some()),
        ("--input-size", args.input_size.is_some()),
        ("--output-stride", args.output_stride.is_some()),
        ("--stated-miou", args.stated_miou.is_some()),
    ];
    if let Some((flag, _)) = only_networks.iter().find(|(_, given)| *given) {
        return Err(usage!("{flag} is not used: {} is an encoder alone\n  hint: take it out", name));
    }
    let imported = import_encoder(file, name, EncoderOptions::default(), layout_name);
    let imported = imported.map_err(|e| coded(USAGE, e))?;
    let bytes = to_safetensors(&imported.tensors)?;
    let config = json!({
        "role": "encoder",
        "encoder": name,
        "origin": format!("{} of layout {}", name_of(file.path(), None), imported.layout),
        "sha256": sha256_hex(&bytes),
    });
    write_atomic(&args.out.join("model.safetensors"), &bytes)?;
    let card = format!(
        "# {}\n\nAn encoder, imported by segdistill from {}. A recipe starts from it with `student.encoder_weights`.\n",
        name, config["origin"]
    );
    write_atomic(&args.out.join("README.md"), card.as_bytes())?;
    write_atomic(&args.out.join("config.json"), &serde_json::to_vec_pretty(&config)?)?;
    report(args, &imported, file.others(), name, json!({ "encoder": name }))
}

/// Says what was taken, what was not, and `others`, what lay beside the tensors and is none.
fn report(args: &Import, imported: &Imported, others: &[String], name: &str, more: serde_json::Value) -> Result<()> {
    let mut why: BTreeMap<&str, usize> = BTreeMap::new();
    for left in &imported.left_out {
        *why.entry(left.why).or_default() += 1;
    }
    if args.json {
        let mut value = json!({
            "out": args.out, "layout": imported.layout, "n_tensors": imported.tensors.len(),
            "left_out": imported.left_out, "wrapper": imported.wrapper, "assumed": imported.assumed, "others": others,
        });
        if let (Some(value), Some(more)) = (value.as_object_mut(), more.as_object()) {
            value.extend(more.clone());
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    println!("{name} in layout {}: {} tensors into {}", imported.layout, imported.tensors.len(), args.out.display());
    if !imported.wrapper.is_empty() {
        println!("  `{}` taken off every name", imported.wrapper);
    }
    for (why, n) in why {
        println!("  {n} left out: {why}");
    }
    for other in others {
        println!("  no tensor: {other}");
    }
    if !imported.assumed.is_empty() {
        let assumed: Vec<String> = imported.assumed.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        println!("  assumed, as no tensor shows it: {}", assumed.join(", "));
    }
    Ok(())
}

/// Names and colours of what the model predicts.
struct Classes {
    dataset: String,
    names: Vec<String>,
    palette: Vec<[u8; 3]>,
    image_hw: [usize; 2],
}

impl Classes {
    fn of(args: &Import, spec: &ModelSpec) -> Result<Self> {
        let n = spec.n_classes;
        let Some(id) = &args.dataset else {
            let palette = (0..n).map(|i| colour(i, n)).collect();
            let names = (0..n).map(|i| format!("class {i}")).collect();
            return Ok(Self { dataset: String::new(), names, palette, image_hw: [512, 512] });
        };
        let manifest = Manifest::named(id).map_err(|e| coded(USAGE, e))?;
        let (names, palette) = class_lists(&manifest.classes);
        if names.len() != n {
            return Err(usage!("{id} has {} classes, the weights {n}\n  hint: leave --dataset out", names.len()));
        }
        Ok(Self { dataset: manifest.id.clone(), names, palette, image_hw: manifest.image_hw })
    }
}

/// A colour for class `i` of `n`: hues around the circle, every other one darker.
fn colour(i: usize, n: usize) -> [u8; 3] {
    let hue = 6.0 * i as f64 / n as f64;
    let value = if i.is_multiple_of(2) { 230.0 } else { 150.0 };
    // Each of red, green and blue is full for a third of the circle and fades over a sixth on either side.
    let part = |at: f64| {
        let far = (hue - at).rem_euclid(6.0);
        let far = far.min(6.0 - far);
        (value * (2.0 - far).clamp(0.0, 1.0)) as u8
    };
    [part(0.0), part(2.0), part(4.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_without_a_data_set_have_colours_of_their_own() {
        assert_eq!(colour(0, 3), [230, 0, 0]);
        for n in [2, 19, 150] {
            let colours: std::collections::BTreeSet<_> = (0..n).map(|i| colour(i, n)).collect();
            assert_eq!(colours.len(), n);
        }
    }
}
