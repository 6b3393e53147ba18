//! A policy with a fault of each kind that can be planted: all of them are found, each where it stands, and nothing else.

use msrgate_msrs::cpuid::Cpuid;
use msrgate_policy::{Code, Diagnostic, Policy, Severity, check};

/// A comment `# W…` stands in the line before the place at which the fault is to be found.
const FAULTY: &str = r#"
version = 1
default = "allow"
# W010
accept = { W010 = "a rule that is not there any more" }

[[rule]]
msr  = "IA32_SYSENTER_CS..=IA32_SYSENTER_EIP"
read = "zero"

# W001
[[rule]]
msr  = "IA32_SYSENTER_ESP"
read = "deny"

[[rule]]
msr  = "@thermal"
read = "zero"

# W005
[[rule]]
msr   = "IA32_THERM_STATUS"
read  = { value = 0x8800_0000 }
write = "ignore"

[[rule]]
msr  = ["MSR_PKG_ENERGY_STATUS", "MSR_DRAM_ENERGY_STATUS"]
read = "zero"

# W006
[[rule]]
msr  = ["MSR_DRAM_ENERGY_STATUS", "MSR_PP0_ENERGY_STATUS"]
read = "zero"

# W007
[[rule]]
msr  = "IA32_PAT"
read = "allow"

# W008
[[rule]]
msr   = "IA32_EFER"
write = "deny"

# W009
[[rule]]
msr  = "IA32_PPIN"
read = "host"

# W017
[[rule]]
msr  = "MSR_PP1_ENERGY_STATUS"
read = "allow"

[[rule]]
msr  = "0x640..=0x642"
read = "zero"

# W002
[[rule]]
msr   = "@x2apic"
write = "deny"

# W003
[[rule]]
msr  = "HWCR"
read = "allow"
log  = "all"

[[rule]]
msr  = "0xc0010010..=0xc001001f"
read = "zero"

# W004
[[rule]]
msr   = "IA32_HWP_REQUEST"
write = "shadow"

# W011
[[rule]]
msr   = "IA32_TSC_DEADLINE"
read  = "deny"
write = "allow"

# W012
[[rule]]
msr   = "IA32_DS_AREA"
read  = "deny"
write = "deny"

# W013
[[rule]]
msr   = "IA32_STAR"
write = "ignore"

# W014
[[rule]]
msr  = "0xc000080"
read = "deny"

# W015
[[rule]]
msr  = "IA32_KERNEL_GS_BASE"
read = "zero"
"#;

#[test]
fn each_planted_fault_is_found_where_it_stands_and_nothing_else() {
    let policy = Policy::parse("faulty.toml", FAULTY).unwrap_or_else(|rejected| panic!("{:#?}", rejected.diagnostics));
    // A 64-bit Intel processor with memory types and a debug store, and without the timer.
    let cpuid = Cpuid::from_entries([
        (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, 0, [0x0005_0654, 0, 0, 1 << 21 | 1 << 16]),
        (0x8000_0001, 0, [0, 0, 0, 1 << 29]),
    ]);
    let map = policy.decision_map(Some(&cpuid)).expect("a CPUID is there");
    let findings = check(&policy, &map, Some(&cpuid));
    let line = |found: &Diagnostic| {
        let place = found.place.as_ref().expect("a place");
        policy.sources[place.source].line_column(place.span.start).0
    };
    let open = findings.iter().filter(|found| found.is_open());
    let found: Vec<(usize, &str)> = open.map(|found| (line(found), found.code.code())).collect();
    let planted: Vec<(usize, &str)> = (1..)
        .zip(FAULTY.lines())
        .filter_map(|(number, text)| Some((number + 1, text.strip_prefix("# ")?)))
        .collect();
    assert_eq!(found, planted);
    let mut kinds: Vec<&str> = planted.iter().map(|(_, code)| *code).collect();
    kinds.sort_unstable();
    // A policy that denies everything has no other fault than this one.
    let warnings = Code::all().filter(|code| code.severity() == Severity::Warning && *code != Code::DeniesAll);
    assert_eq!(
        kinds,
        warnings.map(Code::code).collect::<Vec<_>>(),
        "a fault of each kind"
    );
}
