//! `capture`: a VMM gets what it gets without, and the lines say what that was.

use super::*;

/// What `filters` asks KVM for: call, VM, and what the VMM prints that it got.
const CALLS: [(&str, Option<u64>, &str); 19] = [
    ("KVM_CREATE_VM", Some(1), "vm done"),
    ("KVM_CREATE_VM", None, "vm of no type EINVAL"),
    ("KVM_CREATE_VM", Some(2), "second vm done"),
    ("KVM_CREATE_VCPU", Some(1), "vcpu done"),
    ("KVM_CREATE_VCPU", Some(1), "the same vcpu EEXIST"),
    ("KVM_ENABLE_CAP", Some(1), "mask done"),
    ("KVM_ENABLE_CAP", Some(1), "mask of bits that are none EINVAL"),
    ("KVM_ENABLE_CAP", Some(1), "mask nowhere EFAULT"),
    ("", None, "another capability done"),
    (FILTER, Some(1), "filter done"),
    (FILTER, Some(1), "filter of flags EINVAL"),
    (FILTER, Some(1), "range of flags EINVAL"),
    (FILTER, Some(1), "range too long EINVAL"),
    (FILTER, Some(1), "range of no direction EINVAL"),
    (FILTER, Some(1), "bitmap nowhere EFAULT"),
    (FILTER, Some(1), "filter nowhere EFAULT"),
    (FILTER, Some(1), "deny without ranges EINVAL"),
    (FILTER, Some(2), "another thread's done"),
    (FILTER, Some(1), "a copy's done"),
];

const FILTER: &str = "KVM_X86_SET_MSR_FILTER";

fn capture(folder: &Folder, program: &Path, arguments: &[&str]) -> Command {
    let mut command = folder.command(&["capture", "-o", "c.jsonl", "--"]);
    command.arg(program).args(arguments);
    command
}

fn captured(folder: &Folder) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.path().join("c.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_call_is_told_with_what_the_vmm_got_however_it_is_built() {
    for way in Way::IN_C {
        let Some(program) = vmm("filters", way) else { continue };
        let folder = Folder::new();
        let without = bare(&folder, &program, &[]).code(7);
        let ran = Ran::of(&mut capture(&folder, &program, &[])).code(7);
        assert_eq!(ran.out, without.out, "{way:?} {}", ran.err);
        assert!(ran.err.lines().all(|line| line.contains("no_new_privs")), "{}", ran.err);

        let lines = captured(&folder);
        let expected: Vec<_> = CALLS.iter().filter(|(call, ..)| !call.is_empty()).collect();
        assert_eq!(lines.len(), expected.len(), "{way:?} {lines:#?}");
        for (line, (call, vm, got)) in lines.iter().zip(expected) {
            assert!(without.out.lines().any(|line| line == *got), "{got}");
            assert_eq!(
                (text(line, "call"), line["vm"].as_u64()),
                (*call, *vm),
                "{way:?} {got} {line}"
            );
            match got.rsplit_once(' ').unwrap().1 {
                "done" => assert!(
                    line["result"].as_i64() >= Some(0) && line["errno"].is_null(),
                    "{got} {line}"
                ),
                errno => assert_eq!(
                    (line["result"].as_i64(), text(line, "errno")),
                    (Some(-1), errno),
                    "{got}"
                ),
            }
            let is_main = line["tid"] == line["pid"];
            assert_eq!(is_main, !got.starts_with("another thread's"), "{line}");
        }
        let mask = lines.iter().find(|line| line["mask"] == 6).unwrap();
        assert_eq!(mask["reasons"], serde_json::json!(["unknown", "filter"]));

        // The last one is in force, and each other can be had by its line.
        let last = folder.run(&["decompile", "c.jsonl"]).code(0);
        last.shows(&["default = \"deny\"", "msr   = \"@sysenter\"\nread  = \"allow\""])
            .says(&["of line 18 (VM 1); others that the kernel took are in line 9 (VM 1), line 17 (VM 2)"]);
        let file = std::fs::read_to_string(folder.path().join("c.jsonl")).unwrap();
        for line in file.lines().filter(|line| line.contains(FILTER)) {
            let refused = serde_json::from_str::<Value>(line).unwrap()["errno"].is_string();
            let ran = folder.run_with(&["decompile", "-"], line);
            ran.code(if refused { 2 } else { 0 });
        }
    }
}

/// A guest runs as it does without, whatever the VMM's threads may do.
#[test]
fn sandboxed_vmms_run_as_they_do_without() {
    for way in [Way::Dynamic, Way::Static, Way::Musl] {
        let Some(program) = vmm("sandbox", way) else { continue };
        for kind in ["early", "vcpu", "whole", "caps"] {
            let folder = Folder::new();
            let arguments = ["kill", kind, "r:0x8b", "w:0x8b=7", "r:0x277", "r:0xdeadbeef"];
            let without = bare(&folder, &program, &arguments).code(0);
            let ran = Ran::of(&mut capture(&folder, &program, &arguments)).code(0);
            assert_eq!(ran.out, without.out, "{way:?} {kind} {}", ran.err);
            let lines = captured(&folder);
            let calls: Vec<&str> = lines.iter().map(|line| text(line, "call")).collect();
            let made = ["KVM_CREATE_VM", "KVM_CREATE_VCPU"];
            let expected = match kind {
                "caps" => [&made[..], &["KVM_ENABLE_CAP", FILTER, "KVM_GET_MSRS"]].concat(),
                "early" => [&made[..], &["KVM_ENABLE_CAP", "KVM_GET_MSRS"]].concat(),
                _ => [&made[..], &["KVM_GET_MSRS"]].concat(),
            };
            assert_eq!(calls, expected, "{way:?} {kind}");
            let get = lines.last().unwrap();
            let entry = &list(get, "msrs")[0];
            assert_eq!(
                (text(entry, "msr"), get["vm"].as_u64(), get["vcpu"].as_u64()),
                ("0x8b", Some(1), Some(0)),
                "{get}"
            );
            // The VMM prints what it got.
            if get["result"] == 1 {
                let got = format!("vmm 0x8b {}", text(entry, "value"));
                assert!(ran.out.lines().any(|line| line == got), "{got}: {}", ran.out);
            }
            // To make a call in a sandbox takes rights; without them the kernel makes it unseen.
            let unseen = lines.iter().any(|line| line["result"].is_null());
            assert_eq!(
                unseen,
                ran.err.contains("what the kernel gives is not seen"),
                "{}",
                ran.err
            );
            assert!(!unseen || !nix::unistd::geteuid().is_root(), "{}", ran.err);
        }
    }
}

#[test]
fn without_rights_a_sandboxed_vmms_calls_are_told_without_their_results() {
    if !users::is_root() {
        return;
    }
    let Some(program) = vmm("sandbox", Way::Dynamic) else {
        return;
    };
    let folder = users::open_to_all("", &program);
    let arguments = ["kill", "caps", "r:0x277", "r:0xdeadbeef"];
    let without = bare(&folder, &program, &arguments).code(0);
    let ran = users::as_nobody(&folder, "capture", &[], &arguments).code(0);
    assert_eq!(ran.out, without.out, "{}", ran.err);
    let lines: Vec<Value> = ran
        .err
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(text(&lines[0], "call"), "KVM_CREATE_VM");
    assert!(lines[0]["result"].is_number(), "{}", ran.err);
    let filter = lines.iter().find(|line| line["call"] == FILTER).unwrap();
    assert!(filter["result"].is_null() && filter["errno"].is_null(), "{filter}");
    assert_eq!(list(filter, "ranges").len(), 1);
    let said = ran
        .err
        .matches("what the kernel gives is not seen: its thread has a seccomp sandbox");
    assert_eq!(said.count(), 1, "{}", ran.err);
    folder
        .run_with(&["decompile", "-"], &filter.to_string())
        .code(0)
        .shows(&["read  = \"deny\""]);
}

#[test]
fn lines_that_cannot_be_written_change_nothing_and_are_told_once() {
    let Some(program) = vmm("filters", Way::Dynamic) else {
        return;
    };
    let folder = Folder::new();
    let without = bare(&folder, &program, &[]).code(7);
    let mut command = folder.command(&["capture", "-o", "/dev/full", "--"]);
    let ran = Ran::of(command.arg(&program)).code(7);
    assert_eq!(ran.out, without.out, "{}", ran.err);
    let told = ran
        .err
        .matches("the calls from here on are missing, since they cannot be written");
    assert_eq!(told.count(), 1, "{}", ran.err);
}

#[test]
fn what_lets_calls_wait_already_is_told() {
    let Some(program) = vmm("filters", Way::Dynamic) else {
        return;
    };
    let folder = Folder::new();
    let msrgate = crate::command::program();
    let inner = ["capture", "--", program.to_str().unwrap()];
    let ran = Ran::of(&mut capture(&folder, &msrgate, &inner)).code(3);
    ran.says(&["another supervisor lets calls wait here already"]);
}

/// What the VMM prints is what it prints without, with the same exit code.
#[track_caller]
fn changes_nothing(program: &Path, arguments: &[&str]) -> (Folder, Ran) {
    // Some leave files behind.
    let without = bare(&Folder::new(), program, arguments);
    let folder = Folder::new();
    let ran = Ran::of(&mut capture(&folder, program, arguments));
    assert_eq!(ran.out, without.out, "{program:?} {arguments:?} {}", ran.err);
    assert_eq!(ran.code, without.code, "{program:?} {arguments:?} {}", ran.err);
    (folder, ran)
}

#[test]
fn random_filters_get_what_they_get_without_and_are_read_as_the_kernel_took_them() {
    for way in [Way::Dynamic, Way::Static] {
        let Some(program) = vmm("fuzz", way) else { continue };
        for seed in ["1", "2", "3"] {
            changes_nothing(&program, &[seed, "1000"]);
        }
        let (folder, _) = changes_nothing(&program, &["4", "100"]);
        let mut taken = 0;
        for line in captured(&folder).iter().filter(|line| line["call"] == FILTER) {
            let ran = folder.run_with(&["decompile", "-"], &line.to_string());
            let took = line["result"] == 0;
            taken += i32::from(took);
            assert_eq!(ran.code, Some(if took { 0 } else { 2 }), "{line} {}", ran.err);
        }
        assert!(taken > 5, "{taken}");
    }
}

#[test]
fn a_vm_has_its_number_in_whichever_process_and_by_whichever_descriptor() {
    let Some(program) = vmm("handed", Way::Dynamic) else {
        return;
    };
    for how in [
        "scm",
        "pidfd",
        "exec",
        "vfork",
        "before-setuid",
        "before-undumpable",
        "before-chroot",
    ] {
        if how.starts_with("before") && !users::is_root() {
            continue;
        }
        let (folder, ran) = changes_nothing(&program, &[how]);
        let lines = captured(&folder);
        let made = |line: &&Value| line["call"] == "KVM_CREATE_VM";
        let vms: Vec<u64> = lines.iter().filter(made).map(|line| count(line, "vm")).collect();
        assert_eq!(vms, (1..=vms.len() as u64).collect::<Vec<_>>(), "{how}");
        assert!(
            lines.iter().all(|line| line["vm"].is_number()),
            "{how} {lines:#?} {}",
            ran.err
        );
    }
}

#[test]
fn calls_of_32_bits_and_of_other_instructions_are_left_to_the_kernel() {
    let Some(program) = vmm("past", Way::Dynamic) else {
        return;
    };
    let (folder, ran) = changes_nothing(&program, &["int80"]);
    // A kernel may have no such calls.
    for line in captured(&folder) {
        assert!(line["result"].is_null(), "{line}");
        assert!(ran.err.contains("32-bit system calls"), "{}", ran.err);
    }
    for how in ["raw", "syscall", "libc"] {
        let (folder, _) = changes_nothing(&program, &[how]);
        let filters = captured(&folder).into_iter().filter(|line| line["call"] == FILTER);
        assert_eq!(filters.filter(|line| line["result"] == 0).count(), 7, "{how}");
        let sets: Vec<Value> = captured(&folder)
            .into_iter()
            .filter(|line| line["call"] == "KVM_SET_MSRS")
            .collect();
        assert_eq!(sets.len(), 7, "{how}");
        for set in sets {
            let entry = serde_json::json!({ "msr": "0x8b", "name": "IA32_BIOS_SIGN_ID", "value": "0x5555" });
            assert_eq!(
                (&set["msrs"], &set["vcpu"]),
                (&serde_json::json!([entry]), &0.into()),
                "{how} {set}"
            );
        }
    }
}
