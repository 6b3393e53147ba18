//! The command line itself: help, exit codes, pipes, colour, completions, manual.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::process::{Command, Stdio};

use crate::command::{Folder, POLICIES, Ran, find, program};

#[test]
fn the_help_lists_each_subcommand_and_each_has_help_of_its_own() {
    let names = Folder::new().subcommands();
    for name in ["check", "plan", "explain", "replay", "msr", "completions", "man"] {
        assert!(names.iter().any(|listed| listed == name), "{name} is not in {names:?}");
    }
    let folder = Folder::new();
    for name in &names {
        let ran = folder.run(&[name, "--help"]).code(0);
        let ran = ran.shows(&[&format!("Usage: msrgate {name}")]);
        assert!(ran.err.is_empty(), "{name}: {}", ran.err);
    }
}

#[test]
fn the_help_tells_the_exit_codes_and_the_version_is_the_crates() {
    let folder = Folder::new();
    folder.run(&["--help"]).code(0).shows(&["Exit codes", "[[rule]]"]);
    let version = folder.run(&["--version"]).code(0).out;
    assert_eq!(version, format!("msrgate {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_exit_2_and_prints_nothing_on_stdout() {
    let folder = Folder::furnished();
    for arguments in [
        &[][..],
        &["chekc"],
        &["check"],
        &["check", "--verbose", "policies/qemu.toml"],
        &["plan"],
        &["plan", "policies/qemu.toml", "--emit", "cobol"],
        &["plan", "policies/qemu.toml", "--json", "--emit", "c"],
        &["explain"],
        &["explain", "policies/qemu.toml", "@nothing"],
        &["explain", "policies/qemu.toml", "IA32_TSC", "execute"],
        &["explain", "policies/qemu.toml", "IA32_TCS"],
        &["explain", "policies/qemu.toml", "0x100000000"],
        &["replay", "traces/linux-6.1-microvm.jsonl"],
        &["replay", "-p", "policies/qemu.toml"],
        &[
            "replay",
            "-p",
            "policies/qemu.toml",
            "--backend",
            "xen",
            "traces/linux-6.1-microvm.jsonl",
        ],
        &["scan", "--range", "0x10..0x20"],
        &["scan", "--range", "@nothing"],
        &["scan", "--only"],
        &["scan", "--against", "missing.json"],
        &["scan", "-p", "missing.toml", "--write", "some"],
        &["msr", "@nothing"],
        &["msr", "0x100000000"],
        &["completions", "tcsh"],
        &["man", "nothing"],
        &["check", "--cpuid", "missing.txt", "policies/qemu.toml"],
    ] {
        let ran = folder.run(arguments).code(2);
        assert!(ran.out.is_empty() && !ran.err.is_empty(), "{arguments:?}: {}", ran.out);
    }
}

#[test]
fn a_misspelt_name_is_told_which_one_is_near() {
    let folder = Folder::furnished();
    let explain = folder.run(&["explain", "policies/qemu.toml", "IA32_BIOS_SIGN"]).code(2);
    explain.says(&["`IA32_BIOS_SIGN`", "did you mean `IA32_BIOS_SIGN_ID`?"]);
    let msr = folder.run(&["msr", "IA32_TCS"]).code(1);
    msr.says(&["did you mean `IA32_TSC`?"]);
    folder.run(&["msr", "@nothing"]).code(2).says(&["@nothing", "@pmu  "]);
    folder
        .run(&["msr", "IA32_MC99_STATUS"])
        .code(1)
        .says(&["did you mean `", "` or `"]);
    let index = folder.run(&["msr", "0x3"]).code(1);
    index.says(&["near it are 0x1 IA32_P5_MC_TYPE, 0x6 IA32_MONITOR_FILTER_SIZE"]);
    let efer = folder.run(&["msr", "efer"]).code(0);
    efer.shows(&["0xc0000080 IA32_EFER", "needed by   FreeBSD, wrmsr: long mode"]);
}

#[test]
fn the_reader_of_our_output_may_go_away() {
    let mut child = Command::new(program())
        .args(["msr", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut out = child.stdout.take().expect("a pipe");
    out.read_exact(&mut [0; 16]).expect("a beginning");
    drop(out);
    let output = child.wait_with_output().expect("an end");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn output_that_cannot_be_written_is_told() {
    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
        println!("skipped: there is no /dev/full");
        return;
    };
    let folder = Folder::furnished();
    for arguments in [
        &["msr", "--json"][..],
        &["plan", "policies/linux-microvm.toml"],
        &["plan", "--emit", "c", "policies/linux-microvm.toml"],
        &["check", "--json", "policies/linux-microvm.toml"],
        &["completions", "bash"],
        &["man"],
    ] {
        let full = full.try_clone().expect("a descriptor");
        let child = folder.command(arguments).stdout(full).stderr(Stdio::piped()).spawn();
        let output = child.expect("the program starts").wait_with_output().expect("an end");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(err.contains("cannot be written"), "{arguments:?}: {err}");
    }
}

#[test]
fn what_goes_to_a_pipe_has_no_colour() {
    let folder = Folder::furnished();
    folder.write("bad.toml", "version = 1\ndefault = 5\n");
    for arguments in [
        &["check", "bad.toml"][..],
        &["check", "policies/linux-microvm.toml"],
        &["plan", "policies/linux-microvm.toml"],
        &[
            "replay",
            "--backend",
            "engine",
            "-p",
            "policies/qemu.toml",
            "traces/linux-6.1-pc-smp2.jsonl",
        ],
        &["msr", "@tsc"],
        &["plan"],
    ] {
        let ran = folder.run(arguments);
        assert!(!ran.out.contains('\x1b') && !ran.err.contains('\x1b'), "{arguments:?}");
    }
}

/// The command on a terminal, by `script`.
fn on_a_terminal(folder: &Folder, line: &str, no_colour: Option<&str>) -> Option<String> {
    find("script")?;
    let mut command = Command::new("script");
    command.args(["-qec", line, "/dev/null"]).current_dir(folder.path());
    command.stdin(Stdio::null()).env("TERM", "xterm").env_remove("NO_COLOR");
    if let Some(value) = no_colour {
        command.env("NO_COLOR", value);
    }
    let output = command.output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_terminal_gets_colour_unless_no_color_is_set() {
    let folder = Folder::new();
    folder.write("bad.toml", "version = 1\ndefault = 5\n");
    let line = format!("{} check bad.toml", program().display());
    let Some(coloured) = on_a_terminal(&folder, &line, None) else {
        println!("skipped: there is no `script` to make a terminal with");
        return;
    };
    assert!(coloured.contains("E004") && coloured.contains('\x1b'), "{coloured:?}");
    let plain = on_a_terminal(&folder, &line, Some("1")).expect("as before");
    assert!(plain.contains("E004") && !plain.contains('\x1b'), "{plain:?}");
    // The convention: an empty NO_COLOR is none.
    let empty = on_a_terminal(&folder, &line, Some("")).expect("as before");
    assert!(empty.contains('\x1b'), "{empty:?}");
}

#[test]
fn completions_for_each_shell_name_each_subcommand() {
    let folder = Folder::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = folder.run(&["completions", shell]).code(0).out;
        for name in folder.subcommands() {
            assert!(script.contains(&name), "{shell}: {name}");
        }
        folder.write(shell, &script);
    }
    if find("bash").is_some() {
        Ran::of(Command::new("bash").args(["-n", "bash"]).current_dir(folder.path())).code(0);
    } else {
        println!("skipped in part: there is no bash");
    }
}

#[test]
fn there_is_a_manual_page_and_one_for_each_subcommand() {
    let folder = Folder::new();
    folder
        .run(&["man"])
        .code(0)
        .shows(&[".TH msrgate", ".SH SYNOPSIS", "Exit codes"]);
    folder.run(&["man", "--into", "."]).code(0);
    for name in folder.subcommands() {
        let page = folder.run(&["man", &name]).code(0);
        let page = page.shows(&[&format!(".TH msrgate-{name}"), ".SH SYNOPSIS"]);
        let written = fs::read_to_string(folder.path().join(format!("msrgate-{name}.1"))).expect("its page");
        assert_eq!(written, page.out);
    }
    assert!(folder.path().join("msrgate.1").is_file());
    folder.run(&["man", "--into", "nowhere"]).code(2);
}

#[test]
fn the_policies_that_are_compiled_in_here_are_all_there_are() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../policies");
    let entries = fs::read_dir(folder).expect("the policies");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    let known: Vec<&str> = POLICIES.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, known);
}
