//! Many VMs and vCPUs, one after the other and at a time: a trace has all of it, or says what is missing.

use super::*;

/// Without a value that the kernel holds, since there is a trace.
fn traces(program: &Path, arguments: &[&str], events: u64) {
    let folder = with_policy(ANSWERS);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--json"];
    let ran = Ran::of(&mut under(&folder, &options, program, arguments)).code(0);
    let told = summary(&ran);
    let (written, missing) = whole(&traced(&folder));
    assert_eq!(written + missing, events, "{told:#}");
    assert_eq!(count(&told["lost"], "events"), missing, "{told:#}");
    assert_eq!(count(&told["lost"], "uncounted"), 0, "{told:#}");
    let counted: u64 = list(&told, "by_msr").iter().map(|row| count(row, "count")).sum();
    assert_eq!(counted, events, "{told:#}");
}

#[test]
fn a_trace_has_the_vms_of_600_processes_that_follow_each_other() {
    let Some(program) = vmm("sequence", Way::Dynamic) else {
        return;
    };
    for how in ["exec", "fork"] {
        traces(&program, &[how, "600", "r:0x8b", "w:0x174=1"], 1200);
    }
}

#[test]
fn a_trace_has_1000_vcpus_that_run_at_a_time_or_says_what_is_missing() {
    let Some(program) = vmm("many", Way::Dynamic) else {
        return;
    };
    traces(
        &program,
        &["1000", "r:0x8b", "w:0x174=1", "r:0x174", "a:0x8b=20"],
        23_000,
    );
}

#[test]
fn learning_has_the_first_touches_of_600_vms() {
    let Some(program) = vmm("sequence", Way::Static) else {
        return;
    };
    let folder = Folder::new();
    let options = ["--learn", "--trace", "trace.jsonl", "--json"];
    Ran::of(&mut under(&folder, &options, &program, &["exec", "600", "r:0x174"])).code(0);
    assert_eq!(whole(&traced(&folder)), (600, 0));
}

#[test]
fn a_process_makes_and_lets_go_of_1000_vms_and_has_256_vcpus() {
    let Some(program) = vmm("lives", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    for arguments in [["vms", "1000"], ["vcpus", "256"]] {
        let without = bare(&folder, &program, &arguments).code(0);
        let ran = Ran::of(&mut under(&folder, &["-p", "policy.toml"], &program, &arguments)).code(0);
        assert!(without.out.starts_with("wrong 0 open "), "{without:?}");
        assert_eq!(ran.out, without.out, "{}", ran.err);
    }
}

#[test]
fn learning_has_8000_first_touches_that_no_range_joins() {
    let Some(program) = vmm("lives", Way::Dynamic) else {
        return;
    };
    let folder = Folder::new();
    let options = ["--learn", "--trace", "trace.jsonl"];
    let ran = Ran::of(&mut under(&folder, &options, &program, &["touches", "8000"])).code(0);
    assert_eq!(ran.out, "faults 8000\n", "{}", ran.err);
    assert_eq!(whole(&traced(&folder)), (8000, 0), "{}", ran.err);
}
