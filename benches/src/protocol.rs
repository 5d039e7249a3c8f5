//! What a process that measures is asked, and what it answers: one JSON object a line, each way.
//!
//! ```text
//! <- {"hello": "segdistill-bench 1", "about": "torch 2.15.0", "threads": 2, "idle_kib": 310000}
//! -> {"do": "prepare", "name": "resnet34/encoder.conv1", "case": {...}, "variant": "nhwc", "answer": true}
//! <- {"answer": {"y": 0.57, "grad-weight": 12.1}}
//! -> {"do": "round", "least_ms": 200}
//! <- {"ms": 41.2, "runs": 5, "peak_kib": 512000}
//! -> {"do": "peak"}
//! <- {"gflops": 330.1, "vector_bits": 512}
//! ```
//! `variant` is the precision of our side and the layout of a peer. `prepare` replaces what was prepared before. Any
//! request may be answered by `{"error": "...", "hint": "...", "usage": true}` instead. The end of the input ends the
//! process.

use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::peak::Peak;
use crate::workload::Answer;

/// First word of a process of this protocol, with its version.
pub const HELLO: &str = "segdistill-bench 1";

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Make a case ready, and compute its answer if asked.
    Prepare {
        /// Its name.
        name: String,
        /// All there is to know.
        case: Box<Case>,
        /// Precision of our side, layout of a peer.
        variant: String,
        /// Whether to compute the answer.
        answer: bool,
    },
    /// Run what is prepared, again and again for `least_ms`.
    Round {
        /// Milliseconds of measured runs, at least one.
        least_ms: f64,
    },
    /// Measure the peak of arithmetic.
    Peak,
}

/// First line of a process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`HELLO`].
    pub hello: String,
    /// Program and version.
    pub about: String,
    /// Threads it computes on.
    pub threads: usize,
    /// Resident memory before anything is prepared.
    pub idle_kib: u64,
}

/// Answer to `prepare`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// Numbers that the other side must agree with; empty when not asked for.
    pub answer: Answer,
}

/// Answer to `round`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Round {
    /// Median milliseconds of a run.
    pub ms: f64,
    /// Runs it is the median of.
    pub runs: usize,
    /// High-water mark since the case was prepared.
    pub peak_kib: u64,
}

/// Anything a process may answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Reply {
    /// It cannot.
    Error {
        /// What was found, what was expected.
        error: String,
        /// The way out.
        #[serde(default)]
        hint: Option<String>,
        /// Whether the caller should change the command.
        #[serde(default)]
        usage: bool,
    },
    /// First line.
    Hello(Hello),
    /// To `round`.
    Round(Round),
    /// To `peak`.
    Peak(Peak),
    /// To `prepare`.
    Prepared(Prepared),
}
