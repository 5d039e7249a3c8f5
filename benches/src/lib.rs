//! Benchmarks at the real shapes of segmentation networks, each answer checked before it is timed, beside PyTorch.
//!
//! [`catalogue`] lists what is run; [`workload`] makes a case ready on our side, `peers/*.py` on PyTorch's. [`worker`] and
//! `peers/peer.py` speak one [`protocol`]; [`contest`] runs both in turn, round by round, each in a process of its own,
//! so that peak memory belongs to one side. [`results`] holds the figures, [`report`] writes them, [`plot`] draws the
//! growth of CSC. `cargo xtask bench` is the command; `cargo bench -p segdistill-benches` runs our side alone.
//!
//! What does not live here: arguments, progress bars and exit codes (`xtask`), and any test that depends on time.
#![forbid(unsafe_code)]
// `!(a <= b)` holds for NaN too, and a check must not let one pass.
#![allow(clippy::neg_cmp_op_on_partial_ord)]

pub mod case;
pub mod catalogue;
pub mod contest;
mod error;
pub mod fill;
pub mod layers;
pub mod machine;
pub mod memory;
pub mod peak;
pub mod plot;
pub mod process;
pub mod protocol;
pub mod report;
pub mod results;
pub mod worker;
pub mod workload;

pub use error::{BenchError, Result};
