//! Weight files: plain `.safetensors`, names as the model has them.
//!
//! No renaming here, and no atomic replacement: checkpoints belong to training.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::error::{ModelError, Result};

/// Every tensor of a `.safetensors` file, by name.
///
/// # Errors
/// `Ops(Weights)` when the file is absent, short or not safetensors.
/// # Example
/// ```no_run
/// # use candle_core::{DType, Device};
/// # fn main() -> segdistill_models::Result<()> {
/// let tensors = segdistill_models::weights::read("teacher.safetensors", &Device::Cpu)?;
/// let spec = segdistill_models::ModelSpec::deeplabv3plus("xception65", 11);
/// let teacher = segdistill_models::Frozen::new(&spec, tensors, DType::F32, &Device::Cpu)?;
/// # Ok(())
/// # }
/// ```
pub fn read(path: impl AsRef<Path>, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    Ok(segdistill_ops::params::read_safetensors(path.as_ref(), device)?)
}

/// Writes `tensors` to a `.safetensors` file; the same tensors give the same bytes.
///
/// # Errors
/// `Write` when the file cannot be written.
pub fn save(path: impl AsRef<Path>, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let path = path.as_ref();
    // candle takes a hash map; the format sorts by type and name, so its order leaves no trace.
    let map: HashMap<&str, Tensor> = tensors.iter().map(|(name, t)| (name.as_str(), t.clone())).collect();
    candle_core::safetensors::save(&map, path)
        .map_err(|e| ModelError::Write { path: path.to_path_buf(), why: e.to_string() })
}
