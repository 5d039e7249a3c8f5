//! The benchmark command end to end: a small case, its files, and what wrong arguments are told. No test depends on
//! how long anything takes.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// What a run of the program left.
struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs `bench` in `folder`.
fn bench(folder: &Path, args: &[&str]) -> Outcome {
    let out = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("bench")
        .args(args)
        .current_dir(folder)
        .env_remove("RAYON_NUM_THREADS")
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    Outcome {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8(out.stdout).unwrap(),
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

/// Small cases: the image pooling's convolution sees one pixel, the CSC map 690.
const SMALL: [&str; 6] = ["--filter", "resnet34/decoder.aspp.4", "--filter", "csc/linear-11c-690", "--rounds", "2"];

#[test]
fn small_cases_run_and_leave_json_record_and_plot() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["--json", "run.json", "--record", "record", "--date", "2001-02-03", "--plot", "plots/csc.svg"];
    let run = bench(folder.path(), &[&SMALL[..], &["--round-ms", "1", "--threads", "2"], &files].concat());
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    for name in ["resnet34/decoder.aspp.4.conv", "csc/linear-11c-690"] {
        assert!(run.stdout.lines().any(|line| line.starts_with(name)), "{}", run.stdout);
    }
    assert!(run.stdout.contains("2 threads, peak"), "{}", run.stdout);

    let read = |path: &str| fs_err::read_to_string(folder.path().join(path)).unwrap();
    let json: Value = serde_json::from_str(&read("run.json")).unwrap();
    assert_eq!((&json["threads"], &json["rounds"]), (&Value::from(2), &Value::from(2)));
    assert!(json["peak"]["gflops"].as_f64().unwrap() > 0.1);
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for case in cases {
        let ours = &case["ours"];
        assert_eq!(ours["ms"].as_array().unwrap().len(), 2, "{case}");
        assert!(ours["ms"][0].as_f64().unwrap() > 0.0 && !ours["answer"].as_object().unwrap().is_empty(), "{case}");
        assert!(case["peers"].as_object().unwrap().is_empty(), "{case}");
    }
    if cfg!(target_os = "linux") {
        assert!(cases[0]["ours"]["peak_kib"].as_u64().unwrap() > 1000);
    }

    let machines: Vec<_> = fs_err::read_dir(folder.path().join("record")).unwrap().map(|e| e.unwrap().path()).collect();
    let [machine] = machines.as_slice() else { panic!("{machines:?}") };
    let record = fs_err::read_to_string(machine.join("2001-02-03.md")).unwrap();
    assert!(record.contains("cargo xtask bench") && record.contains("`csc/linear-11c-690`"), "{record}");
    assert!(read("plots/csc.svg").starts_with("<svg "));

    // The figures can be read again without measuring.
    let again = bench(folder.path(), &["--from", "run.json", "--filter", "csc", "--record", "record"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(
        again.stdout.contains("csc/linear-11c-690") && !again.stdout.contains("decoder.aspp.4"),
        "{}",
        again.stdout
    );
    assert!(machine.join("2001-02-03-2.md").is_file(), "a record is never replaced");
}

/// A peer that is a shell script speaks the same protocol; its figures stand beside ours.
#[cfg(unix)]
#[test]
fn a_peer_is_timed_beside_ours_and_a_bad_one_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let peer = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs_err::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_string()
    };
    let case = ["--filter", "csc/linear-11c-690", "--rounds", "1", "--round-ms", "1", "--threads", "2"];

    // Ours first, for the answer that the peer must give.
    let alone = bench(folder.path(), &[&case[..], &["--json", "alone.json"]].concat());
    assert_eq!(alone.code, 0, "{}", alone.stderr);
    let json: Value = serde_json::from_str(&fs_err::read_to_string(folder.path().join("alone.json")).unwrap()).unwrap();
    let answer = &json["cases"][0]["ours"]["answer"];
    let hello = r#"echo '{"hello":"segdistill-bench 1","about":"script 9","threads":2,"idle_kib":100}'"#;
    let answers = |answer: &str| {
        format!(
            "{hello}\nwhile read -r line; do case \"$line\" in\n*round*) echo '{{\"ms\":1e9,\"runs\":1,\"peak_kib\":2148}}' ;;\n\
             *) echo '{{\"answer\":{answer}}}' ;;\nesac; done"
        )
    };
    let good = peer("good", &answers(&answer.to_string()));
    let both = bench(folder.path(), &[&case[..], &["--peer", &good, "--json", "both.json"]].concat());
    assert_eq!(both.code, 0, "{}{}", both.stdout, both.stderr);
    assert!(both.stdout.contains("csc") && both.stdout.contains("1 compared"), "{}", both.stdout);
    let text = fs_err::read_to_string(folder.path().join("both.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["versions"]["peer"], "script 9");
    assert_eq!(json["cases"][0]["peers"]["nchw"]["ms"], serde_json::json!([1e9]));
    assert!(!text.contains(folder.path().to_str().unwrap()), "a record names no folder of a machine");

    let wrong = peer("wrong", &answers(r#"{"value":1.0,"grad":1.0}"#));
    let run = bench(folder.path(), &[&case[..], &["--peer", &wrong]].concat());
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stderr.contains("csc/linear-11c-690") && run.stderr.contains("allowed"), "{}", run.stderr);
    let hangs = peer("hangs", &format!("{hello}\nexec sleep 600"));
    let run = bench(folder.path(), &[&case[..], &["--peer", &hangs, "--timeout", "2"]].concat());
    assert_eq!(run.code, 1, "{}", run.stdout);
    assert!(run.stderr.contains("no answer") && run.stderr.contains("--timeout"), "{}", run.stderr);
    let bare = peer("bare", r#"echo '{"error":"python has no torch","hint":"install it","usage":true}'"#);
    let run = bench(folder.path(), &[&case[..], &["--peer", &bare]].concat());
    assert_eq!(run.code, 2, "{}", run.stdout);
    assert!(run.stderr.contains("no torch") && run.stderr.contains("install it"), "{}", run.stderr);
}

#[test]
fn the_list_names_every_group() {
    let folder = tempfile::tempdir().unwrap();
    let list = bench(folder.path(), &["--list"]);
    assert_eq!(list.code, 0, "{}", list.stderr);
    for group in ["conv-stem", "conv-dense", "conv-depthwise", "op", "csc", "train", "inference"] {
        assert!(list.stdout.lines().any(|l| l.split_whitespace().next() == Some(group)), "{group}: {}", list.stdout);
    }
    let few = bench(folder.path(), &["--list", "--filter", "train"]);
    assert_eq!(few.stdout.lines().count(), 3, "{}", few.stdout);
}

#[test]
fn wrong_arguments_exit_with_2_and_say_what_would_do() {
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join("other.json"), "{}").unwrap();
    let refused = |args: &[&str], words: &[&str]| {
        let run = bench(folder.path(), args);
        assert_eq!(run.code, 2, "{args:?}: {}{}", run.stdout, run.stderr);
        assert!(words.iter().all(|w| run.stderr.contains(w)), "{args:?}: {}", run.stderr);
    };
    refused(&["--filter", "resnet34/encoder.layer9"], &["`resnet34/encoder.layer9`", "nearest", "--list"]);
    refused(&["--precision", "f16"], &["`f16`", "f32 or bf16"]);
    refused(&["--layouts", "nhcw"], &["`nhcw`", "nchw, nhwc or bf16"]);
    refused(&["--rounds", "0"], &["--rounds", "at least 1"]);
    refused(&["--threads", "0"], &["--threads", "at least 1"]);
    refused(&["--date", "today"], &["`today`", "YYYY-MM-DD"]);
    refused(&["--from", "absent.json"], &["absent.json", "--json"]);
    refused(&["--from", "other.json"], &["other.json", "--json"]);
    refused(&["--from", "other.json", "--peer", "python3"], &["--from", "--peer"]);
    let peer = ["--filter", "csc/linear-11c-690", "--peer", "no/such/python"];
    refused(&peer, &["no/such/python", "a Python with torch"]);
    let left: Vec<_> = fs_err::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["other.json"]);
}
