//! What may stand in an address or become part of a path: repositories, files, revisions, commits, hashes.
//!
//! Everything a server or a file of the user names passes here first, so that no name can leave the cache's folder.

use super::error::{HubError, Result};

/// Longest name that is taken.
const MAX: usize = 200;

/// Foreign text for a message: escaped, at most 80 characters.
pub(crate) fn shown(text: &str) -> String {
    shown_up_to(text, 80)
}

/// Foreign text for a message: escaped, at most `n` characters.
pub(crate) fn shown_up_to(text: &str, n: usize) -> String {
    let mut out: String = text.chars().take(n).collect::<String>().escape_debug().collect();
    if text.chars().nth(n).is_some() {
        out += "...";
    }
    out
}

/// Whether `part` can be one component of a path and of an address.
fn plain(part: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '=');
    !part.is_empty() && part.len() <= MAX && part.chars().all(known) && !part.starts_with('.') && !part.ends_with('.')
}

fn refused(what: &str, found: &str, expected: &str) -> HubError {
    HubError::Config {
        what: what.into(),
        found: format!("`{}`", shown(found)),
        expected: expected.into(),
        hint: "nothing was asked for and nothing written".into(),
    }
}

/// A repository `ORG/NAME`.
///
/// # Errors
/// `Config` for anything else.
pub(crate) fn repo(name: &str) -> Result<()> {
    let fine = |part: &str| plain(part) && !part.contains("--") && !part.contains("..");
    match name.split('/').collect::<Vec<_>>()[..] {
        [org, name] if fine(org) && fine(name) => Ok(()),
        _ => Err(refused("repository", name, "ORG/NAME of letters, digits and ._-")),
    }
}

/// A file of a repository, perhaps in folders.
///
/// # Errors
/// `Config` for a path that could leave the repository, or a name that an address would need to quote.
pub(crate) fn file(name: &str) -> Result<()> {
    if name.len() <= MAX && name.split('/').all(plain) {
        return Ok(());
    }
    Err(refused("file", name, "a relative path of letters, digits and ._-"))
}

/// A branch, tag, commit or `refs/pr/N`.
///
/// # Errors
/// `Config` for anything else.
pub(crate) fn revision(name: &str) -> Result<()> {
    if name.len() <= MAX && name.split('/').all(|part| plain(part) && !part.contains("..")) {
        return Ok(());
    }
    Err(refused("revision", name, "a branch, tag or commit"))
}

/// Whether `text` is `n` lower-case hexadecimal digits.
fn hex(text: &str, n: usize) -> bool {
    text.len() == n && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Whether `text` is a whole commit id.
pub(crate) fn is_commit(text: &str) -> bool {
    hex(text, 40)
}

/// Whether `text` is a sha256 in lower case.
pub(crate) fn is_sha256(text: &str) -> bool {
    hex(text, 64)
}

/// A sha256 that somebody wrote, in lower case.
///
/// # Errors
/// `Config` for anything else.
pub(crate) fn sha256(text: &str) -> Result<String> {
    let lower = text.to_ascii_lowercase();
    if is_sha256(&lower) { Ok(lower) } else { Err(refused("sha256", text, "64 hexadecimal digits")) }
}

/// Whether `text` is the id of a git blob, in lower case.
pub(crate) fn is_git_id(text: &str) -> bool {
    hex(text, 40)
}

/// The name of a blob from an ETag, in lower case: a sha256 for large files, the id of a git blob for small ones.
pub(crate) fn blob(etag: &str) -> Option<String> {
    let inner = etag.trim();
    let inner = inner.strip_prefix("W/").unwrap_or(inner);
    let inner = inner.strip_prefix('"').and_then(|e| e.strip_suffix('"')).unwrap_or(inner).to_ascii_lowercase();
    (is_sha256(&inner) || is_git_id(&inner)).then_some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_their_folder_are_refused() {
        for good in ["timm/resnet34.tv_in1k", "smp-hub/mit_b0.imagenet"] {
            repo(good).unwrap();
        }
        for bad in
            ["", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "a--b/c", "a/b?x", "a/b%2f", "a\\b/c", "a/b c"]
        {
            assert!(repo(bad).is_err(), "{bad}");
        }
        for good in ["model.safetensors", "a/b/model.bin"] {
            file(good).unwrap();
        }
        for bad in ["", "/etc/passwd", "../x", "a/../x", "a//b", ".hidden", "a/./b", "a\\b", "x#y", "x\0", "x\n"] {
            assert!(file(bad).is_err(), "{bad:?}");
        }
        for good in ["main", "refs/pr/3", "v1.0", &"a".repeat(40)] {
            revision(good).unwrap();
        }
        for bad in ["", "../main", "a..b", "refs//x", "/x", "x/", "ma in"] {
            assert!(revision(bad).is_err(), "{bad}");
        }
        assert!(file(&"x".repeat(300)).is_err());
    }

    #[test]
    fn a_blob_is_named_by_hexadecimal_digits_only() {
        let (sha, git) = ("0123456789abcdef".repeat(4), "0".repeat(40));
        for etag in [sha.clone(), format!("\"{sha}\""), format!("W/\"{sha}\""), format!("\"{}\"", sha.to_uppercase())] {
            assert_eq!(blob(&etag).unwrap(), sha);
        }
        assert_eq!(blob(&format!("\"{git}\"")).unwrap(), git);
        for bad in ["", "\"\"", "../../x", &sha[1..], "\"../../../../tmp/x\"", &format!("{sha}/..")] {
            assert_eq!(blob(bad), None, "{bad}");
        }
        assert!(sha256(&sha.to_uppercase()).is_ok() && sha256(&git).is_err());
    }

    #[test]
    fn foreign_text_is_shown_on_one_short_line() {
        assert_eq!(shown("a\nb\u{1b}"), "a\\nb\\u{1b}");
        assert_eq!(shown(&"x".repeat(100)).len(), 83);
    }
}
