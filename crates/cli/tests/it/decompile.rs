//! `decompile`: from a raw filter or a plan back to a policy.

use serde_json::{Value, json};

use crate::command::{Folder, POLICIES, list};

#[test]
fn each_policys_plan_and_filter_come_back_as_policies_that_are_equal_to_them() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let policy = format!("policies/{name}");
        let plan = folder.run(&["plan", "--json", &policy]).code(0);
        folder.write("plan.json", &plan.out);
        let plan = plan.json();
        let filter = json!({ "default": plan["default"], "ranges": plan["ranges"] });
        folder.write("filter.json", filter.to_string());
        // What is printed for a VMM in C is the same filter.
        folder.write("filter.c", folder.run(&["plan", "--emit", "c", &policy]).code(0).out);
        folder
            .run(&["diff", "filter.json", "filter.c"])
            .code(0)
            .shows(&["equal"]);
        for file in ["plan.json", "filter.json"] {
            let again = folder.run(&["decompile", file]).code(0).out;
            folder.write("again.toml", again);
            folder.run(&["diff", "again.toml", file]).code(0).shows(&["equal"]);
            if file == "plan.json" {
                folder.run(&["diff", "again.toml", &policy]).code(0).shows(&["equal"]);
            }
        }
    }
}

#[test]
fn a_decompiled_policy_says_the_same_as_json_and_as_text() {
    let folder = Folder::new();
    let range = json!({ "base": "0x174", "nmsrs": 3, "flags": 2, "bitmap": "0000000000000000" });
    folder.write(
        "filter.json",
        json!({ "default": "allow", "ranges": [range] }).to_string(),
    );
    let text = folder.run(&["decompile", "filter.json"]).code(0).out;
    let found = folder.run(&["decompile", "--json", "filter.json"]).code(0).json();
    assert_eq!(found["policy"], Value::String(text));
    assert_eq!(
        list(&found, "rules"),
        [json!({ "msrs": ["@sysenter"], "read": null, "write": "deny" })]
    );
    assert_eq!((&found["default"], &found["remarks"]), (&"allow".into(), &json!([])));
}

#[test]
fn what_the_kernel_takes_for_something_else_is_told() {
    let folder = Folder::new();
    let range = json!({ "base": "0xffffffff", "nmsrs": 1, "flags": 3, "bitmap": "0000000000000000" });
    folder.write(
        "filter.json",
        json!({ "default": "allow", "ranges": [range] }).to_string(),
    );
    let ran = folder.run(&["decompile", "filter.json"]).code(0);
    assert!(!ran.out.contains("[[rule]]"), "{}", ran.out);
    ran.shows(&["# In the filter: range 0 ends behind"])
        .says(&["filter.json: range 0 ends behind 0xffffffff"]);
}

#[test]
fn what_is_no_filter_is_exit_2() {
    let folder = Folder::furnished();
    folder
        .run(&["decompile", "policies/qemu.toml"])
        .code(2)
        .says(&["if it is a policy"]);
    folder
        .run(&["decompile", "missing"])
        .code(2)
        .says(&["cannot read `missing`"]);
    folder.write("deny.json", "{ \"flags\": 1, \"ranges\": [] }");
    folder.run(&["decompile", "deny.json"]).code(2).says(&["EINVAL"]);
}
