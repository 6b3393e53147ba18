//! What is known of this machine without trying: its processor.

use std::fs;

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
