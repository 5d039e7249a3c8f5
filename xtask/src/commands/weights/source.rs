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
    /// Branch, tag or commit of a name; asks the hub again and pins what it says, whatever the lock file says
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// sha256 the file must have
    #[arg(long, value_name = "HEX")]
    pub(crate) sha256: Option<String>,
    /// Lock file for a name, kept beside the recipe
    #[arg(long, default_value = crate::hub::lock::DEFAULT, value_name = "FILE")]
    pub(crate) lock: PathBuf,
}

impl Source {
    /// The file, fetched if it is a name, opened and checked; and its row of the table.
    pub(crate) fn open(&self) -> Result<(WeightFile, Option<&'static NamedWeights>)> {
        let (revision, sha256) = (self.revision.as_deref(), self.sha256.as_deref());
        let wanted = hub::Wanted { name: &self.file, revision, sha256, pin_anew: revision.is_some() };
        let (path, named) = find(&wanted, &self.lock)?;
        Ok((open(&path, self.key.as_deref())?, named))
    }
}

/// The file that is wanted: a path that is there, or a name of the table, fetched if need be.
pub(crate) fn find(wanted: &hub::Wanted<'_>, lock: &Path) -> Result<(PathBuf, Option<&'static NamedWeights>)> {
    let path = Path::new(wanted.name);
    if path.exists() {
        // Its format is checked where it is opened, PyTorch's included.
        hub::check_file(wanted, path).map_err(hub::HubError::coded)?;
        return Ok((path.to_path_buf(), None));
    }
    let path = hub::resolve(wanted, lock).map_err(hub::HubError::coded)?;
    Ok((path, registry::find(wanted.name)))
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
