//! What is the same for a guest whether its own instruction or user space carries it out.

use msrgate_core::{Msr, MsrRange, Op};

/// Registers that may be passed through from user space, by their first and last MSR, and whether reads and writes may.
///
/// Made by `msrgate_guest::faithful` from registers which, by KVM's source, hold a value or have one answer, and which no
/// clock, counter or event changes. Here is what was the same on Linux 6.18 with `kvm_pvm`, 6.1 with `kvm_amd` and 6.1 with
/// `kvm_intel`: in real and in 64-bit mode, with all of the CPUID that KVM supports and with none. The live test
/// `crates/guest/tests/live/faithful.rs` holds each kernel to it, and prints what more is the same there.
///
/// Not here, though they only hold values: writes of IA32_LSTAR, IA32_CSTAR, the segment bases and the SYSENTER registers,
/// since one of these kernels takes a value from the host that it does not take from a guest, or the reverse; and what a
/// guest without the feature in its CPUID cannot read and the host can.
#[rustfmt::skip]
pub const FAITHFUL: [(u32, u32, bool, bool); 28] = [
    (0x17, 0x17, false, true), // IA32_PLATFORM_ID
    (0x2a, 0x2a, true, true), // MSR_EBL_CR_POWERON
    (0xcd, 0xcd, true, true), // MSR_FSB_FREQ
    (0xce, 0xce, true, false), // MSR_PLATFORM_INFO
    (0xfe, 0xfe, true, true), // IA32_MTRRCAP
    (0x11e, 0x11e, true, true), // MSR_BBL_CR_CTL3
    (0x140, 0x140, true, true), // MSR_MISC_FEATURES_ENABLES
    (0x174, 0x175, true, false), // IA32_SYSENTER_CS, IA32_SYSENTER_ESP
    (0x179, 0x17a, true, true), // IA32_MCG_CAP, IA32_MCG_STATUS
    (0x198, 0x199, true, true), // IA32_PERF_STATUS, IA32_PERF_CTL
    (0x1a0, 0x1a0, true, false), // IA32_MISC_ENABLE
    (0x200, 0x20f, true, true), // IA32_MTRR_PHYSBASE0 and those after it
    (0x250, 0x250, true, true), // IA32_MTRR_FIX64K_00000
    (0x258, 0x259, true, true), // IA32_MTRR_FIX16K_80000, IA32_MTRR_FIX16K_A0000
    (0x268, 0x26f, true, true), // IA32_MTRR_FIX4K_C0000 and those after it
    (0x277, 0x277, true, true), // IA32_PAT
    (0x2ff, 0x2ff, true, true), // IA32_MTRR_DEF_TYPE
    (0x606, 0x606, true, true), // MSR_RAPL_POWER_UNIT
    (0xc000_0081, 0xc000_0081, true, true), // IA32_STAR
    (0xc000_0082, 0xc000_0083, true, false), // IA32_LSTAR, IA32_CSTAR
    (0xc000_0084, 0xc000_0084, true, true), // IA32_FMASK
    (0xc000_0100, 0xc000_0102, true, false), // IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE
    (0xc001_0010, 0xc001_0010, true, true), // SYSCFG
    (0xc001_0055, 0xc001_0058, true, true), // INT_PENDING_MSG to MMIO_CONF_BASE
    (0xc001_0112, 0xc001_0113, true, true), // TSEG_ADDR, TSEG_MASK
    (0xc001_1021, 0xc001_1028, true, true), // IC_CFG and those after it
    (0xc001_1029, 0xc001_1029, true, false), // DE_CFG
    (0xc001_102a, 0xc001_102c, true, true), // BU_CFG2 to EX_CFG
];

/// Registers that guests touch while they run, and not only when they start: the last to be passed through where no
/// profile tells.
const HOT: [(u32, u32); 1] = [(0xc000_0100, 0xc000_0102)];

/// What may be passed through, each register for itself, and how much sooner than another one with less weight.
pub fn spillable() -> impl Iterator<Item = (Msr, Op, u16)> {
    FAITHFUL.iter().flat_map(|(first, last, reads, writes)| {
        let range = MsrRange::new(Msr(*first), Msr(*last))
            .into_iter()
            .flat_map(MsrRange::iter);
        range.flat_map(|msr| {
            let ops = [(Op::Read, *reads), (Op::Write, *writes)];
            let ops = ops.into_iter().filter(|(_, may)| *may);
            let hot = HOT.iter().any(|(first, last)| (*first..=*last).contains(&msr.0));
            ops.map(move |(op, _)| (msr, op, if hot { 1000 } else { 1 }))
        })
    })
}

/// Whether the access gets the guest the same if user space passes it through (KVM_GET_MSRS, KVM_SET_MSRS).
pub fn faithful(msr: Msr, op: Op) -> bool {
    FAITHFUL.iter().any(|(first, last, reads, writes)| {
        let may = match op {
            Op::Read => *reads,
            Op::Write => *writes,
        };
        may && (*first..=*last).contains(&msr.0)
    })
}
