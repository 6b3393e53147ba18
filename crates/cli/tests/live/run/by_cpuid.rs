//! Policies that depend on the CPUID that the VMM sets.

use super::*;

#[test]
fn a_policy_that_depends_on_the_cpuid_is_the_one_for_what_the_vmm_sets() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(BY_VENDOR);
    for (vendors, expected) in [("intel,intel", "0x11"), ("amd,amd", "0x22")] {
        let accesses = format!("--filter --vcpus 2 --vendors {vendors} --set 0x174=8 r:0x8b r:0x174 r:0x35");
        let each = [
            format!("rdmsr 0x8b {expected}"),
            "rdmsr 0x174 0x8".to_owned(),
            "rdmsr 0x35 0x20004".to_owned(),
            "vmm 0x174 0x8".to_owned(),
        ];
        let ran = under(&folder, &["-p", "policy.toml", "--json"], &accesses).code(0);
        assert_eq!(seen(&ran), [each.clone(), each].concat());
        assert_eq!(count(&list(&summary(&ran), "by_msr")[0], "count"), 2);
    }
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--ignore-unknown"];
    let ran = under(&folder, &options, "--vendors amd r:0x8b r:0xdeadbeef").code(0);
    assert_eq!(seen(&ran), ["rdmsr 0x8b 0x22", "rdmsr 0xdeadbeef 0x0"]);
    let events = traced(&folder).1;
    assert_eq!(events.len(), 2, "{events:?}");
}

#[test]
fn vcpus_that_the_policy_would_treat_otherwise_and_those_without_a_cpuid_do_not_run() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(BY_VENDOR);
    let ran = under(&folder, &["-p", "policy.toml"], "--vcpus 2 --vendors intel,amd r:0x8b");
    assert_eq!((ran.code, seen(&ran)), (Some(9), Vec::new()), "{}", ran.err);
    ran.says(&[
        "msrgate: vCPU 1 does not get this CPUID: the policy means something else for it",
        "small_vmm: KVM_SET_CPUID2: ",
    ]);
    let ran = under(&folder, &["-p", "policy.toml"], "--vcpus 2 r:0x8b");
    assert_eq!((ran.code, seen(&ran)), (Some(9), Vec::new()), "{}", ran.err);
    let said = ran.err.matches("no vCPU runs whose CPUID the VMM has not set").count();
    assert_eq!(said, 1, "{}", ran.err);
    // A policy that no filter can hold for this guest.
    let rules: String = (0..17)
        .map(|slot| {
            let msr = 0x4000_0000 + (slot << 20);
            format!("[[rule]]\nmsr = \"{msr:#x}\"\nread = \"zero\"\nwhen = {{ vendor = \"amd\" }}\n")
        })
        .collect();
    let folder = with_policy(&format!("default = \"allow\"\n{rules}"));
    let ran = under(&folder, &["-p", "policy.toml"], "--vendors amd r:0x10");
    assert_eq!(ran.code, Some(9), "{}", ran.err);
    ran.says(&["vCPU 0 does not get this CPUID: the policy needs 17 filter ranges"]);
    under(&folder, &["-p", "policy.toml"], "--vendors intel r:0x174").code(0);
}
