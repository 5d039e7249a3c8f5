//! Parameters, multiply-accumulates, names and taps: what a network is, before any number runs through it.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};
use segdistill_models::encoders::{EncoderOptions, plan};
use segdistill_models::{ModelError, ModelSpec, build, catalog, info, macs};
use segdistill_ops::{Mode, ParamKind, ParamStore};

/// Published counts without the classifier (torchvision, timm); `names` below holds plans against built networks.
#[test]
fn encoders_have_the_published_parameter_counts() {
    for (encoder, expected) in [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("xception65", 37_867_312)] {
        for output_stride in [8, 16, 32] {
            let plan = plan(encoder, EncoderOptions { output_stride, ..EncoderOptions::default() }).unwrap();
            assert_eq!(plan.n_parameters(), expected, "{encoder} at {output_stride}");
        }
    }
}

/// Printed by `fixtures/make_deeplab.py --counts` (PyTorch, 11 classes).
#[test]
fn networks_have_pytorchs_parameter_counts() {
    for (encoder, expected) in [("resnet18", 16_605_611), ("resnet34", 26_713_771), ("xception65", 41_052_843)] {
        let spec = ModelSpec::deeplabv3plus(encoder, 11);
        assert_eq!(info(&spec).unwrap().n_parameters, expected, "{encoder}");
        assert_eq!(info(&ModelSpec { output_stride: 8, ..spec }).unwrap().n_parameters, expected, "{encoder} at 8");
    }
}

/// Printed by `fixtures/make_deeplab.py --counts`: output sizes met in forward hooks, times the weights' elements.
#[test]
fn multiply_accumulates_equal_pytorchs() {
    let expected = [
        ("resnet18", 16, [512, 512], 41_246_916_608),
        ("resnet18", 16, [360, 480], 27_406_426_112),
        ("resnet18", 16, [97, 131], 2_249_838_720),
        ("resnet18", 8, [512, 512], 85_740_093_440),
        ("resnet18", 8, [360, 480], 56_518_172_672),
        ("resnet18", 8, [97, 131], 4_538_224_768),
        ("resnet34", 16, [512, 512], 54_534_471_680),
        ("resnet34", 16, [360, 480], 36_306_870_272),
        ("resnet34", 16, [97, 131], 3_035_558_016),
        ("resnet34", 8, [512, 512], 128_018_677_760),
        ("resnet34", 8, [360, 480], 84_387_356_672),
        ("resnet34", 8, [97, 131], 6_815_019_136),
        ("xception65", 16, [512, 512], 51_242_377_216),
        ("xception65", 16, [360, 480], 34_365_562_928),
        ("xception65", 16, [97, 131], 3_037_858_592),
        ("xception65", 8, [512, 512], 171_552_145_408),
        ("xception65", 8, [360, 480], 113_083_868_288),
        ("xception65", 8, [97, 131], 9_225_665_680),
    ];
    for (encoder, output_stride, hw, expected) in expected {
        let spec = ModelSpec { output_stride, ..ModelSpec::deeplabv3plus(encoder, 11) };
        assert_eq!(macs(&spec, hw).unwrap(), expected, "{encoder} at {output_stride}, {hw:?}");
    }
}

#[test]
fn sizes_outside_the_range_are_refused_with_the_range() {
    let spec = ModelSpec::deeplabv3plus("resnet18", 11);
    for hw in [[31, 64], [64, 0], [usize::MAX, 64]] {
        let error = macs(&spec, hw).unwrap_err();
        assert!(matches!(error, ModelError::Input { .. }), "{error}");
        assert!(error.to_string().contains("from 32 to 65536"), "{error}");
    }
}

fn names(spec: &ModelSpec) -> BTreeSet<(String, Vec<usize>)> {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    let model = build(spec, &store).unwrap();
    assert_eq!(store.n_parameters(), model.info().n_parameters, "{spec:?}");
    store.named().into_iter().map(|p| (p.name, p.tensor.dims().to_vec())).collect()
}

/// Spot checks of METHODS section 6; that every name is PyTorch's is proven by `pytorch.rs`, where values follow names.
#[test]
fn tensors_have_torchvisions_and_timms_names() {
    let expect = |encoder: &str, n: usize, some: &[(&str, &[usize])]| {
        let names = names(&ModelSpec::deeplabv3plus(encoder, 11));
        assert_eq!(names.len(), n, "{encoder}");
        for (name, shape) in some {
            assert!(names.contains(&(name.to_string(), shape.to_vec())), "{encoder}: {name} {shape:?}");
        }
    };
    // 36 convolutions with normalisation, 4 buffers and scales each, in the encoder; 9 in the decoder; the classifier.
    expect(
        "resnet34",
        36 * 5 + 9 * 5 + 2,
        &[
            ("encoder.conv1.weight", &[64, 3, 7, 7]),
            ("encoder.bn1.running_var", &[64]),
            ("encoder.layer2.0.downsample.0.weight", &[128, 64, 1, 1]),
            ("encoder.layer2.0.downsample.1.running_mean", &[128]),
            ("encoder.layer4.2.conv2.weight", &[512, 512, 3, 3]),
            ("decoder.aspp.3.conv.weight", &[256, 512, 3, 3]),
            ("decoder.project.conv.weight", &[256, 1280, 1, 1]),
            ("decoder.low.conv.weight", &[48, 64, 1, 1]),
            ("decoder.fuse.0.conv.weight", &[256, 304, 3, 3]),
            ("decoder.classifier.weight", &[11, 256, 1, 1]),
            ("decoder.classifier.bias", &[11]),
        ],
    );
    // Stem 2, skips 4, 21 blocks of 3 separable convolutions; decoder 4 dense and 5 separable; the classifier.
    expect(
        "xception65",
        (2 + 4 + 21 * 6) * 5 + (4 + 2 * 5) * 5 + 2,
        &[
            ("encoder.stem.1.conv.weight", &[64, 32, 3, 3]),
            ("encoder.stem.1.bn.bias", &[64]),
            ("encoder.blocks.19.shortcut.conv.weight", &[1024, 728, 1, 1]),
            ("encoder.blocks.19.shortcut.bn.running_var", &[1024]),
            ("encoder.blocks.20.stack.conv3.conv_dw.weight", &[1536, 1, 3, 3]),
            ("encoder.blocks.20.stack.conv3.conv_pw.weight", &[2048, 1536, 1, 1]),
            ("encoder.blocks.3.stack.conv1.bn_dw.weight", &[728]),
            ("decoder.aspp.1.conv_dw.weight", &[2048, 1, 3, 3]),
            ("decoder.low.conv.weight", &[48, 256, 1, 1]),
            ("decoder.fuse.0.conv_dw.weight", &[304, 1, 3, 3]),
        ],
    );
}

#[test]
fn output_stride_changes_no_tensor() {
    for entry in catalog().into_iter().filter(|entry| entry.name == "deeplabv3plus") {
        for width in [0.01, 0.3] {
            let at = |output_stride| {
                names(&ModelSpec { output_stride, width, ..ModelSpec::deeplabv3plus(entry.encoder, 11) })
            };
            assert_eq!(at(8), at(16), "{} at width {width}", entry.encoder);
        }
    }
}

#[test]
fn taps_have_the_published_channels_and_strides() {
    for (encoder, low, high) in [("resnet18", 64, 512), ("resnet34", 64, 512), ("xception65", 256, 2048)] {
        for output_stride in [8, 16] {
            let spec = ModelSpec { output_stride, ..ModelSpec::deeplabv3plus(encoder, 11) };
            let info = info(&spec).unwrap();
            let taps: Vec<_> = info.taps.iter().map(|t| (t.name, t.channels, t.stride)).collect();
            let expected =
                [("low", low, 4), ("high", high, output_stride), ("aspp", 256, output_stride), ("decoder", 256, 4)];
            assert_eq!(taps, expected, "{encoder}");
            assert_eq!((info.logits_stride, info.output_stride), (4, output_stride));
        }
    }
}

/// Sizes that are no multiple of any stride, and the smallest there is.
#[test]
fn maps_have_the_channels_and_strides_that_are_said() {
    for encoder in ["resnet18", "resnet34", "xception65"] {
        for (output_stride, hw) in [(16, [32, 32]), (16, [45, 77]), (8, [33, 70])] {
            let spec = ModelSpec { output_stride, width: 0.1, ..ModelSpec::deeplabv3plus(encoder, 7) };
            let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
            let model = build(&spec, &store).unwrap();
            let images = Tensor::full(0.5f32, (2, 3, hw[0], hw[1]), &Device::Cpu).unwrap();
            let out = model.forward(&images, Mode::Eval).unwrap();
            assert_eq!(out.logits_nchw.dims(), [2, 7, hw[0].div_ceil(4), hw[1].div_ceil(4)]);
            assert!(out.aux_logits_nchw.is_none());
            assert_eq!(out.features.len(), model.info().taps.len());
            for tap in &model.info().taps {
                let expected = [2, tap.channels, hw[0].div_ceil(tap.stride), hw[1].div_ceil(tap.stride)];
                assert_eq!(out.features[tap.name].dims(), expected, "{} of {encoder}", tap.name);
            }
        }
    }
}

#[test]
fn new_networks_start_from_the_stated_distributions() {
    let store = ParamStore::trainable(3, DType::F32, &Device::Cpu);
    build(&ModelSpec { width: 0.5, ..ModelSpec::deeplabv3plus("xception65", 11) }, &store).unwrap();
    for p in store.named() {
        let values = p.tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let constant = match p.kind {
            ParamKind::Bias => Some(0.0),
            ParamKind::Norm | ParamKind::Buffer if p.name.ends_with("weight") || p.name.ends_with("running_var") => {
                Some(1.0)
            }
            ParamKind::Norm | ParamKind::Buffer => Some(0.0),
            ParamKind::Weight => None,
        };
        if let Some(constant) = constant {
            assert!(values.iter().all(|&v| v == constant), "{}", p.name);
        } else if values.len() > 2000 && !p.name.ends_with("classifier.weight") {
            let [n_out, _, kh, kw] = *p.tensor.dims() else { panic!("{}", p.name) };
            let groups = if p.name.ends_with("conv_dw.weight") { n_out } else { 1 };
            let expected = 2.0 / (n_out / groups * kh * kw) as f64;
            let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
            // Of n normal draws the variance is known to sqrt(2 / n): 3 % at 2000, five of them allowed.
            let allowed = 5.0 * (2.0 / values.len() as f64).sqrt();
            assert!((variance / expected - 1.0).abs() < allowed, "{}: {variance} for {expected}", p.name);
        }
    }
}

#[test]
fn a_store_takes_one_network() {
    let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
    let spec = ModelSpec { width: 0.125, ..ModelSpec::deeplabv3plus("resnet18", 11) };
    build(&spec, &store).unwrap();
    let error = build(&spec, &store).err().unwrap().to_string();
    assert!(error.contains("built twice"), "{error}");
}
