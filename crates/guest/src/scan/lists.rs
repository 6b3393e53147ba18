//! What KVM tells a VMM of a guest's MSRs, and which values it takes of them.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::Msr;
use msrgate_msrs::State;

use crate::{Guest, GuestError, Mode, Options};

/// What KVM tells a VMM of a guest's MSRs.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Lists {
    /// What KVM_GET_MSR_INDEX_LIST names, by MSR: the value is that of a new vCPU.
    pub listed: Vec<Offer>,
    /// What other kernels and vendors name there, and this KVM gives without naming it: likewise.
    pub unlisted: Vec<Offer>,
    /// What KVM_GET_MSR_FEATURE_INDEX_LIST names, by MSR: the value is what KVM_GET_MSRS says on `/dev/kvm`.
    pub features: Vec<Offer>,
    /// Whether KVM may name others too, which whoever made the lists left out.
    pub partial: bool,
}

/// An MSR that KVM names to a VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Which.
    pub msr: Msr,
    /// What KVM_GET_MSRS gives; `None` where it gives nothing.
    pub value: Option<u64>,
    /// What KVM_SET_MSRS takes.
    pub taken: Taken,
}

/// Which values KVM_SET_MSRS takes of an MSR, tried on a vCPU that never runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Taken {
    /// It was not tried.
    Untried,
    /// Not even the value that was read.
    Refused,
    /// The value that was read, and that value with one bit changed.
    Bits {
        /// The bits that were 0, and are taken as 1.
        set: u64,
        /// The bits that were 1, and are taken as 0.
        clear: u64,
    },
}

impl Offer {
    /// The bits for which KVM_SET_MSRS refuses `value`; `None` where that was not tried, or nothing is taken.
    pub fn refused(&self, value: u64) -> Option<u64> {
        let (own, Taken::Bits { set, clear }) = (self.value?, self.taken) else {
            return None;
        };
        Some((value & !own & !set) | (own & !value & !clear))
    }

    /// The bits that a guest can have as 1, and those it can have as 0.
    pub(super) fn range(&self) -> Option<(u64, u64)> {
        match (self.value?, self.taken) {
            (value, Taken::Bits { set, clear }) => Some((value | set, !value | clear)),
            _ => None,
        }
    }
}

impl Lists {
    /// Asks KVM for a guest made with `options`. Each MSR is written in a new vCPU, which never runs.
    pub(super) fn ask(kvm: &Kvm, options: &Options) -> Result<Lists, GuestError> {
        let listed = kvm
            .get_msr_index_list()
            .map_err(GuestError::of("KVM_GET_MSR_INDEX_LIST"))?;
        let mut lists = Lists::default();
        let mut guest = Guest::new(kvm, Mode::Real, options)?;
        let mut trials = Trials::new(kvm, options)?;
        for msr in sorted(listed.as_slice()) {
            let value = get(
                |msrs| guest.vcpu(0).ok().and_then(|vcpu| vcpu.fd().get_msrs(msrs).ok()),
                msr,
            );
            lists.listed.push(trials.offer(msr, value)?);
        }
        // Kernels before 4.17 have no such list.
        if let Ok(features) = kvm.get_msr_feature_index_list() {
            for msr in sorted(features.as_slice()) {
                let value = get(|msrs| kvm.get_msrs(msrs).ok(), msr);
                lists.features.push(trials.offer(msr, value)?);
            }
        }
        let elsewhere = msrgate_msrs::all().iter().filter(|entry| entry.state == State::Listed);
        for msr in elsewhere.map(|entry| entry.msr) {
            if find(&lists.listed, msr).or(find(&lists.features, msr)).is_some() {
                continue;
            }
            let given = get(
                |msrs| guest.vcpu(0).ok().and_then(|vcpu| vcpu.fd().get_msrs(msrs).ok()),
                msr,
            );
            if given.is_some() {
                lists.unlisted.push(trials.offer(msr, given)?);
            }
        }
        drop(guest);
        Ok(lists)
    }
}

/// Finds the offer of an MSR among offers in order.
pub(super) fn find(offers: &[Offer], msr: Msr) -> Option<&Offer> {
    let place = offers.binary_search_by_key(&msr, |offer| offer.msr).ok()?;
    offers.get(place)
}

fn sorted(indices: &[u32]) -> Vec<Msr> {
    let mut msrs: Vec<Msr> = indices.iter().copied().map(Msr).collect();
    msrs.sort_unstable();
    msrs.dedup();
    msrs
}

fn entry(msr: Msr, data: u64) -> Option<Msrs> {
    let entry = kvm_msr_entry {
        index: msr.0,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).ok()
}

fn get(mut ask: impl FnMut(&mut Msrs) -> Option<usize>, msr: Msr) -> Option<u64> {
    let mut one = entry(msr, 0)?;
    match ask(&mut one) {
        Some(1) => one.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// Makes vCPUs to try values on, many in one VM: a VM takes as long as a hundred of them.
struct Trials<'a> {
    kvm: &'a Kvm,
    options: &'a Options,
    cpuid: CpuId,
    guest: Guest,
    made: u64,
}

impl<'a> Trials<'a> {
    fn new(kvm: &'a Kvm, options: &'a Options) -> Result<Self, GuestError> {
        let supported = || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = options.cpuid.clone().map_or_else(supported, Ok);
        Ok(Trials {
            kvm,
            options,
            cpuid: cpuid.map_err(GuestError::of("KVM_GET_SUPPORTED_CPUID"))?,
            guest: Guest::new(kvm, Mode::Real, options)?,
            // The guest's own.
            made: 1,
        })
    }

    fn vcpu(&mut self) -> Result<VcpuFd, GuestError> {
        // Not every kernel takes more.
        if self.made == 64 {
            *self = Trials::new(self.kvm, self.options)?;
        }
        let vcpu = self.guest.vm().create_vcpu(self.made);
        let vcpu = vcpu.map_err(GuestError::of("KVM_CREATE_VCPU"))?;
        self.made += 1;
        vcpu.set_cpuid2(&self.cpuid).map_err(GuestError::of("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    }

    fn offer(&mut self, msr: Msr, value: Option<u64>) -> Result<Offer, GuestError> {
        let taken = match value {
            None => Taken::Untried,
            Some(value) => self.tried(msr, value)?,
        };
        Ok(Offer { msr, value, taken })
    }

    fn tried(&mut self, msr: Msr, value: u64) -> Result<Taken, GuestError> {
        let mut vcpu = self.vcpu()?;
        if !takes(&vcpu, msr, value) {
            return Ok(Taken::Refused);
        }
        let (mut set, mut clear) = (0, 0);
        for bit in (0..64).map(|bit| 1_u64 << bit) {
            if !takes(&vcpu, msr, value ^ bit) {
                continue;
            }
            set |= bit & !value;
            clear |= bit & value;
            // Some kernels go by what the vCPU had last: what it gave up it does not get back.
            if !takes(&vcpu, msr, value) {
                vcpu = self.vcpu()?;
            }
        }
        Ok(Taken::Bits { set, clear })
    }
}

fn takes(vcpu: &VcpuFd, msr: Msr, value: u64) -> bool {
    entry(msr, value).is_some_and(|one| vcpu.set_msrs(&one).is_ok_and(|taken| taken == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_refused_for_the_bits_that_were() {
        let offer = Offer {
            msr: Msr(0x48b),
            value: Some(0b1100),
            taken: Taken::Bits {
                set: 0b0001,
                clear: 0b0100,
            },
        };
        assert_eq!(offer.refused(0b1100), Some(0));
        assert_eq!(offer.refused(0b1001), Some(0));
        assert_eq!(offer.refused(0b0110), Some(0b1010));
        assert_eq!(offer.range(), Some((0b1101, !0b1000)));
        let untried = Offer {
            taken: Taken::Refused,
            ..offer
        };
        assert_eq!((untried.refused(0), untried.range()), (None, None));
    }
}
