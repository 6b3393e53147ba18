//! VMMs whose threads may make the calls that they make themselves, and no other.

use super::*;

const ACCESSES: [&str; 8] = [
    "r:0x8b",
    "w:0x8b=7",
    "r:0x174",
    "w:0x10a=1",
    "w:0x175=1",
    "w:0x175=2",
    "r:0x176",
    "r:0xdeadbeef",
];

fn command(folder: &Folder, options: &[&str], program: &Path, action: &str, kind: &str) -> Command {
    under(folder, options, program, &[&[action, kind], &ACCESSES[..]].concat())
}

#[test]
fn sandboxed_vmms_run_under_every_kind_of_policy() {
    let denied = "default = \"deny\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"allow\"\nwrite = \"allow\"\n";
    for way in [Way::Dynamic, Way::Static, Way::Inline, Way::Musl] {
        let Some(program) = vmm("sandbox", way) else { continue };
        for (action, kind) in [
            ("kill", "early"),
            ("trap", "early"),
            ("errno", "early"),
            ("thread", "vcpu"),
            ("trap", "vcpu"),
            ("errno", "vcpu"),
            ("kill", "whole"),
            ("errno", "whole"),
            ("kill", "caps"),
            ("errno", "caps"),
        ] {
            let folder = with_policy(ANSWERS);
            let without = bare(&folder, &program, &[&[action, kind], &ACCESSES[..]].concat()).code(0);
            let own = |line: usize| without.out.lines().nth(line).unwrap();
            let case = format!("{way:?} {action} {kind}");
            for options in [
                &["--learn", "--trace", "trace.jsonl"][..],
                &["-p", "policy.toml", "--audit"],
            ] {
                let ran = Ran::of(&mut command(&folder, options, &program, action, kind)).code(0);
                assert_eq!(ran.out, without.out, "{case} {options:?} {}", ran.err);
            }
            let expected = [
                "rdmsr 0x8b 0x5",
                "wrmsr 0x8b done",
                "rdmsr 0x174 0x11",
                "wrmsr 0x10a fault",
                "wrmsr 0x175 done",
                "wrmsr 0x175 fault",
                "rdmsr 0x176 0x100",
                own(7),
                // What the VMM would see without a policy.
                own(8),
            ];
            for options in [
                &["-p", "policy.toml"][..],
                &["-p", "policy.toml", "--trace", "trace.jsonl", "--rip"],
            ] {
                let ran = Ran::of(&mut command(&folder, options, &program, action, kind)).code(0);
                assert_eq!(
                    ran.out.lines().collect::<Vec<_>>(),
                    expected,
                    "{case} {options:?} {}",
                    ran.err
                );
            }
            let folder = with_policy(HELD);
            let ran = Ran::of(&mut command(&folder, &["-p", "policy.toml"], &program, action, kind)).code(0);
            let lines: Vec<_> = ran.out.lines().collect();
            assert_eq!((lines[0], lines[8]), ("rdmsr 0x8b 0x5", own(8)), "{case} {}", ran.err);
            let folder = with_policy(denied);
            let ran = Ran::of(&mut command(&folder, &["-p", "policy.toml"], &program, action, kind)).code(0);
            let faults = ran.out.lines().filter(|line| line.ends_with("fault")).count();
            assert_eq!(
                (ran.out.lines().next(), faults),
                (Some(own(0)), 6),
                "{case} {}",
                ran.err
            );
        }
    }
}

#[test]
fn a_vmm_that_its_own_sandbox_kills_is_told_of_with_the_call_and_the_thread() {
    let Some(program) = vmm("sandbox", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(ANSWERS);
    for action in ["kill", "trap"] {
        let ran = Ran::of(&mut command(&folder, &["-p", "policy.toml"], &program, action, "wrong"));
        assert_eq!(ran.code, None, "{ran:?}");
        let ran = ran.says(&["the VMM's own seccomp sandbox killed it (SIGSYS)", "1 VM and 1 vCPU"]);
        // Where the log is to be read; a trap is the process's own.
        if action == "kill" && !ran.err.contains("the kernel's audit log says") {
            ran.says(&["thread `vcpu0` made system call 16 (ioctl)"]);
        }
    }
}
