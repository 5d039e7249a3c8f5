//! From a name to a checked file: the lock, the cache, then the hub.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Wanted;
use super::cache::{OnDisk, Promise, RepoCache};
use super::client::{HttpHub, Hub, HubFile, Remote};
use super::download::{Download, UNANNOUNCED, patiently};
use super::error::{HubError, Result};
use super::file_format;
use super::lock::{Lock, PIN_HINT, Pin};
use super::names;
use super::registry::{self, NamedWeights};
use super::settings::Settings;

/// Where the bytes came from this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Origin {
    /// They lay in the cache.
    Cache,
    /// They were downloaded.
    Hub,
}

/// A file that may be used: its sha256 was checked by this process.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    /// The entry of the table.
    pub(crate) weights: &'static NamedWeights,
    /// The file in the cache.
    pub(crate) path: PathBuf,
    /// What it is pinned to now.
    pub(crate) pin: Pin,
    /// Where it came from.
    pub(crate) origin: Origin,
    /// Whether the lock file changed: the name was trusted for the first time, or anew.
    pub(crate) newly_pinned: bool,
}

/// The file that `wanted` names, from the cache or the hub, checked; the lock file `lock` says which bytes those are, or
/// is told.
///
/// # Errors
/// Everything of [`HubError`].
pub(crate) fn fetch(wanted: &Wanted<'_>, lock: &Path, settings: &Settings) -> Result<Fetched> {
    fetch_from(wanted, lock, settings, &HttpHub::new(settings)?)
}

fn fetch_from(wanted: &Wanted<'_>, lock: &Path, settings: &Settings, hub: &dyn Hub) -> Result<Fetched> {
    let weights = registry::named(wanted.name)?;
    let mut lock_file = Lock::read(lock)?;
    let plan = Plan::new(weights, wanted, &lock_file, lock)?;
    if plan.by.is_none() {
        lock_file.check_writable()?;
    }
    let cache = RepoCache::new(&settings.cache, &plan.file);
    let (found, origin) = match plan.in_cache(&cache, settings)? {
        Some(found) => (found, Origin::Cache),
        None => plan.as_served(&cache, settings, hub)?,
    };
    file_format::check(&found.path, &weights.file)?;
    let pin = Pin {
        repo: weights.repo.clone(),
        file: weights.file.clone(),
        revision: plan.revision,
        commit: found.commit,
        sha256: found.sha256,
        size: found.size,
    };
    let newly_pinned = lock_file.record(&weights.name, &pin, plan.replace)?;
    Ok(Fetched { weights, path: found.path, pin, origin, newly_pinned })
}

/// A checked file of a commit.
struct Found {
    path: PathBuf,
    commit: String,
    sha256: String,
    size: u64,
}

/// What is asked for, and what it must be.
struct Plan {
    /// At the pinned commit, else at the revision.
    file: HubFile,
    /// Branch, tag or commit as somebody named it.
    revision: String,
    commit: Option<String>,
    sha256: Option<String>,
    size: Option<u64>,
    /// The lock file, when it says so.
    by: Option<String>,
    /// Whether the lock's entry is to be written anew.
    replace: bool,
}

impl Plan {
    /// `--revision` and a sha256 of the recipe or the table win over the lock; else the lock says what is fetched.
    fn new(weights: &NamedWeights, wanted: &Wanted<'_>, lock: &Lock, lock_path: &Path) -> Result<Self> {
        let sha256 = wanted.sha256.or(weights.sha256.as_deref()).map(names::sha256).transpose()?;
        let asked = wanted.revision.or(weights.revision.as_deref());
        let old = lock.get(&weights.name);
        let holds = |pin: &&Pin| {
            let same_revision = asked.is_none_or(|r| r == pin.revision || r == pin.commit);
            same_revision && sha256.as_ref().is_none_or(|s| *s == pin.sha256) && !wanted.pin_anew
        };
        if let Some(pin) = old.filter(holds) {
            for (field, found, expected) in [("repo", &weights.repo, &pin.repo), ("file", &weights.file, &pin.file)] {
                if found != expected {
                    return Err(HubError::Pinned {
                        what: weights.name.clone(),
                        field,
                        found: found.clone(),
                        expected: expected.clone(),
                        by: format!("`{}`", lock_path.display()),
                        hint: PIN_HINT,
                    });
                }
            }
            return Ok(Self {
                file: HubFile::new(&pin.repo, &pin.file, &pin.commit)?,
                revision: pin.revision.clone(),
                commit: Some(pin.commit.clone()),
                sha256: Some(pin.sha256.clone()),
                size: Some(pin.size),
                by: Some(format!("`{}`", lock_path.display())),
                replace: false,
            });
        }
        let revision = asked.unwrap_or("main").to_string();
        Ok(Self {
            file: HubFile::new(&weights.repo, &weights.file, &revision)?,
            commit: names::is_commit(&revision).then(|| revision.clone()),
            revision,
            sha256,
            size: None,
            by: None,
            replace: old.is_some(),
        })
    }

    fn pinned(&self, field: &'static str, found: &str, expected: &str) -> HubError {
        HubError::Pinned {
            what: self.file.what(),
            field,
            found: found.into(),
            expected: expected.into(),
            by: self.by.clone().unwrap_or_else(|| "the request".into()),
            hint: if self.by.is_some() { PIN_HINT } else { "mend the sha256 or the revision that was asked for" },
        }
    }

    /// The file where the cache holds it and it may be used without asking: at a pinned commit, or offline.
    fn in_cache(&self, cache: &RepoCache, settings: &Settings) -> Result<Option<Found>> {
        let recalled = || cache.reference(self.file.revision()).filter(|_| settings.offline.is_some());
        let commit = self.commit.clone().or_else(recalled);
        let path = commit.as_ref().map(|commit| cache.snapshot(commit, self.file.file()));
        let on_disk = path.as_deref().map(OnDisk::of).transpose()?.flatten();
        let (Some(commit), Some(path), Some(found)) = (commit, path, on_disk) else {
            return match settings.offline {
                Some(why) => Err(HubError::Offline { what: self.file.what(), cache: settings.cache.clone(), why }),
                None => Ok(None),
            };
        };
        let pinned = self.sha256.as_ref().map(|expected| Promise {
            kind: "sha256",
            found: found.sha256.clone(),
            expected: expected.clone(),
        });
        let Some(broken) = pinned.or_else(|| found.promise.clone()).filter(|promise| !promise.is_kept()) else {
            return Ok(Some(Found { path, commit, sha256: found.sha256, size: found.size }));
        };
        let Promise { kind, found: hash, expected } = broken;
        if found.is_whole() && found.promise.is_some() {
            // Sound bytes, but others than were pinned: the same commit cannot give them again.
            return Err(self.pinned(kind, &hash, &expected));
        }
        let damaged = HubError::Content {
            what: self.file.what(),
            place: path,
            field: kind,
            found: hash,
            expected,
            hint: "the file was damaged on disk; without HF_HUB_OFFLINE it is downloaded again",
        };
        if settings.offline.is_some() {
            return Err(damaged);
        }
        log::warn!("{damaged}");
        Ok(None)
    }

    /// The file as the hub serves it, if that is what it must be.
    fn as_served(&self, cache: &RepoCache, settings: &Settings, hub: &dyn Hub) -> Result<(Found, Origin)> {
        let remote = patiently(&settings.patience, || hub.describe(&self.file))?;
        if let Some(expected) = self.commit.as_ref().filter(|c| **c != remote.commit) {
            return Err(self.pinned("commit", &remote.commit, expected));
        }
        let served = names::is_sha256(&remote.blob).then_some(&remote.blob);
        if let (Some(served), Some(expected)) = (served, &self.sha256)
            && served != expected
        {
            return Err(self.pinned("sha256", served, expected));
        }
        if let (Some(served), Some(expected)) = (remote.size, self.size)
            && served != expected
        {
            return Err(self.pinned("size", &served.to_string(), &expected.to_string()));
        }
        let sha256 = self.sha256.as_ref().or(served);
        let size = self.size.or(remote.size);
        let whole = |found: &OnDisk| match sha256 {
            Some(expected) => found.sha256 == *expected,
            None => found.is_whole(),
        };
        // All there under its name: a cache that may only be read serves it too.
        let path = cache.snapshot(&remote.commit, self.file.file());
        if let Some(found) = OnDisk::named(&path, &remote.blob)?.filter(whole) {
            self.remember(cache, &remote.commit);
            return Ok((Found { path, commit: remote.commit, sha256: found.sha256, size: found.size }, Origin::Cache));
        }
        // Held until the file has its name, so that a second process finds it.
        let _held = cache.hold(&self.file, &remote.blob, settings.patience.held)?;
        let blob = cache.blob(&remote.blob);
        let (sha256, size, origin) = match OnDisk::of(&blob)?.filter(whole) {
            Some(found) => (found.sha256, found.size, Origin::Cache),
            None => {
                let (file, sha256, patience) = (&self.file, sha256.map(String::as_str), settings.patience);
                let unannounced = UNANNOUNCED;
                let done = Download { hub, file, remote: &remote, sha256, size, unannounced, cache, patience }.run()?;
                (done.sha256, done.size, Origin::Hub)
            }
        };
        let Remote { commit, blob, .. } = remote;
        let path = cache.link(&commit, self.file.file(), &blob)?;
        self.remember(cache, &commit);
        Ok((Found { path, commit, sha256, size }, origin))
    }

    /// Writes down what the revision stands for. Only a fetch offline and without a lock file ever asks for it, so that a
    /// cache that cannot be written is no reason to stop.
    fn remember(&self, cache: &RepoCache, commit: &str) {
        if let Err(error) = cache.set_reference(&self.revision, commit) {
            log::warn!("the cache does not learn that {} is commit {commit}: {error}", self.revision);
        }
    }
}
