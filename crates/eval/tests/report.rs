//! The page says what the rows say, no more, and holds everything it shows.

use segdistill_eval::report::*;
use segdistill_eval::table::{PerClassRow, ResultRow, TimingRow};

fn row(method: &str, role: &str, split: &str, seed: u64, miou: f64) -> ResultRow {
    ResultRow {
        method: method.into(),
        role: role.into(),
        encoder: if role == "teacher" { "xception65".into() } else { "resnet34".into() },
        split: split.into(),
        seed,
        miou,
        pixel_accuracy: 0.9,
        mean_accuracy: 0.7,
        fw_iou: 0.8,
        n_classes_present: 2,
        n_images: 101,
        params: Some(22_437_000),
        macs: Some(2_260_000_000),
        agreement: None,
        run: String::new(),
    }
}

/// A teacher at 0.7 and two students on one split; one seed for each number given.
fn comparison(ce: &[f64], csc: &[f64]) -> Report {
    let mut rows = vec![row("ce", "teacher", "val", 0, 0.7)];
    rows.extend(ce.iter().enumerate().map(|(i, m)| row("ce", "student", "val", i as u64, *m)));
    rows.extend(csc.iter().enumerate().map(|(i, m)| row("csc+ce", "student", "val", i as u64, *m)));
    Report { title: "Run".into(), rows, ..Report::default() }
}

fn full() -> Report {
    let mut report = comparison(&[0.50, 0.52], &[0.56, 0.58]);
    let test: Vec<ResultRow> = report.rows.iter().map(|r| ResultRow { split: "test".into(), ..r.clone() }).collect();
    report.rows.extend(test);
    report.class_names = vec!["road".into(), "car".into()];
    report.class_colors = vec![[1, 2, 3], [200, 100, 50]];
    report.void_color = Some([0, 0, 0]);
    for r in report.rows.clone() {
        for (class_idx, iou) in [Some(r.miou), None].into_iter().enumerate() {
            report.per_class.push(PerClassRow {
                method: r.method.clone(),
                role: r.role.clone(),
                encoder: r.encoder.clone(),
                split: r.split.clone(),
                seed: r.seed,
                class_idx,
                class: report.class_names[class_idx].clone(),
                iou,
                accuracy: iou,
                n_pixels: 10,
                run: r.run.clone(),
            });
        }
    }
    let x: Vec<f64> = (1..=200).map(f64::from).collect();
    for label in ["teacher", "ce seed 0", "ce seed 1", "csc+ce/seed-0", "something else"] {
        let y = x.iter().map(|x| 1.0 / x).collect();
        report.curves.push(Curve {
            label: label.into(),
            x: x.clone(),
            y,
            panel: "loss: ce".into(),
            run: String::new(),
        });
    }
    let picture = RgbBytes { h: 2, w: 2, rgb: vec![7; 12] };
    report.gallery = vec![GalleryRow {
        name: "0016E5".into(),
        split: "val".into(),
        panels: vec![("Input".into(), picture.clone()), ("Teacher".into(), picture)],
    }];
    for (method, seconds) in [("ce", 10.0), ("csc+ce", 15.0)] {
        report.timings.push(TimingRow {
            method: method.into(),
            role: "student".into(),
            seed: 0,
            stage: "train".into(),
            seconds,
            n_steps: 100,
            run: String::new(),
        });
    }
    report.plan_toml = Some("[optim]\nlr = 0.01 # <x>\n".into());
    report.environment = vec![("Machine".into(), "2 cores".into())];
    report.notes = vec!["A remark.".into()];
    report
}

#[test]
fn a_gain_above_the_noise_is_told_with_its_numbers() {
    let report = comparison(&[0.50, 0.52], &[0.56, 0.58]);
    let gain = &gains(&report)[0];
    assert_eq!(gain.verdict, Verdict::Helped);
    assert!((gain.gain - 0.06).abs() < 1e-12);
    // Both have deviation 0.01 * sqrt(2); the gap to the teacher is 0.7 - 0.51.
    assert!((gain.pooled_sd.unwrap() - 0.0002f64.sqrt()).abs() < 1e-12);
    assert!((gain.gap_share.unwrap() - 0.06 / 0.19).abs() < 1e-12);
    assert_eq!(gain.seeds_better, [2, 2]);
    for page in [report.to_html(), report.to_markdown()] {
        assert!(page.contains("Distillation gained 6.00 points of mIoU on val."));
        assert!(
            page.contains(
                "CSC+CE reaches 57.00 ± 1.41 % mIoU and CE alone 51.00 ± 1.41 % (2 seeds each): +6.00 points"
            )
        );
        assert!(page.contains("32 % of the gap to the teacher at 70.00 %"));
        assert!(page.contains("The gain is larger than the noise between seeds (pooled deviation 1.41 points)"));
    }
}

#[test]
fn a_loss_noise_and_one_seed_are_not_called_a_gain() {
    let html = comparison(&[0.55, 0.57], &[0.52, 0.54]).to_html();
    assert!(html.contains("Distillation did not help in this run: −3.00 points of mIoU on val."));
    assert!(!html.contains("Distillation gained") && !html.contains("gap to the teacher at"));

    let report = comparison(&[0.50, 0.56], &[0.51, 0.57]);
    assert_eq!(gains(&report)[0].verdict, Verdict::WithinNoise);
    assert!(report.to_html().contains("within the noise between seeds"));

    let report = comparison(&[0.50], &[0.56]);
    assert_eq!((gains(&report)[0].verdict, gains(&report)[0].pooled_sd), (Verdict::NoiseUnknown, None));
    assert!(report.to_html().contains("with one seed the noise is unknown"));

    let report = comparison(&[0.5], &[0.5]);
    assert_eq!(gains(&report)[0].verdict, Verdict::DidNotHelp);
    // A teacher no better than the baseline leaves no gap to close.
    let report = comparison(&[0.72, 0.71], &[0.73, 0.74]);
    assert_eq!(gains(&report)[0].gap_share, None);
    assert!(report.to_html().contains("no gap was there to close"));
    // A score that is no number is no gain.
    assert!(gains(&comparison(&[f64::NAN], &[0.5])).is_empty());
}

/// Two runs of the same methods and seeds: distillation gained 0.06 in run `a` and lost 0.03 in run `b<i>`, whose teacher
/// is no better than its baseline.
fn two_runs() -> Report {
    let (mut report, mut other) = (full(), full());
    other.rows = comparison(&[0.60, 0.62], &[0.57, 0.59]).rows;
    other.rows[0].miou = 0.61;
    other.per_class.iter_mut().for_each(|r| r.iou = Some(0.25));
    other.timings[1].seconds = 40.0;
    for (part, run) in [(&mut report, "a"), (&mut other, "b<i>")] {
        part.rows = part.rows.iter().map(|r| r.clone().with_run(run)).collect();
        part.per_class.iter_mut().for_each(|r| r.run = run.into());
        part.timings.iter_mut().for_each(|r| r.run = run.into());
        part.curves.iter_mut().for_each(|c| c.run = run.into());
    }
    report.rows.extend(other.rows);
    report.per_class.extend(other.per_class);
    report.timings.extend(other.timings);
    report.curves.extend(other.curves);
    report
}

#[test]
fn runs_are_told_apart_and_measured_against_their_own_baseline() {
    let report = two_runs();
    let found: Vec<_> = gains(&report).into_iter().filter(|g| g.split == "val").collect();
    assert_eq!(found.iter().map(|g| g.run.as_str()).collect::<Vec<_>>(), ["a", "b<i>"]);
    assert!((found[0].gain - 0.06).abs() < 1e-12 && (found[1].gain + 0.03).abs() < 1e-12, "{found:?}");
    assert_eq!(
        found.iter().map(|g| (g.teacher, g.distilled.n, g.seeds_better)).collect::<Vec<_>>(),
        [(Some(0.7), 2, [2, 2]), (Some(0.61), 2, [0, 2])]
    );
    assert_eq!((found[0].gap_share.is_some(), found[1].gap_share), (true, None));
    let (html, markdown) = (report.to_html(), report.to_markdown());
    for part in [
        "Distillation gained 6.00 points of mIoU on val in run a.",
        "CSC+CE of run a is the best of 2 distilled models compared on val.",
        "CSC+CE of run b&lt;i> reaches 58.00 ± 1.41 % mIoU and CE alone 61.00 ± 1.41 % (2 seeds each): −3.00 points",
        "| a: Teacher, xception65 | absent | 70.00 | 70.00 | 1 |",
        "| b&lt;i>: Teacher, xception65 | absent | 61.00 | absent | 1 |",
        "| a: Student (CE), resnet34 | absent | 51.00 ± 1.41 | 51.00 ± 1.41 | 2 |",
        "| b&lt;i>: Student (CE), resnet34 | absent | 61.00 ± 1.41 | absent | 2 |",
        "| a: CSC+CE | val | 51.00 ± 1.41 | 57.00 ± 1.41 | +6.00 |",
        "| b&lt;i>: CSC+CE | val | 61.00 ± 1.41 | 58.00 ± 1.41 | −3.00 |",
        "| a: Student (CSC+CE) | train | 15.0 s | 150.0 | 1.50 × | 1 |",
        "| b&lt;i>: Student (CSC+CE) | train | 40.0 s | 400.0 | 4.00 × | 1 |",
        // The classes of `b<i>` are 0.25 everywhere, of `a` the mean over seeds: nothing is pooled across runs.
        "| road | 70.00 | 25.00 | 51.00 ± 1.41 | 25.00 ± 0.00 | 57.00 ± 1.41 | 25.00 ± 0.00 |",
    ] {
        assert!(markdown.contains(part), "`{part}` is missing in\n{markdown}");
    }
    // Each run has its own lines, and no line but a model's takes its colour.
    for name in ["a: Student (CE)", "b&lt;i&gt;: Student (CE)"] {
        assert!(html.contains(&format!("{name} <span class=\"enc\">&nbsp;2 runs</span>")), "{name}");
    }
    assert!(
        html.contains("a: something else") && html.contains("b&lt;i&gt;: something else") && !html.contains("b<i>")
    );
    // Of one run the page is the same whether that run has a name or not.
    let (mut named, plain) = (full(), full());
    named.rows.iter_mut().for_each(|r| r.run = "a".into());
    named.per_class.iter_mut().for_each(|r| r.run = "a".into());
    named.timings.iter_mut().for_each(|r| r.run = "a".into());
    named.curves.iter_mut().for_each(|c| c.run = "a".into());
    assert_eq!((named.to_html(), named.to_markdown()), (plain.to_html(), plain.to_markdown()));
}

#[test]
fn no_gain_in_any_run_is_said_of_all() {
    let mut report = comparison(&[0.60, 0.62], &[0.57, 0.59]);
    report.rows.iter_mut().for_each(|r| r.run = "b".into());
    report.rows.extend(comparison(&[0.60, 0.62], &[0.59, 0.61]).rows.into_iter().map(|r| r.with_run("a")));
    assert!(report.to_html().contains("Distillation helped in no run: at best −1.00 points of mIoU on val in run a."));
    // Without a baseline of its own a run gains nothing, whatever others have.
    report.rows.retain(|r| r.run == "b" || r.role == "teacher" || r.method != "ce");
    assert_eq!(gains(&report).iter().map(|g| g.run.as_str()).collect::<Vec<_>>(), ["b"]);
}

/// The seeds that are missing may be those on which it failed.
#[test]
fn a_gain_over_fewer_seeds_than_the_baseline_is_not_called_one() {
    let report = comparison(&[0.50, 0.52, 0.51], &[0.58, 0.59]);
    assert!(gains(&report).iter().all(|g| g.verdict == Verdict::SeedsMissing), "{:?}", gains(&report));
    let html = report.to_html();
    assert!(html.contains("over fewer seeds than the baseline has"));
    assert!(
        html.contains("Only 2 of the baseline's 3 seeds are there")
            || html.contains("Only 2 of the baseline&#39;s 3 seeds are there")
    );
    let worse = comparison(&[0.50, 0.52, 0.51], &[0.48, 0.49]);
    assert!(gains(&worse).iter().all(|g| g.verdict == Verdict::DidNotHelp));
}

#[test]
fn the_best_of_several_methods_is_called_that() {
    let mut report = comparison(&[0.50, 0.51], &[0.53, 0.54]);
    for (i, m) in (0..9).zip(["kd", "skd", "cirkd", "cwd", "at", "ifvd", "dsd", "rkd", "fitnet"]) {
        for seed in 0..2 {
            report.rows.push(row(m, "student", "val", seed, 0.50 + 0.01 * f64::from(i) + 0.005 * seed as f64));
        }
    }
    let html = report.to_html();
    assert!(html.contains("FITNET is the best of 10 distilling methods compared on val."));
    assert_eq!(gains(&report).len(), 10);
    for m in ["KD", "SKD", "CIRKD", "CWD", "AT", "IFVD", "DSD", "RKD", "FITNET", "CSC+CE", "CE"] {
        assert!(html.contains(&format!("Student ({m})")), "{m}");
    }
}

/// More models than colours: bars stand beside names, and what shares a picture is told apart.
#[test]
fn many_methods_are_named_beside_their_bars() {
    let mut report = full();
    let many = ["kd", "skd", "cirkd", "cwd", "at", "ifvd", "dsd", "rkd", "fitnet"];
    for (i, method) in (0u8..).zip(many) {
        let miou = 0.40 + 0.01 * f64::from(i);
        report.rows.push(row(method, "student", "val", 0, miou));
        let like = report.per_class[0].clone();
        report.per_class.push(PerClassRow {
            method: method.into(),
            split: "val".into(),
            role: "student".into(),
            encoder: "resnet34".into(),
            iou: Some(miou),
            ..like
        });
        let (x, y) = (vec![1.0, 2.0], vec![1.0, 0.5]);
        let label = format!("{method}/seed-0");
        report.curves.push(Curve { label, x, y, panel: "loss: ce".into(), run: String::new() });
    }
    let html = report.to_html();
    let figure = html.split("<figcaption>val</figcaption>").nth(1).expect("a figure of val").split("</figure>").next();
    for name in many {
        assert!(figure.unwrap().contains(&format!(">{}<", name.to_uppercase())), "{name}");
    }
    assert!(figure.unwrap().contains(">Teacher<") && figure.unwrap().contains(">CE<"));
    // Twelve models: the two worst methods have no place in the pictures that need colours, and a sentence says so.
    let part = |from: &str| html.split(from).nth(1).expect("a section").split("</section>").next().unwrap().to_string();
    let (by_class, curves) = (part("<h2>IoU by class"), part("<h2>Learning curves"));
    let keys = by_class.split("</ul>").next().unwrap();
    for (name, is_drawn) in [("KD", false), ("SKD", false), ("CIRKD", true), ("FITNET", true), ("CE", true)] {
        assert_eq!(keys.contains(&format!("Student ({name})")), is_drawn, "{name}");
        assert_eq!(curves.contains(&format!("Student ({name})")), is_drawn, "{name}");
    }
    assert!(by_class.contains("the best on val") && curves.contains("the best on val"));
    assert!(by_class.matches("Student (SKD)").count() > 0, "the numbers have all");
}

#[test]
fn every_row_and_every_part_is_on_the_page() {
    let report = full();
    let (html, markdown) = (report.to_html(), report.to_markdown());
    for page in [&html, &markdown] {
        for part in [
            "Teacher",
            "Student (CE)",
            "Student (CSC+CE)",
            "xception65",
            "resnet34",
            "70.00",
            "51.00 ± 1.41",
            "57.00 ± 1.41",
            "22.44 M",
            "2.26 G",
            "101",
            "The train split is absent",
            "absent",
            "road",
            "car",
            "150.0",
            "1.50 ×",
            "2 cores",
            "A remark.",
            "val: 101 images",
            "test: 101 images",
            "train: absent",
            "lr = 0.01",
        ] {
            assert!(page.contains(part), "`{part}` is missing");
        }
    }
    // Students stand in the order teacher, baseline, distilled, however the rows come.
    let at = |text: &str| html.find(text).unwrap();
    let order = [">Teacher", ">Student (CE)", ">Student (CSC+CE)"].map(|name| at(&format!("</span>{name}")[7..]));
    assert!(order.is_sorted(), "{order:?}");
    // Curves of one method share a legend entry; a label that names no model keeps its own.
    assert!(html.contains("Student (CE) <span class=\"enc\">&nbsp;2 runs</span>") && html.contains("something else"));
    assert!(html.contains("void (not counted)") && html.contains("rgb(200,100,50)"));
    assert_eq!(html.matches("data:image/png;base64,").count(), 2);
}

#[test]
fn the_page_is_self_contained_and_repeatable() {
    let report = full();
    let html = report.to_html();
    for outside in ["<script", "http://", "https://", "<link", "@import", "url(", "NaN", "inf\""] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("prefers-color-scheme:dark") && html.contains("@media print"));
    assert_eq!(html, report.clone().to_html());
    assert_eq!(report.to_markdown(), report.clone().to_markdown());
    for tag in ["section", "table", "div", "svg", "figure", "ul", "details", "tr", "thead"] {
        let opened = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert!(opened > 0, "{tag} is on the page");
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn names_cannot_become_markup() {
    let evil = "<img src=x onerror='a(\"b\")'>&|`_*";
    let mut report = full();
    report.title = evil.into();
    report.summary = vec![evil.into()];
    for r in &mut report.rows {
        if r.method == "csc+ce" {
            (r.method, r.encoder, r.role) = (evil.into(), evil.into(), "other".into());
        }
    }
    report.rows.push(row("ce", "student", evil, 0, 0.1));
    report.class_names[0] = evil.into();
    report.curves[0].panel = evil.into();
    report.curves[4].label = evil.into();
    report.gallery[0].name = evil.into();
    report.gallery[0].panels[0].0 = evil.into();
    report.timings[0].stage = evil.into();
    report.plan_toml = Some(format!("</pre>{evil}\n```\n"));
    report.environment.push((evil.into(), evil.into()));
    report.notes.push(evil.into());
    let html = report.to_html();
    assert!(!html.contains("<img src=x") && !html.contains("onerror='"), "unescaped");
    assert!(html.matches("&lt;img src=x onerror=&#39;").count() >= 10);
    assert!(html.contains("<pre>&lt;/pre&gt;&lt;img"));
    let markdown = report.to_markdown();
    assert!(!markdown.split("````toml").next().unwrap().contains("<img"));
    assert!(markdown.contains("````toml"), "the fence is longer than the one inside");
}

#[test]
fn a_single_row_and_an_empty_report_are_fine() {
    let one = Report {
        title: "Scored".into(),
        splits: Vec::new(),
        rows: vec![ResultRow {
            encoder: String::new(),
            params: None,
            macs: None,
            ..row("their-net", "predictions", "val", 0, 0.6)
        }],
        ..Report::default()
    };
    let html = one.to_html();
    assert!(html.contains("their-net reaches 60.00 % mIoU on val."));
    for absent in ["absent", "Distillation", "distillation", "Learning curves", "Pictures", "Cost"] {
        assert!(!html.split("</style>").nth(1).unwrap().contains(absent), "{absent}");
    }
    assert!(one.to_markdown().contains("| their-net | 60.00 | 1 | – | – |"));
    let empty = Report { title: "Nothing".into(), ..Report::default() };
    assert!(empty.to_html().contains("0 rows of results") && empty.to_markdown().starts_with("# Nothing"));
}

#[test]
fn a_picture_of_the_wrong_size_is_said_to_be_missing() {
    let mut report = full();
    report.gallery[0].panels[1].1.rgb.pop();
    let html = report.to_html();
    assert_eq!(html.matches("data:image/png;base64,").count(), 1);
    assert!(html.contains("No picture: picture: found 11 bytes, expected 3 x 2 x 2"));
}

#[test]
fn an_error_map_shows_wrong_right_and_void() {
    let map = error_map(&[0, 1, 255, 2], &[0, 0, 1, 2], [2, 2], 255).unwrap();
    assert_eq!(map.rgb, [ERROR_RIGHT, ERROR_WRONG, ERROR_VOID, ERROR_RIGHT].concat());
    assert!(error_map(&[0; 4], &[0; 3], [2, 2], 255).is_err());
    assert!(error_map(&[0; 4], &[0; 4], [2, 3], 255).is_err());
}
