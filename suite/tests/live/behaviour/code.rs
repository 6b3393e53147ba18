//! Programs of a few bytes, for what the guest's own does not do.

#![expect(unsafe_code, reason = "assembly, and memory that is handed to KVM")]

use std::arch::global_asm;

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use msrgate_guest::Mode;
use msrgate_guest::raw::Arena;

use super::live::Live;

/// Where programs lie: in a gap of the guest's memory that its page tables map.
pub(crate) const CODE: u64 = 0xd800_0000;
/// The first memory slot that the guest does not use.
const SLOT: u32 = 9;

/// Pages at [`CODE`], a program in the first of them, which ends with [`OUT`]. They must outlive the VM.
pub(crate) struct Pages {
    arena: Arena,
    count: usize,
}

/// `out 0xf4, al`: the guest leaves with KVM_EXIT_IO.
pub(crate) const OUT: [u8; 2] = [0xe6, 0xf4];

impl Pages {
    /// As many as there are contents, which each starts with.
    pub(crate) fn with(contents: &[&[u8]]) -> Pages {
        let count = contents.len();
        let mut arena = Arena::new(count).unwrap();
        for (number, bytes) in contents.iter().enumerate() {
            arena.page(number).unwrap()[..bytes.len()].copy_from_slice(bytes);
        }
        Pages { arena, count }
    }

    /// Puts them into a VM that has none.
    pub(crate) fn map(&self, vm: &VmFd) {
        for number in 0..self.count {
            let region = kvm_userspace_memory_region {
                slot: SLOT + number as u32,
                guest_phys_addr: address(number),
                memory_size: Arena::PAGE as u64,
                userspace_addr: self.arena.address(number).unwrap(),
                flags: 0,
            };
            // SAFETY: a page that this program touches in `Pages::read` alone, while no vCPU runs; by the type's contract it
            // outlives the VM.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
    }

    /// Eight bytes of a page, while no vCPU runs.
    pub(crate) fn read(&mut self, number: usize, at: usize) -> u64 {
        u64::from_le_bytes(self.arena.page(number).unwrap()[at..at + 8].try_into().unwrap())
    }
}

/// Where the guest has a page.
pub(crate) fn address(number: usize) -> u64 {
    CODE + (number * Arena::PAGE) as u64
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

global_asm!(
    ".pushsection .rodata.msrgate_suite, \"a\"",
    ".globl msrgate_l1_vmx, msrgate_l1_vmx_exit, msrgate_l1_vmx_end, msrgate_l1_svm, msrgate_l1_svm_end",
    // RDI points to the addresses of the VMXON region and of the VMCS, and to fields and values behind them, up to a field 0. What
    // is in other registers but RSI and R8 is L2's too. It leaves by OUT when L2 has exited, and then enters it anew.
    "msrgate_l1_vmx:",
    "    vmxon [rdi]",
    "    jbe 4f",
    "2:  vmclear [rdi + 8]",
    "    jbe 4f",
    "    vmptrld [rdi + 8]",
    "    jbe 4f",
    "    lea rsi, [rdi + 16]",
    "3:  mov r8, [rsi]",
    "    vmwrite r8, [rsi + 8]",
    "    jbe 4f",
    "    add rsi, 16",
    "    cmp qword ptr [rsi], 0",
    "    jne 3b",
    "    vmlaunch",
    "4:  mov rbx, -1",
    "    out 0xf4, al",
    // Reason and qualification.
    "msrgate_l1_vmx_exit:",
    "    mov r8d, 0x4402",
    "    vmread rbx, r8",
    "    mov r8d, 0x6400",
    "    vmread rbp, r8",
    "    out 0xf4, al",
    "    jmp 2b",
    "msrgate_l1_vmx_end:",
    // RDI points to the VMCB, which has L2's RAX, and RSI to where L2 starts; the other registers are L2's too. As above.
    "msrgate_l1_svm:",
    "    mov [rdi + 0x578], rsi",
    "    mov rax, rdi",
    "    vmrun rax",
    // The exit's code, and L2's RAX.
    "    mov rbx, [rax + 0x70]",
    "    mov rax, [rax + 0x5f8]",
    "    out 0xf4, al",
    "    jmp msrgate_l1_svm",
    "msrgate_l1_svm_end:",
    ".popsection",
);

unsafe extern "C" {
    static msrgate_l1_vmx: u8;
    static msrgate_l1_vmx_exit: u8;
    static msrgate_l1_vmx_end: u8;
    static msrgate_l1_svm: u8;
    static msrgate_l1_svm_end: u8;
}

/// A hypervisor that enters L2 by VMX, and the offset at which it goes on when L2 exits.
pub(crate) fn l1_vmx() -> (&'static [u8], u64) {
    let [start, exit, end] = [
        &raw const msrgate_l1_vmx,
        &raw const msrgate_l1_vmx_exit,
        &raw const msrgate_l1_vmx_end,
    ];
    let length = end.addr() - start.addr();
    // SAFETY: both symbols bound one run of bytes in a read-only section of this program.
    let program = unsafe { std::slice::from_raw_parts(start, length) };
    (program, (exit.addr() - start.addr()) as u64)
}

/// A hypervisor that enters L2 by SVM.
pub(crate) fn l1_svm() -> &'static [u8] {
    let [start, end] = [&raw const msrgate_l1_svm, &raw const msrgate_l1_svm_end];
    let length = end.addr() - start.addr();
    // SAFETY: both symbols bound one run of bytes in a read-only section of this program.
    unsafe { std::slice::from_raw_parts(start, length) }
}
