//! The contest: ours and the peer's layouts in turn, case by case and round by round, each in a process of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::case::{Case, Layout, Precision};
use crate::error::{BenchError, Result};
use crate::memory::available_mib;
use crate::process::{Side, command};
use crate::protocol::Request;
use crate::results::{CaseResult, Measured};
use crate::workload::{compare, has_bf16};

/// The peer's program, carried along so that it runs wherever the binary does.
const PEER_FILES: [(&str, &str); 7] = [
    ("peer.py", include_str!("../peers/peer.py")),
    ("fill.py", include_str!("../peers/fill.py")),
    ("operations.py", include_str!("../peers/operations.py")),
    ("csc.py", include_str!("../peers/csc.py")),
    ("losses.py", include_str!("../peers/losses.py")),
    ("relations.py", include_str!("../peers/relations.py")),
    ("deeplab.py", include_str!("../peers/deeplab.py")),
];

/// Pause between two sides: threads that spin for their next work go to sleep meanwhile.
const PAUSE: Duration = Duration::from_millis(30);

/// How to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Program and arguments of our side, which calls [`crate::worker::serve`].
    pub worker: (PathBuf, Vec<String>),
    /// A Python with torch.
    pub peer: Option<PathBuf>,
    /// Layouts the peer runs.
    pub layouts: Vec<Layout>,
    /// Precision of our side.
    pub precision: Precision,
    /// Threads on both sides.
    pub threads: usize,
    /// Rounds of each case.
    pub rounds: usize,
    /// Least milliseconds of a round.
    pub least_ms: f64,
    /// Longest wait for one answer.
    pub patience: Duration,
}

/// Our process, and the peer's, one a layout.
pub struct Contest {
    settings: Settings,
    folder: Option<tempfile::TempDir>,
    peers: BTreeMap<Layout, Side>,
    /// What the peer says it is.
    about_peer: Option<String>,
}

impl Contest {
    /// Checks that both sides can be started; the peer, if there is one, is running afterwards.
    ///
    /// # Errors
    /// `Usage` when the peer is no program or lacks torch; `Process` when a side does not start.
    pub fn new(settings: Settings) -> Result<Self> {
        let folder = match &settings.peer {
            None => None,
            Some(python) => {
                // A bare name is looked up in PATH by the system; anything else must be there.
                if python.components().count() > 1 && !python.is_file() {
                    return Err(BenchError::usage(
                        format!("peer `{}` is not there, expected a Python with torch", python.display()),
                        "--peer takes the path of the interpreter, such as .venv/bin/python",
                    ));
                }
                let folder = tempfile::Builder::new().prefix("segdistill-bench-").tempdir()?;
                for (name, text) in PEER_FILES {
                    fs_err::write(folder.path().join(name), text)?;
                }
                Some(folder)
            }
        };
        let mut contest = Self { settings, folder, peers: BTreeMap::new(), about_peer: None };
        if let Some(&layout) = contest.settings.layouts.first().filter(|_| contest.settings.peer.is_some()) {
            contest.start_peer(layout)?;
        }
        Ok(contest)
    }

    /// What the peer says it is, once it has started.
    pub fn about_peer(&self) -> Option<&str> {
        self.about_peer.as_deref()
    }

    /// A process of our side.
    ///
    /// # Errors
    /// `Process` when it does not start.
    pub fn start_ours(&self) -> Result<Side> {
        let (program, args) = &self.settings.worker;
        let mut command = command(program, self.settings.threads);
        command.args(args);
        self.threads_agree("segdistill", command)
    }

    fn start_peer(&mut self, layout: Layout) -> Result<()> {
        if self.peers.contains_key(&layout) {
            return Ok(());
        }
        let (Some(python), Some(folder)) = (&self.settings.peer, &self.folder) else { return Ok(()) };
        let mut command = command(python, self.settings.threads);
        command.arg(folder.path().join("peer.py")).arg("--threads").arg(self.settings.threads.to_string());
        let side = self.threads_agree(&format!("peer ({})", layout.name()), command)?;
        self.about_peer = Some(side.hello().about.clone());
        self.peers.insert(layout, side);
        Ok(())
    }

    fn threads_agree(&self, name: &str, command: Command) -> Result<Side> {
        let side = Side::start(name, command, self.settings.patience)?;
        match side.hello().threads == self.settings.threads {
            true => Ok(side),
            false => Err(BenchError::Process {
                side: name.into(),
                what: format!("computes on {} threads, expected {}", side.hello().threads, self.settings.threads),
                hint: "choose a number of threads that both sides take with --threads".into(),
            }),
        }
    }

    /// Runs one case on all sides; answers are checked and compared before the first round.
    ///
    /// `progress` hears what is going on.
    ///
    /// # Errors
    /// `Wrong` for a wrong answer; `Process` when a side dies, hangs or refuses.
    pub fn run(&mut self, case: &Case, progress: &mut dyn FnMut(&str)) -> Result<CaseResult> {
        let mut result = CaseResult {
            case: case.clone(),
            ours: None,
            peers: BTreeMap::new(),
            left_out: None,
            wrong_peers: BTreeMap::new(),
        };
        let precision = self.settings.precision;
        if precision == Precision::Bf16 && !has_bf16(&case.work) {
            result.left_out = Some("has no bf16 form".into());
            return Ok(result);
        }
        if let Some(free) = available_mib().filter(|free| *free < case.needs_mib) {
            result.left_out = Some(format!("needs about {} MiB of memory, {free} MiB are free", case.needs_mib));
            return Ok(result);
        }
        if case.alone() {
            self.peers.clear();
        }
        let layouts: Vec<Layout> = match self.settings.peer {
            Some(_) => case.layouts.iter().copied().filter(|l| self.settings.layouts.contains(l)).collect(),
            None => Vec::new(),
        };

        // The check takes memory of its own: a process of its own keeps it out of the measured one.
        progress("checks its answer");
        let answer = self.start_ours()?.prepare(&self.prepare(case, precision.name(), true))?.answer;
        let mut ours = self.start_ours()?;
        ours.prepare(&self.prepare(case, precision.name(), false))?;
        let mut measured = Measured { idle_kib: ours.hello().idle_kib, answer, ..Default::default() };
        for &layout in &layouts {
            progress(&format!("prepares the peer, {}", layout.name()));
            self.start_peer(layout)?;
            let request = self.prepare(case, layout.name(), true);
            let Some(side) = self.peers.get_mut(&layout) else { continue };
            let answer = side.prepare(&request)?.answer;
            // Two precisions are as far apart as the coarser one.
            let coarser = if layout == Layout::Bf16 { Precision::Bf16 } else { precision };
            let agreed =
                compare(&case.name, &measured.answer, &answer, &format!("the peer ({})", layout.name()), coarser);
            // Ours has been checked against plain sums. What the peer gets wrong in its own coarser arithmetic stops
            // nobody; a disagreement in one precision does.
            match agreed {
                Err(BenchError::Wrong { what, .. }) if coarser != precision => {
                    result.wrong_peers.insert(layout, what);
                    continue;
                }
                agreed => agreed?,
            }
            let idle_kib = side.hello().idle_kib;
            result.peers.insert(layout, Measured { idle_kib, answer, ..Default::default() });
        }

        for round in 1..=self.settings.rounds {
            progress(&format!("round {round} of {}", self.settings.rounds));
            let once = |side: &mut Side, into: &mut Measured| -> Result<()> {
                std::thread::sleep(PAUSE);
                let round = side.round(&case.name, self.settings.least_ms)?;
                into.ms.push(round.ms);
                into.peak_kib = into.peak_kib.max(round.peak_kib);
                Ok(())
            };
            once(&mut ours, &mut measured)?;
            for layout in &layouts {
                if let (Some(side), Some(into)) = (self.peers.get_mut(layout), result.peers.get_mut(layout)) {
                    once(side, into)?;
                }
            }
        }
        if case.alone() {
            self.peers.clear();
        }
        result.ours = Some(measured);
        Ok(result)
    }

    fn prepare(&self, case: &Case, variant: &str, answer: bool) -> Request {
        Request::Prepare { name: case.name.clone(), case: Box::new(case.clone()), variant: variant.to_string(), answer }
    }
}
