//! The growth of the CSC forms with the number of pixels, as SVG on logarithmic axes: one file, no style sheet.

use std::fmt::Write;

use crate::case::{Form, Layout, Work};
use crate::results::{Measured, Run, log_slope};

/// One line of a panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Legend.
    pub name: String,
    /// Stroke, as CSS writes colours.
    pub color: &'static str,
    /// (pixels, value), both positive.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// Exponent of the growth: slope of the straight line through the points on logarithmic axes.
    pub fn slope(&self) -> Option<f64> {
        log_slope(&self.points)
    }
}

const FORMS: [(Form, &str, &str); 3] = [
    (Form::Letter, "letter", "#c2410c"),
    (Form::Direct, "pixel pairs", "#7c3aed"),
    (Form::Linear, "class pairs", "#0369a1"),
];
const PEER: &str = "#6b7280";

/// Time in seconds of every form over the pixels, the peer's letter last, for `classes`.
pub fn times(run: &Run, classes: usize) -> Vec<Series> {
    series(run, classes, |measured| measured.median_ms() / 1e3)
}

/// Memory in MiB above the idle process, likewise.
pub fn memory(run: &Run, classes: usize) -> Vec<Series> {
    // Below a page nothing can be measured, nor drawn on this axis.
    series(run, classes, |measured| measured.grown_mib().max(1.0 / 256.0))
}

fn series(run: &Run, classes: usize, value: impl Fn(&Measured) -> f64) -> Vec<Series> {
    let mut found: Vec<Series> =
        FORMS.iter().map(|(_, name, color)| Series { name: name.to_string(), color, points: Vec::new() }).collect();
    let mut peer = Series { name: "letter, peer".into(), color: PEER, points: Vec::new() };
    for result in &run.cases {
        let Work::Csc { form, classes: c, hw, .. } = &result.case.work else { continue };
        let pixels = (hw[0] * hw[1]) as f64;
        if *c != classes {
            continue;
        }
        if let (Some(ours), Some(at)) = (&result.ours, FORMS.iter().position(|(f, ..)| f == form)) {
            found[at].points.push((pixels, value(ours)));
        }
        // The peer computes the letter whatever form stands beside it: one of them will do.
        if let Some(theirs) = result.peers.get(&Layout::Nchw)
            && !peer.points.iter().any(|(x, _)| *x == pixels)
        {
            peer.points.push((pixels, value(theirs)));
        }
    }
    found.push(peer);
    for line in &mut found {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    found.retain(|line| !line.points.is_empty());
    found
}

const SIZE: [f64; 2] = [860.0, 400.0];
/// Left edges of the two panels, and their common width, top and bottom.
const LEFT: [f64; 2] = [64.0, 492.0];
const WIDTH: f64 = 350.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 300.0;

/// Two panels, time and memory, for the number of classes of which the run holds more; `None` when it holds no CSC.
pub fn csc_growth(run: &Run) -> Option<String> {
    let points = |classes: usize| times(run, classes).iter().map(|s| s.points.len()).sum::<usize>();
    let classes = [19, 11].into_iter().max_by_key(|c| (points(*c), *c)).filter(|c| points(*c) > 0)?;
    let mut body = String::new();
    let panels = [("seconds", times(run, classes)), ("MiB above the idle process", memory(run, classes))];
    for (left, (axis, lines)) in LEFT.into_iter().zip(&panels) {
        panel(&mut body, left, axis, lines);
    }
    let title = format!("CSC, value and gradient, {classes} classes: {} threads of {}", run.threads, run.machine.cpu);
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{title}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#374151\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{}\" y=\"22\" font-size=\"14\" fill=\"#111827\">{title}</text>\n{body}</svg>\n",
        SIZE[0],
        SIZE[1],
        LEFT[0],
        title = escape(&title),
    ))
}

fn panel(body: &mut String, left: f64, axis: &str, lines: &[Series]) {
    let decades = |pick: fn(&(f64, f64)) -> f64| {
        let values = || lines.iter().flat_map(|s| s.points.iter().map(pick));
        let low = values().fold(f64::INFINITY, f64::min).log10().floor();
        let high = values().fold(f64::MIN_POSITIVE, f64::max).log10().ceil();
        (low, high.max(low + 1.0))
    };
    let ((x_low, x_high), (y_low, y_high)) = (decades(|p| p.0), decades(|p| p.1));
    let px = |x: f64| left + WIDTH * (x.log10() - x_low) / (x_high - x_low);
    let py = |y: f64| BOTTOM - (BOTTOM - TOP) * (y.log10() - y_low) / (y_high - y_low);
    for power in x_low as i32..=x_high as i32 {
        let x = px(10f64.powi(power));
        let _ = writeln!(
            body,
            "<path d=\"M{x:.1} {TOP}V{BOTTOM}\" stroke=\"#e5e7eb\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            BOTTOM + 16.0,
            power_text(power)
        );
    }
    for power in y_low as i32..=y_high as i32 {
        let y = py(10f64.powi(power));
        let _ = writeln!(
            body,
            "<path d=\"M{left} {y:.1}H{}\" stroke=\"#e5e7eb\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left + WIDTH,
            left - 6.0,
            y + 4.0,
            power_text(power)
        );
    }
    let _ = writeln!(
        body,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">pixels</text><text x=\"{left}\" y=\"{}\">{}</text>",
        left + WIDTH / 2.0,
        BOTTOM + 32.0,
        TOP - 6.0,
        escape(axis)
    );
    for (k, line) in lines.iter().enumerate() {
        let mut pen = 'M';
        let mut path = String::new();
        let mut marks = String::new();
        for &(x, y) in &line.points {
            let _ = write!(path, "{pen}{:.1} {:.1}", px(x), py(y));
            let _ = write!(marks, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{}\"/>", px(x), py(y), line.color);
            pen = 'L';
        }
        let dash = if line.color == PEER { " stroke-dasharray=\"5 4\"" } else { "" };
        let slope = line.slope().map_or_else(String::new, |s| format!(", slope {s:.2}"));
        let (x, y) = (left + WIDTH / 2.0 * (k % 2) as f64, BOTTOM + 56.0 + 20.0 * (k / 2) as f64);
        let _ = writeln!(
            body,
            "<path d=\"{path}\" fill=\"none\" stroke=\"{c}\" stroke-width=\"2\"{dash}/>{marks}\
             <path d=\"M{x} {y}h18\" stroke=\"{c}\" stroke-width=\"2\"{dash}/><text x=\"{}\" y=\"{}\">{}{slope}</text>",
            x + 24.0,
            y + 4.0,
            escape(&line.name),
            c = line.color
        );
    }
}

/// A power of ten as people read it.
fn power_text(power: i32) -> String {
    match power {
        0..=3 => 10i64.pow(power as u32).to_string(),
        4..=5 => format!("{}k", 10i64.pow(power as u32 - 3)),
        6..=8 => format!("{}M", 10i64.pow(power as u32 - 6)),
        -3..=-1 => format!("{:.*}", -power as usize, 10f64.powi(power)),
        _ => format!("1e{power}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::invented;

    #[test]
    fn lines_hold_the_points_and_their_slope() {
        let lines = times(&invented(), 19);
        let names: Vec<&str> = lines.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["class pairs", "letter, peer"]);
        assert_eq!(lines[0].points, [(2700.0, 0.010), (10_800.0, 0.040), (43_200.0, 0.160)]);
        assert!((lines[0].slope().unwrap() - 1.0).abs() < 1e-9 && (lines[1].slope().unwrap() - 2.0).abs() < 1e-9);
        assert_eq!(memory(&invented(), 19)[0].points[0], (2700.0, 100.0));
        assert!(times(&invented(), 11).is_empty());
    }

    #[test]
    fn the_plot_is_whole_and_needs_csc() {
        let svg = csc_growth(&invented()).unwrap();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        for word in ["19 classes", "slope 1.00", "slope 2.00", "seconds", "MiB above", "Some CPU @ 2 GHz"] {
            assert!(svg.contains(word), "`{word}` is not in\n{svg}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        // Three points in each panel for us, two for the peer.
        assert_eq!(svg.matches("<circle").count(), 10);
        let mut run = invented();
        run.cases.truncate(2);
        assert_eq!(csc_growth(&run), None);
    }

    #[test]
    fn powers_of_ten_read_well() {
        assert_eq!([-4, -2, 0, 3, 4, 5, 6].map(power_text), ["1e-4", "0.01", "1", "1000", "10k", "100k", "1M"]);
    }
}
