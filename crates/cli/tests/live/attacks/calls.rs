//! VMMs that make their calls by other ways than most, or from other threads and processes.

use super::*;

/// What a program prints under the answers, as root.
#[track_caller]
fn shows(name: &str, way: Way, policy: &str, arguments: &[&str], expected: &[&str]) {
    let Some(program) = vmm(name, way) else { return };
    let folder = with_policy(policy);
    let ran = Ran::of(&mut under(&folder, &["-p", "policy.toml"], &program, arguments)).code(0);
    assert_eq!(
        ran.out.lines().collect::<Vec<_>>(),
        expected,
        "{way:?} {arguments:?} {}",
        ran.err
    );
}

#[test]
fn no_way_to_make_a_call_leads_past_the_policy() {
    let expected = [
        "bad type -1",
        "rdmsr 0x8b 0x5",
        "rdmsr 0x174 0x11",
        "wrmsr 0x174 done",
        "rdmsr 0x174 0x7",
        "wrmsr 0x10a fault",
        "wrmsr 0x175 done",
        "wrmsr 0x175 fault",
    ];
    for way in [Way::Dynamic, Way::Inline] {
        for how in ["raw", "syscall", "dlsym"] {
            shows("past", way, ANSWERS, &[how], &expected);
        }
    }
    shows("past", Way::Dynamic, ANSWERS, &["int80"], &["int80 refused"]);
}

#[test]
fn a_library_of_the_users_that_makes_ioctls_its_own_way_is_under_the_policy() {
    let (Some(program), Some(library)) = (vmm("accesses", Way::Dynamic), vmm("wrapper", Way::Library)) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let mut command = under(
        &folder,
        &["-p", "policy.toml"],
        &program,
        &["r:0x8b", "r:0x174", "w:0x10a=1"],
    );
    let ran = Ran::of(command.env("LD_PRELOAD", library)).code(0);
    assert_eq!(
        ran.out, "rdmsr 0x8b 0x5\nrdmsr 0x174 0x11\nwrmsr 0x10a fault\n",
        "{}",
        ran.err
    );
}

#[test]
fn a_vcpu_whose_thread_ends_in_kvm_run_runs_on_another() {
    for how in ["cancel", "exit"] {
        shows(
            "threads",
            Way::Dynamic,
            ANSWERS,
            &[how],
            &["another rdmsr 0x174 0x11"; 4],
        );
    }
}

#[test]
fn threads_and_processes_that_share_or_do_not_are_under_the_policy() {
    let all = [
        "main rdmsr 0x174 0x11",
        "thread rdmsr 0x174 0x11",
        "main rdmsr 0x174 0x11",
        "main rdmsr 0x174 0x11",
    ];
    shows("threads", Way::Dynamic, ANSWERS, &["unshare"], &all);
    let both = ["child rdmsr 0x174 0x11", "main rdmsr 0x174 0x11"];
    shows("threads", Way::Dynamic, ANSWERS, &["clone"], &both);
    for how in ["fifo", "badclose"] {
        shows("threads", Way::Dynamic, ANSWERS, &[how], &both[1..]);
    }
}

#[test]
fn the_smallest_stack_is_enough() {
    let expected = ["thread rdmsr 0x174 0x11", "thread rdmsr 0x277 fault"];
    for way in [Way::Dynamic, Way::Static] {
        shows("threads", way, ANSWERS, &["stack"], &expected);
        let by_cpuid = "default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = { value = \"0x11\" }\n\
                        when = { vendor = \"intel\" }\n";
        shows("threads", way, by_cpuid, &["stack"], &expected);
    }
}

#[test]
fn the_trace_names_the_vmms_own_filter_where_that_denies() {
    let Some(program) = vmm("handed", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl"];
    let ran = Ran::of(&mut under(&folder, &options, &program, &["scm"])).code(0);
    ran.says(&["rdmsr 0x277 IA32_PAT: 1 time, the VMM's own filter denies it"]);
    let of = |msr: &str| {
        let events = traced(&folder).into_iter().filter(|event| event["msr"] == msr);
        let told = events.map(|event| (event["did"].clone(), event["why"].clone()));
        told.collect::<Vec<_>>()
    };
    assert_eq!(of("0x277"), [("fault".into(), "vmm-filter".into())]);
    assert_eq!(of("0x10a"), [("deny".into(), Value::Null)]);
}

#[test]
fn a_vm_is_under_the_policy_in_whose_hands_it_is() {
    let last = [
        "last rdmsr 0x8b 0x5",
        "last wrmsr 0x174 done",
        "last rdmsr 0x174 0x5",
        "last rdmsr 0x10a fault",
        // The VMM's own filter.
        "last rdmsr 0x277 fault",
    ];
    for how in ["scm", "pidfd"] {
        shows("handed", Way::Dynamic, ANSWERS, &[how], &last);
    }
    let others = ["vcpu -1 mask -1 filter -1", "Input/output error"];
    let first = "first rdmsr 0x174 0x11";
    shows(
        "handed",
        Way::Dynamic,
        ANSWERS,
        &["exec"],
        &[&[first], &others[..]].concat(),
    );
    shows(
        "handed",
        Way::Dynamic,
        ANSWERS,
        &["vfork"],
        &[&[first], &others[..], &[first]].concat(),
    );
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: it takes root to give up root's rights");
        return;
    }
    for how in ["before-setuid", "before-undumpable", "before-chroot", "before-userns"] {
        shows("handed", Way::Dynamic, ANSWERS, &[how], &last);
    }
    let before = [
        "before rdmsr 0x174 0x11",
        "after rdmsr 0x174 0x11",
        "after rdmsr 0x10a fault",
    ];
    for how in ["after-setuid", "after-undumpable", "after-chroot"] {
        shows(
            "handed",
            Way::Dynamic,
            ANSWERS,
            &[how],
            &[&before[..], &last[..]].concat(),
        );
    }
}

#[test]
fn a_policy_that_allows_all_changes_no_result_of_a_filter_or_a_capability() {
    for way in [Way::Dynamic, Way::Static] {
        let Some(program) = vmm("fuzz", way) else { continue };
        let folder = with_policy("default = \"allow\"\n");
        for seed in ["1", "2", "3"] {
            let without = bare(&folder, &program, &[seed, "1000"]).code(0);
            let lines = without.out.lines();
            assert!(lines.filter(|line| line.starts_with("0 0 ")).count() > 300);
            let mut command = under(&folder, &["-p", "policy.toml"], &program, &[seed, "1000"]);
            let ran = Ran::of(&mut command).code(0);
            let same = without
                .out
                .lines()
                .zip(ran.out.lines())
                .position(|(one, other)| one != other);
            assert_eq!(
                (same, ran.out.len()),
                (None, without.out.len()),
                "{way:?} seed {seed}: {}",
                ran.err
            );
        }
    }
}

#[test]
fn msr_platform_info_is_the_policys_until_the_vmm_takes_it_from_the_guest() {
    let Some(program) = vmm("lives", Way::Dynamic) else {
        return;
    };
    let folder = with_policy("default = \"allow\"\n[[rule]]\nmsr = \"0xce\"\nread = { value = \"0x77\" }\n");
    for options in [
        &["-p", "policy.toml"][..],
        &["-p", "policy.toml", "--trace", "trace.jsonl"],
    ] {
        let ran = Ran::of(&mut under(&folder, options, &program, &["platform"])).code(0);
        assert_eq!(
            ran.out, "on rdmsr 0xce 0x77\noff rdmsr 0xce 0x77\n",
            "{options:?} {}",
            ran.err
        );
    }
}
