//! The fields of registers.

use std::string::{String, ToString};
use std::vec::Vec;
use std::{format, vec};

use crate::{Entry, all, by_name};

fn of(name: &str) -> &'static Entry {
    by_name(name).unwrap_or_else(|| panic!("{name}"))
}

fn text<T: ToString>(parts: Vec<T>) -> String {
    let parts: Vec<String> = parts.iter().map(ToString::to_string).collect();
    parts.join(" ")
}

#[test]
fn the_bits_of_a_value_are_told_by_name_value_and_word_and_unknown_ones_by_number() {
    for (name, value, expected) in [
        ("IA32_EFER", 0xd01, "SCE LME LMA NXE"),
        ("IA32_EFER", 0, ""),
        ("IA32_EFER", 0x8000_0000_00c4_0002, "[1] INTWB [22-23] [63]"),
        ("IA32_MTRRCAP", 0x508, "VCNT=8 FIX WC"),
        ("IA32_MTRR_DEF_TYPE", 0xc06, "TYPE=WB FE E"),
        ("IA32_MTRR_DEF_TYPE", 0xc00, "TYPE=UC FE E"),
        ("IA32_MTRR_PHYSBASE3", 0xe000_0006, "TYPE=WB BASE=0xe0000000"),
        (
            "IA32_PAT",
            0x0007_0406_0007_0406,
            "PA0=WB PA1=WT PA2=UC- PA3=UC PA4=WB PA5=WT PA6=UC- PA7=UC",
        ),
        ("IA32_APIC_BASE", 0xfee0_0d00, "BSP EXTD EN BASE=0xfee00000"),
        ("IA32_FIXED_CTR_CTRL", 0xb3, "EN0=ALL EN1=ALL PMI1"),
        ("IA32_PERFEVTSEL0", 0x53_003c, "EVENT=0x3c USR OS INT EN"),
        (
            "IA32_ARCH_CAPABILITIES",
            0x6b,
            "RDCL_NO IBRS_ALL SKIP_L1DFL_VMENTRY MDS_NO IF_PSCHANGE_MC_NO",
        ),
        (
            "IA32_VMX_PROCBASED_CTLS2",
            0x0001_582e_0000_0000,
            "EPT DESC_EXIT RDTSCP VPID RDRAND_EXIT INVPCID SHADOW_VMCS RDSEED_EXIT",
        ),
        (
            "IA32_VMX_TRUE_PINBASED_CTLS",
            0x0000_0029_0000_0016,
            "[1-2] [4] EXT_INTR_EXIT NMI_EXIT VIRTUAL_NMIS",
        ),
        ("HWCR", 0x0900_0011, "SmmLock INVDWBINVD TscFreqSel EffFreqReadOnlyLock"),
        ("GHCB", 0x8000_0001_0000_0004, "INFO=CPUID_REQ DATA=0x8000000100000000"),
        ("IA32_BIOS_SIGN_ID", 0x0100_0065_0000_0000, "REVISION=0x1000065"),
        // Nothing is known of its bits.
        ("IA32_TSC", 5, ""),
    ] {
        assert_eq!(text(of(name).bits(value)), expected, "{name} {value:#x}");
    }
}

#[test]
fn two_values_differ_by_their_fields_and_by_unknown_bits() {
    for (name, before, after, expected) in [
        ("IA32_EFER", 0xd01, 0x1501, "-NXE +SVME"),
        ("IA32_MTRR_DEF_TYPE", 0xc00, 0x806, "TYPE=UC→WB -FE"),
        ("IA32_MTRRCAP", 0x508, 0x10a, "VCNT=8→0xa -WC"),
        ("IA32_EFER", 0x6, 0xc000, "-[1-2] +FFXSR +TCE"),
        ("IA32_EFER", 1, 1, ""),
        ("IA32_TSC", 1, 2, ""),
    ] {
        assert_eq!(
            text(of(name).changed(before, after)),
            expected,
            "{name} {before:#x} {after:#x}"
        );
    }
}

#[test]
fn fields_lie_in_order_in_a_register_and_have_names_that_stand_for_themselves() {
    let mut distinct: Vec<String> = vec![];
    for entry in all() {
        let mut free = 0;
        let mut names: Vec<&str> = vec![];
        for field in entry.fields() {
            assert!(
                field.first >= free && field.last >= field.first && field.last < 64,
                "{}",
                entry.name()
            );
            free = field.last + 1;
            let plain = |c: char| c.is_ascii_alphanumeric() || "_:".contains(c);
            assert!(field.name.chars().all(plain), "{}: {}", entry.name(), field.name);
            assert!(!names.contains(&field.name), "{}: {} twice", entry.name(), field.name);
            names.push(field.name);
            for (value, _) in field.words() {
                assert!(value <= field.mask() >> field.first, "{}: {}", entry.name(), field.name);
            }
        }
        assert!(!entry.fields_source().is_empty());
        let all: Vec<String> = entry.fields().map(|field| format!("{field:?}")).collect();
        let all = all.join(";");
        if !all.is_empty() && !distinct.contains(&all) {
            distinct.push(all);
        }
    }
    assert!(distinct.len() >= 100, "{} layouts are known", distinct.len());
}

#[test]
fn a_value_is_all_of_its_parts() {
    for entry in all().iter().filter(|entry| entry.fields().next().is_some()) {
        for value in [
            0,
            1,
            u64::MAX,
            0x5555_5555_5555_5555,
            0x8000_0000_0000_0000,
            0x0123_4567_89ab_cdef,
        ] {
            let place = |part: &crate::Part| match entry
                .fields()
                .find(|field| field.first == part.first && field.is_address)
            {
                Some(_) => part.value,
                None => part.value << part.first,
            };
            let sum = entry.bits(value).iter().map(place).fold(0, |sum, bits| sum | bits);
            assert_eq!(sum, value, "{}", entry.name());
        }
    }
}
