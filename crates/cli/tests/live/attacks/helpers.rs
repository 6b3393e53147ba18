//! What a VMM starts gets nothing of msrgate's, and cannot change what its VMs are under.

use super::*;

/// What the helper says of its descriptors, of memory that it shares, and of what it gets on the VMM's VM.
fn inherited(ran: &Ran) -> Vec<&str> {
    let starts = ["fd ", "shared ", "KVM_RUN ", "mask ", "filter "];
    let lines = ran.out.lines();
    let mut lines: Vec<&str> = lines
        .filter(|line| starts.iter().any(|start| line.starts_with(start)))
        .collect();
    // Where the kernel maps something is its own choice.
    lines.sort_unstable();
    lines
}

#[test]
fn a_helper_inherits_nothing_and_cannot_change_what_the_vmms_guests_get() {
    for way in [Way::Dynamic, Way::Static, Way::Inline] {
        let Some(program) = vmm("helper", way) else { continue };
        let folder = with_policy(ANSWERS);
        for options in [
            &["-p", "policy.toml"][..],
            &["-p", "policy.toml", "--trace", "trace.jsonl"],
            &["--learn", "--trace", "trace.jsonl"],
        ] {
            for how in ["fork", "exec"] {
                let without = bare(&folder, &program, &[how]).code(0);
                let ran = Ran::of(&mut under(&folder, options, &program, &[how])).code(0);
                assert_eq!(inherited(&ran), inherited(&without), "{way:?} {options:?} {how}");
            }
        }
        let ran = Ran::of(&mut under(&folder, &["-p", "policy.toml"], &program, &["fork"])).code(0);
        let guests = ran
            .out
            .lines()
            .filter(|line| line.starts_with("vmm ") || line.starts_with("helper "));
        let expected = [
            "vmm rdmsr 0x8b 0x5",
            "vmm wrmsr 0x175 done",
            "vmm rdmsr 0x174 0x11",
            "helper rdmsr 0x8b 0x5",
            "helper rdmsr 0x174 0x11",
            "helper wrmsr 0x10a fault",
            "vmm rdmsr 0x8b 0x5",
            "vmm rdmsr 0x174 0x11",
            "vmm wrmsr 0x175 fault",
        ];
        assert_eq!(guests.collect::<Vec<_>>(), expected, "{way:?} {}", ran.err);
    }
}
