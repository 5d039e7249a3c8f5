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
use crate::hub::{self, Wanted, registry};
use crate::run_folder::{model_place, read_config, read_final};

/// Weights a stage starts from, instead of those its seed draws.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Start {
    /// Folder, file or name.
    pub(crate) from: String,
    /// What of the network they fill.
    pub(crate) fills: Fills,
    /// Which of the bytes that ever had this name.
    #[serde(default, skip_serializing_if = "Pinned::is_free")]
    pub(crate) pinned: Pinned,
}

/// Which bytes a recipe means by a name; each wins over the lock file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Pinned {
    /// Branch, tag or commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    /// sha256 of the weight file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
}

impl Pinned {
    /// What the keys `weights_revision` and `weights_sha256` of a role say; an empty one says nothing.
    pub(super) fn of(role: &str, revision: &str, sha256: &str) -> Result<Self> {
        let said = |text: &str| (!text.is_empty()).then(|| text.to_string());
        let pinned = Self { revision: said(revision), sha256: said(sha256) };
        for (key, alone) in [
            ("weights_revision", Self { sha256: None, ..pinned.clone() }),
            ("weights_sha256", Self { revision: None, ..pinned.clone() }),
        ] {
            alone
                .wanted("")
                .check()
                .map_err(|e| coded(USAGE, anyhow::Error::new(e).context(format!("{role}.{key}"))))?;
        }
        Ok(pinned)
    }

    /// Whether any bytes of the name will do.
    pub(crate) fn is_free(&self) -> bool {
        *self == Self::default()
    }

    /// The weights called `name`, of these bytes.
    pub(crate) fn wanted<'a>(&'a self, name: &'a str) -> Wanted<'a> {
        Wanted { name, revision: self.revision.as_deref(), sha256: self.sha256.as_deref(), pin_anew: false }
    }
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
    pub(super) fn of(
        role: &str,
        [weights, encoder_weights]: [&str; 2],
        new_classifier: bool,
        pinned: Pinned,
    ) -> Result<Option<Self>> {
        let fills = if new_classifier { Fills::AllButClassifier } else { Fills::Network };
        match (weights, encoder_weights) {
            ("", "") if new_classifier => Err(usage!(
                "{role}.new_classifier is set without {role}.weights\n  hint: it replaces the classifier of given weights"
            )),
            ("", "") => {
                let set = [("revision", &pinned.revision), ("sha256", &pinned.sha256)];
                match set.into_iter().find(|(_, value)| value.is_some()) {
                    Some((key, _)) => Err(usage!(
                        "{role}.weights_{key} is set without {role}.weights or {role}.encoder_weights\n  hint: it says which bytes of those are meant"
                    )),
                    None => Ok(None),
                }
            }
            ("", from) if new_classifier => {
                Err(usage!("{role}.new_classifier is set, but `{from}` fills the encoder alone\n  hint: take it out"))
            }
            ("", from) => Ok(Some(Self { from: from.to_string(), fills: Fills::Encoder, pinned })),
            (from, "") => Ok(Some(Self { from: from.to_string(), fills, pinned })),
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
        let wanted = self.pinned.wanted(&self.from);
        match self.fills {
            Fills::Network => whole(&wanted, spec, None, lock).map(|(tensors, _)| tensors),
            Fills::AllButClassifier => whole(&wanted, spec, Some(seed), lock).map(|(tensors, _)| tensors),
            Fills::Encoder => {
                let (path, named) = match model_file(&wanted)? {
                    Some(path) => (path, None),
                    None => source::find(&wanted, lock)?,
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

/// The weight file of a model folder, if the name is one; held to the bytes that are wanted.
fn model_file(wanted: &Wanted<'_>) -> Result<Option<PathBuf>> {
    let path = Path::new(wanted.name);
    if !path.is_dir() {
        return Ok(None);
    }
    let path = model_place(path).join("model.safetensors");
    hub::check_file(wanted, &path).map_err(hub::HubError::coded)?;
    Ok(Some(path))
}

/// Every tensor of `spec` out of what is wanted, and where they come from, in words.
///
/// # Errors
/// As [`Start::load`].
pub(crate) fn whole(
    wanted: &Wanted<'_>,
    spec: &ModelSpec,
    new_classifier: Option<u64>,
    lock: &Path,
) -> Result<(BTreeMap<String, Tensor>, Origin)> {
    let name = wanted.name;
    let fit = || format!("weights `{name}` do not fit {} on {}", spec.name, spec.encoder);
    let folder = model_file(wanted)?;
    let (path, named) = match folder.clone() {
        Some(path) => {
            // Verified against its digest.
            read_final(Path::new(name), &Device::Cpu)?;
            (path, None)
        }
        None => source::find(wanted, lock)?,
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
    let align_corners = match (&imported, folder) {
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
        let of = |weights, encoder, new| Start::of("student", [weights, encoder], new, Pinned::default());
        assert_eq!(of("", "", false).unwrap(), None);
        assert_eq!(of("a", "", false).unwrap().unwrap().fills, Fills::Network);
        assert_eq!(of("a", "", true).unwrap().unwrap().fills, Fills::AllButClassifier);
        assert_eq!(of("", "b", false).unwrap().unwrap().fills, Fills::Encoder);
        for (weights, encoder, new) in [("a", "b", false), ("", "b", true), ("", "", true)] {
            let error = of(weights, encoder, new).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), USAGE);
            assert!(format!("{error:#}").contains("student."), "{error:#}");
        }
        for (revision, sha256, key) in [("../x", "", "weights_revision"), ("main", "12", "weights_sha256")] {
            let error = Pinned::of("student", revision, sha256).unwrap_err();
            assert_eq!(crate::exit::code_of(&error), USAGE);
            assert!(format!("{error:#}").contains(&format!("student.{key}")), "{error:#}");
        }
        let pinned = Pinned::of("student", "main", &"A".repeat(64)).unwrap();
        assert!(Start::of("student", ["", ""], false, pinned.clone()).is_err(), "pins nothing");
        let start = Start::of("student", ["", "b"], false, pinned).unwrap().unwrap();
        assert_eq!(start.pinned.wanted(&start.from).revision, Some("main"));
        let error = exists("student", "no/such/file.safetensors").unwrap_err();
        assert_eq!(crate::exit::code_of(&error), UNAVAILABLE);
        exists("student", "timm/resnet34").unwrap();
    }
}
