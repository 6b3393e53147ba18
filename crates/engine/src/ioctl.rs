//! ioctl numbers, by descriptor and by the kind of process.

use msrgate_core::abi::{self, EnableCap, Layout};

use crate::{Errno, UserMemory, Vm};

/// Who makes an ioctl, and on what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Caller {
    /// The calling process.
    pub process: Process,
    /// The descriptor.
    pub descriptor: Descriptor,
}

impl Caller {
    /// A process with a descriptor.
    pub const fn new(process: Process, descriptor: Descriptor) -> Caller {
        Caller { process, descriptor }
    }

    /// A 64-bit process with the VM's descriptor.
    pub const NATIVE: Caller = Caller {
        process: Process::Native,
        descriptor: Descriptor::Vm,
    };
    /// A 32-bit process with the VM's descriptor.
    pub const COMPAT: Caller = Caller {
        process: Process::Compat,
        descriptor: Descriptor::Vm,
    };
}

/// The calling process, under a 64-bit kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Process {
    /// 64-bit.
    Native,
    /// 32-bit.
    Compat,
}

/// Which of KVM's descriptors an ioctl is made on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Descriptor {
    /// `/dev/kvm`.
    System,
    /// A VM.
    Vm,
    /// A vCPU of it.
    Vcpu,
}

impl Vm {
    /// An ioctl by its number: KVM_X86_SET_MSR_FILTER in both layouts, KVM_ENABLE_CAP, KVM_CHECK_EXTENSION
    /// (`kvm_vm_ioctl`, `kvm_vm_compat_ioctl`). Gives what the system call returns. Every other request gives ENOTTY on
    /// the VM's descriptor and EINVAL on the others, where the kernel serves many more.
    ///
    /// `argp` is the argument as the kernel has it: zero-extended for a 32-bit process.
    pub fn ioctl(&self, request: u32, argp: u64, memory: &impl UserMemory, caller: Caller) -> Result<u32, Errno> {
        match caller.descriptor {
            Descriptor::System => match request {
                abi::CHECK_EXTENSION => Ok(self.check_extension(argp)),
                _ => Err(Errno::Einval),
            },
            Descriptor::Vm => self.vm_ioctl(request, argp, memory, caller.process),
            Descriptor::Vcpu => {
                self.gate()?;
                if request == abi::ENABLE_CAP {
                    // A vCPU has capabilities of its own: the structure is copied before it is refused.
                    memory.read(argp, &mut [0; EnableCap::BYTES])?;
                }
                Err(Errno::Einval)
            }
        }
    }

    fn vm_ioctl(&self, request: u32, argp: u64, memory: &impl UserMemory, process: Process) -> Result<u32, Errno> {
        self.gate()?;
        match request {
            abi::SET_MSR_FILTER => self.set_msr_filter(argp, Layout::NATIVE, memory).map(|()| 0),
            // The native number is tried after this one, so a 32-bit process may use both.
            abi::SET_MSR_FILTER_COMPAT if process == Process::Compat && self.has_compat_ioctl() => {
                self.set_msr_filter(argp, Layout::COMPAT, memory).map(|()| 0)
            }
            abi::ENABLE_CAP => self.enable_cap(argp, memory).map(|()| 0),
            abi::CHECK_EXTENSION => Ok(self.check_extension(argp)),
            _ => Err(Errno::Enotty),
        }
    }
}
