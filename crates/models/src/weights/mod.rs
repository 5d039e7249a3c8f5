//! Weight files: our own, those of other libraries, and the names each has for the same tensors.
//!
//! Our own are plain `.safetensors` with names as the model has them ([`read`], [`save`]). Others are opened by
//! [`WeightFile`] (`.safetensors` and PyTorch checkpoints, nothing executed), turned into our names by [`import`] with a
//! table of the library's, and back by [`export`]. Everything fits or nothing is taken: a file that lacks a tensor, has one
//! too many or one of another shape is refused with every difference.
//!
//! No atomic replacement here: checkpoints belong to training, downloads to the program.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::error::{ModelError, Result};

mod dtype;
mod export;
mod file;
mod header;
mod import;
mod layout;
mod misfit;
mod names;
mod pickle;
mod pth;
mod settings;
mod structure;
#[cfg(test)]
mod tests;

pub use dtype::FileType;
pub use export::{Exported, export, export_encoder};
pub use file::{FileFormat, FileTensor, WeightFile};
pub use import::{
    ImportOptions, Imported, LeftOut, encoder_options, import, import_check, import_encoder, spec_of, tensor_names,
};
pub use layout::{Layout, layout, layout_names, layouts, our_name};
pub use misfit::Misfit;

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
