//! `verify` on this machine's KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

use std::fs;

use msrgate_suite::{Checked, Engine, Process, Step, check, parse};
use serde_json::Value;

use crate::command::{Folder, POLICIES, Terminal, count, fits_any_terminal, list, text};
use crate::kvm::{kvm_opens, without_permission};

const MODES: [&str; 2] = ["real", "long"];

/// The report of a run that compared everything and found no disagreement.
fn agrees(folder: &Folder, arguments: &[&str]) -> Value {
    without_disagreement(folder, arguments, 0)
}

fn without_disagreement(folder: &Folder, arguments: &[&str], code: i32) -> Value {
    let ran = folder.run(&[&["verify", "--json"], arguments].concat()).code(code);
    let report = ran.json();
    assert_eq!(list(&report, "disagreements").len(), 0, "{report:#}");
    assert_eq!(report["backend"], "kvm");
    report
}

#[test]
fn random_calls_come_to_the_same_on_the_kernel_and_on_the_engine() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    for mode in MODES {
        let report = agrees(&folder, &["--random", "300", "--seed", "1", "--mode", mode]);
        assert_eq!((count(&report, "seed"), count(&report, "candidates")), (1, 300));
        assert!(count(&report, "errnos") > 300, "{report:#}");
        assert!(count(&report, "filters") > 30, "{report:#}");
        assert!(count(&report, "accesses") > 2000, "{report:#}");
        assert_eq!(report["mode"], mode);
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
        assert!(text(&report, "kernel").starts_with(release.trim()), "{report:#}");
    }
}

#[test]
fn what_was_compared_fits_any_terminal() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    for line in [
        "verify --random 20 --seed 1",
        "verify --interception",
        "verify policies/qemu.toml",
    ] {
        let arguments: Vec<&str> = line.split(' ').collect();
        fits_any_terminal(|| folder.command(&arguments), Terminal::Output);
    }
}

#[test]
fn a_seed_gives_the_same_run_again_and_one_is_printed_where_none_is_given() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let ran = folder
        .run(&["verify", "--json", "--random", "120", "--accesses", "5"])
        .code(0);
    let first = ran.json();
    let seed = count(&first, "seed").to_string();
    // Told before the run, which may not come to its end.
    let ran = ran.says(&[&format!("seed {seed}")]);
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    let again = agrees(&folder, &["--random", "120", "--accesses", "5", "--seed", &seed]);
    assert_eq!(first, again);
    // Two that are not as good as each other by chance: what is accepted is the same on every kernel.
    let filters = |seed| {
        count(
            &agrees(&folder, &["--random", "120", "--accesses", "5", "--seed", seed]),
            "filters",
        )
    };
    assert_ne!(filters("1"), filters("2"));
}

#[test]
fn another_kernels_behaviour_is_told_apart_and_shrunk_to_a_case_that_the_suite_takes() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    // That old kernel takes unknown bits in flags and mask.
    let arguments = ["verify", "--random", "500", "--seed", "1", "--profile", "5.18"];
    let ran = folder.run(&[&arguments[..], &["--json"]].concat()).code(1);
    let report = ran.json();
    assert_eq!(report["profile"], "5.18");
    let found = list(&report, "disagreements");
    assert!(!found.is_empty());
    for one in found {
        assert_eq!((text(one, "live"), text(one, "engine")), ("EINVAL", "ok"), "{report:#}");
        let cases = parse(text(one, "case")).expect("a case");
        let [case] = cases.as_slice() else {
            panic!("{report:#}");
        };
        // One call and no range: all else does not matter.
        assert!(matches!(case.steps.as_slice(), [Step::Call(_)]), "{report:#}");
        assert!(!text(one, "case").contains("ranges"), "{report:#}");
        // It says what the kernel did, as the engine does too where it takes after this one.
        assert_eq!(check(case, Process::Native, &Engine::VM_EXIT), Checked::Passed);
    }
    folder
        .run(&arguments)
        .code(1)
        .shows(&["disagreement at the last call, candidate ", "[[case]]", "seed 1, "]);
}

#[test]
fn each_policy_does_on_the_kernel_what_its_plan_does_on_the_engine() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let policies: Vec<String> = POLICIES.iter().map(|(name, _)| format!("policies/{name}")).collect();
    let policies: Vec<&str> = policies.iter().map(String::as_str).collect();
    for mode in MODES {
        // Some ask the physical CPU, which needs a module.
        let code = if host_msrs() { 0 } else { 3 };
        let arguments = [&policies[..], &["--cpuid", "host", "--mode", mode]].concat();
        let report = without_disagreement(&folder, &arguments, code);
        let skipped = list(&report, "skipped");
        let filters = count(&report, "filters") as usize;
        assert_eq!(filters + skipped.len(), policies.len(), "{report:#}");
        assert!(filters >= 10 && count(&report, "accesses") > 5000, "{report:#}");
        assert_eq!(skipped.is_empty(), code == 0, "{report:#}");
        for line in skipped {
            let line = line.as_str().unwrap_or_default();
            assert!(line.contains("/dev/cpu/") && line.contains("modprobe msr"), "{line}");
        }
    }
}

/// Whether the registers of the physical CPU can be read.
fn host_msrs() -> bool {
    fs::File::open("/dev/cpu/0/msr").is_ok()
}

#[test]
fn a_policy_that_cannot_be_put_in_force_here_ends_with_3_and_is_not_called_an_agreement() {
    if !kvm_opens() {
        return;
    }
    if host_msrs() {
        println!("skipped: /dev/cpu/0/msr opens");
        return;
    }
    let folder = Folder::new();
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x17\nread = \"host\"\nwrite = \"deny\"\n",
    );
    let ran = folder.run(&["verify", "policy.toml"]).code(3);
    let ran = ran.shows(&["skipped: policy.toml: /dev/cpu/0/msr", "nothing compared"]);
    assert!(!ran.out.contains("no disagreement"), "{}", ran.out);
}

#[test]
fn full_tries_every_msr_of_the_ranges() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x10000000..=0x100001ff\"\nread = { shadow = 5 }\nwrite = \"shadow\"\n",
    );
    let boundaries = agrees(&folder, &["policy.toml"]);
    let full = agrees(&folder, &["policy.toml", "--full"]);
    // Two of the 512 are ends of the range; each is read, written, and read again.
    assert_eq!(count(&full, "accesses"), count(&boundaries, "accesses") + (512 - 2) * 3);
}

#[test]
fn a_bypass_is_named_where_there_is_one_and_only_for_writes_of_tsc_deadline() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = [0x6df, 0x6e0, 0x6e1]\nread = \"deny\"\nwrite = \"deny\"\n",
    );
    let report = agrees(&folder, &["policy.toml"]);
    let known = list(&report, "known");
    for one in known {
        assert_eq!(
            (text(one, "kind"), text(one, "msr"), text(one, "op")),
            ("bypass", "0x6e0", "wrmsr")
        );
    }
    let kernel = text(&report, "kernel");
    let timer = fs::read_to_string("/sys/module/kvm_intel/parameters/preemption_timer").unwrap_or_default();
    if kernel.ends_with("kvm_intel") && timer.trim() == "Y" {
        assert_eq!(known.len(), 1, "{report:#}");
    }
    // Up to 6.17, AMD asks the filter.
    if kernel.ends_with("kvm_amd") && text(&report, "profile") != "6.18" {
        assert!(known.is_empty(), "{report:#}");
    }
}

#[test]
fn msrs_that_the_hardware_passes_through_are_those_of_the_engines_bitmap() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    for mode in MODES {
        let module = |name: &str| fs::exists(format!("/sys/module/{name}")).is_ok_and(|there| there);
        if !module("kvm_intel") && !module("kvm_amd") {
            let ran = folder.run(&["verify", "--interception", "--mode", mode]).code(3);
            let ran = ran.shows(&["skipped: ", " has no bitmap", "nothing compared"]);
            assert!(!ran.out.contains("no disagreement"), "{}", ran.out);
            println!("skipped: KVM has no bitmap here");
            continue;
        }
        let report = agrees(&folder, &["--interception", "--mode", mode]);
        let rows = list(&report, "interception");
        let passed = rows
            .iter()
            .filter(|row| text(row, "bitmap") == "passed, intercepted, passed");
        assert!(passed.clone().count() >= 12, "{report:#}");
        for row in passed {
            assert!(count(row, "before") < 20 && count(row, "after") < 20, "{row}");
            assert_eq!(count(row, "user"), 200, "{row}");
        }
    }
}

#[test]
fn while_filters_are_swapped_an_msr_shows_one_of_the_two_and_nothing_else() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    for mode in MODES {
        // In no time: what is asked for is done however slow the machine.
        let report = agrees(&folder, &["--swap", "0", "--mode", mode]);
        assert!(count(&report, "filters") > 50, "{report:#}");
        for row in list(&report, "swapped") {
            assert_eq!(count(row, "neither"), 0, "{row}");
            let (denied, allowed) = (count(row, "denied"), count(row, "allowed"));
            assert!(denied + allowed > 0, "{row}");
            match text(row, "filters") {
                "deny, deny" => assert_eq!(allowed, 0, "{row}"),
                "allow, allow" => assert_eq!(denied, 0, "{row}"),
                _ => {}
            }
        }
    }
}

#[test]
fn verify_needs_to_be_told_one_thing_to_do() {
    let folder = Folder::furnished();
    for arguments in [
        &["verify"][..],
        &["verify", "--random", "5", "policies/qemu.toml"],
        &["verify", "--swap", "1", "--interception"],
        &["verify", "--seed", "1", "policies/qemu.toml"],
        &["verify", "--full", "--random", "1"],
        &["verify", "--random", "1", "--profile", "2.6"],
    ] {
        let ran = folder.run(arguments).code(2);
        assert!(ran.out.is_empty() && !ran.err.is_empty(), "{arguments:?}");
    }
}

#[test]
fn without_permission_verify_says_so_and_ends_with_3() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let Some(run) = without_permission(&folder) else { return };
    run(&["verify", "--random", "1"])
        .code(3)
        .says(&["this user may not open"]);
}
