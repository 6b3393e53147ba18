//! Policies and traces that cannot be used: what is wrong, where, and what to write instead.

use serde_json::Value;

use crate::command::{Folder, Ran, TRACES, count, list, text};

/// One mistake of each kind that a policy can make by itself, and the line on which it is.
const MISTAKES: &str = r#"version = 1
default = "deny"
colour  = "red"
extends = ["missing.toml", "circle.toml"]

[[rule]]
msr  = ["IA32_BIOS_SIGN", "@mttr", "0x20..=0x10", "NOTHING_*"]
read = { value = "0x10000000000000000" }

[[rule]]
msr   = "IA32_TSC"
read  = "permit"
write = "allow"

[[rule]]
msr  = "IA32_PAT"
when = { vendor = "intle" }

[[rule]]
msr   = "IA32_EFER"
write = ["allow"]
"#;

const FOUND: [(&str, u64, &str); 12] = [
    ("E003", 3, "`colour`"),
    ("E014", 4, "`missing.toml`"),
    ("E005", 7, "`IA32_BIOS_SIGN`"),
    ("E006", 7, "`@mttr`"),
    ("E009", 7, "`0x20..=0x10`"),
    ("E007", 7, "`NOTHING_*`"),
    ("E008", 8, "`0x10000000000000000`"),
    ("E010", 12, "`permit`"),
    ("E016", 17, "`intle`"),
    ("E015", 15, ""),
    ("E004", 21, ""),
    ("E013", 3, "circle"),
];

fn mistakes() -> Folder {
    let folder = Folder::furnished();
    folder.write("bad.toml", MISTAKES);
    folder.write("circle.toml", "version = 1\n\nextends = \"bad.toml\"\n");
    folder
}

/// The findings of `check --json`.
fn findings(ran: &Ran) -> Vec<Value> {
    list(&ran.json(), "findings").to_vec()
}

#[test]
fn all_mistakes_of_a_policy_are_told_at_once_with_line_and_help() {
    let folder = mistakes();
    let ran = folder.run(&["check", "bad.toml"]).code(2);
    for (code, line, what) in FOUND {
        let place = if code == "E013" { "circle.toml" } else { "bad.toml" };
        // Each finding is a title, its place, the text underlined, and help.
        let parts: Vec<&str> = ran
            .err
            .split("\n\n")
            .filter(|part| part.starts_with(&format!("error[{code}]")))
            .collect();
        let told = parts.iter().any(|part| {
            part.contains(what)
                && part.contains(&format!("--> {place}:{line}:"))
                && part.contains("^")
                && part.contains("= help: ")
        });
        assert!(told, "{code} of line {line} is not told in\n{}", ran.err);
    }
    assert_eq!(ran.err.matches("error[").count(), FOUND.len(), "{}", ran.err);
    ran.shows(&[&format!("bad.toml: refused, {} errors", FOUND.len())]);
}

#[test]
fn programs_get_the_same_mistakes_with_the_same_codes_and_lines() {
    let folder = mistakes();
    let ran = folder.run(&["check", "--json", "bad.toml"]).code(2);
    assert_eq!(ran.json()["ok"], false);
    assert_eq!(ran.json()["policy"]["name"], "bad");
    assert!(ran.json()["policy"]["hash"].is_null(), "there is no partial policy");
    let mut found: Vec<(String, u64)> = findings(&ran)
        .iter()
        .map(|finding| (text(finding, "code").to_owned(), count(finding, "line")))
        .collect();
    found.sort();
    let mut wanted: Vec<(String, u64)> = FOUND.map(|(code, line, _)| (code.to_owned(), line)).into();
    wanted.sort();
    assert_eq!(found, wanted);
    for finding in findings(&ran) {
        assert_eq!(text(&finding, "severity"), "error");
        assert!(!text(&finding, "help").is_empty(), "{finding:#}");
        assert!(
            count(&finding, "column") > 0 && !text(&finding, "file").is_empty(),
            "{finding:#}"
        );
    }
    // For programs that go line by line, and for people who run it twice.
    assert_eq!(folder.run(&["check", "--json", "bad.toml"]).out, ran.out);
}

#[test]
fn a_finding_looks_as_it_always_does() {
    let folder = Folder::new();
    folder.write(
        "bad.toml",
        "version = 1\ndefault = \"deny\"\n\n[[rule]]\nmsr  = \"IA32_TCS\"\nread = \"allow\"\n",
    );
    let ran = folder.run(&["check", "bad.toml"]).code(2);
    assert_eq!(
        ran.err,
        "\
error[E005]: no MSR is named `IA32_TCS`
 --> bad.toml:5:8
  |
5 | msr  = \"IA32_TCS\"
  |        ^^^^^^^^^^
  |
  = help: did you mean `IA32_TSC`? `msrgate msr TEXT` searches the names; an index works too: `0x8b`

"
    );
    assert_eq!(ran.out, "bad.toml: refused, 1 error\n");
}

#[test]
fn no_command_goes_on_with_a_part_of_a_policy() {
    let folder = mistakes();
    let trace = "traces/linux-6.1-microvm.jsonl";
    for arguments in [
        &["plan", "bad.toml"][..],
        &["plan", "--json", "bad.toml"],
        &["plan", "--emit", "c", "bad.toml"],
        &["explain", "bad.toml", "IA32_TSC"],
        &["replay", "--backend", "engine", "-p", "bad.toml", trace],
        &["replay", "--json", "--backend", "engine", "-p", "bad.toml", trace],
    ] {
        let ran = folder.run(arguments).code(2).says(&["error[E005]", "error[E013]"]);
        assert!(ran.out.is_empty(), "{arguments:?}: {}", ran.out);
    }
}

#[test]
fn text_that_is_no_toml_is_told_by_line_with_help() {
    let folder = Folder::new();
    for (code, line, policy) in [
        ("E012", 3, "version = 1\ndefault = \"deny\"\ndefault = \"allow\"\n"),
        ("E001", 3, "version = 1\ndefault = \"deny\"\n[[rule]\nmsr = 5\n"),
        ("E001", 2, "version = 1\ndefault = deny\n"),
    ] {
        folder.write("bad.toml", policy);
        let ran = folder.run(&["check", "--json", "bad.toml"]).code(2);
        let finding = &findings(&ran)[0];
        assert_eq!(
            (text(finding, "code"), count(finding, "line")),
            (code, line),
            "{policy}"
        );
        assert!(!text(finding, "help").is_empty(), "{policy}");
    }
}

#[test]
fn files_that_cannot_be_read_are_told_with_the_reason() {
    let folder = Folder::furnished();
    folder.write("latin.toml", b"version = 1\nname = \"\xfcber\"\n");
    for (path, why) in [
        ("missing.toml", "No such file"),
        (".", "directory"),
        ("latin.toml", "not UTF-8 text: byte 20"),
    ] {
        folder.run(&["check", path]).code(2).says(&["E014", path, why]);
        let ran = folder.run(&["check", "--json", path]).code(2);
        assert_eq!(findings(&ran)[0]["code"], "E014", "{path}");
        folder.run(&["plan", path]).code(2).says(&["E014", why]);
    }
    let replay = [
        "replay",
        "--backend",
        "engine",
        "-p",
        "policies/qemu.toml",
        "missing.jsonl",
    ];
    folder
        .run(&replay)
        .code(2)
        .says(&["cannot read `missing.jsonl`", "No such file"]);
}

#[test]
fn one_bad_policy_among_several_is_exit_2_and_the_others_are_still_checked() {
    let folder = mistakes();
    let ran = folder
        .run(&["check", "policies/qemu.toml", "bad.toml", "policies/deny-all.toml"])
        .code(2);
    ran.shows(&[
        "policies/qemu.toml: ok",
        "bad.toml: refused",
        "policies/deny-all.toml: ok",
    ]);
}

#[test]
fn a_policy_for_certain_guests_asks_for_their_cpuid() {
    let folder = Folder::new();
    folder.write(
        "when.toml",
        "version = 1\ndefault = \"deny\"\n\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"allow\"\nwhen = { vendor = \"amd\" }\n",
    );
    folder
        .run(&["check", "when.toml"])
        .code(2)
        .says(&["E018", "when.toml:4", "--cpuid"]);
    // A leaf 0 of AMD's.
    folder.write(
        "amd.txt",
        "CPU:\n   0x00000000 0x00: eax=0x00000001 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65\n",
    );
    let with = [
        "explain",
        "--json",
        "--cpuid",
        "amd.txt",
        "when.toml",
        "IA32_TSC",
        "read",
    ];
    assert_eq!(folder.run(&with).code(0).json()["action"], "allow");
    folder.write(
        "intel.txt",
        "CPU:\n   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n",
    );
    let with = [
        "explain",
        "--json",
        "--cpuid",
        "intel.txt",
        "when.toml",
        "IA32_TSC",
        "read",
    ];
    assert_eq!(folder.run(&with).code(0).json()["action"], "deny");
    // A trace of such a guest does as well; what else stands in it is not looked at.
    let header = "{\"msrgate_trace\":1,\"cpuid\":\"CPU:\\n   0x00000000 0x00: eax=0x1 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65\\n\"}";
    folder.write("amd.jsonl", format!("{header}\nno event\n"));
    let with = [
        "explain",
        "--json",
        "--cpuid",
        "amd.jsonl",
        "when.toml",
        "IA32_TSC",
        "read",
    ];
    assert_eq!(folder.run(&with).code(0).json()["action"], "allow");
    folder.write("none.jsonl", "{\"msrgate_trace\":1}\n");
    let with = ["check", "--cpuid", "none.jsonl", "when.toml"];
    folder.run(&with).code(2).says(&["none.jsonl", "no `cpuid`"]);
    folder.write("garbage.txt", "no leaves at all\n");
    let with = ["check", "--cpuid", "garbage.txt", "when.toml"];
    folder.run(&with).code(2).says(&["garbage.txt"]);
}

/// A policy that closes reads of so many MSRs, too far from each other for a range to hold two.
fn scattered(msrs: u32) -> String {
    let mut policy = "version = 1\ndefault = \"allow\"\n".to_owned();
    for number in 1..=msrs {
        policy += &format!("\n[[rule]]\nmsr  = {:#x}\nread = \"deny\"\n", number * 0x10_0000);
    }
    policy
}

#[test]
fn sixteen_ranges_fit() {
    let folder = Folder::new();
    folder.write("wide.toml", scattered(16));
    folder.run(&["check", "wide.toml"]).code(0).shows(&["16 of 16 ranges"]);
}

#[test]
fn what_needs_more_than_sixteen_ranges_is_refused_with_the_numbers_and_who_asks_for_them() {
    let folder = Folder::new();
    folder.write("wide.toml", scattered(18));
    for arguments in [
        &["check", "wide.toml"][..],
        &["plan", "wide.toml"],
        &["plan", "--json", "wide.toml"],
        &["plan", "--emit", "rust", "wide.toml"],
        &["explain", "wide.toml", "0x100000"],
    ] {
        let ran = folder.run(arguments).code(1);
        let ran = ran.says(&[
            "E020",
            "needs 18 filter ranges",
            "holds 16",
            "= help: ",
            "the smallest change that fits changes 2 accesses",
        ]);
        for number in 1..=18 {
            let group = format!("reads of {:#x}: ", number * 0x10_0000);
            assert!(ran.err.contains(&group), "{group} is not named in\n{}", ran.err);
            let place = format!("wide.toml:{}", number * 4);
            assert!(ran.err.contains(&place), "{place} is not named in\n{}", ran.err);
        }
        match (arguments[0], arguments[1]) {
            // What programs read is why, and no part of a plan.
            ("plan", "--json") => assert!(ran.json().as_object().unwrap().keys().eq(["refused"]), "{}", ran.out),
            _ => assert!(!ran.out.contains("0x"), "no part of a plan: {}", ran.out),
        }
    }
    let ran = folder.run(&["check", "--json", "wide.toml"]).code(1);
    let finding = &findings(&ran)[0];
    assert_eq!(text(finding, "code"), "E020");
    assert!(text(finding, "message").contains("needs 18 filter ranges"));
    assert!(text(finding, "help").contains("leaving out"));
}

const TRACE: &str = r#"{"msrgate_trace":1,"guest":"a test"}
{"t":1,"vm":0,"vcpu":0,"op":"rdmsr","msr":"0x10","value":"0x5","did":"allow"}
{"t":2,"vm":0,"vcpu":0,"op":"wrmsr","msr":"0x10","value":"0x6","did":"allow"}
"#;

/// Replays on the engine under a policy that leaves these accesses alone.
fn replay(folder: &Folder, trace: &str) -> Ran {
    folder.run(&[
        "replay",
        "--json",
        "--backend",
        "engine",
        "-p",
        "policies/qemu.toml",
        trace,
    ])
}

#[test]
fn a_trace_that_cannot_be_read_on_is_told_by_line_and_what_came_before_is_reported() {
    let folder = Folder::furnished();
    for (bad, why) in [
        ("{\"op\":\"rdmsr\",\"msr\":\"0x1", "breaks off"),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x1\n", "not an event"),
        ("garbage\n", "not an event"),
        ("\u{0}\u{7f}\n", "not an event"),
        ("{\"op\":\"rdtsc\",\"msr\":\"0x10\"}\n", "`rdtsc`"),
        ("{\"op\":\"wrmsr\",\"msr\":\"0x10\"}\n", "no `value`"),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x100000000\"}\n", "32 bits"),
    ] {
        folder.write("bad.jsonl", format!("{TRACE}{bad}"));
        let ran = replay(&folder, "bad.jsonl").code(2);
        let report = ran.json();
        assert_eq!(count(&report, "accesses"), 2, "{bad:?}");
        assert_eq!(list(&report, "by_msr").len(), 2, "{bad:?}");
        assert_eq!(count(&report["error"], "line"), 4, "{bad:?}");
        assert!(text(&report["error"], "message").contains(why), "{bad:?}: {report:#}");
        ran.says(&["bad.jsonl", "line 4", why, "what came before is reported"]);

        let people = ["replay", "--backend", "engine", "-p", "policies/qemu.toml", "bad.jsonl"];
        folder
            .run(&people)
            .code(2)
            .says(&["line 4", why])
            .shows(&["IA32_TSC", "2 accesses"]);
    }
}

#[test]
fn a_recorded_trace_that_is_cut_anywhere_gives_what_was_whole() {
    let folder = Folder::furnished();
    let (_, whole) = TRACES[0];
    let third = whole.match_indices('\n').nth(3).expect("lines").0;
    for cut in third..third + 120 {
        folder.write("cut.jsonl", &whole[..cut]);
        let lines = whole[..cut].lines().count() as u64;
        let ran = replay(&folder, "cut.jsonl");
        let complete = whole[..cut].ends_with(['}', '\n']);
        let (code, accesses) = if complete { (0, lines - 1) } else { (2, lines - 2) };
        let ran = ran.code(code);
        assert_eq!(count(&ran.json(), "accesses"), accesses, "cut at byte {cut}");
        if !complete {
            assert_eq!(count(&ran.json()["error"], "line"), lines, "cut at byte {cut}");
        }
    }
}

#[test]
fn a_trace_needs_a_header_of_a_known_version() {
    let folder = Folder::furnished();
    for (header, why) in [
        ("", "empty"),
        ("\n\n", "empty"),
        ("{\"msrgate_trace\":2}\n", "version 2"),
        ("{\"msrgate_trace\":\"one\"}\n", "version \"one\""),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n", "header"),
        ("garbage\n", "header"),
    ] {
        folder.write("bad.jsonl", header);
        let ran = replay(&folder, "bad.jsonl").code(2).says(&["bad.jsonl", "line ", why]);
        assert!(ran.out.is_empty(), "{header:?}: {}", ran.out);
    }
}

#[test]
fn a_trace_without_events_does_not_say_that_nothing_changes() {
    let folder = Folder::furnished();
    folder.write("quiet.jsonl", "{\"msrgate_trace\":1}\n");
    let ran = replay(&folder, "quiet.jsonl").code(2).says(&["nothing was replayed"]);
    assert_eq!(count(&ran.json(), "accesses"), 0);
    // Neither does the text of another event.
    folder.write(
        "other.txt",
        "  swapper  0 [000]  1.000001: irq:irq_handler_entry: irq=1 name=i8042\n",
    );
    for command in [
        &["learn"][..],
        &["report"],
        &["replay", "-p", "policies/linux-microvm.toml"],
    ] {
        folder
            .run(&[command, &["other.txt"]].concat())
            .code(2)
            .says(&["no event of kvm:kvm_msr"]);
    }
}

#[test]
fn the_traces_before_a_bad_one_are_reported() {
    let folder = Folder::furnished();
    folder.write("good.jsonl", TRACE);
    folder.write("bad.jsonl", "garbage\n");
    let both = [
        "replay",
        "--json",
        "--backend",
        "engine",
        "-p",
        "policies/qemu.toml",
        "good.jsonl",
        "bad.jsonl",
    ];
    let ran = folder
        .run(&both)
        .code(2)
        .says(&["bad.jsonl", "line 1", "what came before is reported"]);
    assert_eq!(count(&ran.json(), "accesses"), 2);
    assert_eq!(count(&ran.json()["error"], "line"), 1);
}

#[test]
fn a_trace_may_come_by_standard_input() {
    let folder = Folder::furnished();
    let arguments = [
        "replay",
        "--json",
        "--backend",
        "engine",
        "-p",
        "policies/qemu.toml",
        "-",
    ];
    assert_eq!(count(&folder.run_with(&arguments, TRACE).code(0).json(), "accesses"), 2);
    let ran = folder.run_with(&arguments, &TRACE[..TRACE.len() - 10]).code(2);
    assert_eq!(count(&ran.json()["error"], "line"), 3);
}

#[test]
fn a_trace_with_too_many_vcpus_is_refused() {
    let folder = Folder::furnished();
    let mut trace = "{\"msrgate_trace\":1}\n".to_owned();
    for vcpu in 0..1000 {
        trace += &format!("{{\"vcpu\":{vcpu},\"op\":\"rdmsr\",\"msr\":\"0x10\"}}\n");
    }
    folder.write("many.jsonl", trace);
    replay(&folder, "many.jsonl").code(2).says(&["more than 64 vCPUs"]);
}

/// A scan's JSON, with one of its keys replaced.
fn scan_with(key: &str, value: &str) -> String {
    let mut keys = vec![
        ("host", "\"a processor\""),
        ("microcode", "null"),
        ("kernel", "\"6.1\""),
        ("cpuid", "null"),
        ("x2apic", "false"),
        ("policy", "null"),
        ("ranges", r#"[{ "first": "0x10", "last": "0x1f" }]"#),
        ("readable", r#"[{ "msr": "0x10", "value": "0x5", "volatile": false }]"#),
        ("written", "[]"),
        ("writable", "[]"),
        ("faults", "15"),
    ];
    let place = keys.iter().position(|(name, _)| *name == key).expect("a key");
    keys[place].1 = value;
    let keys: Vec<String> = keys.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
    format!("{{{}}}", keys.join(", "))
}

#[test]
fn what_is_no_earlier_scan_is_told_before_anything_is_scanned() {
    let folder = Folder::new();
    for (text, says) in [
        (String::new(), "EOF"),
        ("[]".to_owned(), "invalid"),
        ("{}".to_owned(), "missing field `x2apic`"),
        ("\u{7f}ELF".to_owned(), "line 1 column 1"),
        (scan_with("policy", "\"sandbox\""), "invalid type"),
        (scan_with("faults", "-1"), "invalid value"),
        (scan_with("writable", r#"[{ "msr": "0x100000000" }]"#), "is not an MSR"),
        (
            scan_with("written", r#"[{ "first": "0x2", "last": "0x1" }]"#),
            "0x1 before it begins at 0x2",
        ),
        (scan_with("ranges", "null"), "invalid type"),
        (
            scan_with("readable", r#"[{ "msr": "0x10", "value": "five", "volatile": false }]"#),
            "`five` is not a number",
        ),
        (
            scan_with(
                "readable",
                r#"[{ "msr": "0x10", "value": "0x10000000000000000", "volatile": false }]"#,
            ),
            "is not a number of 64 bits",
        ),
    ] {
        folder.write("before.json", &text);
        let ran = folder.run(&["scan", "--against", "before.json"]).code(2);
        assert!(ran.out.is_empty(), "{text}");
        ran.says(&["before.json is not a scan, as `msrgate scan --json` prints it", says]);
    }
    let whole = scan_with("faults", "15");
    for length in 0..whole.len() {
        folder.write("before.json", &whole[..length]);
        folder.run(&["scan", "--against", "before.json"]).code(2);
    }
}

#[test]
fn what_is_no_policy_is_told_by_what_it_is() {
    let folder = Folder::furnished();
    folder.write("plan.json", "{\"ranges\":[]}");
    folder.write("program", "\u{7f}ELF and more");
    for (file, what) in [
        ("traces/linux-6.1-microvm.jsonl", "it is a trace and no policy"),
        ("plan.json", "it is JSON and no policy"),
        ("program", "it is a program and no policy"),
    ] {
        let ran = folder.run(&["check", file]).code(2).says(&[what]);
        assert!(ran.err.lines().count() < 12, "{}", ran.err);
    }
    let trace = "traces/linux-6.1-microvm.jsonl";
    for (arguments, what) in [
        (
            &["decompile", trace][..],
            "it is a trace and no filter: `msrgate report`",
        ),
        (
            &["diff", "policies/deny-all.toml", trace],
            "it is a trace and no filter",
        ),
        (&["migrate", trace, trace], "it is a trace and no scan"),
        (&["scan", "--against", trace], "it is a trace and no scan"),
    ] {
        folder.run(arguments).code(2).says(&[what]);
    }
    for (text, policy) in [
        ("extends = \"linux-microvm.toml\"", "own.toml"),
        ("", "linux-microvm.toml"),
    ] {
        folder.write("own.toml", format!("version = 1\nname = \"own\"\n{text}\n"));
        let ran = folder.run(&["check", policy]).code(2);
        ran.says(&[
            "cannot read `linux-microvm.toml`",
            "`msrgate:linux-microvm` comes with msrgate",
        ]);
    }
    folder.write("empty", "");
    folder.run(&["why", "empty"]).code(1).says(&["the log is empty"]);
    let ran = folder.run(&["explain", "IA32_EFER", "policies/deny-all.toml"]).code(2);
    ran.says(&["the policy comes first", "msrgate explain policies/deny-all.toml MSR"]);
}

#[test]
fn a_message_has_no_names_of_the_source() {
    let folder = Folder::furnished();
    let trace = |line: &str| format!("{{\"msrgate_trace\":1}}\n{line}\n");
    let traces = [
        "[1]".to_owned(),
        "5".to_owned(),
        "{\"msrgate_trace\":\"x\"}".to_owned(),
        trace("[1]"),
        trace("5"),
        trace("{\"op\":\"rdmsr\",\"msr\":[1]}"),
        trace("{\"op\":\"rdmsr\",\"msr\":{}}"),
        trace("{\"op\":5,\"msr\":1}"),
        "{\"msrgate_trace\":1,\"coverage\":5}".to_owned(),
        "{\"msrgate_summary\":1,\"traces\":\"x\"}".to_owned(),
        "{\"msrgate_summary\":1}\n[1]\n".to_owned(),
    ];
    let templates = [
        "[1]",
        "{\"msr_modifiers\":5}",
        "{\"msr_modifiers\":[5]}",
        "{\"msr_modifiers\":[[]]}",
    ];
    let scans = [
        "[1]",
        "{\"x2apic\":true,\"policy\":5}",
        "{\"x2apic\":true,\"ranges\":[5]}",
        "{\"x2apic\":true,\"readable\":[5]}",
        "{\"x2apic\":true,\"writable\":[5]}",
    ];
    let runs = traces.iter().flat_map(|text| {
        let commands = [&["learn", "given"][..], &["report", "given"]];
        commands.map(|command| (text.as_str(), command))
    });
    let runs = runs.chain(templates.map(|text| (text, &["import", "--from", "firecracker", "given"][..])));
    for (text, command) in runs.chain(scans.map(|text| (text, &["scan", "--against", "given"][..]))) {
        folder.write("given", text);
        let ran = folder.run(command);
        assert!(!ran.err.is_empty(), "{command:?} {text}");
        for name in ["struct ", "enum ", "tuple ", "untagged"] {
            assert!(!ran.err.contains(name), "{command:?} {text}: {}", ran.err);
        }
    }
}

#[test]
fn a_misspelt_class_is_told_with_the_one_that_is_meant() {
    let folder = Folder::new();
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"@pmuu\"\nread = \"zero\"\n",
    );
    folder
        .run(&["check", "p.toml"])
        .code(2)
        .says(&["E006", "did you mean `@pmu`?"]);
    folder.run(&["msr", "@pmuu"]).code(2).says(&["did you mean `@pmu`?"]);
}

#[test]
fn one_of_a_thing_is_no_plural() {
    let folder = Folder::furnished();
    folder.write(
        "t.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"value\":\"0x1\"}\n",
    );
    folder.write(
        "one.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x1234\nread = \"zero\"\n",
    );
    let replay = ["replay", "--backend", "engine", "-p", "one.toml", "t.jsonl"];
    folder.run(&replay).code(0).shows(&["1 access by"]);
    folder.run(&["check", "one.toml"]).code(0).shows(&["1 rule,"]);
    folder
        .run(&["diff", "one.toml", "policies/ignore-unknown.toml"])
        .shows(&["1 range, 1 of 2^33"]);
}
