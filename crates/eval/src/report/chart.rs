//! Charts as inline SVG: grouped horizontal bars and lines. Colours come from the page's style sheet.

use std::fmt::Write;

use super::format::escape;

/// One bar: which colour, how long, how sure.
pub(super) struct Bar {
    pub(super) color: usize,
    pub(super) name: String,
    /// Fraction in [0, 1]; `None` is written as absent.
    pub(super) value: Option<f64>,
    pub(super) sd: Option<f64>,
}

/// Bars that belong together, with their name at the left.
pub(super) struct BarGroup {
    pub(super) label: String,
    pub(super) swatch: Option<[u8; 3]>,
    pub(super) bars: Vec<Bar>,
}

const BARS_WIDTH: f64 = 480.0;
const BARS_LEFT: f64 = 116.0;
const BARS_RIGHT: f64 = 430.0;

/// Grouped bars of fractions, drawn in percent; `axis` names the quantity.
pub(super) fn grouped_bars(groups: &[BarGroup], max: f64, axis: &str) -> String {
    let most = groups.iter().map(|g| g.bars.len()).max().unwrap_or(1);
    let (thick, gap) = if most <= 4 { (10.0, 2.0) } else { (8.0, 1.0) };
    let top = 6.0;
    let mut y = top;
    let mut body = String::new();
    let (ticks, max) = nice_ticks(0.0, 100.0 * max.clamp(0.01, 1.0), 5);
    let at = |percent: f64| BARS_LEFT + (BARS_RIGHT - BARS_LEFT) * percent / max;
    for group in groups {
        let height = group.bars.len() as f64 * (thick + gap) - gap;
        let middle = y + height / 2.0;
        if let Some([r, g, b]) = group.swatch {
            let _ = write!(
                body,
                "<rect class=\"swatch\" x=\"0.5\" y=\"{}\" width=\"10\" height=\"10\" rx=\"2\" fill=\"rgb({r},{g},{b})\"/>",
                num(middle - 5.0)
            );
        }
        let x = if group.swatch.is_some() { 16.0 } else { 0.5 };
        let _ = write!(
            body,
            "<text class=\"lab\" x=\"{x}\" y=\"{}\">{}<title>{}</title></text>",
            num(middle + 4.0),
            escape(&shorten(&group.label, if group.swatch.is_some() { 15 } else { 17 })),
            escape(&group.label)
        );
        for bar in &group.bars {
            let base = y + thick - 1.0;
            match bar.value {
                Some(value) => {
                    let percent = 100.0 * value;
                    let _ = write!(
                        body,
                        "<rect class=\"f{}\" x=\"{BARS_LEFT}\" y=\"{}\" width=\"{}\" height=\"{thick}\"><title>{}: {} \
                         {percent:.2} %</title></rect>",
                        bar.color % super::models::N_COLORS,
                        num(y),
                        num((at(percent) - BARS_LEFT).max(0.5)),
                        escape(&group.label),
                        escape(&bar.name),
                    );
                    let mut end = at(percent);
                    if let Some(sd) = bar.sd {
                        let (low, high) = (at((percent - 100.0 * sd).max(0.0)), at((percent + 100.0 * sd).min(max)));
                        let line = num(y + thick / 2.0);
                        let _ = write!(
                            body,
                            "<path class=\"whisker\" d=\"M{l} {line}H{h}M{l} {a}v4M{h} {a}v4\"/>",
                            l = num(low),
                            h = num(high),
                            a = num(y + thick / 2.0 - 2.0)
                        );
                        end = end.max(high);
                    }
                    let _ = write!(
                        body,
                        "<text class=\"val\" x=\"{}\" y=\"{}\">{percent:.1}</text>",
                        num(end + 4.0),
                        num(base)
                    );
                }
                None => {
                    let _ = write!(
                        body,
                        "<text class=\"val absent\" x=\"{}\" y=\"{}\">absent</text>",
                        BARS_LEFT + 4.0,
                        num(base)
                    );
                }
            }
            y += thick + gap;
        }
        y += if most > 1 { 9.0 } else { 5.0 };
    }
    let bottom = y;
    let mut grid = String::new();
    for tick in ticks {
        let x = num(at(tick));
        let _ = write!(
            grid,
            "<path class=\"grid\" d=\"M{x} {top}V{}\"/><text class=\"tick mid\" x=\"{x}\" y=\"{}\">{}</text>",
            num(bottom - 2.0),
            num(bottom + 11.0),
            tick_text(tick)
        );
    }
    let _ = write!(
        grid,
        "<text class=\"tick mid\" x=\"{}\" y=\"{}\">{}</text>",
        num((BARS_LEFT + BARS_RIGHT) / 2.0),
        num(bottom + 25.0),
        escape(axis)
    );
    format!(
        "<svg viewBox=\"0 0 {BARS_WIDTH} {}\" role=\"img\" aria-label=\"Bars: {}\">{grid}{body}</svg>",
        num(bottom + 30.0),
        escape(axis)
    )
}

/// One line of a chart.
pub(super) struct Line {
    pub(super) color: usize,
    pub(super) name: String,
    pub(super) x: Vec<f64>,
    pub(super) y: Vec<f64>,
}

const LINES: [f64; 2] = [440.0, 250.0];
/// Left, right, top, bottom edge of the plotted area.
const PLOT: [f64; 4] = [54.0, 430.0, 8.0, 208.0];
/// Lines with at most this many points are drawn as they are, with a mark at each point.
const FEW_POINTS: usize = 40;
const MAX_BUCKETS: usize = 240;

/// Lines over training steps: the raw values faint, a centred moving average strong.
pub(super) fn line_chart(lines: &[Line], axis: &str) -> String {
    let smooth: Vec<Vec<(f64, f64)>> = lines.iter().map(smoothed).collect();
    let strong = || smooth.iter().flatten();
    let raw: Vec<f64> = lines.iter().flat_map(|l| l.y.iter().copied().filter(|v| v.is_finite())).collect();
    let Some((x_low, x_high)) = extent(strong().map(|p| p.0)).filter(|_| !raw.is_empty()) else {
        return "<p class=\"muted\">No finite value was recorded.</p>".to_string();
    };
    let (mut low, mut high) = extent(strong().map(|p| p.1)).unwrap_or((0.0, 1.0));
    // Single spikes of the raw values would squash the rest: the frame holds 98 of 100 of them.
    let (raw_low, raw_high) = (quantile(&raw, 0.01), quantile(&raw, 0.99));
    (low, high) = (low.min(raw_low), high.max(raw_high));
    // A scale that almost reaches zero shows it.
    if low > 0.0 && low < 0.35 * high {
        low = 0.0;
    }
    let (y_ticks, y_low, y_high) = span_ticks(low, high, 5);
    let (x_ticks, x_low, x_high) = {
        let (ticks, _, _) = span_ticks(x_low, x_high, 5);
        (ticks, x_low, if x_high > x_low { x_high } else { x_low + 1.0 })
    };
    let [left, right, top, bottom] = PLOT;
    let px = |x: f64| left + (right - left) * (x - x_low) / (x_high - x_low);
    let py = |y: f64| bottom - (bottom - top) * (y - y_low) / (y_high - y_low);
    let mut body = String::new();
    for tick in y_ticks {
        let y = num(py(tick));
        let _ = write!(
            body,
            "<path class=\"grid\" d=\"M{left} {y}H{right}\"/><text class=\"tick end\" x=\"{}\" y=\"{}\">{}</text>",
            left - 6.0,
            num(py(tick) + 4.0),
            tick_text(tick)
        );
    }
    for tick in x_ticks.into_iter().filter(|t| (x_low..=x_high).contains(t)) {
        let x = num(px(tick));
        let _ = write!(
            body,
            "<path class=\"axis\" d=\"M{x} {bottom}v4\"/><text class=\"tick mid\" x=\"{x}\" y=\"{}\">{}</text>",
            bottom + 16.0,
            tick_text(tick)
        );
    }
    let _ = write!(
        body,
        "<path class=\"axis\" d=\"M{left} {bottom}H{right}\"/><text class=\"tick mid\" x=\"{}\" y=\"{}\">training step</text>\
         <text class=\"tick mid\" transform=\"translate(11 {}) rotate(-90)\">{}</text>",
        num((left + right) / 2.0),
        bottom + 34.0,
        num((top + bottom) / 2.0),
        escape(&shorten(axis, 34))
    );
    for line in lines.iter().filter(|l| l.x.len() > FEW_POINTS) {
        let _ = write!(
            body,
            "<path class=\"raw l{}\" d=\"{}\"/>",
            line.color % super::models::N_COLORS,
            path(&envelope(line), px, |y| { py(y.clamp(y_low, y_high)) })
        );
    }
    for (line, points) in lines.iter().zip(&smooth) {
        let color = line.color % super::models::N_COLORS;
        let _ = write!(
            body,
            "<path class=\"line l{color} d{color}\" d=\"{}\"><title>{}</title></path>",
            path(points, px, py),
            escape(&line.name)
        );
        if line.x.len() <= FEW_POINTS {
            for &(x, y) in points.iter().filter(|p| p.1.is_finite()) {
                let _ =
                    write!(body, "<circle class=\"f{color}\" cx=\"{}\" cy=\"{}\" r=\"2.4\"/>", num(px(x)), num(py(y)));
            }
        }
    }
    format!(
        "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"Curves: {}\">{body}</svg>",
        LINES[0],
        LINES[1],
        escape(axis)
    )
}

/// The mark of a line in a legend, with its colour and dash.
pub(super) fn line_key(color: usize) -> String {
    let color = color % super::models::N_COLORS;
    format!(
        "<svg class=\"key\" viewBox=\"0 0 26 10\" aria-hidden=\"true\"><path class=\"line l{color} d{color}\" d=\"M1 5H25\"/></svg>"
    )
}

/// Centred moving average over a 25th of the points, at no more than `MAX_BUCKETS` places.
fn smoothed(line: &Line) -> Vec<(f64, f64)> {
    let n = line.x.len().min(line.y.len());
    if n <= FEW_POINTS {
        return (0..n).map(|i| (line.x[i], line.y[i])).collect();
    }
    let reach = (n / 50).max(1);
    let n_places = n.min(MAX_BUCKETS);
    (0..n_places)
        .map(|place| {
            let i = place * (n - 1) / (n_places - 1);
            // Shrinks towards both ends, so that it stays centred.
            let reach = reach.min(i).min(n - 1 - i);
            let window = line.y[i - reach..=i + reach].iter().filter(|v| v.is_finite());
            let (sum, count) = window.fold((0.0, 0), |(sum, count), v| (sum + v, count + 1));
            (line.x[i], if count > 0 { sum / f64::from(count) } else { f64::NAN })
        })
        .collect()
}

/// Least and greatest value of each of at most `MAX_BUCKETS` stretches of the raw values.
fn envelope(line: &Line) -> Vec<(f64, f64)> {
    let n = line.x.len().min(line.y.len());
    let size = n.div_ceil(MAX_BUCKETS).max(1);
    if size == 1 {
        return (0..n).map(|i| (line.x[i], line.y[i])).collect();
    }
    (0..n)
        .step_by(size)
        .flat_map(|from| {
            let to = (from + size).min(n);
            let x = line.x[from..to].iter().sum::<f64>() / (to - from) as f64;
            match extent(line.y[from..to].iter().copied()) {
                Some((low, high)) => [(x, low), (x, high)],
                None => [(x, f64::NAN); 2],
            }
        })
        .collect()
}

fn path(points: &[(f64, f64)], px: impl Fn(f64) -> f64, py: impl Fn(f64) -> f64) -> String {
    let mut d = String::new();
    let mut pen = 'M';
    for &(x, y) in points {
        if x.is_finite() && y.is_finite() {
            let _ = write!(d, "{pen}{} {}", num(px(x)), num(py(y)));
            pen = 'L';
        } else {
            pen = 'M';
        }
    }
    d
}

fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((f64::min(low, v), f64::max(high, v))),
    })
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// Multiples of 1, 2 or 5 times a power of ten from `low` up, and the end of the scale.
fn nice_ticks(low: f64, high: f64, n_wanted: usize) -> (Vec<f64>, f64) {
    let (ticks, _, end) = span_ticks(low, high, n_wanted);
    (ticks, end)
}

/// Ticks that enclose `low..high`, and the ends of the scale.
fn span_ticks(low: f64, high: f64, n_wanted: usize) -> (Vec<f64>, f64, f64) {
    let high = if high > low { high } else { low + low.abs().max(1e-6) * 0.1 };
    let rough = (high - low) / n_wanted as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.999).unwrap_or(10.0 * power);
    let (first, last) = ((low / step + 1e-9).floor() as i64, (high / step - 1e-9).ceil() as i64);
    ((first..=last).map(|i| i as f64 * step).collect(), first as f64 * step, last as f64 * step)
}

fn tick_text(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        s if s >= 10_000.0 => return format!("{}k", trim(&format!("{:.1}", value / 1000.0))),
        s if s >= 1.0 || s == 0.0 => format!("{value:.2}"),
        s if s >= 1e-4 => format!("{value:.5}"),
        _ => return format!("{value:.0e}"),
    };
    trim(&text).to_string()
}

fn trim(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

/// A coordinate with at most two digits.
fn num(value: f64) -> String {
    let text = format!("{value:.2}");
    trim(&text).to_string()
}

fn shorten(text: &str, n: usize) -> String {
    if text.chars().count() <= n { text.to_string() } else { text.chars().take(n - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose_the_values() {
        assert_eq!(span_ticks(0.0, 0.83, 5).0, [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        let (ticks, low, high) = span_ticks(37.2, 61.9, 5);
        assert!(low <= 37.2 && high >= 61.9 && (4..=8).contains(&ticks.len()), "{ticks:?}");
        assert_eq!(
            [tick_text(0.6000000000000001), tick_text(12_000.0), tick_text(0.0), tick_text(0.00025)],
            ["0.6", "12k", "0", "0.00025"]
        );
        // One constant value still has a scale of some width.
        let (_, low, high) = span_ticks(3.0, 3.0, 5);
        assert!(high > low);
    }

    #[test]
    fn smoothing_keeps_ends_length_and_constants() {
        let line = |y: Vec<f64>| Line { color: 0, name: String::new(), x: (0..y.len()).map(|i| i as f64).collect(), y };
        let points = smoothed(&line((0..1000).map(|i| f64::from(i) * 2.0).collect()));
        assert_eq!(points.len(), MAX_BUCKETS);
        // A centred mean leaves a straight line where it is.
        assert!(points.iter().all(|(x, y)| (y - 2.0 * x).abs() < 1e-9));
        assert_eq!((points[0], points[MAX_BUCKETS - 1]), ((0.0, 0.0), (999.0, 1998.0)));
        let few = smoothed(&line(vec![1.0, 5.0, 2.0]));
        assert_eq!(few, [(0.0, 1.0), (1.0, 5.0), (2.0, 2.0)]);
    }

    #[test]
    fn curves_without_a_number_say_so() {
        let line = Line { color: 0, name: String::new(), x: vec![1.0, 2.0], y: vec![f64::NAN; 2] };
        assert!(line_chart(&[line], "loss").contains("No finite value"));
        assert!(line_chart(&[], "loss").contains("No finite value"));
        let line = Line { color: 3, name: "a<b".into(), x: vec![1.0, 2.0, 3.0], y: vec![1.0, f64::NAN, 2.0] };
        let svg = line_chart(&[line], "loss");
        assert!(svg.contains("a&lt;b") && !svg.contains("NaN"), "{svg}");
    }
}
