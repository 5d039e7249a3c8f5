//! What can keep a named weight file from being used: what was wanted, where, what was found, and the way out.
//!
//! Text that a server sent is escaped and shortened before it stands in an error, and the token is taken out of it.

use std::path::PathBuf;
use std::time::Duration;

use crate::exit::{UNAVAILABLE, USAGE, coded};

/// Result of this module.
pub(crate) type Result<T> = std::result::Result<T, HubError>;

/// Way out of everything that keeps a file on the other side of the network.
pub(crate) const BY_HAND: &str =
    "fetch it where that works and bring its folder of the cache here, or pass the path of a file instead of the name";

/// Reasons for which a named weight file is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum HubError {
    /// A setting, name, registry or lock file that cannot be meant.
    #[error("{what}: found {found}, expected {expected}\n  hint: {hint}")]
    Config {
        /// Variable, option or file.
        what: String,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
        /// The way out.
        hint: String,
    },
    /// A path that holds no file.
    #[error("`{}` is no weight file: nothing there\n  hint: name a file, or one of `cargo xtask weights list`", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// The hub is switched off and the cache lacks the file.
    #[error("{what} is not in the cache `{}`, and the hub may not be asked: {why}\n  hint: {BY_HAND}", cache.display())]
    Offline {
        /// File, repository, revision.
        what: String,
        /// Folder of the cache.
        cache: PathBuf,
        /// Who switched it off.
        why: &'static str,
    },
    /// The hub says that the repository, the revision or the file does not exist.
    #[error(
        "{what} does not exist: {url} answered 404\n  hint: look for the name on the hub; with `--revision`, for the revision"
    )]
    Missing {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
    },
    /// The hub wants to know who asks.
    #[error("{what} is not open to this user: {url} answered {status}\n  hint: {hint}")]
    Denied {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// 401 or 403.
        status: u16,
        /// The way out: whether a token was sent, and to whom.
        hint: String,
    },
    /// The hub is too busy or broken for now.
    #[error("{what}: {url} answered {status}{}\n  hint: try again later; or {BY_HAND}", waiting(*retry_after))]
    Busy {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// 408, 429 or 5xx.
        status: u16,
        /// How long the hub asks to wait.
        retry_after: Option<Duration>,
    },
    /// No connection, or it broke.
    #[error("{what}: {url}: {reason}\n  hint: check the network and HF_ENDPOINT; or {BY_HAND}")]
    Network {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// Nothing, or next to nothing, came for too long.
    #[error(
        "{what}: {url}: {waited}\n  hint: allow more with `--timeout SECONDS` or HF_HUB_DOWNLOAD_TIMEOUT; or {BY_HAND}"
    )]
    Timeout {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// What was waited for, and how long.
        waited: String,
    },
    /// An answer that a hub does not give.
    #[error(
        "{what}: {url}: found {found}, expected {expected}\n  hint: is HF_ENDPOINT a hub? nothing of the answer was kept"
    )]
    Answer {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// What came.
        found: String,
        /// What had to come.
        expected: String,
    },
    /// A way that would show the download to everybody between.
    #[error(
        "{what}: {url} sends on to {found}, expected an https address\n  hint: set HF_ENDPOINT to a hub that keeps to https"
    )]
    Insecure {
        /// File, repository, revision.
        what: String,
        /// Address without its query.
        url: String,
        /// Where it leads, without its query.
        found: String,
    },
    /// Bytes that are not those that were promised.
    #[error("{what}: {field} of `{}` is {found}, expected {expected}\n  hint: {hint}", place.display())]
    Content {
        /// File, repository, revision.
        what: String,
        /// The file.
        place: PathBuf,
        /// `sha256`, `git id` or `size`.
        field: &'static str,
        /// What it is.
        found: String,
        /// What it had to be.
        expected: String,
        /// The way out.
        hint: &'static str,
    },
    /// The hub offers something else than the lock file, the registry or the recipe names.
    #[error("{what}: {field} is {found}, but {by} says {expected}\n  hint: {hint}")]
    Pinned {
        /// File, repository, revision.
        what: String,
        /// `commit`, `sha256`, `size`, `repo` or `file`.
        field: &'static str,
        /// What the hub offers.
        found: String,
        /// What was pinned.
        expected: String,
        /// What pinned it.
        by: String,
        /// The way out.
        hint: &'static str,
    },
    /// A file of another format than its name or the registry says.
    #[error("`{}` is {found}, expected {expected}\n  hint: {hint}", place.display())]
    Format {
        /// The file.
        place: PathBuf,
        /// What it looks like.
        found: &'static str,
        /// What it had to be.
        expected: &'static str,
        /// The way out.
        hint: &'static str,
    },
    /// Another process holds the same download.
    #[error(
        "{what}: another process has held `{}` for {waited:?}\n  hint: wait for it or end it; what it has downloaded is used",
        lock.display()
    )]
    Held {
        /// File, repository, revision.
        what: String,
        /// Its lock file.
        lock: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// The lock file can be neither read nor written.
    #[error(
        "lock file `{}`: {reason}\n  hint: `--lock FILE` names another place; that of a recipe lies beside the recipe",
        path.display()
    )]
    LockFile {
        /// The lock file.
        path: PathBuf,
        /// What the disk said.
        reason: String,
    },
    /// The disk.
    #[error("{0}\n  hint: is there room, and may this user write there? HF_HUB_CACHE names another place")]
    Io(String),
}

fn waiting(retry_after: Option<Duration>) -> String {
    retry_after.map_or(String::new(), |wait| format!(" and asks to wait {} s", wait.as_secs()))
}

impl From<std::io::Error> for HubError {
    /// As text: its message names the path and ends before the hint.
    fn from(error: std::io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

impl HubError {
    /// Whether trying again may help.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Network { .. } | Self::Timeout { .. })
    }

    /// How long the hub asks to wait before the next try.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The error with the exit code of this program: 2 for settings, 4 for a file that is not there.
    pub(crate) fn coded(self) -> anyhow::Error {
        let code = if matches!(self, Self::Config { .. }) { USAGE } else { UNAVAILABLE };
        coded(code, self)
    }
}
