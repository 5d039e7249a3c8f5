//! The page as a whole: the frame, the headline and the order of the sections.

use super::Report;
use super::format::{escape, plural};
use super::gains::{Verdict, headline};
use super::models::models;
use super::{costs, sections};

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let models = models(report);
    let body = [
        opening(report),
        sections::results(report, &models),
        sections::gains_table(report),
        sections::per_class(report, &models),
        super::curves::curves(report, &models),
        sections::gallery(report),
        costs::costs(report),
        sections::facts(report, &models),
    ]
    .concat();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\">\n<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n\
         <main>\n{body}</main>\n</body>\n</html>\n",
        title = escape(&report.title),
        style = include_str!("style.css"),
    )
}

fn opening(report: &Report) -> String {
    let mut out = format!("<header>\n<h1>{}</h1>\n", escape(&report.title));
    if let Some(headline) = headline(report) {
        let tone = match headline.verdict {
            Some(Verdict::Helped) => "tone-good",
            Some(Verdict::WithinNoise | Verdict::NoiseUnknown | Verdict::SeedsMissing) => "tone-warn",
            Some(Verdict::DidNotHelp) => "tone-bad",
            None => "tone-plain",
        };
        out.push_str(&format!("<div class=\"headline {tone}\"><strong>{}.</strong>", escape(&headline.title)));
        for sentence in &headline.sentences {
            out.push_str(&format!("<p>{}</p>", escape(sentence)));
        }
        out.push_str("</div>\n");
    } else if report.rows.is_empty() {
        out.push_str(&format!("<p class=\"muted\">{} of results.</p>\n", plural(0, "row")));
    }
    for line in &report.summary {
        out.push_str(&format!("<p>{}</p>\n", escape(line)));
    }
    out.push_str("</header>\n");
    out
}
