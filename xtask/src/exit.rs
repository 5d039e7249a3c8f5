//! Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 data check failed, 4 needed file unavailable, 5 result outside
//! the expected band, 130 and 143 interrupted after a checkpoint was written.

use std::fmt;

/// An error that ends the program with its own code.
#[derive(Debug)]
pub(crate) struct Coded {
    code: u8,
    source: anyhow::Error,
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.source)
    }
}

impl std::error::Error for Coded {}

/// Usage or configuration: exit code 2.
pub(crate) const USAGE: u8 = 2;
/// A data check failed: exit code 3.
pub(crate) const DATA: u8 = 3;
/// A needed file is not there: exit code 4.
pub(crate) const UNAVAILABLE: u8 = 4;
/// A result is outside the expected band: exit code 5.
pub(crate) const OUT_OF_BAND: u8 = 5;

/// `source`, ending the program with `code`.
pub(crate) fn coded(code: u8, source: impl Into<anyhow::Error>) -> anyhow::Error {
    anyhow::Error::new(Coded { code, source: source.into() })
}

/// A usage error with its message: `anyhow!` that ends with code 2.
macro_rules! usage {
    ($($arg:tt)*) => { $crate::exit::coded($crate::exit::USAGE, anyhow::anyhow!($($arg)*)) };
}
pub(crate) use usage;

/// The code `error` asks for, 1 when none.
pub(crate) fn code_of(error: &anyhow::Error) -> u8 {
    error.chain().find_map(|e| e.downcast_ref::<Coded>()).map_or(1, |c| c.code)
}
