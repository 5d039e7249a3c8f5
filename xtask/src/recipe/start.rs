//! Weights a recipe names: where they are, and how they become tensors of the network they are for.
//!
//! A name means, in this order, a folder that `weights import` or a run wrote, a file of ours or of another library, or
//! weights of the table that the hub serves. Whole networks fit whole; encoders alone fill the encoder and leave the rest
//! as the seed drew it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use segdistill_models::weights::{ImportOptions, encoder_options, import, import_encoder, tensor_names};
use segdistill_models::{Frozen, ModelError, ModelSpec};

use crate::commands::weights::source;
use crate::exit::{UNAVAILABLE, USAGE, coded, usage};
use crate::hub::registry;
use crate::run_folder::{model_place, read_config, read_final};

/// Weights a stage starts from, instead of those its seed draws.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Start {
    /// Folder, file or name.
    pub(crate) from: String,
    /// What of the network they fill.
    pub(crate) fills: Fills,
}

/// What weights fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fills {
    /// Everything; the number of classes is the same.
    Network,
    /// Everything but the classifier, where the number of classes differs.
    AllButClassifier,
    /// The encoder.
    Encoder,
}

impl Start {
    /// The start that a role's keys ask for: `weights` or `encoder_weights`, not both.
    pub(super) fn of(role: &str, weights: &str, encoder_weights: &str, new_classifier: bool) -> Result<Option<Self>> {
        let fills = if new_classifier { Fills::AllButClassifier } else { Fills::Network };
        match (weights, encoder_weights) {
            ("", "") if new_classifier => Err(usage!(
                "{role}.new_classifier is set without {role}.weights\n  hint: it replaces the classifier of given weights"
            )),
            ("", "") => Ok(None),
            ("", from) if new_classifier => {
                Err(usage!("{role}.new_classifier is set, but `{from}` fills the encoder alone\n  hint: take it out"))
            }
            ("", from) => Ok(Some(Self { from: from.to_string(), fills: Fills::Encoder })),
            (from, "") => Ok(Some(Self { from: from.to_string(), fills })),
            _ => Err(usage!(
                "{role}.weights and {role}.encoder_weights are both set\n  hint: whole weights hold the encoder already; take one out"
            )),
        }
    }

    /// Tensors of `spec` that the stage starts from; `seed` draws a classifier anew.
    ///
    /// # Errors
    /// Exit code 2 for weights that do not fit, with every difference; 4 for what is not there.
    pub(crate) fn load(&self, spec: &ModelSpec, seed: u64, lock: &Path) -> Result<BTreeMap<String, Tensor>> {
        let fit = || format!("weights `{}` do not fit {} on {}", self.from, spec.name, spec.encoder);
        match self.fills {
            Fills::Network => whole(&self.from, spec, None, lock).map(|(tensors, _)| tensors),
            Fills::AllButClassifier => whole(&self.from, spec, Some(seed), lock).map(|(tensors, _)| tensors),
            Fills::Encoder => {
                let path = model_file(&self.from);
                let (path, named) = match path {
                    Some(path) => (path, None),
                    None => source::find(&self.from, lock)?,
                };
                let mut file = source::open(&path, None)?;
                let names = tensor_names(spec).map_err(|e| coded(USAGE, e))?;
                let encoder = |name: &&String| name.starts_with("encoder.");
                if names.iter().filter(encoder).all(|name| file.tensors().contains_key(name)) {
                    // Written by `weights import`, in the names of this network.
                    return Ok(file.load(|name| names.contains(name) && name.starts_with("encoder."))?);
                }
                let options = encoder_options(spec).map_err(|e| coded(USAGE, e))?;
                let imported = import_encoder(&mut file, &spec.encoder, options, source::layout("auto", named));
                Ok(imported.with_context(fit).map_err(|e| coded(USAGE, e))?.tensors)
            }
        }
    }
}

/// Checks that `name` means something, without fetching it.
pub(super) fn exists(role: &str, name: &str) -> Result<()> {
    if Path::new(name).exists() || registry::find(name).is_some() {
        return Ok(());
    }
    let why = anyhow::anyhow!(
        "{role} weights `{name}` are not there\n  hint: a weight file, a folder that `weights import` wrote, or a name of `cargo xtask weights list`"
    );
    Err(coded(UNAVAILABLE, why))
}

/// The weight file of a model folder, if `name` is one.
fn model_file(name: &str) -> Option<PathBuf> {
    let path = Path::new(name);
    path.is_dir().then(|| model_place(path).join("model.safetensors"))
}

/// Every tensor of `spec` out of what `name` means, and where they come from, in words.
///
/// # Errors
/// As [`Start::load`].
pub(crate) fn whole(
    name: &str,
    spec: &ModelSpec,
    new_classifier: Option<u64>,
    lock: &Path,
) -> Result<(BTreeMap<String, Tensor>, Origin)> {
    let fit = || format!("weights `{name}` do not fit {} on {}", spec.name, spec.encoder);
    let (path, named) = match model_file(name) {
        Some(path) => {
            // Verified against its digest.
            read_final(Path::new(name), &Device::Cpu)?;
            (path, None)
        }
        None => source::find(name, lock)?,
    };
    let mut file = source::open(&path, None)?;
    let names = tensor_names(spec).map_err(|e| coded(USAGE, e))?;
    let shared = names.iter().filter(|name| file.tensors().contains_key(*name)).count();
    let is_ours = shared == names.len() && new_classifier.is_none();
    let imported = if is_ours {
        None
    } else {
        let options = ImportOptions { new_classifier };
        Some(import(&mut file, spec, source::layout("auto", named), options))
    };
    let align_corners = match (&imported, model_file(name)) {
        (Some(Ok(imported)), _) => segdistill_models::weights::layout(&imported.layout)?.align_corners(),
        (_, Some(_)) => Some(read_config(Path::new(name))?.align_corners),
        _ => None,
    };
    let (tensors, layout) = match imported {
        Some(Ok(imported)) => (imported.tensors, Some(imported.layout)),
        // Mostly ours, with something wrong: what differs from our own names says more, unless the other library's were all
        // found.
        Some(Err(error)) if shared * 2 < names.len() || new_classifier.is_some() || all_named(&error) => {
            return Err(coded(USAGE, anyhow::Error::new(error).context(fit())));
        }
        _ => (file.load(|_| true)?, None),
    };
    Frozen::new(spec, tensors.clone(), DType::F32, &Device::Cpu).with_context(fit).map_err(|e| coded(USAGE, e))?;
    let align_corners = align_corners.unwrap_or(layout.is_some() && segdistill_models::info(spec)?.align_corners);
    Ok((tensors, Origin { path, layout, align_corners }))
}

/// Whether a file has every name of its layout, so that it is surely of that library.
fn all_named(error: &ModelError) -> bool {
    matches!(error, ModelError::Fit(misfit) if misfit.missing.is_empty())
}

/// Where weights came from.
pub(crate) struct Origin {
    /// File.
    pub(crate) path: PathBuf,
    /// Layout they were read by; `None` for names of ours.
    pub(crate) layout: Option<String>,
    /// Whether logits are enlarged with corners aligned.
    pub(crate) align_corners: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_and_encoder_weights_exclude_each_other() {
        let of = |weights, encoder, new| Start::of("student", weights, encoder, new);
        assert_eq!(of("", "", false).unwrap(), None);
        assert_eq!(of("a", "", false).unwrap().unwrap().fills, Fills::Network);
        assert_eq!(of("a", "", true).unwrap().unwrap().fills, Fills::AllButClassifier);
        assert_eq!(of("", "b", false).unwrap().unwrap().fills, Fills::Encoder);
        for (weights, encoder, new) in [("a", "b", false), ("", "b", true), ("", "", true)] {
            let error = of(weights, encoder, new).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), USAGE);
            assert!(format!("{error:#}").contains("student."), "{error:#}");
        }
        let error = exists("student", "no/such/file.safetensors").unwrap_err();
        assert_eq!(crate::exit::code_of(&error), UNAVAILABLE);
        exists("student", "timm/resnet34").unwrap();
    }
}
