//! Every network of the registry trains: the whole loop on drawn scenes, at small width, with a loss that falls.

mod common;

use common::{HW, World, stage};
use segdistill_data::{Split, StreetScenes, StreetScenesConfig};
use segdistill_models::{CatalogEntry, ModelSpec, catalog, info, networks};
use segdistill_train::{InputConfig, Observer, StepRecord, TermKind, run_stage};

const STEPS: u64 = 24;

#[derive(Default)]
struct Losses(Vec<f64>);
impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) {
        self.0.push(record.loss);
    }
}

/// Every layout of every network on the first encoder that carries it, and every encoder under one network.
fn specs() -> Vec<ModelSpec> {
    let all = catalog();
    let mut specs = Vec::new();
    for network in networks() {
        let carried = |layout: &&str| {
            let spec = |entry: &CatalogEntry| ModelSpec {
                layout: layout.to_string(),
                aux: network.aux && *layout != "smp",
                ..small(entry)
            };
            all.iter().filter(|e| e.name == network.name).map(spec).find(|spec| info(spec).is_ok())
        };
        let found: Vec<ModelSpec> = network.layouts.iter().filter_map(carried).collect();
        assert_eq!(found.len(), network.layouts.len(), "{} stands on no encoder in some layout", network.name);
        specs.extend(found);
    }
    // Deeper members of a family train as their shallower ones do.
    let deep = ["resnet101", "resnet50-deep", "resnet101-deep", "mit-b3", "mit-b4", "mit-b5"];
    specs.extend(all.iter().filter(|e| e.name == "deeplabv3" && !deep.contains(&e.encoder)).map(small));
    // The networks that are told from their encoder, whatever the registry's order.
    let of_name = |name| ModelSpec {
        width: 0.125,
        dropout: 0.0,
        ..ModelSpec::named(name, 11).expect("a network of the registry")
    };
    specs.extend(["unet-unet", "unet-unet-bn", "unet-resnet18", "fcn8s-vgg16", "segformer-mit-b0"].map(of_name));
    specs
}

fn small(entry: &CatalogEntry) -> ModelSpec {
    ModelSpec { width: 0.125, decoder_channels: 64, dropout: 0.0, ..entry.spec(11) }
}

#[test]
fn every_network_learns_what_it_sees() {
    let mut world = World::new();
    let cfg =
        StreetScenesConfig { height: HW[0], width: HW[1], seed: 5, variety: 0.3, n_train: 4, n_val: 1, n_test: 1 };
    world.train = std::sync::Arc::new(StreetScenes::new(cfg.clone(), Split::Train).expect("drawn scenes"));
    world.val = std::sync::Arc::new(StreetScenes::new(cfg, Split::Val).expect("drawn scenes"));
    let mut wrong = Vec::new();
    for model in specs() {
        let name = format!("{} ({}{})", model.full_name(), model.layout, if model.aux { ", aux" } else { "" });
        let mut stage = stage(&[(TermKind::ce(), 1.0)]);
        if model.aux {
            stage.terms.push(common::term(TermKind::Aux {}, TermKind::AUX_WEIGHT));
        }
        stage.model = model;
        stage.steps = STEPS;
        stage.optim.lr = 0.03;
        stage.eval_every = STEPS;
        // The same four images each time, so that the loss has no reason to rise but the step itself.
        stage.batch_size = 4;
        stage.input = InputConfig { scale: [1.0, 1.0], flip: 0.0, jitter: 0.0, ..stage.input };
        let folder = tempfile::tempdir().expect("a folder");
        let mut losses = Losses::default();
        // The loop itself refuses a parameter without a finite gradient.
        if let Err(error) = run_stage(&stage, folder.path(), &world.data(), false, &mut losses) {
            wrong.push(format!("{name}: {error}"));
            continue;
        }
        let Losses(losses) = losses;
        let (first, last) = (losses[0], (losses[losses.len() - 2] + losses[losses.len() - 1]) / 2.0);
        if losses.len() as u64 != STEPS || !last.is_finite() || last >= 0.98 * first {
            wrong.push(format!("{name}: losses {losses:.3?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
