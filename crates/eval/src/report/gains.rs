//! What distillation gained, and whether that is more than the noise between seeds.

use crate::stats::{MeanSd, pooled_sd};
use crate::table::ResultRow;

use super::Report;
use super::costs::{TRAIN, cost_rows};
use super::format::{join, percent, percent_mean_sd, plural, points, share};
use super::models::{Model, absent, models, shown_run, splits};

/// What the numbers allow to say of a gain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Positive and larger than the deviation between seeds.
    Helped,
    /// Positive, but not larger than the deviation between seeds.
    WithinNoise,
    /// Positive, but with one seed nobody knows the noise.
    NoiseUnknown,
    /// Positive, but over fewer seeds than the baseline has: those that are missing may be the bad ones.
    SeedsMissing,
    /// Zero or negative.
    DidNotHelp,
}

impl Verdict {
    /// In a few words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Helped => "gain above seed noise",
            Self::WithinNoise => "gain within seed noise",
            Self::NoiseUnknown => "gain, noise unknown",
            Self::SeedsMissing => "gain, seeds missing",
            Self::DidNotHelp => "no gain",
        }
    }
}

/// One method against the baseline of the same run, role and encoder, on one split.
#[derive(Clone, Debug, PartialEq)]
pub struct Gain {
    /// Run of both; empty where there is only one.
    pub run: String,
    /// Method.
    pub method: String,
    /// Encoder of both.
    pub encoder: String,
    /// Split.
    pub split: String,
    /// mIoU of the baseline.
    pub baseline: MeanSd,
    /// mIoU of the method.
    pub distilled: MeanSd,
    /// mIoU of the teacher of the run, if it was evaluated on this split.
    pub teacher: Option<f64>,
    /// Mean of the method less mean of the baseline, a fraction.
    pub gain: f64,
    /// Share of the distance from baseline to teacher that was closed; `None` without a teacher above the baseline.
    pub gap_share: Option<f64>,
    /// Share of pixels to which the method's student gives the teacher's class, where that was counted.
    pub agreement: Option<MeanSd>,
    /// Time of a training step over that of the baseline, where both were timed.
    pub step_cost: Option<f64>,
    /// Standard deviation between seeds, pooled over both; `None` when neither has two seeds.
    pub pooled_sd: Option<f64>,
    /// Seeds on which the method is above the baseline, and seeds that both have.
    pub seeds_better: [usize; 2],
    /// What this allows to say.
    pub verdict: Verdict,
}

/// Every method against the baseline of its run, for each split on which both were evaluated.
pub fn gains(report: &Report) -> Vec<Gain> {
    let models = models(report);
    let costs = cost_rows(report);
    let mut gains = Vec::new();
    for model in models.iter().filter(|m| m.role != "teacher" && m.method != report.baseline) {
        let same = |m: &&Model| m.is(&model.run, &model.role, &report.baseline, &model.encoder);
        let Some(baseline) = models.iter().find(same) else { continue };
        let teacher = models.iter().find(|m| m.run == model.run && m.role == "teacher");
        for split in splits(report) {
            let (Some(b), Some(d)) = (baseline.on(&split), model.on(&split)) else { continue };
            let gain = d.miou.mean - b.miou.mean;
            if !gain.is_finite() {
                continue;
            }
            let teacher = teacher.and_then(|t| t.on(&split)).map(|t| t.miou.mean).filter(|t| t.is_finite());
            let pooled = pooled_sd(&[b.miou, d.miou]);
            gains.push(Gain {
                run: model.run.clone(),
                method: model.method.clone(),
                encoder: model.encoder.clone(),
                baseline: b.miou,
                distilled: d.miou,
                teacher,
                gain,
                gap_share: teacher.map(|t| t - b.miou.mean).filter(|gap| *gap > 0.0).map(|gap| gain / gap),
                agreement: d.agreement,
                step_cost: costs
                    .iter()
                    .find(|c| {
                        (&c.run, &c.role, &c.method, c.stage.as_str())
                            == (&model.run, &model.role, &model.method, TRAIN)
                    })
                    .and_then(|c| c.relative),
                pooled_sd: pooled,
                seeds_better: seeds_better(report, model, baseline, &split),
                verdict: match pooled {
                    _ if gain <= 0.0 => Verdict::DidNotHelp,
                    _ if d.miou.n < b.miou.n => Verdict::SeedsMissing,
                    None => Verdict::NoiseUnknown,
                    Some(sd) if gain > sd => Verdict::Helped,
                    Some(_) => Verdict::WithinNoise,
                },
                split,
            });
        }
    }
    gains
}

fn seeds_better(report: &Report, model: &Model, baseline: &Model, split: &str) -> [usize; 2] {
    let of = |m: &Model, seed: Option<u64>| -> Vec<&ResultRow> {
        let same =
            |r: &&ResultRow| m.is(&r.run, &r.role, &r.method, &r.encoder) && r.split == split && r.miou.is_finite();
        report.rows.iter().filter(same).filter(|r| seed.is_none_or(|s| r.seed == s)).collect()
    };
    let mut better = [0, 0];
    for row in of(model, None) {
        if let Some(base) = of(baseline, Some(row.seed)).first() {
            better[0] += usize::from(row.miou > base.miou);
            better[1] += 1;
        }
    }
    better
}

/// The headline and the sentences that support it.
pub(super) struct Headline {
    pub(super) title: String,
    pub(super) sentences: Vec<String>,
    pub(super) verdict: Option<Verdict>,
}

/// What the page says first; computed from the rows alone.
pub(super) fn headline(report: &Report) -> Option<Headline> {
    let all = gains(report);
    let selection = match all.iter().any(|g| g.split == report.selection_split) {
        true => report.selection_split.clone(),
        false => match all.first() {
            Some(gain) => gain.split.clone(),
            None => return plain_headline(report),
        },
    };
    let on_selection: Vec<&Gain> = all.iter().filter(|g| g.split == selection).collect();
    // The first of equal ones, so that the page does not depend on how a sort breaks ties.
    let best_of =
        |gains: &[&'_ Gain]| gains.iter().copied().reduce(|a, b| if b.gain > a.gain { b } else { a }).cloned();
    let best = best_of(&on_selection)?;
    let run = shown_run(report, &best.run);
    let place = if run.is_empty() { selection.clone() } else { format!("{selection} in run {run}") };
    let size = points(best.gain).trim_start_matches(['+', '−']).to_string();
    let title = match best.verdict {
        Verdict::Helped => format!("Distillation gained {size} points of mIoU on {place}"),
        Verdict::WithinNoise => {
            format!("Distillation gained {size} points of mIoU on {place}, which is within the noise between seeds")
        }
        Verdict::NoiseUnknown => {
            format!("Distillation gained {size} points of mIoU on {place}; with one seed the noise is unknown")
        }
        Verdict::SeedsMissing => {
            format!("Distillation gained {size} points of mIoU on {place}, over fewer seeds than the baseline has")
        }
        Verdict::DidNotHelp if !run.is_empty() => {
            format!("Distillation helped in no run: at best {} points of mIoU on {place}", points(best.gain))
        }
        Verdict::DidNotHelp => {
            format!("Distillation did not help in this run: {} points of mIoU on {selection}", points(best.gain))
        }
    };
    let mut sentences = Vec::new();
    if on_selection.len() > 1 {
        let noun = if run.is_empty() { "distilling method" } else { "distilled model" };
        sentences.push(format!(
            "{} is the best of {} compared on {selection}.",
            method_name(report, &best),
            plural(on_selection.len(), noun)
        ));
    }
    sentences.push(sentence(report, &best));
    for gain in &all {
        // The training images say nothing about new ones, so they stand in the tables only.
        let same = (&gain.run, &gain.method, &gain.encoder) == (&best.run, &best.method, &best.encoder);
        if same && gain.split != selection && gain.split != "train" {
            sentences.push(sentence(report, gain));
        }
    }
    // What the best run gained says nothing about the others, so each has its sentence.
    let mut told = vec![&best.run];
    for gain in &on_selection {
        if !told.contains(&&gain.run) {
            told.push(&gain.run);
            let of_run: Vec<&Gain> = on_selection.iter().copied().filter(|g| g.run == gain.run).collect();
            sentences.extend(best_of(&of_run).map(|best| sentence(report, &best)));
        }
    }
    if absent(report).iter().any(|s| s == "test") {
        sentences.push(format!(
            "The test split is absent, so no number here is free of the selection of checkpoints on {}.",
            report.selection_split
        ));
    }
    Some(Headline { title, sentences, verdict: Some(best.verdict) })
}

/// `CSC+CE`, or `CSC+CE of run a` where there are several.
fn method_name(report: &Report, gain: &Gain) -> String {
    match shown_run(report, &gain.run) {
        "" => gain.method.to_uppercase(),
        run => format!("{} of run {run}", gain.method.to_uppercase()),
    }
}

fn sentence(report: &Report, gain: &Gain) -> String {
    let role = if gain.split == report.selection_split { " (the selection split)" } else { "" };
    let seeds = if gain.distilled.n == gain.baseline.n {
        format!("{}{}", plural(gain.distilled.n, "seed"), if gain.distilled.n > 1 { " each" } else { "" })
    } else {
        format!("{} against {}", plural(gain.distilled.n, "seed"), gain.baseline.n)
    };
    let mut text = format!(
        "On {}{role} {} reaches {} % mIoU and {} alone {} % ({seeds}): {} points",
        gain.split,
        method_name(report, gain),
        percent_mean_sd(gain.distilled),
        report.baseline.to_uppercase(),
        percent_mean_sd(gain.baseline),
        points(gain.gain),
    );
    match (gain.teacher, gain.gap_share) {
        (Some(teacher), Some(gap)) if gain.gain > 0.0 => {
            text.push_str(&format!(", {} of the gap to the teacher at {} %", share(gap), percent(teacher)));
        }
        (Some(teacher), Some(_)) => text.push_str(&format!(", with the teacher at {} %", percent(teacher))),
        (Some(teacher), None) => {
            text.push_str(&format!(
                "; the teacher at {} % is not above the baseline, so no gap was there to close",
                percent(teacher)
            ));
        }
        (None, _) => {}
    }
    let sd = gain.pooled_sd.map(percent).unwrap_or_default();
    text.push_str(&match (gain.verdict, gain.pooled_sd) {
        (Verdict::Helped, _) => format!(". The gain is larger than the noise between seeds (pooled deviation {sd} points)."),
        (Verdict::WithinNoise, _) => format!(
            ". The gain is within the noise between seeds (pooled deviation {sd} points), so it is not evidence that distillation helps."
        ),
        (Verdict::SeedsMissing, _) => format!(
            ". Only {} of the baseline's {} seeds are there, and those that are missing may be the bad ones.",
            gain.distilled.n, gain.baseline.n
        ),
        (Verdict::NoiseUnknown, _) => ". With one seed the noise is unknown: the gain may be chance.".to_string(),
        (Verdict::DidNotHelp, Some(_)) => {
            format!(". Distillation did not help in this run (pooled deviation between seeds {sd} points).")
        }
        (Verdict::DidNotHelp, None) => {
            ". Distillation did not help in this run; with one seed the noise is unknown.".to_string()
        }
    });
    text
}

/// A report without a comparison says what was reached.
fn plain_headline(report: &Report) -> Option<Headline> {
    let models = models(report);
    let split = match report.rows.iter().any(|r| r.split == report.selection_split) {
        true => report.selection_split.clone(),
        false => report.rows.first()?.split.clone(),
    };
    let reached: Vec<String> = models
        .iter()
        .filter_map(|m| m.on(&split).map(|s| format!("{} reaches {} % mIoU", m.name(), percent_mean_sd(s.miou))))
        .collect();
    let title = format!("{} on {split}", join(&reached));
    Some(Headline { title, sentences: Vec::new(), verdict: None })
}
