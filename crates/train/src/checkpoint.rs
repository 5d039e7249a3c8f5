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
    /// What the objective's terms own: adapters, memories, a discriminator.
    pub parts: Parts,
}

/// Tensor files of a checkpoint beside model and optimizer: name without ending, tensors by name.
pub type Parts = BTreeMap<String, BTreeMap<String, Tensor>>;

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const ENDING: &str = ".safetensors";
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
    parts: &Parts,
    is_best: bool,
) -> Result<PathBuf> {
    let root = stage_dir.join("checkpoints");
    fs_err::create_dir_all(&root)?;
    // The same step saved twice (stopped, then evaluated) gets a second folder: the one `last` names stays until the
    // pointer has moved.
    let step = format!("step_{:06}", state.step);
    let name = (1..)
        .map(|n| if n == 1 { step.clone() } else { format!("{step}-{n}") })
        .find(|name| !root.join(name).exists())
        .unwrap_or(step);
    let scratch = root.join(format!("{SCRATCH}{}-{name}", std::process::id()));
    let place = root.join(&name);
    let write = |state: &mut State| -> Result<()> {
        if scratch.exists() {
            fs_err::remove_dir_all(&scratch)?;
        }
        fs_err::create_dir(&scratch)?;
        let fixed = [(MODEL.to_string(), model), (OPTIMIZER.to_string(), optimizer)];
        let parts = parts.iter().map(|(name, tensors)| (format!("{name}{ENDING}"), tensors));
        state.sha256.clear();
        for (file, tensors) in fixed.into_iter().chain(parts) {
            let bytes = to_safetensors(tensors)?;
            write_synced(&scratch.join(&file), &bytes)?;
            state.sha256.insert(file, sha256_hex(&bytes));
        }
        let json = serde_json::to_vec_pretty(state).map_err(|e| broken(&scratch, e.to_string()))?;
        write_synced(&scratch.join(STATE), &json)?;
        sync_dir(&scratch)?;
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
    let mut keep = Vec::new();
    for which in ["last", "best"] {
        keep.extend(pointer(stage_dir, which)?);
    }
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

/// The checkpoint name a pointer file holds; `None` when nothing was ever saved.
fn pointer(stage_dir: &Path, which: &str) -> Result<Option<String>> {
    let path = stage_dir.join(which);
    let name = match fs_err::read_to_string(&path) {
        Ok(text) => text.trim().to_string(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let known = name.starts_with("step_") && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if known { Ok(Some(name)) } else { Err(broken(&path, format!("it names `{name}`, expected step_NNNNNN"))) }
}

/// The folder that `last` or `best` names, if a checkpoint was ever written.
///
/// A process killed between a checkpoint and its pointer leaves a whole checkpoint that no `last` names: the newest is it.
///
/// # Errors
/// `Checkpoint` when the pointer file is damaged.
pub fn find(stage_dir: &Path, which: &str) -> Result<Option<PathBuf>> {
    let root = stage_dir.join("checkpoints");
    if let Some(name) = pointer(stage_dir, which)? {
        return Ok(Some(root.join(name)));
    }
    if which != "last" || !root.is_dir() {
        return Ok(None);
    }
    let mut whole = Vec::new();
    for entry in fs_err::read_dir(&root)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("step_") {
            whole.push(name);
        }
    }
    Ok(whole.into_iter().max().map(|name| root.join(name)))
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
    let mut parts = Parts::new();
    for file in state.sha256.keys().filter(|file| ![MODEL, OPTIMIZER].contains(&file.as_str())) {
        // Names come from a file: none may lead out of the folder.
        let name = file.strip_suffix(ENDING).filter(|name| !name.contains(['/', '\\']) && !name.starts_with('.'));
        let name =
            name.ok_or_else(|| broken(&dir.join(STATE), format!("it names `{file}`, no file of a checkpoint")))?;
        parts.insert(name.to_string(), tensors(file)?);
    }
    Ok(Checkpoint { model: tensors(MODEL)?, optimizer: tensors(OPTIMIZER)?, parts, state })
}
