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
                let known: Vec<&str> = recipe.objectives.keys().map(String::as_str).collect();
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
            Objective::check(&stage.terms, &describe(stage)?, &teachers)
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
                "objective `{name}` is set but no method uses it; methods: {}, objectives: {}\n  hint: --methods {name}",
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
mod tests {
    use segdistill_ops::Precision;

    use super::*;

    fn args(recipe: &str, set: &[&str]) -> RecipeArgs {
        RecipeArgs {
            recipe: recipe.into(),
            data_root: None,
            set: set.iter().map(|s| s.to_string()).collect(),
            out: None,
            seeds: None,
            methods: None,
            precision: None,
            device: crate::cli::DeviceArgs { device: Some("cpu".into()), tf32: false },
        }
    }

    #[test]
    fn every_embedded_recipe_resolves() {
        for (name, _) in super::super::layers::EMBEDDED {
            let mut args = args(name, &[]);
            if name.starts_with("camvid") || name.starts_with("cityscapes") {
                args.data_root = Some(std::env::temp_dir());
            }
            let plan = Plan::resolve(&args).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            assert_eq!(plan.recipe, name);
            let back: Plan = toml::from_str(&plan.to_toml().unwrap()).unwrap();
            assert_eq!(back, plan, "{name} survives its TOML");
        }
    }

    #[test]
    fn weights_of_recipes_reach_the_stages_they_are_for() {
        let resolve = |name: &str, set: &[&str]| {
            let mut args = args(name, set);
            args.data_root = Some(std::env::temp_dir());
            Plan::resolve(&args)
        };
        let from = |start: Option<&Start>| start.map(|s| s.from.clone());
        let patent = resolve("cityscapes", &[]).unwrap();
        assert_eq!(from(patent.start_of(&patent.teacher)).unwrap(), "timm/xception65.tf_in1k");
        assert_eq!(from(patent.start_of(&patent.students[0])).unwrap(), "timm/resnet34");
        assert_eq!((patent.teacher_weights.as_ref(), patent.teacher.model.encoder.as_str()), (None, "xception65"));
        let given = resolve("cityscapes-segformer", &[]).unwrap();
        assert_eq!(given.teacher_weights.as_deref(), Some(Path::new("smp-hub/segformer-b2-1024x1024-city-160k")));
        assert_eq!(from(given.start_of(&given.teacher)), None);
        assert_eq!((given.teacher.model.name.as_str(), given.teacher.model.decoder_channels), ("segformer", 768));
        assert_eq!(given.weights_lock, Path::new("weights.lock"));
        let DataPlan::Files { dataset, .. } = &given.data else { panic!("{:?}", given.data) };
        assert_eq!((dataset.as_str(), given.students[0].model.n_classes), ("cityscapes", 19));
        let named = |plan: &Plan| plan.weights_by_name().into_iter().map(|(_, _, name)| name).collect::<Vec<_>>();
        assert_eq!(named(&patent), ["timm/xception65.tf_in1k", "timm/resnet34"]);
        assert_eq!(named(&given), ["smp-hub/segformer-b2-1024x1024-city-160k", "timm/resnet34"]);
        let absent = resolve("cityscapes", &["student.encoder_weights=timm/resnet340"]).unwrap_err();
        assert_eq!(crate::exit::code_of(&absent), crate::exit::UNAVAILABLE);
        let both = resolve("cityscapes", &["student.weights=timm/resnet34"]).unwrap_err();
        assert!(format!("{both:#}").contains("student.weights and student.encoder_weights are both set"), "{both:#}");
        assert_eq!(lock_beside("a/b.toml"), Path::new("a/weights.lock"));
    }

    #[test]
    fn a_network_is_named_whole_and_its_auxiliary_head_joins_the_objective() {
        let set = ["teacher.model=fcn8s-vgg16", "student.model=pspnet-resnet18-deep", "student.aux=true"];
        let plan = Plan::resolve(&args("toy", &set)).unwrap();
        assert_eq!(plan.teacher.model.full_name(), "fcn8s-vgg16");
        let names = |stage: &segdistill_train::Stage| stage.terms.iter().map(|t| t.loss.name()).collect::<Vec<_>>();
        assert_eq!(names(&plan.teacher), ["ce"]);
        for student in &plan.students {
            assert_eq!(student.model.full_name(), "pspnet-resnet18-deep");
            assert_eq!(names(student).last(), Some(&"aux".to_string()));
        }
        for (set, said) in [
            (vec!["teacher.model=fcn9s-vgg16"], "unknown model `fcn9s`"),
            (vec!["teacher.model=fcn8s-vgg16", "teacher.encoder=resnet18"], "are both set"),
            (vec!["student.aux=true"], "aux is true"),
            (vec!["student.layout=smb"], "unknown layout `smb`, known: paper, smp"),
        ] {
            let error = Plan::resolve(&args("toy", &set)).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), 2);
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
    }

    #[test]
    fn all_is_the_baseline_and_every_method_that_compares_with_a_teacher_once() {
        let with = |recipe: &str, methods: &[&str]| {
            let methods = Some(methods.iter().map(ToString::to_string).collect());
            let data_root = (recipe != "toy").then(std::env::temp_dir);
            Plan::resolve(&RecipeArgs { methods, data_root, ..args(recipe, &["seeds=[0]"]) }).unwrap()
        };
        let names = |plan: &Plan| plan.students.iter().map(|s| s.method.clone()).collect::<Vec<_>>();
        let all = with("toy", &["all"]);
        let expected = "ce,ace,af-dcd,at,cirkd,csc,csc+ace,cwd,cwd-features,dist,fitnet,ifvd,kd,mgd,skd";
        assert_eq!(names(&all).join(","), expected);
        assert!(all.students[1..].iter().all(segdistill_train::Stage::needs_teacher));
        let first = &all.students[0];
        for s in &all.students {
            assert_eq!((&s.model, s.seed, s.steps, &s.input), (&first.model, first.seed, first.steps, &first.input));
        }
        // Every loss has a method that uses it, but for those that only stand for labels in other ways.
        let used: std::collections::BTreeSet<&str> =
            all.students.iter().flat_map(|s| s.terms.iter().map(|t| t.loss.loss())).collect();
        let unused: Vec<&str> =
            segdistill_train::TermKind::NAMES.into_iter().filter(|name| !used.contains(name)).collect();
        assert_eq!(unused, ["aux", "ohem", "dice", "lovasz", "bce"]);
        for method in ["ohem", "dice+ce", "lovasz+ce", "csc+ce"] {
            assert_eq!(names(&with("toy", &[method])), [method]);
        }
        assert_eq!(names(&with("toy", &["kd", "all"]))[..2], ["kd", "ce"], "what `all` brings stands once");
        // Weights are those of the data set where its source has others.
        let weight = |recipe: &str| with(recipe, &["af-dcd"]).students[0].terms[0].weight;
        assert_eq!((weight("toy"), weight("camvid")), (2e-6, 8e-6));
        let mut own = args("camvid", &[r#"objectives.af-dcd.terms=[{ loss = "kd", weight = 7.0 }]"#]);
        (own.methods, own.data_root) = (Some(vec!["af-dcd".into()]), Some(std::env::temp_dir()));
        assert_eq!(Plan::resolve(&own).unwrap().students[0].terms[0].weight, 7.0, "what was written stands");
    }

    #[test]
    fn a_resumed_run_may_gain_methods_and_seeds_and_nothing_else() {
        let plan = |methods: &[&str], set: &[&str]| {
            let methods = Some(methods.iter().map(ToString::to_string).collect());
            Plan::resolve(&RecipeArgs { methods, ..args("toy", set) }).unwrap()
        };
        let saved = plan(&["ce", "kd"], &["seeds=[0]"]);
        assert_eq!(plan(&["ce", "cwd", "kd"], &["seeds=[1, 0]"]).without_new(&saved), saved);
        assert_ne!(plan(&["ce", "kd"], &["seeds=[0]", "train.steps=77"]).without_new(&saved), saved);
        assert_ne!(plan(&["ce"], &["seeds=[0]"]).without_new(&saved), saved, "nothing may be taken away");
    }

    #[test]
    fn a_sweep_is_a_grid_around_one_method_beside_the_baseline() {
        let sweep = |method: &str, vary: &[&str], set: &[&str]| {
            let vary: Vec<Variation> = vary.iter().map(|v| v.parse().unwrap()).collect();
            Plan::resolve_sweep(&args("toy", set), method, &vary)
        };
        let (plan, variants) = sweep("kd", &["kd.weight=0.1,1", "kd.temperature=1,4"], &["seeds=[0, 1]"]).unwrap();
        let names: Vec<&str> = variants.iter().map(|v| v.method.as_str()).collect();
        assert_eq!(names[1], "kd_kd.weight=0.1_kd.temperature=4");
        assert_eq!((variants.len(), plan.students.len()), (4, 2 * (1 + 4)));
        let term = &plan.students[2 * 2].terms[0];
        assert_eq!((plan.students[2 * 2].method.as_str(), term.weight), (names[1], 0.1));
        assert_eq!(
            term.loss,
            segdistill_train::TermKind::Kd { temperature: 4.0, normaliser: segdistill_train::KdNormaliser::MeanPixel }
        );
        let own = [r#"objectives.mine.terms=[{ loss = "csc", weight = 1.0 }, { loss = "ce", weight = 1.0 }]"#];
        assert_eq!(sweep("mine", &["csc.weight=1,2"], &own).unwrap().1.len(), 2);
        for (method, vary, said) in [
            ("kdd", "kd.weight=1", "unknown method `kdd`"),
            ("kd", "csc.weight=1", "method `kd` has no term `csc`, its terms: kd, ce"),
            ("kd", "kd.temprature=1", "temprature"),
            ("kd", "kd.temperature=hot", "hot"),
            ("kd", "kd.temperature=0", "temperature = 0"),
            ("kd", "kd.loss=csc", "not a setting"),
            ("kd", "kd.weight=1,1.0", "are the same objective"),
            ("fitnet", "fitnet.tap=nosuch", "the student has no map `nosuch`, known: logits, penultimate"),
            ("af-dcd", "af-dcd.groups=7", "in 7 groups"),
        ] {
            let error = sweep(method, &[vary], &[]).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), 2, "{vary}");
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = Plan::resolve(&args("toy", &["optim.lrr=1"])).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), 2);
        let text = format!("{error:#}");
        assert!(text.contains("`optim.lrr`") && text.contains("`optim.lr`"), "{text}");
    }

    #[test]
    fn settings_reach_the_stages_and_keep_their_types() {
        let plan = Plan::resolve(&args("toy", &["optim.lr=1", "train.steps=77", "student.encoder=resnet34"])).unwrap();
        assert_eq!((plan.students[0].optim.lr, plan.students[0].steps), (1.0, 77));
        assert_eq!(plan.students[0].model.encoder, "resnet34");
        let text = format!("{:#}", Plan::resolve(&args("toy", &["train.steps=many"])).unwrap_err());
        assert!(text.contains("`train.steps`") && text.contains("many") && text.contains("whole number"), "{text}");
        let quoted = args("toy", &[r#"objectives."csc+ce".terms=[{ loss = "ce", weight = 2.0 }]"#]);
        let plan = Plan::resolve(&quoted).unwrap();
        let weight = |m: &str| plan.students.iter().find(|s| s.method == m).unwrap().terms[0].weight;
        assert_eq!((weight("csc+ce"), weight("ce")), (2.0, 1.0));
    }

    #[test]
    fn a_short_run_warms_up_for_a_tenth_of_itself_unless_told_otherwise() {
        let warmups = |set: &[&str]| {
            let plan = Plan::resolve(&args("toy", set))?;
            Ok::<_, anyhow::Error>((plan.teacher.optim.warmup_steps, plan.students[0].optim.warmup_steps))
        };
        assert_eq!(warmups(&["train.steps=20"]).unwrap(), (30, 2));
        assert_eq!(warmups(&["train.steps=20", "teacher.steps=5"]).unwrap(), (0, 2));
        assert_eq!(warmups(&["train.steps=31"]).unwrap(), (30, 30));
        let refused = warmups(&["train.steps=20", "optim.warmup_steps=30"]).unwrap_err();
        assert!(format!("{refused:#}").contains("optim.warmup_steps = 30 of 20 steps"), "{refused:#}");
    }

    #[test]
    fn the_precision_reaches_every_stage_and_the_flag_is_a_setting() {
        let precisions = |plan: &Plan| -> Vec<Precision> {
            std::iter::once(&plan.teacher).chain(&plan.students).map(|s| s.precision).collect()
        };
        let default = Plan::resolve(&args("toy", &[])).unwrap();
        assert!(precisions(&default).iter().all(|p| *p == Precision::F32));
        let set = Plan::resolve(&args("toy", &["train.precision=bf16"])).unwrap();
        assert!(precisions(&set).iter().all(|p| *p == Precision::Bf16));
        let toml = set.to_toml().unwrap();
        assert_eq!(toml.matches("precision = \"bf16\"").count(), 1 + set.students.len(), "{toml}");
        let flag = RecipeArgs { precision: Some("bf16".into()), ..args("toy", &["train.precision=f32"]) };
        assert_eq!(Plan::resolve(&flag).unwrap(), set, "the flag comes after --set");

        // Plans of versions that knew one precision.
        let toml = default.to_toml().unwrap();
        let older = toml.replace("precision = \"f32\"\n", "");
        assert!(older.len() < toml.len());
        assert_eq!(toml::from_str::<Plan>(&older).unwrap(), default);
    }

    #[test]
    fn what_this_processor_lacks_is_a_usage_error() {
        let plan = Plan::resolve(&args("toy", &["train.precision=bf16"])).unwrap();
        match (Precision::Bf16.on_cpu(), plan.check_precision(&Device::Cpu)) {
            (Ok(_), checked) => checked.unwrap(),
            (Err(why), checked) => {
                let error = checked.unwrap_err();
                assert_eq!(crate::exit::code_of(&error), 2);
                assert!(format!("{error:#}").contains(&why.to_string()), "{error:#}");
            }
        }
        Plan::resolve(&args("toy", &[])).unwrap().check_precision(&Device::Cpu).unwrap();
    }

    #[test]
    fn what_is_set_but_unused_is_refused() {
        let mut a = args("camvid-quick", &["data.height=64"]);
        a.data_root = Some(std::env::temp_dir());
        assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains("data.height"));
        let mut a = args("toy", &[]);
        a.data_root = Some(std::env::temp_dir());
        assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains("not used"));
    }

    #[test]
    fn unknown_recipes_methods_and_ranges_are_usage_errors() {
        for (recipe, set, expected) in [
            ("tiny", vec![], "known: toy, camvid, camvid-quick"),
            ("toy", vec!["optim.momentum=1.5"], "optim.momentum = 1.5"),
            ("toy", vec!["student.encoder=resnet19"], "resnet18"),
            ("toy", vec!["dataset=cityscape"], "camvid"),
            ("toy", vec!["optim.lr"], "KEY=VALUE"),
            ("toy", vec!["=1"], "KEY=VALUE"),
            ("toy", vec!["lr=1"], "`optim.lr`"),
            ("toy", vec!["steps=100"], "steps`"),
            ("toy", vec!["seeds=0"], "list in brackets"),
            ("toy", vec!["optim.lr=abc"], "`optim.lr` in --set is \"abc\""),
            ("toy", vec!["extends=camvid"], "--recipe"),
            ("toy", vec!["objectives.cse.terms=[]"], "`cse`"),
            ("toy", vec!["teacher.lr=-1"], "teacher.lr = -1"),
            ("toy", vec!["optim.weight_decay=inf"], "optim.weight_decay = inf"),
            ("toy", vec!["train.precision=f16"], "`f16`, expected `f32` or `bf16` in `train.precision`"),
            ("toy", vec!["train.precision=16"], "`train.precision` in --set is 16"),
        ] {
            let error = Plan::resolve(&args(recipe, &set)).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), 2, "{error:#}");
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
        let mut a = args("toy", &[]);
        for (method, expected) in [("cscc", "csc+ce"), ("../x", "letters"), ("teacher", "letters")] {
            a.methods = Some(vec![method.into()]);
            assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains(expected));
        }
    }
}
