//! What operating systems need of MSRs: accesses that they make unguarded, so that #GP stops them or leaves them crippled.
//!
//! A row says which access, of whom, what becomes of it without, and where that can be read. Accesses that a system guards,
//! as Linux does with `rdmsrl_safe`, have none.

use std::fmt;

use msrgate_core::Op::{Read, Write};
use msrgate_core::{Msr, Op};

use self::System::{FreeBsd, Linux, Windows};

/// An operating system, of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum System {
    /// Linux.
    Linux,
    /// Windows.
    Windows,
    /// FreeBSD.
    FreeBsd,
}

impl System {
    /// All of them.
    pub const ALL: [System; 3] = [Linux, Windows, FreeBsd];
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Linux => "Linux",
            Windows => "Windows",
            FreeBsd => "FreeBSD",
        })
    }
}

/// An access without which an operating system fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The register. Where the guest's CPUID says that it is not there, the system leaves it alone.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// Whose need it is.
    pub system: System,
    /// What it is for, and what happens without.
    pub why: &'static str,
    /// Where this can be read.
    pub source: &'static str,
}

/// All needs that are known, by MSR.
pub fn needs() -> &'static [Need] {
    NEEDS
}

/// Registers that the processor or KVM works by: a write that only seems done makes a system fail, or leaves it unprotected.
pub const WORKED_BY: [u32; 20] = [
    0x1b,
    0x48,
    0x174,
    0x175,
    0x176,
    0x277,
    0x6e0,
    0xda0,
    0x4000_0001,
    0x4b56_4d00,
    0x4b56_4d01,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
];

/// Registers that systems read to change bits of them and write the others back.
pub const CHANGED_IN_PLACE: [u32; 2] = [0x1b, 0xc000_0080];

const fn n(msr: u32, op: Op, system: System, why: &'static str, source: &'static str) -> Need {
    Need {
        msr: Msr(msr),
        op,
        system,
        why,
        source,
    }
}

#[rustfmt::skip]
static NEEDS: &[Need] = &[
    n(0x0000_0000, Read, Windows, "Windows Server 2019 Essentials reads it while it starts; #GP is a bug check", "Xen, commit \"x86/msr: handle reads to MSR_P5_MC_{ADDR,TYPE}\""),
    n(0x0000_001b, Read, Linux, "looked at before the local APIC is used; without it x2APIC stays off, with a warning", "Linux, try_to_enable_x2apic, __x2apic_enable"),
    n(0x0000_001b, Read, FreeBsd, "read where CPUID has x2APIC; #GP is a panic", "FreeBSD, native_lapic_is_x2apic"),
    n(0x0000_001b, Write, Linux, "turns x2APIC on; without it x2APIC stays off, with a warning", "Linux, __x2apic_enable"),
    n(0x0000_001b, Write, FreeBsd, "turns x2APIC on; #GP is a panic", "FreeBSD, native_lapic_enable_x2apic"),
    n(0x0000_003b, Read, Linux, "whether firmware moved the counter; #GP is a warning, and clocks of CPUs may differ", "Linux, tsc_verify_tsc_adjust"),
    n(0x0000_0048, Read, Linux, "bits that firmware set are kept; without it mitigations stay off, with a warning", "Linux, cpu_select_mitigations"),
    n(0x0000_0048, Write, Linux, "IBRS, STIBP and SSBD are turned on; without it they are not, with a warning", "Linux, write_spec_ctrl_current"),
    n(0x0000_008b, Read, Linux, "the microcode's revision on Intel's processors; #GP is a warning, and flaws are worked around that are mended", "Linux, intel_get_microcode_revision"),
    n(0x0000_008b, Write, Linux, "on Intel's processors cleared before the revision is read; #GP is a warning", "Linux, intel_get_microcode_revision"),
    n(0x0000_00fe, Read, Linux, "how many MTRRs there are; #GP is a warning, and memory is cached by chance", "Linux, mtrr_bp_init"),
    n(0x0000_00fe, Read, FreeBsd, "how many MTRRs there are; #GP is a panic", "FreeBSD, x86_mrinit"),
    n(0x0000_010a, Read, Linux, "which flaws the processor lacks; without it all of them are worked around, with a warning", "Linux, x86_read_arch_cap_msr"),
    n(0x0000_0179, Read, Linux, "how many machine check banks there are; #GP is a warning, and machine checks are lost", "Linux, __mcheck_cpu_cap_init"),
    n(0x0000_0179, Read, FreeBsd, "how many machine check banks there are; #GP is a panic", "FreeBSD, _mca_init"),
    n(0x0000_017a, Read, Linux, "read when machine checks are turned on; #GP is a panic", "Linux, mce_gather_info, ex_handler_msr_mce"),
    n(0x0000_01a0, Read, Linux, "read on Intel's processors before there is a fault handler; #GP is a reset", "Linux, verify_cpu in arch/x86/kernel/verify_cpu.S"),
    n(0x0000_01a0, Read, FreeBsd, "read on Intel's processors; #GP is a panic", "FreeBSD, fix_cpuid"),
    n(0x0000_0277, Write, Linux, "memory types for page tables; without it write-combining and uncached mappings are wrong, with a warning", "Linux, pat_bsp_init, pat_cpu_init"),
    n(0x0000_0277, Write, FreeBsd, "memory types for page tables; #GP is a panic", "FreeBSD, pmap_init_pat"),
    n(0x0000_02ff, Read, Linux, "whether MTRRs are on; #GP is a warning, and memory is cached by chance", "Linux, mtrr_state_warn, get_mtrr_state"),
    n(0x0000_02ff, Read, FreeBsd, "whether MTRRs are on; #GP is a panic", "FreeBSD, x86_mrinit"),
    n(0x0000_0400, Write, FreeBsd, "turns machine checks on; #GP is a panic", "FreeBSD, _mca_init"),
    n(0x0000_0401, Read, Linux, "read when machine checks are turned on; #GP is a panic", "Linux, machine_check_poll, ex_handler_msr_mce"),
    n(0x0000_0401, Write, FreeBsd, "cleared when machine checks are turned on; #GP is a panic", "FreeBSD, _mca_init"),
    n(0x0000_06e0, Write, Linux, "arms the timer; without it no timer fires, and the start hangs", "Linux, lapic_next_deadline"),
    n(0x0000_06e0, Write, FreeBsd, "arms the timer; #GP is a panic", "FreeBSD, lapic_timer_deadline"),
    n(0x0000_0da0, Write, Linux, "which states XSAVES saves; without it XSAVES goes on with others, with a warning", "Linux, fpu__init_cpu_xstate"),
    n(0x4000_0000, Write, Windows, "a system that finds the Hyper-V interface says who it is, before it has hypercalls", "Microsoft, Requirements for Implementing the Microsoft Hypervisor Interface"),
    n(0x4000_0001, Write, Windows, "a system that finds the Hyper-V interface asks for its page of hypercalls", "Microsoft, Requirements for Implementing the Microsoft Hypervisor Interface"),
    n(0x4000_0002, Read, Windows, "a system that finds the Hyper-V interface asks which virtual processor this is", "Microsoft, Requirements for Implementing the Microsoft Hypervisor Interface"),
    n(0x4b56_4d00, Write, Linux, "where KVM puts the time of day; without it the clock starts at 1970, with a warning", "Linux, kvm_get_wallclock"),
    n(0x4b56_4d01, Write, Linux, "where KVM puts its clock; without it the guest reads a page of zeros, and time stands still", "Linux, kvm_register_clock"),
    n(0xc000_0080, Read, Linux, "read, to change bits of it, before there is a fault handler; #GP is a reset", "Linux, secondary_startup_64 in arch/x86/kernel/head_64.S"),
    n(0xc000_0080, Read, FreeBsd, "read, to change bits of it; #GP is a panic", "FreeBSD, initializecpu, amd64_conf_fast_syscall"),
    n(0xc000_0080, Write, Linux, "long mode, SYSCALL and NX are turned on here, before there is a fault handler; #GP is a reset", "Linux, secondary_startup_64 in arch/x86/kernel/head_64.S"),
    n(0xc000_0080, Write, Windows, "long mode is turned on here, on each CPU", "AMD APM vol. 2, Enabling and Activating Long Mode"),
    n(0xc000_0080, Write, FreeBsd, "long mode, SYSCALL and NX are turned on here; #GP is a panic", "FreeBSD, initializecpu, amd64_conf_fast_syscall"),
    n(0xc000_0081, Write, Linux, "the segments of system calls; without it the first program dies", "Linux, syscall_init"),
    n(0xc000_0081, Write, Windows, "the segments of system calls", "AMD APM vol. 2, SYSCALL and SYSRET MSRs"),
    n(0xc000_0081, Write, FreeBsd, "the segments of system calls; #GP is a panic", "FreeBSD, amd64_conf_fast_syscall"),
    n(0xc000_0082, Read, Windows, "read back and compared with what was written; a difference is bug check 0x109", "Microsoft, Bug Check 0x109: CRITICAL_STRUCTURE_CORRUPTION, type 7"),
    n(0xc000_0082, Write, Linux, "where system calls enter the kernel; without it the first program dies", "Linux, syscall_init"),
    n(0xc000_0082, Write, Windows, "where system calls enter the kernel", "AMD APM vol. 2, SYSCALL and SYSRET MSRs"),
    n(0xc000_0082, Write, FreeBsd, "where system calls enter the kernel; #GP is a panic", "FreeBSD, amd64_conf_fast_syscall"),
    n(0xc000_0083, Write, FreeBsd, "where 32-bit system calls enter the kernel; #GP is a panic", "FreeBSD, amd64_conf_fast_syscall"),
    n(0xc000_0084, Write, Linux, "flags that system calls clear; without it the kernel is entered with a program's flags, interrupts on", "Linux, syscall_init"),
    n(0xc000_0084, Write, Windows, "flags that system calls clear", "AMD APM vol. 2, SYSCALL and SYSRET MSRs"),
    n(0xc000_0084, Write, FreeBsd, "flags that system calls clear; #GP is a panic", "FreeBSD, amd64_conf_fast_syscall"),
    n(0xc000_0100, Write, Linux, "thread-local storage, where FSGSBASE is off; without it each program dies that has any", "Linux, cpu_init, x86_fsbase_write_cpu"),
    n(0xc000_0100, Write, FreeBsd, "set before there is a fault handler; #GP is a reset", "FreeBSD, hammer_time"),
    n(0xc000_0101, Write, Linux, "where the data of this CPU is, set before there is a fault handler; #GP is a reset", "Linux, secondary_startup_64 in arch/x86/kernel/head_64.S"),
    n(0xc000_0101, Write, Windows, "where the data of this CPU is: a base beyond 4 GiB can be set in no other way at first", "AMD APM vol. 2, FS and GS Registers in 64-Bit Mode"),
    n(0xc000_0101, Write, FreeBsd, "where the data of this CPU is, set before there is a fault handler; #GP is a reset", "FreeBSD, hammer_time"),
    n(0xc000_0102, Write, Linux, "what SWAPGS brings back for a program; #GP is a warning, and programs share a base", "Linux, cpu_init, save_base_legacy"),
    n(0xc000_0102, Write, Windows, "what SWAPGS brings back when the kernel is entered", "AMD APM vol. 2, SWAPGS Instruction"),
    n(0xc000_0102, Write, FreeBsd, "set before there is a fault handler; #GP is a reset", "FreeBSD, hammer_time"),
    n(0xc000_0103, Write, Linux, "the CPU's number for RDTSCP and RDPID; without it getcpu() is wrong, with a warning", "Linux, setup_getcpu"),
    n(0xc000_0103, Write, FreeBsd, "the CPU's number for RDTSCP and RDPID; #GP is a panic", "FreeBSD, initializecpu"),
    n(0xc001_001f, Read, Linux, "read, to change a bit of it, on AMD's processors; #GP is a warning", "Linux, amd_bus_cpu_online"),
    n(0xc001_001f, Write, Linux, "extended configuration space by I/O ports, on AMD's processors; #GP is a warning", "Linux, amd_bus_cpu_online"),
    n(0xc001_102c, Read, Windows, "Windows 10 works around an erratum of AMD's family 15h; #GP is a bug check", "Linux, commit \"kvm: x86: Add AMD's EX_CFG to the list of ignored MSRs\""),
    n(0xc001_102c, Write, Windows, "Windows 10 works around an erratum of AMD's family 15h; #GP is a bug check", "Linux, commit \"kvm: x86: Add AMD's EX_CFG to the list of ignored MSRs\""),
];
