//! The lock file that a user keeps beside a recipe: what every name resolved to when it was first fetched.
//!
//! Trust on first use: the first fetch takes what the hub serves and writes down commit, sha256 and size; from then on
//! nothing else is taken. The first fetch itself is as trustworthy as the hub and the connection to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use segdistill_eval::table::write_atomic;

use super::error::{HubError, Result};
use super::names;

/// Name of the file where nobody gives another one.
pub(crate) const DEFAULT: &str = "weights.lock";

/// Most bytes a lock file may have: some thousand entries.
const MAX_BYTES: u64 = 1 << 20;

const HEADER: &str = "\
# Written by `cargo xtask weights fetch`: what each name resolved to when it was first fetched. Keep this file beside the
# recipe: later fetches take these commits and bytes and nothing else. `--revision` pins a name anew.
";

/// What a name resolved to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pin {
    /// Repository.
    pub(crate) repo: String,
    /// File in it.
    pub(crate) file: String,
    /// What was asked for: a branch, tag or commit.
    pub(crate) revision: String,
    /// Commit it resolved to.
    pub(crate) commit: String,
    /// sha256 of the file.
    pub(crate) sha256: String,
    /// Its bytes.
    pub(crate) size: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    #[serde(default)]
    weights: BTreeMap<String, Pin>,
}

/// A lock file as it was read.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    weights: BTreeMap<String, Pin>,
}

impl Lock {
    /// Reads a lock file; one that is not there is empty.
    ///
    /// # Errors
    /// `Config` for anything but a lock file whose names and hashes can be meant; `LockFile` with what the disk says.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let refused = |found: String| HubError::Config {
            what: format!("lock file `{}`", path.display()),
            found,
            expected: "a file that `weights fetch` wrote".into(),
            hint: "take the file from version control, or remove it to trust the hub anew".into(),
        };
        let weights = match fs_err::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(unusable(path, &e)),
            Ok(meta) if !meta.is_file() => return Err(refused("no regular file".into())),
            Ok(meta) if meta.len() > MAX_BYTES => return Err(refused(format!("{} bytes", meta.len()))),
            Ok(_) => {
                let text = fs_err::read_to_string(path).map_err(|e| unusable(path, &e))?;
                let contents: Contents = toml::from_str(&text).map_err(|e| refused(e.message().to_string()))?;
                if contents.version != 1 {
                    return Err(refused(format!("version {}", contents.version)));
                }
                contents.weights
            }
        };
        for (name, pin) in &weights {
            names::repo(&pin.repo).and(names::file(&pin.file)).and(names::revision(&pin.revision))?;
            if !names::is_commit(&pin.commit) || !names::is_sha256(&pin.sha256) {
                return Err(refused(format!("commit or sha256 of `{}` that is none", names::shown(name))));
            }
        }
        Ok(Self { path: path.to_path_buf(), weights })
    }

    /// What `name` is pinned to.
    pub(crate) fn get(&self, name: &str) -> Option<&Pin> {
        self.weights.get(name)
    }

    /// Checks that the file could be written, before anything is downloaded for its sake.
    ///
    /// # Errors
    /// `LockFile` with what the disk says.
    pub(crate) fn check_writable(&self) -> Result<()> {
        let probe = self.folder().join(format!(".weights-lock-{}", std::process::id()));
        let made = fs_err::create_dir_all(self.folder())
            .and_then(|()| fs_err::OpenOptions::new().write(true).create_new(true).open(&probe));
        match made {
            // A process of the same number that was killed here could write.
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(unusable(&self.path, &e)),
            _ => fs_err::remove_file(&probe).map_err(|e| unusable(&self.path, &e)),
        }
    }

    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    /// Writes down what `name` resolved to; returns whether the file changed. The file is read again first, under a lock,
    /// so that two processes lose no entry of each other.
    ///
    /// # Errors
    /// `LockFile` with what the disk says; `Pinned` when another process has meanwhile pinned it to something else and `replace` is not set.
    pub(crate) fn record(&mut self, name: &str, pin: &Pin, replace: bool) -> Result<bool> {
        let unusable = |e: std::io::Error| unusable(&self.path, &e);
        fs_err::create_dir_all(self.folder()).map_err(unusable)?;
        let _held = hold_folder(self.folder()).map_err(unusable)?;
        self.weights = Self::read(&self.path)?.weights;
        match self.weights.get(name) {
            Some(old) if old == pin => return Ok(false),
            Some(old) if !replace => {
                let (field, found, expected) = difference(pin, old);
                return Err(HubError::Pinned {
                    what: name.to_string(),
                    field,
                    found: found.to_string(),
                    expected: expected.to_string(),
                    by: format!("`{}`", self.path.display()),
                    hint: PIN_HINT,
                });
            }
            _ => {}
        }
        self.weights.insert(name.to_string(), pin.clone());
        let contents = Contents { version: 1, weights: self.weights.clone() };
        let text = toml::to_string(&contents).map_err(std::io::Error::other)?;
        write_atomic(&self.path, format!("{HEADER}{text}").as_bytes())
            .map_err(|e| unusable(std::io::Error::other(e)))?;
        Ok(true)
    }
}

/// An error of the disk with the path of the lock file, whichever step it befell.
fn unusable(path: &Path, error: &std::io::Error) -> HubError {
    HubError::LockFile { path: path.to_path_buf(), reason: error.to_string() }
}

/// Way out of a difference from the lock.
pub(crate) const PIN_HINT: &str = "the lock says what was trusted first; pin anew with `weights fetch NAME --revision main` only if the change is known";

/// First field in which two pins differ, as (name, new, old).
fn difference<'a>(new: &'a Pin, old: &'a Pin) -> (&'static str, &'a str, &'a str) {
    let fields = [
        ("repo", &new.repo, &old.repo),
        ("file", &new.file, &old.file),
        ("commit", &new.commit, &old.commit),
        ("sha256", &new.sha256, &old.sha256),
        ("revision", &new.revision, &old.revision),
    ];
    // Bytes of one sha256 have one size.
    let differs = fields.into_iter().find(|(_, new, old)| new != old);
    differs.map_or(("size", "another", "one"), |(field, new, old)| (field, new.as_str(), old.as_str()))
}

/// Keeps other processes of this program from rewriting lock files in `folder`. Advisory, and gone with the process.
fn hold_folder(folder: &Path) -> std::io::Result<Option<std::fs::File>> {
    if !cfg!(unix) {
        return Ok(None);
    }
    let file = fs_err::File::open(folder)?.into_file();
    let started = Instant::now();
    // Held for milliseconds at a time; a file system without locks is no reason to stop.
    while let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        if started.elapsed() > Duration::from_secs(20) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(digit: &str) -> Pin {
        Pin {
            repo: "timm/resnet34.tv_in1k".into(),
            file: "model.safetensors".into(),
            revision: "main".into(),
            commit: digit.repeat(40),
            sha256: digit.repeat(64),
            size: 5,
        }
    }

    #[test]
    fn what_was_recorded_is_read_back_and_not_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/weights.lock");
        let mut lock = Lock::read(&path).unwrap();
        assert_eq!(lock.get("a"), None);
        assert!(lock.record("a", &pin("1"), false).unwrap());
        assert!(!lock.record("a", &pin("1"), false).unwrap());
        let error = lock.record("a", &pin("2"), false).unwrap_err().to_string();
        assert!(
            error.contains("commit") && error.contains(&"2".repeat(40)) && error.contains(&"1".repeat(40)),
            "{error}"
        );
        assert!(lock.record("a", &pin("2"), true).unwrap());
        let text = fs_err::read_to_string(&path).unwrap();
        assert!(text.starts_with(HEADER), "{text}");
        assert_eq!(Lock::read(&path).unwrap().get("a"), Some(&pin("2")));
        let left: Vec<_> = fs_err::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn entries_of_two_processes_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.lock");
        let [mut one, mut other] = [(); 2].map(|()| Lock::read(&path).unwrap());
        one.record("a", &pin("1"), false).unwrap();
        other.record("b", &pin("2"), false).unwrap();
        assert!(one.record("b", &pin("3"), false).is_err(), "pinned by the other meanwhile");
        let both = Lock::read(&path).unwrap();
        assert_eq!((both.get("a"), both.get("b")), (Some(&pin("1")), Some(&pin("2"))));
    }

    #[test]
    fn a_lock_that_cannot_be_meant_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.lock");
        let good = format!("version = 1\n[weights.a]\n{}", toml::to_string(&pin("1")).unwrap());
        fs_err::write(&path, &good).unwrap();
        Lock::read(&path).unwrap();
        for (from, to) in [
            ("version = 1", "version = 2"),
            ("repo", "colour"),
            ("model.safetensors", "../../x"),
            ("timm/", "../"),
            (&"1".repeat(64), "none"),
            (&"1".repeat(64), &format!("{}x", "1".repeat(63))),
            ("size = 5", "size = -5"),
            ("\"main\"", "\"../main\""),
        ] {
            assert!(good.contains(from));
            fs_err::write(&path, good.replace(from, to)).unwrap();
            let error = Lock::read(&path).unwrap_err();
            assert!(matches!(error, HubError::Config { .. }), "{from}: {error}");
        }
        fs_err::write(&path, "\0".repeat(2 << 20)).unwrap();
        assert!(Lock::read(&path).unwrap_err().to_string().contains("2097152 bytes"));
        assert!(Lock::read(dir.path()).is_err(), "a folder");
    }
}
