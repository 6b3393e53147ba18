//! The words for single things: an MSR, a hash, a time, a count, a path.

use std::path::Path;

use msrgate_core::{Msr, MsrRange};
use msrgate_plan::Preset;
use serde_json::{Value, json};

use crate::stream;

/// The name of an MSR, where it has one.
pub(crate) fn name(msr: Msr) -> Option<&'static str> {
    msrgate_msrs::by_msr(msr).map(|entry| entry.name())
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

/// A hash as programs and people get it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Presets, as JSON has them.
pub(crate) fn presets<'a>(presets: impl IntoIterator<Item = &'a Preset>) -> Value {
    let presets = presets.into_iter();
    presets
        .map(|preset| json!({ "msr": preset.msr.to_string(), "value": format!("{:#x}", preset.value) }))
        .collect()
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

/// `1 access`, `2 accesses`.
pub(crate) fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
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
