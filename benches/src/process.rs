//! One side of a comparison as a child process: started, asked, waited for with patience that ends, and never left
//! behind.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{BenchError, Result};
use crate::peak::Peak;
use crate::protocol::{HELLO, Hello, Prepared, Reply, Request, Round};

/// Last lines of a process's error output that an error shows.
const LAST_WORDS: usize = 8;
/// What narrows a fault down.
const ALONE: &str = "run this case alone with --filter";
/// Time after which the last words of a process that ended are no longer waited for.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(200);

/// A process that speaks the protocol.
pub struct Side {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<std::io::Result<String>>,
    words: Arc<Mutex<VecDeque<String>>>,
    patience: Duration,
    hello: Hello,
}

impl Side {
    /// Starts `command` and waits for its first line.
    ///
    /// # Errors
    /// `Usage` when the program cannot be started or says that something it needs is missing; `Process` when it ends,
    /// hangs or greets in another protocol.
    pub fn start(name: &str, mut command: Command, patience: Duration) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(|e| {
            BenchError::usage(
                format!("{name}: cannot run `{program}`: {e}, expected a program"),
                "--peer takes the path of a Python with torch, such as .venv/bin/python",
            )
        })?;
        let (send, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines() {
                    if send.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        let words = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(stderr) = child.stderr.take() {
            let words = words.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(std::io::Result::ok) {
                    let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
                    words.push_back(line);
                    if words.len() > LAST_WORDS {
                        words.pop_front();
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        let hello = Hello { hello: String::new(), about: String::new(), threads: 0, idle_kib: 0 };
        let mut side = Self { name: name.to_string(), child, stdin, lines, words, patience, hello };
        side.hello = match side.reply("its start")? {
            Reply::Hello(hello) if hello.hello == HELLO => hello,
            other => return Err(side.fault(format!("greeted with {other:?}, expected `{HELLO}`"))),
        };
        Ok(side)
    }

    /// Its first line.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Sends `prepare`.
    ///
    /// # Errors
    /// As [`Side::start`].
    pub fn prepare(&mut self, request: &Request) -> Result<Prepared> {
        let Request::Prepare { name, .. } = request else { return Err(self.fault("was not asked to prepare".into())) };
        match self.ask(request, &format!("`prepare {name}`"))? {
            Reply::Prepared(prepared) => Ok(prepared),
            other => Err(self.fault(format!("answered `prepare` with {other:?}"))),
        }
    }

    /// Sends `round`.
    ///
    /// # Errors
    /// As [`Side::start`].
    pub fn round(&mut self, case: &str, least_ms: f64) -> Result<Round> {
        match self.ask(&Request::Round { least_ms }, &format!("a round of {case}"))? {
            Reply::Round(round) if round.ms.is_finite() && round.ms > 0.0 => Ok(round),
            other => Err(self.fault(format!("answered `round` with {other:?}"))),
        }
    }

    /// Sends `peak`.
    ///
    /// # Errors
    /// As [`Side::start`].
    pub fn peak(&mut self) -> Result<Peak> {
        match self.ask(&Request::Peak, "`peak`")? {
            Reply::Peak(peak) => Ok(peak),
            other => Err(self.fault(format!("answered `peak` with {other:?}"))),
        }
    }

    fn ask(&mut self, request: &Request, what: &str) -> Result<Reply> {
        let line = serde_json::to_string(request).map_err(std::io::Error::from)?;
        let sent = self.stdin.as_mut().map(|pipe| writeln!(pipe, "{line}").and_then(|()| pipe.flush()));
        match sent {
            Some(Ok(())) => self.reply(what),
            // A broken pipe: the process is gone, and its last words say more.
            _ => Err(self.ended(what)),
        }
    }

    fn reply(&mut self, what: &str) -> Result<Reply> {
        let line = match self.lines.recv_timeout(self.patience) {
            Ok(Ok(line)) => line,
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => return Err(self.ended(what)),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = self.patience.as_secs_f64();
                let words = self.last_words();
                return Err(BenchError::Process {
                    side: self.name.clone(),
                    what: format!("no answer to {what} within {seconds} s{words}"),
                    hint: "raise --timeout, or run this case alone with --filter".into(),
                });
            }
        };
        match serde_json::from_str::<Reply>(&line) {
            Ok(Reply::Error { error, hint, usage: true }) => {
                let hint = hint.unwrap_or_else(|| "change the command".into());
                Err(BenchError::usage(format!("{}: {error}", self.name), hint))
            }
            Ok(Reply::Error { error, hint, .. }) => {
                let hint = hint.unwrap_or_else(|| ALONE.into());
                Err(BenchError::Process { side: self.name.clone(), what: format!("{what}: {error}"), hint })
            }
            Ok(reply) => Ok(reply),
            Err(_) => Err(self.fault(format!("answered {what} with `{line}`, expected one JSON object a line"))),
        }
    }

    fn fault(&self, what: String) -> BenchError {
        let what = format!("{what}{}", self.last_words());
        BenchError::Process { side: self.name.clone(), what, hint: ALONE.into() }
    }

    fn ended(&mut self, what: &str) -> BenchError {
        self.stdin = None;
        std::thread::sleep(LAST_WORDS_WAIT);
        let status = match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            _ => "its output closed".into(),
        };
        let words = self.last_words();
        BenchError::Process {
            side: self.name.clone(),
            what: format!("ended ({status}) before it answered {what}{words}"),
            hint: format!("a process killed by the kernel (signal 9) had too little memory; else {ALONE}"),
        }
    }

    fn last_words(&self) -> String {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        words.iter().map(|line| format!("\n  | {line}")).collect()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command for `program` with the threads that both sides compute on.
pub(crate) fn command(program: &Path, threads: usize) -> Command {
    let mut command = Command::new(program);
    let threads = threads.to_string();
    for name in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"] {
        command.env(name, &threads);
    }
    // candle's own pool spins for its workers beside rayon's; the repository's cargo configuration sets it so.
    command.env("CANDLE_NUM_THREADS", "1");
    command
}
