//! The store's promises: seeded by name, loaded whole or not at all, no gradient where none belongs.

use super::*;

/// Two layers as a network would build them, with an optional one between.
fn build(store: &ParamStore, with_extra: bool) -> Result<Vec<Tensor>> {
    let root = store.root();
    let mut built = vec![root.pp("conv1").get("weight", &[4, 3, 3, 3], ParamKind::Weight, Init::KaimingFanOut)?];
    if with_extra {
        root.pp("between").get("weight", &[2, 2], ParamKind::Weight, Init::Xavier)?;
    }
    let bn = root.pp("layer1").pp(0).pp("bn1");
    built.push(bn.get("weight", &[4], ParamKind::Norm, Init::Constant(1.0))?);
    built.push(bn.get("running_mean", &[4], ParamKind::Buffer, Init::Constant(0.0))?);
    built.push(root.pp("head").get("weight", &[5, 4], ParamKind::Weight, Init::KaimingFanIn)?);
    built.push(root.pp("head").get("bias", &[5], ParamKind::Bias, Init::Constant(0.5))?);
    Ok(built)
}

fn trainable(seed: u64, with_extra: bool) -> ParamStore {
    let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
    build(&store, with_extra).unwrap();
    store
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn snapshot(store: &ParamStore) -> BTreeMap<String, Vec<f32>> {
    store.tensors().iter().map(|(name, t)| (name.clone(), values(t))).collect()
}

fn no_float(name: &str, found: DType) -> DTypeDifference {
    DTypeDifference { name: name.into(), found, expected: "F16, BF16, F32 or F64" }
}

fn mismatch<T: std::fmt::Debug>(result: Result<T>) -> Mismatch {
    match result {
        Err(OpsError::Mismatch(m)) => *m,
        other => panic!("expected a mismatch, found {other:?}"),
    }
}

#[test]
fn weights_are_a_function_of_seed_and_name() {
    let (plain, extra) = (snapshot(&trainable(1, false)), snapshot(&trainable(1, true)));
    assert_eq!(plain.len() + 1, extra.len());
    for (name, value) in &plain {
        assert_eq!(value, &extra[name], "{name} changed when a layer was added before it");
    }
    assert_eq!(plain, snapshot(&trainable(1, false)));
    assert_ne!(plain["conv1.weight"], snapshot(&trainable(2, false))["conv1.weight"]);
    // Equal shapes under two names hold different values.
    let store = ParamStore::trainable(1, DType::F32, &Device::Cpu);
    let draw = |scope: &str| {
        store.root().pp(scope).get("weight", &[4, 3, 3, 3], ParamKind::Weight, Init::KaimingFanOut).unwrap()
    };
    assert_ne!(values(&draw("a")), values(&draw("b")));
}

#[test]
fn the_store_lists_names_kinds_and_counts() {
    let store = trainable(0, false);
    let listed: Vec<(String, ParamKind)> = store.named().into_iter().map(|p| (p.name, p.kind)).collect();
    let expected = [
        ("conv1.weight", ParamKind::Weight),
        ("head.bias", ParamKind::Bias),
        ("head.weight", ParamKind::Weight),
        ("layer1.0.bn1.running_mean", ParamKind::Buffer),
        ("layer1.0.bn1.weight", ParamKind::Norm),
    ];
    assert_eq!(listed, expected.map(|(name, kind)| (name.to_string(), kind)));
    assert_eq!(store.n_parameters(), 108 + 5 + 20 + 4);
    assert_eq!(store.root().pp("layer1").pp(0).path(), "layer1.0");
    let again = store.root().pp("head").get("bias", &[5], ParamKind::Bias, Init::Constant(0.0));
    assert!(matches!(&again, Err(OpsError::Config { what, .. }) if what.contains("head.bias")), "{again:?}");
}

#[test]
fn load_takes_everything_or_nothing_and_lists_every_difference() {
    let store = trainable(1, false);
    let before = snapshot(&store);
    let other = trainable(2, false).tensors();
    let mut wrong = other.clone();
    wrong.remove("head.bias");
    wrong.insert("extra.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    wrong.insert("head.weight".into(), Tensor::zeros((4, 5), DType::F32, &Device::Cpu).unwrap());
    wrong.insert("layer1.0.bn1.weight".into(), Tensor::new(&[1f32, 2.0, f32::NAN, 4.0], &Device::Cpu).unwrap());
    wrong.insert("layer1.0.bn1.running_mean".into(), Tensor::new(&[1u32, 2, 3, 4], &Device::Cpu).unwrap());
    let error = store.load(&wrong);
    let text = error.as_ref().unwrap_err().to_string();
    let parts = ["5 tensors differ", "head.bias", "extra.weight", "[4, 5]", "[5, 4]", "layer1.0.bn1.weight", "hint"];
    for part in parts.into_iter().chain(["layer1.0.bn1.running_mean: found U32, expected F16, BF16, F32 or F64"]) {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    let expected = Mismatch {
        missing: vec!["head.bias".into()],
        unexpected: vec!["extra.weight".into()],
        shapes: vec![ShapeDifference { name: "head.weight".into(), found: vec![4, 5], expected: vec![5, 4] }],
        dtypes: vec![no_float("layer1.0.bn1.running_mean", DType::U32)],
        non_finite: vec!["layer1.0.bn1.weight".into()],
    };
    assert_eq!(mismatch(error), expected);
    assert_eq!(snapshot(&store), before, "a refused load changed the store");

    // The tensors handed out earlier, buffers too, see the loaded values.
    let store = ParamStore::trainable(1, DType::F32, &Device::Cpu);
    let built = build(&store, false).unwrap();
    store.load(&other).unwrap();
    assert_eq!(values(&built[0]), values(&other["conv1.weight"]));
    let mut moved = other.clone();
    moved.insert("layer1.0.bn1.running_mean".into(), Tensor::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap());
    store.load(&moved).unwrap();
    assert_eq!(values(&built[2]), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn a_store_loads_what_shares_its_own_memory() {
    let store = trainable(1, false);
    let before = snapshot(&store);
    store.load(&store.tensors()).unwrap();
    assert_eq!(snapshot(&store), before);

    // The last of the names in order changes, after shared ones; and the other way round.
    for changed in ["conv1.weight", "layer1.0.bn1.weight"] {
        let store = trainable(1, false);
        let mut tensors = store.tensors();
        let new = (&tensors[changed] * 2.0).unwrap();
        tensors.insert(changed.into(), new.clone());
        store.load(&tensors).unwrap();
        for (name, value) in snapshot(&store) {
            if name == changed {
                assert_eq!(value, values(&new));
                assert_ne!(value, before[&name]);
            } else {
                assert_eq!(value, before[&name], "{name}");
            }
        }
    }

    // Two tensors of the store, exchanged: each is read before either is written.
    let mut swapped = store.tensors();
    let (scale, mean) = (swapped["layer1.0.bn1.weight"].clone(), swapped["layer1.0.bn1.running_mean"].clone());
    swapped.insert("layer1.0.bn1.weight".into(), mean);
    swapped.insert("layer1.0.bn1.running_mean".into(), scale);
    store.load(&swapped).unwrap();
    let after = snapshot(&store);
    assert_eq!((&after["layer1.0.bn1.weight"], &after["layer1.0.bn1.running_mean"]), (&vec![0.0; 4], &vec![1.0; 4]));
}

#[test]
fn finiteness_is_judged_in_the_stores_type() {
    let huge = |tensors: BTreeMap<String, Tensor>| {
        let mut tensors = tensors;
        tensors.insert("head.bias".into(), Tensor::full(1e300f64, 5, &Device::Cpu).unwrap());
        tensors
    };
    // Finite in f64, infinite in f32.
    let narrow = trainable(1, false);
    let before = snapshot(&narrow);
    let found = mismatch(narrow.load(&huge(narrow.tensors())));
    assert_eq!(found, Mismatch { non_finite: vec!["head.bias".into()], ..Mismatch::default() });
    assert_eq!(snapshot(&narrow), before);
    let frozen = ParamStore::frozen(huge(narrow.tensors()), DType::F32, &Device::Cpu).unwrap();
    build(&frozen, false).unwrap();
    assert_eq!(mismatch(frozen.finish()).non_finite, ["head.bias"]);

    let wide = ParamStore::trainable(1, DType::F64, &Device::Cpu);
    build(&wide, false).unwrap();
    wide.load(&huge(wide.tensors())).unwrap();
    assert_eq!(wide.tensors()["head.bias"].to_vec1::<f64>().unwrap(), [1e300; 5]);
    let frozen = ParamStore::frozen(huge(narrow.tensors()), DType::F64, &Device::Cpu).unwrap();
    build(&frozen, false).unwrap();
    frozen.finish().unwrap();
}

#[test]
fn narrower_floats_are_taken() {
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let store = trainable(1, false);
        let tensors: BTreeMap<String, Tensor> =
            trainable(2, false).tensors().into_iter().map(|(k, t)| (k, t.to_dtype(dtype).unwrap())).collect();
        store.load(&tensors).unwrap();
        for (name, t) in store.tensors() {
            assert_eq!(values(&t), values(&tensors[&name].to_dtype(DType::F32).unwrap()), "{name} {dtype:?}");
        }
    }
}

#[test]
fn training_the_source_does_not_move_a_frozen_store() {
    let source = trainable(3, false);
    let expected = snapshot(&source);
    let double = || {
        for p in source.named() {
            p.var.unwrap().set(&(p.tensor.detach() * 2.0).unwrap().affine(1.0, 1.0).unwrap()).unwrap();
        }
    };
    let store = ParamStore::frozen(source.tensors(), DType::F32, &Device::Cpu).unwrap();
    // Before the model is built, and after.
    double();
    build(&store, false).unwrap();
    store.finish().unwrap();
    assert_eq!(snapshot(&store), expected);
    double();
    assert_eq!(snapshot(&store), expected);
    assert_ne!(snapshot(&source), expected);
}

#[test]
fn a_frozen_store_takes_its_tensors_whole_and_records_no_graph() {
    let tensors = trainable(3, false).tensors();
    let store = ParamStore::frozen(tensors.clone(), DType::F64, &Device::Cpu).unwrap();
    let built = build(&store, false).unwrap();
    store.finish().unwrap();
    assert!(built.iter().all(|t| !t.track_op() && t.dtype() == DType::F64));
    assert!(store.named().iter().all(|p| p.var.is_none()));
    assert_eq!(
        values(&store.tensors()["conv1.weight"].to_dtype(DType::F32).unwrap()),
        values(&tensors["conv1.weight"])
    );
    assert!(matches!(store.load(&tensors), Err(OpsError::Config { .. })));
    // A trainable store has nothing to finish.
    trainable(0, false).finish().unwrap();
}

#[test]
fn a_frozen_store_lists_every_difference_at_the_end() {
    let mut tensors = trainable(3, false).tensors();
    tensors.remove("conv1.weight");
    tensors.remove("head.bias");
    tensors.insert("aux.weight".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    tensors.insert("head.weight".into(), Tensor::zeros((11, 4), DType::F32, &Device::Cpu).unwrap());
    tensors.insert("layer1.0.bn1.running_mean".into(), Tensor::full(f32::INFINITY, 4, &Device::Cpu).unwrap());
    tensors.insert("layer1.0.bn1.weight".into(), Tensor::ones(4, DType::U8, &Device::Cpu).unwrap());
    let store = ParamStore::frozen(tensors, DType::F32, &Device::Cpu).unwrap();
    build(&store, false).unwrap();
    let expected = Mismatch {
        missing: vec!["conv1.weight".into(), "head.bias".into()],
        unexpected: vec!["aux.weight".into()],
        shapes: vec![ShapeDifference { name: "head.weight".into(), found: vec![11, 4], expected: vec![5, 4] }],
        dtypes: vec![no_float("layer1.0.bn1.weight", DType::U8)],
        non_finite: vec!["layer1.0.bn1.running_mean".into()],
    };
    assert_eq!(mismatch(store.finish()), expected);
}

#[test]
fn buffers_get_no_gradient() {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    let built = build(&store, false).unwrap();
    let sum = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap();
    let loss = built.iter().map(sum).reduce(|a, b| (a + b).unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    for p in store.named() {
        let var = p.var.unwrap();
        let found = grads.get(&p.tensor).is_some() || grads.get(var.as_tensor()).is_some();
        assert_eq!(found, p.kind != ParamKind::Buffer, "{}", p.name);
    }
}

#[test]
fn initial_values_have_the_stated_spread() {
    let shape = [64, 32, 3, 3];
    let store = ParamStore::trainable(5, DType::F64, &Device::Cpu);
    let draw = |name: &str, init| -> Vec<f64> {
        let t = store.root().get(name, &shape, ParamKind::Weight, init).unwrap();
        t.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (fan_in, fan_out): (f64, f64) = (32.0 * 9.0, 64.0 * 9.0);
    for (name, init, variance) in [
        ("out", Init::KaimingFanOut, 2.0 / fan_out),
        ("in", Init::KaimingFanIn, 2.0 / fan_in),
        ("xavier", Init::Xavier, 2.0 / (fan_in + fan_out)),
    ] {
        let x = draw(name, init);
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let found = x.iter().map(|v| v * v).sum::<f64>() / n;
        // 18432 draws: four standard deviations are 3 % of the spread for the mean, 4.2 % for a normal variance.
        assert!(mean.abs() < 0.03 * variance.sqrt(), "{name}: mean {mean}");
        assert!((found / variance - 1.0).abs() < 0.042, "{name}: variance {found}, expected {variance}");
        let largest = x.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let bound = (6.0 / (fan_in + fan_out)).sqrt();
        match init {
            Init::Xavier => assert!(largest < bound && largest > 0.99 * bound, "{largest} of {bound}"),
            _ => assert!(largest > 3.0 * variance.sqrt(), "a normal has tails: {largest}"),
        }
    }
    assert!(draw("constant", Init::Constant(0.25)).iter().all(|&v| v == 0.25));
}

#[test]
fn bilinear_weights_are_the_known_kernel() {
    let store = ParamStore::trainable(0, DType::F64, &Device::Cpu);
    let get = |name: &str, shape: &[usize]| store.root().get(name, shape, ParamKind::Weight, Init::Bilinear);
    let kernel = get("up", &[2, 2, 4, 4]).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    // (1/4, 3/4, 3/4, 1/4) along both axes, in sixteenths.
    let known = [1.0, 3.0, 3.0, 1.0, 3.0, 9.0, 9.0, 3.0, 3.0, 9.0, 9.0, 3.0, 1.0, 3.0, 3.0, 1.0].map(|v| v / 16.0);
    for (block, expected) in kernel.chunks(16).zip([known, [0.0; 16], [0.0; 16], known]) {
        assert_eq!(block, expected);
    }
    let three = get("odd", &[1, 1, 3, 3]).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(three, [0.25, 0.5, 0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 0.25]);
    assert!(matches!(get("wrong", &[2, 3, 4, 4]), Err(OpsError::Shape { .. })));
    assert!(matches!(get("flat", &[2, 2]), Err(OpsError::Shape { .. })));
}

#[test]
fn finiteness_sees_every_kind_of_non_number() {
    let check = |values: &[f32]| all_finite(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap();
    assert!(check(&[1.0, -2.0, f32::MAX, f32::MIN_POSITIVE, 0.0]));
    let wide = |value: f64| all_finite(&Tensor::full(value, (2, 3), &Device::Cpu).unwrap()).unwrap();
    assert!(wide(f64::MAX) && wide(1e300) && !wide(f64::NAN) && !wide(f64::NEG_INFINITY));
    assert!(!check(&[1.0, f32::NAN]) && !check(&[f32::INFINITY, 1.0]) && !check(&[f32::NEG_INFINITY, f32::INFINITY]));
}

#[test]
fn unreadable_weights_name_the_file() {
    let error = read_safetensors(Path::new("absent/weights.safetensors"), &Device::Cpu).unwrap_err();
    assert!(matches!(error, OpsError::Weights { .. }));
    assert!(error.to_string().contains("absent/weights.safetensors"), "{error}");
}

#[test]
fn the_precision_reaches_every_scope_and_changes_no_tensor() {
    let plain = trainable(1, true);
    assert_eq!(plain.root().pp("conv1").precision(), Precision::F32);
    let rounded = ParamStore::trainable(1, DType::F32, &Device::Cpu).with_precision(Precision::Bf16);
    build(&rounded, true).unwrap();
    assert_eq!(rounded.clone().root().pp("layer1").pp(0).precision(), Precision::Bf16);
    assert_eq!(snapshot(&rounded), snapshot(&plain));
    let frozen = ParamStore::frozen(rounded.tensors(), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(frozen.root().precision(), Precision::F32, "frozen from tensors, which know no precision");
}
