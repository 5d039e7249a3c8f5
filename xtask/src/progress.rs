//! What a person sees while it runs: bars with throughput and ETA on a terminal, plain lines elsewhere. All on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use segdistill_train::{Observer, Stage, StepRecord, ValRecord};

/// Seconds between two plain lines.
const QUIET: Duration = Duration::from_secs(15);

/// One progress bar, or its plain lines.
pub(crate) struct Progress {
    bar: ProgressBar,
    label: String,
    total: u64,
    done: u64,
    started: Instant,
    /// What was done before this process started.
    skipped: u64,
    last_line: Instant,
    plain: bool,
}

impl Progress {
    /// A bar over `total` units called `unit`.
    pub(crate) fn new(label: &str, total: u64, unit: &str) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(total),
            if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() },
        );
        let template = format!("{{prefix:<22}} [{{bar:30}}] {{pos}}/{{len}} {unit}  {{per_sec}}  eta {{eta}}  {{msg}}");
        // The template is ours: it is valid, and a default bar is no loss if it ever is not.
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_prefix(label.to_string());
        let now = Instant::now();
        Self { bar, label: label.to_string(), total, done: 0, started: now, skipped: 0, last_line: now, plain }
    }

    /// `done` units are done, with a word on how it goes.
    pub(crate) fn set(&mut self, done: u64, message: impl FnOnce() -> String) {
        self.done = done;
        if !self.plain {
            self.bar.set_position(done);
            self.bar.set_message(message());
        } else if self.last_line.elapsed() >= QUIET {
            self.last_line = Instant::now();
            self.line(&message());
        }
    }

    /// A line that stays.
    pub(crate) fn note(&mut self, text: &str) {
        if self.plain {
            self.last_line = Instant::now();
            self.line(text);
        } else {
            self.bar.println(format!("{:<22} {text}", self.label));
        }
    }

    /// A line of the results, on stdout, past the bar.
    pub(crate) fn print(&self, text: &str) {
        self.bar.suspend(|| println!("{text}"));
    }

    fn line(&self, text: &str) {
        let rate = self.done.saturating_sub(self.skipped) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let left = (self.total.saturating_sub(self.done)) as f64 / rate.max(1e-9);
        let eta = if rate > 0.0 { format!("eta {}", duration(left)) } else { String::new() };
        eprintln!("{:<22} {}/{}  {rate:.1}/s  {eta}  {text}", self.label, self.done, self.total);
    }

    /// Ends the bar.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Seconds as people write them.
pub(crate) fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// Shows a training stage.
pub(crate) struct StageProgress {
    progress: Option<Progress>,
    label: String,
    batch_size: f64,
}

impl StageProgress {
    /// For the stage called `label`.
    pub(crate) fn new(label: &str) -> Self {
        Self { progress: None, label: label.to_string(), batch_size: 1.0 }
    }

    /// Ends the bar.
    pub(crate) fn finish(self) {
        if let Some(progress) = self.progress {
            progress.finish();
        }
    }
}

impl Observer for StageProgress {
    fn on_start(&mut self, stage: &Stage, done: u64) {
        let mut progress = Progress::new(&self.label, stage.steps, "steps");
        progress.done = done;
        progress.skipped = done;
        progress.bar.set_position(done);
        progress.bar.reset_eta();
        self.batch_size = stage.batch_size as f64;
        if done > 0 {
            progress.note(&format!("resumed at step {done}"));
        }
        self.progress = Some(progress);
    }

    fn on_step(&mut self, r: &StepRecord) {
        if let Some(progress) = &mut self.progress {
            progress.set(r.step, || format!("loss {:.3}  {:.1} img/s", r.loss, r.images_per_second));
        }
    }

    fn on_val(&mut self, r: &ValRecord) {
        if let Some(progress) = &mut self.progress {
            let best = if r.is_best { "  (best)" } else { "" };
            progress.note(&format!("step {}: val mIoU {:.4}{best}", r.step, r.scores.miou));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(4.4), "4 s");
        assert_eq!(duration(61.0), "1 min 01 s");
        assert_eq!(duration(7500.0), "2 h 05 min");
    }
}
