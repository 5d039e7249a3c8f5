//! PyTorch checkpoints: the zip archive of today and the sequence of pickles before 1.6.
//!
//! What is read of an archive is its directory, `data.pkl`, and the storages a tensor needs, each by its exact name and
//! only if it lies there uncompressed, as PyTorch writes it; nothing is unpacked to disk. The older tar archives (before
//! 0.1.10) are refused.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use fs_err::File;
use zip::{CompressionMethod, ZipArchive};

use super::dtype::FileType;
use super::file::io;
use super::header::{MAX_TENSORS, shown};
use super::pickle::{self, Id, Pickle, TensorRef, Value};
use crate::error::{ModelError, Result};

/// Longest pickle of a checkpoint, in bytes.
const MAX_PICKLE: u64 = 32 << 20;
/// Most entries of an archive.
const MAX_ENTRIES: u64 = 100_000;
/// Names under which training programs keep the state dict in a checkpoint, the likeliest first.
const NESTED: [&str; 6] = ["state_dict", "model_state_dict", "model", "net", "network", "module"];
/// Depth of nesting that is looked through.
const MAX_DEPTH: usize = 4;

const RESAVE: &str = "save it anew with torch.save(model.state_dict(), FILE), or as .safetensors";
const AGAIN: &str = "the file is cut or damaged; obtain it again";

/// Where the numbers of a checkpoint lie.
pub(super) enum Storages {
    /// In an archive, below this folder.
    Zip { archive: Box<ZipArchive<File>>, folder: String },
    /// In the file itself: first byte and number of bytes of each.
    Plain { file: File, at: HashMap<String, (u64, u64)> },
}

impl std::fmt::Debug for Storages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zip { .. } => "Storages::Zip",
            Self::Plain { .. } => "Storages::Plain",
        })
    }
}

/// A checkpoint: its tensors, what lay beside them, and where their numbers are.
#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) tensors: BTreeMap<String, TensorRef>,
    /// Names beside the tensors that hold something else.
    pub(super) others: Vec<String>,
    /// Dotted keys that lead to the state dict; empty when it is the whole.
    pub(super) key: String,
    pub(super) storages: Storages,
}

fn refused<T>(path: &Path, at: impl Into<String>, why: impl Into<String>, hint: &'static str) -> Result<T> {
    Err(ModelError::File { path: path.to_path_buf(), at: at.into(), why: why.into(), hint })
}

/// Opens the archive `file`.
pub(super) fn open_zip(path: &Path, mut file: File, file_len: u64, key: Option<&str>) -> Result<Checkpoint> {
    // PyTorch's archives end with a directory without comment: asked for first, so that a cut file is told apart from a
    // broken one and no search through it is needed.
    let mut end = [0; 22];
    let read =
        file_len.checked_sub(22).map(|at| file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut end)));
    if !matches!(read, Some(Ok(()))) || !end.starts_with(b"PK\x05\x06") {
        return refused(path, "the end", "no zip directory there: the archive is cut short or was appended to", AGAIN);
    }
    let broken = |e: zip::result::ZipError| ModelError::File {
        path: path.to_path_buf(),
        at: "the zip directory".to_string(),
        why: e.to_string(),
        hint: AGAIN,
    };
    file.rewind().map_err(io(path))?;
    let mut archive = ZipArchive::new(file).map_err(broken)?;
    if archive.len() as u64 > MAX_ENTRIES {
        return refused(path, "the zip directory", format!("{} entries, at most {MAX_ENTRIES}", archive.len()), RESAVE);
    }
    if archive.has_duplicate_names() {
        return refused(path, "the zip directory", "an entry is there twice", AGAIN);
    }
    let names: Vec<String> = archive.file_names_raw().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    let is_pickle = |name: &&String| *name == "data.pkl" || name.ends_with("/data.pkl");
    let pickles: Vec<&String> = names.iter().filter(is_pickle).collect();
    let [pickle] = pickles.as_slice() else {
        let first: Vec<String> = names.iter().take(3).map(|n| format!("`{}`", shown(n))).collect();
        let why = match pickles.len() {
            0 => format!(
                "{} entries ({}), none of them `data.pkl`: no PyTorch checkpoint",
                names.len(),
                first.join(", ")
            ),
            n => format!("{n} entries called `data.pkl`"),
        };
        return refused(path, "the zip directory", why, RESAVE);
    };
    let folder = pickle.strip_suffix("data.pkl").unwrap_or_default().to_string();
    let byte_order = format!("{folder}byteorder");
    if names.contains(&byte_order) && entry(path, &mut archive, &byte_order, 16)? != b"little" {
        return refused(path, format!("entry `{byte_order}`"), "numbers are not little-endian", RESAVE);
    }
    let bytes = entry(path, &mut archive, pickle, MAX_PICKLE)?;
    let place = format!("entry `{}`", shown(pickle));
    let pickle = run(path, &place, &bytes)?;
    let found = find_tensors(path, &place, &pickle, key)?;
    Ok(found.with(Storages::Zip { archive: Box::new(archive), folder }))
}

/// The bytes of an entry that lies uncompressed in the archive; its checksum is verified.
fn entry(path: &Path, archive: &mut ZipArchive<File>, name: &str, most: u64) -> Result<Vec<u8>> {
    let at = || format!("entry `{}`", shown(name));
    let fail = |why: String| ModelError::File { path: path.to_path_buf(), at: at(), why, hint: AGAIN };
    let index = archive.index_for_name(name).ok_or_else(|| fail("is not in the archive".to_string()))?;
    // Raw, so that a compressed entry is looked at and not begun.
    let (method, encrypted, size, packed) = {
        let raw = archive.by_index_raw(index).map_err(|e| fail(e.to_string()))?;
        (raw.compression(), raw.encrypted(), raw.size(), raw.compressed_size())
    };
    if method != CompressionMethod::Stored || encrypted || size != packed {
        let why = format!("{packed} bytes that unpack to {size} ({method:?}); PyTorch stores its entries unpacked");
        return refused(path, at(), why, RESAVE);
    }
    if size > most {
        return refused(path, at(), format!("{size} bytes, at most {most} are taken"), RESAVE);
    }
    let mut reader = archive.by_index(index).map_err(|e| fail(e.to_string()))?;
    let mut bytes = Vec::new();
    // `take` and not a buffer of the announced size: what is not there is not allocated.
    reader.by_ref().take(size).read_to_end(&mut bytes).map_err(|e| fail(e.to_string()))?;
    // One read more lets the checksum be compared.
    let rest = reader.read(&mut [0]).map_err(|e| fail(e.to_string()))?;
    match bytes.len() as u64 == size && rest == 0 {
        true => Ok(bytes),
        false => Err(fail(format!("{} bytes are there, {size} are announced", bytes.len()))),
    }
}

fn run(path: &Path, place: &str, bytes: &[u8]) -> Result<Pickle> {
    pickle::run(bytes).or_else(|e| refused(path, format!("{place}, byte {}", e.at), e.why, e.hint))
}

/// What the first pickle of the older form holds: a number nobody else begins with.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The second: version 1001.
const LEGACY_VERSION: &[u8] = b"M\xe9\x03.";

/// Whether a file begins as the older form does, in whatever binary protocol.
pub(super) fn is_legacy(first: &[u8]) -> bool {
    pickled(first, LEGACY_MAGIC).is_some()
}

/// Length of the pickle of one number that `bytes` begin with, if it is this one: protocol, from version 4 on a frame, then
/// `number` with its end.
fn pickled(bytes: &[u8], number: &[u8]) -> Option<usize> {
    let [0x80, 2..=5, rest @ ..] = bytes else { return None };
    let unframed = match rest {
        [0x95, rest @ ..] => rest.get(8..)?,
        _ => rest,
    };
    unframed.starts_with(number).then(|| bytes.len() - unframed.len() + number.len())
}

/// Opens a file of the older form.
pub(super) fn open_legacy(path: &Path, mut file: File, file_len: u64, key: Option<&str>) -> Result<Checkpoint> {
    let mut window = Vec::new();
    file.rewind().and_then(|()| file.by_ref().take(MAX_PICKLE).read_to_end(&mut window)).map_err(io(path))?;
    let mut at = pickled(&window, LEGACY_MAGIC).unwrap_or_default();
    let Some(version) = pickled(&window[at..], LEGACY_VERSION) else {
        return refused(path, format!("byte {at}"), "a version of the older form that is not 1001", RESAVE);
    };
    at += version;
    let mut next = |what: &str| -> Result<Pickle> {
        let place = format!("{what} at byte {at}");
        let pickle = run(path, &place, &window[at..])?;
        at += pickle.len;
        Ok(pickle)
    };
    let system = next("the pickle of the system")?;
    if !matches!(system.get(system.root), Value::Dict(_)) {
        return refused(path, "the pickle of the system", format!("is {}", system.kind(system.root)), RESAVE);
    }
    let little = dict_get(&system, system.root, "little_endian").map(|id| system.get(id) == &Value::Bool(true));
    if little == Some(false) {
        return refused(path, "the pickle of the system", "numbers are not little-endian", RESAVE);
    }
    let tensors = next("the pickle of the tensors")?;
    let keys = next("the pickle of the storage keys")?;
    let found = find_tensors(path, "the pickle of the tensors", &tensors, key)?;
    let Value::List(keys_in_order) = keys.get(keys.root) else {
        return refused(path, "the pickle of the storage keys", "is no list", RESAVE);
    };

    // Behind the pickles: for each key its number of elements, then the elements; their size is known from the tensors.
    let mut sizes: HashMap<&str, FileType> = HashMap::new();
    for value in tensors.values() {
        if let Value::Storage(storage) = value {
            sizes.insert(&storage.key, storage.dtype);
        }
    }
    let mut at = at as u64;
    let mut places = HashMap::new();
    for id in keys_in_order {
        let Some(name) = keys.text(*id) else {
            return refused(path, "the pickle of the storage keys", "holds what is no text", RESAVE);
        };
        let Some(dtype) = sizes.get(name) else {
            return refused(
                path,
                "the pickle of the storage keys",
                format!("`{}` is used by nothing", shown(name)),
                RESAVE,
            );
        };
        let place = format!("storage `{name}` at byte {at}");
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(at)).map_err(io(path))?;
        if file.read_exact(&mut count).is_err() {
            return refused(path, place, "the file ends before it", AGAIN);
        }
        let len = u64::from_le_bytes(count).checked_mul(dtype.size() as u64);
        match len.and_then(|len| (at + 8).checked_add(len)).filter(|end| *end <= file_len) {
            Some(end) => {
                if places.insert(name.to_string(), (at + 8, end - at - 8)).is_some() {
                    return refused(path, place, "is there twice", AGAIN);
                }
                at = end;
            }
            None => return refused(path, place, "the file ends inside it", AGAIN),
        }
    }
    if at != file_len {
        return refused(path, "the end", format!("{} bytes belong to no storage", file_len - at), AGAIN);
    }
    Ok(found.with(Storages::Plain { file, at: places }))
}

/// The tensors of a pickle.
struct Found {
    tensors: BTreeMap<String, TensorRef>,
    others: Vec<String>,
    key: String,
}

impl Found {
    fn with(self, storages: Storages) -> Checkpoint {
        Checkpoint { tensors: self.tensors, others: self.others, key: self.key, storages }
    }
}

fn dict_get(pickle: &Pickle, dict: Id, key: &str) -> Option<Id> {
    let Value::Dict(items) = pickle.get(dict) else { return None };
    items.iter().rev().find(|(k, _)| pickle.text(*k) == Some(key)).map(|(_, value)| *value)
}

fn n_tensors(pickle: &Pickle, dict: Id) -> usize {
    let Value::Dict(items) = pickle.get(dict) else { return 0 };
    let is_tensor =
        |(key, value): &&(Id, Id)| pickle.text(*key).is_some() && matches!(pickle.get(*value), Value::Tensor(_));
    items.iter().filter(is_tensor).count()
}

/// Names of [`NESTED`] that lead from a dictionary to the state dict, and the number of its tensors: the first name below
/// which lie more tensors than beside it, as a step counter or a score may be a tensor too.
fn way_in(pickle: &Pickle, dict: Id, depth: usize, seen: &mut HashSet<Id>) -> (usize, Vec<(&'static str, Id)>) {
    let own = n_tensors(pickle, dict);
    if depth == 0 || !seen.insert(dict) {
        return (own, Vec::new());
    }
    for name in NESTED {
        let Some(next) = dict_get(pickle, dict, name).filter(|id| matches!(pickle.get(*id), Value::Dict(_))) else {
            continue;
        };
        let (n, way) = way_in(pickle, next, depth - 1, seen);
        if n > own {
            return (n, std::iter::once((name, next)).chain(way).collect());
        }
    }
    (own, Vec::new())
}

/// The state dict: the dictionary below `key`, else the one [`way_in`] leads to.
fn find_tensors(path: &Path, place: &str, pickle: &Pickle, key: Option<&str>) -> Result<Found> {
    let mut at = pickle.root;
    let mut way: Vec<String> = Vec::new();
    if let Some(key) = key {
        for part in key.split('.') {
            let Some(next) = dict_get(pickle, at, part) else {
                let why = format!("no dictionary with a key `{part}` there; {}", kinds(pickle, at));
                return refused(path, place, why, "--key names the state dict inside the checkpoint");
            };
            way.push(part.to_string());
            at = next;
        }
    } else {
        for (name, next) in way_in(pickle, at, MAX_DEPTH, &mut HashSet::new()).1 {
            way.push(name.to_string());
            at = next;
        }
    }
    let n = n_tensors(pickle, at);
    if n == 0 {
        let why = format!("no state dict found; {}", kinds(pickle, at));
        let hint = match pickle.get(at) {
            Value::Dict(_) => "--key names the state dict inside the checkpoint",
            _ => RESAVE,
        };
        return refused(path, place, why, hint);
    }
    if n > MAX_TENSORS {
        return refused(path, place, format!("{n} tensors, at most {MAX_TENSORS} are taken"), RESAVE);
    }
    let mut found = Found { tensors: BTreeMap::new(), others: Vec::new(), key: way.join(".") };
    let Value::Dict(items) = pickle.get(at) else { return Ok(found) };
    for (key, value) in items {
        match (pickle.text(*key), pickle.get(*value)) {
            (Some(name), Value::Tensor(tensor)) => {
                if found.tensors.insert(name.to_string(), tensor.clone()).is_some() {
                    return refused(path, place, format!("tensor `{}` is there twice", shown(name)), AGAIN);
                }
            }
            (Some(name), _) => found.others.push(format!("{} ({})", shown(name), pickle.kind(*value))),
            (None, _) => found.others.push(format!("a key that is no text ({})", pickle.kind(*value))),
        }
    }
    Ok(found)
}

/// What a value is, and the first keys of a dictionary.
fn kinds(pickle: &Pickle, id: Id) -> String {
    let Value::Dict(items) = pickle.get(id) else { return format!("the outermost value is {}", pickle.kind(id)) };
    let key = |(key, value): &(Id, Id)| {
        let name = pickle.text(*key).map_or("?".to_string(), shown);
        format!("`{name}` ({})", pickle.kind(*value))
    };
    let first: Vec<String> = items.iter().take(8).map(key).collect();
    format!("a dictionary of {} keys: {}", items.len(), first.join(", "))
}

impl Storages {
    /// The bytes of the storage of `tensor`.
    pub(super) fn read(&mut self, path: &Path, tensor: &TensorRef) -> Result<Vec<u8>> {
        let storage = &tensor.storage;
        let expected = storage.len * storage.dtype.size();
        let (at, bytes) = match self {
            Self::Zip { archive, folder } => {
                let name = format!("{folder}data/{}", storage.key);
                (format!("entry `{}`", shown(&name)), entry(path, archive, &name, expected as u64)?)
            }
            Self::Plain { file, at } => {
                let place = format!("storage `{}`", storage.key);
                let Some((start, len)) = at.get(&storage.key).filter(|(_, len)| *len <= expected as u64) else {
                    return refused(path, place, "is not in the file, or longer than a tensor says", AGAIN);
                };
                let mut bytes = Vec::new();
                file.seek(SeekFrom::Start(*start)).map_err(io(path))?;
                file.by_ref().take(*len).read_to_end(&mut bytes).map_err(io(path))?;
                (place, bytes)
            }
        };
        match bytes.len() == expected {
            true => Ok(bytes),
            false => {
                let why = format!("{} bytes, expected {expected}: {} of {}", bytes.len(), storage.len, storage.dtype);
                refused(path, at, why, AGAIN)
            }
        }
    }
}
