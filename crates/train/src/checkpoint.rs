//! Checkpoints: a folder each, written whole or not at all, verified when read.
//!
//! A checkpoint is written into a scratch folder beside its place, flushed to disk, renamed, and only then does the
//! pointer file (`last`, `best`) name it: a process killed at any moment leaves the previous one readable.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use segdistill_eval::table::write_atomic;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Stage;
use crate::error::{Result, TrainError};

/// What `state.json` holds beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Step of the last evaluation on val.
    pub validated: u64,
    /// Best val mIoU so far and its step.
    pub best: Option<(u64, f64)>,
    /// Stage the checkpoint belongs to.
    pub stage: Stage,
    /// Identity of teacher weights the objective saw, if any (sha256).
    pub teacher: Option<String>,
    /// Identity of the training data: data set, split, number of images.
    pub data: String,
    /// sha256 of every tensor file.
    pub sha256: BTreeMap<String, String>,
}

/// A checkpoint in memory.
#[derive(Debug)]
pub struct Checkpoint {
    /// `state.json`.
    pub state: State,
    /// Weights and running statistics.
    pub model: BTreeMap<String, Tensor>,
    /// Momentum buffers.
    pub optimizer: BTreeMap<String, Tensor>,
}

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const SCRATCH: &str = ".scratch-";

fn broken(path: &Path, why: impl Into<String>) -> TrainError {
    TrainError::Checkpoint {
        path: path.to_path_buf(),
        why: why.into(),
        hint: "delete the folder and resume from an earlier checkpoint, or train the stage again",
    }
}

/// sha256 of bytes, in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn sync_dir(dir: &Path) -> Result<()> {
    fs_err::File::open(dir)?.sync_all()?;
    Ok(())
}

/// Tensors as the bytes of a safetensors file, sorted by name: the same tensors give the same bytes.
///
/// # Errors
/// `Config` when a tensor cannot be serialised.
pub fn to_safetensors(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let views: Vec<(&String, &Tensor)> = tensors.iter().collect();
    safetensors::serialize(views, None)
        .map_err(|e| TrainError::config(format!("tensors cannot be serialised: {e}"), "report this as a defect"))
}

/// Writes `checkpoints/step_NNNNNN` below `stage_dir` and points `last` (and `best`) at it.
///
/// # Errors
/// `Io` naming the file; the previous checkpoint and pointers are then untouched.
pub fn save(
    stage_dir: &Path,
    mut state: State,
    model: &BTreeMap<String, Tensor>,
    optimizer: &BTreeMap<String, Tensor>,
    is_best: bool,
) -> Result<PathBuf> {
    let root = stage_dir.join("checkpoints");
    fs_err::create_dir_all(&root)?;
    let name = format!("step_{:06}", state.step);
    let scratch = root.join(format!("{SCRATCH}{}-{name}", std::process::id()));
    let place = root.join(&name);
    let write = |state: &mut State| -> Result<()> {
        if scratch.exists() {
            fs_err::remove_dir_all(&scratch)?;
        }
        fs_err::create_dir(&scratch)?;
        for (file, tensors) in [(MODEL, model), (OPTIMIZER, optimizer)] {
            let bytes = to_safetensors(tensors)?;
            state.sha256.insert(file.to_string(), sha256_hex(&bytes));
            write_synced(&scratch.join(file), &bytes)?;
        }
        let json = serde_json::to_vec_pretty(state).map_err(|e| broken(&scratch, e.to_string()))?;
        write_synced(&scratch.join(STATE), &json)?;
        sync_dir(&scratch)?;
        if place.exists() {
            // The same step saved twice: move the old one aside, so that its place is empty for one rename only.
            fs_err::rename(&place, root.join(format!("{SCRATCH}{}-old", std::process::id())))?;
        }
        fs_err::rename(&scratch, &place)?;
        sync_dir(&root)
    };
    write(&mut state).inspect_err(|_| {
        let _ = fs_err::remove_dir_all(&scratch);
    })?;
    write_atomic(&stage_dir.join("last"), name.as_bytes())?;
    if is_best {
        write_atomic(&stage_dir.join("best"), name.as_bytes())?;
    }
    sweep(stage_dir)?;
    Ok(place)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = fs_err::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(())
}

/// Removes checkpoints that neither `last` nor `best` names, and scratch left by a killed process.
fn sweep(stage_dir: &Path) -> Result<()> {
    let keep: Vec<String> = ["last", "best"].iter().filter_map(|p| pointer(stage_dir, p)).collect();
    for entry in fs_err::read_dir(stage_dir.join("checkpoints"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = name.starts_with("step_") || name.starts_with(SCRATCH);
        if ours && !keep.contains(&name) {
            fs_err::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn pointer(stage_dir: &Path, which: &str) -> Option<String> {
    Some(fs_err::read_to_string(stage_dir.join(which)).ok()?.trim().to_string())
}

/// The folder that `last` or `best` names, if a checkpoint was ever written.
pub fn find(stage_dir: &Path, which: &str) -> Option<PathBuf> {
    Some(stage_dir.join("checkpoints").join(pointer(stage_dir, which)?))
}

/// Reads a checkpoint folder and verifies every digest.
///
/// # Errors
/// `Checkpoint` when a file is missing, cut, changed or not ours.
pub fn load(dir: &Path, device: &Device) -> Result<Checkpoint> {
    let read = |file: &str| fs_err::read(dir.join(file)).map_err(|e| broken(dir, e.to_string()));
    let state: State = serde_json::from_slice(&read(STATE)?).map_err(|e| broken(&dir.join(STATE), e.to_string()))?;
    let tensors = |file: &str| -> Result<BTreeMap<String, Tensor>> {
        let bytes = read(file)?;
        let (found, expected) = (sha256_hex(&bytes), state.sha256.get(file));
        if expected != Some(&found) {
            let expected = expected.map_or("no digest", String::as_str);
            return Err(broken(&dir.join(file), format!("sha256 is {found}, expected {expected}")));
        }
        let map = candle_core::safetensors::load_buffer(&bytes, device)
            .map_err(|e| broken(&dir.join(file), e.to_string()))?;
        Ok(map.into_iter().collect())
    };
    Ok(Checkpoint { model: tensors(MODEL)?, optimizer: tensors(OPTIMIZER)?, state })
}
