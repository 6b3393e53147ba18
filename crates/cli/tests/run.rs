//! `run` and programs that use no KVM.

mod command;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use command::{Folder, Ran, find};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MICROCODE: [&str; 4] = ["run", "-p", "policies/fixed-microcode.toml", "--"];

fn run(folder: &Folder, command: &[&str]) -> Ran {
    folder.run(&[&MICROCODE[..], command].concat())
}

fn started(folder: &Folder, script: &str) -> (Child, BufReader<impl Read + use<>>) {
    let mut command = folder.command(&[&MICROCODE[..], &["sh", "-c", script]].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

fn line(out: &mut impl BufRead) -> String {
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    line.trim().to_owned()
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Waits until the process is in a state, a letter of `/proc/PID/stat`.
fn wait_for(pid: Pid, state: char) {
    let start = Instant::now();
    loop {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        if stat.rsplit(')').next().unwrap().trim().starts_with(state) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{stat}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_program_without_kvm_runs_unchanged() {
    let folder = Folder::furnished();
    let ran = folder.run_with(
        &[&MICROCODE[..], &["sh", "-c", "cat; echo $0 $1; exit 7", "a", "b c"]].concat(),
        "input\n",
    );
    let ran = ran.code(7);
    assert_eq!(ran.out, "input\na b c\n");
    ran.says(&["no VM was made"]);
}

#[test]
fn a_script_is_started_as_a_shell_starts_it() {
    let folder = Folder::furnished();
    folder.write("vmm", "#!/bin/sh\necho \"$1\"\n");
    fs::set_permissions(folder.path().join("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(run(&folder, &["./vmm", "x"]).code(0).out, "x\n");
}

#[test]
fn the_vmms_own_options_are_not_the_commands() {
    let folder = Folder::furnished();
    let policy = &MICROCODE[..3];
    for rest in [&["--", "echo", "-p", "--json"][..], &["echo", "-p", "--json"]] {
        assert_eq!(folder.run(&[policy, rest].concat()).code(0).out, "-p --json\n");
    }
    folder
        .run(&[policy, &["--no-such", "true"]].concat())
        .code(2)
        .says(&["--no-such"]);
    folder
        .run(&["run", "true", "-p", "x.toml"])
        .code(2)
        .says(&["--policy <POLICY>"]);
}

#[test]
fn what_was_preloaded_before_still_is() {
    let folder = Folder::furnished();
    let mut command = folder.command(&[&MICROCODE[..], &["sh", "-c", "echo $LD_PRELOAD"]].concat());
    let ran = Ran::of(command.env("LD_PRELOAD", "libc.so.6")).code(0);
    assert!(
        ran.out.trim().ends_with("libmsrgate_preload.so:libc.so.6"),
        "{}",
        ran.out
    );
}

#[test]
fn the_end_of_the_program_is_the_end_of_the_command() {
    use std::os::unix::process::ExitStatusExt;
    let folder = Folder::furnished();
    for (signal, number) in [("KILL", 9), ("SEGV", 11), ("TERM", 15)] {
        let mut command = folder.command(&[&MICROCODE[..], &["sh", "-c", &format!("kill -{signal} $$")]].concat());
        assert_eq!(command.output().unwrap().status.signal(), Some(number));
    }
}

#[test]
fn signals_go_on_to_the_program() {
    let folder = Folder::furnished();
    let script = "trap 'exit 9' TERM; trap 'echo hup' HUP; echo up; while :; do sleep 0.02; done";
    let (mut child, mut out) = started(&folder, script);
    assert_eq!(line(&mut out), "up");
    // What a trace that has become too long brings about is the command's own affair.
    kill(pid(&child), Signal::SIGXFSZ).unwrap();
    kill(pid(&child), Signal::SIGHUP).unwrap();
    assert_eq!(line(&mut out), "hup");
    kill(pid(&child), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn a_summary_is_printed_on_sigusr1_and_the_program_does_not_see_it() {
    let folder = Folder::furnished();
    let (mut child, mut out) = started(
        &folder,
        "echo up; read line < /dev/null; while [ ! -e stop ]; do sleep 0.02; done",
    );
    assert_eq!(line(&mut out), "up");
    kill(pid(&child), Signal::SIGUSR1).unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    assert!(line(&mut errors).contains("no VM was made"));
    folder.write("stop", "");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(line(&mut errors).contains("no VM was made"));
}

#[test]
fn the_command_stops_and_goes_on_with_the_program() {
    let folder = Folder::furnished();
    let (mut child, mut out) = started(&folder, "echo $$; while [ ! -e go ]; do sleep 0.02; done; echo on");
    let program = Pid::from_raw(line(&mut out).parse().unwrap());
    kill(pid(&child), Signal::SIGTSTP).unwrap();
    wait_for(program, 'T');
    wait_for(pid(&child), 'T');
    folder.write("go", "");
    kill(pid(&child), Signal::SIGCONT).unwrap();
    assert_eq!(line(&mut out), "on");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_command_that_is_killed_takes_the_program_along() {
    let folder = Folder::furnished();
    let (mut child, mut out) = started(&folder, "echo up; while :; do sleep 0.02; done");
    assert_eq!(line(&mut out), "up");
    kill(pid(&child), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    // Its end of the pipe closes when it ends.
    assert_eq!(out.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
fn what_goes_on_in_the_background_has_a_process_that_stays_with_it_and_the_command_returns() {
    let folder = Folder::furnished();
    let script = "sh -c 'while [ ! -e go ]; do sleep 0.02; done; read pid comm state parent rest < /proc/$$/stat; \
                  echo $parent $(cat /proc/$parent/comm) > who' > /dev/null 2>&1 < /dev/null & exit 3";
    // It ends though the output is read to its end, and only once whoever could write it is gone.
    let ran = run(&folder, &["sh", "-c", script]).code(3);
    ran.says(&["no VM was made so far", "goes on in the background"]);
    folder.write("go", "");
    let start = Instant::now();
    let who = loop {
        let who = fs::read_to_string(folder.path().join("who")).unwrap_or_default();
        if who.ends_with('\n') {
            break who;
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    };
    let (keeper, name) = who.trim().split_once(' ').unwrap();
    assert_eq!(name, "msrgate");
    // It ends when there is nothing left to stay with.
    while fs::read_to_string(format!("/proc/{keeper}/stat")).is_ok_and(|stat| !stat.contains(") Z")) {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An ELF file with these program headers: type, offset and size of what they point to.
fn elf(headers: &[(u32, u64, u64)], rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64, 0);
    bytes[18] = 62;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = headers.len() as u8;
    for (kind, offset, size) in headers {
        let mut header = kind.to_le_bytes().to_vec();
        header.resize(56, 0);
        header[8..16].copy_from_slice(&offset.to_le_bytes());
        header[32..40].copy_from_slice(&size.to_le_bytes());
        bytes.extend(header);
    }
    bytes.extend(rest);
    bytes
}

#[test]
fn programs_that_would_run_without_the_policy_are_refused_with_the_reason() {
    let folder = Folder::furnished();
    let go = b"\x04\0\0\0\x53\0\0\0\x04\0\0\0Go\0\0build";
    let at = 64 + 2 * 56;
    let mut foreign = elf(&[(3, 0, 0)], b"");
    foreign[4] = 1;
    let musl = b"/lib/ld-musl-x86_64.so.1\0";
    let interpreter = (3, 64 + 56, musl.len() as u64);
    for (name, bytes, why) in [
        ("foreign", foreign, "is a program for another kind of processor"),
        ("static", elf(&[(1, 0, 0)], b""), "is linked statically"),
        (
            "musl",
            elf(&[interpreter], musl),
            "another C library than glibc (its dynamic linker is `/lib/ld-musl-x86_64.so.1`)",
        ),
        ("go", elf(&[(3, 0, 0), (4, at, go.len() as u64)], go), "is a Go program"),
    ] {
        folder.write(name, bytes);
        fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(0o755)).unwrap();
        run(&folder, &[&format!("./{name}")]).code(3).says(&[why]);
    }
    if nix::unistd::Uid::current().is_root() {
        fs::copy(find("true").unwrap(), folder.path().join("other")).unwrap();
        let other = folder.path().join("other");
        std::os::unix::fs::chown(&other, Some(65534), None).unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o4755)).unwrap();
        run(&folder, &["./other"])
            .code(3)
            .says(&["gains rights when it starts"]);
    }
}

#[test]
fn what_cannot_be_done_is_said_before_the_program_starts() {
    let folder = Folder::furnished();
    run(&folder, &["no-such-vmm"])
        .code(2)
        .says(&["`no-such-vmm` is not in PATH"]);
    run(&folder, &["./no-such-vmm"]).code(2).says(&["cannot be started"]);
    folder.write("vmm", "#!/no/such/shell\n");
    run(&folder, &["./vmm"])
        .code(2)
        .says(&["it is not executable for this user"]);
    fs::set_permissions(folder.path().join("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
    run(&folder, &["./vmm"])
        .code(2)
        .says(&["its interpreter, which its first line names"]);
    let mut command = folder.command(&[&MICROCODE[..], &["true"]].concat());
    let twice = Ran::of(command.env("MSRGATE_RUN", "1:500:2:501:3"));
    twice.code(2).says(&["under `msrgate run` already", "`extends`"]);
    let handler =
        "version = 1\nname = \"x\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = { handler = \"mine\" }\n";
    folder.write("handler.toml", handler);
    let ran = folder.run(&["run", "-p", "handler.toml", "--", "sh", "-c", "echo started"]);
    assert_eq!(ran.code(2).says(&["the handler `mine`", "code of a VMM"]).out, "");
    let mut command = folder.command(&[&MICROCODE[..], &["true"]].concat());
    let missing = Ran::of(command.env("MSRGATE_PRELOAD", "/no/such.so"));
    missing.code(3).says(&["MSRGATE_PRELOAD names `/no/such.so`"]);
    folder.write("by_cpuid.toml", format!("{handler}when = {{ vendor = \"amd\" }}\n"));
    let ran = folder.run(&["run", "-p", "by_cpuid.toml", "--", "sh", "-c", "echo started"]);
    assert_eq!(ran.code(2).says(&["the handler `mine`", "code of a VMM"]).out, "");
    folder.run(&["run", "--", "true"]).code(2).says(&["--policy"]);
    let unwritable = [
        "run",
        "-p",
        "policies/fixed-microcode.toml",
        "--trace",
        "/no/such/file",
        "--",
        "true",
    ];
    folder.run(&unwritable).code(2).says(&["cannot write `/no/such/file`"]);
}
