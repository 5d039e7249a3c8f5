//! `weights fetch` against a hub on this machine: what is asked, what is kept, what every fault ends with.
//!
//! Each run of the program has a token in its environment and the finest log there is; whatever it prints or leaves on
//! disk is searched for the token.

#![cfg(feature = "hub")]

mod faults;
mod good;
mod hf_hub_alone;
mod pins;
mod server;
mod statuses;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What nobody but the hub may see.
pub(crate) const TOKEN: &str = "hf_Zq8sXw2LkP0vTn5YbR7cJd3M";
/// A commit.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Another.
pub(crate) const LATER: &str = "76543210fedcba9876543210fedcba9876543210";
/// Weights of the table that the tests fetch, and their folder in the cache.
pub(crate) const NAME: &str = "timm/resnet34";
pub(crate) const FOLDER: &str = "models--timm--resnet34.tv_in1k";
pub(crate) const PATH: &str = "/timm/resnet34.tv_in1k/resolve/main/model.safetensors";

/// Bytes that begin as a safetensors file does; another `seed` gives other bytes.
pub(crate) fn weights(seed: u8, len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed);
    let noise = std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    8u64.to_le_bytes().into_iter().chain(*b"{      }").chain(noise).take(len).collect()
}

/// What a run of the program left.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Outcome {
    /// Ended with `code`, and said each of `words`.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, words: &[&str]) -> &Self {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert_eq!(self.code, code, "{all}");
        for word in words {
            assert!(all.contains(word), "no `{word}` in {all}");
        }
        if code != 0 {
            assert!(all.contains("error: ") && all.contains("hint: "), "{all}");
        }
        assert!(self.took < Duration::from_secs(20), "took {:?}", self.took);
        self
    }

    /// The only entry of the JSON answer.
    pub(crate) fn json(&self) -> Value {
        let value: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", self.stdout, self.stderr));
        value["weights"][0].clone()
    }
}

/// A folder to start the program in, with a cache of its own.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, part: &str) -> PathBuf {
        self.dir.path().join(part)
    }

    /// The repository's folder in the cache.
    pub(crate) fn repo(&self, part: &str) -> PathBuf {
        self.path("hf/hub").join(FOLDER).join(part)
    }

    pub(crate) fn lock(&self) -> String {
        fs_err::read_to_string(self.path("weights.lock")).unwrap_or_default()
    }

    /// The command, not started yet.
    pub(crate) fn command(&self, endpoint: &str, args: &[&str]) -> Command {
        self.program(endpoint, &[&["weights", "fetch"], args].concat())
    }

    /// Any command of the program, not started yet.
    pub(crate) fn program(&self, endpoint: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        ] {
            command.env_remove(name);
        }
        for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("HF_HOME", self.path("hf"))
            .env("HF_ENDPOINT", endpoint)
            .env("HF_TOKEN", TOKEN)
            .env("HF_HUB_ETAG_TIMEOUT", "2")
            .env("HF_HUB_DOWNLOAD_TIMEOUT", "0.6")
            .env("RUST_LOG", "trace");
        command
    }

    /// Runs it, and searches what it printed and left for the token.
    #[track_caller]
    pub(crate) fn run(&self, mut command: Command) -> Outcome {
        let started = Instant::now();
        let out = command.stdin(Stdio::null()).output().unwrap();
        let took = started.elapsed();
        let outcome = Outcome {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
            took,
        };
        for printed in [&outcome.stdout, &outcome.stderr] {
            assert!(!tells_token(printed.as_bytes()), "the token is in {printed}");
        }
        for file in files(self.dir.path()) {
            assert!(!tells_token(&fs_err::read(&file).unwrap()), "the token is in {}", file.display());
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            assert!(!name.ends_with(".tmp"), "{name} was left over");
        }
        outcome
    }

    /// Fetches the test's weights.
    #[track_caller]
    pub(crate) fn fetch(&self, endpoint: &str, args: &[&str]) -> Outcome {
        self.run(self.command(endpoint, &[&[NAME], args].concat()))
    }

    /// A fault's end: the cache is as usable as before. A good hub serves the file, and then it is never asked again.
    #[track_caller]
    pub(crate) fn expect_usable(&self, bytes: &[u8]) {
        let hub = server::Server::good(bytes.to_vec(), COMMIT);
        let first = self.fetch(&hub.url(), &["--json"]);
        first.expect(0, &[]);
        assert_eq!(fs_err::read(first.json()["path"].as_str().unwrap()).unwrap(), bytes);
        let asked = hub.seen().len();
        self.fetch(&hub.url(), &[]).expect(0, &["in the cache"]);
        assert_eq!(hub.seen().len(), asked, "asked again");
        let blobs: Vec<_> = files(&self.repo("blobs"));
        assert_eq!(blobs, [self.repo("blobs").join(server::sha256(bytes))], "nothing else was kept");
    }
}

/// Whether six characters of the token in a row stand in `bytes`, as they are or as hexadecimal digits.
fn tells_token(bytes: &[u8]) -> bool {
    let spaceless: Vec<u8> = bytes.iter().filter(|b| !b.is_ascii_whitespace()).map(u8::to_ascii_lowercase).collect();
    let found = |needle: &[u8], hay: &[u8]| hay.windows(needle.len()).any(|w| w == needle);
    TOKEN.as_bytes()[3..].windows(6).any(|part| {
        let hex: String = part.iter().map(|b| format!("{b:02x}")).collect();
        found(part, bytes) || (bytes.is_ascii() && found(hex.as_bytes(), &spaceless))
    })
}

/// Every file below `root`, sorted.
pub(crate) fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(&folder).map(|d| d.collect::<Vec<_>>()).unwrap_or_default() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn the_search_for_the_token_finds_it() {
    assert!(tells_token(format!("Bearer {TOKEN}").as_bytes()));
    let rows: String = TOKEN.bytes().map(|b| format!("{b:02X} ")).collect();
    assert!(tells_token(rows.as_bytes()));
    assert!(!tells_token(b"hf_*** and nothing else"));
}
