use msrgate_core::Op::{Read, Write};

use super::Speaker::*;
use super::*;

fn said(line: &str) -> Said {
    match Log::default().line(line) {
        Ok(Some(Line::Access(said))) => said,
        other => panic!("{line}: {other:?}"),
    }
}

type Row = (&'static str, Speaker, Cause, Option<Op>, u32, Option<u64>);

/// Made in the shapes that logs have.
#[rustfmt::skip]
const LINES: &[Row] = &[
    // KVM, from 3.x to 7.x.
    ("[   44.000001] kvm [100]: vcpu0, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0", Kvm, Cause::Ignored, Some(Read), 0x641, Some(0)),
    ("Sep 04 12:00:01 host1 kernel: kvm_amd: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010115) = 0x0", Kvm, Cause::Dropped, Some(Write), 0xc001_0115, Some(0)),
    ("Nov 21 10:00:01 host1 kernel: kvm: 100: cpu0 unhandled rdmsr: 0x35", Kvm, Cause::Unknown, Some(Read), 0x35, None),
    ("kvm: 4242: cpu1 ignored rdmsr: 0x1c9", Kvm, Cause::Ignored, Some(Read), 0x1c9, None),
    ("[ 9.1] kvm [7]: vcpu1, guest rIP: 0xffffffff8104f4ad ignored wrmsr: 0x611 data 0x1f", Kvm, Cause::Ignored, Some(Write), 0x611, Some(0x1f)),
    ("kvm [7]: vcpu1 unhandled wrmsr: 0x1a4 data 0xf", Kvm, Cause::Unknown, Some(Write), 0x1a4, Some(0xf)),
    ("kvm_intel: kvm [7]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010015) = 0x7", Kvm, Cause::Refused, Some(Write), 0xc001_0015, Some(7)),
    ("kvm: kvm [7]: vcpu0, guest rIP: 0x5 Unhandled WRMSR(0xc1) = 0xabcd", Kvm, Cause::Dropped, Some(Write), 0xc1, Some(0xabcd)),
    ("kvm [7]: vcpu0, guest rIP: 0x5 Unhandled RDMSR(0x40000021)", Kvm, Cause::Refused, Some(Read), 0x4000_0021, None),
    ("kern  :err   : [592420.654337] kvm [21715]: vcpu1 Hyper-V unhandled rdmsr: 0x40000020", Kvm, Cause::Refused, Some(Read), 0x4000_0020, None),
    ("kvm [9347]: vcpu0, guest rIP: 0xcc Hyper-V uhandled wrmsr: 0x40000004 data 0x94", Kvm, Cause::Refused, Some(Write), 0x4000_0004, Some(0x94)),
    ("kvm [93]: vcpu0, guest rIP: 0xcc Hyper-V unhandled wrmsr: 0x40000090 data 0x1", Kvm, Cause::Refused, Some(Write), 0x4000_0090, Some(1)),
    ("kvm: 93: cpu0 HYPER-V unimplemented wrmsr: 0x40000020 data 0x0", Kvm, Cause::Refused, Some(Write), 0x4000_0020, Some(0)),
    ("[ 280.802981] kvm [18411]: vcpu0, guest rIP: 0xfffff80011112222 disabled perfctr wrmsr: 0xc0010007 data 0xffff", Kvm, Cause::Dropped, Some(Write), 0xc001_0007, Some(0xffff)),
    ("kvm: 5: cpu0 unimplemented perfctr wrmsr: 0x186 data 0x130079", Kvm, Cause::Dropped, Some(Write), 0x186, Some(0x13_0079)),
    ("kvm: 5: cpu0 unimplemented wrmsr: 0xc0010114 data 0x10", Kvm, Cause::Dropped, Some(Write), 0xc001_0114, Some(0x10)),
    ("kvm [5]: vcpu2 unimplemented HWCR wrmsr: 0x1000000", Kvm, Cause::Refused, Some(Write), 0xc001_0015, Some(0x100_0000)),
    ("kvm [5]: vcpu2 unimplemented MMIO_CONF_BASE wrmsr: 0xe0000021", Kvm, Cause::Refused, Some(Write), 0xc001_0058, Some(0xe000_0021)),
    ("kvm [1]: vcpu0, guest rIP: 0xfff0 vmx_set_msr: BTF|LBR in IA32_DEBUGCTLMSR 0x1, nop", Kvm, Cause::Dropped, Some(Write), 0x1d9, Some(1)),
    ("kvm [1]: vcpu0, guest rIP: 0xfff0 kvm_set_msr_common: MSR_IA32_DEBUGCTLMSR 0x1, nop", Kvm, Cause::Dropped, Some(Write), 0x1d9, Some(1)),
    ("kvm: svm_set_msr: MSR_IA32_DEBUGCTL 0x1, nop", Kvm, Cause::Dropped, Some(Write), 0x1d9, Some(1)),
    ("kvm: kvm_set_msr_common: MSR_IA32_MCG_STATUS 0x0, nop", Kvm, Cause::Dropped, Some(Write), 0x17a, Some(0)),
    // Before the guest's first instruction it is the VMM that writes.
    ("[ 153.076519] kvm [2154]: vcpu0, guest rIP: 0xfff0 unhandled wrmsr: 0x38d data 0x0", Kvm, Cause::Vmm, Some(Write), 0x38d, Some(0)),
    ("kvm_amd: kvm [7]: vcpu3, guest rIP: 0xfff0 Unhandled WRMSR(0xc0010015) = 0x7", Kvm, Cause::Vmm, Some(Write), 0xc001_0015, Some(7)),
    ("kvm [5]: MSR_IA32_POWER_CTL is unhandled", Kvm, Cause::Unknown, None, 0x1fc, None),
    ("kvm [5]: MSR 0x1fc is unhandled", Kvm, Cause::Unknown, None, 0x1fc, None),
    ("nested_vmx_load_msr cannot write MSR (0, 0x38f, 0x7)", Kvm, Cause::Refused, Some(Write), 0x38f, Some(7)),
    ("kvm: nested_vmx_get_vmexit_msr_value cannot read MSR (0x10a)", Kvm, Cause::Refused, Some(Read), 0x10a, None),
    // illumos' KVM.
    ("kvm: [ID 391722 kern.info] unhandled wrmsr: 0x50cc47 data 90", Kvm, Cause::Unknown, Some(Write), 0x50_cc47, Some(0x90)),
    // Proxmox' journal.
    ("Oct 03 01:02:03 pve1 kernel: kvm [2101]: vcpu4, guest rIP: 0xfffff8027ae1bfd2 ignored rdmsr: 0x140 data 0x0", Kvm, Cause::Ignored, Some(Read), 0x140, Some(0)),
    ("Oct 03 01:02:03 pve1 QEMU[2101]: kvm: error: failed to set MSR 0x202 to 0xe000000000", Qemu, Cause::Vmm, Some(Write), 0x202, Some(0xe0_0000_0000)),
    // Linux as a guest.
    ("[    0.000000] unchecked MSR access error: RDMSR from 0x10a at rIP: 0xffffffff81000001 (native_read_msr+0x6/0x20)", Linux, Cause::Fault, Some(Read), 0x10a, None),
    ("[ 99.9] unchecked MSR access error: WRMSR to 0x122 (tried to write 0x0000000000000002) at rIP: 0xfffff80011112222 (native_write_msr+0x4/0x20)", Linux, Cause::Fault, Some(Write), 0x122, Some(2)),
    ("[    0.076000] Failed to access perfctr msr (MSR c1 is 0)", Linux, Cause::Dropped, Some(Write), 0xc1, None),
    ("Feb 25 22:07:36 localhost kernel: Failed to access perfctr msr (MSR c0010007 is ffffffffffffffff)", Linux, Cause::Dropped, Some(Write), 0xc001_0007, None),
    ("intel_rapl_msr: failed to read msr 0x611 on cpu 0", Linux, Cause::Fault, Some(Read), 0x611, None),
    ("[ 7.5] msr: Write to unrecognized MSR 0x150 by tool (pid: 3717).", MsrDriver, Cause::Program, Some(Write), 0x150, None),
    ("rdmsr: CPU 0 cannot read MSR 0x000001a0", MsrDriver, Cause::Fault, Some(Read), 0x1a0, None),
    ("wrmsr: CPU 3 cannot set MSR 0x000001a4 to 0x000000000000000f", MsrDriver, Cause::Fault, Some(Write), 0x1a4, Some(0xf)),
    ("[2026-01-22 10:00:00.000]  msr      cannot set MSR 0xc0011020 to 0x0000000000000000", MsrDriver, Cause::Fault, Some(Write), 0xc001_1020, Some(0)),
    ("ERROR: WRMSR failed for reg[0x38f] <- value[0x7] on lcore 2", MsrDriver, Cause::Fault, Some(Write), 0x38f, Some(7)),
    ("turbostat: cpu0: msr offset 0x3f8 read failed: Input/output error", MsrDriver, Cause::Fault, Some(Read), 0x3f8, None),
    // VMMs.
    ("qemu-system-x86_64: error: failed to set MSR 0x48b to 0x1582e00000000", Qemu, Cause::Vmm, Some(Write), 0x48b, Some(0x1_582e_0000_0000)),
    ("2026-05-17T07:32:21.253962Z qemu-system-x86_64: error: failed to set MSR 0x4b564d02 to 0xf3", Qemu, Cause::Vmm, Some(Write), 0x4b56_4d02, Some(0xf3)),
    ("qemu-kvm: error: failed to get MSR 0x174", Qemu, Cause::Vmm, Some(Read), 0x174, None),
    // Of a VMX control the bits are those of the high half.
    ("2026-06-20T09:27:27.161311Z qemu-kvm: warning: host doesn't support requested feature: MSR(48DH).vmx-posted-intr [bit 7]", Qemu, Cause::Lacking, Some(Write), 0x48d, Some(1 << 39)),
    ("qemu-system-x86_64: warning: TCG doesn't support requested feature: MSR(490H).vmx-entry-load-pkrs [bit 22]", Qemu, Cause::Lacking, Some(Write), 0x490, Some(1 << 54)),
    ("kvm: warning: host doesn't support requested feature: MSR(10AH).taa-no [bit 8]", Qemu, Cause::Lacking, Some(Write), 0x10a, Some(1 << 8)),
    ("kvm: warning: host doesn't support requested feature: MSR(CFH).split-lock-detect [bit 5]", Qemu, Cause::Lacking, Some(Write), 0xcf, Some(1 << 5)),
    ("cloud-hypervisor: 835.112786ms: <vmm> WARN:hypervisor/src/kvm/mod.rs:2074 -- Detected faulty MSR 0x4b564d02 while setting MSRs", CloudHypervisor, Cause::Vmm, Some(Write), 0x4b56_4d02, None),
    ("cloud-hypervisor: <vmm> WARN -- Detected faulty MSR 0x480 while getting MSRs", CloudHypervisor, Cause::Vmm, Some(Read), 0x480, None),
    ("cloud-hypervisor: 1.5s: <vcpu0> ERROR:hypervisor/src/kvm/mod.rs:3403 -- Unable to set feature MSR 0x48b, MSR value=378429568450560", CloudHypervisor, Cause::Vmm, Some(Write), 0x48b, Some(0x1_582e_0000_0000)),
    ("2026-01-01T00:00:00.1 [vm:fc_vcpu 0] Failed to get KVM vcpu msr: 0x10a", Firecracker, Cause::Vmm, Some(Read), 0x10a, None),
    // Xen.
    ("(XEN) d1v0 RDMSR 0x00000150 unimplemented", Xen, Cause::Unknown, Some(Read), 0x150, None),
    ("(XEN) [2026-01-01 00:00:00] d3v2 WRMSR 0x00000150 val 0x000000000000ffff unimplemented", Xen, Cause::Unknown, Some(Write), 0x150, Some(0xffff)),
    ("(XEN) traps.c:2755:d0v0 Domain attempted WRMSR c0010112 from 0x0000000000000000 to 0x0000000000000001", Xen, Cause::Dropped, Some(Write), 0xc001_0112, Some(1)),
    ("(XEN) traps.c:2512:d0 Domain attempted WRMSR 00000000000001a0 from 0x0000000000850089 to 0x0000000000850088.", Xen, Cause::Dropped, Some(Write), 0x1a0, Some(0x85_0088)),
    ("(XEN) emul-priv-op.c:1032:d0v1 faking RDMSR 0x00000620", Xen, Cause::Ignored, Some(Read), 0x620, None),
    ("(XEN) d2v0 Read from unimplemented MSR 0x40000118", Xen, Cause::Unknown, Some(Read), 0x4000_0118, None),
    ("(XEN) d2v0 Write 0000000000000001 to unimplemented MSR 0x40000106", Xen, Cause::Unknown, Some(Write), 0x4000_0106, Some(1)),
    ("(XEN) d2v0 viridian_synic_wrmsr: unimplemented MSR 0x40000090 (0000000000010000)", Xen, Cause::Unknown, Some(Write), 0x4000_0090, Some(0x1_0000)),
    ("(XEN) d2v0 viridian_time_rdmsr: unimplemented MSR 0x400000b0", Xen, Cause::Unknown, Some(Read), 0x4000_00b0, None),
    ("(XEN) HVM d2v0 attempted load of unhandled MSR 0x48", Xen, Cause::Vmm, Some(Write), 0x48, None),
    // VirtualBox.
    ("00:00:01.000000 CPUM: Unknown MSR 0x641 read", VirtualBox, Cause::Unknown, Some(Read), 0x641, None),
    ("00:00:01.000000 CPUM: Unknown MSR 0x641 -> #GP(0)", VirtualBox, Cause::Unknown, Some(Read), 0x641, None),
    ("00:00:01.000000 CPUM: Unknown MSR 0x1a4, 0xf -> #GP(0)", VirtualBox, Cause::Unknown, Some(Write), 0x1a4, Some(0xf)),
    ("00:00:09.123456 MsrExit/0: 0010:fffff8011a2b3c4d/LM: RDMSR c0011029 -> 00000000 / VERR_CPUM_RAISE_GP_0", VirtualBox, Cause::Fault, Some(Read), 0xc001_1029, None),
    ("00:00:03.000000 GIM: HyperV: Unknown/invalid RdMsr (0x40000118) -> #GP(0)", VirtualBox, Cause::Unknown, Some(Read), 0x4000_0118, None),
    ("00:00:03.000000 GIMHvWriteMsr: Unknown/invalid WrMsr 0x400000b0 -> #GP(0)", VirtualBox, Cause::Unknown, Some(Write), 0x4000_00b0, None),
    // bhyve.
    ("Unhandled rdmsr 0x641", Bhyve, Cause::Unknown, Some(Read), 0x641, None),
    ("Unhandled wrmsr 0x641 0x5", Bhyve, Cause::Unknown, Some(Write), 0x641, Some(5)),
    ("rdmsr to register 0x4e on vcpu 0", Bhyve, Cause::Unknown, Some(Read), 0x4e, None),
    ("wrmsr to register 0x140(0) on vcpu 2", Bhyve, Cause::Unknown, Some(Write), 0x140, Some(0)),
    ("Unknown WRMSR code 391, val 2000000f, cpu 0", Bhyve, Cause::Unknown, Some(Write), 0x391, Some(0x2000_000f)),
    // VMware.
    ("2026-04-07T19:32:00.261+08:00| vcpu-0| I125: SetMSR: unknown MSR[0x1d9]:=0x0 (sinking): rip=0xafd5990 count=91", Vmware, Cause::Ignored, Some(Write), 0x1d9, Some(0)),
    ("Jun 28 23:41:20.949: vcpu-0| WRMSR: unknown MSR[0x404]:=0 (sinking): rip=0x15d5 count=1", Vmware, Cause::Ignored, Some(Write), 0x404, Some(0)),
    // What others make of a line: libvirt's error within JSON.
    (r#"{"level":"info","reason":"Message='... qemu-kvm: error: failed to set MSR 0x48e to 0xfff9fffe04006172\\nqemu-kvm: kvm.c:2713: ...'"}"#, Qemu, Cause::Vmm, Some(Write), 0x48e, Some(0xfff9_fffe_0400_6172)),
    ("vm exit rdmsr 0xe8, cpu 0", Bhyve, Cause::Unknown, Some(Read), 0xe8, None),
    // The first KVMs, and those of CentOS 6.
    ("kvm: unhandled wrmsr: c0000101", Kvm, Cause::Unknown, Some(Write), 0xc000_0101, None),
    ("kvm: 23090: cpu0 unhandled wrmsr 0x391 data 2000000f", Kvm, Cause::Unknown, Some(Write), 0x391, Some(0x2000_000f)),
    ("(XEN) d2v0 write to unimplemented MSR 0x40000106", Xen, Cause::Unknown, Some(Write), 0x4000_0106, None),
    ("(XEN) write to unimplemented MSR 0x40000106", Xen, Cause::Unknown, Some(Write), 0x4000_0106, None),
    ("Jun 28 23:41:21.806: vcpu-0| RDMSR: unknown MSR[0x2a] (read as zero): rip=0x57cb count=1", Vmware, Cause::Ignored, Some(Read), 0x2a, None),
    // What Windows tells of its crash.
    ("2026-01-02T03:04:05.678Z vcpu-0 - WinBSOD: Synthetic MSR[0x40000100] 0x80", Vmware, Cause::Crash, Some(Write), 0x4000_0100, Some(0x80)),
    ("vcpu-0 - WinBSOD: Synthetic MSR[0x40000101] 0xffffffffc0000096", Vmware, Cause::Privileged, Some(Write), 0x4000_0101, Some(0xffff_ffff_c000_0096)),
    ("HV crash parameters: (0x7e 0xffffffffc0000096 0xfffff80311112222 0x0 0x0)", Qemu, Cause::Privileged, Some(Write), 0x4000_0100, Some(0x7e)),
    ("HV crash parameters: (0 0 0 0 0)", Qemu, Cause::Crash, Some(Write), 0x4000_0100, Some(0)),
    ("panic hyper-v: arg1='0x7e', arg2='0xffffffffc0000096', arg3='0xfffff80311112222', arg4='0xf', arg5='0xe'", Qemu, Cause::Privileged, Some(Write), 0x4000_0100, Some(0x7e)),
    ("kvm [4]: vcpu0 hv crash (0x1e 0xffffffffc0000005 0xfffff80311112222 0x0 0x0)", Kvm, Cause::Crash, Some(Write), 0x4000_0100, Some(0x1e)),
    ("(XEN) d1v0 VIRIDIAN CRASH: 7e ffffffffc0000096 fffff80311112222 0 0", Xen, Cause::Privileged, Some(Write), 0x4000_0100, Some(0x7e)),
    ("00:00:09.1 GIM: HyperV: Guest indicates a fatal condition! P0=0x1e P1=0xffffffffc0000096 P2=0x5 P3=0x0", VirtualBox, Cause::Privileged, Some(Write), 0x4000_0100, Some(0x1e)),
    // Jailhouse, libvmm, L4Re, NOVA's VMM, propolis, and other hypervisors, VMMs and tools whose forms nobody has listed.
    ("FATAL: Unhandled MSR read: c0002001", Other, Cause::Unknown, Some(Read), 0xc000_2001, None),
    ("FATAL: Unhandled MSR write: 1a4", Other, Cause::Unknown, Some(Write), 0x1a4, None),
    ("Unhandled msr read to register at address 0x1A0", Other, Cause::Unknown, Some(Read), 0x1a0, None),
    ("Unhandled MSR read: 1073741858", Other, Cause::Unknown, Some(Read), 0x4000_0022, None),
    ("VMM|ERROR: unknown rdmsr 0x3a", Other, Cause::Unknown, Some(Read), 0x3a, None),
    ("WARNING: Unknown rdmsr: 0000008b at 0xc0112233", Other, Cause::Unknown, Some(Read), 0x8b, None),
    ("unknown wrmsr 000001A0 0000000000850089", Other, Cause::Unknown, Some(Write), 0x1a0, Some(0x85_0089)),
    ("VM1: Unsupported RDMSR: 0x1a2", Other, Cause::Unknown, Some(Read), 0x1a2, None),
    ("unsupported wrmsr 1d9 <-(2:1) at c0101010", Other, Cause::Unknown, Some(Write), 0x1d9, Some(0x2_0000_0001)),
    ("[  1]: Writing unsupported MSR 0x140", Other, Cause::Unknown, Some(Write), 0x140, None),
    ("WRMSR: Unsupported MSR 0x00000140 = 0x0000000000000001", Other, Cause::Unknown, Some(Write), 0x140, Some(1)),
    ("RDMSR: unhandled MSR 0x1b8, returning 0", Other, Cause::Ignored, Some(Read), 0x1b8, None),
    ("RDMSR: Unknown MSR 0x00000150 outside handled ranges, injecting #GP (RIP=0xFFFFF80311112222)", Other, Cause::Unknown, Some(Read), 0x150, None),
    ("hvf: unknown msr 0x1a2", Other, Cause::Unknown, None, 0x1a2, None),
    ("unexpected rdmsr exit: 35", Other, Cause::Unknown, Some(Read), 0x35, None),
    ("Unhandled rdmsr 00000034, rip: 0", Other, Cause::Unknown, Some(Read), 0x34, None),
    ("Unhandled RDMSR(c0010015)", Other, Cause::Unknown, Some(Read), 0xc001_0015, None),
    ("KVM_SET_MSRS failed, r: 3 (failed on MSR 48b)", Other, Cause::Fault, Some(Write), 0x48b, None),
    ("rdmsr c0010015: unhandled", Other, Cause::Unknown, Some(Read), 0xc001_0015, None),
    ("rdmsr: 1a2 should not come here!", Other, Cause::Fault, Some(Read), 0x1a2, None),
];

#[test]
fn each_line_is_read_for_its_register_direction_value_and_cause() {
    for (line, by, cause, op, msr, value) in LINES {
        let said = said(line);
        let read = (said.by, said.cause, said.op, said.msr.0, said.value);
        assert_eq!(read, (*by, *cause, *op, *msr, *value), "{line}");
    }
}

#[test]
fn what_stands_around_a_line_does_not_matter() {
    for (line, ..) in LINES {
        let bare = said(line);
        for (before, behind) in [
            ("> > ", ""),
            ("- `", "`"),
            ("    ", "\r"),
            ("| ", " |"),
            ("<6>", ""),
            ("2026-11-22T00:00:01,123456+01:00 host kernel: ", ", and then it hung"),
            ("é→ ", " é"),
            ("\"", "\" 0x5"),
        ] {
            let around = said(&format!("{before}{line}{behind}"));
            let key = |said: &Said| (said.by, said.cause, said.op, said.msr, said.value, said.vcpu);
            // A value that a line need not have is told by what follows.
            let open = around.value != bare.value && bare.value.is_none() && behind.contains("0x5");
            assert!(key(&around) == key(&bare) || open, "{before}{line}{behind}: {around:?}");
        }
        let json = serde_json::json!({ "PRIORITY": "6", "MESSAGE": line, "__MONOTONIC_TIMESTAMP": "44000001" });
        let around = said(&json.to_string());
        assert_eq!(
            (around.msr, around.op, around.cause, around.t.0),
            (bare.msr, bare.op, bare.cause, 44_000_001_000)
        );
    }
}

#[test]
fn who_made_an_access_and_where_is_read() {
    let at = Some(0xffff_f800_1111_2222);
    for (line, vcpu, rip) in [
        (
            "kvm [100]: vcpu1, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0",
            1,
            at,
        ),
        ("kvm: 6176: cpu2 unhandled rdmsr: 0xc0010001", 2, None),
        (
            "unchecked MSR access error: RDMSR from 0x10a at rIP: 0xfffff80011112222 (native_read_msr+0x6/0x20)",
            0,
            at,
        ),
        ("(XEN) d1v3 RDMSR 0x00000150 unimplemented", 3, None),
        ("wrmsr to register 0x140(0) on vcpu 2", 2, None),
    ] {
        let said = said(line);
        assert_eq!((said.vcpu, said.rip), (vcpu, rip), "{line}");
    }
}

#[test]
fn an_access_of_a_trace_has_what_the_guest_got() {
    let did = |line: &str| said(line).event().map(|event| (event.op, event.did));
    for (line, got) in [
        ("ignored rdmsr: 0x641 data 0x0", Some((Read, Disposition::Zero))),
        ("ignored wrmsr: 0x611 data 0x1f", Some((Write, Disposition::Ignore))),
        (
            "kvm: Unhandled WRMSR(0xc0010115) = 0x0",
            Some((Write, Disposition::Ignore)),
        ),
        (
            "kvm: Unhandled WRMSR(0xc0010015) = 0x7",
            Some((Write, Disposition::Fault)),
        ),
        ("unhandled rdmsr: 0x35", Some((Read, Disposition::Fault))),
        (
            "unchecked MSR access error: RDMSR from 0x10a at rIP: 0x5",
            Some((Read, Disposition::Fault)),
        ),
        (
            "(XEN) d1v0 RDMSR 0x00000150 unimplemented",
            Some((Read, Disposition::Fault)),
        ),
        ("kvm: error: failed to set MSR 0x48b to 0x5", None),
        (
            "host doesn't support requested feature: MSR(48BH).vmx-ept [bit 1]",
            None,
        ),
        ("msr: Write to unrecognized MSR 0x150 by x (pid: 1).", None),
        ("kvm: MSR 0x1fc is unhandled", None),
    ] {
        assert_eq!(did(line), got, "{line}");
    }
}

#[test]
fn processes_are_vms_and_what_was_left_out_is_a_gap() {
    let mut log = Log::default();
    for (process, vm) in [(100, 0), (200, 1), (100, 0)] {
        let line = format!("[    1.000000] kvm [{process}]: vcpu0 ignored rdmsr: 0x35 data 0x0");
        let record = log.line(&line);
        assert!(
            matches!(record, Ok(Some(Line::Access(said))) if said.vm == vm),
            "{record:?}"
        );
    }
    let gap = |line: &str| matches!(Log::default().line(line), Ok(Some(Line::Missing(gap))) if gap.events == 27);
    assert!(gap("[  280.802976] kvm_msr_ignored_check: 27 callbacks suppressed"));
    assert!(gap("kvm_pr_unimpl_rdmsr: 27 callbacks suppressed"));
    assert!(!gap("[  280.802976] net_ratelimit: 27 callbacks suppressed"));
}

#[test]
fn a_line_that_a_mail_folded_is_read_with_the_one_behind_it() {
    for (first, second, msr, value) in [
        (
            "> kvm [9347]: vcpu0, guest rIP: 0xcc Hyper-V uhandled wrmsr: 0x40000004 data",
            "> 0x94",
            0x4000_0004,
            0x94,
        ),
        (
            "kvm [5]: vcpu0, guest rIP: 0xfff0 disabled perfctr wrmsr:",
            "0xc0010004 data 0x0",
            0xc001_0004,
            0,
        ),
        (
            "kvm [5]: vcpu0, guest rIP: 0xfff0 ignored",
            "> wrmsr: 0x611 data 0x1f",
            0x611,
            0x1f,
        ),
        (
            "[ 1.0] unchecked MSR access error: WRMSR to 0x122 (tried to write",
            "0x2) at rIP: 0x5",
            0x122,
            2,
        ),
    ] {
        let mut log = Log::default();
        assert_eq!(log.line(first), Ok(None), "{first}");
        assert_eq!(log.line("> "), Ok(None), "a blank line is none");
        let line = log.line(second);
        assert!(
            matches!(line, Ok(Some(Line::Access(said))) if (said.msr.0, said.value) == (msr, Some(value))),
            "{first}\n{second}: {line:?}"
        );
        assert_eq!(log.finish(), Ok(()));
    }
}

type Told = (Option<Op>, u32, Option<u64>);

/// What systems print as they stop at #GP: the lines, and what the dump says of an MSR.
#[rustfmt::skip]
const DUMPS: &[(&[&str], Option<Told>)] = &[
    // Linux of today and of 3.2, and one that stopped at `mov %rdi,%cr3`.
    (&[
        "[    1.1] Oops: general protection fault, maybe for address 0x1: 0000 [#1] PREEMPT SMP PTI",
        "[    1.1] RIP: 0010:switch_mm_irqs_off+0x473/0x500",
        "[    1.1] Code: b9 49 00 00 00 48 89 c2 48 c1 ea 20 <0f> 30 e9 13 fc ff ff",
        "[    1.1] RAX: 0000000000000001 RBX: ffff8c1002ca0000 RCX: 0000000000000049",
        "[    1.1] RDX: 0000000000000000 RSI: 0000000000000001 RDI: ffffffff8b507040",
    ], Some((Some(Write), 0x49, Some(1)))),
    (&[
        "general protection fault: 0000 [#1] SMP",
        "RIP: 0010:[<ffffffff8104f4ad>]  [<ffffffff8104f4ad>] native_read_msr_safe+0xa/0x1d",
        "RAX: 0000000000000000 RBX: 00000000ffffffff RCX: 000000000000038f",
        "RDX: 0000000000000000 RSI: 0000000000000001 RDI: 000000000000038f",
    ], Some((Some(Read), 0x38f, None))),
    (&[
        "general protection fault: 0000 [#1] SMP",
        "RIP: 0010:load_new_mm_cr3+0x7d/0x170",
        "RAX: 0000000000000000 RBX: 00000000ffffffff RCX: 000000000000038f",
        "RDX: 0000000000000000 RSI: 0000000000000001 RDI: 000000000000038f",
        "Call Trace: ? native_read_msr+0x5/0x10",
        "Code: 48 09 d7 <0f> 22 df 0f 1f 40 00",
        "RIP: native_read_msr+0x7d/0x170 RSP: ffffbe26c1707e70",
    ], None),
    // macOS and firmware print no instruction.
    (&[
        "panic(cpu 0 caller 0xffffff8010f8776f): Kernel trap at 0xffffff7f947fc102, type 13=general protection, registers:",
        "RAX: 0x0000000020100800, RBX: 0x0000000000000002, RCX: 0x00000000000000e2, RDX: 0x0000000000000000",
    ], Some((None, 0xe2, None))),
    (&[
        "panic(cpu 0 caller 0xffffff8010f8776f): Kernel trap at 0xffffff7f947fc102, type 13=general protection, registers:",
        "RAX: 0x0000000020100800, RBX: 0x0000000000000002, RCX: 0xffffff8010f8776f, RDX: 0x0000000000000000",
    ], None),
    (&[
        "!!!! X64 Exception Type - 0D(#GP - General Protection)  CPU Apic ID - 00000000 !!!!",
        "RAX  - 0000000000000000, RCX - 0000000000000487, RDX - 0000000000000000",
    ], Some((None, 0x487, None))),
    // OpenBSD, FreeBSD and Xen.
    (&[
        "kernel: protection fault trap, code=0",
        "Stopped at      identifycpu+0x1b1:      rdmsr",
        "rax               0x1",
        "rcx               0xc0011029",
        "rdx               0",
    ], Some((Some(Read), 0xc001_1029, None))),
    (&[
        "Fatal trap 9: general protection fault while in kernel mode",
        "rdi: ffffffff81ca2b30 rsi: 0000000000000000 rdx: 0000000000000005",
        "rcx: 0000000000000140  r8: 0000000000000002  r9: 0000000000000000",
        "rax: 0000000000000001 rbx: 0000000000000001 rbp: ffffffff82a01a20",
        "Stopped at      initializecpu+0x1a2: wrmsr",
    ], Some((Some(Write), 0x140, Some(0x5_0000_0001)))),
    (&[
        "(XEN) ----[ Xen-4.17  x86_64  debug=n  Not tainted ]----",
        "(XEN)  c0 01 00 00 00 b9 64 00 01 c0 <0f> 32 48 c1 e2 20",
        "(XEN) rax: 0000000000000000   rbx: ffff830837bd0000   rcx: 00000000c0010064",
        "(XEN) rdx: 0000000000000000   rsi: 000000000000000a   rdi: ffff82d0405d3e00",
        "(XEN) GENERAL PROTECTION FAULT",
    ], Some((Some(Read), 0xc001_0064, None))),
];

#[test]
fn a_dump_of_registers_tells_of_the_msr_at_which_a_system_stopped() {
    for (lines, told) in DUMPS {
        let mut log = Log::default();
        let mut read = Vec::new();
        for line in *lines {
            if let Some(Line::Access(said)) = log.line(line).expect(line) {
                assert_eq!((said.by, said.cause), (Dump, Cause::Fault), "{line}");
                read.push((said.op, said.msr.0, said.value));
            }
        }
        assert_eq!(read, told.iter().copied().collect::<Vec<_>>(), "{lines:?}");
    }
}

#[test]
fn other_lines_are_passed_over_and_broken_ones_told() {
    for line in [
        "[    0.000000] Linux version 6.1.0",
        "-- Boot 0123 --",
        "[    0.1] Performance Events: PMU not available due to virtualization, using software events only.",
        "msr: module loaded, unrecognized option",
        "Failed to read MSR_PLATFORM_INFO",
        // An access without trouble, trouble without an access, and numbers that are no register's.
        "vmx_handle_rdmsr: rdmsr exit, msr=0x1b, data returned to guest=0x0:0xfee00900",
        "RDMSR: MSR[0x11e] (read as 708101): rip=0x4651",
        "msr_rmw(): CPU0 read msr failed",
        "rdmsr failed on 16 CPUs; 17 MSRs 1 MiB apart: refused",
        "unknown option 0x10 of the module msr",
        "CPU 1/KVM 18 [015] 48.258056: kvm:kvm_msr: msr_read 1a6 = 0x0 (#GP)",
        "rdmsr tool, wrmsr tool",
        // A CPUID bit is no MSR's, a bit is one of 64, and without leave nothing was read.
        "qemu: warning: host doesn't support requested feature: CPUID.01H:ECX.fma [bit 12]",
        "qemu: warning: host doesn't support requested feature: MSR(48DH).x [bit 64]",
        "turbostat: cpu0: msr offset 0x611 read failed: Operation not permitted",
        "",
    ] {
        let mut log = Log::default();
        assert_eq!(log.line(line), Ok(None), "{line}");
        assert_eq!(log.finish(), Ok(()), "{line}");
    }
    for (line, what) in [
        ("kvm [1]: ignored rdmsr: many", "no index"),
        ("kvm [1]: ignored rdmsr: 0x100000000", "32 bits"),
        ("kvm [1]: ignored wrmsr: 0x611 da", "or what was written"),
        ("kvm [1]: ignored rdmsr:", "before the register"),
    ] {
        let mut log = Log::default();
        let error = log.line(line).and_then(|_| log.finish()).expect_err(line);
        assert!(error.contains(what), "{line}: {error}");
    }
    // The line behind is not lost.
    let mut log = Log::default();
    assert_eq!(log.line("kvm [1]: ignored wrmsr: 0x611 da"), Ok(None));
    assert!(log.line("kvm [1]: ignored rdmsr: 0x35").is_err());
    assert!(matches!(
        log.line("kvm [1]: ignored rdmsr: 0x35"),
        Ok(Some(Line::Access(_)))
    ));
}
