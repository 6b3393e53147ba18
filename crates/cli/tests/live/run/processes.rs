//! VMMs whose processes and descriptors come and go in other ways than most.

use super::*;

#[test]
fn a_vmm_in_the_background_gets_the_policy_for_its_cpuid_and_its_trace_is_written_to_the_end() {
    if !kvm_opens() {
        return;
    }
    let folder = with_policy(BY_VENDOR);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--json"];
    let ran = under(&folder, &options, "background --vendors amd r:0x8b w:0x8b=1").code(3);
    let told = summary(&ran);
    assert_eq!((&told["background"], count(&told, "vms")), (&Value::Bool(true), 0));
    folder.write("go", "");
    // It is made with the first vCPU, which is made later.
    let trace = || fs::read_to_string(folder.path().join("trace.jsonl")).unwrap_or_default();
    wait_until(|| trace().lines().count() == 3);
    let out = || fs::read_to_string(folder.path().join("out")).unwrap();
    wait_until(|| out().contains("rdmsr 0x8b 0x22\nwrmsr 0x8b done\n"));
}

#[test]
fn a_vmm_that_does_without_libc_or_its_environment_is_under_the_policy_too() {
    if !kvm_opens() {
        return;
    }
    // As programs do that have no use for a C library.
    let ran = under(&Folder::furnished(), MICROCODE, descriptors::PAST).code(0);
    assert!(ran.out.contains("a VM"), "{ran:?}");
    ran.says(&["1 VM and 0 vCPUs"]);
    let accesses = "stripped r:0x8b w:0x8b=1";
    let ran = under(&Folder::furnished(), &[MICROCODE, &["--json"]].concat(), accesses).code(0);
    assert_eq!(seen(&ran), ["rdmsr 0x8b 0x100000000000000", "wrmsr 0x8b done"]);
    let told = summary(&ran);
    assert_eq!((count(&told, "vms"), count(&told, "refused")), (1, 0));
}

#[test]
fn a_descriptor_that_is_closed_in_any_way_is_no_longer_the_vms() {
    if !kvm_opens() {
        return;
    }
    let ran = under(&Folder::furnished(), MICROCODE, DESCRIPTORS).code(0);
    let lines: Vec<_> = ran
        .out
        .lines()
        .filter(|line| line.starts_with('c') || line.starts_with("sys"))
        .collect();
    let expected = ["close", "syscall", "close_range", "closefrom"].map(|way| format!("{way} true false"));
    assert_eq!(lines, expected);
    assert!(ran.err.contains("4 VMs and 0 vCPUs, no access answered"), "{}", ran.err);
}
