//! The tables of names against the state dicts of each library, listed in `tests/fixtures/keys` (`make_key_lists.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use segdistill_ops::ParamKind;

use super::file::{FileTensor, WeightFile};
use super::import::{Staging, Target, stage};
use super::layout::layout;
use super::structure::{self, Structure};
use super::*;
use crate::encoders::EncoderOptions;
use crate::spec::ModelSpec;

fn list(name: &str) -> (PathBuf, BTreeMap<String, FileTensor>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keys").join(format!("{name}.txt"));
    let text = fs_err::read_to_string(&path).unwrap();
    let tensor = |line: &str| {
        let (name, shape) = line.split_once(' ').unwrap();
        let shape = shape.split('x').filter(|side| *side != "-").map(|side| side.parse().unwrap()).collect();
        (name.to_string(), FileTensor { dtype: FileType::F32, shape })
    };
    (path, text.lines().map(tensor).collect())
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn listing(name: &str) -> WeightFile {
    let (path, tensors) = list(name);
    WeightFile::listing(&path, tensors)
}

/// Every name of `file` is used or left out for a reason, every tensor of the network found, and the names written again
/// are those that were read.
#[track_caller]
fn assert_whole(file: &WeightFile, target: Target, layout_name: &str, expected: &Structure, n_left_out: usize) {
    let layout = layout(layout_name).unwrap();
    let Staging { take, left_out, misfit, .. } = stage(file, target, layout, expected).unwrap();
    assert_eq!(misfit.n_tensors(), 0, "{misfit}");
    assert_eq!(take.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert_eq!(left_out.len(), n_left_out, "{left_out:?}");
    let used: BTreeSet<&String> = take.values().flatten().flatten().collect();
    let left: BTreeSet<&String> = left_out.iter().map(|l| &l.name).collect();
    assert!(used.is_disjoint(&left));
    assert_eq!(used.len() + left.len(), file.tensors().len());
}

#[test]
fn encoders_of_each_library_are_taken_whole_but_for_their_classifier() {
    for (keys, layout_name, encoder, n_left_out) in [
        ("torchvision-resnet18", "torchvision", "resnet18", 2),
        ("torchvision-resnet101", "torchvision", "resnet101", 2),
        ("torchvision-vgg16", "torchvision", "vgg16", 6),
        ("torchvision-vgg16_bn", "torchvision", "vgg16-bn", 6),
        ("torchvision-densenet169", "torchvision", "densenet169", 2),
        ("torchvision-mobilenet_v2", "torchvision", "mobilenetv2", 2),
        ("timm-resnet34", "timm", "resnet34", 2),
        ("timm-mobilenetv2_100", "timm", "mobilenetv2", 2),
        ("timm-xception65", "timm", "xception65", 2),
        ("smp-mit_b2", "smp", "mit-b2", 0),
        ("transformers-mit-b0-v5", "transformers", "mit-b0", 2),
    ] {
        let options = EncoderOptions::default();
        let expected = structure::of_encoder(encoder, options).unwrap();
        assert!(expected.keys().all(|name| name.starts_with("encoder.")));
        assert_whole(&listing(keys), Target::Encoder(encoder, options), layout_name, &expected, n_left_out);
    }
}

/// What a state dict says of itself: network, layout, classes, decoder channels, auxiliary head, tensors left out.
const NETWORKS: [(&str, &str, &str, usize, usize, bool, usize); 14] = [
    ("smp-deeplabv3plus-resnet34", "deeplabv3plus-resnet34", "smp", 19, 256, false, 0),
    ("smp-deeplabv3plus-tu-xception65", "deeplabv3plus-xception65", "smp", 19, 256, false, 0),
    ("smp-deeplabv3plus-mobilenet_v2", "deeplabv3plus-mobilenetv2", "smp", 19, 256, false, 0),
    ("smp-deeplabv3-resnet18", "deeplabv3-resnet18", "smp", 19, 256, false, 0),
    ("smp-unet-resnet34", "unet-resnet34", "smp", 19, 256, false, 0),
    // Two stages that never run, layer3 and layer4.
    ("smp-pspnet-resnet18", "pspnet-resnet18", "smp", 19, 256, false, 50),
    ("smp-segformer-mit_b0", "segformer-mit-b0", "smp", 19, 256, false, 0),
    ("torchvision-deeplabv3_resnet50", "deeplabv3-resnet50", "torchvision", 21, 256, true, 0),
    ("torchvision-fcn_resnet50", "fcn-resnet50", "torchvision", 21, 256, true, 0),
    ("transformers-segformer-b0-legacy", "segformer-mit-b0", "transformers", 19, 256, false, 0),
    ("transformers-segformer-b0-v5", "segformer-mit-b0", "transformers", 19, 256, false, 0),
    ("cirkd-deeplabv3-resnet18", "deeplabv3-resnet18-deep", "cirkd", 19, 256, true, 0),
    ("cirkd-pspnet-resnet18", "pspnet-resnet18-deep", "cirkd", 19, 256, true, 0),
    ("cirkd-deeplabv3-mobilenet", "deeplabv3-mobilenetv2", "cirkd", 19, 256, false, 0),
];

#[test]
fn networks_of_each_library_are_recognised_and_taken_whole() {
    for (keys, name, layout_name, n_classes, channels, aux, n_left_out) in NETWORKS {
        let file = listing(keys);
        let (spec, found) = spec_of(&file, name, "auto").unwrap();
        assert_eq!((found.name(), spec.n_classes, spec.aux), (layout_name, n_classes, aux), "{keys}");
        assert_eq!(spec.decoder_channels, channels, "{keys}");
        let expected = structure::of_network(&spec).unwrap();
        assert_whole(&file, Target::Network(&spec), layout_name, &expected, n_left_out);
    }
}

#[test]
fn what_is_exported_has_the_names_and_shapes_that_were_read() {
    // The files of version 5 hold other names than those that are written.
    for (keys, name, layout_name, ..) in NETWORKS.iter().filter(|n| !n.0.ends_with("-v5")) {
        let (_, listed) = list(keys);
        let (spec, _) = spec_of(&listing(keys), name, layout_name).unwrap();
        let tensors = structure::of_network(&spec).unwrap();
        let tensors: BTreeMap<_, _> = tensors.iter().map(|(name, slot)| (name.clone(), zeros(&slot.shape))).collect();
        let exported = export(&tensors, &BTreeMap::new(), &spec, layout_name).unwrap();
        let is_counter = |name: &String| name.ends_with("num_batches_tracked");
        let written: BTreeMap<String, Vec<usize>> = exported
            .tensors
            .iter()
            .filter(|(name, _)| !is_counter(name))
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect();
        let expected: BTreeMap<String, Vec<usize>> = listed.into_iter().map(|(name, t)| (name, t.shape)).collect();
        let differing = |(name, shape): &(&String, &Vec<usize>)| expected.get(*name) != Some(shape);
        assert_eq!(written.iter().find(differing), None, "{keys}");
        assert_eq!(expected.keys().find(|name| !written.contains_key(*name)), None, "{keys}");
        let n_means = written.keys().filter(|name| name.ends_with("running_mean")).count();
        assert_eq!(exported.tensors.keys().filter(|name| is_counter(name)).count(), n_means, "{keys}");
        let n_dormant = if *keys == "smp-pspnet-resnet18" { 50 } else { 0 };
        assert_eq!(exported.n_filled, n_dormant, "{keys}");
    }
}

#[test]
fn the_library_is_told_how_to_build_what_was_exported() {
    let config = |name: &str, layout_name: &str| {
        let network = ModelSpec::named(name, 5).unwrap();
        let spec = layout(layout_name).unwrap().spec(&network.name, &network.encoder, 5).unwrap();
        let slots = structure::of_network(&spec).unwrap();
        let zero = |(n, s): (&String, &structure::Slot)| (n.clone(), zeros(&s.shape));
        let tensors = slots.iter().map(zero).collect();
        serde_json::Value::Object(export(&tensors, &BTreeMap::new(), &spec, layout_name).unwrap().config)
    };
    let deeplab = config("deeplabv3plus-xception65", "smp");
    assert_eq!(deeplab["_model_class"], "DeepLabV3Plus");
    assert_eq!(deeplab["encoder_name"], "tu-xception65");
    // Left out, it would mean a download.
    assert_eq!(deeplab.get("encoder_weights"), Some(&serde_json::Value::Null));
    assert_eq!((&deeplab["classes"], &deeplab["encoder_output_stride"]), (&5.into(), &16.into()));
    let unet = config("unet-resnet18", "smp");
    assert_eq!(unet["decoder_channels"], serde_json::json!([256, 128, 64, 32, 16]));
    let fcn = config("fcn-resnet50", "torchvision");
    assert_eq!((&fcn["model"], &fcn["aux_loss"]), (&"fcn_resnet50".into(), &false.into()));
}

#[test]
fn a_misfit_names_what_is_missing_too_many_or_of_another_shape() {
    let (path, mut tensors) = list("smp-deeplabv3plus-resnet34");
    tensors.remove("decoder.block1.0.weight").unwrap();
    for i in 0..30 {
        tensors.insert(format!("extra.{i}.weight"), FileTensor { dtype: FileType::F32, shape: vec![1] });
    }
    tensors.get_mut("encoder.conv1.weight").unwrap().shape = vec![64, 4, 7, 7];
    tensors.get_mut("encoder.bn1.bias").unwrap().dtype = FileType::I64;
    let mut file = WeightFile::listing(&path, tensors);
    let spec = ModelSpec { layout: "smp".into(), ..ModelSpec::named("deeplabv3plus-resnet34", 19).unwrap() };
    let text = import(&mut file, &spec, "auto", ImportOptions::default()).unwrap_err().to_string();
    for said in [
        "smp-deeplabv3plus-resnet34.txt",
        "deeplabv3plus-resnet34 in layout smp",
        "1 missing, 30 unexpected, 1 of another shape, 1 of another type",
        "decoder.block1.0.weight (here decoder.low.conv.weight)",
        "encoder.conv1.weight: found [64, 4, 7, 7], expected [64, 3, 7, 7]",
        "encoder.bn1.bias: found I64",
        "extra.0.weight",
        "extra.29.weight",
        "takes images of 4 channels, this program takes RGB",
        "hint: ",
    ] {
        assert!(text.contains(said), "does not say `{said}`: {text}");
    }
    assert!(!text.contains(" more"), "{text}");
}

/// A listing of smp's DeepLabV3+ with other tensors.
fn changed(change: impl Fn(&mut BTreeMap<String, FileTensor>)) -> String {
    let (path, mut tensors) = list("smp-deeplabv3plus-resnet34");
    change(&mut tensors);
    let mut file = WeightFile::listing(&path, tensors);
    let (spec, layout) = spec_of(&file, "deeplabv3plus-resnet34", "auto").unwrap();
    import(&mut file, &spec, layout.name(), ImportOptions::default()).unwrap_err().to_string()
}

#[test]
fn the_one_reason_behind_many_differences_is_told() {
    let gray = changed(|t| t.get_mut("encoder.conv1.weight").unwrap().shape[1] = 1);
    assert!(gray.contains("images of 1 channels, this program takes RGB"), "{gray}");
    let binary = changed(|t| {
        t.get_mut("segmentation_head.0.weight").unwrap().shape[0] = 1;
        t.get_mut("segmentation_head.0.bias").unwrap().shape[0] = 1;
    });
    assert!(binary.contains("one logit for two classes"), "{binary}");
}

#[test]
fn a_classifier_of_images_beside_the_network_is_left_out() {
    let (path, mut tensors) = list("smp-deeplabv3plus-resnet34");
    for (name, shape) in [("weight", vec![4, 512]), ("bias", vec![4])] {
        tensors.insert(format!("classification_head.3.{name}"), FileTensor { dtype: FileType::F32, shape });
    }
    let file = WeightFile::listing(&path, tensors);
    let (spec, _) = spec_of(&file, "deeplabv3plus-resnet34", "auto").unwrap();
    let expected = structure::of_network(&spec).unwrap();
    assert_whole(&file, Target::Network(&spec), "smp", &expected, 2);
}

#[test]
fn channels_of_a_decoder_follow_the_file() {
    let (path, mut tensors) = list("smp-pspnet-resnet18");
    for (name, tensor) in &mut tensors {
        let of_decoder = name.starts_with("decoder.conv") || name.starts_with("segmentation_head");
        for side in tensor.shape.iter_mut().filter(|side| of_decoder && **side == 512) {
            *side = 200;
        }
    }
    // What comes in has as many channels as what goes out in the published network.
    tensors.get_mut("decoder.conv.0.weight").unwrap().shape =
        list("smp-pspnet-resnet18").1["decoder.conv.0.weight"].shape.clone();
    tensors.get_mut("decoder.conv.0.weight").unwrap().shape[0] = 200;
    let file = WeightFile::listing(&path, tensors);
    let (spec, _) = spec_of(&file, "pspnet-resnet18", "auto").unwrap();
    assert_eq!(spec.decoder_channels, 100);
    let expected = structure::of_network(&spec).unwrap();
    assert_whole(&file, Target::Network(&spec), "smp", &expected, 50);
}

#[test]
fn no_layout_is_taken_where_nothing_fits() {
    let file = listing("smp-deeplabv3plus-resnet34");
    let text = spec_of(&file, "segformer-mit-b0", "auto").unwrap_err().to_string();
    for said in ["found none that fits", "smp: ", "transformers: ", "missing", "unexpected", "--layout"] {
        assert!(text.contains(said), "does not say `{said}`: {text}");
    }
    // Asked for by its name, every difference is told.
    let text = import_check(&file, "segformer-mit-b0", "smp").unwrap().unwrap().to_string();
    assert!(text.contains("decoder.mlp_stage.0.linear.weight"), "{text}");
    let text = spec_of(&file, "unet-densenet169", "auto").unwrap_err().to_string();
    assert!(text.contains("no layout with names for `unet-densenet169`") && text.contains("unet-resnet34"), "{text}");
}

#[test]
fn what_stands_before_every_name_is_found_or_asked_for() {
    let (path, tensors) = list("cirkd-deeplabv3-resnet18");
    let before = |prefix: &str| -> BTreeMap<String, FileTensor> {
        tensors.iter().map(|(name, t)| (format!("{prefix}{name}"), t.clone())).collect()
    };
    for prefix in ["model.", "module.student.", "a.b.c."] {
        let file = WeightFile::listing(&path, before(prefix));
        let (spec, found) = spec_of(&file, "deeplabv3-resnet18-deep", "auto").unwrap();
        assert_eq!((found.name(), spec.n_classes), ("cirkd", 19), "{prefix}");
        let expected = structure::of_network(&spec).unwrap();
        let Staging { wrapper, .. } = stage(&file, Target::Network(&spec), found, &expected).unwrap();
        assert_eq!(wrapper, prefix);
        assert_whole(&file, Target::Network(&spec), "cirkd", &expected, 0);
    }
    // Beside other tensors it must be asked for.
    let mut both = before("student.");
    both.extend(before("teacher."));
    let file = WeightFile::listing(&path, both.clone());
    assert!(spec_of(&file, "deeplabv3-resnet18-deep", "auto").is_err());
    let file = WeightFile::listing(&path, both).below("student.").unwrap();
    let (spec, _) = spec_of(&file, "deeplabv3-resnet18-deep", "auto").unwrap();
    let expected = structure::of_network(&spec).unwrap();
    assert_whole(&file, Target::Network(&spec), "cirkd", &expected, tensors.len());
}

#[test]
fn settings_beside_a_file_are_read_and_must_be_those_of_the_network() {
    let (folder, path, spec, _) = small(4);
    let mut settings = export(&small(4).3, &BTreeMap::new(), &spec, "smp").unwrap().config;
    let open = || WeightFile::open(&path, None).unwrap();
    let with = |settings: &serde_json::Map<String, serde_json::Value>| {
        fs_err::write(folder.path().join("config.json"), serde_json::to_vec(settings).unwrap()).unwrap();
        import(&mut open(), &spec, "smp", ImportOptions::default())
    };
    let alone = import(&mut open(), &spec, "smp", ImportOptions::default()).unwrap();
    assert_eq!(alone.assumed["decoder_interpolation"], "nearest");
    assert!(with(&settings).unwrap().assumed.is_empty());
    settings.insert("decoder_use_norm".into(), true.into());
    settings.insert("encoder_weights".into(), "imagenet".into());
    with(&settings).unwrap();

    settings.insert("decoder_interpolation".into(), "bilinear".into());
    settings.insert("in_channels".into(), 4.into());
    settings.insert("novelty".into(), 1.into());
    let text = with(&settings).unwrap_err().to_string();
    for said in [
        "config.json",
        "decoder_interpolation: found \"bilinear\", expected \"nearest\"",
        "in_channels: found 4, expected 3",
        "novelty: found 1, which is not known here",
        "hint: ",
    ] {
        assert!(text.contains(said), "does not say `{said}`: {text}");
    }
    assert!(!text.contains("encoder_weights") && !text.contains("classes"), "{text}");
    // Of another program, it says nothing of this file.
    let other = serde_json::json!({ "in_channels": 4 });
    with(other.as_object().unwrap()).unwrap();
}

#[test]
fn the_output_stride_that_was_written_is_the_one_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs_err::write(&path, "").unwrap();
    let file = WeightFile::listing(&path, list("smp-deeplabv3plus-resnet34").1);
    let stride = || spec_of(&file, "deeplabv3plus-resnet34", "auto").unwrap().0.output_stride;
    assert_eq!(stride(), 16);
    let settings = r#"{"_model_class": "DeepLabV3Plus", "encoder_output_stride": 8, "decoder_aspp_dropout": 0.25}"#;
    fs_err::write(folder.path().join("config.json"), settings).unwrap();
    assert_eq!(stride(), 8);
    assert_eq!(spec_of(&file, "deeplabv3plus-resnet34", "smp").unwrap().0.dropout, 0.25);
}

#[test]
fn the_same_tensor_under_two_names_is_refused() {
    let (path, mut tensors) = list("transformers-segformer-b0-legacy");
    let doubled = tensors["decode_head.linear_fuse.weight"].clone();
    // The same layer under its name of version 5.
    let linear = tensors["decode_head.linear_c.0.proj.bias"].clone();
    tensors.insert("decode_head.linear_projections.0.proj.bias".into(), linear);
    let spec = ModelSpec::named("segformer-mit-b0", 19).unwrap();
    let file = WeightFile::listing(&path, tensors);
    let mut both = file;
    let text = import(&mut both, &spec, "transformers", ImportOptions::default()).unwrap_err().to_string();
    assert!(text.contains("linear_projections.0.proj.bias (a second one of its kind)"), "{text}");
    assert_eq!(doubled.shape.len(), 4);
}

#[test]
fn half_of_a_joined_tensor_is_missing_by_its_own_name() {
    let (path, mut tensors) = list("transformers-segformer-b0-legacy");
    tensors.remove("segformer.encoder.block.2.1.attention.self.value.weight").unwrap();
    let spec = ModelSpec::named("segformer-mit-b0", 19).unwrap();
    let mut file = WeightFile::listing(&path, tensors);
    let text = import(&mut file, &spec, "transformers", ImportOptions::default()).unwrap_err().to_string();
    let said =
        "missing     segformer.encoder.block.2.1.attention.self.value.weight (here encoder.block3.1.attn.kv.weight)";
    assert!(text.contains(said), "{text}");
}

#[test]
fn a_wrapper_before_every_name_is_taken_off() {
    let (path, tensors) = list("cirkd-deeplabv3-resnet18");
    let wrapped = tensors.iter().map(|(name, t)| (format!("module.{name}"), t.clone())).collect();
    let file = WeightFile::listing(&path, wrapped);
    let (spec, found) = spec_of(&file, "deeplabv3-resnet18-deep", "auto").unwrap();
    assert_eq!((found.name(), spec.n_classes), ("cirkd", 19));
    let expected = structure::of_network(&spec).unwrap();
    assert_whole(&file, Target::Network(&spec), "cirkd", &expected, 0);
    // Before some names it is none.
    let mut some: BTreeMap<_, _> = tensors;
    some.insert("module.x".into(), FileTensor { dtype: FileType::F32, shape: vec![] });
    let mut file = WeightFile::listing(&path, some);
    assert!(import(&mut file, &spec, "cirkd", ImportOptions::default()).unwrap_err().to_string().contains("module.x"));
}

/// A folder with a real file of a small network in smp's names, and its tensors here.
fn small(n_classes: usize) -> (tempfile::TempDir, PathBuf, ModelSpec, BTreeMap<String, Tensor>) {
    let spec = ModelSpec { layout: "smp".into(), ..ModelSpec::named("unet-resnet18", n_classes).unwrap() };
    let spec = ModelSpec { decoder_channels: 16, ..spec };
    let store = segdistill_ops::ParamStore::trainable(3, DType::F32, &Device::Cpu);
    crate::segmenter::build(&spec, &store).unwrap();
    let tensors = store.tensors();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    save(&path, &export(&tensors, &BTreeMap::new(), &spec, "smp").unwrap().tensors).unwrap();
    (folder, path, spec, tensors)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn weights_go_out_and_come_back_the_same() {
    let (_folder, path, spec, tensors) = small(4);
    let mut file = WeightFile::open(&path, None).unwrap();
    let (found, layout) = spec_of(&file, "unet-resnet18", "auto").unwrap();
    assert_eq!((found.n_classes, found.decoder_channels, layout.name()), (4, 16, "smp"));
    assert_eq!(found.layout, spec.layout);
    let imported = import(&mut file, &found, "auto", ImportOptions::default()).unwrap();
    assert_eq!(imported.tensors.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
    for (name, tensor) in &imported.tensors {
        assert_eq!(values(tensor), values(&tensors[name]), "{name}");
    }
    assert!(imported.left_out.iter().all(|l| l.name.ends_with("num_batches_tracked")));
    assert!(!imported.left_out.is_empty() && imported.dormant.is_empty() && imported.wrapper.is_empty());
}

#[test]
fn the_classifier_is_replaced_only_when_asked() {
    let (_folder, path, spec, tensors) = small(4);
    let mut file = WeightFile::open(&path, None).unwrap();
    let seven = ModelSpec { n_classes: 7, ..spec.clone() };
    let text = import(&mut file, &seven, "smp", ImportOptions::default()).unwrap_err().to_string();
    assert!(text.contains("2 of another shape") && text.contains("4 classes, the network 7"), "{text}");

    let asked = ImportOptions { new_classifier: Some(5) };
    let imported = import(&mut file, &seven, "smp", asked).unwrap();
    let replaced: Vec<&String> =
        imported.tensors.iter().filter(|(n, t)| t.dims() != tensors[*n].dims()).map(|(n, _)| n).collect();
    assert_eq!(replaced, ["decoder.classifier.bias", "decoder.classifier.weight"]);
    assert_eq!(imported.tensors["decoder.classifier.weight"].dims()[0], 7);
    let again = import(&mut file, &seven, "smp", asked).unwrap();
    let of = |i: &Imported| values(&i.tensors["decoder.classifier.weight"]);
    assert_eq!(of(&imported), of(&again), "a function of the seed");
    assert_ne!(
        of(&imported),
        of(&import(&mut file, &seven, "smp", ImportOptions { new_classifier: Some(6) }).unwrap())
    );
    assert_eq!(values(&imported.tensors["encoder.conv1.weight"]), values(&tensors["encoder.conv1.weight"]));

    // With the file's own number of classes there is nothing to replace.
    let same = import(&mut file, &spec, "smp", asked).unwrap();
    assert_eq!(values(&same.tensors["decoder.classifier.weight"]), values(&tensors["decoder.classifier.weight"]));
    // Another width is no matter of classes.
    let wide = ModelSpec { decoder_channels: 32, n_classes: 7, ..spec };
    assert!(
        import(&mut file, &wide, "smp", asked).unwrap_err().to_string().contains("decoder.blocks.0.conv1.0.weight")
    );
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let (_folder, path, spec, mut tensors) = small(4);
    let bad = tensors["encoder.bn1.weight"].affine(f64::NAN, 0.0).unwrap();
    tensors.insert("encoder.bn1.weight".into(), bad);
    save(&path, &export(&tensors, &BTreeMap::new(), &spec, "smp").unwrap().tensors).unwrap();
    let mut file = WeightFile::open(&path, None).unwrap();
    let text = import(&mut file, &spec, "smp", ImportOptions::default()).unwrap_err().to_string();
    assert!(text.contains("1 not finite") && text.contains("encoder.bn1.weight"), "{text}");
    assert!(text.contains("diverged"), "{text}");
}

#[test]
fn an_encoder_alone_goes_below_its_prefix() {
    let (_folder, path, _, tensors) = small(4);
    let bare: BTreeMap<String, Tensor> = tensors
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("encoder.")?.to_string(), t.clone())))
        .chain([("fc.weight".to_string(), Tensor::zeros((1000, 512), DType::F32, &Device::Cpu).unwrap())])
        .collect();
    save(&path, &bare).unwrap();
    let mut file = WeightFile::open(&path, None).unwrap();
    let imported = import_encoder(&mut file, "resnet18", EncoderOptions::default(), "auto").unwrap();
    assert_eq!(imported.left_out.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["fc.weight"]);
    for (name, tensor) in &imported.tensors {
        assert_eq!(values(tensor), values(&tensors[name]), "{name}");
    }
    // A network that stops after three stages takes those, and says what it left.
    let cut = EncoderOptions { depth: 3, ..EncoderOptions::default() };
    let imported = import_encoder(&mut file, "resnet18", cut, "torchvision").unwrap();
    assert_eq!(imported.left_out.len(), 51);
    assert!(imported.tensors.keys().all(|name| !name.starts_with("encoder.layer3")));
    let text = import_encoder(&mut file, "resnet34", EncoderOptions::default(), "auto").unwrap_err().to_string();
    assert!(text.contains("resnet34") && text.contains("missing"), "{text}");
}

#[test]
fn a_layout_says_what_it_has_names_for() {
    let text = layout("keras").unwrap_err().to_string();
    assert!(text.contains("unknown layout `keras`, known: torchvision, timm, smp, transformers, cirkd"), "{text}");
    let text = layout("timm").unwrap().of_encoder("mit-b0").unwrap_err().to_string();
    assert!(text.contains("`timm`") && text.contains("mit-b0") && text.contains("resnet18"), "{text}");
    let paper = ModelSpec::named("deeplabv3plus-resnet34", 4).unwrap();
    let text = export(&BTreeMap::new(), &BTreeMap::new(), &paper, "smp").unwrap_err().to_string();
    assert!(text.contains("structure `smp`, this one is `paper`") && text.contains("hint: "), "{text}");
    let narrow = ModelSpec { width: 0.5, layout: "smp".into(), ..paper };
    let text = export(&BTreeMap::new(), &BTreeMap::new(), &narrow, "smp").unwrap_err().to_string();
    assert!(text.contains("width 0.5"), "{text}");
    for layout in layouts() {
        for name in layout.networks() {
            assert!(!name.is_empty() && !layout.about().is_empty());
        }
    }
}

#[test]
fn a_library_s_name_of_an_encoder_is_understood() {
    for (given, ours) in [
        ("unet-resnet18", "unet-resnet18"),
        ("deeplabv3plus-tu-xception65", "deeplabv3plus-xception65"),
        ("segformer-mit_b3", "segformer-mit-b3"),
        ("mobilenet_v2", "mobilenetv2"),
        ("vgg16_bn", "vgg16-bn"),
        ("resnet18-deep", "resnet18-deep"),
        ("unet-nothing", "unet-nothing"),
        ("nothing", "nothing"),
    ] {
        assert_eq!(our_name(given), ours);
    }
}

#[test]
fn every_table_names_networks_and_encoders_that_exist() {
    for layout in layouts() {
        for name in layout.networks() {
            match name.split_once('-').filter(|(network, _)| crate::decoders::names().contains(network)) {
                Some((network, encoder)) => {
                    let spec = layout.spec(network, encoder, 3).unwrap();
                    // Some decoders cannot stand on some encoders; the catalogue leaves those out, too.
                    if spec.validate().is_ok() && crate::segmenter::info(&spec).is_ok() {
                        layout.of_network(&spec).unwrap();
                    }
                }
                None => {
                    layout.of_encoder(&name).unwrap();
                    structure::of_encoder(&name, EncoderOptions::default()).unwrap();
                }
            }
        }
    }
}

#[test]
fn kinds_of_filled_tensors_keep_variances_positive() {
    let spec = ModelSpec { layout: "smp".into(), ..ModelSpec::named("pspnet-resnet18", 3).unwrap() };
    let zero = |(n, s): (&String, &structure::Slot)| (n.clone(), zeros(&s.shape));
    let tensors = structure::of_network(&spec).unwrap().iter().map(zero).collect();
    let exported = export(&tensors, &BTreeMap::new(), &spec, "smp").unwrap().tensors;
    assert_eq!(values(&exported["encoder.layer4.0.bn1.running_var"])[0], 1.0);
    assert_eq!(values(&exported["encoder.layer4.0.bn1.weight"])[0], 1.0);
    assert_eq!(values(&exported["encoder.layer4.0.conv1.weight"])[0], 0.0);
    assert_eq!(structure::of_network(&spec).unwrap()["encoder.bn1.weight"].kind, ParamKind::Norm);
}
