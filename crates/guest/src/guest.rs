//! A VM that does nothing but access MSRs.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use msrgate_core::Access;

use crate::error::GuestError;
use crate::memory::{MAX_VCPUS, Memory};
use crate::mode::Mode;
use crate::vcpu::{Pending, Seen, Vcpu};

/// How a guest is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// What CPUID tells the guest; `None` for all that KVM supports (KVM_GET_SUPPORTED_CPUID).
    pub cpuid: Option<CpuId>,
    /// How many vCPUs.
    pub vcpus: usize,
    /// Whether the kernel emulates the interrupt controllers: without them there is neither x2APIC nor TSC deadline.
    pub irqchip: bool,
}

/// One vCPU, all that KVM supports, no interrupt controllers.
impl Default for Options {
    fn default() -> Options {
        Options {
            cpuid: None,
            vcpus: 1,
            irqchip: false,
        }
    }
}

/// A VM that does nothing but access MSRs.
#[derive(Debug)]
pub struct Guest {
    // Dropped in this order, after `Drop` took the memory from the VM.
    vcpus: Vec<Vcpu>,
    vm: VmFd,
    memory: Memory,
}

impl Guest {
    /// A new guest, which has not run yet.
    pub fn new(kvm: &Kvm, mode: Mode, options: &Options) -> Result<Guest, GuestError> {
        if options.vcpus > MAX_VCPUS {
            return Err(GuestError::NoVcpu { vcpu: options.vcpus });
        }
        let vm = kvm.create_vm().map_err(GuestError::of("KVM_CREATE_VM"))?;
        let memory = Memory::new(&vm, options.vcpus).map_err(|source| GuestError::Kvm {
            doing: "mapping the guest's memory",
            source,
        })?;
        let mut guest = Guest {
            vcpus: Vec::new(),
            vm,
            memory,
        };
        // Where an Intel processor cannot run real mode by itself, KVM needs three pages of the guest for it.
        guest
            .vm
            .set_tss_address(0xfffb_d000)
            .map_err(GuestError::of("KVM_SET_TSS_ADDR"))?;
        if options.irqchip {
            guest
                .vm
                .create_irq_chip()
                .map_err(GuestError::of("KVM_CREATE_IRQCHIP"))?;
        }
        let supported;
        let cpuid = match &options.cpuid {
            Some(cpuid) => cpuid,
            None => {
                supported = kvm
                    .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                    .map_err(GuestError::of("KVM_GET_SUPPORTED_CPUID"))?;
                &supported
            }
        };
        for id in 0..options.vcpus {
            let table = guest.memory.table(id).ok_or(GuestError::NoVcpu { vcpu: id })?;
            let fd = guest
                .vm
                .create_vcpu(id as u64)
                .map_err(GuestError::of("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(cpuid).map_err(GuestError::of("KVM_SET_CPUID2"))?;
            guest.vcpus.push(Vcpu::new(fd, id, mode, table)?);
        }
        Ok(guest)
    }

    /// The VM, to install a plan on.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// One vCPU.
    pub fn vcpu(&mut self, vcpu: usize) -> Result<&mut Vcpu, GuestError> {
        self.vcpus.get_mut(vcpu).ok_or(GuestError::NoVcpu { vcpu })
    }

    /// All vCPUs, to run each on a thread of its own.
    pub fn vcpus(&mut self) -> &mut [Vcpu] {
        &mut self.vcpus
    }

    /// [`Vcpu::run`] of one vCPU.
    pub fn run(
        &mut self,
        vcpu: usize,
        accesses: &[Access],
        exits: &mut dyn FnMut(&mut Pending<'_>),
    ) -> Result<&[Seen], GuestError> {
        self.vcpu(vcpu)?.run(accesses, exits)
    }

    /// [`Vcpu::exits`] of one vCPU.
    pub fn exits(&self, vcpu: usize) -> Result<u64, GuestError> {
        self.vcpus.get(vcpu).ok_or(GuestError::NoVcpu { vcpu })?.exits()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.memory.unmap(&self.vm);
    }
}
