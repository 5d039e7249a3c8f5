//! A hub on this machine: speaks HTTP/1.1 over plain sockets, counts what it is asked, and misbehaves on order.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `HEAD` or `GET`.
    pub(crate) method: String,
    /// Path and query.
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// A header by its lower-case name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// First and last byte that a range asks for; without one, of `len` bytes, all.
    fn range(&self, len: usize) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().unwrap_or(len.saturating_sub(1)).min(len.saturating_sub(1))))
    }
}

/// How a body is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Manner {
    /// As announced.
    Whole,
    /// The connection is closed after so many bytes.
    CutAfter(usize),
    /// Nothing more comes after so many bytes, and the connection stays open.
    StallAfter(usize),
    /// A byte at a time, with a pause after each.
    Drip(Duration),
    /// Not even a status line comes.
    Silent,
}

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// Status code; 0 for a body that is sent raw, without status line and headers.
    pub(crate) status: u16,
    /// Headers; `Content-Length` is added unless it is here.
    pub(crate) headers: Vec<(String, String)>,
    /// Body.
    pub(crate) body: Vec<u8>,
    /// How it is sent.
    pub(crate) manner: Manner,
}

impl Reply {
    /// A status and nothing else.
    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), manner: Manner::Whole }
    }

    /// The file as the hub serves it: its sha256 as ETag, the commit, ranges.
    pub(crate) fn file(request: &Request, bytes: &[u8], commit: &str) -> Self {
        let mut reply = Self::status(200).with("ETag", &format!("\"{}\"", sha256(bytes))).with("X-Repo-Commit", commit);
        reply.body = bytes.to_vec();
        if let Some((first, last)) = request.range(bytes.len()) {
            if first >= bytes.len() {
                return Self::status(416).with("Content-Range", &format!("bytes */{}", bytes.len()));
            }
            reply.status = 206;
            reply = reply.with("Content-Range", &format!("bytes {first}-{last}/{}", bytes.len()));
            reply.body = bytes[first..=last].to_vec();
        }
        reply
    }

    /// The file as the hub points to it: hash, commit and size here, the bytes at `location`.
    pub(crate) fn elsewhere(bytes: &[u8], commit: &str, location: &str) -> Self {
        Self::status(302)
            .with("X-Repo-Commit", commit)
            .with("X-Linked-Etag", &format!("\"{}\"", sha256(bytes)))
            .with("X-Linked-Size", &bytes.len().to_string())
            .with("Location", location)
    }

    /// With a header, instead of any of that name.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self.headers.push((name.to_string(), value.to_string()));
        self
    }

    /// Without a header.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self
    }

    /// Sent in another manner.
    pub(crate) fn sent(mut self, manner: Manner) -> Self {
        self.manner = manner;
        self
    }

    /// With other bytes.
    pub(crate) fn carrying(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }
}

/// A server that runs until it is dropped.
pub(crate) struct Server {
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// Answers every request with what `answer` makes of it and of its number, from 0.
    pub(crate) fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let answer = Arc::new(answer);
        let (seen_here, stop_here) = (Arc::clone(&seen), Arc::clone(&stop));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop_here.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (answer, seen, stop) = (Arc::clone(&answer), Arc::clone(&seen_here), Arc::clone(&stop_here));
                std::thread::spawn(move || {
                    // A client that hangs up in the middle is what some tests want.
                    let _ = serve(&stream, answer.as_ref(), &seen, &stop);
                });
            }
        });
        Self { port, seen, stop }
    }

    /// A hub that serves `bytes` under every name, at `commit`.
    pub(crate) fn good(bytes: Vec<u8>, commit: &'static str) -> Self {
        Self::start(move |request, _| Reply::file(request, &bytes, commit))
    }

    /// Its address.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Everything it was asked.
    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// How often it was asked, as (HEAD, GET).
    pub(crate) fn counts(&self) -> (usize, usize) {
        let seen = self.seen();
        let n = |method: &str| seen.iter().filter(|r| r.method == method).count();
        (n("HEAD"), n("GET"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that waits for a connection.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(
    mut stream: &TcpStream,
    answer: &(dyn Fn(&Request, usize) -> Reply + Send + Sync),
    seen: &Mutex<Vec<Request>>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
    }
    let request = Request { method: method.into(), path: path.into(), headers };
    let n = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    let reply = answer(&request, n);
    let wait = |limit: Duration| {
        let started = Instant::now();
        while !stop.load(Ordering::SeqCst) && started.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let long = Duration::from_secs(60);
    if matches!(reply.manner, Manner::Silent) {
        wait(long);
        return Ok(());
    }
    if reply.status > 0 {
        let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
        for (name, value) in &reply.headers {
            head += &format!("{name}: {value}\r\n");
        }
        let has = |name: &str| reply.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        if !has("content-length") && !has("transfer-encoding") {
            head += &format!("Content-Length: {}\r\n", reply.body.len());
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
    }
    if request.method == "HEAD" {
        return Ok(());
    }
    match reply.manner {
        Manner::Whole => stream.write_all(&reply.body)?,
        Manner::CutAfter(n) => stream.write_all(&reply.body[..n.min(reply.body.len())])?,
        Manner::StallAfter(n) => {
            stream.write_all(&reply.body[..n.min(reply.body.len())])?;
            stream.flush()?;
            wait(long);
        }
        Manner::Drip(pause) => {
            for byte in &reply.body {
                stream.write_all(&[*byte])?;
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(pause);
            }
        }
        Manner::Silent => {}
    }
    stream.flush()
}

/// Id of a git blob: how the hub names files that git itself keeps.
pub(crate) fn git_id(bytes: &[u8]) -> String {
    let framed = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    sha1::Sha1::digest(framed).iter().map(|b| format!("{b:02x}")).collect()
}

/// sha256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
