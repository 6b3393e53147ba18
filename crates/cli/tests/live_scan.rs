//! What a guest sees, on this machine's KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

mod command;
mod live;

use command::{Folder, count, hex, list, text};
use live::kvm_opens;
use serde_json::Value;

/// The keys of an object, in order.
#[track_caller]
fn keys(value: &Value, wanted: &[&str]) {
    let found: Vec<&str> = value
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(found, wanted);
}

/// What the MSR of a list reads.
fn value(scan: &Value, msr: u64) -> Option<u64> {
    let found = list(scan, "readable").iter().find(|seen| hex(seen, "msr") == msr);
    found.map(|seen| hex(seen, "value"))
}

fn writable(scan: &Value, msr: u64) -> bool {
    list(scan, "writable").iter().any(|seen| hex(seen, "msr") == msr)
}

#[test]
fn a_scan_is_json_with_documented_keys_and_the_next_one_sees_the_same() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let ran = folder.run(&["scan", "--json", "--all-known"]).code(0);
    let scan = ran.json();
    let facts = ["host", "microcode", "kernel", "cpuid", "policy"];
    let lists = [
        "ranges",
        "readable",
        "written",
        "writable",
        "unwritten",
        "broken",
        "faults",
    ];
    keys(&scan, &[&facts[..], &lists].concat());
    assert!(!text(&scan, "kernel").is_empty());
    for range in list(&scan, "ranges").iter().chain(list(&scan, "written")) {
        keys(range, &["first", "last"]);
        assert!(hex(range, "first") <= hex(range, "last"));
    }
    let mut last = None;
    for seen in list(&scan, "readable") {
        keys(seen, &["msr", "name", "value", "volatile"]);
        hex(seen, "value");
        assert!(last < Some(hex(seen, "msr")), "in order");
        last = Some(hex(seen, "msr"));
    }
    for seen in list(&scan, "writable") {
        keys(seen, &["msr", "name"]);
    }
    for seen in list(&scan, "unwritten") {
        keys(seen, &["msr", "name", "why"]);
    }
    assert!(list(&scan, "broken").is_empty());
    let read: u64 = list(&scan, "ranges")
        .iter()
        .map(|range| hex(range, "last") - hex(range, "first") + 1)
        .sum();
    assert_eq!(list(&scan, "readable").len() as u64 + count(&scan, "faults"), read);
    // What every kernel gives every guest.
    assert_eq!(value(&scan, 0x1b), Some(0xfee0_0900));
    assert!(writable(&scan, 0x174) && !writable(&scan, 0xfe));
    let tsc = list(&scan, "readable")
        .iter()
        .find(|seen| hex(seen, "msr") == 0x10)
        .expect("a TSC");
    assert_eq!(tsc["volatile"], true);

    folder.write("before.json", &ran.out);
    let same = folder
        .run(&["scan", "--json", "--against", "before.json"])
        .code(0)
        .json();
    keys(&same, &[&facts[..], &lists, &["against", "differences"]].concat());
    keys(&same["against"], &facts);
    assert_eq!(same["differences"], serde_json::json!([]));
    let shown = folder.run(&["scan", "--against", "before.json"]).code(0);
    shown.shows(&["a guest sees what it saw before", "MSRs read by a real guest: "]);
}

#[test]
fn what_a_policy_changed_is_told_and_ends_with_1() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let before = folder.run(&["scan", "--json"]).code(0);
    folder.write("before.json", &before.out);
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n\
         [[rule]]\nmsr = 0x8b\nread = { value = 0x7700000000 }\nwrite = \"deny\"\n\
         [[rule]]\nmsr = 0x1b\nread = \"deny\"\nwrite = \"deny\"\n\
         [[rule]]\nmsr = 0x35\nread = { value = 0x20004 }\nwrite = \"ignore\"\n\
         [[rule]]\nmsr = 0xfe\nwrite = \"ignore\"\n",
    );
    let against = ["scan", "--json", "-p", "policy.toml", "--against", "before.json"];
    let after = folder.run(&against).code(1).json();
    keys(&after["policy"], &["name", "hash"]);
    assert_eq!(after["against"]["policy"], Value::Null);
    let differences: Vec<(u64, &str, &Value, &Value)> = list(&after, "differences")
        .iter()
        .map(|found| {
            keys(found, &["msr", "name", "what", "before", "after"]);
            (
                hex(found, "msr"),
                text(found, "what"),
                &found["before"],
                &found["after"],
            )
        })
        .collect();
    let microcode = format!("{:#x}", value(&before.json(), 0x8b).expect("a revision"));
    let none = &Value::Null;
    let expected = [
        (0x1b, "unreadable", &"0xfee00900".into(), none),
        (0x1b, "unwritable", none, none),
        (0x35, "readable", none, &"0x20004".into()),
        (0x8b, "value", &microcode.into(), &"0x7700000000".into()),
        (0x8b, "unwritable", none, none),
        (0xfe, "writable", none, none),
    ];
    assert_eq!(differences, expected);
    let shown = folder
        .run(&["scan", "-p", "policy.toml", "--against", "before.json"])
        .code(1);
    shown.shows(&[
        "none → policy (",
        "IA32_APIC_BASE",
        "0xfee00900 → #GP",
        "#GP → done",
        "4 MSRs differ",
    ]);
}

#[test]
fn more_than_a_scan_takes_is_refused_and_more_than_the_windows_is_read() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let many = folder.run(&["scan", "--range", "0..=0xffffffff"]).code(2);
    many.says(&["4294967296 MSRs", "in parts"]);
    let args = [
        "scan",
        "--json",
        "--write",
        "none",
        "--range",
        "0xdeadbee0..=0xdeadbeef",
    ];
    let scan = folder.run(&args).code(0).json();
    assert_eq!(list(&scan, "ranges").len(), 6);
    assert_eq!(hex(&list(&scan, "ranges")[5], "last"), 0xdead_beef);
    assert_eq!(
        (&scan["written"], &scan["writable"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
}
