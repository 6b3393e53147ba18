//! Programs of a few bytes, for what the guest's own does not do.

#![expect(unsafe_code, reason = "hands memory to KVM")]

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use msrgate_guest::Mode;
use msrgate_guest::raw::Arena;

use super::live::Live;

/// Where programs lie: in a gap of the guest's memory that its page tables map.
pub(crate) const CODE: u64 = 0xd800_0000;
/// A memory slot that the guest does not use.
const SLOT: u32 = 9;

/// A page with a program at [`CODE`]. It ends with [`OUT`], and must outlive the VM.
pub(crate) struct Page(Arena);

/// `out 0xf4, al`: the guest leaves with KVM_EXIT_IO.
pub(crate) const OUT: [u8; 2] = [0xe6, 0xf4];

impl Page {
    pub(crate) fn with(code: &[u8]) -> Page {
        let mut arena = Arena::new(1).unwrap();
        arena.page(0).unwrap()[..code.len()].copy_from_slice(code);
        Page(arena)
    }

    /// Puts the page into a VM that has none.
    pub(crate) fn map(&self, vm: &VmFd) {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            guest_phys_addr: CODE,
            memory_size: Arena::PAGE as u64,
            userspace_addr: self.0.address(0).unwrap(),
            flags: 0,
        };
        // SAFETY: a page that this program touches no more; by the type's contract it outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
}

/// Stands before the program's first byte.
pub(crate) fn enter(live: &mut Live, regs: kvm_regs) {
    let mode = live.mode;
    let fd = live.fd();
    let stack = fd.get_regs().unwrap().rsp;
    if mode == Mode::Real {
        // A base that no selector gives: it holds until CS is loaded, which the program does not do.
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (CODE, 0);
        fd.set_sregs(&sregs).unwrap();
    }
    let rip = if mode == Mode::Real { 0 } else { CODE };
    fd.set_regs(&kvm_regs {
        rip,
        rsp: stack,
        rflags: 2,
        ..regs
    })
    .unwrap();
}
