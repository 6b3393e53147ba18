use alloc::string::ToString;
use alloc::vec::Vec;

use super::*;

/// A Haswell client with two CPUs.
const INTEL: &str = "\
CPU 0:
   0x00000000 0x00: eax=0x0000000d ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69
   0x00000001 0x00: eax=0x000306c3 ebx=0x00100800 ecx=0x7ffafbbf edx=0xbfebfbff
   0x00000006 0x00: eax=0x00000077 ebx=0x00000002 ecx=0x00000009 edx=0x00000000
   0x00000007 0x00: eax=0x00000000 ebx=0x000027ab ecx=0x00000000 edx=0x9c000400
   0x0000000a 0x00: eax=0x07300403 ebx=0x00000000 ecx=0x00000000 edx=0x00000603
   0x0000000d 0x01: eax=0x00000001 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000001 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000021 edx=0x2c100800

CPU 1:
   0x00000000 0x00: eax=0x0000000d ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
";

/// A KVM guest with an AMD EPYC (Zen 2) that also shows Hyper-V's interface.
const AMD_GUEST: &str = "\
CPU:
   0x00000000 0x00: eax=0x0000000d ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x00000001 0x00: eax=0x00830f10 ebx=0x00010800 ecx=0xfef83203 edx=0x078bfbff
   0x40000000 0x00: eax=0x40000005 ebx=0x7263694d ecx=0x666f736f edx=0x76482074
   0x40000001 0x00: eax=0x31237648 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x40000003 0x00: eax=0x00000a62 ebx=0x00000000 ecx=0x00000000 edx=0x00000408
   0x40000100 0x00: eax=0x40000101 ebx=0x4b4d564b ecx=0x564b4d56 edx=0x0000004d
   0x40000101 0x00: eax=0x01007efb ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000001 0x00: eax=0x00830f10 ebx=0x00000000 ecx=0x01c003f7 edx=0x2fd3fbff
   0x80000008 0x00: eax=0x00003028 ebx=0x0110d000 ecx=0x00000000 edx=0x00000000
";

#[test]
fn the_first_cpu_of_several_is_taken() {
    let cpuid = Cpuid::parse_raw(INTEL).unwrap();
    assert_eq!(cpuid.vendor(), Some(CpuVendor::Intel));
    assert_eq!(cpuid.entries().count(), 7);
}

#[test]
fn extended_family_and_model_are_folded_in() {
    let intel = Cpuid::parse_raw(INTEL).unwrap();
    assert_eq!(
        (intel.family(), intel.model(), intel.stepping()),
        (Some(6), Some(0x3c), Some(3))
    );
    let amd = Cpuid::parse_raw(AMD_GUEST).unwrap();
    assert_eq!(amd.vendor(), Some(CpuVendor::Amd));
    assert_eq!(
        (amd.family(), amd.model(), amd.stepping()),
        (Some(0x17), Some(0x31), Some(0))
    );
    let pentium = Cpuid::from_entries([(1, 0, [0x000f_0525, 0, 0, 0])]);
    assert_eq!((pentium.family(), pentium.model()), (Some(5), Some(2)));
}

#[test]
fn features_are_read_from_their_bits() {
    #[rustfmt::skip]
    let cases = [
        ("mtrr", true, true), ("dts", true, false), ("x2apic", true, true), ("epb", true, false),
        ("hwp", false, false), ("arch_perfmon", true, false), ("arch_perfmon_v4", false, false),
        ("arch_perfmon_gp4", true, false), ("arch_perfmon_gp5", false, false),
        ("arch_perfmon_fixed3", true, false), ("arch_perfmon_fixed4", false, false),
        ("tsc_adjust", true, false), ("flush_l1d", true, false), ("ssbd", true, true), ("amd_ssbd", false, true),
        ("ibpb", true, true), ("svm", false, true), ("perfctr_core", false, true), ("lm", true, true),
        ("kvm", false, true), ("kvm_clocksource", false, true), ("kvm_nop_io_delay", false, true),
        ("kvm_migration_control", false, false), ("hyperv", false, true), ("hv_vpindex", false, true),
        ("hv_synic", false, false), ("hv_crash", false, true), ("xen", false, false),
    ];
    let (intel, amd) = (Cpuid::parse_raw(INTEL).unwrap(), Cpuid::parse_raw(AMD_GUEST).unwrap());
    for (name, on_intel, on_amd) in cases {
        assert_eq!(intel.has(name), Some(on_intel), "{name} on Intel");
        assert_eq!(amd.has(name), Some(on_amd), "{name} on AMD");
    }
    assert_eq!(intel.has("MTRR"), Some(true));
    assert_eq!(intel.has("no_such_feature"), None);
}

#[test]
fn text_round_trips() {
    for text in [INTEL, AMD_GUEST] {
        let cpuid = Cpuid::parse_raw(text).unwrap();
        assert_eq!(Cpuid::parse_raw(&cpuid.to_raw()), Ok(cpuid));
    }
    assert_eq!(Cpuid::parse_raw(AMD_GUEST).unwrap().to_raw(), AMD_GUEST);
}

#[test]
fn errors_name_the_line_and_what_is_wrong() {
    #[rustfmt::skip]
    let cases = [
        ("", "no CPUID leaf in the text; expected what `cpuid -r -1` prints"),
        ("CPU:\nvendor_id = GenuineIntel", "line 2: `vendor_id` is not a 32-bit number in hexadecimal, such as `0x0000000d`"),
        ("0x1 0x0 eax=0x1", "line 1: expected `LEAF SUBLEAF: eax=… ebx=… ecx=… edx=…`, found `0x1 0x0 eax=0x1`"),
        ("0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x1ffffffff", "line 1: `0x1ffffffff` is not a 32-bit number in hexadecimal, such as `0x0000000d`"),
        ("0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x+1", "line 1: `0x+1` is not a 32-bit number in hexadecimal, such as `0x0000000d`"),
        ("0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x1 more", "line 1: expected `LEAF SUBLEAF: eax=… ebx=… ecx=… edx=…`, found `0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x1 more`"),
        ("\n0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x1\n0x1 0x0: eax=0x1 ebx=0x1 ecx=0x1 edx=0x1", "line 3: leaf 0x00000001 subleaf 0x00 is given twice"),
    ];
    for (text, expected) in cases {
        assert_eq!(Cpuid::parse_raw(text).unwrap_err().to_string(), expected);
    }
}

#[test]
fn feature_names_are_unique_and_their_fields_fit_a_register() {
    let mut names: Vec<_> = features().iter().map(|feature| feature.name).collect();
    names.sort_unstable();
    let listed = names.len();
    names.dedup();
    assert_eq!(names.len(), listed);
    for place in features().iter().flat_map(|feature| feature.places) {
        assert!(
            place.width >= 1 && u32::from(place.bit) + u32::from(place.width) <= 32,
            "{place:?}"
        );
    }
}
