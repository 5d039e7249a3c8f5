//! The run folder: who may write it, where each stage lives, what a finished stage leaves.

use std::collections::BTreeMap;
use std::fs::TryLockError;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use segdistill_data::classes::{Class, ClassTable};
use segdistill_eval::table::write_atomic;
use segdistill_models::{Frozen, ModelSpec};
use segdistill_train::Stage;
use segdistill_train::checkpoint::{sha256_hex, to_safetensors};

use crate::exit::{UNAVAILABLE, coded, usage};
use crate::recipe::Plan;

/// A run folder held by this process.
#[derive(Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
    _lock: std::fs::File,
}

/// `final/config.json`: what the weights beside it are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FinalConfig {
    /// `teacher` or `student`.
    pub(crate) role: String,
    /// Objective.
    pub(crate) method: String,
    /// Seed.
    pub(crate) seed: u64,
    /// Network.
    pub(crate) model: ModelSpec,
    /// Data set the classes come from.
    pub(crate) dataset: String,
    /// Class names, in order of their ids.
    pub(crate) classes: Vec<String>,
    /// Class colours.
    pub(crate) palette: Vec<[u8; 3]>,
    /// Height and width images are resized to before the network.
    pub(crate) input_size: [usize; 2],
    /// Trained parameters, buffers left out.
    pub(crate) params: usize,
    /// Multiply-accumulates of one image at `input_size`, convolutions and linear layers.
    pub(crate) macs: u64,
    /// Step of these weights, chosen on val.
    pub(crate) best_step: u64,
    /// mIoU on val at that step; `None` for weights from elsewhere that were not measured here.
    pub(crate) val_miou: Option<f64>,
    /// mIoU on val as whoever published the weights states it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stated_miou: Option<f64>,
    /// Whether logits are brought to the image's size with corners aligned, as the library does that the weights come
    /// from; else by pixel centres, as training and evaluation do here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) align_corners: bool,
    /// Where the weights come from.
    pub(crate) origin: String,
    /// sha256 of model.safetensors.
    pub(crate) sha256: String,
}

/// A finished stage read back.
pub(crate) struct FinalModel {
    /// What it is.
    pub(crate) config: FinalConfig,
    /// The network, frozen.
    pub(crate) network: Frozen,
}

impl FinalModel {
    /// Logits of images in [0, 1]: on the network's own grid, or at the images' size where corners are aligned.
    pub(crate) fn logits(&self, images_nchw: &Tensor) -> segdistill_train::Result<Tensor> {
        self.enlarged(self.network.forward(images_nchw)?.logits_nchw, images_nchw)
    }

    /// As [`FinalModel::logits`] for images that are normalised already.
    pub(crate) fn logits_of_normalised(&self, images_nchw: &Tensor) -> segdistill_train::Result<Tensor> {
        self.enlarged(self.network.forward_normalised(images_nchw)?.logits_nchw, images_nchw)
    }

    fn enlarged(&self, logits_nchw: Tensor, images_nchw: &Tensor) -> segdistill_train::Result<Tensor> {
        if !self.config.align_corners {
            return Ok(logits_nchw);
        }
        let (_, _, h, w) = images_nchw.dims4()?;
        Ok(segdistill_ops::resize_bilinear(&logits_nchw, [h, w], true)?)
    }
}

/// The first few of many, and how many more there are.
fn some_of(differences: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = match differences.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    format!("{}{more}", differences[..differences.len().min(SHOWN)].join("; "))
}

impl RunFolder {
    /// Takes the folder for one stage of `plan` beside those it holds already; returns the joined plan too.
    pub(crate) fn join(path: &Path, plan: &Plan) -> Result<(RunFolder, Plan)> {
        let lock = Self::lock(path)?;
        let saved = path.join("plan.toml");
        let joined = if saved.is_file() { plan.joined_to(&Plan::read(&saved)?)? } else { plan.clone() };
        Ok((Self::with_plan(path, &joined, lock)?, joined))
    }

    /// Takes the folder for this process and writes the plan. An earlier run without `resume` is moved aside, never
    /// overwritten; with `resume` the saved plan must be the same.
    pub(crate) fn take(path: &Path, plan: &Plan, resume: bool) -> Result<RunFolder> {
        let saved = path.join("plan.toml");
        let mut lock = Self::lock(path)?;
        if saved.is_file() {
            if resume {
                // Read and written again, so that a key which is newer than the folder has its default on both sides.
                // Methods and seeds may be added: what there is stays as it is.
                let before = Plan::read(&saved)?;
                let differences = differing_keys(&before.to_toml()?, &plan.without_new(&before).to_toml()?);
                if !differences.is_empty() {
                    return Err(usage!(
                        "`{}` was made by another plan: {}\n  hint: resume with the same recipe and settings (methods and seeds may be added), or start in another --out folder",
                        path.display(),
                        some_of(&differences)
                    ));
                }
            } else {
                let aside = free_name(path);
                fs_err::rename(path, &aside)?;
                eprintln!("kept the earlier run as {}", aside.display());
                lock = Self::lock(path)?;
            }
        }
        Self::with_plan(path, plan, lock)
    }

    fn with_plan(path: &Path, plan: &Plan, lock: std::fs::File) -> Result<RunFolder> {
        write_atomic(&path.join("plan.toml"), plan.to_toml()?.as_bytes())?;
        let facts = path.join("environment.json");
        if !facts.is_file() {
            // A resumed run keeps the facts it was started with.
            write_atomic(&facts, serde_json::to_string_pretty(&environment(plan))?.as_bytes())?;
        }
        Ok(RunFolder { path: path.to_path_buf(), _lock: lock })
    }

    fn lock(path: &Path) -> Result<std::fs::File> {
        fs_err::create_dir_all(path)?;
        let name = path.join(".lock");
        let file =
            fs_err::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&name)?.into_file();
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                (&file).write_all(format!("pid {}\n", std::process::id()).as_bytes())?;
                Ok(file)
            }
            Err(TryLockError::WouldBlock) => {
                let owner = fs_err::read_to_string(&name).unwrap_or_default();
                Err(anyhow::anyhow!(
                    "`{}` is in use by another run ({})\n  hint: wait for it, or choose another --out folder",
                    path.display(),
                    owner.trim()
                ))
            }
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock `{}`", name.display())),
        }
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Folder of a stage below a run.
pub(crate) fn stage_dir(run: &Path, stage: &Stage) -> PathBuf {
    if stage.method == "teacher" {
        run.join("teacher")
    } else {
        run.join(&stage.method).join(format!("seed-{}", stage.seed))
    }
}

/// The first of `path-1`, `path-2`, ... that is free.
fn free_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (1..)
        .map(|i| path.with_file_name(format!("{name}-{i}")))
        .find(|p| !p.exists())
        .unwrap_or_else(|| path.with_extension("old"))
}

/// Leaves of two TOML texts that differ, as `key was A, is B`.
pub(crate) fn differing_keys(saved: &str, now: &str) -> Vec<String> {
    fn flat(prefix: &str, value: &toml::Value, out: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(t) => t.iter().for_each(|(k, v)| flat(&format!("{prefix}.{k}"), v, out)),
            toml::Value::Array(a) => a.iter().enumerate().for_each(|(i, v)| flat(&format!("{prefix}[{i}]"), v, out)),
            leaf => {
                out.insert(prefix.trim_start_matches('.').to_string(), leaf.to_string());
            }
        }
    }
    let leaves = |text: &str| {
        let mut out = BTreeMap::new();
        if let Ok(table) = text.parse::<toml::Table>() {
            flat("", &toml::Value::Table(table), &mut out);
        }
        out
    };
    let (a, b) = (leaves(saved), leaves(now));
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let none = "absent".to_string();
    keys.into_iter()
        .filter(|k| a.get(*k) != b.get(*k))
        .map(|k| format!("{k} was {}, is {}", a.get(k).unwrap_or(&none), b.get(k).unwrap_or(&none)))
        .collect()
}

/// Versions of the libraries that decide numbers, from the lock file the program was built with.
fn locked_versions() -> serde_json::Value {
    const NAMES: [&str; 6] = ["candle-core", "gemm", "image", "polars", "rand_chacha", "safetensors"];
    let lock = include_str!("../../Cargo.lock").parse::<toml::Table>().unwrap_or_default();
    let packages = lock.get("package").and_then(toml::Value::as_array).into_iter().flatten();
    let text = |p: &toml::Value, key: &str| p.get(key).and_then(toml::Value::as_str).map(str::to_string);
    let known = packages.filter_map(|p| Some((text(p, "name")?, text(p, "version")?)));
    let listed: Vec<String> =
        known.filter(|(n, _)| NAMES.contains(&n.as_str())).map(|(n, v)| format!("{n} {v}")).collect();
    serde_json::json!(listed.join(", "))
}

/// What the run ran on.
fn environment(plan: &Plan) -> serde_json::Value {
    let first_line = |command: &str, args: &[&str]| {
        let out = std::process::Command::new(command).args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).lines().next()?.to_string())
    };
    let cpu = fs_err::read_to_string("/proc/cpuinfo").ok().and_then(|t| {
        t.lines()
            .find(|l| l.starts_with("model name"))
            .and_then(|l| l.split_once(':'))
            .map(|(_, v)| v.trim().to_string())
    });
    let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    serde_json::json!({
        "segdistill": env!("CARGO_PKG_VERSION"),
        "git_commit": first_line("git", &["rev-parse", "HEAD"]),
        "rustc": first_line("rustc", &["--version"]),
        "crates": locked_versions(),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(1, |n| n.get()),
        "threads": std::env::var("RAYON_NUM_THREADS").ok(),
        "device": plan.device,
        "tf32": plan.tf32,
        "precision": plan.teacher.precision.name(),
        "kernels": plan.kernels(),
        "started_unix": started,
    })
}

/// Writes `final/` of a stage: weights, config.json, model card; config.json last, so that it marks a finished stage.
pub(crate) fn write_final(dir: &Path, config: &mut FinalConfig, weights: &BTreeMap<String, Tensor>) -> Result<()> {
    write_model(&dir.join("final"), config, weights)
}

/// Writes a model folder: weights, model card, and config.json last.
pub(crate) fn write_model(place: &Path, config: &mut FinalConfig, weights: &BTreeMap<String, Tensor>) -> Result<()> {
    fs_err::create_dir_all(place)?;
    let bytes = to_safetensors(weights)?;
    config.sha256 = sha256_hex(&bytes);
    write_atomic(&place.join("model.safetensors"), &bytes)?;
    write_atomic(&place.join("README.md"), model_card(config).as_bytes())?;
    write_atomic(&place.join("config.json"), &serde_json::to_vec_pretty(&config)?)?;
    Ok(())
}

/// `failure.json` of a stage whose numbers ran away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// Which stage.
    pub(crate) stage: String,
    /// What was not finite, at which step, and what may help.
    pub(crate) error: String,
}

impl Failure {
    /// Name of the file.
    pub(crate) const FILE: &str = "failure.json";

    fn place(dir: &Path) -> PathBuf {
        dir.join(Self::FILE)
    }

    /// Leaves the record in the stage's folder.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        Ok(write_atomic(&Self::place(dir), &serde_json::to_vec_pretty(self)?)?)
    }

    /// The record in `dir`, if there is one.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = Self::place(dir);
        if !path.is_file() {
            return Ok(None);
        }
        let of = |bytes: Vec<u8>| serde_json::from_slice(&bytes);
        of(fs_err::read(&path)?)
            .map(Some)
            .with_context(|| format!("`{}` is not the record of a failure", path.display()))
    }

    /// Takes the record away, before the stage is trained again.
    pub(crate) fn forget(dir: &Path) -> Result<()> {
        let path = Self::place(dir);
        if path.is_file() {
            fs_err::remove_file(path)?;
        }
        Ok(())
    }

    /// What a report says of it: the error without its hint.
    pub(crate) fn sentence(&self) -> String {
        let what = self.error.lines().next().unwrap_or_default();
        format!("{} did not finish and is in no table and no mean: {what}.", self.stage)
    }
}

/// Whether the stage in `dir` is finished.
pub(crate) fn is_finished(dir: &Path) -> bool {
    dir.join("final/config.json").is_file()
}

/// The folder that holds the weights of `dir`: its `final/` if it is a stage, itself if it is a model folder.
pub(crate) fn model_place(dir: &Path) -> PathBuf {
    let of_stage = dir.join("final");
    if !of_stage.join("config.json").is_file() && dir.join("config.json").is_file() {
        dir.to_path_buf()
    } else {
        of_stage
    }
}

/// `config.json` of the stage or model folder `dir`.
pub(crate) fn read_config(dir: &Path) -> Result<FinalConfig> {
    let path = model_place(dir).join("config.json");
    let bytes = fs_err::read(&path).map_err(|e| {
        let hint = anyhow::anyhow!(
            "{e}\n  hint: name the folder of a finished stage, such as runs/toy/teacher or runs/toy/ce/seed-0, or one that `weights import` wrote"
        );
        coded(UNAVAILABLE, hint)
    })?;
    let role = serde_json::from_slice::<serde_json::Value>(&bytes).ok();
    if role.is_some_and(|config| config["role"] == "encoder") {
        return Err(usage!(
            "`{}` is an encoder alone, expected a whole network\n  hint: a recipe takes it as teacher.encoder_weights or student.encoder_weights",
            dir.display()
        ));
    }
    serde_json::from_slice(&bytes).with_context(|| format!("`{}` is not the configuration of a model", path.display()))
}

/// The finished stage or model folder `dir`, its weights verified.
pub(crate) fn read_final(dir: &Path, device: &Device) -> Result<FinalModel> {
    let config = read_config(dir)?;
    let path = model_place(dir).join("model.safetensors");
    let bytes = fs_err::read(&path).map_err(|e| coded(UNAVAILABLE, e))?;
    let found = sha256_hex(&bytes);
    if found != config.sha256 {
        anyhow::bail!(
            "`{}` has sha256 {found}, expected {}\n  hint: the file was changed or cut; train the stage or import the weights again",
            path.display(),
            config.sha256
        );
    }
    let tensors = segdistill_ops::params::read_safetensors(&path, device)?;
    let network = Frozen::new(&config.model, tensors, candle_core::DType::F32, device)
        .with_context(|| format!("`{}`", path.display()))?;
    Ok(FinalModel { config, network })
}

/// Names and colours of a class table.
pub(crate) fn class_lists(classes: &ClassTable) -> (Vec<String>, Vec<[u8; 3]>) {
    classes.classes.iter().map(|c| (c.name.clone(), c.color)).unzip()
}

/// The class table a model predicts.
pub(crate) fn class_table(config: &FinalConfig) -> ClassTable {
    let class = |(name, color): (&String, &[u8; 3])| Class { name: name.clone(), color: *color };
    ClassTable {
        name: config.dataset.clone(),
        classes: config.classes.iter().zip(&config.palette).map(class).collect(),
        void_color: [0, 0, 0],
    }
}

/// The model card of a folder.
pub(crate) fn model_card(c: &FinalConfig) -> String {
    let m = &c.model;
    let trained = match c.role.as_str() {
        "imported" => "A network for semantic segmentation, imported by segdistill.".to_string(),
        role => format!("A {role} for semantic segmentation, trained by segdistill."),
    };
    let miou = match (c.val_miou, c.stated_miou) {
        (Some(miou), _) => format!("{miou:.4} at step {} (whole images, label resolution, single scale)", c.best_step),
        (None, Some(miou)) => format!("{miou:.4} as stated by whoever published the weights; not measured here"),
        (None, None) => "not measured".to_string(),
    };
    format!(
        "# {name} on {encoder}, {method}\n\n\
         {trained}\n\n\
         | | |\n|---|---|\n\
         | network | {name}, encoder {encoder}, width {width}, output stride {os} |\n\
         | data | {data}{n} classes: {classes} |\n\
         | input | RGB in [0, 1] at {h}x{w}; the network normalises for itself |\n\
         | objective | {method}, seed {seed} |\n\
         | weights | {origin} |\n\
         | val mIoU | {miou} |\n\
         | parameters | {params} |\n\
         | MACs | {macs} an image, convolutions and linear layers |\n",
        name = m.name,
        encoder = m.encoder,
        method = c.method,
        width = m.width,
        os = segdistill_models::info(m).map_or(m.output_stride, |about| about.output_stride),
        data = if c.dataset.is_empty() { String::new() } else { format!("{}, ", c.dataset) },
        n = m.n_classes,
        classes = c.classes.join(", "),
        h = c.input_size[0],
        w = c.input_size[1],
        seed = c.seed,
        origin = c.origin,
        miou = miou,
        params = c.params,
        macs = c.macs,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_key() {
        let found = differing_keys("a = 1\n[b]\nc = [1, 2]\n", "a = 1\n[b]\nc = [1, 3]\nd = 4\n");
        assert_eq!(found, ["b.c[1] was 2, is 3", "b.d was absent, is 4"]);
    }
}
