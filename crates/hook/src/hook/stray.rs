//! VMs and vCPUs whose descriptors came into the process by a way that is not followed.

use libc::{EACCES, c_int, c_ulong};
use msrgate_core::abi;

use super::{Hook, failed};
use crate::kernel::{Kernel, errno, set_errno};

/// `_IO(KVMIO, 0x03)`, which `/dev/kvm` and VMs answer.
pub(super) const KVM_CHECK_EXTENSION: u32 = 0xae03;
/// `_IOR(KVMIO, 0x98, struct kvm_mp_state)`, which vCPUs answer.
pub(super) const KVM_GET_MP_STATE: u32 = 0x8004_ae98;

/// What a call is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stray {
    Vm,
    Vcpu,
}

impl<K: Kernel> Hook<K> {
    /// A call on a descriptor that is not kept track of. It goes on to the kernel, unless the descriptor is a VM's or a
    /// vCPU's all the same: then the policy would not be in force, or its exits reach a VMM that did not ask for them.
    #[cold]
    #[inline(never)]
    pub(super) fn unknown(&self, fd: c_int, request: c_ulong, argument: usize, stray: Stray) -> c_int {
        let before = errno();
        let mut state = 0_u32;
        // The kernel refuses both for the VMs of another process.
        let (name, is) = match stray {
            Stray::Vm => {
                let capability = abi::CAP_X86_USER_SPACE_MSR as usize;
                let answered = self.kernel.ioctl(fd, c_ulong::from(KVM_CHECK_EXTENSION), capability) >= 0;
                ("VM", answered && !self.kernel.is_kvm(fd))
            }
            Stray::Vcpu => {
                let address = (&raw mut state).expose_provenance();
                let answered = self.kernel.ioctl(fd, c_ulong::from(KVM_GET_MP_STATE), address) >= 0;
                ("vCPU", answered)
            }
        };
        set_errno(before);
        if !is {
            return self.kernel.ioctl(fd, request, argument);
        }
        self.kernel.say(&format!(
            "descriptor {fd} is refused: it is a {name}'s, and came by a way that is not followed, such as a socket or \
             pidfd_getfd; the VMM has to use the one that KVM gave it, or a dup of that"
        ));
        failed(EACCES)
    }
}
