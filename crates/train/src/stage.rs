//! One stage: a network trained once, from the first step to its best weights, on one page.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use segdistill_data::{Batch, Dataset, Loader, LoaderConfig, stats::Stats, transform::TrainTransform};
use segdistill_eval::Scores;
use segdistill_losses::enet_weights;
use segdistill_models::{Frozen, build};
use segdistill_ops::{Mode, NamedParam, ParamStore, graph};

use crate::checkpoint::{self, State, sha256_hex};
use crate::config::{ClassWeighting, Stage};
use crate::error::{Result, TrainError};
use crate::evaluate::evaluate;
use crate::metrics_log::MetricsLog;
use crate::objective::{Objective, Setting, TermValue};
use crate::optim::{Optimizer, Sgd, global_norm};
use crate::schedule::PolySchedule;
use crate::step::StepInputs;

/// What a stage learns from.
pub struct StageData<'a> {
    /// Training split.
    pub train: Arc<dyn Dataset>,
    /// Split that picks the best weights.
    pub val: &'a dyn Dataset,
    /// Frozen teacher and the digest of its weights, when the objective compares with one.
    pub teacher: Option<(&'a Frozen, &'a str)>,
    /// Tensors the network starts from, by name; those left out are drawn from the seed.
    pub start: &'a BTreeMap<String, Tensor>,
    /// Where everything runs.
    pub device: &'a Device,
    /// Raised from outside: finish the step, write a checkpoint, stop.
    pub stop: &'a AtomicBool,
}

/// One value of one term.
#[derive(Clone, Debug)]
pub struct StepTerm {
    /// Name of the term.
    pub name: String,
    /// Weight at this step.
    pub weight: f64,
    /// Unweighted value; `None` when the weight is 0.
    pub value: Option<f64>,
}

/// One optimizer step.
#[derive(Clone, Debug)]
pub struct StepRecord {
    /// Steps done, from 1.
    pub step: u64,
    /// Weighted sum of the terms.
    pub loss: f64,
    /// Every term.
    pub terms: Vec<StepTerm>,
    /// Loss of the discriminator, where the objective trains one.
    pub critic: Option<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Images a second over this step.
    pub images_per_second: f64,
}

/// One evaluation on val.
#[derive(Clone, Debug)]
pub struct ValRecord {
    /// Steps done.
    pub step: u64,
    /// Scores on val.
    pub scores: Scores,
    /// Whether these are the best weights so far.
    pub is_best: bool,
}

/// Told what happens in a stage; every method may do nothing.
pub trait Observer {
    /// Training starts, at `done` of `stage.steps`.
    fn on_start(&mut self, _stage: &Stage, _done: u64) {}
    /// A step is done.
    fn on_step(&mut self, _record: &StepRecord) {}
    /// An evaluation on val is done.
    fn on_val(&mut self, _record: &ValRecord) {}
}

/// What a finished stage leaves.
#[derive(Debug)]
pub struct StageOutcome {
    /// Best weights by val, with running statistics.
    pub weights: BTreeMap<String, Tensor>,
    /// Step and val mIoU of these weights.
    pub best: (u64, f64),
    /// Seconds spent in this process.
    pub seconds: f64,
}

/// Trains `stage` in `dir`, from its last checkpoint if `resume` and there is one.
///
/// # Errors
/// Every variant of [`TrainError`]; after any of them the checkpoints on disk are whole.
pub fn run_stage(
    stage: &Stage,
    dir: &Path,
    data: &StageData<'_>,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<StageOutcome> {
    stage.validate()?;
    if data.device.is_cpu() {
        stage.precision.on_cpu()?;
    }
    fs_err::create_dir_all(dir)?;
    let started = Instant::now();
    let store = ParamStore::trainable(stage.seed, DType::F32, data.device).with_precision(stage.precision);
    let student = build(&stage.model, &store)?;
    if !data.start.is_empty() {
        // All at once, so that a name or shape the network does not have stops the stage.
        let mut tensors = store.tensors();
        tensors.extend(data.start.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        store.load(&tensors)?;
    }
    let teacher = if stage.needs_teacher() { data.teacher.map(|(teacher, _)| teacher) } else { None };
    let mut objective = Objective::new(
        &stage.terms,
        &Setting {
            steps: stage.steps,
            seed: stage.seed,
            class_weights: class_weights(stage.class_weighting, data.train.as_ref())?,
            optim: &stage.optim,
            student: student.info(),
            teacher: teacher.map(Frozen::info),
            device: data.device,
        },
    )?;
    let trained = store.named().into_iter().chain(objective.params()).collect();
    let mut sgd = Sgd::over(trained, stage.optim.clone())?;
    let mut state = State {
        step: 0,
        validated: 0,
        best: None,
        stage: stage.clone(),
        teacher: data.teacher.map(|(_, digest)| digest.to_string()),
        data: identity(data.train.as_ref())?,
        sha256: BTreeMap::new(),
    };
    if let Some(place) = if resume { checkpoint::find(dir, "last")? } else { None } {
        let saved = checkpoint::load(&place, data.device)?;
        same_run(&place, &saved.state, &state)?;
        store.load(&saved.model)?;
        sgd.load_state(saved.optimizer)?;
        objective.load_state(&saved.parts)?;
        state = saved.state;
    }
    let schedule = PolySchedule::new(&stage.optim, stage.steps);
    let loader = Loader::new(Arc::clone(&data.train), Some(transform(stage)), loader_config(stage))?;
    let mut log = MetricsLog::open(dir, &objective.names(), objective.has_critic(), state.step)?;
    observer.on_start(stage, state.step);

    let mut batches = loader.iter_from(state.step);
    loop {
        let due = state.step > 0 && (state.step.is_multiple_of(stage.eval_every) || state.step == stage.steps);
        if due && state.validated < state.step {
            let scores = validate(stage, &store, data, state.step)?;
            if !scores.miou.is_finite() {
                let what = format!("val mIoU is {} at step {}: no pixel of val has a class", scores.miou, state.step);
                return Err(TrainError::config(what, "evaluate on a split with labels"));
            }
            let is_best = state.best.is_none_or(|(_, best)| scores.miou > best);
            state.validated = state.step;
            if is_best {
                state.best = Some((state.step, scores.miou));
            }
            let record = ValRecord { step: state.step, scores, is_best };
            log.val(&record)?;
            log.sync()?;
            checkpoint::save(dir, state.clone(), &store.tensors(), sgd.state(), &objective.state()?, is_best)?;
            observer.on_val(&record);
        }
        if state.step == stage.steps {
            break;
        }

        let clock = Instant::now();
        let t = state.step;
        let batch = batches.next().ok_or_else(|| TrainError::config("loader ended", "report this as a defect"))??;
        // Labels stay on the host, where masks and targets are made of them.
        let batch = Batch { images_nchw: batch.images_nchw.to_device(data.device)?, ..batch };
        let mut forward = || -> Result<Vec<TermValue>> {
            let mode = Mode::Train { seed: stage.seed, step: t };
            objective.terms(&StepInputs::forward(student.as_ref(), teacher, &batch, mode)?, t)
        };
        // Only the losses are held from here on: the backward pass lets go of each map it is done with.
        let (losses, values) = finite_losses(forward()?, t, &batch)?;
        let grads = sgd.gradients(&graph::backward_from(losses)?)?;
        let norm = global_norm(&grads)?;
        if !norm.is_finite() {
            return Err(blame_gradient(&grads, sgd.params(), forward()?, t, &batch));
        }
        let clip = stage.optim.clip_norm;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let lr = schedule.at(t);
        sgd.step(&grads, lr, scale)?;
        let critic = objective.train_critic(t, &batch.names)?;
        state.step += 1;

        let record = StepRecord {
            step: state.step,
            loss: values.iter().map(|v| v.weight * v.value.unwrap_or(0.0)).sum(),
            terms: values,
            critic,
            lr,
            grad_norm: norm,
            images_per_second: stage.batch_size as f64 / clock.elapsed().as_secs_f64(),
        };
        log.step(&record)?;
        observer.on_step(&record);
        if data.stop.load(Ordering::SeqCst) {
            log.sync()?;
            let place =
                checkpoint::save(dir, state.clone(), &store.tensors(), sgd.state(), &objective.state()?, false)?;
            return Err(TrainError::Interrupted { step: state.step, checkpoint: place });
        }
    }
    finish(dir, &state, data.device, started)
}

/// Best weights of a finished stage.
fn finish(dir: &Path, state: &State, device: &Device, started: Instant) -> Result<StageOutcome> {
    let place = checkpoint::find(dir, "best")?.ok_or_else(|| TrainError::Checkpoint {
        path: dir.to_path_buf(),
        why: "no evaluation on val chose a best checkpoint".into(),
        hint: "train the stage again without --resume",
    })?;
    let weights = checkpoint::load(&place, device)?.model;
    let best = state.best.unwrap_or((state.step, f64::NAN));
    Ok(StageOutcome { weights, best, seconds: started.elapsed().as_secs_f64() })
}

/// What a resumed run must find again: name, size and first sample of the training data.
fn identity(dataset: &dyn Dataset) -> Result<String> {
    let first = dataset.sample(0)?;
    let digest = sha256_hex(&[first.name.as_bytes(), &first.image.rgb, &first.labels.ids].concat());
    Ok(format!("{}/{} {} images, first {}", dataset.id(), dataset.split(), dataset.len(), &digest[..16]))
}

/// Refuses to resume a checkpoint of another configuration, naming what differs.
fn same_run(place: &Path, saved: &State, now: &State) -> Result<()> {
    let json = |s: &State| serde_json::json!({ "stage": s.stage, "teacher": s.teacher, "data": s.data });
    let mut differences = Vec::new();
    compare("", &json(saved), &json(now), &mut differences);
    if differences.is_empty() {
        return Ok(());
    }
    Err(TrainError::Checkpoint {
        path: place.to_path_buf(),
        why: format!("belongs to another configuration: {}", differences.join("; ")),
        hint: "resume with the plan the run was started with, or start in another --out folder",
    })
}

fn compare(path: &str, saved: &serde_json::Value, now: &serde_json::Value, out: &mut Vec<String>) {
    match (saved, now) {
        (serde_json::Value::Object(a), serde_json::Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let null = serde_json::Value::Null;
                let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&below, a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null), out);
            }
        }
        _ if saved != now => out.push(format!("{path} was {saved}, is {now}")),
        _ => {}
    }
}

/// Augmentation of a stage.
pub(crate) fn transform(stage: &Stage) -> TrainTransform {
    let i = &stage.input;
    TrainTransform {
        base_hw: Some(i.size),
        scale: i.scale,
        crop_hw: i.crop,
        flip: i.flip,
        brightness: i.jitter,
        contrast: i.jitter,
        saturation: i.jitter,
    }
}

fn loader_config(stage: &Stage) -> LoaderConfig {
    LoaderConfig { batch_size: stage.batch_size, workers: stage.input.workers.max(1), prefetch: 2, seed: stage.seed }
}

/// Class weights of `scheme` from the labels of the training split.
fn class_weights(scheme: ClassWeighting, train: &dyn Dataset) -> Result<Option<Vec<f64>>> {
    let median = || -> Result<Vec<f64>> { Ok(Stats::of(train)?.median_frequency_weights()) };
    Ok(match scheme {
        ClassWeighting::None => None,
        ClassWeighting::MedianFrequency => Some(median()?),
        ClassWeighting::SqrtMedianFrequency => Some(median()?.into_iter().map(f64::sqrt).collect()),
        ClassWeighting::Enet => Some(enet_weights(&Stats::of(train)?.class_shares())),
    })
}

/// Scores of the weights after `step` on val, whole images, running statistics, no graph, f32 products.
fn validate(stage: &Stage, store: &ParamStore, data: &StageData<'_>, step: u64) -> Result<Scores> {
    let frozen = Frozen::new(&stage.model, store.tensors(), store.dtype(), data.device)?;
    let logits = |images: &Tensor| Ok(frozen.forward(images)?.logits_nchw);
    match evaluate(&logits, data.val, stage.input.size, data.device, &mut |_| Ok(())) {
        Ok(done) => Ok(done.confusion.scores()),
        Err(TrainError::NonFiniteLogit { value, class, split, .. }) => {
            Err(TrainError::NonFiniteLogit { value, class, split, step: Some(step) })
        }
        Err(other) => Err(other),
    }
}

/// The losses to differentiate, each with its weight, and every term's value, all finite.
fn finite_losses(terms: Vec<TermValue>, step: u64, batch: &Batch) -> Result<(Vec<(Tensor, Tensor)>, Vec<StepTerm>)> {
    let mut losses = Vec::with_capacity(terms.len());
    let mut values = Vec::with_capacity(terms.len());
    for term in terms {
        let mut value = None;
        if let Some(loss) = term.loss {
            let v = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !v.is_finite() {
                let samples = batch.names.clone();
                return Err(TrainError::NonFiniteLoss { term: term.name, value: v, step, samples });
            }
            losses.push(weighted(loss, term.weight)?);
            value = Some(v);
        }
        values.push(StepTerm { name: term.name, weight: term.weight, value });
    }
    if losses.is_empty() {
        let what = format!("every term has weight 0 at step {step}");
        return Err(TrainError::config(what, "keep one term's weight above 0"));
    }
    Ok((losses, values))
}

/// A loss with the gradient of `weight * loss` with respect to it.
pub(crate) fn weighted(loss: Tensor, weight: f64) -> Result<(Tensor, Tensor)> {
    let seed = Tensor::full(weight, loss.shape(), loss.device())?.to_dtype(loss.dtype())?;
    Ok((loss, seed))
}

/// Names the parameter and, by differentiating each term alone, the terms whose gradient is not finite.
fn blame_gradient(
    grads: &[Tensor],
    params: &[NamedParam],
    terms: Vec<TermValue>,
    step: u64,
    batch: &Batch,
) -> TrainError {
    let bad = |g: &Tensor| !global_norm(std::slice::from_ref(g)).is_ok_and(f64::is_finite);
    let parameter = params.iter().zip(grads).find(|(_, g)| bad(g)).map_or("their sum", |(p, _)| p.name.as_str());
    let names: Vec<String> = terms.iter().filter(|t| t.loss.is_some()).map(|t| t.name.clone()).collect();
    let alone = |term: TermValue| {
        let grads = graph::backward_from(vec![weighted(term.loss?, term.weight).ok()?]).ok()?;
        params.iter().any(|p| grads.get(&p.tensor).is_some_and(bad)).then_some(term.name)
    };
    let mut blamed: Vec<String> = terms.into_iter().filter_map(alone).collect();
    if blamed.is_empty() {
        blamed = names;
    }
    TrainError::NonFiniteGradient { parameter: parameter.into(), terms: blamed, step, samples: batch.names.clone() }
}

#[cfg(test)]
mod tests {
    use segdistill_data::{Split, StreetScenes, StreetScenesConfig};

    use super::*;

    #[test]
    fn class_weights_are_those_of_the_labels() {
        let cfg = StreetScenesConfig { height: 32, width: 48, seed: 5, variety: 1.0, n_train: 4, n_val: 1, n_test: 1 };
        let scenes = StreetScenes::new(cfg, Split::Train).unwrap();
        let n_classes = scenes.classes().n_classes();
        // Pixels of each class, and pixels of the images that hold it.
        let (mut pixels, mut beside) = (vec![0.0f64; n_classes], vec![0.0f64; n_classes]);
        for i in 0..scenes.len() {
            let ids = scenes.sample(i).unwrap().labels.ids;
            for class in 0..n_classes {
                let found = ids.iter().filter(|id| usize::from(**id) == class).count() as f64;
                pixels[class] += found;
                beside[class] += if found > 0.0 { ids.len() as f64 } else { 0.0 };
            }
        }
        let total: f64 = pixels.iter().sum();
        let present = |class: &usize| pixels[*class] > 0.0;
        let mut frequencies: Vec<f64> = (0..n_classes).filter(present).map(|c| pixels[c] / beside[c]).collect();
        frequencies.sort_by(f64::total_cmp);
        let k = frequencies.len();
        let median = (frequencies[(k - 1) / 2] + frequencies[k / 2]) / 2.0;
        let of = |scheme| class_weights(scheme, &scenes).unwrap();
        assert_eq!(of(ClassWeighting::None), None);
        let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-12, "{found}, {expected}");
        for class in (0..n_classes).filter(present) {
            let by_median = median / (pixels[class] / beside[class]);
            near(of(ClassWeighting::MedianFrequency).unwrap()[class], by_median);
            near(of(ClassWeighting::SqrtMedianFrequency).unwrap()[class], by_median.sqrt());
            near(of(ClassWeighting::Enet).unwrap()[class], 1.0 / (1.02 + pixels[class] / total).ln());
        }
    }
}
