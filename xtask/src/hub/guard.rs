//! A log that tells nothing it should not.
//!
//! At level trace the HTTP library writes every byte it sends, the token among them, and at debug where a redirect leads,
//! signature and all. [`Guard`] stands before the real logger and lets such records of those libraries not through,
//! whatever `RUST_LOG` says. What this program logs itself is written without secrets.

use log::{Level, Log, Metadata, Record};

/// Crates whose records finer than warnings are kept back.
const KEPT_BACK: [&str; 4] = ["ureq", "ureq_proto", "rustls", "hf_hub"];

/// A logger behind which nothing secret arrives.
pub(crate) struct Guard<L>(pub(crate) L);

fn may_pass(metadata: &Metadata<'_>) -> bool {
    let krate = metadata.target().split("::").next().unwrap_or_default();
    metadata.level() <= Level::Warn || !KEPT_BACK.contains(&krate)
}

impl<L: Log> Log for Guard<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        may_pass(metadata) && self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if may_pass(record.metadata()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_on_the_wire_are_kept_back_and_the_rest_passes() {
        let pass = |level, target: &str| may_pass(&Metadata::builder().level(level).target(target).build());
        for target in ["ureq_proto::util", "ureq::run", "rustls::client::hs", "hf_hub"] {
            assert!(
                !pass(Level::Trace, target) && !pass(Level::Debug, target) && !pass(Level::Info, target),
                "{target}"
            );
            assert!(pass(Level::Warn, target), "{target}");
        }
        for target in ["xtask::hub", "ureqs", "polars"] {
            assert!(pass(Level::Trace, target), "{target}");
        }
    }
}
