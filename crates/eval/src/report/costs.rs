//! What each stage cost in time, over its seeds and against the baseline.

use std::fmt::Write;

use crate::stats::MeanSd;

use super::Report;
use super::format::{duration, escape};
use super::models::{in_run, model_name, shown_run};

/// Name of the stage that trains, in timings.
pub(super) const TRAIN: &str = "train";

/// Time of each kind of stage over its seeds.
pub(super) struct Cost {
    pub(super) run: String,
    pub(super) role: String,
    pub(super) method: String,
    pub(super) stage: String,
    pub(super) seconds: MeanSd,
    pub(super) ms_per_step: Option<MeanSd>,
    /// Time per step over that of the same stage of the baseline of the same run.
    pub(super) relative: Option<f64>,
}

pub(super) fn cost_rows(report: &Report) -> Vec<Cost> {
    let mut costs: Vec<Cost> = Vec::new();
    for row in &report.timings {
        let key = (&row.run, &row.role, &row.method, &row.stage);
        if costs.iter().any(|c| (&c.run, &c.role, &c.method, &c.stage) == key) {
            continue;
        }
        let same: Vec<_> = report.timings.iter().filter(|r| (&r.run, &r.role, &r.method, &r.stage) == key).collect();
        let per_step = MeanSd::of(same.iter().filter(|r| r.n_steps > 0).map(|r| 1e3 * r.seconds / r.n_steps as f64));
        costs.push(Cost {
            run: row.run.clone(),
            role: row.role.clone(),
            method: row.method.clone(),
            stage: row.stage.clone(),
            seconds: MeanSd::of(same.iter().map(|r| r.seconds)),
            ms_per_step: (per_step.n > 0).then_some(per_step),
            relative: None,
        });
    }
    let base: Vec<(String, String, f64)> = costs
        .iter()
        .filter(|c| c.role != "teacher" && c.method == report.baseline)
        .filter_map(|c| c.ms_per_step.map(|m| (c.run.clone(), c.stage.clone(), m.mean)))
        .collect();
    for cost in &mut costs {
        let same = base.iter().find(|(run, stage, ms)| *run == cost.run && *stage == cost.stage && *ms > 0.0);
        cost.relative = same.and_then(|(_, _, ms)| cost.ms_per_step.map(|m| m.mean / ms));
    }
    costs
}

/// `Teacher` or `Student (CE)` for a row of timings, with the run in front where there are several.
pub(super) fn cost_name(report: &Report, cost: &Cost) -> String {
    in_run(shown_run(report, &cost.run), model_name(&cost.role, &cost.method))
}

/// Milliseconds a step, with the deviation over seeds.
pub(super) fn ms_text(value: Option<MeanSd>) -> String {
    match value {
        Some(MeanSd { mean, sd: Some(sd), .. }) => format!("{mean:.1} ± {sd:.1}"),
        Some(MeanSd { mean, .. }) => format!("{mean:.1}"),
        None => "–".to_string(),
    }
}

/// What each stage cost.
pub(super) fn costs(report: &Report) -> String {
    let costs = cost_rows(report);
    if costs.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<section>\n<h2>Cost</h2>\n<div class=\"scroll\"><table class=\"pin\"><thead><tr><th class=\"l\">Model</th><th \
         class=\"l\">Stage</th><th>Time a run</th><th>ms a step</th><th>Relative</th><th>Runs</th></tr></thead><tbody>\n",
    );
    for cost in &costs {
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"l\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&cost_name(report, cost)),
            escape(&cost.stage),
            duration(cost.seconds.mean),
            ms_text(cost.ms_per_step),
            cost.relative.map_or("–".to_string(), |r| format!("{r:.2} ×")),
            cost.seconds.n
        );
    }
    let _ = write!(
        out,
        "</tbody></table></div>\n<p class=\"muted small\">Wall time. A step of training is one optimizer step, a step of \
         evaluation one image; relative to {} at the same stage.</p>\n</section>\n",
        escape(&report.baseline.to_uppercase())
    );
    out
}
