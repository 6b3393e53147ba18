//! VMMs that are not root's.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use super::*;

/// Who has no rights.
pub(super) const NOBODY: u32 = 65_534;

/// A folder where nobody may run msrgate and this VMM.
pub(super) fn open_to_all(policy: &str, vmm: &Path) -> Folder {
    let folder = with_policy(policy);
    for (name, from) in [("msrgate", crate::command::program().as_path()), ("vmm", vmm)] {
        let to = folder.path().join(name);
        fs::copy(from, &to).unwrap();
        fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// The VMM as nobody, with `/dev/kvm` as its standard input, since nobody may not open it.
pub(super) fn as_nobody(folder: &Folder, subcommand: &str, options: &[&str], arguments: &[&str]) -> Ran {
    let mut command = Command::new(folder.path().join("msrgate"));
    command
        .arg(subcommand)
        .args(options)
        .args(["--", "./vmm"])
        .args(arguments);
    command.current_dir(folder.path()).env("KVM_FD", "0");
    command.stdin(File::options().read(true).write(true).open("/dev/kvm").unwrap());
    Ran::of(command.uid(NOBODY).gid(NOBODY))
}

pub(super) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: it takes root to become nobody");
    }
    root
}

#[test]
fn the_policy_is_in_force_without_rights_and_that_no_new_privs_is_set_is_said() {
    for way in Way::ALL {
        let Some(program) = vmm("accesses", way) else { continue };
        if !is_root() {
            return;
        }
        let accesses = [
            "2",
            "r:0x8b",
            "w:0x174=5",
            "r:0x174",
            "w:0x175=1",
            "w:0x175=2",
            "w:0x10a=1",
        ];
        let each = [
            "rdmsr 0x8b 0x5",
            "wrmsr 0x174 done",
            "rdmsr 0x174 0x5",
            "wrmsr 0x175 done",
            "wrmsr 0x175 fault",
            "wrmsr 0x10a fault",
        ];
        let folder = open_to_all(ANSWERS, &program);
        let ran = as_nobody(&folder, "run", &["-p", "policy.toml"], &accesses).code(0);
        assert_eq!(
            ran.out.lines().collect::<Vec<_>>(),
            [each, each].concat(),
            "{way:?} {}",
            ran.err
        );
        ran.says(&["no_new_privs is set", "1 VM and 2 vCPUs"]);
        // What cannot be kept is refused.
        let ran = as_nobody(&folder, "run", &["-p", "policy.toml", "--allow-new-privs"], &accesses);
        assert_ne!(ran.code, Some(0));
        assert_eq!(ran.out, "");
        ran.says(&["leave --allow-new-privs out"]);
    }
}

#[test]
fn a_sandboxed_thread_without_rights_gets_no_vm_and_the_reason_is_said() {
    let Some(program) = vmm("sandbox", Way::Dynamic) else {
        return;
    };
    if !is_root() {
        return;
    }
    let folder = open_to_all(HELD, &program);
    let ran = as_nobody(&folder, "run", &["-p", "policy.toml"], &["kill", "early", "r:0x8b"]);
    assert_ne!(ran.code, Some(0));
    assert_eq!(ran.out, "");
    ran.says(&["no VM is made: ", "seccomp sandbox"]);
}
