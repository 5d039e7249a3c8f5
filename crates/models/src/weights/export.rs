//! Weights of ours in the names of another library.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use segdistill_ops::ParamKind;

use super::layout::{self, Layout, NameMap};
use super::structure;
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;

/// A network in another library's names.
#[derive(Clone, Debug)]
pub struct Exported {
    /// Every tensor of the library's state dict.
    pub tensors: BTreeMap<String, Tensor>,
    /// What its constructor is called with.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Number of tensors that the library expects and never uses, filled with zeros (ones where a variance or scale
    /// stands) because their values are not known.
    pub n_filled: usize,
}

/// The tensors of the network of `spec` in the names of `layout`, with the counters of its normalisations.
///
/// `dormant` are tensors of stages that the network does not run but the library expects
/// ([`Imported::dormant`](super::Imported::dormant)).
///
/// # Errors
/// `Unknown` and `Layout` for a layout that does not exist or has no such network; `Layout` for a network of another
/// width; `Ops(Mismatch)` when a tensor of the network is missing.
pub fn export(
    tensors: &BTreeMap<String, Tensor>,
    dormant: &BTreeMap<String, Tensor>,
    spec: &ModelSpec,
    layout: &str,
) -> Result<Exported> {
    let layout: &Layout = layout::layout(layout)?;
    let names = layout.of_network(spec)?;
    if spec.width != 1.0 {
        return Err(no_name(layout, format!("has no {} of width {}", spec.full_name(), spec.width)));
    }
    let mut here = tensors.clone();
    let mut n_filled = 0;
    if names.dormant {
        for (name, slot) in structure::of_whole_encoder(spec)?.iter() {
            if here.contains_key(name) {
                continue;
            }
            let known = dormant.get(name).filter(|t| t.dims() == slot.shape).cloned();
            let one = name.ends_with("running_var") || (slot.kind == ParamKind::Norm && name.ends_with(".weight"));
            let fill = || match one {
                true => Tensor::ones(slot.shape.as_slice(), DType::F32, &Device::Cpu),
                false => Tensor::zeros(slot.shape.as_slice(), DType::F32, &Device::Cpu),
            };
            n_filled += usize::from(known.is_none());
            here.insert(name.clone(), known.map_or_else(fill, Ok)?);
        }
    }
    let mut out = BTreeMap::new();
    write(&here, layout, &names, &mut out)?;
    Ok(Exported { tensors: out, config: config(&names.config, spec, &names.encoder), n_filled })
}

/// The tensors of `encoder` alone in the names of `layout`, with the counters of its normalisations; the classifier it was
/// published with is not among them.
///
/// # Errors
/// `Unknown` and `Layout` for a layout that does not exist or has no such encoder.
pub fn export_encoder(
    tensors: &BTreeMap<String, Tensor>,
    encoder: &str,
    layout: &str,
) -> Result<BTreeMap<String, Tensor>> {
    let layout: &Layout = layout::layout(layout)?;
    let mut out = BTreeMap::new();
    write(tensors, layout, &layout.of_encoder(encoder)?, &mut out)?;
    Ok(out)
}

/// Writes tensors under their names there.
fn write(
    here: &BTreeMap<String, Tensor>,
    layout: &Layout,
    names: &NameMap,
    out: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    for (name, tensor) in here {
        let there = names.to_there(name).ok_or_else(|| no_name(layout, format!("has no name for `{name}`")))?;
        let parts = there.len();
        let rows = tensor.dims().first().copied().unwrap_or(0);
        if parts > 1 && !rows.is_multiple_of(parts) {
            return Err(no_name(layout, format!("splits `{name}` into {parts}, which {rows} rows do not allow")));
        }
        for (part, name) in there.into_iter().enumerate() {
            let tensor = match parts {
                1 => tensor.clone(),
                _ => tensor.narrow(0, part * (rows / parts), rows / parts)?.contiguous()?,
            };
            if let Some(of) = name.strip_suffix("running_mean") {
                out.insert(format!("{of}num_batches_tracked"), Tensor::new(0i64, &Device::Cpu)?);
            }
            out.insert(name, tensor);
        }
    }
    Ok(())
}

fn no_name(layout: &Layout, why: String) -> ModelError {
    ModelError::Layout {
        layout: layout.name().to_string(),
        why,
        hint: "networks of the published structure and width can be exported".to_string(),
    }
}

/// The table of a layout with the values of a spec in it.
pub(super) fn config(
    table: &toml::Table,
    spec: &ModelSpec,
    encoder: &str,
) -> serde_json::Map<String, serde_json::Value> {
    use serde_json::{Value, json};
    fn filled(value: &toml::Value, fields: &[(&str, Value)]) -> Value {
        match value {
            toml::Value::String(text) => match fields.iter().find(|(name, _)| *text == format!("{{{name}}}")) {
                Some((_, value)) => value.clone(),
                None => {
                    let plain = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
                    let text = fields.iter().fold(text.clone(), |t, (n, v)| t.replace(&format!("{{{n}}}"), &plain(v)));
                    Value::String(text)
                }
            },
            toml::Value::Integer(i) => json!(i),
            toml::Value::Float(f) => json!(f),
            toml::Value::Boolean(b) => json!(b),
            toml::Value::Array(items) => Value::Array(items.iter().map(|item| filled(item, fields)).collect()),
            toml::Value::Table(t) => Value::Object(t.iter().map(|(k, v)| (k.clone(), filled(v, fields))).collect()),
            toml::Value::Datetime(d) => Value::String(d.to_string()),
        }
    }
    let d = spec.decoder_channels;
    let fields = [
        ("encoder", json!(encoder)),
        ("n_classes", json!(spec.n_classes)),
        ("output_stride", json!(spec.output_stride)),
        ("decoder_channels", json!(d)),
        ("decoder_channels*2", json!(d * 2)),
        ("decoder_channels/2", json!(d / 2)),
        ("decoder_channels/4", json!(d / 4)),
        ("decoder_channels/8", json!(d / 8)),
        ("decoder_channels/16", json!(d / 16)),
        ("dropout", json!(spec.dropout)),
        ("aux", json!(spec.aux)),
        ("none", Value::Null),
    ];
    table.iter().map(|(key, value)| (key.clone(), filled(value, &fields))).collect()
}
