//! Whether a guest can go from one scanned host to another, and what a policy has to say so that hosts are alike.

use std::collections::{BTreeMap, BTreeSet};

use msrgate_core::{Msr, Op};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{self as msrs, State};

use super::Scan;
use super::lists::{Lists, Offer, Taken, find};

/// What is known of the guest that is to move.
#[derive(Clone, Default, Debug)]
pub struct GuestUse {
    /// The guest's CPUID: an MSR that CPUID says is not there does not count.
    pub cpuid: Option<Cpuid>,
    /// The MSRs that it accesses, where that is known, with the values that it writes.
    pub accesses: Option<BTreeMap<Msr, BTreeSet<u64>>>,
}

/// An MSR that stands in a guest's way, or that whoever moves the guest has to know of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Obstacle {
    /// Which.
    pub msr: Msr,
    /// What a guest has there.
    pub from: u64,
    /// What the other host offers of it; `None` where it offers nothing.
    pub to: Option<u64>,
    /// Why.
    pub kind: Kind,
}

/// Why an MSR stands in a guest's way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// KVM_SET_MSRS refuses the value for these bits.
    Refused {
        /// The bits.
        bits: u64,
    },
    /// The other host's KVM does not have the MSR: KVM_SET_MSRS refuses any value, or the guest gets #GP.
    Absent,
    /// KVM takes the value, and it tells the guest of a processor that is not there.
    Untrue {
        /// The bits that are not true.
        bits: u64,
    },
    /// A guest reads another value, and no KVM_SET_MSRS brings its own along.
    Changes,
    /// No obstacle: the value is taken, and the VMM has to set it: the other host's own is another, or its
    /// KVM_GET_MSR_INDEX_LIST does not name the MSR.
    ToBeSet,
    /// No obstacle by itself: a guest can have set these bits, which the other host refuses.
    MayBeRefused {
        /// The bits.
        bits: u64,
    },
}

impl Kind {
    /// Whether it keeps a guest from moving.
    pub const fn is_obstacle(self) -> bool {
        !matches!(self, Kind::ToBeSet | Kind::MayBeRefused { .. })
    }

    /// The word that JSON uses.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Refused { .. } => "refused",
            Kind::Absent => "absent",
            Kind::Untrue { .. } => "untrue",
            Kind::Changes => "changes",
            Kind::ToBeSet => "to-be-set",
            Kind::MayBeRefused { .. } => "may-be-refused",
        }
    }

    /// The bits that are concerned; 0 where it is the whole register.
    pub const fn bits(self) -> u64 {
        match self {
            Kind::Refused { bits } | Kind::Untrue { bits } | Kind::MayBeRefused { bits } => bits,
            _ => 0,
        }
    }
}

/// What stands in the way of a guest that goes from `from` to `to`, by MSR.
///
/// A guest has what `from` offers it, as a guest has whose VMM gives it all of the host (`-cpu host`). Whether `to` takes that is
/// known from its scan, which tried each bit; where it did not, from [`msrs::restore`].
pub fn migrate(from: &Scan, to: &Scan, guest: &GuestUse) -> Vec<Obstacle> {
    let mut all: BTreeSet<Msr> = from.readable.iter().map(|seen| seen.msr).collect();
    if let Some(lists) = &from.lists {
        let offers = [&lists.listed, &lists.unlisted, &lists.features].into_iter().flatten();
        all.extend(offers.map(|offer| offer.msr));
    }
    let known = all.into_iter().filter(|msr| guest.has(*msr));
    known.filter_map(|msr| obstacle(from, to, guest, msr)).collect()
}

fn obstacle(from: &Scan, to: &Scan, guest: &GuestUse, msr: Msr) -> Option<Obstacle> {
    let own = from.offers(msr)?;
    let offered = to.offers(msr);
    let found = |kind| {
        let obstacle = Obstacle {
            msr,
            from: own,
            to: offered,
            kind,
        };
        Some(obstacle)
    };
    let restore = msrs::restore(msr);
    if restore.is_some() || from.feature(msr).is_some() {
        if from.refuses_all(msr) {
            // No VMM gives it to a guest there.
            return None;
        }
        let Some(other) = offered.filter(|_| !to.refuses_all(msr)) else {
            return found(Kind::Absent).filter(|_| to.knows_absence_of(msr));
        };
        let tried = to.offer(msr).and_then(|offer| offer.refused(own));
        let refused = tried.or(restore.map(|restore| restore.refused(other, own)));
        let untrue = restore.map_or(0, |restore| restore.untrue(other, own));
        return match refused.unwrap_or(0) {
            0 if untrue != 0 => found(Kind::Untrue { bits: untrue }),
            0 if own != other => found(Kind::ToBeSet),
            0 => None,
            bits => found(Kind::Refused { bits }),
        };
    }
    let read = |scan: &Scan| scan.readable.iter().find(|seen| seen.msr == msr).copied();
    let tried = |scan: &Scan| scan.ranges.iter().any(|range| range.contains(msr));
    let gone = guest.uses(msr) && read(from).is_some() && tried(to) && read(to).is_none();
    if let Some(kept) = from.kept(msr) {
        let other = to.kept(msr);
        let refused = |offer: &Offer| offer.taken == Taken::Refused;
        let takes_none = other.is_none_or(|other| refused(other) && !refused(kept));
        let absent = to.lists.as_ref().is_some_and(|lists| !lists.partial) && takes_none;
        if gone || (absent && guest.uses(msr)) {
            return found(Kind::Absent);
        }
        // A VMM that goes by the other host's list leaves it out.
        let left_out = from.is_listed(msr) && !to.is_listed(msr) && guest.uses(msr);
        let kind = state(kept, other?, guest).or(left_out.then_some(Kind::ToBeSet));
        return kind.and_then(found);
    }
    if gone {
        return found(Kind::Absent);
    }
    let moved = msrs::by_msr(msr).is_some_and(|entry| entry.state != State::Nothing);
    let (before, after) = (read(from)?, read(to)?);
    let differs = before.value != after.value && !before.volatile && !after.volatile;
    found(Kind::Changes).filter(|_| differs && !moved && guest.uses(msr))
}

/// Whether the other host takes what a guest can have written.
fn state(from: &Offer, to: &Offer, guest: &GuestUse) -> Option<Kind> {
    if let Some(accesses) = &guest.accesses {
        let written = accesses.get(&from.msr).into_iter().flatten();
        let refused = written.filter_map(|value| {
            // What the guest's own host does not take either, a guest did not get.
            Some(to.refused(*value)? & !from.refused(*value)?)
        });
        let bits = refused.fold(0, |all, bits| all | bits);
        return (bits != 0).then_some(Kind::Refused { bits });
    }
    let ((ones, zeros), (other_ones, other_zeros)) = (from.range()?, to.range()?);
    let bits = (ones & !other_ones) | (zeros & !other_zeros);
    (bits != 0).then_some(Kind::MayBeRefused { bits })
}

/// What a policy says of an MSR so that a guest sees the same on each of several hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shared {
    /// The MSR.
    pub msr: Msr,
    /// What a read gives; `None` for #GP.
    pub value: Option<u64>,
    /// Whether a write that a host takes is to seem done.
    pub writable: bool,
}

/// What a policy has to say so that a guest sees the same on each of `hosts`: what tells a guest of its processor, and what it
/// reads that no KVM_SET_MSRS brings along. Of capabilities a guest sees what all hosts have, of other values what it sees on the
/// first. What changes by itself is left out.
pub fn common(hosts: &[&Scan], guest: &GuestUse) -> Vec<Shared> {
    let mut all = BTreeSet::new();
    for (place, from) in hosts.iter().enumerate() {
        for to in hosts
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != place)
            .map(|(_, to)| to)
        {
            let found = migrate(from, to, guest).into_iter();
            let found = found.filter(|found| found.kind.is_obstacle() || found.kind == Kind::ToBeSet);
            all.extend(found.map(|found| found.msr).filter(|msr| guest.uses(*msr)));
        }
    }
    all.into_iter().map(|msr| shared(hosts, msr)).collect()
}

fn shared(hosts: &[&Scan], msr: Msr) -> Shared {
    let values: Option<Vec<u64>> = hosts
        .iter()
        .map(|host| host.offers(msr).filter(|_| !host.refuses_all(msr)))
        .collect();
    let value = values.and_then(|values| {
        let mut values = values.into_iter();
        let first = values.next()?;
        match msrs::restore(msr) {
            Some(restore) => values.try_fold(first, |all, value| restore.common(all, value)),
            None => Some(first),
        }
    });
    Shared {
        msr,
        value,
        writable: hosts.iter().any(|host| host.writable.contains(&msr)),
    }
}

impl GuestUse {
    /// Whether the MSR is there for the guest, as far as that is known.
    fn has(&self, msr: Msr) -> bool {
        let entry = msrs::by_msr(msr);
        let lacks = |cpuid: &Cpuid| entry.is_some_and(|entry| entry.exists_on(cpuid) == Some(false));
        !self.cpuid.as_ref().is_some_and(lacks)
    }

    /// Whether the guest accesses the MSR, as far as that is known.
    fn uses(&self, msr: Msr) -> bool {
        self.accesses
            .as_ref()
            .is_none_or(|accesses| accesses.contains_key(&msr))
    }

    /// Notes an access.
    pub fn note(&mut self, msr: Msr, op: Op, value: Option<u64>) {
        let values = self.accesses.get_or_insert_default().entry(msr).or_default();
        values.extend(value.filter(|_| op == Op::Write));
    }
}

impl Scan {
    fn feature(&self, msr: Msr) -> Option<&Offer> {
        find(&self.lists.as_ref()?.features, msr)
    }

    /// What a new vCPU has.
    fn kept(&self, msr: Msr) -> Option<&Offer> {
        let lists = self.lists.as_ref()?;
        find(&lists.listed, msr).or_else(|| find(&lists.unlisted, msr))
    }

    fn is_listed(&self, msr: Msr) -> bool {
        let lists = self.lists.as_ref();
        lists.is_some_and(|lists| find(&lists.listed, msr).is_some())
    }

    /// What was tried of it: as a feature, since that is what the host has, else of a vCPU.
    fn offer(&self, msr: Msr) -> Option<&Offer> {
        let mut offers = [self.feature(msr), self.kept(msr)].into_iter().flatten();
        let tried = offers.clone().find(|offer| matches!(offer.taken, Taken::Bits { .. }));
        tried.or(offers.next())
    }

    /// What the host offers a guest: of a feature that no guest with this CPUID gets, what a new vCPU has.
    fn offers(&self, msr: Msr) -> Option<u64> {
        let read = || self.readable.iter().find(|seen| seen.msr == msr).map(|seen| seen.value);
        self.offer(msr).and_then(|offer| offer.value).or_else(read)
    }

    /// Whether KVM_SET_MSRS took no value at all.
    fn refuses_all(&self, msr: Msr) -> bool {
        self.offer(msr).is_some_and(|offer| offer.taken == Taken::Refused)
    }

    /// Whether the scan would have it if the host had it.
    fn knows_absence_of(&self, msr: Msr) -> bool {
        let partial = |lists: &Lists| lists.partial;
        match &self.lists {
            Some(lists) if !partial(lists) => true,
            _ => self.ranges.iter().any(|range| range.contains(msr)),
        }
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::MsrRange;

    use super::super::Readable;
    use super::*;

    const CONTROLS2: Msr = Msr(0x48b);

    /// A host that offers this of features, of which each bit that it has can be 0, and that lists and reads this.
    fn host(features: &[(u32, u64)], listed: &[(u32, u64)], read: &[(u32, u64)]) -> Scan {
        let offers = |rows: &[(u32, u64)]| -> Vec<Offer> {
            let rows = rows.iter().map(|(msr, value)| Offer {
                msr: Msr(*msr),
                value: Some(*value),
                taken: Taken::Bits { set: 0, clear: *value },
            });
            rows.collect()
        };
        Scan {
            ranges: vec![MsrRange::ALL],
            readable: read
                .iter()
                .map(|(msr, value)| Readable {
                    msr: Msr(*msr),
                    value: *value,
                    volatile: false,
                })
                .collect(),
            written: Vec::new(),
            writable: Vec::new(),
            broken: Vec::new(),
            faults: 0,
            lists: Some(Lists {
                listed: offers(listed),
                unlisted: Vec::new(),
                features: offers(features),
                partial: false,
            }),
        }
    }

    fn kinds(from: &Scan, to: &Scan, guest: &GuestUse) -> Vec<(u32, Kind)> {
        let found = migrate(from, to, guest).into_iter();
        found.map(|found| (found.msr.0, found.kind)).collect()
    }

    #[test]
    fn a_control_that_the_other_host_lacks_is_refused_by_its_bit_tried_or_not() {
        let from = host(&[(0x48b, 0x0001_582e_0000_0000)], &[], &[]);
        let mut to = host(&[(0x48b, 0x0001_582a_0000_0000)], &[], &[]);
        let any = GuestUse::default();
        let refused = [(0x48b, Kind::Refused { bits: 1 << 34 })];
        assert_eq!(kinds(&from, &to, &any), refused);
        assert_eq!(kinds(&to, &from, &any), [(0x48b, Kind::ToBeSet)]);
        to.lists.as_mut().unwrap().features[0].taken = Taken::Untried;
        assert_eq!(kinds(&from, &to, &any), refused);
        let policy = common(&[&from, &to], &any);
        assert_eq!(policy.len(), 1);
        assert_eq!(
            (policy[0].msr, policy[0].value),
            (CONTROLS2, Some(0x0001_582a_0000_0000))
        );
        // A guest whose CPUID has no VMX has no such register.
        let without = GuestUse {
            cpuid: Some(Cpuid::from_entries([
                (0, 0, [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
                (1, 0, [0; 4]),
            ])),
            accesses: None,
        };
        assert_eq!(kinds(&from, &to, &without), []);
        // A guest that never reads it is refused all the same: the VMM sets it.
        let idle = GuestUse {
            accesses: Some(BTreeMap::new()),
            ..GuestUse::default()
        };
        assert_eq!(kinds(&from, &to, &idle), refused);
    }

    #[test]
    fn what_the_other_host_does_not_have_is_absent_where_that_is_known() {
        let from = host(&[(0x48b, 1)], &[(0x1fc, 0)], &[(0x1fc, 0), (0x606, 7)]);
        let mut to = host(&[], &[], &[(0x606, 8)]);
        let any = GuestUse::default();
        let expected = [(0x1fc, Kind::Absent), (0x48b, Kind::Absent), (0x606, Kind::Changes)];
        assert_eq!(kinds(&from, &to, &any), expected);
        let mut reads = GuestUse::default();
        reads.note(Msr(0x10), Op::Read, Some(5));
        assert_eq!(kinds(&from, &to, &reads), [(0x48b, Kind::Absent)]);
        to.lists.as_mut().unwrap().partial = true;
        to.ranges = vec![MsrRange::single(Msr(0x606))];
        assert_eq!(kinds(&from, &to, &any), [(0x606, Kind::Changes)]);
        assert_eq!(common(&[&from, &to], &any)[0].value, Some(7));
    }

    #[test]
    fn a_promise_of_the_processor_that_is_not_kept_there_is_untrue() {
        let rows = |value| host(&[(0x10a, value)], &[], &[]);
        let (mut from, mut to) = (rows(0b10_0001), rows(0b00_0001));
        for scan in [&mut from, &mut to] {
            scan.lists.as_mut().unwrap().features[0].taken = Taken::Bits {
                set: u64::MAX,
                clear: u64::MAX,
            };
        }
        let untrue = [(0x10a, Kind::Untrue { bits: 0b10_0000 })];
        assert_eq!(kinds(&from, &to, &GuestUse::default()), untrue);
        assert_eq!(kinds(&to, &from, &GuestUse::default()), [(0x10a, Kind::ToBeSet)]);
    }

    #[test]
    fn what_a_guest_wrote_counts_and_what_it_can_write_is_told() {
        let offer = |set| Offer {
            msr: Msr(0x1d9),
            value: Some(0),
            taken: Taken::Bits { set, clear: 0 },
        };
        let (mut from, mut to) = (host(&[], &[], &[]), host(&[], &[], &[]));
        from.lists.as_mut().unwrap().listed = vec![offer(0b111)];
        to.lists.as_mut().unwrap().listed = vec![offer(0b001)];
        let may = [(0x1d9, Kind::MayBeRefused { bits: 0b110 })];
        assert_eq!(kinds(&from, &to, &GuestUse::default()), may);
        let mut guest = GuestUse::default();
        guest.note(Msr(0x1d9), Op::Write, Some(0b001));
        assert_eq!(kinds(&from, &to, &guest), []);
        guest.note(Msr(0x1d9), Op::Write, Some(0b1010));
        assert_eq!(kinds(&from, &to, &guest), [(0x1d9, Kind::Refused { bits: 0b10 })]);
    }

    #[test]
    fn what_the_other_host_takes_and_does_not_list_is_not_absent_and_the_vmm_has_to_set_it() {
        let from = host(&[], &[(0xc000_0103, 0)], &[]);
        let mut to = host(&[], &[], &[]);
        assert_eq!(kinds(&from, &to, &GuestUse::default()), [(0xc000_0103, Kind::Absent)]);
        to.lists.as_mut().unwrap().unlisted = from.lists.as_ref().unwrap().listed.clone();
        assert_eq!(kinds(&from, &to, &GuestUse::default()), [(0xc000_0103, Kind::ToBeSet)]);
        assert_eq!(kinds(&to, &from, &GuestUse::default()), []);
        to.lists.as_mut().unwrap().unlisted[0].taken = Taken::Refused;
        assert_eq!(kinds(&from, &to, &GuestUse::default()), [(0xc000_0103, Kind::Absent)]);
        assert_eq!(kinds(&to, &to, &GuestUse::default()), []);
    }

    #[test]
    fn a_feature_that_no_guest_with_this_cpuid_gets_is_not_what_a_guest_has() {
        let mut from = host(&[(0x10a, 0b10_0001)], &[(0x10a, 0)], &[]);
        from.lists.as_mut().unwrap().features[0].taken = Taken::Refused;
        assert_eq!(kinds(&from, &from, &GuestUse::default()), []);
        let other = host(&[(0x10a, 0b10_0001)], &[(0x10a, 0b10_0001)], &[]);
        let refused = [(0x10a, Kind::Refused { bits: 0b10_0001 })];
        assert_eq!(kinds(&other, &from, &GuestUse::default()), refused);
    }

    #[test]
    fn equal_hosts_have_no_obstacle() {
        let host = host(&[(0x48b, 1), (0x10a, 2)], &[(0x174, 0)], &[(0x606, 7)]);
        assert_eq!(kinds(&host, &host, &GuestUse::default()), []);
        assert_eq!(common(&[&host, &host], &GuestUse::default()), []);
    }
}
