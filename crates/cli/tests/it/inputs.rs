//! What the command reads: pipes and standard input, inputs without end, and inputs that an output would overwrite.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use crate::command::{self, Folder, Ran};

const BASE: &str = "version = 1\n\n[[rule]]\nmsr = 0x8b\nread = { value = 7 }\n";
const EXTENDING: &str = "version = 1\ndefault = \"deny\"\nextends = \"base.toml\"\n";
const TRACE: &str = r#"{"msrgate_trace":1,"guest":"a test"}
{"t":1,"vm":0,"vcpu":0,"op":"rdmsr","msr":"0x10","value":"0x5","did":"allow"}
"#;

/// A command line that `bash` runs in the folder, `msrgate` being the program under test.
fn bash(folder: &Folder, line: &str) -> Ran {
    let mut command = Command::new("bash");
    let line = format!("msrgate() {{ '{}' \"$@\"; }}\n{line}", command::program().display());
    Ran::of(
        command
            .args(["-c", &line])
            .current_dir(folder.path())
            .stdin(Stdio::null()),
    )
}

#[test]
fn a_policy_that_comes_with_the_command_is_named_wherever_a_policy_is_asked_for() {
    let folder = Folder::new();
    let name = "msrgate:linux-microvm";
    folder.run(&["check", name]).code(0);
    folder.run(&["plan", name]).code(0);
    folder.write("p.toml", "version = 1\nextends = \"msrgate:linux-microvm\"\n");
    folder.run(&["diff", name, "p.toml"]).code(0);
    folder.write("t.jsonl", TRACE);
    folder
        .run(&["replay", "--backend", "engine", "-p", name, "t.jsonl"])
        .code(1);
    folder
        .run(&["check", "msrgate:none"])
        .code(2)
        .says(&["linux-microvm, "]);
}

#[test]
fn a_policy_comes_from_standard_input_and_what_it_extends_from_the_current_directory() {
    let folder = Folder::new();
    folder.write("base.toml", BASE);
    let ran = folder.run_with(&["check", "-"], EXTENDING).code(0);
    ran.shows(&["standard input: ok; 1 rule,"]);
    let ran = folder
        .run_with(&["explain", "--json", "-", "0x8b", "read"], EXTENDING)
        .code(0);
    assert_eq!(ran.json()["action"], "value");
    assert_eq!(ran.json()["rule"]["file"], "base.toml");
    folder.run_with(&["plan", "-"], EXTENDING).code(0);
    folder
        .run_with(&["diff", "-", "base.toml"], EXTENDING)
        .code(2)
        .says(&["base.toml"]);
    folder.write("a.toml", EXTENDING);
    folder.run_with(&["diff", "-", "a.toml"], EXTENDING).code(0);
    folder.write("t.jsonl", TRACE);
    let replay = ["replay", "--backend", "engine", "-p", "-", "t.jsonl", "t.jsonl"];
    folder.run_with(&replay, EXTENDING).code(1).shows(&["2 accesses"]);
    folder
        .run_with(&["learn", "--since", "-", "t.jsonl"], EXTENDING)
        .says(&["since standard input"]);
    // It can be read once.
    for (arguments, input) in [
        (&["diff", "-", "-"][..], EXTENDING),
        (&["replay", "--backend", "engine", "-p", "-", "-"], EXTENDING),
        (&["learn", "-", "-"], TRACE),
    ] {
        folder
            .run_with(arguments, input)
            .code(2)
            .says(&["cannot read `standard input`: it is named twice"]);
    }
}

#[test]
fn a_policy_comes_from_a_pipe() {
    let folder = Folder::new();
    folder.write("base.toml", BASE);
    folder.write("a.toml", EXTENDING);
    folder.write("t.jsonl", TRACE);
    if command::find("bash").is_none() {
        println!("skipped: there is no bash");
        return;
    }
    for (line, code) in [
        ("msrgate check <(cat a.toml)", 0),
        ("msrgate explain <(cat a.toml) 0x8b", 0),
        ("msrgate diff a.toml <(cat a.toml)", 0),
        ("msrgate diff <(cat a.toml) <(msrgate plan --json <(cat a.toml))", 0),
        (
            "msrgate replay --backend engine -p <(cat a.toml) t.jsonl <(cat t.jsonl)",
            1,
        ),
        ("msrgate report -p <(cat a.toml) <(cat t.jsonl)", 0),
        ("msrgate learn --since <(msrgate learn t.jsonl) <(cat t.jsonl)", 0),
        (
            "msrgate learn --since <(msrgate learn --summary t.jsonl) <(cat t.jsonl)",
            0,
        ),
        (
            "msrgate check --cpuid <(echo '0x0 0x0: eax=0x1 ebx=0x0 ecx=0x0 edx=0x0') a.toml",
            0,
        ),
    ] {
        let ran = bash(&folder, line);
        assert_eq!(ran.code, Some(code), "{line}\n{}\n{}", ran.out, ran.err);
    }
}

#[test]
fn an_input_without_end_is_refused() {
    let folder = Folder::new();
    folder.write("a.toml", EXTENDING);
    folder.write("base.toml", BASE);
    folder.write("t.jsonl", TRACE);
    for arguments in [
        &["check", "/dev/zero"][..],
        &["check", "-"],
        &["check", "--cpuid", "/dev/zero", "a.toml"],
        &["plan", "/dev/zero"],
        &["explain", "/dev/zero", "0x10"],
        &["diff", "a.toml", "/dev/zero"],
        &["decompile", "/dev/zero"],
        &["import", "--from", "crosvm", "/dev/zero"],
        &["learn", "--since", "/dev/zero", "t.jsonl"],
        &["report", "-p", "/dev/zero", "t.jsonl"],
        &["replay", "--backend", "engine", "-p", "/dev/zero", "t.jsonl"],
    ] {
        let zero = File::open("/dev/zero").expect("zeros");
        let ran = Ran::of(folder.command(arguments).stdin(zero));
        let ran = ran
            .code(2)
            .says(&["it has more than 16 MiB", "name the file that is meant"]);
        assert!(!ran.out.contains('\0'), "{arguments:?}");
    }
    // A file of just so much is read.
    let mut long = BASE
        .replace("version = 1", "version = 1\ndefault = \"deny\"")
        .into_bytes();
    long.resize(16 << 20, b'\n');
    folder.write("long.toml", &long);
    folder.run(&["check", "long.toml"]).code(0);
    long.push(b'\n');
    folder.write("longer.toml", &long);
    folder.run(&["check", "longer.toml"]).code(2).says(&["E014", "16 MiB"]);
}

#[test]
fn a_policy_extends_no_device_and_no_pipe() {
    let folder = Folder::new();
    let fifo = Command::new("mkfifo").arg(folder.path().join("fifo")).status();
    assert!(fifo.is_ok_and(|status| status.success()), "there is no mkfifo");
    for name in ["fifo", "/dev/zero", "/dev/stdin"] {
        folder.write(
            "a.toml",
            format!("version = 1\ndefault = \"deny\"\nextends = \"{name}\"\n"),
        );
        let ran = folder.run_with(&["check", "a.toml"], "").code(2);
        ran.says(&["E014", "a.toml:3", &format!("`{name}`: it is not a regular file")]);
    }
}

#[test]
fn an_output_overwrites_no_input_under_any_name() {
    let folder = Folder::new();
    folder.write("t.jsonl", TRACE);
    folder.write("base.toml", BASE);
    folder.write("a.toml", EXTENDING);
    folder.write("leaf.txt", "0x0 0x0: eax=0x1 ebx=0x0 ecx=0x0 edx=0x0\n");
    fs::hard_link(folder.path().join("t.jsonl"), folder.path().join("hard")).expect("a link");
    std::os::unix::fs::symlink("t.jsonl", folder.path().join("soft")).expect("a link");
    for (arguments, input) in [
        (&["report", "t.jsonl", "--html", "t.jsonl"][..], "t.jsonl"),
        (&["report", "t.jsonl", "--html", "./hard"], "t.jsonl"),
        (&["report", "t.jsonl", "--html", "soft"], "t.jsonl"),
        (&["report", "hard", "--html", "soft"], "hard"),
        (&["report", "t.jsonl", "-p", "a.toml", "--html", "a.toml"], "a.toml"),
        (
            &["report", "t.jsonl", "-p", "a.toml", "--html", "base.toml"],
            "base.toml",
        ),
        (
            &["report", "t.jsonl", "--cpuid", "leaf.txt", "--html", "leaf.txt"],
            "leaf.txt",
        ),
        (&["report", "-", "--html", "t.jsonl"], "standard input"),
    ] {
        let trace = File::open(folder.path().join("t.jsonl")).expect("the trace");
        let ran = Ran::of(folder.command(arguments).stdin(trace)).code(2);
        ran.says(&[&format!("is the file of the input `{input}`"), "name another output"]);
    }
    for (name, text) in [("t.jsonl", TRACE), ("base.toml", BASE), ("a.toml", EXTENDING)] {
        assert_eq!(
            fs::read_to_string(folder.path().join(name)).expect("a file"),
            text,
            "{name}"
        );
    }
    folder.run(&["report", "t.jsonl", "--html", "page.html"]).code(0);
    folder.run(&["report", "t.jsonl", "--html", "page.html"]).code(0);
    folder.run(&["report", "t.jsonl", "--html", "/dev/null"]).code(0);
}
