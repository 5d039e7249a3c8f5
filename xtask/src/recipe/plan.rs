//! The plan: what runs, resolved and checked, saved before step 1.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use segdistill_data::{Manifest, Split};
use segdistill_train::{Objective, Stage};

use super::{BASELINE, Fills, Pinned, Read, Recipe, Start, Variant, Variation, whole};
use crate::cli::RecipeArgs;
use crate::commands::need_split;
use crate::exit::{UNAVAILABLE, USAGE, coded, usage};
use crate::run_folder::differing_keys;

/// What a recipe promises; a run outside ends with exit code 5.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expect {
    /// Least teacher mIoU on val; 0 asks nothing.
    pub(crate) teacher_val_miou: f64,
    /// Least mean mIoU of the cross-entropy student on val; 0 asks nothing.
    pub(crate) student_ce_val_miou: f64,
    /// Teacher above every method's mean on val.
    pub(crate) teacher_above_students: bool,
}

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "dataset", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum DataPlan {
    /// Scenes drawn from a seed.
    StreetScenes {
        /// Drawn height in pixels.
        height: usize,
        /// Drawn width in pixels.
        width: usize,
        /// Training scenes.
        train: usize,
        /// Validation scenes.
        val: usize,
        /// Test scenes.
        test: usize,
        /// Seed of the world.
        seed: u64,
        /// How little a look tells of a class, 0 to 1.
        variety: f64,
    },
    /// A data set of files below a folder.
    #[serde(untagged)]
    Files {
        /// Its manifest's id, such as `camvid`.
        dataset: String,
        /// The data set's folder, or one that holds it.
        root: PathBuf,
    },
}

/// What runs: resolved, checked, saved before step 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// Recipe name.
    pub(crate) recipe: String,
    /// One line on what it is for.
    pub(crate) description: String,
    /// Where it runs.
    pub(crate) device: String,
    /// Whether products on CUDA may round their factors to TF32.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) tf32: bool,
    /// Teacher weights given as a file, folder or name instead of trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher_weights: Option<PathBuf>,
    /// Which bytes those are.
    #[serde(default, skip_serializing_if = "Pinned::is_free")]
    pub(crate) teacher_pinned: Pinned,
    /// Weights a trained teacher starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher_start: Option<Start>,
    /// Weights every student starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) student_start: Option<Start>,
    /// File that pins weights fetched by name.
    #[serde(default = "default_lock", skip_serializing_if = "is_default_lock")]
    pub(crate) weights_lock: PathBuf,
    /// Images.
    pub(crate) data: DataPlan,
    /// What the recipe promises.
    pub(crate) expect: Expect,
    /// The teacher.
    pub(crate) teacher: Stage,
    /// Students: method by method, seed by seed.
    pub(crate) students: Vec<Stage>,
}

impl Plan {
    /// The plan of a command line: recipe, `--set`, flags; every range, name and file checked.
    ///
    /// # Errors
    /// Usage errors (exit code 2) for what is written wrong, 4 for a folder or file that is not there.
    pub(crate) fn resolve(args: &RecipeArgs) -> Result<Plan> {
        let Read { recipe, written } = Recipe::read(args)?;
        let methods = recipe.methods(args.methods.as_ref().unwrap_or(&recipe.methods));
        Self::of(recipe, &written, args, &methods)
    }

    /// The plan of a sweep: the baseline and every point of the grid around the objective `method`.
    ///
    /// # Errors
    /// As [`Plan::resolve`], and for a grid that does not fit the objective.
    pub(crate) fn resolve_sweep(
        args: &RecipeArgs,
        method: &str,
        variations: &[Variation],
    ) -> Result<(Plan, Vec<Variant>)> {
        if args.methods.is_some() {
            return Err(usage!("a sweep varies one method\n  hint: --method names it; take out --methods"));
        }
        let Read { mut recipe, mut written } = Recipe::read(args)?;
        let variants = recipe.vary(method, variations)?;
        // The objective itself is used by what was made of it.
        let own = format!("objectives.{method}.");
        written.retain(|key| !key.starts_with(&own));
        let mut methods: Vec<String> = vec![BASELINE.to_string()];
        methods.extend(variants.iter().map(|v| v.method.clone()));
        Ok((Self::of(recipe, &written, args, &methods)?, variants))
    }

    fn of(recipe: Recipe, written: &[String], args: &RecipeArgs, methods: &[String]) -> Result<Plan> {
        let manifest = Manifest::named(&recipe.dataset).map_err(|e| coded(USAGE, e))?;
        let data = data_plan(&recipe, written, args)?;
        let n_classes = manifest.classes.n_classes();
        let seeds = args.seeds.clone().unwrap_or_else(|| recipe.seeds.clone());
        if seeds.is_empty() || methods.is_empty() {
            return Err(usage!("no seed or no method to run\n  hint: such as --seeds 0,1 --methods ce,csc+ce"));
        }
        let doubled_seed = first_double(&seeds).map(ToString::to_string);
        for (what, doubled) in [("seed", doubled_seed), ("method", first_double(methods).cloned())] {
            if let Some(item) = doubled {
                return Err(usage!("{what} {item} is given twice\n  hint: give each once"));
            }
        }
        check_names(&recipe, methods, written)?;
        let mut teacher = recipe.teacher_stage(written, n_classes)?;
        let student = recipe.student_model(written, n_classes)?;
        let mut students = Vec::new();
        for method in methods {
            let objective = recipe.objectives.get(method).ok_or_else(|| {
                // The points of a sweep are no objectives that anybody wrote.
                let known = recipe.objectives.keys().map(String::as_str).filter(|known| !known.contains('='));
                let known: Vec<&str> = known.collect();
                usage!(
                    "unknown method `{method}`, known: all, {}\n  hint: a recipe may add [objectives.{method}]",
                    known.join(", ")
                )
            })?;
            for &seed in &seeds {
                students.push(recipe.stage(method, student.clone(), seed, objective.terms(&recipe.dataset).to_vec()));
            }
        }
        // A warm-up that a recipe of the program's own brings along fits its own length; a shorter run, asked for by its
        // steps alone, warms up for a tenth of itself. A warm-up that somebody wrote stands, or is refused.
        let given = written.iter().any(|key| key == "optim.warmup_steps");
        let mut shortened = BTreeSet::new();
        for stage in std::iter::once(&mut teacher).chain(&mut students) {
            if !given && stage.optim.warmup_steps >= stage.steps {
                shortened.insert((stage.steps, stage.optim.warmup_steps));
                stage.optim.warmup_steps = stage.steps / 10;
            }
        }
        for (steps, warmup) in shortened {
            eprintln!("runs of {steps} steps warm up for {} of them, not for the recipe's {warmup}", steps / 10);
        }
        for stage in std::iter::once(&teacher).chain(&students) {
            stage.validate().map_err(|e| usage!("stage `{}`: {e}", stage.method))?;
            stage.model.validate().map_err(|e| usage!("stage `{}`: {e}", stage.method))?;
        }
        let describe =
            |stage: &Stage| segdistill_models::info(&stage.model).map_err(|e| usage!("stage `{}`: {e}", stage.method));
        let teachers = describe(&teacher)?;
        for stage in &students {
            // Before anything is trained: a map that is not there would else be found out after the teacher.
            Objective::check(&stage.terms, &describe(stage)?, &teachers, stage.input.crop)
                .map_err(|e| usage!("stage `{}`: {e}", stage.method))?;
        }
        let [teacher_start, student_start] = recipe.starts()?;
        let (teacher_weights, teacher_pinned) = recipe.teacher_weights()?.unzip();
        Ok(Plan {
            recipe: recipe.name.clone(),
            description: recipe.description.clone(),
            device: crate::commands::device_name(&args.device),
            tf32: args.device.tf32,
            teacher_weights,
            teacher_pinned: teacher_pinned.unwrap_or_default(),
            teacher_start,
            student_start,
            weights_lock: lock_beside(&args.recipe),
            data,
            expect: recipe.expect,
            teacher,
            students,
        })
    }

    /// Checks that `device` can train in the precision of every stage that is trained.
    ///
    /// # Errors
    /// Exit code 2 with what the processor lacks.
    pub(crate) fn check_precision(&self, device: &Device) -> Result<()> {
        for stage in std::iter::once(&self.teacher).chain(&self.students).filter(|_| device.is_cpu()) {
            stage.precision.on_cpu().map_err(|e| coded(USAGE, e))?;
        }
        Ok(())
    }

    /// Checks what needs data and weights, before anything is written: both training splits are there and large enough, a
    /// given teacher fits, and the device has the precision.
    ///
    /// # Errors
    /// Exit code 2 for settings that cannot run, 4 for what is not there; a teacher that does not fit lists every difference.
    pub(crate) fn preflight(&self, device: &Device) -> Result<()> {
        self.check_precision(device)?;
        let train = need_split(&self.data, Split::Train)?;
        need_split(&self.data, Split::Val)?;
        for stage in std::iter::once(&self.teacher).chain(&self.students) {
            if train.len() < stage.batch_size {
                return Err(usage!(
                    "{} training images for batches of {}\n  hint: train.batch_size is at most the number of images",
                    train.len(),
                    stage.batch_size
                ));
            }
        }
        if let Some(path) = &self.teacher_weights {
            let name = path.to_string_lossy();
            let wanted = self.teacher_pinned.wanted(&name);
            whole(&wanted, &self.teacher.model, None, &self.weights_lock).context("teacher")?;
        }
        for stage in std::iter::once(&self.teacher).chain(self.students.first()) {
            if let Some(start) = self.start_of(stage) {
                start.load(&stage.model, stage.seed, &self.weights_lock)?;
            }
        }
        Ok(())
    }

    /// Weights that `stage` starts from, if the plan gives it any.
    pub(crate) fn start_of(&self, stage: &Stage) -> Option<&Start> {
        match stage.method == self.teacher.method {
            true => self.teacher_start.as_ref().filter(|_| self.teacher_weights.is_none()),
            false => self.student_start.as_ref(),
        }
    }

    /// Weights that are no path of this machine but names of the hub's: whose, what they fill, and the name.
    pub(crate) fn weights_by_name(&self) -> Vec<(&'static str, &'static str, String)> {
        let given =
            self.teacher_weights.as_ref().map(|path| ("teacher", "weights", path.to_string_lossy().into_owned()));
        let started = std::iter::once(("teacher", &self.teacher)).chain(self.students.first().map(|s| ("students", s)));
        let started = started.filter_map(|(whose, stage)| {
            let start = self.start_of(stage)?;
            let what = if start.fills == Fills::Encoder { "encoder weights" } else { "weights" };
            Some((whose, what, start.from.clone()))
        });
        given.into_iter().chain(started).filter(|(_, _, name)| !Path::new(name).exists()).collect()
    }

    /// Name of the kernels that carry out the precision on this processor; `None` on CUDA, where they are cuDNN's.
    pub(crate) fn kernels(&self) -> Option<&'static str> {
        (self.device == "cpu").then(|| self.teacher.precision.on_cpu().ok()).flatten()
    }

    /// This plan joined to the one saved in a folder: the same data and teacher, and students of either.
    ///
    /// # Errors
    /// Usage errors naming what differs.
    pub(crate) fn joined_to(&self, saved: &Plan) -> Result<Plan> {
        let common =
            |p: &Plan| Plan { students: Vec::new(), description: String::new(), device: String::new(), ..p.clone() };
        if common(self) != common(saved) {
            let differences = differing_keys(&common(saved).to_toml()?, &common(self).to_toml()?);
            return Err(usage!(
                "the folder holds a run of other data or another teacher: {}\n  hint: choose another --out folder",
                differences.join("; ")
            ));
        }
        let mut joined = saved.clone();
        for stage in &self.students {
            match saved.students.iter().find(|s| (&s.method, s.seed) == (&stage.method, stage.seed)) {
                None => joined.students.push(stage.clone()),
                Some(old) if old == stage => {}
                Some(_) => {
                    return Err(usage!(
                        "the folder holds stage {} seed {} of other settings\n  hint: choose another --out folder",
                        stage.method,
                        stage.seed
                    ));
                }
            }
        }
        Ok(joined)
    }

    /// This plan without students that `saved` has not, in the order of `saved`: what a resumed run must find unchanged.
    pub(crate) fn without_new(&self, saved: &Plan) -> Plan {
        let same = |old: &&Stage| self.students.iter().find(|s| (&s.method, s.seed) == (&old.method, old.seed));
        let students = saved.students.iter().filter_map(|old| same(&old).cloned()).collect();
        Plan { students, ..self.clone() }
    }

    /// The plan as TOML.
    pub(crate) fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("the plan cannot be written as TOML")
    }

    /// The plan saved in a run folder.
    pub(crate) fn read(path: &Path) -> Result<Plan> {
        let text = fs_err::read_to_string(path).map_err(|e| coded(UNAVAILABLE, e))?;
        toml::from_str(&text).map_err(|e| usage!("`{}` is not a plan: {}", path.display(), e.message()))
    }
}

fn default_lock() -> PathBuf {
    PathBuf::from(crate::hub::lock::DEFAULT)
}

fn is_default_lock(lock: &Path) -> bool {
    lock == default_lock()
}

/// The lock file of a recipe: beside its file, or in the working folder for one of the program's own.
fn lock_beside(recipe: &str) -> PathBuf {
    let folder = Path::new(recipe).parent().filter(|_| recipe.ends_with(".toml"));
    folder.map_or_else(default_lock, |folder| folder.join(crate::hub::lock::DEFAULT))
}

fn first_double<T: PartialEq>(items: &[T]) -> Option<&T> {
    items.iter().enumerate().find(|(i, item)| items[..*i].contains(item)).map(|(_, item)| item)
}

/// Method names become folder names; an objective somebody wrote must be used.
fn check_names(recipe: &Recipe, methods: &[String], written: &[String]) -> Result<()> {
    for method in methods {
        let plain = !method.is_empty() && method.bytes().all(|b| b.is_ascii_alphanumeric() || b"+_-.=".contains(&b));
        let plain = plain && !method.starts_with('.');
        if !plain || ["teacher", "report", "all"].contains(&method.as_str()) {
            return Err(usage!(
                "method `{method}` cannot name a folder of the run\n  hint: use letters, digits, +, _ and -, and not `teacher` or `report`"
            ));
        }
    }
    let of_objective = |k: &String| {
        let name = k.strip_prefix("objectives.")?.strip_suffix(".terms")?;
        Some(name.split_once(".on.").map_or(name, |(name, _)| name).to_string())
    };
    for name in written.iter().filter_map(of_objective) {
        if name != "ce" && !methods.contains(&name) {
            let known: Vec<&str> = recipe.objectives.keys().map(String::as_str).collect();
            return Err(usage!(
                "objective `{name}` is set but no method uses it; methods: {}, objectives: {}\n  hint: name it with --methods (a sweep: --method), or take it out",
                methods.join(", "),
                known.join(", ")
            ));
        }
    }
    Ok(())
}

fn data_plan(recipe: &Recipe, written: &[String], args: &RecipeArgs) -> Result<DataPlan> {
    let d = &recipe.data;
    match recipe.dataset.as_str() {
        "street-scenes" => {
            if args.data_root.is_some() || !d.root.is_empty() {
                return Err(usage!(
                    "street-scenes draws its images: a data root is not used\n  hint: take out --data-root, or choose --recipe camvid-quick"
                ));
            }
            let (height, width) = (d.height, d.width);
            Ok(DataPlan::StreetScenes {
                height,
                width,
                train: d.train,
                val: d.val,
                test: d.test,
                seed: d.seed,
                variety: d.variety,
            })
        }
        id => {
            let unused = written.iter().find(|k| k.starts_with("data.") && *k != "data.root");
            if let Some(key) = unused {
                return Err(usage!(
                    "`{key}` is set but data set {id} does not use it\n  hint: take it out; only street-scenes draws images"
                ));
            }
            let set = (!d.root.is_empty()).then(|| PathBuf::from(&d.root));
            let root = crate::commands::data_root(id, args.data_root.clone().or(set))?;
            Ok(DataPlan::Files { dataset: id.to_string(), root })
        }
    }
}

#[cfg(test)]
mod tests;
