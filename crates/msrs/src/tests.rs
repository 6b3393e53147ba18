mod bits;
mod families;
mod names;

use std::collections::HashMap;

use std::format;
use std::string::ToString;
use std::vec::Vec;

use msrgate_core::{Msr, Op};

use super::*;
use crate::cpuid::{self, Cpuid};
use crate::entry::bare;
use crate::wildcard::matches;

fn named(name: &str) -> (u32, &'static str) {
    let entry = by_name(name).unwrap_or_else(|| panic!("{name} is missing"));
    (entry.msr.0, entry.name())
}

#[test]
fn no_two_msrs_share_a_name() {
    let mut owners = HashMap::new();
    for entry in all() {
        for name in entry.names() {
            let other = owners.insert(bare(name).to_ascii_uppercase(), entry.msr.0);
            assert_eq!(other, None, "{name} of {:#x}", entry.msr.0);
        }
    }
}

#[test]
fn names_are_what_a_policy_can_spell() {
    for name in all().iter().flat_map(Entry::names) {
        assert!(
            name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
                && !name.starts_with(|first: char| first.is_ascii_digit()),
            "{name}"
        );
    }
}

#[test]
fn every_entry_has_a_class_a_vendor_and_a_source_without_repeats() {
    for entry in all() {
        assert!(
            !entry.classes().is_empty() && !entry.vendors().is_empty() && !entry.source().is_empty(),
            "{}",
            entry.name()
        );
        let mut classes = entry.classes().to_vec();
        classes.sort_unstable();
        classes.dedup();
        assert_eq!(classes.len(), entry.classes().len(), "{}", entry.name());
    }
}

#[test]
fn every_feature_is_known_to_cpuid() {
    for entry in all() {
        for name in entry.exists().features() {
            assert!(cpuid::is_feature(name), "{name} of {}", entry.name());
        }
    }
}

#[test]
fn a_hypervisors_msr_is_there_only_if_a_feature_says_so() {
    let hypervisors = [Vendor::Kvm, Vendor::Hyperv, Vendor::Xen];
    for entry in all()
        .iter()
        .filter(|entry| entry.vendors().iter().any(|vendor| hypervisors.contains(vendor)))
    {
        assert!(
            !matches!(entry.exists(), Exists::Always | Exists::Model),
            "{}",
            entry.name()
        );
    }
}

#[test]
fn every_class_is_sorted_named_and_used() {
    assert!(Class::ALL.is_sorted_by(|a, b| a.name() < b.name()));
    for &class in Class::ALL {
        assert_eq!(class.name().parse(), Ok(class));
    }
    for name in classes() {
        assert!(
            super::class(name).is_some_and(|mut entries| entries.next().is_some()),
            "{name} is empty"
        );
    }
    assert!(super::class("no_such_class").is_none());
}

#[test]
fn an_msr_is_found_by_the_names_of_intel_amd_and_linux() {
    #[rustfmt::skip]
    let cases = [
        ("IA32_BIOS_SIGN_ID", 0x8b), ("MSR_IA32_UCODE_REV", 0x8b), ("patch_level", 0x8b),
        ("MSR_IA32_APICBASE", 0x1b), ("TSC", 0x10), ("MSR_EFER", 0xc000_0080), ("efer", 0xc000_0080),
        ("MSR_SYSCALL_MASK", 0xc000_0084), ("MSR_KERNEL_GS_BASE", 0xc000_0102), ("HWCR", 0xc001_0015),
        ("MSR_K7_HWCR", 0xc001_0015), ("MSR_MTRRfix4K_C8000", 0x269), ("IA32_MC7_STATUS", 0x41d),
        ("MSR_KVM_STEAL_TIME", 0x4b56_4d03), ("KVM_STEAL_TIME", 0x4b56_4d03), ("HV_X64_MSR_SINT15", 0x4000_009f),
        ("MSR_AMD64_SMCA_MC3_IPID", 0xc000_2035), ("IA32_X2APIC_SELF_IPI", 0x83f), ("PERF_CTR5", 0xc001_020b),
    ];
    for (name, msr) in cases {
        assert_eq!(named(name).0, msr, "{name}");
    }
    assert!(by_name("IA32_").is_none());
    assert!(by_name("").is_none());
    assert!(by_name("é_MSR").is_none());
}

#[test]
fn every_entry_is_found_by_its_index_and_no_other_index_is() {
    for entry in all() {
        assert_eq!(by_msr(entry.msr), Some(entry));
    }
    for absent in [0x2, 0x402 + 0x80, 0x7ff, 0xffff_ffff] {
        assert_eq!(
            by_msr(Msr(absent)).map(|entry| entry.msr.0),
            all().iter().map(|e| e.msr.0).find(|&m| m == absent)
        );
    }
    assert_eq!(by_msr(Msr(0xffff_ffff)), None);
}

#[test]
fn every_msr_of_the_recorded_guests_has_an_entry() {
    let traces = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let mut seen = 0;
    for trace in std::fs::read_dir(traces).unwrap() {
        let text = std::fs::read_to_string(trace.unwrap().path()).unwrap();
        for (_, rest) in text.lines().filter_map(|line| line.split_once(r#""msr":"0x"#)) {
            let (digits, _) = rest.split_once('"').unwrap();
            let msr = Msr(u32::from_str_radix(digits, 16).unwrap());
            assert!(by_msr(msr).is_some(), "{msr}");
            seen += 1;
        }
    }
    assert!(seen > 900, "{seen}");
}

/// The indices of a list such as `10 19a-c`: the end of a range gives its last digits.
fn indices(list: &str) -> impl Iterator<Item = Msr> + '_ {
    let number = |digits: &str| u32::from_str_radix(digits, 16).unwrap();
    list.split_whitespace().flat_map(move |part| {
        let (first, last) = part.split_once('-').unwrap_or((part, ""));
        let last = format!("{}{last}", &first[..first.len() - last.len()]);
        (number(first)..=number(&last)).map(Msr)
    })
}

#[test]
fn the_architectural_msrs_of_both_manuals_are_here() {
    let intel = "0-1 6 10 17 1b 2f 3a-b 48-9 4e-f 79-c 82-3 85-7 8b-f 9b 9e bc-d c1-a cf e1 e7-8 fe 10a-b 10f 122-3 174-6 179-b \
                 186-f 198-9 19a-c 1a0 1b0-2 1c4-5 1d9 1f2-3 1f8-a 1fc 200-213 250 258-9 268-f 277 280-9f 2ff 309-f 345 38d-92 \
                 3f1 400-7f 480-93 4c1-a 4d0 500 560-1 570-2 580-7 600 6a0 6a2 6a4-8 6e0-1 770-7 802-3 808 80a-b 80d 80f 810-f \
                 820-8 82f-30 832-8 839 83e-f 981-5 990 c81 c83 c8d-f c90 d10 d90-1 da0 db0-2 1200-1f 14ce-f 1500-1f 1600-1f \
                 17d0-2 17d4 17da c0000080-4 c0000100-3";
    let amd = "10 1b 3b 48-9 8b e7-8 fe 10b 174-6 179-b 1d9 1db-e 200-f 250 258-9 268-f 277 2ff 400-3 6a0 6a2 6a4-7 da0 \
               c0000080-4 c0000100-6 c0000108 c000010e-f c00000e7-9 c0000300-3 c0000400-1 c0000410 c0010000-7 c0010010 c0010015-a \
               c001001d c0010020 c0010061-b c0010074 c0010111-b c001011e-f c0010130-6 c0010140-1 c0010200-b c0010230-b \
               c0010240-7 c0010280 c00102b0-4 c00102f0-1 c0011019-b c0011027 c0011030-d";
    let missing = indices(intel).chain(indices(amd)).filter(|msr| by_msr(*msr).is_none());
    assert_eq!(missing.collect::<Vec<_>>(), []);
}

#[test]
fn the_msrs_of_policies_in_the_field_are_here() {
    // QEMU, crosvm, OpenVMM, bhyve, HVMI, Propolis, a fork of Cloud Hypervisor for monitoring, msr-safe, and what guests are
    // reported to touch.
    let named = "17 34-5 3a 4e-f 79 88-b cd-f e7-8 116 118-b 11e 140 174-6 17f 198-9 19a-d 1a2 1a6-7 1ad-f 1b0-2 1c9 1fc \
                 3f6 3f8-a 3fc-f 601 606 60a-d 610-4 618-9 61b-c 630-5 638-b 640-2 648-f 650 658-b 660 664 668-9 690 6b0-1 \
                 770-4 777 c24 d04 c0000081-2 c0010000-7 c0010015 c001001f c0010114-5 c0011020 c0011029";
    let missing = indices(named).filter(|msr| by_msr(*msr).is_none());
    assert_eq!(missing.collect::<Vec<_>>(), []);
}

#[test]
fn a_class_of_one_maker_holds_no_others_msrs() {
    let makers = [
        ("vmx", Vendor::Intel),
        ("sgx", Vendor::Intel),
        ("tdx", Vendor::Intel),
        ("pt", Vendor::Intel),
        ("hwp", Vendor::Intel),
        ("uintr", Vendor::Intel),
        ("tme", Vendor::Intel),
        ("fred", Vendor::Intel),
        ("svm", Vendor::Amd),
        ("ibs", Vendor::Amd),
        ("cppc", Vendor::Amd),
        ("kvm", Vendor::Kvm),
        ("kvmclock", Vendor::Kvm),
        ("hyperv", Vendor::Hyperv),
        ("xen", Vendor::Xen),
    ];
    for (name, maker) in makers {
        for entry in super::class(name).unwrap() {
            assert!(
                entry.vendors().contains(&maker),
                "{} is in @{name}, and is {:?}",
                entry.name(),
                entry.vendors()
            );
        }
    }
    // And the other way round, for those who have a class of their own.
    for (maker, class) in [
        (Vendor::Kvm, Class::Kvm),
        (Vendor::Hyperv, Class::Hyperv),
        (Vendor::Xen, Class::Xen),
    ] {
        for entry in all().iter().filter(|entry| entry.vendors().contains(&maker)) {
            assert!(entry.classes().contains(&class), "{} is not in @{class}", entry.name());
        }
    }
}

#[test]
fn needs_are_in_order_once_each_and_of_accesses_that_there_are() {
    let key = |need: &Need| (need.msr, need.op, need.system);
    assert!(needs().is_sorted_by(|a, b| key(a) < key(b)));
    for need in needs() {
        let entry = by_msr(need.msr).unwrap_or_else(|| panic!("{} has no entry", need.msr));
        assert!(entry.access.ops().contains(&need.op), "{} of {}", need.op, entry.name());
        assert!(
            entry.is_filterable() && entry.needs().any(|one| one == need),
            "{}",
            entry.name()
        );
        let said = !need.why.is_empty() && !need.why.ends_with('.') && !need.source.is_empty();
        assert!(said, "{} of {}", need.op, entry.name());
    }
    for system in System::ALL {
        let count = needs().iter().filter(|need| need.system == system).count();
        assert!(count > 10, "{system}");
    }
}

#[test]
fn what_linux_needs_the_recorded_guests_did() {
    let traces = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let read = |name| std::fs::read_to_string(traces.join(name)).unwrap();
    let texts = ["linux-6.1-microvm.jsonl", "linux-6.1-pc-smp2.jsonl"].map(read);
    // Their processor is AMD's as QEMU emulates it, and has none of these.
    let absent = ["IA32_MISC_ENABLE", "IA32_SPEC_CTRL", "IA32_XSS"].map(|name| by_name(name).unwrap().msr);
    let of_intel = (Msr(0x8b), Op::Write);
    for need in needs().iter().filter(|need| need.system == System::Linux) {
        let done = format!("\"op\":\"{}\",\"msr\":\"{}\"", need.op, need.msr);
        let seen = texts.iter().any(|text| text.contains(&done));
        assert!(
            seen || absent.contains(&need.msr) || (need.msr, need.op) == of_intel,
            "{done}"
        );
    }
}

#[test]
fn a_class_does_not_take_in_what_every_guest_needs() {
    // Denying these classes must leave a guest able to boot.
    for class in [
        "svm", "vmx", "sev", "sgx", "lbr", "rapl", "pmu", "mce", "uncore", "hwp", "rdt", "xen", "smm",
    ] {
        for needed in [
            "IA32_EFER",
            "SYSCFG",
            "IA32_TSC",
            "IA32_APIC_BASE",
            "IA32_BIOS_SIGN_ID",
            "IA32_MISC_ENABLE",
        ] {
            let needed = by_name(needed).unwrap();
            assert!(
                !needed.classes().iter().any(|&of| of.name() == class),
                "{} is in @{class}",
                needed.name()
            );
        }
    }
}

#[test]
fn a_glob_matches_names_and_aliases_whole() {
    let names = |pattern| glob(pattern).map(|entry| entry.name()).collect::<Vec<_>>();
    let sysenter = ["IA32_SYSENTER_CS", "IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP"];
    assert_eq!(names("ia32_sysenter_*"), sysenter);
    assert_eq!(names("MSR_IA32_SYSENTER_*"), sysenter);
    assert_eq!(names("IA32_SYSENTER_E?P"), sysenter[1..]);
    assert_eq!(names("PKG_POWER_*"), ["MSR_PKG_POWER_LIMIT", "MSR_PKG_POWER_INFO"]);
    assert_eq!(names("*UCODE_REV"), ["IA32_BIOS_SIGN_ID"]);
    assert_eq!(names("SYSENTER"), [""; 0]);
    assert_eq!(names(""), [""; 0]);
    assert_eq!(names("*").len(), all().len());
}

#[test]
fn a_star_swallows_as_much_as_the_rest_of_the_pattern_leaves() {
    #[rustfmt::skip]
    let cases = [
        ("*", "", true), ("", "", true), ("", "a", false), ("a", "", false), ("?", "", false), ("?", "a", true),
        ("a*", "a", true), ("*a", "ba", true), ("*a", "ab", false), ("a*c", "abcbc", true), ("a*c", "abcb", false),
        ("*ab*b", "aabb", true), ("*ab?", "abab", false), ("*ab?", "ababa", true), ("**", "x", true),
        ("*a*a*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
    ];
    for (pattern, text, expected) in cases {
        assert_eq!(
            matches(pattern.as_bytes(), text.as_bytes()),
            expected,
            "{pattern} {text}"
        );
    }
}

#[test]
fn banks_are_complete() {
    #[rustfmt::skip]
    let cases = [
        ("IA32_MC*_CTL2", 32), ("IA32_MC*_MISC", 32), ("IA32_MTRR_PHYS*", 20), ("IA32_MTRR_FIX*", 11),
        ("IA32_PMC?", 10), ("IA32_PERFEVTSEL?", 10), ("IA32_FIXED_CTR?", 7), ("IA32_X2APIC_IRR?", 8),
        ("HV_X64_MSR_SINT*", 16), ("HV_X64_MSR_STIMER*", 8), ("PERF_CTL?", 6), ("PERF_LEGACY_*", 8),
        ("PSTATE_DEF_?", 8), ("MSR_AMD64_SMCA_MC*_CTL", 32), ("MSR_KVM_*", 11), ("IA32_VMX_*", 20),
    ];
    for (pattern, count) in cases {
        assert_eq!(glob(pattern).count(), count, "{pattern}");
    }
}

#[test]
fn a_misspelt_name_points_to_the_nearest_and_nonsense_to_none() {
    assert_eq!(nearest("IA32_EFRE"), Some("IA32_EFER"));
    assert_eq!(nearest("MSR_LSTARR"), Some("MSR_LSTAR"));
    assert_eq!(nearest("IA32_MC99_STATUS"), Some("IA32_MC9_STATUS"));
    assert_eq!(nearest("completely_else_where"), None);
    assert_eq!(nearest(""), None);
    assert_eq!(near("IA32_MC99_STATUS").len(), 3);
    assert_eq!(near("IA32_EFRE"), ["IA32_EFER"]);
}

#[test]
fn search_takes_an_index_a_class_a_pattern_a_name_or_a_part() {
    let names = |text| search(text).iter().map(|entry| entry.name()).collect::<Vec<_>>();
    assert_eq!(names("0x8B"), ["IA32_BIOS_SIGN_ID"]);
    assert_eq!(names("0xffffffff"), [""; 0]);
    assert_eq!(names("@sysenter").len(), 3);
    assert_eq!(names("@nonsense"), [""; 0]);
    assert_eq!(names("IA32_SYSENTER_C?"), ["IA32_SYSENTER_CS"]);
    assert_eq!(names("ucode_rev"), ["IA32_BIOS_SIGN_ID"]);
    assert_eq!(names("steal"), ["MSR_KVM_STEAL_TIME"]);
}

#[test]
fn search_takes_a_range_digits_and_words_in_any_order() {
    let names = |text| search(text).iter().map(|entry| entry.name()).collect::<Vec<_>>();
    assert_eq!(names("0x174..=0x175"), ["IA32_SYSENTER_CS", "IA32_SYSENTER_ESP"]);
    assert_eq!(
        names("IA32_SYSENTER_ESP ..= 0x176"),
        ["IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP"]
    );
    assert_eq!(names("c0000080"), ["IA32_EFER"]);
    assert_eq!(names("139"), ["IA32_BIOS_SIGN_ID"]);
    assert_eq!(names("time stamp"), ["IA32_TSC"]);
    assert_eq!(names("amd energy"), ["CORE_ENERGY_STAT", "PKG_ENERGY_STAT"]);
    assert_eq!(names("energy amd"), names("amd energy"));
    // What a class is called, what it is for, and what a system needs.
    assert_eq!(names("pmu"), names("@pmu"));
    assert!(names("machine check banks").contains(&"IA32_MC0_CTL"));
    assert!(names("windows erratum").contains(&"EX_CFG"));
    for nothing in ["", " ", "..=", "0x10..=", "no such thing", "é"] {
        assert_eq!(names(nothing), [""; 0], "{nothing}");
    }
}

#[test]
fn an_index_that_is_not_known_lies_between_two_that_are() {
    let around = |index| {
        let (before, after) = around(Msr(index));
        (before.map(|entry| entry.msr.0), after.map(|entry| entry.msr.0))
    };
    assert_eq!(around(0x3), (Some(0x1), Some(0x6)));
    assert_eq!(around(0x6), (Some(0x1), Some(0x10)));
    assert_eq!(around(0), (None, Some(0x1)));
    assert!(around(u32::MAX).1.is_none() && around(u32::MAX).0.is_some());
}

#[test]
fn existence_follows_cpuid_then_the_maker() {
    let vendor = |ebx, edx, ecx| (0, 0, [0xd, ebx, ecx, edx]);
    let intel = Cpuid::from_entries([
        vendor(0x756e_6547, 0x4965_6e69, 0x6c65_746e),
        (1, 0, [0x306c3, 0, 0, 1 << 12]),
    ]);
    let amd = Cpuid::from_entries([
        vendor(0x6874_7541, 0x6974_6e65, 0x444d_4163),
        (7, 0, [0, 0, 0, 1 << 29]),
        (0x8000_0001, 0, [0, 0, 1 << 2, 0]),
    ]);
    #[rustfmt::skip]
    let cases = [
        ("IA32_MTRRCAP", Some(true), Some(false)), ("IA32_MISC_ENABLE", Some(true), Some(false)),
        ("HWCR", Some(false), Some(true)), ("IA32_BIOS_SIGN_ID", Some(true), Some(true)),
        ("MSR_PKG_ENERGY_STATUS", None, Some(false)), ("LS_CFG", Some(false), None),
        ("IA32_ARCH_CAPABILITIES", Some(false), Some(true)), ("IA32_EFER", Some(false), Some(true)),
        ("MSR_KVM_STEAL_TIME", Some(false), Some(false)), ("MSR_TMTA_LONGRUN_CTRL", Some(false), Some(false)),
    ];
    for (name, on_intel, on_amd) in cases {
        let entry = by_name(name).unwrap();
        assert_eq!(
            (entry.exists_on(&intel), entry.exists_on(&amd)),
            (on_intel, on_amd),
            "{name}"
        );
    }
    let unknown = Cpuid::default();
    assert_eq!(by_name("HWCR").unwrap().exists_on(&unknown), None);
}

#[test]
fn a_condition_prints_as_its_features() {
    let text = |name| by_name(name).unwrap().exists().to_string();
    assert_eq!(text("IA32_MTRRCAP"), "mtrr");
    assert_eq!(text("IA32_TSC_AUX"), "rdtscp|rdpid");
    assert_eq!(text("HWCR"), "-");
}

#[test]
fn what_is_known_of_an_entry_does_not_contradict_itself() {
    for entry in all() {
        let name = entry.name();
        // KVM gives the guest a value of its own, so it is none of the host's. The microcode's revision is both: a
        // VMM may copy the host's into the guest.
        let both = entry.state != State::Nothing && entry.host != Host::Nothing;
        assert!(!both || name == "IA32_BIOS_SIGN_ID", "{name}");
        assert_eq!(
            entry.state == State::Lapic,
            entry.classes().contains(&Class::X2apic) && entry.access == Access::ReadWrite
                || ["HV_X64_MSR_ICR", "HV_X64_MSR_TPR"].contains(&name),
            "{name}"
        );
        // What cannot be read can neither be saved nor tell anything.
        if entry.access == Access::WriteOnly {
            assert_eq!(entry.host, Host::Nothing, "{name}");
            assert_eq!(
                entry.state == State::Nothing,
                name != "MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_CLR" && name != "MSR_AMD64_PERF_CNTR_GLOBAL_STATUS_SET",
                "{name}"
            );
        }
        assert!(!entry.is_secret() || entry.host != Host::Setup, "{name}");
        assert!(entry.is_filterable() || entry.unfiltered().is_some(), "{name}");
    }
}

#[test]
fn some_facts_that_are_known_well() {
    let of = |name: &str| by_name(name).unwrap_or_else(|| panic!("{name}"));
    #[rustfmt::skip]
    let state = [
        ("IA32_SYSENTER_EIP", State::Listed), ("IA32_LSTAR", State::Listed), ("IA32_MTRR_DEF_TYPE", State::Unlisted),
        ("IA32_EFER", State::Sregs), ("IA32_APIC_BASE", State::Sregs), ("IA32_X2APIC_TPR", State::Lapic),
        ("MSR_PKG_ENERGY_STATUS", State::Nothing), ("IA32_PRED_CMD", State::Nothing), ("HV_X64_MSR_SIMP", State::Unlisted),
    ];
    for (name, expected) in state {
        assert_eq!(of(name).state, expected, "{name}");
    }
    #[rustfmt::skip]
    let host = [
        ("MSR_PKG_ENERGY_STATUS", Host::Activity), ("PKG_ENERGY_STAT", Host::Activity), ("IA32_THERM_STATUS", Host::Activity),
        ("IA32_APERF", Host::Activity), ("IA32_MPERF", Host::Activity), ("IA32_PPIN", Host::Identity), ("PPIN_AMD", Host::Identity),
        ("IA32_BIOS_SIGN_ID", Host::Setup), ("MSR_RAPL_POWER_UNIT", Host::Setup), ("IA32_LBR_3_FROM_IP", Host::Trace),
        ("IA32_LSTAR", Host::Nothing), ("IA32_MC0_STATUS", Host::Nothing),
    ];
    for (name, expected) in host {
        assert_eq!(of(name).host, expected, "{name}");
    }
    assert!(of("IA32_LSTAR").holds_guest_state() && !of("IA32_VMX_BASIC").holds_guest_state());
    assert!(of("IA32_PPIN").is_secret() && !of("IA32_BIOS_SIGN_ID").is_secret());
    assert!(
        !of("IA32_X2APIC_TPR").is_filterable() && !of("SEV_STATUS").is_filterable() && of("IA32_TSC").is_filterable()
    );
}

#[test]
fn an_index_is_read_as_manuals_and_logs_print_it() {
    for (text, index) in [
        ("48DH", 0x48d),
        ("48dh", 0x48d),
        ("C0010015", 0xc001_0015),
        ("c0000080", 0xc000_0080),
        ("C001_0015", 0xc001_0015),
        ("MSRC001_0015", 0xc001_0015),
        ("MSR0000_0010", 0x10),
    ] {
        assert_eq!(crate::printed(text), Some(Msr(index)), "{text}");
        assert!(
            crate::search(text).iter().all(|entry| entry.msr == Msr(index)),
            "{text}"
        );
    }
    for text in [
        "",
        "H",
        "FEED",
        "MSR",
        "IA32_EFER",
        "C001_00",
        "1_2",
        "0x10",
        "123456789",
        "MSR_K7_HWCR",
    ] {
        assert_eq!(crate::printed(text), None, "{text}");
    }
}

#[test]
fn what_kvm_refuses_is_of_registers_that_there_are_and_kvm_has_those() {
    for refusal in crate::entry::refusals() {
        for of in refusal.of {
            let named = |entry: &&Entry| matches(of.as_bytes(), entry.name().as_bytes());
            assert!(all().iter().any(|entry| named(&entry)), "{of}");
        }
    }
    let of = |name: &str| by_name(name).unwrap_or_else(|| panic!("{name}"));
    let says = of("IA32_MC0_CTL2").refusals(Op::Read).next().expect("0x280").says;
    assert!(says.contains("5.19") && says.contains("MCG_CMCI_P"), "{says}");
    assert!(of("HWCR").refusals(Op::Write).next().is_some() && of("HWCR").refusals(Op::Read).next().is_none());
    let lbr = of("MSR_LASTBRANCH_0_FROM_IP")
        .refusals(Op::Write)
        .next()
        .expect("0x680");
    assert!(
        lbr.is_unknown
            && of("IA32_MC0_CTL2")
                .refusals(Op::Read)
                .all(|refusal| !refusal.is_unknown)
    );
    for (name, known) in [
        ("IA32_MC0_CTL2", true),
        ("IA32_PRED_CMD", true),
        ("MSR_LBR_SELECT", true),
        ("IA32_EFER", true),
        ("MSR_PP1_ENERGY_STATUS", true),
        ("IA32_THERM_STATUS", false),
        ("MSR_TURBO_RATIO_LIMIT", false),
    ] {
        assert_eq!(of(name).is_known_to_kvm(), known, "{name}");
    }
}
