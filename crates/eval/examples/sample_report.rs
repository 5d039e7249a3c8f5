//! Writes a report of made-up numbers, to look at the page: `cargo run -p segdistill-eval --example sample_report OUT.html`.
//!
//! With `--test-absent` the test split is left out, with `--one` it is the report of a single row of scores.

use segdistill_eval::report::{Curve, GalleryRow, Report, RgbBytes, error_map};
use segdistill_eval::table::{PerClassRow, ResultRow, TimingRow, per_class_rows, write_atomic};
use segdistill_eval::{Confusion, Result};
use segdistill_ops::rng::Stream;

const VOID: u8 = 255;
const HW: [usize; 2] = [180, 240];
const CLASSES: [(&str, [u8; 3]); 11] = [
    ("sky", [128, 128, 128]),
    ("building", [128, 0, 0]),
    ("pole", [192, 192, 128]),
    ("road", [128, 64, 128]),
    ("pavement", [60, 40, 222]),
    ("tree", [128, 128, 0]),
    ("sign", [192, 128, 128]),
    ("fence", [64, 64, 128]),
    ("car", [64, 0, 128]),
    ("pedestrian", [64, 64, 0]),
    ("cyclist", [0, 128, 192]),
];

/// A street of boxes.
fn scene(seed: u64) -> Vec<u8> {
    let mut s = Stream::new(seed, "scene", &[]);
    let [h, w] = HW;
    let mut labels = vec![0u8; h * w];
    let mut fill = |class: u8, top: usize, left: usize, bottom: usize, right: usize| {
        for y in top..bottom.min(h) {
            labels[y * w + left.min(w)..y * w + right.min(w)].fill(class);
        }
    };
    fill(3, 110, 0, h, w);
    fill(4, 110, 0, h, 50 + s.below(20) as usize);
    for i in 0..5 {
        let left = 50 * i + s.below(15) as usize;
        fill(if s.chance(0.3) { 5 } else { 1 }, 20 + s.below(50) as usize, left, 110, left + 44);
    }
    for (class, h0, w0) in [(8, 26, 48), (8, 18, 34), (9, 34, 11), (10, 26, 20), (2, 90, 3), (6, 14, 12), (7, 16, 60)] {
        let (bottom, left) = (118 + s.below(40) as usize, s.below(200) as usize);
        fill(class, bottom - h0, left, bottom, left + w0);
    }
    fill(VOID, 174, 0, h, w);
    labels
}

/// Labels with ragged edges and patches of another class, the more the worse the model.
fn predicted(labels: &[u8], worse: f64, seed: u64) -> Vec<u8> {
    let mut s = Stream::new(seed, "predicted", &[]);
    let [h, w] = HW;
    let mut out: Vec<u8> = (0..h * w)
        .map(|i| {
            let (y, x) = ((i / w) as f64, (i % w) as f64);
            let shift = |a: f64, b: f64| (worse * 9.0 * ((a / 7.0).sin() + (b / 5.0 + a / 3.0).cos())) as isize;
            let y = (y as isize + shift(x, y)).clamp(0, h as isize - 1) as usize;
            let x = (x as isize + shift(y as f64, x)).clamp(0, w as isize - 1) as usize;
            if labels[y * w + x] == VOID { 3 } else { labels[y * w + x] }
        })
        .collect();
    for _ in 0..(worse * 20.0) as usize {
        let (top, left, class) = (s.below(150) as usize, s.below(210) as usize, s.below(11) as u8);
        for y in top..top + 12 {
            out[y * w + left..y * w + left + 24].fill(class);
        }
    }
    out
}

fn painted(labels: &[u8]) -> RgbBytes {
    let color = |l: &u8| CLASSES.get(usize::from(*l)).map_or([0, 0, 0], |c| c.1);
    RgbBytes { h: HW[0], w: HW[1], rgb: labels.iter().flat_map(color).collect() }
}

fn photo(labels: &[u8], seed: u64) -> RgbBytes {
    let mut s = Stream::new(seed, "photo", &[]);
    let mut picture = painted(labels);
    picture.rgb.iter_mut().for_each(|v| *v = (f64::from(*v) * 0.55 + 70.0 + 12.0 * s.normal()).clamp(0.0, 255.0) as u8);
    picture
}

fn curve(label: &str, panel: &str, n: usize, step: f64, y: impl Fn(f64) -> f64, noise: f64) -> Curve {
    let mut s = Stream::new(3, &format!("{label}{panel}"), &[]);
    let x: Vec<f64> = (1..=n).map(|i| i as f64 * step).collect();
    let y = x.iter().map(|x| y(*x) * (1.0 + noise * s.normal())).collect();
    Curve { label: label.into(), x, y, panel: panel.into(), run: String::new() }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|a| a == name);
    let out = arguments.iter().find(|a| !a.starts_with("--")).map_or("sample_report.html", String::as_str);
    let class_names: Vec<String> = CLASSES.iter().map(|c| c.0.to_string()).collect();
    let mut rows: Vec<ResultRow> = Vec::new();
    let mut per_class: Vec<PerClassRow> = Vec::new();
    let splits = if flag("--test-absent") { vec!["train", "val"] } else { vec!["train", "val", "test"] };
    for (method, role, encoder, worse, seeds, size) in [
        ("ce", "teacher", "xception65", 0.20, vec![0], (41_052_000, 5_130_000_000)),
        ("ce", "student", "resnet34", 0.50, vec![0, 1, 2], (22_437_000, 2_260_000_000)),
        ("csc+ce", "student", "resnet34", 0.43, vec![0, 1, 2], (22_437_000, 2_260_000_000)),
    ] {
        for (k, split) in splits.iter().enumerate() {
            for &seed in &seeds {
                let mut confusion = Confusion::new(CLASSES.len());
                for image in 0..6 {
                    let labels = scene(100 * k as u64 + image);
                    let worse = worse + 0.05 * k as f64 + 0.02 * (seed as f64 - 1.0);
                    confusion.add(&labels, &predicted(&labels, worse, image + 7 * seed), VOID)?;
                }
                let scores = confusion.scores();
                let row = ResultRow::new(method, role, encoder, split, seed, &scores, 6).with_size(size.0, size.1);
                per_class.extend(per_class_rows(&row, &class_names, &scores)?);
                rows.push(row);
            }
        }
    }
    let mut report = Report {
        title: "Street scenes: DeepLabV3+ distilled with CSC".into(),
        summary: vec!["Made-up numbers that show the page; nothing here was trained.".into()],
        class_names: class_names.clone(),
        class_colors: CLASSES.iter().map(|c| c.1).collect(),
        void_color: Some([0, 0, 0]),
        rows,
        per_class,
        ..Report::default()
    };
    if flag("--one") {
        report.title = "Label images of another program, scored".into();
        report.splits = Vec::new();
        report.rows.retain(|r| r.split == "val" && r.role == "teacher");
        report.per_class.retain(|r| r.split == "val" && r.role == "teacher");
        for row in &mut report.rows {
            (row.role, row.method, row.encoder) = ("predictions".into(), "their-net".into(), String::new());
            (row.params, row.macs) = (None, None);
        }
        for row in &mut report.per_class {
            (row.role, row.method, row.encoder) = ("predictions".into(), "their-net".into(), String::new());
        }
        return write_atomic(std::path::Path::new(out), report.to_html().as_bytes());
    }
    for seed in 0..3 {
        let (ce, csc) = (format!("ce seed {seed}"), format!("csc+ce seed {seed}"));
        let fall = |floor: f64, pace: f64| move |x: f64| floor + 2.2 * (-x / pace).exp();
        report.curves.push(curve(&ce, "loss: ce", 1200, 1.0, fall(0.34, 160.0), 0.12));
        report.curves.push(curve(&csc, "loss: ce", 1200, 1.0, fall(0.31, 170.0), 0.12));
        report.curves.push(curve(&csc, "loss: csc", 1200, 1.0, |x| 0.004 + 0.03 * (-x / 260.0).exp(), 0.15));
        report.curves.push(curve(&ce, "val mIoU", 12, 100.0, |x| 0.56 * (1.0 - (-x / 300.0).exp()), 0.015));
        report.curves.push(curve(&csc, "val mIoU", 12, 100.0, |x| 0.60 * (1.0 - (-x / 280.0).exp()), 0.015));
    }
    report.curves.push(curve("teacher", "val mIoU", 12, 100.0, |x| 0.70 * (1.0 - (-x / 240.0).exp()), 0.01));
    report.curves.push(curve("teacher", "loss: ce", 1200, 1.0, |x| 0.20 + 2.1 * (-x / 140.0).exp(), 0.1));
    for image in 0..3 {
        let labels = scene(100 + image);
        let by = |worse: f64| predicted(&labels, worse, image);
        report.gallery.push(GalleryRow {
            name: format!("scene-{image:04}"),
            split: "val".into(),
            panels: vec![
                ("Input".into(), photo(&labels, image)),
                ("Teacher".into(), painted(&by(0.2))),
                ("Ground truth".into(), painted(&labels)),
                ("Student (CE)".into(), painted(&by(0.5))),
                ("Student (CSC+CE)".into(), painted(&by(0.43))),
                ("Errors of CE: wrong red, void grey".into(), error_map(&labels, &by(0.5), HW, VOID)?),
                ("Errors of CSC+CE: wrong red, void grey".into(), error_map(&labels, &by(0.43), HW, VOID)?),
            ],
        });
    }
    for seed in 0..3 {
        for (method, seconds) in [("ce", 201.0), ("csc+ce", 259.0)] {
            for (stage, share, n_steps) in [("train", 1.0, 1200), ("eval val", 0.02, 40)] {
                let seconds = share * (seconds + 3.0 * seed as f64);
                let (method, role, stage) = (method.into(), "student".into(), stage.into());
                report.timings.push(TimingRow { method, role, seed, stage, seconds, n_steps, run: String::new() });
            }
        }
    }
    report.plan_toml = Some("[teacher]\nencoder = \"xception65\"\n\n[optim]\nlr = 0.01\nsteps = 1200\n".into());
    report.environment = [
        ("Resolution", "180 x 240"),
        ("Evaluation", "whole image, logits upsampled bilinearly to the labels"),
        ("Machine", "2 cores, no GPU"),
        ("Device", "cpu"),
    ]
    .map(|(name, value)| (name.to_string(), value.to_string()))
    .to_vec();
    report.notes = vec!["Checkpoints were selected on val; test was evaluated once.".into()];
    write_atomic(std::path::Path::new(out), report.to_html().as_bytes())
}
