//! Objectives made of one by varying settings of its terms over a grid.

use anyhow::Result;
use serde_json::Value;

use segdistill_train::TermConfig;

use super::{ObjectiveKeys, Recipe};
use crate::exit::usage;

/// One setting of one term and the values it takes, as `kd.weight=0.1,1,10`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Variation {
    /// Name of the term.
    pub(crate) term: String,
    /// Setting of it.
    pub(crate) key: String,
    /// Values, as written.
    pub(crate) values: Vec<String>,
}

/// One point of the grid.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Variant {
    /// Name of its objective, which folders and the report have.
    pub(crate) method: String,
    /// A value for each variation.
    pub(crate) values: Vec<String>,
}

impl std::str::FromStr for Variation {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || usage!("--vary {text}: expected TERM.SETTING=V,V\n  hint: such as --vary csc.weight=1,10,100");
        let (place, values) = text.split_once('=').ok_or_else(wrong)?;
        let (term, key) = place.split_once('.').ok_or_else(wrong)?;
        let values: Vec<String> = values.split(',').map(|v| v.trim().to_string()).collect();
        if term.is_empty() || key.is_empty() || values.iter().any(String::is_empty) {
            return Err(wrong());
        }
        if let Some(twice) = values.iter().enumerate().find(|(i, v)| values[..*i].contains(v)).map(|(_, v)| v) {
            return Err(usage!("--vary {text}: {twice} is given twice\n  hint: give each value once"));
        }
        Ok(Self { term: term.to_string(), key: key.to_string(), values })
    }
}

impl Variation {
    /// The setting, as `kd.weight`.
    pub(crate) fn name(&self) -> String {
        format!("{}.{}", self.term, self.key)
    }
}

impl Recipe {
    /// Adds an objective for every point of the grid of `variations` around the objective `method`.
    ///
    /// # Errors
    /// Usage errors for an objective, a term or a setting that is not there, and for values it cannot take.
    pub(super) fn vary(&mut self, method: &str, variations: &[Variation]) -> Result<Vec<Variant>> {
        let known: Vec<&str> = self.objectives.keys().map(String::as_str).collect();
        let objective = self.objectives.get(method).ok_or_else(|| {
            usage!(
                "unknown method `{method}`, known: {}\n  hint: --method names the objective to vary",
                known.join(", ")
            )
        })?;
        let terms = objective.terms(&self.dataset).to_vec();
        let mut grid: Vec<(Variant, Vec<TermConfig>)> =
            vec![(Variant { method: method.to_string(), values: Vec::new() }, terms)];
        for variation in variations {
            let mut finer = Vec::with_capacity(grid.len() * variation.values.len());
            for (variant, terms) in &grid {
                for value in &variation.values {
                    let mut variant = variant.clone();
                    variant.method.push_str(&format!("_{}={value}", variation.name()));
                    variant.values.push(value.clone());
                    finer.push((variant, with(terms, variation, value, method)?));
                }
            }
            grid = finer;
        }
        for (i, (variant, terms)) in grid.iter().enumerate() {
            if let Some((twin, _)) = grid[..i].iter().find(|(_, other)| other == terms) {
                return Err(usage!(
                    "{} and {} are the same objective\n  hint: give each value once, in whatever form",
                    twin.method,
                    variant.method
                ));
            }
            let keys = ObjectiveKeys { terms: terms.clone(), on: Default::default() };
            self.objectives.insert(variant.method.clone(), keys);
        }
        Ok(grid.into_iter().map(|(variant, _)| variant).collect())
    }
}

/// `terms` with one setting of one of them changed.
fn with(terms: &[TermConfig], variation: &Variation, value: &str, method: &str) -> Result<Vec<TermConfig>> {
    let names: Vec<String> = terms.iter().map(|t| t.loss.name()).collect();
    let place = names.iter().position(|name| *name == variation.term).ok_or_else(|| {
        usage!(
            "method `{method}` has no term `{}`, its terms: {}\n  hint: --vary TERM.SETTING=V,V",
            variation.term,
            names.join(", ")
        )
    })?;
    let wrong =
        |why: String| usage!("--vary {}={value}: {why}\n  hint: docs/losses.md lists the settings", variation.name());
    let mut written = serde_json::to_value(&terms[place]).map_err(|e| wrong(e.to_string()))?;
    // A number or a truth value is one; everything else is a word.
    let parsed = serde_json::from_str::<Value>(value).unwrap_or_else(|_| Value::String(value.to_string()));
    let Some(table) = written.as_object_mut() else { return Err(wrong("a term is a table".into())) };
    if variation.key == "loss" {
        return Err(wrong("the loss itself is not a setting".into()));
    }
    table.insert(variation.key.clone(), parsed);
    let term = serde_json::from_value::<TermConfig>(written)
        .map_err(|e| wrong(format!("{e}; besides, every term has `weight` and `schedule`")))?;
    let mut varied = terms.to_vec();
    varied[place] = term;
    Ok(varied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::code_of;

    #[test]
    fn a_variation_is_a_setting_and_its_values() {
        let parsed: Variation = "kd.weight=0.1, 1,10".parse().unwrap();
        assert_eq!(
            (parsed.name().as_str(), parsed.values),
            ("kd.weight", ["0.1", "1", "10"].map(String::from).to_vec())
        );
        for wrong in ["kd.weight", "kd=1", ".weight=1", "kd.=1", "kd.weight=", "kd.weight=1,,2", "kd.weight=1,1"] {
            assert_eq!(code_of(&wrong.parse::<Variation>().unwrap_err()), 2, "{wrong}");
        }
    }
}
