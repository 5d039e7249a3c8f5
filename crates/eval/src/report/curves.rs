//! Learning curves: a chart for each recorded quantity.

use std::fmt::Write;

use super::chart::{Line, line_chart, line_key};
use super::format::escape;
use super::models::{Model, N_COLORS, in_run, model_of, shown_run};
use super::sections::drawn;
use super::{Curve, Report};

/// One chart for each panel of curves.
pub(super) fn curves(report: &Report, models: &[Model]) -> String {
    if report.curves.is_empty() {
        return String::new();
    }
    let mut panels: Vec<(&str, Vec<&Curve>)> = Vec::new();
    for curve in &report.curves {
        match panels.iter_mut().find(|p| p.0 == curve.panel) {
            Some(panel) => panel.1.push(curve),
            None => panels.push((&curve.panel, vec![curve])),
        }
    }
    // Labels that name no model get the colours after the models'.
    let first_free = models.iter().map(|m| m.color + 1).max().unwrap_or(1);
    let name = |curve: &Curve| in_run(shown_run(report, &curve.run), curve.label.clone());
    let mut others: Vec<String> = Vec::new();
    for curve in &report.curves {
        if model_of(curve, models).is_none() && !others.contains(&name(curve)) {
            others.push(name(curve));
        }
    }
    let key = |curve: &Curve| match model_of(curve, models) {
        Some(model) => (model.color, model.name()),
        None => (first_free + others.iter().position(|o| *o == name(curve)).unwrap_or(0), name(curve)),
    };
    let mut out = String::from("<section>\n<h2>Learning curves</h2>\n<div class=\"charts curves\">\n");
    let (mut any_smoothed, mut any_left_out) = (false, false);
    let shown = drawn(report, models, &report.selection_split);
    for (panel, mut curves) in panels {
        let mut names: Vec<String> = curves.iter().map(|c| key(c).1).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > N_COLORS {
            curves.retain(|c| shown.iter().any(|m| m.name() == key(c).1));
            any_left_out = true;
        }
        // Where the models are more than the colours, each panel hands them out anew.
        let mut names: Vec<(usize, String, usize)> = Vec::new();
        for curve in &curves {
            let (color, name) = key(curve);
            match names.iter_mut().find(|n| n.1 == name) {
                Some(entry) => entry.2 += 1,
                None => names.push((if models.len() > N_COLORS { names.len() } else { color }, name, 1)),
            }
        }
        let color = |curve: &Curve| names.iter().find(|n| n.1 == key(curve).1).map_or(0, |n| n.0);
        let share = panel.contains("IoU") || panel.contains("accuracy");
        let scale = if share { 100.0 } else { 1.0 };
        let axis = if share { format!("{panel}, percent") } else { panel.to_string() };
        let lines: Vec<Line> = curves
            .iter()
            .map(|c| Line {
                color: color(c),
                name: name(c),
                x: c.x.clone(),
                y: c.y.iter().map(|y| y * scale).collect(),
            })
            .collect();
        any_smoothed |= curves.iter().any(|c| c.x.len() > 40);
        let _ = write!(out, "<figure><h3>{}</h3>{}<ul class=\"keys\">", escape(panel), line_chart(&lines, &axis));
        for (color, name, n) in names {
            let runs = if n > 1 { format!(" <span class=\"enc\">&nbsp;{n} runs</span>") } else { String::new() };
            let _ = write!(out, "<li>{}{}{runs}</li>", line_key(color), escape(&name));
        }
        out.push_str("</ul></figure>\n");
    }
    out.push_str("</div>\n");
    if any_left_out {
        let _ = writeln!(
            out,
            "<p class=\"muted small\">Where more than {N_COLORS} models have a curve, teacher, baseline and the best on {} are \
             drawn; metrics.csv of each stage has all.</p>",
            escape(&report.selection_split)
        );
    }
    if any_smoothed {
        out.push_str(
            "<p class=\"muted small\">Strong lines are a centred moving average over a 25th of the run, faint ones every \
             recorded value; single values beyond the frame are drawn at its edge.</p>\n",
        );
    }
    out.push_str("</section>\n");
    out
}
