//! Whether a test may use this machine's KVM.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::command::{Folder, Ran, find, program};

/// Whether `/dev/kvm` opens. Where it does not the test is skipped, or fails if its lane requires KVM.
pub(crate) fn kvm_opens() -> bool {
    let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else {
        return true;
    };
    let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
    assert!(!required, "/dev/kvm does not open: {error}");
    println!("skipped: /dev/kvm does not open: {error}");
    false
}

/// Whether a guest of QEMU's with the host's CPU model starts here, without msrgate. There are hosts on which none does: an MSR that
/// KVM offers and then does not take ends QEMU.
pub(crate) fn qemu_runs() -> bool {
    if !kvm_opens() {
        return false;
    }
    let Some(qemu) = find("qemu-system-x86_64") else {
        println!("skipped: there is no qemu-system-x86_64");
        return false;
    };
    let words = "-accel kvm -cpu host -display none -net none -boot reboot-timeout=0 -no-reboot";
    let ran = Ran::of(Command::new(qemu).args(words.split(' ')).stdin(Stdio::null()));
    if ran.code != Some(0) {
        println!(
            "skipped: QEMU by itself ends with {:?} here: {}",
            ran.code,
            ran.err.trim()
        );
    }
    ran.code == Some(0)
}

/// A run of the command by a user who may not open `/dev/kvm`; `None`, and why, where there can be none.
pub(crate) fn without_permission(folder: &Folder) -> Option<impl Fn(&[&str]) -> Ran> {
    const NOBODY: u32 = 65534;
    let device = fs::metadata("/dev/kvm").expect("it opens");
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if !root || device.permissions().mode() & 0o006 != 0 || device.gid() == NOBODY {
        println!("skipped: needs root, and a /dev/kvm that is not open to everyone");
        return None;
    }
    // Where the program was built may be closed to others.
    fs::copy(program(), folder.path().join("msrgate")).expect("a copy");
    let directory = folder.path().to_path_buf();
    Some(move |arguments: &[&str]| {
        let mut command = Command::new(directory.join("msrgate"));
        command.args(arguments).current_dir(&directory).stdin(Stdio::null());
        Ran::of(command.uid(NOBODY).gid(NOBODY))
    })
}
