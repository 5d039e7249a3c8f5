//! Named weights: a table of them, the HF hub they come from, the cache they lie in, and the lock file that says which
//! bytes a name means.
//!
//! What the hf-hub crate does here, and what it does not. Version 0.5.0 with its blocking client is taken: 19 crates
//! beside what the program has anyway, a minute of one core; 1.0.0 would bring an asynchronous runtime, its own
//! chunk store and four times the crates. It gives addresses ([`client`]) and the folders of the cache that Python's
//! huggingface_hub shares ([`cache`]). Its own download is not called. It cannot be wrapped, since it decides inside: it
//! writes where an ETag says, also outside the cache; it sends its token on to the host of a redirect; it waits without
//! end for an answer; it takes a body that is short or damaged; it continues whatever lies there as a partial file. The
//! test `what_hf_hub_alone_does` keeps that list true. Requests are therefore made with `ureq`, the HTTP library
//! underneath hf-hub, in the same copy.
//!
//! What is promised:
//! - No byte is used whose hash was not compared, in this process, with the sha256 of the lock, the table, the recipe, or
//!   on first use with the hub's own ETag: a sha256, or the id of a git blob for files of a few kilobytes.
//! - A file appears under its name whole or not at all; a failed fetch leaves the cache as usable as before.
//! - Every wait ends: for a name, a connection, an answer, a body that stands still or drips, another process.
//! - The token goes to the hub's own host over https (or to this machine), and is shown nowhere.
//! - `HF_HUB_OFFLINE` opens no connection.

pub(crate) mod error;
pub(crate) mod file_format;
pub(crate) mod guard;
pub(crate) mod lock;
mod names;
pub(crate) mod registry;
pub(crate) mod settings;

#[cfg(feature = "hub")]
mod address;
#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod fetch;

use std::path::{Path, PathBuf};

pub(crate) use error::{HubError, Result};
#[cfg(feature = "hub")]
pub(crate) use fetch::{Fetched, Origin, fetch};

/// A named weight file as a recipe or the command line asks for it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// Name in the table, a repository of it, or, for [`resolve`], the path of a file.
    pub(crate) name: &'a str,
    /// Branch, tag or commit; wins over the table and over a lock that was made from another.
    pub(crate) revision: Option<&'a str>,
    /// sha256 that the file must have; wins over the table and the lock.
    pub(crate) sha256: Option<&'a str>,
    /// Ask the hub again, and write what it says into the lock: what `--revision` means on the command line.
    pub(crate) pin_anew: bool,
}

impl Wanted<'_> {
    /// Checks that revision and sha256 can be meant, without asking anybody.
    ///
    /// # Errors
    /// `Config` with the one that cannot.
    pub(crate) fn check(&self) -> Result<()> {
        self.revision.map_or(Ok(()), names::revision)?;
        self.sha256.map_or(Ok(()), |sha256| names::sha256(sha256).map(drop))
    }
}

/// The weight file that `wanted` names: fetched if the table knows the name, else the file at that path. Its format and,
/// where one is known, its sha256 are checked.
///
/// # Errors
/// Everything of [`HubError`]; [`HubError::coded`] gives the exit code.
pub(crate) fn resolve(wanted: &Wanted<'_>, lock: &Path) -> Result<PathBuf> {
    if registry::find(wanted.name).is_some() {
        return fetch_named(wanted, lock);
    }
    let path = Path::new(wanted.name);
    if !path.is_file() {
        // A name with a typing error is told the nearest one; what looks like a path is missed as a file.
        let is_path =
            path.is_absolute() || wanted.name.starts_with('.') || path.extension().is_some_and(is_weight_file);
        return if is_path {
            Err(HubError::NoFile { path: path.to_path_buf() })
        } else {
            registry::named(wanted.name).map(|_| path.to_path_buf())
        };
    }
    check_file(wanted, path)?;
    file_format::check(path, wanted.name)?;
    Ok(path.to_path_buf())
}

/// Checks that the file at `path` is the one `wanted`: its sha256, and that no revision is asked of it.
///
/// # Errors
/// `Config` for a revision, which only the hub has; `Content` for other bytes.
pub(crate) fn check_file(wanted: &Wanted<'_>, path: &Path) -> Result<()> {
    wanted.check()?;
    if let Some(revision) = wanted.revision {
        return Err(HubError::Config {
            what: format!("revision of `{}`", path.display()),
            found: format!("`{}`", names::shown(revision)),
            expected: "none, since it is a file".into(),
            hint: "a name of `cargo xtask weights list` has revisions; a file may be held to its sha256".into(),
        });
    }
    let Some(expected) = wanted.sha256.map(names::sha256).transpose()? else { return Ok(()) };
    let found = sha256_of(path)?;
    if found == expected {
        return Ok(());
    }
    Err(HubError::Content {
        what: "weight file".into(),
        place: path.to_path_buf(),
        field: "sha256",
        found,
        expected,
        hint: "take the file the recipe was written for, or mend the sha256 that was asked for",
    })
}

fn is_weight_file(extension: &std::ffi::OsStr) -> bool {
    ["safetensors", "bin", "ckpt", "pt", "pth"].iter().any(|e| extension.eq_ignore_ascii_case(e))
}

fn sha256_of(path: &Path) -> Result<String> {
    use sha2::Digest;
    let mut hasher = sha2::Sha256::new();
    std::io::copy(&mut fs_err::File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(feature = "hub")]
fn fetch_named(wanted: &Wanted<'_>, lock: &Path) -> Result<PathBuf> {
    Ok(fetch(wanted, lock, &settings::Settings::from_env()?)?.path)
}

#[cfg(not(feature = "hub"))]
fn fetch_named(wanted: &Wanted<'_>, _lock: &Path) -> Result<PathBuf> {
    Err(HubError::Offline {
        what: wanted.name.to_string(),
        cache: settings::Settings::from_env()?.cache,
        why: "this program was built without the feature `hub`",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_taken_as_it_is_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let name = path.to_str().unwrap();
        let lock = dir.path().join("weights.lock");
        let wanted = Wanted { name, ..Wanted::default() };
        assert!(matches!(resolve(&wanted, &lock), Err(HubError::NoFile { .. })));
        fs_err::write(&path, [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
        assert_eq!(resolve(&wanted, &lock).unwrap(), path);
        let sha256 = sha256_of(&path).unwrap();
        assert_eq!(resolve(&Wanted { sha256: Some(&sha256), ..wanted }, &lock).unwrap(), path);
        let other = "5".repeat(64);
        let error = resolve(&Wanted { sha256: Some(&other), ..wanted }, &lock).unwrap_err();
        assert!(matches!(error, HubError::Content { .. }), "{error}");
        fs_err::write(&path, b"PK\x03\x04aaaaaaaaaaaaa").unwrap();
        let error = resolve(&wanted, &lock).unwrap_err().to_string();
        assert!(error.contains("zip") && error.contains("weights import"), "{error}");
        assert!(!lock.exists());
    }

    #[test]
    fn exit_codes_tell_settings_from_files() {
        let lock = Path::new("weights.lock");
        let code = |name: &str| {
            crate::exit::code_of(&resolve(&Wanted { name, ..Wanted::default() }, lock).unwrap_err().coded())
        };
        assert_eq!(code("timm/resnet3"), crate::exit::USAGE);
        assert_eq!(code("no/such/file.safetensors"), crate::exit::UNAVAILABLE);
        assert_eq!(code("./nothing"), crate::exit::UNAVAILABLE);
    }
}
