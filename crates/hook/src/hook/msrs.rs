//! The VMM's own calls on MSRs: where a preset is, it sees and sets what would be there without it.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libc::{EACCES, EINTR, c_int, c_ulong};
use msrgate_core::Msr;
use msrgate_plan::Preset;

use super::{Hook, KVM_GET_MSRS, KVM_SET_MSRS, failed};
use crate::descriptor::Object;
use crate::kernel::{Kernel, errno, set_errno};
use crate::vcpu::Entered;

/// How often, at a millisecond each, a call waits for the thread that is in KVM_RUN: a VMM makes these calls on the
/// vCPU's own thread, and the kernel lets others wait.
const PATIENCE: u32 = 2000;

/// A register of a vCPU that holds a preset.
#[derive(Debug)]
pub(crate) struct Register {
    preset: Preset,
    /// What it would hold without msrgate: the kernel's own value, or what the VMM has put there.
    vmms: Cell<u64>,
}

impl<K: Kernel> Hook<K> {
    /// The registers of a new vCPU, before anything is put into them.
    pub(super) fn registers(&self, vcpu: c_int, presets: &[Preset]) -> Result<Box<[Register]>, String> {
        let registers = presets.iter().map(|preset| {
            let vmms = self.host_read(vcpu, preset.msr);
            Ok(Register {
                preset: *preset,
                vmms: Cell::new(vmms.ok_or_else(|| format!("the kernel gives no value of {}", preset.msr))?),
            })
        });
        registers.collect()
    }

    /// KVM_GET_MSRS and its like: the registers hold the VMM's values for the length of the call, and what it leaves
    /// there is the VMM's. Neither locks nor allocates.
    pub(super) fn msrs(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let preset = self.presets.load(Ordering::Relaxed);
        let (true, Some(Object::Vcpu(slot))) = (preset, self.descriptors.object(fd)) else {
            return self.kernel.ioctl(fd, request, argument);
        };
        let Some(entered) = self.enter_in_time(fd, slot) else {
            return failed(EINTR);
        };
        let Some(body) = entered.body().filter(|body| !body.registers.is_empty()) else {
            return self.kernel.ioctl(fd, request, argument);
        };
        let before = errno();
        for Register { preset, vmms } in &body.registers {
            if vmms.get() != preset.value {
                // Where it is not taken the VMM sees the preset.
                let _ = self.one_msr(fd, KVM_SET_MSRS, preset.msr, vmms.get());
            }
        }
        set_errno(before);
        let result = self.kernel.ioctl(fd, request, argument);
        let after = errno();
        for Register { preset, vmms } in &body.registers {
            let holds = self.host_read(fd, preset.msr);
            if holds == Some(preset.value) {
                vmms.set(preset.value);
                continue;
            }
            if let Some(value) = holds {
                vmms.set(value);
            }
            // Whether it was taken is what reading shows.
            let _ = self.one_msr(fd, KVM_SET_MSRS, preset.msr, preset.value);
            if self.host_read(fd, preset.msr) != Some(preset.value) {
                body.ready.set(false);
                self.kernel.say(&format!(
                    "vCPU {} does not run any more: the kernel no longer holds {:#x} in {}",
                    body.id, preset.value, preset.msr
                ));
                return failed(EACCES);
            }
        }
        set_errno(after);
        result
    }

    /// The vCPU for this thread alone; `None` where another thread keeps it for too long.
    pub(super) fn enter_in_time(&self, fd: c_int, slot: u32) -> Option<Entered<super::BodyOf<K>>> {
        for _ in 0..PATIENCE {
            if let Some(entered) = self.vcpus.enter(slot) {
                return Some(entered);
            }
            if self.descriptors.object(fd) != Some(Object::Vcpu(slot)) {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// The kernel's value of an MSR, where it gives one. The guest's own RDMSR may get another.
    pub(super) fn host_read(&self, vcpu: c_int, msr: Msr) -> Option<u64> {
        self.one_msr(vcpu, KVM_GET_MSRS, msr, 0)
    }

    pub(super) fn one_msr(&self, vcpu: c_int, request: u32, msr: Msr, value: u64) -> Option<u64> {
        // `struct kvm_msrs` with one entry: count and padding, index and reserved, data.
        let mut one = [1, u64::from(msr.0), value];
        let address = one.as_mut_ptr().expose_provenance();
        let done = self.kernel.ioctl(vcpu, c_ulong::from(request), address);
        (done == 1).then_some(one[2])
    }
}
