//! `msrgate why`, and bits wherever values are shown.

use crate::command::{Folder, count, list, text};

const IGNORED: &str = "[   44.000001] kvm [100]: vcpu0, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0";

/// What users have in hand, and what of it is to be told: the register, the direction and the cause.
#[rustfmt::skip]
const IN_HAND: &[(&str, &str, &str, &str)] = &[
    (IGNORED, "0x641", "rdmsr", "ignored"),
    ("Sep 04 12:00:01 host1 kernel: kvm_amd: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010115) = 0x0", "0xc0010115", "wrmsr", "dropped"),
    ("Nov 21 10:00:01 host1 kernel: kvm: 100: cpu0 unhandled rdmsr: 0x35", "0x35", "rdmsr", "unknown"),
    ("[    0.000000] unchecked MSR access error: RDMSR from 0x10a at rIP: 0xffffffff81000001 (native_read_msr+0x6/0x20)", "0x10a", "rdmsr", "fault"),
    ("qemu-system-x86_64: error: failed to set MSR 0x48b to 0x1582e00000000", "0x48b", "wrmsr", "vmm"),
    ("(XEN) d1v0 RDMSR 0x00000150 unimplemented", "0x150", "rdmsr", "unknown"),
    ("00:00:01.000000 CPUM: Unknown MSR 0x641 read   (VirtualBox's log, in several spellings)", "0x641", "rdmsr", "unknown"),
    ("Unhandled rdmsr 0x641 (bhyve)", "0x641", "rdmsr", "unknown"),
    ("FATAL: Unhandled MSR write: 1a4", "0x1a4", "wrmsr", "unknown"),
    ("HV crash parameters: (0x7e 0xffffffffc0000096 0xfffff80311112222 0x0 0x0)", "0x40000100", "wrmsr", "privileged"),
    (DUMP, "0x49", "wrmsr", "fault"),
];

const DUMP: &str = "[    1.1] Oops: general protection fault, maybe for address 0x1: 0000 [#1] PREEMPT SMP PTI
[    1.1] Code: b9 49 00 00 00 48 89 c2 48 c1 ea 20 <0f> 30 e9 13 fc ff ff
[    1.1] RAX: 0000000000000001 RBX: ffff8c1002ca0000 RCX: 0000000000000049
[    1.1] RDX: 0000000000000000 RSI: 0000000000000001 RDI: ffffffff8b507040";

#[test]
fn a_line_gives_register_direction_and_cause_from_an_argument_a_file_or_a_pipe() {
    let folder = Folder::new();
    for (number, (line, msr, op, cause)) in IN_HAND.iter().enumerate() {
        let file = format!("log{number}");
        folder.write(&file, format!("something else\n\n> {line}\n"));
        for ran in [
            folder.run(&["why", "--json", line]),
            folder.run(&["why", "--json", &file]),
            folder.run_with(&["why", "--json"], line),
            folder.run_with(&["why", "--json", "-"], line),
        ] {
            let json = ran.code(0).json();
            let register = &list(&json, "registers")[0];
            let access = &list(register, "accesses")[0];
            let told = [text(register, "msr"), text(access, "op"), text(access, "cause")];
            assert_eq!(told, [*msr, *op, *cause], "{line}");
        }
    }
}

#[test]
fn a_whole_log_is_counted_by_register_and_what_is_left_out_is_said() {
    let folder = Folder::new();
    let mut log = String::from("[    0.000000] Linux version 6.1.0\n");
    for value in 0..20 {
        log += &format!("[    1.000001] kvm [7]: vcpu1, guest rIP: 0x5 ignored wrmsr: 0x1a4 data {value:#x}\n");
    }
    log += &format!("{IGNORED}\n> {IGNORED}\n[    2.000000] kvm_msr_ignored_check: 27 callbacks suppressed\n");
    log += "kvm [7]: ignored wrmsr: 0x1a4 da\n[    3.000000] usb 1-1: new device\n";
    folder.write("dmesg", log);
    let json = folder.run(&["why", "--json", "dmesg"]).code(0).json();
    let counts = ["lines", "about_msrs", "broken", "suppressed", "unlisted"].map(|key| count(&json, key));
    assert_eq!(counts, [26, 23, 1, 27, 0]);
    assert_eq!(json["ignore_msrs"], true);
    let registers = list(&json, "registers");
    assert_eq!(registers.len(), 2);
    let access = &list(&registers[0], "accesses")[0];
    assert_eq!((count(access, "count"), count(access, "other_values")), (20, 12));
    let ran = folder.run(&["why", "dmesg"]).code(0);
    let first = ran.out.lines().next().unwrap_or_default();
    assert_eq!(first, "2 MSRs in 23 lines about MSRs: a rule helps with each");
    ran.shows(&[
        "note: the kernel left out 27 messages",
        "note: the host has `kvm.ignore_msrs`",
        "0x1a4 MSR_MISC_FEATURE_CONTROL",
        "wrmsr, 20 times, by KVM",
        "0x3, 1 time: L2_PREFETCH_DISABLE L2_ADJACENT_DISABLE",
    ]);
}

#[test]
fn unknown_and_refused_are_told_apart() {
    let folder = Folder::new();
    let why = |line: &str| {
        let json = folder.run(&["why", "--json", line]).code(0).json();
        list(&list(&json, "registers")[0], "accesses")[0].clone()
    };
    let refused =
        why("unchecked MSR access error: RDMSR from 0x280 at rIP: 0xffffffff81000001 (native_read_msr+0x6/0x20)");
    assert_eq!(refused["ignorable"], false);
    assert!(
        text(&refused, "why").contains("5.19") && text(&refused, "why").contains("MCG_CMCI_P"),
        "{refused:#}"
    );
    let unknown = why("kvm [1]: vcpu0 unhandled rdmsr: 0x19c");
    assert_eq!(unknown["ignorable"], true);
    // What the line says goes before what the database knows of other cases.
    let unknown = why("kvm [1]: vcpu0 unhandled rdmsr: 0x40000010");
    assert_eq!(text(&unknown, "why"), "KVM does not know the register: #GP");
    // KVM reads 0 to a guest, and knows no writes.
    let write = why("unchecked MSR access error: WRMSR to 0xc0010010 (tried to write 0x7) at rIP: 0x5");
    assert!(
        text(&write, "why").ends_with("is not known to take writes"),
        "{write:#}"
    );
    let read = why("unchecked MSR access error: RDMSR from 0xc0010010 at rIP: 0x5");
    assert!(text(&read, "why").contains("KVM has the register"), "{read:#}");
    // The line does not say why, and the database does not either.
    let fault = why("unchecked MSR access error: RDMSR from 0x19c at rIP: 0x5");
    assert_eq!(fault["ignorable"], serde_json::Value::Null);
}

/// A register that QEMU could not set is the CPU model's, and no policy's.
#[test]
fn what_qemu_could_not_set_has_the_switch_that_leaves_it_out() {
    let folder = Folder::new();
    #[rustfmt::skip]
    let lines = [
        // A named model of Intel's, on a host of AMD's.
        ("failed to set MSR 0x10a to 0x2b", "arch-capabilities", "`-cpu MODEL,-arch-capabilities` gives"),
        // In a VM whose hypervisor has no PMU for it.
        ("failed to set MSR 0x38d to 0x0", "pmu", "`-cpu MODEL,-pmu` gives"),
        ("failed to set MSR 0xc1 to 0x0", "pmu", "`-cpu MODEL,-pmu` gives"),
        ("failed to set MSR 0x4b564d02 to 0x0", "kvm-asyncpf", "`-cpu MODEL,-kvm-asyncpf` gives"),
        ("failed to set MSR 0x480 to 0x0", "vmx", "nested=1"),
        ("failed to set MSR 0x48d to 0x7f00000016", "vmx", "printf 'MSR_ADDR,VALUE\\n0x48d,0x7f00000016\\n' | msrgate migrate - here.json"),
        ("failed to set MSR 0xe1 to 0x0", "", "wherever KVM lists it"),
        ("failed to set MSR 0x202 to 0xe000000000", "", "phys-bits=N"),
        ("failed to set MSR 0x174 to 0x10", "", "a host that has it"),
    ];
    for (said, property, help) in lines {
        let line = format!("qemu-system-x86_64: error: {said}");
        let json = folder.run(&["why", "--json", &line]).code(0).json();
        let register = &list(&json, "registers")[0];
        let told: Vec<&str> = list(register, "qemu").iter().filter_map(|name| name.as_str()).collect();
        assert_eq!(told.join(" "), property, "{said}");
        assert!(text(register, "no_rule").contains(help), "{said}: {register:#}");
        assert!(register["rule"].is_null());
        let verdict = match property {
            "" => "no rule helps\n".to_owned(),
            name => format!("no rule helps, QEMU's `-cpu MODEL,-{name}` does\n"),
        };
        folder.run(&["why", &line]).code(0).shows(&[&verdict]);
    }
}

/// KVM tells of the VMM's own writes too, where the guest has not run.
#[test]
fn what_kvm_says_of_a_guest_that_has_not_run_is_the_vmms() {
    let folder = Folder::new();
    let line = |rip: &str| format!("kvm [2154]: vcpu0, guest rIP: {rip} unhandled wrmsr: 0x38d data 0x0");
    folder.run(&["why", &line("0xfff0")]).code(0).shows(&[
        "no rule helps, QEMU's `-cpu MODEL,-pmu` does",
        "no guest has run",
        "the VMM sets the register",
    ]);
    folder.run(&["why", &line("0xfff1")]).code(0).shows(&["a rule helps"]);
}

#[test]
fn what_did_no_harm_is_said_to_need_no_mending() {
    let folder = Folder::new();
    let warning = |feature: &str| format!("qemu: warning: host doesn't support requested feature: {feature}\n");
    folder.write(
        "warnings",
        warning("MSR(48BH).vmx-apicv-register [bit 8]")
            + &warning("MSR(48BH).vmx-apicv-vid [bit 9]")
            + &warning("MSR(48DH).vmx-posted-intr [bit 7]"),
    );
    let out = folder.run(&["why", "warnings"]).code(0).out;
    let first = out.lines().next().unwrap_or_default();
    let switches = "`-cpu MODEL,-vmx-apicv-register,-vmx-apicv-vid,-vmx-posted-intr`";
    assert!(
        first.ends_with(&format!("nothing is to be mended; {switches} ends QEMU's warnings")),
        "{out}"
    );
    assert!(out.contains("APIC_REGISTER INTR_DELIVERY"), "{out}");
    for line in [
        "kvm_amd: kvm [1]: vcpu3, guest rIP: 0x5 Unhandled WRMSR(0xc0010115) = 0x0",
        "kvm [1]: vcpu0, guest rIP: 0x5 vmx_set_msr: BTF|LBR in IA32_DEBUGCTLMSR 0x1, nop",
        "Failed to access perfctr msr (MSR c1 is 0)",
    ] {
        folder
            .run(&["why", line])
            .code(0)
            .shows(&["nothing is to be mended", "no guest was refused anything"]);
    }
}

/// What helps there is not what helps on KVM.
#[test]
fn a_line_of_another_hypervisor_has_its_own_remedy_and_no_rule_for_what_kvm_has() {
    let folder = Folder::new();
    for (line, shown) in [
        (
            "(XEN) vmx.c:3381:d3v1 RDMSR 0x00000150 unimplemented",
            ["a rule helps", "`msr_relaxed = 1`"],
        ),
        ("rdmsr to register 0x4e on vcpu 0", ["a rule helps", "`bhyve -w`"]),
        (
            "wrmsr to register 0x10(0) on vcpu 1",
            ["a guest on KVM needs no rule\n", "KVM has the register"],
        ),
        (
            "vcpu-0| I125: SetMSR: unknown MSR[0x1d9]:=0x0 (sinking): rip=0xafd5990 count=91",
            ["a guest on KVM needs no rule\n", "VMware does not know"],
        ),
        (
            "FATAL: Unhandled MSR read: c0002001",
            [
                "note: lines are of another program",
                "the program that says so does not know",
            ],
        ),
        (
            "WinBSOD: Synthetic MSR[0x40000101] 0xffffffffc0000096",
            [
                "no rule helps\n",
                "`msrgate run --ignore-unknown --trace - -- QEMU…` does",
            ],
        ),
        (
            "WinBSOD: Synthetic MSR[0x40000100] 0x80",
            ["no rule helps\n", "does not say that the guest was refused a register"],
        ),
    ] {
        folder.run(&["why", line]).code(0).shows(&shown);
    }
}

#[test]
fn each_rule_that_is_printed_passes_check() {
    let folder = Folder::new();
    let json = folder.run(&["msr", "--json"]).code(0).json();
    let mut log = String::new();
    for entry in json.as_array().expect("a list") {
        let msr = text(entry, "msr");
        log += &format!("kvm [1]: vcpu0 unhandled rdmsr: {msr}\nkvm [1]: vcpu0 unhandled wrmsr: {msr} data 0x1\n");
        log += &format!("unchecked MSR access error: RDMSR from {msr} at rIP: 0x5\n");
    }
    log += "kvm [1]: vcpu0 unhandled rdmsr: 0x12345678\n";
    folder.write("log", log);
    let json = folder.run(&["why", "--json", "log"]).code(0).json();
    let registers = list(&json, "registers");
    assert!(registers.len() > 1000, "{}", registers.len());
    let mut policy = String::from("version = 1\nname = \"all\"\ndefault = \"allow\"\n");
    let (mut rules, mut none) = (0, 0);
    for register in registers {
        match register["rule"].as_str() {
            Some(rule) => {
                policy += rule;
                rules += 1;
            }
            None => {
                assert!(!text(register, "no_rule").is_empty());
                none += 1;
            }
        }
    }
    assert!(rules > 1000 && none > 10, "{rules} {none}");
    // One by one, as they are pasted; `check` has many at once by their directions.
    let of = |msr: &str| {
        let register = registers.iter().find(|register| text(register, "msr") == msr);
        register
            .and_then(|register| register["rule"].as_str())
            .map(str::to_owned)
    };
    for msr in ["0x641", "0x280", "0x19c", "0x1a4", "0xc0010015", "0x12345678"] {
        let rule = of(msr).unwrap_or_else(|| panic!("{msr} has no rule"));
        folder.write(
            "one.toml",
            format!("version = 1\nname = \"one\"\ndefault = \"allow\"\n\n{rule}"),
        );
        folder.run(&["check", "one.toml"]).code(0).shows(&["ok"]);
    }
    // KVM has the branch records of some guests, and calls them unknown to the others.
    let access = folder.run(&[
        "why",
        "--json",
        "unchecked MSR access error: WRMSR to 0x680 (tried to write 0x0)",
    ]);
    let access = list(&list(&access.code(0).json(), "registers")[0], "accesses")[0].clone();
    assert_eq!(access["ignorable"], true);
    assert!(text(&access, "why").contains("Linux 5.12"), "{access}");
    // A write that only seems done is none.
    assert_eq!(of("0xc0000080"), None);
    // No filter stops x2APIC.
    assert_eq!(of("0x808"), None);
}

#[test]
fn what_says_nothing_of_an_msr_is_a_no_and_what_is_no_log_is_refused() {
    let folder = Folder::new();
    folder.write("log", "nothing\nof an MSR\n");
    folder.run(&["why", "log"]).code(1).says(&["2 lines say nothing"]);
    let json = folder.run(&["why", "--json", "log"]).code(1).json();
    assert_eq!((count(&json, "lines"), list(&json, "registers").len()), (2, 0));
    folder.run(&["why", "a line of something else"]).code(1);
    // An older QEMU names no register.
    let assertion = "qemu: target/i386/kvm.c:1809: kvm_put_msrs: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed.";
    folder
        .run(&["why", assertion])
        .code(1)
        .says(&["does not say which", "`journalctl -k | msrgate why`"]);
    for line in [
        "Failed to set all KVM MSRs for this vCPU. Only a partial write was done.",
        "  Fatal: KVM_SET_MSRS failed: Bad address",
        "Could not get vCPU state GetMsrEntries(InvalidParameter)",
    ] {
        folder.run_with(&["why"], line).code(1).says(&["does not say which"]);
    }
    folder
        .run(&["why", "0x641"])
        .code(2)
        .says(&["msrgate msr MSR_PP1_ENERGY_STATUS"]);
    for (line, code) in [(&["rdmsr", "0x641"][..], 2), (&["a guest reads 0x641"], 1)] {
        let ran = folder.run(&[&["why"], line].concat()).code(code);
        ran.says(&["msrgate msr MSR_PP1_ENERGY_STATUS"]);
    }
    folder
        .run(&["why", "absent.log"])
        .code(2)
        .says(&["neither a file nor a line"]);
    folder.write("trace.jsonl", "{\"msrgate_trace\":1}\n");
    folder.run(&["why", "trace.jsonl"]).code(2).says(&["msrgate report"]);
    folder.write("log.gz", b"\x1f\x8b\x08\0".as_slice());
    folder.run(&["why", "log.gz"]).code(2).says(&["gzip -dc"]);
    // A shell took the quotes away.
    let words = [
        "why", "kvm", "[100]:", "vcpu0", "ignored", "rdmsr:", "0x641", "data", "0x0",
    ];
    folder.run(&words).code(0).shows(&["0x641 MSR_PP1_ENERGY_STATUS"]);
}

#[test]
fn a_log_does_nothing_to_a_terminal() {
    let folder = Folder::new();
    folder.write("log", "\x1b[31m\u{202e} kvm [1]: ignored rdmsr: 0x641 data 0x0\x07\n");
    let ran = folder.run(&["why", "log"]).code(0);
    assert!(!ran.out.contains(['\x1b', '\x07', '\u{202e}']), "{:?}", ran.out);
}

#[test]
fn bits_are_told_wherever_a_value_is_shown() {
    let folder = Folder::new();
    folder
        .run(&["msr", "IA32_EFER", "0xd01"])
        .code(0)
        .shows(&["0xd01: SCE LME LMA NXE"]);
    folder
        .run(&["msr", "0xc0000080", "0xd01"])
        .code(0)
        .shows(&["0xd01: SCE LME LMA NXE"]);
    folder
        .run(&["msr", "IA32_TSC", "5"])
        .code(0)
        .shows(&["0x5: the database does not know its bits"]);
    folder
        .run(&["msr", "IA32_EFER", "0"])
        .code(0)
        .shows(&["0x0: no bit is set"]);
    let json = folder
        .run(&["msr", "--json", "IA32_MTRR_DEF_TYPE", "0xc06"])
        .code(0)
        .json();
    let bits = list(&json[0], "bits");
    let told: Vec<(&str, &str)> = bits.iter().map(|bit| (text(bit, "name"), text(bit, "value"))).collect();
    assert_eq!(told, [("TYPE", "0x6"), ("FE", "0x1"), ("E", "0x1")]);
    assert_eq!(bits[0]["word"], "WB");
    let policy = |value: &str| {
        format!(
            "version = 1\nname = \"x\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"IA32_MISC_ENABLE\"\nread = {{ value = \"{value}\" }}\n"
        )
    };
    folder.write("a.toml", policy("0x850089"));
    folder.write("b.toml", policy("0x50001"));
    let explained = ["explain", "a.toml", "IA32_MISC_ENABLE", "read"];
    folder
        .run(&explained)
        .code(0)
        .shows(&["bits     FAST_STRINGS TM1 PERFMON EIST MONITOR XTPR_DISABLE"]);
    folder
        .run(&["diff", "a.toml", "b.toml"])
        .code(1)
        .shows(&["value 0x50001 (-TM1 -PERFMON -XTPR_DISABLE)"]);
    let json = folder.run(&["diff", "--json", "a.toml", "b.toml"]).code(1).json();
    let bits = list(&list(&json, "differences")[0], "bits");
    assert_eq!(
        (
            text(&bits[0], "name"),
            text(&bits[0], "before"),
            text(&bits[0], "value")
        ),
        ("TM1", "0x1", "0x0")
    );
    folder.write(
        "t.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"wrmsr\",\"msr\":\"0xc0000080\",\"value\":\"0xd01\"}\n",
    );
    folder
        .run(&["report", "t.jsonl"])
        .code(0)
        .shows(&["0xd01 (SCE LME LMA NXE)"]);
    let page = folder.run(&["report", "--html", "-", "t.jsonl"]).code(0).out;
    assert!(page.contains("SCE LME LMA NXE"));
}

#[test]
fn a_trace_that_may_be_of_a_host_with_ignore_msrs_is_told() {
    let folder = Folder::new();
    let trace = |msr: &str, value: &str, header: &str| {
        format!("{{\"msrgate_trace\":1{header}}}\n{{\"op\":\"rdmsr\",\"msr\":\"{msr}\",\"value\":\"{value}\"}}\n")
    };
    let note = "the host may have `kvm.ignore_msrs`";
    for (msr, value, header, told) in [
        ("0x19c", "0x0", "", true),
        ("0x12345678", "0x0", "", true),
        ("0x19c", "0x1", "", false),
        ("0x1b", "0x0", "", false),
        ("0x19c", "0x0", ",\"ignore_msrs\":false", false),
    ] {
        folder.write("t.jsonl", trace(msr, value, header));
        let out = folder.run(&["report", "t.jsonl"]).code(0).out;
        assert_eq!(out.contains(note), told, "{msr} {value} {header}: {out}");
    }
    folder.write("log", format!("{IGNORED}\n"));
    folder
        .run(&["report", "log"])
        .code(0)
        .shows(&["log is from a host with `kvm.ignore_msrs`"]);
}
