//! The models a report compares: their order, names and colours.

use crate::table::{SummaryRow, summarize};

use super::{Curve, Report};

/// Colours of the style sheet; further models repeat them with another dash.
pub(super) const N_COLORS: usize = 10;

/// One model over all splits and seeds.
#[derive(Clone)]
pub(super) struct Model {
    pub(super) run: String,
    /// The run where its name should show, which is when the report holds several; empty otherwise.
    pub(super) shown_run: String,
    pub(super) method: String,
    pub(super) role: String,
    pub(super) encoder: String,
    pub(super) params: Option<u64>,
    pub(super) macs: Option<u64>,
    /// Position among the colours of the style sheet, which are `--s0` (for the teacher), `--s1`, ...
    pub(super) color: usize,
    /// Summary of each split that was evaluated.
    pub(super) splits: Vec<SummaryRow>,
}

impl Model {
    /// As [`model_name`], with the run in front where the report holds several.
    pub(super) fn name(&self) -> String {
        in_run(&self.shown_run, model_name(&self.role, &self.method))
    }

    /// What tells it from the other models of a run: the method, or `Teacher`.
    pub(super) fn short_name(&self) -> String {
        let name = match self.role.as_str() {
            "teacher" => "Teacher".to_string(),
            "student" => self.method.to_uppercase(),
            _ => self.method.clone(),
        };
        in_run(&self.shown_run, name)
    }

    /// Whether this is the model of a row with these names.
    pub(super) fn is(&self, run: &str, role: &str, method: &str, encoder: &str) -> bool {
        (self.run.as_str(), self.role.as_str(), self.method.as_str(), self.encoder.as_str())
            == (run, role, method, encoder)
    }

    pub(super) fn on(&self, split: &str) -> Option<&SummaryRow> {
        self.splits.iter().find(|s| s.split == split)
    }

    fn rank(&self, baseline: &str) -> u8 {
        match (self.role.as_str(), self.method == baseline) {
            ("teacher", _) => 0,
            (_, true) => 1,
            _ => 2,
        }
    }
}

/// `Teacher`, `Student (CSC+CE)`, or the method itself for a role of the caller's.
pub(super) fn model_name(role: &str, method: &str) -> String {
    match role {
        "teacher" => "Teacher".to_string(),
        "student" => format!("Student ({})", method.to_uppercase()),
        _ => method.to_string(),
    }
}

/// `run: name`, or the name alone where the run is empty.
pub(super) fn in_run(run: &str, name: String) -> String {
    if run.is_empty() { name } else { format!("{run}: {name}") }
}

/// The name of a run as the page shows it: empty where all there is belongs to one run.
pub(super) fn shown_run<'a>(report: &Report, run: &'a str) -> &'a str {
    let rows = report.rows.iter().map(|r| &r.run);
    let mut runs = rows.chain(report.timings.iter().map(|r| &r.run)).chain(report.curves.iter().map(|c| &c.run));
    let first = runs.next();
    if runs.any(|r| Some(r) != first) { run } else { "" }
}

/// All models: teachers, then the baseline, then the others, each in the order of the rows.
pub(super) fn models(report: &Report) -> Vec<Model> {
    let mut models: Vec<Model> = Vec::new();
    for row in summarize(&report.rows) {
        match models.iter_mut().find(|m| m.splits[0].same_model(&row)) {
            Some(model) => model.splits.push(row),
            None => models.push(Model {
                run: row.run.clone(),
                shown_run: shown_run(report, &row.run).to_string(),
                method: row.method.clone(),
                role: row.role.clone(),
                encoder: row.encoder.clone(),
                params: row.params,
                macs: row.macs,
                color: 0,
                splits: vec![row],
            }),
        }
    }
    models.sort_by_key(|m| m.rank(&report.baseline));
    // The grey of the first colour is the teacher's alone.
    let first = usize::from(models.first().is_none_or(|m| m.role != "teacher"));
    models.iter_mut().enumerate().for_each(|(i, m)| m.color = first + i);
    models
}

/// The splits of the page: those expected, then others that the rows have.
pub(super) fn splits(report: &Report) -> Vec<String> {
    let mut splits = report.splits.clone();
    for row in &report.rows {
        if !splits.contains(&row.split) {
            splits.push(row.split.clone());
        }
    }
    splits
}

/// The expected splits on which nothing was evaluated.
pub(super) fn absent(report: &Report) -> Vec<String> {
    report.splits.iter().filter(|s| report.rows.iter().all(|r| r.split != **s)).cloned().collect()
}

/// The model of its run that a curve's label names.
pub(super) fn model_of<'a>(curve: &Curve, models: &'a [Model]) -> Option<&'a Model> {
    let names = |word: &str| {
        curve
            .label
            .strip_prefix(word)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '/', ',', '(', ':']))
    };
    if names("teacher") {
        return models.iter().find(|m| m.run == curve.run && m.role == "teacher");
    }
    let of_run = models.iter().filter(|m| m.run == curve.run);
    of_run.filter(|m| m.role != "teacher" && names(&m.method)).max_by_key(|m| m.method.len())
}
