//! `diff`: which accesses two policies, plans or raw filters treat differently.

use serde_json::json;

use crate::command::{Folder, POLICIES, list, text};

/// The plan of a policy as JSON.
fn plan(folder: &Folder, policy: &str) -> String {
    folder.run(&["plan", "--json", policy]).code(0).out
}

/// The filter alone of a plan.
fn filter_of(plan: &str) -> String {
    let plan: serde_json::Value = serde_json::from_str(plan).expect("JSON");
    json!({ "default": plan["default"], "ranges": plan["ranges"] }).to_string()
}

#[test]
fn each_policy_is_equal_to_its_plan_and_to_its_filter() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let policy = format!("policies/{name}");
        let plan = plan(&folder, &policy);
        folder.write("plan.json", &plan);
        folder.write("filter.json", filter_of(&plan));
        let by = |a: &str, b: &str| text(&folder.run(&["diff", "--json", a, b]).code(0).json(), "by").to_owned();
        assert_eq!(by(&policy, &policy), "actions", "{name}");
        assert_eq!(by(&policy, "plan.json"), "actions", "{name}");
        assert_eq!(by(&policy, "filter.json"), "verdicts", "{name}");
        assert_eq!(by("filter.json", "plan.json"), "verdicts", "{name}");
    }
}

#[test]
fn a_difference_is_a_range_with_what_each_gives_and_the_names() {
    let folder = Folder::new();
    let head = "version = 1\ndefault = \"allow\"\n";
    folder.write(
        "a.toml",
        format!(
            "{head}unknown = \"ignore\"\n[[rule]]\nmsr = \"0x170..=0x176\"\nread = \"deny\"\nwrite = {{ only = [1] }}\n"
        ),
    );
    folder.write(
        "b.toml",
        format!("{head}[[rule]]\nmsr = \"0x175..=0x178\"\nread = \"zero\"\n"),
    );
    let found = folder.run(&["diff", "--json", "a.toml", "b.toml"]).code(1).json();
    let wanted = json!({
        "equal": false,
        "by": "actions",
        "differences": [
            { "first": "0x170", "last": "0x174", "op": "rdmsr", "a": "deny", "b": "allow", "bits": null, "names": ["IA32_SYSENTER_CS"] },
            { "first": "0x170", "last": "0x176", "op": "wrmsr", "a": "only 0x1", "b": "allow",
              "bits": null, "names": ["IA32_SYSENTER_CS", "IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP"] },
            { "first": "0x175", "last": "0x176", "op": "rdmsr", "a": "deny", "b": "zero",
              "bits": null, "names": ["IA32_SYSENTER_ESP", "IA32_SYSENTER_EIP"] },
            { "first": "0x177", "last": "0x178", "op": "rdmsr", "a": "allow", "b": "zero", "bits": null, "names": [] },
        ],
        "fallbacks": [
            { "when": "unknown", "op": "rdmsr", "a": "zero", "b": "deny" },
            { "when": "unknown", "op": "wrmsr", "a": "ignore", "b": "deny" },
        ],
    });
    assert_eq!(found, wanted);
    folder.run(&["diff", "a.toml", "b.toml"]).code(1).shows(&[
        "A is a.toml, B is b.toml",
        "IA32_SYSENTER_CS",
        "4 ranges, 16 of 2^33 accesses differ",
    ]);
}

#[test]
fn a_filter_calls_every_answer_of_user_space_a_denial() {
    let folder = Folder::new();
    folder.write(
        "emulated.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = [0x8b, 0x8d]\nread = { value = 1 }\n",
    );
    let range = |base: &str| json!({ "base": base, "nmsrs": 1, "flags": 1, "bitmap": "0000000000000000" });
    let filter = json!({ "flags": 0, "ranges": [range("0x8b"), range("0x8c")] });
    folder.write("filter.json", filter.to_string());
    let found = folder
        .run(&["diff", "--json", "emulated.toml", "filter.json"])
        .code(1)
        .json();
    let rows: Vec<(&str, &str, &str)> = list(&found, "differences")
        .iter()
        .map(|row| (text(row, "first"), text(row, "a"), text(row, "b")))
        .collect();
    assert_eq!(rows, [("0x8c", "allow", "deny"), ("0x8d", "value 0x1", "allow")]);
}

#[test]
fn a_plan_for_a_host_leaves_what_the_kernel_holds_to_the_kernel() {
    let folder = Folder::new();
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x8b\nread = { value = 1 }\nwrite = \"ignore\"\n",
    );
    let fallback = json!({ "read": "deny", "write": "deny" });
    let plan = json!({
        "default": "allow",
        "ranges": [{ "base": "0x8b", "nmsrs": 1, "read": false, "write": true, "bitmap": "0000000000000000" }],
        "presets": [{ "msr": "0x8b", "value": "0x1" }],
        "actions": [{ "first": "0x8b", "last": "0x8b", "op": "wrmsr", "action": "ignore", "rule": 0 }],
        "unknown": fallback, "invalid": fallback,
    });
    folder.write("plan.json", plan.to_string());
    folder
        .run(&["diff", "policy.toml", "plan.json"])
        .code(0)
        .shows(&["equal"]);
    folder.write("filter.json", filter_of(&plan.to_string()));
    folder
        .run(&["diff", "plan.json", "filter.json"])
        .code(0)
        .shows(&["equal"]);
}

#[test]
fn standard_input_is_one_of_the_two() {
    let folder = Folder::furnished();
    let plan = plan(&folder, "policies/qemu.toml");
    folder.run_with(&["diff", "policies/qemu.toml", "-"], &plan).code(0);
    let (_, policy) = POLICIES
        .iter()
        .find(|(name, _)| *name == "qemu.toml")
        .expect("qemu.toml");
    folder.run_with(&["diff", "-", "policies/qemu.toml"], policy).code(0);
    folder
        .run(&["diff", "-", "-"])
        .code(2)
        .says(&["standard input", "named twice"]);
}

#[test]
fn what_cannot_be_read_is_exit_2_with_the_file_and_what_is_wrong() {
    let folder = Folder::furnished();
    for (bad, what) in [
        ("{ \"default\": \"deny\", \"ranges\": [] }", "EINVAL"),
        ("{ \"default\": \"deny\" }", "`ranges` is missing"),
        ("version = 1\ndefault = \"maybe\"\n", "allow"),
        ("garbage", "error["),
    ] {
        folder.write("bad", bad);
        let ran = folder.run(&["diff", "policies/qemu.toml", "bad"]).code(2);
        assert!(ran.out.is_empty(), "{}", ran.out);
        ran.says(&["bad", what]);
    }
    folder
        .run(&["diff", "policies/qemu.toml", "missing"])
        .code(2)
        .says(&["cannot read `missing`"]);
}

#[test]
fn a_cell_of_any_length_leaves_the_others_as_they_are() {
    let folder = Folder::new();
    let values: Vec<String> = (0..20_000).map(|n| n.to_string()).collect();
    let rules: String = (1..2000)
        .map(|n| format!("\n[[rule]]\nmsr = {n}\nread = {{ value = {n} }}\n"))
        .collect();
    let long = format!("\n[[rule]]\nmsr = 0\nwrite = {{ only = [{}] }}\n", values.join(", "));
    folder.write("a.toml", format!("version = 1\ndefault = \"deny\"\n{long}{rules}"));
    folder.write("b.toml", "version = 1\ndefault = \"deny\"\nspill = \"refuse\"\n");
    let ran = folder.run(&["diff", "a.toml", "b.toml"]).code(1).shows(&["…", "0x7cf"]);
    let longest = ran.out.lines().map(|line| line.chars().count()).max();
    assert!(longest.is_some_and(|longest| longest < 1000), "{longest:?}");
    // Programs get all of it.
    folder
        .run(&["diff", "--json", "a.toml", "b.toml"])
        .code(1)
        .shows(&["0x4e1f"]);
}
