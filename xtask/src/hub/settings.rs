//! Settings of the hub from `HF_*` variables, resolved here and handed on as values: no library reads the environment
//! for us, and nothing is set in it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::error::{HubError, Result};
use super::names;

/// A secret: never shown, not by `Debug` either.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl Token {
    /// The secret itself, for the one header that carries it.
    pub(crate) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// How long to wait, and how often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Patience {
    /// Longest wait for a connection, and for the head of an answer.
    pub(crate) answer: Duration,
    /// Longest time in which a download may stand still.
    pub(crate) stall: Duration,
    /// Bytes that must come within each such time, 2 KiB a second: a drip is a stall.
    pub(crate) least_bytes: u64,
    /// Tries after the first.
    pub(crate) retries: u32,
    /// Longest wait between two tries, also where the hub asks for more.
    pub(crate) longest_pause: Duration,
    /// Longest wait for another process that downloads the same file.
    pub(crate) held: Duration,
}

impl Patience {
    /// As huggingface_hub: ten seconds for an answer, ten for a stall; three tries.
    pub(crate) fn usual() -> Self {
        Self::of(Duration::from_secs(10), Duration::from_secs(10), 2)
    }

    /// Everything that follows from two time-outs.
    pub(crate) fn of(answer: Duration, stall: Duration, retries: u32) -> Self {
        Self {
            answer,
            stall,
            least_bytes: (stall.as_secs_f64() * 2048.0) as u64,
            retries,
            longest_pause: stall * 3,
            held: Duration::from_secs(3600),
        }
    }

    /// Wait before try `n`, from 1: a twentieth of the stall time, doubled each time.
    pub(crate) fn pause(&self, n: u32) -> Duration {
        (self.stall / 20 * 2u32.pow(n.min(10) - 1)).min(self.longest_pause)
    }
}

/// Where the hub is, who asks, and where files are kept.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Folder with `models--ORG--NAME` folders in it.
    pub(crate) cache: PathBuf,
    /// Address of the hub, without a slash at its end.
    pub(crate) endpoint: String,
    /// For repositories that are not open to everybody.
    pub(crate) token: Option<Token>,
    /// Who forbids asking the hub, if anybody.
    pub(crate) offline: Option<&'static str>,
    /// Time-outs and tries.
    pub(crate) patience: Patience,
}

impl Settings {
    /// From this process's environment.
    ///
    /// # Errors
    /// `Config` with the variable that cannot be meant.
    pub(crate) fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    /// From any table of variables; an empty one counts as absent.
    ///
    /// Cache: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, or `hub` in `HF_HOME`, which is `huggingface` in `XDG_CACHE_HOME`
    /// or `~/.cache`. Token: `HF_TOKEN`, or the file `HF_TOKEN_PATH`, which is `token` in `HF_HOME`; none at all with
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`. Then `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT` and
    /// `HF_HUB_DOWNLOAD_TIMEOUT` in seconds.
    ///
    /// # Errors
    /// `Config` with the variable that cannot be meant.
    pub(crate) fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| lookup(name).filter(|v| !v.trim().is_empty());
        let home = || var("HOME").map(PathBuf::from);
        let path = |text: String| match text.strip_prefix("~/").and_then(|rest| Some(home()?.join(rest))) {
            Some(path) => path,
            None => PathBuf::from(text),
        };
        let caches = || var("XDG_CACHE_HOME").map(&path).or_else(|| home().map(|h| h.join(".cache")));
        let hf_home = var("HF_HOME").map(&path).or_else(|| caches().map(|c| c.join("huggingface")));
        let named = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(&path);
        let cache = named.or_else(|| hf_home.as_ref().map(|h| h.join("hub"))).ok_or_else(|| {
            config("HF_HOME", "nothing, and no HOME either", "a folder for the cache", "set HF_HOME or HF_HUB_CACHE")
        })?;
        // A relative cache would be another one in every folder the program is started from.
        let cache = std::path::absolute(cache)?;

        let token = if truthy(var("HF_HUB_DISABLE_IMPLICIT_TOKEN").as_deref()) {
            None
        } else {
            let file = var("HF_TOKEN_PATH").map(&path).or_else(|| hf_home.map(|h| h.join("token")));
            let stored = || fs_err::read_to_string(file?).ok().filter(|t| !t.trim().is_empty());
            var("HF_TOKEN").or_else(stored).map(|t| checked_token(&t)).transpose()?
        };
        let usual = Patience::usual();
        let answer = seconds("HF_HUB_ETAG_TIMEOUT", var("HF_HUB_ETAG_TIMEOUT"))?.unwrap_or(usual.answer);
        let stall = seconds("HF_HUB_DOWNLOAD_TIMEOUT", var("HF_HUB_DOWNLOAD_TIMEOUT"))?.unwrap_or(usual.stall);
        Ok(Self {
            cache,
            endpoint: checked_endpoint(&var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()))?,
            token,
            offline: truthy(var("HF_HUB_OFFLINE").as_deref()).then_some("HF_HUB_OFFLINE is set"),
            patience: Patience::of(answer, stall, usual.retries),
        })
    }
}

fn config(what: &str, found: &str, expected: &str, hint: &str) -> HubError {
    HubError::Config { what: what.into(), found: found.into(), expected: expected.into(), hint: hint.into() }
}

/// As huggingface_hub reads switches.
fn truthy(value: Option<&str>) -> bool {
    value.is_some_and(|v| ["1", "ON", "YES", "TRUE"].contains(&v.trim().to_ascii_uppercase().as_str()))
}

/// Seconds as somebody wrote them, for `what`.
pub(crate) fn seconds(what: &str, text: Option<String>) -> Result<Option<Duration>> {
    let Some(text) = text else { return Ok(None) };
    match text.trim().parse::<f64>() {
        Ok(s) if (0.01..=86_400.0).contains(&s) => Ok(Some(Duration::from_secs_f64(s))),
        _ => Err(config(
            what,
            &format!("`{}`", names::shown(&text)),
            "seconds from 0.01 to 86400",
            "take it out or mend it",
        )),
    }
}

/// A token that can stand in a header. The error does not show it.
fn checked_token(text: &str) -> Result<Token> {
    let token = text.trim();
    if token.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(Token(token.to_string()));
    }
    Err(config("HF_TOKEN", "a value with blanks or control characters", "one word", "write the token anew"))
}

/// An endpoint without a slash at its end. One that carries a password is refused, and not shown.
fn checked_endpoint(text: &str) -> Result<String> {
    let endpoint = text.trim().trim_end_matches('/');
    let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
    let expected = "http:// or https://, a host, perhaps a path";
    let hint = "take HF_ENDPOINT out to ask huggingface.co";
    if endpoint.contains('@') {
        return Err(config(
            "HF_ENDPOINT",
            "an address with a user or password in it",
            expected,
            "a token goes into HF_TOKEN",
        ));
    }
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#' | '\\' | '"' | '<' | '>' | '%');
    match rest {
        Some(rest) if !rest.is_empty() && !rest.starts_with('/') && rest.chars().all(plain) => Ok(endpoint.to_string()),
        _ => Err(config("HF_ENDPOINT", &format!("`{}`", names::shown(text)), expected, hint)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_lookup(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn the_cache_is_where_python_looks_for_it() {
        let cache = |vars: &[(&str, &str)]| settings(vars).unwrap().cache;
        let home = ("HOME", "/ada");
        assert_eq!(cache(&[home]), PathBuf::from("/ada/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/c")]), PathBuf::from("/c/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/c"), ("HF_HOME", "~/hf")]), PathBuf::from("/ada/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), PathBuf::from("/old"));
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), PathBuf::from("/new"));
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", ""), ("HF_HOME", " ")]), cache(&[home]));
        assert!(settings(&[]).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn a_token_comes_from_the_variable_then_the_file_and_is_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        fs_err::write(dir.path().join("token"), "from_file\n").unwrap();
        fs_err::write(dir.path().join("other"), "from_other").unwrap();
        let other = dir.path().join("other");
        let token = |vars: &[(&str, &str)]| {
            settings(&[&[("HF_HOME", home)], vars].concat()).unwrap().token.map(|t| t.secret().to_string())
        };
        assert_eq!(token(&[]).unwrap(), "from_file");
        assert_eq!(token(&[("HF_TOKEN_PATH", other.to_str().unwrap())]).unwrap(), "from_other");
        assert_eq!(token(&[("HF_TOKEN", " from_env ")]).unwrap(), "from_env");
        assert_eq!(token(&[("HF_TOKEN", "x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "yes")]), None);
        let all = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{all:?}").contains("hf_secret"), "{all:?}");
        let bad = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_se cret\r\nX: y")]).unwrap_err().to_string();
        assert!(bad.contains("HF_TOKEN") && !bad.contains("cret"), "{bad}");
    }

    #[test]
    fn endpoints_switches_and_times_are_checked() {
        let with = |name: &str, value: &str| settings(&[("HF_HOME", "/h"), (name, value)]);
        assert_eq!(settings(&[("HF_HOME", "/h")]).unwrap().endpoint, "https://huggingface.co");
        assert_eq!(with("HF_ENDPOINT", "http://127.0.0.1:80/hub//").unwrap().endpoint, "http://127.0.0.1:80/hub");
        for bad in ["huggingface.co", "ftp://x", "https://", "https:///x", "https://a b", "https://a?b", "http://a#b"] {
            assert!(with("HF_ENDPOINT", bad).unwrap_err().to_string().contains("HF_ENDPOINT"), "{bad}");
        }
        let secret = with("HF_ENDPOINT", "https://ada:lovelace@hub").unwrap_err().to_string();
        assert!(!secret.contains("lovelace"), "{secret}");
        for (value, off) in [("1", true), ("true", true), ("ON", true), ("0", false), ("no", false), ("", false)] {
            assert_eq!(with("HF_HUB_OFFLINE", value).unwrap().offline.is_some(), off, "{value}");
        }
        let patience = with("HF_HUB_DOWNLOAD_TIMEOUT", "0.5").unwrap().patience;
        assert_eq!((patience.stall, patience.answer), (Duration::from_millis(500), Duration::from_secs(10)));
        for bad in ["0", "-1", "nan", "inf", "ten"] {
            assert!(with("HF_HUB_ETAG_TIMEOUT", bad).unwrap_err().to_string().contains("HF_HUB_ETAG_TIMEOUT"), "{bad}");
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        let patience = Patience::usual();
        assert_eq!([1, 2, 3].map(|n| patience.pause(n).as_millis()), [500, 1000, 2000]);
        assert_eq!(patience.pause(u32::MAX), patience.longest_pause);
    }
}
