//! Names in the sentence of a finding.

use msrgate_msrs::Entry;

use crate::Pattern;

/// Patterns as an author wrote them: `@x2apic`, `0x10`.
pub(super) fn listed(patterns: &[&Pattern]) -> String {
    let names: Vec<String> = patterns.iter().map(|pattern| format!("`{pattern}`")).collect();
    names.join(", ")
}

/// The names of some MSRs, in a sentence.
pub(super) fn named(entries: &[&Entry]) -> String {
    let names: Vec<String> = entries.iter().map(|entry| entry.name().to_owned()).collect();
    some(&names)
}

/// The first of many, and how many more there are.
pub(super) fn some(names: &[String]) -> String {
    match names.split_at_checked(5) {
        Some((first, more)) if more.len() > 1 => format!("{} and {} more", first.join(", "), more.len()),
        _ => names.join(", "),
    }
}
