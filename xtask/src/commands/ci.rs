//! `ci`: what continuous integration runs, in order, stopping at the first failure with its exit code.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, anyhow};

use super::tidy;
use crate::exit::coded;
use crate::progress::duration;

/// One cargo command.
struct Step {
    args: &'static [&'static str],
    /// Variable set for this step alone.
    env: Option<(&'static str, &'static str)>,
    hint: &'static str,
}

/// Before `tidy`: what takes seconds, or the compile time that the tests need anyway.
const BEFORE: [Step; 2] = [
    Step { args: &["fmt", "--all", "--check"], env: None, hint: "run `cargo fmt --all`" },
    Step {
        args: &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        env: None,
        hint: "mend each warning; an `allow` needs its reason beside it",
    },
];

/// After `tidy`.
const AFTER: [Step; 2] = [
    Step { args: &["test", "--workspace"], env: None, hint: "run one test alone: `cargo test --workspace NAME`" },
    Step {
        args: &["doc", "--workspace", "--no-deps"],
        env: Some(("RUSTDOCFLAGS", "-D warnings")),
        hint: "mend the link or the example that rustdoc names",
    },
];

/// Runs every step.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = tidy::workspace_root()?;
    let started = Instant::now();
    for step in &BEFORE {
        cargo(&root, step)?;
    }
    eprintln!("$ cargo xtask tidy");
    tidy::run()?;
    for step in &AFTER {
        cargo(&root, step)?;
    }
    println!("ci: everything passes, {}", duration(started.elapsed().as_secs_f64()));
    Ok(())
}

/// The command as one would type it.
fn line(step: &Step) -> String {
    let env = step.env.map(|(name, value)| format!("{name}=\"{value}\" ")).unwrap_or_default();
    format!("{env}cargo {}", step.args.join(" "))
}

/// Echoes a step, runs it in `root`, says how long it took; its exit code becomes ours.
fn cargo(root: &Path, step: &Step) -> anyhow::Result<()> {
    // The cargo that started us, so that every step sees the same toolchain.
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    eprintln!("$ {}", line(step));
    let started = Instant::now();
    let status = Command::new(program)
        .args(step.args)
        .envs(step.env)
        .current_dir(root)
        .status()
        .with_context(|| format!("cannot run `{}`", line(step)))?;
    let took = duration(started.elapsed().as_secs_f64());
    if status.success() {
        eprintln!("  ok, {took}");
        return Ok(());
    }
    let code = code_of(status.code());
    Err(coded(code, anyhow!("`{}` failed after {took} with exit code {code}\n  hint: {}", line(step), step.hint)))
}

/// The exit code to hand on; a command ended by a signal has none and counts as 1.
fn code_of(code: Option<i32>) -> u8 {
    code.and_then(|c| u8::try_from(c).ok()).filter(|c| *c != 0).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn a_step_is_written_as_one_would_type_it() {
        assert_eq!(line(&BEFORE[1]), "cargo clippy --workspace --all-targets -- -D warnings");
        assert_eq!(line(&AFTER[1]), "RUSTDOCFLAGS=\"-D warnings\" cargo doc --workspace --no-deps");
    }

    #[test]
    fn a_failing_step_hands_its_exit_code_on() {
        let step = Step { args: &["no-such-command-of-cargo"], env: None, hint: "none" };
        let error = cargo(Path::new("."), &step).unwrap_err();
        assert_eq!(exit::code_of(&error), 101);
        assert!(error.to_string().starts_with("`cargo no-such-command-of-cargo` failed after "), "{error}");
        assert!(cargo(Path::new("."), &Step { args: &["--version"], env: None, hint: "none" }).is_ok());
    }

    #[test]
    fn a_signal_and_a_code_beyond_a_byte_count_as_one() {
        assert_eq!([code_of(Some(101)), code_of(None), code_of(Some(256)), code_of(Some(-1))], [101, 1, 1, 1]);
    }
}
