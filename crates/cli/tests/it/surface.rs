//! What a guest can reach: `explain POLICY`, `explain POLICY @class`, and what `plan` and `check` say of it first.

use serde_json::Value;

use crate::allows::Allows;
use crate::command::{Folder, POLICIES, count, hex, list, text};
use crate::filter::Op;

fn json(folder: &Folder, arguments: &[&str]) -> Value {
    folder.run(&[&["explain", "--json"], arguments].concat()).code(0).json()
}

#[test]
fn the_surface_has_each_known_msr_once_and_what_the_policy_allows_of_it() {
    let folder = Folder::furnished();
    let known = folder.run(&["msr", "--json"]).code(0).json();
    let known = known.as_array().expect("a list");
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let policy = Allows::load(&folder.path().join(&path));
        let surface = json(&folder, &[&path]);
        for (op, key) in [(Op::Read, "reads"), (Op::Write, "writes")] {
            let allowed = known
                .iter()
                .map(|entry| u32::try_from(hex(entry, "msr")).expect("an index"));
            // No filter stops the x2APIC's registers.
            let allowed = allowed.filter(|msr| (0x800..=0x8ff).contains(msr) || policy.allows(*msr, op));
            assert_eq!(count(&surface[key], "allowed"), allowed.count() as u64, "{name}: {key}");
            let sum = |counts: &Value| {
                ["allowed", "answered", "denied"]
                    .map(|key| count(counts, key))
                    .iter()
                    .sum::<u64>()
            };
            assert_eq!(sum(&surface[key]), known.len() as u64, "{name}: {key}");
            let classes: u64 = list(&surface, "classes").iter().map(|class| sum(&class[key])).sum();
            assert_eq!(classes, known.len() as u64, "{name}: {key}");
            // With the x2APIC's registers, which are counted nowhere else.
            let unnamed = sum(&surface["unnamed"][key]);
            let x2apic = known
                .iter()
                .filter(|entry| (0x800..=0x8ff).contains(&hex(entry, "msr")))
                .count() as u64;
            assert_eq!(unnamed + 256 + known.len() as u64 - x2apic, 1 << 32, "{name}: {key}");
        }
    }
}

#[test]
fn a_class_is_shown_register_by_register_and_the_rest_of_it_is_folded() {
    let folder = Folder::furnished();
    let policy = "policies/linux-microvm.toml";
    let ran = folder.run(&["explain", policy, "@mtrr"]).code(0).shows(&[
        "@mtrr: a guest reaches reads of 34 and writes of 0",
        "IA32_MTRR_PHYSBASE0 … IA32_MTRR_PHYSMASK9 (20)",
        "Linux (rdmsr)",
        "denied: MSR_IDT_MCR0..=MSR_IDT_MCR5",
        "--all shows all",
    ]);
    assert!(!ran.out.contains("IA32_SMRR_PHYSMASK"), "{}", ran.out);
    let all = folder.run(&["explain", policy, "@mtrr", "--all"]).code(0).out;
    assert!(
        all.contains("IA32_SMRR_PHYSMASK") && all.contains("IA32_MTRR_PHYSMASK4"),
        "{all}"
    );
    let class = json(&folder, &[policy, "@mtrr"]);
    for register in list(&class, "registers") {
        let one = json(&folder, &[policy, text(register, "name")]);
        for (op, rule) in [("read", "read_rule"), ("write", "write_rule")] {
            assert!(text(register, op).starts_with(text(&one[op], "action")), "{register:#}");
            assert_eq!(register[rule], one[op]["rule"]["index"], "{register:#}");
        }
    }
    folder
        .run(&["explain", policy, "@mtr"])
        .code(2)
        .says(&["no class `@mtr`", "did you mean `@mtrr`"]);
}

#[test]
fn what_is_needed_and_what_tells_of_the_host_is_named_with_the_classes() {
    let folder = Folder::furnished();
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = [\"IA32_APERF\", \"MSR_PKG_ENERGY_STATUS\"]\nread = \"allow\"\n\
         [[rule]]\nmsr = \"IA32_PPIN\"\nread = \"zero\"\n[[rule]]\nmsr = \"IA32_APIC_BASE\"\nread = \"allow\"\n",
    );
    let surface = json(&folder, &["p.toml"]);
    let class = |name: &str| {
        list(&surface, "classes")
            .iter()
            .find(|class| class["class"] == name)
            .expect("a class")
    };
    assert_eq!(class("pstate")["tells"][0]["name"], "IA32_APERF");
    assert_eq!(class("rapl")["tells"][0]["host"], "activity");
    // What the policy answers itself tells nothing.
    assert_eq!(class("platform")["tells"], Value::Array(Vec::new()));
    assert_eq!(count(&class("platform")["reads"], "answered"), 1);
    assert!(list(class("apic"), "needed_by").contains(&"Linux".into()));
    assert!(
        list(class("apic"), "denied_to").contains(&"Linux".into()),
        "writes are denied"
    );
    let shown = [
        "reads of 63 and writes of 59 of",
        "what it and its other guests do now (IA32_APERF, MSR_PKG_ENERGY_STATUS)",
    ];
    for line in [&["explain", "p.toml"][..], &["plan", "p.toml"]] {
        folder.run(line).code(0).shows(&shown);
    }
    folder
        .run(&["check", "p.toml"])
        .code(1)
        .shows(&shown)
        .says(&["W009", "W017"]);
}

#[test]
fn a_plan_folds_what_no_rule_allows_and_shows_all_that_a_rule_decides() {
    let folder = Folder::furnished();
    let plan = |arguments: &[&str]| folder.run(&[&["plan"], arguments].concat()).code(0).out;
    let microvm = "policies/linux-microvm.toml";
    let (short, long) = (plan(&[microvm]), plan(&[microvm, "--all"]));
    assert!(
        short.contains("and 70 ranges denied by the default; --all shows each"),
        "{short}"
    );
    assert!(short.contains("IA32_BIOS_UPDT_TRIG") && long.contains("IA32_BIOS_UPDT_TRIG"));
    assert_eq!(
        long.lines().filter(|line| line.contains(" deny ")).count(),
        70,
        "{long}"
    );
    assert!(!short.contains(" deny "), "{short}");
    // What a rule denies is what such a policy is about.
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"IA32_TSC_ADJUST\"\nwrite = \"deny\"\n",
    );
    assert!(
        plan(&["p.toml"]).contains("0x3b   0x3b  wrmsr  deny"),
        "{}",
        plan(&["p.toml"])
    );
}

#[test]
fn what_tells_of_the_host_is_listed_with_what_it_tells() {
    let folder = Folder::new();
    let all = folder.run(&["msr", "--leaks", "--json"]).code(0).json();
    let all = all.as_array().expect("a list");
    for name in [
        "IA32_PPIN",
        "MSR_PKG_ENERGY_STATUS",
        "IA32_APERF",
        "IA32_BIOS_SIGN_ID",
        "IA32_THERM_STATUS",
    ] {
        assert!(all.iter().any(|entry| entry["name"] == name), "{name}");
    }
    assert!(all.iter().all(|entry| entry["host"].is_string()));
    assert_eq!(all[0]["host"], "identity");
    let ran = folder.run(&["msr", "--leaks", "@rapl"]).code(0).shows(&[
        "MSR_PKG_ENERGY_STATUS",
        "what it and its other guests do now",
        "Intel SDM",
    ]);
    assert!(!ran.out.contains("IA32_APERF"), "{}", ran.out);
    folder
        .run(&["msr", "--leaks", "IA32_EFER"])
        .code(1)
        .says(&["nothing of `IA32_EFER`"]);
}
