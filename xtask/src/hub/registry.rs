//! Named weights: where each lies on the hub, what its tensors fill, what it was trained on, and under which licence.
//!
//! The table is data, `weights.toml`, and part of the program.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::error::{HubError, Result};
use super::names;

/// What a weight file fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// An encoder, trained as a classifier.
    Encoder,
    /// A whole segmenter.
    Segmenter,
}

/// One named weight file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedWeights {
    /// What a recipe or the command line calls it.
    pub(crate) name: String,
    /// Repository on the hub, `ORG/NAME`.
    pub(crate) repo: String,
    /// File in it.
    pub(crate) file: String,
    /// What it fills.
    pub(crate) role: Role,
    /// Network: an encoder, or `NETWORK-ENCODER`.
    pub(crate) network: String,
    /// Naming of the tensors: a key map of `segdistill_models::weights`.
    pub(crate) layout: String,
    /// Classes it tells apart.
    pub(crate) classes: String,
    /// How many.
    pub(crate) n_classes: usize,
    /// Mean of the RGB values in [0, 1] that is subtracted from an image.
    pub(crate) mean: [f64; 3],
    /// Deviation it is divided by.
    pub(crate) std: [f64; 3],
    /// Licence of the weights.
    pub(crate) licence: String,
    /// mIoU as published, a fraction.
    pub(crate) miou: Option<f64>,
    /// Who published it, and how it was measured.
    pub(crate) miou_source: Option<String>,
    /// Branch, tag or commit; `main` when nobody names one.
    pub(crate) revision: Option<String>,
    /// sha256 of the file; it wins over the lock.
    pub(crate) sha256: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    weights: Vec<NamedWeights>,
}

/// Every named weight file, in the table's order.
pub(crate) fn all() -> &'static [NamedWeights] {
    static ALL: LazyLock<Vec<NamedWeights>> = LazyLock::new(|| {
        let table: Table = toml::from_str(include_str!("weights.toml")).expect("the embedded table is valid");
        table.weights
    });
    &ALL
}

/// The weights called `name`, or those of the repository `name` when it holds one file of the table.
pub(crate) fn find(name: &str) -> Option<&'static NamedWeights> {
    all().iter().find(|w| w.name == name).or_else(|| all().iter().find(|w| w.repo == name))
}

/// As [`find`]; an unknown name is an error that names the nearest one.
pub(crate) fn named(name: &str) -> Result<&'static NamedWeights> {
    find(name).ok_or_else(|| {
        let near = all().iter().max_by(|a, b| {
            let score = |w: &NamedWeights| strsim::jaro_winkler(&w.name, name).max(strsim::jaro_winkler(&w.repo, name));
            score(a).total_cmp(&score(b))
        });
        HubError::Config {
            what: "weights".into(),
            found: format!("`{}`", names::shown(name)),
            expected: near.map_or_else(String::new, |w| format!("a name of the table, such as `{}`", w.name)),
            hint: "`cargo xtask weights list` has every name".into(),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_entry_can_be_asked_for_and_invents_nothing() {
        let mut seen = BTreeSet::new();
        for w in all() {
            assert!(seen.insert(&w.name), "{} twice", w.name);
            names::repo(&w.repo).unwrap();
            names::file(&w.file).unwrap();
            assert_eq!((&w.revision, &w.sha256), (&None, &None), "{}", w.name);
            assert_eq!(w.miou.is_some(), w.role == Role::Segmenter, "{}", w.name);
            assert_eq!(w.miou.is_some(), w.miou_source.is_some(), "{}", w.name);
            assert!(w.miou.is_none_or(|m| (0.7..0.9).contains(&m)), "{}", w.name);
            assert_eq!(w.n_classes, if w.role == Role::Segmenter { 19 } else { 1000 }, "{}", w.name);
            assert!(w.mean.iter().chain(&w.std).all(|v| (0.2..=0.5).contains(v)), "{}", w.name);
            assert!(!w.licence.is_empty(), "{}", w.name);
            assert!(
                segdistill_models::weights::layout_names().contains(&w.layout.as_str()),
                "{}: {}",
                w.name,
                w.layout
            );
            let encoder = w.network.strip_prefix("segformer-").unwrap_or(&w.network);
            assert!(segdistill_models::encoders::names().contains(&encoder), "{}: {}", w.name, w.network);
        }
        assert!(seen.len() == 21);
    }

    #[test]
    fn names_and_repositories_are_found_and_others_are_told_the_nearest() {
        assert_eq!(named("timm/resnet34").unwrap().repo, "timm/resnet34.tv_in1k");
        assert_eq!(named("timm/resnet34.tv_in1k").unwrap().name, "timm/resnet34");
        let error = named("timm/resnet35").unwrap_err().to_string();
        assert!(error.contains("`timm/resnet35`") && error.contains("`timm/resnet34`"), "{error}");
        assert!(named("a\u{1b}[31m\nb").unwrap_err().to_string().contains("a\\u{1b}[31m\\nb"));
    }
}
