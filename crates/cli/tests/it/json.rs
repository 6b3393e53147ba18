//! What programs read. Which keys there are stands in docs/json.md, which is written from what is printed.

use serde_json::Value;

use crate::command::{FRAGMENTS, Folder, POLICIES, Ran, count, hex, list, text};

/// The keys of an object, in their order.
fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

/// One of the words.
#[track_caller]
fn word(value: &Value, key: &str, words: &[&str]) {
    let found = text(value, key);
    assert!(words.contains(&found), "`{key}` is `{found}`, not one of {words:?}");
}

/// A hash: 32 bytes in lower-case hexadecimal.
#[track_caller]
fn hash(value: &Value) {
    let text = text(value, "hash");
    let digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    assert!(text.len() == 64 && text.chars().all(digit), "{text}");
}

#[test]
fn check_says_whether_a_policy_is_right_and_what_was_found() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let checked = folder.run(&["check", "--json", &path]).code(0).json();
        assert_eq!(checked["ok"], true, "{name}");
        assert_eq!(format!("{}.toml", text(&checked["policy"], "name")), *name);
        hash(&checked["policy"]);
        for finding in list(&checked, "findings") {
            // A warning of these is accepted, or `ok` would be false.
            word(
                finding,
                "severity",
                if finding["accepted"].is_null() {
                    &["note"]
                } else {
                    &["warning"]
                },
            );
            let kind = if finding["accepted"].is_null() { 'N' } else { 'W' };
            assert!(text(finding, "code").starts_with(kind) && !text(finding, "message").is_empty());
        }
    }
}

#[test]
fn check_counts_a_warning_as_a_no_and_a_note_as_none() {
    let folder = Folder::new();
    folder.write(
        "late.toml",
        "version = 1\ndefault = \"allow\"\n\n[[rule]]\nmsr = \"0x1230..=0x123f\"\nread = \"zero\"\n\n[[rule]]\nmsr = 0x1234\nread = \"deny\"\n",
    );
    let ran = folder.run(&["check", "--json", "late.toml"]).code(1);
    let checked = ran.json();
    assert_eq!(checked["ok"], false);
    hash(&checked["policy"]);
    let finding = &list(&checked, "findings")[0];
    word(finding, "severity", &["warning"]);
    assert_eq!((text(finding, "code"), count(finding, "line")), ("W001", 8));
    assert!(count(finding, "column") > 0 && text(finding, "file") == "late.toml");
    folder
        .run(&["check", "late.toml"])
        .code(1)
        .says(&["warning[W001]", "this one decides"])
        .shows(&["1 finding"]);
}

#[test]
fn check_lists_what_the_policy_accepts_and_does_not_count_it() {
    let folder = Folder::new();
    let policy = |accept| {
        format!(
            "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"deny\"\naccept = {{ {accept} }}\n\
             [[rule]]\nmsr = \"IA32_EFER\"\nread = \"allow\"\n"
        )
    };
    folder.write("accepted.toml", policy("W007 = \"for whoever reads it\""));
    let checked = folder.run(&["check", "--json", "accepted.toml"]).code(0).json();
    let finding = &list(&checked, "findings")[0];
    assert_eq!(
        (text(finding, "code"), text(finding, "accepted")),
        ("W007", "for whoever reads it")
    );
    let ran = folder.run(&["check", "accepted.toml"]).code(0);
    let ran = ran.shows(&[
        "accepted.toml: ok",
        "accepted W007 at accepted.toml:3: for whoever reads it",
    ]);
    assert!(ran.err.is_empty(), "{}", ran.err);
    folder.write("idle.toml", policy("W001 = \"for whoever reads it\""));
    folder
        .run(&["check", "idle.toml"])
        .code(1)
        .says(&["warning[W007]", "warning[W010]"]);
}

#[test]
fn check_of_several_policies_is_one_object() {
    let folder = Folder::furnished();
    folder.write("bad.toml", "version = 1\n");
    let all = folder
        .run(&["check", "--json", "policies/qemu.toml", "bad.toml"])
        .code(2)
        .json();
    assert_eq!(all["ok"], false);
    let each = list(&all, "policies");
    assert_eq!((&each[0]["ok"], &each[1]["ok"]), (&true.into(), &false.into()));
}

/// What an action is given, by its word.
fn arguments(op: &str, action: &str) -> &'static [&'static str] {
    match (op, action) {
        (_, "handler") => &["handler"],
        ("rdmsr", "zero" | "value") => &["value"],
        ("rdmsr", "shadow") => &["initial"],
        ("rdmsr", "mask") => &["keep", "set"],
        ("wrmsr", "mask") => &["may_change", "otherwise"],
        ("wrmsr", "only") => &["values"],
        _ => &[],
    }
}

#[track_caller]
fn is_a_plan(plan: &Value) {
    word(plan, "default", &["allow", "deny"]);
    hash(plan);
    let ranges = list(plan, "ranges");
    assert!(ranges.len() <= 16);
    for range in ranges {
        let msrs = count(range, "nmsrs");
        assert!((1..=12288).contains(&msrs));
        assert!(hex(range, "base") + msrs <= 1 << 32);
        assert!(range["read"].as_bool().unwrap() || range["write"].as_bool().unwrap());
        let bitmap = text(range, "bitmap");
        assert_eq!(bitmap.len() as u64, msrs.div_ceil(64) * 8 * 2, "whole words of 8 bytes");
        assert!(bitmap.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c)));
    }
    for reason in list(plan, "reasons") {
        assert!(["filter", "unknown", "invalid"].contains(&reason.as_str().unwrap()));
    }
    for preset in list(plan, "presets") {
        hex(preset, "msr");
        hex(preset, "value");
    }
    let mut last = [None, None];
    for action in list(plan, "actions") {
        word(action, "op", &["rdmsr", "wrmsr"]);
        let op = text(action, "op");
        let mut wanted = vec!["first", "last", "op", "action", "rule", "decided_by"];
        wanted.extend(arguments(op, text(action, "action")));
        assert_eq!(keys(action), wanted);
        let first = hex(action, "first");
        let before = last[usize::from(op == "wrmsr")].replace(hex(action, "last"));
        assert!(
            first <= hex(action, "last") && before.is_none_or(|before| before < first),
            "{action:#}"
        );
        assert_eq!(action["rule"].is_u64(), action["decided_by"] == "rule");
        word(action, "decided_by", &["rule", "valid", "default"]);
        assert_ne!(
            text(action, "action"),
            "allow",
            "what the kernel answers needs no entry"
        );
    }
    for when in ["unknown", "invalid"] {
        for op in ["read", "write"] {
            let wanted = arguments(["rdmsr", "wrmsr"][usize::from(op == "write")], text(&plan[when], op));
            assert_eq!(keys(&plan[when][format!("{op}_arguments")]), wanted);
        }
    }
    for note in list(plan, "notes") {
        assert!(text(note, "code").starts_with('N'));
    }
    assert!(plan["minimum"]["proved"].as_bool().unwrap());
    assert!(count(&plan["minimum"], "ranges") <= count(&plan["minimum"], "separate"));
}

#[test]
fn plan_says_what_the_kernel_and_user_space_get() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let ran = folder.run(&["plan", "--json", &path]).code(0);
        is_a_plan(&ran.json());
        assert_eq!(folder.run(&["plan", "--emit", "json", &path]).code(0).out, ran.out);
        let checked = folder.run(&["check", "--json", &path]).code(0).json();
        assert_eq!(checked["policy"]["hash"], ran.json()["hash"]);
    }
}

/// Every action of the language.
const ACTIONS: &str = r#"version = 1
default = "allow"
unknown = "ignore"
invalid = { read = "zero", write = "deny" }

[[rule]]
msr   = "IA32_BIOS_SIGN_ID"
read  = { value = "0xfedcba9876543210" }
write = "ignore"

[[rule]]
msr   = "IA32_FS_BASE"
read  = { mask = { keep = 0xff, set = 0x100 } }
write = { mask = { may_change = 0xf, otherwise = "drop" } }

[[rule]]
msr   = "IA32_GS_BASE"
read  = { shadow = 5 }
write = "shadow"

[[rule]]
msr   = "IA32_LSTAR"
read  = "host"
write = { once = true }

[[rule]]
msr   = "IA32_STAR"
read  = "zero"
write = { only = [1, 2] }

[[rule]]
msr   = "IA32_CSTAR"
read  = { handler = "cstar" }
write = { handler = "cstar" }

[[rule]]
msr   = "IA32_PAT"
read  = "deny"
write = "deny"
"#;

#[test]
fn plan_tells_what_each_action_is_given() {
    let folder = Folder::new();
    folder.write("actions.toml", ACTIONS);
    let plan = folder.run(&["plan", "--json", "actions.toml"]).code(0).json();
    is_a_plan(&plan);
    let find = |op: &str, msr: u64| {
        let found = list(&plan, "actions")
            .iter()
            .find(|action| text(action, "op") == op && hex(action, "first") == msr);
        found.unwrap_or_else(|| panic!("{op} {msr:#x}")).clone()
    };
    assert_eq!(find("rdmsr", 0x8b)["value"], "0xfedcba9876543210");
    assert_eq!(find("wrmsr", 0x8b)["action"], "ignore");
    let mask = find("rdmsr", 0xc000_0100);
    assert_eq!((&mask["keep"], &mask["set"]), (&"0xff".into(), &"0x100".into()));
    let mask = find("wrmsr", 0xc000_0100);
    assert_eq!(
        (&mask["may_change"], &mask["otherwise"]),
        (&"0xf".into(), &"drop".into())
    );
    assert_eq!(find("rdmsr", 0xc000_0101)["initial"], "0x5");
    assert_eq!(find("wrmsr", 0xc000_0101)["action"], "shadow");
    assert_eq!(find("rdmsr", 0xc000_0082)["action"], "host");
    assert_eq!(find("wrmsr", 0xc000_0082)["action"], "once");
    assert_eq!(find("rdmsr", 0xc000_0081)["action"], "zero");
    assert_eq!(find("wrmsr", 0xc000_0081)["values"], serde_json::json!(["0x1", "0x2"]));
    assert_eq!(find("wrmsr", 0xc000_0083)["handler"], "cstar");
    let deny = find("rdmsr", 0x277);
    assert_eq!((&deny["action"], &deny["rule"]), (&"deny".into(), &6.into()));
    assert_eq!(plan["reasons"], serde_json::json!(["invalid", "unknown", "filter"]));
    assert_eq!(
        plan["unknown"],
        serde_json::json!({
            "read": "zero", "read_arguments": { "value": "0x0" }, "write": "ignore", "write_arguments": {}
        })
    );
    assert_eq!(text(&plan["invalid"], "write"), "deny");
}

#[test]
fn plan_tells_what_is_saved_with_a_guest_and_what_is_left_out() {
    let folder = Folder::furnished();
    folder.write("policies/actions.toml", ACTIONS);
    let names = POLICIES.iter().map(|(name, _)| *name).chain(["actions.toml"]);
    for name in names {
        let path = format!("policies/{name}");
        let state = folder.run(&["plan", "--state", "--json", &path]).code(0).json();
        let plan = folder.run(&["plan", "--json", &path]).code(0).json();
        assert_eq!(state["policy"]["hash"], plan["hash"]);
        for kept in list(&state, "save") {
            word(kept, "state", &["listed", "unlisted", "sregs", "lapic"]);
            let why = kept["written"] == true || kept["read"] == true || kept["passes"].is_string();
            assert!(why, "{kept:#}");
        }
        for left in list(&state, "drop") {
            word(left, "state", &["listed", "unlisted"]);
        }
        for kept in list(&state, "emulated") {
            word(kept, "kind", &["shadow", "once", "handler"]);
            assert_eq!(kept["handler"].is_string(), kept["kind"] == "handler");
        }
    }
    let state = folder
        .run(&["plan", "--state", "--json", "policies/actions.toml"])
        .code(0)
        .json();
    let emulated = |msr: &str| {
        let kept = list(&state, "emulated").iter().find(|kept| kept["first"] == msr);
        kept.map(|kept| text(kept, "kind").to_owned())
    };
    assert_eq!(emulated("0xc0000101").as_deref(), Some("shadow"));
    assert_eq!(emulated("0xc0000082").as_deref(), Some("once"));
    assert_eq!(emulated("0xc0000083").as_deref(), Some("handler"));
    assert_eq!(state["fallback"], false);
    folder
        .run(&["plan", "--state", "policies/actions.toml"])
        .code(0)
        .shows(&[
            "once: whether the one write has been made",
            "handler cstar: the VMM's own",
            "IA32_TSC",
            "KVM_GET_MSRS, unlisted",
            "which the VMM leaves out",
        ]);
    folder
        .run(&["plan", "--state", "policies/ignore-unknown.toml"])
        .code(0)
        .shows(&["no vCPU has emulated state"]);
}

#[test]
fn a_policy_of_pure_allow_and_deny_never_leaves_the_kernel() {
    let folder = Folder::furnished();
    let plan = folder.run(&["plan", "--json", "policies/deny-all.toml"]).code(0).json();
    assert!(list(&plan, "reasons").is_empty());
    assert_eq!(plan["default"], "deny");
    // The kernel refuses a default of deny without a range.
    assert_eq!(list(&plan, "ranges").len(), 1);
    assert_eq!(count(&plan["minimum"], "ranges"), 0);
}

fn explain(folder: &Folder, policy: &str, msr: &str, op: &str) -> Value {
    let explained = folder.run(&["explain", "--json", policy, msr, op]).code(0).json();
    word(&explained, "verdict", &["allow", "deny"]);
    word(&explained, "op", &["rdmsr", "wrmsr"]);
    assert!(explained["exits"].is_boolean());
    word(
        &explained,
        "decided_by",
        &["rule", "valid", "default", "x2apic", "last-msr"],
    );
    explained
}

#[test]
fn explain_goes_from_an_access_to_its_rule_range_and_bit() {
    let folder = Folder::furnished();
    let policy = "policies/linux-microvm.toml";
    let efer = explain(&folder, policy, "IA32_EFER", "read");
    assert_eq!(
        (&efer["msr"], &efer["name"]),
        (&"0xc0000080".into(), &"IA32_EFER".into())
    );
    assert_eq!(
        (&efer["action"], &efer["verdict"], &efer["exits"]),
        (&"allow".into(), &"allow".into(), &false.into())
    );
    assert_eq!(efer["rule"]["file"], "policies/base/x86-64.toml");
    let (_, text_of) = FRAGMENTS.iter().find(|(name, _)| *name == "base/x86-64.toml").unwrap();
    let line = text_of.lines().position(|line| line.contains("\"IA32_EFER\"")).unwrap() as u64;
    assert_eq!(count(&efer["rule"], "line"), line, "the line of its [[rule]]");

    let tsc = explain(&folder, policy, "0x10", "write");
    assert_eq!(
        (&tsc["action"], &tsc["verdict"], &tsc["rule"]),
        (&"deny".into(), &"deny".into(), &Value::Null)
    );
    assert_eq!(tsc["sees"], "#GP(0)");
    // Words that recorded guests and manuals use.
    assert_eq!(explain(&folder, policy, "0x10", "wrmsr"), tsc);

    let x2apic = explain(&folder, policy, "0x830", "write");
    assert_eq!(
        (&x2apic["action"], &x2apic["verdict"], &x2apic["range"]),
        (&"deny".into(), &"allow".into(), &Value::Null)
    );

    let fixed = explain(&folder, "policies/fixed-microcode.toml", "0x8b", "read");
    assert_eq!(
        (&fixed["sees"], &fixed["exits"]),
        (&"0x100000000000000".into(), &true.into())
    );
    assert!(text(&fixed["rule"], "why").contains("revision"));
}

#[test]
fn what_decides_is_named_whether_a_rule_the_default_the_cpuid_or_the_kernel() {
    let folder = Folder::new();
    folder.write(
        "valid.toml",
        "version = 1\ndefault = \"allow\"\nvalid = \"cpu-model\"\nunknown = \"ignore\"\n\
         [[rule]]\nmsr = [0x830, 0x8b, 0xffffffff]\nread = \"zero\"\n",
    );
    // Intel's, without MTRRs, with an APIC.
    folder.write(
        "guest.txt",
        "0x0 0x0: eax=0x1 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n0x1 0x0: eax=0x000306c3 ebx=0x0 ecx=0x0 edx=0x210\n",
    );
    let explain = |msr: &str| {
        let explain = ["explain", "--json", "--cpuid", "guest.txt", "valid.toml", msr, "read"];
        folder.run(&explain).code(0).json()
    };
    for (msr, decided_by, unknown) in [
        ("0x8b", "rule", Value::Null),
        ("0x10", "default", "zero".into()),
        ("0xdead", "default", "zero".into()),
        ("MTRRcap", "valid", Value::Null),
        ("HWCR", "valid", Value::Null),
        ("0x830", "x2apic", Value::Null),
        ("0xffffffff", "last-msr", "zero".into()),
    ] {
        let explained = explain(msr);
        assert_eq!(
            (&explained["decided_by"], &explained["unknown"]),
            (&decided_by.into(), &unknown),
            "{msr}"
        );
        assert_eq!(explained["lacks"].is_null(), decided_by != "valid", "{msr}");
    }
    assert_eq!(
        explain("MTRRcap")["lacks"],
        serde_json::json!({
            "features": [{ "name": "mtrr", "places": [
                { "leaf": "0x1", "subleaf": "0x0", "register": "EDX", "bit": 12, "width": 1, "at_least": 1 },
            ] }],
            "vendors": [],
        })
    );
    let hwcr = explain("HWCR");
    assert_eq!(hwcr["lacks"], serde_json::json!({ "features": [], "vendors": ["amd"] }));
    assert_eq!((&hwcr["rule"], &hwcr["action"]), (&Value::Null, &"deny".into()));

    let with = |command: &str, rest: &[&str]| {
        let first = [command, "--cpuid", "guest.txt", "valid.toml"];
        folder.run(&[&first[..], rest].concat()).code(0)
    };
    with("explain", &["MTRRcap"])
        .shows(&["rule     none; `valid` decides: the guest's CPUID lacks `mtrr` (CPUID.0x1:EDX[12])"]);
    with("explain", &["HWCR"])
        .shows(&["rule     none; `valid` decides: the guest's CPUID.0x0 names another vendor than amd"]);
    with("explain", &["0x830"]).shows(&["; not consulted, since the kernel itself decides about the x2APIC"]);
    with("explain", &["0xffffffff"]).shows(&["rule     0, valid.toml:5; not consulted, since no range covers the MSR"]);
    with("plan", &[]).shows(&["valid: no mtrr", "valid: not of amd"]);
    let plan = with("plan", &["--json"]).json();
    let of = |msr: &str| {
        let mut actions = list(&plan, "actions").iter();
        actions.find(|action| action["first"] == msr).unwrap()["decided_by"].clone()
    };
    assert_eq!((of("0xc0010015"), of("0x8b")), ("valid".into(), "rule".into()));
    let mut lacking = list(&plan, "valid").iter();
    let hwcr = lacking.find(|lacking| lacking["name"] == "HWCR").unwrap();
    assert_eq!(
        (&hwcr["msr"], &hwcr["lacks"]["vendors"]),
        (&"0xc0010015".into(), &serde_json::json!(["amd"]))
    );

    folder.write(
        "t.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0xc0010015\",\"value\":\"0x0\"}\n",
    );
    let report = |option: &str| {
        let report = ["report", option, "--cpuid", "guest.txt", "-p", "valid.toml", "t.jsonl"];
        folder.run(&report).code(0)
    };
    let report_json = report("--json").json();
    assert_eq!(list(&report_json, "by_msr")[0]["policy"]["decided_by"], "valid");
}

#[test]
fn explain_shows_the_range_and_the_bit_that_the_plan_has() {
    let folder = Folder::furnished();
    let policy = "policies/linux-pc.toml";
    let plan = folder.run(&["plan", "--json", policy]).code(0).json();
    for msr in [
        "0x1b",
        "0x8b",
        "0x277",
        "0x6e0",
        "0x4b564d01",
        "0xc0000080",
        "0xc0010010",
    ] {
        for op in ["read", "write"] {
            let explained = explain(&folder, policy, msr, op);
            if explained["range"].is_null() {
                continue;
            }
            let range = &list(&plan, "ranges")[count(&explained["range"], "slot") as usize];
            let bit = count(&explained["range"], "bit");
            assert_eq!(hex(range, "base") + bit, hex(&explained, "msr"));
            let place = bit as usize / 8 * 2;
            let byte = u8::from_str_radix(&text(range, "bitmap")[place..place + 2], 16).unwrap();
            let allowed = byte >> (bit % 8) & 1 == 1;
            assert_eq!(allowed, explained["verdict"] == "allow", "{msr} {op}");
        }
    }
}

#[test]
fn explain_without_a_direction_gives_both() {
    let folder = Folder::furnished();
    let policy = "policies/qemu.toml";
    let both = folder.run(&["explain", "--json", policy, "0x35"]).code(0).json();
    assert_eq!(both["read"], explain(&folder, policy, "0x35", "read"));
    assert_eq!(both["write"], explain(&folder, policy, "0x35", "write"));
    folder
        .run(&["explain", policy, "0x35"])
        .code(0)
        .shows(&["rdmsr 0x35", "wrmsr 0x35", "rule", "sees", "cost"]);
}

fn replay(folder: &Folder, policy: &str, trace: &str) -> Ran {
    folder.run(&["replay", "--json", "--backend", "engine", "-p", policy, trace])
}

#[test]
fn replay_says_what_each_register_got() {
    let folder = Folder::furnished();
    let report = replay(&folder, "policies/linux-microvm.toml", "traces/linux-6.1-microvm.jsonl")
        .code(0)
        .json();
    assert_eq!(report["backend"], "engine");
    assert_eq!((count(&report, "accesses"), count(&report, "changed")), (564, 0));
    let rows = list(&report, "by_msr");
    for row in rows {
        word(row, "op", &["rdmsr", "wrmsr"]);
        assert!(count(row, "count") > 0);
        assert!(row["name"].is_null() || !text(row, "name").is_empty());
        assert!(!text(row, "sees").is_empty() && !text(row, "recorded").is_empty());
        assert_eq!(row["sees"], row["recorded"], "the engine answers as the trace says");
    }
    assert_eq!(rows.iter().map(|row| count(row, "count")).sum::<u64>(), 564);
    let order: Vec<(u64, &str)> = rows.iter().map(|row| (hex(row, "msr"), text(row, "op"))).collect();
    assert!(order.is_sorted(), "by MSR, reads first");
}

#[test]
fn msr_is_a_list_of_what_is_known() {
    let folder = Folder::new();
    let all = folder.run(&["msr", "--json"]).code(0).json();
    let all = all.as_array().expect("an array");
    assert!(all.len() >= 300, "{}", all.len());
    for entry in all {
        for need in list(entry, "needs") {
            word(need, "system", &["Linux", "Windows", "FreeBSD", "macOS"]);
            word(need, "op", &["rdmsr", "wrmsr"]);
        }
        assert!(!text(entry, "name").is_empty() && !text(entry, "source").is_empty());
        for key in ["aliases", "classes", "vendors"] {
            assert!(list(entry, key).iter().all(Value::is_string));
        }
        let x2apic = (0x800..=0x8ff).contains(&hex(entry, "msr"));
        assert!(!(x2apic && entry["filterable"] == true), "{entry:#}");
        assert!(entry["filterable"] == true || entry["passes"].is_string(), "{entry:#}");
        assert!(entry["secret"] == false || entry["host"].is_string(), "{entry:#}");
    }
    for (what, name) in [
        ("0x8b", "IA32_BIOS_SIGN_ID"),
        ("139", "IA32_BIOS_SIGN_ID"),
        ("IA32_BIOS_SIGN_ID", "IA32_BIOS_SIGN_ID"),
        ("MSR_IA32_UCODE_REV", "IA32_BIOS_SIGN_ID"),
        ("@kvm", "MSR_KVM_STEAL_TIME"),
        ("IA32_MTRR_PHYSBASE*", "IA32_MTRR_PHYSBASE0"),
        ("physbase0", "IA32_MTRR_PHYSBASE0"),
        ("c0000080", "IA32_EFER"),
        ("0x8b..=0x8c", "IA32_SGXLEPUBKEYHASH0"),
        ("intel microcode", "IA32_BIOS_UPDT_TRIG"),
    ] {
        let found = folder.run(&["msr", "--json", what]).code(0).json();
        let names: Vec<&str> = found
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| text(entry, "name"))
            .collect();
        assert!(names.contains(&name), "{what}: {names:?}");
    }
    let none = folder.run(&["msr", "--json", "0xdeadbeef"]).code(1);
    assert_eq!(none.json(), serde_json::json!([]));
}

#[test]
fn schema_is_a_json_schema_that_knows_the_languages_keys() {
    let schema = Folder::new().run(&["schema"]).code(0).json();
    assert!(text(&schema, "$schema").contains("json-schema.org"));
    for key in [
        "version", "name", "default", "unknown", "invalid", "valid", "extends", "rule",
    ] {
        assert!(schema["properties"][key].is_object(), "{key}");
    }
}
