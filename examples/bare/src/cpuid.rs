//! CPUID: the processor's, without virtualization.

use core::arch::x86_64::__cpuid_count;

use crate::processor::Registers;

/// Puts what the guest asks for into its registers.
pub(crate) fn answer(registers: &mut Registers, cr4: u64) {
    const OSXSAVE: u32 = 1 << 27;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let leaf = registers.rax as u32;
    let mut got = __cpuid_count(leaf, registers.rcx as u32);
    match leaf {
        1 => {
            got.ecx &= !(VMX | OSXSAVE);
            // It mirrors the guest's CR4.
            if cr4 >> 18 & 1 == 1 {
                got.ecx |= OSXSAVE;
            }
        }
        0x8000_0001 => got.ecx &= !SVM,
        0x8000_000a => (got.eax, got.ebx, got.ecx, got.edx) = (0, 0, 0, 0),
        _ => {}
    }
    (registers.rax, registers.rbx) = (got.eax.into(), got.ebx.into());
    (registers.rcx, registers.rdx) = (got.ecx.into(), got.edx.into());
}
