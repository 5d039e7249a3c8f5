//! `train`: one stage of a recipe alone.

use anyhow::Result;

use segdistill_train::Stage;

use crate::cli::{RecipeArgs, Train};
use crate::exit::usage;
use crate::pipeline::{Interrupt, Pipeline};
use crate::recipe::Plan;
use crate::run_folder::{Failure, RunFolder, is_finished, read_config, stage_dir};

/// Runs the command.
pub(crate) fn run(args: &Train) -> Result<()> {
    // Any objective of the recipe can be trained alone, whether or not it is among the recipe's methods.
    let methods = args.recipe.methods.clone().or_else(|| (args.stage != "teacher").then(|| vec![args.stage.clone()]));
    let recipe = RecipeArgs { methods, ..args.recipe.clone() };
    let plan = Plan::resolve(&recipe)?;
    let device = super::device(&plan.device, plan.tf32)?;
    let wanted: Vec<_> = plan.students.iter().filter(|s| s.method == args.stage).collect();
    if args.stage != "teacher" && wanted.is_empty() {
        let mut known: Vec<&str> = plan.students.iter().map(|s| s.method.as_str()).collect();
        known.dedup();
        return Err(usage!("unknown stage `{}`, this recipe has: teacher, {}", args.stage, known.join(", ")));
    }
    let out = super::reproduce::out_dir(&args.recipe, &plan);
    let teacher_dir = stage_dir(&out, &plan.teacher);
    let needs_teacher = wanted.iter().any(|s| s.needs_teacher());
    if needs_teacher && !is_finished(&teacher_dir) && plan.teacher_weights.is_none() {
        return Err(usage!(
            "stage `{}` needs a teacher and `{}` holds none\n  hint: first `cargo xtask train --stage teacher`, or set teacher.weights",
            args.stage,
            out.display()
        ));
    }
    let stages: Vec<_> = if args.stage == "teacher" { vec![&plan.teacher] } else { wanted };
    for dir in stages.iter().map(|s| stage_dir(&out, s)).filter(|_| !args.resume) {
        if is_finished(&dir) || dir.join("metrics.csv").is_file() {
            return Err(usage!(
                "`{}` holds this stage already\n  hint: --resume goes on with it, another --out folder starts anew",
                dir.display()
            ));
        }
    }
    plan.preflight(&device)?;
    let only =
        Plan { students: plan.students.iter().filter(|s| s.method == args.stage).cloned().collect(), ..plan.clone() };
    let (folder, joined) = RunFolder::join(&out, &only)?;
    // Everything the folder holds already is kept: the stages to train were found new, or `--resume` was given.
    let pipeline =
        Pipeline { plan: &joined, run: folder.path(), device, interrupt: Interrupt::listen()?, resume: true };
    let teacher = if args.stage == "teacher" || needs_teacher { Some(pipeline.teacher()?) } else { None };
    let students: Vec<&Stage> = stages.iter().copied().filter(|stage| stage.method != "teacher").collect();
    let failed = pipeline.students(&students, teacher.as_ref())?;
    let dirs = stages.iter().map(|stage| stage_dir(folder.path(), stage));
    let written: Vec<_> = dirs.filter(|dir| is_finished(dir) && !dir.join(Failure::FILE).is_file()).collect();
    let configs = written.iter().map(|d| read_config(d)).collect::<Result<Vec<_>>>()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&configs)?);
    } else {
        for (dir, c) in written.iter().zip(&configs) {
            let miou = c.val_miou.map_or("not measured".to_string(), |miou| format!("{miou:.4}"));
            println!("{}  val mIoU {miou} at step {}", dir.display(), c.best_step);
        }
    }
    super::reproduce::all_finished(&failed)
}
