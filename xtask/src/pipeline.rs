//! Stages of a plan, run in order: train or take weights, keep the best, evaluate on every split there is.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device};

use segdistill_data::preview::{read_labels, write_label_png, write_png};
use segdistill_data::{Dataset, LabelMap, Split, VOID};
use segdistill_eval::table::{
    ResultRow, TimingRow, confusion_frame, per_class_frame, per_class_rows, read_csv, timings_frame,
    timings_from_frame, write_csv,
};
use segdistill_eval::{Confusion, Scores, Summary};
use segdistill_models::{Frozen, macs};
use segdistill_train::checkpoint::sha256_hex;
use segdistill_train::{Stage, StageData, TrainError, evaluate, run_stage};

use crate::commands::{SPLITS, labels_withheld, need_split, open_split};
use crate::exit::{DATA, coded};
use crate::progress::{Progress, StageProgress, duration};
use crate::recipe::{Fills, Plan, whole};
use crate::run_folder::{
    Failure, FinalConfig, FinalModel, class_lists, is_finished, read_config, read_final, stage_dir, write_final,
};

/// Validation images whose predictions are kept for the report's pictures.
const GALLERY: usize = 4;

/// How label maps are predicted, as summaries and reports say it.
pub(crate) const MODE: &str = "whole image, single scale, bilinear logits at label resolution";

/// Raised by SIGINT and SIGTERM; the second signal ends the program at once.
pub(crate) struct Interrupt {
    flag: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Listens from now on.
    pub(crate) fn listen() -> Result<Self> {
        let (flag, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        for number in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&flag))?;
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)?;
            signal_hook::flag::register(number, Arc::clone(&flag))?;
        }
        Ok(Self { flag, signal })
    }

    fn code(&self) -> u8 {
        128 + self.signal.load(Ordering::SeqCst) as u8
    }

    /// An error once a signal came, to leave a loop that holds nothing to save.
    fn check(&self) -> segdistill_train::Result<()> {
        if self.flag.load(Ordering::SeqCst) {
            let what = "interrupted between two stages; every finished stage is saved".to_string();
            return Err(TrainError::Config { what, hint: "go on with `--resume`" });
        }
        Ok(())
    }

    /// Gives an error the code of the signal, if one came.
    fn coded(&self, error: TrainError) -> anyhow::Error {
        if self.flag.load(Ordering::SeqCst) { coded(self.code(), error) } else { error.into() }
    }
}

/// A plan at work in its folder.
pub(crate) struct Pipeline<'a> {
    /// What runs.
    pub(crate) plan: &'a Plan,
    /// Run folder.
    pub(crate) run: &'a Path,
    /// Device.
    pub(crate) device: Device,
    /// Signals.
    pub(crate) interrupt: Interrupt,
    /// Go on from checkpoints.
    pub(crate) resume: bool,
}

impl Pipeline<'_> {
    /// The teacher: its weights as given, or trained; measured before anything is distilled.
    pub(crate) fn teacher(&self) -> Result<FinalModel> {
        let stage = &self.plan.teacher;
        let dir = stage_dir(self.run, stage);
        if !(self.resume && is_finished(&dir)) {
            match &self.plan.teacher_weights {
                Some(path) => self.take_weights(stage, &dir, path)?,
                None => self.train(stage, &dir, None)?,
            }
        }
        let teacher = read_final(&dir, &self.device)?;
        self.evaluate(&teacher, &dir)?;
        let val = Summary::read(&dir.join("eval/val/summary.json"))?;
        eprintln!("teacher: val mIoU {:.4} before anything is distilled", val.scores.miou);
        Ok(teacher)
    }

    /// One student, trained and evaluated.
    fn student(&self, stage: &Stage, teacher: Option<&FinalModel>) -> Result<FinalModel> {
        let dir = stage_dir(self.run, stage);
        Failure::forget(&dir)?;
        if !(self.resume && is_finished(&dir)) {
            self.train(stage, &dir, teacher)?;
        }
        let student = read_final(&dir, &self.device)?;
        self.evaluate(&student, &dir)?;
        Ok(student)
    }

    /// Every student of `stages`. One whose numbers run away leaves a record in its folder, and the others go on; gives a
    /// sentence for each of these.
    pub(crate) fn students(&self, stages: &[&Stage], teacher: Option<&FinalModel>) -> Result<Vec<String>> {
        let mut failed = Vec::new();
        for stage in stages {
            let done = self.student(stage, teacher);
            let Err(error) = done else { continue };
            let diverged = error.chain().find_map(|e| e.downcast_ref::<TrainError>()).filter(|e| e.diverged());
            let Some(cause) = diverged else { return Err(error) };
            let failure = Failure { stage: label(stage), error: cause.to_string() };
            failure.write(&stage_dir(self.run, stage))?;
            eprintln!("error: {error:#}");
            eprintln!("{} is left out; the other students go on", label(stage));
            failed.push(failure.sentence());
        }
        Ok(failed)
    }

    fn train(&self, stage: &Stage, dir: &Path, teacher: Option<&FinalModel>) -> Result<()> {
        let train = need_split(&self.plan.data, Split::Train)?;
        let val = need_split(&self.plan.data, Split::Val)?;
        let start = self.plan.start_of(stage);
        let start =
            start.map(|s| s.load(&stage.model, stage.seed, &self.plan.weights_lock)).transpose()?.unwrap_or_default();
        let data = StageData {
            train: Arc::clone(&train),
            val: val.as_ref(),
            teacher: teacher.map(|t| (&t.network, t.config.sha256.as_str())),
            start: &start,
            device: &self.device,
            stop: &self.interrupt.flag,
        };
        let mut progress = StageProgress::new(&label(stage));
        let outcome = run_stage(stage, dir, &data, self.resume, &mut progress)
            .map_err(|e| self.interrupt.coded(e).context(format!("stage {}", label(stage))))?;
        progress.finish();
        eprintln!(
            "{}: best val mIoU {:.4} at step {}, {}",
            label(stage),
            outcome.best.1,
            outcome.best.0,
            duration(outcome.seconds)
        );
        let origin = self.plan.start_of(stage).map_or("trained from scratch".to_string(), |start| {
            let what = if start.fills == Fills::Encoder { "encoder" } else { "weights" };
            format!("trained from {what} `{}`", start.from)
        });
        let best = (outcome.best.0, Some(outcome.best.1));
        let mut config = self.config(stage, val.as_ref(), best, origin)?;
        write_final(dir, &mut config, &outcome.weights)
    }

    /// A teacher whose weights are a file: all of it fits, or the run stops with every difference.
    fn take_weights(&self, stage: &Stage, dir: &Path, path: &Path) -> Result<()> {
        let name = path.to_string_lossy();
        let wanted = self.plan.teacher_pinned.wanted(&name);
        let (tensors, from) = whole(&wanted, &stage.model, None, &self.plan.weights_lock)?;
        let network = Frozen::new(&stage.model, tensors.clone(), DType::F32, &self.device)?;
        let val = need_split(&self.plan.data, Split::Val)?;
        let layout = from.layout.map_or(String::new(), |layout| format!(" of layout {layout}"));
        let origin = format!("`{}`{layout}, sha256 {}", path.display(), sha256_hex(&fs_err::read(&from.path)?));
        let config = self.config(stage, val.as_ref(), (0, None), origin)?;
        let mut model = FinalModel { config: FinalConfig { align_corners: from.align_corners, ..config }, network };
        let scores = self.scores(&model, val.as_ref(), "teacher on val")?;
        model.config.val_miou = Some(scores.miou);
        write_final(dir, &mut model.config, &tensors)
    }

    fn config(
        &self,
        stage: &Stage,
        val: &dyn Dataset,
        best: (u64, Option<f64>),
        origin: String,
    ) -> Result<FinalConfig> {
        let (classes, palette) = class_lists(val.classes());
        let params = segdistill_models::info(&stage.model)?.n_parameters;
        Ok(FinalConfig {
            role: if stage.method == "teacher" { "teacher" } else { "student" }.to_string(),
            method: if stage.method == "teacher" { "ce".to_string() } else { stage.method.clone() },
            seed: stage.seed,
            model: stage.model.clone(),
            dataset: val.id().to_string(),
            classes,
            palette,
            input_size: stage.input.size,
            params,
            macs: macs(&stage.model, stage.input.size)?,
            best_step: best.0,
            val_miou: best.1,
            stated_miou: None,
            align_corners: false,
            origin,
            sha256: String::new(),
        })
    }

    fn scores(&self, model: &FinalModel, dataset: &dyn Dataset, label: &str) -> Result<Scores> {
        let mut progress = Progress::new(label, dataset.len() as u64, "images");
        let logits = |images: &candle_core::Tensor| model.logits(images);
        let done = evaluate(&logits, dataset, model.config.input_size, &self.device, &mut |image| {
            progress.set(image.index as u64 + 1, String::new);
            self.interrupt.check()
        });
        progress.finish();
        Ok(done.map_err(|e| self.interrupt.coded(e))?.confusion.scores())
    }

    /// Evaluates a finished model on every split that is there and not evaluated yet.
    fn evaluate(&self, model: &FinalModel, dir: &Path) -> Result<()> {
        for split in SPLITS {
            let place = dir.join("eval").join(split.to_string());
            if self.resume && place.join("summary.json").is_file() {
                continue;
            }
            if labels_withheld(&self.plan.data, split)? {
                log::info!("labels of {split} are withheld: nothing is scored on it");
                continue;
            }
            let Some(dataset) = open_split(&self.plan.data, split)? else { continue };
            let started = Instant::now();
            let keep = if split == Split::Val { gallery_indices(dataset.len()) } else { Vec::new() };
            let label = format!("{} {split}", stage_label(&model.config));
            // On val the teacher's label maps are kept, and every student's are held against them.
            let teachers = stage_dir(self.run, &self.plan.teacher).join("eval/val/predicted");
            let predictions = match (split, model.config.role.as_str()) {
                (Split::Val, "teacher") => Predictions::Kept(&teachers),
                (Split::Val, _) if teachers.is_dir() => Predictions::Compared(&teachers),
                _ => Predictions::Left,
            };
            let how = Evaluating { place: Some(&place), label: &label, keep: &keep, predictions };
            evaluate_into(model, dataset.as_ref(), &self.device, &how, &|| self.interrupt.check()).map_err(|e| {
                match e.downcast::<TrainError>() {
                    Ok(e) => self.interrupt.coded(e),
                    Err(e) => e,
                }
            })?;
            let row =
                timing(&model.config, &format!("eval {split}"), started.elapsed().as_secs_f64(), dataset.len() as u64);
            add_timing(dir, row)?;
        }
        Ok(())
    }
}

/// What becomes of the label maps an evaluation predicts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Predictions<'a> {
    /// They are scored, no more.
    #[default]
    Left,
    /// They are written to a folder, one PNG an image.
    Kept(&'a Path),
    /// They are held against those in a folder.
    Compared(&'a Path),
}

/// What an evaluation leaves, and what it is called.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evaluating<'a> {
    /// Folder of summary.json, per_class.csv and confusion.csv.
    pub(crate) place: Option<&'a Path>,
    /// Name of its progress.
    pub(crate) label: &'a str,
    /// Images whose pictures the report shows.
    pub(crate) keep: &'a [usize],
    /// The label maps.
    pub(crate) predictions: Predictions<'a>,
}

/// Evaluates `model` on `dataset` and leaves what `how` asks for.
pub(crate) fn evaluate_into(
    model: &FinalModel,
    dataset: &dyn Dataset,
    device: &Device,
    how: &Evaluating<'_>,
    check: &dyn Fn() -> segdistill_train::Result<()>,
) -> Result<Summary> {
    let Evaluating { place, label, keep, predictions } = *how;
    if let Predictions::Kept(folder) = predictions {
        fs_err::create_dir_all(folder)?;
    }
    // Pixels on which both agree, and pixels compared.
    let mut agreed = [0u64, 0];
    let mut progress = Progress::new(label, dataset.len() as u64, "images");
    let logits = |images: &candle_core::Tensor| model.logits(images);
    let mut label_hw = [0, 0];
    let done = evaluate(&logits, dataset, model.config.input_size, device, &mut |image| {
        progress.set(image.index as u64 + 1, String::new);
        let labels = &image.sample.labels;
        label_hw = [labels.height, labels.width];
        if let Some(place) = place.filter(|_| keep.contains(&image.index)) {
            let folder = place.join("gallery");
            fs_err::create_dir_all(&folder)?;
            let name = file_stem(&image.sample.name);
            write_png(&folder.join(format!("{name}_input.png")), &image.sample.image)?;
            write_label_png(&folder.join(format!("{name}_labels.png")), labels)?;
            let predicted = LabelMap { height: labels.height, width: labels.width, ids: image.predictions.to_vec() };
            write_label_png(&folder.join(format!("{name}_predicted.png")), &predicted)?;
        }
        let file = |folder: &Path| folder.join(format!("{:06}.png", image.index));
        match predictions {
            Predictions::Left => {}
            Predictions::Kept(folder) => {
                let map = LabelMap { height: labels.height, width: labels.width, ids: image.predictions.to_vec() };
                write_label_png(&file(folder), &map)?;
            }
            Predictions::Compared(folder) => {
                let other = read_labels(&file(folder))?;
                if other.ids.len() != labels.ids.len() {
                    let what = format!("{} is not of the size of the labels", file(folder).display());
                    return Err(TrainError::Config {
                        what,
                        hint: "evaluate the teacher again, in another --out folder",
                    });
                }
                for ((label, ours), theirs) in labels.ids.iter().zip(image.predictions).zip(&other.ids) {
                    agreed[0] += u64::from(*label != VOID && ours == theirs);
                    agreed[1] += u64::from(*label != VOID);
                }
            }
        }
        check()
    })?;
    progress.finish();
    let c = &model.config;
    let scores = done.confusion.scores();
    let split = dataset.split().to_string();
    if scores.n_pixels == 0 {
        return Err(nothing_to_score(&format!("{} {split}", dataset.id())));
    }
    let mut row = ResultRow::new(&c.method, &c.role, &c.model.encoder, &split, c.seed, &scores, done.n_images)
        .with_size(c.params as u64, c.macs);
    row.agreement = (agreed[1] > 0).then(|| agreed[0] as f64 / agreed[1] as f64);
    let summary = Summary {
        stage: stage_label(c),
        dataset: dataset.id().to_string(),
        label_hw,
        mode: format!("{MODE}, images at {}x{}", c.input_size[0], c.input_size[1]),
        class_names: c.classes.clone(),
        result: row,
        scores,
    };
    if let Some(place) = place {
        write_evaluation(&summary, &done.confusion, place)?;
    }
    Ok(summary)
}

/// The error of labels without a single pixel of a class, on which every score would be no number.
pub(crate) fn nothing_to_score(labels: &str) -> anyhow::Error {
    let why = anyhow::anyhow!(
        "no pixel of {labels} belongs to a class: there is nothing to score\n  hint: publishers that withhold labels, as Cityscapes those of test, fill label files with void; evaluate on val"
    );
    coded(DATA, why)
}

/// Writes summary.json, per_class.csv and confusion.csv; the summary last, so that it marks a whole evaluation.
pub(crate) fn write_evaluation(summary: &Summary, confusion: &Confusion, place: &Path) -> Result<()> {
    fs_err::create_dir_all(place)?;
    let rows = per_class_rows(&summary.result, &summary.class_names, &summary.scores)?;
    write_csv(&per_class_frame(&rows)?, &place.join("per_class.csv"))?;
    write_csv(&confusion_frame(confusion, &summary.class_names)?, &place.join("confusion.csv"))?;
    Ok(summary.write(&place.join("summary.json"))?)
}

/// A sample name as a file name.
pub(crate) fn file_stem(name: &str) -> String {
    let stem = name.rsplit('/').next().unwrap_or(name);
    let stem = stem.strip_suffix(".png").unwrap_or(stem);
    stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}

/// Images of val that the report shows: spread over the split, the same for every model.
fn gallery_indices(len: usize) -> Vec<usize> {
    let n = GALLERY.min(len);
    (0..n).map(|i| (2 * i + 1) * len / (2 * n)).collect()
}

/// `teacher`, or `ce/seed-0`.
pub(crate) fn stage_label(c: &FinalConfig) -> String {
    if c.role == "teacher" { "teacher".to_string() } else { format!("{}/seed-{}", c.method, c.seed) }
}

fn label(stage: &Stage) -> String {
    if stage.method == "teacher" { "teacher".to_string() } else { format!("{} seed {}", stage.method, stage.seed) }
}

fn timing(c: &FinalConfig, stage: &str, seconds: f64, n_steps: u64) -> TimingRow {
    TimingRow {
        method: c.method.clone(),
        role: c.role.clone(),
        seed: c.seed,
        stage: stage.to_string(),
        seconds,
        n_steps,
        run: String::new(),
    }
}

/// Puts one row into the stage's timings.csv, in place of an earlier one of the same name.
fn add_timing(dir: &Path, row: TimingRow) -> Result<()> {
    let path = dir.join("timings.csv");
    let mut rows = if path.is_file() { timings_from_frame(&read_csv(&path)?)? } else { Vec::new() };
    rows.retain(|r| r.stage != row.stage);
    rows.push(row);
    Ok(write_csv(&timings_frame(&rows)?, &path)?)
}

/// The finished stages of a run folder: teacher first, then students in plan order.
pub(crate) fn finished_stages(run: &Path, plan: &Plan) -> Result<Vec<(PathBuf, FinalConfig)>> {
    let mut out = Vec::new();
    for stage in std::iter::once(&plan.teacher).chain(&plan.students) {
        let dir = stage_dir(run, stage);
        if is_finished(&dir) && Failure::read(&dir)?.is_none() {
            out.push((dir.clone(), read_config(&dir)?));
        }
    }
    Ok(out)
}

/// A sentence for each planned student that [`finished_stages`] leaves out, in the plan's order.
pub(crate) fn unfinished(run: &Path, plan: &Plan) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for stage in &plan.students {
        let dir = stage_dir(run, stage);
        match Failure::read(&dir)? {
            Some(failure) => out.push(failure.sentence()),
            None if is_finished(&dir) => {}
            None => {
                out.push(format!("{} is planned, not trained to its end, and in no table and no mean.", label(stage)))
            }
        }
    }
    Ok(out)
}

/// Seconds of training of a stage, from its metrics: batch size over images a second, summed over the steps.
pub(crate) fn training_time(dir: &Path, stage: &Stage) -> Result<Option<TimingRow>> {
    if !dir.join("metrics.csv").is_file() {
        return Ok(None);
    }
    let columns = segdistill_train::read_metrics(dir)?;
    let Some((_, rates)) = columns.iter().find(|(name, _)| name == "images_per_second") else { return Ok(None) };
    let seconds = rates.iter().map(|r| stage.batch_size as f64 / r).sum();
    let config = read_config(dir)?;
    Ok(Some(timing(&config, "train", seconds, rates.len() as u64)))
}
