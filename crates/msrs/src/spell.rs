//! MSRs as a policy spells them.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use msrgate_core::{Msr, MsrRange};

use crate::class::Class;
use crate::entry::all;
use crate::lookup::by_msr;

/// The name of the MSR, else the index.
pub fn name(msr: Msr) -> String {
    by_msr(msr).map_or_else(|| msr.to_string(), |entry| entry.name().to_owned())
}

/// MSRs in order as ranges.
pub fn runs(msrs: &[Msr]) -> Vec<MsrRange> {
    msrs.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0))
        .filter_map(|run| MsrRange::new(*run.first()?, *run.last()?))
        .collect()
}

/// MSRs in order as a policy spells them: three or more in a row as a range.
pub fn patterns(msrs: &[Msr]) -> Vec<String> {
    runs(msrs).into_iter().flat_map(range).collect()
}

/// A range as a policy spells it: each MSR where there are no more than two; else by the names of its ends, and by their
/// indices where one has no name, since a reader could not tell how far `0x1a3..=MSR_TURBO_RATIO_LIMIT` goes.
pub fn range(range: MsrRange) -> Vec<String> {
    if range.len() <= 2 {
        return range.iter().map(name).collect();
    }
    vec![match (by_msr(range.first()), by_msr(range.last())) {
        (Some(first), Some(last)) => format!("{}..={}", first.name(), last.name()),
        _ => range.to_string(),
    }]
}

/// Names for several MSRs at once, with the MSRs in order.
pub fn groups() -> Vec<(String, Vec<Msr>)> {
    let classes = classes()
        .into_iter()
        .map(|(class, members)| (format!("@{class}"), members));
    classes.chain(globs()).collect()
}

/// The classes that hold several MSRs, those with the most first.
pub fn classes() -> Vec<(Class, Vec<Msr>)> {
    let mut classes: Vec<(Class, Vec<Msr>)> = Vec::new();
    for class in Class::ALL {
        let members = all().iter().filter(|entry| entry.classes().contains(class));
        let members: Vec<Msr> = members.map(|entry| entry.msr).collect();
        if members.len() > 1 {
            classes.push((*class, members));
        }
    }
    classes.sort_by_key(|(_, members)| core::cmp::Reverse(members.len()));
    classes
}

/// The globs `PREFIX*` whose prefix ends with a word of a name (`IA32_MTRR_*`, `MSR_TURBO_RATIO_LIMIT*`), with what they
/// match: three MSRs or more. Of several globs that match the same MSRs, the shortest.
fn globs() -> Vec<(String, Vec<Msr>)> {
    // As `glob` matches: a name, and the same without Linux's `MSR_`.
    let mut names: Vec<(String, Msr)> = Vec::new();
    for entry in all() {
        for name in entry.names() {
            let name = name.to_ascii_uppercase();
            names.extend(name.strip_prefix("MSR_").map(|bare| (bare.to_owned(), entry.msr)));
            names.push((name, entry.msr));
        }
    }
    names.sort_unstable();
    let prefixes: BTreeSet<&str> = all().iter().flat_map(|entry| words(entry.name())).collect();
    let mut globs: BTreeMap<Vec<Msr>, String> = BTreeMap::new();
    for prefix in prefixes {
        let from = names.partition_point(|(name, _)| name.as_str() < prefix);
        let matched = names.iter().skip(from).take_while(|(name, _)| name.starts_with(prefix));
        let members: BTreeSet<Msr> = matched.map(|(_, msr)| *msr).collect();
        if members.len() >= 3 {
            let members = members.into_iter().collect();
            globs.entry(members).or_insert_with(|| format!("{prefix}*"));
        }
    }
    globs.into_iter().map(|(members, glob)| (glob, members)).collect()
}

/// The prefixes of a name that end with one of its words, and say more than whose it is.
fn words(name: &str) -> impl Iterator<Item = &str> {
    let ends = name.char_indices().filter_map(|(at, c)| match c {
        '_' => Some(at + 1),
        c if c.is_ascii_digit() => Some(at),
        _ => None,
    });
    ends.filter_map(|end| name.get(..end))
        .filter(|prefix| prefix.len() >= 4 && !["IA32_", "MSR_"].contains(prefix))
        // `glob` takes `MSR_IA32_*` for `IA32_*`.
        .filter(|prefix| !prefix.starts_with("MSR_IA32_"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup::{by_name, glob};

    #[test]
    fn a_glob_is_what_the_database_makes_of_it() {
        let globs = globs();
        assert!(globs.len() > 50, "{}", globs.len());
        for (pattern, members) in globs {
            let found: Vec<Msr> = glob(&pattern).map(|entry| entry.msr).collect();
            assert_eq!(found, members, "{pattern}");
        }
    }

    #[test]
    fn a_name_means_its_msr_wherever_it_has_one() {
        for entry in all() {
            let spelt = name(entry.msr);
            let meant = by_name(&spelt).map(|found| found.msr);
            assert!(meant == Some(entry.msr) || spelt == entry.msr.to_string(), "{spelt}");
        }
        assert_eq!(name(Msr(0x8b)), "IA32_BIOS_SIGN_ID");
    }
}
