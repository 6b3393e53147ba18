//! What others wrote does nothing to a terminal: whatever the input, and whatever reads it.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::process::Stdio;

use crate::command::{self, Folder, Ran};

/// Sets a window's title, colours, a bell, CSI as one character, delete, and turns the order of what follows round.
const EVIL: &str = "\u{1b}]0;PWNED\u{7}\u{1b}[31m\u{9b}32m\u{7f}\u{202e}\u{2067}";

/// The same as TOML and JSON escape it.
const ESCAPED: &str = r"\u001b]0;PWNED\u0007\u001b[31m\u009b32m\u007f\u202e\u2067";

/// Fails where a character would act on a terminal.
#[track_caller]
fn harmless(arguments: &[&OsStr], ran: &Ran) {
    let acts = |c: char| {
        c.is_control() && c != '\n' && c != '\t' || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    for (stream, text) in [("stdout", &ran.out), ("stderr", &ran.err)] {
        let at = text.find(acts);
        let around = at.map(|at| text[..at].chars().rev().take(60).collect::<Vec<_>>());
        let around = around.map(|text| text.into_iter().rev().collect::<String>());
        assert!(at.is_none(), "{arguments:?}: {stream} acts behind {around:?}");
    }
    assert!(ran.code.is_some(), "{arguments:?} was killed");
}

/// Files of every kind that the command reads, each with `EVIL` wherever its format has a text, and where it is broken.
fn furnish(folder: &Folder) -> Vec<String> {
    let policies = [
        format!(
            "version = 1\nname = \"{ESCAPED}\"\ndefault = \"deny\"\n\n[[rule]]\nmsr = \"0x8b\"\nread = {{ shadow = 1 }}\nwrite \
             = \"shadow\"\nlog = \"all\"\nwhy = \"{ESCAPED}\"\n\n[[rule]]\nmsr = 0x10\nread = \"deny\"\nwhy = \"{ESCAPED}\"\n\
             accept = {{ W007 = \"{ESCAPED}\" }}\n"
        ),
        format!("version = 1\ndefault = \"deny\"\n# {EVIL}\n[[rule]]\nmsr = \"{EVIL}\"\nread = \"allow\"\n"),
        format!("version = 1\ndefault = \"{ESCAPED}\"\n\"{ESCAPED}\" = 1\nextends = \"{ESCAPED}\"\n"),
        format!(
            "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = [\"{ESCAPED}\", \"@{ESCAPED}\", \"{ESCAPED}*\", \"1{ESCAPED}\", \
             \"1..{ESCAPED}\", \"0x10..={ESCAPED}\"]\nread = \"{ESCAPED}\"\nwrite = {{ \"{ESCAPED}\" = 1 }}\nwhen = {{ vendor = \
             \"{ESCAPED}\", features = [\"{ESCAPED}\"], family = \"{ESCAPED}\", \"{ESCAPED}\" = 1 }}\naccept = {{ \"{ESCAPED}\" \
             = \"x\" }}\nlog = \"{ESCAPED}\"\n\"{ESCAPED}\" = 2\n[[rule]]\nmsr = 1\nread = {{ handler = \"{ESCAPED}\" }}\n"
        ),
        format!("version = 1\r\ndefault = \"deny\"\r\nname = {EVIL}\r\n"),
    ];
    let event = r#""t":1,"vm":0,"vcpu":0"#;
    let header = format!(
        r#"{{"msrgate_trace":1,"guest":"{ESCAPED}","kernel":"{ESCAPED}","vmm":"{ESCAPED}","mode":"{ESCAPED}","policy":"{ESCAPED}","source":"{ESCAPED}"}}"#
    );
    let traces = [
        format!("{header}\n{{{event},\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x5\",\"did\":\"allow\"}}\n"),
        format!("{header}\n{{{event},\"op\":\"{ESCAPED}\",\"msr\":\"0x8b\",\"value\":\"0x5\",\"did\":\"allow\"}}\n"),
        format!("{header}\n{{{event},\"op\":\"rdmsr\",\"msr\":\"{ESCAPED}\",\"value\":\"0x5\",\"did\":\"allow\"}}\n"),
        format!("{header}\n{{{event},\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"{ESCAPED}\",\"did\":\"allow\"}}\n"),
        format!("{header}\n{{{event},\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x5\",\"did\":\"{ESCAPED}\"}}\n"),
        format!("{header}\n{{{event},\"{ESCAPED}\":1}}\n"),
        format!("{{\"msrgate_trace\":1,\"cpuid\":\"{ESCAPED}\"}}\n"),
        format!("{{\"msrgate_trace\":\"{ESCAPED}\"}}\n"),
        format!("{{\"msrgate_summary\":1,\"{ESCAPED}\":1}}\n"),
        format!("{{\"msrgate_summary\":1,\"traces\":1,\"names\":[\"{ESCAPED}\"]}}\n{{\"msr\":\"{ESCAPED}\"}}\n"),
        format!("# tracer: nop\n{EVIL}-1 [000] d... 1.0: kvm_msr: msr_read 8b = 0x{EVIL}\n"),
    ];
    let others = [
        format!("{{\"default\":\"{ESCAPED}\",\"ranges\":[],\"{ESCAPED}\":1}}"),
        format!(
            "{{\"default\":\"allow\",\"ranges\":[{{\"base\":\"{ESCAPED}\",\"nmsrs\":1,\"flags\":1,\"bitmap\":\"{ESCAPED}\"}}]}}"
        ),
        format!("struct kvm_msr_filter f = {{ .flags = {EVIL} }};\n"),
        format!("struct kvm_msr_filter f = {{ .flags = a{EVIL} }};\n"),
        format!("00000000: {EVIL}\n"),
        format!("--userspace-msr index={EVIL},type=r,action=pass\n"),
        format!("--userspace-msr {EVIL}=1\n"),
        format!("0x10 {EVIL} # {EVIL}\n"),
        format!("0x00000010 0x0000000000000000 # {EVIL}\n"),
        format!("{{\"msr_modifiers\":[{{\"addr\":\"{ESCAPED}\",\"bitmap\":\"{ESCAPED}\"}}],\"{ESCAPED}\":1}}"),
        format!("   0x00000000 0x00: eax={EVIL} ebx=0x0 ecx=0x0 edx=0x0\n"),
        format!("{{\"host\":\"{ESCAPED}\",\"{ESCAPED}\":1}}"),
        EVIL.to_owned(),
    ];
    let texts = policies.iter().chain(&traces).chain(&others);
    // The file's own name is another's word too.
    let named = (0..).zip(texts).map(|(number, text)| {
        let name = format!("{number}{EVIL}.toml");
        folder.write(&name, text);
        name
    });
    named.collect()
}

#[test]
fn no_input_acts_on_a_terminal_through_any_subcommand() {
    let folder = Folder::new();
    let files = furnish(&folder);
    folder.write("good.toml", "version = 1\ndefault = \"allow\"\n");
    folder.write("t.jsonl", "{\"msrgate_trace\":1}\n{\"t\":1,\"vm\":0,\"vcpu\":0,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x5\",\"did\":\"allow\"}\n");
    let missing = format!("missing{EVIL}");
    let word = &EVIL;
    let files = files.iter().chain([&missing]);
    let mut lines: Vec<Vec<&str>> = vec![
        vec![word],
        vec!["msr", word],
        vec!["msr", "--json", word],
        vec!["msr", "@x\u{1b}"],
        vec!["explain", "good.toml", word],
        vec!["explain", "good.toml", "0x8b", word],
        vec!["explain", "good.toml", "@x\u{1b}"],
        vec!["msr", "--leaks", word],
        vec!["man", word],
        vec!["completions", word],
        vec!["scan", "--range", word],
        vec!["plan", "good.toml", "--emit", word],
        vec!["verify", "--random", word],
        vec!["run", "--trace", word, "-p", word, "--", word],
        vec!["report", "t.jsonl", "--html", "/\u{1b}/x"],
    ];
    for file in files {
        for line in [
            "check F",
            "check --json F",
            "check --cpuid F good.toml",
            "check --profile F good.toml",
            "plan F",
            "plan --json F",
            "plan --state F",
            "plan --state --json F",
            "plan --emit c F",
            "plan --emit rust F",
            "plan --emit crosvm F",
            "plan --emit msr-safe F",
            "explain F 0x8b",
            "explain F",
            "explain F @mtrr",
            "explain --json F",
            "plan --all F",
            "review --dry-run --accept served F t.jsonl",
            "review --dry-run --accept served --json good.toml F",
            "review --dry-run --answers F good.toml t.jsonl",
            "review --answers F -o o.toml F t.jsonl",
            "explain --json F 0x8b",
            "diff good.toml F",
            "diff --json good.toml F",
            "decompile F",
            "decompile --json F",
            "import --from crosvm F",
            "import --from firecracker F",
            "import --from msr-safe F",
            "import --json --from msr-safe F",
            "replay --backend engine -p F t.jsonl",
            "replay --backend engine -p good.toml F",
            "replay --json --backend engine -p good.toml F",
            "report F",
            "report --json F",
            "report --html - F",
            "report -p F t.jsonl",
            "report -p good.toml F",
            "learn F",
            "learn --json F",
            "learn --summary F",
            "learn --since F t.jsonl",
            "learn --since F --json t.jsonl",
            "scan --against F",
            "scan -p F --only --range 0x8b",
            "verify F",
            "run -p F -- true",
            "run -p good.toml -- F",
            "run --profile F -p good.toml -- true",
            "capture -o F/c -- true",
            "capture -- F",
        ] {
            lines.push(
                line.split(' ')
                    .map(|word| if word == "F" { file } else { word })
                    .collect(),
            );
        }
    }
    for line in lines {
        let line: Vec<&OsStr> = line.into_iter().map(OsStr::new).collect();
        let mut command = folder.command(&[]);
        harmless(&line, &Ran::of(command.args(&line)));
    }
    // A file name needs not be UTF-8.
    let name = OsStr::from_bytes(b"\x1b[31m\xff\x9b");
    let mut command = folder.command(&["check"]);
    harmless(&[name], &Ran::of(command.arg(name)));
}

#[test]
fn on_a_terminal_there_are_colours_and_no_other_escapes() {
    if command::find("script").is_none() {
        println!("skipped: there is no `script` to make a terminal with");
        return;
    }
    let folder = Folder::new();
    for (number, file) in furnish(&folder).iter().enumerate() {
        let line = format!(
            "'{}' check '{file}'; '{0}' plan '{file}'; '{0}' '{file}'",
            command::program().display()
        );
        let mut script = std::process::Command::new("script");
        script.args(["-qec", &line, "/dev/null"]).current_dir(folder.path());
        script.stdin(Stdio::null()).env("TERM", "xterm").env_remove("NO_COLOR");
        let mut ran = Ran::of(&mut script);
        // Ours begin with CSI and end with `m`; a terminal's lines end with a carriage return.
        let mut parts = ran.out.split("\u{1b}[");
        let first = parts.next().unwrap_or_default().to_owned();
        let without = parts.map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';'));
        let without = without.map(|part| part.strip_prefix('m').unwrap_or("\u{1b}"));
        let out = without.fold(first, |all, part| all + part).replace("\r\n", "\n");
        assert!(
            !(1..5).contains(&number) || ran.out.contains("\u{1b}["),
            "{file} has no colour: {}",
            ran.out
        );
        ran.out = out;
        harmless(&[OsStr::new(&line)], &ran);
    }
}

#[test]
fn what_is_shown_in_place_of_an_escape_says_which_it_was() {
    let folder = Folder::new();
    let files = furnish(&folder);
    let shown = ESCAPED;
    folder.run(&["plan", &files[0]]).code(0).shows(&[shown]);
    folder
        .run(&["explain", &files[0], "0x8b"])
        .code(0)
        .shows(&[&format!("why      {shown}")]);
    folder.run(&["msr", EVIL]).code(1).says(&[shown]);
    // For programs it is the same text.
    let json = folder
        .run(&["explain", "--json", &files[0], "0x8b", "read"])
        .code(0)
        .json();
    assert_eq!(json["rule"]["why"], EVIL);
}

#[test]
fn help_that_cannot_be_written_is_told() {
    let full = OpenOptions::new().write(true).open("/dev/full").expect("a full device");
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["--version"],
        &["check", "--help"],
        &["help"],
        &["completions", "bash"],
        &["completions", "fish"],
        &["man"],
        &["schema"],
        &["msr", "0x10"],
    ] {
        let full = full.try_clone().expect("a descriptor");
        let mut command = Folder::new().command(arguments);
        command.current_dir("/").stdout(full).stderr(Stdio::piped());
        let output = command
            .spawn()
            .expect("the program starts")
            .wait_with_output()
            .expect("an end");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {err}");
        assert!(err.contains("the output cannot be written"), "{arguments:?}: {err}");
    }
}

#[test]
fn many_findings_are_cut_short_for_people_and_whole_for_programs() {
    let folder = Folder::new();
    let rules: String = (0..25)
        .map(|n| format!("\n[[rule]]\nmsr = \"NOSUCH{n}\"\nread = \"allow\"\n"))
        .collect();
    folder.write("bad.toml", format!("version = 1\ndefault = \"deny\"\n{rules}"));
    let ran = folder
        .run(&["check", "bad.toml"])
        .code(2)
        .says(&["NOSUCH19", "and 5 more, which `msrgate check --json` lists"]);
    assert!(!ran.err.contains("NOSUCH20"), "{}", ran.err);
    assert_eq!(
        command::list(&folder.run(&["check", "--json", "bad.toml"]).json(), "findings").len(),
        25
    );
}

#[test]
fn a_hint_quotes_a_file_for_the_shell() {
    let folder = Folder::new();
    let event = r#"{"t":1,"vm":0,"vcpu":0,"op":"rdmsr","msr":"0x8b","value":"0x5","did":"allow"}"#;
    for (name, word) in [
        ("a; touch pwned #.jsonl", "'a; touch pwned #.jsonl'"),
        ("it's", r"'it'\''s'"),
    ] {
        folder.write(name, format!("{{\"msrgate_trace\":1}}\n{event}\nbroken\n"));
        let hint = format!("head -n 2 {word} | msrgate learn -");
        folder.run(&["learn", name]).code(2).says(&[&hint]);
    }
}
