//! The words for single things: an MSR, a hash, a time, a count, a path.

use std::path::Path;
use std::time::SystemTime;

use msrgate_core::{Disposition, FaultCause, Msr, MsrRange, Reason};
use msrgate_msrs::{Changed, Part};
use msrgate_plan::Preset;
use msrgate_policy::Code;
pub(crate) use msrgate_policy::print::counted;

use crate::json::{Printed, object};
use crate::stream;

/// The name of an MSR, where it has one.
pub(crate) fn name(msr: Msr) -> Option<&'static str> {
    msrgate_msrs::by_msr(msr).map(|entry| entry.name())
}

/// What the bits of a register's value mean: `SCE LME LMA NXE`; nothing where that is not known.
pub(crate) fn bits(msr: Msr, value: u64) -> String {
    joined(&msrgate_msrs::bits(msr, value))
}

/// A value, and what its bits mean.
pub(crate) fn value(msr: Msr, value: u64) -> String {
    match bits(msr, value) {
        bits if bits.is_empty() => format!("{value:#x}"),
        bits => format!("{value:#x} ({bits})"),
    }
}

/// By which bits a register's value differs from an earlier one: `+SVME -NXE`; nothing where that is not known.
pub(crate) fn changed(msr: Msr, before: u64, after: u64) -> String {
    joined(&msrgate_msrs::changed(msr, before, after))
}

fn joined<T: ToString>(parts: &[T]) -> String {
    let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
    parts.join(" ")
}

/// What the bits of a register's value mean, as JSON has it.
pub(crate) fn bits_printed(msr: Msr, value: u64) -> Vec<impl Printed> {
    msrgate_msrs::bits(msr, value).iter().map(part).collect()
}

/// By which bits a register's value differs from an earlier one, as JSON has it.
pub(crate) fn changed_printed(msr: Msr, before: u64, after: u64) -> Vec<impl Printed> {
    let changed = msrgate_msrs::changed(msr, before, after).into_iter();
    let one = |changed: Changed| {
        object! {
            /// The field in the later value.
            #[serde(flatten)]
            after: part(&changed.after),
            /// What the field was in the earlier value.
            before: format!("{:#x}", changed.before.value),
            /// The manual's word for that; null where it has none.
            word_before: changed.before.word,
        }
    };
    changed.map(one).collect()
}

fn part(part: &Part) -> impl Printed + use<> {
    object! {
        /// The lowest bit.
        first: part.first,
        /// The highest bit.
        last: part.last,
        /// The field's name; null for bits that are not known.
        name: part.name,
        /// The field's value; of an address, with the zeros below it.
        value: format!("{:#x}", part.value),
        /// The manual's word for the value; null where it has none.
        word: part.word,
    }
}

/// The first names of a range, for orientation.
pub(crate) fn names(range: MsrRange) -> String {
    let known = msrgate_msrs::within(range);
    match known {
        [] => String::new(),
        [one] => one.name().to_owned(),
        [one, two] => format!("{}, {}", one.name(), two.name()),
        [first, .., last] => format!("{} … {} ({})", first.name(), last.name(), known.len()),
    }
}

/// The bits of a mask, by number: `bit 5`, `bits 0..=4, 63`.
pub(crate) fn bit_numbers(mask: u64) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for bit in (0..64).filter(|bit| mask >> bit & 1 == 1) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == bit => *last = bit,
            _ => runs.push((bit, bit)),
        }
    }
    let runs = runs.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}..={last}"),
    });
    let word = if mask.count_ones() == 1 { "bit" } else { "bits" };
    format!("{word} {}", runs.collect::<Vec<_>>().join(", "))
}

/// What docs/findings.md says of a kind of finding: its paragraph without the heading.
pub(crate) fn finding(code: Code) -> Option<&'static str> {
    let heading = format!("\n## {}: ", code.code());
    let (_, section) = FINDINGS.split_once(&heading)?;
    let (_, text) = section.split_once('\n')?;
    Some(text.split("\n## ").next().unwrap_or_default().trim())
}

/// The home of what findings mean.
const FINDINGS: &str = include_str!("../docs/findings.md");

/// A hash as programs and people get it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Presets, as JSON has them.
pub(crate) fn presets<'a>(presets: impl IntoIterator<Item = &'a Preset>) -> Vec<impl Printed> {
    let presets = presets.into_iter();
    presets
        .map(|preset| {
            object! {
                /// The register.
                msr: preset.msr.to_string(),
                /// What is put there.
                value: format!("{:#x}", preset.value),
            }
        })
        .collect()
}

/// What an access got: what was done, why it faulted or left the kernel, and what the policy would do.
pub(crate) fn outcome(
    did: Disposition,
    why: Option<FaultCause>,
    reason: Option<Reason>,
    would: Option<Disposition>,
) -> String {
    let would = would.map(|would| format!("; policy: {would}")).unwrap_or_default();
    match (why, reason) {
        (Some(why), _) => format!("{did}: {why}{would}"),
        (None, Some(reason)) if reason != Reason::Filter => format!("{did} ({reason}){would}"),
        (None, _) => format!("{did}{would}"),
    }
}

/// For how long a thread of the VMM stood still at most, of so many nanoseconds.
pub(crate) fn stood_still(longest: u64) -> String {
    match longest {
        0 => "no thread of the VMM stood still".to_owned(),
        _ => format!("no thread of the VMM stood still for more than {}", duration(longest)),
    }
}

/// A time as people read it.
pub(crate) fn duration(nanoseconds: u64) -> String {
    let float = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", float / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", float / 1e6),
        _ => format!("{:.1} s", float / 1e9),
    }
}

/// Date and time in UTC, as RFC 3339 spells them; a time before 1970 is its first moment.
pub(crate) fn date(time: SystemTime) -> String {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    // Days in eras of 400 years that begin on the first of March.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let (month, date) = ((march + 2) % 12 + 1, of_year - (153 * march + 2) / 5 + 1);
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Properties that QEMU's `-cpu` is to turn off, as its argument has them.
pub(crate) fn switches(properties: &[&str]) -> String {
    let switches: Vec<String> = properties.iter().map(|name| format!("-{name}")).collect();
    switches.join(",")
}

/// A text of others in one line of a table, shown and not acted on. What goes to a [`stream`] needs it only where it is to be
/// one line.
pub(crate) fn plain(text: &str) -> String {
    stream::shown(text, "").into_owned()
}

/// The path of a file as a shell's word.
pub(crate) fn quoted(path: &Path) -> String {
    let name = path.display().to_string();
    // An option begins with `-`.
    let name = match name.starts_with('-') {
        true => format!("./{name}"),
        false => name,
    };
    let bare = |c: char| c.is_ascii_alphanumeric() || "_./+,:@%-".contains(c);
    match !name.is_empty() && name.chars().all(bare) {
        true => name,
        false => format!("'{}'", name.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_hint_is_one_word_of_a_shell() {
        let words = ["a/b-1.jsonl", "-n", "a; b", "it's", "", "$(x)"].map(|path| quoted(Path::new(path)));
        assert_eq!(words, ["a/b-1.jsonl", "./-n", "'a; b'", r"'it'\''s'", "''", "'$(x)'"]);
    }

    #[test]
    fn a_time_is_told_in_the_unit_that_suits_it() {
        let told = [999, 1_500, 999_949, 2_000_000, 90_000_000_000].map(duration);
        assert_eq!(told, ["999 ns", "1.5 µs", "999.9 µs", "2.0 ms", "90.0 s"]);
    }
}
