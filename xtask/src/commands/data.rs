//! `data check`, `data stats` and `data preview`: what of a data set is there, what it holds, what it looks like.
//!
//! Looking is done by `segdistill_data`; here its findings become lines, JSON and exit codes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use segdistill_data::check::{CheckReport, Problem, SplitReport, SplitStatus, check};
use segdistill_data::manifest::Source;
use segdistill_data::stats::Stats;
use segdistill_data::{Dataset, DecodedCache, Manifest, Sample, Split, preview};

use super::{SPLITS, data_root, need_split, open_split};
use crate::cli::{Data, DatasetArgs};
use crate::exit::{DATA, UNAVAILABLE, USAGE, coded, usage};
use crate::progress::Progress;
use crate::recipe::DataPlan;

/// Runs the command.
pub(crate) fn run(args: &Data) -> Result<()> {
    match args {
        Data::Check { dataset, json } => run_check(&Asked::new(dataset)?, *json),
        Data::Stats { dataset, json } => run_stats(&Asked::new(dataset)?, *json),
        Data::Preview { dataset, out, count } => {
            if *count == 0 {
                return Err(usage!("--count 0, expected at least 1"));
            }
            if out.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
                return Err(usage!("--out `{}`, expected a file name ending in .png", out.display()));
            }
            run_preview(&Asked::new(dataset)?, out, *count)
        }
    }
}

/// What was asked for, resolved.
struct Asked {
    manifest: Manifest,
    /// Folder of the data set; `None` for drawn data.
    root: Option<PathBuf>,
    /// In report order, each once.
    splits: Vec<Split>,
    /// Whether the splits were named: then each must be there.
    named: bool,
}

impl Asked {
    fn new(args: &DatasetArgs) -> Result<Self> {
        let manifest = Manifest::named(&args.dataset).map_err(|e| coded(USAGE, e))?;
        let splits = args.splits.as_deref().map_or(Ok(SPLITS.to_vec()), parse_splits)?;
        let root = match (manifest.source, &args.data_root) {
            (Source::Files, given) => Some(data_root(&manifest.id, given.clone())?),
            (Source::Drawn, None) => None,
            (Source::Drawn, Some(_)) => {
                return Err(usage!("{} is drawn: a data root is not used\n  hint: take out --data-root", manifest.id));
            }
        };
        Ok(Self { manifest, root, splits, named: args.splits.is_some() })
    }

    /// Samples of `split` as the manifest counts them.
    fn published(&self, split: Split) -> usize {
        self.manifest.splits.get(&split).map_or(0, |s| s.count)
    }

    /// What the manifest says, for opening it. Drawn scenes come in the manifest's size and counts, from seed 0.
    fn plan(&self) -> DataPlan {
        match &self.root {
            Some(root) => DataPlan::Files { dataset: self.manifest.id.clone(), root: root.clone() },
            None => {
                let [height, width] = self.manifest.image_hw;
                let [train, val, test] = SPLITS.map(|split| self.published(split));
                DataPlan::StreetScenes { height, width, train, val, test, seed: 0, variety: 1.0 }
            }
        }
    }

    /// Every split asked for that is there; a named one must be.
    fn open(&self) -> Result<Vec<Arc<dyn Dataset>>> {
        let plan = self.plan();
        let mut open = Vec::new();
        for split in &self.splits {
            match self.named {
                true => open.push(need_split(&plan, *split)?),
                false => open.extend(open_split(&plan, *split)?),
            }
        }
        if open.is_empty() {
            let hint = &self.manifest.obtain;
            return Err(coded(UNAVAILABLE, anyhow!("no split of {} is there\n  hint: {hint}", self.manifest.id)));
        }
        Ok(open)
    }
}

/// Splits by name, in report order, each once.
fn parse_splits(names: &[String]) -> Result<Vec<Split>> {
    let asked =
        names.iter().map(|name| name.parse::<Split>().map_err(|e| coded(USAGE, e))).collect::<Result<Vec<_>>>()?;
    Ok(SPLITS.into_iter().filter(|split| asked.contains(split)).collect())
}

fn run_check(asked: &Asked, json: bool) -> Result<()> {
    let root = asked.root.as_deref().unwrap_or(Path::new(""));
    let mut report = CheckReport { dataset: asked.manifest.id.clone(), splits: Vec::new() };
    let mut progress = Progress::new("checking", asked.splits.len() as u64, "splits");
    for (done, split) in asked.splits.iter().enumerate() {
        progress.set(done as u64, || split.to_string());
        report.splits.extend(check(root, &asked.manifest, &[*split]).splits);
    }
    progress.finish();
    let verdict = Verdict::of(&report, asked.named);
    if json {
        println!("{}", serde_json::to_string_pretty(&check_json(asked, &report, &verdict)?)?);
    } else {
        for line in check_lines(asked, &report) {
            println!("{line}");
        }
    }
    match verdict.failure() {
        None => Ok(()),
        Some(why) => Err(coded(DATA, anyhow!("data check of {} failed: {why}", report.dataset))),
    }
}

/// What a check comes to.
struct Verdict {
    n_problems: usize,
    /// Absent splits that had to be there.
    missing: Vec<Split>,
}

impl Verdict {
    fn of(report: &CheckReport, named: bool) -> Self {
        let absent: Vec<Split> = absent_splits(report).collect();
        // One absent split is how many people have the data set; none present is no data set.
        let none_present = absent.len() == report.splits.len();
        Self { n_problems: problems(report).len(), missing: if named || none_present { absent } else { Vec::new() } }
    }

    fn failure(&self) -> Option<String> {
        let problems = match self.n_problems {
            0 => None,
            1 => Some("1 problem".to_string()),
            n => Some(format!("{n} problems")),
        };
        let names = self.missing.iter().map(Split::to_string).collect::<Vec<_>>().join(", ");
        let missing = (!self.missing.is_empty()).then(|| format!("absent: {names}"));
        let parts: Vec<String> = problems.into_iter().chain(missing).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn absent_splits(report: &CheckReport) -> impl Iterator<Item = Split> {
    report.splits.iter().filter(|s| s.status == SplitStatus::Absent).map(|s| s.split)
}

/// Every problem once: a folder without any list file is the same problem for each split.
fn problems(report: &CheckReport) -> Vec<&Problem> {
    let mut all: Vec<&Problem> = Vec::new();
    for problem in report.splits.iter().flat_map(|s| &s.problems) {
        if !all.contains(&problem) {
            all.push(problem);
        }
    }
    all
}

fn check_json(asked: &Asked, report: &CheckReport, verdict: &Verdict) -> Result<Value> {
    let mut value = serde_json::to_value(report)?;
    value["root"] = json!(asked.root);
    value["ok"] = json!(verdict.failure().is_none());
    value["obtain"] = json!(asked.manifest.obtain);
    for (at, split) in report.splits.iter().enumerate() {
        value["splits"][at]["n_published"] = json!(asked.published(split.split));
    }
    Ok(value)
}

/// A line a split, then the problems: `file: place: found X, expected Y`, each with its way out.
fn check_lines(asked: &Asked, report: &CheckReport) -> Vec<String> {
    let mut lines: Vec<String> = report.splits.iter().map(|split| split_line(asked, split)).collect();
    for p in problems(report) {
        lines.push(format!("{}: {}: found {}, expected {}", p.file, p.place, p.found, p.expected));
        lines.push(format!("  hint: {}", p.hint));
    }
    lines
}

fn split_line(asked: &Asked, report: &SplitReport) -> String {
    let split = report.split;
    if report.status == SplitStatus::Absent {
        let (n, how) = (asked.published(split), &asked.manifest.obtain);
        return format!("{split:<6} absent (manifest: {n} images); how to obtain: {how}");
    }
    let withheld = asked.manifest.splits.get(&split).is_some_and(|s| s.labels_withheld);
    let state = match (report.problems.len(), asked.manifest.source) {
        (0, Source::Files) if withheld && report.n_unlabelled == report.n_images => {
            "ok, every pixel void: the publishers withhold these labels, nothing can be scored here".to_string()
        }
        (0, Source::Files) => "ok".to_string(),
        (0, Source::Drawn) => "ok, drawn from a seed".to_string(),
        (1, _) => "1 problem".to_string(),
        (n, _) => format!("{n} problems"),
    };
    format!("{split:<6} {:>4} images  {state}", report.n_images)
}

fn run_stats(asked: &Asked, json: bool) -> Result<()> {
    let open = asked.open()?;
    let mut progress = Progress::new("counting", open.len() as u64, "splits");
    let mut counted = Vec::new();
    for (done, dataset) in open.iter().enumerate() {
        progress.set(done as u64, || dataset.split().to_string());
        let stats = Stats::of(dataset.as_ref()).map_err(|e| coded(DATA, e))?;
        counted.push((dataset.split(), stats));
    }
    progress.finish();
    if json {
        let splits: Vec<Value> = counted.iter().map(|(split, stats)| stats_json(asked, *split, stats)).collect();
        println!("{}", serde_json::to_string_pretty(&json!({ "dataset": asked.manifest.id, "splits": splits }))?);
        return Ok(());
    }
    for (split, stats) in &counted {
        for line in stats_lines(asked, *split, stats) {
            println!("{line}");
        }
    }
    Ok(())
}

fn stats_json(asked: &Asked, split: Split, stats: &Stats) -> Value {
    let (shares, weights) = (stats.class_shares(), stats.median_frequency_weights());
    let class = |(id, class): (usize, &segdistill_data::Class)| {
        json!({
            "name": class.name,
            "pixels": stats.class_pixels[id],
            "share": shares[id],
            "images": stats.images_with_class[id],
            "median_frequency_weight": weights[id],
        })
    };
    json!({
        "split": split,
        "n_images": stats.n_images,
        "n_pixels": stats.n_pixels(),
        "void_pixels": stats.void_pixels,
        "rgb_mean": stats.rgb_mean(),
        "rgb_std": stats.rgb_std(),
        "classes": asked.manifest.classes.classes.iter().enumerate().map(class).collect::<Vec<_>>(),
    })
}

fn stats_lines(asked: &Asked, split: Split, stats: &Stats) -> Vec<String> {
    let (shares, weights) = (stats.class_shares(), stats.median_frequency_weights());
    let rgb = |v: [f64; 3]| v.map(|x| format!("{x:.4}")).join(" ");
    let mut lines = vec![
        format!("{split}: {} images, {} pixels", stats.n_images, stats.n_pixels()),
        format!("  RGB mean {}, deviation {}, in [0, 1]", rgb(stats.rgb_mean()), rgb(stats.rgb_std())),
        format!("  {:<14} {:>12} {:>9} {:>8} {:>8}", "class", "pixels", "share", "images", "weight"),
    ];
    for (id, class) in asked.manifest.classes.classes.iter().enumerate() {
        let (pixels, images) = (stats.class_pixels[id], stats.images_with_class[id]);
        let (share, weight) = (100.0 * shares[id], weights[id]);
        lines.push(format!("  {:<14} {pixels:>12} {share:>7.2} % {images:>8} {weight:>8.3}", class.name));
    }
    lines.push(format!("  {:<14} {:>12}", "void", stats.void_pixels));
    if stats.class_pixels.iter().all(|n| *n == 0) {
        lines.push("  no pixel belongs to a class: nothing can be learnt or scored here".into());
    }
    lines.push("  share: of the pixels that are not void; weight: median frequency balancing".into());
    lines
}

fn run_preview(asked: &Asked, out: &Path, count: usize) -> Result<()> {
    let open = asked.open()?;
    let lens: Vec<usize> = open.iter().map(|dataset| dataset.len()).collect();
    let mut samples: Vec<Sample> = Vec::with_capacity(count);
    let hw = sheet_hw(asked.manifest.image_hw);
    for (dataset, share) in open.iter().zip(shares(&lens, count)) {
        // Shrinks on the way and keeps nothing.
        let shrunk = DecodedCache::new(Arc::clone(dataset), hw, 0);
        for index in spread(shrunk.len(), share) {
            samples.push(shrunk.sample(index).map_err(|e| coded(DATA, e))?);
        }
    }
    let sheet = preview::sheet(&samples, &asked.manifest.classes, if samples.len() < 4 { 1 } else { 2 })?;
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs_err::create_dir_all(folder)?;
    }
    preview::write_png(out, &sheet)?;
    let names: Vec<&str> = samples.iter().map(|s| s.name.as_str()).collect();
    let size = hw.map_or(String::new(), |[h, w]| format!(", shrunk to {w}x{h}"));
    println!("{}: {} of {}, each as image, labels, overlay{size}", out.display(), names.join(", "), asked.manifest.id);
    Ok(())
}

/// Widest picture on a sheet, in pixels.
const SHEET_WIDTH: usize = 640;

/// Height and width that pictures of `[h, w]` are shrunk to on a sheet, if they are wider than it takes.
fn sheet_hw([h, w]: [usize; 2]) -> Option<[usize; 2]> {
    (w > SHEET_WIDTH).then(|| [(h * SHEET_WIDTH / w).max(1), SHEET_WIDTH])
}

/// How many samples each split gives to a sheet of `count`: as even as their lengths allow, the first ones more.
fn shares(lens: &[usize], count: usize) -> Vec<usize> {
    let mut given = vec![0; lens.len()];
    let mut left = count.min(lens.iter().sum());
    while left > 0 {
        for (share, len) in given.iter_mut().zip(lens) {
            if left > 0 && *share < *len {
                *share += 1;
                left -= 1;
            }
        }
    }
    given
}

/// `count` indices spread over `0..len`, first one first.
fn spread(len: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count.min(len)).map(move |k| k * len / count.min(len).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    fn args(dataset: &str, splits: Option<&[&str]>) -> DatasetArgs {
        let splits = splits.map(|s| s.iter().map(ToString::to_string).collect());
        DatasetArgs { dataset: dataset.into(), data_root: None, splits }
    }

    fn report(splits: &[(Split, SplitStatus, usize)]) -> CheckReport {
        let problem = |k: usize| Problem {
            file: format!("{k}.png"),
            place: "row 1, column 2".into(),
            found: "label 12".into(),
            expected: "0..=10 or void 11".into(),
            hint: "look".into(),
        };
        let split = |&(split, status, n): &(Split, SplitStatus, usize)| SplitReport {
            split,
            status,
            n_images: 5,
            n_unlabelled: 0,
            problems: (0..n).map(problem).collect(),
        };
        CheckReport { dataset: "camvid".into(), splits: splits.iter().map(split).collect() }
    }

    fn asked() -> Asked {
        let manifest = Manifest::named("camvid").unwrap();
        Asked { manifest, root: Some("camvid".into()), splits: SPLITS.to_vec(), named: false }
    }

    const PRESENT: SplitStatus = SplitStatus::Present;
    const ABSENT: SplitStatus = SplitStatus::Absent;

    #[test]
    fn splits_come_in_report_order_each_once() {
        let names = |names: &[&str]| parse_splits(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(names(&["test", "train", "test"]).unwrap(), [Split::Train, Split::Test]);
        let error = names(&["val", "trial"]).unwrap_err();
        assert_eq!(exit::code_of(&error), USAGE);
        assert!(error.to_string().contains("`trial`") && error.to_string().contains("train, val"), "{error}");
    }

    #[test]
    fn names_nobody_knows_and_a_root_nobody_needs_are_usage_errors() {
        let code = |args: &DatasetArgs| exit::code_of(&Asked::new(args).err().unwrap());
        assert_eq!(code(&args("kitti", None)), USAGE);
        assert_eq!(code(&args("street-scenes", Some(&["vall"]))), USAGE);
        assert_eq!(code(&DatasetArgs { data_root: Some(".".into()), ..args("street-scenes", None) }), USAGE);
        assert_eq!(code(&DatasetArgs { data_root: Some("no/such".into()), ..args("camvid", None) }), UNAVAILABLE);
    }

    #[test]
    fn an_absent_split_fails_when_named_or_when_none_is_there() {
        let one = report(&[(Split::Train, PRESENT, 0), (Split::Test, ABSENT, 0)]);
        assert_eq!(Verdict::of(&one, false).failure(), None);
        assert_eq!(Verdict::of(&one, true).failure().unwrap(), "absent: test");
        let none = report(&[(Split::Train, ABSENT, 1), (Split::Test, ABSENT, 1)]);
        assert_eq!(Verdict::of(&none, false).failure().unwrap(), "1 problem, absent: train, test");
        let broken = report(&[(Split::Train, PRESENT, 2), (Split::Test, ABSENT, 0)]);
        assert_eq!(Verdict::of(&broken, false).failure().unwrap(), "2 problems");
    }

    #[test]
    fn a_check_is_written_as_lines_and_json() {
        let report = report(&[(Split::Train, PRESENT, 0), (Split::Val, PRESENT, 1), (Split::Test, ABSENT, 0)]);
        let lines = check_lines(&asked(), &report);
        assert_eq!(lines[0], "train     5 images  ok");
        assert_eq!(lines[1], "val       5 images  1 problem");
        assert!(lines[2].starts_with("test   absent (manifest: 233 images); how to obtain: "), "{}", lines[2]);
        assert_eq!(lines[3], "0.png: row 1, column 2: found label 12, expected 0..=10 or void 11");
        assert_eq!(lines[4..], ["  hint: look"]);
        let value = check_json(&asked(), &report, &Verdict::of(&report, false)).unwrap();
        assert_eq!((&value["ok"], &value["splits"][2]["status"]), (&json!(false), &json!("absent")));
        assert_eq!(value["splits"][2]["n_published"], json!(233));
    }

    #[test]
    fn drawn_data_is_opened_without_a_folder_and_counted() {
        let asked = Asked::new(&args("street-scenes", Some(&["val"]))).unwrap();
        let open = asked.open().unwrap();
        assert_eq!((open.len(), open[0].len(), open[0].split()), (1, 128, Split::Val));
        let stats = Stats::of(open[0].as_ref()).unwrap();
        let value = stats_json(&asked, Split::Val, &stats);
        assert_eq!(value["n_pixels"], json!(128 * 96 * 128));
        let counted: u64 = value["classes"].as_array().unwrap().iter().map(|c| c["pixels"].as_u64().unwrap()).sum();
        assert_eq!(counted + value["void_pixels"].as_u64().unwrap(), 128 * 96 * 128);
        assert_eq!(stats_lines(&asked, Split::Val, &stats).len(), 3 + 11 + 2);
    }

    #[test]
    fn a_sheet_shares_its_places() {
        assert_eq!((sheet_hw([360, 480]), sheet_hw([1024, 2048])), (None, Some([320, 640])));
        assert_eq!(shares(&[367, 101, 233], 8), [3, 3, 2]);
        assert_eq!(shares(&[1, 5], 4), [1, 3]);
        assert_eq!(shares(&[2, 1], 8), [2, 1]);
        assert_eq!(spread(10, 3).collect::<Vec<_>>(), [0, 3, 6]);
        assert_eq!(spread(2, 5).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(spread(0, 3).count(), 0);
    }
}
