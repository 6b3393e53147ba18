//! What was learned from a guest, under a real guest on this machine's KVM. Skipped where /dev/kvm does not open, unless
//! MSRGATE_LANE_REQUIRE is 1.

use serde_json::Value;

use crate::command::{Folder, count, list, text};
use crate::kvm::kvm_opens;

/// In an emulator each replay takes seconds, and so there is but the shorter trace.
fn traces() -> &'static [&'static str] {
    let traces = &["traces/linux-6.1-pc-smp2.jsonl", "traces/linux-6.1-microvm.jsonl"];
    match std::env::var("MSRGATE_LANE") {
        Ok(lane) if lane != "host" => &traces[..1],
        _ => traces,
    }
}

fn replay(folder: &Folder, policy: &str) -> Value {
    let arguments = ["replay", "--json", "--backend", "kvm", "-p", policy];
    let ran = folder.run(&[&arguments[..], traces()].concat());
    assert!(matches!(ran.code, Some(0 | 1)), "{}", ran.err);
    ran.json()
}

/// The rows that a policy without a rule denies and the whole policy does not.
fn lost<'a>(whole: &'a Value, less: &'a Value) -> Vec<(&'a Value, &'a Value)> {
    let rows = list(whole, "by_msr").iter().zip(list(less, "by_msr"));
    rows.inspect(|(a, b)| assert_eq!((&a["msr"], &a["op"]), (&b["msr"], &b["op"])))
        .filter(|(a, b)| a["action"] != b["action"])
        .collect()
}

#[test]
fn a_learned_policy_changes_nothing_and_each_of_its_rules_is_needed() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let learned = folder.run(&[&["learn"], traces()].concat()).code(0).out;
    folder.write("learned.toml", &learned);
    let whole = replay(&folder, "learned.toml");
    assert_eq!(count(&whole, "changed"), 0, "{whole:#}");
    let rules: Vec<&str> = learned.split("\n[[rule]]\n").collect();
    let mut needed = 0;
    for without in 1..rules.len() {
        let mut rest = rules.clone();
        let removed = rest.remove(without);
        folder.write("less.toml", rest.join("\n[[rule]]\n"));
        let less = replay(&folder, "less.toml");
        let lost = lost(&whole, &less);
        assert!(!lost.is_empty(), "nothing is denied without {removed}");
        // What this machine's kernel does not serve in the first place cannot be missed.
        let missed = lost.iter().any(|(whole, _)| text(whole, "sees") != "#GP");
        assert_eq!(count(&less, "changed") > 0, missed, "without {removed}: {lost:#?}");
        needed += usize::from(missed);
    }
    assert!(
        needed * 2 > rules.len(),
        "{needed} of {} rules are missed",
        rules.len() - 1
    );
}
