//! Finding MSRs by index, name, pattern and class.

use msrgate_core::{Msr, MsrRange, Op};

use crate::class::Class;
use crate::entry::{Entry, all, bare, by_bare_name, restores};
use crate::restore::Restore;
use crate::wildcard::matches;

/// The MSR of this index.
pub fn by_msr(msr: Msr) -> Option<&'static Entry> {
    let place = all().binary_search_by_key(&msr.0, |entry| entry.msr.0).ok()?;
    all().get(place)
}

/// The MSRs of a range, by index.
pub fn within(range: MsrRange) -> &'static [Entry] {
    let from = all().partition_point(|entry| entry.msr < range.first());
    let to = all().partition_point(|entry| entry.msr <= range.last());
    all().get(from..to).unwrap_or_default()
}

/// The MSR of this name or alias: in any case, with or without `MSR_` before it.
///
/// Where Linux gives a name of the manual to another MSR, the manual counts: `IA32_PMC0` and `MSR_IA32_PMC0` are
/// 0xc1, though Linux calls 0x4c1 so.
pub fn by_name(name: &str) -> Option<&'static Entry> {
    by_bare_name(&bare(name).to_ascii_uppercase())
}

/// The MSRs with a name or alias that a pattern matches, by index.
///
/// `*` stands for any characters, `?` for one; case does not matter. A name matches as the table spells it and
/// without its `MSR_`; `MSR_IA32_*`, as Linux writes it, means `IA32_*`.
pub fn glob(pattern: &str) -> impl Iterator<Item = &'static Entry> + use<> {
    let linux = pattern
        .get(..9)
        .is_some_and(|start| start.eq_ignore_ascii_case("MSR_IA32_"));
    let mut pattern = if linux { bare(pattern) } else { pattern }.as_bytes().to_vec();
    // Several in a row mean what one does.
    pattern.dedup_by(|a, b| (*a, *b) == (b'*', b'*'));
    all().iter().filter(move |entry| {
        entry
            .names()
            .any(|name| matches(&pattern, name.as_bytes()) || matches(&pattern, bare(name).as_bytes()))
    })
}

/// The MSRs of a class, by index; the class by its name without the `@`. `None` if there is no such class.
pub fn class(name: &str) -> Option<impl Iterator<Item = &'static Entry> + use<>> {
    let class: Class = name.parse().ok()?;
    Some(all().iter().filter(move |entry| entry.classes().contains(&class)))
}

/// The names of all classes, in alphabetical order, without the `@`.
pub fn classes() -> impl Iterator<Item = &'static str> {
    Class::ALL.iter().map(|class| class.name())
}

/// What a write of an MSR does, where it acts and is not kept ([`Entry::command`]).
pub fn command(msr: Msr) -> Option<&'static str> {
    by_msr(msr).and_then(Entry::command)
}

/// What KVM_SET_MSRS takes of an MSR that tells a guest what its processor can do.
pub fn restore(msr: Msr) -> Option<&'static Restore> {
    let place = restores().binary_search_by_key(&msr, |row| row.msr).ok()?;
    restores().get(place)
}

/// The accesses that user space may pass on to the kernel ([`Entry::passes_through`]), and how much sooner one of less
/// weight is passed on.
pub fn spillable() -> impl Iterator<Item = (Msr, Op, u16)> {
    all().iter().flat_map(|entry| {
        let weight = if entry.is_hot() { 1000 } else { 1 };
        let ops = Op::ALL.into_iter().filter(|op| entry.passes_through(*op));
        ops.map(move |op| (entry.msr, op, weight))
    })
}
