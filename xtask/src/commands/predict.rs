//! `predict`: label images, overlays and logits for images or folders of images, or logits of a tensor of images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use segdistill_data::preview::{overlay, read_image, write_label_png, write_png};
use segdistill_data::{LabelMap, Manifest};
use segdistill_eval::predict_labels;
use segdistill_eval::table::write_atomic;
use segdistill_models::ModelError;
use segdistill_models::weights::WeightFile;
use segdistill_ops::params::all_finite;
use segdistill_ops::resize_bilinear;
use segdistill_train::checkpoint::to_safetensors;
use segdistill_train::{TrainError, image_tensor};

use crate::cli::Predict;
use crate::exit::{DATA, UNAVAILABLE, USAGE, coded, usage};
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

/// One image and the files made of it.
struct Job<'a> {
    name: String,
    image: &'a Path,
    labels: PathBuf,
    overlay: PathBuf,
}

/// What is written where; nothing may be written over an input or twice.
fn jobs<'a>(files: &'a [PathBuf], out: &Path) -> Result<Vec<Job<'a>>> {
    let full = |p: &Path| fs_err::canonicalize(p).unwrap_or_else(|_| p.to_path_buf());
    let out_full = full(out);
    let mut taken: BTreeMap<PathBuf, &Path> = files.iter().map(|f| (full(f), f.as_path())).collect();
    let mut jobs = Vec::with_capacity(files.len());
    for image in files {
        let name = file_stem(&image.with_extension("").to_string_lossy());
        let (labels, overlay) = (format!("{name}.png"), format!("{name}_overlay.png"));
        for made in [&labels, &overlay] {
            if let Some(other) = taken.insert(out_full.join(made), image) {
                return Err(usage!(
                    "`{made}` made of `{}` would be written over `{}` or what is made of it\n  hint: choose another --out folder, or predict into two",
                    image.display(),
                    other.display()
                ));
            }
        }
        jobs.push(Job { name, image, labels: out.join(labels), overlay: out.join(overlay) });
    }
    Ok(jobs)
}

/// Most bytes of logits that are held for one file.
const MOST_LOGITS: usize = 2 << 30;

/// Runs the command.
pub(crate) fn run(args: &Predict) -> Result<()> {
    let device = super::device(&super::device_name(&args.device), args.device.tf32)?;
    let out = match (&args.tensor, &args.out) {
        (Some(tensor), _) => return of_tensor(args, tensor, &device),
        (None, Some(out)) => out,
        (None, None) => return Err(usage!("no --out folder\n  hint: --out DIR takes label images and overlays")),
    };
    let files = images(&args.images)?;
    let jobs = jobs(&files, out)?;
    let model = read_final(&args.model, &device)?;
    let classes = class_table(&model.config);
    let of_same_classes = |m: &Manifest| m.classes.n_classes() == classes.n_classes();
    let manifest = Manifest::named(&model.config.dataset).ok().filter(of_same_classes);
    fs_err::create_dir_all(out)?;
    let mut progress = Progress::new("predict", jobs.len() as u64, "images");
    let mut logits_by_name = BTreeMap::new();
    let mut held = 0;
    let mut written = Vec::new();
    for (done, job) in jobs.iter().enumerate() {
        let image = read_image(job.image).map_err(|e| coded(DATA, e))?;
        let hw = [image.height, image.width];
        let logits = model.logits(&image_tensor(&[&image], model.config.input_size, &device)?)?;
        let ids = predict_labels(&logits, hw)?.into_iter().next().unwrap_or_default();
        let labels = LabelMap { height: hw[0], width: hw[1], ids };
        write_png(&job.overlay, &overlay(&image, &labels, &classes, 0.5)?)?;
        // As the data set's own label files, so that `eval --predictions` and a benchmark's server read them alike.
        let labels = match &manifest {
            Some(manifest) => manifest.labels_from_ids(labels),
            None => labels,
        };
        write_label_png(&job.labels, &labels)?;
        if args.save_logits.is_some() {
            held += model.config.classes.len() * hw[0] * hw[1] * size_of::<f32>();
            if held > MOST_LOGITS {
                return Err(usage!(
                    "the logits of {} images pass {} GiB\n  hint: predict fewer images into one --save-logits file",
                    done + 1,
                    MOST_LOGITS >> 30
                ));
            }
            logits_by_name.insert(job.name.clone(), resize_bilinear(&logits, hw, false)?);
        }
        written.push(serde_json::json!({ "image": job.image, "labels": job.labels, "overlay": job.overlay }));
        progress.set(done as u64 + 1, String::new);
    }
    progress.finish();
    if let Some(path) = &args.save_logits {
        write_atomic(path, &to_safetensors(&logits_by_name)?)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&written)?);
    } else {
        println!("{} images predicted into {}", written.len(), out.display());
    }
    Ok(())
}

/// Name of the tensor that `--tensor` reads.
const IMAGES: &str = "images_nchw";
/// Name of the tensor that is written for it.
const LOGITS: &str = "logits_nchw";

/// Logits at the size of the images, for images that are normalised already.
fn of_tensor(args: &Predict, path: &Path, device: &Device) -> Result<()> {
    let Some(out) = &args.save_logits else {
        return Err(usage!("--tensor without --save-logits\n  hint: name the file for the logits"));
    };
    let model = read_final(&args.model, device)?;
    let mut file = WeightFile::open(path, None).map_err(|e| coded(UNAVAILABLE, e))?;
    let found = file.tensors().get(IMAGES).cloned();
    let [n, h, w] = match found.as_ref().map(|t| (t.shape.as_slice(), t.dtype.is_float())) {
        Some((&[n, 3, h, w], true)) => [n, h, w],
        Some((shape, _)) => {
            let dtype = found.as_ref().map_or("", |t| t.dtype.name());
            return Err(usage!(
                "`{IMAGES}` in `{}` is {dtype} {shape:?}, expected floats [n, 3, h, w]",
                path.display()
            ));
        }
        None => {
            return Err(usage!(
                "`{}` holds no tensor `{IMAGES}`\n  hint: save normalised images [n, 3, h, w] under that name",
                path.display()
            ));
        }
    };
    let bytes = [n, model.config.classes.len(), h, w, size_of::<f32>()].into_iter().try_fold(1, usize::checked_mul);
    if bytes.is_none_or(|bytes| bytes > MOST_LOGITS) {
        return Err(usage!(
            "the logits of {n} images of {h}x{w} pass {} GiB\n  hint: predict fewer images at a time",
            MOST_LOGITS >> 30
        ));
    }
    let images = file.load(|name| name == IMAGES)?[IMAGES].to_dtype(DType::F32)?;
    if !all_finite(&images)? {
        return Err(usage!(
            "`{IMAGES}` in `{}` holds NaN or infinity\n  hint: a channel without variance divides by zero; normalise by the model's mean and std",
            path.display()
        ));
    }
    let images = images.to_device(device)?;
    let mut progress = Progress::new("predict", n as u64, "images");
    let mut logits = Vec::with_capacity(n);
    for i in 0..n {
        // One at a time, so that memory does not grow with their number.
        let image = images.narrow(0, i, 1)?.contiguous()?;
        let grid = model.logits_of_normalised(&image).map_err(|e| match e {
            TrainError::Model(ModelError::Input { .. }) => coded(USAGE, e),
            other => other.into(),
        })?;
        let (_, _, grid_h, grid_w) = grid.dims4()?;
        logits.push(if [grid_h, grid_w] == [h, w] { grid } else { resize_bilinear(&grid, [h, w], false)? });
        progress.set(i as u64 + 1, String::new);
    }
    progress.finish();
    if logits.is_empty() {
        return Err(usage!("`{IMAGES}` in `{}` holds no image", path.display()));
    }
    let logits = Tensor::cat(&logits, 0)?;
    let shape = logits.dims().to_vec();
    write_atomic(out, &to_safetensors(&BTreeMap::from([(LOGITS.to_string(), logits)]))?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "logits": out, "shape": shape }))?);
    } else {
        println!("{LOGITS} {shape:?} written to {}", out.display());
    }
    Ok(())
}
