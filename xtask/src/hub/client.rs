//! Asking a hub: what a file is, and its bytes. Knows nothing of the cache and tries once.
//!
//! Two requests, as huggingface_hub makes them: `HEAD` of `/{org}/{name}/resolve/{revision}/{file}` for commit, ETag and
//! size, `GET` for the bytes, from where the first answer pointed.

use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};
use ureq::http::{HeaderMap, Response, StatusCode, header};
use ureq::{Agent, Body};

use super::address::Address;
use super::error::{HubError, Result};
use super::names;
use super::settings::Settings;

/// Most redirects that are followed.
const MAX_HOPS: usize = 6;
/// Largest file that is downloaded, in bytes.
const MAX_BYTES: u64 = 1 << 34;
/// As it stands in messages.
const AT_MOST: &str = "bytes, at most 16 GiB";

/// A file of a repository at a revision, each of them checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubFile {
    repo: String,
    file: String,
    revision: String,
}

impl HubFile {
    /// A file that can be asked for.
    ///
    /// # Errors
    /// `Config` when a name is none.
    pub(crate) fn new(repo: &str, file: &str, revision: &str) -> Result<Self> {
        names::repo(repo).and(names::file(file)).and(names::revision(revision))?;
        Ok(Self { repo: repo.into(), file: file.into(), revision: revision.into() })
    }

    /// `ORG/NAME`.
    pub(crate) fn repo(&self) -> &str {
        &self.repo
    }

    /// Path in the repository.
    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    /// Branch, tag or commit.
    pub(crate) fn revision(&self) -> &str {
        &self.revision
    }

    /// For messages.
    pub(crate) fn what(&self) -> String {
        format!("`{}` of {} at {}", self.file, self.repo, self.revision)
    }
}

/// What the hub says of a file.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    /// Commit that the revision stands for.
    pub(crate) commit: String,
    /// Name of the blob: its sha256 for large files, the id of a git blob for small ones.
    pub(crate) blob: String,
    /// Bytes, where the hub says it.
    pub(crate) size: Option<u64>,
    /// Where the bytes are.
    pub(super) address: Address,
}

/// The next bytes of a body, 0 at its end.
pub(crate) type Bytes<'a> = Box<dyn FnMut(&mut [u8]) -> Result<usize> + 'a>;

/// A body that has begun.
pub(crate) struct Opened<'a> {
    /// Where in the file it begins: where it was asked to, or 0.
    pub(crate) from: u64,
    /// Bytes of the whole file, where the answer says it.
    pub(crate) total: Option<u64>,
    /// The body.
    pub(crate) bytes: Bytes<'a>,
}

/// A hub.
pub(crate) trait Hub {
    /// What `file` is.
    ///
    /// # Errors
    /// Everything that is between this machine and the file.
    fn describe(&self, file: &HubFile) -> Result<Remote>;

    /// Its bytes from `from` on, or from the beginning when the server knows no ranges.
    ///
    /// # Errors
    /// Everything that is between this machine and the file.
    fn open<'a>(&'a self, file: &'a HubFile, remote: &Remote, from: u64) -> Result<Opened<'a>>;
}

/// A hub that is reached over HTTP.
pub(crate) struct HttpHub<'s> {
    settings: &'s Settings,
    home: Address,
    api: Api,
    agent: Agent,
}

impl<'s> HttpHub<'s> {
    /// The hub of these settings. Opens no connection.
    ///
    /// # Errors
    /// `Config` for an endpoint that is no address.
    pub(crate) fn new(settings: &'s Settings) -> Result<Self> {
        let refused = |found: String| HubError::Config {
            what: "HF_ENDPOINT".into(),
            found,
            expected: "an http or https address".into(),
            hint: "take it out to ask huggingface.co".into(),
        };
        let home = Address::parse(&settings.endpoint)
            .ok_or_else(|| refused(format!("`{}`", names::shown(&settings.endpoint))))?;
        // It makes addresses only: it learns no token, so it can give none away.
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_token(None)
            .with_progress(false)
            .with_endpoint(settings.endpoint.clone())
            .build()
            .map_err(|e| refused(e.to_string()))?;
        let patience = &settings.patience;
        let mut agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("segdistill/", env!("CARGO_PKG_VERSION"), "; hf-hub"))
            // A compressed body could be a bomb, and is another body than the one whose size is known.
            .accept_encoding("identity")
            .max_idle_connections(0)
            .timeout_resolve(Some(patience.answer))
            .timeout_connect(Some(patience.answer))
            .timeout_send_request(Some(patience.answer))
            .timeout_recv_response(Some(patience.answer))
            .timeout_per_write(Some(patience.stall))
            .timeout_per_read(Some(patience.stall));
        if home.is_loopback() {
            agent = agent.proxy(None);
        }
        Ok(Self { settings, home, api, agent: agent.build().new_agent() })
    }

    /// Address of a file, in hf-hub's own spelling of revisions.
    fn address_of(&self, file: &HubFile) -> Result<Address> {
        let repo = Repo::with_revision(file.repo.clone(), RepoType::Model, file.revision.clone());
        let text = self.api.repo(repo).url(&file.file);
        Address::parse(&text).ok_or_else(|| HubError::Config {
            what: file.what(),
            found: format!("`{}`", names::shown(&text)),
            expected: "an address".into(),
            hint: "look at HF_ENDPOINT and `--revision`".into(),
        })
    }

    /// Foreign text for a message: escaped, short, without the token a server may have sent back.
    fn shown(&self, text: &str) -> String {
        names::shown(&self.without_token(text))
    }

    fn without_token(&self, text: &str) -> String {
        match &self.settings.token {
            Some(token) => text.replace(token.secret(), "***"),
            None => text.to_string(),
        }
    }

    fn url(&self, address: &Address) -> String {
        // Cut afterwards: half a token would not be found.
        names::shown_up_to(&self.without_token(&address.without_query()), 300)
    }

    /// The token where it belongs: on the hub's own host, and past nobody's eyes.
    fn secret_for(&self, address: &Address) -> Option<&str> {
        let safe = address.is_https() || address.is_loopback();
        self.settings.token.as_ref().filter(|_| safe && address.same_origin(&self.home)).map(|token| token.secret())
    }

    fn send(&self, file: &HubFile, head: bool, address: &Address, from: u64) -> Result<Response<Body>> {
        let mut request = if head { self.agent.head(address.text()) } else { self.agent.get(address.text()) };
        if let Some(secret) = self.secret_for(address) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {secret}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let response = request.call().map_err(|e| self.explain(file, address, &e))?;
        log::debug!("{} {}: {}", if head { "HEAD" } else { "GET" }, self.url(address), response.status());
        Ok(response)
    }

    /// Where a redirect leads; a way out of https is not taken, nor one to plain http on another machine.
    fn next(&self, file: &HubFile, address: &Address, headers: &HeaderMap) -> Result<Address> {
        let location = text(headers, "location").unwrap_or_default();
        let next = address.join(&location).ok_or_else(|| HubError::Answer {
            what: file.what(),
            url: self.url(address),
            found: format!("a redirect to `{}`", self.shown(&location)),
            expected: "an http or https address".into(),
        })?;
        let downgraded =
            !next.is_https() && (address.is_https() || !(next.is_loopback() || next.same_origin(&self.home)));
        if downgraded {
            return Err(HubError::Insecure { what: file.what(), url: self.url(address), found: self.url(&next) });
        }
        Ok(next)
    }

    /// The error that a status other than success stands for.
    fn refused(&self, file: &HubFile, address: &Address, status: StatusCode, headers: &HeaderMap) -> HubError {
        let (what, url) = (file.what(), self.url(address));
        match status.as_u16() {
            404 | 410 => HubError::Missing { what, url },
            status @ (401 | 403) => {
                let token = match (&self.settings.token, self.secret_for(address)) {
                    (None, _) => "no token is set",
                    (Some(_), Some(_)) => "the token that is set was sent",
                    (Some(_), None) => "the token that is set was kept back, since it goes over https only",
                };
                let hint = if address.same_origin(&self.home) {
                    format!("accept its licence on the hub and set HF_TOKEN; {token}")
                } else {
                    "this is another host than the hub, which sent on to it: its address may be too old by now, or a proxy refuses it; fetch again".into()
                };
                HubError::Denied { what, url, status, hint }
            }
            status @ (408 | 429 | 500..=599) => {
                let wait = text(headers, "retry-after").and_then(|t| t.trim().parse().ok()).map(Duration::from_secs);
                HubError::Busy { what, url, status, retry_after: wait }
            }
            status => HubError::Answer { what, url, found: format!("status {status}"), expected: "200".into() },
        }
    }

    fn explain(&self, file: &HubFile, address: &Address, error: &ureq::Error) -> HubError {
        let (what, url) = (file.what(), self.url(address));
        let patience = &self.settings.patience;
        match error {
            ureq::Error::Timeout(ureq::Timeout::PerRead | ureq::Timeout::PerWrite) => {
                HubError::Timeout { what, url, waited: format!("nothing came for {:?}", patience.stall) }
            }
            ureq::Error::Timeout(phase) => {
                HubError::Timeout { what, url, waited: format!("no answer within {:?} ({phase})", patience.answer) }
            }
            ureq::Error::Io(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::ConnectProxyFailed(_)
            | ureq::Error::InvalidProxyUrl
            | ureq::Error::Tls(_)
            | ureq::Error::Rustls(_) => HubError::Network { what, url, reason: self.shown(&error.to_string()) },
            other => {
                let (found, expected) = (self.shown(&other.to_string()), "an answer as HTTP/1.1 has it".into());
                HubError::Answer { what, url, found, expected }
            }
        }
    }

    /// A header that must be there and must be what it should be.
    fn need<T>(
        &self,
        file: &HubFile,
        address: &Address,
        name: &str,
        value: Option<&str>,
        read: impl Fn(&str) -> Option<T>,
        expected: &str,
    ) -> Result<T> {
        value.and_then(&read).ok_or_else(|| HubError::Answer {
            what: file.what(),
            url: self.url(address),
            found: value.map_or(format!("no {name}"), |v| format!("{name} `{}`", self.shown(v))),
            expected: expected.into(),
        })
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned())
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// What the hub itself says of a file, gathered over the redirects on its own host.
#[derive(Default)]
struct Gathered {
    commit: Option<String>,
    linked_etag: Option<String>,
    linked_size: Option<String>,
    /// ETag and length of the last answer: those of the way there are of pages nobody reads.
    etag: Option<String>,
    length: Option<String>,
}

impl Gathered {
    fn add(&mut self, headers: &HeaderMap, redirect: bool) {
        let first = |slot: &mut Option<String>, name: &str| {
            if slot.is_none() {
                *slot = text(headers, name);
            }
        };
        first(&mut self.commit, "x-repo-commit");
        first(&mut self.linked_etag, "x-linked-etag");
        first(&mut self.linked_size, "x-linked-size");
        self.etag = text(headers, "etag");
        self.length = text(headers, "content-length").filter(|_| !redirect);
    }
}

/// A length that a file may have.
fn length(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|n| *n <= MAX_BYTES)
}

impl Hub for HttpHub<'_> {
    fn describe(&self, file: &HubFile) -> Result<Remote> {
        let mut address = self.address_of(file)?;
        let mut seen = Gathered::default();
        for _ in 0..=MAX_HOPS {
            let response = self.send(file, true, &address, 0)?;
            let (status, headers) = (response.status(), response.headers());
            let redirect = is_redirect(status);
            if !redirect && status != StatusCode::OK {
                return Err(self.refused(file, &address, status, headers));
            }
            seen.add(headers, redirect);
            let next = if redirect { Some(self.next(file, &address, headers)?) } else { None };
            // The first answer that is not a step on the hub's own host is its last word: another host may refuse to be
            // asked twice, and what it says of commit and hash is not the hub's.
            if let Some(next) = next.clone().filter(|next| next.same_origin(&self.home)) {
                address = next;
                continue;
            }
            return self.described(file, &address, seen, next);
        }
        Err(self.too_many(file, &address))
    }

    fn open<'a>(&'a self, file: &'a HubFile, remote: &Remote, from: u64) -> Result<Opened<'a>> {
        let mut address = remote.address.clone();
        for _ in 0..=MAX_HOPS {
            let response = self.send(file, false, &address, from)?;
            let (status, headers) = (response.status(), response.headers());
            if is_redirect(status) {
                address = self.next(file, &address, headers)?;
                continue;
            }
            let plain = |t: &str| t.trim().eq_ignore_ascii_case("identity").then_some(());
            if let Some(encoding) = text(headers, "content-encoding") {
                self.need(file, &address, "Content-Encoding", Some(&encoding), plain, "the bytes themselves")?;
            }
            let (begins, total) = match status.as_u16() {
                200 => {
                    let said = text(headers, "content-length");
                    let total = said.map(|said| self.need(file, &address, "length", Some(&said), length, AT_MOST));
                    (0, total.transpose()?)
                }
                206 if from > 0 => {
                    let range = text(headers, "content-range").unwrap_or_default();
                    match content_range(&range).filter(|(begins, _)| *begins == from) {
                        Some(ours) => ours,
                        // Another part than was asked for is of no use: the whole file then.
                        None => {
                            let url = self.url(&address);
                            log::debug!("{url}: asked from byte {from} on, got `{}`", self.shown(&range));
                            return self.open(file, remote, 0);
                        }
                    }
                }
                // What was kept is longer than the file: begin again.
                416 if from > 0 => return self.open(file, remote, 0),
                _ => return Err(self.refused(file, &address, status, headers)),
            };
            let mut reader = response.into_body().into_reader();
            let bytes = move |buffer: &mut [u8]| {
                std::io::Read::read(&mut reader, buffer)
                    .map_err(|e| self.explain(file, &address, &ureq::Error::from(e)))
            };
            return Ok(Opened { from: begins, total, bytes: Box::new(bytes) });
        }
        Err(self.too_many(file, &address))
    }
}

impl HttpHub<'_> {
    /// The description that the hub's own words amount to; the bytes are at `next`, where it sent on, or at `address`.
    fn described(&self, file: &HubFile, address: &Address, seen: Gathered, next: Option<Address>) -> Result<Remote> {
        let commit = |t: &str| names::is_commit(t.trim()).then(|| t.trim().to_string());
        let commit =
            self.need(file, address, "X-Repo-Commit", seen.commit.as_deref(), commit, "40 hexadecimal digits")?;
        let etag = seen.linked_etag.or(seen.etag);
        let hash = "40 or 64 hexadecimal digits, the hash of the file";
        let blob = self.need(file, address, "ETag", etag.as_deref(), names::blob, hash)?;
        // Some servers say 0 of every body they do not send.
        let said = seen.linked_size.or(seen.length).filter(|said| said.trim() != "0");
        let size = said.map(|said| self.need(file, address, "length", Some(&said), length, AT_MOST)).transpose()?;
        Ok(Remote { commit, blob, size, address: next.unwrap_or_else(|| address.clone()) })
    }

    fn too_many(&self, file: &HubFile, address: &Address) -> HubError {
        HubError::Answer {
            what: file.what(),
            url: self.url(address),
            found: format!("more than {MAX_HOPS} redirects"),
            expected: "the file".into(),
        }
    }
}

/// `bytes A-B/TOTAL` as (A, TOTAL), where B is the last byte.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (begins, last) = range.split_once('-')?;
    let (begins, last): (u64, u64) = (begins.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(length(total).filter(|t| last.checked_add(1) == Some(*t))?),
    };
    (begins <= last).then_some((begins, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_whole_or_not_at_all() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in ["", "bytes 5-9", "bytes 5-8/10", "bytes 9-5/6", "bytes -5/10", "items 0-1/2", "bytes a-b/c"] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
