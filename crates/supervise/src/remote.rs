//! Calls on a VMM's own descriptors, made in its thread.

use std::collections::HashMap;

use libc::{MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE};
use msrgate_core::abi::{self, EnableCap, Layout, OneMsr, RawFilter};
use msrgate_core::{Filter, Msr, Reasons};
use nix::errno::Errno;

use crate::seccomp::Waiting;
use crate::target;
use crate::tracee::{StopError, Tracee, Tracer};

/// Memory for the arguments of calls: a filter with all its bitmaps, and what tells that it is ours.
pub(crate) const SCRATCH: usize = 36 << 10;
const ARGUMENTS: u64 = 64;
const _: () = assert!(
    SCRATCH >= ARGUMENTS as usize + Layout::NATIVE.filter_size + abi::MAX_RANGES * abi::MAX_BITMAP_BYTES as usize
);
/// `F_OFD_SETLK`.
const OFD_SETLK: u64 = 37;

/// What makes them.
#[derive(Debug)]
pub(crate) struct RemoteCalls {
    pub(crate) tracer: Tracer,
    /// By process: where its memory for arguments is, of threads that have none of their own.
    scratch: HashMap<i32, u64>,
}

impl RemoteCalls {
    pub(crate) fn new(tracer: Tracer) -> RemoteCalls {
        RemoteCalls {
            tracer,
            scratch: HashMap::new(),
        }
    }

    /// Stops the thread of a call ([`Tracer::stop`]); `Err` has the line for people, or none where nobody waits any more.
    pub(crate) fn stop<T>(
        &self,
        waiting: &Waiting<'_>,
        process: i32,
        elsewhere: Option<u64>,
        before: impl FnOnce() -> T,
    ) -> Result<(Tracee, T), Option<String>> {
        self.tracer
            .stop(waiting, process, elsewhere, before)
            .map_err(|error| match error {
                StopError::Gone => None,
                StopError::Refused(line) => Some(line),
            })
    }

    /// Has the bytes where calls in the thread find them, and gives the place. Another thread of the VMM could change
    /// them; the VMM is trusted.
    pub(crate) fn lay_out(&mut self, tracee: &mut Tracee, bytes: &[u8]) -> Result<u64, Errno> {
        let ours = self.tracer.cookies.call.to_le_bytes();
        let process = tracee.process;
        if let Some(at) = tracee.scratch {
            return target::write(process, at, bytes).then_some(at).ok_or(Errno::EFAULT);
        }
        // After an exec it is gone.
        let known = self.scratch.get(&process).copied().filter(|at| {
            let mut there = [0; 8];
            target::read(process, *at, &mut there) && there == ours
        });
        let at = match known {
            Some(at) => at,
            None => {
                let at = tracee.map(0, SCRATCH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1)?;
                if !target::write(process, at, &ours) {
                    return Err(Errno::EFAULT);
                }
                self.scratch.insert(process, at);
                at
            }
        };
        match target::write(process, at + ARGUMENTS, bytes) {
            true => Ok(at + ARGUMENTS),
            false => Err(Errno::EFAULT),
        }
    }

    /// An ioctl whose argument points to a structure; gives the result, and what the kernel left there.
    pub(crate) fn ioctl(
        &mut self,
        tracee: &mut Tracee,
        fd: u64,
        request: u32,
        structure: &mut [u8],
    ) -> Result<u64, Errno> {
        let at = self.lay_out(tracee, structure)?;
        let result = tracee.ioctl(fd, request, at)?;
        match target::read(tracee.process, at, structure) {
            true => Ok(result),
            false => Err(Errno::EFAULT),
        }
    }

    /// Names the open file of a descriptor ([`target::Object`]).
    pub(crate) fn tag(&mut self, tracee: &mut Tracee, fd: u64, tag: u64) -> Result<(), Errno> {
        // `struct flock`: type, whence, start, length, process.
        let mut lock = [0; 32];
        let fields = [(0, i64::from(libc::F_WRLCK)), (8, tag.cast_signed()), (16, 1)];
        for (at, value) in fields {
            let bytes = if at == 0 {
                &value.to_le_bytes()[..2]
            } else {
                &value.to_le_bytes()[..]
            };
            if let Some(field) = lock.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        }
        let at = self.lay_out(tracee, &lock)?;
        tracee.call(libc::SYS_fcntl, [fd, OFD_SETLK, at, 0, 0, 0]).map(drop)
    }

    /// KVM_ENABLE_CAP of `KVM_CAP_X86_USER_SPACE_MSR`.
    pub(crate) fn set_mask(&mut self, tracee: &mut Tracee, vm: u64, mask: Reasons) -> Result<(), Errno> {
        let mut cap = EnableCap::mask(mask).to_bytes();
        self.ioctl(tracee, vm, abi::ENABLE_CAP, &mut cap).map(drop)
    }

    /// KVM_X86_SET_MSR_FILTER.
    pub(crate) fn set_filter(&mut self, tracee: &mut Tracee, vm: u64, filter: &Filter) -> Result<(), Errno> {
        // The structure has addresses of what lies behind it.
        let at = self.lay_out(tracee, &[])?;
        let bytes = raw(filter, at);
        if !target::write(tracee.process, at, &bytes) {
            return Err(Errno::EFAULT);
        }
        tracee.ioctl(vm, abi::SET_MSR_FILTER, at).map(drop)
    }

    /// How long [`RemoteCalls::lay_down`] is at most for so many VMs: calls, the mask, and the filter.
    pub(crate) fn laid_down(vms: usize) -> usize {
        ((vms * 2 + 1) * 24 + EnableCap::BYTES).next_multiple_of(64) + SCRATCH
    }

    /// Calls by which each VM gets a filter and then a mask ([`Tracee::leave_behind`]), for memory at this address, as words.
    pub(crate) fn lay_down(at: u64, vms: &[u64], mask: Reasons, filter: &Filter) -> Vec<u64> {
        let calls = (vms.len() * 2 + 1) * 24;
        let cap = EnableCap::mask(mask).to_bytes();
        let filter_from = (calls + cap.len()).next_multiple_of(64);
        let (cap_at, filter_at) = (at + calls as u64, at + filter_from as u64);
        let mut words = Vec::new();
        for vm in vms {
            words.extend([*vm, u64::from(abi::SET_MSR_FILTER), filter_at]);
            words.extend([*vm, u64::from(abi::ENABLE_CAP), cap_at]);
        }
        words.extend([0; 3]);
        let mut all: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        all.extend(cap);
        all.resize(filter_from, 0);
        all.extend(raw(filter, filter_at));
        all.resize(all.len().next_multiple_of(8), 0);
        all.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    }

    /// The kernel's value of an MSR, as the host reads it; `None` where the kernel gives none.
    pub(crate) fn host_read(&mut self, tracee: &mut Tracee, vcpu: u64, msr: Msr) -> Option<u64> {
        self.one_msr(tracee, vcpu, abi::GET_MSRS, msr, 0)
    }

    /// Writes the kernel's MSR as the host does; `None` where the kernel does not take it.
    pub(crate) fn host_write(&mut self, tracee: &mut Tracee, vcpu: u64, msr: Msr, value: u64) -> Option<()> {
        self.one_msr(tracee, vcpu, abi::SET_MSRS, msr, value).map(drop)
    }

    fn one_msr(&mut self, tracee: &mut Tracee, vcpu: u64, request: u32, msr: Msr, value: u64) -> Option<u64> {
        let mut one = OneMsr { msr, value }.to_bytes();
        let done = self.ioctl(tracee, vcpu, request, &mut one);
        (done == Ok(1)).then(|| OneMsr::from_bytes(&one).value)
    }

    /// Forgets processes that have ended.
    pub(crate) fn prune(&mut self, ended: impl Fn(i32) -> bool) {
        self.scratch.retain(|process, _| !ended(*process));
    }
}

/// `struct kvm_msr_filter` at an address, and its bitmaps behind it.
fn raw(filter: &Filter, at: u64) -> Vec<u8> {
    let mut end = at + Layout::NATIVE.filter_size as u64;
    let raw = RawFilter::of(filter, |range| {
        let bitmap = end;
        end += size_of_val(range.bitmap()) as u64;
        bitmap
    });
    let words = filter.ranges().iter().flat_map(|range| range.bitmap());
    let bitmaps = words.flat_map(|word| word.to_le_bytes());
    raw.to_bytes().into_iter().chain(bitmaps).collect()
}

#[cfg(test)]
mod tests {
    use msrgate_core::{FilterRange, Ops, Verdict};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is laid out for the kernel reads as the filter again.
        #[test]
        fn a_filter_is_laid_out_as_the_kernel_reads_it(
            deny in any::<bool>(),
            ranges in prop::collection::vec((any::<u32>(), 1_u32..200, 1_u32..4, any::<u64>()), 1..16),
        ) {
            let ranges: Vec<FilterRange> = ranges
                .into_iter()
                .map(|(base, nmsrs, ops, word)| {
                    let words = vec![word; nmsrs.div_ceil(64) as usize];
                    FilterRange::new(base, nmsrs, Ops::from_bits(ops).unwrap(), words).unwrap()
                })
                .collect();
            let filter = Filter::new(if deny { Verdict::Deny } else { Verdict::Allow }, ranges).unwrap();
            let at = 0x7000_0000;
            let bytes = raw(&filter, at);
            let mut read = |address: u64, to: &mut [u8]| {
                let from = (address - at) as usize;
                bytes.get(from..from + to.len()).map(|bytes| to.copy_from_slice(bytes)).is_some()
            };
            let raw = RawFilter::from_bytes(&bytes, Layout::NATIVE).unwrap();
            prop_assert_eq!(raw.filter(&mut read), Ok(filter));
        }
    }
}
