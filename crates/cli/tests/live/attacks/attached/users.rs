//! `attach` by users who are not root, and what Yama lets them do.

use std::fs;
use std::path::PathBuf;

use super::super::users::{NOBODY, is_root, open_to_all};
use super::*;
use crate::command::find;

const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// A folder with msrgate and the VMM, and the VMM as nobody, to which root hands `/dev/kvm`; `None` where the test is to be skipped.
fn nobodys(program: Option<PathBuf>, policy: &str, arguments: &[&str]) -> Option<(Folder, Asked)> {
    let program = program?;
    if !is_root() {
        return None;
    }
    if find("setpriv").is_none() {
        println!("skipped: there is no setpriv(1)");
        return None;
    }
    let folder = open_to_all(policy, &program);
    let mut command = Command::new("sh");
    let words = "exec setpriv --reuid=65534 --regid=65534 --clear-groups ./vmm \"$@\" 3<>/dev/kvm";
    command.args(["-c", words, "sh"]).args(arguments);
    command.env("KVM_FD", "3").current_dir(folder.path());
    Some((folder, Asked::of(command)))
}

/// `attach` as nobody, with this capability if there is one.
fn as_nobody(folder: &Folder, capability: Option<&str>, process: &str) -> Result<Attach, Ran> {
    as_nobody_of(NOBODY, folder, capability, process)
}

/// Likewise, of this group.
fn as_nobody_of(group: u32, folder: &Folder, capability: Option<&str>, process: &str) -> Result<Attach, Ran> {
    let ids = [format!("--reuid={NOBODY}"), format!("--regid={group}")];
    let mut command = Command::new("setpriv");
    command.args(ids).arg("--clear-groups");
    if let Some(name) = capability {
        command.args([format!("--inh-caps=+{name}"), format!("--ambient-caps=+{name}")]);
    }
    command
        .args(["./msrgate", "attach", "-p", "policy.toml"])
        .args(NONE)
        .arg(process);
    Attach::of(command.current_dir(folder.path()))
}

/// Has Yama say this as long as it lives, where there is Yama.
struct Scope(String);

impl Scope {
    fn set(scope: &str) -> Option<Scope> {
        let before = fs::read_to_string(YAMA).ok()?;
        fs::write(YAMA, scope).unwrap();
        Some(Scope(before))
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let _ = fs::write(YAMA, &self.0);
    }
}

#[test]
fn users_attach_to_vmms_of_their_own_and_guests_get_answers() {
    let _scope = Scope::set("0");
    for (policy, got) in [(DENIED, "fault"), (ANSWERED, "0x11"), (asks::ASKED, "0x100")] {
        let program = vmm("running", Way::Dynamic);
        let Some((folder, mut vmm)) = nobodys(program, policy, &["1", "2"]) else {
            return;
        };
        for _ in 0..2 {
            let attach = as_nobody(&folder, None, &vmm.process()).unwrap_or_else(|ran| panic!("{}", ran.err));
            assert_eq!(vmm.ask("1 r:0x174"), format!("rdmsr 0x174 {got}"));
            attach.detach().code(0).says(&["detached: no MSR is denied any more"]);
            assert_eq!(vmm.ask("1 r:0x174"), "rdmsr 0x174 0x0");
        }
        vmm.end();
    }
}

#[track_caller]
fn refused(attach: Result<Attach, Ran>, says: &str) {
    let Err(ran) = attach else { panic!("it is put in force") };
    let ran = ran.code(3).says(&[says]);
    assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
}

#[test]
fn what_users_may_not_attach_to_is_refused_by_name() {
    let _scope = Scope::set("0");
    let program = vmm("running", Way::Dynamic);
    let Some((folder, mut sandboxed)) = nobodys(program.clone(), ANSWERED, &["1", "1", "waits"]) else {
        return;
    };
    // All threads but the first are.
    refused(
        as_nobody(&folder, None, &sandboxed.process()),
        "its thread has a seccomp sandbox, and it takes CAP_SYS_ADMIN",
    );
    refused(
        as_nobody_of(0, &folder, None, &sandboxed.process()),
        "its group is 65534, and msrgate's is another",
    );
    assert_eq!(sandboxed.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    sandboxed.end();
    let roots = Asked::start(&program.unwrap(), &["1", "1"]);
    for capability in [None, Some("sys_ptrace")] {
        let attach = as_nobody(&folder, capability, &roots.process());
        refused(attach, "it is user 0's: run msrgate as root");
    }
    roots.end();
}

#[test]
fn what_yama_does_not_let_a_user_do_is_refused_and_takes_a_capability() {
    // Many hosts' kernels have none, and the nested lane's has.
    let program = vmm_anywhere("running", Way::Dynamic);
    let Some((folder, mut vmm)) = nobodys(program, ANSWERED, &["1", "1"]) else {
        return;
    };
    for scope in ["1", "2"] {
        let Some(_scope) = Scope::set(scope) else {
            return println!("skipped: the kernel has no Yama");
        };
        let attach = as_nobody(&folder, None, &vmm.process());
        refused(
            attach,
            &format!("kernel.yama.ptrace_scope is {scope}: run msrgate as root, or give it CAP_SYS_PTRACE"),
        );
        let able = as_nobody(&folder, Some("sys_ptrace"), &vmm.process());
        let root = Attach::start(&folder, &NONE, &vmm.process());
        assert!(root.is_err(), "two at once");
        let able = able.unwrap_or_else(|ran| panic!("{}", ran.err));
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x11");
        able.detach().code(0);
        let root = Attach::start(&folder, &NONE, &vmm.process()).unwrap_or_else(|ran| panic!("{}", ran.err));
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x11");
        root.detach().code(0);
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
    }
    vmm.end();
}
