//! What is not the same in two scans.

use msrgate_core::{Msr, MsrRange};

use super::lists::{Lists, Offer};
use super::{Readable, Scan, joined};

/// What became of an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// It was #GP, and can be read.
    Readable {
        /// What it gives.
        value: u64,
    },
    /// It could be read, and is #GP.
    Unreadable {
        /// What it gave.
        value: u64,
    },
    /// It gives something else, and in neither scan by itself.
    Value {
        /// What it gave.
        before: u64,
        /// What it gives.
        after: u64,
    },
    /// Writing back what it holds was #GP, and is done.
    Writable,
    /// Writing back what it holds was done, and is #GP.
    Unwritable,
    /// KVM_GET_MSR_INDEX_LIST names it, and did not.
    Listed,
    /// KVM_GET_MSR_INDEX_LIST named it, and does not.
    Unlisted,
    /// KVM offers something else of it as a feature: what KVM_GET_MSRS says on `/dev/kvm`, `None` where it says nothing.
    Feature {
        /// What it offered.
        before: Option<u64>,
        /// What it offers.
        after: Option<u64>,
    },
    /// KVM_SET_MSRS takes other values: the bits of which it took either value, and of which it does.
    Taken {
        /// The bits that could be 1, and those that could be 0.
        before: (u64, u64),
        /// The bits that can be 1, and those that can be 0.
        after: (u64, u64),
    },
}

/// An MSR that is not the same in two scans.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Which.
    pub msr: Msr,
    /// What became of it.
    pub change: Change,
}

impl Scan {
    /// What became of the MSRs since `before`, in order: of those that both scans read, or wrote.
    ///
    /// Values that changed within a scan ([`Readable::volatile`]) say nothing, and are no difference.
    pub fn since(&self, before: &Scan) -> Vec<Difference> {
        let mut found = Vec::new();
        let (old, new) = (Sorted::of(before), Sorted::of(self));
        let both_read = Both::of(&before.ranges, &self.ranges);
        let both_written = Both::of(&before.written, &self.written);
        let mut all: Vec<Msr> = [&old, &new].into_iter().flat_map(Sorted::msrs).collect();
        for lists in [&before.lists, &self.lists].into_iter().flatten() {
            all.extend(lists.listed.iter().chain(&lists.features).map(|offer| offer.msr));
        }
        all.sort_unstable();
        all.dedup();
        for msr in all {
            if both_read.contain(msr) {
                let change = match (old.read(msr), new.read(msr)) {
                    (None, Some(new)) => Some(Change::Readable { value: new.value }),
                    (Some(old), None) => Some(Change::Unreadable { value: old.value }),
                    (Some(old), Some(new)) if old.value != new.value && !old.volatile && !new.volatile => {
                        Some(Change::Value {
                            before: old.value,
                            after: new.value,
                        })
                    }
                    _ => None,
                };
                found.extend(change.map(|change| Difference { msr, change }));
            }
            if both_written.contain(msr) {
                let change = match (old.wrote(msr), new.wrote(msr)) {
                    (false, true) => Some(Change::Writable),
                    (true, false) => Some(Change::Unwritable),
                    _ => None,
                };
                found.extend(change.map(|change| Difference { msr, change }));
            }
            if let (Some(before), Some(after)) = (&before.lists, &self.lists) {
                let changes = offered(before, after, msr).into_iter().flatten();
                found.extend(changes.map(|change| Difference { msr, change }));
            }
        }
        found
    }
}

/// What became of an MSR in what KVM tells a VMM.
fn offered(before: &Lists, after: &Lists, msr: Msr) -> [Option<Change>; 3] {
    let find = |offers: &[Offer]| offers.iter().find(|offer| offer.msr == msr).copied();
    let (old, new) = (find(&before.listed), find(&after.listed));
    let listed = match (old, new) {
        (None, Some(_)) => Some(Change::Listed),
        (Some(_), None) => Some(Change::Unlisted),
        _ => None,
    };
    let features = (find(&before.features), find(&after.features));
    let value = |offer: Option<Offer>| offer.and_then(|offer| offer.value);
    let values = (value(features.0), value(features.1));
    let feature = (values.0 != values.1).then_some(Change::Feature {
        before: values.0,
        after: values.1,
    });
    let ranges = |a: Option<Offer>, b: Option<Offer>| Some((a?.range()?, b?.range()?));
    let ranges = ranges(features.0, features.1).or(ranges(old, new));
    let taken = ranges.filter(|(before, after)| before != after);
    let taken = taken.map(|(before, after)| Change::Taken { before, after });
    [listed, feature, taken]
}

/// What a scan found, to look MSRs up in: a scan that comes from a file may be in no order.
struct Sorted {
    readable: Vec<Readable>,
    writable: Vec<Msr>,
}

impl Sorted {
    fn of(scan: &Scan) -> Sorted {
        let mut sorted = Sorted {
            readable: scan.readable.clone(),
            writable: scan.writable.clone(),
        };
        sorted.readable.sort_by_key(|seen| seen.msr);
        sorted.writable.sort_unstable();
        sorted
    }

    fn msrs(&self) -> impl Iterator<Item = Msr> {
        let readable = self.readable.iter().map(|seen| seen.msr);
        readable.chain(self.writable.iter().copied())
    }

    fn read(&self, msr: Msr) -> Option<&Readable> {
        let place = self.readable.binary_search_by_key(&msr, |seen| seen.msr).ok()?;
        self.readable.get(place)
    }

    fn wrote(&self, msr: Msr) -> bool {
        self.writable.binary_search(&msr).is_ok()
    }
}

/// What lies in both of two lists of ranges.
struct Both([Vec<MsrRange>; 2]);

impl Both {
    fn of(a: &[MsrRange], b: &[MsrRange]) -> Both {
        Both([joined(a), joined(b)])
    }

    fn contain(&self, msr: Msr) -> bool {
        self.0.iter().all(|ranges| {
            let after = ranges.partition_point(|range| range.last() < msr);
            ranges.get(after).is_some_and(|range| range.contains(msr))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: MsrRange = MsrRange::X2APIC;

    /// A scan that read and wrote all of the window: index within it, value, whether the write was done.
    fn scan(seen: &[(u32, u64, bool)]) -> Scan {
        let msr = |index: u32| Msr(WINDOW.first().0 + index);
        let readable = seen.iter().map(|(index, value, _)| Readable {
            msr: msr(*index),
            value: *value,
            volatile: false,
        });
        let writable = seen.iter().filter(|(_, _, done)| *done);
        Scan {
            ranges: vec![WINDOW],
            readable: readable.collect(),
            written: vec![WINDOW],
            writable: writable.map(|(index, ..)| msr(*index)).collect(),
            broken: Vec::new(),
            faults: 0,
            lists: None,
        }
    }

    fn differences(before: &Scan, after: &Scan) -> Vec<(u32, Change)> {
        let found = after.since(before).into_iter();
        found
            .map(|found| (found.msr.0 - WINDOW.first().0, found.change))
            .collect()
    }

    #[test]
    fn each_kind_of_change_is_told_in_order() {
        let before = scan(&[(1, 1, false), (2, 2, true), (4, 4, false), (5, 5, true), (6, 6, true)]);
        let after = scan(&[(2, 7, true), (3, 3, false), (4, 4, true), (5, 5, false), (6, 6, true)]);
        let expected = [
            (1, Change::Unreadable { value: 1 }),
            (2, Change::Value { before: 2, after: 7 }),
            (3, Change::Readable { value: 3 }),
            (4, Change::Writable),
            (5, Change::Unwritable),
        ];
        assert_eq!(differences(&before, &after), expected);
        assert_eq!(differences(&before, &before), []);
    }

    #[test]
    fn what_moves_by_itself_in_either_scan_is_no_difference() {
        let (still, moved) = (scan(&[(1, 1, false)]), scan(&[(1, 2, false)]));
        let mut clock = scan(&[(1, 2, false)]);
        clock.readable[0].volatile = true;
        assert_eq!(differences(&still, &moved).len(), 1);
        assert_eq!(differences(&still, &clock), []);
        assert_eq!(differences(&clock, &still), []);
        // That it is not there is one all the same.
        assert_eq!(differences(&clock, &scan(&[])), [(1, Change::Unreadable { value: 2 })]);
    }

    #[test]
    fn what_only_one_scan_tried_is_no_difference() {
        let before = scan(&[]);
        let mut after = scan(&[(1, 1, true)]);
        after.ranges = vec![MsrRange::single(WINDOW.first())];
        assert_eq!(differences(&before, &after), [(1, Change::Writable)]);
        after.written = Vec::new();
        assert_eq!(differences(&before, &after), []);
    }

    #[test]
    fn lists_that_are_in_no_order_are_compared_all_the_same() {
        let mut before = scan(&[(1, 1, true), (2, 2, true), (3, 3, true)]);
        let after = scan(&[(1, 1, true), (2, 2, true), (3, 3, true)]);
        before.readable.reverse();
        before.writable.reverse();
        before.ranges = vec![MsrRange::single(Msr(0x803)), WINDOW, MsrRange::single(Msr(0x801))];
        assert_eq!(differences(&before, &after), []);
    }
}
