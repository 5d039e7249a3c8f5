//! A stage small enough to train in a second.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use segdistill_data::{Dataset, Split, StreetScenes, StreetScenesConfig};
use segdistill_models::{Frozen, ModelSpec};
use segdistill_ops::ParamStore;
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

/// Unlike the student in everything: network, channels, and the grid of its maps.
pub(crate) fn other_teacher(device: &Device) -> Frozen {
    let spec = ModelSpec { width: 0.25, decoder_channels: 64, ..ModelSpec::new("fcn", "resnet18", 11) };
    let store = ParamStore::trainable(99, DType::F32, &Device::Cpu);
    segdistill_models::build(&spec, &store).unwrap();
    Frozen::new(&spec, store.tensors(), DType::F32, device).unwrap()
}

/// `kind` with its memories cut to a size that fills.
pub(crate) fn small(name: &str) -> TermKind {
    match TermKind::named(name).unwrap() {
        TermKind::CirkdPixel { tap, temperature, .. } => {
            TermKind::CirkdPixel { tap, temperature, slots: 30, contrast: 50, pixels_an_image: 4 }
        }
        TermKind::CirkdRegion { tap, temperature, .. } => {
            TermKind::CirkdRegion { tap, temperature, slots: 5, contrast: 20 }
        }
        TermKind::AfDcd { tap, masked, enhanced, temperature, .. } => {
            TermKind::AfDcd { tap, masked, enhanced, pooling: 1, patch: 4, groups: 4, temperature }
        }
        TermKind::Holistic { form, critic_weight, penalty, optimizer, lr, .. } => {
            TermKind::Holistic { form, condition: true, critic_weight, penalty, optimizer, lr, width: 0.125 }
        }
        kind => kind,
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
