//! The headline and the tables as Markdown.

use std::fmt::Write;

use super::Report;
use super::costs::{cost_name, cost_rows, ms_text};
use super::format::{count, duration, join, percent, percent_mean_sd, points, share};
use super::gains::{gains, headline};
use super::models::{Model, absent, in_run, models, shown_run, splits};
use super::sections::{class_iou, classes, derived_facts, present_text};

/// Text that neither ends a table cell nor starts markup.
fn cell(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => out.push(' '),
            '<' => out.push_str("&lt;"),
            '|' | '*' | '_' | '`' | '[' | ']' | '\\' => out.extend(['\\', c]),
            _ => out.push(c),
        }
    }
    out
}

fn table(out: &mut String, header: &[String], n_text: usize, rows: &[Vec<String>]) {
    let rule: Vec<&str> = (0..header.len()).map(|i| if i < n_text { "---" } else { "---:" }).collect();
    let _ = writeln!(out, "| {} |\n| {} |", header.join(" | "), rule.join(" | "));
    for row in rows {
        let _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out.push('\n');
}

fn header(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

fn named(model: &Model) -> String {
    match model.encoder.is_empty() {
        true => cell(&model.name()),
        false => cell(&format!("{}, {}", model.name(), model.encoder)),
    }
}

/// The whole report.
pub(super) fn page(report: &Report) -> String {
    let models = models(report);
    let mut out = format!("# {}\n\n", cell(&report.title));
    if let Some(headline) = headline(report) {
        let _ = writeln!(out, "**{}.**\n", cell(&headline.title));
        headline.sentences.iter().for_each(|s| out.push_str(&format!("{}\n\n", cell(s))));
    }
    report.summary.iter().for_each(|line| out.push_str(&format!("{}\n\n", cell(line))));
    results(&mut out, report, &models);
    gained(&mut out, report);
    per_class(&mut out, report, &models);
    costs(&mut out, report);
    facts(&mut out, report, &models);
    out
}

fn results(out: &mut String, report: &Report, models: &[Model]) {
    if models.is_empty() {
        return;
    }
    let splits = splits(report);
    out.push_str("## Results: mIoU in percent\n\n");
    let mut names = header(&["Model"]);
    names.extend(splits.iter().map(|s| cell(s)));
    names.extend(header(&["Seeds", "Parameters", "MACs"]));
    let rows: Vec<Vec<String>> = models
        .iter()
        .map(|model| {
            let mut row = vec![named(model)];
            row.extend(splits.iter().map(|s| model.on(s).map_or("absent".to_string(), |r| percent_mean_sd(r.miou))));
            let n_seeds = model.splits.iter().map(|s| s.seeds.len()).max().unwrap_or(0);
            row.extend([n_seeds.to_string(), count(model.params), count(model.macs)]);
            row
        })
        .collect();
    table(out, &names, 1, &rows);
    let absent = absent(report);
    if !absent.is_empty() {
        let (noun, verb) = if absent.len() == 1 { ("split", "is") } else { ("splits", "are") };
        let _ = writeln!(out, "The {} {noun} {verb} absent: nothing was evaluated there.\n", cell(&join(&absent)));
    }
    for split in splits.iter().filter(|s| !absent.contains(s)) {
        let _ = writeln!(out, "### All scores on {}\n", cell(split));
        let names = header(&[
            "Model",
            "mIoU",
            "Pixel accuracy",
            "Mean accuracy",
            "FW IoU",
            "Classes present",
            "Images",
            "Seeds",
        ]);
        let rows: Vec<Vec<String>> = models
            .iter()
            .filter_map(|model| {
                let row = model.on(split)?;
                Some(vec![
                    named(model),
                    percent_mean_sd(row.miou),
                    percent_mean_sd(row.pixel_accuracy),
                    percent_mean_sd(row.mean_accuracy),
                    percent_mean_sd(row.fw_iou),
                    present_text(row, report.class_names.len()),
                    row.n_images.to_string(),
                    row.seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
                ])
            })
            .collect();
        table(out, &names, 1, &rows);
    }
}

fn gained(out: &mut String, report: &Report) {
    let gains = gains(report);
    if gains.is_empty() {
        return;
    }
    let baseline = cell(&report.baseline.to_uppercase());
    let _ = writeln!(out, "## What distillation gained over {baseline} alone\n");
    let names = [
        "Method",
        "Split",
        &baseline,
        "Distilled",
        "Gain, points",
        "Pooled deviation",
        "Seeds better",
        "Gap to teacher closed",
        "Agreement with teacher",
        "Cost a step",
        "Verdict",
    ];
    let rows: Vec<Vec<String>> = gains
        .iter()
        .map(|gain| {
            vec![
                cell(&in_run(shown_run(report, &gain.run), gain.method.to_uppercase())),
                cell(&gain.split),
                percent_mean_sd(gain.baseline),
                percent_mean_sd(gain.distilled),
                points(gain.gain),
                gain.pooled_sd.map_or("unknown".to_string(), percent),
                format!("{} of {}", gain.seeds_better[0], gain.seeds_better[1]),
                gain.gap_share.map_or("–".to_string(), share),
                gain.agreement.map_or("–".to_string(), percent_mean_sd),
                gain.step_cost.map_or("–".to_string(), |cost| format!("{cost:.2} ×")),
                gain.verdict.text().to_string(),
            ]
        })
        .collect();
    table(out, &header(&names), 2, &rows);
}

fn per_class(out: &mut String, report: &Report, models: &[Model]) {
    for split in splits(report) {
        if report.per_class.iter().all(|r| r.split != split) {
            continue;
        }
        let _ = writeln!(out, "## IoU by class on {}, percent\n", cell(&split));
        let shown: Vec<&Model> = models.iter().filter(|m| m.on(&split).is_some()).collect();
        let mut names = header(&["Class"]);
        names.extend(shown.iter().map(|m| cell(&m.name())));
        let rows: Vec<Vec<String>> = classes(report)
            .into_iter()
            .map(|(idx, name)| {
                let mut row = vec![cell(&name)];
                row.extend(shown.iter().map(|model| match class_iou(report, model, &split, idx) {
                    iou if iou.n == 0 => "absent".to_string(),
                    iou => percent_mean_sd(iou),
                }));
                row
            })
            .collect();
        table(out, &names, 1, &rows);
    }
}

fn costs(out: &mut String, report: &Report) {
    let costs = cost_rows(report);
    if costs.is_empty() {
        return;
    }
    out.push_str("## Cost\n\n");
    let rows: Vec<Vec<String>> = costs
        .iter()
        .map(|cost| {
            vec![
                cell(&cost_name(report, cost)),
                cell(&cost.stage),
                duration(cost.seconds.mean),
                ms_text(cost.ms_per_step),
                cost.relative.map_or("–".to_string(), |r| format!("{r:.2} ×")),
                cost.seconds.n.to_string(),
            ]
        })
        .collect();
    table(out, &header(&["Model", "Stage", "Time a run", "ms a step", "Relative", "Runs"]), 2, &rows);
}

fn facts(out: &mut String, report: &Report, models: &[Model]) {
    let facts = [derived_facts(report, models), report.environment.clone()].concat();
    if facts.is_empty() && report.notes.is_empty() && report.plan_toml.is_none() {
        return;
    }
    out.push_str("## Facts\n\n");
    facts.iter().for_each(|(name, value)| out.push_str(&format!("- {}: {}\n", cell(name), cell(value))));
    report.notes.iter().for_each(|note| out.push_str(&format!("- {}\n", cell(note))));
    if let Some(plan) = &report.plan_toml {
        // A fence longer than any run of backticks inside.
        let longest = plan.split(|c| c != '`').map(str::len).max().unwrap_or(0);
        let fence = "`".repeat(longest.max(2) + 1);
        let _ = writeln!(out, "\n{fence}toml\n{}\n{fence}", plan.trim_end());
    }
}
