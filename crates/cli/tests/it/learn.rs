//! `learn`: from traces to the smallest policy that serves them.

use serde_json::json;

use crate::command::{Folder, TRACES, count, list, text};

const MICROVM: &str = "traces/linux-6.1-microvm.jsonl";
const PC: &str = "traces/linux-6.1-pc-smp2.jsonl";

/// A trace of these events.
fn trace(events: &[&str]) -> String {
    let mut text = "{\"msrgate_trace\":1}\n".to_owned();
    for event in events {
        text.push_str(event);
        text.push('\n');
    }
    text
}

fn learn(folder: &Folder, arguments: &[&str]) -> String {
    folder.run(&[&["learn"], arguments].concat()).code(0).out
}

#[test]
fn a_recorded_guest_is_not_changed_by_what_was_learned_from_it() {
    let folder = Folder::furnished();
    for traces in [&[MICROVM][..], &[PC], &[MICROVM, PC]] {
        for widen in [&[][..], &["--widen", "ranges"], &["--widen", "classes,ranges"]] {
            folder.write("learned.toml", learn(&folder, &[widen, traces].concat()));
            folder.run(&["check", "learned.toml"]).code(0);
            let replay = ["replay", "--backend", "engine", "-p", "learned.toml"];
            folder
                .run(&[&replay[..], traces].concat())
                .code(0)
                .shows(&["the policy changed nothing for the guest"]);
        }
    }
}

#[test]
fn each_rule_is_needed() {
    let folder = Folder::furnished();
    let learned = learn(&folder, &[MICROVM, PC]);
    let rules: Vec<&str> = learned.split("\n[[rule]]\n").collect();
    assert!(rules.len() > 15, "{learned}");
    for without in 1..rules.len() {
        let mut rest = rules.clone();
        let removed = rest.remove(without);
        folder.write("less.toml", rest.join("\n[[rule]]\n"));
        let ran = folder.run(&["replay", "--backend", "engine", "-p", "less.toml", MICROVM, PC]);
        assert_eq!(ran.code, Some(1), "nothing changed without {removed}");
    }
}

#[test]
fn a_policy_is_commented_named_and_has_its_reasons() {
    let folder = Folder::furnished();
    let out = learn(&folder, &[MICROVM, PC]);
    for text in [
        "# Learned from 2 traces (linux-6.1-microvm.jsonl, linux-6.1-pc-smp2.jsonl): 950 accesses, of which",
        "# Denied as it was then, since it only faulted: rdmsr LS_CFG, FP_CFG.",
        "default = \"deny\"",
        "msr   = \"@sysenter\"\nwrite = \"allow\"\nwhy   = \"9 writes in 2 of 2 traces",
        "IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7",
        "why   = \"apic: 15 reads and 3 writes in 2 of 2 traces",
        "tsc: 1 read in 1 of 2 traces (linux-6.1-microvm.jsonl), 0.278 s after its start",
    ] {
        assert!(out.contains(text), "no `{text}` in\n{out}");
    }
}

#[test]
fn a_reason_has_who_needs_it_and_what_it_tells_of_the_host() {
    let folder = Folder::new();
    let events = [
        "{\"op\":\"rdmsr\",\"msr\":\"0x611\",\"did\":\"allow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x1b\",\"did\":\"allow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x179\",\"did\":\"allow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x17a\",\"did\":\"allow\"}",
    ];
    folder.write("t.jsonl", trace(&events));
    let out = learn(&folder, &["t.jsonl"]);
    for text in [
        "why   = \"apic: 1 read in the trace (t.jsonl); Linux needs it (rdmsr: looked at before the local APIC is used",
        "why   = \"mce: 2 reads in the trace (t.jsonl); Linux needs IA32_MCG_CAP, IA32_MCG_STATUS",
        "why   = \"rapl: 1 read in the trace (t.jsonl); of the host it may tell what it and its other guests do now\"",
    ] {
        assert!(out.contains(text), "no `{text}` in\n{out}");
    }
    // A need of a write is none of a read.
    assert!(!out.contains("turns x2APIC on"), "{out}");
    folder.write("learned.toml", &out);
    folder
        .run(&["check", "learned.toml"])
        .code(1)
        .says(&["warning[W017]", "MSR_PKG_ENERGY_STATUS"]);
}

#[test]
fn summaries_are_the_same_bytes_in_every_order_and_grouping() {
    let folder = Folder::furnished();
    folder.write(
        "third.jsonl",
        trace(&["{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"t\":5,\"did\":\"fault\"}"]),
    );
    let summary = |traces: &[&str]| learn(&folder, &[&["--summary"], traces].concat());
    let all = summary(&[MICROVM, PC, "third.jsonl"]);
    assert_eq!(all, summary(&["third.jsonl", PC, MICROVM]));
    folder.write("a", summary(&[MICROVM]));
    folder.write("bc", summary(&["third.jsonl", PC]));
    assert_eq!(all, summary(&["bc", "a"]));
    assert_eq!(all, summary(&["bc", MICROVM]));
    folder.write("all", &all);
    assert_eq!(all, summary(&["all"]));
    assert_eq!(
        learn(&folder, &["bc", "a"]),
        learn(&folder, &[MICROVM, PC, "third.jsonl"])
    );
    // From standard input a trace has another name, and the same rules.
    let piped = folder.run_with(&["learn", "--json", "-"], &all).code(0).json();
    assert_eq!(count(&piped, "events"), 951);
}

#[test]
fn what_a_policy_answered_then_it_answers_again() {
    let folder = Folder::new();
    let events = [
        "{\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x100000000\",\"did\":\"value\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x8b\",\"value\":\"0x0\",\"did\":\"ignore\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x606\",\"value\":\"0x0\",\"did\":\"zero\",\"reason\":\"unknown\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x774\",\"value\":\"0x7\",\"did\":\"shadow\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x774\",\"value\":\"0x9\",\"did\":\"shadow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x774\",\"value\":\"0x9\",\"did\":\"shadow\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0xc0000082\",\"value\":\"0x9\",\"did\":\"once\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0xc0000082\",\"value\":\"0xa\",\"did\":\"fault\",\"why\":\"already-written\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x48\",\"value\":\"0x1\",\"did\":\"only\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x48\",\"value\":\"0x8\",\"did\":\"fault\",\"why\":\"value-not-listed\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x900\",\"value\":\"0x1\",\"did\":\"allow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x802\",\"value\":\"0x1\",\"did\":\"allow\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x34\",\"did\":\"deny\"}",
    ];
    folder.write("t.jsonl", trace(&events));
    let learned = learn(&folder, &["t.jsonl"]);
    for text in [
        "read  = { value = \"0x100000000\" }\nwrite = \"ignore\"",
        "msr   = \"MSR_RAPL_POWER_UNIT\"\nread  = \"zero\"",
        "read  = { shadow = \"0x7\" }\nwrite = \"shadow\"",
        "write = { once = true }",
        "write = { only = [\"0x1\"] }",
        "msr   = \"0x900\"\nread  = \"allow\"",
        "1 access of the x2APIC's registers",
    ] {
        assert!(learned.contains(text), "no `{text}` in\n{learned}");
    }
    assert!(!learned.contains("0x802"), "{learned}");
    folder.write("learned.toml", &learned);
    folder.run(&["check", "learned.toml"]).code(0);
    folder
        .run(&["replay", "--backend", "engine", "-p", "learned.toml", "t.jsonl"])
        .code(0);
}

#[test]
fn what_a_trace_does_not_tell_is_said_and_is_exit_1() {
    let folder = Folder::new();
    let events = [
        "{\"op\":\"rdmsr\",\"msr\":\"0x10a\",\"value\":\"0x1\",\"did\":\"mask\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x1\",\"did\":\"value\"}",
        "{\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x2\",\"did\":\"value\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x79\",\"value\":\"0x2\",\"did\":\"ignore\"}",
        "{\"op\":\"wrmsr\",\"msr\":\"0x79\",\"value\":\"0x2\",\"did\":\"allow\"}",
    ];
    folder.write("t.jsonl", trace(&events));
    let ran = folder.run(&["learn", "--json", "t.jsonl"]).code(1);
    let json = ran.json();
    let remarks: Vec<&str> = list(&json, "remarks")
        .iter()
        .map(|remark| text(remark, "msr"))
        .collect();
    assert_eq!(remarks, ["0x79", "0x8b", "0x10a"]);
    ran.says(&[
        "`mask`",
        "several values, 0x1, 0x2",
        "several ways, `allow` 1 time and `ignore` 1 time",
    ]);
}

#[test]
fn a_trace_that_breaks_off_is_refused_with_its_line_and_what_to_do() {
    let folder = Folder::new();
    let good = "{\"op\":\"rdmsr\",\"msr\":\"0x10\"}";
    folder.write("cut.jsonl", trace(&[good, good]).trim_end().trim_end_matches("\"}"));
    let ran = folder.run(&["learn", "cut.jsonl"]).code(2);
    assert!(ran.out.is_empty());
    ran.says(&["cut.jsonl: line 3: ", "head -n 2 cut.jsonl | msrgate learn -"]);
    let summary = learn_summary(&folder, &trace(&[good]));
    folder.write("cut.summary", summary.lines().next().expect("a header"));
    folder.run(&["learn", "cut.summary"]).code(2).says(&["cut short"]);
    folder.write(
        "new.summary",
        "{\"msrgate_summary\":2,\"traces\":0,\"events\":0,\"faults\":0,\"unfiltered\":0,\"rows\":0}\n",
    );
    folder.run(&["learn", "new.summary"]).code(2).says(&["version 2"]);
    folder
        .run(&["learn", "nosuch.jsonl"])
        .code(2)
        .says(&["cannot read `nosuch.jsonl`"]);
}

#[test]
fn a_trace_with_gaps_is_refused_with_what_to_do_unless_that_is_asked_for() {
    let folder = Folder::new();
    let read = "{\"op\":\"rdmsr\",\"msr\":\"0x10\"}";
    let gap = "{\"lost\":15369,\"t\":5,\"vm\":0,\"vcpu\":0}";
    folder.write("whole.jsonl", trace(&[read]));
    folder.write("gap.jsonl", trace(&[read, gap]));
    for arguments in [&["gap.jsonl"][..], &["--summary", "whole.jsonl", "gap.jsonl"]] {
        let ran = folder.run(&[&["learn"], arguments].concat()).code(2);
        assert!(ran.out.is_empty(), "{}", ran.out);
        ran.says(&[
            "gap.jsonl: 15369 accesses are missing",
            "record the guest again",
            "--incomplete",
        ]);
    }
    let ran = folder.run(&["learn", "--incomplete", "gap.jsonl"]).code(0);
    let learned = ran.says(&["gap.jsonl: 15369 accesses are missing"]).out;
    assert!(learned.contains("lacks 15369 accesses"), "{learned}");
    folder.write("learned.toml", learned);
    folder.run(&["check", "learned.toml"]).code(0);
    let json = |arguments: &[&str]| {
        let ran = folder.run(&[&["learn", "--json"], arguments].concat());
        let json = ran.json();
        (json["complete"].clone(), count(&json, "lost"))
    };
    assert_eq!(json(&["whole.jsonl"]), (true.into(), 0));
    assert_eq!(json(&["--incomplete", "whole.jsonl"]), (true.into(), 0));
    assert_eq!(
        json(&["--incomplete", "gap.jsonl", "gap.jsonl"]),
        (false.into(), 2 * 15_369)
    );
    // What a summary is made of stays incomplete, however often it is merged.
    folder.write("one", learn(&folder, &["--summary", "--incomplete", "gap.jsonl"]));
    folder.run(&["learn", "one"]).code(2).says(&["one: 15369 accesses"]);
    folder.write(
        "two",
        learn(&folder, &["--summary", "--incomplete", "one", "whole.jsonl"]),
    );
    folder.run(&["learn", "two"]).code(2).says(&["two: 15369 accesses"]);
    assert_eq!(json(&["--incomplete", "two"]), (false.into(), 15_369));
    // So does what it is held against.
    let since = ["--since", "gap.jsonl", "whole.jsonl"];
    let ran = folder.run(&[&["learn"][..], &since].concat()).code(2);
    ran.says(&["gap.jsonl: 15369 accesses are missing"]);
    assert_eq!(json(&[&["--incomplete"][..], &since].concat()), (false.into(), 0));
    folder.write("less.jsonl", trace(&[gap]));
    let dropped = ["learn", "--incomplete", "--since", "whole.jsonl", "less.jsonl"];
    folder
        .run(&dropped)
        .code(0)
        .says(&["dropped rdmsr IA32_TSC", "from which accesses are missing"]);
    // A gap that is none is an error like any other line.
    folder.write("bad.jsonl", trace(&[read, "{\"lost\":0}"]));
    let bad = folder.run(&["learn", "--incomplete", "bad.jsonl"]).code(2);
    bad.says(&["bad.jsonl: line 3: `lost` is 0"]);
}

fn learn_summary(folder: &Folder, trace: &str) -> String {
    folder.run_with(&["learn", "--summary", "-"], trace).code(0).out
}

#[test]
fn what_is_widened_is_named() {
    let folder = Folder::new();
    let mut events: Vec<String> = Vec::new();
    for msr in [0x174, 0x175, 0x400, 0x401, 0x403, 0x404] {
        events.push(format!("{{\"op\":\"wrmsr\",\"msr\":{msr},\"value\":0}}"));
    }
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    folder.write("t.jsonl", trace(&events));
    let exact = learn(&folder, &["t.jsonl"]);
    assert!(!exact.contains("not seen") && !exact.contains('@'), "{exact}");
    let classes = learn(&folder, &["--widen", "classes", "t.jsonl"]);
    assert!(
        classes.contains("msr   = \"@sysenter\"") && classes.contains("wrmsr not seen of IA32_SYSENTER_EIP"),
        "{classes}"
    );
    let ranges = learn(&folder, &["--widen", "ranges", "t.jsonl"]);
    assert!(ranges.contains("msr   = \"IA32_MC0_CTL..=IA32_MC1_CTL\""), "{ranges}");
    assert!(ranges.contains("wrmsr not seen of IA32_MC0_ADDR\""), "{ranges}");
}

#[test]
fn a_later_trace_says_what_it_adds_and_what_was_not_touched_again() {
    let folder = Folder::new();
    let read = |msr: &str| format!("{{\"op\":\"rdmsr\",\"msr\":\"{msr}\",\"value\":\"0x1\",\"t\":1000000}}");
    let write = "{\"op\":\"wrmsr\",\"msr\":\"0x10\",\"value\":\"0x1\",\"t\":9000000}";
    let fault = "{\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"did\":\"fault\"}";
    folder.write("old.jsonl", trace(&[&read("0x10"), &read("0x8b"), &read("0xfe")]));
    folder.write("new.jsonl", trace(&[&read("0x10"), write, fault]));
    folder.write("old.toml", learn(&folder, &["old.jsonl"]));
    folder.write("old.summary", learn(&folder, &["--summary", "old.jsonl"]));
    // Whatever the older one is, the same changes; exit 1, since the older policy does not serve the new trace.
    for old in ["old.toml", "old.summary", "old.jsonl"] {
        let ran = folder.run(&["learn", "--json", "--since", old, "new.jsonl"]).code(1);
        let json = ran.json();
        let told: Vec<[&str; 4]> = list(&json, "changes")
            .iter()
            .map(|change| ["change", "first", "op", "after"].map(|key| text(change, key)))
            .collect();
        let expected = [
            ["added", "0x10", "wrmsr", "allow"],
            ["dropped", "0x8b", "rdmsr", "deny"],
            ["dropped", "0xfe", "rdmsr", "deny"],
        ];
        assert_eq!(told, expected, "since {old}");
        assert_eq!(list(&json, "changes")[0]["names"], json!(["IA32_TSC"]));
        ran.says(&[
            &format!("since {old}: 1 added, 0 changed, 2 dropped"),
            "added wrmsr IA32_TSC: allow, was deny: 1 write in the trace (new.jsonl), 0.009 s after",
            "1 read in the trace (old.jsonl)",
            "only faulted, 1 time, in 1 trace since (new.jsonl)",
            "not touched in 1 trace since (new.jsonl)",
        ]);
    }
    // Together with what the older one was learned from, nothing is dropped: the policy is looser and no tighter.
    let ran = folder
        .run(&["learn", "--since", "old.toml", "old.summary", "new.jsonl"])
        .code(1);
    ran.says(&["1 added, 0 changed, 0 dropped"]);
    // What the older one serves already is no change, though a trace does not tell what a mask is.
    let same = folder.run(&["learn", "--since", "old.toml", "old.jsonl"]).code(0);
    same.says(&["nothing differs from old.toml"]);
    folder.write(
        "mask.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = 16\nread = { mask = { keep = 1 } }\n[[rule]]\nmsr = \"0x800..=0x8ff\"\nread = \"allow\"\n",
    );
    folder.write(
        "masked.jsonl",
        trace(&["{\"op\":\"rdmsr\",\"msr\":16,\"value\":1,\"did\":\"mask\"}"]),
    );
    folder
        .run(&["learn", "--since", "mask.toml", "masked.jsonl"])
        .code(1)
        .says(&["`mask`", "nothing differs"]);
    folder
        .run(&["learn", "--since", "none.toml", "new.jsonl"])
        .code(2)
        .says(&["cannot read `none.toml`"]);
}

#[test]
fn a_summary_that_contradicts_itself_is_refused_with_its_line() {
    let folder = Folder::new();
    let head = |rows: u32| {
        format!(
            "{{\"msrgate_summary\":1,\"traces\":1,\"names\":[\"a\"],\"events\":1,\"faults\":0,\"unfiltered\":0,\"rows\":{rows}}}\n"
        )
    };
    let row = "{\"msr\":\"0x10\",\"op\":\"rdmsr\",\"did\":{\"allow\":1},\"traces\":1,\"names\":[\"a\"],\"first\":0,\"last\":5}\n";
    folder.run_with(&["learn", "-"], &format!("{}{row}", head(1))).code(0);
    for (bad, what) in [
        (row.replace("{\"allow\":1}", "{\"allow\":0}"), "contradicts itself"),
        (row.replace("\"traces\":1", "\"traces\":2"), "contradicts itself"),
        (row.replace("\"traces\":1,", ""), "contradicts itself"),
        (row.replace("\"last\":5", "\"first\":6"), "duplicate field"),
        (row.replace("\"first\":0", "\"first\":6"), "contradicts itself"),
        (
            row.replace("\"a\"", &format!("\"{}\"", "n".repeat(2000))),
            "a name is longer",
        ),
        (row.replace("{\"allow\":1}", "{\"deny\":1}"), "not known here"),
        (row.replace("0x10", "0x100000000"), "32 bits"),
        (row.replace("{\"allow\":1}", "{\"allow\":-1}"), "not a summary"),
        (format!("{{\"msr\":\"{}", "x".repeat(1 << 20)), "longer than"),
        (row.repeat(2), "twice"),
    ] {
        let ran = folder.run_with(&["learn", "-"], &format!("{}{bad}", head(1))).code(2);
        assert!(ran.out.is_empty());
        ran.says(&["standard input: line "]).says(&[what]);
    }
}

#[test]
fn a_trace_may_be_empty_huge_or_odd() {
    let folder = Folder::new();
    let learned = folder.run_with(&["learn", "-"], &trace(&[])).code(0);
    let learned = learned.says(&["no access", "denies everything"]).out.clone();
    folder.write("learned.toml", &learned);
    folder.run(&["check", "learned.toml"]).code(1).says(&["warning[W016]"]);
    // More than 16 windows cannot be allowed.
    let mut events: Vec<String> = Vec::new();
    for window in 0..17 {
        events.push(format!("{{\"op\":\"rdmsr\",\"msr\":{}}}", window * 0x10000));
    }
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    let ran = folder.run_with(&["learn", "--json", "-"], &trace(&events)).code(1);
    assert!(ran.json()["ranges"].is_null());
    ran.says(&["17 filter ranges"]);
    // A file's name may hold what TOML does not.
    let odd = "odd\u{1} \"name\"\u{7f}\n\\.jsonl";
    folder.write(odd, TRACES[0].1);
    folder.write("learned.toml", learn(&folder, &[odd]));
    folder.run(&["check", "learned.toml"]).code(0);
}

#[test]
fn a_trace_of_a_host_that_ignores_what_kvm_does_not_know_is_told() {
    let folder = Folder::new();
    let trace = |ignores: bool| {
        format!(
            "{{\"msrgate_trace\":1,\"ignore_msrs\":{ignores}}}\n{{\"op\":\"rdmsr\",\"msr\":\"0x19c\",\"value\":\"0x0\"}}\n"
        )
    };
    folder.write("yes.jsonl", trace(true));
    folder.write("no.jsonl", trace(false));
    let ran = folder.run(&["learn", "yes.jsonl"]).code(0);
    assert!(
        ran.err.contains("yes.jsonl: the host had `kvm.ignore_msrs`"),
        "{}",
        ran.err
    );
    assert!(
        ran.out.contains("# 1 trace is from a host with `kvm.ignore_msrs`"),
        "{}",
        ran.out
    );
    // It stays with a summary.
    let summary = folder.run(&["learn", "--summary", "yes.jsonl"]).code(0).out;
    folder.write("yes.summary", summary);
    let json = folder
        .run(&["learn", "--json", "yes.summary", "no.jsonl"])
        .code(0)
        .json();
    assert_eq!(json["ignoring"], 1);
    let ran = folder.run(&["learn", "no.jsonl"]).code(0);
    assert!(
        !ran.err.contains("ignore_msrs") && !ran.out.contains("ignore_msrs"),
        "{}{}",
        ran.out,
        ran.err
    );
}

#[test]
fn a_log_that_tells_of_no_guest_is_refused_as_a_whole() {
    let folder = Folder::new();
    folder.write(
        "log",
        "qemu: error: failed to set MSR 0x48b to 0x5\n[    1.000000] usb 1-1: new device\n",
    );
    let told = [
        "log: no line of this log is about an MSR that a guest accessed",
        "`msrgate why`",
    ];
    let ran = folder.run(&["learn", "log"]).code(2).says(&told);
    assert!(!ran.err.contains("head -n"), "{}", ran.err);
}
