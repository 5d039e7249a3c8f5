//! The loop as its callers see it: repeatable, resumable bit for bit, stopping on nonsense.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Tensor};
use common::{World, stage};
use segdistill_models::{Frozen, ModelSpec};
use segdistill_ops::ParamStore;
use segdistill_train::{
    Observer, Stage, StageData, StageOutcome, StepRecord, TermKind, TrainError, checkpoint, read_metrics, run_stage,
};

struct Silent;
impl Observer for Silent {}

/// Raises the stop flag after a step.
struct StopAt<'a>(u64, &'a AtomicBool);
impl Observer for StopAt<'_> {
    fn on_step(&mut self, r: &StepRecord) {
        if r.step == self.0 {
            self.1.store(true, Ordering::SeqCst);
        }
    }
}

fn bytes(weights: &BTreeMap<String, Tensor>) -> Vec<u8> {
    checkpoint::to_safetensors(weights).unwrap()
}

fn train(stage: &Stage, dir: &Path, world: &World) -> StageOutcome {
    run_stage(stage, dir, &world.data(), false, &mut Silent).unwrap()
}

/// Columns that do not hold time.
fn untimed(dir: &Path) -> Vec<(String, Vec<f64>)> {
    read_metrics(dir).unwrap().into_iter().filter(|(name, _)| name != "images_per_second").collect()
}

fn last_weights(dir: &Path) -> Vec<u8> {
    bytes(&checkpoint::load(&checkpoint::find(dir, "last").unwrap().unwrap(), &Device::Cpu).unwrap().model)
}

#[test]
fn a_run_repeats_bit_for_bit() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stage = stage(&[(TermKind::ce(), 1.0)]);
    let (x, y) = (train(&stage, a.path(), &World::new()), train(&stage, b.path(), &World::new()));
    assert_eq!(bytes(&x.weights), bytes(&y.weights));
    assert_eq!(untimed(a.path()), untimed(b.path()));
    let mut other = stage;
    other.seed = 4;
    let c = tempfile::tempdir().unwrap();
    assert_ne!(
        bytes(&train(&other, c.path(), &World::new()).weights),
        bytes(&x.weights),
        "another seed, other weights"
    );
}

#[test]
fn a_run_stopped_at_any_step_resumes_to_the_same_bits() {
    let stage = stage(&[(TermKind::ce(), 1.0)]);
    let whole = tempfile::tempdir().unwrap();
    let expected = train(&stage, whole.path(), &World::new());
    for cut in 1..=stage.steps {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let stopped = run_stage(&stage, dir.path(), &world.data(), false, &mut StopAt(cut, &world.stop));
        match stopped {
            Err(TrainError::Interrupted { step, checkpoint }) => {
                assert_eq!(step, cut);
                assert!(checkpoint.is_dir());
            }
            other => panic!("stopped at {cut}: {other:?}"),
        }
        world.stop.store(false, Ordering::SeqCst);
        let resumed = run_stage(&stage, dir.path(), &world.data(), true, &mut Silent).unwrap();
        assert_eq!(bytes(&resumed.weights), bytes(&expected.weights), "best weights, cut at {cut}");
        assert_eq!(last_weights(dir.path()), last_weights(whole.path()), "last weights, cut at {cut}");
        assert_eq!(resumed.best, expected.best);
        assert_eq!(untimed(dir.path()), untimed(whole.path()), "metrics, cut at {cut}");
        let val = |d: &Path| fs_err::read_to_string(d.join("val.csv")).unwrap();
        assert_eq!(val(dir.path()), val(whole.path()), "val, cut at {cut}");
    }
}

#[test]
fn resuming_another_configuration_names_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let mut stage = stage(&[(TermKind::ce(), 1.0)]);
    train(&stage, dir.path(), &World::new());
    stage.optim.lr = 0.5;
    stage.batch_size = 3;
    let error = run_stage(&stage, dir.path(), &World::new().data(), true, &mut Silent).unwrap_err().to_string();
    assert!(
        error.contains("stage.optim.lr was 0.02, is 0.5") && error.contains("stage.batch_size was 2, is 3"),
        "{error}"
    );
}

#[test]
fn a_changed_checkpoint_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    train(&stage(&[(TermKind::ce(), 1.0)]), dir.path(), &World::new());
    let place = checkpoint::find(dir.path(), "last").unwrap().unwrap();
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let path = place.join(file);
        let whole = fs_err::read(&path).unwrap();
        let mut flipped = whole.clone();
        let at = flipped.len() - 5;
        flipped[at] ^= 4;
        for bad in [&flipped[..], &whole[..whole.len() / 2], &[]] {
            fs_err::write(&path, bad).unwrap();
            let error = checkpoint::load(&place, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains(file) && error.contains("sha256"), "{error}");
        }
        fs_err::write(&path, &whole).unwrap();
    }
    checkpoint::load(&place, &Device::Cpu).unwrap();
}

/// A teacher of the student's network with weights of another seed.
fn teacher(spec: &ModelSpec, poison: Option<f32>) -> Frozen {
    let store = ParamStore::trainable(99, DType::F32, &Device::Cpu);
    segdistill_models::build(spec, &store).unwrap();
    let mut tensors = store.tensors();
    if let Some(value) = poison {
        // Large enough to overflow on the way, yet finite: what a loader cannot refuse.
        let name = tensors.keys().find(|k| k.ends_with("classifier.weight")).expect("a classifier").clone();
        let big = (tensors[&name].ones_like().unwrap() * f64::from(value)).unwrap();
        tensors.insert(name, big);
    }
    Frozen::new(spec, tensors, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn distilling_trains_the_student_alone() {
    let (dir, world) = (tempfile::tempdir().unwrap(), World::new());
    let stage = stage(&[(TermKind::Csc {}, 5.0), (TermKind::ce(), 1.0)]);
    let frozen = teacher(&stage.model, None);
    let probe = Tensor::ones((1, 3, 32, 48), DType::F32, &Device::Cpu).unwrap();
    let before = frozen.forward(&probe).unwrap().logits_nchw.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let data = StageData { teacher: Some((&frozen, "digest")), ..world.data() };
    run_stage(&stage, dir.path(), &data, false, &mut Silent).unwrap();
    let after = frozen.forward(&probe).unwrap().logits_nchw.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(before, after, "the teacher's weights and running statistics are untouched");
    let columns = read_metrics(dir.path()).unwrap();
    let of = |name: &str| columns.iter().find(|(n, _)| n == name).unwrap().1.clone();
    for step in 0..stage.steps as usize {
        let sum = of("loss_csc")[step] * of("weight_csc")[step] + of("loss_ce")[step] * of("weight_ce")[step];
        assert!((of("loss")[step] - sum).abs() < 1e-9 && of("loss_csc")[step] > 0.0);
    }
}

#[test]
fn a_term_without_teacher_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = run_stage(&stage(&[(TermKind::Csc {}, 1.0)]), dir.path(), &World::new().data(), false, &mut Silent);
    assert!(error.unwrap_err().to_string().contains("no teacher"));
}

#[test]
fn a_blown_up_loss_names_term_and_samples() {
    let dir = tempfile::tempdir().unwrap();
    let mut stage = stage(&[(TermKind::ce(), 1.0)]);
    stage.optim.lr = 1e30;
    stage.optim.warmup_steps = 0;
    let error = run_stage(&stage, dir.path(), &World::new().data(), false, &mut Silent).unwrap_err();
    let text = error.to_string();
    match error {
        TrainError::NonFiniteLoss { term, samples, step, .. } => {
            assert_eq!((term.as_str(), samples.len()), ("ce", 2));
            assert!(step > 0);
        }
        TrainError::NonFiniteGradient { terms, samples, .. } => {
            assert_eq!((terms, samples.len()), (vec!["ce".to_string()], 2));
        }
        other => panic!("{other}"),
    }
    assert!(text.contains("optim.lr"), "{text}");
}

/// The step itself was finite; what it did to the weights shows on val.
#[test]
fn logits_that_overflow_on_val_name_the_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut stage = stage(&[(TermKind::ce(), 1.0)]);
    (stage.optim.lr, stage.optim.warmup_steps, stage.eval_every) = (1e30, 0, 1);
    let error = run_stage(&stage, dir.path(), &World::new().data(), false, &mut Silent).unwrap_err();
    assert!(matches!(error, TrainError::NonFiniteLogit { step: Some(1), .. }) && error.diverged(), "{error}");
    assert!(error.to_string().contains("optim.lr"), "{error}");
}

#[test]
fn a_teacher_that_overflows_is_named_by_its_term() {
    let (dir, world) = (tempfile::tempdir().unwrap(), World::new());
    let stage = stage(&[(TermKind::Csc {}, 1.0), (TermKind::ce(), 1.0)]);
    let frozen = teacher(&stage.model, Some(3e38));
    let data = StageData { teacher: Some((&frozen, "digest")), ..world.data() };
    let error = run_stage(&stage, dir.path(), &data, false, &mut Silent).unwrap_err();
    assert!(matches!(&error, TrainError::NonFiniteLoss { term, step: 0, .. } if term == "csc"), "{error}");
}

/// A stage starts from the tensors it is given, from its seed in all others, and refuses what the network does not have.
#[test]
fn a_stage_starts_from_what_it_is_given() {
    let mut stage = stage(&[(TermKind::ce(), 1.0)]);
    (stage.optim.lr, stage.optim.warmup_steps) = (1e-12, 0);
    let drawn = |seed| {
        let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
        segdistill_models::build(&stage.model, &store).unwrap();
        store.tensors()
    };
    let (own, other) = (drawn(stage.seed), drawn(stage.seed + 1));
    let given = "encoder.layer1.0.conv1.weight";
    let mut world = World::new();
    world.start.insert(given.to_string(), other[given].force_contiguous().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let trained = train(&stage, dir.path(), &world).weights;
    let far = |a: &Tensor, b: &Tensor| a.sub(b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    // A step of 1e-12 moves nothing that f32 shows.
    assert!(far(&trained[given], &other[given]) < 1e-6);
    assert!(far(&trained[given], &own[given]) > 1e-2);
    let rest = "encoder.layer1.0.conv2.weight";
    assert!(far(&trained[rest], &own[rest]) < 1e-6);

    world.start.insert("encoder.fc.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let error = run_stage(&stage, dir.path(), &world.data(), false, &mut Silent).unwrap_err().to_string();
    assert!(error.contains("unexpected") && error.contains("encoder.fc.weight"), "{error}");
}
