//! Where a weight file comes from: a path, or a name of the table that the hub serves.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use segdistill_models::weights::{WeightFile, layout_names};

use crate::exit::{USAGE, coded};
use crate::hub;
use crate::hub::registry::{self, NamedWeights};

/// A weight file, and how to read it.
#[derive(Debug, Args)]
pub(crate) struct Source {
    /// Weight file (.safetensors, .pth, .pt, .bin, .ckpt), or a name of `weights list`
    #[arg(value_name = "FILE|NAME")]
    pub(crate) file: String,
    /// Where the state dict lies inside a PyTorch checkpoint, such as ema.state_dict
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Lock file for a name, kept beside the recipe
    #[arg(long, default_value = crate::hub::lock::DEFAULT, value_name = "FILE")]
    pub(crate) lock: PathBuf,
}

impl Source {
    /// The file, fetched if it is a name, opened and checked; and its row of the table.
    pub(crate) fn open(&self) -> Result<(WeightFile, Option<&'static NamedWeights>)> {
        let (path, named) = find(&self.file, &self.lock)?;
        Ok((open(&path, self.key.as_deref())?, named))
    }
}

/// The file that `name` means: a path that is there, or a name of the table, fetched if need be.
pub(crate) fn find(name: &str, lock: &Path) -> Result<(PathBuf, Option<&'static NamedWeights>)> {
    let path = Path::new(name);
    if path.exists() {
        // Its format is checked where it is opened, PyTorch's included.
        return Ok((path.to_path_buf(), None));
    }
    let wanted = hub::Wanted { name, ..hub::Wanted::default() };
    let path = hub::resolve(&wanted, lock).map_err(hub::HubError::coded)?;
    Ok((path, registry::find(name)))
}

/// Opens a weight file; what is no weight file ends with code 2.
pub(crate) fn open(path: &Path, key: Option<&str>) -> Result<WeightFile> {
    WeightFile::open(path, key).map_err(|e| coded(USAGE, e))
}

/// The layout asked for: as written, else the table's, else `auto`.
pub(crate) fn layout<'a>(written: &'a str, named: Option<&'a NamedWeights>) -> &'a str {
    match named {
        Some(row) if written == "auto" && layout_names().contains(&row.layout.as_str()) => &row.layout,
        _ => written,
    }
}
