//! Numbers and names as text: percent, points, sizes, escaping.

use crate::stats::MeanSd;

/// Text that is safe between tags and inside a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

/// A fraction in percent with two digits, without the sign; an en dash when it is not a number.
pub(super) fn percent(fraction: f64) -> String {
    if fraction.is_finite() { format!("{:.2}", 100.0 * fraction) } else { "–".to_string() }
}

/// Mean and deviation in percent, as `57.03 ± 0.41`; without the deviation when it is unknown.
pub(super) fn percent_mean_sd(value: MeanSd) -> String {
    match value.sd {
        Some(sd) => format!("{} ± {}", percent(value.mean), percent(sd)),
        None => percent(value.mean),
    }
}

/// A fraction in whole percent, as `58 %` or `−9 %`.
pub(super) fn share(fraction: f64) -> String {
    let text = format!("{:.0} %", 100.0 * fraction.abs());
    if fraction < 0.0 && text != "0 %" { format!("−{text}") } else { text }
}

/// A difference of fractions in points with its sign, as `+1.90` or `−0.35`.
pub(super) fn points(difference: f64) -> String {
    if !difference.is_finite() {
        return "–".to_string();
    }
    let text = format!("{:.2}", 100.0 * difference.abs());
    match text.as_str() {
        "0.00" => text,
        _ if difference < 0.0 => format!("−{text}"),
        _ => format!("+{text}"),
    }
}

/// A count with a unit prefix, as `22.4 M`; an en dash when unknown.
pub(super) fn count(value: Option<u64>) -> String {
    let Some(value) = value else { return "–".to_string() };
    match value {
        0..=9_999 => value.to_string(),
        10_000..=999_999 => format!("{:.1} k", value as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.2} M", value as f64 / 1e6),
        _ => format!("{:.2} G", value as f64 / 1e9),
    }
}

/// Seconds for reading: `0.84 s`, `12.3 s`, `4 min 05 s`, `1 h 02 min`.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "–".to_string();
    }
    let whole = seconds.round() as u64;
    match seconds {
        s if s < 9.995 => format!("{s:.2} s"),
        s if s < 59.95 => format!("{s:.1} s"),
        _ if whole < 3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Names in a sentence: `a`, `a and b`, `a, b and c`.
pub(super) fn join(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

/// `1 seed`, `3 seeds`.
pub(super) fn plural(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(percent(0.570_26), "57.03");
        assert_eq!(percent(f64::NAN), "–");
        assert_eq!(percent_mean_sd(MeanSd { mean: 0.5, sd: Some(0.004), n: 3 }), "50.00 ± 0.40");
        assert_eq!(
            [points(0.019), points(-0.0035), points(0.00001), points(-0.00001)],
            ["+1.90", "−0.35", "0.00", "0.00"]
        );
        assert_eq!([share(0.576), share(-0.09), share(-0.004)], ["58 %", "−9 %", "0 %"]);
        assert_eq!([count(Some(9_999)), count(Some(22_437_000)), count(None)], ["9999", "22.44 M", "–"]);
        assert_eq!(
            [duration(0.842), duration(12.34), duration(245.2), duration(3725.0)],
            ["0.84 s", "12.3 s", "4 min 05 s", "1 h 02 min"]
        );
        assert_eq!(duration(59.97), "1 min 00 s");
        assert_eq!(join(&["a".into(), "b".into(), "c".into()]), "a, b and c");
        assert_eq!(escape("<b a=\"1\">&'"), "&lt;b a=&quot;1&quot;&gt;&amp;&#39;");
    }
}
