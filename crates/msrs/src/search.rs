//! What a person may mean by a text.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::Msr;

use crate::entry::{Entry, all, bare};
use crate::lookup::{by_msr, by_name, class, glob};
use crate::number;

/// The MSRs that a text may mean, by index: those of an index (`0x8b`, `139`, or as [`printed`]), a range (`0x400..=0x47f`), a class
/// (`@pmu`), a pattern (`IA32_MC*`) or a name; else those with all of its words in a name, and those of a class that is called
/// so; else those of which all of its words are said: in names, classes and what these are for, makers, features.
pub fn search(text: &str) -> Vec<&'static Entry> {
    let text = text.trim();
    if let Some(name) = text.strip_prefix('@') {
        return class(name).into_iter().flatten().collect();
    }
    if let Some((first, last)) = text.split_once("..=") {
        let (Some(first), Some(last)) = (one(first.trim()), one(last.trim())) else {
            return Vec::new();
        };
        return all()
            .iter()
            .filter(|entry| (first..=last).contains(&entry.msr))
            .collect();
    }
    if let Ok(index) = number::parse(text) {
        let msr = u32::try_from(index).ok().map(Msr);
        return msr.and_then(by_msr).into_iter().collect();
    }
    if text.contains(['*', '?']) {
        return glob(text).collect();
    }
    if let Some(entry) = by_name(text).or_else(|| printed(text).and_then(by_msr)) {
        return vec![entry];
    }
    let words: Vec<String> = text
        .split(|character: char| !character.is_alphanumeric() && character != '_')
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_uppercase)
        .collect();
    if words.is_empty() {
        return Vec::new();
    }
    let in_a_name = |entry: &&Entry| {
        let mut names = entry.names().map(str::to_ascii_uppercase);
        let called = |name: String| words.iter().all(|word| name.contains(bare(word)));
        names.any(called)
            || entry
                .classes()
                .iter()
                .any(|class| class.name().eq_ignore_ascii_case(text))
    };
    let named: Vec<&Entry> = all().iter().filter(in_a_name).collect();
    if !named.is_empty() {
        return named;
    }
    let said = |entry: &&Entry| {
        let said = said(entry);
        words.iter().all(|word| said.contains(word.as_str()))
    };
    all().iter().filter(said).collect()
}

/// The names and aliases that are most like a misspelt one, at most three; none if none comes near.
pub fn near(name: &str) -> Vec<&'static str> {
    let names = slips(name, all().iter().flat_map(Entry::names)).collect::<Vec<_>>();
    let least = names.iter().map(|(slips, _)| *slips).min();
    let nearest = names.iter().filter(|(slips, _)| Some(*slips) == least);
    nearest.map(|(_, name)| *name).take(3).collect()
}

/// The name or alias that is most like a misspelt one; `None` if none comes near.
pub fn nearest(name: &str) -> Option<&'static str> {
    near(name).first().copied()
}

/// The MSRs that are known before and after an index.
pub fn around(msr: Msr) -> (Option<&'static Entry>, Option<&'static Entry>) {
    let after = all().partition_point(|entry| entry.msr <= msr);
    let before = all().partition_point(|entry| entry.msr < msr);
    (
        before.checked_sub(1).and_then(|place| all().get(place)),
        all().get(after),
    )
}

/// The candidate that takes the fewest slips to become the text; `None` if none comes near.
pub fn nearest_of<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let nearest = slips(text, candidates).min_by_key(|&(slips, _)| slips);
    nearest.map(|(_, candidate)| candidate)
}

/// The candidates that come near, and how many slips each takes to become the text.
fn slips<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> impl Iterator<Item = (usize, &'a str)> {
    let wanted = bare(text).to_ascii_uppercase();
    // One slip in four characters still points somewhere; more is a guess.
    let limit = wanted.len().div_ceil(4);
    candidates.filter_map(move |candidate| {
        let spelling = bare(candidate).to_ascii_uppercase();
        if spelling.len().abs_diff(wanted.len()) > limit {
            return None;
        }
        let slips = distance(wanted.as_bytes(), spelling.as_bytes());
        (slips <= limit).then_some((slips, candidate))
    })
}

/// An index or a name.
fn one(text: &str) -> Option<Msr> {
    match number::parse(text) {
        Ok(index) => u32::try_from(index).ok().map(Msr),
        Err(_) => by_name(text).map(|entry| entry.msr),
    }
}

/// An index in hexadecimal without `0x`, as manuals and logs print it: Intel's `48DH`, AMD's `MSRC001_0015` and `C001_0015`,
/// and `c0010015` of KVM's log. `None` for what may be a name.
pub fn printed(text: &str) -> Option<Msr> {
    let text = text.strip_prefix("MSR").unwrap_or(text);
    let text = text.strip_suffix(['H', 'h']).unwrap_or(text);
    let halves = text
        .split_once('_')
        .filter(|(high, low)| (high.len(), low.len()) == (4, 4));
    let digits = halves.map_or_else(|| text.to_owned(), |(high, low)| [high, low].concat());
    let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let has_digit = digits.bytes().any(|byte| byte.is_ascii_digit());
    let index = u32::from_str_radix(&digits, 16).ok();
    index.filter(|_| hexadecimal && has_digit).map(Msr)
}

/// All that is said of an MSR, in capitals.
fn said(entry: &Entry) -> String {
    let mut said: Vec<String> = entry.names().map(str::to_owned).collect();
    said.extend(entry.classes().iter().map(|class| format!("{class} {}", class.about())));
    said.extend(entry.vendors().iter().map(ToString::to_string));
    said.push(entry.exists().to_string());
    said.extend(entry.needs().map(|need| format!("{} {}", need.system, need.why)));
    said.join(" ").to_ascii_uppercase()
}

/// How many slips make one text the other: a character put in, left out or changed, or two neighbours swapped.
fn distance(a: &[u8], b: &[u8]) -> usize {
    // The row of `a` two characters back, which a swap goes on from, and the row of one character back.
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    let mut last = None;
    for (i, &x) in (1..).zip(a) {
        let mut row = vec![i];
        let mut left = i;
        let mut last_y = None;
        for (j, (&y, corner)) in b.iter().zip(above.windows(2)).enumerate() {
            let &[diagonal, up] = corner else { break };
            let mut slips = (diagonal + usize::from(x != y)).min(left + 1).min(up + 1);
            if last == Some(y) && last_y == Some(x) {
                // Both texts have a character before this one, so that `before` is filled and `j` is not 0.
                slips = before.get(j - 1).map_or(slips, |swapped| slips.min(swapped + 1));
            }
            row.push(slips);
            left = slips;
            last_y = Some(y);
        }
        before = core::mem::replace(&mut above, row);
        last = Some(x);
    }
    above.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_insertions_deletions_changes_and_swaps() {
        #[rustfmt::skip]
        let cases = [
            ("", "", 0), ("a", "", 1), ("", "ab", 2), ("abc", "abc", 0), ("kitten", "sitting", 3), ("ab", "ba", 1),
            ("mrs", "msr", 1), ("abcd", "acbd", 1), ("abcd", "badc", 2), ("abc", "ca", 3), ("aab", "aba", 1),
        ];
        for (a, b, expected) in cases {
            assert_eq!(distance(a.as_bytes(), b.as_bytes()), expected, "{a} {b}");
            assert_eq!(distance(b.as_bytes(), a.as_bytes()), expected, "{b} {a}");
        }
    }
}
