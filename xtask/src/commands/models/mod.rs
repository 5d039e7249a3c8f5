//! `models list`, `describe` and `draw`: what the networks are and what they cost, without building them.

mod describe;
mod draw;
mod list;
mod parts;

use anyhow::Result;

use segdistill_models::{Configuration, ModelSpec, Subject, catalog, configurations, info};

use crate::cli::Models;
use crate::exit::usage;

/// Input size where nobody says another.
const DEFAULT_HW: [usize; 2] = [512, 512];
/// Classes where nobody says another: Cityscapes'.
const DEFAULT_CLASSES: usize = 19;

/// Runs the command.
pub(crate) fn run(args: &Models) -> Result<()> {
    match args {
        Models::List { published, size, classes, json } => list::run(*published, size.as_deref(), *classes, *json),
        Models::Describe(args) => describe::run(args),
        Models::Draw { out } => draw::run(out),
    }
}

/// The network called `name`: a published configuration, or a network on an encoder.
///
/// # Errors
/// A usage error that lists the networks and encoders and says the nearest name.
fn find(name: &str) -> Result<Configuration> {
    let published = configurations();
    if let Some(configuration) = published.iter().find(|c| c.name == name) {
        return Ok(configuration.clone());
    }
    let combined = catalog();
    if combined.iter().any(|entry| format!("{}-{}", entry.name, entry.encoder) == name) {
        let subject = Subject::Network(ModelSpec::named(name, DEFAULT_CLASSES)?);
        return Ok(Configuration { name: name.to_string(), subject, input_hw: DEFAULT_HW });
    }
    let full: Vec<String> = combined.iter().map(|entry| format!("{}-{}", entry.name, entry.encoder)).collect();
    // Of a network that exists its own names, else the networks'.
    let network = name.split_once('-').map_or(name, |(network, _)| network);
    let alike: Vec<&str> =
        full.iter().filter(|n| n.split_once('-').is_some_and(|(n, _)| n == network)).map(String::as_str).collect();
    let networks = || segdistill_models::networks().iter().map(|n| n.name).collect();
    let known = if alike.is_empty() { networks() } else { alike };
    let names = full.iter().map(String::as_str).chain(published.iter().map(|c| c.name.as_str()));
    let hint = nearest(name, names).map(|n| format!("; the nearest is `{n}`")).unwrap_or_default();
    // A pair of two parts that exist is refused for a reason of its own.
    if let Some(Err(why)) = ModelSpec::named(name, DEFAULT_CLASSES).ok().map(|spec| info(&spec)) {
        return Err(crate::exit::coded(crate::exit::USAGE, why));
    }
    Err(usage!(
        "unknown network `{name}`, known: {}\n  hint: NETWORK-ENCODER, or a name of `cargo xtask models list`{hint}",
        known.join(", ")
    ))
}

/// The most alike of `names`, if it is alike at all.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const ALIKE: f64 = 0.75;
    let scored = names.map(|n| (strsim::jaro(name, n), n)).filter(|(score, _)| *score >= ALIKE);
    scored.max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, n)| n)
}

/// `360x480` as [height, width].
pub(crate) fn parse_size(text: &str) -> Result<[usize; 2]> {
    let parsed = text.split_once('x').and_then(|(h, w)| Some([h.parse().ok()?, w.parse().ok()?]));
    match parsed {
        Some([h, w]) if h > 0 && w > 0 => Ok([h, w]),
        _ => Err(usage!("size `{text}`, expected HxW in pixels\n  hint: height first, such as 360x480")),
    }
}

/// A count of parameters with its unit: `22.44 M`.
fn count_text(count: u64) -> String {
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.1} k", count as f64 / 1e3),
        _ => format!("{:.2} M", count as f64 / 1e6),
    }
}

/// Multiply-accumulates with their unit: `31.6 GMACs`.
fn macs_text(macs: u64) -> String {
    match macs {
        0..1_000_000 => format!("{:.1} kMACs", macs as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MMACs", macs as f64 / 1e6),
        1_000_000_000..1_000_000_000_000 => format!("{:.1} GMACs", macs as f64 / 1e9),
        _ => format!("{:.2} TMACs", macs as f64 / 1e12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{self, USAGE};

    #[test]
    fn sizes_are_height_then_width() {
        assert_eq!(parse_size("360x480").unwrap(), [360, 480]);
        for bad in ["360", "360x", "x480", "360x480x3", "0x480", "360X480", "-1x4", "a×b", ""] {
            let error = parse_size(bad).unwrap_err();
            assert_eq!(exit::code_of(&error), USAGE, "{bad}");
            assert!(error.to_string().contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn counts_and_macs_carry_their_unit() {
        assert_eq!([0, 999, 1_500, 22_437_971].map(count_text), ["0", "999", "1.5 k", "22.44 M"]);
        let macs = [40_000, 512_300_000, 31_600_000_000, 1_234_000_000_000].map(macs_text);
        assert_eq!(macs, ["40.0 kMACs", "512.3 MMACs", "31.6 GMACs", "1.23 TMACs"]);
    }

    #[test]
    fn an_unknown_network_lists_the_known_and_the_nearest() {
        let error = find("deeplabv3plus-resnet43").unwrap_err();
        assert_eq!(exit::code_of(&error), USAGE);
        let text = error.to_string();
        assert!(text.contains("known: deeplabv3plus-resnet18, deeplabv3plus-resnet34"), "{text}");
        assert!(text.ends_with("the nearest is `deeplabv3plus-resnet34`"), "{text}");
        let error = find("deeplabv4-resnet18").unwrap_err().to_string();
        assert!(error.contains("known: deeplabv3plus, deeplabv3, pspnet"), "{error}");
        assert!(!find("foo").unwrap_err().to_string().contains("nearest"));
        let error = find("segnet-resnet18").unwrap_err();
        assert_eq!(exit::code_of(&error), USAGE);
        let error = error.to_string();
        assert!(error.contains("indices") && error.contains("vgg16"), "{error}");
        assert!(find("deeplabv3plus-xception65").is_ok());
        assert_eq!(find("skd/pspnet-resnet18-deep").unwrap().input_hw, [512, 1024]);
    }
}
