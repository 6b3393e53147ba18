//! The registers and handlers that actions ask.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use msrgate_core::{ActionTable, Backing, Msr, ReadAction, Why};

use crate::handler::{Fault, Handlers};
use crate::{InstallError, ioctl};

/// Open descriptors of `/dev/cpu/N/msr`, by N.
#[derive(Debug, Default)]
pub(crate) struct HostMsrs {
    cpus: Vec<Option<File>>,
}

impl HostMsrs {
    /// Opens those that `table` needs: all or none.
    pub(crate) fn for_table(table: &ActionTable) -> Result<HostMsrs, InstallError> {
        let entries = table.reads().iter().map(|entry| &entry.action);
        let mut actions = entries.chain([&table.unknown().0, &table.invalid().0]);
        if !actions.any(|action| matches!(action, ReadAction::Host)) {
            return Ok(HostMsrs::default());
        }
        let mut cpus = Vec::new();
        for cpu in 0..configured_cpus() {
            let path = PathBuf::from(format!("/dev/cpu/{cpu}/msr"));
            match File::open(&path) {
                Ok(file) => cpus.push(Some(file)),
                // A CPU that is offline has no device; a guest cannot run there either.
                Err(source) if source.kind() == io::ErrorKind::NotFound && cpu > 0 => cpus.push(None),
                Err(source) => return Err(InstallError::HostMsrs { path, source }),
            }
        }
        Ok(HostMsrs { cpus })
    }

    /// The value on the CPU that runs this thread. Where the thread moves in between it is another CPU's.
    fn read(&self, msr: Msr) -> Option<u64> {
        // SAFETY: takes nothing and touches no memory of ours.
        let cpu = unsafe { libc::sched_getcpu() };
        let file = self.cpus.get(usize::try_from(cpu).ok()?)?.as_ref()?;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, u64::from(msr.0)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }
}

fn configured_cpus() -> libc::c_long {
    // SAFETY: takes a number and touches no memory of ours.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) }
}

/// What the actions of one vCPU may reach.
pub(crate) struct Registers<'a> {
    pub(crate) vcpu: &'a OwnedFd,
    pub(crate) id: u32,
    pub(crate) host: &'a HostMsrs,
    pub(crate) handlers: &'a Handlers,
}

impl Backing for Registers<'_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, Why> {
        ioctl::get_msr(self.vcpu, msr).ok_or(Why::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), Why> {
        ioctl::set_msr(self.vcpu, msr, value).ok_or(Why::KernelRefused)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, Why> {
        self.host.read(msr).ok_or(Why::HostUnreadable)
    }

    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, Why> {
        let handler = self.handlers.find(name).ok_or(Why::NoHandler)?;
        guarded(|| handler.read(self.id, msr))
    }

    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), Why> {
        let handler = self.handlers.find(name).ok_or(Why::NoHandler)?;
        guarded(|| handler.write(self.id, msr, value))
    }
}

/// A handler's answer; its panic is one too.
fn guarded<T>(ask: impl FnOnce() -> Result<T, Fault>) -> Result<T, Why> {
    // Unwind safe: a handler is shared between threads, so what it holds is its own to keep whole.
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Fault)) => Err(Why::HandlerFault),
        Err(_) => Err(Why::HandlerPanicked),
    }
}
