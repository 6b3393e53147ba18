//! Debian's QEMU, unmodified, boots Linux under `msrgate run`.
//!
//! Needs a kernel and modules for the guest, which the nested lane has where this machine's files are its root; skipped
//! elsewhere:
//!
//! ```text
//! cargo test -p msrgate --release --no-run
//! cargo xtask nested --smp 2 --mem 2048 -- target/release/deps/nested_qemu-… --nocapture --test-threads 1
//! ```

#[allow(unused_macros, reason = "a part of it")]
mod command;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command::{Folder, find};

/// What the guest does before it powers off. `rd CPU MSR` and `wr CPU MSR` print what the device of that CPU gives.
const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc none /proc
$B mount -t devtmpfs none /dev
$B insmod /msr.ko
rd() {
    if $B dd if=/dev/cpu/$1/msr bs=8 count=1 iflag=skip_bytes skip=$(($2)) of=/value 2>/error; then
        echo "rd $1 $2 $($B od -An -t x8 /value)"
    else
        echo "rd $1 $2 $($B cat /error)"
    fi
}
$B echo "cpus $($B grep -c ^processor /proc/cpuinfo)"
$B grep -m1 ^microcode /proc/cpuinfo
$B grep -m1 "cpu cores" /proc/cpuinfo
SCRIPT
$B echo "guest done"
$B poweroff -f
"#;

/// The lane's folder with a kernel, or `None` where the test is to be skipped.
fn boot() -> Option<PathBuf> {
    let folder = std::env::var_os("MSRGATE_LANE_BOOT").map(PathBuf::from);
    let reason = match &folder {
        Some(folder) if !folder.join("vmlinux").exists() => "MSRGATE_LANE_BOOT has no vmlinux",
        Some(_) if find("qemu-system-x86_64").is_none() => "there is no qemu-system-x86_64",
        Some(_) if find("busybox").is_none() => "there is no busybox",
        Some(_) => return folder,
        None => "not in the nested lane with this machine's files",
    };
    println!("skipped: {reason}");
    None
}

/// An initramfs whose init runs `script`.
fn initramfs(folder: &Folder, boot: &Path, script: &str) -> PathBuf {
    let root = folder.path().join("root");
    for name in ["bin", "proc", "dev"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(find("busybox").unwrap(), root.join("bin/busybox")).unwrap();
    fs::copy(boot.join("modules/msr.ko"), root.join("msr.ko")).unwrap();
    fs::write(root.join("init"), INIT.replace("SCRIPT", script)).unwrap();
    let pack = "chmod 755 root/init && cd root && find . | busybox cpio -o -H newc > ../initrd";
    let mut packer = Command::new("sh");
    packer.args(["-c", pack]).current_dir(folder.path());
    assert!(packer.stderr(Stdio::null()).status().unwrap().success());
    folder.path().join("initrd")
}

/// What the guest prints, and the command's standard error.
fn console(before: &[&str], machine: &[&str], script: &str) -> Option<(String, String)> {
    let boot = boot()?;
    let folder = Folder::furnished();
    let initrd = initramfs(&folder, &boot, script);
    let mut command = match before {
        [] => Command::new("qemu-system-x86_64"),
        before => {
            let mut command = folder.command(before);
            command.args(["--", "qemu-system-x86_64"]);
            command
        }
    };
    command.arg("-no-reboot").args(machine).args(guest(&boot, &initrd));
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    println!(
        "{before:?} {machine:?}: {:.1} s\n{text}{error}",
        start.elapsed().as_secs_f64()
    );
    assert!(output.status.success(), "{:?}\n{text}\n{error}", output.status);
    assert!(text.contains("guest done"), "{text}\n{error}");
    Some((text, error))
}

/// QEMU's arguments for the guest.
fn guest(boot: &Path, initrd: &Path) -> Vec<String> {
    let fixed = "-accel kvm -cpu host -m 256 -nodefaults -display none -serial stdio -append";
    let append = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check random.trust_cpu=on audit=0 \
                  cryptomgr.notests";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    let files = [("-kernel", boot.join("vmlinux")), ("-initrd", initrd.to_path_buf())];
    arguments.push(append.to_owned());
    for (option, path) in files {
        arguments.extend([option.to_owned(), path.display().to_string()]);
    }
    arguments
}

const MICROVM: &[&str] = &["-M", "microvm,rtc=on"];
const READ_REVISION: &str = "rd 0 0x8b";

/// What the guest's line that begins with `start` says after it.
#[track_caller]
fn line<'a>(text: &'a str, start: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(start));
    line.unwrap_or_else(|| panic!("no line `{start}`:\n{text}")).trim()
}

#[test]
fn a_guest_of_qemu_sees_the_policys_microcode_revision_and_another_without_it() {
    let Some((without, _)) = console(&[], MICROVM, READ_REVISION) else {
        return;
    };
    let policy = ["run", "-p", "policies/fixed-microcode.toml"];
    let Some((with, _)) = console(&policy, MICROVM, READ_REVISION) else {
        return;
    };
    assert_eq!(line(&with, "rd 0 0x8b"), "0100000000000000");
    assert_ne!(line(&without, "rd 0 0x8b"), line(&with, "rd 0 0x8b"));
}

#[test]
fn a_denied_msr_is_eio_in_the_guest_and_the_topology_is_qemus() {
    let policy = r#"
version = 1
name = "test"
default = "allow"
[[rule]]
msr = "IA32_BIOS_SIGN_ID"
read = "deny"
"#;
    let folder = Folder::new();
    folder.write("policy.toml", policy);
    let path = folder.path().join("policy.toml");
    let run = ["run", "-p", path.to_str().unwrap()];
    let machine = ["-M", "microvm,rtc=on", "-smp", "4,cores=2,threads=2"];
    let script = "rd 0 0x8b\nrd 3 0x8b\nrd 0 0x10\nrd 0 0x35";
    let Some((text, _)) = console(&run, &machine, script) else {
        return;
    };
    for start in ["rd 0 0x8b", "rd 3 0x8b"] {
        assert!(line(&text, start).contains("Input/output error"), "{text}");
    }
    assert!(!line(&text, "rd 0 0x10").contains("error"), "{text}");
    assert_eq!(line(&text, "cpus"), "4");
    // QEMU answers this one itself.
    assert_eq!(line(&text, "rd 0 0x35"), "0000000000020004");
}

#[test]
fn a_boot_that_was_learned_boots_with_all_else_denied_in_qemus_sandbox() {
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let trace = path("trace.jsonl");
    let learn = ["run", "--learn", "--trace", &trace];
    let Some((text, _)) = console(&learn, MICROVM, READ_REVISION) else {
        return;
    };
    // What the guest sees is the kernel's own.
    assert_ne!(line(&text, "rd 0 0x8b"), "0100000000000000");
    let lines = fs::read(&trace).unwrap();
    let lines = msrgate_policy::trace::Lines::new(lines.as_slice()).unwrap();
    let mut rules = String::new();
    let mut touched = 0;
    for event in lines.map(Result::unwrap) {
        let op = if event.op == msrgate_core::Op::Read {
            "read"
        } else {
            "write"
        };
        rules.push_str(&format!("[[rule]]\nmsr = \"{}\"\n{op} = \"allow\"\n", event.msr));
        touched += 1;
    }
    println!("{touched} MSRs and directions");
    assert!(touched > 50, "{touched}");
    folder.write(
        "policy.toml",
        format!("version = 1\nname = \"learned\"\ndefault = \"deny\"\n{rules}"),
    );
    let policy = path("policy.toml");
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let machine = [MICROVM, &["-sandbox", sandbox]].concat();
    let run = ["run", "-p", &policy];
    let Some((text, _)) = console(&run, &machine, "rd 0 0x8b\nrd 0 0xc0010299") else {
        return;
    };
    assert_eq!(line(&text, "cpus"), "1");
    assert!(line(&text, "rd 0 0xc0010299").contains("Input/output error"), "{text}");
    let replay = folder.run(&["replay", "--json", "--backend", "kvm", "-p", &policy, &trace]);
    let report = replay.code(0).json();
    assert_eq!(command::count(&report, "changed"), 0, "{report:#}");
}

#[test]
fn unknown_msrs_read_as_zero_on_a_pc_of_two_cpus() {
    let machine = ["-M", "pc", "-smp", "2"];
    let Some((text, error)) = console(&["run", "--ignore-unknown"], &machine, "rd 1 0xdead0000") else {
        return;
    };
    assert_eq!(line(&text, "cpus"), "2");
    assert_eq!(line(&text, "rd 1 0xdead0000"), "0000000000000000");
    assert!(error.contains("0xdead0000"), "{error}");
}

#[test]
fn a_vm_that_is_started_as_libvirt_does_it_has_the_policy() {
    let Some(boot) = boot() else { return };
    let folder = Folder::furnished();
    let initrd = initramfs(&folder, &boot, READ_REVISION);
    // What stands as <emulator>: descriptors are closed but for the one that is passed, the VM starts paused.
    let emulator = r#"exec 9</dev/null 3<&- 4<&- 5<&-; exec timeout 90 "$0" run -p policies/fixed-microcode.toml -- qemu-system-x86_64 "$@""#;
    let mut command = Command::new("sh");
    command
        .args(["-c", emulator])
        .arg(command::program())
        .current_dir(folder.path());
    command.args(["-S", "-add-fd", "set=1,fd=9", "-qmp", "unix:qmp,server=on,wait=off"]);
    command.arg("-no-reboot").args(MICROVM).args(guest(&boot, &initrd));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let mut qemu = command.spawn().unwrap();
    let out = BufReader::new(qemu.stdout.take().unwrap());

    let socket = folder.path().join("qmp");
    let start = Instant::now();
    let mut monitor = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(start.elapsed().as_secs() < 60, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    monitor
        .write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"cont\"}")
        .unwrap();
    let text: Vec<String> = out.lines().map(Result::unwrap).collect();
    assert_eq!(line(&text.join("\n"), "rd 0 0x8b"), "0100000000000000");
    assert!(qemu.wait().unwrap().success());
}
