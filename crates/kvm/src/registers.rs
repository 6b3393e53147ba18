//! The registers and handlers that actions ask.

#![expect(unsafe_code, reason = "system calls")]

use std::os::fd::OwnedFd;

use msrgate_core::{FaultCause, Msr, MsrBackend};

use crate::{Handlers, HostMsrs, VcpuId, ioctl};

/// What the actions of one vCPU may reach.
pub(crate) struct Registers<'a> {
    pub(crate) vcpu: &'a OwnedFd,
    pub(crate) id: VcpuId,
    pub(crate) host: Option<&'a HostMsrs>,
    pub(crate) handlers: &'a Handlers,
}

impl MsrBackend for Registers<'_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        ioctl::get_msr(self.vcpu, msr).ok_or(FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        ioctl::set_msr(self.vcpu, msr, value).ok_or(FaultCause::KernelRefused)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        // SAFETY: takes nothing and touches no memory of ours.
        let cpu = unsafe { libc::sched_getcpu() };
        let value = |cpu| self.host?.read(cpu, msr);
        // Where the thread moves in between it is another CPU's.
        usize::try_from(cpu)
            .ok()
            .and_then(value)
            .ok_or(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, FaultCause> {
        self.handlers.read(name, self.id, msr)
    }

    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), FaultCause> {
        self.handlers.write(name, self.id, msr, value)
    }
}
