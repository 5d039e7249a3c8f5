//! Cityscapes through the binary: a tree of few pictures is checked, counted and shown; what a network predicts is scored
//! as label ids, from one flat folder or from city folders.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device};
use common::{good, refused, text, xtask};
use segdistill_data::preview::{read_image, read_labels, write_label_png, write_png};
use segdistill_data::{LabelMap, RgbImage};
use segdistill_models::weights::{export, save};
use segdistill_models::{ModelSpec, build};
use segdistill_ops::ParamStore;
use serde_json::Value;

const TRAIN: [&str; 2] = ["aachen_000000_000019", "zurich_000000_000019"];
const VAL: [&str; 2] = ["frankfurt_000000_000294", "munster_000000_000019"];
const TEST: [&str; 1] = ["berlin_000000_000019"];

/// A file of the tree: `kind` is its first folder and its ending.
fn place(root: &Path, split: &str, name: &str, [top, ending]: [&str; 2]) -> PathBuf {
    let city = root.join(top).join(split).join(name.split('_').next().unwrap());
    fs_err::create_dir_all(&city).unwrap();
    city.join(format!("{name}{ending}"))
}

const IMAGE: [&str; 2] = ["leftImg8bit", "_leftImg8bit.png"];
const LABEL: [&str; 2] = ["gtFine", "_gtFine_labelIds.png"];

/// A tree of two cities in train and val and one in test, pictures of `hw`.
fn tree([height, width]: [usize; 2]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (split, names) in [("train", &TRAIN[..]), ("val", &VAL), ("test", &TEST)] {
        for (k, name) in names.iter().enumerate() {
            let tone = |i: usize| (i / 3 % width * 255 / width + 40 * k) as u8;
            let rgb = (0..height * width * 3).map(tone).collect();
            write_png(&place(dir.path(), split, name, IMAGE), &RgbImage { height, width, rgb }).unwrap();
            let label = |i: usize| if split == "test" { 1 } else { i % width * 34 / width };
            let ids = (0..height * width).map(|i| label(i) as u8).collect();
            write_label_png(&place(dir.path(), split, name, LABEL), &LabelMap { height, width, ids }).unwrap();
            // The archives hold these too.
            for other in ["_gtFine_instanceIds.png", "_gtFine_color.png", "_gtFine_polygons.json"] {
                fs_err::write(place(dir.path(), split, name, ["gtFine", other]), "not looked at").unwrap();
            }
        }
    }
    dir
}

#[test]
fn a_tree_is_checked_counted_and_shown() {
    let dir = tree([1024, 2048]);
    let root = dir.path().to_str().unwrap();
    let of = ["--dataset", "cityscapes", "--data-root", root];
    let out = xtask(&[&["data", "check"], &of[..]].concat());
    // Nothing is wrong with it but that it is small.
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    assert_eq!(said.matches("as published").count(), 3, "{said}");
    assert_eq!(said.matches("hint: ").count(), 3, "{said}");
    assert!(text(&out.stderr).contains("3 problems"), "{}", text(&out.stderr));
    let out = xtask(&[&["data", "check", "--json"], &of[..]].concat());
    let report: Value = serde_json::from_str(&text(&out.stdout)).unwrap();
    let figures = |key: &str| (0..3).map(|k| report["splits"][k][key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(figures("n_images"), [2, 2, 1]);
    assert_eq!(figures("n_published"), [2975, 500, 1525]);
    assert_eq!(figures("n_unlabelled"), [0, 0, 1]);

    let stats = good(&[&["data", "stats", "--json"], &of[..]].concat());
    let stats: Value = serde_json::from_str(&stats).unwrap();
    let train = &stats["splits"][0];
    assert_eq!((&train["n_images"], &train["n_pixels"]), (&2.into(), &(2 * 1024 * 2048).into()));
    assert_eq!((&train["classes"][0]["name"], &train["classes"][18]["name"]), (&"road".into(), &"bicycle".into()));
    // A column belongs to the label id `column * 34 / 2048`: 60 or 61 columns each.
    let columns = |id: usize| (0..2048).filter(|c| c * 34 / 2048 == id).count();
    assert_eq!(train["classes"][13]["pixels"], serde_json::json!(2 * 1024 * columns(26)));
    assert_eq!(stats["splits"][2]["void_pixels"], serde_json::json!(1024 * 2048));
    let said = good(&[&["data", "stats", "--splits", "test"], &of[..]].concat());
    assert!(said.contains("no pixel belongs to a class"), "{said}");

    let sheet = dir.path().join("sheet.png");
    let to_sheet = ["--count", "1", "--out", sheet.to_str().unwrap()];
    let said = good(&[&["data", "preview", "--splits", "train"], &to_sheet[..], &of[..]].concat());
    assert!(said.contains("aachen_000000_000019 of cityscapes") && said.contains("shrunk to 640x320"), "{said}");
    let sheet = read_image(&sheet).unwrap();
    assert!(sheet.height > 320 && sheet.height < 340 && sheet.width > 3 * 640, "{:?}", sheet.hw());
}

/// Predictions of val as `score` maps the label ids, each under the name that `name` gives it.
fn predictions(root: &Path, name: impl Fn(&str) -> String, score: impl Fn(u8) -> u8) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for sample in VAL {
        let mut map = read_labels(&place(root, "val", sample, LABEL)).unwrap();
        map.ids.iter_mut().for_each(|id| *id = score(*id));
        let path = dir.path().join(name(sample));
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        write_label_png(&path, &map).unwrap();
    }
    dir
}

/// Train id of a label id; 255 for void.
fn train_id(label: u8) -> u8 {
    const LABELS: [u8; 19] = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33];
    LABELS.iter().position(|l| *l == label).map_or(255, |id| id as u8)
}

#[test]
fn predictions_are_label_ids_matched_by_city_sequence_and_frame() {
    let data = tree([4, 68]);
    let labels = data.path().join("gtFine/val");
    let args = |folder: &Path, more: &[&str]| -> Vec<String> {
        let (folder, labels) = (folder.to_str().unwrap(), labels.to_str().unwrap());
        let fixed = ["eval", "--predictions", folder, "--labels", labels, "--dataset", "cityscapes", "--json"];
        fixed.iter().chain(more).map(ToString::to_string).collect()
    };
    let run = |folder: &Path, more: &[&str]| {
        let args = args(folder, more);
        xtask(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let miou = |out: &Output| {
        assert!(out.status.success(), "{}", text(&out.stderr));
        let summary: Value = serde_json::from_str(&text(&out.stdout)).unwrap();
        assert_eq!(summary["scores"]["n_classes_present"], 19);
        summary["scores"]["miou"].as_f64().unwrap()
    };
    let names: [fn(&str) -> String; 4] = [
        |s| format!("{s}.png"),
        |s| format!("{s}_leftImg8bit.png"),
        |s| format!("{}/{s}_gtFine_labelIds.png", s.split('_').next().unwrap()),
        |s| format!("{s}_pred_labelIds.png"),
    ];
    for name in names {
        let made = predictions(data.path(), name, |id| id);
        let out = run(made.path(), &[]);
        assert_eq!(miou(&out), 1.0);
        assert!(text(&out.stderr).is_empty(), "{}", text(&out.stderr));
    }
    // Void that is predicted on a pixel of a class is a miss; what is predicted on void counts nowhere.
    let made = predictions(data.path(), |s| format!("{s}.png"), |id| if id == 26 { 4 } else { id });
    assert!((miou(&run(made.path(), &[])) - 18.0 / 19.0).abs() < 1e-12);
    let made = predictions(data.path(), |s| format!("{s}.png"), |id| if train_id(id) == 255 { 26 } else { id });
    assert_eq!(miou(&run(made.path(), &[])), 1.0);

    // Train ids are scored as such when that is said, and noticed when it is not.
    let made = predictions(data.path(), |s| format!("{s}.png"), train_id);
    assert_eq!(miou(&run(made.path(), &["--train-ids"])), 1.0);
    let out = run(made.path(), &[]);
    assert!(miou(&out) < 0.1 && text(&out.stderr).contains("these look like train ids"), "{}", text(&out.stderr));
    let label_ids = predictions(data.path(), |s| format!("{s}.png"), |id| id);
    let out = run(label_ids.path(), &["--train-ids"]);
    assert_eq!(out.status.code(), Some(3), "label id 33 is no train id: {}", text(&out.stderr));

    // One prediction for each label image, no more and no less, and no value that means nothing.
    let code_and_text = |folder: &Path| {
        let out = run(folder, &[]);
        (out.status.code().unwrap(), text(&out.stderr))
    };
    let one = label_ids.path().join(format!("{}.png", VAL[0]));
    fs_err::copy(&one, label_ids.path().join(format!("{}_again.png", VAL[0]))).unwrap();
    let (code, said) = code_and_text(label_ids.path());
    assert!(code == 3 && said.contains("are both predictions of `frankfurt_000000_000294`"), "{said}");
    fs_err::remove_file(label_ids.path().join(format!("{}_again.png", VAL[0]))).unwrap();
    fs_err::copy(&one, label_ids.path().join("paris_000000_000019.png")).unwrap();
    let (code, said) = code_and_text(label_ids.path());
    assert!(code == 3 && said.contains("paris_000000_000019.png") && said.contains("has no label image"), "{said}");
    fs_err::remove_file(label_ids.path().join("paris_000000_000019.png")).unwrap();
    write_label_png(&one, &LabelMap::filled(4, 68, 40)).unwrap();
    let (code, said) = code_and_text(label_ids.path());
    assert!(code == 3 && said.contains("label 40 at row 0, column 0"), "{said}");
    fs_err::remove_file(&one).unwrap();
    let (code, said) = code_and_text(label_ids.path());
    assert!(
        code == 3 && said.contains("frankfurt_000000_000294_gtFine_labelIds.png") && said.contains("no prediction")
    );

    // Labels of test are void: nothing is scored rather than a mean of nothing.
    let test = data.path().join("gtFine/test");
    let made = tempfile::tempdir().unwrap();
    write_label_png(&made.path().join(format!("{}.png", TEST[0])), &LabelMap::filled(4, 68, 7)).unwrap();
    let [made, test] = [made.path(), &test].map(|p| p.to_str().unwrap());
    let said = ["no pixel of the label files", "nothing to score"];
    refused(&["eval", "--predictions", made, "--labels", test, "--dataset", "cityscapes"], 3, &said);
    let camvid = ["eval", "--predictions", made, "--labels", test, "--dataset", "camvid", "--train-ids"];
    refused(&camvid, 2, &["--train-ids changes nothing for camvid"]);
}

/// Against `fixtures/make_cityscapes.py`, which runs cityscapesScripts on the same label images.
#[test]
fn scores_are_those_of_the_official_evaluation() {
    let official: Value = serde_json::from_str(include_str!("fixtures/cityscapes.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (height, width) = (40, 64);
    for (k, city) in ["frankfurt", "munster"].iter().enumerate() {
        let label = |i: usize| (i * 7 + i / 11 + k * 3) % 30;
        let predicted = |i: usize| if (i * 13 + k) % 5 < 3 { label(i) } else { (i * 5 + i / 7 + k) % 33 };
        let map = |of: &dyn Fn(usize) -> usize| LabelMap {
            height,
            width,
            ids: (0..height * width).map(|i| of(i) as u8).collect(),
        };
        let name = format!("{city}_000000_000019");
        write_label_png(&place(dir.path(), "val", &name, LABEL), &map(&label)).unwrap();
        write_label_png(&place(dir.path(), "val", &name, ["made", ".png"]), &map(&predicted)).unwrap();
    }
    let [labels, made] = ["gtFine/val", "made/val"].map(|folder| dir.path().join(folder).to_str().unwrap().to_string());
    let ours = good(&["eval", "--predictions", &made, "--labels", &labels, "--dataset", "cityscapes", "--json"]);
    let ours: Value = serde_json::from_str(&ours).unwrap();
    assert_eq!(ours["class_names"].as_array().unwrap().len(), 19);
    for (name, iou) in ours["class_names"].as_array().unwrap().iter().zip(ours["scores"]["iou"].as_array().unwrap()) {
        assert_eq!(iou, &official["iou"][name.as_str().unwrap()], "{name}");
    }
    // Means of 18 numbers, which may be added in another order.
    let difference = ours["scores"]["miou"].as_f64().unwrap() - official["miou"].as_f64().unwrap();
    assert!(difference.abs() < 1e-14, "{difference}");
}

#[test]
fn what_a_network_predicts_scores_as_its_own_evaluation() {
    let data = tree([32, 68]);
    let root = data.path().to_str().unwrap();
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name).to_str().unwrap().to_string();
    let spec = ModelSpec::named("segformer-mit-b0", 19).unwrap();
    let store = ParamStore::trainable(1, DType::F32, &Device::Cpu);
    build(&spec, &store).unwrap();
    let theirs = export(&store.tensors(), &BTreeMap::new(), &spec, "smp").unwrap();
    save(work.path().join("smp.safetensors"), &theirs.tensors).unwrap();
    let (file, model, out) = (at("smp.safetensors"), at("model"), at("out"));
    let import = ["weights", "import", &file, "--model", "segformer-mit-b0", "--dataset", "cityscapes"];
    good(&[&import[..], &["--input-size", "32x64", "--out", &model]].concat());

    let verify = ["weights", "verify", &model, "--data-root", root, "--device", "cpu", "--json"];
    let verified = xtask(&[&verify[..], &["--miou", "0.5", "--tolerance", "1"]].concat());
    let verified: Value = serde_json::from_str(&text(&verified.stdout)).unwrap();
    assert_eq!((&verified["dataset"], &verified["n_images"]), (&"cityscapes".into(), &2.into()));
    refused(&[&verify[..], &["--split", "test", "--miou", "0.5"]].concat(), 2, &["test are withheld", "val"]);

    let [a, b] = ["frankfurt", "munster"].map(|city| format!("{root}/leftImg8bit/val/{city}"));
    good(&["predict", "--model", &model, "--out", &out, "--device", "cpu", &a, &b]);
    let labels = format!("{root}/gtFine/val");
    // Overlays lie beside the label images and are passed over.
    assert!(work.path().join("out/munster_000000_000019_leftImg8bit_overlay.png").is_file());
    let scored = good(&["eval", "--predictions", &out, "--labels", &labels, "--dataset", "cityscapes", "--json"]);
    let scored: Value = serde_json::from_str(&scored).unwrap();
    assert_eq!(scored["scores"]["miou"], verified["miou"]);
    assert!(scored["scores"]["miou"].as_f64().is_some_and(f64::is_finite));
    let made = read_labels(&work.path().join("out/munster_000000_000019_leftImg8bit.png")).unwrap();
    assert!(made.ids.iter().all(|label| train_id(*label) != 255), "label ids of classes");
}

#[test]
fn a_dry_run_fetches_nothing_and_says_what_a_run_would() {
    let data = tree([4, 8]);
    let work = tempfile::tempdir().unwrap();
    let root = data.path().to_str().unwrap();
    let mut args = vec!["reproduce", "--recipe", "cityscapes", "--data-root", root, "--dry-run", "--device", "cpu"];
    for set in [
        "teacher.model=deeplabv3plus-resnet18",
        "teacher.width=0.125",
        "student.model=deeplabv3plus-resnet18",
        "student.width=0.125",
        "input.size=[64,128]",
        "input.crop=[32,64]",
    ] {
        args.extend(["--set", set]);
    }
    let out = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(&args)
        .current_dir(work.path())
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", work.path().join("no-cache"))
        .output()
        .unwrap();
    let said = text(&out.stdout);
    assert!(out.status.success(), "{said}{}", text(&out.stderr));
    for word in
        ["dataset = \"cityscapes\"", "`timm/xception65.tf_in1k`", "`timm/resnet34`", "a dry run fetches nothing"]
    {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(fs_err::read_dir(work.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn a_run_scores_train_and_val_and_says_why_not_test() {
    let data = tree([64, 128]);
    let work = tempfile::tempdir().unwrap();
    let (root, run) = (data.path().to_str().unwrap(), work.path().join("run"));
    let at = |name: &str| run.join(name).to_str().unwrap().to_string();
    let out = at("");
    let mut args = vec!["reproduce", "--recipe", "cityscapes", "--data-root", root, "--device", "cpu", "--out", &out];
    args.extend(["--seeds", "0", "--methods", "ce"]);
    for set in [
        "teacher.model=deeplabv3plus-resnet18",
        "teacher.width=0.125",
        "teacher.encoder_weights=",
        "student.model=deeplabv3plus-resnet18",
        "student.width=0.125",
        "student.encoder_weights=",
        "train.steps=2",
        "train.batch_size=2",
        "train.eval_every=2",
        "input.size=[64,128]",
        "input.crop=[64,64]",
        "input.workers=1",
    ] {
        args.extend(["--set", set]);
    }
    good(&args);
    for (split, scored) in [("train", true), ("val", true), ("test", false)] {
        assert_eq!(run.join(format!("teacher/eval/{split}/summary.json")).is_file(), scored, "{split}");
    }
    let report = fs_err::read_to_string(run.join("report/report.md")).unwrap();
    assert!(report.contains("Labels of test are withheld by the publishers"), "{report}");
    let teacher = at("teacher");
    refused(&["eval", "--model", &teacher, "--split", "test"], 2, &["labels of split test are withheld", "val"]);
    good(&["eval", "--model", &teacher, "--split", "val", "--device", "cpu"]);
}
