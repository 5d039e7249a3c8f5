//! Recipes: TOML as written (`Recipe`), and what will run once everything is known to fit (`Plan`).
//!
//! `base.toml` holds every key with its default; it is the list of known keys, so that an unknown one is found with the
//! nearest known beside it. A recipe `extends` another; `--set` comes last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use segdistill_data::Manifest;
use segdistill_models::ModelSpec;
use segdistill_train::{ClassWeighting, InputConfig, OptimConfig, Stage, TermConfig};

use crate::cli::RecipeArgs;
use crate::exit::{coded, usage};

/// Recipes that come with the program.
const EMBEDDED: [(&str, &str); 4] = [
    ("base", include_str!("../recipes/base.toml")),
    ("toy", include_str!("../recipes/toy.toml")),
    ("camvid", include_str!("../recipes/camvid.toml")),
    ("camvid-quick", include_str!("../recipes/camvid-quick.toml")),
];

/// A recipe as written, merged with what it extends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    name: String,
    description: String,
    dataset: String,
    methods: Vec<String>,
    seeds: Vec<u64>,
    data: DataKeys,
    teacher: TeacherKeys,
    student: ModelKeys,
    train: TrainKeys,
    optim: OptimConfig,
    input: InputConfig,
    objectives: BTreeMap<String, ObjectiveKeys>,
    expect: Expect,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DataKeys {
    root: String,
    height: usize,
    width: usize,
    train: usize,
    val: usize,
    test: usize,
    seed: u64,
    variety: f64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelKeys {
    name: String,
    encoder: String,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TeacherKeys {
    name: String,
    encoder: String,
    width: f64,
    output_stride: usize,
    dropout: f64,
    decoder_channels: usize,
    seed: u64,
    steps: u64,
    lr: f64,
    weights: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrainKeys {
    steps: u64,
    batch_size: usize,
    eval_every: u64,
    class_weighting: ClassWeighting,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectiveKeys {
    terms: Vec<TermConfig>,
}

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
    /// CamVid below a folder.
    Camvid {
        /// Folder with train.txt, val.txt, ...
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
    /// Teacher weights given as a file instead of trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) teacher_weights: Option<PathBuf>,
    /// Images.
    pub(crate) data: DataPlan,
    /// What the recipe promises.
    pub(crate) expect: Expect,
    /// The teacher.
    pub(crate) teacher: Stage,
    /// Students: method by method, seed by seed.
    pub(crate) students: Vec<Stage>,
}

/// Merges `over` into `base`, table by table.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(table)) => merge(below, table),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Dotted keys of the leaves of a table.
fn leaves(table: &Table, prefix: &str, out: &mut Vec<String>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(below) => leaves(below, &path, out),
            _ => out.push(path),
        }
    }
}

fn leaf_paths(table: &Table) -> Vec<String> {
    let mut out = Vec::new();
    leaves(table, "", &mut out);
    out
}

/// Refuses keys the base recipe does not have; objectives may be new.
fn known_keys(written: &Table, base: &Table, origin: &str) -> Result<()> {
    let known = leaf_paths(base);
    for key in leaf_paths(written) {
        let new_objective = key.starts_with("objectives.") && key.ends_with(".terms");
        if key == "extends" || new_objective || known.contains(&key) {
            continue;
        }
        let nearest =
            known.iter().max_by(|a, b| strsim::jaro_winkler(a, &key).total_cmp(&strsim::jaro_winkler(b, &key)));
        let nearest = nearest.map_or(String::new(), |n| format!("; the nearest known key is `{n}`"));
        return Err(usage!(
            "unknown key `{key}` in {origin}{nearest}\n  hint: xtask/recipes/base.toml lists every key with its default"
        ));
    }
    Ok(())
}

fn parse(text: &str, origin: &str) -> Result<Table> {
    text.parse::<Table>().map_err(|e| usage!("{origin} is not TOML: {e}"))
}

fn embedded(name: &str) -> Option<&'static str> {
    EMBEDDED.iter().find(|(n, _)| *n == name).map(|(_, text)| *text)
}

/// The recipe `name`, as a chain from itself to the base, each with its origin.
fn chain(name: &str) -> Result<Vec<(String, Table)>> {
    let mut out: Vec<(String, Table)> = Vec::new();
    let mut next = name.to_string();
    loop {
        let (origin, text) = match embedded(&next) {
            Some(text) => (format!("recipe `{next}`"), text.to_string()),
            None if next.ends_with(".toml") => {
                let text = fs_err::read_to_string(&next).map_err(|e| coded(crate::exit::UNAVAILABLE, e))?;
                (format!("`{next}`"), text)
            }
            None => {
                let known: Vec<&str> = EMBEDDED.iter().map(|(n, _)| *n).filter(|n| *n != "base").collect();
                return Err(usage!(
                    "unknown recipe `{next}`, known: {}\n  hint: or give a file that ends in .toml",
                    known.join(", ")
                ));
            }
        };
        if out.iter().any(|(o, _)| *o == origin) {
            return Err(usage!("{origin} extends itself\n  hint: end the chain at `base`"));
        }
        let table = parse(&text, &origin)?;
        let base = table
            .get("extends")
            .map(|v| v.as_str().map(str::to_string).ok_or_else(|| usage!("`extends` in {origin} is not a string")));
        let is_base = next == "base";
        out.push((origin, table));
        if is_base {
            return Ok(out);
        }
        next = base.transpose()?.unwrap_or_else(|| "base".to_string());
    }
}

/// `key=value` as a nested table; the value is TOML, or else a string.
fn setting(text: &str) -> Result<Table> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| usage!("--set {text}: expected KEY=VALUE\n  hint: such as --set optim.lr=0.02"))?;
    let value = format!("v = {value}").parse::<Table>().ok().and_then(|t| t.get("v").cloned());
    let value = value.unwrap_or_else(|| Value::String(text.split_once('=').map_or("", |p| p.1).to_string()));
    let keys: Vec<&str> = key.trim().split('.').collect();
    let nest = |inner: Value, key: &&str| Value::Table(Table::from_iter([((*key).to_string(), inner)]));
    match keys.iter().rev().fold(value, nest) {
        Value::Table(table) => Ok(table),
        _ => Err(usage!("--set {text}: the key is empty")),
    }
}

impl Recipe {
    /// Reads the recipe that `args` name and applies their changes; also the keys somebody wrote (not defaults).
    fn read(args: &RecipeArgs) -> Result<(Recipe, Vec<String>)> {
        let layers = chain(&args.recipe)?;
        let base = layers.last().map(|(_, t)| t.clone()).unwrap_or_default();
        let mut merged = base.clone();
        let mut written = Vec::new();
        for (origin, table) in layers.iter().rev().skip(1) {
            known_keys(table, &base, origin)?;
            written.extend(leaf_paths(table));
            merge(&mut merged, table.clone());
        }
        for set in &args.set {
            let table = setting(set)?;
            known_keys(&table, &base, "--set")?;
            written.extend(leaf_paths(&table));
            merge(&mut merged, table);
        }
        merged.remove("extends");
        widen(&mut merged, &base);
        let recipe = Value::Table(merged).try_into::<Recipe>();
        Ok((recipe.map_err(|e| usage!("recipe `{}`: {}", args.recipe, e.message()))?, written))
    }
}

/// Whole numbers where the base has a fraction: `--set optim.lr=1` means 1.0.
fn widen(table: &mut Table, base: &Table) {
    for (key, value) in table.iter_mut() {
        match (value, base.get(key)) {
            (Value::Table(below), Some(Value::Table(base))) => widen(below, base),
            (value, Some(Value::Float(_))) => {
                if let Value::Integer(i) = value {
                    *value = Value::Float(*i as f64);
                }
            }
            _ => {}
        }
    }
}

impl Plan {
    /// The plan of a command line: recipe, `--set`, flags; every range, name and file checked.
    ///
    /// # Errors
    /// Usage errors (exit code 2) for what is written wrong, 4 for a folder or file that is not there.
    pub(crate) fn resolve(args: &RecipeArgs) -> Result<Plan> {
        let (recipe, written) = Recipe::read(args)?;
        let manifest = Manifest::named(&recipe.dataset).map_err(|e| coded(crate::exit::USAGE, e))?;
        let data = data_plan(&recipe, &written, args)?;
        let n_classes = manifest.classes.n_classes();
        let seeds = args.seeds.clone().unwrap_or_else(|| recipe.seeds.clone());
        let methods = args.methods.clone().unwrap_or_else(|| recipe.methods.clone());
        if seeds.is_empty() || methods.is_empty() {
            return Err(usage!("no seed or no method to run\n  hint: such as --seeds 0,1 --methods ce,csc+ce"));
        }
        let doubled_seed = first_double(&seeds).map(ToString::to_string);
        for (what, doubled) in [("seed", doubled_seed), ("method", first_double(&methods).cloned())] {
            if let Some(item) = doubled {
                return Err(usage!("{what} {item} is given twice\n  hint: give each once"));
            }
        }
        let teacher = recipe.teacher_stage(n_classes)?;
        let mut students = Vec::new();
        for method in &methods {
            let objective = recipe.objectives.get(method).ok_or_else(|| {
                let known: Vec<&str> = recipe.objectives.keys().map(String::as_str).collect();
                usage!(
                    "unknown method `{method}`, known: {}\n  hint: a recipe may add [objectives.{method}]",
                    known.join(", ")
                )
            })?;
            for &seed in &seeds {
                students.push(recipe.stage(method, &recipe.student, n_classes, seed, objective.terms.clone()));
            }
        }
        for stage in std::iter::once(&teacher).chain(&students) {
            stage.validate().map_err(|e| usage!("stage `{}`: {e}", stage.method))?;
            stage.model.validate().map_err(|e| usage!("stage `{}`: {e}", stage.method))?;
        }
        Ok(Plan {
            recipe: recipe.name.clone(),
            description: recipe.description.clone(),
            device: args.device.clone(),
            teacher_weights: recipe.teacher_weights()?,
            data,
            expect: recipe.expect,
            teacher,
            students,
        })
    }

    /// The plan as TOML.
    pub(crate) fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("the plan cannot be written as TOML")
    }

    /// The plan saved in a run folder.
    pub(crate) fn read(path: &Path) -> Result<Plan> {
        let text = fs_err::read_to_string(path).map_err(|e| coded(crate::exit::UNAVAILABLE, e))?;
        toml::from_str(&text).map_err(|e| usage!("`{}` is not a plan: {}", path.display(), e.message()))
    }
}

fn first_double<T: PartialEq>(items: &[T]) -> Option<&T> {
    items.iter().enumerate().find(|(i, item)| items[..*i].contains(item)).map(|(_, item)| item)
}

fn data_plan(recipe: &Recipe, written: &[String], args: &RecipeArgs) -> Result<DataPlan> {
    let d = &recipe.data;
    match recipe.dataset.as_str() {
        "street-scenes" => {
            if args.data_root.is_some() || !d.root.is_empty() {
                return Err(usage!(
                    "street-scenes draws its images: a data root is not used\n  hint: take out --data-root, or choose --set dataset=camvid"
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
            Ok(DataPlan::Camvid { root })
        }
    }
}

impl Recipe {
    fn stage(&self, method: &str, model: &ModelKeys, n_classes: usize, seed: u64, terms: Vec<TermConfig>) -> Stage {
        Stage {
            method: method.to_string(),
            model: ModelSpec {
                name: model.name.clone(),
                encoder: model.encoder.clone(),
                n_classes,
                width: model.width,
                output_stride: model.output_stride,
                dropout: model.dropout,
                decoder_channels: model.decoder_channels,
            },
            seed,
            steps: self.train.steps,
            batch_size: self.train.batch_size,
            optim: self.optim.clone(),
            terms,
            input: self.input.clone(),
            class_weighting: self.train.class_weighting,
            eval_every: self.train.eval_every,
        }
    }

    fn teacher_stage(&self, n_classes: usize) -> Result<Stage> {
        let t = &self.teacher;
        let model = ModelKeys {
            name: t.name.clone(),
            encoder: t.encoder.clone(),
            width: t.width,
            output_stride: t.output_stride,
            dropout: t.dropout,
            decoder_channels: t.decoder_channels,
        };
        let ce = self
            .objectives
            .get("ce")
            .ok_or_else(|| usage!("[objectives.ce] is missing\n  hint: the teacher is trained with it"))?;
        let mut stage = self.stage("teacher", &model, n_classes, t.seed, ce.terms.clone());
        if t.steps > 0 {
            stage.steps = t.steps;
        }
        if t.lr > 0.0 {
            stage.optim.lr = t.lr;
        }
        Ok(stage)
    }

    fn teacher_weights(&self) -> Result<Option<PathBuf>> {
        if self.teacher.weights.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&self.teacher.weights);
        if !path.is_file() {
            let why = anyhow::anyhow!(
                "teacher weights `{}` are not there\n  hint: `teacher.weights` names a .safetensors file, or is empty to train the teacher",
                path.display()
            );
            return Err(coded(crate::exit::UNAVAILABLE, why));
        }
        Ok(Some(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(recipe: &str, set: &[&str]) -> RecipeArgs {
        RecipeArgs {
            recipe: recipe.into(),
            data_root: None,
            set: set.iter().map(|s| s.to_string()).collect(),
            out: None,
            seeds: None,
            methods: None,
            device: "cpu".into(),
        }
    }

    #[test]
    fn every_embedded_recipe_resolves() {
        for (name, _) in EMBEDDED {
            let mut args = args(name, &[]);
            if name.starts_with("camvid") {
                args.data_root = Some(std::env::temp_dir());
            }
            let plan = Plan::resolve(&args).unwrap_or_else(|e| panic!("{name}: {e:#}"));
            assert_eq!(plan.recipe, name);
            let back: Plan = toml::from_str(&plan.to_toml().unwrap()).unwrap();
            assert_eq!(back, plan, "{name} survives its TOML");
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
        assert!(text.contains("steps") || text.contains("invalid type"), "{text}");
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
        ] {
            let error = Plan::resolve(&args(recipe, &set)).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), 2, "{error:#}");
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
        let mut a = args("toy", &[]);
        a.methods = Some(vec!["cscc".into()]);
        assert!(format!("{:#}", Plan::resolve(&a).unwrap_err()).contains("csc+ce"));
    }
}
