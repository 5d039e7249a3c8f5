//! Tables survive every format, two writes give the same bytes, and a failed write leaves nothing.

use std::path::Path;

use segdistill_eval::table::*;
use segdistill_eval::{Confusion, EvalError, Scores, Summary};

fn rows() -> Vec<ResultRow> {
    let row = |method: &str, role: &str, split: &str, seed: u64, miou: f64| ResultRow {
        method: method.into(),
        role: role.into(),
        encoder: "resnet34".into(),
        split: split.into(),
        seed,
        miou,
        pixel_accuracy: 1.0 / 3.0,
        mean_accuracy: 0.1 + 0.2,
        fw_iou: 1e-9,
        n_classes_present: 11,
        n_images: 101,
        params: Some(22_437_000),
        macs: Some(5_000_000_000_000),
        agreement: None,
        run: String::new(),
    };
    let mut odd = row("a,\"b\"\nc", "stu dent", "val", u64::from(u32::MAX) + 7, f64::NAN);
    (odd.params, odd.macs, odd.encoder) = (None, None, String::new());
    vec![row("csc+ce", "student", "val", 0, 0.570_312_345_678_901_2), row("ce", "teacher", "test", 1, 0.0), odd]
}

/// Rows as JSON, where NaN is null and equals itself.
fn text<T: serde::Serialize>(rows: &[T]) -> Vec<String> {
    rows.iter().map(|r| serde_json::to_string(r).unwrap()).collect()
}

#[test]
fn results_survive_every_format_to_the_last_digit() {
    let folder = tempfile::tempdir().unwrap();
    for rows in [rows(), rows()[..1].to_vec(), rows()[2..].to_vec(), Vec::new()] {
        let frame = results_frame(&rows).unwrap();
        for path in write_all(&frame, &folder.path().join("deep/results")).unwrap() {
            let back = results_from_frame(&read_table(&path).unwrap()).unwrap();
            assert_eq!(text(&back), text(&rows), "{}", path.display());
        }
    }
}

#[test]
fn the_csv_is_what_a_reader_expects() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.csv");
    write_csv(&results_frame(&rows()[..1]).unwrap(), &path).unwrap();
    let text = fs_err::read_to_string(&path).unwrap();
    let mut lines = text.lines();
    assert_eq!(
        lines.next().unwrap(),
        "method,role,encoder,split,seed,miou,pixel_accuracy,mean_accuracy,fw_iou,n_classes_present,n_images,params,macs"
    );
    assert!(lines.next().unwrap().starts_with("csc+ce,student,resnet34,val,0,0.5703123456789012,0.3333333333333333,"));
    assert!(!text.contains("seconds"));
}

#[test]
fn two_writes_are_byte_identical_and_leave_no_other_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |name: &str| -> Vec<Vec<u8>> {
        let paths = write_all(&results_frame(&rows()).unwrap(), &folder.path().join(name)).unwrap();
        paths.iter().map(|p| fs_err::read(p).unwrap()).collect()
    };
    let first = bytes("a");
    assert_eq!(first, bytes("b"));
    assert_eq!(first, bytes("a"));
    assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 6);
}

#[test]
fn a_failed_write_keeps_the_old_file_and_no_scratch() {
    let folder = tempfile::tempdir().unwrap();
    // A folder of that name cannot be replaced by a file.
    let path = folder.path().join("results.csv");
    fs_err::create_dir_all(path.join("inside")).unwrap();
    assert!(matches!(write_atomic(&path, b"x"), Err(EvalError::Io(_))));
    assert!(path.join("inside").is_dir());
    assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 1);
    assert!(matches!(write_atomic(Path::new("/"), b"x"), Err(EvalError::Config { .. })));
}

#[test]
fn damaged_and_foreign_tables_are_errors_that_name_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let [csv, parquet, json] = write_all(&results_frame(&rows()).unwrap(), &folder.path().join("results")).unwrap();
    for path in [&parquet, &json] {
        let whole = fs_err::read(path).unwrap();
        fs_err::write(path, &whole[..whole.len() / 2]).unwrap();
        let message = read_table(path).unwrap_err().to_string();
        assert!(message.contains(path.to_str().unwrap()) && message.contains("hint: "), "{message}");
    }
    fs_err::write(&csv, "method,role\nce,teacher\n").unwrap();
    assert!(results_from_frame(&read_table(&csv).unwrap()).is_err());
    let message = read_table(&folder.path().join("absent.csv")).unwrap_err().to_string();
    assert!(message.contains("absent.csv"), "{message}");
    assert!(matches!(read_table(Path::new("table.xlsx")), Err(EvalError::Table { .. })));
}

#[test]
fn names_that_look_like_numbers_stay_names() {
    let folder = tempfile::tempdir().unwrap();
    let mut rows = rows()[..1].to_vec();
    (rows[0].method, rows[0].split) = ("007".into(), "1e3".into());
    for path in write_all(&results_frame(&rows).unwrap(), &folder.path().join("t")).unwrap() {
        assert_eq!(results_from_frame(&read_table(&path).unwrap()).unwrap(), rows);
    }
}

fn counted() -> (Confusion, Scores, Vec<String>) {
    let mut confusion = Confusion::new(3);
    confusion.add_abstaining(&[0, 0, 1, 1, 255], &[0, 1, 1, 255, 2], 255).unwrap();
    let scores = confusion.scores();
    (confusion, scores, ["road", "car", "sky"].map(String::from).to_vec())
}

#[test]
fn classes_timings_and_counts_survive_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let (confusion, scores, names) = counted();
    let result = ResultRow::new("ce", "student", "resnet18", "val", 3, &scores, 1);
    let classes = per_class_rows(&result, &names, &scores).unwrap();
    assert_eq!((classes[2].iou, classes[2].accuracy, classes[2].class_idx), (None, None, 2));
    assert!(per_class_rows(&result, &names[..2], &scores).is_err());
    let timings = [TimingRow {
        method: "ce".into(),
        role: "student".into(),
        seed: 3,
        stage: "train".into(),
        seconds: 12.25,
        n_steps: 80,
        run: String::new(),
    }];
    for path in write_all(&per_class_frame(&classes).unwrap(), &folder.path().join("per_class")).unwrap() {
        assert_eq!(per_class_from_frame(&read_table(&path).unwrap()).unwrap(), classes);
    }
    for path in write_all(&timings_frame(&timings).unwrap(), &folder.path().join("timings")).unwrap() {
        assert_eq!(timings_from_frame(&read_table(&path).unwrap()).unwrap(), timings);
    }
    for path in write_all(&confusion_frame(&confusion, &names).unwrap(), &folder.path().join("confusion")).unwrap() {
        assert_eq!(confusion_from_frame(&read_table(&path).unwrap()).unwrap(), (confusion.clone(), names.clone()));
    }
}

#[test]
fn runs_are_a_last_column_where_there_are_several() {
    let folder = tempfile::tempdir().unwrap();
    let (_, scores, names) = counted();
    let of = |run: &str| ResultRow::new("ce", "student", "resnet18", "val", 3, &scores, 1).with_run(run);
    // Of names that look like numbers, and one row without a run among those that have one.
    let results = [of("007"), of(""), of("a/toy")];
    let classes = results.iter().flat_map(|r| per_class_rows(r, &names, &scores).unwrap()).collect::<Vec<_>>();
    assert_eq!(classes.iter().map(|r| r.run.as_str()).collect::<Vec<_>>()[2..4], ["007", ""]);
    let timing = |run: &str| TimingRow {
        method: "ce".into(),
        role: "student".into(),
        seed: 3,
        stage: "train".into(),
        seconds: 1.5,
        n_steps: 2,
        run: run.into(),
    };
    let timings = [timing("007"), timing("a/toy")];
    let frames = [results_frame(&results), per_class_frame(&classes), timings_frame(&timings)].map(Result::unwrap);
    for frame in &frames {
        assert_eq!(frame.get_column_names().last().unwrap().as_str(), "run");
    }
    for path in write_all(&frames[0], &folder.path().join("r")).unwrap() {
        assert_eq!(results_from_frame(&read_table(&path).unwrap()).unwrap(), results);
    }
    for path in write_all(&frames[1], &folder.path().join("c")).unwrap() {
        assert_eq!(per_class_from_frame(&read_table(&path).unwrap()).unwrap(), classes);
    }
    for path in write_all(&frames[2], &folder.path().join("t")).unwrap() {
        assert_eq!(timings_from_frame(&read_table(&path).unwrap()).unwrap(), timings);
    }
    // Rows of two runs are two models, and their summary says whose they are.
    let summary = summarize(&results);
    assert_eq!(
        summary.iter().map(|s| (s.run.as_str(), s.seeds.len())).collect::<Vec<_>>(),
        [("007", 1), ("", 1), ("a/toy", 1)]
    );
    assert_eq!(summary_frame(&summary).unwrap().get_column_names().last().unwrap().as_str(), "run");
    // A single run has no such column anywhere, and its JSON no such key.
    for frame in [
        results_frame(&results[1..2]).unwrap(),
        per_class_frame(&classes[3..6]).unwrap(),
        timings_frame(&[timing("")]).unwrap(),
        summary_frame(&summary[1..2]).unwrap(),
    ] {
        assert!(frame.column("run").is_err(), "{frame}");
    }
    assert!(!text(&results[1..2])[0].contains("run") && text(&results)[0].contains("\"run\":\"007\""));
    assert_eq!(serde_json::from_str::<ResultRow>(&text(&results[1..2])[0]).unwrap(), results[1]);
}

#[test]
fn metrics_of_a_training_run_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.csv");
    fs_err::write(&path, "step,loss/ce,val_miou\n1,2.5,\n2,2.25,\n3,2,0.125\n").unwrap();
    let frame = read_csv(&path).unwrap();
    let column = |name: &str| {
        let column = frame.column(name).unwrap().strict_cast(&polars::prelude::DataType::Float64).unwrap();
        column.f64().unwrap().iter().collect::<Vec<_>>()
    };
    assert_eq!(column("step"), [Some(1.0), Some(2.0), Some(3.0)]);
    assert_eq!(column("loss/ce"), [Some(2.5), Some(2.25), Some(2.0)]);
    assert_eq!(column("val_miou"), [None, None, Some(0.125)]);
}

#[test]
fn a_summary_over_seeds_has_mean_and_sample_deviation() {
    let mut all = Vec::new();
    for (seed, miou) in [(0, 0.50), (1, 0.54), (2, 0.58)] {
        all.push(ResultRow { seed, miou, ..rows()[0].clone() });
    }
    all.push(ResultRow { split: "test".into(), ..rows()[0].clone() });
    let summary = summarize(&all);
    assert_eq!(summary.len(), 2);
    assert_eq!((summary[0].seeds.clone(), summary[0].miou.n), (vec![0, 1, 2], 3));
    assert!((summary[0].miou.mean - 0.54).abs() < 1e-12 && (summary[0].miou.sd.unwrap() - 0.04).abs() < 1e-12);
    assert_eq!(summary[1].miou.sd, None);
    let frame = summary_frame(&summary).unwrap();
    assert_eq!(frame.height(), 2);
    assert_eq!(frame.column("miou_sd").unwrap().f64().unwrap().get(1), None);
    assert!((frame.column("miou_sd").unwrap().f64().unwrap().get(0).unwrap() - 0.04).abs() < 1e-12);
    assert_eq!(frame.column("n_seeds").unwrap().u64().unwrap().get(0), Some(3));
}

#[test]
fn a_summary_file_is_read_back_and_a_bad_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (_, scores, class_names) = counted();
    let summary = Summary {
        stage: "ce/seed-0".into(),
        dataset: "street-scenes".into(),
        label_hw: [360, 480],
        mode: "whole image".into(),
        class_names,
        result: ResultRow::new("ce", "student", "resnet18", "val", 0, &scores, 1),
        scores,
    };
    let path = folder.path().join("eval/val/summary.json");
    summary.write(&path).unwrap();
    assert_eq!(Summary::read(&path).unwrap(), summary);
    let text = fs_err::read_to_string(&path).unwrap();
    fs_err::write(&path, text.replace("n_pixels", "pixels")).unwrap();
    let message = Summary::read(&path).unwrap_err().to_string();
    assert!(message.contains("summary.json") && message.contains("n_pixels"), "{message}");
}
