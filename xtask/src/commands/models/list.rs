//! `models list`: published networks, then every network on every encoder.

use anyhow::Result;
use serde::Serialize;

use segdistill_models::{Configuration, ModelSpec, Subject, catalog, configurations, info};

use super::{DEFAULT_CLASSES, DEFAULT_HW, macs_text, parse_size};
use crate::exit::{USAGE, coded};

/// What `params` and `macs` hold.
const COUNTED: &str = "params: trained elements; macs: multiply-accumulates of one image in convolutions and linear layers, \
                       taps on padding included; both with the auxiliary head where aux is true; attention's two products \
                       stand apart in attention_macs; of an encoder alone \
                       both are without its classifier, with it they are params_with_classifier and macs_with_classifier";

/// One network, with exact integers.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    /// `null` for an encoder alone, as all that only a network has.
    pub(super) network: Option<String>,
    pub(super) encoder: String,
    pub(super) layout: Option<String>,
    pub(super) aux: bool,
    pub(super) n_classes: Option<usize>,
    pub(super) params: usize,
    pub(super) macs: u64,
    pub(super) attention_macs: u64,
    /// `null` for whole networks, and for encoders that were never classifiers.
    pub(super) params_with_classifier: Option<usize>,
    pub(super) macs_with_classifier: Option<u64>,
    pub(super) input_size: [usize; 2],
    pub(super) output_stride: Option<usize>,
    pub(super) logits_stride: Option<usize>,
    pub(super) counted: &'static str,
}

impl Row {
    /// # Errors
    /// Usage errors: what a spec or a size refuses was typed by somebody.
    pub(super) fn new(configuration: &Configuration) -> Result<Self> {
        let cost = configuration.cost().map_err(|e| coded(USAGE, e))?;
        let with = configuration.classifier().map_err(|e| coded(USAGE, e))?;
        let spec = match &configuration.subject {
            Subject::Network(spec) => Some(spec),
            Subject::Encoder(_) => None,
        };
        let about = spec.map(info).transpose().map_err(|e| coded(USAGE, e))?;
        let encoder = match &configuration.subject {
            Subject::Network(spec) => spec.encoder.clone(),
            Subject::Encoder(name) => name.to_string(),
        };
        Ok(Self {
            name: configuration.name.clone(),
            network: spec.map(|s| s.name.clone()),
            encoder,
            layout: spec.map(|s| s.layout.clone()),
            aux: spec.is_some_and(|s| s.aux),
            n_classes: spec.map(|s| s.n_classes),
            params: cost.n_parameters,
            macs: cost.macs,
            attention_macs: cost.attention_macs,
            params_with_classifier: with.map(|c| cost.n_parameters + c.n_parameters),
            macs_with_classifier: with.map(|c| cost.macs + c.macs),
            input_size: configuration.input_hw,
            output_stride: about.as_ref().map(|a| a.output_stride),
            logits_stride: about.as_ref().map(|a| a.logits_stride),
            counted: COUNTED,
        })
    }
}

pub(super) fn run(published: bool, size: Option<&str>, classes: Option<usize>, json: bool) -> Result<()> {
    let rows = rows(published, size, classes)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let name = rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
    println!("{:<name$}  {:>7}  {:>9}  {:>12}  {:>11}", "network", "classes", "input", "parameters", "MACs");
    for r in &rows {
        let classes = r.n_classes.map_or(String::new(), |n| n.to_string());
        let input = format!("{}x{}", r.input_size[0], r.input_size[1]);
        println!("{:<name$}  {classes:>7}  {input:>9}  {:>12}  {:>11}", r.name, r.params, macs_text(r.macs));
    }
    println!("{COUNTED}");
    Ok(())
}

fn rows(published: bool, size: Option<&str>, classes: Option<usize>) -> Result<Vec<Row>> {
    let hw = size.map(parse_size).transpose()?;
    let mut listed = configurations();
    if !published {
        listed.extend(catalog().into_iter().map(|entry| Configuration {
            name: format!("{}-{}", entry.name, entry.encoder),
            subject: Subject::Network(entry.spec(DEFAULT_CLASSES)),
            input_hw: DEFAULT_HW,
        }));
    }
    for configuration in &mut listed {
        if let Some(hw) = hw {
            configuration.input_hw = hw;
        }
        if let (Some(n_classes), Subject::Network(spec)) = (classes, &mut configuration.subject) {
            *spec = ModelSpec { n_classes, ..spec.clone() };
        }
    }
    listed.iter().map(Row::new).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_networks_are_listed_with_their_own_size_and_classes() {
        let rows = rows(true, None, None).unwrap();
        let find = |name: &str| rows.iter().find(|r| r.name == name).unwrap_or_else(|| panic!("no {name}"));
        for (name, params) in [
            ("resnet18", 11_689_512),
            ("resnet34", 21_797_672),
            ("resnet50", 25_557_032),
            ("resnet101", 44_549_160),
            ("mobilenetv2", 3_504_872),
            ("xception65", 39_916_312),
            ("vgg16", 138_357_544),
            ("densenet169", 14_149_480),
        ] {
            assert_eq!(find(&format!("encoder/{name}")).params_with_classifier, Some(params), "{name}");
        }
        assert_eq!(find("encoder/unet").params_with_classifier, None);
        let teacher = find("cirkd/deeplabv3-resnet101-deep");
        assert_eq!(teacher.params_with_classifier, None);
        assert_eq!((teacher.params, teacher.n_classes, teacher.aux), (61_118_950, Some(19), true));
        assert_eq!((teacher.input_size, teacher.output_stride), ([512, 1024], Some(8)));
        assert_eq!(find("encoder/resnet18").n_classes, None);
    }

    #[test]
    fn a_size_and_a_class_count_hold_for_every_row() {
        let all = rows(false, Some("64x96"), Some(7)).unwrap();
        for row in &all {
            assert_eq!(row.input_size, [64, 96]);
            assert!(row.n_classes.is_none_or(|n| n == 7), "{}", row.name);
        }
        assert!(all.iter().any(|r| r.name == "deeplabv3plus-resnet34"));
    }
}
