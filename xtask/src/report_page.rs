//! The report of runs, read back from what their stages left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use segdistill_data::preview::{read_image, read_labels};
use segdistill_data::{LabelMap, classes::VOID};
use segdistill_eval::Summary;
use segdistill_eval::report::{Curve, GalleryRow, Report, RgbBytes, error_map};
use segdistill_eval::table::{
    PerClassRow, ResultRow, per_class_rows, read_csv, results_frame, timings_frame, timings_from_frame, write_all,
    write_atomic, write_csv,
};

use crate::commands::{SPLITS, labels_withheld};
use crate::exit::{UNAVAILABLE, coded, usage};
use crate::pipeline::{MODE, finished_stages, stage_label, training_time, unfinished};
use crate::recipe::{DataPlan, Plan};
use crate::run_folder::{FinalConfig, class_table};

/// What was written.
pub(crate) struct Written {
    /// The page.
    pub(crate) page: PathBuf,
    /// Headline and main table, for the terminal.
    pub(crate) text: String,
    /// Rows of results.csv.
    pub(crate) rows: Vec<ResultRow>,
    /// Students that did not finish, one sentence each.
    pub(crate) failed: Vec<String>,
}

/// A finished stage with everything the report takes from it.
struct StageFiles {
    dir: PathBuf,
    label: String,
    config: FinalConfig,
}

/// Writes report.md, index.html, results.{csv,parquet,json} and timings.csv of `runs` into `out`.
///
/// # Errors
/// Usage for a run given twice, and for runs whose numbers cannot stand beside each other: of other data, scored at
/// another size or on another number of images.
pub(crate) fn write(runs: &[PathBuf], out: &Path) -> Result<Written> {
    let names = run_names(runs)?;
    let mut report = Report::default();
    let mut common = Common::default();
    let mut failed = Vec::new();
    for (run, name) in runs.iter().zip(&names) {
        failed.extend(add_run(&mut report, &mut common, run, name)?);
    }
    if let [first, .., _] = names.as_slice() {
        report.title = format!("segdistill: {} compared", names.join(", "));
        report.notes.push(format!("Pictures, plan and machine are those of run {first}."));
    }
    fs_err::create_dir_all(out)?;
    let (page, text) = (out.join("index.html"), report.to_markdown());
    write_all(&results_frame(&report.rows)?, &out.join("results"))?;
    write_csv(&timings_frame(&report.timings)?, &out.join("timings.csv"))?;
    write_atomic(&out.join("report.md"), text.as_bytes())?;
    write_atomic(&page, report.to_html().as_bytes())?;
    // Everything up to the second table: what a terminal shows at a glance.
    let text = text.split("\n### ").next().unwrap_or(&text).trim_end().to_string();
    Ok(Written { page, text, rows: report.rows, failed })
}

/// The page of one evaluation that belongs to no run.
pub(crate) fn write_single(summary: &Summary, out: &Path, palette: &[[u8; 3]]) -> Result<PathBuf> {
    let [h, w] = summary.label_hw;
    let report = Report {
        title: format!("{} on {}", summary.stage, summary.dataset),
        rows: vec![summary.result.clone()],
        splits: vec![summary.result.split.clone()],
        class_names: summary.class_names.clone(),
        class_colors: palette.to_vec(),
        per_class: per_class_rows(&summary.result, &summary.class_names, &summary.scores)?,
        environment: vec![("scored at".into(), format!("{h}x{w}")), ("mode".into(), summary.mode.clone())],
        ..Report::default()
    };
    let page = out.join("index.html");
    write_atomic(&page, report.to_html().as_bytes())?;
    write_atomic(&out.join("report.md"), report.to_markdown().as_bytes())?;
    Ok(page)
}

/// A name for each run: nothing for a single one, else the last parts of its path, as many as tell it from the others.
fn run_names(runs: &[PathBuf]) -> Result<Vec<String>> {
    if runs.len() < 2 {
        return Ok(vec![String::new(); runs.len()]);
    }
    // Links and `..` resolved, so that one folder has one name; a folder that is not there is refused on reading.
    let parts = |run: &PathBuf| -> Vec<String> {
        let whole = fs_err::canonicalize(run).unwrap_or_else(|_| run.clone());
        whole.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect()
    };
    let all: Vec<Vec<String>> = runs.iter().map(parts).collect();
    let tail = |i: usize, n: usize| &all[i][all[i].len().saturating_sub(n)..];
    let name = |i: usize| {
        for n in 1..=all[i].len() {
            if (0..all.len()).all(|j| j == i || tail(j, n) != tail(i, n)) {
                return Ok(tail(i, n).join("/"));
            }
        }
        let twin = (0..all.len()).find(|j| *j != i && all[*j] == all[i]).unwrap_or(i);
        Err(usage!(
            "`{}` and `{}` are one run\n  hint: name each run once; a run beside itself is no comparison",
            runs[i.min(twin)].display(),
            runs[i.max(twin)].display()
        ))
    };
    (0..all.len()).map(name).collect()
}

/// What all runs of a report must share, from the first run that tells it.
#[derive(Default)]
struct Common {
    /// Data set and classes, and the scenes where they are drawn.
    data: Option<(String, String)>,
    /// Size and number of the label maps of each split.
    splits: BTreeMap<String, (String, String)>,
}

impl Common {
    fn same_data(&mut self, run: &str, plan: &Plan, config: &FinalConfig) -> Result<()> {
        let scenes = match &plan.data {
            DataPlan::StreetScenes { seed, variety, .. } => format!(", scenes of seed {seed} and variety {variety}"),
            DataPlan::Files { .. } => String::new(),
        };
        let found =
            format!("{}{scenes}, {} classes: {}", config.dataset, config.classes.len(), config.classes.join(", "));
        let (first, expected) = self.data.get_or_insert_with(|| (run.to_string(), found.clone()));
        same("data", (run, &found), (first, expected))
    }

    fn same_split(&mut self, run: &str, summary: &Summary) -> Result<()> {
        let [h, w] = summary.label_hw;
        let split = &summary.result.split;
        let found = format!("{}, {} images scored at {h}x{w}", summary.dataset, summary.result.n_images);
        let entry = self.splits.entry(split.clone());
        let (first, expected) = entry.or_insert_with(|| (run.to_string(), found.clone()));
        same(split, (run, &found), (first, expected))
    }
}

fn same(what: &str, (run, found): (&str, &str), (first, expected): (&str, &str)) -> Result<()> {
    // Within one run the plan saw to it.
    if run == first || found == expected {
        return Ok(());
    }
    Err(usage!(
        "{what} of run {run} is {found}, but of run {first} {expected}\n  hint: numbers compare on the same images only; \
         report these runs apart"
    ))
}

/// Adds what a run left; gives a sentence for each student of it that did not finish.
fn add_run(report: &mut Report, common: &mut Common, run: &Path, name: &str) -> Result<Vec<String>> {
    let first = common.data.is_none();
    let plan = Plan::read(&run.join("plan.toml"))?;
    let stages: Vec<StageFiles> = finished_stages(run, &plan)?
        .into_iter()
        .map(|(dir, config)| StageFiles { label: stage_label(&config), dir, config })
        .collect();
    let Some(some) = stages.first() else {
        let why = anyhow::anyhow!(
            "`{}` holds no finished stage\n  hint: `cargo xtask reproduce --resume` goes on with it",
            run.display()
        );
        return Err(coded(UNAVAILABLE, why));
    };
    common.same_data(name, &plan, &some.config)?;
    let of_run = if name.is_empty() { String::new() } else { format!("{name}: ") };
    if first {
        report.title = format!("segdistill: {}", plan.recipe);
        report.class_names = some.config.classes.clone();
        report.class_colors = some.config.palette.clone();
        report.void_color = Some([0, 0, 0]);
        report.notes = notes(&plan);
    }
    if !plan.description.is_empty() {
        report.summary.push(format!("{of_run}{}.", capitalised(&plan.description)));
    }
    let failed: Vec<String> = unfinished(run, &plan)?.iter().map(|sentence| format!("{of_run}{sentence}")).collect();
    report.summary.extend(failed.iter().cloned());
    report.notes.push(format!("{of_run}Teacher weights: {}.", some.config.origin));
    let n_timings = report.timings.len();
    for stage in &stages {
        for split in SPLITS {
            let path = stage.dir.join("eval").join(split.to_string()).join("summary.json");
            if !path.is_file() {
                continue;
            }
            let summary = Summary::read(&path)?;
            common.same_split(name, &summary)?;
            let row = summary.result.clone().with_run(name);
            let of_class: Vec<PerClassRow> = per_class_rows(&row, &summary.class_names, &summary.scores)?;
            report.per_class.extend(of_class);
            report.rows.push(row);
            if first && split == SPLITS[1] && stage.config.role == "teacher" {
                let [h, w] = summary.label_hw;
                report.environment.push(("scored at".into(), format!("{h}x{w}, {}", summary.mode)));
            }
        }
        let timings = stage.dir.join("timings.csv");
        if timings.is_file() {
            report.timings.extend(timings_from_frame(&read_csv(&timings)?)?);
        }
        add_curves(report, &plan, stage, name)?;
    }
    if first {
        report.gallery = gallery(&stages)?;
        report.environment.extend(environment(run)?);
        report.plan_toml = Some(plan.to_toml()?);
    }
    let of_this_run = &mut report.timings[n_timings..];
    of_this_run.iter_mut().for_each(|row| row.run = name.to_string());
    Ok(failed)
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}

fn add_curves(report: &mut Report, plan: &Plan, stage: &StageFiles, run: &str) -> Result<()> {
    if !stage.dir.join("metrics.csv").is_file() {
        return Ok(());
    }
    let mut add = |columns: Vec<(String, Vec<f64>)>, panel: &dyn Fn(&str) -> Option<String>| {
        let Some((_, steps)) = columns.iter().find(|(name, _)| name == "step").cloned() else { return };
        for (name, y) in columns {
            if let Some(panel) = panel(&name) {
                let (label, run) = (stage.label.clone(), run.to_string());
                report.curves.push(Curve { label, x: steps.clone(), y, panel, run });
            }
        }
    };
    add(segdistill_train::read_metrics(&stage.dir)?, &|name| {
        name.strip_prefix("loss_").map(|term| format!("loss: {term}"))
    });
    add(segdistill_train::read_validation(&stage.dir)?, &|name| (name == "miou").then(|| "val mIoU".to_string()));
    let is_teacher = stage.config.role == "teacher";
    let planned =
        plan.students.iter().find(|s| !is_teacher && s.method == stage.config.method && s.seed == stage.config.seed);
    if let Some(row) =
        training_time(&stage.dir, if is_teacher { &plan.teacher } else { planned.unwrap_or(&plan.teacher) })?
    {
        report.timings.push(row);
    }
    Ok(())
}

/// Rows of pictures: input, teacher, ground truth, the first seed of every method, and where each is wrong.
fn gallery(stages: &[StageFiles]) -> Result<Vec<GalleryRow>> {
    let Some(teacher) = stages.first().filter(|s| s.config.role == "teacher") else { return Ok(Vec::new()) };
    let folder = |s: &StageFiles| s.dir.join("eval/val/gallery");
    if !folder(teacher).is_dir() {
        return Ok(Vec::new());
    }
    let mut students: Vec<&StageFiles> = Vec::new();
    for stage in stages.iter().filter(|s| s.config.role == "student") {
        if students.iter().all(|s| s.config.method != stage.config.method) {
            students.push(stage);
        }
    }
    let mut names: Vec<String> = Vec::new();
    for entry in fs_err::read_dir(folder(teacher))? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        names.extend(file.strip_suffix("_input.png").map(str::to_string));
    }
    names.sort();
    let colors = class_table(&teacher.config);
    let mut rows = Vec::new();
    for name in names {
        let at = |s: &StageFiles, what: &str| folder(s).join(format!("{name}_{what}.png"));
        let truth = read_labels(&at(teacher, "labels"))?;
        let hw = [truth.height, truth.width];
        let picture = |labels: &LabelMap| -> RgbBytes {
            let image = colors.colorize(labels);
            RgbBytes { h: image.height, w: image.width, rgb: image.rgb }
        };
        let input = read_image(&at(teacher, "input"))?;
        let mut panels = vec![("input".to_string(), RgbBytes { h: input.height, w: input.width, rgb: input.rgb })];
        let predicted = |s: &StageFiles| read_labels(&at(s, "predicted"));
        panels.push((format!("teacher ({})", teacher.config.model.encoder), picture(&predicted(teacher)?)));
        panels.push(("ground truth".to_string(), picture(&truth)));
        for student in &students {
            let caption = format!("{} ({})", student.config.model.encoder, student.config.method.to_uppercase());
            let labels = predicted(student).with_context(|| format!("gallery of {}", student.label))?;
            panels.push((caption, picture(&labels)));
            panels.push((
                format!("errors of {}", student.config.method.to_uppercase()),
                error_map(&truth.ids, &labels.ids, hw, VOID)?,
            ));
        }
        rows.push(GalleryRow { name, split: "val".to_string(), panels });
    }
    Ok(rows)
}

fn environment(run: &Path) -> Result<Vec<(String, String)>> {
    let path = run.join("environment.json");
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let json: serde_json::Value =
        serde_json::from_slice(&fs_err::read(&path)?).with_context(|| format!("`{}`", path.display()))?;
    let text = |v: &serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    let facts = json.as_object().into_iter().flatten().filter(|(_, v)| !v.is_null());
    Ok(facts.map(|(k, v)| (k.replace('_', " "), text(v))).collect())
}

/// What a reader must know to read the numbers.
fn notes(plan: &Plan) -> Vec<String> {
    let mut notes = vec![
        format!("Predictions: {MODE}. Weights are chosen on val and reported once on test."),
        "Every student of one seed starts from the same weights and sees the same images in the same order."
            .to_string(),
        "MACs are multiply-accumulates of the convolutions, one image at the input size.".to_string(),
    ];
    if matches!(&plan.data, DataPlan::Files { dataset, .. } if dataset == "camvid") {
        notes.push(
            "CamVid's val frames come from a drive that train shares: val flatters, test is the harder measure."
                .to_string(),
        );
    }
    let withheld = SPLITS.into_iter().filter(|split| labels_withheld(&plan.data, *split).unwrap_or(false));
    notes.extend(withheld.map(|split| {
        format!("Labels of {split} are withheld by the publishers of the data set: nothing is scored on {split} here.")
    }));
    notes
}
