//! `report` of several runs: told apart, measured each against its own baseline, refused where they do not compare.
//!
//! The run folders are written by hand, as a finished run leaves them; nothing is trained.

mod common;

use std::path::Path;

use common::{text, xtask};
use serde_json::{Value, json};

use segdistill_eval::table::{
    ResultRow, TimingRow, read_csv, results_from_frame, timings_frame, timings_from_frame, write_csv,
};
use segdistill_eval::{Confusion, Summary};

/// The plan of a small run, resolved by the program: as TOML and as JSON.
fn plan() -> (String, Value) {
    let mut args = vec!["reproduce", "--dry-run", "--seeds", "0,1", "--methods", "ce,csc+ce"];
    for set in ["teacher.width=0.125", "student.width=0.125", "input.size=[32,48]", "input.crop=[32,48]"] {
        args.extend(["--set", set]);
    }
    for set in ["data.height=32", "data.width=48", "teacher.encoder=resnet18"] {
        args.extend(["--set", set]);
    }
    let plain = xtask(&args);
    assert!(plain.status.success(), "{}", text(&plain.stderr));
    args.push("--json");
    let json: Value = serde_json::from_slice(&xtask(&args).stdout).unwrap();
    // The table of stages follows the plan.
    let toml = text(&plain.stdout).split("\nstage ").next().unwrap().to_string();
    (toml, json["plan"].clone())
}

/// What a run of the test is.
#[derive(Clone)]
struct Run {
    dataset: &'static str,
    label_hw: [usize; 2],
    n_images: usize,
    /// Share of pixels that are right for the teacher, for ce and for csc+ce, in percent.
    right: [u64; 3],
    seconds: f64,
}

const RUN: Run = Run { dataset: "street-scenes", label_hw: [32, 48], n_images: 3, right: [90, 50, 60], seconds: 10.0 };

/// Writes a finished run of a teacher and two methods with two seeds.
fn write_run(folder: &Path, (toml, json): &(String, Value), run: &Run) {
    fs_err::create_dir_all(folder).unwrap();
    fs_err::write(folder.join("plan.toml"), toml).unwrap();
    let students = json["students"].as_array().unwrap();
    for stage in std::iter::once(&json["teacher"]).chain(students) {
        let (method, seed) = (stage["method"].as_str().unwrap(), stage["seed"].as_u64().unwrap());
        let (role, method, dir, right) = match method {
            "teacher" => ("teacher", "ce", folder.join("teacher"), run.right[0]),
            "ce" => ("student", method, folder.join("ce").join(format!("seed-{seed}")), run.right[1] + seed),
            _ => ("student", method, folder.join(method).join(format!("seed-{seed}")), run.right[2] + seed),
        };
        let config = json!({
            "role": role, "method": method, "seed": seed, "model": stage["model"], "dataset": run.dataset,
            "classes": ["road", "car"], "palette": [[1, 2, 3], [4, 5, 6]], "input_size": [32, 48], "params": 1000,
            "macs": 2000, "best_step": 4, "val_miou": 0.5, "origin": "trained from scratch", "sha256": "",
        });
        fs_err::create_dir_all(dir.join("final")).unwrap();
        fs_err::write(dir.join("final/config.json"), config.to_string()).unwrap();
        let confusion = Confusion::from_counts(2, vec![right, 100 - right, 100 - right, right]).unwrap();
        let scores = confusion.scores();
        let encoder = stage["model"]["encoder"].as_str().unwrap();
        for split in ["val", "test"] {
            let summary = Summary {
                stage: method.to_string(),
                dataset: run.dataset.to_string(),
                label_hw: run.label_hw,
                mode: "whole image".to_string(),
                class_names: vec!["road".into(), "car".into()],
                result: ResultRow::new(method, role, encoder, split, seed, &scores, run.n_images),
                scores: scores.clone(),
            };
            summary.write(&dir.join("eval").join(split).join("summary.json")).unwrap();
        }
        let timing = TimingRow {
            method: method.to_string(),
            role: role.to_string(),
            seed,
            stage: "train".to_string(),
            seconds: run.seconds,
            n_steps: 100,
            run: String::new(),
        };
        write_csv(&timings_frame(&[timing]).unwrap(), &dir.join("timings.csv")).unwrap();
    }
}

#[test]
fn runs_are_compared_under_names_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p).to_str().unwrap().to_string();
    let plan = plan();
    write_run(&dir.path().join("a/toy"), &plan, &RUN);
    write_run(&dir.path().join("b/toy"), &plan, &Run { right: [92, 70, 65], seconds: 30.0, ..RUN });
    write_run(&dir.path().join("wide"), &plan, &RUN);

    // A single run: no name, no column.
    let alone = xtask(&["report", &at("wide"), "--json"]);
    assert!(alone.status.success(), "{}", text(&alone.stderr));
    let csv = fs_err::read_to_string(dir.path().join("wide/report/results.csv")).unwrap();
    assert!(csv.starts_with("method,role,encoder,split,") && csv.lines().next().unwrap().ends_with(",params,macs"));
    assert!(!fs_err::read_to_string(dir.path().join("wide/report/report.md")).unwrap().contains("wide"));
    assert!(serde_json::from_slice::<Value>(&alone.stdout).unwrap()[0].get("run").is_none());

    // The last part of the path, and as much before it as tells equal ones apart.
    let out = xtask(&["report", &at("a/toy"), &at("b/toy/."), &at("wide"), "--out", &at("compared")]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let rows = results_from_frame(&read_csv(&dir.path().join("compared/results.csv")).unwrap()).unwrap();
    assert_eq!(rows.len(), 3 * 5 * 2);
    for (run, method, role, n) in [
        ("a/toy", "ce", "teacher", 2),
        ("a/toy", "ce", "student", 4),
        ("b/toy", "csc+ce", "student", 4),
        ("wide", "ce", "teacher", 2),
    ] {
        let of = rows.iter().filter(|r| (r.run.as_str(), r.method.as_str(), r.role.as_str()) == (run, method, role));
        assert_eq!(of.count(), n, "{run} {method} {role}");
    }
    let timings = timings_from_frame(&read_csv(&dir.path().join("compared/timings.csv")).unwrap()).unwrap();
    let seconds = |run: &str| timings.iter().filter(|t| t.run == run).map(|t| t.seconds).collect::<Vec<_>>();
    assert_eq!((seconds("a/toy"), seconds("b/toy")), (vec![10.0; 5], vec![30.0; 5]));
    let page = fs_err::read_to_string(dir.path().join("compared/report.md")).unwrap();
    for part in [
        "# segdistill: a/toy, b/toy, wide compared",
        "points of mIoU on val in run a/toy.",
        "CSC+CE of run b/toy reaches",
        "| a/toy: Teacher, resnet18 |",
        "| b/toy: Teacher, resnet18 |",
        "| wide: Student (CSC+CE), resnet18 |",
        "| b/toy: Student (CE) | train | 30.0 s |",
        "| b/toy: CSC+CE | val |",
    ] {
        assert!(page.contains(part), "`{part}` is missing in\n{page}");
    }
}

#[test]
fn runs_that_do_not_compare_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p).to_str().unwrap().to_string();
    let plan = plan();
    write_run(&dir.path().join("one"), &plan, &RUN);
    let refused = |second: &str, parts: &[&str]| {
        let out = xtask(&["report", &at("one"), second, "--out", &at("out")]);
        let message = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{message}");
        for part in parts.iter().chain(&["hint:"]) {
            assert!(message.contains(part), "`{part}` in:\n{message}");
        }
        assert!(!dir.path().join("out").exists() && out.stdout.is_empty());
    };
    // One run twice, under whatever name.
    refused(&at("one"), &["are one run"]);
    refused(&at("one/../one"), &["are one run"]);
    std::os::unix::fs::symlink(dir.path().join("one"), dir.path().join("link")).unwrap();
    refused(&at("link"), &["are one run", "link"]);

    write_run(&dir.path().join("camvid"), &plan, &Run { dataset: "camvid", ..RUN });
    refused(&at("camvid"), &["data of run camvid is camvid", "but of run one street-scenes"]);
    write_run(&dir.path().join("large"), &plan, &Run { label_hw: [64, 96], ..RUN });
    refused(&at("large"), &["val of run large is", "64x96", "32x48"]);
    write_run(&dir.path().join("more"), &plan, &Run { n_images: 4, ..RUN });
    refused(&at("more"), &["val of run more is", "4 images", "3 images"]);
    // Scenes of another seed are other images under the same name.
    let seed = |n: u64| format!("seed = {n}\n");
    let (head, tail) = plan.0.split_once("[data]").unwrap();
    let other = (format!("{head}[data]{}", tail.replacen(&seed(0), &seed(7), 1)), plan.1.clone());
    write_run(&dir.path().join("drawn"), &other, &RUN);
    refused(&at("drawn"), &["data of run drawn", "scenes of seed 7", "scenes of seed 0"]);
}
