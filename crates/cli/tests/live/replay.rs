//! `replay` on this machine's KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

#[rustfmt::skip]
#[path = "../emitted/filter.rs"]
#[allow(missing_docs, unreachable_pub, dead_code, reason = "made by the command")]
mod emitted;
#[path = "../guides/kvm.rs"]
#[allow(missing_docs, unreachable_pub, reason = "as the guide shows it")]
mod guide;

use std::fs;

use serde_json::Value;

use crate::command::{Folder, Ran, count, hex, list, text};
use crate::kvm::{kvm_opens, without_permission};

const MICROVM: &str = "traces/linux-6.1-microvm.jsonl";
const PC: &str = "traces/linux-6.1-pc-smp2.jsonl";

fn replay(folder: &Folder, backend: &str, policy: &str, trace: &str) -> Ran {
    folder.run(&["replay", "--json", "--backend", backend, "-p", policy, trace])
}

/// MSR, direction, count and action of each row.
fn actions(report: &Value) -> Vec<(u64, String, u64, String)> {
    let rows = list(report, "by_msr").iter();
    rows.map(|row| {
        (
            hex(row, "msr"),
            text(row, "op").to_owned(),
            count(row, "count"),
            text(row, "action").to_owned(),
        )
    })
    .collect()
}

fn row<'a>(report: &'a Value, msr: u64, op: &str) -> &'a Value {
    let found = list(report, "by_msr")
        .iter()
        .find(|row| hex(row, "msr") == msr && text(row, "op") == op);
    found.unwrap_or_else(|| panic!("no row of {op} {msr:#x}"))
}

/// The policy of a test: this default, and these rules.
fn policy(folder: &Folder, head: &str, rules: &str) {
    folder.write("policy.toml", format!("version = 1\n{head}\n{rules}"));
}

#[test]
fn a_recorded_boot_is_not_changed_by_the_policy_made_for_it_and_both_backends_say_the_same() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    for (rules, trace, accesses) in [
        ("policies/linux-microvm.toml", MICROVM, 564),
        ("policies/linux-pc.toml", PC, 386),
    ] {
        let kvm = replay(&folder, "kvm", rules, trace).code(0).json();
        let engine = replay(&folder, "engine", rules, trace).code(0).json();
        assert_eq!((&kvm["backend"], &engine["backend"]), (&"kvm".into(), &"engine".into()));
        for report in [&kvm, &engine] {
            assert_eq!((count(report, "accesses"), count(report, "changed")), (accesses, 0));
        }
        assert_eq!(actions(&kvm), actions(&engine));
        let auto = replay(&folder, "auto", rules, trace).code(0).json();
        assert_eq!(auto["backend"], "kvm");
        assert!(auto.get("backend_reason").is_none());
    }
}

#[test]
fn fixed_answers_that_the_kernel_holds_are_presets_on_kvm_and_only_there() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let rule = "[[rule]]\nmsr = 0x8b\nread = { value = \"0x7700000000\" }\nwrite = \"deny\"\n";
    policy(&folder, "default = \"allow\"", rule);
    let held = serde_json::json!([{ "msr": "0x8b", "value": "0x7700000000" }]);
    let kvm = replay(&folder, "kvm", "policy.toml", PC).code(1).json();
    let engine = replay(&folder, "engine", "policy.toml", PC).code(1).json();
    assert_eq!((&kvm["presets"], list(&engine, "presets").len()), (&held, 0));
    for report in [&kvm, &engine] {
        assert_eq!(text(row(report, 0x8b, "rdmsr"), "sees"), "0x7700000000");
    }

    let plan = |host: &[&str]| {
        let args = [&["plan", "--json", "policy.toml"], host].concat();
        folder.run(&args).code(0).json()
    };
    let (here, anywhere) = (plan(&["--host"]), plan(&[]));
    assert_eq!((&here["presets"], list(&anywhere, "presets").len()), (&held, 0));
    assert!(list(&here, "reasons").is_empty() && !list(&anywhere, "reasons").is_empty());
    assert_eq!(here["hash"], anywhere["hash"]);
    let explained = folder.run(&["explain", "--host", "--json", "policy.toml", "0x8b", "read"]);
    let explained = explained.code(0).json();
    assert_eq!(
        (&explained["exits"], &explained["verdict"]),
        (&false.into(), &"allow".into())
    );
    assert_eq!(
        (&explained["no_preset"], list(&here, "no_presets").len()),
        (&Value::Null, 0)
    );
}

#[test]
fn a_fixed_answer_that_is_no_preset_says_why() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    // KVM has no value for 0x10 that stands still, and 0x17 is 0 in every guest of KVM.
    let rules = "[[rule]]\nmsr = 0x10\nread = \"zero\"\nwrite = \"deny\"\n\
                 [[rule]]\nmsr = 0x17\nread = { value = 7 }\nwrite = \"deny\"\n\
                 [[rule]]\nmsr = 0x8b\nread = { value = 7 }\n";
    policy(&folder, "default = \"allow\"", rules);
    let plan = folder.run(&["plan", "--host", "--json", "policy.toml"]).code(0).json();
    let whys: Vec<_> = list(&plan, "no_presets")
        .iter()
        .map(|row| (text(row, "first"), text(row, "last"), text(row, "why")))
        .collect();
    let expected = [
        ("0x10", "0x10", "unkept"),
        ("0x17", "0x17", "unheld"),
        ("0x8b", "0x8b", "written"),
    ];
    assert_eq!(whys, expected);
    let explained = folder
        .run(&["explain", "--host", "policy.toml", "0x17", "read"])
        .code(0);
    assert!(
        explained
            .out
            .contains("preset   none: this kernel has another value here"),
        "{}",
        explained.out
    );
}

#[test]
fn what_the_policy_answers_is_the_same_on_both_backends() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let accesses = [
        ("rdmsr", "0x8b"),
        ("wrmsr", "0x8b"),
        ("rdmsr", "0x35"),
        ("rdmsr", "0x119"),
        ("wrmsr", "0x119"),
        ("rdmsr", "0x611"),
        ("rdmsr", "0x277"),
    ];
    let mut trace = "{\"msrgate_trace\":1}\n".to_owned();
    for (op, msr) in accesses {
        trace += &format!("{{\"op\":\"{op}\",\"msr\":\"{msr}\",\"value\":\"0x1\"}}\n");
    }
    folder.write("some.jsonl", trace);
    // Fixed values, faults, zeros, and writes that go nowhere.
    for name in ["fixed-microcode", "deny-all", "openvmm-stubs", "qemu", "bhyve-intel"] {
        let path = format!("policies/{name}.toml");
        let [kvm, engine] = ["kvm", "engine"].map(|backend| replay(&folder, backend, &path, "some.jsonl").json());
        assert_eq!(actions(&kvm), actions(&engine), "{name}");
        let mut answered = 0;
        for (on_kvm, on_engine) in list(&kvm, "by_msr").iter().zip(list(&engine, "by_msr")) {
            if text(on_kvm, "action") != "allow" {
                assert_eq!(on_kvm["sees"], on_engine["sees"], "{name}: {on_kvm:#}");
                answered += 1;
            }
        }
        assert!(answered > 0, "{name} answers none of them");
    }
}

#[test]
fn a_policy_that_shows_the_physical_cpu_needs_the_msr_module() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    folder.write(
        "one.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0xce\",\"value\":\"0x1\"}\n",
    );
    let ran = replay(&folder, "kvm", "policies/monitoring.toml", "one.jsonl");
    if fs::metadata("/dev/cpu/0/msr").is_ok() {
        assert!(matches!(ran.code, Some(0 | 1)), "{}", ran.err);
    } else {
        ran.code(3).says(&["`host`", "modprobe msr"]);
    }
}

#[test]
fn what_a_policy_denies_or_fixes_is_a_change() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let rules = "
[[rule]]
msr  = \"IA32_EFER\"
read = \"deny\"

[[rule]]
msr  = \"IA32_APIC_BASE\"
read = { value = \"0xdead000\" }

[[rule]]
msr   = \"IA32_PAT\"
write = \"deny\"
read  = { value = \"0x7040600070406\" }
";
    policy(&folder, "default = \"allow\"", rules);
    for backend in ["kvm", "engine"] {
        let report = replay(&folder, backend, "policy.toml", MICROVM).code(1).json();
        let [efer, apic, pat] = [0xc000_0080, 0x1b, 0x277].map(|msr| row(&report, msr, "rdmsr"));
        assert_eq!((count(efer, "changed"), text(efer, "sees")), (3, "#GP"), "{backend}");
        assert_eq!(
            (count(apic, "changed"), text(apic, "sees")),
            (7, "0xdead000"),
            "{backend}"
        );
        // A fixed value that the register would have had anyway: nobody can tell.
        assert_eq!((count(pat, "changed"), text(pat, "action")), (0, "value"), "{backend}");
        assert_eq!(count(&report, "changed"), 10, "{backend}");
    }
    let people = folder
        .run(&["replay", "--backend", "kvm", "-p", "policy.toml", MICROVM])
        .code(1);
    people.shows(&[
        "the policy changed 10 of 564 accesses",
        "a real guest on this machine's KVM",
        "IA32_APIC_BASE",
    ]);
}

#[test]
fn what_the_kernel_does_not_know_reads_as_zero_where_the_policy_says_so() {
    if !kvm_opens() {
        return;
    }
    if fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs").is_ok_and(|value| value.trim() != "N") {
        println!("skipped: kvm.ignore_msrs is set on this host");
        return;
    }
    let folder = Folder::furnished();
    let trace = "{\"msrgate_trace\":1}
{\"op\":\"rdmsr\",\"msr\":\"0xdeadbeef\",\"did\":\"fault\",\"reason\":\"unknown\"}
{\"op\":\"wrmsr\",\"msr\":\"0xdeadbeef\",\"value\":\"0x1\",\"did\":\"fault\",\"reason\":\"unknown\"}
{\"op\":\"rdmsr\",\"msr\":\"0x277\",\"value\":\"0x7040600070406\"}
";
    folder.write("unknown.jsonl", trace);
    policy(&folder, "default = \"allow\"", "");
    for backend in ["kvm", "engine"] {
        let report = replay(&folder, backend, "policy.toml", "unknown.jsonl").code(0).json();
        assert_eq!(
            (count(&report, "faults"), count(&report, "changed")),
            (2, 0),
            "{backend}"
        );
        assert_eq!(row(&report, 0xdead_beef, "rdmsr")["sees"], "#GP");

        let report = replay(&folder, backend, "policies/ignore-unknown.toml", "unknown.jsonl")
            .code(1)
            .json();
        assert_eq!(
            (count(&report, "faults"), count(&report, "changed")),
            (0, 2),
            "{backend}"
        );
        assert_eq!(row(&report, 0xdead_beef, "rdmsr")["sees"], "0x0");
        assert_eq!(row(&report, 0xdead_beef, "wrmsr")["sees"], "done");
    }
}

#[test]
fn a_clock_that_ticks_is_not_changed_and_one_that_stands_is() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let reads = "{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"value\":\"0x123456\"}\n".repeat(20);
    folder.write("tsc.jsonl", format!("{{\"msrgate_trace\":1}}\n{reads}"));
    for (read, code, changed) in [
        ("\"allow\"", 0, 0),
        ("{ mask = { keep = \"0xffffffffffffffff\" } }", 0, 0),
        ("\"zero\"", 1, 20),
        ("\"deny\"", 1, 20),
    ] {
        let rule = format!("[[rule]]\nmsr = \"IA32_TSC\"\nread = {read}\n");
        policy(&folder, "default = \"allow\"", &rule);
        let report = replay(&folder, "kvm", "policy.toml", "tsc.jsonl").code(code).json();
        assert_eq!(count(&report, "changed"), changed, "read = {read}");
    }
}

#[test]
fn each_vcpu_has_a_state_of_its_own() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let mut trace = "{\"msrgate_trace\":1}\n".to_owned();
    for vcpu in [0, 1, 0] {
        trace += &format!("{{\"vcpu\":{vcpu},\"op\":\"wrmsr\",\"msr\":\"0x174\",\"value\":\"0x10\"}}\n");
    }
    folder.write("two.jsonl", trace);
    policy(
        &folder,
        "default = \"allow\"",
        "[[rule]]\nmsr = \"IA32_SYSENTER_CS\"\nwrite = { once = true }\nlog = \"all\"\n",
    );
    for backend in ["kvm", "engine"] {
        // The first write on each vCPU counts; the second one of vCPU 0 faults.
        let report = replay(&folder, backend, "policy.toml", "two.jsonl").code(1).json();
        assert_eq!(
            (count(&report, "changed"), count(&report, "faults")),
            (1, 1),
            "{backend}"
        );
    }
    let people = folder.run(&["replay", "-p", "policy.toml", "two.jsonl"]).code(1);
    people.says(&["log: vcpu 0 wrmsr 0x174", "log: vcpu 1 wrmsr 0x174", "fault"]);
}

#[test]
fn what_this_host_answers_differently_is_not_put_down_to_the_policy() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    folder.write(
        "other.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0x277\",\"value\":\"0x1234\"}\n",
    );
    let report = replay(&folder, "kvm", "policies/ignore-unknown.toml", "other.jsonl")
        .code(0)
        .json();
    let pat = row(&report, 0x277, "rdmsr");
    assert_eq!((count(pat, "changed"), count(pat, "host_differs")), (0, 1));
    assert_eq!(
        (text(pat, "sees"), text(pat, "recorded")),
        ("0x7040600070406", "0x1234")
    );
}

#[test]
fn without_permission_the_command_says_what_to_do_and_the_engine_still_works() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let Some(run) = without_permission(&folder) else { return };
    let nobody = |backend: &[&str]| run(&[&["replay", "-p", "policies/linux-microvm.toml", MICROVM], backend].concat());
    let refused = nobody(&["--backend", "kvm"]).code(3);
    assert!(refused.out.is_empty(), "{}", refused.out);
    refused.says(&[
        "/dev/kvm",
        "this user may not open",
        "join the group",
        "`--backend engine`",
    ]);

    let fallback = nobody(&[]).code(0);
    fallback
        .says(&["running on the engine, since", "may not open"])
        .shows(&["a guest on the engine"]);

    let report = nobody(&["--json"]).code(0);
    assert_eq!(report.json()["backend"], "engine");
    assert!(text(&report.json(), "backend_reason").contains("may not open"));

    nobody(&["--backend", "engine"])
        .code(0)
        .shows(&["564 accesses", "changed nothing"]);
}

#[test]
fn the_guides_program_runs_a_guest_under_a_policy() {
    use kvm_ioctls::Kvm;
    use msrgate_core::{Access, Msr};
    use msrgate_guest::{Guest, Mode, Options};
    use std::os::fd::{AsRawFd, RawFd};

    struct Descriptor(RawFd);
    impl AsRawFd for Descriptor {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }

    if !kvm_opens() {
        return;
    }
    let kvm = Kvm::new().expect("it opens");
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).expect("a guest");
    // It keeps its list, so it makes the access once more.
    guest
        .run(0, &[Access::Read { msr: Msr(0x8b) }], &mut |_| {})
        .expect("a run");
    let vm = Descriptor(guest.vm().as_raw_fd());
    let vcpu = guest.vcpu(0).expect("a vCPU").fd_mut();
    let policy = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x8b\nread = { value = 0x1234 }\n";
    guide::run(&kvm, &vm, vcpu, policy).expect("an end");
    assert_eq!(vcpu.get_regs().expect("registers").rax, 0x1234);
}

#[test]
fn the_kernel_takes_the_filter_that_plan_prints_as_rust() {
    if !kvm_opens() {
        return;
    }
    let kvm = kvm_ioctls::Kvm::new().expect("it opens");
    let vm = kvm.create_vm().expect("a VM");
    vm.set_msr_filter(emitted::EMITTED_DEFAULT, &emitted::emitted_ranges())
        .expect("KVM_X86_SET_MSR_FILTER");
}

#[test]
fn the_cpuid_that_kvm_offers_can_decide_a_policy() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    policy(&folder, "default = \"allow\"\nvalid = \"cpu-model\"", "");
    folder
        .run(&["check", "policy.toml"])
        .code(2)
        .says(&["E018", "--cpuid host"]);
    let ran = folder.run(&["plan", "--json", "--cpuid", "host", "policy.toml"]);
    assert!(matches!(ran.code, Some(0 | 1)), "{}", ran.err);
}
