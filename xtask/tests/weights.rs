//! Weights in and out through the binary: what was imported runs, what is exported is what came in, and a refusal writes
//! nothing.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use common::{good, refused, text, xtask};
use segdistill_models::weights::{export, read, save};
use segdistill_models::{Frozen, ModelSpec, build};
use segdistill_ops::{ParamStore, resize_bilinear};
use serde_json::Value;

/// The smallest published network, with random weights: SegFormer-B0.
fn segformer(n_classes: usize, seed: u64) -> (ModelSpec, BTreeMap<String, Tensor>) {
    let spec = ModelSpec::named("segformer-mit-b0", n_classes).unwrap();
    let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
    build(&spec, &store).unwrap();
    (spec, store.tensors())
}

/// A folder with that network in smp's names.
struct World {
    folder: tempfile::TempDir,
    spec: ModelSpec,
    tensors: BTreeMap<String, Tensor>,
}

impl World {
    fn new(n_classes: usize) -> Self {
        let (spec, tensors) = segformer(n_classes, 1);
        let folder = tempfile::tempdir().unwrap();
        let theirs = export(&tensors, &BTreeMap::new(), &spec, "smp").unwrap();
        save(folder.path().join("smp.safetensors"), &theirs.tensors).unwrap();
        Self { folder, spec, tensors }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    fn entries(&self) -> usize {
        fs_err::read_dir(self.folder.path()).unwrap().count()
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn what_is_imported_runs_as_the_library_and_goes_back_unchanged() {
    let world = World::new(5);
    let (file, imported, exported) = (world.text("smp.safetensors"), world.text("in"), world.text("out"));
    let inspected: Value =
        serde_json::from_str(&good(&["weights", "inspect", &file, "--model", "segformer-mit-b0", "--json"])).unwrap();
    assert_eq!(inspected["format"], "safetensors");
    let fits = &inspected["fits"];
    assert_eq!((&fits["smp"]["summary"], &fits["smp"]["fits"]), (&"fits, 5 classes".into(), &true.into()));
    assert!(fits["transformers"]["summary"].as_str().unwrap().contains("missing"));
    let missing = fits["transformers"]["misfit"]["missing"].as_array().unwrap();
    assert!(missing.len() > 100, "{missing:?}");
    assert_eq!(inspected["tensors"]["encoder.norm4.weight"]["shape"], serde_json::json!([256]));

    let report = good(&["weights", "import", &file, "--model", "segformer-mit-b0", "--out", &imported, "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["layout"], &report["classes"]), (&"smp".into(), &5.into()));
    assert_eq!(report["assumed"], serde_json::json!({ "activation": null, "upsampling": 4 }));
    let config = json(&world.path("in/config.json"));
    assert_eq!((&config["role"], &config["align_corners"]), (&"imported".into(), &true.into()));
    assert!(config["val_miou"].is_null() && !config["origin"].as_str().unwrap().contains('/'), "{config}");
    assert!(fs_err::read_to_string(world.path("in/README.md")).unwrap().contains("segformer"));

    let images = Tensor::from_vec(
        (0..2 * 3 * 64 * 96).map(|i| (i % 31) as f32 / 9.0 - 1.7).collect(),
        (2, 3, 64, 96),
        &Device::Cpu,
    );
    let images = images.unwrap();
    save(world.path("images.safetensors"), &BTreeMap::from([("images_nchw".to_string(), images.clone())])).unwrap();
    let (tensor, logits) = (world.text("images.safetensors"), world.text("logits.safetensors"));
    good(&["predict", "--model", &imported, "--tensor", &tensor, "--save-logits", &logits]);
    let found = read(&logits, &Device::Cpu).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), ["logits_nchw"]);
    let frozen = Frozen::new(&world.spec, world.tensors.clone(), DType::F32, &Device::Cpu).unwrap();
    let grid = frozen.forward_normalised(&images).unwrap().logits_nchw;
    assert_eq!(grid.dims(), [2, 5, 16, 24]);
    let expected = resize_bilinear(&grid, [64, 96], true).unwrap();
    let largest = values(&expected).iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in values(&found["logits_nchw"]).iter().zip(values(&expected)) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} {b}");
    }

    good(&["weights", "export", &imported, "--layout", "smp", "--out", &exported]);
    let (before, after) =
        (read(&file, &Device::Cpu).unwrap(), read(world.path("out/model.safetensors"), &Device::Cpu).unwrap());
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, tensor) in before.iter().filter(|(_, t)| t.dtype() == DType::F32) {
        assert_eq!((tensor.dims(), values(tensor)), (after[name].dims(), values(&after[name])), "{name}");
    }
    let config = json(&world.path("out/config.json"));
    assert_eq!((&config["_model_class"], &config["encoder_name"]), (&"Segformer".into(), &"mit_b0".into()));
    assert_eq!((&config["classes"], &config["decoder_segmentation_channels"]), (&5.into(), &256.into()));
    let card = fs_err::read_to_string(world.path("out/README.md")).unwrap();
    assert!(
        card.starts_with("---\nlibrary_name: segmentation-models-pytorch\n") && card.contains("strict=True"),
        "{card}"
    );

    // In the names of another library, from there back, and the same network again.
    let (other, back) = (world.text("hf"), world.text("back"));
    good(&["weights", "export", &imported, "--layout", "transformers", "--out", &other]);
    let hf = world.text("hf/model.safetensors");
    good(&["weights", "import", &hf, "--model", "segformer-mit-b0", "--out", &back]);
    let again = read(world.path("back/model.safetensors"), &Device::Cpu).unwrap();
    for (name, tensor) in &world.tensors {
        assert_eq!(values(tensor), values(&again[name]), "{name}");
    }
    // Their logits are enlarged by pixel centres.
    assert!(json(&world.path("back/config.json"))["align_corners"].is_null());
    let images = ["predict", "--model", &back, "--tensor", &tensor, "--save-logits", &logits];
    good(&images);
    let centres = resize_bilinear(&grid, [64, 96], false).unwrap();
    let found = read(&logits, &Device::Cpu).unwrap();
    for (a, b) in values(&found["logits_nchw"]).iter().zip(values(&centres)) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} {b}");
    }
}

#[test]
fn hostile_and_unfit_files_write_nothing_and_say_why() {
    let world = World::new(5);
    let (good_file, out) = (world.text("smp.safetensors"), world.text("never"));
    let whole = fs_err::read(&good_file).unwrap();
    let overlap = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#;
    let overlap = [&(overlap.len() as u64).to_le_bytes()[..], overlap.as_bytes(), &[0; 24]].concat();
    let zip = [b"PK\x03\x04".to_vec(), vec![0; 26], b"PK\x05\x06".to_vec(), vec![0; 18]].concat();
    for (name, bytes) in [
        ("cut.safetensors", &whole[..whole.len() / 3]),
        ("overlap.safetensors", &overlap),
        ("zip.safetensors", &zip),
        ("zip.pth", &zip),
        ("cut.pth", &zip[..20]),
    ] {
        fs_err::write(world.path(name), bytes).unwrap();
    }
    let before = world.entries();
    let import = |file: &str, model: &str| -> Vec<String> {
        ["weights", "import", file, "--model", model, "--out", &out].map(str::to_string).to_vec()
    };
    for (file, said) in [
        ("cut.safetensors", vec!["cut.safetensors", "bytes"]),
        ("overlap.safetensors", vec!["`b`", "overlap"]),
        ("zip.safetensors", vec!["byte 0", "zip archive"]),
        ("zip.pth", vec!["zip directory"]),
        ("cut.pth", vec!["cut short"]),
    ] {
        let args = import(&world.text(file), "segformer-mit-b0");
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let started = Instant::now();
        refused(&args, 2, &said);
        assert!(started.elapsed() < Duration::from_secs(2), "{file}: {:?}", started.elapsed());
        refused(&["weights", "inspect", &world.text(file)], 2, &said);
    }
    let unfit = |more: &[&str], model: &str, said: &[&str]| {
        let args = import(&good_file, model);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        refused(&args, 2, said);
    };
    unfit(&[], "segformer-mit-b1", &["does not fit", "of another shape", "hint: "]);
    unfit(&[], "unet-resnet18", &["found none that fits", "smp: ", "missing", "--layout"]);
    unfit(&["--layout", "smp"], "unet-resnet18", &["missing", "encoder.layer4.1.bn2.running_var", "hint: "]);
    unfit(&["--output-stride", "8"], "segformer-mit-b0", &["--output-stride 8 is not used", "always has 32"]);
    unfit(&["--prefix", "student."], "segformer-mit-b0", &["no name begins with `student.`"]);
    unfit(&[], "resnet19", &["segformer", "encoders: resnet18", "the nearest is `resnet18`"]);
    let settings = world.path("config.json");
    fs_err::write(&settings, r#"{"_model_class": "Segformer", "upsampling": 8, "in_channels": 3}"#).unwrap();
    unfit(&[], "segformer-mit-b0", &["config.json", "upsampling: found 8, expected 4", "hint: "]);
    fs_err::remove_file(settings).unwrap();
    unfit(&["--layout", "keras"], "segformer-mit-b0", &["unknown layout `keras`", "transformers"]);
    unfit(&["--layout", "timm"], "segformer-mit-b0", &["layout"]);
    unfit(&["--classes", "7"], "segformer-mit-b0", &["5 classes, the network 7"]);
    unfit(&["--dataset", "camvid"], "segformer-mit-b0", &["camvid has 11 classes, the weights 5"]);
    unfit(&["--key", "model"], "segformer-mit-b0", &["--key"]);
    unfit(&[], "segformer-mit-b9", &["`mit-b9`", "mit-b0"]);
    refused(&["weights", "import", "no/such.pth", "--model", "segformer-mit-b0", "--out", &out], 4, &["no/such.pth"]);
    assert_eq!(world.entries(), before, "something was written");

    // A classifier for other classes is drawn only when asked, and then from its seed.
    good(&[
        "weights",
        "import",
        &good_file,
        "--model",
        "segformer-mit-b0",
        "--classes",
        "7",
        "--new-classifier",
        "3",
        "--out",
        &out,
    ]);
    let replaced = read(world.path("never/model.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(replaced["decoder.classifier.weight"].dims(), [7, 256, 1, 1]);
    assert!(json(&world.path("never/config.json"))["origin"].as_str().unwrap().contains("drawn anew"));
    refused(&["weights", "import", &good_file, "--model", "segformer-mit-b0", "--out", &out], 2, &["is there already"]);
    refused(&["weights", "export", &out, "--layout", "torchvision", "--out", &world.text("x")], 2, &["no names for"]);
    refused(
        &["weights", "export", &world.text("nothing"), "--layout", "smp", "--out", &world.text("x")],
        4,
        &["nothing"],
    );
    let tensor = ["predict", "--model", &out, "--tensor", &good_file, "--save-logits", &world.text("l.safetensors")];
    refused(&tensor, 2, &["images_nchw"]);
    for (name, side, value, said) in [("small", 16, 0.5f32, "32"), ("nan", 32, f32::NAN, "NaN or infinity")] {
        let images = Tensor::full(value, (1, 3, side, side), &Device::Cpu).unwrap();
        let file = world.path(&format!("{name}.safetensors"));
        save(&file, &BTreeMap::from([("images_nchw".to_string(), images)])).unwrap();
        let (file, logits) = (file.to_str().unwrap(), world.text("l.safetensors"));
        refused(&["predict", "--model", &out, "--tensor", file, "--save-logits", &logits], 2, &[said]);
    }
    assert!(!world.path("x").exists() && !world.path("l.safetensors").exists());
}

#[test]
fn an_encoder_alone_goes_in_and_out_and_is_no_network() {
    let world = World::new(5);
    let encoder: BTreeMap<String, Tensor> = world
        .tensors
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("encoder.")?.to_string(), t.clone())))
        .collect();
    let (file, folder, out) = (world.text("encoder.safetensors"), world.text("encoder"), world.text("exported"));
    save(&file, &encoder).unwrap();
    good(&["weights", "import", &file, "--model", "mit-b0", "--out", &folder]);
    good(&["weights", "export", &folder, "--layout", "smp", "--out", &out]);
    let exported = read(world.path("exported/model.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(exported.keys().collect::<Vec<_>>(), encoder.keys().collect::<Vec<_>>());
    for (name, tensor) in &exported {
        assert_eq!(values(tensor), values(&encoder[name]), "{name}");
    }
    refused(&["weights", "export", &folder, "--layout", "timm", "--out", &world.text("x")], 2, &["`mit-b0`"]);
    let tensor = ["predict", "--model", &folder, "--tensor", &file, "--save-logits", &world.text("l.safetensors")];
    refused(&tensor, 2, &["encoder alone", "student.encoder_weights"]);
}

/// A CamVid of two images in val.
fn camvid(root: &Path) {
    let mut list = String::new();
    for (name, value) in [("a", 1u8), ("b", 3)] {
        for (folder, channels) in [("val", 3), ("valannot", 1)] {
            fs_err::create_dir_all(root.join(folder)).unwrap();
            let file = fs_err::File::create(root.join(folder).join(format!("{name}.png"))).unwrap();
            let mut encoder = png::Encoder::new(file, 48, 32);
            encoder.set_color(if channels == 3 { png::ColorType::Rgb } else { png::ColorType::Grayscale });
            encoder.set_depth(png::BitDepth::Eight);
            encoder.write_header().unwrap().write_image_data(&vec![value; 48 * 32 * channels]).unwrap();
        }
        list += &format!("val/{name}.png valannot/{name}.png\n");
    }
    fs_err::write(root.join("val.txt"), list).unwrap();
}

#[test]
fn a_stated_miou_is_verified_with_its_exit_code() {
    let world = World::new(11);
    camvid(&world.path("camvid"));
    let (file, model, root) = (world.text("smp.safetensors"), world.text("in"), world.text("camvid"));
    good(&[
        "weights",
        "import",
        &file,
        "--model",
        "segformer-mit-b0",
        "--dataset",
        "camvid",
        "--input-size",
        "32x64",
        "--stated-miou",
        "1.0",
        "--out",
        &model,
    ]);
    let verify = |more: &[&str]| {
        let args = ["weights", "verify", model.as_str(), "--data-root", root.as_str(), "--device", "cpu", "--json"];
        xtask(&[&args[..], more].concat())
    };
    let out = verify(&[]);
    assert_eq!(out.status.code(), Some(5), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("from the stated 1.0000"), "{}", text(&out.stderr));
    let report: Value = serde_json::from_str(&text(&out.stdout)).unwrap();
    assert_eq!(
        (&report["within"], &report["n_images"], &report["dataset"]),
        (&false.into(), &2.into(), &"camvid".into())
    );
    let miou = report["miou"].as_f64().unwrap();
    assert!((0.0..=0.5).contains(&miou), "{miou}");
    let out = verify(&["--miou", &miou.to_string(), "--tolerance", "0.0001"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    refused(&["weights", "verify", &model, "--data-root", &root, "--miou", "70"], 2, &["fractions"]);
    refused(&["weights", "verify", &model, "--data-root", &root, "--split", "test"], 2, &["states no mIoU on test"]);
    refused(&["weights", "verify", &model, "--data-root", &world.text("absent")], 4, &["absent"]);
}

/// Settings of a stage that takes seconds.
fn tiny(out: &str, stage: &str, more: &[&str]) -> Output {
    let mut args = vec!["train", "--stage", stage, "--out", out, "--seeds", "0", "--json"];
    for set in [
        "data.height=32",
        "data.width=48",
        "data.train=4",
        "data.val=3",
        "data.test=2",
        "teacher.steps=2",
        "student.model=segformer-mit-b0",
        "student.width=1.0",
        "student.decoder_channels=256",
        "student.dropout=0.0",
        "train.steps=2",
        "train.batch_size=2",
        "train.eval_every=2",
        "optim.warmup_steps=0",
        "optim.lr=1e-12",
        "optim.weight_decay=0.0",
        "input.size=[32,48]",
        "input.crop=[32,48]",
    ] {
        args.extend(["--set", set]);
    }
    args.extend(more);
    xtask(&args)
}

#[test]
fn a_recipe_starts_from_given_weights() {
    let world = World::new(11);
    let file = world.text("smp.safetensors");
    let run = |name: &str, setting: &str| {
        let out = tiny(&world.text(name), "ce", &["--set", setting]);
        assert!(out.status.success(), "{}", text(&out.stderr));
        read(world.path(name).join("ce/seed-0/final/model.safetensors"), &Device::Cpu).unwrap()
    };
    // A step of 1e-12 moves nothing that f32 shows: what is written is what it started from.
    let near = |a: &Tensor, b: &Tensor| values(a).iter().zip(values(b)).all(|(a, b)| (a - b).abs() < 1e-6);
    let (inside, head) = ("encoder.block2.1.mlp.fc1.weight", "decoder.fuse_stage.0.weight");
    let started = run("whole", &format!("student.weights={file}"));
    assert!(near(&started[inside], &world.tensors[inside]) && near(&started[head], &world.tensors[head]));

    let bare: BTreeMap<String, Tensor> = world
        .tensors
        .iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("encoder.")?.to_string(), t.force_contiguous().unwrap())))
        .collect();
    save(world.path("mit.safetensors"), &bare).unwrap();
    let started = run("encoder", &format!("student.encoder_weights={}", world.text("mit.safetensors")));
    assert!(near(&started[inside], &world.tensors[inside]) && !near(&started[head], &world.tensors[head]));
    let config = json(&world.path("encoder/ce/seed-0/final/config.json"));
    assert!(config["origin"].as_str().unwrap().starts_with("trained from encoder"), "{config}");

    // An encoder imported first is the same start.
    let folder = world.text("imported-encoder");
    good(&["weights", "import", &world.text("mit.safetensors"), "--model", "mit-b0", "--out", &folder]);
    let again = run("again", &format!("student.encoder_weights={folder}"));
    assert_eq!(values(&again[inside]), values(&started[inside]));

    let wrong = tiny(&world.text("wrong"), "ce", &["--set", &format!("student.encoder_weights={file}")]);
    let message = text(&wrong.stderr);
    // A whole network's file holds the encoder under its own names: those are taken.
    assert!(wrong.status.success(), "{message}");
    let unfit = tiny(
        &world.text("unfit"),
        "ce",
        &["--set", "student.model=segformer-mit-b1", "--set", &format!("student.weights={file}")],
    );
    assert_eq!(unfit.status.code(), Some(2), "{}", text(&unfit.stderr));
    assert!(text(&unfit.stderr).contains("do not fit segformer on mit-b1"), "{}", text(&unfit.stderr));
    assert!(!world.path("unfit").exists(), "nothing was written");
}
