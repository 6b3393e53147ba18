//! The VMM's own calls on MSRs: where a preset is, it sees and sets what would be there without it.

use super::{Supervisor, closed, put_in_force};
use crate::seccomp::Waiting;

impl Supervisor {
    /// KVM_GET_MSRS and its like: the registers hold the VMM's values for the length of the call, and what it leaves
    /// there is the VMM's.
    pub(super) fn msrs(&mut self, waiting: &Waiting<'_>, tag: u64) {
        if self.vcpus.get(&tag).is_none_or(|vcpu| vcpu.registers.is_empty()) {
            return waiting.allow();
        }
        let Some(mut tracee) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let (remote, Some(vcpu)) = (&mut self.remote, self.vcpus.get_mut(&tag)) else {
            return;
        };
        let [fd, request, address, ..] = waiting.arguments;
        for register in vcpu
            .registers
            .iter()
            .filter(|register| register.vmms != register.preset.value)
        {
            // Where it is not taken the VMM sees the preset.
            let _ = remote.host_write(&mut tracee, fd, register.preset.msr, register.vmms);
        }
        let result = tracee.ioctl(fd, request as u32, address);
        let mut lost = None;
        for register in &mut vcpu.registers {
            let preset = register.preset;
            let holds = remote.host_read(&mut tracee, fd, preset.msr);
            register.vmms = holds.unwrap_or(register.vmms);
            if holds == Some(preset.value) {
                continue;
            }
            // Whether it was taken is what reading shows.
            let _ = remote.host_write(&mut tracee, fd, preset.msr, preset.value);
            if remote.host_read(&mut tracee, fd, preset.msr) != Some(preset.value) {
                lost = Some(preset);
            }
        }
        if let Some(preset) = lost {
            let (id, vm) = (vcpu.id, vcpu.vm);
            // The guest would see another value than the policy's: from here on it sees none.
            if let (Some(object), Ok(plan)) = (self.vms.get_mut(&vm), closed())
                && let Some(vm_fd) = object.descriptor(waiting.thread, vm)
            {
                let _ = put_in_force(remote, &mut tracee, vm_fd, object, plan.filter(), plan.reasons());
            }
            let line = format!("the kernel no longer holds {:#x} in {}", preset.value, preset.msr);
            self.tell(
                waiting.thread,
                &format!("the guest of vCPU {id} gets #GP for every MSR from here on"),
                &line,
            );
            return tracee.finish(i64::from(-libc::EACCES));
        }
        tracee.give(result);
    }
}
