//! A stage small enough to train in a second.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Tensor};
use segdistill_data::{Dataset, Split, StreetScenes, StreetScenesConfig};
use segdistill_models::ModelSpec;
use segdistill_train::{
    ClassWeighting, InputConfig, OptimConfig, ScheduleConfig, Stage, StageData, TermConfig, TermKind,
};

pub(crate) const HW: [usize; 2] = [32, 48];

pub(crate) fn scenes(split: Split) -> Arc<dyn Dataset> {
    let cfg =
        StreetScenesConfig { height: HW[0], width: HW[1], seed: 5, variety: 1.0, n_train: 6, n_val: 3, n_test: 2 };
    Arc::new(StreetScenes::new(cfg, split).expect("drawn scenes"))
}

pub(crate) fn term(loss: TermKind, weight: f64) -> TermConfig {
    TermConfig { loss, weight, schedule: ScheduleConfig::Constant }
}

pub(crate) fn stage(terms: &[(TermKind, f64)]) -> Stage {
    Stage {
        method: "ce".into(),
        model: ModelSpec { width: 0.125, decoder_channels: 64, ..ModelSpec::deeplabv3plus("resnet18", 11) },
        seed: 3,
        steps: 6,
        batch_size: 2,
        optim: OptimConfig {
            lr: 0.02,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 1e-4,
            decay_all: false,
            poly_power: 0.9,
            warmup_steps: 2,
            clip_norm: 0.0,
        },
        terms: terms.iter().map(|(loss, weight)| term(loss.clone(), *weight)).collect(),
        input: InputConfig { size: HW, crop: HW, scale: [0.75, 1.5], flip: 0.5, jitter: 0.2, workers: 2 },
        class_weighting: ClassWeighting::SqrtMedianFrequency,
        eval_every: 3,
        precision: Default::default(),
    }
}

pub(crate) struct World {
    pub(crate) train: Arc<dyn Dataset>,
    pub(crate) val: Arc<dyn Dataset>,
    pub(crate) start: BTreeMap<String, Tensor>,
    pub(crate) stop: AtomicBool,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            train: scenes(Split::Train),
            val: scenes(Split::Val),
            start: BTreeMap::new(),
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn data(&self) -> StageData<'_> {
        StageData {
            train: Arc::clone(&self.train),
            val: self.val.as_ref(),
            teacher: None,
            start: &self.start,
            device: &Device::Cpu,
            stop: &self.stop,
        }
    }
}
