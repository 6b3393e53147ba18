//! Answers about traced accesses, by script and at a terminal, and the policy that they become.

use std::fs;

use serde_json::Value;

use crate::command::{Folder, count, list, plain, text, typed};

const MICROVM: &str = "traces/linux-6.1-microvm.jsonl";

/// A policy with comments, which decides one of the accesses of `TRACE` and denies another.
const POLICY: &str = "# A guest's policy.\nversion = 1\nname = \"p\"\ndefault = \"deny\" # all else\n\n# Time.\n[[rule]]\nmsr = \"IA32_TSC\"\n\
                      read = \"allow\"\n\n# Nobody needs these.\n[[rule]]\nmsr = \"@feature\"\nread = \"deny\"\nwrite = \"deny\"\n\
                      accept = { W007 = \"said\", W008 = \"said\" }\n";

fn event(op: &str, msr: &str, value: &str, did: &str) -> String {
    format!(
        "{{\"t\":1,\"vm\":0,\"vcpu\":0,\"op\":\"{op}\",\"msr\":\"{msr}\",\"value\":\"{value}\",\"did\":\"{did}\"}}\n"
    )
}

/// In order of questions: APIC_BASE, its write, PKG_ENERGY_STATUS, 0x12345, its write; beside what is not asked.
fn furnished() -> Folder {
    let folder = Folder::furnished();
    folder.write("p.toml", POLICY);
    let trace = "{\"msrgate_trace\":1}\n".to_owned()
        + &event("rdmsr", "0x10", "0x1", "allow")
        + &event("rdmsr", "0x1b", "0xfee00900", "allow")
        + &event("wrmsr", "0x1b", "0xfee00d00", "allow")
        + &event("rdmsr", "0x611", "0x0", "allow")
        + &event("rdmsr", "0x611", "0x0", "allow")
        + &event("rdmsr", "0x1a0", "0x1", "allow")
        + &event("rdmsr", "0x802", "0x0", "allow")
        + &event("rdmsr", "0x12345", "0x7", "value")
        + &event("wrmsr", "0x12345", "0x8", "ignore");
    folder.write("t.jsonl", trace);
    folder
}

fn read(folder: &Folder, name: &str) -> String {
    fs::read_to_string(folder.path().join(name)).expect("a file")
}

/// What the policy gives an access.
fn gives(folder: &Folder, policy: &str, msr: &str, op: &str) -> Value {
    folder.run(&["explain", "--json", policy, msr, op]).code(0).json()
}

fn answers(folder: &Folder, answers: &str, more: &[&str]) -> crate::command::Ran {
    folder.run_with(
        &[&["review", "p.toml", "t.jsonl", "--answers", "-"], more].concat(),
        answers,
    )
}

#[test]
fn answers_become_rules_behind_the_text_that_was_there() {
    let folder = furnished();
    answers(&folder, "allow\nskip\n# a comment\nzero\nv 0x7\nignore\n", &[])
        .code(0)
        .says(&[
            "1 of 5  rdmsr 0x1b IA32_APIC_BASE",
            "Linux: looked at before the local APIC is used",
            "2 of 5  wrmsr 0x1b",
            "the processor works by it",
            "3 of 5  rdmsr 0x611 MSR_PKG_ENERGY_STATUS",
            "tells of the host what it and its other guests do now",
            "2 reads in the trace",
            "the database does not know it",
            "4 of 5 accesses decided; 1 left as they were; 1 more is denied by a rule",
        ]);
    let written = read(&folder, "p.toml");
    assert!(written.starts_with(POLICY), "{written}");
    assert_eq!(read(&folder, "p.toml.bak"), POLICY);
    folder.run(&["check", "p.toml"]).code(0);
    for (msr, op, action) in [
        ("0x1b", "read", "allow"),
        ("0x1b", "write", "deny"),
        ("0x611", "read", "zero"),
        ("0x12345", "read", "value"),
        ("0x12345", "write", "ignore"),
        ("0x10", "read", "allow"),
    ] {
        assert_eq!(text(&gives(&folder, "p.toml", msr, op), "action"), action, "{op} {msr}");
    }
    // The guest gets what was chosen.
    let replayed = folder
        .run(&["replay", "--backend", "engine", "--json", "-p", "p.toml", "t.jsonl"])
        .json();
    let row = |msr: &str, op: &str| {
        let rows = list(&replayed, "by_msr").iter();
        let mut rows = rows.filter(|row| text(row, "msr") == msr && text(row, "op") == op);
        rows.next().expect("a row").clone()
    };
    for (msr, op, did) in [
        ("0x1b", "rdmsr", "allow"),
        ("0x1b", "wrmsr", "deny"),
        ("0x611", "rdmsr", "zero"),
        ("0x12345", "rdmsr", "value"),
        ("0x12345", "wrmsr", "ignore"),
    ] {
        assert_eq!(text(&row(msr, op), "action"), did, "{op} {msr}");
    }
    assert_eq!(text(&row("0x12345", "rdmsr"), "sees"), "0x7");
    assert_eq!(text(&row("0x1b", "rdmsr"), "sees"), "0xfee00900");
    // Nothing is asked twice, but what was skipped.
    answers(&folder, "", &["--dry-run"])
        .code(0)
        .says(&["1 of 1  wrmsr 0x1b"]);
}

#[test]
fn a_shadow_answers_for_both_directions_and_begins_with_what_was_read() {
    let folder = furnished();
    let ran = answers(&folder, "skip\nskip\nskip\nshadow\nallow\n", &["--json"]).code(0);
    let json = ran.json();
    let of = |place: usize| text(&list(&json, "accesses")[place], "answer").to_owned();
    assert_eq!([of(3), of(4)], ["shadow", "skip"], "the write was not asked");
    for op in ["read", "write"] {
        assert_eq!(text(&gives(&folder, "p.toml", "0x12345", op), "action"), "shadow");
    }
    assert!(
        text(&json, "policy").contains("shadow = \"0x7\""),
        "{}",
        text(&json, "policy")
    );
}

#[test]
fn what_an_answer_is_warned_of_is_told_and_accepted_in_its_rule() {
    let folder = furnished();
    answers(&folder, "skip\nskip\nallow\nquit\n", &[])
        .code(0)
        .says(&["accepted in the rule, W017", "1 of 5 accesses decided"]);
    let written = read(&folder, "p.toml");
    assert!(
        written.contains("accept = { W017 = \"chosen in a review\" }"),
        "{written}"
    );
    folder.run(&["check", "p.toml"]).code(0).shows(&["accepted W017"]);
    // A denial that the default makes too is kept as a rule, so that it is not asked again.
    answers(&folder, "deny\nquit\n", &[]).code(0);
    folder.run(&["check", "p.toml"]).code(0);
    assert_eq!(gives(&folder, "p.toml", "0x1b", "read")["decided_by"], "rule");
    answers(&folder, "", &["--dry-run"])
        .code(0)
        .says(&["1 of 3  wrmsr 0x1b"]);
}

#[test]
fn what_a_rule_denies_is_asked_on_demand_and_the_answer_stands_before_it() {
    let folder = furnished();
    answers(&folder, "skip\nskip\nallow\n", &["--denied"])
        .code(0)
        .says(&["3 of 6  rdmsr 0x1a0 IA32_MISC_ENABLE", "deny, by the rule at p.toml:12"]);
    let written = read(&folder, "p.toml");
    let (before, after) = written.split_once("msr   = \"IA32_MISC_ENABLE\"").expect("a rule");
    assert!(
        before.contains("# Time.") && after.contains("# Nobody needs these."),
        "{written}"
    );
    assert_eq!(text(&gives(&folder, "p.toml", "0x1a0", "read"), "action"), "allow");
    folder.run(&["check", "p.toml"]).code(0);
    // Of a rule that names just this MSR there can be no second.
    let named = POLICY
        .replace("@feature", "IA32_MISC_ENABLE")
        .replace("\nwrite = \"deny\"", "");
    folder.write("p.toml", &named);
    answers(&folder, "skip\nskip\nallow\n", &["--denied"])
        .code(1)
        .says(&["was taken back: E012"]);
    assert_eq!(read(&folder, "p.toml"), named);
}

#[test]
fn what_no_longer_fits_a_filter_is_taken_back_at_once() {
    let folder = Folder::new();
    let mut policy = "version = 1\ndefault = \"deny\"\n".to_owned();
    for place in 0..16 {
        policy.push_str(&format!("[[rule]]\nmsr = {:#x}\nread = \"allow\"\n", (place + 1) << 20));
    }
    folder.write("p.toml", &policy);
    let trace = "{\"msrgate_trace\":1}\n".to_owned()
        + &event("rdmsr", "0x5000000", "0x1", "allow")
        + &event("rdmsr", "0x100001", "0x1", "allow");
    folder.write("t.jsonl", trace);
    // By MSR, so the one that fits is asked first.
    answers(&folder, "allow\nallow\n", &[]).code(1).says(&[
        "0 of 16 ranges are free",
        "taken back: E020",
        "1 of 2 accesses decided",
        "rdmsr 0x5000000: `allow` was taken back",
    ]);
    assert_eq!(text(&gives(&folder, "p.toml", "0x100001", "read"), "action"), "allow");
    // So does what is allowed without asking.
    folder.write("p.toml", &policy);
    let ran = folder
        .run(&[
            "review", "p.toml", "t.jsonl", "--accept", "reads", "--json", "-o", "q.toml",
        ])
        .code(1);
    let json = ran.json();
    let refused: Vec<bool> = list(&json, "accesses")
        .iter()
        .map(|one| !one["refused"].is_null())
        .collect();
    assert_eq!(refused, [false, true]);
    assert_eq!(read(&folder, "p.toml"), policy);
    folder.run(&["plan", "q.toml"]).code(0);
}

#[test]
fn what_is_accepted_grows_from_word_to_word_and_has_no_leak() {
    let folder = furnished();
    let accepted = |what: &str| -> Vec<String> {
        let ran = folder
            .run(&["review", "p.toml", "t.jsonl", "--accept", what, "--dry-run", "--json"])
            .code(0);
        let json = ran.json();
        let allowed = list(&json, "accesses").iter().filter(|one| one["answer"] == "allow");
        allowed
            .map(|one| format!("{} {}", text(one, "op"), text(one, "msr")))
            .collect()
    };
    let needed = ["rdmsr 0x1b", "wrmsr 0x1b"].map(str::to_owned).to_vec();
    assert_eq!(accepted("needed"), needed);
    assert_eq!(accepted("reads"), [&needed[..], &["rdmsr 0x12345".to_owned()]].concat());
    assert_eq!(
        accepted("served"),
        [&needed[..], &["rdmsr 0x12345".to_owned(), "wrmsr 0x12345".to_owned()]].concat()
    );
    assert_eq!(read(&folder, "p.toml"), POLICY, "a dry run writes nothing");
}

#[test]
fn a_real_guest_is_served_by_what_its_trace_needs() {
    let folder = Folder::furnished();
    folder.write("p.toml", "version = 1\nname = \"p\"\ndefault = \"deny\"\n");
    let ran = folder
        .run(&["review", "p.toml", MICROVM, "--accept", "served", "--dry-run"])
        .code(0);
    folder.write("q.toml", &ran.out);
    folder.run(&["check", "q.toml"]).code(0);
    folder
        .run(&["replay", "--backend", "engine", "-p", "q.toml", MICROVM])
        .code(0)
        .shows(&["the policy changed nothing for the guest"]);
    assert!(ran.out.contains("Linux needs"), "{}", ran.out);
    // With less it is not.
    let ran = folder
        .run(&["review", "p.toml", MICROVM, "--accept", "needed", "--json"])
        .code(0);
    assert!(count(&ran.json(), "ranges") <= 16);
    folder
        .run(&["replay", "--backend", "engine", "-p", "p.toml", MICROVM])
        .code(1);
}

#[test]
fn at_a_terminal_a_person_is_asked_again_and_the_file_is_written() {
    let folder = furnished();
    let command = folder.command(&["review", "p.toml", "t.jsonl"]);
    let (shown, code) = typed(command, 80, "perhaps\ns\na\n\nz\nq\n");
    let shown = plain(&shown);
    assert_eq!(code, Some(0), "{shown}");
    for text in [
        "`perhaps` is not an answer to a rdmsr",
        "`s` is ambiguous: it can be shadow or skip",
        "3 of 5  rdmsr 0x611 MSR_PKG_ENERGY_STATUS",
        "2 of 5 accesses decided; 3 left as they were",
        "written to",
    ] {
        assert!(shown.contains(text), "no `{text}` in\n{shown}");
    }
    assert_eq!(text(&gives(&folder, "p.toml", "0x611", "read"), "action"), "zero");
    // An end of input is an end of the answers.
    let (shown, code) = typed(folder.command(&["review", "p.toml", "t.jsonl"]), 80, "\u{4}");
    assert!(code == Some(0) && shown.contains("nothing is written"), "{shown}");
}

#[test]
fn nobody_is_waited_for_where_nobody_can_answer() {
    let folder = furnished();
    folder
        .run(&["review", "p.toml", "t.jsonl"])
        .code(2)
        .says(&["standard input is not a terminal", "--accept needed"]);
    answers(&folder, "allow\nyes\n", &[])
        .code(2)
        .says(&["standard input, line 2: `yes` is not an answer"]);
    assert_eq!(read(&folder, "p.toml"), POLICY, "nothing is written");
    folder
        .run(&["review", "msrgate:deny-all", "t.jsonl", "--accept", "needed"])
        .code(2)
        .says(&["no file that can be written"]);
    folder
        .run(&["review", "p.toml", "t.jsonl", "--accept", "needed", "-o", "t.jsonl"])
        .code(2)
        .says(&["would be overwritten"]);
    // What it extends has to be found from the file that is written.
    folder.write("x.toml", "version = 1\nextends = \"p.toml\"\n");
    folder.write("sub/keep", "");
    folder
        .run(&["review", "x.toml", "t.jsonl", "--accept", "needed", "-o", "sub/x.toml"])
        .code(2)
        .says(&["E014"]);
    assert!(!folder.path().join("sub/x.toml").exists());
    folder
        .run(&["review", "x.toml", "t.jsonl", "--accept", "needed"])
        .code(0);
    assert_eq!(text(&gives(&folder, "x.toml", "0x1b", "read"), "action"), "allow");
    assert_eq!(read(&folder, "p.toml"), POLICY, "an extended policy stays");
}
