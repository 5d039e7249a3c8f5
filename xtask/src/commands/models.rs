//! `models list` and `models describe`: what the networks are and what they cost, without building them.

use anyhow::Result;
use serde::Serialize;

use segdistill_models::{CatalogEntry, ModelInfo, ModelSpec, catalog, info, macs};

use crate::cli::Models;
use crate::exit::{USAGE, coded, usage};

/// Runs the command.
pub(crate) fn run(args: &Models) -> Result<()> {
    match args {
        Models::List { size, classes, json } => list(parse_size(size)?, *classes, *json),
        Models::Describe { name, size, classes, width, output_stride, json } => {
            let entry = find(name)?;
            let spec = ModelSpec {
                width: *width,
                output_stride: *output_stride,
                ..ModelSpec { name: entry.name.into(), ..ModelSpec::deeplabv3plus(entry.encoder, *classes) }
            };
            describe(&entry, &spec, parse_size(size)?, *json)
        }
    }
}

/// One network, with exact integers.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    encoder: &'static str,
    n_classes: usize,
    params: usize,
    macs: u64,
    input_size: [usize; 2],
    output_stride: usize,
    logits_stride: usize,
    description: &'static str,
}

impl Row {
    fn new(entry: &CatalogEntry, spec: &ModelSpec, hw: [usize; 2]) -> Result<(Self, ModelInfo)> {
        // What a spec or a size refuses was typed by somebody: a usage error.
        let about = info(spec).map_err(|e| coded(USAGE, e))?;
        let macs = macs(spec, hw).map_err(|e| coded(USAGE, e))?;
        let row = Self {
            name: full_name(entry),
            encoder: entry.encoder,
            n_classes: spec.n_classes,
            params: about.n_parameters,
            macs,
            input_size: hw,
            output_stride: about.output_stride,
            logits_stride: about.logits_stride,
            description: entry.description,
        };
        Ok((row, about))
    }
}

/// A feature map at one input size.
#[derive(Debug, Serialize)]
struct TapRow {
    name: &'static str,
    stride: usize,
    /// Channels, height, width.
    shape: [usize; 3],
}

/// One network in full.
#[derive(Debug, Serialize)]
struct Description {
    #[serde(flatten)]
    row: Row,
    width: f64,
    taps: Vec<TapRow>,
    logits_shape: [usize; 3],
    mean: [f64; 3],
    std: [f64; 3],
}

fn list(hw: [usize; 2], n_classes: usize, json: bool) -> Result<()> {
    let rows = catalog()
        .iter()
        .map(|entry| {
            let spec = ModelSpec { name: entry.name.into(), ..ModelSpec::deeplabv3plus(entry.encoder, n_classes) };
            Ok(Row::new(entry, &spec, hw)?.0)
        })
        .collect::<Result<Vec<_>>>()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!("{n_classes} classes, input {}x{}, MACs are multiply-accumulates of one image", hw[0], hw[1]);
    let size = rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
    println!("{:<size$}  {:>12}  {:>12}  {:>13}  description", "network", "parameters", "MACs", "logits stride");
    for r in &rows {
        let (params, macs) = (count_text(r.params as u64), macs_text(r.macs));
        println!("{:<size$}  {params:>12}  {macs:>12}  {:>13}  {}", r.name, r.logits_stride, r.description);
    }
    Ok(())
}

fn describe(entry: &CatalogEntry, spec: &ModelSpec, hw: [usize; 2], json: bool) -> Result<()> {
    let description = Description::new(entry, spec, hw)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&description)?);
        return Ok(());
    }
    let Description { row, width, taps, logits_shape, mean, std } = &description;
    println!("{}: {}", row.name, row.description);
    println!("  width          {width}");
    println!("  parameters     {} ({})", count_text(row.params as u64), row.params);
    println!("  MACs           {} ({}) at {}x{}", macs_text(row.macs), row.macs, hw[0], hw[1]);
    println!("  output stride  {}", row.output_stride);
    println!("  input          RGB in [0, 1]; mean {mean:?}, std {std:?} are applied inside");
    println!("  taps           channels x height x width");
    for tap in taps {
        println!("    {:<12} {:>18}  stride {}", tap.name, shape_text(tap.shape), tap.stride);
    }
    println!("    {:<12} {:>18}  stride {}", "logits", shape_text(*logits_shape), row.logits_stride);
    Ok(())
}

impl Description {
    fn new(entry: &CatalogEntry, spec: &ModelSpec, hw: [usize; 2]) -> Result<Self> {
        let (row, about) = Row::new(entry, spec, hw)?;
        let at = |channels: usize, stride: usize| [channels, hw[0].div_ceil(stride), hw[1].div_ceil(stride)];
        let tap =
            |t: &segdistill_models::Tap| TapRow { name: t.name, stride: t.stride, shape: at(t.channels, t.stride) };
        Ok(Self {
            width: spec.width,
            taps: about.taps.iter().map(tap).collect(),
            logits_shape: at(spec.n_classes, about.logits_stride),
            mean: about.mean,
            std: about.std,
            row,
        })
    }
}

fn shape_text([channels, height, width]: [usize; 3]) -> String {
    format!("{channels} x {height} x {width}")
}

/// The name a network has on the command line.
fn full_name(entry: &CatalogEntry) -> String {
    format!("{}-{}", entry.name, entry.encoder)
}

/// The network called `name`, or an error that lists all and says the nearest.
fn find(name: &str) -> Result<CatalogEntry> {
    let all = catalog();
    if let Some(entry) = all.iter().find(|e| full_name(e) == name) {
        return Ok(*entry);
    }
    let known: Vec<String> = all.iter().map(full_name).collect();
    let nearest = known.iter().max_by(|a, b| strsim::jaro(name, a).total_cmp(&strsim::jaro(name, b)));
    let hint = nearest.map(|n| format!("\n  hint: the nearest is `{n}`")).unwrap_or_default();
    Err(usage!("unknown network `{name}`, known: {}{hint}", known.join(", ")))
}

/// `360x480` as [height, width].
pub(crate) fn parse_size(text: &str) -> Result<[usize; 2]> {
    let parsed = text.split_once('x').and_then(|(h, w)| Some([h.parse().ok()?, w.parse().ok()?]));
    match parsed {
        Some([h, w]) if h > 0 && w > 0 => Ok([h, w]),
        _ => Err(usage!("size `{text}`, expected HxW in pixels\n  hint: height first, such as 360x480")),
    }
}

/// A count of parameters with its unit: `22.44 M`.
pub(crate) fn count_text(count: u64) -> String {
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.1} k", count as f64 / 1e3),
        _ => format!("{:.2} M", count as f64 / 1e6),
    }
}

/// Multiply-accumulates with their unit: `31.6 GMACs`.
pub(crate) fn macs_text(macs: u64) -> String {
    match macs {
        0..1_000_000 => format!("{:.1} kMACs", macs as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MMACs", macs as f64 / 1e6),
        1_000_000_000..1_000_000_000_000 => format!("{:.1} GMACs", macs as f64 / 1e9),
        _ => format!("{:.2} TMACs", macs as f64 / 1e12),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use segdistill_models::build;
    use segdistill_ops::{Mode, ParamStore};

    use super::*;
    use crate::exit;

    #[test]
    fn sizes_are_height_then_width() {
        assert_eq!(parse_size("360x480").unwrap(), [360, 480]);
        for bad in ["360", "360x", "x480", "360x480x3", "0x480", "360X480", "-1x4", "a×b", ""] {
            let error = parse_size(bad).unwrap_err();
            assert_eq!(exit::code_of(&error), USAGE, "{bad}");
            assert!(error.to_string().contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn counts_and_macs_carry_their_unit() {
        assert_eq!([0, 999, 1_500, 22_437_971].map(count_text), ["0", "999", "1.5 k", "22.44 M"]);
        let macs = [40_000, 512_300_000, 31_600_000_000, 1_234_000_000_000].map(macs_text);
        assert_eq!(macs, ["40.0 kMACs", "512.3 MMACs", "31.6 GMACs", "1.23 TMACs"]);
    }

    #[test]
    fn an_unknown_network_lists_the_known_and_the_nearest() {
        let error = find("deeplabv3plus-resnet43").unwrap_err();
        assert_eq!(exit::code_of(&error), USAGE);
        let text = error.to_string();
        assert!(text.contains("known: deeplabv3plus-resnet18, deeplabv3plus-resnet34"), "{text}");
        assert!(text.ends_with("the nearest is `deeplabv3plus-resnet34`"), "{text}");
        assert_eq!(find("deeplabv3plus-xception65").unwrap().encoder, "xception65");
    }

    #[test]
    fn a_setting_out_of_range_is_a_usage_error() {
        let entry = find("deeplabv3plus-resnet18").unwrap();
        let spec = ModelSpec { output_stride: 12, ..ModelSpec::deeplabv3plus("resnet18", 11) };
        assert_eq!(exit::code_of(&Description::new(&entry, &spec, [64, 64]).unwrap_err()), USAGE);
    }

    /// The shapes that are printed are those the network gives, for sizes that no stride divides.
    #[test]
    fn described_shapes_are_the_shapes_of_a_forward_pass() {
        for (encoder, output_stride) in [("resnet18", 16), ("resnet18", 8), ("xception65", 16)] {
            let entry = find(&format!("deeplabv3plus-{encoder}")).unwrap();
            let spec = ModelSpec { width: 0.125, output_stride, ..ModelSpec::deeplabv3plus(encoder, 5) };
            let description = Description::new(&entry, &spec, [45, 61]).unwrap();
            let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
            let network = build(&spec, &store).unwrap();
            let images = Tensor::full(0.5f32, (1, 3, 45, 61), &Device::Cpu).unwrap();
            let out = network.forward(&images, Mode::Eval).unwrap();
            assert_eq!(out.logits_nchw.dims()[1..], description.logits_shape);
            assert_eq!(out.features.len(), description.taps.len());
            for tap in &description.taps {
                assert_eq!(out.features[tap.name].dims()[1..], tap.shape, "{encoder} {}", tap.name);
            }
        }
    }
}
