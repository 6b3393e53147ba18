//! The CPUID features that decide whether an MSR exists, by the names of Linux's `/proc/cpuinfo`.
//!
//! Where Linux has no name, the manual's in lower case. The few names that stand for a count
//! (`arch_perfmon_gp3`: at least three general-purpose counters) end in that count.

use super::place::{Feature, Owner, Place, Register};
use Register::{Eax, Ebx, Ecx, Edx};

const fn processor(leaf: u32, subleaf: u32, register: Register, bit: u8) -> Place {
    Place {
        owner: Owner::Processor,
        leaf,
        subleaf,
        register,
        bit,
        width: 1,
        at_least: 1,
    }
}

/// A field of `width` bits from bit `bit` that must be `at_least`.
const fn field(leaf: u32, subleaf: u32, register: Register, bit: u8, width: u8, at_least: u32) -> Place {
    Place {
        owner: Owner::Processor,
        leaf,
        subleaf,
        register,
        bit,
        width,
        at_least,
    }
}

const fn kvm(bit: u8) -> Place {
    Place {
        owner: Owner::Kvm,
        leaf: 0x4000_0001,
        subleaf: 0,
        register: Eax,
        bit,
        width: 1,
        at_least: 1,
    }
}

const fn hyperv(register: Register, bit: u8) -> Place {
    Place {
        owner: Owner::HyperV,
        leaf: 0x4000_0003,
        subleaf: 0,
        register,
        bit,
        width: 1,
        at_least: 1,
    }
}

/// Holds as soon as the hypervisor's leaves are there.
const fn present(owner: Owner) -> Place {
    Place {
        owner,
        leaf: 0x4000_0000,
        subleaf: 0,
        register: Eax,
        bit: 0,
        width: 32,
        at_least: 0,
    }
}

const fn f(name: &'static str, places: &'static [Place]) -> Feature {
    Feature { name, places }
}

#[rustfmt::skip]
pub(super) static FEATURES: &[Feature] = &[
    // Basic CPUID Information, leaf 1
    f("tsc", &[processor(1, 0, Edx, 4)]),
    f("msr", &[processor(1, 0, Edx, 5)]),
    f("mce", &[processor(1, 0, Edx, 7)]),
    f("apic", &[processor(1, 0, Edx, 9)]),
    f("sep", &[processor(1, 0, Edx, 11)]),
    f("mtrr", &[processor(1, 0, Edx, 12)]),
    f("mca", &[processor(1, 0, Edx, 14)]),
    f("pat", &[processor(1, 0, Edx, 16)]),
    f("dts", &[processor(1, 0, Edx, 21)]), // the debug store; the digital thermal sensor is `dtherm`
    f("acpi", &[processor(1, 0, Edx, 22)]),
    f("ht", &[processor(1, 0, Edx, 28)]),
    f("tm", &[processor(1, 0, Edx, 29)]),
    f("pbe", &[processor(1, 0, Edx, 31)]),
    f("dtes64", &[processor(1, 0, Ecx, 2)]),
    f("monitor", &[processor(1, 0, Ecx, 3)]),
    f("ds_cpl", &[processor(1, 0, Ecx, 4)]),
    f("vmx", &[processor(1, 0, Ecx, 5)]),
    f("smx", &[processor(1, 0, Ecx, 6)]),
    f("est", &[processor(1, 0, Ecx, 7)]),
    f("tm2", &[processor(1, 0, Ecx, 8)]),
    f("sdbg", &[processor(1, 0, Ecx, 11)]),
    f("xtpr", &[processor(1, 0, Ecx, 14)]),
    f("pdcm", &[processor(1, 0, Ecx, 15)]),
    f("dca", &[processor(1, 0, Ecx, 18)]),
    f("x2apic", &[processor(1, 0, Ecx, 21)]),
    f("tsc_deadline_timer", &[processor(1, 0, Ecx, 24)]),
    f("xsave", &[processor(1, 0, Ecx, 26)]),
    f("hypervisor", &[processor(1, 0, Ecx, 31)]),
    // Thermal and Power Management, leaf 6
    f("dtherm", &[processor(6, 0, Eax, 0)]),
    f("ida", &[processor(6, 0, Eax, 1)]),
    f("arat", &[processor(6, 0, Eax, 2)]),
    f("pln", &[processor(6, 0, Eax, 4)]),
    f("pts", &[processor(6, 0, Eax, 6)]),
    f("hwp", &[processor(6, 0, Eax, 7)]),
    f("hwp_notify", &[processor(6, 0, Eax, 8)]),
    f("hwp_act_window", &[processor(6, 0, Eax, 9)]),
    f("hwp_epp", &[processor(6, 0, Eax, 10)]),
    f("hwp_pkg_req", &[processor(6, 0, Eax, 11)]),
    f("hdc", &[processor(6, 0, Eax, 13)]),
    f("hwp_peci", &[processor(6, 0, Eax, 16)]),
    f("hfi", &[processor(6, 0, Eax, 19)]),
    f("hwp_ctl", &[processor(6, 0, Eax, 22)]),
    f("itd", &[processor(6, 0, Eax, 23)]), // Intel Thread Director
    f("aperfmperf", &[processor(6, 0, Ecx, 0)]),
    f("epb", &[processor(6, 0, Ecx, 3)]),
    // Structured Extended Feature Flags, leaf 7
    f("fsgsbase", &[processor(7, 0, Ebx, 0)]),
    f("tsc_adjust", &[processor(7, 0, Ebx, 1)]),
    f("sgx", &[processor(7, 0, Ebx, 2)]),
    f("hle", &[processor(7, 0, Ebx, 4)]),
    f("rtm", &[processor(7, 0, Ebx, 11)]),
    f("cqm", &[processor(7, 0, Ebx, 12)]),
    f("mpx", &[processor(7, 0, Ebx, 14)]),
    f("rdt_a", &[processor(7, 0, Ebx, 15)]),
    f("intel_pt", &[processor(7, 0, Ebx, 25)]),
    f("umip", &[processor(7, 0, Ecx, 2)]),
    f("pku", &[processor(7, 0, Ecx, 3)]),
    f("waitpkg", &[processor(7, 0, Ecx, 5)]),
    f("shstk", &[processor(7, 0, Ecx, 7)]),
    f("cet_ss", &[processor(7, 0, Ecx, 7)]),
    f("tme", &[processor(7, 0, Ecx, 13)]),
    f("rdpid", &[processor(7, 0, Ecx, 22)]),
    f("key_locker", &[processor(7, 0, Ecx, 23)]),
    f("bus_lock_detect", &[processor(7, 0, Ecx, 24)]),
    f("enqcmd", &[processor(7, 0, Ecx, 29)]),
    f("sgx_lc", &[processor(7, 0, Ecx, 30)]),
    f("pks", &[processor(7, 0, Ecx, 31)]),
    f("uintr", &[processor(7, 0, Edx, 5)]),
    f("srbds_ctrl", &[processor(7, 0, Edx, 9)]),
    f("md_clear", &[processor(7, 0, Edx, 10)]),
    f("tsx_force_abort", &[processor(7, 0, Edx, 13)]),
    f("hybrid_cpu", &[processor(7, 0, Edx, 15)]),
    f("pconfig", &[processor(7, 0, Edx, 18)]),
    f("arch_lbr", &[processor(7, 0, Edx, 19)]),
    f("ibt", &[processor(7, 0, Edx, 20)]),
    f("amx_tile", &[processor(7, 0, Edx, 24)]),
    f("spec_ctrl", &[processor(7, 0, Edx, 26)]),
    f("intel_stibp", &[processor(7, 0, Edx, 27)]),
    f("flush_l1d", &[processor(7, 0, Edx, 28)]),
    f("arch_capabilities", &[processor(7, 0, Edx, 29)]),
    f("core_capabilities", &[processor(7, 0, Edx, 30)]),
    f("spec_ctrl_ssbd", &[processor(7, 0, Edx, 31)]),
    f("arch_perfmon_ext", &[processor(7, 1, Eax, 8)]),
    f("fred", &[processor(7, 1, Eax, 17)]),
    f("lkgs", &[processor(7, 1, Eax, 18)]),
    f("wrmsrns", &[processor(7, 1, Eax, 19)]),
    f("hreset", &[processor(7, 1, Eax, 22)]),
    f("lam", &[processor(7, 1, Eax, 26)]),
    f("msrlist", &[processor(7, 1, Eax, 27)]),
    f("intel_ppin", &[processor(7, 1, Ebx, 0)]),
    f("intel_psfd", &[processor(7, 2, Edx, 0)]),
    f("ipred_ctrl", &[processor(7, 2, Edx, 1)]),
    f("rrsba_ctrl", &[processor(7, 2, Edx, 2)]),
    f("ddp_ctrl", &[processor(7, 2, Edx, 3)]),
    f("bhi_ctrl", &[processor(7, 2, Edx, 4)]),
    // Architectural Performance Monitoring, leaf 0xa
    f("arch_perfmon", &[field(0xa, 0, Eax, 0, 8, 1)]),
    f("arch_perfmon_v2", &[field(0xa, 0, Eax, 0, 8, 2)]),
    f("arch_perfmon_v4", &[field(0xa, 0, Eax, 0, 8, 4)]),
    f("arch_perfmon_gp1", &[field(0xa, 0, Eax, 8, 8, 1)]),
    f("arch_perfmon_gp2", &[field(0xa, 0, Eax, 8, 8, 2)]),
    f("arch_perfmon_gp3", &[field(0xa, 0, Eax, 8, 8, 3)]),
    f("arch_perfmon_gp4", &[field(0xa, 0, Eax, 8, 8, 4)]),
    f("arch_perfmon_gp5", &[field(0xa, 0, Eax, 8, 8, 5)]),
    f("arch_perfmon_gp6", &[field(0xa, 0, Eax, 8, 8, 6)]),
    f("arch_perfmon_gp7", &[field(0xa, 0, Eax, 8, 8, 7)]),
    f("arch_perfmon_gp8", &[field(0xa, 0, Eax, 8, 8, 8)]),
    f("arch_perfmon_gp9", &[field(0xa, 0, Eax, 8, 8, 9)]),
    f("arch_perfmon_gp10", &[field(0xa, 0, Eax, 8, 8, 10)]),
    // Counted in EDX, or since version 5 named one by one in ECX.
    f("arch_perfmon_fixed1", &[field(0xa, 0, Edx, 0, 5, 1), processor(0xa, 0, Ecx, 0)]),
    f("arch_perfmon_fixed2", &[field(0xa, 0, Edx, 0, 5, 2), processor(0xa, 0, Ecx, 1)]),
    f("arch_perfmon_fixed3", &[field(0xa, 0, Edx, 0, 5, 3), processor(0xa, 0, Ecx, 2)]),
    f("arch_perfmon_fixed4", &[field(0xa, 0, Edx, 0, 5, 4), processor(0xa, 0, Ecx, 3)]),
    f("arch_perfmon_fixed5", &[field(0xa, 0, Edx, 0, 5, 5), processor(0xa, 0, Ecx, 4)]),
    f("arch_perfmon_fixed6", &[field(0xa, 0, Edx, 0, 5, 6), processor(0xa, 0, Ecx, 5)]),
    f("arch_perfmon_fixed7", &[field(0xa, 0, Edx, 0, 5, 7), processor(0xa, 0, Ecx, 6)]),
    // Processor Extended State, leaf 0xd
    f("xsaveopt", &[processor(0xd, 1, Eax, 0)]),
    f("xsavec", &[processor(0xd, 1, Eax, 1)]),
    f("xsaves", &[processor(0xd, 1, Eax, 3)]),
    f("xfd", &[processor(0xd, 1, Eax, 4)]),
    // Resource Director Technology, leaves 0xf and 0x10; AMD's bandwidth limits have leaves of their own
    f("cqm_llc", &[processor(0xf, 0, Edx, 1)]),
    f("cat_l3", &[processor(0x10, 0, Ebx, 1)]),
    f("cat_l2", &[processor(0x10, 0, Ebx, 2)]),
    f("intel_mba", &[processor(0x10, 0, Ebx, 3)]),
    f("cdp_l3", &[processor(0x10, 1, Ecx, 2)]),
    f("cdp_l2", &[processor(0x10, 2, Ecx, 2)]),
    f("mba", &[processor(0x10, 0, Ebx, 3), processor(0x8000_0008, 0, Ebx, 6)]),
    f("amd_mba", &[processor(0x8000_0008, 0, Ebx, 6)]),
    f("smba", &[processor(0x8000_0020, 0, Ebx, 2)]),
    f("bmec", &[processor(0x8000_0020, 0, Ebx, 3)]),
    // Intel Processor Trace, leaf 0x14
    f("intel_pt_ranges1", &[field(0x14, 1, Eax, 0, 3, 1)]),
    f("intel_pt_ranges2", &[field(0x14, 1, Eax, 0, 3, 2)]),
    f("intel_pt_ranges3", &[field(0x14, 1, Eax, 0, 3, 3)]),
    f("intel_pt_ranges4", &[field(0x14, 1, Eax, 0, 3, 4)]),
    // Key Locker, leaf 0x19
    f("aeskle", &[processor(0x19, 0, Ebx, 0)]),
    f("key_locker_backup", &[processor(0x19, 0, Ebx, 4)]),
    // Intel TDX, leaf 0x21: "IntelTDX    ", of which EBX has the beginning
    f("tdx_guest", &[field(0x21, 0, Ebx, 0, 32, 0x6574_6e49)]),
    // Extended CPUID Information, leaf 0x8000_0001
    f("svm", &[processor(0x8000_0001, 0, Ecx, 2)]),
    f("extapic", &[processor(0x8000_0001, 0, Ecx, 3)]),
    f("osvw", &[processor(0x8000_0001, 0, Ecx, 9)]),
    f("ibs", &[processor(0x8000_0001, 0, Ecx, 10)]),
    f("skinit", &[processor(0x8000_0001, 0, Ecx, 12)]),
    f("wdt", &[processor(0x8000_0001, 0, Ecx, 13)]),
    f("lwp", &[processor(0x8000_0001, 0, Ecx, 15)]),
    f("nodeid_msr", &[processor(0x8000_0001, 0, Ecx, 19)]),
    f("topoext", &[processor(0x8000_0001, 0, Ecx, 22)]),
    f("perfctr_core", &[processor(0x8000_0001, 0, Ecx, 23)]),
    f("perfctr_nb", &[processor(0x8000_0001, 0, Ecx, 24)]),
    f("bpext", &[processor(0x8000_0001, 0, Ecx, 26)]),
    f("ptsc", &[processor(0x8000_0001, 0, Ecx, 27)]),
    f("perfctr_llc", &[processor(0x8000_0001, 0, Ecx, 28)]),
    f("syscall", &[processor(0x8000_0001, 0, Edx, 11)]),
    f("nx", &[processor(0x8000_0001, 0, Edx, 20)]),
    f("rdtscp", &[processor(0x8000_0001, 0, Edx, 27)]),
    f("lm", &[processor(0x8000_0001, 0, Edx, 29)]),
    // Processor Power Management and RAS Capabilities, leaf 0x8000_0007
    f("overflow_recov", &[processor(0x8000_0007, 0, Ebx, 0)]),
    f("succor", &[processor(0x8000_0007, 0, Ebx, 1)]),
    f("smca", &[processor(0x8000_0007, 0, Ebx, 3)]),
    f("hw_pstate", &[processor(0x8000_0007, 0, Edx, 7)]),
    f("constant_tsc", &[processor(0x8000_0007, 0, Edx, 8)]),
    f("cpb", &[processor(0x8000_0007, 0, Edx, 9)]),
    f("aperfmperf_ro", &[processor(0x8000_0007, 0, Edx, 10)]),
    f("proc_feedback", &[processor(0x8000_0007, 0, Edx, 11)]),
    f("acc_power", &[processor(0x8000_0007, 0, Edx, 12)]),
    f("rapl", &[processor(0x8000_0007, 0, Edx, 14)]), // AMD's; Intel tells its own by the model alone
    // Processor Capacity Parameters and Extended Feature Identification, leaf 0x8000_0008
    f("irperf", &[processor(0x8000_0008, 0, Ebx, 1)]),
    f("rdpru", &[processor(0x8000_0008, 0, Ebx, 4)]),
    f("amd_ibpb", &[processor(0x8000_0008, 0, Ebx, 12)]),
    f("amd_ibrs", &[processor(0x8000_0008, 0, Ebx, 14)]),
    f("amd_stibp", &[processor(0x8000_0008, 0, Ebx, 15)]),
    f("amd_ppin", &[processor(0x8000_0008, 0, Ebx, 23)]),
    f("amd_ssbd", &[processor(0x8000_0008, 0, Ebx, 24)]),
    f("virt_ssbd", &[processor(0x8000_0008, 0, Ebx, 25)]),
    f("cppc", &[processor(0x8000_0008, 0, Ebx, 27)]),
    f("amd_psfd", &[processor(0x8000_0008, 0, Ebx, 28)]),
    f("brs", &[processor(0x8000_0008, 0, Ebx, 31)]),
    // Names that Linux shows for Intel's bit and for AMD's
    f("ibrs", &[processor(7, 0, Edx, 26), processor(0x8000_0008, 0, Ebx, 14)]),
    f("ibpb", &[processor(7, 0, Edx, 26), processor(0x8000_0008, 0, Ebx, 12)]),
    f("stibp", &[processor(7, 0, Edx, 27), processor(0x8000_0008, 0, Ebx, 15)]),
    f("ssbd", &[processor(7, 0, Edx, 31), processor(0x8000_0008, 0, Ebx, 24)]),
    // SVM Features, leaf 0x8000_000a
    f("npt", &[processor(0x8000_000a, 0, Edx, 0)]),
    f("lbrv", &[processor(0x8000_000a, 0, Edx, 1)]),
    f("svm_lock", &[processor(0x8000_000a, 0, Edx, 2)]),
    f("tsc_scale", &[processor(0x8000_000a, 0, Edx, 4)]),
    f("avic", &[processor(0x8000_000a, 0, Edx, 13)]),
    f("x2avic", &[processor(0x8000_000a, 0, Edx, 18)]),
    f("v_spec_ctrl", &[processor(0x8000_000a, 0, Edx, 20)]),
    // Encrypted Memory Capabilities, leaf 0x8000_001f
    f("sme", &[processor(0x8000_001f, 0, Eax, 0)]),
    f("sev", &[processor(0x8000_001f, 0, Eax, 1)]),
    f("vm_page_flush", &[processor(0x8000_001f, 0, Eax, 2)]),
    f("sev_es", &[processor(0x8000_001f, 0, Eax, 3)]),
    f("sev_snp", &[processor(0x8000_001f, 0, Eax, 4)]),
    f("svsm", &[processor(0x8000_001f, 0, Eax, 28)]),
    // Extended Feature Identification 2, leaf 0x8000_0021
    f("lfence_rdtsc", &[processor(0x8000_0021, 0, Eax, 2)]),
    f("autoibrs", &[processor(0x8000_0021, 0, Eax, 8)]),
    f("no_smm_ctl_msr", &[processor(0x8000_0021, 0, Eax, 9)]),
    f("prefetch_ctl_msr", &[processor(0x8000_0021, 0, Eax, 13)]),
    f("sbpb", &[processor(0x8000_0021, 0, Eax, 27)]),
    // Extended Performance Monitoring and Debug, leaf 0x8000_0022
    f("perfmon_v2", &[processor(0x8000_0022, 0, Eax, 0)]),
    f("amd_lbr_v2", &[processor(0x8000_0022, 0, Eax, 1)]),
    f("amd_lbr_pmc_freeze", &[processor(0x8000_0022, 0, Eax, 2)]),
    // KVM: Documentation/virt/kvm/x86/cpuid.rst
    f("kvm", &[present(Owner::Kvm)]),
    f("kvm_clocksource", &[kvm(0)]),
    f("kvm_nop_io_delay", &[kvm(1)]),
    f("kvm_clocksource2", &[kvm(3)]),
    f("kvm_async_pf", &[kvm(4)]),
    f("kvm_steal_time", &[kvm(5)]),
    f("kvm_pv_eoi", &[kvm(6)]),
    f("kvm_pv_unhalt", &[kvm(7)]),
    f("kvm_pv_tlb_flush", &[kvm(9)]),
    f("kvm_async_pf_vmexit", &[kvm(10)]),
    f("kvm_pv_send_ipi", &[kvm(11)]),
    f("kvm_poll_control", &[kvm(12)]),
    f("kvm_pv_sched_yield", &[kvm(13)]),
    f("kvm_async_pf_int", &[kvm(14)]),
    f("kvm_msi_ext_dest_id", &[kvm(15)]),
    f("kvm_hc_map_gpa_range", &[kvm(16)]),
    f("kvm_migration_control", &[kvm(17)]),
    f("kvm_clocksource_stable_bit", &[kvm(24)]),
    // Hyper-V TLFS, Hypervisor Feature Identification
    f("hyperv", &[present(Owner::HyperV)]),
    f("hv_runtime", &[hyperv(Eax, 0)]),
    f("hv_time_ref_count", &[hyperv(Eax, 1)]),
    f("hv_synic", &[hyperv(Eax, 2)]),
    f("hv_stimer", &[hyperv(Eax, 3)]),
    f("hv_apic", &[hyperv(Eax, 4)]),
    f("hv_hypercall", &[hyperv(Eax, 5)]),
    f("hv_vpindex", &[hyperv(Eax, 6)]),
    f("hv_reset", &[hyperv(Eax, 7)]),
    f("hv_stats", &[hyperv(Eax, 8)]),
    f("hv_reference_tsc", &[hyperv(Eax, 9)]),
    f("hv_idle", &[hyperv(Eax, 10)]),
    f("hv_frequencies", &[hyperv(Eax, 11)]),
    f("hv_reenlightenment", &[hyperv(Eax, 13)]),
    f("hv_tsc_invariant", &[hyperv(Eax, 15)]),
    f("hv_crash", &[hyperv(Edx, 10)]),
    f("hv_syndbg", &[hyperv(Edx, 11)]),
    f("hv_stimer_direct", &[hyperv(Edx, 19)]),
    // Xen: public/arch-x86/cpuid.h
    f("xen", &[present(Owner::Xen)]),
];
