//! The sections of the page, each a piece of HTML, empty where the report has nothing to show.

use std::fmt::Write;

use crate::stats::MeanSd;
use crate::table::SummaryRow;

use super::Report;
use super::chart::{Bar, BarGroup, grouped_bars, line_key};
use super::format::{count, escape, join, percent, percent_mean_sd, plural, points, share};
use super::gains::{Verdict, gains};
use super::models::{Model, N_COLORS, absent, in_run, shown_run, splits};

fn named(model: &Model) -> String {
    let encoder = match model.encoder.is_empty() {
        true => String::new(),
        false => format!(" <span class=\"enc\">{}</span>", escape(&model.encoder)),
    };
    format!("<span class=\"dot b{}\"></span>{}{encoder}", model.color % N_COLORS, escape(&model.name()))
}

/// The main table, the bars beside it, and every score in a second table.
pub(super) fn results(report: &Report, models: &[Model]) -> String {
    if models.is_empty() {
        return String::new();
    }
    let splits = splits(report);
    let absent = absent(report);
    let mut out = String::from(
        "<section>\n<h2>Results: mIoU in percent</h2>\n<div class=\"scroll\"><table class=\"pin\"><thead><tr><th class=\"l\">Model</th>",
    );
    for split in &splits {
        let role = if *split == report.selection_split && splits.len() > 1 { "<br>selection" } else { "" };
        let _ = write!(out, "<th>{}{role}</th>", escape(split));
    }
    out.push_str("<th>Seeds</th><th>Parameters</th><th>MACs</th></tr></thead><tbody>\n");
    for model in models {
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", named(model));
        for split in &splits {
            match model.on(split) {
                Some(row) => {
                    let _ = write!(out, "<td>{}</td>", percent_mean_sd(row.miou));
                }
                None => out.push_str("<td class=\"absent\">absent</td>"),
            }
        }
        let n_seeds = model.splits.iter().map(|s| s.seeds.len()).max().unwrap_or(0);
        let _ = writeln!(out, "<td>{n_seeds}</td><td>{}</td><td>{}</td></tr>", count(model.params), count(model.macs));
    }
    out.push_str("</tbody></table></div>\n");
    out.push_str(
        "<p class=\"muted small\">mIoU pools one confusion matrix over the split and averages the classes present.",
    );
    if models.iter().any(|m| m.splits.iter().any(|s| s.miou.sd.is_some())) {
        out.push_str(" ± is the sample standard deviation over seeds.");
    }
    if models.iter().any(|m| m.macs.is_some()) {
        out.push_str(" MACs are multiply-accumulates of one image.");
    }
    if !absent.is_empty() {
        let (noun, verb) = if absent.len() == 1 { ("split", "is") } else { ("splits", "are") };
        let _ = write!(out, " The {} {noun} {verb} absent: nothing was evaluated there.", escape(&join(&absent)));
    }
    out.push_str("</p>\n");
    let present: Vec<&String> = splits.iter().filter(|s| !absent.contains(s)).collect();
    if models.len() > 1 {
        let wide = if models.len() > N_COLORS { " curves" } else { "" };
        let _ = writeln!(out, "<div class=\"charts{wide}\">{}</div>", split_bars(models, &present));
    }
    out.push_str(&all_scores(report, models, &present));
    out.push_str("</section>\n");
    out
}

/// Bars of every model: the splits in one figure, or a figure a split with the models by name where colours run out.
fn split_bars(models: &[Model], splits: &[&String]) -> String {
    let axis = "mIoU, percent; whiskers: one deviation over seeds";
    let bar = |model: &Model, split: &str| {
        let miou = model.on(split).map(|row| row.miou).filter(|m| m.mean.is_finite());
        Bar { color: model.color, name: model.name(), value: miou.map(|m| m.mean), sd: miou.and_then(|m| m.sd) }
    };
    if models.len() > N_COLORS {
        let named = |split: &str| -> Vec<BarGroup> {
            let one = |m: &Model| BarGroup { label: m.short_name(), swatch: None, bars: vec![bar(m, split)] };
            models.iter().map(one).collect()
        };
        let figure = |split: &&String| {
            let groups = named(split);
            let bars = grouped_bars(&groups, tallest(&groups), axis);
            format!("<figure><figcaption>{}</figcaption>{bars}</figure>", escape(split))
        };
        return splits.iter().map(figure).collect();
    }
    let groups: Vec<BarGroup> = splits
        .iter()
        .map(|split| BarGroup {
            label: (*split).clone(),
            swatch: None,
            bars: models.iter().map(|m| bar(m, split)).collect(),
        })
        .collect();
    format!("<figure>{}</figure>", grouped_bars(&groups, tallest(&groups), axis))
}

/// The models a chart has colours for: all, or teacher and baseline, then the best on `split`, in the order of the tables and
/// with colours of their own.
pub(super) fn drawn(report: &Report, models: &[Model], split: &str) -> Vec<Model> {
    if models.len() <= N_COLORS {
        return models.to_vec();
    }
    let mean = |m: &Model| m.on(split).map_or(f64::NEG_INFINITY, |row| row.miou.mean);
    let first = |m: &Model| m.role == "teacher" || m.method == report.baseline;
    let mut order: Vec<usize> = (0..models.len()).collect();
    order.sort_by(|&a, &b| {
        first(&models[b]).cmp(&first(&models[a])).then(mean(&models[b]).total_cmp(&mean(&models[a])))
    });
    order.truncate(N_COLORS);
    order.sort_unstable();
    order.into_iter().enumerate().map(|(color, i)| Model { color, ..models[i].clone() }).collect()
}

fn tallest(groups: &[BarGroup]) -> f64 {
    let ends = groups.iter().flat_map(|g| &g.bars).filter_map(|b| b.value.map(|v| v + b.sd.unwrap_or(0.0)));
    ends.fold(0.05, f64::max).min(1.0)
}

fn all_scores(report: &Report, models: &[Model], splits: &[&String]) -> String {
    let mut out = String::from(
        "<details><summary>All scores by split</summary>\n<div class=\"scroll\"><table><thead><tr><th class=\"l\">Model</th>\
         <th>mIoU</th><th>Pixel accuracy</th><th>Mean accuracy</th><th>FW IoU</th><th>Classes present</th><th>Images</th>\
         <th class=\"l\">Seeds</th></tr></thead>\n",
    );
    for split in splits {
        let _ = writeln!(out, "<tbody class=\"split\"><tr><th colspan=\"8\">{}</th></tr>", escape(split));
        for model in models {
            let Some(row) = model.on(split) else { continue };
            let seeds: Vec<String> = row.seeds.iter().map(u64::to_string).collect();
            let _ = writeln!(
                out,
                "<tr><td class=\"l\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td \
                 class=\"l\">{}</td></tr>",
                named(model),
                percent_mean_sd(row.miou),
                percent_mean_sd(row.pixel_accuracy),
                percent_mean_sd(row.mean_accuracy),
                percent_mean_sd(row.fw_iou),
                present_text(row, report.class_names.len()),
                row.n_images,
                seeds.join(", ")
            );
        }
        out.push_str("</tbody>\n");
    }
    out.push_str("</table></div>\n<p class=\"muted small\">Percent. FW IoU weighs each class by its share of pixels.</p></details>\n");
    out
}

/// `11 of 11`, or `9 to 11 of 11` when seeds differ.
pub(super) fn present_text(row: &SummaryRow, n_classes: usize) -> String {
    let [low, high] = row.n_classes_present;
    let of = if n_classes > 0 { format!(" of {n_classes}") } else { String::new() };
    if low == high { format!("{low}{of}") } else { format!("{low} to {high}{of}") }
}

/// What each method gained over the baseline.
pub(super) fn gains_table(report: &Report) -> String {
    let gains = gains(report);
    if gains.is_empty() {
        return String::new();
    }
    let baseline = escape(&report.baseline.to_uppercase());
    let encoders = gains.iter().any(|g| g.encoder != gains[0].encoder);
    let mut out = format!(
        "<section>\n<h2>What distillation gained over {baseline} alone</h2>\n<div class=\"scroll\"><table \
         class=\"pin\"><thead><tr><th class=\"l\">Method</th><th class=\"l\">Split</th><th>{baseline}</th><th>Distilled</th>\
         <th>Gain</th><th>Pooled<br>deviation</th><th>Seeds<br>better</th><th>Teacher gap<br>closed</th><th>Agreement<br>with teacher</th><th>Cost<br>a step</th><th \
         class=\"l\">Verdict</th></tr></thead><tbody>\n"
    );
    for gain in &gains {
        let tone = match gain.verdict {
            Verdict::Helped => "good",
            Verdict::WithinNoise | Verdict::NoiseUnknown | Verdict::SeedsMissing => "warn",
            Verdict::DidNotHelp => "bad",
        };
        let encoder =
            if encoders { format!(" <span class=\"enc\">{}</span>", escape(&gain.encoder)) } else { String::new() };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}{encoder}</th><td class=\"l\">{}</td><td>{}</td><td>{}</td><td class=\"best\">{}</td>\
             <td>{}</td><td>{} of {}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"l wrap {tone}\">{}</td></tr>",
            escape(&in_run(shown_run(report, &gain.run), gain.method.to_uppercase())),
            escape(&gain.split),
            percent_mean_sd(gain.baseline),
            percent_mean_sd(gain.distilled),
            points(gain.gain),
            gain.pooled_sd.map_or("unknown".to_string(), percent),
            gain.seeds_better[0],
            gain.seeds_better[1],
            gain.gap_share.map_or("–".to_string(), share),
            gain.agreement.map_or("–".to_string(), percent_mean_sd),
            gain.step_cost.map_or("–".to_string(), |cost| format!("{cost:.2} ×")),
            gain.verdict.text()
        );
    }
    out.push_str(
        "</tbody></table></div>\n<p class=\"muted small\">mIoU in percent, differences in points. The pooled deviation \
         is the sample standard deviation over seeds, pooled over both models; a gain counts as more than noise when it \
         is larger. With few seeds this is an indication, not a test. Agreement: share of pixels, in percent, to which the \
         student gives the teacher's class, right or wrong. Cost: time of a training step over the baseline's.</p>\n</section>\n",
    );
    out
}

/// Bars of every class on the selection split, and the numbers of every split.
pub(super) fn per_class(report: &Report, models: &[Model]) -> String {
    if report.per_class.is_empty() {
        return String::new();
    }
    let has = |split: &str| report.per_class.iter().any(|r| r.split == split);
    let with_rows: Vec<String> = splits(report).into_iter().filter(|s| has(s)).collect();
    let Some(split) = with_rows.iter().find(|s| **s == report.selection_split).or(with_rows.first()) else {
        return String::new();
    };
    let shown = drawn(report, models, split);
    let groups: Vec<BarGroup> = classes(report)
        .into_iter()
        .map(|(idx, name)| BarGroup {
            swatch: report.class_colors.get(idx).copied(),
            bars: shown
                .iter()
                .filter(|m| m.on(split).is_some())
                .map(|m| {
                    let iou = class_iou(report, m, split, idx);
                    let value = iou.mean.is_finite().then_some(iou.mean);
                    Bar { color: m.color, name: m.name(), value, sd: iou.sd }
                })
                .collect(),
            label: name,
        })
        .collect();
    let mut out = format!(
        "<section>\n<h2>IoU by class on {}</h2>\n{}<div class=\"charts\">\n",
        escape(split),
        keys(&shown, false)
    );
    let max = tallest(&groups);
    // Two charts side by side on a wide page, one below the other on a phone.
    let half = if groups.len() > 6 { groups.len().div_ceil(2) } else { groups.len() };
    for part in groups.chunks(half.max(1)) {
        let _ = writeln!(out, "<figure>{}</figure>", grouped_bars(part, max, "IoU, percent"));
    }
    out.push_str("</div>\n<p class=\"muted small\">Mean over seeds");
    if groups.iter().flat_map(|g| &g.bars).any(|b| b.sd.is_some()) {
        out.push_str("; whiskers show one sample standard deviation");
    }
    if shown.len() < models.len() {
        let _ =
            write!(out, ". Drawn are teacher, baseline and the best on {}; the numbers below have all", escape(split));
    }
    out.push_str(". A class in neither labels nor predictions is absent and left out of the mean.</p>\n");
    out.push_str(&per_class_numbers(report, models, &with_rows));
    out.push_str("</section>\n");
    out
}

/// Class indices and names, from the table of classes or from the rows.
pub(super) fn classes(report: &Report) -> Vec<(usize, String)> {
    if !report.class_names.is_empty() {
        return report.class_names.iter().cloned().enumerate().collect();
    }
    let mut classes: Vec<(usize, String)> = report.per_class.iter().map(|r| (r.class_idx, r.class.clone())).collect();
    classes.sort();
    classes.dedup();
    classes
}

/// IoU of one class over the seeds of one model.
pub(super) fn class_iou(report: &Report, model: &Model, split: &str, class_idx: usize) -> MeanSd {
    let rows = report
        .per_class
        .iter()
        .filter(|r| r.class_idx == class_idx && r.split == split && model.is(&r.run, &r.role, &r.method, &r.encoder));
    MeanSd::of(rows.filter_map(|r| r.iou))
}

fn per_class_numbers(report: &Report, models: &[Model], splits: &[String]) -> String {
    let mut out = String::from(
        "<details><summary>The numbers behind the bars, every split</summary>\n<div class=\"scroll\"><table class=\"pin\"><thead><tr><th class=\"l\">Class</th>",
    );
    let columns: Vec<(&String, &Model)> =
        splits.iter().flat_map(|s| models.iter().filter(move |m| m.on(s).is_some()).map(move |m| (s, m))).collect();
    for (split, model) in &columns {
        let _ = write!(out, "<th>{}<br>{}</th>", escape(split), escape(&model.name()));
    }
    out.push_str("</tr></thead><tbody>\n");
    for (idx, name) in classes(report) {
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", escape(&name));
        for (split, model) in &columns {
            let iou = class_iou(report, model, split, idx);
            match iou.n {
                0 => out.push_str("<td class=\"absent\">absent</td>"),
                _ => {
                    let _ = write!(out, "<td>{}</td>", percent_mean_sd(iou));
                }
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div></details>\n");
    out
}

fn keys(models: &[Model], lines: bool) -> String {
    let mut out = String::from("<ul class=\"keys\">");
    for model in models {
        let mark = match lines {
            true => line_key(model.color),
            false => format!("<span class=\"dot b{}\"></span>", model.color % N_COLORS),
        };
        let _ = write!(out, "<li>{mark}{}</li>", escape(&model.name()));
    }
    out.push_str("</ul>\n");
    out
}

/// The class legend and the rows of pictures.
pub(super) fn gallery(report: &Report) -> String {
    if report.gallery.is_empty() && report.class_colors.is_empty() {
        return String::new();
    }
    let title = if report.gallery.is_empty() { "Classes" } else { "Pictures" };
    let mut out = format!("<section>\n<h2>{title}</h2>\n");
    if !report.class_colors.is_empty() {
        out.push_str("<ul class=\"chips\" aria-label=\"Class colours\">");
        let void = report.void_color.iter().map(|c| ("void (not counted)", c));
        let classes = report.class_names.iter().map(String::as_str).zip(&report.class_colors);
        for (name, [r, g, b]) in classes.chain(void) {
            let _ = write!(
                out,
                "<li><span class=\"sw\" style=\"background:rgb({r},{g},{b})\"></span>{}</li>",
                escape(name)
            );
        }
        out.push_str("</ul>\n");
    }
    for row in &report.gallery {
        // At most six side by side, and lines of about equal length.
        let n_columns = row.panels.len().div_ceil(row.panels.len().div_ceil(6).max(1)).max(2);
        let _ = writeln!(
            out,
            "<div class=\"row\"><h3>{} <span class=\"enc\">{}</span></h3><div class=\"panels\" style=\"--cols:{n_columns}\">",
            escape(&row.name),
            escape(&row.split)
        );
        for (caption, picture) in &row.panels {
            let alt = escape(&format!("{caption} of {}", row.name));
            match picture.to_data_uri() {
                Ok(uri) => {
                    let _ = write!(
                        out,
                        "<figure><img src=\"{uri}\" width=\"{}\" height=\"{}\" alt=\"{alt}\">",
                        picture.w, picture.h
                    );
                }
                // A picture that does not fit is said to be missing rather than left out.
                Err(error) => {
                    let _ =
                        write!(out, "<figure><p class=\"bad small\">No picture: {}</p>", escape(&error.to_string()));
                }
            }
            let _ = writeln!(out, "<figcaption>{}</figcaption></figure>", escape(caption));
        }
        out.push_str("</div></div>\n");
    }
    out.push_str("</section>\n");
    out
}

/// Facts that the rows themselves tell.
pub(super) fn derived_facts(report: &Report, models: &[Model]) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let splits: Vec<String> = splits(report)
        .iter()
        .map(|split| match models.iter().filter_map(|m| m.on(split)).map(|r| r.n_images).max() {
            Some(n) => format!("{split}: {}", plural(n, "image")),
            None => format!("{split}: absent"),
        })
        .collect();
    if !report.rows.is_empty() {
        facts.push(("Splits".to_string(), splits.join(", ")));
        let mut seeds: Vec<u64> = report.rows.iter().map(|r| r.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        facts.push(("Seeds".to_string(), seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")));
    }
    if !report.class_names.is_empty() {
        facts.push(("Classes".to_string(), report.class_names.len().to_string()));
    }
    facts
}

/// How the numbers came about: facts, notes and the plan.
pub(super) fn facts(report: &Report, models: &[Model]) -> String {
    let facts = [derived_facts(report, models), report.environment.clone()].concat();
    if facts.is_empty() && report.notes.is_empty() && report.plan_toml.is_none() {
        return String::new();
    }
    let mut out = String::from("<section>\n<h2>Facts</h2>\n<dl>\n");
    for (name, value) in &facts {
        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
    }
    out.push_str("</dl>\n");
    if !report.notes.is_empty() {
        out.push_str("<ul>\n");
        report.notes.iter().for_each(|note| {
            let _ = writeln!(out, "<li>{}</li>", escape(note));
        });
        out.push_str("</ul>\n");
    }
    if let Some(plan) = &report.plan_toml {
        let _ = writeln!(out, "<details><summary>The plan</summary><pre>{}</pre></details>", escape(plan.trim_end()));
    }
    out.push_str("</section>\n");
    out
}
