//! The main job through the binary, on networks and scenes small enough for seconds.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{succeeded, text, xtask};

/// Settings of a run that takes seconds.
const TINY: [&str; 14] = [
    "data.height=32",
    "data.width=48",
    "data.train=4",
    "data.val=3",
    "data.test=2",
    "teacher.encoder=resnet18",
    "teacher.width=0.125",
    "teacher.steps=4",
    "student.width=0.125",
    "train.steps=4",
    "train.batch_size=2",
    "train.eval_every=2",
    "optim.warmup_steps=1",
    "expect.teacher_val_miou=0.0",
];

fn tiny(out: &Path, more: &[&str]) -> Output {
    let out = out.to_str().unwrap();
    let mut args = vec!["reproduce", "--out", out, "--seeds", "0,1", "--set", "expect.teacher_above_students=false"];
    for set in TINY {
        args.extend(["--set", set]);
    }
    args.extend(["--set", "input.size=[32,48]", "--set", "input.crop=[32,48]"]);
    if !more.contains(&"--methods") {
        args.extend(["--methods", "ce,csc+ce"]);
    }
    args.extend(more);
    xtask(&args)
}

fn read(path: PathBuf) -> String {
    fs_err::read_to_string(path).unwrap()
}

#[test]
fn a_run_repeats_and_resumes_to_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    succeeded(&tiny(&a, &[]));
    for file in ["index.html", "report.md", "results.csv", "results.parquet", "results.json", "timings.csv"] {
        assert!(a.join("report").join(file).metadata().unwrap().len() > 50, "{file}");
    }
    let results = read(a.join("report/results.csv"));
    let rows: Vec<Vec<&str>> = results.lines().skip(1).map(|l| l.split(',').collect()).collect();
    // Teacher, and two methods with two seeds; three splits each.
    assert_eq!(rows.len(), 15, "{results}");
    for (role, method, n) in [("teacher", "ce", 3), ("student", "ce", 6), ("student", "csc+ce", 6)] {
        assert_eq!(rows.iter().filter(|r| r[1] == role && r[0] == method).count(), n, "{role} {method}\n{results}");
    }
    succeeded(&tiny(&b, &[]));
    assert_eq!(read(b.join("report/results.csv")), results, "the same seed gives the same file");

    // A second run of the same folder keeps the first.
    succeeded(&tiny(&b, &[]));
    assert_eq!(read(b.join("report/results.csv")), results);
    assert_eq!(read(dir.path().join("b-1/report/results.csv")), results, "the earlier run is kept");

    // Stages that lost their end are trained again, from their checkpoints; the rest is kept.
    fs_err::remove_dir_all(b.join("csc+ce/seed-1/final")).unwrap();
    fs_err::remove_dir_all(b.join("csc+ce/seed-1/eval")).unwrap();
    fs_err::remove_dir_all(b.join("ce/seed-0")).unwrap();
    let kept = b.join("teacher/final/model.safetensors").metadata().unwrap().modified().unwrap();
    succeeded(&tiny(&b, &["--resume"]));
    assert_eq!(read(b.join("report/results.csv")), results, "resumed results are those of the whole run");
    assert_eq!(b.join("teacher/final/model.safetensors").metadata().unwrap().modified().unwrap(), kept);

    let changed = tiny(&b, &["--resume", "--set", "optim.lr=0.3"]);
    assert_eq!(changed.status.code(), Some(2));
    assert!(text(&changed.stderr).contains("optim.lr was 0.05, is 0.3"), "{}", text(&changed.stderr));
    of_one_precision(&b);
    later_commands(&a);
    wrong_teacher(&a);
}

/// A run says its precision, keeps it, and is f32 where it was written before there was another.
fn of_one_precision(run: &Path) {
    let facts: serde_json::Value = serde_json::from_str(&read(run.join("environment.json"))).unwrap();
    assert_eq!(facts["precision"], "f32");
    let page = read(run.join("report/index.html"));
    if facts["device"] == "cpu" {
        let kernels = segdistill_ops::Precision::F32.on_cpu().unwrap();
        assert_eq!(facts["kernels"], kernels);
        assert!(page.contains("kernels") && page.contains(kernels), "the report names the kernels");
        if segdistill_ops::Precision::Bf16.on_cpu().is_ok() {
            let changed = tiny(run, &["--resume", "--precision", "bf16"]);
            assert_eq!(changed.status.code(), Some(2));
            let said = "teacher.precision was \"f32\", is \"bf16\"";
            assert!(text(&changed.stderr).contains(said), "{}", text(&changed.stderr));
        }
    }
    let plan = read(run.join("plan.toml"));
    let older = plan.replace("precision = \"f32\"\n", "");
    assert!(older.len() < plan.len(), "{plan}");
    fs_err::write(run.join("plan.toml"), older).unwrap();
    succeeded(&tiny(run, &["--resume"]));
    assert_eq!(read(run.join("plan.toml")), plan);
}

/// `report`, `eval` and `predict` on a finished run.
fn later_commands(run: &Path) {
    let at = |p: &str| run.join(p).to_str().unwrap().to_string();
    let html = read(run.join("report/index.html"));
    succeeded(&xtask(&["report", &at("")]));
    assert_eq!(read(run.join("report/index.html")), html, "the report is a function of the run folder");
    assert_eq!(xtask(&["report", &at(""), &at("")]).status.code(), Some(2), "several runs need --out");

    let out = xtask(&["eval", "--model", &at("teacher"), "--split", "test", "--json"]);
    succeeded(&out);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let saved: serde_json::Value = serde_json::from_str(&read(run.join("teacher/eval/test/summary.json"))).unwrap();
    assert_eq!(json["scores"], saved["scores"], "one evaluator");

    let mut pictures = fs_err::read_dir(run.join("teacher/eval/val/gallery")).unwrap().map(|e| e.unwrap().path());
    let picture = pictures.find(|p| p.to_str().unwrap().ends_with("_input.png")).unwrap();
    let logits = at("logits.safetensors");
    succeeded(&xtask(&[
        "predict",
        "--model",
        &at("teacher"),
        "--out",
        &at("predicted"),
        "--save-logits",
        &logits,
        picture.to_str().unwrap(),
    ]));
    let stem = picture.file_stem().unwrap().to_str().unwrap();
    let of_eval = fs_err::read(picture.to_str().unwrap().replace("_input", "_predicted")).unwrap();
    let of_predict = fs_err::read(run.join("predicted").join(format!("{stem}.png"))).unwrap();
    assert_eq!(of_predict, of_eval, "predict and the evaluation give the same label image");
    let tensors = segdistill_ops::params::read_safetensors(Path::new(&logits), &candle_core::Device::Cpu).unwrap();
    assert_eq!(tensors[stem].dims(), [1, 11, 32, 48]);

    // Label images made by anything: what `predict` wrote scores 1 against itself.
    let out =
        xtask(&["eval", "--predictions", &at("predicted"), "--labels", &at("predicted"), "--dataset", "street-scenes"]);
    assert_eq!(out.status.code(), Some(3), "an overlay is no label image: {}", text(&out.stderr));
    let over = xtask(&["predict", "--model", &at("teacher"), "--out", &at("predicted"), &at("predicted")]);
    assert_eq!(over.status.code(), Some(2), "a prediction is never written over its input: {}", text(&over.stderr));
    fs_err::remove_file(run.join("predicted").join(format!("{stem}_overlay.png"))).unwrap();
    let out = xtask(&[
        "eval",
        "--predictions",
        &at("predicted"),
        "--labels",
        &at("predicted"),
        "--dataset",
        "street-scenes",
        "--json",
    ]);
    succeeded(&out);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["scores"]["miou"], 1.0);
}

/// A teacher file that does not fit stops the run with every difference, before anything is trained.
fn wrong_teacher(run: &Path) {
    let cpu = candle_core::Device::Cpu;
    let mut tensors =
        segdistill_ops::params::read_safetensors(&run.join("teacher/final/model.safetensors"), &cpu).unwrap();
    let names: Vec<String> = tensors.keys().cloned().collect();
    let (wrong, gone) = (&names[0], &names[5]);
    tensors.insert(wrong.clone(), candle_core::Tensor::zeros((1, 2, 3), candle_core::DType::F32, &cpu).unwrap());
    tensors.remove(gone);
    tensors.insert("extra.weight".into(), candle_core::Tensor::zeros(3, candle_core::DType::F32, &cpu).unwrap());
    let file = run.join("wrong.safetensors");
    candle_core::safetensors::save(&tensors.into_iter().collect(), &file).unwrap();
    let setting = format!("teacher.weights={}", file.to_str().unwrap());
    let out = tiny(&run.join("wrong"), &["--set", &setting]);
    let message = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{message}");
    for part in [wrong.as_str(), "found [1, 2, 3]", gone.as_str(), "extra.weight", "3 tensors differ"] {
        assert!(message.contains(part), "`{part}` in:\n{message}");
    }
    assert!(!run.join("wrong").exists(), "nothing was written");
    let setting = format!("teacher.weights={}", run.join("teacher/final/model.safetensors").to_str().unwrap());
    succeeded(&tiny(&run.join("given"), &["--set", &setting, "--methods", "csc+ce"]));
    assert!(!run.join("given/teacher/metrics.csv").exists(), "a given teacher is not trained");
}

/// A student whose numbers run away takes nobody with it: the others are trained, the report says who is missing, and the
/// program fails.
#[test]
fn a_student_that_diverges_is_left_out_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let wild = "objectives.kd.terms=[{loss='kd',weight=1e300},{loss='ce',weight=1.0}]";
    let methods = ["--methods", "ce,kd,cwd", "--set", wild];
    for resume in [&[][..], &["--resume"]] {
        let failed = tiny(&out, &[&methods[..], resume].concat());
        let said = text(&failed.stderr);
        assert_eq!(failed.status.code(), Some(1), "{said}");
        for seed in [0, 1] {
            let sentence = format!("kd seed {seed} did not finish and is in no table and no mean: ");
            assert!(said.contains(&sentence), "{said}");
            assert!(read(out.join("report/report.md")).contains(&sentence));
            assert!(read(out.join("report/index.html")).contains(&sentence));
            let record: serde_json::Value =
                serde_json::from_str(&read(out.join(format!("kd/seed-{seed}/failure.json")))).unwrap();
            assert_eq!(record["stage"], format!("kd seed {seed}"));
            assert!(record["error"].as_str().unwrap().contains("step 0"), "{record}");
        }
        let results = read(out.join("report/results.csv"));
        let rows = |method: &str| results.lines().filter(|l| l.starts_with(&format!("{method},student"))).count();
        assert_eq!([rows("ce"), rows("kd"), rows("cwd")], [6, 0, 6], "{results}");
    }
    // The stage alone fails with the same record.
    let alone = dir.path().join("alone");
    let alone_text = alone.to_str().unwrap();
    let mut train = vec!["train", "--out", alone_text, "--seeds", "0,1", "--set", wild];
    TINY.iter().for_each(|set| train.extend(["--set", set]));
    train.extend(["--set", "input.size=[32,48]", "--set", "input.crop=[32,48]"]);
    succeeded(&xtask(&[&train[..], &["--methods", "kd", "--stage", "teacher"]].concat()));
    let failed = xtask(&[&train[..], &["--stage", "kd"]].concat());
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed.stderr));
    for seed in [0, 1] {
        assert!(alone.join(format!("kd/seed-{seed}/failure.json")).is_file(), "{}", text(&failed.stderr));
    }
    // A sweep has a line for the point all the same.
    let out = dir.path().join("sweep");
    let mut args = vec!["sweep", "--method", "kd", "--vary", "kd.weight=1,1e300", "--seeds", "0"];
    let out_text = out.to_str().unwrap().to_string();
    args.extend(["--out", &out_text]);
    TINY.iter().for_each(|set| args.extend(["--set", set]));
    args.extend(["--set", "input.size=[32,48]", "--set", "input.crop=[32,48]"]);
    let failed = xtask(&args);
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed.stderr));
    assert!(text(&failed.stdout).contains("diverged"), "{}", text(&failed.stdout));
    let table = read(out.join("report/sweep.csv"));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(lines[2].ends_with(",0,,,"), "{table}");
}

#[test]
fn an_interrupted_run_exits_130_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let long = ["--set", "train.steps=200", "--set", "teacher.steps=200", "--set", "train.eval_every=100"];
    let out = run.to_str().unwrap();
    let mut args = vec!["reproduce", "--out", out, "--set", "expect.teacher_above_students=false"];
    for set in TINY {
        args.extend(["--set", set]);
    }
    args.extend(["--set", "input.size=[32,48]", "--set", "input.crop=[32,48]"]);
    args.extend(long);
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_xtask")).args(&args).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let metrics = run.join("teacher/metrics.csv");
    let started = std::time::Instant::now();
    while fs_err::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 5 {
        assert!(started.elapsed().as_secs() < 120, "training starts");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    let last = read(run.join("teacher/last"));
    assert!(run.join("teacher/checkpoints").join(&last).join("state.json").is_file(), "{last}");

    // The rest of the run, in place, and the same run never stopped: the same results.
    let whole = dir.path().join("whole");
    let of = |out: &Path| {
        let mut args: Vec<&str> = args.clone();
        args[2] = out.to_str().unwrap();
        args.push("--resume");
        args.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for place in [&run, &whole] {
        succeeded(&Command::new(env!("CARGO_BIN_EXE_xtask")).args(of(place)).output().unwrap());
    }
    assert_eq!(read(run.join("report/results.csv")), read(whole.join("report/results.csv")));
}

#[test]
fn a_folder_in_use_is_refused_and_sigterm_exits_143() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let (out, long) = (run.to_str().unwrap(), ["--set", "teacher.steps=4000"]);
    let mut args =
        vec!["train", "--stage", "teacher", "--out", out, "--set", "input.size=[32,48]", "--set", "input.crop=[32,48]"];
    for set in TINY.iter().filter(|s| !s.starts_with("teacher.steps")) {
        args.extend(["--set", set]);
    }
    args.extend(long);
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_xtask")).args(&args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let metrics = run.join("teacher/metrics.csv");
    let started = std::time::Instant::now();
    while fs_err::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 3 {
        assert!(started.elapsed().as_secs() < 120, "training starts");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let second = tiny(&run, &[]);
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("in use by another run (pid"), "{}", text(&second.stderr));
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(run.join("teacher/last").is_file());
}

#[test]
fn stages_trained_alone_make_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    succeeded(&tiny(&whole, &[]));
    let train = |stage: &str, more: &[&str]| {
        let mut args = vec!["train", "--stage", stage, "--out", parts.to_str().unwrap(), "--set", "input.size=[32,48]"];
        args.extend(["--set", "input.crop=[32,48]", "--set", "expect.teacher_above_students=false"]);
        for set in TINY {
            args.extend(["--set", set]);
        }
        args.extend(more);
        xtask(&args)
    };
    let early = train("csc+ce", &["--seeds", "1"]);
    assert_eq!(early.status.code(), Some(2));
    assert!(text(&early.stderr).contains("--stage teacher"), "{}", text(&early.stderr));
    succeeded(&train("teacher", &[]));
    succeeded(&train("csc+ce", &["--seeds", "1"]));
    succeeded(&train("ce", &["--seeds", "0"]));
    let weights = |run: &Path, stage: &str| fs_err::read(run.join(stage).join("final/model.safetensors")).unwrap();
    for stage in ["teacher", "csc+ce/seed-1", "ce/seed-0"] {
        assert_eq!(weights(&whole, stage), weights(&parts, stage), "{stage}");
    }
    let again = train("ce", &["--seeds", "0"]);
    assert_eq!(again.status.code(), Some(2), "a finished stage is not trained over");
    succeeded(&xtask(&["report", parts.to_str().unwrap()]));
}

#[test]
fn what_cannot_run_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    for (set, expected) in [
        ("train.batch_size=9", "4 training images for batches of 9"),
        ("data.height=8", "8x48"),
        ("data.val=0", "n_val = 0"),
        ("input.scale=[0.01,1.0]", "scale"),
        ("data.variety=2", "variety"),
    ] {
        let run = dir.path().join("run");
        let out = tiny(&run, &["--set", set]);
        assert_eq!(out.status.code(), Some(2), "{set}: {}", text(&out.stderr));
        assert!(text(&out.stderr).contains(expected), "{set}: {}", text(&out.stderr));
        assert!(!run.exists(), "{set} left a folder");
    }
    let run = dir.path().join("band");
    let out = tiny(&run, &["--set", "expect.teacher_val_miou=0.99"]);
    assert_eq!(out.status.code(), Some(5), "{}", text(&out.stderr));
    assert!(run.join("report/index.html").is_file(), "the report stands");
    let out = tiny(&dir.path().join("no-test"), &["--set", "data.test=0", "--methods", "ce"]);
    succeeded(&out);
    assert!(text(&out.stdout).contains("test"), "an absent split is named: {}", text(&out.stdout));
}
