//! `run` on this machine's KVM, with a VMM that knows nothing of msrgate. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.

mod command;
mod live;
#[path = "../../../examples/small_vmm.rs"]
mod small_vmm;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command::{Folder, Ran, count, list, program, text};
use live::kvm_opens;
use serde_json::Value;

/// Has this test's own program be the VMM: the value is the VMM's arguments.
const VMM: &str = "MSRGATE_TEST_VMM";
/// A VMM that goes into the background, and writes what it says into the file `out`.
const BACKGROUND: &str = "background ";
/// One that waits for the file `go`.
const LATER: &str = "later ";
/// One that starts another without an environment.
const STRIPPED: &str = "stripped ";
/// A VMM that runs nothing.
const DESCRIPTORS: &str = "descriptors";

#[path = "descriptors/mod.rs"]
mod descriptors;

#[test]
fn vmm() {
    let Ok(mut arguments) = std::env::var(VMM) else { return };
    if let Some(rest) = arguments.strip_prefix(BACKGROUND) {
        let out = fs::File::create("out").unwrap();
        let mut later = bare(&format!("{LATER}{rest}"));
        later.stdin(Stdio::null()).stderr(out.try_clone().unwrap()).stdout(out);
        later.spawn().unwrap();
        std::process::exit(3);
    }
    if let Some(rest) = arguments.strip_prefix(STRIPPED) {
        let status = bare(rest).env_clear().env(VMM, rest).status().unwrap();
        std::process::exit(status.code().unwrap_or(8));
    }
    if let Some(rest) = arguments.strip_prefix(LATER) {
        wait_until(|| fs::exists("go").unwrap());
        arguments = rest.to_owned();
    }
    if arguments == DESCRIPTORS {
        descriptors::close_in_every_way();
        std::process::exit(0);
    }
    let result = small_vmm::main_with(arguments.split(' ').map(str::to_owned));
    if let Err(error) = result {
        eprintln!("small_vmm: {error}");
        std::process::exit(9);
    }
    std::process::exit(0);
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ready() -> bool {
    let beside = program().with_file_name("deps").join("libmsrgate_preload.so");
    let named = std::env::var_os("MSRGATE_PRELOAD").is_some();
    // A lane brings what it was told to.
    if std::env::var_os("MSRGATE_LANE").is_some() && !named && !beside.exists() {
        println!("skipped: the lane has no {}", beside.display());
        return false;
    }
    kvm_opens()
}

/// The VMM by itself. With one thread the test runner would put its name before the first line.
fn bare(vmm: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "vmm", "--nocapture", "--test-threads=2"])
        .env(VMM, vmm);
    command
}

/// The VMM under `run`.
fn under(folder: &Folder, options: &[&str], vmm: &str) -> Ran {
    let mut command = folder.command(&["run"]);
    let this = bare(vmm);
    command
        .args(options)
        .arg("--")
        .arg(this.get_program())
        .args(this.get_args());
    Ran::of(command.env(VMM, vmm))
}

/// What the guests saw.
fn seen(ran: &Ran) -> Vec<&str> {
    let lines = ran.out.lines();
    lines
        .filter(|line| ["rdmsr", "wrmsr", "vmm "].iter().any(|start| line.starts_with(start)))
        .collect()
}

fn with_policy(text: &str) -> Folder {
    let folder = Folder::furnished();
    folder.write("policy.toml", format!("version = 1\nname = \"test\"\n{text}"));
    folder
}

/// The summary of `--json`.
fn summary(ran: &Ran) -> Value {
    let last = ran.err.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {}", ran.err))
}

const MICROCODE: &[&str] = &["-p", "policies/fixed-microcode.toml"];

#[test]
fn a_guest_sees_what_the_policy_says_and_the_kernels_own_for_the_rest() {
    if !ready() {
        return;
    }
    let accesses = "r:0x8b w:0x8b=7 r:0x8b w:0x174=8 r:0x174 r:0xdeadbeef";
    let without = Ran::of(&mut bare(accesses)).code(0);
    assert_ne!(seen(&without)[0], "rdmsr 0x8b 0x100000000000000");
    let ran = under(&Folder::furnished(), MICROCODE, accesses).code(0);
    let expected = [
        "rdmsr 0x8b 0x100000000000000",
        "wrmsr 0x8b done",
        "rdmsr 0x8b 0x100000000000000",
        "wrmsr 0x174 done",
        "rdmsr 0x174 0x8",
        "rdmsr 0xdeadbeef fault",
    ];
    assert_eq!(seen(&ran), expected);
}

#[test]
fn a_vmms_own_filter_and_handlers_go_on_and_no_other_exit_reaches_it() {
    if !ready() {
        return;
    }
    let options = ["-p", "policies/fixed-microcode.toml", "--ignore-unknown"];
    // It would panic on an exit of another MSR or reason.
    let ran = under(
        &Folder::furnished(),
        &options,
        "--filter --vcpus 3 r:0x35 r:0x8b r:0xdeadbeef w:0xdeadbeef=1 w:0x10a=1",
    )
    .code(0);
    let each = [
        "rdmsr 0x35 0x20004",
        "rdmsr 0x8b 0x100000000000000",
        "rdmsr 0xdeadbeef 0x0",
        "wrmsr 0xdeadbeef done",
    ];
    for vcpu in seen(&ran).chunks(5) {
        assert_eq!(vcpu[..4], each);
    }
    assert_eq!(seen(&ran).len(), 15);
}

#[test]
fn actions_with_a_memory_keep_it_for_each_vcpu() {
    if !ready() {
        return;
    }
    let folder = with_policy(
        r#"default = "deny"
[[rule]]
msr = "0x174"
read = { shadow = "0x11" }
write = "shadow"
[[rule]]
msr = "0x175"
read = "allow"
write = { once = true }
[[rule]]
msr = "0x176"
read = { mask = { keep = "0xff", set = "0x100" } }
write = { only = ["0x33"] }
"#,
    );
    let accesses =
        "--vcpus 2 r:0x174 w:0x174=5 r:0x174 w:0x175=6 w:0x175=7 r:0x175 w:0x176=0x33 w:0x176=0x34 r:0x176 r:0x10";
    let ran = under(&folder, &["-p", "policy.toml"], accesses).code(0);
    let each = [
        "rdmsr 0x174 0x11",
        "wrmsr 0x174 done",
        "rdmsr 0x174 0x5",
        "wrmsr 0x175 done",
        "wrmsr 0x175 fault",
        "rdmsr 0x175 0x6",
        "wrmsr 0x176 done",
        "wrmsr 0x176 fault",
        "rdmsr 0x176 0x133",
        "rdmsr 0x10 fault",
    ];
    assert_eq!(seen(&ran), [each, each].concat());
}

#[test]
fn unknown_msrs_are_ignored_for_this_vm_alone_and_named_in_the_summary() {
    if !ready() {
        return;
    }
    let parameter = || fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs").ok();
    let before = parameter();
    let accesses = "r:0xdeadbeef w:0xdeadbeef=1 r:0xdeadbeef r:0x10b0";
    let without = Ran::of(&mut bare(accesses)).code(0);
    if before.as_deref() != Some("Y\n") {
        assert!(seen(&without).iter().all(|line| line.ends_with("fault")), "{without:?}");
    }
    let ran = under(&Folder::furnished(), &["--ignore-unknown", "--json"], accesses).code(0);
    let expected = [
        "rdmsr 0xdeadbeef 0x0",
        "wrmsr 0xdeadbeef done",
        "rdmsr 0xdeadbeef 0x0",
        "rdmsr 0x10b0 0x0",
    ];
    assert_eq!(seen(&ran), expected);
    assert_eq!(parameter(), before);
    let summary = summary(&ran);
    let rows: Vec<_> = list(&summary, "by_msr")
        .iter()
        .map(|row| {
            (
                text(row, "msr"),
                text(row, "op"),
                count(row, "count"),
                text(row, "reason"),
                text(row, "did"),
            )
        })
        .collect();
    let expected = [
        ("0x10b0", "rdmsr", 1, "unknown", "zero"),
        ("0xdeadbeef", "rdmsr", 2, "unknown", "zero"),
        ("0xdeadbeef", "wrmsr", 1, "unknown", "ignore"),
    ];
    assert_eq!(rows, expected);
    assert_eq!((count(&summary, "vms"), count(&summary, "vcpus")), (1, 1));
}

#[test]
fn the_summary_says_what_each_msr_cost_and_all_together() {
    if !ready() {
        return;
    }
    let accesses = "--vcpus 2 r:0x174 r:0x174 w:0x174=1 r:0x8b";
    let folder = with_policy("default = \"allow\"\n[[rule]]\nmsr = \"0x174\"\nread = \"zero\"\nwrite = \"ignore\"\n");
    let ran = under(&folder, &["-p", "policy.toml", "--json"], accesses).code(0);
    let summary = summary(&ran);
    let costs: Vec<u64> = list(&summary, "by_msr")
        .iter()
        .map(|row| count(row, "cost_ns"))
        .collect();
    assert!(
        costs.len() == 2 && costs.iter().all(|cost| (1..1_000_000_000).contains(cost)),
        "{summary:#}"
    );
    // Each row is rounded down to whole nanoseconds.
    assert!(
        count(&summary, "cost_ns").abs_diff(costs.iter().sum()) < 2,
        "{summary:#}"
    );
    let ran = under(&folder, &["-p", "policy.toml"], accesses).code(0);
    ran.says(&["1 VM and 2 vCPUs, 6 accesses answered in ", " each "]);
}

#[test]
fn a_fixed_answer_that_the_kernel_holds_makes_no_exit_and_outlasts_what_the_vmm_puts_there() {
    if !ready() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = "--vcpus 2 --set 0x8b=7 --set 0x174=8 r:0x8b r:0x174";
    let each = [
        "rdmsr 0x8b 0x100000000000000",
        "rdmsr 0x174 0x8",
        // What the VMM would see without a policy.
        "vmm 0x8b 0x7",
        "vmm 0x174 0x8",
    ];
    let ran = under(&folder, &[MICROCODE, &["--json"]].concat(), accesses).code(0);
    assert_eq!(seen(&ran), [each, each].concat());
    let told = summary(&ran);
    assert!(list(&told, "by_msr").is_empty(), "{told:#}");
    let presets = list(&told, "presets");
    assert_eq!(
        (presets.len(), text(&presets[0], "msr"), text(&presets[0], "value")),
        (1, "0x8b", "0x100000000000000")
    );
    let ran = under(&folder, MICROCODE, accesses).code(0);
    ran.says(&[
        "no access answered",
        "the kernel holds the policy's fixed answers of 0x8b",
    ]);

    // What is to be written down makes an exit.
    let options = [MICROCODE, &["--json", "--trace", "trace.jsonl"]].concat();
    let ran = under(&folder, &options, accesses).code(0);
    assert_eq!(seen(&ran), [each, each].concat());
    let told = summary(&ran);
    assert!(list(&told, "presets").is_empty(), "{told:#}");
    assert_eq!(count(&list(&told, "by_msr")[0], "count"), 2);
}

/// What a guest of this maker's processor gets.
const BY_VENDOR: &str = r#"default = "allow"
[[rule]]
msr = "0x8b"
read = { value = "0x11" }
write = "ignore"
when = { vendor = "intel" }
[[rule]]
msr = "0x8b"
read = { value = "0x22" }
write = "ignore"
when = { vendor = "amd" }
"#;

#[test]
fn a_policy_that_depends_on_the_cpuid_is_the_one_for_what_the_vmm_sets() {
    if !ready() {
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
    let trace = fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    assert_eq!(trace.lines().count(), 3, "{trace}");
}

#[test]
fn vcpus_that_the_policy_would_treat_otherwise_and_those_without_a_cpuid_do_not_run() {
    if !ready() {
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

#[test]
fn a_vmm_in_the_background_gets_the_policy_for_its_cpuid_and_its_trace_is_written_to_the_end() {
    if !ready() {
        return;
    }
    let folder = with_policy(BY_VENDOR);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--json"];
    let ran = under(&folder, &options, "background --vendors amd r:0x8b w:0x8b=1").code(3);
    let told = summary(&ran);
    assert_eq!((&told["background"], count(&told, "vms")), (&Value::Bool(true), 0));
    folder.write("go", "");
    let trace = || fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    wait_until(|| trace().lines().count() == 3);
    let out = || fs::read_to_string(folder.path().join("out")).unwrap();
    wait_until(|| out().contains("rdmsr 0x8b 0x22\nwrmsr 0x8b done\n"));
}

#[test]
fn a_vmm_that_was_started_without_the_library_gets_no_vm() {
    if !ready() {
        return;
    }
    if !nix::unistd::Uid::current().is_root() {
        println!("skipped: the kernel gives no listener to who is not root");
        return;
    }
    let accesses = "stripped r:0x8b";
    assert_eq!(seen(&Ran::of(&mut bare(accesses)).code(0)).len(), 1);
    let ran = under(&Folder::furnished(), &[MICROCODE, &["--json"]].concat(), accesses).code(9);
    assert_eq!(seen(&ran), Vec::<&str>::new());
    let told = summary(&ran);
    assert_eq!((count(&told, "vms"), count(&told, "refused")), (0, 1));
    ran.says(&["msrgate: no VM is made by `/", "it has not loaded the policy's library"]);
}

#[test]
fn a_descriptor_that_is_closed_in_any_way_is_no_longer_the_vms() {
    if !ready() {
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

#[test]
fn a_trace_has_each_access_that_the_policy_decides() {
    if !ready() {
        return;
    }
    let folder = Folder::furnished();
    let options = ["-p", "policies/fixed-microcode.toml", "--trace", "trace.jsonl", "--rip"];
    under(&folder, &options, "--vcpus 2 r:0x8b w:0x8b=7 r:0x174").code(0);
    let file = fs::File::open(folder.path().join("trace.jsonl")).unwrap();
    let lines = msrgate_policy::trace::Lines::new(std::io::BufReader::new(file)).unwrap();
    assert!(lines.header().policy.is_some());
    let events: Vec<_> = lines.map(Result::unwrap).collect();
    for vcpu in 0..2 {
        let mut events = events.iter().filter(|event| event.vcpu == vcpu);
        let (read, write) = (events.next().unwrap(), events.next().unwrap());
        assert_eq!((read.msr.0, read.value, read.did.name()), (0x8b, 1 << 56, "value"));
        assert_eq!((write.msr.0, write.value, write.did.name()), (0x8b, 7, "ignore"));
        assert!(
            read.t <= write.t && read.rip < write.rip && read.rip.is_some(),
            "{read:?} {write:?}"
        );
        assert!(read.cost > Some(0) && write.cost > Some(0), "{read:?} {write:?}");
        assert!(events.next().is_none());
    }
}

#[test]
fn an_answered_exit_makes_no_system_call_and_waits_for_no_lock() {
    if !ready() {
        return;
    }
    let folder = with_policy(
        r#"default = "allow"
[[rule]]
msr = "0x8b"
read = { value = "0x5" }
write = "ignore"
log = "all"
[[rule]]
msr = "0x174"
read = { shadow = "0x11" }
write = "shadow"
[[rule]]
msr = "0x175"
read = "zero"
write = "deny"
log = "first"
"#,
    );
    // A system call kills this VMM, and so does a lock that another vCPU has: it would wait in one.
    let accesses = ["r:0x8b", "w:0x8b=7", "w:0x174=9", "r:0x174", "r:0x175", "w:0x175=1"];
    let accesses = format!("--filter --sandbox --vcpus 3 {}", accesses.repeat(20).join(" "));
    for options in [
        &["-p", "policy.toml"][..],
        &["-p", "policy.toml", "--trace", "trace.jsonl"],
    ] {
        let ran = under(&folder, options, &accesses).code(0);
        assert_eq!(seen(&ran).len(), 360);
        assert_eq!(seen(&ran)[3], "rdmsr 0x174 0x9");
    }
    // It is there: the guest's RIP takes one.
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--rip"];
    assert_eq!(under(&folder, &options, &accesses).code, None, "killed");
}

#[test]
fn more_events_than_a_ring_holds_are_lost_and_counted_or_written() {
    if !ready() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = vec!["r:0x8b"; 700].join(" ");
    let options = ["-p", "policies/fixed-microcode.toml", "--trace", "/dev/full", "--json"];
    let ran = under(&folder, &options, &accesses);
    // The header does not fit either, and that shows before a guest runs.
    assert_eq!(ran.code, Some(2), "{}", ran.err);

    let options = [
        "-p",
        "policies/fixed-microcode.toml",
        "--trace",
        "trace.jsonl",
        "--json",
    ];
    let ran = under(&folder, &options, &accesses).code(0);
    assert_eq!(seen(&ran).len(), 700);
    let written = fs::read_to_string(folder.path().join("trace.jsonl"))
        .unwrap()
        .lines()
        .count() as u64
        - 1;
    let summary = summary(&ran);
    assert_eq!(written + count(&summary["lost"], "events"), 700);
    assert_eq!(count(&list(&summary, "by_msr")[0], "count"), 700);
}

#[test]
fn learning_changes_nothing_and_tells_each_msr_and_direction_once() {
    if !ready() {
        return;
    }
    let folder = Folder::furnished();
    // The kernel ignores the write of 0x8b; passing it through as the host would set the revision.
    let accesses =
        "--filter --vcpus 2 r:0x8b w:0x8b=7 r:0x8b r:0x35 w:0x174=8 r:0x174 r:0x174 r:0xdeadbeef w:0xdeadbeef=1";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["--learn", "--trace", "trace.jsonl"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let trace = fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    let lines = msrgate_policy::trace::Lines::new(trace.as_bytes()).unwrap();
    let mut touched: Vec<_> = lines
        .map(Result::unwrap)
        .map(|event| (event.msr.0, event.op.name()))
        .collect();
    touched.sort_unstable();
    let expected = [
        (0x35, "rdmsr"),
        (0x8b, "rdmsr"),
        (0x8b, "wrmsr"),
        (0x174, "rdmsr"),
        (0x174, "wrmsr"),
        (0xdeadbeef, "rdmsr"),
        (0xdeadbeef, "wrmsr"),
    ];
    assert_eq!(touched, expected);
}

#[test]
fn learning_all_tells_every_access_and_says_that_it_is_not_faithful() {
    if !ready() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = "--filter w:0x174=8 r:0x174 r:0x174 r:0x35 r:0xdeadbeef";
    let ran = under(&folder, &["--learn=all", "--trace", "trace.jsonl"], accesses).code(0);
    let expected = [
        "wrmsr 0x174 done",
        "rdmsr 0x174 0x8",
        "rdmsr 0x174 0x8",
        "rdmsr 0x35 0x20004",
        "rdmsr 0xdeadbeef fault",
    ];
    assert_eq!(seen(&ran), expected);
    ran.says(&["not faithful"]);
    let trace = fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    let lines = msrgate_policy::trace::Lines::new(trace.as_bytes()).unwrap();
    assert!(
        lines
            .header()
            .mode
            .as_deref()
            .unwrap_or_default()
            .contains("not always")
    );
    let events: Vec<_> = lines
        .map(Result::unwrap)
        .map(|event| (event.msr.0, event.did.name()))
        .collect();
    let expected = [(0x174, "pass"), (0x174, "pass"), (0x174, "pass"), (0xdeadbeef, "fault")];
    assert_eq!(events, expected);
}

#[test]
fn an_audit_changes_nothing_and_tells_what_the_policy_would_do() {
    if !ready() {
        return;
    }
    let folder = with_policy(
        "default = \"deny\"\n[[rule]]\nmsr = \"0x174\"\nread = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"zero\"\n",
    );
    let accesses = "--filter r:0x35 r:0x8b r:0x8b w:0x174=8 r:0x174 w:0x174=9";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["-p", "policy.toml", "--audit", "--json"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let summary = summary(&ran);
    let rows: Vec<_> = list(&summary, "by_msr")
        .iter()
        .map(|row| (text(row, "msr"), text(row, "op"), count(row, "count"), text(row, "did")))
        .collect();
    let expected = [
        ("0x35", "rdmsr", 1, "deny"),
        ("0x8b", "rdmsr", 1, "zero"),
        ("0x174", "wrmsr", 1, "deny"),
    ];
    assert_eq!(rows, expected);
}

#[test]
fn what_a_rule_logs_is_told_without_a_trace() {
    if !ready() {
        return;
    }
    let folder = with_policy(
        "default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"zero\"\nlog = \"first\"\n\
         [[rule]]\nmsr = \"0x174\"\nwrite = \"deny\"\nlog = \"all\"\n",
    );
    let ran = under(&folder, &["-p", "policy.toml"], "r:0x8b r:0x8b w:0x174=3 w:0x174=4").code(0);
    let told = |what: &str| ran.err.lines().filter(|line| line.contains(what)).count();
    assert_eq!(
        told("rdmsr(0x8b IA32_BIOS_SIGN_ID) = 0x0 zero rule 0"),
        1,
        "{}",
        ran.err
    );
    assert_eq!(
        told("wrmsr(0x174 IA32_SYSENTER_CS, 0x3) = #GP deny rule 1"),
        1,
        "{}",
        ran.err
    );
    assert_eq!(told("wrmsr(0x174"), 2, "{}", ran.err);
}

#[test]
fn a_vmms_filter_that_does_not_fit_beside_the_policy_fails_at_its_ioctl() {
    if !ready() {
        return;
    }
    let rules: String = (0..16)
        .map(|slot| {
            format!(
                "[[rule]]\nmsr = \"{:#x}\"\nread = \"zero\"\n",
                0x4000_0000 + (slot << 20)
            )
        })
        .collect();
    let folder = with_policy(&format!("default = \"allow\"\n{rules}"));
    let ran = under(&folder, &["-p", "policy.toml"], "--filter r:0x35");
    assert_eq!(ran.code, Some(9), "{}", ran.err);
    ran.says(&["the VMM's call fails: together with the VMM's own MSR filter the policy needs 17 filter ranges"]);
}

#[test]
fn what_a_filter_has_no_room_for_is_passed_on_beside_a_vmms_own_filter() {
    if !ready() {
        return;
    }
    let allowed = (0..15)
        .map(|slot| 0x5000_0000 + (slot << 20))
        .chain([0x277, 0xc000_0081_u32]);
    let rules: String = allowed
        .map(|msr| format!("[[rule]]\nmsr = \"{msr:#x}\"\nread = \"allow\"\nwrite = \"allow\"\n"))
        .collect();
    let head = "default = \"deny\"\nspill = \"user-space\"\n";
    let folder = with_policy(&format!("{head}{rules}"));
    // 2 is no memory type.
    let accesses = "--filter --vcpus 2 w:0x277=0x1 r:0x277 w:0x277=0x2 w:0xc0000081=5 r:0xc0000081 r:0x35";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["-p", "policy.toml", "--json"], accesses).code(0);
    let denied = |line: &str| line.replace("rdmsr 0x35 0x20004", "rdmsr 0x35 fault");
    let expected: Vec<_> = seen(&without).into_iter().map(denied).collect();
    assert_eq!(seen(&ran), expected);
    let passed = |row: &&Value| text(row, "did") == "pass";
    let told = summary(&ran);
    assert_ne!(list(&told, "by_msr").iter().filter(passed).count(), 0, "{told:#}");
    // So it is where the CPUID tells what the policy is.
    let rules = format!("{rules}when = {{ vendor = \"amd\" }}\n");
    folder.write("by_cpuid.toml", format!("version = 1\nname = \"x\"\n{head}{rules}"));
    let with_vendors = format!("--vendors amd,amd {accesses}");
    let ran = under(&folder, &["-p", "by_cpuid.toml"], &with_vendors).code(0);
    assert_eq!(seen(&ran), expected);
    // An audit changes nothing, and tells of these too.
    let ran = under(&folder, &["-p", "policy.toml", "--audit", "--json"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let told = summary(&ran);
    assert_ne!(list(&told, "by_msr").iter().filter(passed).count(), 0, "{told:#}");
}

#[test]
fn where_the_policy_cannot_be_put_in_force_there_is_no_vm() {
    if !ready() {
        return;
    }
    if fs::metadata("/dev/cpu/0/msr").is_ok() {
        println!("skipped: this machine has /dev/cpu/0/msr");
        return;
    }
    let host = "default = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = \"host\"\n";
    let folder = with_policy(&format!("{host}when = {{ vendor = \"amd\" }}\n"));
    let ran = under(&folder, &["-p", "policy.toml"], "--vendors amd r:0x8b");
    assert_eq!(ran.code, Some(9), "{}", ran.err);
    ran.says(&["msrgate: vCPU 0 does not get this CPUID: /dev/cpu/0/msr does not open"]);
    let folder = with_policy(host);
    let ran = under(&folder, &["-p", "policy.toml"], "r:0x8b");
    assert_eq!(ran.code, Some(9), "{}", ran.err);
    ran.says(&[
        "msrgate: no VM is made: /dev/cpu/0/msr does not open",
        "Permission denied",
    ]);
}
