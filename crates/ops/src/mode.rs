//! Train or evaluate: an argument of every forward, never hidden state.

/// How a network runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Batch statistics, running statistics updated, dropout drawn from (`seed`, layer name, `step`).
    Train {
        /// Seed of the run.
        seed: u64,
        /// Optimizer step, counted from 0: two steps never share a dropout mask.
        step: u64,
    },
    /// Running statistics, no dropout: the same input always gives the same output.
    Eval,
}

impl Mode {
    /// Whether batch statistics and dropout are in force.
    pub fn is_train(self) -> bool {
        matches!(self, Mode::Train { .. })
    }
}
