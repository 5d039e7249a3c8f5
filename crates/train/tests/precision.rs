//! Training with bf16 products: it learns, stays near f32, repeats itself, and is refused where it cannot run.

mod common;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use common::{World, stage};
use segdistill_data::{Dataset, Split, StreetScenes, StreetScenesConfig};
use segdistill_models::ModelSpec;
use segdistill_ops::Precision;
use segdistill_train::{
    ClassWeighting, InputConfig, Observer, Stage, StageData, StepRecord, TermKind, TrainError, checkpoint, run_stage,
};

/// Past the test harness, which hides what a passing test prints.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn has_bf16(test: &str) -> bool {
    let found = Precision::Bf16.on_cpu();
    if let Err(why) = &found {
        say(&format!("skipped: {test}: {why}"));
    }
    found.is_ok()
}

/// Keeps the loss of every step.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.push(record.loss);
    }
}

fn short(precision: Precision) -> Stage {
    let mut stage = Stage { precision, steps: 24, eval_every: 12, ..stage(&[(TermKind::ce(), 1.0)]) };
    stage.class_weighting = ClassWeighting::None;
    stage
}

/// Losses step by step, and the best weights as bytes.
fn run(stage: &Stage, dir: &Path) -> (Vec<f64>, Vec<u8>) {
    let mut losses = Losses::default();
    let outcome = run_stage(stage, dir, &World::new().data(), false, &mut losses).unwrap();
    (losses.0, checkpoint::to_safetensors(&outcome.weights).unwrap())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn training_in_bf16_learns_and_stays_near_f32() {
    if !has_bf16("training_in_bf16_learns_and_stays_near_f32") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (exact, _) = run(&short(Precision::F32), &at("f32"));
    let (losses, weights) = run(&short(Precision::Bf16), &at("bf16"));
    let again = run(&short(Precision::Bf16), &at("again"));
    assert!((&losses, &weights) == (&again.0, &again.1), "two runs differ");

    assert!(losses.iter().all(|l| l.is_finite()), "{losses:?}");
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 4..]));
    assert!(last < 0.9 * first, "the loss went from {first:.3} to {last:.3}: {losses:?}");
    assert_ne!(losses[0], exact[0], "nothing was rounded");
    for (step, (found, expected)) in losses.iter().zip(&exact).enumerate() {
        // One forward pass apart at first; later each step starts from the differences of those before it, and batches
        // of two make the statistics of the smallest maps sensitive to them.
        let allowed = if step == 0 { 1e-2 } else { 0.25 };
        let distance = (found - expected).abs() / expected;
        assert!(distance <= allowed, "step {step}: loss {found} in bf16, {expected} in f32");
    }
}

#[test]
fn a_run_does_not_go_on_in_another_precision() {
    if !has_bf16("a_run_does_not_go_on_in_another_precision") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let [f32, bf16] = [Precision::F32, Precision::Bf16].map(|precision| Stage { steps: 4, ..short(precision) });
    run(&f32, dir.path());
    let error = run_stage(&bf16, dir.path(), &world.data(), true, &mut Losses::default()).unwrap_err().to_string();
    assert!(error.contains("stage.precision was \"f32\", is \"bf16\""), "{error}");
}

#[test]
fn a_processor_without_bf16_refuses_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let Err(why) = Precision::Bf16.on_cpu() else {
        return say("skipped: a_processor_without_bf16_refuses_before_the_first_step: this processor has bf16");
    };
    let place = dir.path().join("stage");
    let refused =
        run_stage(&short(Precision::Bf16), &place, &World::new().data(), false, &mut Losses::default()).unwrap_err();
    assert!(matches!(refused, TrainError::Ops(_)) && refused.to_string() == why.to_string(), "{refused}");
    assert!(!place.exists(), "nothing is written");
}

#[test]
fn a_checkpoint_of_a_version_without_precisions_is_f32() {
    let now = short(Precision::F32);
    let mut json = serde_json::to_value(&now).unwrap();
    assert_eq!(json["precision"], "f32");
    json.as_object_mut().unwrap().remove("precision");
    assert_eq!(serde_json::from_value::<Stage>(json.clone()).unwrap(), now);
    json["precision"] = "f16".into();
    let error = serde_json::from_value::<Stage>(json).unwrap_err().to_string();
    assert!(error.contains("`f16`, expected `f32` or `bf16`"), "{error}");
}

/// Means over blocks of 20 steps.
fn smooth(losses: &[f64]) -> Vec<f64> {
    losses.chunks(20).map(mean).collect()
}

/// How far `curve` lies from the mean of `curves`, in standard deviations of one curve, at its farthest point.
fn beyond(curve: &[f64], curves: &[Vec<f64>]) -> f64 {
    let at = |k: usize| {
        let values: Vec<f64> = curves.iter().map(|c| c[k]).collect();
        let centre = mean(&values);
        let square: f64 = values.iter().map(|v| (v - centre) * (v - centre)).sum();
        (curve[k] - centre).abs() / (square / (values.len() - 1) as f64).sqrt()
    };
    (0..curve.len()).map(at).fold(0.0, f64::max)
}

#[test]
fn the_loss_curve_of_bf16_lies_within_the_band_of_seeds() {
    const NAME: &str = "the_loss_curve_of_bf16_lies_within_the_band_of_seeds";
    if std::env::var("SEGDISTILL_SLOW_TESTS").as_deref() != Ok("1") {
        return say(&format!("skipped: {NAME} (set SEGDISTILL_SLOW_TESTS=1 for 1600 steps: some three minutes)"));
    }
    if !has_bf16(NAME) {
        return;
    }
    const HW: [usize; 2] = [64, 96];
    let scenes =
        StreetScenesConfig { height: HW[0], width: HW[1], seed: 0, variety: 1.0, n_train: 64, n_val: 2, n_test: 0 };
    let split = |split| Arc::new(StreetScenes::new(scenes.clone(), split).unwrap()) as Arc<dyn Dataset>;
    let (train, val) = (split(Split::Train), split(Split::Val));
    let curve = |seed: u64, precision: Precision, lr: f64| {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Stage {
            seed,
            precision,
            steps: 200,
            batch_size: 4,
            eval_every: 200,
            model: ModelSpec { width: 0.25, ..ModelSpec::deeplabv3plus("resnet18", 11) },
            input: InputConfig { size: HW, crop: HW, scale: [0.75, 1.5], flip: 0.5, jitter: 0.2, workers: 1 },
            ..short(precision)
        };
        stage.optim.lr = lr;
        stage.optim.warmup_steps = 10;
        let stop = AtomicBool::new(false);
        let data = StageData {
            train: Arc::clone(&train),
            val: val.as_ref(),
            teacher: None,
            start: &Default::default(),
            device: &Device::Cpu,
            stop: &stop,
        };
        let mut losses = Losses::default();
        run_stage(&stage, dir.path(), &data, false, &mut losses).unwrap();
        smooth(&losses.0)
    };
    const LR: f64 = 0.05;
    let seeds: Vec<Vec<f64>> = (0..6).map(|seed| curve(seed, Precision::F32, LR)).collect();
    let rounded = curve(0, Precision::Bf16, LR);
    // What the rule must be able to refuse: a run that learns more slowly.
    let slow = curve(0, Precision::F32, LR / 5.0);

    let line = |name: &str, curve: &[f64]| {
        say(&format!("{name:<14}{}", curve.iter().map(|v| format!("{v:>8.4}")).collect::<String>()));
    };
    seeds.iter().enumerate().for_each(|(seed, curve)| line(&format!("f32, seed {seed}"), curve));
    line("bf16, seed 0", &rounded);
    line("f32, lr / 5", &slow);
    let (found, refused) = (beyond(&rounded, &seeds), beyond(&slow, &seeds));
    say(&format!(
        "standard deviations from the seeds' mean: bf16 {found:.2}, a fifth of the learning rate {refused:.2}"
    ));
    // Another f32 seed would lie farther than 4 standard deviations of the six at a given point in 1.4 % of all runs
    // (Student's t with 5 degrees of freedom).
    assert!(found <= 4.0, "bf16 leaves the band of seeds: {found:.2} standard deviations");
    assert!(refused > 4.0, "the band would let a run through that learns at a fifth of the rate: {refused:.2}");
}
