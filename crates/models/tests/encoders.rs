//! Encoders by themselves: every map and every gradient against torchvision and timm (`fixtures/make_encoders.py`),
//! published counts, and what holds for all of them.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use segdistill_models::encoders::{Encoder, EncoderOptions, EncoderPlan, Wanted, plan};
use segdistill_models::weights;
use segdistill_ops::{Mode, ParamKind, ParamStore, max_unpool2d};
use support::{fill, filled, values};

const TRAIN: Mode = Mode::Train { seed: 0, step: 0 };
/// Every encoder of convolutions.
const NAMES: [&str; 14] = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet18-deep",
    "resnet34-deep",
    "resnet50-deep",
    "resnet101-deep",
    "xception41",
    "xception65",
    "mobilenetv2",
    "vgg16",
    "vgg16-bn",
    "densenet169",
];

/// The maps of an encoder, all of them.
fn all(plan: &dyn EncoderPlan) -> Wanted {
    Wanted { taps: (0..plan.taps().len()).collect(), pools: false }
}

/// An encoder with every tensor from the formula.
fn filled_encoder(plan: &dyn EncoderPlan, dtype: DType, calm: Option<f64>) -> (ParamStore, Box<dyn Encoder>) {
    let store = ParamStore::trainable(0, dtype, &Device::Cpu);
    let encoder = plan.build(&store.root().pp("encoder")).unwrap();
    for p in store.named() {
        let values = Tensor::from_vec(filled(&p.name, p.tensor.dims(), calm), p.tensor.dims(), &Device::Cpu).unwrap();
        p.var.unwrap().set(&values.to_dtype(dtype).unwrap()).unwrap();
    }
    (store, encoder)
}

/// Normalised images, in [-1, 1).
fn images(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(fill("images", shape), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Tensors of the fixture by case, then by name.
static EXPECTED: LazyLock<BTreeMap<String, BTreeMap<String, Vec<f64>>>> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders.safetensors");
    let mut cases = BTreeMap::<String, BTreeMap<String, Vec<f64>>>::new();
    for (name, tensor) in weights::read(path, &Device::Cpu).unwrap() {
        let (case, key) = name.split_once('/').unwrap();
        cases.entry(case.to_string()).or_default().insert(key.to_string(), values(&tensor));
    }
    cases
});

struct Tolerance {
    eval: f64,
    train: f64,
    gradients: f64,
    /// A gradient smaller than this share of the largest one is measured by that share.
    floor: f64,
    /// What rounding may leave of a gradient that is zero (a shift that the next normalisation takes away again), as a
    /// share of the largest one.
    zero: f64,
}

/// Only the order of summation differs.
const F64: Tolerance = Tolerance { eval: 1e-12, train: 1e-10, gradients: 1e-9, floor: 0.0, zero: 1e-12 };
/// The bounds the project asks for, where values keep away from the kinks of ReLU.
const F32_CALM: Tolerance = Tolerance { eval: 1e-4, train: 1e-4, gradients: 1e-3, floor: 1e-2, zero: 1e-4 };
/// Elsewhere one value that rounding carries across a kink moves a gradient by a hundredth, in PyTorch as well;
/// gradients are left to the calm cases.
const F32: Tolerance = Tolerance { eval: 1e-4, train: 1e-3, gradients: f64::INFINITY, floor: 1e-2, zero: 1e-4 };

/// At most `most` elements, those that `samples` of the script keeps.
fn samples(tensor: &Tensor, most: usize) -> Vec<f64> {
    let values = values(tensor);
    let step = (values.len().div_ceil(most)..).find(|step| step % 2 != 0 && step % 3 != 0).unwrap();
    values.iter().step_by(step).copied().collect()
}

fn along(name: &str, tensor: &Tensor) -> f64 {
    fill(&format!("along/{name}"), tensor.dims()).iter().zip(values(tensor)).map(|(a, b)| a * b).sum()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// `max |found - expected| / max |expected|`.
fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "number of elements");
    assert!(found.iter().all(|v| v.is_finite()), "not finite");
    let apart = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
    apart / expected.iter().map(|e| e.abs()).fold(0.0, f64::max)
}

fn check_in(case: &str, name: &str, options: EncoderOptions, shape: [usize; 4], calm: Option<f64>, dtype: DType) {
    let expected = &EXPECTED[case];
    let bound = match (dtype, calm) {
        (DType::F64, _) => F64,
        (_, Some(_)) => F32_CALM,
        (_, None) => F32,
    };
    let plan = plan(name, options).unwrap();
    let (store, encoder) = filled_encoder(plan.as_ref(), dtype, calm);
    let input = images(&shape, dtype);

    let near = |mode: &str, maps: &[Tensor], bound: f64| {
        let shapes: Vec<f64> = maps.iter().flat_map(|m| m.dims()).map(|&d| d as f64).collect();
        assert_eq!(shapes, expected["shapes"], "{case}: shapes of the maps");
        for (i, map) in maps.iter().enumerate() {
            let apart = distance(&samples(map, 60), &expected[&format!("{mode}/{i}")]);
            assert!(apart <= bound, "{case} {dtype:?}, {mode} map {i}: {apart:.3e} from PyTorch, allowed {bound:.0e}");
            let [product, size] = expected[&format!("{mode}/{i}/whole")][..] else { panic!("{case}") };
            let apart = (along(&i.to_string(), map) - product).abs().max((norm(&values(map)) - size).abs()) / size;
            assert!(apart <= bound, "{case} {dtype:?}, {mode} map {i} whole: {apart:.3e}, allowed {bound:.0e}");
        }
    };
    near("eval", &encoder.forward(&input, &all(plan.as_ref()), Mode::Eval).unwrap().maps_nchw, bound.eval);
    let maps = encoder.forward(&input, &all(plan.as_ref()), TRAIN).unwrap().maps_nchw;
    near("train", &maps, bound.train);

    let term = |(i, map): (usize, &Tensor)| {
        let direction = Tensor::from_vec(fill(&format!("loss/{i}"), map.dims()), map.dims(), &Device::Cpu).unwrap();
        (map * direction.to_dtype(dtype).unwrap()).unwrap().mean_all().unwrap()
    };
    let loss = maps.iter().enumerate().map(term).reduce(|a, b| (a + b).unwrap()).unwrap();
    let gradients = loss.backward().unwrap();
    let (norms, products) = (&expected["gradient_norms"], &expected["gradient_products"]);
    let largest = norms.iter().copied().fold(0.0, f64::max);
    let (mut i, mut n_named, mut buffers) = (0, 0, Vec::new());
    for p in store.named() {
        if p.kind == ParamKind::Buffer {
            buffers.push(along(&p.name, &p.tensor));
            continue;
        }
        let gradient = gradients.get(&p.tensor).unwrap_or_else(|| panic!("{case}: no gradient for {}", p.name));
        let (named, size) = (expected.get(&format!("gradient/{}", p.name)), norms[i]);
        let found = norm(&values(gradient));
        n_named += usize::from(named.is_some());
        if size < 1e-12 * largest {
            assert!(found <= bound.zero * largest, "{case} {dtype:?}, gradient of {}: {found:.3e}, not 0", p.name);
        } else {
            if let Some(expected) = named {
                let apart = distance(&samples(gradient, 60), expected);
                assert!(apart <= bound.gradients, "{case} {dtype:?}, gradient of {}: {apart:.3e}", p.name);
            }
            // The fixed direction has elements of mean square 1/3: its product is measured by the gradient's norm.
            let apart = (found - size).abs().max((along(&p.name, gradient) - products[i]).abs());
            let apart = apart / size.max(bound.floor * largest);
            assert!(apart <= bound.gradients, "{case} {dtype:?}, gradient of {}: {apart:.3e}, norm {size:.1e}", p.name);
        }
        i += 1;
    }
    assert_eq!(i, norms.len(), "{case}: number of gradients");
    assert!(n_named >= 3, "{case}: {n_named} gradients by name");
    // Running statistics: names in the script's order.
    assert_eq!(buffers.is_empty(), !expected.contains_key("buffer_products"), "{case}: running statistics");
    if let Some(expected) = expected.get("buffer_products") {
        let apart = distance(&buffers, expected);
        assert!(apart <= bound.train, "{case} {dtype:?}, running statistics: {apart:.3e}");
    }
}

fn options(width: f64, output_stride: usize) -> EncoderOptions {
    EncoderOptions { width, output_stride, ..EncoderOptions::default() }
}

/// In f64 and in f32.
fn check(case: &str, name: &str, options: EncoderOptions, shape: [usize; 4], calm: Option<f64>) {
    for dtype in [DType::F64, DType::F32] {
        check_in(case, name, options, shape, calm, dtype);
    }
}

const ODD: [usize; 4] = [2, 3, 65, 97];
const SMALL: [usize; 4] = [3, 3, 33, 49];

/// torchvision's own `replace_stride_with_dilation`.
#[test]
fn bottlenecks_dilate_as_torchvision() {
    let gradual = |os| EncoderOptions { gradual: true, ..options(0.125, os) };
    check("resnet50_os8", "resnet50", gradual(8), ODD, None);
    check("resnet101_os16", "resnet101", gradual(16), ODD, None);
    check("resnet101_calm", "resnet101", gradual(8), SMALL, Some(0.2));
}

#[test]
fn whole_stages_dilate_as_segmentation_models_pytorch() {
    check("resnet18_os8_whole", "resnet18", options(0.125, 8), ODD, None);
    check("resnet50_os16_whole", "resnet50", options(0.125, 16), ODD, None);
}

#[test]
fn deep_stems_are_those_of_cirkd_and_skd() {
    let gradual = |width, os| EncoderOptions { gradual: true, ..options(width, os) };
    check("resnet34_os8", "resnet34", gradual(0.125, 8), ODD, None);
    check("resnet18_deep_os8", "resnet18-deep", gradual(0.25, 8), ODD, None);
    check("resnet101_deep_os8", "resnet101-deep", gradual(0.125, 8), ODD, None);
    check("resnet50_deep_calm", "resnet50-deep", gradual(0.125, 16), SMALL, Some(0.2));
    let skd = EncoderOptions { ceil_pool: true, ..options(0.125, 8) };
    check("resnet18_skd_os8", "resnet18-deep", skd, [2, 3, 64, 96], None);
}

#[test]
fn mobilenetv2_is_torchvisions() {
    let gradual = EncoderOptions { gradual: true, ..options(0.25, 8) };
    check("mobilenetv2_os8", "mobilenetv2", gradual, ODD, None);
    check("mobilenetv2_os32", "mobilenetv2", options(0.5, 32), [3, 3, 65, 97], None);
    check("mobilenetv2_calm", "mobilenetv2", EncoderOptions { output_stride: 16, ..gradual }, SMALL, Some(0.1));
    check("mobilenetv2_os8_whole", "mobilenetv2", options(0.25, 8), ODD, None);
    check("mobilenetv2_320_os8", "mobilenetv2", EncoderOptions { expansion: false, ..gradual }, ODD, None);
}

#[test]
fn xception41_is_timms() {
    check("xception41_os16", "xception41", options(0.125, 16), ODD, None);
    check("xception41_os8", "xception41", options(0.125, 8), ODD, None);
    check("xception41_calm", "xception41", options(0.125, 16), SMALL, Some(0.1));
}

#[test]
fn vgg16_is_torchvisions() {
    check("vgg16", "vgg16", options(0.125, 32), [2, 3, 67, 97], None);
    check("vgg16_bn", "vgg16-bn", options(0.125, 32), [2, 3, 67, 97], None);
    check("vgg16_bn_calm", "vgg16-bn", options(0.125, 32), [3, 3, 65, 97], Some(0.2));
    check("vgg16_os8", "vgg16", options(0.125, 8), ODD, None);
}

#[test]
fn densenet169_is_torchvisions_and_dilates_as_ssnet() {
    check("densenet169_os32", "densenet169", options(0.25, 32), [2, 3, 67, 97], None);
    check("densenet169_os8", "densenet169", options(0.25, 8), ODD, None);
    check("densenet169_calm", "densenet169", options(0.25, 16), SMALL, Some(0.2));
}

/// Printed by `fixtures/make_encoders.py --counts`: torchvision's and timm's parameters (without the classifier) and
/// the multiply-accumulates met in forward hooks, for images of 512x1024 and 97x131.
#[test]
fn counts_equal_pytorchs() {
    let expected = [
        ("resnet18", 32, 11_176_512, [18_949_865_472, 567_837_056]),
        ("resnet34", 8, 21_284_672, [180_816_445_440, 4_862_091_648]),
        ("resnet50", 32, 23_508_032, [42_706_403_328, 1_281_884_544]),
        ("resnet50", 8, 23_508_032, [199_338_491_904, 5_360_320_896]),
        ("resnet101", 16, 42_500_160, [103_641_251_840, 3_095_069_056]),
        ("resnet101", 8, 42_500_160, [354_494_185_472, 9_546_039_680]),
        ("resnet18-deep", 8, 11_324_992, [111_224_553_472, 2_955_285_888]),
        ("resnet34-deep", 16, 21_433_152, [73_375_154_176, 2_084_255_104]),
        ("resnet50-deep", 8, 23_631_808, [213_498_462_208, 5_710_034_304]),
        ("resnet101-deep", 8, 42_623_936, [368_654_155_776, 9_895_753_088]),
        ("mobilenetv2", 32, 2_223_872, [3_129_409_536, 96_589_952]),
        ("mobilenetv2", 16, 2_223_872, [5_599_395_840, 165_736_704]),
        ("mobilenetv2", 8, 2_223_872, [18_696_241_152, 502_537_088]),
        ("xception41", 32, 24_920_560, [51_976_814_592, 1_551_478_320]),
        ("xception41", 16, 24_920_560, [65_674_887_168, 1_934_953_008]),
        ("xception41", 8, 24_920_560, [211_941_064_704, 5_696_355_360]),
        ("xception65", 16, 37_867_312, [92_046_704_640, 2_746_195_440]),
        ("vgg16", 32, 14_714_688, [160_356_630_528, 3_785_145_408]),
        ("vgg16-bn", 32, 14_723_136, [160_356_630_528, 3_785_145_408]),
        ("densenet169", 32, 12_484_480, [35_089_547_264, 844_714_368]),
        ("densenet169", 16, 12_484_480, [44_048_580_608, 1_054_691_712]),
        ("densenet169", 8, 12_484_480, [111_090_335_744, 2_625_982_848]),
    ];
    for (name, output_stride, n_parameters, macs) in expected {
        for gradual in [false, true] {
            let plan = plan(name, EncoderOptions { gradual, ..options(1.0, output_stride) }).unwrap();
            assert_eq!(plan.n_parameters(), n_parameters, "{name}");
            let found = [[512, 1024], [97, 131]].map(|hw| plan.trace(hw).unwrap().macs);
            assert_eq!(found, macs, "{name} at output stride {output_stride}");
        }
    }
    let plan = plan("mobilenetv2", EncoderOptions { expansion: false, ..options(1.0, 8) }).unwrap();
    assert_eq!((plan.n_parameters(), plan.trace([512, 1024]).unwrap().macs), (1_811_712, 15_340_797_952));
    let skd = EncoderOptions { ceil_pool: true, ..options(1.0, 8) };
    let plan = segdistill_models::encoders::plan("resnet101-deep", skd).unwrap();
    assert_eq!(plan.trace([512, 1024]).unwrap().macs, 376_889_610_240);
}

#[test]
fn pyramids_have_the_published_channels_and_strides() {
    let expected = [
        ("resnet50", [64, 256, 512, 1024, 2048]),
        ("resnet18-deep", [128, 64, 128, 256, 512]),
        ("resnet101-deep", [128, 256, 512, 1024, 2048]),
        ("xception41", [128, 256, 728, 1024, 2048]),
        ("mobilenetv2", [16, 24, 32, 96, 1280]),
        ("vgg16", [64, 128, 256, 512, 512]),
        ("densenet169", [64, 128, 256, 640, 1664]),
    ];
    for (name, channels) in expected {
        for os in [8, 16, 32] {
            let plan = plan(name, options(1.0, os)).unwrap();
            let taps = plan.taps();
            let found: Vec<_> = plan.stages().iter().map(|&i| (taps[i].channels, taps[i].stride)).collect();
            let strides = [2, 4, 8, 16, 32].map(|stride: usize| stride.min(os));
            assert_eq!(found, channels.into_iter().zip(strides).collect::<Vec<_>>(), "{name} at {os}");
        }
    }
}

/// Plans against networks, at sizes that are no multiple of any stride, cut short too.
#[test]
fn plans_say_what_networks_have() {
    for name in NAMES {
        for (os, hw) in [(32, [45, 77]), (16, [33, 70]), (8, [32, 41])] {
            let whole = options(0.0625, os);
            let whole_plan = plan(name, whole).unwrap();
            let (_, encoder) = filled_encoder(whole_plan.as_ref(), DType::F32, None);
            let input = images(&[1, 3, hw[0], hw[1]], DType::F32);
            let whole_maps = encoder.forward(&input, &all(whole_plan.as_ref()), Mode::Eval).unwrap().maps_nchw;
            for depth in [5, 1, 3, 4] {
                let Ok(plan) = plan(name, EncoderOptions { depth, ..whole }) else {
                    assert!(name.starts_with("xception") && depth < 5, "{name} at depth {depth}");
                    continue;
                };
                let (store, encoder) = filled_encoder(plan.as_ref(), DType::F32, None);
                assert_eq!(store.n_parameters(), plan.n_parameters(), "{name} at depth {depth}");
                let maps = encoder.forward(&input, &all(plan.as_ref()), Mode::Eval).unwrap().maps_nchw;
                assert_eq!((maps.len(), plan.stages().len()), (plan.taps().len(), depth), "{name}");
                let trace = plan.trace(hw).unwrap();
                for (i, (tap, map)) in plan.taps().iter().zip(&maps).enumerate() {
                    let [h, w] = trace.sizes[i];
                    assert_eq!(map.dims(), [1, tap.channels, h, w], "{name} at {os}, {}", tap.name);
                    assert_eq!(values(map), values(&whole_maps[i]), "{name} cut to {depth}, {}", tap.name);
                }
            }
            // Only what is wanted, in order.
            let some =
                encoder.forward(&input, &Wanted { taps: vec![1, 3], pools: false }, Mode::Eval).unwrap().maps_nchw;
            assert_eq!(some.len(), 2);
            assert_eq!(values(&some[0]), values(&whole_maps[1]), "{name}");
            assert_eq!(values(&some[1]), values(&whole_maps[3]), "{name}");
        }
    }
}

/// `||found - expected|| / ||expected||`.
fn norm_distance(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (values(found), values(expected));
    let difference: Vec<f64> = found.iter().zip(&expected).map(|(f, e)| f - e).collect();
    norm(&difference) / norm(&expected)
}

/// Folding the normalisations moves rounding alone: 1e-12 in f64, and in f32 1e-5, or where fifty layers make more of
/// rounding than that, no more than twice what the graph's own evaluation lies from f64.
#[test]
fn frozen_encoders_give_what_trained_ones_evaluate_to() {
    for name in NAMES {
        let plan = plan(name, EncoderOptions { gradual: true, ..options(0.125, 16) }).unwrap();
        let wanted = all(plan.as_ref());
        // A new network whose running statistics are those of its maps.
        let store = ParamStore::trainable(1, DType::F32, &Device::Cpu);
        let encoder = plan.build(&store.root().pp("encoder")).unwrap();
        for _ in 0..20 {
            encoder.forward(&images(&[2, 3, 64, 64], DType::F32), &wanted, TRAIN).unwrap();
        }
        let evaluate = |encoder: &dyn Encoder, dtype| {
            encoder.forward(&images(&[2, 3, 47, 66], dtype), &wanted, Mode::Eval).unwrap().maps_nchw
        };
        let frozen = |dtype| {
            let store = ParamStore::frozen(store.tensors(), dtype, &Device::Cpu).unwrap();
            let encoder = plan.build(&store.root().pp("encoder")).unwrap();
            store.finish().unwrap();
            encoder
        };
        let wide_store = ParamStore::trainable(1, DType::F64, &Device::Cpu);
        let wide = plan.build(&wide_store.root().pp("encoder")).unwrap();
        wide_store.load(&store.tensors()).unwrap();

        let exact = evaluate(wide.as_ref(), DType::F64);
        let graph = evaluate(encoder.as_ref(), DType::F32);
        let folded = evaluate(frozen(DType::F32).as_ref(), DType::F32);
        let wide_folded = evaluate(frozen(DType::F64).as_ref(), DType::F64);
        for (i, exact) in exact.iter().enumerate() {
            assert!(!folded[i].track_op(), "{name}, map {i}: a graph was recorded");
            let apart = norm_distance(&wide_folded[i], exact);
            assert!(apart <= 1e-12, "{name}, map {i} in f64: {apart:.3e}");
            let (apart, own) = (norm_distance(&folded[i], &graph[i]), norm_distance(&graph[i], exact));
            println!("{name}, map {i}: {apart:.1e}, own {own:.1e}");
            assert!(apart <= 1e-5f64.max(2.0 * own), "{name}, map {i}: {apart:.3e}, own {own:.3e}");
        }
        let input = images(&[2, 3, 47, 66], DType::F32);
        let error = frozen(DType::F32).forward(&input, &wanted, TRAIN).err().unwrap().to_string();
        assert!(error.contains("cannot train") && error.contains("hint: "), "{name}: {error}");
    }
}

/// Unpooling the maxima to where they lay and pooling again gives them back; sizes before the poolings may be odd.
#[test]
fn vgg16_hands_out_where_its_maxima_lay() {
    for name in ["vgg16", "vgg16-bn"] {
        let plan = plan(name, options(0.125, 32)).unwrap();
        assert_eq!(plan.pools(), [8, 16, 32, 64, 64]);
        let (_, encoder) = filled_encoder(plan.as_ref(), DType::F32, None);
        let input = images(&[2, 3, 45, 70], DType::F32);
        let wanted = Wanted { pools: true, ..all(plan.as_ref()) };
        let out = encoder.forward(&input, &wanted, Mode::Eval).unwrap();
        let plain = encoder.forward(&input, &all(plan.as_ref()), Mode::Eval).unwrap();
        assert!(plain.pools.is_empty());
        let hws: Vec<_> = out.pools.iter().map(|pooling| pooling.hw).collect();
        assert_eq!(hws, [[45, 70], [22, 35], [11, 17], [5, 8], [2, 4]]);
        assert_eq!(hws, plan.trace([45, 70]).unwrap().pool_sizes);
        for (i, pooling) in out.pools.iter().enumerate() {
            let map = &out.maps_nchw[i];
            assert_eq!(values(map), values(&plain.maps_nchw[i]), "{name}, pooling {i}");
            // Never negative, so that the zeros between never win.
            let spread = max_unpool2d(map, &pooling.indices, pooling.hw).unwrap();
            let halving =
                segdistill_ops::Pool2dConfig { kernel: [2; 2], stride: [2; 2], padding: [0; 2], ceil_mode: false };
            let again = segdistill_ops::max_pool2d(&spread, halving).unwrap();
            assert_eq!(values(&again), values(map), "{name}, pooling {i}");
        }
    }
    assert!(plan("vgg16", options(0.125, 16)).unwrap().pools().is_empty());
}

/// torchvision's distributions: fan-out, for DenseNet fan-in; the same seed gives the same weights.
#[test]
fn new_encoders_start_from_the_stated_distributions() {
    for (name, fan_in) in [("resnet50-deep", false), ("mobilenetv2", false), ("vgg16", false), ("densenet169", true)] {
        let build = |seed| {
            let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
            plan(name, options(0.25, 16)).unwrap().build(&store.root().pp("encoder")).unwrap();
            store
        };
        let (store, again, other) = (build(3), build(3), build(4));
        let mut n_checked = 0;
        for ((p, again), other) in store.named().iter().zip(again.named()).zip(other.named()) {
            assert_eq!(values(&p.tensor), values(&again.tensor), "{}", p.name);
            if p.kind != ParamKind::Weight || p.tensor.elem_count() <= 2000 {
                continue;
            }
            n_checked += 1;
            let values = values(&p.tensor);
            assert_ne!(values, support::values(&other.tensor), "{}", p.name);
            let [n_out, n_in, kh, kw] = *p.tensor.dims() else { panic!("{}", p.name) };
            // Of one group of a depthwise convolution.
            let fan = if n_in == 1 {
                1
            } else if fan_in {
                n_in
            } else {
                n_out
            };
            let expected = 2.0 / (fan * kh * kw) as f64;
            let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
            let allowed = 5.0 * (2.0 / values.len() as f64).sqrt();
            assert!((variance / expected - 1.0).abs() < allowed, "{}: {variance} for {expected}", p.name);
        }
        assert!(n_checked >= 10, "{name}: {n_checked} weights");
    }
}
