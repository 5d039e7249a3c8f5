//! The program as its users run it: arguments in, exit code and output out.

#![allow(dead_code)]

use std::process::{Command, Output};

/// Runs the program; nothing of the surroundings changes what it does, and the hub is not asked.
pub(crate) fn xtask(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(args)
        .env_remove("SEGDISTILL_DATA_DIR")
        .env_remove("RUST_LOG")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a successful run printed.
#[track_caller]
pub(crate) fn good(args: &[&str]) -> String {
    let out = xtask(args);
    succeeded(&out);
    text(&out.stdout)
}

#[track_caller]
pub(crate) fn succeeded(out: &Output) {
    assert!(out.status.success(), "{}\n{}", text(&out.stdout), text(&out.stderr));
}

/// A run that ends with `code`, says every one of `said` and prints no result.
#[track_caller]
pub(crate) fn refused(args: &[&str], code: i32, said: &[&str]) {
    let out = xtask(args);
    let message = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}\n{message}");
    for word in said {
        assert!(message.contains(word), "{args:?} does not say `{word}`:\n{message}");
    }
    assert!(out.stdout.is_empty(), "{args:?} printed {}", text(&out.stdout));
}
