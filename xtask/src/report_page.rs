//! The report of runs, read back from what their stages left.

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

use crate::commands::SPLITS;
use crate::exit::{UNAVAILABLE, coded};
use crate::pipeline::{MODE, finished_stages, stage_label, training_time};
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
}

/// A finished stage with everything the report takes from it.
struct StageFiles {
    dir: PathBuf,
    label: String,
    config: FinalConfig,
}

/// Writes report.md, index.html, results.{csv,parquet,json} and timings.csv of `runs` into `out`.
pub(crate) fn write(runs: &[PathBuf], out: &Path) -> Result<Written> {
    let mut report = Report::default();
    for (i, run) in runs.iter().enumerate() {
        let prefix = if runs.len() > 1 {
            format!("{}: ", run.file_name().unwrap_or_default().to_string_lossy())
        } else {
            String::new()
        };
        add_run(&mut report, run, &prefix, i == 0)?;
    }
    fs_err::create_dir_all(out)?;
    let (page, text) = (out.join("index.html"), report.to_markdown());
    write_all(&results_frame(&report.rows)?, &out.join("results"))?;
    write_csv(&timings_frame(&report.timings)?, &out.join("timings.csv"))?;
    write_atomic(&out.join("report.md"), text.as_bytes())?;
    write_atomic(&page, report.to_html().as_bytes())?;
    // Everything up to the second table: what a terminal shows at a glance.
    let text = text.split("\n### ").next().unwrap_or(&text).trim_end().to_string();
    Ok(Written { page, text, rows: report.rows })
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

fn add_run(report: &mut Report, run: &Path, prefix: &str, first: bool) -> Result<()> {
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
    let classes = &some.config.classes;
    if first {
        report.title = format!("segdistill: {}", plan.recipe);
        report.class_names = classes.clone();
        report.class_colors = some.config.palette.clone();
        report.void_color = Some([0, 0, 0]);
        if !plan.description.is_empty() {
            report.summary.push(capitalised(&plan.description) + ".");
        }
    } else if report.class_names != *classes {
        anyhow::bail!("`{}` has other classes than the first run\n  hint: compare runs of one data set", run.display());
    }
    for stage in &stages {
        for split in SPLITS {
            let path = stage.dir.join("eval").join(split.to_string()).join("summary.json");
            if !path.is_file() {
                continue;
            }
            let summary = Summary::read(&path)?;
            let mut row = summary.result.clone();
            row.method = format!("{prefix}{}", row.method);
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
        add_curves(report, &plan, stage, prefix)?;
    }
    if first {
        report.gallery = gallery(&stages)?;
        report.environment.extend(environment(run)?);
        report.plan_toml = Some(plan.to_toml()?);
        report.notes = notes(&plan, some);
    }
    Ok(())
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().chain(chars).collect())
}

fn add_curves(report: &mut Report, plan: &Plan, stage: &StageFiles, prefix: &str) -> Result<()> {
    if !stage.dir.join("metrics.csv").is_file() {
        return Ok(());
    }
    let label = format!("{prefix}{}", stage.label);
    let mut add = |columns: Vec<(String, Vec<f64>)>, panel: &dyn Fn(&str) -> Option<String>| {
        let Some((_, steps)) = columns.iter().find(|(name, _)| name == "step").cloned() else { return };
        for (name, y) in columns {
            if let Some(panel) = panel(&name) {
                report.curves.push(Curve { label: label.clone(), x: steps.clone(), y, panel });
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
fn notes(plan: &Plan, teacher: &StageFiles) -> Vec<String> {
    let mut notes = vec![
        format!("Predictions: {MODE}. Weights are chosen on val and reported once on test."),
        "Every student of one seed starts from the same weights and sees the same images in the same order."
            .to_string(),
        format!("Teacher weights: {}.", teacher.config.origin),
        "MACs are multiply-accumulates of the convolutions, one image at the input size.".to_string(),
    ];
    if matches!(plan.data, DataPlan::Camvid { .. }) {
        notes.push(
            "CamVid's val frames come from a drive that train shares: val flatters, test is the harder measure."
                .to_string(),
        );
    }
    notes
}
