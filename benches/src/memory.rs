//! What this process holds in memory, as the kernel counts it.

/// Resident memory and its high-water mark, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Now (`VmRSS`).
    pub resident_kib: u64,
    /// At most since the start, or since [`reset_peak`] (`VmHWM`).
    pub peak_kib: u64,
}

/// What the kernel says of this process; `None` where there is no `/proc`.
pub fn memory() -> Option<Memory> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| status.lines().find_map(|l| kib(l.strip_prefix(name)?));
    Some(Memory { resident_kib: field("VmRSS:")?, peak_kib: field("VmHWM:")? })
}

/// Starts the high-water mark anew from what is resident now; says whether the kernel allowed it. Where it does not,
/// the mark covers the life of the process.
pub fn reset_peak() -> bool {
    fs_err::write("/proc/self/clear_refs", "5").is_ok()
}

/// Memory that could be had now, in MiB; `None` where the kernel does not say.
pub fn available_mib() -> Option<u64> {
    let info = fs_err::read_to_string("/proc/meminfo").ok()?;
    info.lines().find_map(|l| kib(l.strip_prefix("MemAvailable:")?)).map(|kib| kib >> 10)
}

/// `  1234 kB` as a number.
fn kib(text: &str) -> Option<u64> {
    text.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_sees_what_was_touched() {
        let Some(before) = memory() else { return };
        assert!(before.resident_kib > 0 && before.peak_kib >= before.resident_kib);
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().step_by(4096).map(|&b| u64::from(b)).sum::<u64>() > 0);
        let held = memory().unwrap();
        assert!(held.peak_kib >= before.resident_kib + (60 << 10), "{before:?} {held:?}");
        assert!(available_mib().unwrap() > 0);
    }
}
