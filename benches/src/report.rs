//! Tables of a run: rows for the terminal, Markdown for the record.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::case::{Group, Layout, Precision};
use crate::error::Result;
use crate::results::{CaseResult, Run, Summary};

/// Width of the name column on a terminal.
const NAME: usize = 50;

/// Heading of [`row`].
pub fn heading(precision: Precision) -> String {
    let ours = format!("ours {}", precision.name());
    format!(
        "{:<NAME$} {:>10} {:>9} {:>9} {:>9} {:>6} {:>6} {:>6} {:>8} {:>8}",
        "case (ms)", ours, "nchw", "nhwc", "bf16", "ratio", "GF/s", "% peak", "MiB", "peer MiB"
    )
}

/// One case on one line: our time, the peer's in each layout, our time over the peer's best of the same precision,
/// rate and its share of the peak, memory above the idle process on both sides.
pub fn row(result: &CaseResult, run: &Run) -> String {
    let mut line = format!("{:<NAME$}", result.case.name);
    if let Some(why) = &result.left_out {
        let _ = write!(line, "  left out: {why}");
        return line;
    }
    for (cell, width) in cells(result, run).iter().zip([10, 9, 9, 9, 6, 6, 6, 8, 8]) {
        let _ = write!(line, " {cell:>width$}");
    }
    line
}

/// A group on one line.
pub fn summary_row(summary: &Summary) -> String {
    format!(
        "{:<34} {:>3} compared, geometric mean {:.3}, in all {:.3}, worst {:.2} ({})",
        summary.name, summary.compared, summary.geometric_mean, summary.total_ratio, summary.worst.0, summary.worst.1
    )
}

fn cells(result: &CaseResult, run: &Run) -> [String; 9] {
    let best = result.best_peer(run.precision);
    let peer = |layout: Layout| match result.wrong_peers.contains_key(&layout) {
        true => "wrong".to_string(),
        false => text(result.peers.get(&layout).map(|m| m.median_ms()), milliseconds),
    };
    let gflops = result.gflops();
    let share = gflops.zip(run.peak).map(|(rate, peak)| 100.0 * rate / peak.gflops);
    [
        text(result.ours_ms(), milliseconds),
        peer(Layout::Nchw),
        peer(Layout::Nhwc),
        peer(Layout::Bf16),
        text(result.ratio(run.precision), |v| format!("{v:.2}")),
        text(gflops, |v| format!("{v:.0}")),
        text(share, |v| format!("{v:.0}")),
        text(result.ours.as_ref().map(|m| m.grown_mib()), |v| format!("{v:.0}")),
        text(best.map(|(_, m)| m.grown_mib()), |v| format!("{v:.0}")),
    ]
}

fn text(value: Option<f64>, write: impl Fn(f64) -> String) -> String {
    value.filter(|v| v.is_finite()).map_or_else(|| "-".to_string(), write)
}

/// Milliseconds with three digits that count.
fn milliseconds(ms: f64) -> String {
    match ms {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// The whole run as Markdown: where, how, every figure, every raw round.
pub fn markdown(run: &Run) -> String {
    let mut out = String::new();
    let m = &run.machine;
    let _ = writeln!(out, "# Benchmarks of {}, {}\n", run.date, m.cpu);
    let _ = writeln!(out, "```text\n{}\n```\n", run.command);
    out += "| | |\n|---|---|\n";
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "| {name} | {value} |");
        }
    };
    fact("processor", m.cpu.clone());
    fact("extensions", m.extensions.join(" "));
    fact("cores, threads used", format!("{}, {}", m.cores, run.threads));
    fact("memory", format!("{} MiB", m.memory_mib));
    fact("kernel", m.kernel.clone());
    fact(
        "peak of f32 arithmetic",
        run.peak.map_or_else(String::new, |p| {
            format!("{:.0} GF/s: fused multiply-adds on {}-bit registers, all threads", p.gflops, p.vector_bits)
        }),
    );
    fact("precision of our side", run.precision.name().into());
    fact("rounds", format!("{} of at least {} ms each, sides in turn", run.rounds, run.least_ms));
    fact("load average (start; end)", run.load.join("; "));
    for (name, version) in &run.versions {
        fact(name, version.clone());
    }
    out += "\nMilliseconds are medians of the rounds. *Ratio* is our time over the peer's best of the same precision: \
            below 1 we are\nfaster. GF/s counts two operations a multiply-add of the convolutions alone; its share is \
            of the f32 peak above.\nMemory is the high-water mark above the idle process. Of single operations it is \
            no result: the peer's process\nlives on from case to case.\n";

    let summaries = run.summaries();
    if !summaries.is_empty() {
        out += "\n## In short\n\n| group | compared | geometric mean of the ratios | ratio of the sums | worst |\n\
                |---|---:|---:|---:|---|\n";
        for s in &summaries {
            let _ = writeln!(
                out,
                "| {} | {} | {:.3} | {:.3} | {:.2}, `{}` |",
                s.name, s.compared, s.geometric_mean, s.total_ratio, s.worst.0, s.worst.1
            );
        }
        out += "\nIn the sums each layer counts as often as it occurs in its network.\n";
    }

    for group in Group::ALL {
        let results: Vec<&CaseResult> = run.cases.iter().filter(|r| r.case.group == group).collect();
        if results.is_empty() {
            continue;
        }
        let _ = writeln!(out, "\n## {}\n", group.title());
        let ours = format!("ours {}", run.precision.name());
        let _ = writeln!(
            out,
            "| case | sizes | times | {ours} ms | nchw ms | nhwc ms | bf16 ms | ratio | GF/s | % peak | MiB | peer MiB |\n\
             |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
        );
        for result in results {
            let case = &result.case;
            let _ = write!(out, "| `{}` | {} | {} |", case.name, case.work.describe(), case.repeats);
            match &result.left_out {
                Some(why) => {
                    let _ = writeln!(out, " left out: {why} | | | | | | | | |");
                }
                None => {
                    let _ = writeln!(out, " {} |", cells(result, run).join(" | "));
                }
            }
        }
    }

    if run.cases.iter().any(|result| !result.wrong_peers.is_empty()) {
        out += "\n## Wrong answers of the peer\n\nLayouts that were not timed, since what they give is wrong.\n\n";
        for result in &run.cases {
            for (layout, what) in &result.wrong_peers {
                let _ = writeln!(out, "- {} ({}): {what}", result.case.name, layout.name());
            }
        }
    }

    out += "\n## Raw rounds\n\nMilliseconds of every round, each the median of the runs in it.\n\n```text\n";
    for result in &run.cases {
        let list = |ms: &[f64]| ms.iter().map(|v| milliseconds(*v)).collect::<Vec<_>>().join(" ");
        if let Some(ours) = &result.ours {
            let _ = writeln!(out, "{} ours: {}", result.case.name, list(&ours.ms));
        }
        for (layout, measured) in &result.peers {
            let _ = writeln!(out, "{} {}: {}", result.case.name, layout.name(), list(&measured.ms));
        }
    }
    out += "```\n";
    out
}

/// Where the record of a run goes: `folder/<machine>/<date>.md`, with a number behind the date if that is taken.
pub fn record_path(folder: &Path, run: &Run) -> PathBuf {
    let folder = folder.join(slug(&run.machine.cpu));
    let names = std::iter::once(format!("{}.md", run.date)).chain((2..).map(|k| format!("{}-{k}.md", run.date)));
    let free = names.map(|name| folder.join(name)).find(|path| !path.exists());
    free.unwrap_or(folder)
}

/// Writes the record of a run below `folder`; a record is never replaced.
///
/// # Errors
/// `Io` when it cannot be written.
pub fn write_record(folder: &Path, run: &Run) -> Result<PathBuf> {
    let path = record_path(folder, run);
    if let Some(parent) = path.parent() {
        fs_err::create_dir_all(parent)?;
    }
    fs_err::write(&path, markdown(run))?;
    Ok(path)
}

/// A name as a folder: lower-case letters and digits, one hyphen between.
fn slug(name: &str) -> String {
    let plain: String = name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { ' ' }).collect();
    let words: Vec<&str> = plain.split_whitespace().collect();
    if words.is_empty() { "unknown".into() } else { words.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::invented;

    #[test]
    fn a_row_holds_every_figure_in_its_column() {
        let run = invented();
        let words =
            |k: usize| -> Vec<String> { row(&run.cases[k], &run).split_whitespace().map(str::to_string).collect() };
        let gflops = run.cases[0].case.flop as f64 / 8.0 / 1e6;
        let [rate, share] = [format!("{gflops:.0}"), format!("{:.0}", gflops / 4.0)];
        let expected =
            ["resnet34/encoder.layer1.0.conv1", "8.00", "12.0", "10.0", "2.00", "0.80", &rate, &share, "100", "200"];
        assert_eq!(words(0), expected);
        assert_eq!(words(4), ["csc/linear-19c-43200", "160", "-", "-", "-", "-", "-", "-", "100", "-"]);
        assert_eq!(heading(run.precision).len(), row(&run.cases[0], &run).len());
        let mut left_out = run.cases[4].clone();
        left_out.left_out = Some("needs memory".into());
        assert!(row(&left_out, &run).ends_with("left out: needs memory"));
        let mut wrong = run.cases[0].clone();
        wrong.peers.remove(&Layout::Bf16);
        wrong.wrong_peers.insert(Layout::Bf16, "`grad-weight` is 1 here and 1e33 in the peer".into());
        assert!(row(&wrong, &run).contains(" wrong "), "{}", row(&wrong, &run));
        let record = markdown(&Run { cases: vec![wrong], ..run.clone() });
        assert!(record.contains("(bf16): `grad-weight` is 1 here and 1e33 in the peer"), "{record}");
    }

    #[test]
    fn the_record_says_where_how_and_every_round() {
        let text = markdown(&invented());
        for word in [
            "# Benchmarks of 2001-02-03, Some CPU @ 2 GHz",
            "cargo xtask bench --peer python",
            "| peer | torch 9 |",
            "| load average (start; end) | 0.10 0.20 0.30 |",
            "400 GF/s",
            "## Dense convolutions",
            "| `resnet34/encoder.layer1.0.conv1` | 4x64x88x120 * 64x64x3x3 | 6 | 8.00 | 12.0 | 10.0 | 2.00 | 0.80 |",
            "resnet34/encoder.layer1.0.conv1 ours: 12.0 8.00 7.20",
            "csc/linear-19c-2700 nchw: 200 200 200",
        ] {
            assert!(text.contains(word), "`{word}` is not in\n{text}");
        }
        assert!(!text.contains("## Depthwise"), "a table without rows");
    }

    #[test]
    fn a_record_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let run = invented();
        let names: Vec<String> = (0..3)
            .map(|_| {
                let path = write_record(folder.path(), &run).unwrap();
                path.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned()
            })
            .collect();
        assert_eq!(
            names,
            ["some-cpu-2-ghz/2001-02-03.md", "some-cpu-2-ghz/2001-02-03-2.md", "some-cpu-2-ghz/2001-02-03-3.md"]
        );
    }
}
