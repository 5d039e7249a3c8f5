//! `train`: one stage of a recipe alone.

use anyhow::Result;

use crate::cli::Train;
use crate::exit::usage;
use crate::pipeline::{Interrupt, Pipeline};
use crate::recipe::Plan;
use crate::run_folder::{RunFolder, is_finished, read_config, read_final, stage_dir};

/// Runs the command.
pub(crate) fn run(args: &Train) -> Result<()> {
    let plan = Plan::resolve(&args.recipe)?;
    let device = super::device(&args.recipe.device)?;
    let wanted: Vec<_> = plan.students.iter().filter(|s| s.method == args.stage).collect();
    if args.stage != "teacher" && wanted.is_empty() {
        let mut known: Vec<&str> = plan.students.iter().map(|s| s.method.as_str()).collect();
        known.dedup();
        return Err(usage!("unknown stage `{}`, this recipe has: teacher, {}", args.stage, known.join(", ")));
    }
    let out = super::reproduce::out_dir(&args.recipe, &plan);
    let teacher_dir = stage_dir(&out, &plan.teacher);
    // A student that needs a teacher joins the run that trained it: the folder is kept whatever `--resume` says.
    let joins = args.stage != "teacher" && is_finished(&teacher_dir);
    if wanted.iter().any(|s| s.needs_teacher()) && !joins && plan.teacher_weights.is_none() {
        return Err(usage!(
            "stage `{}` needs a teacher and `{}` holds none\n  hint: first `cargo xtask train --stage teacher`, or set teacher.weights",
            args.stage,
            out.display()
        ));
    }
    let folder = RunFolder::take(&out, &plan, args.resume || joins)?;
    let pipeline = Pipeline {
        plan: &plan,
        run: folder.path(),
        device,
        interrupt: Interrupt::listen()?,
        resume: args.resume || joins,
    };
    let mut written = Vec::new();
    if args.stage == "teacher" || wanted.iter().any(|s| s.needs_teacher()) {
        pipeline.teacher()?;
    }
    if args.stage == "teacher" {
        written.push(teacher_dir);
    } else {
        let teacher = if is_finished(&teacher_dir) { Some(read_final(&teacher_dir, &pipeline.device)?) } else { None };
        for stage in wanted {
            pipeline.student(stage, teacher.as_ref())?;
            written.push(stage_dir(folder.path(), stage));
        }
    }
    let configs = written.iter().map(|d| read_config(d)).collect::<Result<Vec<_>>>()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&configs)?);
    } else {
        for (dir, c) in written.iter().zip(&configs) {
            println!("{}  val mIoU {:.4} at step {}", dir.display(), c.val_miou, c.best_step);
        }
    }
    Ok(())
}
