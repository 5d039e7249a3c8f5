//! `predict`: label images, overlays and logits for images or folders of images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

use segdistill_data::LabelMap;
use segdistill_data::preview::{overlay, read_image, write_label_png, write_png};
use segdistill_eval::predict_labels;
use segdistill_eval::table::write_atomic;
use segdistill_ops::resize_bilinear;
use segdistill_train::checkpoint::to_safetensors;
use segdistill_train::image_tensor;

use crate::cli::Predict;
use crate::exit::{DATA, UNAVAILABLE, coded, usage};
use crate::pipeline::file_stem;
use crate::progress::Progress;
use crate::run_folder::{class_table, read_final};

/// Images named on the command line, folders opened, sorted.
fn images(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let is_image =
        |p: &Path| p.extension().is_some_and(|e| ["png", "jpg", "jpeg"].iter().any(|k| e.eq_ignore_ascii_case(k)));
    let mut out = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut inside = Vec::new();
            for entry in fs_err::read_dir(path)? {
                let entry = entry?.path();
                if is_image(&entry) {
                    inside.push(entry);
                }
            }
            inside.sort();
            out.extend(inside);
        } else if path.is_file() {
            out.push(path.clone());
        } else {
            let why = anyhow::anyhow!(
                "`{}` is not there\n  hint: name images or folders of images (PNG, JPEG)",
                path.display()
            );
            return Err(coded(UNAVAILABLE, why));
        }
    }
    if out.is_empty() {
        return Err(usage!("no PNG or JPEG among what was named\n  hint: name images or folders of images"));
    }
    Ok(out)
}

/// Runs the command.
pub(crate) fn run(args: &Predict) -> Result<()> {
    let device = super::device(&args.device)?;
    let files = images(&args.images)?;
    let mut by_name: BTreeMap<String, &Path> = BTreeMap::new();
    for file in &files {
        let name = file_stem(&file.with_extension("").to_string_lossy());
        if let Some(other) = by_name.insert(name.clone(), file) {
            return Err(usage!(
                "`{}` and `{}` would both be written as {name}.png\n  hint: predict them into two folders",
                other.display(),
                file.display()
            ));
        }
    }
    let model = read_final(&args.model, &device)?;
    let classes = class_table(&model.config);
    fs_err::create_dir_all(&args.out)?;
    let mut progress = Progress::new("predict", files.len() as u64, "images");
    let mut logits_by_name = BTreeMap::new();
    let mut written = Vec::new();
    for (done, (name, file)) in by_name.iter().enumerate() {
        let image = read_image(file).map_err(|e| coded(DATA, e))?;
        let hw = [image.height, image.width];
        let logits = model.network.forward(&image_tensor(&[&image], model.config.input_size, &device)?)?.logits_nchw;
        let ids = predict_labels(&logits, hw)?.into_iter().next().unwrap_or_default();
        let labels = LabelMap { height: hw[0], width: hw[1], ids };
        let (label_png, overlay_png) =
            (args.out.join(format!("{name}.png")), args.out.join(format!("{name}_overlay.png")));
        write_label_png(&label_png, &labels)?;
        write_png(&overlay_png, &overlay(&image, &labels, &classes, 0.5)?)?;
        if args.save_logits.is_some() {
            logits_by_name.insert(name.clone(), resize_bilinear(&logits, hw, false)?);
        }
        written.push(serde_json::json!({ "image": file, "labels": label_png, "overlay": overlay_png }));
        progress.set(done as u64 + 1, String::new);
    }
    progress.finish();
    if let Some(path) = &args.save_logits {
        write_atomic(path, &to_safetensors(&logits_by_name)?)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&written)?);
    } else {
        println!("{} images predicted into {}", written.len(), args.out.display());
    }
    Ok(())
}
