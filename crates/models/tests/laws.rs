//! Laws every network keeps: evaluation is a function of the image alone, training reaches everything, a frozen network
//! stays as it is.

mod support;

use candle_core::{DType, Device, Tensor};
use segdistill_models::{Frozen, ModelError, ModelSpec, build, weights};
use segdistill_ops::testing::{assert_close, relative_error};
use segdistill_ops::{Mode, OpsError, ParamKind, ParamStore};
use support::{filled_network, images, values};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };

fn small(encoder: &str) -> ModelSpec {
    ModelSpec { width: 0.125, ..ModelSpec::deeplabv3plus(encoder, 7) }
}

fn specs() -> impl Iterator<Item = ModelSpec> {
    ["resnet18", "resnet34", "xception65"].into_iter().map(small)
}

#[test]
fn evaluation_is_deterministic_and_a_batch_equals_its_items() {
    for spec in specs() {
        let (store, model) = filled_network(&spec, DType::F64, None);
        let batch = images("images", &[3, 3, 45, 64], DType::F64);
        let before = store.tensors().values().flat_map(values).collect::<Vec<_>>();
        let together = model.forward(&batch, Mode::Eval).unwrap().logits_nchw;
        let again = model.forward(&batch, Mode::Eval).unwrap().logits_nchw;
        assert_eq!(values(&together), values(&again), "{}", spec.encoder);
        for i in 0..3 {
            let alone = model.forward(&batch.narrow(0, i, 1).unwrap(), Mode::Eval).unwrap().logits_nchw;
            let apart = relative_error(&together.narrow(0, i, 1).unwrap(), &alone).unwrap();
            assert!(apart < 1e-12, "{} image {i}: {apart:.3e}", spec.encoder);
        }
        let after = store.tensors().values().flat_map(values).collect::<Vec<_>>();
        assert_eq!(before, after, "{}: evaluation moved a tensor", spec.encoder);
    }
}

#[test]
fn every_parameter_gets_a_finite_gradient_and_every_statistic_moves() {
    for spec in specs() {
        let store = ParamStore::trainable(5, DType::F32, &Device::Cpu);
        let model = build(&spec, &store).unwrap();
        let buffers = |store: &ParamStore| {
            let named = store.named().into_iter().filter(|p| p.kind == ParamKind::Buffer);
            named.map(|p| (p.name, values(&p.tensor))).collect::<Vec<_>>()
        };
        let before = buffers(&store);
        let logits = model.forward(&images("images", &[3, 3, 48, 64], DType::F32), TRAIN).unwrap().logits_nchw;
        let gradients = logits.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        for p in store.named() {
            match (p.kind, gradients.get(&p.tensor)) {
                (ParamKind::Buffer, gradient) => assert!(gradient.is_none(), "gradient for {}", p.name),
                (_, None) => panic!("no gradient for {}", p.name),
                (_, Some(gradient)) => {
                    let gradient = values(gradient);
                    assert!(gradient.iter().all(|v| v.is_finite()), "{}", p.name);
                    // A shift between two linear layers is taken away by the next normalisation: zero but for rounding.
                    let idle = p.name.ends_with("bn_dw.bias");
                    assert!(idle || gradient.iter().any(|&v| v != 0.0), "{} has a zero gradient", p.name);
                }
            }
        }
        for ((name, old), (_, new)) in before.iter().zip(buffers(&store)) {
            assert_ne!(old, &new, "{name} did not move");
        }
    }
}

#[test]
fn a_training_step_is_the_same_for_any_number_of_threads() {
    for spec in specs() {
        // Every value as its bits: gradients by name, then running statistics.
        let step = |threads: usize| -> Vec<(String, Vec<u32>)> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let bits = |t: &Tensor| -> Vec<u32> {
                    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
                };
                let (store, model) = filled_network(&spec, DType::F32, None);
                let logits = model.forward(&images("images", &[3, 3, 65, 97], DType::F32), TRAIN).unwrap().logits_nchw;
                let gradients = logits.sqr().unwrap().mean_all().unwrap().backward().unwrap();
                let value = |p: &segdistill_ops::NamedParam| match p.kind {
                    ParamKind::Buffer => bits(&p.tensor),
                    _ => bits(gradients.get(&p.tensor).unwrap_or_else(|| panic!("no gradient for {}", p.name))),
                };
                let named = store.named().into_iter().map(|p| (p.name.clone(), value(&p)));
                named.chain([("logits".to_string(), bits(&logits))]).collect()
            })
        };
        let one = step(1);
        for threads in [2, 3] {
            for ((name, expected), (_, found)) in one.iter().zip(step(threads)) {
                assert!(*expected == found, "{}: {name} differs with {threads} threads", spec.encoder);
            }
        }
    }
}

#[test]
fn dropout_follows_seed_and_step_and_rests_in_evaluation() {
    let spec = ModelSpec { dropout: 0.5, ..small("resnet18") };
    let input = images("images", &[2, 3, 48, 64], DType::F32);
    let run = |mode| {
        let (_, model) = filled_network(&spec, DType::F32, None);
        values(&model.forward(&input, mode).unwrap().logits_nchw)
    };
    assert_eq!(run(TRAIN), run(TRAIN));
    assert_ne!(run(TRAIN), run(Mode::Train { seed: 0, step: 1 }));
    assert_ne!(run(TRAIN), run(Mode::Train { seed: 1, step: 0 }));
    let (_, plain) = filled_network(&ModelSpec { dropout: 0.0, ..spec.clone() }, DType::F32, None);
    assert_eq!(run(Mode::Eval), values(&plain.forward(&input, Mode::Eval).unwrap().logits_nchw));
}

#[test]
fn images_are_normalised_by_each_network_for_itself() {
    for spec in specs() {
        let (store, model) = filled_network(&spec, DType::F64, None);
        let info = model.info();
        // At the mean colour the first convolution sees zeros, whatever its weights: nothing but shifts is left.
        let mean = Tensor::from_slice(&info.mean, (1, 3, 1, 1), &Device::Cpu).unwrap();
        let grey = mean.broadcast_as((1, 3, 48, 64)).unwrap().contiguous().unwrap();
        let before = model.forward(&grey, Mode::Eval).unwrap().logits_nchw;
        let first = if spec.encoder == "xception65" { "encoder.stem.0.conv.weight" } else { "encoder.conv1.weight" };
        let var = store.named().into_iter().find(|p| p.name == first).unwrap().var.unwrap();
        var.set(&(var.as_tensor() * 3.0).unwrap()).unwrap();
        let after = model.forward(&grey, Mode::Eval).unwrap().logits_nchw;
        assert_close(&after, &before, 1e-12, "zeros times three");
        // One standard deviation above the mean in f32 is taken as well: images are converted to the weights' type.
        assert!(model.forward(&grey.to_dtype(DType::F32).unwrap(), Mode::Eval).is_ok());
    }
}

#[test]
fn inputs_that_are_no_images_are_refused() {
    let (_, model) = filled_network(&small("resnet18"), DType::F32, None);
    for shape in [vec![1, 3, 31, 64], vec![1, 3, 64, 31], vec![1, 4, 64, 64], vec![3, 64, 64], vec![0, 3, 64, 64]] {
        let input = Tensor::zeros(shape.clone(), DType::F32, &Device::Cpu).unwrap();
        let error = model.forward(&input, Mode::Eval).unwrap_err();
        assert!(matches!(error, ModelError::Input { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{shape:?}")), "{error}");
    }
}

#[test]
fn training_on_one_image_is_refused_because_image_pooling_has_one_value() {
    let (_, model) = filled_network(&small("resnet18"), DType::F32, None);
    let error = model.forward(&images("images", &[1, 3, 64, 64], DType::F32), TRAIN).unwrap_err();
    assert!(matches!(&error, ModelError::Ops(OpsError::Shape { .. } | OpsError::Config { .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains("batch_norm") && text.contains("hint: "), "{text}");
}

#[test]
fn a_frozen_network_gives_the_same_and_records_nothing() {
    for spec in specs() {
        let (store, model) = filled_network(&spec, DType::F32, None);
        let frozen = Frozen::new(&spec, store.tensors(), DType::F32, &Device::Cpu).unwrap();
        let input = images("images", &[2, 3, 48, 64], DType::F32);
        let variable = candle_core::Var::from_tensor(&input).unwrap();
        let expected = model.forward(&input, Mode::Eval).unwrap();
        assert!(expected.logits_nchw.track_op());
        let out = frozen.forward(variable.as_tensor()).unwrap();
        let apart = relative_error(&out.logits_nchw, &expected.logits_nchw).unwrap();
        assert!(apart < 1e-5, "{}: {apart:.3e}", spec.encoder);
        for (name, map) in out.features.iter().chain([(&"logits", &out.logits_nchw)]) {
            assert!(!map.track_op() && !map.is_variable(), "{name} of {}", spec.encoder);
        }
        assert_eq!(frozen.info(), model.info());

        // The store lives on and is trained: weights change and running statistics move; the frozen network does not.
        model.forward(&input, TRAIN).unwrap();
        for p in store.named() {
            p.var.unwrap().set(&p.tensor.detach().affine(0.5, 0.0).unwrap()).unwrap();
        }
        assert_ne!(values(&model.forward(&input, Mode::Eval).unwrap().logits_nchw), values(&expected.logits_nchw));
        let later = frozen.forward(&input).unwrap();
        assert_eq!(values(&later.logits_nchw), values(&out.logits_nchw), "{}", spec.encoder);
    }
}

#[test]
fn folding_the_normalisation_changes_nothing_but_rounding() {
    // All maps that leave the network, taps before a ReLU included, at two widths and both output strides.
    for spec in specs() {
        for (width, output_stride) in [(0.125, 16), (0.25, 8)] {
            let spec = ModelSpec { width, output_stride, ..spec.clone() };
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
                let (store, model) = filled_network(&spec, dtype, None);
                let frozen = Frozen::new(&spec, store.tensors(), dtype, &Device::Cpu).unwrap();
                let input = images("images", &[2, 3, 45, 64], dtype);
                let (live, folded) = (model.forward(&input, Mode::Eval).unwrap(), frozen.forward(&input).unwrap());
                let maps = folded.features.iter().map(|(name, map)| (*name, map, &live.features[name]));
                for (name, folded, live) in maps.chain([("logits", &folded.logits_nchw, &live.logits_nchw)]) {
                    let apart = relative_error(folded, live).unwrap();
                    assert!(apart < tolerance, "{name} of {} at {width}, {dtype:?}: {apart:.3e}", spec.encoder);
                }
            }
        }
    }
}

#[test]
fn training_over_a_frozen_store_is_refused() {
    let spec = small("resnet18");
    let (store, _) = filled_network(&spec, DType::F32, None);
    let frozen = ParamStore::frozen(store.tensors(), DType::F32, &Device::Cpu).unwrap();
    let model = build(&spec, &frozen).unwrap();
    frozen.finish().unwrap();
    let input = images("images", &[2, 3, 48, 64], DType::F32);
    assert!(model.forward(&input, Mode::Eval).is_ok());
    let error = model.forward(&input, TRAIN).unwrap_err();
    assert!(matches!(&error, ModelError::Ops(OpsError::Config { .. })), "{error}");
    assert!(error.to_string().contains("folded into the convolutions"), "{error}");
}

#[test]
fn wrong_weights_are_listed_whole() {
    let spec = small("resnet18");
    let (store, _) = filled_network(&spec, DType::F32, None);
    let mut tensors = store.tensors();
    tensors.remove("encoder.layer3.0.bn1.running_mean").unwrap();
    tensors.remove("decoder.classifier.bias").unwrap();
    tensors.insert("encoder.fc.weight".into(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap());
    tensors.insert("encoder.conv1.weight".into(), Tensor::zeros((8, 3, 3, 3), DType::F32, &Device::Cpu).unwrap());
    let nan = Tensor::full(f32::NAN, tensors["encoder.bn1.weight"].shape(), &Device::Cpu).unwrap();
    tensors.insert("encoder.bn1.weight".into(), nan);
    let error = Frozen::new(&spec, tensors, DType::F32, &Device::Cpu).unwrap_err();
    let ModelError::Ops(OpsError::Mismatch(mismatch)) = error else { panic!("{error}") };
    assert_eq!(mismatch.missing, ["decoder.classifier.bias", "encoder.layer3.0.bn1.running_mean"]);
    assert_eq!(mismatch.unexpected, ["encoder.fc.weight"]);
    assert_eq!(mismatch.non_finite, ["encoder.bn1.weight"]);
    assert_eq!(mismatch.shapes.len(), 1);
    assert_eq!(mismatch.shapes[0].found, [8, 3, 3, 3]);
    assert_eq!(mismatch.shapes[0].expected, [8, 3, 7, 7]);
}

#[test]
fn weights_survive_a_file_byte_for_byte() {
    let spec = small("resnet18");
    let (store, _) = filled_network(&spec, DType::F32, None);
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    weights::save(&first, &store.tensors()).unwrap();
    let read = weights::read(&first, &Device::Cpu).unwrap();
    assert_eq!(read.keys().collect::<Vec<_>>(), store.tensors().keys().collect::<Vec<_>>());
    for (name, tensor) in store.tensors() {
        assert_eq!(values(&read[&name]), values(&tensor), "{name}");
    }
    weights::save(&second, &read).unwrap();
    assert!(fs_bytes(&first) == fs_bytes(&second), "the same tensors gave other bytes");

    let absent = weights::read(dir.path().join("absent.safetensors"), &Device::Cpu).unwrap_err();
    assert!(matches!(absent, ModelError::Ops(OpsError::Weights { .. })), "{absent}");
    let nowhere = weights::save(dir.path().join("no/where.safetensors"), &read).unwrap_err();
    assert!(matches!(nowhere, ModelError::Write { .. }), "{nowhere}");
}

#[expect(clippy::disallowed_methods, reason = "a test needs no path in the error")]
fn fs_bytes(path: &std::path::Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
