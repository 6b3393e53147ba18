//! What is known of this machine without trying: its processor and its kernel.

use std::fs;

use msrgate_msrs::Linux;

/// The processor's name and the revision of its microcode, as far as the kernel tells them.
pub(crate) fn processor() -> (Option<String>, Option<String>) {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let find = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let found = lines.find(|(name, _)| name.trim() == key);
        found.map(|(_, value)| value.trim().to_owned())
    };
    (find("model name"), find("microcode"))
}

/// The version of the kernel that runs here.
pub(crate) fn linux() -> Option<Linux> {
    fs::read_to_string("/proc/sys/kernel/osrelease").ok()?.parse().ok()
}
