//! One blob from the hub into the cache: tried again, continued, bounded, and hashed before it gets its name.

use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::cache::{self, CHUNK, Promise, RepoCache};
use super::client::{Hub, HubFile, Opened, Remote};
use super::error::{HubError, Result};
use super::file_format;
use super::settings::Patience;
use crate::progress::Progress;

/// Bytes after which a broken download counts as one that gets on: its tries begin anew.
const GETS_ON: u64 = 1 << 20;
/// Most tries of one download, also of one that gets on.
const MAX_TRIES: u32 = 100;
/// Most bytes that are taken of a body when nobody has said how long it is.
pub(super) const UNANNOUNCED: u64 = 1 << 30;

/// Runs `step` until it succeeds, fails for good, or has failed for a while too often.
pub(super) fn patiently<T>(patience: &Patience, mut step: impl FnMut() -> Result<T>) -> Result<T> {
    let mut failed = 0;
    loop {
        match step() {
            Err(error) if error.is_transient() => {
                failed += 1;
                pause(patience, failed, error)?;
            }
            done => return done,
        }
    }
}

/// Waits before the next try; `error` itself when there is to be none.
fn pause(patience: &Patience, failed: u32, error: HubError) -> Result<()> {
    let asked = error.retry_after();
    if failed > patience.retries || asked.is_some_and(|wait| wait > patience.longest_pause) {
        return Err(error);
    }
    let wait = asked.unwrap_or_default().max(patience.pause(failed));
    log::info!("try {} in {wait:?}: {error}", failed + 1);
    std::thread::sleep(wait);
    Ok(())
}

/// A blob that is in the cache now.
pub(super) struct Downloaded {
    /// Its sha256.
    pub(super) sha256: String,
    /// Its bytes.
    pub(super) size: u64,
}

/// One download, held by this process.
pub(super) struct Download<'a> {
    /// Where it comes from.
    pub(super) hub: &'a dyn Hub,
    /// What was asked for.
    pub(super) file: &'a HubFile,
    /// What the hub says it is.
    pub(super) remote: &'a Remote,
    /// sha256 that it must have, where one is known; else the name of the blob says its hash.
    pub(super) sha256: Option<&'a str>,
    /// Bytes that it must have, where they are known.
    pub(super) size: Option<u64>,
    /// Most bytes that it may have where they are not: [`UNANNOUNCED`].
    pub(super) unannounced: u64,
    /// Where it goes.
    pub(super) cache: &'a RepoCache,
    /// How long, how often.
    pub(super) patience: Patience,
}

impl Download<'_> {
    /// Downloads, checks and names the blob. What was kept of an earlier download is continued: the hash tells afterwards
    /// whether it belonged to it; if it did not, the download begins once more.
    ///
    /// # Errors
    /// What the hub says, after the last try; `Content` and `Format` for bytes that are not the promised ones. What has
    /// come of a broken download stays for the next one; what is wrong is removed.
    pub(super) fn run(&self) -> Result<Downloaded> {
        let mut partial = Partial::open(self.cache.incomplete(&self.remote.blob))?;
        if self.size.is_some_and(|size| partial.len > size) {
            partial.restart()?;
        }
        let mut inherited = partial.len > 0;
        let units = self.size.unwrap_or(0).div_ceil(1024);
        let mut progress = Progress::new(self.file.file(), units, "KiB");
        if inherited {
            progress.note(&format!("continues at {} KiB", partial.len / 1024));
        }
        loop {
            let received = self.receive(&mut partial, &mut progress);
            let checked = received.and_then(|()| self.check(&partial));
            match checked {
                Ok(sha256) => {
                    progress.finish();
                    let size = partial.len;
                    partial.publish(self.cache.blob(&self.remote.blob))?;
                    return Ok(Downloaded { sha256, size });
                }
                Err(HubError::Content { .. }) if inherited => {
                    progress.note("what was kept was not of this file: from the beginning");
                    partial.restart()?;
                    inherited = false;
                }
                Err(error) => {
                    if partial.len == 0 || matches!(error, HubError::Content { .. } | HubError::Format { .. }) {
                        partial.remove()?;
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Receives bytes until the body has ended, continuing where it broke.
    fn receive(&self, partial: &mut Partial, progress: &mut Progress) -> Result<()> {
        let (mut failed, mut tries, mut mark) = (0, 0, partial.len);
        // A whole file that was never named, by a process that was ended then.
        while self.size.is_none_or(|size| partial.len < size) || partial.len == 0 {
            let opened = self.hub.open(self.file, self.remote, partial.len);
            let Err(error) = opened.and_then(|opened| self.pour(opened, partial, progress)) else { return Ok(()) };
            tries += 1;
            if !error.is_transient() || tries >= MAX_TRIES {
                return Err(error);
            }
            if partial.len >= mark.saturating_add(GETS_ON) {
                failed = 0;
            }
            // What came at most: a server that begins anew each time does not get on by ending sooner before.
            mark = mark.max(partial.len);
            failed += 1;
            pause(&self.patience, failed, error)?;
        }
        Ok(())
    }

    /// One body into the file.
    fn pour(&self, mut opened: Opened<'_>, partial: &mut Partial, progress: &mut Progress) -> Result<()> {
        if let (Some(total), Some(size)) = (opened.total, self.size)
            && total != size
        {
            return Err(self.content(
                "size",
                total.to_string(),
                size.to_string(),
                "the hub contradicts itself; try again later",
            ));
        }
        if opened.from != partial.len {
            partial.restart()?;
        }
        let announced = self.size.or(opened.total);
        let most = announced.unwrap_or(self.unannounced);
        let mut buffer = vec![0; CHUNK];
        let (mut window, mut in_window) = (Instant::now(), 0);
        loop {
            let n = (opened.bytes)(&mut buffer)?;
            if n == 0 {
                break;
            }
            partial.push(&buffer[..n])?;
            if partial.len > most {
                let expected = match announced {
                    Some(size) => size.to_string(),
                    None => format!("at most {most} where the hub does not say how many"),
                };
                let hint = "the hub sends more than the file; try again later";
                return Err(self.content("size", format!("more than {most}"), expected, hint));
            }
            progress.set(partial.len / 1024, String::new);
            in_window += n as u64;
            if window.elapsed() >= self.patience.stall {
                let done = announced == Some(partial.len);
                if in_window < self.patience.least_bytes && !done {
                    let waited = format!("only {in_window} bytes came within {:?}", window.elapsed());
                    return Err(HubError::Timeout { what: self.file.what(), url: self.file.repo().into(), waited });
                }
                (window, in_window) = (Instant::now(), 0);
            }
        }
        match announced {
            Some(size) if partial.len < size => Err(HubError::Network {
                what: self.file.what(),
                url: self.file.repo().into(),
                reason: format!("the body ended after {} of {size} bytes", partial.len),
            }),
            _ => Ok(()),
        }
    }

    /// Hash and format of what has come.
    fn check(&self, partial: &Partial) -> Result<String> {
        let sha256 = cache::hex(partial.hasher.clone());
        let promise = Promise::of(self.sha256.unwrap_or(&self.remote.blob), &partial.path, &sha256)?;
        if let Some(Promise { kind, found, expected }) = promise.filter(|promise| !promise.is_kept()) {
            let hint = "the file was damaged on its way, or is another one; nothing of it was kept, so try again";
            return Err(self.content(kind, found, expected, hint));
        }
        file_format::check(&partial.path, self.file.file())?;
        Ok(sha256)
    }

    fn content(&self, field: &'static str, found: String, expected: String, hint: &'static str) -> HubError {
        HubError::Content {
            what: self.file.what(),
            place: self.cache.incomplete(&self.remote.blob),
            field,
            found,
            expected,
            hint,
        }
    }
}

/// A blob that has not got its name yet, and the hash of what is in it.
struct Partial {
    path: PathBuf,
    file: fs_err::File,
    hasher: Sha256,
    len: u64,
}

impl Partial {
    fn open(path: PathBuf) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs_err::create_dir_all(folder)?;
        }
        // A link put in its place would be written through.
        if fs_err::symlink_metadata(&path).is_ok_and(|meta| !meta.is_file()) {
            fs_err::remove_file(&path)?;
        }
        let options = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = options?;
        let (hasher, len) = cache::digest(&mut file)?;
        Ok(Self { path, file, hasher, len })
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hasher, self.len) = (Sha256::new(), 0);
        Ok(())
    }

    fn remove(self) -> Result<()> {
        Ok(fs_err::remove_file(&self.path)?)
    }

    /// On disk first, then under its name, then the name on disk.
    fn publish(self, blob: PathBuf) -> Result<()> {
        self.file.sync_all()?;
        fs_err::rename(&self.path, &blob)?;
        if let Some(folder) = blob.parent().filter(|_| cfg!(unix)) {
            fs_err::File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;
    use std::time::Duration;

    use super::super::address::Address;
    use super::*;

    /// A hub whose every body is zeros: `body` says how many come of the one that is sent, and its announced length.
    struct Zeros<F> {
        body: F,
        opened: Cell<u64>,
    }

    impl<F: Fn(u64) -> (u64, Option<u64>)> Hub for Zeros<F> {
        fn describe(&self, _: &HubFile) -> Result<Remote> {
            unreachable!("described by the test")
        }

        fn open<'a>(&'a self, file: &'a HubFile, _: &Remote, from: u64) -> Result<Opened<'a>> {
            let n = self.opened.get();
            self.opened.set(n + 1);
            let (mut left, total) = (self.body)(n);
            let bytes = move |buffer: &mut [u8]| match left.min(buffer.len() as u64) {
                0 => Err(HubError::Network { what: file.what(), url: "zeros".into(), reason: "cut".into() }),
                n => {
                    left -= n;
                    buffer[..n as usize].fill(0);
                    Ok(n as usize)
                }
            };
            Ok(Opened { from, total, bytes: Box::new(bytes) })
        }
    }

    /// Downloads without a known size; the error, how many bodies were opened, and what is left of the file.
    fn download(folder: &Path, body: impl Fn(u64) -> (u64, Option<u64>)) -> (HubError, u64, Option<u64>) {
        let file = HubFile::new("org/name", "f", "main").unwrap();
        let (cache, hub) = (RepoCache::new(folder, &file), Zeros { body, opened: Cell::new(0) });
        let address = Address::parse("http://127.0.0.1/f").unwrap();
        let remote = Remote { commit: "0".repeat(40), blob: "5".repeat(64), size: None, address };
        let patience = Patience::of(Duration::from_secs(9), Duration::from_millis(1), 2);
        let download = Download {
            hub: &hub,
            file: &file,
            remote: &remote,
            sha256: None,
            size: None,
            unannounced: 4 << 20,
            cache: &cache,
            patience,
        };
        let error = download.run().err().unwrap();
        let left = fs_err::metadata(cache.incomplete(&remote.blob)).ok().map(|meta| meta.len());
        (error, hub.opened.get(), left)
    }

    #[test]
    fn a_body_without_end_or_length_is_left_and_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (error, opened, left) = download(dir.path(), |_| (u64::MAX, None));
        assert!(matches!(&error, HubError::Content { field: "size", .. }), "{error}");
        assert!(error.to_string().contains("at most 4194304 where the hub does not say"), "{error}");
        assert_eq!((opened, left), (1, None));
    }

    #[test]
    fn a_download_that_gets_on_a_little_each_time_ends_too() {
        let dir = tempfile::tempdir().unwrap();
        let (error, opened, left) = download(dir.path(), |_| (GETS_ON, Some(1 << 34)));
        assert!(matches!(error, HubError::Network { .. }), "{error}");
        assert_eq!((opened, left), (u64::from(MAX_TRIES), Some(u64::from(MAX_TRIES) * GETS_ON)));
        // What was kept stays for the next run; one that brings nothing is left after three tries.
        assert_eq!(download(dir.path(), |_| (0, Some(1 << 34))).1, 3);
        // Too much of it for a body of no announced length: the hash cannot be told by then, so from the beginning, once.
        let (error, opened, left) = download(dir.path(), |_| (u64::MAX, None));
        assert!(matches!(error, HubError::Content { .. }), "{error}");
        assert_eq!((opened, left), (2, None));
    }
}
