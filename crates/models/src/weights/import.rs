//! Weights of another library for a network of ours: all of them fit, or none is taken and every difference is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use segdistill_ops::{ParamStore, ShapeDifference, params::all_finite};

use super::file::WeightFile;
use super::layout::{Layout, NameMap, layouts};
use super::misfit::Misfit;
use super::settings::{self, Settings};
use super::structure::{self, Structure};
use crate::encoders::{self, EncoderOptions};
use crate::error::{ModelError, Result};
use crate::segmenter::build;
use crate::spec::ModelSpec;

/// What whole programs of training put before every name.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];
/// Why a name is left out that does not begin as was asked for.
const BESIDE: &str = "not below the prefix that was asked for";

/// A tensor that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Its name in the file.
    pub name: String,
    /// Why.
    pub why: &'static str,
}

/// Weights out of a file, in this project's names.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Every tensor of the network, f32.
    pub tensors: BTreeMap<String, Tensor>,
    /// Tensors of the file that belong to stages of the encoder which this network never runs; kept for export.
    pub dormant: BTreeMap<String, Tensor>,
    /// Tensors that were left out.
    pub left_out: Vec<LeftOut>,
    /// Layout of the file.
    pub layout: String,
    /// What was before every name, such as `module.`.
    pub wrapper: String,
    /// Settings of the library that no tensor shows and no file beside the weights said, with the values that were assumed.
    pub assumed: BTreeMap<String, serde_json::Value>,
}

/// What weights are read for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target<'a> {
    Network(&'a ModelSpec),
    Encoder(&'a str, EncoderOptions),
}

impl Target<'_> {
    fn name(&self) -> String {
        match self {
            Self::Network(spec) => spec.full_name(),
            Self::Encoder(name, _) => (*name).to_string(),
        }
    }

    fn names(&self, layout: &Layout) -> Result<NameMap> {
        match self {
            Self::Network(spec) => layout.of_network(spec),
            Self::Encoder(name, _) => layout.of_encoder(name),
        }
    }

    fn structure(&self) -> Result<Arc<Structure>> {
        match self {
            Self::Network(spec) => structure::of_network(spec),
            Self::Encoder(name, options) => structure::of_encoder(name, *options),
        }
    }

    /// Tensors that a file may hold although the target does not use them.
    fn unused(&self) -> Result<BTreeMap<String, &'static str>> {
        const STAGE: &str = "of a stage of the encoder that the network does not run";
        const AUX: &str = "of the auxiliary head, which the network does not have";
        let (whole, aux) = match self {
            Self::Network(spec) => (structure::of_whole_encoder(spec)?, structure::aux_names(spec)?),
            Self::Encoder(name, options) => {
                (structure::of_encoder(name, EncoderOptions { depth: 5, ..*options })?, BTreeSet::new())
            }
        };
        let stages = whole.keys().map(|name| (name.clone(), STAGE));
        Ok(stages.chain(aux.into_iter().map(|name| (name, AUX))).collect())
    }
}

/// Where each tensor of a network comes from.
pub(super) struct Staging {
    /// Name here to its parts there, in order.
    pub(super) take: BTreeMap<String, Vec<Option<String>>>,
    dormant: BTreeMap<String, String>,
    pub(super) left_out: Vec<LeftOut>,
    pub(super) wrapper: String,
    pub(super) misfit: Misfit,
}

/// Most parts before every name that are tried.
const MAX_PARTS: usize = 4;

/// What stands before every name: the prefix that was asked for, and of the parts that all names then share as many as let
/// the most of them be names of `expected`; of equals the fewest.
fn wrapper(file: &WeightFile, names: &NameMap, expected: &Structure) -> String {
    let below = |prefix: &str| -> Vec<&str> {
        let all = file.tensors().keys().filter(|name| name.starts_with(file.prefix()));
        all.filter_map(|name| name.strip_prefix(prefix)).collect()
    };
    let n_known = |prefix: &str| {
        let is_known = |name: &&str| names.to_here(name).is_some_and(|(.., here)| expected.contains_key(&here));
        below(prefix).into_iter().filter(is_known).count()
    };
    let mut prefix = file.prefix().to_string();
    let (mut best, mut most) = (prefix.clone(), n_known(&prefix));
    for _ in 0..MAX_PARTS {
        let rest = below(&prefix);
        let Some(part) = rest.first().and_then(|name| Some(&name[..=name.find('.')?])) else { break };
        if !rest.iter().all(|name| name.starts_with(part)) {
            break;
        }
        prefix = format!("{prefix}{part}");
        // A wrapper of training programs is taken off whether or not the rest is known, so that differences are told by
        // the plain names.
        let n = n_known(&prefix);
        if n > most || (n == most && WRAPPERS.contains(&part) && best.len() + part.len() == prefix.len()) {
            (best, most) = (prefix.clone(), n);
        }
    }
    best
}

pub(super) fn stage(file: &WeightFile, target: Target, layout: &Layout, expected: &Structure) -> Result<Staging> {
    let names = target.names(layout)?;
    let unused = target.unused()?;
    let wrapper = wrapper(file, &names, expected);
    let mut misfit = Misfit {
        path: file.path().to_path_buf(),
        model: target.name(),
        layout: layout.name().to_string(),
        ..Misfit::default()
    };
    let mut take: BTreeMap<String, Vec<Option<String>>> = BTreeMap::new();
    let mut taken_by: BTreeMap<String, usize> = BTreeMap::new();
    let (mut dormant, mut left_out) = (BTreeMap::new(), Vec::new());
    for name in file.tensors().keys() {
        let mut leave = |why| left_out.push(LeftOut { name: name.clone(), why });
        let Some(plain) = name.strip_prefix(&wrapper) else {
            leave(BESIDE);
            continue;
        };
        // A rule goes before what is left out by name, except counters, which no rule may take.
        if names.left_out(plain) == Some(super::layout::COUNTER) {
            leave(super::layout::COUNTER);
            continue;
        }
        match names.to_here(plain) {
            Some((rule, part, here)) if expected.contains_key(&here) => {
                let parts = names.rules[rule].there.len();
                let slots = take.entry(here.clone()).or_insert_with(|| vec![None; parts]);
                let same_rule = *taken_by.entry(here).or_insert(rule) == rule;
                match slots.get_mut(part) {
                    Some(slot) if same_rule && slot.is_none() => *slot = Some(name.clone()),
                    _ => misfit.unexpected.push(format!("{name} (a second one of its kind)")),
                }
            }
            Some((_, _, here)) if unused.contains_key(&here) => {
                leave(unused[&here]);
                if names.dormant {
                    dormant.insert(here, name.clone());
                }
            }
            _ => match names.left_out(plain) {
                Some(why) => leave(why),
                None => misfit.unexpected.push(name.clone()),
            },
        }
    }
    let there = |here: &String| names.to_there(here).unwrap_or_else(|| vec!["?".to_string()]);
    for (here, slot) in expected {
        let Some(parts) = take.get(here) else {
            misfit.missing.push((there(here).join(" + "), here.clone()));
            continue;
        };
        let rule = taken_by.get(here).map_or(0, |rule| *rule);
        let absent: Vec<String> = match names.rules[rule].to_there(here) {
            Some(all) => all.into_iter().zip(parts).filter(|(_, part)| part.is_none()).map(|(name, _)| name).collect(),
            None => Vec::new(),
        };
        if !absent.is_empty() {
            misfit.missing.push((absent.join(" + "), here.clone()));
            continue;
        }
        let parts: Vec<&String> = parts.iter().flatten().collect();
        for name in parts.iter().filter(|name| !file.tensors()[**name].dtype.is_float()) {
            misfit.dtypes.push(format!("{name}: found {}, expected a float", file.tensors()[*name].dtype));
        }
        let shapes: Vec<&[usize]> = parts.iter().map(|name| file.tensors()[*name].shape.as_slice()).collect();
        let found = joined_shape(&shapes);
        if found.as_deref() != Some(slot.shape.as_slice()) {
            let name = parts.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(" + ");
            let found = found.unwrap_or_else(|| shapes.concat());
            misfit.shapes.push(ShapeDifference { name, found, expected: slot.shape.clone() });
        }
    }
    Ok(Staging { take, dormant, left_out, wrapper, misfit })
}

/// Whether almost nothing of a file is what a target needs: less than a tenth of the names on either side.
fn is_stranger(file: &WeightFile, expected: &Structure, misfit: &Misfit) -> bool {
    10 * misfit.missing.len() > 9 * expected.len() && 10 * misfit.unexpected.len() > 8 * file.tensors().len()
}

/// Shape of tensors joined along their first dimension; `None` when they do not join.
fn joined_shape(shapes: &[&[usize]]) -> Option<Vec<usize>> {
    let (first, more) = shapes.split_first()?;
    let mut out = first.to_vec();
    for shape in more {
        if shape.get(1..) != first.get(1..) || first.is_empty() {
            return None;
        }
        out[0] += shape[0];
    }
    Some(out)
}

/// The layout of a file for a target among `layout`, or all that have names for it for `auto`: the one whose names differ
/// least from what the target needs.
fn detect(file: &WeightFile, target: Target, layout: &str, expected: &Structure) -> Result<&'static Layout> {
    if layout != "auto" {
        return super::layout::layout(layout);
    }
    let mut best: Option<(usize, &'static Layout)> = None;
    let mut strangers = Vec::new();
    for candidate in layouts().iter().filter(|layout| target.names(layout).is_ok()) {
        let misfit = stage(file, target, candidate, expected)?.misfit;
        if is_stranger(file, expected, &misfit) {
            strangers.push(misfit);
        } else if best.is_none_or(|(least, _)| misfit.n_tensors() < least) {
            best = Some((misfit.n_tensors(), candidate));
        }
    }
    best.map(|(_, layout)| layout).ok_or_else(|| no_layout(&target.name(), &strangers))
}

fn load(file: &mut WeightFile, expected: &Structure, staging: Staging) -> Result<Imported> {
    let Staging { take, dormant, left_out, wrapper, mut misfit } = staging;
    if misfit.n_tensors() > 0 {
        misfit.explain(file);
        return Err(ModelError::Fit(Box::new(misfit)));
    }
    let wanted: BTreeSet<&String> = take.values().flatten().flatten().chain(dormant.values()).collect();
    let loaded = file.load(|name| wanted.contains(&name.to_string()))?;
    let f32_of = |name: &String| -> Result<Tensor> { Ok(loaded[name].to_dtype(DType::F32)?) };
    let mut tensors = BTreeMap::new();
    for (here, parts) in &take {
        let mut joined = Vec::with_capacity(parts.len());
        for name in parts.iter().flatten() {
            let tensor = f32_of(name)?;
            if !all_finite(&tensor)? {
                misfit.non_finite.push(name.clone());
            }
            joined.push(tensor);
        }
        let tensor = if joined.len() == 1 { joined.remove(0) } else { Tensor::cat(&joined, 0)? };
        debug_assert_eq!(tensor.dims(), expected[here].shape);
        tensors.insert(here.clone(), tensor);
    }
    let mut unused = BTreeMap::new();
    for (here, name) in &dormant {
        let tensor = f32_of(name)?;
        if !all_finite(&tensor)? {
            misfit.non_finite.push(name.clone());
        }
        unused.insert(here.clone(), tensor);
    }
    if misfit.n_tensors() > 0 {
        return Err(ModelError::Fit(Box::new(misfit)));
    }
    let assumed = BTreeMap::new();
    Ok(Imported { tensors, dormant: unused, left_out, layout: misfit.layout, wrapper, assumed })
}

/// Weights of an encoder alone, such as a classifier trained on ImageNet; names here are below `encoder.`.
///
/// `layout` is a name of [`layouts`], or `auto` for the one that fits best.
///
/// # Errors
/// `Fit` with every difference; `Unknown` and `Layout` for a layout that does not exist or does not know the encoder.
pub fn import_encoder(file: &mut WeightFile, encoder: &str, options: EncoderOptions, layout: &str) -> Result<Imported> {
    let target = Target::Encoder(encoder, options);
    let expected = target.structure()?;
    let layout = detect(file, target, layout, &expected)?;
    let staging = stage(file, target, layout, &expected)?;
    load(file, &expected, staging)
}

/// No layout has names for `name`, or those that have are `strangers` to the file.
fn no_layout(name: &str, strangers: &[Misfit]) -> ModelError {
    let layout = "auto".to_string();
    if !strangers.is_empty() {
        let counts: Vec<String> = strangers.iter().map(|m| format!("{}: {}", m.layout, m.counts())).collect();
        let path = strangers[0].path.display();
        return ModelError::Layout {
            layout,
            why: format!("found none that fits `{path}` as {name}; {}", counts.join("; ")),
            hint: "another network or encoder may fit: `weights inspect` lists the names; --layout NAME lists every \
                   difference"
                .to_string(),
        };
    }
    // What the same network stands on, else encoders, else everything.
    let network = name.split_once('-').map_or("", |(network, _)| network);
    let is_network = crate::decoders::names().contains(&network);
    let has = |l: &Layout| -> Option<String> {
        let of = |n: &String| {
            let before = n.split_once('-').map_or("", |(before, _)| before);
            if is_network { before == network } else { !crate::decoders::names().contains(&before) }
        };
        let names: Vec<String> = l.networks().into_iter().filter(of).collect();
        (!names.is_empty()).then(|| format!("{} has {}", l.name(), names.join(", ")))
    };
    let known: Vec<String> = layouts().iter().filter_map(has).collect();
    let hint = match known.is_empty() {
        true => format!("no library here has a {network}; its weights are read in the names of this project only"),
        false => known.join("; "),
    };
    ModelError::Layout { layout, why: format!("found no layout with names for `{name}`"), hint }
}

/// What is wanted of a network's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// With a file of another number of classes, take everything but the classifier and draw that anew from this seed;
    /// `None` refuses such a file.
    pub new_classifier: Option<u64>,
}

/// Weights of the network of `spec`, whose structure must be the layout's ([`ModelSpec::layout`]).
///
/// Total or an error: every tensor the network needs is in the file in its shape, and everything in the file is used, or
/// left out by a rule of the layout. Nothing outside is changed in either case.
///
/// Where the library left its settings beside the file (`config.json` of segmentation_models.pytorch), they must be those of
/// the network here; what they do not say is told as [`Imported::assumed`].
///
/// # Errors
/// `Fit` with every difference; `Settings` with every setting that differs; `Unknown` and `Layout` for a layout that does not exist or has no such network; as
/// [`ModelSpec::validate`].
pub fn import(file: &mut WeightFile, spec: &ModelSpec, layout: &str, options: ImportOptions) -> Result<Imported> {
    spec.validate()?;
    let target = Target::Network(spec);
    let expected = target.structure()?;
    let layout = detect(file, target, layout, &expected)?;
    // Before the tensors: a setting that differs is the reason why they do.
    let assumed = settings::assumed(file.path(), &layout.of_network(spec)?, spec)?;
    let mut staging = stage(file, target, layout, &expected)?;
    let replaced = classifier(file, spec, layout, &mut staging, options)?;
    let mut imported = Imported { assumed, ..load(file, &expected, staging)? };
    if let (false, Some(seed)) = (replaced.is_empty(), options.new_classifier) {
        let store = ParamStore::trainable(seed, DType::F32, &Device::Cpu);
        build(spec, &store)?;
        let mut fresh = store.tensors();
        for name in replaced {
            if let Some(tensor) = fresh.remove(&name) {
                imported.tensors.insert(name, tensor.force_contiguous()?);
            }
        }
    }
    Ok(imported)
}

/// Sets aside the shapes that differ in the number of classes alone: their names here if they are to be drawn anew, else
/// noted as the reason.
fn classifier(
    file: &WeightFile,
    spec: &ModelSpec,
    layout: &Layout,
    staging: &mut Staging,
    options: ImportOptions,
) -> Result<Vec<String>> {
    if staging.misfit.shapes.is_empty() {
        return Ok(Vec::new());
    }
    let wrapper = staging.wrapper.clone();
    let found = number_in(file, &wrapper, spec, layout, with_classes)?.filter(|found| *found != spec.n_classes);
    // A number no network has, such as the one logit of two classes, is told as shapes that differ.
    let found = found.filter(|found| with_classes(spec, *found).validate().is_ok());
    let Some(found) = found else { return Ok(Vec::new()) };
    let theirs = structure::of_network(&ModelSpec { n_classes: found, ..spec.clone() })?;
    let by_there: BTreeMap<String, String> = staging
        .take
        .iter()
        .map(|(here, parts)| (parts.iter().flatten().cloned().collect::<Vec<_>>().join(" + "), here.clone()))
        .collect();
    let of_classes = |d: &ShapeDifference| {
        let here = by_there.get(&d.name)?;
        (theirs.get(here)?.shape == d.found).then(|| here.clone())
    };
    let differing: Vec<String> = staging.misfit.shapes.iter().filter_map(of_classes).collect();
    if options.new_classifier.is_none() {
        if !differing.is_empty() {
            staging.misfit.classes = Some((found, spec.n_classes));
        }
        return Ok(Vec::new());
    }
    staging.misfit.shapes.retain(|d| of_classes(d).is_none());
    for here in &differing {
        for name in staging.take.remove(here).into_iter().flatten().flatten() {
            staging.left_out.push(LeftOut { name, why: "the classifier, drawn anew for another number of classes" });
        }
    }
    Ok(differing)
}

/// A number of a network's spec as a file has it, by the tensors with such a dimension.
fn number_in(
    file: &WeightFile,
    wrapper: &str,
    spec: &ModelSpec,
    layout: &Layout,
    with: fn(&ModelSpec, usize) -> ModelSpec,
) -> Result<Option<usize>> {
    let names = layout.of_network(spec)?;
    for (here, place) in structure::dimensions(spec, with)? {
        for there in names.rules.iter().filter_map(|rule| rule.to_there(&here)) {
            let [there] = there.as_slice() else { continue };
            let tensor = file.tensors().get(&format!("{wrapper}{there}"));
            if let Some(n) = tensor.and_then(|t| t.shape.get(place.dimension)) {
                // Another number than a multiple of it is told as a shape that differs.
                return Ok(n.is_multiple_of(place.times).then_some(n / place.times));
            }
        }
    }
    Ok(None)
}

fn with_classes(spec: &ModelSpec, n_classes: usize) -> ModelSpec {
    ModelSpec { n_classes, ..spec.clone() }
}

fn with_decoder(spec: &ModelSpec, decoder_channels: usize) -> ModelSpec {
    ModelSpec { decoder_channels, ..spec.clone() }
}

/// The spec of the network `name` (such as `unet-resnet34`) as the file holds it: the layout that fits best among `layout`
/// (or all for `auto`), its structure and
/// defaults, the number of classes, the decoder's channels, and whether an auxiliary head is there; output stride and
/// dropout are those of the library's own file of settings, where one lies beside the weights.
///
/// # Errors
/// `Unknown` for a name or layout that does not exist; `Layout` when no layout has such a network.
pub fn spec_of(file: &WeightFile, name: &str, layout: &str) -> Result<(ModelSpec, &'static Layout)> {
    let plain = ModelSpec::named(name, 2)?;
    let mut best: Option<(usize, ModelSpec, &'static Layout)> = None;
    let (mut known, mut strangers) = (false, Vec::new());
    let settings = Settings::beside(file.path());
    for candidate in layouts().iter().filter(|l| layout == "auto" || l.name() == layout) {
        known = true;
        let Some(spec) = candidate.spec(&plain.name, &plain.encoder, 2).filter(|s| s.validate().is_ok()) else {
            continue;
        };
        let Ok(names) = candidate.of_network(&spec) else { continue };
        let aux = structure::aux_names(&spec)?;
        let wrapper = wrapper(file, &names, &*structure::of_network(&spec)?);
        let here = |name: &String| names.to_here(name.get(wrapper.len()..)?).map(|(.., here)| here);
        let has_aux = file.tensors().keys().filter_map(here).any(|here| aux.contains(&here));
        let mut spec = ModelSpec { aux: has_aux, ..spec };
        if let Some(settings) = settings.as_ref().filter(|settings| settings.are_of(&names)) {
            let written = settings.fill(&names, &spec);
            // Settings no network has are told where the file is imported.
            spec = if written.validate().is_ok() { written } else { spec };
        }
        let n_classes = number_in(file, &wrapper, &spec, candidate, with_classes)?.unwrap_or(spec.n_classes);
        let decoder_channels = number_in(file, &wrapper, &spec, candidate, with_decoder)?;
        let decoder_channels = decoder_channels.unwrap_or(spec.decoder_channels);
        let found = ModelSpec { n_classes, decoder_channels, ..spec.clone() };
        // Numbers no network has are told as shapes that differ.
        let spec = if found.validate().is_ok() { found } else { spec };
        let expected = structure::of_network(&spec)?;
        let misfit = stage(file, Target::Network(&spec), candidate, &expected)?.misfit;
        let differences = misfit.n_tensors();
        if layout == "auto" && is_stranger(file, &expected, &misfit) {
            strangers.push(misfit);
        } else if best.as_ref().is_none_or(|(least, ..)| differences < *least) {
            best = Some((differences, spec, candidate));
        }
    }
    if !known {
        super::layout::layout(layout)?;
    }
    best.map(|(_, spec, layout)| (spec, layout)).ok_or_else(|| no_layout(name, &strangers))
}

/// Whether a file fits the network or encoder `name` in `layout`, by names and shapes alone: `None` if it does.
///
/// # Errors
/// `Unknown` and `Layout` for a name or layout that does not exist or do not go together.
pub fn import_check(file: &WeightFile, name: &str, layout: &str) -> Result<Option<Misfit>> {
    let mut misfit: Misfit = if encoders::names().contains(&name) && ModelSpec::named(name, 2).is_err() {
        let target = Target::Encoder(name, EncoderOptions::default());
        let expected = target.structure()?;
        stage(file, target, super::layout::layout(layout)?, &expected)?.misfit
    } else {
        let (spec, layout) = spec_of(file, name, layout)?;
        let target = Target::Network(&spec);
        let expected = target.structure()?;
        stage(file, target, layout, &expected)?.misfit
    };
    misfit.explain(file);
    Ok((misfit.n_tensors() > 0).then_some(misfit))
}

/// Names of every tensor of a network, its running statistics included.
///
/// # Errors
/// As [`ModelSpec::validate`].
pub fn tensor_names(spec: &ModelSpec) -> Result<BTreeSet<String>> {
    spec.validate()?;
    Ok(structure::of_network(spec)?.keys().cloned().collect())
}

/// What a network asks of its encoder, for [`import_encoder`].
///
/// # Errors
/// `Unknown` for a network that does not exist.
pub fn encoder_options(spec: &ModelSpec) -> Result<EncoderOptions> {
    Ok(crate::decoders::entry(&spec.name)?.encoder_options(spec))
}
