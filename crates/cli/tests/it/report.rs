//! What traces tell, for people and for programs.

use serde_json::{Value, json};

use crate::command::{Folder, count, list, text};

const HEADER: &str = "{\"msrgate_trace\":1}\n";

/// The row of this MSR and direction.
#[track_caller]
fn row<'a>(report: &'a Value, msr: &str, op: &str) -> &'a Value {
    let mut rows = list(report, "by_msr").iter();
    rows.find(|row| row["msr"] == msr && row["op"] == op)
        .unwrap_or_else(|| panic!("no row {op} {msr} in {report:#}"))
}

#[test]
fn a_report_tells_who_asked_for_what_how_often_when_and_what_it_got() {
    let folder = Folder::new();
    folder.write(
        "a.jsonl",
        format!(
            "{HEADER}\
             {{\"t\":1000,\"vm\":0,\"vcpu\":0,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x7\",\"reason\":\"filter\",\"did\":\"value\",\"rule\":3,\"rip\":\"0xff00\",\"cost\":1500}}\n\
             {{\"t\":5000,\"vm\":0,\"vcpu\":1,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"reason\":\"unknown\",\"did\":\"fault\",\"why\":\"no-rule\",\"in\":\"l2\"}}\n\
             {{\"t\":3000,\"vm\":1,\"vcpu\":0,\"op\":\"wrmsr\",\"msr\":\"0xdead0000\",\"value\":\"0x5\"}}\n"
        ),
    );
    let report = folder.run(&["report", "--json", "a.jsonl"]).code(0).json();
    let totals = ["accesses", "allowed", "emulated", "faulted", "exits"].map(|key| count(&report, key));
    assert_eq!(totals, [3, 1, 1, 1, 2]);
    let read = row(&report, "0x8b", "rdmsr");
    assert_eq!(read["name"], "IA32_BIOS_SIGN_ID");
    assert_eq!(
        (&read["first"], &read["last"]),
        (&json!({ "trace": 0, "ns": 0 }), &json!({ "trace": 0, "ns": 4000 }))
    );
    assert_eq!(
        read["got"],
        json!([
            { "did": "value", "why": null, "reason": "filter", "would": null, "in": null, "rule": 3, "count": 1 },
            { "did": "fault", "why": "no-rule", "reason": "unknown", "would": null, "in": "l2", "rule": null, "count": 1 },
        ])
    );
    assert_eq!(
        read["values"],
        json!([{
            "value": "0x7",
            "count": 1,
            "bits": [{ "first": 0, "last": 31, "name": "PATCH_LEVEL", "value": "0x7", "word": null }],
        }]),
        "a fault reads nothing"
    );
    assert_eq!(read["rips"], json!([{ "rip": "0xff00", "count": 1 }]));
    assert_eq!(read["vcpus"][1], json!({ "trace": 0, "vm": 0, "vcpu": 1, "count": 1 }));
    let cost = json!({ "accesses": 1, "ns": 1500, "most_ns": 1500 });
    assert_eq!((&read["policy"], &read["cost"]), (&Value::Null, &cost));
    assert_eq!(report["cost"], cost);
    let write = row(&report, "0xdead0000", "wrmsr");
    assert_eq!(
        (
            &write["name"],
            count(write, "allowed"),
            count(write, "exits"),
            &write["cost"]
        ),
        (&Value::Null, 1, 0, &Value::Null)
    );
    let buckets = list(&report["timeline"], "buckets");
    let timed: u64 = ["allowed", "emulated", "faulted"]
        .iter()
        .flat_map(|key| buckets.iter().map(|bucket| count(bucket, key)))
        .sum();
    assert_eq!(timed, 3);
    folder.run(&["report", "a.jsonl"]).code(0).shows(&[
        "0x8b        IA32_BIOS_SIGN_ID  rdmsr  2",
        "1 value, 1 fault: no-rule",
        "0xff00",
        "1/0",
        "3 accesses by 3 vCPUs: 1 allowed, 1 emulated, 1 faulted",
        "2 left the kernel for user space, where 1 of them took 1.5 µs",
    ]);
}

#[test]
fn a_policy_says_beside_each_row_what_it_decides_and_why() {
    let folder = Folder::furnished();
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"deny\"\n\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"zero\"\nwhy = \"no clock\"\n\n[[rule]]\nmsr = 5\nread = \"deny\"\n",
    );
    let hash = folder.run(&["check", "--json", "p.toml"]).json();
    let hash = text(&hash["policy"], "hash");
    let events =
        "{\"op\":\"rdmsr\",\"msr\":16,\"did\":\"zero\",\"rule\":0}\n{\"op\":\"wrmsr\",\"msr\":16,\"value\":1}\n";
    folder.write(
        "same.jsonl",
        format!("{{\"msrgate_trace\":1,\"policy\":\"{hash}\"}}\n{events}"),
    );
    folder.write(
        "other.jsonl",
        format!("{{\"msrgate_trace\":1,\"policy\":\"00\"}}\n{events}"),
    );
    let report = folder
        .run(&["report", "--json", "-p", "p.toml", "same.jsonl"])
        .code(0)
        .json();
    assert_eq!(report["policy"]["hash"], hash);
    assert_eq!(count(&report, "served_but_denied"), 1);
    let read = &row(&report, "0x10", "rdmsr")["policy"];
    assert_eq!(
        (text(read, "action"), count(read, "rule"), &read["exits"]),
        ("zero", 0, &true.into())
    );
    let write = &row(&report, "0x10", "wrmsr")["policy"];
    assert_eq!((text(write, "action"), &write["rule"]), ("deny", &Value::Null));
    let rules = list(&report, "rules");
    assert_eq!(
        rules.iter().map(|rule| count(rule, "accesses")).collect::<Vec<_>>(),
        [1, 0]
    );
    assert_eq!((text(&rules[0], "why"), count(&rules[0], "line")), ("no clock", 4));
    assert_eq!(text(&rules[0], "text").lines().nth(1), Some("msr = \"IA32_TSC\""));
    assert!(
        list(&report, "notes")
            .iter()
            .all(|note| !note.to_string().contains("another policy"))
    );
    folder
        .run(&["report", "-p", "p.toml", "same.jsonl", "other.jsonl"])
        .code(0)
        .shows(&[
            "zero, rule 0   ",
            "no clock",
            "deny, by default",
            "`p` denies 2 of the accesses that the guest was served with",
            "other.jsonl was made under another policy",
        ]);
    // A policy that asks for the CPUID takes the trace's, and without one says what to give.
    folder.write(
        "cpu.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = 16\nread = \"zero\"\nwhen = { vendor = \"intel\" }\n",
    );
    folder
        .run(&["report", "-p", "cpu.toml", "same.jsonl"])
        .code(2)
        .says(&["E018", "--cpuid"]);
    let leaf = "   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69";
    folder.write(
        "intel.jsonl",
        format!("{}\n{events}", json!({ "msrgate_trace": 1, "cpuid": leaf })),
    );
    let report = folder
        .run(&["report", "--json", "-p", "cpu.toml", "intel.jsonl"])
        .code(0)
        .json();
    assert_eq!(row(&report, "0x10", "rdmsr")["policy"]["rule"], 0);
}

#[test]
fn a_trace_that_breaks_off_is_reported_up_to_there() {
    let folder = Folder::furnished();
    folder.write(
        "cut.jsonl",
        format!("{HEADER}{{\"op\":\"rdmsr\",\"msr\":16}}\n{{\"op\":\"rd"),
    );
    folder.write("none.jsonl", "");
    let good = "traces/linux-6.1-microvm.jsonl";
    let ran = folder
        .run(&["report", "--json", "none.jsonl", "cut.jsonl", good])
        .code(2)
        .says(&[
            "none.jsonl: line 1: the trace is empty",
            "cut.jsonl: line 3",
            "breaks off",
        ]);
    let report = ran.json();
    assert_eq!(count(&report, "accesses"), 565);
    let traces = list(&report, "traces");
    assert_eq!(
        traces.iter().map(|trace| count(trace, "accesses")).collect::<Vec<_>>(),
        [0, 1, 564]
    );
    assert_eq!(
        (&traces[1]["error"]["line"], &traces[2]["error"]),
        (&3.into(), &Value::Null)
    );
    let ran = folder.run(&["report", "--json", "none.jsonl"]).code(2);
    assert_eq!(ran.out, "");
    folder.run(&["report", "absent.jsonl"]).code(2).says(&["absent.jsonl"]);
    folder.run_with(&["report", "-"], HEADER).code(0).shows(&["0 accesses"]);
}

#[test]
fn accesses_that_are_missing_are_told_first_with_whose_and_when() {
    let folder = Folder::new();
    let gap = |lost: u64, t: u64, vcpu: u32| format!("{{\"lost\":{lost},\"t\":{t},\"vm\":0,\"vcpu\":{vcpu}}}\n");
    let event = "{\"t\":1000000000,\"op\":\"rdmsr\",\"msr\":16,\"value\":\"0x1\"}\n";
    let gaps = [
        gap(5, 1_500_000_000, 1),
        gap(15_000, 1_250_000_000, 0),
        gap(364, 3_000_000_000, 0),
    ]
    .concat();
    folder.write("gap.jsonl", format!("{HEADER}{event}{gaps}"));
    folder.write("whole.jsonl", format!("{HEADER}{event}"));
    let note = "15369 accesses are missing from gap.jsonl, so this is not all that the guests did: \
                15364 of VM 0 vCPU 0 at 0.250000 s to 2.000000 s, 5 of VM 0 vCPU 1 at 0.500000 s";
    let out = folder.run(&["report", "gap.jsonl"]).code(0).out;
    // The verdict goes first and says itself that something is missing; whose and when stands before the table.
    let first = out.lines().next().unwrap_or_default();
    assert!(first.contains("0 faulted; 15369 more are missing"), "{out}");
    assert_eq!(out.lines().nth(3), Some(format!("note: {note}").as_str()), "{out}");
    assert!(out.find("note: ") < out.find("MSR   name"), "{out}");
    folder.write("allow.toml", "version = 1\ndefault = \"allow\"\n");
    for (trace, verdict) in [
        (
            "gap.jsonl",
            "`allow` denies 0 of the accesses that the guest was served with, as far as the traces tell",
        ),
        (
            "whole.jsonl",
            "`allow` denies 0 of the accesses that the guest was served with",
        ),
    ] {
        let out = folder.run(&["report", "-p", "allow.toml", trace]).code(0).out;
        assert_eq!(out.lines().next(), Some(verdict), "{out}");
    }
    let report = folder
        .run(&["report", "--json", "whole.jsonl", "gap.jsonl"])
        .code(0)
        .json();
    assert_eq!((count(&report, "accesses"), count(&report, "lost")), (2, 15_369));
    let lost: Vec<u64> = list(&report, "traces")
        .iter()
        .map(|trace| count(trace, "lost"))
        .collect();
    assert_eq!(lost, [0, 15_369]);
    assert_eq!(
        report["gaps"],
        json!([
            { "trace": 1, "vm": 0, "vcpu": 1, "events": 5, "first_ns": 500_000_000, "last_ns": 500_000_000 },
            { "trace": 1, "vm": 0, "vcpu": 0, "events": 15_364, "first_ns": 250_000_000, "last_ns": 2_000_000_000_u64 },
        ])
    );
    assert_eq!(report["notes"][0], note);
    let page = folder.run(&["report", "--html", "-", "gap.jsonl"]).code(0).out;
    assert!(page.contains(&note[..100]), "{page}");
    // A trace of nothing but gaps, of more vCPUs than a note names.
    let many: String = (0..300).map(|vcpu| gap(u64::from(vcpu) + 1, 7, vcpu)).collect();
    folder.write("many.jsonl", format!("{HEADER}{many}"));
    let ran = folder.run(&["report", "many.jsonl"]).code(0);
    ran.shows(&[
        "45150 accesses are missing",
        "and of more vCPUs",
        "0 accesses by 0 vCPUs",
    ]);
    let whole = folder.run(&["report", "whole.jsonl"]).code(0).out;
    assert!(!whole.contains("missing"), "{whole}");
}

#[test]
fn times_are_from_the_earliest_event_on_wherever_it_stands() {
    let folder = Folder::new();
    let event = |t: u64, vcpu: u32| format!("{{\"t\":{t},\"vcpu\":{vcpu},\"op\":\"rdmsr\",\"msr\":{}}}\n", 16 + vcpu);
    // As `run` writes vCPUs one after the other: the second's are older.
    let events = [
        event(1_000_228_000, 0),
        event(3_000_000_000, 0),
        event(1_000_000_000, 1),
    ]
    .concat();
    folder.write("a.jsonl", format!("{HEADER}{events}"));
    let report = folder.run(&["report", "--json", "a.jsonl"]).code(0).json();
    assert_eq!(count(&row(&report, "0x10", "rdmsr")["first"], "ns"), 228_000);
    assert_eq!(count(&row(&report, "0x10", "rdmsr")["last"], "ns"), 2_000_000_000);
    assert_eq!(count(&row(&report, "0x11", "rdmsr")["first"], "ns"), 0);
    assert_eq!(count(&report["traces"][0], "last_ns"), 2_000_000_000);
    let out = folder.run(&["report", "a.jsonl"]).code(0).out;
    assert!(out.contains("0.000228") && !out.contains("-0.0"), "{out}");
    let page = folder.run(&["report", "--html", "-", "a.jsonl"]).code(0).out;
    for bar in page.split("<title>").skip(2) {
        let title = bar.split('<').next().unwrap_or_default();
        assert!(!title.contains("-0.") && !title.contains("-1"), "{title}");
    }
    assert!(page.contains("<title>0 s to "), "{page}");
    assert!(!page.contains("data-n=\"-") && !page.contains(">-"), "{page}");
}

#[test]
fn a_page_is_one_file_that_names_what_it_runs_and_no_other() {
    let folder = Folder::furnished();
    let trace = "traces/linux-6.1-microvm.jsonl";
    let ran = folder.run(&["report", "--html", "page.html", trace]).code(0);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""));
    let page = std::fs::read_to_string(folder.path().join("page.html")).expect("a page");
    let printed = folder.run(&["report", "--html", "-", trace]).code(0).out;
    assert_eq!(page, printed, "the same trace gives the same bytes");
    assert!(
        page.contains("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-")
    );
    for outside in [
        "http://",
        "https://",
        "src=",
        "url(\"",
        "@import",
        "<link",
        " style=",
        " onclick=",
    ] {
        assert!(!page.contains(outside), "the page has `{outside}`");
    }
    for text in [
        "IA32_TSC_DEADLINE",
        "<title>msrgate report: traces/linux-6.1-microvm.jsonl</title>",
        "aria-sort",
    ] {
        assert!(page.contains(text), "the page has no `{text}`");
    }
    // Times, costs and numbers that no machine has.
    let mut odd = HEADER.to_owned();
    for t in [1_u64 << 63, 0, u64::MAX] {
        odd.push_str(&format!(
            "{{\"t\":{t},\"op\":\"rdmsr\",\"msr\":4294967295,\"cost\":{},\"vcpu\":{},\"rule\":4294967295}}\n",
            u64::MAX,
            t % 3
        ));
    }
    folder.write("odd.jsonl", odd);
    for arguments in [&["--html", "-"][..], &["--json"], &[]] {
        folder
            .run(&[&["report"], arguments, &["odd.jsonl", "odd.jsonl"]].concat())
            .code(0);
    }
    // A trace that breaks off gives a page up to there.
    folder.write(
        "cut.jsonl",
        format!("{HEADER}{{\"op\":\"rdmsr\",\"msr\":16}}\n{{\"op\":\"rd"),
    );
    let ran = folder
        .run(&["report", "--html", "-", "cut.jsonl"])
        .code(2)
        .says(&["line 3"]);
    assert!(ran.out.contains("what came before it is in the report"), "{}", ran.out);
    let ran = folder.run(&["report", "--html", "no/such/page.html", trace]).code(2);
    ran.says(&["cannot write `no/such/page.html`"]);
    folder
        .run(&["report", "--html", "-", "--json", trace])
        .code(2)
        .says(&["cannot be used with"]);
}

#[test]
fn what_a_trace_says_of_itself_does_nothing_to_a_terminal() {
    let folder = Folder::new();
    let header = json!({ "msrgate_trace": 1, "guest": "\u{1b}]0;title\u{7}\u{202e}x\nline" });
    folder.write("a.jsonl", format!("{header}\n{{\"op\":\"rdmsr\",\"msr\":16}}\n"));
    let out = folder.run(&["report", "a.jsonl"]).code(0).out;
    assert!(!out.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{out:?}");
    assert!(out.contains("]0;title"), "{out:?}");
}
