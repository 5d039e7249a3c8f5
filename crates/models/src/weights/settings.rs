//! What a library writes beside its weights about how a network is built: settings that no tensor shows.
//!
//! segmentation_models.pytorch's `save_pretrained` leaves a `config.json` with the arguments of the constructor. Two networks
//! of equal tensors may compute different things, by their output stride or rates, so the file is held against the table of
//! the layout before a tensor is taken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::export::config;
use super::layout::NameMap;
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;

/// Longest such file, in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// The class that is built, by which such a file is told from other `config.json`.
const CLASS: &str = "_model_class";
/// Keys that change nothing here: where the encoder came from, and what the shapes of the tensors say.
const WITHOUT_EFFECT: [&str; 3] = ["encoder_weights", "classes", "aux_params"];

/// The settings beside a weight file.
pub(super) struct Settings {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Settings {
    /// Those of `config.json` beside `weights`; `None` where there is none, or one of another kind.
    pub(super) fn beside(weights: &Path) -> Option<Self> {
        let path = weights.parent()?.join("config.json");
        fs_err::metadata(&path).ok().filter(|meta| meta.is_file() && meta.len() <= MAX_BYTES)?;
        let values: Map<String, Value> = serde_json::from_slice(&fs_err::read(&path).ok()?).ok()?;
        values.contains_key(CLASS).then_some(Self { path, values })
    }

    /// Whether they are of the library that `names` are of: one that writes such files.
    pub(super) fn are_of(&self, names: &NameMap) -> bool {
        names.config.contains_key(CLASS)
    }

    /// `spec` with the output stride and the dropout that are written.
    pub(super) fn fill(&self, names: &NameMap, spec: &ModelSpec) -> ModelSpec {
        let written = |field: &str| self.values.get(key_of(names, field)?);
        let output_stride = written("{output_stride}").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let dropout = written("{dropout}").and_then(Value::as_f64);
        ModelSpec {
            output_stride: output_stride.unwrap_or(spec.output_stride),
            dropout: dropout.unwrap_or(spec.dropout),
            ..spec.clone()
        }
    }

    /// Compares every setting with what the network of `spec` is.
    ///
    /// # Errors
    /// `Settings` with each that differs.
    fn check(&self, names: &NameMap, spec: &ModelSpec) -> Result<()> {
        let ours = config(&names.config, spec, &names.encoder);
        let same = config(&names.same, spec, &names.encoder);
        // The stride is the caller's to change; dropout never runs where weights are used as they are.
        let free = [key_of(names, "{output_stride}"), key_of(names, "{dropout}")];
        let differs = |(key, found): &(&String, &Value)| {
            if WITHOUT_EFFECT.contains(&key.as_str()) || free.contains(&Some(key.as_str())) {
                return None;
            }
            let expected = ours.get(*key);
            let fits = [expected, same.get(*key)].into_iter().flatten().any(|value| equal(value, found));
            match expected {
                _ if fits => None,
                Some(expected) => Some(format!("{key}: found {found}, expected {expected}")),
                None if found.is_null() || (key.starts_with('_') && *key != CLASS) => None,
                None => Some(format!("{key}: found {found}, which is not known here")),
            }
        };
        let differences: Vec<String> = self.values.iter().filter_map(|pair| differs(&pair)).collect();
        match differences.is_empty() {
            true => Ok(()),
            false => Err(ModelError::Settings { path: self.path.clone(), model: spec.full_name(), differences }),
        }
    }
}

/// Settings that no tensor shows and no file beside the weights said, as the network of `spec` has them; those that are
/// written are checked.
///
/// # Errors
/// As [`Settings::check`].
pub(super) fn assumed(weights: &Path, names: &NameMap, spec: &ModelSpec) -> Result<BTreeMap<String, Value>> {
    let settings = Settings::beside(weights).filter(|settings| settings.are_of(names));
    if let Some(settings) = &settings {
        settings.check(names, spec)?;
    }
    let ours = config(&names.config, spec, &names.encoder);
    let said = |key: &str| settings.as_ref().is_some_and(|settings| settings.values.contains_key(key));
    let value = |key: &String| Some((key.clone(), ours.get(key)?.clone())).filter(|_| !said(key));
    let mut out: BTreeMap<String, Value> = names.untold.iter().filter_map(value).collect();
    let dilated = crate::decoders::entry(&spec.name)?.dilated && names.config.is_empty();
    if dilated {
        out.insert("output_stride".to_string(), spec.output_stride.into());
    }
    Ok(out)
}

/// The key under which a library has a field of the spec.
fn key_of<'a>(names: &'a NameMap, field: &str) -> Option<&'a str> {
    names.config.iter().find(|(_, value)| value.as_str() == Some(field)).map(|(key, _)| key.as_str())
}

/// Equality of values, whole numbers and floats of one value included.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}
