//! `run` and programs that use no KVM.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Folder, Ran, find, wait_until};

const MICROCODE: [&str; 4] = ["run", "-p", "policies/fixed-microcode.toml", "--"];

fn run(folder: &Folder, command: &[&str]) -> Ran {
    folder.run(&[&MICROCODE[..], command].concat())
}

fn started(folder: &Folder, script: &str) -> (Child, BufReader<impl Read + use<>>) {
    started_under(folder, &MICROCODE, script)
}

fn started_under(folder: &Folder, run: &[&str], script: &str) -> (Child, BufReader<impl Read + use<>>) {
    let mut command = folder.command(&[run, &["sh", "-c", script]].concat());
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
    wait_until(|| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().trim().starts_with(state)
    });
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
fn the_signal_that_a_vmm_dies_of_is_told() {
    let folder = Folder::furnished();
    let ends = |options: &[&str], script| {
        let run = [
            &["run", "-p", "policies/fixed-microcode.toml"],
            options,
            &["--", "sh", "-c", script],
        ];
        folder.run(&run.concat())
    };
    let dies = |options| ends(options, "kill -SEGV $$");
    let ran = dies(&[]);
    assert_eq!(ran.code, None, "{}", ran.err);
    ran.says(&["the VMM died of SIGSEGV", "no VM was made"]);
    let summary = |ran: &Ran| -> serde_json::Value { serde_json::from_str(ran.err.lines().last().unwrap()).unwrap() };
    let told = summary(&dies(&["--json"]));
    assert_eq!(
        (&told["signal"], &told["killed"]),
        (&"SIGSEGV".into(), &serde_json::Value::Null)
    );
    assert_eq!(
        summary(&ends(&["--json"], "exit 3").code(3))["signal"],
        serde_json::Value::Null
    );
}

#[test]
fn the_help_of_run_refuses_no_vmm_that_it_takes() {
    let help = Folder::new().run(&["run", "--help"]).code(0).out;
    for untrue in ["preload", "are refused", "glibc"] {
        assert!(!help.contains(untrue), "{untrue}: {help}");
    }
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
fn the_program_finds_its_environment_and_its_descriptors_as_they_were() {
    let folder = Folder::furnished();
    let what = "env | sort; ls -l /proc/self/fd | wc -l; grep -c msrgate /proc/self/maps";
    let of = |command: &mut std::process::Command| Ran::of(command.env("LD_PRELOAD", "libc.so.6").env("A", "b")).out;
    let mut plain = std::process::Command::new(find("sh").unwrap());
    plain.args(["-c", what]).current_dir(folder.path());
    let mut under = folder.command(&[&MICROCODE[..], &["sh", "-c", what]].concat());
    assert_eq!(of(&mut plain), of(&mut under));
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
    // Where no file is named SIGHUP is the program's too.
    let (mut child, mut out) = started_under(&folder, &["run", "--ignore-unknown", "--"], script);
    assert_eq!(line(&mut out), "up");
    // What a trace that has become too long brings about is the command's own affair.
    kill(pid(&child), Signal::SIGXFSZ).unwrap();
    kill(pid(&child), Signal::SIGHUP).unwrap();
    assert_eq!(line(&mut out), "hup");
    kill(pid(&child), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn sighup_reads_the_policy_again_and_the_program_does_not_see_it() {
    let folder = Folder::furnished();
    let script = "trap 'echo hup' HUP; echo up; while [ ! -e stop ]; do sleep 0.02; done";
    let (mut child, mut out) = started(&folder, script);
    assert_eq!(line(&mut out), "up");
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    kill(pid(&child), Signal::SIGHUP).unwrap();
    let said = line(&mut errors);
    assert!(
        said.contains("fixed-microcode.toml is in force from here on, on 0 VMs; 0 of 2^33"),
        "{said}"
    );
    folder.write("stop", "");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(line(&mut out), "");
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
fn a_program_that_somebody_else_stops_and_lets_go_on_takes_the_command_with_it_and_is_never_left_alone() {
    let folder = Folder::furnished();
    let (mut child, mut out) = started(
        &folder,
        "echo $$ $PPID; while [ ! -e go ]; do sleep 0.02; done; echo on",
    );
    let told = line(&mut out);
    let (program, monitor) = told.split_once(' ').unwrap();
    let [program, monitor] = [program, monitor].map(|process| Pid::from_raw(process.parse().unwrap()));
    for _ in 0..3 {
        kill(program, Signal::SIGSTOP).unwrap();
        wait_for(pid(&child), 'T');
        // What the program asks meanwhile, by another process of its, is answered.
        wait_for(monitor, 'S');
        kill(program, Signal::SIGCONT).unwrap();
        wait_for(pid(&child), 'S');
    }
    folder.write("go", "");
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
    let who = || fs::read_to_string(folder.path().join("who")).unwrap_or_default();
    wait_until(|| who().ends_with('\n'));
    let who = who();
    let (keeper, name) = who.trim().split_once(' ').unwrap();
    assert_eq!(name, "msrgate");
    // It ends when there is nothing left to stay with.
    wait_until(|| fs::read_to_string(format!("/proc/{keeper}/stat")).map_or(true, |stat| stat.contains(") Z")));
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
    let own = folder.command(&[]);
    let own = own.get_program().to_str().unwrap();
    let twice = run(&folder, &[&[own], &MICROCODE[..], &["true"]].concat());
    twice.code(3).says(&["an outer `msrgate run`", "`extends`"]);
    let handler =
        "version = 1\nname = \"x\"\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x8b\"\nread = { handler = \"mine\" }\n";
    folder.write("handler.toml", handler);
    let ran = folder.run(&["run", "-p", "handler.toml", "--", "sh", "-c", "echo started"]);
    assert_eq!(ran.code(2).says(&["the handler `mine`", "code of a VMM"]).out, "");
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
    for (options, why) in [
        (&["--trace", "."][..], "cannot write `.`"),
        (
            &["--trace", "%d.jsonl"],
            "`%d.jsonl` is not a name for a trace: `%n` is the VM's name",
        ),
        (&["--trace", "100%"], "`%%` a percent sign"),
        (&["--trace", "t", "--trace-size", "63K"], "takes 64K at least"),
        (&["--trace", "t", "--trace-size", "much"], "`100M`"),
        (&["--trace", "t", "--trace-size", "99999999999G"], "`100M`"),
        (&["--trace", "-", "--trace-size", "1M"], "name a file"),
        (
            &["--trace", "/dev/stdout", "--trace-size", "1M"],
            "leave --trace-size out",
        ),
        (&["--trace-size", "1M"], "--trace"),
    ] {
        folder
            .run(&[&MICROCODE[..3], options, &["true"]].concat())
            .code(2)
            .says(&[why]);
    }
    let none = [&MICROCODE[..3], &["--trace", "t.jsonl", "true"]].concat();
    folder.run(&none).code(0);
    assert!(!folder.path().join("t.jsonl").exists(), "no guest ran");
}
