//! A weight file of any format, opened by what it holds: its list of tensors first, their numbers when asked.

use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use fs_err::File;
use serde::Serialize;

use super::dtype::FileType;
use super::header::{self, shown};
use super::pickle::TensorRef;
use super::pth::{self, Storages};
use crate::error::{ModelError, Result};

/// Endings that PyTorch checkpoints have.
const PICKLE_ENDINGS: [&str; 6] = ["pth", "pt", "bin", "ckpt", "pkl", "tar"];
/// How much larger than the file the tensors may be, where several are views of one storage.
const MAX_SHARED: u64 = 4;

/// Format of a weight file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FileFormat {
    /// `.safetensors`.
    Safetensors,
    /// PyTorch's zip archive around a pickle (since 1.6).
    PytorchZip,
    /// PyTorch's sequence of pickles (before 1.6).
    PytorchLegacy,
}

impl FileFormat {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::PytorchZip => "PyTorch checkpoint (zip)",
            Self::PytorchLegacy => "PyTorch checkpoint (before 1.6)",
        }
    }
}

/// A tensor of a weight file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileTensor {
    /// Element type in the file.
    pub dtype: FileType,
    /// Sizes.
    pub shape: Vec<usize>,
}

#[derive(Debug)]
enum Contents {
    Safetensors { file: File, places: BTreeMap<String, (u64, usize)> },
    Pytorch { tensors: BTreeMap<String, TensorRef>, storages: Storages },
}

/// A weight file, opened and checked as a whole; numbers are read by [`WeightFile::load`].
///
/// Nothing in a file is executed, and nothing is written to disk. What it may ask for is bounded: 16 MiB of header, 32 MiB
/// of pickle, and tensors that lie in the file.
///
/// # Example
/// ```no_run
/// # fn main() -> segdistill_models::Result<()> {
/// let mut file = segdistill_models::weights::WeightFile::open("resnet18.pth", None)?;
/// for (name, tensor) in file.tensors() {
///     println!("{name} {:?} {}", tensor.shape, tensor.dtype);
/// }
/// let tensors = file.load(|name| !name.ends_with("num_batches_tracked"))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    format: FileFormat,
    key: String,
    others: Vec<String>,
    prefix: String,
    tensors: BTreeMap<String, FileTensor>,
    contents: Contents,
}

/// Turns an error of the system into one that names the file.
pub(super) fn io(path: &Path) -> impl Fn(std::io::Error) -> ModelError {
    move |error| ModelError::File {
        path: path.to_path_buf(),
        at: "the file itself".to_string(),
        why: error.to_string(),
        hint: "it must be there and readable",
    }
}

impl WeightFile {
    /// Opens `path`; `key` names the state dict inside a PyTorch checkpoint, such as `state_dict` or `ema.module`.
    ///
    /// Without a key, a checkpoint is looked through for `state_dict`, `model_state_dict`, `model`, `net`, `network` and
    /// `module`, in this order; the first that holds more tensors than the dictionary around it is taken.
    ///
    /// # Errors
    /// `File` when it is absent, cut, damaged, no weight file, of another format than its ending says, or asks for more
    /// than a state dict needs.
    pub fn open(path: impl AsRef<Path>, key: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        let refused = |at: &str, why: String, hint| {
            Err(ModelError::File { path: path.to_path_buf(), at: at.to_string(), why, hint })
        };
        let mut file = File::open(path).map_err(io(path))?;
        let meta = file.metadata().map_err(io(path))?;
        if !meta.is_file() {
            return refused("the file itself", "is no plain file".to_string(), "name a file, not a folder or device");
        }
        let mut first = Vec::new();
        file.by_ref().take(512).read_to_end(&mut first).map_err(io(path))?;
        file.rewind().map_err(io(path))?;

        let ending = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let says_safetensors = ending == "safetensors";
        let says_pickle = PICKLE_ENDINGS.contains(&ending.as_str());
        const RENAME: &str =
            "give the file the ending of what it is (.safetensors or .pth), if you trust where it is from";
        let is_zip = first.starts_with(b"PK");
        let is_tar = first.get(257..262) == Some(b"ustar");
        let is_pickle = first.starts_with(b"\x80") && !is_header(&first, meta.len());
        if is_tar {
            let hint = "load it with the PyTorch of its time and save it anew";
            return refused(
                "byte 257",
                "is a tar archive; PyTorch's tar format before 0.1.10 is not read".into(),
                hint,
            );
        }
        if says_safetensors && (is_zip || is_pickle) {
            let is = if is_zip { "a zip archive" } else { "a pickle" };
            return refused("byte 0", format!("ends in .safetensors, but is {is}"), RENAME);
        }
        if says_pickle && is_header(&first, meta.len()) {
            let ending = shown(&ending);
            return refused("byte 0", format!("ends in .{ending}, but is a safetensors file"), RENAME);
        }
        if !says_safetensors && !says_pickle {
            let why = format!("ends in `.{}`, expected .safetensors, .{}", shown(&ending), PICKLE_ENDINGS.join(", ."));
            return refused("its name", why, RENAME);
        }
        let checkpoint = if is_zip {
            (FileFormat::PytorchZip, pth::open_zip(path, file, meta.len(), key)?)
        } else if pth::is_legacy(&first) {
            (FileFormat::PytorchLegacy, pth::open_legacy(path, file, meta.len(), key)?)
        } else if says_safetensors {
            if key.is_some() {
                let hint = "leave --key out: safetensors holds tensors only";
                return refused("its name", "a key is given for a safetensors file".into(), hint);
            }
            return Self::safetensors(path, file, meta.len());
        } else {
            let why = match (first.is_empty(), is_pickle) {
                (true, _) => "is empty".to_string(),
                (_, true) => "is a bare pickle, not what torch.save writes".to_string(),
                _ => format!("begins with {:02x?}, as no PyTorch checkpoint does", &first[..first.len().min(4)]),
            };
            return refused("byte 0", why, "expected a file written by torch.save, or .safetensors");
        };
        let (format, checkpoint) = checkpoint;
        let describe = |t: &TensorRef| FileTensor { dtype: t.storage.dtype, shape: t.shape.clone() };
        let tensors: BTreeMap<_, _> = checkpoint.tensors.iter().map(|(name, t)| (name.clone(), describe(t))).collect();
        let opened = Self {
            path: path.to_path_buf(),
            format,
            key: checkpoint.key,
            others: checkpoint.others,
            prefix: String::new(),
            tensors,
            contents: Contents::Pytorch { tensors: checkpoint.tensors, storages: checkpoint.storages },
        };
        opened.check_claims(meta.len())?;
        Ok(opened)
    }

    fn safetensors(path: &Path, mut file: File, len: u64) -> Result<Self> {
        let listed = header::read(&mut file, len).map_err(|e| ModelError::File {
            path: path.to_path_buf(),
            at: e.at,
            why: e.why,
            hint: "expected a .safetensors file, whole and unchanged; obtain it again",
        })?;
        let places = listed.iter().map(|t| (t.name.clone(), (t.at, t.len))).collect();
        let tensors = listed.into_iter().map(|t| (t.name, FileTensor { dtype: t.dtype, shape: t.shape })).collect();
        Ok(Self {
            path: path.to_path_buf(),
            format: FileFormat::Safetensors,
            key: String::new(),
            others: Vec::new(),
            prefix: String::new(),
            tensors,
            contents: Contents::Safetensors { file, places },
        })
    }

    /// A file that lists these tensors and holds no numbers.
    #[cfg(test)]
    pub(super) fn listing(path: &Path, tensors: BTreeMap<String, FileTensor>) -> Self {
        let file = File::open(path).expect("a file to stand for it");
        Self {
            path: path.to_path_buf(),
            format: FileFormat::Safetensors,
            key: String::new(),
            others: Vec::new(),
            prefix: String::new(),
            tensors,
            contents: Contents::Safetensors { file, places: BTreeMap::new() },
        }
    }

    /// Checks that the tensors of a checkpoint lie in the file: their storages together are no longer than it, and views
    /// of one storage do not multiply it.
    fn check_claims(&self, file_len: u64) -> Result<()> {
        let Contents::Pytorch { tensors, .. } = &self.contents else { return Ok(()) };
        let bytes = |count: usize, t: &TensorRef| (count as u64).saturating_mul(t.storage.dtype.size() as u64);
        let mut seen = HashSet::new();
        let distinct = tensors.values().filter(|t| seen.insert(&t.storage.key));
        let stored = distinct.fold(0u64, |sum, t| sum.saturating_add(bytes(t.storage.len, t)));
        let viewed = tensors.values().fold(0u64, |sum, t| sum.saturating_add(bytes(t.shape.iter().product(), t)));
        if stored <= file_len && viewed <= MAX_SHARED * file_len {
            return Ok(());
        }
        Err(ModelError::File {
            path: self.path.clone(),
            at: "the list of tensors".to_string(),
            why: format!("{stored} bytes of storages and {viewed} of tensors in a file of {file_len} bytes"),
            hint: "the file is damaged or made up; obtain it again",
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> FileFormat {
        self.format
    }

    /// Dotted keys that lead to the state dict inside a checkpoint; empty when it is the whole.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The same file, of which only the tensors are looked at whose names begin with `prefix`, such as `model.`; what all of
    /// them share beyond that is found without.
    ///
    /// # Errors
    /// `File` when no name begins so.
    pub fn below(self, prefix: &str) -> Result<Self> {
        if self.tensors.keys().any(|name| name.starts_with(prefix)) {
            return Ok(Self { prefix: prefix.to_string(), ..self });
        }
        let first: Vec<String> = self.tensors.keys().take(3).map(|name| format!("`{}`", shown(name))).collect();
        Err(ModelError::File {
            path: self.path,
            at: "the list of tensors".to_string(),
            why: format!("no name begins with `{}`; the first are {}", shown(prefix), first.join(", ")),
            hint: "`weights inspect` lists the names",
        })
    }

    /// What the names begin with that are looked at; empty unless [`WeightFile::below`] was called.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// What lies beside the tensors and is none, as `name (kind)`.
    pub fn others(&self) -> &[String] {
        &self.others
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, FileTensor> {
        &self.tensors
    }

    /// The numbers of the tensors that are `wanted`, on the CPU: floats of 16 bits widened to f32, f64 kept, whole numbers
    /// as i64.
    ///
    /// # Errors
    /// `File` when they cannot be read.
    pub fn load(&mut self, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, Tensor>> {
        let path = &self.path;
        let mut out = BTreeMap::new();
        match &mut self.contents {
            Contents::Safetensors { file, places } => {
                for (name, (at, len)) in places.iter().filter(|(name, _)| wanted(name)) {
                    let FileTensor { dtype, shape } = &self.tensors[name];
                    let mut bytes = vec![0; *len];
                    let read = file.seek(SeekFrom::Start(*at)).and_then(|_| file.read_exact(&mut bytes));
                    read.map_err(io(path))?;
                    out.insert(name.clone(), dtype.tensor(&bytes, shape, None)?);
                }
            }
            Contents::Pytorch { tensors, storages } => {
                let mut wanted: Vec<_> = tensors.iter().filter(|(name, _)| wanted(name)).collect();
                // Views of one storage beside each other, so that it is read once.
                wanted.sort_by(|(_, a), (_, b)| a.storage.key.cmp(&b.storage.key));
                let mut held: Option<(&TensorRef, Vec<u8>)> = None;
                for (name, tensor) in wanted {
                    let fresh = held.take().filter(|(of, _)| of.storage == tensor.storage);
                    let bytes = match fresh {
                        Some((_, bytes)) => bytes,
                        None => storages.read(path, tensor)?,
                    };
                    out.insert(name.clone(), view(tensor, &bytes)?);
                    held = Some((tensor, bytes));
                }
            }
        }
        Ok(out)
    }
}

/// Whether a file begins with the length and the brace of a safetensors header, whatever its first byte.
fn is_header(first: &[u8], file_len: u64) -> bool {
    let length = first.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    first.get(8) == Some(&b'{') && length.is_some_and(|n| n <= file_len.saturating_sub(8))
}

/// The elements of a tensor, in order, out of its storage.
fn view(tensor: &TensorRef, bytes: &[u8]) -> Result<Tensor> {
    let TensorRef { storage, offset, shape, strides } = tensor;
    let count: usize = shape.iter().product();
    let mut dense = 1usize;
    let is_dense = shape.iter().zip(strides).rev().all(|(side, stride)| {
        let fits = *side == 1 || *stride == dense;
        dense = dense.saturating_mul(*side);
        fits
    });
    if count == 0 || is_dense {
        let size = storage.dtype.size();
        return Ok(storage.dtype.tensor(&bytes[offset * size..(offset + count) * size], shape, None)?);
    }
    let mut indices = vec![*offset];
    for (side, stride) in shape.iter().zip(strides) {
        indices = indices.iter().flat_map(|at| (0..*side).map(move |i| at + i * stride)).collect();
    }
    Ok(storage.dtype.tensor(bytes, shape, Some(&indices))?)
}
