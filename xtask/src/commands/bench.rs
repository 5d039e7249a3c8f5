//! `bench`: times every operation and whole steps beside PyTorch; the cases and the contest live in
//! `segdistill-benches`, here arguments become settings and figures become lines.

use std::io::{BufReader, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use segdistill_benches::BenchError;
use segdistill_benches::case::{Case, Layout, Precision};
use segdistill_benches::catalogue::{cases, filtered};
use segdistill_benches::contest::{Contest, Settings};
use segdistill_benches::machine::{load_average, machine, today};
use segdistill_benches::results::{CaseResult, Run};
use segdistill_benches::{plot, report, worker};

use crate::cli::Bench;
use crate::exit::{USAGE, coded, usage};
use crate::progress::Progress;

/// Argument of the process that this command starts as its own side.
const WORKER: &str = "--worker";

/// Runs the command.
pub(crate) fn run(args: &Bench) -> Result<()> {
    if args.worker {
        return worker::serve(BufReader::new(stdin().lock()), stdout().lock()).map_err(told);
    }
    check(args)?;
    let chosen = filtered(&cases().map_err(told)?, &args.filter).map_err(told)?;
    if args.list {
        list(&chosen);
        return Ok(());
    }
    let run = match args.from.as_slice() {
        [] => measure(args, &chosen)?,
        files => read(files, &chosen)?,
    };
    print_summaries(&run);
    if let Some(path) = &args.plot {
        let svg = plot::csc_growth(&run).ok_or_else(|| {
            usage!(
                "--plot draws the CSC cases, and this run has none\n  hint: leave --filter away, or use --filter csc"
            )
        })?;
        write(path, &svg)?;
        eprintln!("plot: {}", path.display());
    }
    if let Some(folder) = &args.record {
        let path = report::write_record(folder, &run).map_err(told)?;
        eprintln!("record: {}", path.display());
    }
    Ok(())
}

/// What can be refused before anything is started.
fn check(args: &Bench) -> Result<()> {
    let at_least_one = |name: &str, value: usize| match value {
        0 => Err(usage!("--{name} is 0, expected at least 1\n  hint: leave it away for the default")),
        _ => Ok(()),
    };
    at_least_one("rounds", args.rounds)?;
    at_least_one("timeout", args.timeout as usize)?;
    if let Some(threads) = args.threads {
        at_least_one("threads", threads)?;
    }
    if let Some(date) = &args.date {
        let parts: Vec<&str> = date.split('-').collect();
        let fits =
            parts.iter().map(|p| p.len()).eq([4, 2, 2]) && parts.iter().all(|p| p.bytes().all(|b| b.is_ascii_digit()));
        if !fits {
            return Err(usage!("date `{date}`, expected YYYY-MM-DD\n  hint: leave --date away for today"));
        }
    }
    if !args.from.is_empty() && args.peer.is_some() {
        return Err(usage!("--from reads earlier figures and --peer makes new ones\n  hint: use one of them"));
    }
    Ok(())
}

fn list(cases: &[Case]) {
    let mut out = stdout().lock();
    for case in cases {
        let gflop = if case.flop > 0 { format!("{:.2}", case.flop as f64 / 1e9) } else { "-".into() };
        let (group, name, sizes) = (case.group.name(), &case.name, case.work.describe());
        let line = writeln!(out, "{group:<15} {name:<50} {gflop:>9} GFLOP  x{:<3} {sizes}", case.repeats);
        // A reader that has seen enough (`| head`) is no error.
        if line.is_err() {
            return;
        }
    }
}

fn measure(args: &Bench, chosen: &[Case]) -> Result<Run> {
    let precision = precision(&args.precision)?;
    let threads = args.threads.unwrap_or_else(default_threads);
    let program = std::env::current_exe().context("cannot tell this program's own path")?;
    let settings = Settings {
        worker: (program, vec!["bench".into(), WORKER.into()]),
        peer: args.peer.clone(),
        layouts: layouts(&args.layouts)?,
        precision,
        threads,
        rounds: args.rounds,
        least_ms: args.round_ms,
        patience: Duration::from_secs(args.timeout),
    };
    let mut contest = Contest::new(settings).map_err(told)?;
    let mut ours = contest.start_ours().map_err(told)?;
    let peak = ours.peak().map_err(told)?;
    let mut run = Run {
        date: args.date.clone().unwrap_or_else(today),
        command: command_line(args),
        machine: machine(),
        threads,
        rounds: args.rounds,
        least_ms: args.round_ms,
        precision,
        versions: versions(&ours.hello().about, contest.about_peer()),
        load: vec![load_average()],
        peak: Some(peak),
        cases: Vec::new(),
    };
    drop(ours);
    warn_if_busy(threads);
    println!("{}, {threads} threads, peak {:.0} GF/s (f32, {} bits)", run.machine.cpu, peak.gflops, peak.vector_bits);
    println!("{}", report::heading(precision));
    let mut progress = Progress::new("bench", chosen.len() as u64, "cases");
    for (done, case) in chosen.iter().enumerate() {
        let mut say = |stage: &str| progress.set(done as u64, || format!("{}: {stage}", case.name));
        let result = contest.run(case, &mut say).map_err(told)?;
        progress.print(&report::row(&result, &run));
        run.cases.push(result);
        // After each case: what was measured is kept if a later one fails.
        save(args, &run)?;
    }
    progress.finish();
    run.load.push(load_average());
    save(args, &run)?;
    Ok(run)
}

fn save(args: &Bench, run: &Run) -> Result<()> {
    match &args.json {
        Some(path) => write(path, &format!("{}\n", serde_json::to_string_pretty(run)?)),
        None => Ok(()),
    }
}

/// Earlier runs as one, the chosen cases of them.
fn read(files: &[PathBuf], chosen: &[Case]) -> Result<Run> {
    let mut merged: Option<Run> = None;
    for path in files {
        let broken = |why: String| told(BenchError::Record { path: path.clone(), why });
        let text = fs_err::read_to_string(path).map_err(|e| broken(e.to_string()))?;
        let run: Run = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
        match &mut merged {
            None => merged = Some(run),
            Some(all) => {
                let settings = |r: &Run| (r.precision, r.threads, r.machine.cpu.clone());
                if settings(all) != settings(&run) {
                    let what = format!("{:?} beside {:?}", settings(&run), settings(all));
                    return Err(usage!(
                        "`{}` was measured otherwise: {what}\n  hint: join runs of one machine, precision and thread count",
                        path.display()
                    ));
                }
                all.merge(run);
            }
        }
    }
    let mut run = merged.ok_or_else(|| usage!("--from without a file\n  hint: name what --json wrote"))?;
    run.cases.retain(|r| chosen.iter().any(|case| case.name == r.case.name));
    println!("{}", report::heading(run.precision));
    for result in &run.cases {
        println!("{}", report::row(result, &run));
    }
    Ok(run)
}

fn print_summaries(run: &Run) {
    let summaries = run.summaries();
    if summaries.is_empty() {
        return;
    }
    println!("\nours over the peer's best {} layout:", run.precision.name());
    for summary in &summaries {
        println!("{}", report::summary_row(summary));
    }
    let left_out = run.cases.iter().filter(|r: &&CaseResult| r.left_out.is_some()).count();
    if left_out > 0 {
        println!("{left_out} cases left out, see above");
    }
}

/// Writes a file, its folder made if need be.
fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs_err::create_dir_all(parent)?;
    }
    Ok(fs_err::write(path, text)?)
}

fn precision(name: &str) -> Result<Precision> {
    let known = [Precision::F32, Precision::Bf16];
    let found = known.into_iter().find(|p| p.name() == name);
    found.ok_or_else(|| usage!("unknown precision `{name}`, expected f32 or bf16\n  hint: f32 is the default"))
}

fn layouts(names: &[String]) -> Result<Vec<Layout>> {
    let layout = |name: &String| {
        let found = Layout::ALL.into_iter().find(|l| l.name() == name);
        found.ok_or_else(|| {
            usage!("unknown layout `{name}`, expected nchw, nhwc or bf16\n  hint: all three are the default")
        })
    };
    names.iter().map(layout).collect()
}

/// Threads of rayon's pool as it would be here.
fn default_threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|v| v.parse().ok()).filter(|n| *n > 0);
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// What was typed, without folders of this machine.
fn command_line(args: &Bench) -> String {
    let mut words = vec!["cargo xtask bench".to_string()];
    if args.peer.is_some() {
        words.push("--peer PYTHON".into());
    }
    let mut option = |name: &str, value: String| words.push(format!("--{name} {value}"));
    for filter in &args.filter {
        option("filter", filter.clone());
    }
    option("rounds", args.rounds.to_string());
    option("precision", args.precision.clone());
    if let Some(threads) = args.threads {
        option("threads", threads.to_string());
    }
    words.join(" ")
}

fn versions(ours: &str, peer: Option<&str>) -> std::collections::BTreeMap<String, String> {
    let first_line = |command: &str, args: &[&str]| {
        let out = Command::new(command).args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).lines().next()?.to_string())
    };
    let mut known = vec![("ours".to_string(), ours.to_string())];
    let mut put = |name: &str, value: Option<String>| known.extend(value.map(|v| (name.to_string(), v)));
    put("rustc", first_line("rustc", &["--version"]));
    put("commit", first_line("git", &["describe", "--always", "--dirty"]));
    put("peer", peer.map(str::to_string));
    known.into_iter().collect()
}

/// Says so when something else computes here.
fn warn_if_busy(threads: usize) {
    let load: Option<f64> = load_average().split(' ').next().and_then(|v| v.parse().ok());
    if let Some(load) = load.filter(|load| *load > 0.5 * threads as f64) {
        eprintln!("warning: the load average is {load} on {threads} threads; what else runs here slows both sides");
    }
}

/// An error of the benchmarks with its exit code.
fn told(error: BenchError) -> anyhow::Error {
    match &error {
        BenchError::Usage { .. } | BenchError::Record { .. } => coded(USAGE, error),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn wrong_names_are_usage_errors() {
        let code = |error: anyhow::Error, word: &str| {
            assert!(error.to_string().contains(word), "{error}");
            exit::code_of(&error)
        };
        assert_eq!(code(precision("f16").unwrap_err(), "`f16`"), USAGE);
        assert_eq!(code(layouts(&["nhcw".to_string()]).unwrap_err(), "`nhcw`"), USAGE);
        assert_eq!(layouts(&["bf16".to_string(), "nchw".to_string()]).unwrap(), [Layout::Bf16, Layout::Nchw]);
        assert_eq!(precision("bf16").unwrap(), Precision::Bf16);
    }
}
