//! The header of a `.safetensors` file: read alone, checked as a whole, before a byte of a tensor is touched.

use std::fmt;
use std::io::Read;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use super::dtype::FileType;

/// Longest header, in bytes: thousands of tensors take hundreds of kilobytes.
const MAX_HEADER: u64 = 16 << 20;
/// Most tensors: no network known here comes near it, and each is compared with every name of a layout.
pub(super) const MAX_TENSORS: usize = 20_000;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// One tensor of the header.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) dtype: FileType,
    pub(super) shape: Vec<usize>,
    /// First byte in the file and number of bytes.
    pub(super) at: u64,
    pub(super) len: usize,
}

/// What a header is refused for.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) at: String,
    pub(super) why: String,
}

fn refusal<T>(at: impl Into<String>, why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { at: at.into(), why: why.into() })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header as written: names in file order, doubled ones included.
struct Entries(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut out = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<std::collections::BTreeMap<String, String>>()?;
                    } else {
                        out.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(out))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Reads the header that `file` begins with; `file_len` is its whole length.
///
/// Every tensor must have exactly the bytes its shape and type need, and together they must fill the file: no gap, no
/// overlap, no byte left over, no name twice.
pub(super) fn read(file: &mut impl Read, file_len: u64) -> Result<Vec<Listed>, Refusal> {
    let start = "the header";
    if file_len < 8 {
        return refusal(start, format!("the file has {file_len} bytes, a header takes 8 or more"));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).or_else(|e| refusal(start, e.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > file_len - 8 {
        return refusal(
            start,
            format!("says it has {length} bytes, {} are there: cut short or not safetensors", file_len - 8),
        );
    }
    if length > MAX_HEADER {
        return refusal(start, format!("has {length} bytes, at most {MAX_HEADER} are taken"));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).or_else(|e| refusal(start, e.to_string()))?;
    let Entries(entries) = serde_json::from_slice(&text).or_else(|e| refusal(start, e.to_string()))?;

    if entries.len() > MAX_TENSORS {
        return refusal(start, format!("lists {} tensors, at most {MAX_TENSORS} are taken", entries.len()));
    }

    let data_at = 8 + length;
    let mut listed = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        let at = || format!("tensor `{}`", shown(&name));
        let Some(dtype) = FileType::named(&info.dtype) else {
            return refusal(at(), format!("type `{}`, which is not read", shown(&info.dtype)));
        };
        if info.shape.len() > MAX_RANK {
            return refusal(at(), format!("{} dimensions, at most {MAX_RANK} are taken", info.shape.len()));
        }
        let bytes = info.shape.iter().try_fold(dtype.size() as u64, |n, side| n.checked_mul(*side));
        let [from, to] = info.data_offsets;
        let has = to.checked_sub(from);
        match (bytes, has) {
            (Some(bytes), Some(has)) if bytes == has && data_at.checked_add(to).is_some_and(|end| end <= file_len) => {}
            (Some(bytes), Some(has)) if bytes == has => {
                return refusal(at(), format!("bytes {from} to {to} of {} that are there", file_len - data_at));
            }
            _ => {
                let shape = &info.shape;
                return refusal(at(), format!("bytes {from} to {to} for shape {shape:?} of {dtype}, which do not fit"));
            }
        }
        let shape = info.shape.iter().map(|side| *side as usize).collect();
        listed.push(Listed { dtype, shape, at: data_at + from, len: (to - from) as usize, name });
    }

    listed.sort_by(|a, b| (a.at, a.len, &a.name).cmp(&(b.at, b.len, &b.name)));
    let mut end = data_at;
    let mut before = "the header".to_string();
    for tensor in &listed {
        if tensor.at != end {
            let how = if tensor.at < end { "overlap those of" } else { "leave a gap after" };
            let at = format!("tensor `{}`", shown(&tensor.name));
            return refusal(at, format!("its bytes, from {}, {how} {before}, which end at {end}", tensor.at));
        }
        end += tensor.len as u64;
        before = format!("`{}`", shown(&tensor.name));
    }
    if end != file_len {
        return refusal("the end", format!("{} bytes belong to no tensor", file_len - end));
    }
    let mut names: Vec<&str> = listed.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return refusal(format!("tensor `{}`", shown(pair[0])), "its name is there twice");
    }
    Ok(listed)
}

/// The beginning of a text out of a file, safe to print.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(120).flat_map(char::escape_debug).collect()
}
