//! The program from outside: exit codes, what is said on stdout and stderr, and that nothing is written on a refusal.
//!
//! Real CamVid is checked where it lies (`SEGDISTILL_DATA_DIR`, by default `../shared` beside the checkout).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What a run of the program left.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs the program in `folder`, without the caller's data folder.
fn xtask(folder: &Path, args: &[&str]) -> Run {
    let out = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .current_dir(folder)
        .env_remove("SEGDISTILL_DATA_DIR")
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    Run {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// As [`xtask`], in an empty folder that must still be empty afterwards.
fn xtask_writing_nothing(args: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let run = xtask(folder.path(), args);
    let left: Vec<_> = fs_err::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{args:?} left {left:?}");
    run
}

#[track_caller]
fn assert_refused(args: &[&str], code: i32, said: &[&str]) {
    let run = xtask_writing_nothing(args);
    assert_eq!(run.code, code, "{args:?}: {}{}", run.stdout, run.stderr);
    for word in said {
        assert!(run.stderr.contains(word), "{args:?} does not say `{word}`: {}", run.stderr);
    }
    assert!(run.stdout.is_empty(), "{args:?} printed results: {}", run.stdout);
}

#[test]
fn help_names_every_command_with_examples() {
    let help = xtask_writing_nothing(&["--help"]);
    assert_eq!(help.code, 0);
    for word in [
        "reproduce",
        "train",
        "eval",
        "predict",
        "report",
        "data",
        "models",
        "weights",
        "bench",
        "tidy",
        "ci",
        "Examples:",
    ] {
        assert!(help.stdout.contains(word), "{word}");
    }
    let commands: [&[&str]; 11] = [
        &["reproduce"],
        &["train"],
        &["eval"],
        &["predict"],
        &["report"],
        &["data", "check"],
        &["data", "stats"],
        &["data", "preview"],
        &["models", "list"],
        &["models", "describe"],
        &["bench"],
    ];
    for command in commands {
        let help = xtask_writing_nothing(&[command, &["--help"]].concat());
        assert_eq!(help.code, 0, "{command:?}");
        let example = format!("  cargo xtask {}", command.join(" "));
        assert!(help.stdout.contains("Example") && help.stdout.contains(&example), "{command:?}: {}", help.stdout);
    }
}

#[test]
fn an_unknown_recipe_lists_the_known_ones() {
    assert_refused(&["reproduce", "--recipe", "nosuch"], 2, &["nosuch", "toy", "camvid", "camvid-quick"]);
}

#[test]
fn an_unknown_key_names_the_nearest() {
    let run = xtask_writing_nothing(&["reproduce", "--set", "optim.lrr=1"]);
    assert_eq!(run.code, 2, "{}", run.stderr);
    assert!(run.stderr.contains("optim.lrr"), "{}", run.stderr);
    // The key that was meant, apart from the key as written.
    assert!(run.stderr.replace("optim.lrr", "").contains("optim.lr"), "{}", run.stderr);
}

#[test]
fn usage_errors_exit_with_2() {
    assert_refused(&["no-such-command"], 2, &["no-such-command"]);
    assert_refused(&["models", "list", "--size", "512"], 2, &["`512`", "HxW"]);
    assert_refused(
        &["models", "describe", "deeplabv3plus-resnet43"],
        2,
        &["deeplabv3plus-resnet18, deeplabv3plus-resnet34", "nearest is `deeplabv3plus-resnet34`"],
    );
    assert_refused(&["data", "check", "--dataset", "camvidd"], 2, &["camvidd", "camvid", "street-scenes"]);
    assert_refused(
        &["data", "check", "--dataset", "street-scenes", "--splits", "train,trial"],
        2,
        &["trial", "train", "val", "test"],
    );
}

#[test]
fn an_unknown_precision_names_the_known_ones() {
    for command in [&["reproduce"][..], &["train", "--stage", "ce"]] {
        assert_refused(&[command, &["--precision", "f16"]].concat(), 2, &["f16", "f32", "bf16"]);
        let set = ["--set", "train.precision=f16"];
        assert_refused(&[command, &set].concat(), 2, &["`f16`", "`f32` or `bf16`", "train.precision"]);
    }
    let help = xtask_writing_nothing(&["train", "--help"]).stdout;
    assert!(help.contains("--precision <f32|bf16>") && help.contains("train.precision"), "{help}");
}

#[test]
fn bf16_is_planned_where_the_processor_has_it_and_refused_where_not() {
    let mut args = vec!["reproduce", "--dry-run", "--precision", "bf16", "--device", "cpu"];
    for set in ["data.height=32", "data.width=48", "input.size=[32,48]", "input.crop=[32,48]", "student.width=0.125"] {
        args.extend(["--set", set]);
    }
    args.extend(["--set", "teacher.encoder=resnet18", "--set", "teacher.width=0.125"]);
    match segdistill_ops::Precision::Bf16.on_cpu() {
        Ok(kernels) => {
            let run = xtask_writing_nothing(&args);
            assert_eq!(run.code, 0, "{}", run.stderr);
            let said = format!("in bf16 ({kernels})");
            assert!(run.stdout.contains("precision = \"bf16\"") && run.stdout.contains(&said), "{}", run.stdout);
        }
        Err(_) => {
            assert_refused(&args, 2, &["AMX-BF16", "AVX-512-BF16", "hint"]);
            args.retain(|a| *a != "--dry-run");
            assert_refused(&args, 2, &["AMX-BF16"]);
            assert_refused(
                &["train", "--stage", "teacher", "--precision", "bf16", "--device", "cpu"],
                2,
                &["AMX-BF16"],
            );
        }
    }
}

#[test]
fn a_missing_data_folder_exits_with_4() {
    assert_refused(&["data", "check", "--dataset", "camvid"], 4, &["--data-root", "SEGDISTILL_DATA_DIR"]);
    let missing = ["data", "check", "--dataset", "camvid", "--data-root", "no/such/folder"];
    assert_refused(&missing, 4, &["no/such/folder", "--data-root"]);
}

#[test]
fn models_are_listed_and_described_with_exact_integers() {
    let list = xtask_writing_nothing(&["models", "list", "--size", "64x96", "--classes", "11", "--json"]);
    assert_eq!(list.code, 0, "{}", list.stderr);
    let rows: Vec<Value> = serde_json::from_str(&list.stdout).unwrap();
    let row = rows.iter().find(|r| r["name"] == "deeplabv3plus-resnet34").unwrap();
    assert_eq!((&row["encoder"], &row["output_stride"]), (&Value::from("resnet34"), &Value::from(16)));
    assert_eq!(row["input_size"], serde_json::json!([64, 96]));
    let args = ["models", "describe", "deeplabv3plus-resnet34", "--size", "64x96", "--classes", "11", "--json"];
    let described: Value = serde_json::from_str(&xtask_writing_nothing(&args).stdout).unwrap();
    for key in ["params", "macs"] {
        assert!(row[key].as_u64().unwrap() > 1_000_000, "{key}");
        assert_eq!(described[key], row[key], "{key}");
    }
    assert_eq!(described["logits_shape"], serde_json::json!([11, 16, 24]));

    let table = xtask_writing_nothing(&["models", "list", "--size", "64x96", "--classes", "11"]).stdout;
    assert!(table.contains("deeplabv3plus-resnet34") && table.contains("MACs"), "{table}");
}

#[test]
fn drawn_scenes_need_no_folder() {
    let check = xtask_writing_nothing(&["data", "check", "--dataset", "street-scenes"]);
    assert_eq!(check.code, 0, "{}{}", check.stdout, check.stderr);
    for split in ["train", "val", "test"] {
        assert!(check.stdout.lines().any(|l| l.starts_with(split) && l.contains("images")), "{}", check.stdout);
    }
    let folder = tempfile::tempdir().unwrap();
    let args = ["data", "preview", "--dataset", "street-scenes", "--splits", "val", "--count", "2", "--out", "s.png"];
    let preview = xtask(folder.path(), &args);
    assert_eq!(preview.code, 0, "{}", preview.stderr);
    assert!(fs_err::read(folder.path().join("s.png")).unwrap().starts_with(b"\x89PNG"));
}

/// Height and width of CamVid's images.
const HW: [u32; 2] = [360, 480];

/// Writes an 8-bit PNG whose every sample is `value(row, column)`.
fn write_png(path: &Path, color: png::ColorType, hw: [u32; 2], value: impl Fn(u32, u32) -> u8) {
    let channels = color.samples();
    let mut samples = Vec::new();
    for row in 0..hw[0] {
        for column in 0..hw[1] {
            samples.extend(std::iter::repeat_n(value(row, column), channels));
        }
    }
    let mut encoder = png::Encoder::new(fs_err::File::create(path).unwrap(), hw[1], hw[0]);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().unwrap().write_image_data(&samples).unwrap();
}

fn write_labels(path: &Path, hw: [u32; 2], value: impl Fn(u32, u32) -> u8) {
    write_png(path, png::ColorType::Grayscale, hw, value);
}

/// A tree as CamVid is published, with a few drawn pairs: list files hold the publisher's own prefix.
fn tiny_camvid() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (split, count) in [("train", 3), ("val", 2)] {
        let mut list = String::new();
        let at = |folder: &str| root.path().join(format!("{split}{folder}"));
        fs_err::create_dir_all(at("")).unwrap();
        fs_err::create_dir_all(at("annot")).unwrap();
        for k in 0..count {
            let name = format!("{split}_{k:04}.png");
            write_png(&at("").join(&name), png::ColorType::Rgb, HW, |row, column| (row + column) as u8);
            write_labels(&at("annot").join(&name), HW, |row, column| ((row / 40 + column / 40) % 12) as u8);
            list += &format!("/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n");
        }
        fs_err::write(root.path().join(format!("{split}.txt")), list).unwrap();
    }
    root
}

/// Runs `data check` on CamVid below `root` and hands back its code and the problems of its JSON, each as one text.
fn check(root: &Path, splits: &str) -> (i32, Vec<Value>) {
    let root = root.to_str().unwrap();
    let args = ["data", "check", "--dataset", "camvid", "--data-root", root, "--splits", splits, "--json"];
    let run = xtask_writing_nothing(&args);
    let report: Value =
        serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", run.stdout, run.stderr));
    let splits = report["splits"].as_array().unwrap();
    (run.code, splits.iter().flat_map(|s| s["problems"].as_array().unwrap().clone()).collect())
}

/// Breaks a tiny tree and asserts that exactly one more problem is found: in `file`, saying every one of `words`, as
/// JSON and as text.
fn assert_one_more_problem(break_it: impl Fn(&Path), file: &str, words: &[&str]) {
    let root = tiny_camvid();
    let (_, before) = check(root.path(), "train,val");
    break_it(root.path());
    let (code, after) = check(root.path(), "train,val");
    assert_eq!(code, 3);
    let added: Vec<&Value> = after.iter().filter(|p| !before.contains(p)).collect();
    assert_eq!(added.len(), 1, "{added:#?}");
    assert!(added[0]["file"].as_str().unwrap().ends_with(file), "{:#}", added[0]);
    let place = root.path().to_str().unwrap();
    let run = xtask_writing_nothing(&["data", "check", "--dataset", "camvid", "--data-root", place]);
    assert_eq!(run.code, 3);
    let has_all = |text: &str| text.contains(file) && words.iter().all(|word| text.contains(word));
    assert!(has_all(&added[0].to_string()), "not all of {words:?} are in: {:#}", added[0]);
    assert!(run.stdout.lines().any(has_all), "no line has {file} and all of {words:?}: {}", run.stdout);
}

#[test]
fn a_whole_tiny_tree_differs_in_its_counts_only() {
    let root = tiny_camvid();
    let (code, problems) = check(root.path(), "train,val");
    assert_eq!(code, 3);
    assert_eq!(problems.len(), 2, "{problems:#?}");
    for (problem, [file, found, expected]) in problems.iter().zip([["train.txt", "3", "367"], ["val.txt", "2", "101"]])
    {
        let text = problem.to_string();
        assert!([file, found, expected].iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn a_missing_pair_is_named() {
    // The list promises the pair: the problem is told at its line there and names the file that is missing.
    let missing = "trainannot/train_0001.png";
    let remove = |root: &Path| fs_err::remove_file(root.join(missing)).unwrap();
    assert_one_more_problem(remove, "train.txt", &["line 2", missing, "not there"]);
    let missing = "val/val_0000.png";
    let remove = |root: &Path| fs_err::remove_file(root.join(missing)).unwrap();
    assert_one_more_problem(remove, "val.txt", &["line 1", missing, "not there"]);
}

#[test]
fn a_label_value_beyond_the_classes_is_named_with_its_place() {
    let file = "valannot/val_0000.png";
    let value = |row, column| if (row, column) == (40, 7) { 12 } else { 3 };
    assert_one_more_problem(|root| write_labels(&root.join(file), HW, value), file, &["12", "row 40", "column 7"]);
}

#[test]
fn labels_of_another_size_are_named() {
    let file = "trainannot/train_0002.png";
    assert_one_more_problem(
        |root| write_labels(&root.join(file), [180, 240], |_, _| 3),
        file,
        &["180", "240", "360", "480"],
    );
}

#[test]
fn an_absent_split_fails_only_when_asked_for() {
    let root = tiny_camvid();
    let place = root.path().to_str().unwrap();
    let all = xtask_writing_nothing(&["data", "check", "--dataset", "camvid", "--data-root", place]);
    let line = all.stdout.lines().find(|l| l.starts_with("test")).unwrap();
    assert!(line.contains("absent") && line.contains("233"), "{line}");
    let asked =
        xtask_writing_nothing(&["data", "check", "--dataset", "camvid", "--data-root", place, "--splits", "test"]);
    assert_eq!(asked.code, 3, "{}{}", asked.stdout, asked.stderr);
    assert!(asked.stderr.contains("test") && asked.stderr.contains("absent"), "{}", asked.stderr);
}

/// Real CamVid, or `None` after saying that it is not here.
fn real_camvid(test: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let data = std::env::var_os("SEGDISTILL_DATA_DIR").map_or_else(beside, PathBuf::from);
    let root = data.join("camvid");
    if root.is_dir() {
        return fs_err::canonicalize(root).ok();
    }
    // Past the test harness, which hides what a passing test prints.
    let line = format!("skipped: {test} needs CamVid; set SEGDISTILL_DATA_DIR to the folder that holds `camvid`\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    None
}

#[test]
fn real_camvid_is_whole_and_test_is_said_to_be_absent() {
    let Some(root) = real_camvid("real_camvid_is_whole_and_test_is_said_to_be_absent") else { return };
    let has_test = root.join("test").is_dir();
    let run = xtask_writing_nothing(&["data", "check", "--dataset", "camvid", "--data-root", root.to_str().unwrap()]);
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    for (split, words) in [("train", ["367 images", "ok"]), ("val", ["101 images", "ok"])] {
        let line = run.stdout.lines().find(|l| l.starts_with(split)).unwrap();
        assert!(words.iter().all(|w| line.contains(w)), "{line}");
    }
    let line = run.stdout.lines().find(|l| l.starts_with("test")).unwrap();
    let expected = if has_test { ["233 images", "ok"] } else { ["absent", "233 images"] };
    assert!(expected.iter().all(|w| line.contains(w)), "{line}");
}

/// The real set with three files changed: three problems, no more.
#[cfg(unix)]
#[test]
fn real_camvid_with_three_broken_labels_has_three_problems() {
    let Some(real) = real_camvid("real_camvid_with_three_broken_labels_has_three_problems") else { return };
    let copy = tempfile::tempdir().unwrap();
    for list in ["train.txt", "val.txt"] {
        fs_err::copy(real.join(list), copy.path().join(list)).unwrap();
    }
    for folder in ["train", "trainannot", "val", "valannot"] {
        fs_err::create_dir(copy.path().join(folder)).unwrap();
        for entry in fs_err::read_dir(real.join(folder)).unwrap() {
            let entry = entry.unwrap();
            std::os::unix::fs::symlink(entry.path(), copy.path().join(folder).join(entry.file_name())).unwrap();
        }
    }
    let mut names: Vec<_> = fs_err::read_dir(real.join("valannot")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let [value, size, missing] = [0, 1, 2].map(|k| copy.path().join("valannot").join(&names[k]));
    for path in [&value, &size, &missing] {
        fs_err::remove_file(path).unwrap();
    }
    write_labels(&value, HW, |row, column| if (row, column) == (359, 479) { 12 } else { 0 });
    write_labels(&size, [360, 481], |_, _| 0);
    let (code, problems) = check(copy.path(), "train,val");
    assert_eq!(code, 3);
    assert_eq!(problems.len(), 3, "{problems:#?}");
    for (path, words) in [(&value, ["row 359", "12"]), (&size, ["481", "480"]), (&missing, ["val.txt", "not there"])] {
        let name = path.file_name().unwrap().to_str().unwrap();
        let problem = problems.iter().map(Value::to_string).find(|p| p.contains(name)).unwrap();
        assert!(words.iter().all(|w| problem.contains(w)), "{problem}");
    }
}
