//! The folder of one repository in the cache that huggingface_hub and we share, and what is on disk in it.
//!
//! ```text
//! models--ORG--NAME/blobs/HASH                     the bytes, named by what they are
//! models--ORG--NAME/blobs/HASH.incomplete          what has come of them so far
//! models--ORG--NAME/refs/main                      the commit that a branch stood for
//! models--ORG--NAME/snapshots/COMMIT/FILE          a link to the blob
//! .locks/models--ORG--NAME/HASH.lock               held while a blob is downloaded
//! ```
//! Names are hf-hub's; the link, the reference and the blob appear by renaming, so that a reader never sees half of one.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use segdistill_eval::table::write_atomic;
use sha2::{Digest, Sha256};

use super::client::HubFile;
use super::error::{HubError, Result};
use super::names;

/// Bytes read at a time.
pub(super) const CHUNK: usize = 1 << 18;

/// A sha256 in hexadecimal.
pub(super) fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Hash and length of what is in `file` from here on.
pub(super) fn digest(file: &mut impl Read) -> std::io::Result<(Sha256, u64)> {
    let (mut hasher, mut size, mut buffer) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((hasher, size)),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Id of the git blob that holds the bytes of `path`: how the hub names files that git itself keeps.
pub(super) fn git_id(path: &Path) -> std::io::Result<String> {
    let mut file = fs_err::File::open(path)?;
    let mut hasher = sha1::Sha1::new_with_prefix(format!("blob {}\0", file.metadata()?.len()));
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A hash that the bytes of a file should have, and the one they have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Promise {
    /// `sha256` or `git id`.
    pub(super) kind: &'static str,
    /// The hash of the bytes.
    pub(super) found: String,
    /// The hash they should have: the name of the blob.
    pub(super) expected: String,
}

impl Promise {
    /// What the blob called `name` promises of the bytes of `path`, whose sha256 is known; `None` for another name.
    pub(super) fn of(name: &str, path: &Path, sha256: &str) -> std::io::Result<Option<Self>> {
        let (kind, found) = match name {
            name if names::is_sha256(name) => ("sha256", sha256.to_string()),
            name if names::is_git_id(name) => ("git id", git_id(path)?),
            _ => return Ok(None),
        };
        Ok(Some(Self { kind, found, expected: name.to_string() }))
    }

    /// Whether the bytes are the promised ones.
    pub(super) fn is_kept(&self) -> bool {
        self.found == self.expected
    }
}

/// What a file on disk turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OnDisk {
    /// sha256.
    pub(super) sha256: String,
    /// Bytes.
    pub(super) size: u64,
    /// What the name of its blob promises.
    pub(super) promise: Option<Promise>,
}

impl OnDisk {
    /// Reads the whole file; `None` when there is none.
    pub(super) fn of(path: &Path) -> Result<Option<Self>> {
        // A blob may itself be a link, into the store that newer versions of huggingface_hub share between repositories:
        // its own name counts, not that of what it leads to.
        let name = |path: &Path| path.file_name().and_then(|n| names::blob(n.to_str()?));
        let blob = name(path).or_else(|| name(&fs_err::read_link(path).ok()?));
        Self::named(path, blob.as_deref().unwrap_or_default())
    }

    /// As [`OnDisk::of`], held to the blob called `blob` whatever its own name is.
    pub(super) fn named(path: &Path, blob: &str) -> Result<Option<Self>> {
        let mut file = match fs_err::File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let (hasher, size) = digest(&mut file)?;
        let sha256 = hex(hasher);
        let promise = Promise::of(blob, path, &sha256)?;
        Ok(Some(Self { sha256, size, promise }))
    }

    /// Whether the bytes are those its name promises, as far as it promises any.
    pub(super) fn is_whole(&self) -> bool {
        self.promise.as_ref().is_none_or(Promise::is_kept)
    }
}

/// One repository in the cache.
pub(super) struct RepoCache {
    root: PathBuf,
    folder: PathBuf,
    names: CacheRepo,
}

impl RepoCache {
    /// The folder of the repository of `file` in the cache `root`. Touches nothing.
    pub(super) fn new(root: &Path, file: &HubFile) -> Self {
        let repo = Repo::with_revision(file.repo().into(), RepoType::Model, file.revision().into());
        let folder = root.join(repo.folder_name());
        Self { root: root.to_path_buf(), folder, names: Cache::new(root.to_path_buf()).repo(repo) }
    }

    /// Where `file` of `commit` is, or will be.
    pub(super) fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        self.names.pointer_path(commit).join(file)
    }

    /// Where the blob called `name` is, or will be.
    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.names.blob_path(name)
    }

    /// What has come of a blob so far.
    pub(super) fn incomplete(&self, name: &str) -> PathBuf {
        self.names.blob_path(&format!("{name}.incomplete"))
    }

    /// The commit that a branch or tag stood for when it was last fetched.
    pub(super) fn reference(&self, revision: &str) -> Option<String> {
        let text = fs_err::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        names::is_commit(text.trim()).then(|| text.trim().to_string())
    }

    /// Writes down the commit that a branch or tag stands for.
    pub(super) fn set_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.reference(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        Ok(write_atomic(&path, commit.as_bytes()).map_err(std::io::Error::other)?)
    }

    /// Makes `file` of `commit` the blob called `name`; a link that pointed elsewhere is replaced.
    pub(super) fn link(&self, commit: &str, file: &str, name: &str) -> Result<PathBuf> {
        let link = self.snapshot(commit, file);
        let (blob, folder) = (self.blob(name), link.parent().unwrap_or(&self.folder));
        fs_err::create_dir_all(folder)?;
        // snapshots/COMMIT, then a step for each folder of the file.
        let up = "../".repeat(2 + file.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{name}"));
        if fs_err::read_link(&link).is_ok_and(|old| old == target) {
            return Ok(link);
        }
        let fresh = folder.join(format!(".{}.{name}.tmp", std::process::id()));
        // Left by a process of the same number that was killed here; none is the usual case.
        let _ = fs_err::remove_file(&fresh);
        #[cfg(unix)]
        {
            debug_assert!(blob.is_file());
            fs_err::os::unix::fs::symlink(&target, &fresh)?;
        }
        #[cfg(not(unix))]
        fs_err::copy(&blob, &fresh)?;
        fs_err::rename(&fresh, &link)?;
        Ok(link)
    }

    /// Holds the download of the blob called `name` for this process, as huggingface_hub does; freed when it is dropped.
    ///
    /// # Errors
    /// `Held` when another process keeps it for longer than `patience`.
    pub(super) fn hold(&self, file: &HubFile, name: &str, patience: Duration) -> Result<std::fs::File> {
        let folder = self.root.join(".locks").join(self.folder.file_name().unwrap_or_default());
        fs_err::create_dir_all(&folder)?;
        let path = folder.join(format!("{name}.lock"));
        let lock = fs_err::OpenOptions::new().create(true).append(true).open(&path)?.into_file();
        let started = Instant::now();
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(std::fs::TryLockError::WouldBlock) if started.elapsed() >= patience => {
                    return Err(HubError::Held { what: file.what(), lock: path, waited: patience });
                }
                Err(std::fs::TryLockError::WouldBlock) => {
                    if !told && started.elapsed() > Duration::from_secs(1) {
                        told = true;
                        log::warn!("another process is downloading {}; waiting for it", file.what());
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                // A file system without locks: two processes may download twice, and each checks what it got.
                Err(std::fs::TryLockError::Error(e)) => {
                    log::debug!("no lock on `{}`: {e}", path.display());
                    return Ok(lock);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache(root: &Path) -> RepoCache {
        RepoCache::new(root, &HubFile::new("org/name", "a/model.bin", "refs/pr/3").unwrap())
    }

    #[test]
    fn the_layout_is_the_shared_one_and_hf_hub_finds_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let repo = cache(root);
        let name = "5".repeat(64);
        assert_eq!(repo.blob(&name), root.join("models--org--name/blobs").join(&name));
        assert_eq!(repo.snapshot(COMMIT, "f"), root.join("models--org--name/snapshots").join(COMMIT).join("f"));
        fs_err::create_dir_all(repo.blob(&name).parent().unwrap()).unwrap();
        fs_err::write(repo.blob(&name), "bytes").unwrap();
        let link = repo.link(COMMIT, "a/model.bin", &name).unwrap();
        assert_eq!(fs_err::read_to_string(&link).unwrap(), "bytes");
        assert_eq!(fs_err::read_link(&link).unwrap(), PathBuf::from(format!("../../../blobs/{name}")));
        assert_eq!(repo.reference("refs/pr/3"), None);
        repo.set_reference("refs/pr/3", COMMIT).unwrap();
        assert_eq!(repo.reference("refs/pr/3").as_deref(), Some(COMMIT));
        let theirs = Repo::with_revision("org/name".into(), RepoType::Model, "refs/pr/3".into());
        assert_eq!(Cache::new(root.into()).repo(theirs).get("a/model.bin").unwrap(), link);
    }

    #[test]
    fn a_link_that_points_elsewhere_is_replaced_and_nothing_is_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let repo = cache(dir.path());
        let [old, new] = ["5", "6"].map(|d| d.repeat(64));
        fs_err::create_dir_all(repo.blob(&old).parent().unwrap()).unwrap();
        for name in [&old, &new] {
            fs_err::write(repo.blob(name), name).unwrap();
            let link = repo.link(COMMIT, "f", name).unwrap();
            assert_eq!(&fs_err::read_to_string(link).unwrap(), name);
        }
        assert_eq!(fs_err::read_dir(repo.snapshot(COMMIT, "")).unwrap().count(), 1);
    }

    #[test]
    fn a_blob_that_is_not_what_its_name_says_is_not_whole() {
        let dir = tempfile::tempdir().unwrap();
        let sha = hex(Sha256::new_with_prefix("bytes"));
        // As `git hash-object` has it.
        let git = "b6862c638cdf872a1946aeff705f4b4d90f71f41";
        for (name, whole) in [
            (sha.clone(), true),
            ("5".repeat(64), false),
            (git.into(), true),
            ("5".repeat(40), false),
            ("model.safetensors".into(), true),
        ] {
            let path = dir.path().join(&name);
            fs_err::write(&path, "bytes").unwrap();
            let found = OnDisk::of(&path).unwrap().unwrap();
            assert_eq!((found.is_whole(), found.size, &found.sha256), (whole, 5, &sha));
        }
        #[cfg(unix)]
        {
            // snapshot -> blob -> shared store, where names are hashes of another kind.
            let [blob, snapshot] = [&sha, "model.safetensors"].map(|name| dir.path().join("repo").join(name));
            fs_err::create_dir(dir.path().join("repo")).unwrap();
            fs_err::os::unix::fs::symlink(dir.path().join("5".repeat(64)), &blob).unwrap();
            fs_err::os::unix::fs::symlink(&blob, &snapshot).unwrap();
            for path in [&blob, &snapshot] {
                assert!(OnDisk::of(path).unwrap().unwrap().is_whole(), "{}", path.display());
            }
        }
        assert_eq!(OnDisk::of(&dir.path().join("none")).unwrap(), None);
        assert_eq!(OnDisk::of(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_download_is_held_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let repo = cache(dir.path());
        let file = HubFile::new("org/name", "f", "main").unwrap();
        let first = repo.hold(&file, "x", Duration::ZERO).unwrap();
        let error = repo.hold(&file, "x", Duration::from_millis(60)).unwrap_err();
        assert!(matches!(&error, HubError::Held { .. }) && error.to_string().contains("x.lock"), "{error}");
        drop(first);
        repo.hold(&file, "x", Duration::ZERO).unwrap();
    }
}
