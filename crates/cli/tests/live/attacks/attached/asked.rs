//! What an msrgate that keeps a policy in force is asked for: another policy, and its end.

use super::*;

/// Denies this register.
fn denies(msr: &str) -> String {
    format!("version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"{msr}\"\nread = \"deny\"\nwrite = \"deny\"\n")
}

#[test]
fn an_attached_policy_is_replaced_and_taken_off_by_whoever_names_the_vmm() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    let folder = with_policy(DENIED);
    let mut vmm = Asked::start(&program, &["1", "2"]);
    let process = vmm.process();
    let attach = Attach::start(&folder, &NONE, &process).unwrap();
    let mut expect = |first: &str, second: &str| {
        assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {first}"));
        assert_eq!(vmm.ask("1 r:0x175"), format!("rdmsr 0x175 {second}"));
    };
    expect("fault", "0x0");

    let top = folder.run(&["top", "--json"]).code(0).json();
    let of = list(&top, "vmms")
        .iter()
        .find(|one| one["attached"] == process.parse::<u32>().unwrap());
    assert_eq!(text(of.unwrap(), "mode"), "enforce");

    folder.write("other.toml", denies("0x175"));
    let reload = |file: &str| folder.run(&["reload", &process, "-p", file, "--json"]);
    let told = reload("other.toml").code(0).json();
    assert_eq!((count(&told, "vms"), count(&told, "accesses")), (1, 4), "{told:#}");
    expect("0x0", "fault");

    // What cannot be put in force changes nothing.
    folder.write("bad.toml", "version = 1\ndefault = \"perhaps\"\n");
    folder.write(
        "cpuid.toml",
        denies("0x174").replace("write", "when = { vendor = \"intel\" }\nwrite"),
    );
    for (file, code, why) in [
        ("bad.toml", 2, "perhaps"),
        ("cpuid.toml", 1, "depends on the guest's CPUID"),
    ] {
        let ran = reload(file);
        assert_eq!(ran.code, Some(code), "{}", ran.err);
        assert!(ran.err.contains(why), "{}", ran.err);
        expect("0x0", "fault");
    }

    // SIGHUP: the file that `attach` was given.
    folder.write("policy.toml", denies("0x174"));
    attach.signal(Signal::SIGHUP);
    wait_until(|| vmm.ask("0 r:0x174") == "rdmsr 0x174 fault");
    assert_eq!(vmm.ask("1 r:0x175"), "rdmsr 0x175 0x0");

    let told = folder.run(&["detach", &process, "--json"]).code(0).json();
    assert_eq!(told["detached"], true, "{told:#}");
    attach.rest().code(0).says(&["detached: no MSR is denied any more"]);
    assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    let ran = folder.run(&["detach", &process]);
    assert!(
        ran.code != Some(0) && ran.err.contains("does not run under msrgate"),
        "{}",
        ran.err
    );
    vmm.end();
}

#[test]
fn a_vmm_that_msrgate_started_goes_on_without_the_policy_where_that_is_wanted() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    for (policy, under, ignores) in [(DENIED, "fault", "fault"), (ANSWERED, "0x11", "0x0")] {
        let folder = with_policy(policy);
        let mut command = folder.command(&["run", "-p", "policy.toml"]);
        if ignores == "0x0" {
            command.arg("--ignore-unknown");
        }
        command.arg("--").arg(&program).args(["1", "2"]);
        let mut vmm = Asked::of(command);
        assert_eq!(vmm.ask("0 r:0x174"), format!("rdmsr 0x174 {under}"));
        assert_eq!(vmm.ask("0 r:0xdeadbeef"), format!("rdmsr 0xdeadbeef {ignores}"));
        let ran = folder.run(&["detach", &vmm.process(), "--json"]);
        if policy == DENIED {
            let told = ran.code(0).json();
            assert_eq!(count(&told, "vms"), 1, "{told:#}");
            assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
            assert_eq!(vmm.ask("1 r:0xdeadbeef"), "rdmsr 0xdeadbeef fault");
        } else {
            // The kernel holds the fixed answer of 0x8b for as long as the vCPU is there.
            assert_eq!(ran.code, Some(1), "{}", ran.err);
            assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x11");
        }
    }
}
