//! What is known of this machine without trying: its kernel and its processor.

use std::fs;

/// The kernel's release, as `uname -r` prints it.
pub(crate) fn release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

/// The module that KVM is made whole by: the one that drives the processor's virtualization.
pub(crate) fn module() -> String {
    let loaded = fs::read_dir("/sys/module").into_iter().flatten();
    let names = loaded.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names = names.filter(|name| name.starts_with("kvm_"));
    names.min().unwrap_or_else(|| "kvm".into())
}

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
