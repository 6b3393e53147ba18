//! How much the kernel puts on a stack where a signal is delivered.

#![expect(unsafe_code, reason = "instructions")]

use core::arch::x86_64::{__cpuid, __cpuid_count};

/// CPUID.1:ECX.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// XTILEDATA, which a process has to ask for (`XFEATURE_MASK_USER_DYNAMIC`).
const DYNAMIC: u64 = 1 << 18;

/// Bytes of the extended state in a signal's frame, `FP_XSTATE_MAGIC2` included (`xstate_sigframe_size`); 0 on a
/// processor without XSAVE, whose frames say nothing.
pub(crate) fn bytes() -> u64 {
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: XGETBV of XCR0 exists where OSXSAVE is set, and changes these registers alone.
    unsafe { core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    let enabled = (u64::from(high) << 32 | u64::from(low)) & !DYNAMIC;
    // Leaf 0xd: for each component from 2 on, its size and its place in the standard format.
    let end = |component: u32| {
        let leaf = __cpuid_count(0xd, component);
        u64::from(leaf.eax) + u64::from(leaf.ebx)
    };
    let components = (2..63).filter(|component| enabled >> component & 1 == 1);
    let state = components.map(end).max().unwrap_or(0).max(512 + 64);
    state + 4
}
