//! The registers and handlers that actions ask.

#![expect(unsafe_code, reason = "system calls")]

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use msrgate_core::{FaultCause, Msr, MsrBackend};

use crate::{Fault, Handlers, HostMsrs, VcpuId, ioctl};

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
        let handler = self.handlers.find(name).ok_or(FaultCause::NoHandler)?;
        guarded(|| handler.read(self.id, msr))
    }

    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let handler = self.handlers.find(name).ok_or(FaultCause::NoHandler)?;
        guarded(|| handler.write(self.id, msr, value))
    }
}

/// A handler's answer; its panic is one too.
fn guarded<T>(ask: impl FnOnce() -> Result<T, Fault>) -> Result<T, FaultCause> {
    // Unwind safe: a handler is shared between threads, so what it holds is its own to keep whole.
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Fault)) => Err(FaultCause::HandlerFault),
        Err(_) => Err(FaultCause::HandlerPanicked),
    }
}
