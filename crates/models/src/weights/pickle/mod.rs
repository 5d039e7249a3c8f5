//! A reader of pickles that knows what a state dict is made of, and nothing else.
//!
//! A pickle is a program for a stack machine whose `GLOBAL` and `REDUCE` name any Python function and call it. Here the
//! functions are a closed list ([`Callable`]) that only describes tensors; what any other name would make is one value
//! without content, so nothing of the file is ever executed, and what hangs on it is no tensor. candle's own reader was weighed and not taken: it allocates as many bytes as a string
//! claims (4 GiB from ten bytes), copies whole trees for each reference to them (a file of a kilobyte can double itself
//! beyond any memory), panics on short argument lists, leaves out what it does not know with a line on stderr, and
//! refuses tensors with strides.
//!
//! Memory and time are bounded by construction. Values live in one flat arena and refer to each other by number, so a
//! reference costs four bytes and dropping is not recursive; a string is taken only as far as the bytes are there; the
//! numbers of steps and of values are capped. Nothing walks the values recursively.

mod machine;
mod rebuild;
mod value;

pub(super) use machine::{Pickle, run};
pub(super) use value::{Callable, Id, StorageRef, TensorRef, Value};

/// Why a pickle is refused, and at which byte of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Byte of the pickle.
    pub(super) at: usize,
    /// What was found there.
    pub(super) why: String,
    /// The way out.
    pub(super) hint: &'static str,
}
