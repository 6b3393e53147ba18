//! This machine's KVM, and how guests on it are made.

use std::io;

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::Capabilities;

use crate::{Kernel, VerifyError};

/// This machine's KVM, and the kernel that the engine is to take after.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    pub(crate) probed: Capabilities,
    mode: Mode,
    cpuid: Option<CpuId>,
    pub(crate) kernel: Kernel,
}

impl Machine {
    /// Opens `/dev/kvm`. Guests run in `mode` with this CPUID; `None` is all that KVM supports.
    pub fn open(mode: Mode, cpuid: Option<CpuId>, kernel: Kernel) -> Result<Machine, VerifyError> {
        let probed = msrgate_kvm::probe(&msrgate_kvm::open()?)?;
        let kvm = Kvm::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Machine {
            kvm,
            probed,
            mode,
            cpuid,
            kernel,
        })
    }

    /// The kernel that the engine takes after.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// `/dev/kvm`.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// A new VM. It has interrupt controllers, without which TSC_DEADLINE does nothing.
    pub(crate) fn guest(&self, vcpus: usize) -> Result<Guest, VerifyError> {
        let options = Options {
            cpuid: self.cpuid.clone(),
            vcpus,
            irqchip: true,
        };
        Ok(Guest::new(&self.kvm, self.mode, &options)?)
    }
}
