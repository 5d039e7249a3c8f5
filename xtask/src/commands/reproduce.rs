//! `reproduce`: teacher, students, evaluation, report.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device};

use segdistill_eval::stats::MeanSd;
use segdistill_eval::table::ResultRow;
use segdistill_models::{Frozen, build, macs};
use segdistill_ops::ParamStore;
use segdistill_train::{Stage, step_seconds};

use crate::cli::{RecipeArgs, Reproduce};
use crate::exit::{OUT_OF_BAND, coded};
use crate::pipeline::{Interrupt, Pipeline};
use crate::progress::duration;
use crate::recipe::{Expect, Plan};
use crate::report_page;
use crate::run_folder::RunFolder;

/// Where a command's run lives.
pub(crate) fn out_dir(args: &RecipeArgs, plan: &Plan) -> PathBuf {
    args.out.clone().unwrap_or_else(|| Path::new("runs").join(&plan.recipe))
}

/// Runs the command.
pub(crate) fn run(args: &Reproduce) -> Result<()> {
    let plan = Plan::resolve(&args.recipe)?;
    let device = super::device(&plan.device, plan.tf32)?;
    plan.check_precision(&device)?;
    if args.dry_run {
        return dry_run(&plan, &device, args.json);
    }
    let started = Instant::now();
    let (_, written) = run_plan(&plan, &out_dir(&args.recipe, &plan), args.resume)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&written.rows)?);
    } else {
        println!("{}", written.text);
    }
    eprintln!("report: {}  ({})", written.page.display(), duration(started.elapsed().as_secs_f64()));
    all_finished(&written.failed)?;
    within_band(&plan.expect, &written.rows)
}

/// An error, once the report is written, when students are missing from it.
pub(super) fn all_finished(failed: &[String]) -> Result<()> {
    if failed.is_empty() {
        return Ok(());
    }
    Err(anyhow::anyhow!(
        "{}\n  hint: what the others reached stands; lower `optim.lr` or the weight of the term, or set \
         `optim.clip_norm`, in another --out folder",
        failed.join("\n")
    ))
}

/// Trains and evaluates every stage of a plan in `out` and writes the report there; gives the folder and the report.
pub(crate) fn run_plan(plan: &Plan, out: &Path, resume: bool) -> Result<(PathBuf, report_page::Written)> {
    let device = super::device(&plan.device, plan.tf32)?;
    plan.preflight(&device)?;
    let folder = RunFolder::take(out, plan, resume)?;
    eprintln!("run folder {}", folder.path().display());
    let pipeline = Pipeline { plan, run: folder.path(), device, interrupt: Interrupt::listen()?, resume };
    let teacher = pipeline.teacher()?;
    pipeline.students(&plan.students.iter().collect::<Vec<_>>(), Some(&teacher))?;
    let written = report_page::write(&[folder.path().to_path_buf()], &folder.path().join("report"))?;
    Ok((folder.path().to_path_buf(), written))
}

/// What the recipe promises of its results.
fn within_band(expect: &Expect, rows: &[ResultRow]) -> Result<()> {
    let val = |role: &str, method: Option<&str>| {
        let of = |r: &&ResultRow| r.split == "val" && r.role == role && method.is_none_or(|m| r.method == m);
        MeanSd::of(rows.iter().filter(of).map(|r| r.miou)).mean
    };
    let teacher = val("teacher", None);
    let mut missed = Vec::new();
    let mut at_least = |what: &str, found: f64, least: f64| {
        // A missing or non-finite score misses too.
        if least > 0.0 && (found < least || !found.is_finite()) {
            missed.push(format!("{what} is {found:.4}, expected at least {least:.4}"));
        }
    };
    at_least("teacher mIoU on val", teacher, expect.teacher_val_miou);
    if rows.iter().any(|r| r.role == "student" && r.method == "ce") {
        at_least("mean mIoU of the ce student on val", val("student", Some("ce")), expect.student_ce_val_miou);
    }
    if expect.teacher_above_students {
        let mut methods: Vec<&str> = rows.iter().filter(|r| r.role == "student").map(|r| r.method.as_str()).collect();
        methods.dedup();
        for method in methods {
            let student = val("student", Some(method));
            if student >= teacher {
                missed.push(format!(
                    "mean mIoU of {method} on val is {student:.4}, not below the teacher's {teacher:.4}"
                ));
            }
        }
    }
    if missed.is_empty() {
        return Ok(());
    }
    let why = anyhow::anyhow!(
        "outside the recipe's band: {}\n  hint: the report is written and stands; [expect] of the recipe holds the band",
        missed.join("; ")
    );
    Err(coded(OUT_OF_BAND, why))
}

/// Prints what would run: networks, MACs, and the time from one measured step of each method.
pub(super) fn dry_run(plan: &Plan, device: &Device, json: bool) -> Result<()> {
    // Weights do not matter to time: those of a teacher are drawn.
    let drawn = ParamStore::trainable(0, DType::F32, device);
    build(&plan.teacher.model, &drawn)?;
    let teacher = Frozen::new(&plan.teacher.model, drawn.tensors(), DType::F32, device)?;
    let mut rows: Vec<(&Stage, Cost, f64)> = Vec::new();
    for stage in std::iter::once(&plan.teacher).chain(&plan.students) {
        let known = rows.iter().find(|(s, _, _)| (&s.model, &s.terms) == (&stage.model, &stage.terms));
        let cost = known.map_or_else(|| measure(stage, &teacher, device), |(_, cost, _)| Ok(*cost))?;
        let trained = stage.method != "teacher" || plan.teacher_weights.is_none();
        let seconds = if trained { cost.step * (stage.batch_size as u64 * stage.steps) as f64 } else { 0.0 };
        rows.push((stage, cost, seconds));
    }
    let total: f64 = rows.iter().map(|(_, _, s)| s).sum();
    if json {
        let stages: Vec<_> = rows
            .iter()
            .map(|(s, c, seconds)| {
                serde_json::json!({ "stage": s, "params": c.params, "macs": c.macs, "estimated_seconds": seconds })
            })
            .collect();
        let out = serde_json::json!({
            "plan": plan, "kernels": plan.kernels(), "stages": stages, "estimated_seconds": total,
        });
        println!("{}", serde_json::to_string_pretty(&out)?);
        return Ok(());
    }
    println!("{}", plan.to_toml()?);
    let name = |stage: &Stage| match stage.method.as_str() {
        "teacher" => "teacher".to_string(),
        method => format!("{method} seed {}", stage.seed),
    };
    let wide = rows.iter().map(|(stage, ..)| name(stage).len()).max().unwrap_or(0);
    println!(
        "{:<wide$} {:<10} {:>6} {:>12} {:>16} {:>7} {:>12}",
        "stage", "encoder", "width", "parameters", "MACs an image", "steps", "time, about"
    );
    for (stage, cost, seconds) in &rows {
        let mega = format!("{:.1} M", cost.macs as f64 / 1e6);
        println!(
            "{:<wide$} {:<10} {:>6} {:>12} {mega:>16} {:>7} {:>12}",
            name(stage),
            stage.model.encoder,
            stage.model.width,
            cost.params,
            stage.steps,
            duration(*seconds)
        );
    }
    for (whose, what, name) in plan.weights_by_name() {
        println!(
            "\n{whose}: {what} `{name}`, from the hub's cache or fetched when the run starts; a dry run fetches nothing"
        );
    }
    println!(
        "\ntraining takes about {} here in {}{}, evaluation comes on top (from one measured step of each method)",
        duration(total),
        plan.teacher.precision.name(),
        plan.kernels().map_or(String::new(), |name| format!(" ({name})")),
    );
    Ok(())
}

/// Size of a network, and seconds of a training step an image on this machine.
#[derive(Clone, Copy)]
struct Cost {
    params: usize,
    macs: u64,
    step: f64,
}

/// Pixels of the crops of a measured step, at most about: a batch of large crops is measured in part, so that a dry run fits
/// where the run would not.
const MEASURED_PIXELS: usize = 4 * 360 * 480;

/// Times a training step of a batch, or of as many of its crops as [`MEASURED_PIXELS`] allows.
fn measure(stage: &Stage, teacher: &Frozen, device: &Device) -> Result<Cost> {
    let [h, w] = stage.input.crop;
    // Two at least, where the batch has them: a normalisation after pooling to one pixel needs more than one value.
    let n_images = (MEASURED_PIXELS / (h * w).max(1)).max(2).min(stage.batch_size);
    let step = step_seconds(stage, Some(teacher), n_images, device)? / n_images as f64;
    let params = segdistill_models::info(&stage.model)?.n_parameters;
    Ok(Cost { params, macs: macs(&stage.model, stage.input.size)?, step })
}
