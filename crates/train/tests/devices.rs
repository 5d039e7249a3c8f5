//! A stage on every device: the same bits from run to run, and the losses that the CPU sees.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use common::{World, other_teacher, small, stage};
use segdistill_models::Frozen;
use segdistill_ops::testing::devices_with_convolution;
use segdistill_train::{
    CriticForm, CriticOptimizer, Observer, Stage, StageData, StepRecord, TermKind, TrainError, checkpoint, run_stage,
};

/// Keeps the loss of every step.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.push(record.loss);
    }
}

/// Keeps the terms of every step.
#[derive(Default)]
struct Terms(Vec<(String, f64)>);

impl Observer for Terms {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.extend(record.terms.iter().map(|t| (t.name.clone(), t.value.unwrap())));
        self.0.extend(record.critic.map(|loss| ("critic".to_string(), loss)));
    }
}

struct StopAt<'a>(u64, &'a AtomicBool);

impl Observer for StopAt<'_> {
    fn on_step(&mut self, record: &StepRecord) {
        if record.step == self.0 {
            self.1.store(true, Ordering::SeqCst);
        }
    }
}

/// Losses step by step, and the best weights as bytes.
fn run(device: &Device) -> (Vec<f64>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let world = World::new();
    let teach = stage(&[(TermKind::ce(), 1.0)]);
    let teacher = segdistill_ops::ParamStore::trainable(9, candle_core::DType::F32, &Device::Cpu);
    segdistill_models::build(&teach.model, &teacher).unwrap();
    let teacher = Frozen::new(&teach.model, teacher.tensors(), candle_core::DType::F32, device).unwrap();
    let data = StageData { device, teacher: Some((&teacher, "seed 9")), ..world.data() };
    let mut losses = Losses::default();
    let stage = stage(&[(TermKind::ce(), 1.0), (TermKind::Csc {}, 2.0)]);
    let outcome = run_stage(&stage, folder.path(), &data, false, &mut losses).unwrap();
    (losses.0, checkpoint::to_safetensors(&outcome.weights).unwrap())
}

#[test]
fn every_device_repeats_itself_and_starts_like_the_cpu() {
    let (on_cpu, _) = run(&Device::Cpu);
    assert_eq!(on_cpu.len(), 6);
    for device in devices_with_convolution() {
        let (losses, weights) = run(&device);
        let again = run(&device);
        assert!((&losses, &weights) == (&again.0, &again.1), "two runs differ on {device:?}");
        for (step, (found, expected)) in losses.iter().zip(&on_cpu).enumerate() {
            // The same weights, images and masks at the first step; each step after it starts from the differences of
            // the one before, and batches of two make the statistics of the smallest maps sensitive to them.
            let allowed = if step == 0 { 1e-4 } else { 5e-2 };
            let distance = (found - expected).abs() / expected;
            assert!(distance <= allowed, "step {step}: loss {found} on {device:?}, {expected} on the CPU");
        }
    }
}

/// A discriminator with moments of its own goes on from a checkpoint to the same bits, wherever it lies.
#[test]
fn a_discriminator_is_resumed_on_every_device() {
    let mut stage = stage(&[(small("holistic"), 0.1), (TermKind::ce(), 1.0)]);
    let TermKind::Holistic { form, optimizer, .. } = &mut stage.terms[0].loss else { panic!("holistic") };
    (*form, *optimizer) = (CriticForm::Hinge, CriticOptimizer::Adam);
    for device in devices_with_convolution() {
        let teacher = other_teacher(&device);
        let (world, cut) = (World::new(), World::new());
        let run = |world: &World, folder: &Path, resume, observer: &mut dyn Observer| {
            let data = StageData { device: &device, teacher: Some((&teacher, "seed 99")), ..world.data() };
            run_stage(&stage, folder, &data, resume, observer)
        };
        let [whole, parts] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        run(&world, whole.path(), false, &mut Terms::default()).unwrap();
        let stopped = run(&cut, parts.path(), false, &mut StopAt(2, &cut.stop)).unwrap_err();
        assert!(matches!(stopped, TrainError::Interrupted { .. }), "{stopped}");
        cut.stop.store(false, Ordering::SeqCst);
        run(&cut, parts.path(), true, &mut Terms::default()).unwrap();
        let critic = |folder: &Path| {
            let place = checkpoint::find(folder, "last").unwrap().unwrap();
            checkpoint::to_safetensors(&checkpoint::load(&place, &Device::Cpu).unwrap().parts["critic"]).unwrap()
        };
        assert!(critic(whole.path()) == critic(parts.path()), "{device:?}");
    }
}

/// Every loss, with all that the terms own, in one objective: each is at the first step what the CPU makes of it.
#[test]
fn every_loss_starts_like_the_cpu() {
    let terms: Vec<(TermKind, f64)> =
        TermKind::NAMES.into_iter().filter(|name| *name != "aux").map(|name| (small(name), 1e-4)).collect();
    let stage = Stage { steps: 3, ..stage(&terms) };
    let run = |device: &Device| {
        let (folder, world) = (tempfile::tempdir().unwrap(), World::new());
        let teacher = other_teacher(device);
        let data = StageData { device, teacher: Some((&teacher, "seed 99")), ..world.data() };
        let mut seen = Terms::default();
        run_stage(&stage, folder.path(), &data, false, &mut seen).unwrap();
        seen.0
    };
    let on_cpu = run(&Device::Cpu);
    assert_eq!(on_cpu.len(), 3 * (TermKind::NAMES.len() - 1 + 1), "every term and the discriminator, at every step");
    for device in devices_with_convolution() {
        let found = run(&device);
        assert_eq!(found, run(&device), "two runs differ on {device:?}");
        for ((name, value), (_, expected)) in found.iter().zip(&on_cpu).take(on_cpu.len() / 3) {
            let distance = (value - expected).abs() / expected.abs().max(1e-3);
            assert!(distance <= 1e-3, "{name} is {value} on {device:?}, {expected} on the CPU");
        }
    }
}
