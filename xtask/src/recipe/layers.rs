//! From TOML texts to one table: recipes that extend each other, then `--set`, every key known and of the right type.

use anyhow::Result;
use toml::{Table, Value};

use crate::exit::{UNAVAILABLE, coded, usage};

/// Recipes that come with the program.
pub(super) const EMBEDDED: [(&str, &str); 6] = [
    ("base", include_str!("../../recipes/base.toml")),
    ("toy", include_str!("../../recipes/toy.toml")),
    ("camvid", include_str!("../../recipes/camvid.toml")),
    ("camvid-quick", include_str!("../../recipes/camvid-quick.toml")),
    ("cityscapes", include_str!("../../recipes/cityscapes.toml")),
    ("cityscapes-segformer", include_str!("../../recipes/cityscapes-segformer.toml")),
];

/// Objectives that come with the program: fragments of the base recipe, a method or a family each.
const METHODS: [&str; 8] = [
    include_str!("../../recipes/methods/supervised.toml"),
    include_str!("../../recipes/methods/csc.toml"),
    include_str!("../../recipes/methods/kd.toml"),
    include_str!("../../recipes/methods/skd.toml"),
    include_str!("../../recipes/methods/cirkd.toml"),
    include_str!("../../recipes/methods/cwd.toml"),
    include_str!("../../recipes/methods/dist.toml"),
    include_str!("../../recipes/methods/features.toml"),
];

/// All layers merged.
pub(super) struct Merged {
    /// Every key of the base recipe, with the last value written for it.
    pub(super) table: Table,
    /// Keys written in files of the user's and in `--set`.
    pub(super) written: Vec<String>,
}

/// Merges the chain of recipe `name` and the settings of the command line.
pub(super) fn merge_all(name: &str, settings: &[String]) -> Result<Merged> {
    let layers = chain(name)?;
    let base = layers.last().map(|l| l.table.clone()).unwrap_or_default();
    let mut table = base.clone();
    let mut written = Vec::new();
    let mut add = |layer: Layer| -> Result<()> {
        check(&layer, &base)?;
        if !layer.embedded {
            written.extend(leaf_paths(&layer.table));
        }
        merge(&mut table, layer.table);
        Ok(())
    };
    for layer in layers.into_iter().rev().skip(1) {
        add(layer)?;
    }
    for text in settings {
        let layer = setting(text)?;
        if layer.table.contains_key("extends") {
            return Err(usage!("--set {text}: a setting extends nothing\n  hint: choose the recipe with --recipe"));
        }
        add(layer)?;
    }
    table.remove("extends");
    widen(&mut table, &base);
    Ok(Merged { table, written })
}

/// One text and where it comes from.
struct Layer {
    origin: String,
    table: Table,
    embedded: bool,
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

/// Dotted keys and values of the leaves of a table.
fn leaves<'a>(table: &'a Table, prefix: &str, out: &mut Vec<(String, &'a Value)>) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Table(below) => leaves(below, &path, out),
            _ => out.push((path, value)),
        }
    }
}

fn leaf_values(table: &Table) -> Vec<(String, &Value)> {
    let mut out = Vec::new();
    leaves(table, "", &mut out);
    out
}

fn leaf_paths(table: &Table) -> Vec<String> {
    leaf_values(table).into_iter().map(|(path, _)| path).collect()
}

/// Refuses keys the base recipe does not have, and values of another type; objectives may be new.
fn check(layer: &Layer, base: &Table) -> Result<()> {
    let known = leaf_values(base);
    for (key, value) in leaf_values(&layer.table) {
        if key == "extends" || (key.starts_with("objectives.") && key.ends_with(".terms")) {
            continue;
        }
        let Some((_, default)) = known.iter().find(|(k, _)| *k == key) else {
            let nearest = nearest(&key, known.iter().map(|(k, _)| k.as_str()));
            let nearest = nearest.map_or(String::new(), |n| format!("; the nearest known key is `{n}`"));
            return Err(usage!(
                "unknown key `{key}` in {}{nearest}\n  hint: xtask/recipes/base.toml lists every key with its default",
                layer.origin
            ));
        };
        let number = |v: &Value| v.is_integer() || v.is_float();
        let fits = value.same_type(default) || (default.is_float() && number(value));
        if !fits {
            return Err(usage!(
                "`{key}` in {} is {value}, a {}, expected a {}\n  hint: such as {key}={default}",
                layer.origin,
                kind(value),
                kind(default)
            ));
        }
    }
    Ok(())
}

/// What a value is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "string",
        Value::Integer(_) => "whole number",
        Value::Float(_) => "number",
        Value::Boolean(_) => "true or false",
        Value::Array(_) => "list in brackets",
        Value::Table(_) => "table",
        Value::Datetime(_) => "date",
    }
}

/// The known key most like `key`: first by its last part, then as a whole.
pub(super) fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_string();
    let likeness = |k: &str| {
        let part = strsim::normalized_damerau_levenshtein(&last(k), &last(key));
        (part + 0.5 * strsim::normalized_damerau_levenshtein(k, key), std::cmp::Reverse(k.len()))
    };
    known.max_by(|a, b| likeness(a).partial_cmp(&likeness(b)).unwrap_or(std::cmp::Ordering::Equal))
}

fn parse(text: &str, origin: &str) -> Result<Table> {
    text.parse::<Table>().map_err(|e| usage!("{origin} is not TOML: {e}"))
}

/// The recipe `name`, as a chain from itself to the base.
fn chain(name: &str) -> Result<Vec<Layer>> {
    let mut out: Vec<Layer> = Vec::new();
    let mut next = name.to_string();
    loop {
        let text = EMBEDDED.iter().find(|(n, _)| *n == next).map(|(_, text)| *text);
        let (origin, table, embedded) = match text {
            Some(text) => {
                let mut table = parse(text, &next)?;
                if next == "base" {
                    for method in METHODS {
                        merge(&mut table, parse(method, "methods")?);
                    }
                }
                (format!("recipe `{next}`"), table, true)
            }
            None if next.ends_with(".toml") => {
                let text = fs_err::read_to_string(&next).map_err(|e| coded(UNAVAILABLE, e))?;
                (format!("`{next}`"), parse(&text, &next)?, false)
            }
            None => {
                let known: Vec<&str> = EMBEDDED.iter().map(|(n, _)| *n).filter(|n| *n != "base").collect();
                return Err(usage!(
                    "unknown recipe `{next}`, known: {}\n  hint: or give a file that ends in .toml",
                    known.join(", ")
                ));
            }
        };
        if out.iter().any(|l| l.origin == origin) {
            return Err(usage!("{origin} extends itself\n  hint: end the chain at `base`"));
        }
        let extends = match table.get("extends") {
            None => "base".to_string(),
            Some(Value::String(base)) => base.clone(),
            Some(other) => {
                return Err(usage!("`extends` in {origin} is {other}, expected the name of a recipe or a file"));
            }
        };
        out.push(Layer { origin, table, embedded });
        if next == "base" {
            return Ok(out);
        }
        next = extends;
    }
}

/// `key=value` as a layer; the key may be dotted and quoted as in TOML, the value is TOML or else a string.
fn setting(text: &str) -> Result<Layer> {
    let (key, value) = text
        .split_once('=')
        .map(|(k, v)| (k.trim(), v.trim()))
        .filter(|(k, _)| !k.is_empty())
        .ok_or_else(|| usage!("--set {text}: expected KEY=VALUE\n  hint: such as --set optim.lr=0.02"))?;
    let quoted = Value::String(value.to_string());
    let table = format!("{key} = {value}").parse::<Table>().or_else(|_| format!("{key} = {quoted}").parse::<Table>());
    let table = table.map_err(|_| {
        usage!("--set {text}: `{key}` is no key\n  hint: such as optim.lr, or objectives.\"csc+ce\".terms")
    })?;
    Ok(Layer { origin: "--set".to_string(), table, embedded: false })
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
