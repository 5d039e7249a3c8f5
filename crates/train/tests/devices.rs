//! A stage on every device: the same bits from run to run, and the losses that the CPU sees.

mod common;

use candle_core::Device;
use common::{World, stage};
use segdistill_models::Frozen;
use segdistill_ops::testing::devices_with_convolution;
use segdistill_train::{Observer, StageData, StepRecord, TermKind, checkpoint, run_stage};

/// Keeps the loss of every step.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.push(record.loss);
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
