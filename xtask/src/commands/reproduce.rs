//! `reproduce`: teacher, students, evaluation, report.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use segdistill_eval::stats::MeanSd;
use segdistill_eval::table::ResultRow;
use segdistill_models::{build, macs};
use segdistill_ops::{Mode, ParamStore, rng::Stream};
use segdistill_train::Stage;

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
        "{}\n  hint: the report of the others is written; lower `optim.lr` or the weight of the term, or set \
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
    pipeline.students(&teacher)?;
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

/// Prints what would run: networks, MACs, and the time from one measured step of each network.
pub(super) fn dry_run(plan: &Plan, device: &Device, json: bool) -> Result<()> {
    let mut rows = Vec::new();
    let mut forward_of_teacher = 0.0;
    for stage in std::iter::once(&plan.teacher).chain(&plan.students) {
        let known = rows.iter().find(|(s, _, _): &&(&Stage, Cost, f64)| s.model == stage.model).map(|(_, c, _)| *c);
        let cost = known.map_or_else(|| measure(stage, device), Ok)?;
        let is_teacher = stage.method == "teacher";
        if is_teacher {
            forward_of_teacher = cost.forward;
        }
        let teaching = if stage.needs_teacher() { forward_of_teacher } else { 0.0 };
        let trained = !is_teacher || plan.teacher_weights.is_none();
        let seconds =
            if trained { (cost.step + teaching) * (stage.batch_size as u64 * stage.steps) as f64 } else { 0.0 };
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
    println!(
        "{:<16} {:<10} {:>6} {:>12} {:>16} {:>7} {:>12}",
        "stage", "encoder", "width", "parameters", "MACs an image", "steps", "time, about"
    );
    for (stage, cost, seconds) in &rows {
        let name = if stage.method == "teacher" {
            "teacher".to_string()
        } else {
            format!("{} seed {}", stage.method, stage.seed)
        };
        let mega = format!("{:.1} M", cost.macs as f64 / 1e6);
        println!(
            "{name:<16} {:<10} {:>6} {:>12} {mega:>16} {:>7} {:>12}",
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
        "\ntraining takes about {} here in {}{}, evaluation comes on top (from one measured step of each network)",
        duration(total),
        plan.teacher.precision.name(),
        plan.kernels().map_or(String::new(), |name| format!(" ({name})")),
    );
    Ok(())
}

/// Size of a network, and seconds an image on this machine.
#[derive(Clone, Copy)]
struct Cost {
    params: usize,
    macs: u64,
    forward: f64,
    step: f64,
}

/// Pixels of the crops of a measured step, about: large crops are few, so that a dry run fits where the run would not.
const MEASURED_PIXELS: usize = 4 * 360 * 480;

/// Times a training step of a few crops: the fastest of three after one that warms up, or the second where steps are slow.
fn measure(stage: &Stage, device: &Device) -> Result<Cost> {
    const SLOW: f64 = 5.0;
    let store = ParamStore::trainable(0, DType::F32, device).with_precision(stage.precision);
    let network = build(&stage.model, &store)?;
    let [h, w] = stage.input.crop;
    // Two at least, where the batch has them: a normalisation after pooling to one pixel needs more than one value.
    let n_images = (MEASURED_PIXELS / (h * w).max(1)).clamp(2, 4).min(stage.batch_size);
    let mut stream = Stream::new(0, "dry-run", &[]);
    let values: Vec<f32> = (0..n_images * 3 * h * w).map(|_| stream.unit() as f32).collect();
    let images = Tensor::from_vec(values, (n_images, 3, h, w), device)?;
    let (mut forward, mut step) = (f64::INFINITY, f64::INFINITY);
    for round in 0..4 {
        let clock = Instant::now();
        let logits = network.forward(&images, Mode::Train { seed: 0, step: round })?.logits_nchw;
        let there = clock.elapsed().as_secs_f64();
        logits.sqr()?.mean_all()?.backward()?;
        let back = clock.elapsed().as_secs_f64();
        if round > 0 {
            forward = forward.min(there / n_images as f64);
            step = step.min(back / n_images as f64);
        }
        if round > 0 && back > SLOW {
            break;
        }
    }
    Ok(Cost { params: network.info().n_parameters, macs: macs(&stage.model, stage.input.size)?, forward, step })
}
