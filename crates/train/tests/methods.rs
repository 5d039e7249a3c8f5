//! Every loss as a term of a whole run: it trains, what it owns is resumed bit for bit, and none of that reaches the student.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use common::{World, other_teacher, small, stage};
use segdistill_ops::ParamStore;
use segdistill_train::{
    CriticForm, CriticOptimizer, Observer, ScheduleConfig, Stage, StageData, StepRecord, Taps, TermKind, TrainError,
    checkpoint, read_metrics, run_stage, step_seconds,
};

struct Silent;
impl Observer for Silent {}

struct StopAt<'a>(u64, &'a AtomicBool);
impl Observer for StopAt<'_> {
    fn on_step(&mut self, r: &StepRecord) {
        if r.step == self.0 {
            self.1.store(true, Ordering::SeqCst);
        }
    }
}

#[derive(Default)]
struct Records(Vec<StepRecord>);
impl Observer for Records {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.push(record.clone());
    }
}

fn of_names(names: &[&str]) -> Stage {
    let weight = |name: &str| match name {
        "ce" => 1.0,
        // A sum over the map, where the others are means.
        "mgd" => 2e-5,
        _ => 0.1,
    };
    let terms: Vec<(TermKind, f64)> = names.iter().map(|name| (small(name), weight(name))).collect();
    Stage { steps: 4, eval_every: 2, ..stage(&terms) }
}

fn names_of(dir: &Path) -> BTreeSet<String> {
    fs_err::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn every_loss_trains_and_leaves_the_student_as_it_is() {
    let (world, teacher) = (World::new(), other_teacher(&Device::Cpu));
    let plain: Vec<String> = {
        let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
        segdistill_models::build(&of_names(&["ce"]).model, &store).unwrap();
        store.tensors().into_keys().collect()
    };
    for name in TermKind::NAMES.into_iter().filter(|name| !["ce", "aux"].contains(name)) {
        let stage = of_names(&[name, "ce"]);
        let dir = tempfile::tempdir().unwrap();
        let data = StageData { teacher: Some((&teacher, "digest")), ..world.data() };
        let mut records = Records::default();
        let outcome =
            run_stage(&stage, dir.path(), &data, false, &mut records).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(outcome.weights.keys().cloned().collect::<Vec<_>>(), plain, "{name}: the student's tensors alone");
        for record in &records.0 {
            let value = record.terms[0].value.unwrap();
            assert!(value.is_finite() && value != 0.0, "{name} is {value} at step {}", record.step);
            assert_eq!(record.critic.is_some(), name == "holistic", "{name}");
        }
    }
}

#[test]
fn what_the_terms_own_is_resumed_bit_for_bit() {
    let mut stage = of_names(&["kd", "holistic", "cirkd-pixel", "cirkd-region", "mgd", "af-dcd", "fitnet", "ce"]);
    stage.terms[0].schedule = ScheduleConfig::RampUp;
    stage.terms[2].schedule = ScheduleConfig::RampDown;
    resumes(&stage, &["adapters", "critic", "memory-cirkd-pixel", "memory-cirkd-region"]);
}

#[test]
fn a_discriminator_of_the_hinge_with_adam_is_resumed_too() {
    let mut stage = of_names(&["holistic", "ce"]);
    let TermKind::Holistic { form, optimizer, .. } = &mut stage.terms[0].loss else { panic!("holistic") };
    (*form, *optimizer) = (CriticForm::Hinge, CriticOptimizer::Adam);
    resumes(&stage, &["critic"]);
}

/// Trains `stage` whole and cut in two places: the same student, momentum, `parts` and metrics, bit for bit.
fn resumes(stage: &Stage, parts: &[&str]) {
    let teacher = other_teacher(&Device::Cpu);
    let run = |dir: &Path, world: &World, resume, observer: &mut dyn Observer| {
        let data = StageData { teacher: Some((&teacher, "digest")), ..world.data() };
        run_stage(stage, dir, &data, resume, observer)
    };
    let last = |dir: &Path| checkpoint::load(&checkpoint::find(dir, "last").unwrap().unwrap(), &Device::Cpu).unwrap();
    let bits = |tensors: &BTreeMap<String, Tensor>| checkpoint::to_safetensors(tensors).unwrap();
    let untimed = |dir: &Path| -> Vec<(String, Vec<f64>)> {
        read_metrics(dir).unwrap().into_iter().filter(|(name, _)| name != "images_per_second").collect()
    };
    let whole = tempfile::tempdir().unwrap();
    run(whole.path(), &World::new(), false, &mut Silent).unwrap();
    let expected = last(whole.path());
    assert_eq!(expected.parts.keys().map(String::as_str).collect::<Vec<_>>(), parts);
    for cut in [1, 3] {
        let (dir, world) = (tempfile::tempdir().unwrap(), World::new());
        let stopped = run(dir.path(), &world, false, &mut StopAt(cut, &world.stop));
        assert!(matches!(stopped, Err(TrainError::Interrupted { .. })), "{stopped:?}");
        world.stop.store(false, Ordering::SeqCst);
        run(dir.path(), &world, true, &mut Silent).unwrap();
        let found = last(dir.path());
        assert_eq!(bits(&found.model), bits(&expected.model), "student, cut at {cut}");
        assert_eq!(bits(&found.optimizer), bits(&expected.optimizer), "momentum, cut at {cut}");
        for (name, tensors) in &expected.parts {
            assert_eq!(bits(&found.parts[name]), bits(tensors), "{name}, cut at {cut}");
        }
        assert_eq!(untimed(dir.path()), untimed(whole.path()), "metrics, cut at {cut}");
    }
    // A part that is changed on disk is refused like the weights themselves.
    let place = checkpoint::find(whole.path(), "last").unwrap().unwrap();
    for part in parts {
        assert!(names_of(&place).contains(&format!("{part}.safetensors")), "{part}");
    }
    let path = place.join("critic.safetensors");
    let mut flipped = fs_err::read(&path).unwrap();
    let at = flipped.len() - 3;
    flipped[at] ^= 1;
    fs_err::write(&path, flipped).unwrap();
    let error = checkpoint::load(&place, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("critic.safetensors") && error.contains("sha256"), "{error}");
}

#[test]
fn a_step_is_timed_before_training() {
    let teacher = other_teacher(&Device::Cpu);
    let stage = of_names(&["kd", "holistic", "cirkd-pixel", "ifvd", "ce"]);
    let seconds = step_seconds(&stage, Some(&teacher), 2, &Device::Cpu).unwrap();
    assert!(seconds > 0.0 && seconds.is_finite(), "{seconds}");
    let error = step_seconds(&stage, None, 2, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("no teacher"), "{error}");
    let blind = Stage { batch_size: 0, ..stage };
    assert!(step_seconds(&blind, Some(&teacher), 2, &Device::Cpu).unwrap_err().to_string().contains("batch_size"));
}

#[test]
fn adapters_and_discriminator_learn() {
    let (world, teacher, dir) = (World::new(), other_teacher(&Device::Cpu), tempfile::tempdir().unwrap());
    let mut stage = of_names(&["holistic", "fitnet", "ce"]);
    let data = StageData { teacher: Some((&teacher, "digest")), ..world.data() };
    run_stage(&stage, dir.path(), &data, false, &mut Silent).unwrap();
    let after = checkpoint::load(&checkpoint::find(dir.path(), "last").unwrap().unwrap(), &Device::Cpu).unwrap().parts;
    // One step of no length shows where they began.
    (stage.steps, stage.eval_every, stage.optim.warmup_steps, stage.optim.lr) = (1, 1, 0, 1e-30);
    for term in &mut stage.terms {
        if let TermKind::Holistic { lr, .. } = &mut term.loss {
            *lr = 1e-30;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    run_stage(&stage, dir.path(), &data, false, &mut Silent).unwrap();
    let before = checkpoint::load(&checkpoint::find(dir.path(), "last").unwrap().unwrap(), &Device::Cpu).unwrap().parts;
    let moved = |part: &str| {
        // The attentions start with a gain of 0, which lets next to nothing through to their own weights at first.
        let own =
            |name: &str| !name.starts_with("optimizer.") && !name.contains("attention") && name.ends_with("weight");
        let weights = before[part].iter().filter(|(name, _)| own(name));
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        weights.map(|(name, tensor)| (values(tensor) != values(&after[part][name]), name)).collect::<Vec<_>>()
    };
    for part in ["adapters", "critic"] {
        let moved = moved(part);
        assert!(!moved.is_empty() && moved.iter().all(|(moved, _)| *moved), "{part}: {moved:?}");
    }
}

#[test]
fn maps_are_asked_for_by_name() {
    let (world, teacher, dir) = (World::new(), other_teacher(&Device::Cpu), tempfile::tempdir().unwrap());
    let with = |tap: Taps| {
        let mut stage = of_names(&["at", "ce"]);
        stage.terms[0].loss = TermKind::At { tap };
        let data = StageData { teacher: Some((&teacher, "digest")), ..world.data() };
        run_stage(&stage, dir.path(), &data, false, &mut Silent)
    };
    with(Taps::Each(["aspp".into(), "high".into()])).unwrap();
    let error = with(Taps::Both("aspp".into())).unwrap_err().to_string();
    assert!(error.contains("the teacher has no map `aspp`, known: logits, penultimate, "), "{error}");
}

#[test]
fn a_term_of_weight_0_is_not_computed_and_owns_nothing() {
    let (world, teacher, dir) = (World::new(), other_teacher(&Device::Cpu), tempfile::tempdir().unwrap());
    let mut stage = of_names(&["kd", "cirkd-pixel", "holistic", "mgd", "ce"]);
    for term in &mut stage.terms[1..4] {
        term.weight = 0.0;
    }
    let data = StageData { teacher: Some((&teacher, "digest")), ..world.data() };
    let mut records = Records::default();
    run_stage(&stage, dir.path(), &data, false, &mut records).unwrap();
    assert!(records.0[0].terms[1..4].iter().all(|term| term.value.is_none()));
    let last = checkpoint::load(&checkpoint::find(dir.path(), "last").unwrap().unwrap(), &Device::Cpu).unwrap();
    assert!(last.parts.is_empty());
}
