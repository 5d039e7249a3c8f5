//! What a weight file is by its first bytes, whatever its name says.

use std::io::Read;
use std::path::Path;

use super::error::{HubError, Result};

/// Longest header a safetensors file may have, in bytes.
const MAX_HEADER: u64 = 100_000_000;

const IMPORT: &str = "a PyTorch file is read by `cargo xtask weights import`, which runs none of it";
const AGAIN: &str = "the file on the hub is not what the table says; look at it there";

/// Refuses a file whose first bytes are not those of its kind: of safetensors for `.safetensors`, of `torch.save` for
/// `.bin`, `.pt` and `.pth`. `name` carries the extension; other kinds pass.
///
/// # Errors
/// `Format` with what the bytes look like.
pub(crate) fn check(path: &Path, name: &str) -> Result<()> {
    let mut head = [0; 16];
    let mut file = fs_err::File::open(path)?;
    let size = file.metadata()?.len();
    let mut filled = 0;
    while filled < head.len() {
        match file.read(&mut head[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    let head = &head[..filled];
    let refused = |found, expected, hint| Err(HubError::Format { place: path.to_path_buf(), found, expected, hint });
    let looks = looks_like(head, size);
    match name.rsplit('.').next() {
        Some("safetensors") if looks != Looks::Safetensors => {
            let hint = if matches!(looks, Looks::Zip | Looks::Pickle) { IMPORT } else { AGAIN };
            refused(looks.text(), "a safetensors file", hint)
        }
        Some("bin" | "pt" | "pth") if !matches!(looks, Looks::Zip | Looks::Pickle) => {
            refused(looks.text(), "a file that torch.save wrote", AGAIN)
        }
        _ => Ok(()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looks {
    Safetensors,
    Zip,
    Pickle,
    Page,
    Pointer,
    Empty,
    Nothing,
}

impl Looks {
    fn text(self) -> &'static str {
        match self {
            Self::Safetensors => "a safetensors file",
            Self::Zip => "a zip archive, as torch.save writes",
            Self::Pickle => "a Python pickle",
            Self::Page => "a web page",
            Self::Pointer => "a Git LFS pointer, not the file it points to",
            Self::Empty => "empty",
            Self::Nothing => "of no known format",
        }
    }
}

fn looks_like(head: &[u8], size: u64) -> Looks {
    if head.is_empty() {
        return Looks::Empty;
    }
    // First: a header of 640 bytes begins as a pickle does.
    let length = head.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    if length.is_some_and(|l| l >= 2 && l <= MAX_HEADER.min(size - 8)) && head.get(8) == Some(&b'{') {
        return Looks::Safetensors;
    }
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return Looks::Zip;
    }
    if head[0] == 0x80 && head.get(1).is_some_and(|protocol| (1..=5).contains(protocol)) {
        return Looks::Pickle;
    }
    if head.starts_with(b"version https:/") {
        return Looks::Pointer;
    }
    if head.trim_ascii_start().starts_with(b"<") {
        return Looks::Page;
    }
    Looks::Nothing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_make_a_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let check = |bytes: &[u8], name: &str| {
            fs_err::write(&path, bytes).unwrap();
            check(&path, name).map_err(|e| e.to_string())
        };
        let good = [&2u64.to_le_bytes()[..], b"{}"].concat();
        check(&good, "model.safetensors").unwrap();
        check(&[&640u64.to_le_bytes()[..], b"{", &[b' '; 639]].concat(), "model.safetensors").unwrap();
        check(b"anything", "config.json").unwrap();
        for name in ["m.bin", "m.pt", "m.pth"] {
            check(b"PK\x03\x04....", name).unwrap();
            check(b"\x80\x02}q\x00.", name).unwrap();
            assert!(check(&good, name).unwrap_err().contains("a safetensors file, expected a file that torch.save"));
        }
        for (bytes, found) in [
            (&b"PK\x03\x04aaaaaaaaaaaa"[..], "zip archive"),
            (b"\x80\x02}q\x00.", "pickle"),
            (b"<!doctype html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
            (b"", "empty"),
            (b"\0", "no known format"),
            (&good[..9], "no known format"),
            (&[&(1u64 << 60).to_le_bytes()[..], b"{}"].concat(), "no known format"),
            (&[&3u64.to_le_bytes()[..], b"{}"].concat(), "no known format"),
        ] {
            let error = check(bytes, "model.safetensors").unwrap_err();
            assert!(error.contains(found) && error.contains("expected a safetensors file"), "{error}");
            assert_eq!(error.contains("weights import"), found == "zip archive" || found == "pickle", "{error}");
        }
    }
}
