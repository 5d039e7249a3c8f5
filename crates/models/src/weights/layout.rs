//! Layouts: how another library names the tensors of a network, as tables.
//!
//! The tables are TOML beside this file (`layouts/*.toml`); no library has code of its own here. A layout joins the names
//! of an encoder, which several layouts share, behind a prefix, with the names of a decoder.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

use super::names::{Pattern, Rule};
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;

const ENCODERS: &str = include_str!("layouts/encoders.toml");
const LAYOUTS: [&str; 5] = [
    include_str!("layouts/torchvision.toml"),
    include_str!("layouts/timm.toml"),
    include_str!("layouts/smp.toml"),
    include_str!("layouts/transformers.toml"),
    include_str!("layouts/cirkd.toml"),
];

#[derive(Deserialize)]
#[serde(untagged)]
enum There {
    One(String),
    Joined(Vec<String>),
}

type Written = Vec<(There, String)>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EncoderFile {
    encoder: Vec<EncoderTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EncoderTable {
    /// Whose names they are.
    library: String,
    /// Encoders here, each with its name there.
    encoders: BTreeMap<String, String>,
    names: Written,
    /// The classifier and what else a segmenter has no use for.
    #[serde(default)]
    leave: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutFile {
    name: String,
    about: String,
    /// Whose names the encoders have.
    library: String,
    /// Whether every network brings its logits to the image's size with corners aligned, whatever its publication does.
    align_corners: Option<bool>,
    /// What a bare encoder's names begin with.
    #[serde(default)]
    bare_prefix: String,
    #[serde(default)]
    network: Vec<NetworkTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkTable {
    networks: Vec<String>,
    /// Encoders it is for; empty: all that the library names.
    #[serde(default)]
    encoders: Vec<String>,
    /// [`ModelSpec::layout`] of the network.
    structure: String,
    /// Others that have the same tensors under the same names.
    #[serde(default)]
    also: Vec<String>,
    /// What names of its encoder begin with.
    prefix: String,
    names: Written,
    #[serde(default)]
    leave: Vec<String>,
    /// Whether files hold the encoder's last stages although the network never runs them.
    #[serde(default)]
    dormant: bool,
    /// Values of the spec that the library fixes or has as its default.
    #[serde(default)]
    defaults: Defaults,
    /// What the library's constructor is called with, `{field}` standing for a value of the spec, `{none}` for null.
    #[serde(default)]
    config: toml::Table,
    /// Keys of `config` that no tensor shows.
    #[serde(default)]
    untold: Vec<String>,
    /// Settings, of other versions too, with a value that means the same.
    #[serde(default)]
    same: toml::Table,
}

/// Values of a spec that a library has as its default; those left out stay as they are.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Defaults {
    output_stride: Option<usize>,
    decoder_channels: Option<usize>,
    dropout: Option<f64>,
}

/// The names a library has for one network, or one encoder alone.
#[derive(Clone, Debug)]
pub(super) struct NameMap {
    pub(super) rules: Vec<Rule>,
    /// Names that are left out, with the reason.
    pub(super) leave: Vec<(Pattern, &'static str)>,
    /// The encoder's name there.
    pub(super) encoder: String,
    pub(super) dormant: bool,
    pub(super) config: toml::Table,
    pub(super) untold: Vec<String>,
    pub(super) same: toml::Table,
}

/// How a library names tensors.
pub struct Layout {
    file: LayoutFile,
    encoders: Vec<EncoderTable>,
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layout").field("name", &self.file.name).finish_non_exhaustive()
    }
}

/// Counters that no network here reads.
const LEFT_ALWAYS: [&str; 1] = ["num_batches_tracked"];
pub(super) const COUNTER: &str = "a counter of training steps";
const CLASSIFIER: &str = "the classifier of the encoder's own task";
const OF_NO_USE: &str = "of no use to this network";

/// Every layout.
pub fn layouts() -> &'static [Layout] {
    static READ: OnceLock<Vec<Layout>> = OnceLock::new();
    READ.get_or_init(|| {
        let one = |text: &&str| -> Layout {
            let file: LayoutFile = toml::from_str(text).expect("an embedded table of names is TOML of this form");
            let all: EncoderFile =
                toml::from_str(ENCODERS).expect("the embedded names of encoders are TOML of this form");
            let encoders = all.encoder.into_iter().filter(|e| e.library == file.library).collect();
            Layout { file, encoders }
        };
        LAYOUTS.iter().map(one).collect()
    })
}

/// Names of all layouts.
pub fn layout_names() -> Vec<&'static str> {
    layouts().iter().map(Layout::name).collect()
}

/// The layout `name`.
///
/// # Errors
/// `Unknown` for another name, listing those that exist.
pub fn layout(name: &str) -> Result<&'static Layout> {
    let unknown = || ModelError::Unknown { what: "layout", found: name.to_string(), known: layout_names() };
    layouts().iter().find(|l| l.name() == name).ok_or_else(unknown)
}

/// A network or encoder by its name here, where a library's name for the encoder is given: `unet-resnet18` stays,
/// `deeplabv3plus-tu-xception65` becomes `deeplabv3plus-xception65`, `mit_b0` becomes `mit-b0`. What no library has stays.
pub fn our_name(name: &str) -> String {
    let is_network = |part: &str| crate::decoders::names().contains(&part);
    let (network, encoder) = match name.split_once('-').filter(|(network, _)| is_network(network)) {
        Some((network, encoder)) => (Some(network), encoder),
        None => (None, name),
    };
    let theirs = layouts().iter().flat_map(|l| &l.encoders).flat_map(|t| &t.encoders);
    let ours = theirs.filter(|(_, there)| there.as_str() == encoder).map(|(here, _)| here.as_str()).next();
    let known = crate::encoders::names().contains(&encoder);
    let encoder = if known { encoder } else { ours.unwrap_or(encoder) };
    network.map_or(encoder.to_string(), |network| format!("{network}-{encoder}"))
}

impl Layout {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// One line on it.
    pub fn about(&self) -> &str {
        &self.file.about
    }

    /// Whether the library brings logits to the image's size with corners aligned; `None` where each network decides
    /// ([`ModelInfo::align_corners`](crate::ModelInfo)).
    pub fn align_corners(&self) -> Option<bool> {
        self.file.align_corners
    }

    fn encoder_table(&self, encoder: &str) -> Option<(&EncoderTable, &str)> {
        self.encoders.iter().find_map(|t| Some((t, t.encoders.get(encoder)?.as_str())))
    }

    fn network_table(&self, network: &str, encoder: &str) -> Option<&NetworkTable> {
        let fits = |t: &&NetworkTable| {
            t.networks.iter().any(|n| n == network)
                && (t.encoders.is_empty() || t.encoders.iter().any(|e| e == encoder))
        };
        self.file.network.iter().find(fits)
    }

    /// The spec of a network as this library has it, with its structure and defaults; `None` when it has none.
    pub fn spec(&self, network: &str, encoder: &str, n_classes: usize) -> Option<ModelSpec> {
        let table = self.network_table(network, encoder).filter(|_| self.encoder_table(encoder).is_some())?;
        let plain = ModelSpec::new(network, encoder, n_classes);
        let Defaults { output_stride, decoder_channels, dropout } = table.defaults;
        Some(ModelSpec {
            layout: table.structure.clone(),
            output_stride: output_stride.unwrap_or(plain.output_stride),
            decoder_channels: decoder_channels.unwrap_or(plain.decoder_channels),
            dropout: dropout.unwrap_or(plain.dropout),
            ..plain
        })
    }

    /// The names of a network, of the structure that this library has.
    pub(super) fn of_network(&self, spec: &ModelSpec) -> Result<NameMap> {
        let (network, encoder) = (spec.name.as_str(), spec.encoder.as_str());
        let found = self.encoder_table(encoder).zip(self.network_table(network, encoder));
        let Some(((encoder_table, there), table)) = found else { return Err(self.none_for(&spec.full_name())) };
        if spec.layout != table.structure && !table.also.contains(&spec.layout) {
            return Err(ModelError::Layout {
                layout: self.file.name.clone(),
                why: format!("has a {network} of structure `{}`, this one is `{}`", table.structure, spec.layout),
                hint: format!(
                    "its tensors are others; set layout = \"{}\" where the network is built",
                    table.structure
                ),
            });
        }
        let mut map = self.encoder_map(encoder_table, there, &table.prefix)?;
        map.rules.extend(rules(&table.names, "", "")?);
        map.leave.extend(patterns(&table.leave, "", OF_NO_USE)?);
        map.dormant = table.dormant;
        map.config = table.config.clone();
        map.untold = table.untold.clone();
        map.same = table.same.clone();
        Ok(map)
    }

    /// The names of an encoder alone; here they are below `encoder.`.
    pub(super) fn of_encoder(&self, encoder: &str) -> Result<NameMap> {
        let (table, there) = self.encoder_table(encoder).ok_or_else(|| self.none_for(encoder))?;
        self.encoder_map(table, there, &self.file.bare_prefix)
    }

    fn encoder_map(&self, table: &EncoderTable, there: &str, prefix: &str) -> Result<NameMap> {
        let mut leave = patterns(&table.leave, prefix, CLASSIFIER)?;
        if !prefix.is_empty() {
            // A classifier may stand beside the prefix as well as below it.
            leave.extend(patterns(&table.leave, "", CLASSIFIER)?);
        }
        Ok(NameMap {
            rules: rules(&table.names, prefix, "encoder.")?,
            leave,
            encoder: there.to_string(),
            dormant: false,
            config: toml::Table::new(),
            untold: Vec::new(),
            same: toml::Table::new(),
        })
    }

    fn none_for(&self, what: &str) -> ModelError {
        ModelError::Layout {
            layout: self.file.name.clone(),
            why: format!("has no names for `{what}`"),
            hint: format!("it has them for {}", self.networks().join(", ")),
        }
    }

    /// Networks and encoders it has names for, as `network-encoder`; encoders alone by their name.
    pub fn networks(&self) -> Vec<String> {
        let encoders = || self.encoders.iter().flat_map(|t| t.encoders.keys());
        let of = |t: &NetworkTable| {
            let fits = |e: &&String| t.encoders.is_empty() || t.encoders.contains(e);
            let pair = |network: &String| encoders().filter(fits).map(|e| format!("{network}-{e}")).collect::<Vec<_>>();
            t.networks.iter().flat_map(pair).collect::<Vec<_>>()
        };
        self.file.network.iter().flat_map(of).chain(encoders().cloned()).collect()
    }
}

impl NameMap {
    /// Why a name is left out, if it is.
    pub(super) fn left_out(&self, name: &str) -> Option<&'static str> {
        let last = name.rsplit('.').next().unwrap_or(name);
        if LEFT_ALWAYS.contains(&last) {
            return Some(COUNTER);
        }
        self.leave.iter().find(|(pattern, _)| pattern.read(name).is_some()).map(|(_, why)| *why)
    }

    /// The name here of a name there: rule, part of what the rule joins, name.
    pub(super) fn to_here(&self, name: &str) -> Option<(usize, usize, String)> {
        self.rules.iter().enumerate().find_map(|(rule, r)| r.to_here(name).map(|(here, part)| (rule, part, here)))
    }

    /// The names there of a name here, by the first rule that has it.
    pub(super) fn to_there(&self, name: &str) -> Option<Vec<String>> {
        self.rules.iter().find_map(|rule| rule.to_there(name))
    }
}

fn table_error(why: String) -> ModelError {
    ModelError::Setting {
        setting: "an embedded table of names",
        found: why,
        expected: "patterns that can be read both ways",
        hint: "report this as a defect",
    }
}

fn rules(written: &Written, there_prefix: &str, here_prefix: &str) -> Result<Vec<Rule>> {
    let rule = |(there, here): &(There, String)| {
        let there = match there {
            There::One(name) => std::slice::from_ref(name),
            There::Joined(names) => names,
        };
        let there = there
            .iter()
            .map(|t| Ok(Pattern::parse(t)?.below(there_prefix)))
            .collect::<std::result::Result<_, String>>()?;
        Rule::new(there, Pattern::parse(here)?.below(here_prefix))
    };
    written.iter().map(|w| rule(w).map_err(table_error)).collect()
}

fn patterns(written: &[String], prefix: &str, why: &'static str) -> Result<Vec<(Pattern, &'static str)>> {
    written.iter().map(|w| Ok((Pattern::parse(w).map_err(table_error)?.below(prefix), why))).collect()
}
