//! Whole networks against segmentation_models.pytorch, torchvision and transcriptions of CIRKD's, SKD's and U-Net's
//! (`fixtures/make_segmenters.py`), and what holds for every network.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use segdistill_models::{Frozen, ModelSpec, build, catalog, networks, trace, weights};
use segdistill_ops::testing::relative_error;
use segdistill_ops::{Mode, ParamKind, ParamStore, graph};
use support::{fill, filled_network, images, values};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };

/// `max |found - expected| / max |expected|`.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "number of elements");
    assert!(found.iter().all(|v| v.is_finite()), "not finite");
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let apart = largest(&mut found.iter().zip(expected).map(|(f, e)| (f - e).abs()));
    apart / largest(&mut expected.iter().map(|e| e.abs()))
}

/// At most `most` elements, those that `samples` of the script keeps.
fn samples(tensor: &Tensor, most: usize) -> Vec<f64> {
    let values = values(tensor);
    let step = (values.len().div_ceil(most)..).find(|step| step % 2 != 0 && step % 3 != 0).unwrap();
    values.iter().step_by(step).copied().collect()
}

fn directed(map: &Tensor, direction: &str) -> Tensor {
    let direction = Tensor::from_vec(fill(direction, map.dims()), map.dims(), &Device::Cpu).unwrap();
    (map * direction).unwrap().mean_all().unwrap()
}

/// Logits and every gradient in f64, to the order of summation; logits in f32 to the bound the project asks for.
fn check(case: &str, spec: ModelSpec, shape: [usize; 4]) {
    let spec = ModelSpec { n_classes: 5, dropout: 0.0, ..spec };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/segmenters.safetensors");
    let prefix = format!("{case}/");
    let expected: BTreeMap<String, Vec<f64>> = weights::read(path, &Device::Cpu)
        .unwrap()
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), values(t))))
        .collect();
    assert!(expected.len() >= 6, "{case}: {} tensors in the fixture", expected.len());
    let near = |what: &str, found: &[f64], bound: f64| {
        let apart = distance(found, &expected[what]);
        assert!(apart <= bound, "{case}, {what}: {apart:.3e} from PyTorch, allowed {bound:.0e}");
    };

    let (_, model) = filled_network(&spec, DType::F32, None);
    let logits = model.forward(&images("images", &shape, DType::F32), Mode::Eval).unwrap().logits_nchw;
    near("eval_logits", &samples(&logits, 200), 1e-4);

    let (store, model) = filled_network(&spec, DType::F64, None);
    let input = images("images", &shape, DType::F64);
    let out = model.forward(&input, Mode::Eval).unwrap();
    assert!(out.aux_logits_nchw.is_none(), "{case}: no auxiliary head in evaluation");
    near("eval_logits", &samples(&out.logits_nchw, 200), 1e-12);
    let out = model.forward(&input, TRAIN).unwrap();
    near("train_logits", &samples(&out.logits_nchw, 200), 1e-11);
    let mut loss = directed(&out.logits_nchw, "loss");
    assert_eq!(out.aux_logits_nchw.is_some(), expected.contains_key("aux_logits"), "{case}");
    if let Some(aux) = &out.aux_logits_nchw {
        near("aux_logits", &samples(aux, 100), 1e-11);
        loss = (loss + directed(aux, "aux_loss")).unwrap();
    }

    let gradients = loss.backward().unwrap();
    let parameters: Vec<_> = store.named().into_iter().filter(|p| p.kind != ParamKind::Buffer).collect();
    let (all_norms, all_products) = (&expected["gradient_norms"], &expected["gradient_products"]);
    assert_eq!(parameters.len(), all_norms.len(), "{case}: parameters with a gradient in PyTorch");
    let largest = all_norms.iter().copied().fold(0.0, f64::max);
    let mut n_sampled = 0;
    for (i, p) in parameters.iter().enumerate() {
        let name = &p.name;
        let gradient = gradients.get(&p.tensor).unwrap_or_else(|| panic!("{case}: no gradient for {name}"));
        let found = values(gradient);
        let norm = found.iter().map(|v| v * v).sum::<f64>().sqrt();
        let along = fill(&format!("along/{name}"), gradient.dims()).iter().zip(&found).map(|(a, g)| a * g).sum::<f64>();
        if all_norms[i] < 1e-12 * largest {
            // A bias that the next normalisation takes away again.
            assert!(norm <= 1e-12 * largest, "{case}, {name}: {norm:.3e}, expected 0");
            continue;
        }
        let apart = (norm - all_norms[i]).abs().max((along - all_products[i]).abs()) / all_norms[i];
        assert!(apart <= 1e-9, "{case}, gradient of {name}: {apart:.3e} from PyTorch");
        let key = format!("gradient/{name}");
        if expected.contains_key(&key) {
            near(&key, &samples(gradient, 40), 1e-9);
            n_sampled += 1;
        }
    }
    assert!(n_sampled >= 3, "{case}: {n_sampled} gradients compared element by element");
}

fn smp(name: &str, encoder: &str) -> ModelSpec {
    ModelSpec { layout: "smp".into(), ..ModelSpec::new(name, encoder, 5) }
}

/// On a quarter of the ResNet with the deep stem, at output stride 8, with the auxiliary head.
fn deep(name: &str, layout: &str) -> ModelSpec {
    let spec = ModelSpec::new(name, "resnet18-deep", 5);
    ModelSpec { layout: layout.into(), aux: true, width: 0.25, output_stride: 8, ..spec }
}

#[test]
fn deeplabv3plus_is_smps() {
    check("smp_deeplabv3plus", smp("deeplabv3plus", "resnet18"), [3, 3, 64, 96]);
}

#[test]
fn deeplabv3plus_on_xception_is_smps() {
    check("smp_deeplabv3plus_xception41", smp("deeplabv3plus", "xception41"), [3, 3, 64, 64]);
}

#[test]
fn deeplabv3_is_smps() {
    check("smp_deeplabv3", ModelSpec { output_stride: 8, ..smp("deeplabv3", "resnet18") }, [3, 3, 64, 64]);
}

#[test]
fn pspnet_is_smps() {
    check("smp_pspnet", smp("pspnet", "resnet18"), [3, 3, 64, 96]);
}

#[test]
fn unet_on_a_resnet_is_smps() {
    check("smp_unet", ModelSpec::new("unet", "resnet18", 5), [2, 3, 64, 96]);
}

#[test]
fn deeplabv3_and_fcn_are_torchvisions() {
    // An eighth of the encoder under heads of torchvision's 256 channels.
    let spec = |name| ModelSpec {
        layout: "torchvision".into(),
        aux: true,
        output_stride: 8,
        width: 0.125,
        decoder_channels: 2048,
        ..ModelSpec::new(name, "resnet50", 5)
    };
    check("torchvision_deeplabv3", spec("deeplabv3"), [3, 3, 65, 81]);
    check("torchvision_fcn", spec("fcn"), [3, 3, 65, 81]);
}

#[test]
fn deeplabv3_and_pspnet_are_cirkds() {
    check("cirkd_deeplabv3", deep("deeplabv3", "paper"), [3, 3, 65, 97]);
    check("cirkd_pspnet", deep("pspnet", "paper"), [3, 3, 65, 97]);
}

#[test]
fn pspnet_is_skds() {
    check("skd_pspnet", deep("pspnet", "skd"), [3, 3, 64, 96]);
}

#[test]
fn unet_is_the_papers_with_and_without_normalisation() {
    let spec = |encoder| ModelSpec { width: 0.125, ..ModelSpec::new("unet", encoder, 5) };
    check("unet", spec("unet"), [2, 3, 45, 61]);
    check("unet_bn", spec("unet-bn"), [2, 3, 45, 61]);
    check("unet_bn_bias", spec("unet-bn-bias"), [2, 3, 48, 64]);
}

/// Every network on two encoders, and every encoder under one network: all that can be told apart without the product.
fn specs() -> Vec<ModelSpec> {
    let of_interest = |name: &str, encoder: &str| match encoder {
        "resnet18" | "resnet18-deep" | "unet-bn" | "vgg16" | "vgg16-bn" | "mit-b0" => true,
        _ => name == "deeplabv3",
    };
    let entries = catalog().into_iter().filter(|e| of_interest(e.name, e.encoder));
    let layouts = networks();
    let of_entry = |entry: segdistill_models::CatalogEntry| {
        let network = layouts.iter().find(|n| n.name == entry.name).unwrap();
        let layouts = network.layouts.clone();
        let aux = network.aux;
        layouts.into_iter().map(move |layout| ModelSpec {
            layout: layout.into(),
            aux: aux && layout != "smp",
            width: 0.05,
            ..entry.spec(3)
        })
    };
    entries.flat_map(of_entry).filter(|spec| segdistill_models::info(spec).is_ok()).collect()
}

/// At sizes no stride divides: channels, strides, sizes, parameters; and the same network frozen.
#[test]
fn every_network_is_what_its_plan_says() {
    let specs = specs();
    for network in networks() {
        assert!(specs.iter().any(|s| s.name == network.name), "{} stands on no encoder", network.name);
    }
    let input = images("images", &[1, 3, 45, 70], DType::F32);
    for spec in specs {
        let name = format!("{} ({})", spec.full_name(), spec.layout);
        let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
        let model = build(&spec, &store).unwrap();
        let info = model.info();
        assert_eq!(store.n_parameters(), info.n_parameters, "{name}");
        let trace = trace(&spec, [45, 70]).unwrap();
        let out = model.forward(&input, Mode::Eval).unwrap();
        assert_eq!(out.logits_nchw.dims(), [1, 3, trace.logits_hw[0], trace.logits_hw[1]], "{name}");
        assert_eq!((out.features.len(), trace.tap_sizes.len()), (info.taps.len(), info.taps.len()), "{name}");
        for (tap, [h, w]) in info.taps.iter().zip(&trace.tap_sizes) {
            assert_eq!(out.features[tap.name].dims(), [1, tap.channels, *h, *w], "{} of {name}", tap.name);
            // Rounded down or up, by one at most beyond what the image has (pooling that rounds up).
            for (side, full) in [(h, 45), (w, 70)] {
                assert!(side.abs_diff(full / tap.stride) <= 1, "{} of {name}: {side} of {full}", tap.name);
            }
        }
        let outputs = [vec![out.logits_nchw.clone()], out.features.values().cloned().collect()].concat();
        // The parameters of a dense block are joined by candle, with nothing but variables below; FCN crops to a size that
        // no stride divides.
        let most = match (&*spec.name, &*spec.encoder) {
            (_, "densenet169") => 4,
            ("fcn32s" | "fcn16s" | "fcn8s", _) => 3,
            _ => 0,
        };
        let left = graph::handovers(&outputs);
        assert!(left <= most, "{name}: {left} operations that the backward pass leaves to candle");
        let frozen = Frozen::new(&spec, store.tensors(), DType::F32, &Device::Cpu).unwrap();
        let apart = relative_error(&frozen.forward(&input).unwrap().logits_nchw, &out.logits_nchw).unwrap();
        assert!(apart < 1e-4, "{name}: frozen is {apart:.1e} apart");
    }
}
