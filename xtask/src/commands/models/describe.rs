//! `models describe`: one network in full.

use anyhow::Result;
use serde::Serialize;

use segdistill_models::encoders::{EncoderOptions, plan as encoder_plan};
use segdistill_models::{Configuration, Subject, Tap, info, trace};

use super::list::Row;
use super::{count_text, find, macs_text, parse_size};
use crate::cli::Describe;
use crate::exit::{USAGE, coded, usage};

/// A feature map at one input size.
#[derive(Debug, Serialize)]
struct TapRow {
    name: &'static str,
    stride: usize,
    /// Channels, height, width.
    shape: [usize; 3],
}

impl TapRow {
    fn new(tap: &Tap, [h, w]: [usize; 2]) -> Self {
        Self { name: tap.name, stride: tap.stride, shape: [tap.channels, h, w] }
    }
}

/// One network in full.
#[derive(Debug, Serialize)]
struct Description {
    #[serde(flatten)]
    row: Row,
    width: f64,
    taps: Vec<TapRow>,
    /// `null` for an encoder alone.
    logits_shape: Option<[usize; 3]>,
    mean: [f64; 3],
    std: [f64; 3],
}

pub(super) fn run(args: &Describe) -> Result<()> {
    let description = Description::new(&configuration(args)?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&description)?);
        return Ok(());
    }
    let Description { row, width, taps, logits_shape, mean, std } = &description;
    println!("{}", row.name);
    if let (Some(network), Some(layout)) = (&row.network, &row.layout) {
        let aux = if row.aux { ", auxiliary head" } else { "" };
        println!("  network        {network} on {}, {layout} layout, width {width}{aux}", row.encoder);
    }
    println!("  parameters     {} ({})", count_text(row.params as u64), row.params);
    println!("  MACs           {} ({}) at {}x{}", macs_text(row.macs), row.macs, row.input_size[0], row.input_size[1]);
    if let (Some(params), Some(macs)) = (row.params_with_classifier, row.macs_with_classifier) {
        println!("  with the classifier it was trained with: {params} parameters, {macs} MACs");
    }
    if row.attention_macs > 0 {
        println!("  attention      {} ({}) more", macs_text(row.attention_macs), row.attention_macs);
    }
    if let Some(stride) = row.output_stride {
        println!("  output stride  {stride}");
    }
    println!("  input          RGB in [0, 1]; mean {mean:?}, std {std:?} are applied inside");
    println!("  taps           channels x height x width");
    for tap in taps {
        println!("    {:<12} {:>18}  stride {}", tap.name, shape_text(tap.shape), tap.stride);
    }
    if let (Some(shape), Some(stride)) = (logits_shape, row.logits_stride) {
        println!("    {:<12} {:>18}  stride {stride}", "logits", shape_text(*shape));
    }
    println!("  counted        {}", row.counted);
    Ok(())
}

/// What is described: the named configuration with what the flags change.
fn configuration(args: &Describe) -> Result<Configuration> {
    let mut found = find(&args.name)?;
    if let Some(size) = &args.size {
        found.input_hw = parse_size(size)?;
    }
    match &mut found.subject {
        Subject::Network(spec) => {
            spec.n_classes = args.classes.unwrap_or(spec.n_classes);
            spec.width = args.width.unwrap_or(spec.width);
            spec.output_stride = args.output_stride.unwrap_or(spec.output_stride);
            spec.layout = args.layout.clone().unwrap_or_else(|| spec.layout.clone());
            spec.aux |= args.aux;
            if let Some(stride) = args.output_stride {
                let about = info(spec).map_err(|e| coded(USAGE, e))?;
                if about.output_stride != stride {
                    return Err(usage!(
                        "--output-stride {stride} is not used: {} always has {}\n  hint: take it out",
                        spec.full_name(),
                        about.output_stride
                    ));
                }
            }
        }
        Subject::Encoder(name) => {
            let changed = args.classes.is_some() || args.width.is_some() || args.output_stride.is_some();
            if changed || args.layout.is_some() || args.aux {
                return Err(usage!(
                    "`{name}` is an encoder alone\n  hint: it has a size only: take out the other options"
                ));
            }
        }
    }
    Ok(found)
}

impl Description {
    fn new(configuration: &Configuration) -> Result<Self> {
        let row = Row::new(configuration)?;
        let hw = configuration.input_hw;
        match &configuration.subject {
            Subject::Network(spec) => {
                let about = info(spec).map_err(|e| coded(USAGE, e))?;
                let trace = trace(spec, hw).map_err(|e| coded(USAGE, e))?;
                let [h, w] = trace.logits_hw;
                Ok(Self {
                    width: spec.width,
                    taps: about.taps.iter().zip(trace.tap_sizes).map(|(tap, hw)| TapRow::new(tap, hw)).collect(),
                    logits_shape: Some([spec.n_classes, h, w]),
                    mean: about.mean,
                    std: about.std,
                    row,
                })
            }
            Subject::Encoder(name) => {
                let plan = encoder_plan(name, EncoderOptions::default())?;
                let sizes = plan.trace(hw)?.sizes;
                let normalisation = plan.normalisation();
                Ok(Self {
                    width: 1.0,
                    taps: plan.taps().iter().zip(sizes).map(|(tap, hw)| TapRow::new(tap, hw)).collect(),
                    logits_shape: None,
                    mean: normalisation.mean,
                    std: normalisation.std,
                    row,
                })
            }
        }
    }
}

fn shape_text([channels, height, width]: [usize; 3]) -> String {
    format!("{channels} x {height} x {width}")
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use segdistill_models::{ModelSpec, build};
    use segdistill_ops::{Mode, ParamStore};

    use super::*;
    use crate::exit;

    fn described(spec: ModelSpec, input_hw: [usize; 2]) -> Result<Description> {
        Description::new(&Configuration { name: spec.full_name(), subject: Subject::Network(spec), input_hw })
    }

    #[test]
    fn a_setting_out_of_range_is_a_usage_error() {
        let spec = ModelSpec { output_stride: 12, ..ModelSpec::deeplabv3plus("resnet18", 11) };
        assert_eq!(exit::code_of(&described(spec, [64, 64]).unwrap_err()), USAGE);
    }

    /// The shapes that are printed are those the network gives, for sizes that no stride divides.
    #[test]
    fn described_shapes_are_the_shapes_of_a_forward_pass() {
        let cases = [
            ("deeplabv3plus-resnet18", 16),
            ("deeplabv3plus-resnet18", 8),
            ("deeplabv3plus-xception65", 16),
            ("unet-unet-bn", 16),
            ("unet-resnet18", 16),
            ("pspnet-resnet18-deep", 8),
            ("fcn8s-vgg16", 16),
            ("segnet-vgg16-bn", 16),
            ("segformer-mit-b0", 16),
        ];
        for (name, output_stride) in cases {
            let spec = ModelSpec { width: 0.125, output_stride, ..ModelSpec::named(name, 5).unwrap() };
            let description = described(spec.clone(), [45, 61]).unwrap();
            let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
            let network = build(&spec, &store).unwrap();
            let images = Tensor::full(0.5f32, (1, 3, 45, 61), &Device::Cpu).unwrap();
            let out = network.forward(&images, Mode::Eval).unwrap();
            assert_eq!(Some(&out.logits_nchw.dims()[1..]), description.logits_shape.as_ref().map(|s| &s[..]), "{name}");
            assert_eq!(out.features.len(), description.taps.len(), "{name}");
            for tap in &description.taps {
                assert_eq!(out.features[tap.name].dims()[1..], tap.shape, "{name} {}", tap.name);
            }
        }
    }
}
