//! The machine, the date and the load, as the system tells them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::results::Machine;

/// Extensions that change how fast the kernels are, in the kernel's names.
const EXTENSIONS: [&str; 8] = ["avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd"];

/// What this machine is; empty where there is no `/proc`.
pub fn machine() -> Machine {
    let read = |path: &str| fs_err::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = info.lines().find(|l| l.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
    let has = |name: &&str| flags.split_whitespace().any(|flag| flag == *name);
    let total = read("/proc/meminfo");
    let kib = total.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    Machine {
        cpu: processor(field),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        memory_mib: kib.unwrap_or(0u64) >> 10,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
        extensions: EXTENSIONS.iter().filter(|name| has(name)).map(|name| name.to_string()).collect(),
    }
}

/// The model's name; a virtual machine may hide all but the maker, and family and model tell it apart then.
fn processor(field: impl Fn(&str) -> Option<String>) -> String {
    let name = field("model name").unwrap_or_else(|| format!("unknown {}", std::env::consts::ARCH));
    match (field("cpu family"), field("model")) {
        (Some(family), Some(model)) if !name.chars().any(|c| c.is_ascii_digit()) => {
            format!("{name} family {family} model {model}")
        }
        _ => name,
    }
}

/// Load averages over 1, 5 and 15 minutes; empty where the kernel does not say.
pub fn load_average() -> String {
    let text = fs_err::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Today, `YYYY-MM-DD`, UTC.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds / 86_400)
}

/// The date `days` after 1970-01-01, by the Gregorian calendar counted from the 1st of March of the year 0, so that
/// the day a leap year adds comes last.
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        let found = [0, 59, 10_956, 11_016, 11_017, 19_782, 19_783, 47_540].map(date);
        let expected = [
            "1970-01-01",
            "1970-03-01",
            "1999-12-31",
            "2000-02-29",
            "2000-03-01",
            "2024-02-29",
            "2024-03-01",
            "2100-02-28",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_hidden_model_is_told_by_its_numbers() {
        let fields = |name: &'static str| {
            move |key: &str| match key {
                "model name" => Some(name.to_string()),
                "cpu family" => Some("25".to_string()),
                "model" => Some("17".to_string()),
                _ => None,
            }
        };
        assert_eq!(processor(fields("AMD EPYC")), "AMD EPYC family 25 model 17");
        assert_eq!(processor(fields("Ryzen 7 5800X")), "Ryzen 7 5800X");
        assert!(processor(|_| None).starts_with("unknown "));
        assert!(machine().cores > 0);
    }
}
