//! `run` on this machine's KVM, with a VMM that knows nothing of msrgate. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.

#[path = "../../../../examples/small_vmm.rs"]
mod small_vmm;

mod by_cpuid;
mod descriptors;
mod handlers;
mod modes;
mod processes;
mod told;

use std::fs;
use std::io::BufReader;
use std::process::{Command, Stdio};

use msrgate_core::{Event, Nanos, Op, Reason};
use msrgate_msrs::cpuid::CpuVendor;
use msrgate_trace::{Header, Lines, Record};
use serde_json::Value;

use crate::command::{Folder, Ran, count, list, text, wait_until};
use crate::kvm::kvm_opens;
use crate::policies::{BY_VENDOR, MICROCODE, summary, too_much, with_policy};

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
    if arguments == descriptors::PAST {
        descriptors::make_past_libc();
        std::process::exit(0);
    }
    if arguments == DESCRIPTORS {
        descriptors::close_in_every_way();
        std::process::exit(0);
    }
    let result = small_vmm::main_with(arguments.split(' ').map(str::to_owned));
    if let Err(error) = result {
        // In one write, so that no other line begins within it.
        let line = format!("small_vmm: {error}\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
        std::process::exit(9);
    }
    std::process::exit(0);
}

/// The VMM by itself. With one thread the test runner would put its name before the first line.
pub(crate) fn bare(vmm: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "run::vmm", "--nocapture", "--test-threads=2"])
        .env(VMM, vmm);
    command
}

/// The VMM under `run`.
fn under(folder: &Folder, options: &[&str], vmm: &str) -> Ran {
    Ran::of(&mut command_under(folder, options, vmm))
}

fn command_under(folder: &Folder, options: &[&str], vmm: &str) -> Command {
    let mut command = folder.command(&["run"]);
    let this = bare(vmm);
    command
        .args(options)
        .arg("--")
        .arg(this.get_program())
        .args(this.get_args());
    command.env(VMM, vmm);
    command
}

/// What the guests saw.
fn seen(ran: &Ran) -> Vec<&str> {
    let lines = ran.out.lines();
    lines
        .filter(|line| ["rdmsr", "wrmsr", "vmm "].iter().any(|start| line.starts_with(start)))
        .collect()
}

/// What a summary has by MSR: which, in which direction, how often, and what the last one got.
fn rows(summary: &Value) -> Vec<(&str, &str, u64, &str)> {
    let rows = list(summary, "by_msr").iter();
    rows.map(|row| (text(row, "msr"), text(row, "op"), count(row, "count"), text(row, "did")))
        .collect()
}

/// A trace, and what it says of itself.
fn traced(folder: &Folder) -> (Header, Vec<Event>) {
    let file = fs::File::open(folder.path().join("trace.jsonl")).unwrap();
    let lines = Lines::new(BufReader::new(file)).unwrap();
    let header = lines.header().clone();
    let events = lines.map(|record| match record.unwrap() {
        Record::Event(event) => event,
        Record::Gap(gap) => panic!("{gap:?}"),
    });
    (header, events.collect())
}

#[test]
fn a_guest_sees_what_the_policy_says_and_the_kernels_own_for_the_rest() {
    if !kvm_opens() {
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
    if !kvm_opens() {
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
    if !kvm_opens() {
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
    if !kvm_opens() {
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
    let expected = [
        ("0x10b0", "rdmsr", 1, "zero"),
        ("0xdeadbeef", "rdmsr", 2, "zero"),
        ("0xdeadbeef", "wrmsr", 1, "ignore"),
    ];
    assert_eq!(rows(&summary), expected);
    assert!(
        list(&summary, "by_msr")
            .iter()
            .all(|row| text(row, "reason") == "unknown")
    );
    assert_eq!((count(&summary, "vms"), count(&summary, "vcpus")), (1, 1));
}

#[test]
fn a_fixed_answer_that_the_kernel_holds_makes_no_exit_and_outlasts_what_the_vmm_puts_there() {
    if !kvm_opens() {
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

#[test]
fn an_answered_exit_makes_no_system_call_and_waits_for_no_lock() {
    if !kvm_opens() {
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
    // Nor does the guest's RIP take one.
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl", "--rip"];
    under(&folder, &options, &accesses).code(0);
    assert!(traced(&folder).1.iter().all(|event| event.rip.is_some()));
}

#[test]
fn a_vmms_filter_that_does_not_fit_beside_the_policy_fails_at_its_ioctl() {
    if !kvm_opens() {
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
    if !kvm_opens() {
        return;
    }
    let policy = too_much();
    let folder = with_policy(&policy);
    // 2 is no memory type.
    let accesses = "--filter --vcpus 2 w:0x277=0x1 r:0x277 w:0x277=0x2 w:0xc0000081=5 r:0xc0000081 r:0x35";
    let without = Ran::of(&mut bare(accesses)).code(0);
    let ran = under(&folder, &["-p", "policy.toml", "--json"], accesses).code(0);
    let denied = |line: &str| line.replace("rdmsr 0x35 0x20004", "rdmsr 0x35 fault");
    let expected: Vec<_> = seen(&without).into_iter().map(denied).collect();
    assert_eq!(seen(&ran), expected);
    let told = summary(&ran);
    assert!(rows(&told).iter().any(|row| row.3 == "pass"), "{told:#}");
    // So it is where the CPUID tells what the policy is.
    let by_cpuid = format!("{policy}when = {{ vendor = \"amd\" }}\n");
    folder.write("by_cpuid.toml", format!("version = 1\nname = \"test\"\n{by_cpuid}"));
    let with_vendors = format!("--vendors amd,amd {accesses}");
    let ran = under(&folder, &["-p", "by_cpuid.toml"], &with_vendors).code(0);
    assert_eq!(seen(&ran), expected);
    // An audit changes nothing, and tells of these too.
    let ran = under(&folder, &["-p", "policy.toml", "--audit", "--json"], accesses).code(0);
    assert_eq!(seen(&ran), seen(&without));
    let told = summary(&ran);
    assert!(rows(&told).iter().any(|row| row.3 == "pass"), "{told:#}");
}

#[test]
fn where_the_policy_cannot_be_put_in_force_there_is_no_vm() {
    if !kvm_opens() {
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
