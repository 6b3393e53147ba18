//! Debian's QEMU, unmodified, boots Linux under `msrgate run`.
//!
//! Needs a kernel and modules for the guest, which the nested lane has where this machine's files are its root; skipped
//! elsewhere. `cargo xtask test --only qemu` runs it there; or, to look at one test:
//!
//! ```text
//! cargo test -p msrgate-cli --no-run
//! cargo xtask nested --mem 1536 -- env MSRGATE_BIN=$PWD/target/debug/msrgate target/debug/deps/nested_qemu-… --nocapture NAME
//! ```

#[allow(unused_macros, reason = "a part of it")]
mod command;
mod policies;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use command::{Folder, find, wait_until};
use nix::unistd::Pid;
use policies::{Attach, BY_VENDOR, MICROCODE, with_policy};
use serde_json::{Value, json};

/// Reads commands from its serial port and does them. `rd CPU MSR` and `wr CPU MSR VALUE` tell what the device of that
/// CPU gives.
const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc none /proc
$B mount -t devtmpfs none /dev
$B insmod /msr.ko allow_writes=on
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
$B stty -echo
rd() {
    if $B dd if=/dev/cpu/$1/msr bs=8 count=1 iflag=skip_bytes skip=$(($2)) of=/value 2>/error; then
        echo "rd $1 $2 0x$($B od -An -t x8 /value | $B tr -d ' ')"
    else
        echo "rd $1 $2 $($B cat /error)"
    fi
}
wr() {
    rest=$(($3)) bytes=
    for i in 0 1 2 3 4 5 6 7; do
        bytes="$bytes\\x$($B printf %02x $((rest & 255)))"
        rest=$((rest >> 8))
    done
    if $B printf "$bytes" | $B dd of=/dev/cpu/$1/msr bs=8 oflag=seek_bytes seek=$(($2)) conv=notrunc 2>/error; then
        echo "wr $1 $2 done"
    else
        echo "wr $1 $2 $($B cat /error)"
    fi
}
echo "@ready"
while read -r line; do
    eval "$line"
    echo "@end"
done
"#;

/// How long a guest may take to boot, on a busy machine.
const BOOT: Duration = Duration::from_secs(240);
/// How long it may take for a command.
const ANSWER: Duration = Duration::from_secs(120);

/// The guest's kernel's command line.
const APPEND: &str = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check random.trust_cpu=on audit=0 \
                      cryptomgr.notests";
const MICROVM: &[&str] = &["-M", "microvm,rtc=on"];

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

/// A folder with an initramfs, the policies, and this one as `policy.toml`.
fn furnished(boot: &Path, policy: &str) -> Folder {
    let folder = with_policy(policy);
    let root = folder.path().join("root");
    for name in ["bin", "proc", "dev"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(find("busybox").unwrap(), root.join("bin/busybox")).unwrap();
    fs::copy(boot.join("modules/msr.ko"), root.join("msr.ko")).unwrap();
    executable(&root.join("init"), INIT);
    let mut packer = Command::new("sh");
    packer.args(["-c", "cd root && find . | busybox cpio -o -H newc > ../initrd"]);
    let packed = packer.current_dir(folder.path()).stderr(Stdio::null()).status();
    assert!(packed.unwrap().success());
    folder
}

fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A socket of QEMU's, once it is there.
fn connected(socket: &Path) -> UnixStream {
    let mut stream = None;
    wait_until(|| {
        stream = UnixStream::connect(socket).ok();
        stream.is_some()
    });
    stream.unwrap()
}

/// What comes before QEMU's own arguments.
fn under(options: &[&str]) -> Vec<String> {
    let program = command::program().to_str().unwrap().to_owned();
    let words = [&["run"], options, &["--", "qemu-system-x86_64"]].concat();
    [program]
        .into_iter()
        .chain(words.into_iter().map(str::to_owned))
        .collect()
}

fn bare() -> Vec<String> {
    vec!["qemu-system-x86_64".to_owned()]
}

/// A guest that waits for commands on its serial port.
struct Guest<'a> {
    folder: &'a Folder,
    command: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
    start: Instant,
}

impl<'a> Guest<'a> {
    /// Boots the lane's kernel: its `vmlinux`, or its `vmlinuz`, which comes back from a reset.
    ///
    /// An emulated machine hangs now and then, with msrgate or without: a guest that does not come up is tried once more.
    fn boots(folder: &'a Folder, command: &[String], machine: &[&str], kernel: &Path) -> Guest<'a> {
        for last in [false, true] {
            let mut guest = Guest::starts(folder, command, machine, kernel);
            match guest.is_ready() {
                Ok(()) => return guest,
                Err(text) if last => panic!("no boot:\n{text}\n{}", guest.killed().1),
                Err(text) => println!("no boot, trying once more:\n{text}\n{}", guest.killed().1),
            }
        }
        unreachable!("the second is the last")
    }

    fn starts(folder: &'a Folder, command: &[String], machine: &[&str], kernel: &Path) -> Guest<'a> {
        println!("{command:?} {machine:?}");
        let _ = fs::remove_file(folder.path().join("qmp"));
        let (program, first) = command.split_first().unwrap();
        let mut command = Command::new(program);
        command.args(first).args(machine).arg("-kernel").arg(kernel);
        let fixed = "-accel kvm -cpu host -m 256 -nodefaults -display none -serial stdio -initrd initrd \
                     -qmp unix:qmp,server=on,wait=off";
        command.args(fixed.split_whitespace());
        command.args(["-append", APPEND]).current_dir(folder.path());
        let pipes = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut command = pipes.spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let out = BufReader::new(command.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                println!("    {line}");
                let _ = sender.send(line);
            }
        });
        let mut stderr = command.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Guest {
            folder,
            input: command.stdin.take().unwrap(),
            command,
            lines,
            errors: Some(errors),
            start: Instant::now(),
        }
    }

    /// Waits until it takes commands; what it said instead where it does not.
    fn is_ready(&mut self) -> Result<(), String> {
        self.until("@ready", BOOT)?;
        println!("    up after {:.1} s", self.start.elapsed().as_secs_f64());
        Ok(())
    }

    fn until(&mut self, mark: &str, patience: Duration) -> Result<String, String> {
        let (mut text, end) = (String::new(), Instant::now() + patience);
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line == mark => return Ok(text),
                Ok(line) => text = format!("{text}{line}\n"),
                Err(_) => return Err(text),
            }
        }
    }

    /// What the guest says to a command.
    #[track_caller]
    fn says(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        self.until("@end", ANSWER).unwrap_or_else(|text| {
            let _ = self.command.kill();
            let (status, errors) = self.ended();
            panic!("no end of `{command}`:\n{text}\n{errors}\n{status}")
        })
    }

    /// What an access gives: `rd CPU MSR` a value or an error, `wr CPU MSR VALUE` `done` or an error.
    #[track_caller]
    fn gets(&mut self, access: &str) -> String {
        let said = self.says(access);
        let start: Vec<&str> = access.splitn(4, ' ').take(3).collect();
        let line = said.lines().find_map(|line| line.strip_prefix(&start.join(" ")));
        line.unwrap_or_else(|| panic!("no line `{access}`:\n{said}"))
            .trim()
            .to_owned()
    }

    #[track_caller]
    fn faults(&mut self, access: &str) {
        let got = self.gets(access);
        assert!(got.contains("Input/output error"), "{access}: {got}");
    }

    /// One of QEMU's own commands, for machines and for people.
    fn monitor(&self, command: &Value) -> Value {
        let mut monitor = connected(&self.folder.path().join("qmp"));
        let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines().map(Result::unwrap);
        let mut ask = |command: &Value| {
            writeln!(monitor, "{command}").unwrap();
            loop {
                let answer: Value = serde_json::from_str(&answers.next().unwrap()).unwrap();
                assert!(answer.get("error").is_none(), "{command}: {answer}");
                if let Some(answer) = answer.get("return") {
                    return answer.clone();
                }
            }
        };
        ask(&json!({ "execute": "qmp_capabilities" }));
        ask(command)
    }

    fn tells_qemu(&self, line: &str) {
        let arguments = json!({ "command-line": line });
        let said = self.monitor(&json!({ "execute": "human-monitor-command", "arguments": arguments }));
        assert_eq!(said, "", "{line}");
    }

    /// Powers it off, and gives standard error.
    fn off(mut self) -> String {
        writeln!(self.input, "$B poweroff -f").unwrap();
        let (status, errors) = self.ended();
        assert!(status.success(), "{status}\n{errors}");
        errors
    }

    fn ended(&mut self) -> (ExitStatus, String) {
        let status = self.command.wait().unwrap();
        let errors = self.errors.take().unwrap().join().unwrap();
        println!("{errors}    {status} after {:.1} s", self.start.elapsed().as_secs_f64());
        (status, errors)
    }

    fn killed(mut self) -> (ExitStatus, String) {
        self.command.kill().unwrap();
        self.ended()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // `run` takes QEMU along.
        let _ = self.command.kill();
        let _ = self.command.wait();
    }
}

#[test]
fn a_guest_of_qemu_sees_the_policys_microcode_revision_and_another_without_it() {
    let Some(boot) = boot() else { return };
    let kernel = boot.join("vmlinux");
    let folder = furnished(
        &boot,
        "default = \"allow\"\n[[rule]]\nmsr = \"IA32_BIOS_SIGN_ID\"\nread = { value = \"0x0100000000012345\" }\nwrite = \"ignore\"\n",
    );
    let mut guest = Guest::boots(&folder, &bare(), MICROVM, &kernel);
    let without = guest.gets("rd 0 0x8b");
    guest.off();
    let mut guest = Guest::boots(&folder, &under(&["-p", "policy.toml"]), MICROVM, &kernel);
    assert_eq!(guest.gets("rd 0 0x8b"), "0x0100000000012345");
    assert_ne!(without, "0x0100000000012345");
    let microcode = guest.says("$B grep -m1 ^microcode /proc/cpuinfo");
    assert!(microcode.trim().ends_with(": 0x12345"), "{microcode}");
    guest.off();
}

#[test]
fn a_denied_msr_is_eio_in_the_guest_and_the_topology_is_qemus() {
    let Some(boot) = boot() else { return };
    let folder = furnished(
        &boot,
        "default = \"allow\"\n[[rule]]\nmsr = \"IA32_BIOS_SIGN_ID\"\nread = \"deny\"\n",
    );
    let machine = [MICROVM, &["-smp", "4,cores=2,threads=2"]].concat();
    let run = under(&["-p", "policy.toml"]);
    let mut guest = Guest::boots(&folder, &run, &machine, &boot.join("vmlinux"));
    guest.faults("rd 0 0x8b");
    guest.faults("rd 3 0x8b");
    assert!(guest.gets("rd 0 0x10").starts_with("0x"));
    assert_eq!(guest.says("$B grep -c ^processor /proc/cpuinfo").trim(), "4");
    // QEMU answers this one itself.
    assert_eq!(guest.gets("rd 0 0x35"), "0x0000000000020004");
    guest.off();
}

#[test]
fn a_boot_that_was_learned_boots_with_all_else_denied_in_qemus_sandbox() {
    let Some(boot) = boot() else { return };
    let kernel = boot.join("vmlinux");
    let folder = furnished(&boot, "default = \"allow\"\n");
    let learn = under(&["--learn", "--trace", "trace.jsonl"]);
    let mut guest = Guest::boots(&folder, &learn, MICROVM, &kernel);
    // What the guest sees is the kernel's own.
    assert_ne!(guest.gets("rd 0 0x8b"), "0x0100000000000000");
    guest.off();
    learned(&folder);
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let machine = [MICROVM, &["-sandbox", sandbox]].concat();
    let mut guest = Guest::boots(&folder, &under(&["-p", "policy.toml"]), &machine, &kernel);
    assert_eq!(guest.says("$B grep -c ^processor /proc/cpuinfo").trim(), "1");
    assert!(guest.gets("rd 0 0x8b").starts_with("0x"));
    guest.faults("rd 0 0xc0010299");
    guest.off();
    nothing_changed(&folder);
}

#[test]
fn a_boot_of_four_cpus_that_was_learned_boots_with_all_else_denied_on_pc_and_q35() {
    let Some(boot) = boot() else { return };
    let kernel = boot.join("vmlinux");
    for machine in [["-M", "pc", "-smp", "4"], ["-M", "q35", "-smp", "4"]] {
        let folder = furnished(&boot, "default = \"allow\"\n");
        let learn = under(&["--learn", "--trace", "trace.jsonl"]);
        Guest::boots(&folder, &learn, &machine, &kernel).off();
        learned(&folder);
        let mut guest = Guest::boots(&folder, &under(&["-p", "policy.toml"]), &machine, &kernel);
        assert_eq!(guest.says("$B grep -c ^processor /proc/cpuinfo").trim(), "4");
        guest.faults("rd 3 0xc0010299");
        guest.off();
        nothing_changed(&folder);
    }
}

/// Makes `policy.toml` of what `trace.jsonl` has.
fn learned(folder: &Folder) {
    let policy = folder.run(&["learn", "trace.jsonl"]).code(0).out;
    let rules = policy.matches("[[rule]]").count();
    println!("{rules} rules");
    assert!(rules > 10, "{policy}");
    folder.write("policy.toml", policy);
}

/// A guest that does what `trace.jsonl` has gets under `policy.toml` what it gets without.
fn nothing_changed(folder: &Folder) {
    let arguments = "replay --json --backend kvm -p policy.toml trace.jsonl";
    let words: Vec<&str> = arguments.split(' ').collect();
    let report = folder.run(&words).code(0).json();
    assert_eq!(command::count(&report, "changed"), 0, "{report:#}");
    assert!(command::count(&report, "accesses") > 50, "{report:#}");
}

#[test]
fn a_policy_that_depends_on_the_cpuid_is_the_one_for_qemus_cpu() {
    let Some(boot) = boot() else { return };
    // The lane's CPU is AMD's, which has no IA32_MISC_ENABLE.
    let folder = furnished(&boot, &format!("valid = \"cpu-model\"\n{BY_VENDOR}"));
    let machine = ["-M", "pc", "-smp", "2"];
    let run = under(&["-p", "policy.toml"]);
    let mut guest = Guest::boots(&folder, &run, &machine, &boot.join("vmlinux"));
    for cpu in 0..2 {
        assert_eq!(guest.gets(&format!("rd {cpu} 0x8b")), "0x0000000000000022");
        guest.faults(&format!("rd {cpu} 0x1a0"));
    }
    guest.off();
}

#[test]
fn presets_are_on_each_of_four_cpus_of_a_pc_and_unknown_msrs_read_as_zero() {
    let Some(boot) = boot() else { return };
    let folder = furnished(&boot, "default = \"allow\"\n");
    let run = under(&[MICROCODE, &["--ignore-unknown"]].concat());
    let machine = ["-M", "pc", "-smp", "4"];
    let mut guest = Guest::boots(&folder, &run, &machine, &boot.join("vmlinux"));
    assert_eq!(guest.says("$B grep -c ^processor /proc/cpuinfo").trim(), "4");
    for cpu in 0..4 {
        assert_eq!(guest.gets(&format!("rd {cpu} 0x8b")), "0x0100000000000000");
    }
    assert_eq!(guest.gets("rd 3 0xdead0000"), "0x0000000000000000");
    assert_eq!(guest.gets("wr 3 0xdead0000 7"), "done");
    let errors = guest.off();
    assert!(errors.contains("0xdead0000") && errors.contains(PRESET), "{errors}");
}

/// A revision of microcode, a register with a memory, and one that is written once.
const MEMORY: &str = r#"
default = "allow"
[[rule]]
msr = "IA32_BIOS_SIGN_ID"
read = { value = "0x0100000000000000" }
write = "ignore"
[[rule]]
msr = "0xdead0001"
read = { shadow = "0x11" }
write = "shadow"
[[rule]]
msr = "0x402"
write = { once = true }
"#;

/// QEMU sets this register at each reset and where it loads a state.
const PRESET: &str = "the kernel holds the policy's fixed answers of 0x8b: reads of these make no exit";

#[test]
fn after_a_reboot_the_policy_is_in_force_and_remembers_nothing() {
    let Some(boot) = boot() else { return };
    let folder = furnished(&boot, MEMORY);
    let run = under(&["-p", "policy.toml"]);
    let mut guest = Guest::boots(&folder, &run, &["-M", "pc"], &boot.join("vmlinuz"));
    for last in [false, true] {
        assert_eq!(guest.gets("rd 0 0x8b"), "0x0100000000000000");
        assert_eq!(guest.gets("rd 0 0xdead0001"), "0x0000000000000011");
        assert_eq!(guest.gets("wr 0 0xdead0001 0x22"), "done");
        assert_eq!(guest.gets("rd 0 0xdead0001"), "0x0000000000000022");
        assert_eq!(guest.gets("wr 0 0x402 6"), "done");
        guest.faults("wr 0 0x402 6");
        if !last {
            writeln!(guest.input, "$B reboot -f").unwrap();
            guest
                .is_ready()
                .unwrap_or_else(|text| panic!("no second boot:\n{text}"));
        }
    }
    let errors = guest.off();
    assert!(errors.contains(PRESET), "{errors}");
}

#[test]
fn a_snapshot_that_is_loaded_has_the_policy_and_no_lock_is_undone_by_it() {
    let Some(boot) = boot() else { return };
    if find("qemu-img").is_none() {
        println!("skipped: there is no qemu-img");
        return;
    }
    let folder = furnished(&boot, MEMORY);
    let mut disk = Command::new("qemu-img");
    disk.args(["create", "-q", "-f", "qcow2", "disk", "64M"])
        .current_dir(folder.path());
    assert!(disk.status().unwrap().success());
    let machine = ["-M", "pc", "-drive", "if=none,file=disk,format=qcow2"];
    let run = under(&["-p", "policy.toml"]);
    let mut guest = Guest::boots(&folder, &run, &machine, &boot.join("vmlinux"));
    assert_eq!(guest.gets("wr 0 0xdead0001 0x22"), "done");
    guest.tells_qemu("savevm here");
    assert_eq!(guest.gets("wr 0 0xdead0001 0x33"), "done");
    assert_eq!(guest.gets("wr 0 0x402 6"), "done");
    assert_eq!(guest.gets("rd 0 0x402"), "0x0000000000000006");
    guest.tells_qemu("loadvm here");
    assert_eq!(guest.gets("rd 0 0x8b"), "0x0100000000000000");
    // The kernel's register is in the snapshot; what the policy remembers is not.
    assert_eq!(guest.gets("rd 0 0x402"), "0x0000000000000000");
    guest.faults("wr 0 0x402 6");
    assert_eq!(guest.gets("rd 0 0xdead0001"), "0x0000000000000033");
    let errors = guest.off();
    assert!(errors.contains(PRESET), "{errors}");
}

#[test]
fn a_vm_that_is_started_as_libvirt_does_it_has_the_policy_and_leaves_nothing_when_it_is_killed() {
    let Some(boot) = boot() else { return };
    let folder = furnished(&boot, "default = \"allow\"\n");
    // What stands as <emulator>: descriptors are closed but for the one that is passed, the VM starts paused.
    let emulator = format!(
        "#!/bin/sh\nexec 9</dev/null 3<&- 4<&- 5<&-\nexec {} \"$@\"\n",
        under(MICROCODE).join(" ")
    );
    executable(&folder.path().join("emulator"), &emulator);
    let machine = [MICROVM, &["-S", "-add-fd", "set=1,fd=9"]].concat();
    let mut guest = Guest::starts(&folder, &["./emulator".to_owned()], &machine, &boot.join("vmlinux"));
    guest.monitor(&json!({ "execute": "cont" }));
    guest.is_ready().unwrap_or_else(|text| panic!("no boot:\n{text}"));
    assert_eq!(guest.gets("rd 0 0x8b"), "0x0100000000000000");

    assert!(!mapped().is_empty(), "the board is shared memory");
    let command = Pid::from_raw(guest.command.id().cast_signed());
    let keeper = child_of(command);
    let qemu = child_of(keeper);
    let processes = [command, keeper, qemu];
    assert!(!left_of(&processes).is_empty(), "a socket for `msrgate reload`");
    nix::sys::signal::kill(qemu, nix::sys::signal::Signal::SIGKILL).unwrap();
    let (status, errors) = guest.ended();
    assert_eq!(status.signal(), Some(9), "{status}");
    // What was counted is told all the same.
    assert!(errors.contains("1 VM and 1 vCPU"), "{errors}");
    drop(guest);
    assert_eq!(left_of(&processes), [""; 0].map(PathBuf::from));
    assert_eq!(mapped(), [""; 0]);
}

#[test]
fn a_daemon_has_the_policy_for_its_cpuid_and_its_trace_and_the_command_has_ended() {
    let Some(boot) = boot() else { return };
    let folder = furnished(&boot, BY_VENDOR);
    let options = ["-p", "policy.toml", "--trace", "trace.jsonl"];
    let run = under(&options);
    let (program, first) = run.split_first().unwrap();
    let mut command = Command::new(program);
    let fixed = "-daemonize -accel kvm -cpu host -m 256 -nodefaults -display none -initrd initrd \
                 -serial unix:serial,server=on";
    command.args(first).args(MICROVM).args(fixed.split_whitespace());
    command.arg("-kernel").arg(boot.join("vmlinux"));
    command.args(["-append", APPEND]);
    let mut started = command
        .current_dir(folder.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // QEMU waits for who reads its serial port before it goes into the background.
    let mut serial = connected(&folder.path().join("serial"));
    let mut lines = BufReader::new(serial.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut errors = String::new();
    started.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(started.wait().unwrap().success(), "{errors}");
    assert!(errors.contains("goes on in the background"), "{errors}");
    assert!(lines.any(|line| line.trim() == "@ready"));
    writeln!(serial, "rd 0 0x8b").unwrap();
    assert_eq!(
        lines.find(|line| line.starts_with("rd ")).unwrap().trim(),
        "rd 0 0x8b 0x0000000000000022"
    );
    let trace = || fs::read_to_string(folder.path().join("trace.jsonl")).unwrap();
    wait_until(|| trace().contains("\"0x8b\",\"value\":\"0x22\""));
    assert!(trace().contains("\"cpuid\":\"CPU:"));
    // As libvirt looks at what a QEMU can do, with the same options: a VM without a vCPU, and none.
    for probe in [
        "-machine none,accel=kvm -nodefaults -display none -monitor stdio",
        "--version",
    ] {
        let words: Vec<&str> = first.iter().map(String::as_str).chain(probe.split(' ')).collect();
        folder.run_with(&words, "quit\n").code(0);
    }
    assert!(trace().contains("\"0x8b\",\"value\":\"0x22\""));
    assert!(!folder.path().join("trace.jsonl.1").exists());
    writeln!(serial, "$B poweroff -f").unwrap();
    assert_eq!(lines.find(|line| line.starts_with("rd ")), None, "it is off");
    wait_until(|| mapped().is_empty());
}

/// What a guest reads of a CPU's microcode revision, and whether it may, while it boots, under two policies that take turns under
/// load, and afterwards.
#[test]
fn a_linux_that_boots_gets_the_policy_each_of_a_hundred_others_and_its_own_again() {
    let Some(boot) = boot() else { return };
    let kernel = boot.join("vmlinux");
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    for (machine, cpus, reloads) in [
        ([MICROVM, &["-sandbox", sandbox]].concat(), 1, 100),
        // The emulator has one CPU for the four.
        (vec!["-M", "pc", "-smp", "4"], 4, 20),
    ] {
        let denies = "default = \"allow\"\n[[rule]]\nmsr = \"IA32_BIOS_SIGN_ID\"\nread = \"deny\"\n";
        let folder = furnished(&boot, denies);
        folder.write("allows.toml", "version = 1\ndefault = \"allow\"\n");
        let mut guest = Guest::starts(&folder, &bare(), &machine, &kernel);
        let process = guest.command.id().to_string();
        let mut attach = None;
        wait_until(|| {
            // Until QEMU has a VM, and all its vCPUs.
            attach = Attach::start(&folder, &[], &process).ok();
            attach.is_some()
        });
        let attach = attach.unwrap();
        guest.is_ready().unwrap_or_else(|text| panic!("no boot:\n{text}"));
        let last = cpus - 1;
        guest.faults(&format!("rd {last} 0x8b"));
        // QEMU answers this one itself.
        let topology = guest.gets("rd 0 0x35");
        assert!(topology.starts_with("0x"), "{topology}");

        // Each CPU reads in a loop meanwhile, and counts what it gets.
        guest.says(
            "for cpu in $($B seq 0 $(($($B grep -c ^processor /proc/cpuinfo) - 1))); do (while [ ! -e /stop ]; do \
             if $B dd if=/dev/cpu/$cpu/msr bs=8 count=1 iflag=skip_bytes skip=139 of=/dev/null 2>/dev/null; \
             then echo got; else echo fault; fi; done > /counts.$cpu) & done",
        );
        for number in 0..reloads {
            let policy = ["allows.toml", "policy.toml"][number % 2];
            folder.run(&["reload", &process, "-p", policy]).code(0);
            if number % 10 == 0 {
                assert!(guest.gets(&format!("rd {last} 0x8b")).starts_with("0x"));
                guest.says("until $B grep -q got /counts.0; do :; done");
            }
        }
        guest.faults("rd 0 0x8b");
        guest.says("until $B grep -q fault /counts.0; do :; done");
        let counts = guest.says("$B touch /stop; wait; $B cat /counts.* | $B sort | $B uniq -c");
        let counts: Vec<&str> = counts.split_whitespace().collect();
        assert!(matches!(counts[..], [_, "fault", _, "got"]), "{counts:?}");

        let ended = attach.detach().code(0);
        ended.says(&["detached", "stood still for more than"]);
        for cpu in 0..cpus {
            assert!(guest.gets(&format!("rd {cpu} 0x8b")).starts_with("0x"));
        }
        assert_eq!(guest.gets("rd 0 0x35"), topology);
        guest.off();
    }
}

/// Files that outlive a process, of those whose names tell that they are these processes'. What others do there meanwhile, outside
/// of an emulated machine too, does not count.
fn left_of(processes: &[Pid]) -> Vec<PathBuf> {
    let folders = ["/dev/shm", "/tmp", "/run", "/run/msrgate"].map(fs::read_dir);
    let files = folders
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.unwrap().path());
    let is_theirs = |file: &PathBuf| {
        let name = file.file_name().unwrap().to_string_lossy();
        let mut numbers = name.split(|letter: char| !letter.is_ascii_digit());
        numbers.any(|number| {
            number
                .parse()
                .is_ok_and(|number| processes.contains(&Pid::from_raw(number)))
        })
    };
    files.filter(is_theirs).collect()
}

/// What processes have mapped of msrgate's shared memory.
fn mapped() -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let maps = processes.filter_map(|process| fs::read_to_string(process.join("maps")).ok());
    let lines = maps.flat_map(|maps| maps.lines().map(str::to_owned).collect::<Vec<_>>());
    lines.filter(|line| line.contains("memfd:msrgate")).collect()
}

fn child_of(parent: Pid) -> Pid {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let mut children = processes.filter(|process| {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        status.lines().any(|line| line == format!("PPid:\t{parent}"))
    });
    let child = children.next().expect("a child");
    Pid::from_raw(child.file_name().unwrap().to_str().unwrap().parse().unwrap())
}
