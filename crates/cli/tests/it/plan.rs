//! What `plan` gives is what the policy says, by a reading of its own; and the source that it prints builds.

use std::path::Path;
use std::process::Command;

use msrgate_plan::Plan;
use msrgate_policy::Policy;

use crate::allows::Allows;
use crate::command::{self, Folder, POLICIES, Ran, count, find, list, text};
use crate::filter::{Filter, Op, boundaries};

#[test]
fn each_plan_denies_exactly_what_its_policy_does_not_allow() {
    let folder = Folder::furnished();
    let mut asked = 0;
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let plan = folder.run(&["plan", "--json", &path]).code(0).json();
        let filter = Filter::parse(&plan);
        let policy = Allows::load(&folder.path().join(&path));
        // Wherever the policy may change its mind, and all that a range covers.
        let covered = filter
            .ranges
            .iter()
            .flat_map(|range| range.base..range.base + range.nmsrs);
        for msr in policy.edges().chain(covered).chain(boundaries(&filter)) {
            // What the kernel never filters, and what no range can cover.
            if (0x800..=0x8ff).contains(&msr) || msr == u32::MAX {
                continue;
            }
            for op in [Op::Read, Op::Write] {
                assert_eq!(
                    filter.allows(msr, op),
                    policy.allows(msr, op),
                    "{name}: {op:?} {msr:#x}"
                );
                asked += 1;
            }
        }
    }
    assert!(asked > 100_000, "{asked}");
}

#[test]
fn each_access_that_a_plan_denies_has_an_action_and_no_other_has() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let plan = folder
            .run(&["plan", "--json", &format!("policies/{name}")])
            .code(0)
            .json();
        let filter = Filter::parse(&plan);
        let actions = list(&plan, "actions");
        for msr in boundaries(&filter) {
            if (0x800..=0x8ff).contains(&msr) || msr == u32::MAX {
                continue;
            }
            for op in [Op::Read, Op::Write] {
                let has = actions.iter().any(|action| {
                    let range = command::hex(action, "first")..=command::hex(action, "last");
                    text(action, "op") == op.name() && range.contains(&msr.into())
                });
                assert_eq!(filter.allows(msr, op), !has, "{name}: {op:?} {msr:#x}");
            }
        }
    }
}

/// Prints the emitted `struct kvm_msr_filter`, as JSON has it.
const MAIN: &str = r#"
#include <stdio.h>
int main(void)
{
	unsigned i, byte;

	printf("%u %llu\n", POLICY_filter.flags, (unsigned long long)REASONS);
	for (i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
		const struct kvm_msr_filter_range *range = &POLICY_filter.ranges[i];
		if (!range->nmsrs)
			break;
		printf("%u %#x %u ", range->flags, range->base, range->nmsrs);
		for (byte = 0; byte < (range->nmsrs + 63) / 64 * 8; byte++)
			printf("%02x", range->bitmap[byte]);
		printf("\n");
	}
	return 0;
}
"#;

#[test]
fn the_c_that_plan_prints_builds_without_a_warning_and_is_the_plans_filter() {
    let Some(cc) = find("cc") else {
        println!("skipped: there is no C compiler");
        return;
    };
    if !Path::new("/usr/include/linux/kvm.h").exists() {
        println!("skipped: there is no <linux/kvm.h>");
        return;
    }
    let folder = Folder::furnished();
    folder.write(
        "odd.toml",
        "version = 1\nname = \"0 */ \\\" odd\"\ndefault = \"allow\"\n[[rule]]\nmsr = 5\nread = \"deny\"\n",
    );
    let mut paths: Vec<String> = POLICIES.iter().map(|(name, _)| format!("policies/{name}")).collect();
    paths.push("odd.toml".to_owned());
    for path in &paths {
        let header = folder.run(&["plan", "--emit", "c", path]).code(0).out;
        folder.write("filter.h", &header);
        let filter = header
            .split("static const struct kvm_msr_filter ")
            .nth(1)
            .expect("a filter");
        let name = filter.split("_filter = {").next().expect("its name");
        let main = MAIN
            .replace("POLICY", name)
            .replace("REASONS", &format!("{}_REASONS", name.to_uppercase()));
        folder.write("main.c", format!("#include \"filter.h\"\n{main}"));
        // The last is what runs.
        let languages = [["-xc++", "-std=c++20"], ["-xc", "-std=gnu11"]];
        for language in languages.iter().skip(usize::from(find("c++").is_none())) {
            let flags = [
                "-Wall",
                "-Wextra",
                "-Wconversion",
                "-pedantic",
                "-Werror",
                "-o",
                "main",
                "main.c",
            ];
            Ran::of(Command::new(&cc).args(language).args(flags).current_dir(folder.path())).code(0);
        }
        let printed = Ran::of(Command::new("./main").current_dir(folder.path())).code(0).out;

        let plan = folder.run(&["plan", "--json", path]).code(0).json();
        let reasons = list(&plan, "reasons").iter().map(|reason| match reason.as_str() {
            Some("invalid") => 1,
            Some("unknown") => 2,
            Some("filter") => 4,
            other => panic!("{other:?}"),
        });
        let reasons: u64 = reasons.sum();
        let mut wanted = format!("{} {reasons}\n", u32::from(plan["default"] == "deny"));
        for range in list(&plan, "ranges") {
            let flags = u32::from(range["read"] == true) | u32::from(range["write"] == true) << 1;
            // C prints a base of zero without its prefix.
            let base = text(range, "base").replace("0x0", "0");
            let base = if base == "0" {
                base
            } else {
                text(range, "base").to_owned()
            };
            wanted += &format!("{flags} {base} {} {}\n", count(range, "nmsrs"), text(range, "bitmap"));
        }
        assert_eq!(printed, wanted, "{path}");
    }
}

#[rustfmt::skip]
#[path = "../emitted/filter.rs"]
#[allow(missing_docs, unreachable_pub, reason = "made by the command")]
mod emitted;

const EMITTED: &str = include_str!("../emitted/policy.toml");

#[test]
fn the_rust_that_plan_prints_builds_against_kvm_ioctls_and_is_the_plans_filter() {
    let folder = Folder::new();
    folder.write("policy.toml", EMITTED);
    let printed = folder.run(&["plan", "--emit", "rust", "policy.toml"]).code(0).out;
    // The file is checked in so that this test's own build compiles it.
    let kept = include_str!("../emitted/filter.rs");
    assert_eq!(
        printed, kept,
        "cargo run -- plan --emit rust crates/cli/tests/emitted/policy.toml makes it anew"
    );

    let policy = Policy::parse("policy.toml", EMITTED).expect("a policy");
    let plan = Plan::compile_for(&policy.decision_map(None).expect("a map"), &policy.options());
    assert_eq!(
        Plan::from_bytes(&emitted::EMITTED_PLAN).expect("a plan"),
        plan.expect("a plan")
    );

    let plan = folder.run(&["plan", "--json", "policy.toml"]).code(0).json();
    assert_eq!(emitted::EMITTED_REASONS, 4);
    assert_eq!(plan["reasons"], serde_json::json!(["filter"]));
    assert!(matches!(
        emitted::EMITTED_DEFAULT,
        kvm_ioctls::MsrFilterDefaultAction::ALLOW
    ));
    assert_eq!(plan["default"], "allow");
    let ranges = emitted::emitted_ranges();
    assert_eq!(ranges.len(), list(&plan, "ranges").len());
    assert!(ranges.len() > 2, "the policy is to show both kinds of ranges");
    for (range, planned) in ranges.iter().zip(list(&plan, "ranges")) {
        assert_eq!(u64::from(range.base), command::hex(planned, "base"));
        assert_eq!(u64::from(range.msr_count), count(planned, "nmsrs"));
        assert_eq!(
            range.flags.contains(kvm_ioctls::MsrFilterRangeFlags::READ),
            planned["read"] == true
        );
        assert_eq!(
            range.flags.contains(kvm_ioctls::MsrFilterRangeFlags::WRITE),
            planned["write"] == true
        );
        let bytes: String = range.bitmap.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bytes, text(planned, "bitmap"));
    }
}

#[test]
fn people_see_ranges_reasons_and_what_user_space_answers() {
    let folder = Folder::furnished();
    let ran = folder.run(&["plan", "policies/fixed-microcode.toml"]).code(0);
    ran.shows(&[
        "fixed-microcode, hash ",
        "default  allow",
        "of 16",
        "no fewer are possible",
        "reasons  filter",
        "value 0x100000000000000",
        "policies/fixed-microcode.toml:16",
        "IA32_BIOS_SIGN_ID",
    ]);
    let ran = folder.run(&["plan", "policies/deny-all.toml"]).code(0);
    ran.shows(&[
        "none: no access leaves the kernel",
        "the kernel refuses to deny all without one",
        "note N001",
    ]);
}

/// What a policy asks of the filter, from a plan's JSON alone: the accesses that `actions` names are denied, all others
/// are allowed.
fn denied(plan: &serde_json::Value, msr: u64, op: &str) -> bool {
    list(plan, "actions").iter().any(|action| {
        let range = command::hex(action, "first")..=command::hex(action, "last");
        text(action, "op") == op && range.contains(&msr)
    })
}

#[test]
fn the_witness_of_a_plan_proves_its_number_of_ranges_without_the_planner() {
    /// `KVM_MSR_FILTER_MAX_BITMAP_SIZE` in bits.
    const LONGEST: u64 = 0x600 * 8;
    let folder = Folder::furnished();
    folder.write(
        "deny.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = [1, \"0x5000..=0x9000\"]\nread = \"allow\"\n",
    );
    let mut proved = 0;
    let paths = POLICIES.iter().map(|(name, _)| format!("policies/{name}"));
    for path in paths.chain(["deny.toml".to_owned()]) {
        let plan = folder.run(&["plan", "--json", &path]).code(0).json();
        let Some(witness) = plan["minimum"]["witness"].as_array() else {
            continue;
        };
        assert_eq!(witness.len() as u64, count(&plan["minimum"], "ranges"), "{path}");
        let allows = plan["default"] == "allow";
        let mut msrs = Vec::new();
        for access in witness {
            let msr = command::hex(access, "msr");
            // The default gives it the wrong verdict, so some range has to serve it.
            assert_eq!(denied(&plan, msr, text(access, "op")), allows, "{path}: {access}");
            msrs.push(msr);
        }
        msrs.sort_unstable();
        for pair in msrs.windows(2) {
            assert!(pair[1] - pair[0] >= LONGEST, "{path}: one range can serve {pair:x?}");
        }
        proved += witness.len();
    }
    assert!(proved > 10, "{proved}");
}

#[test]
fn a_refusal_gives_its_witness_and_a_change_that_fits() {
    let folder = Folder::new();
    let islands: Vec<u64> = (0..18).map(|i| i * 0x10000).collect();
    let msrs: Vec<String> = islands.iter().map(|msr| format!("{msr:#x}")).collect();
    let rules = format!(
        "[[rule]]\nmsr = [{}]\nread = \"zero\"\n\n[[rule]]\nmsr = \"0x200000..=0x200003\"\nread = \"deny\"\n",
        msrs.join(", ")
    );
    let head = "version = 1\ndefault = \"allow\"\n";
    folder.write("wide.toml", format!("{head}{rules}"));
    for command in ["plan", "check"] {
        let ran = folder.run(&[command, "--json", "wide.toml"]).code(1);
        let refused = &ran.json()["refused"];
        assert_eq!((count(refused, "needed"), &refused["exact"]), (19, &true.into()));
        assert_eq!(count(refused, "separate"), 19);
        let witness = list(refused, "witness");
        assert_eq!(witness.len(), 19);
        for (access, msr) in witness.iter().zip(islands.iter().chain([&0x200000])) {
            assert_eq!((command::hex(access, "msr"), text(access, "op")), (*msr, "rdmsr"));
        }
        let ranges = list(refused, "ranges");
        assert_eq!((ranges.len(), count(&ranges[18], "accesses")), (19, 4));
        assert_eq!(
            (&ranges[18]["read"], &ranges[18]["write"]),
            (&true.into(), &false.into())
        );
        assert_eq!(
            (command::hex(&ranges[18], "first"), command::hex(&ranges[18], "last")),
            (0x200000, 0x200003)
        );
        assert_eq!(ranges[18]["rules"], serde_json::json!([1]));
        let change = &refused["change"];
        assert_eq!((count(change, "accesses"), &change["proved"]), (3, &true.into()));
        // With what it says put first, the policy fits.
        let mut parts = String::new();
        for part in list(change, "parts") {
            assert_eq!((text(part, "op"), text(part, "to")), ("rdmsr", "allow"));
            assert_eq!((count(part, "rule"), text(part, "place")), (0, "wide.toml:3"));
            let range = format!("{}..={}", text(part, "first"), text(part, "last"));
            parts += &format!("[[rule]]\nmsr = \"{range}\"\nread = \"allow\"\n");
        }
        folder.write("mended.toml", format!("{head}{parts}{rules}"));
        let plan = folder.run(&["plan", "--json", "mended.toml"]).code(0).json();
        assert_eq!(list(&plan, "ranges").len(), 16);
        assert_eq!(refused["without"], serde_json::json!({ "rules": [0], "accesses": 18 }));
    }
    let ran = folder.run(&["plan", "wide.toml"]).code(1);
    assert_eq!(ran.out, "");
    ran.says(&[
        "error[E020]",
        "the policy needs 19 filter ranges",
        "no range can serve two of these 17: rdmsr 0x0, rdmsr 0x10000",
        "the smallest change that fits changes 3 accesses",
        "against the rule at wide.toml:3",
        "by leaving out the rule at wide.toml:3, which changes 18 accesses",
    ]);
}

/// Sixteen MSRs, each far from the next.
fn far() -> String {
    let msrs: Vec<String> = (1..=16).map(|i| format!("{:#x}", i * 0x10000)).collect();
    format!("[[rule]]\nmsr = [{}]\nread = \"allow\"\n", msrs.join(", "))
}

const PASSED: &str = "[[rule]]\nmsr = \"IA32_PAT\"\nread = \"allow\"\nwrite = \"allow\"\n";

const TRACE: &str = "{\"msrgate_trace\":1}\n\
    {\"op\":\"rdmsr\",\"msr\":\"0x277\",\"value\":\"0x7040600070406\"}\n\
    {\"op\":\"wrmsr\",\"msr\":\"0x277\",\"value\":\"0x7010600070106\"}\n\
    {\"op\":\"rdmsr\",\"msr\":\"0x277\",\"value\":\"0x7010600070106\"}\n\
    {\"op\":\"rdmsr\",\"msr\":\"0x10000\",\"value\":0,\"did\":\"fault\"}\n";

#[test]
fn what_does_not_fit_is_spilled_where_the_policy_asks_for_it() {
    let folder = Folder::new();
    let head = "version = 1\ndefault = \"deny\"\n";
    folder.write("refuse.toml", format!("{head}{}{PASSED}", far()));
    folder.write("spill.toml", format!("{head}spill = \"user-space\"\n{}{PASSED}", far()));
    folder.write("boot.jsonl", TRACE);
    folder.run(&["check", "refuse.toml"]).code(1).says(&["error[E020]"]);

    let plan = folder.run(&["plan", "--json", "spill.toml"]).code(0).json();
    assert_eq!(list(&plan, "ranges").len(), 16);
    let passed = serde_json::json!([
        { "first": "0x277", "last": "0x277", "op": "rdmsr", "exits": null },
        { "first": "0x277", "last": "0x277", "op": "wrmsr", "exits": null },
    ]);
    assert_eq!(plan["spilled"], passed);
    let actions = list(&plan, "actions")
        .iter()
        .filter(|action| action["action"] == "pass");
    assert_eq!(actions.count(), 2);
    assert_eq!(plan["reasons"], serde_json::json!(["filter"]));
    // The filter in Rust would deny what is spilled: its heading names it all. The C passes it on.
    let source = folder.run(&["plan", "--emit", "rust", "spill.toml"]).code(0).out;
    let passed_on = "must pass them on with KVM_GET_MSRS and KVM_SET_MSRS";
    assert!(source.contains(passed_on), "{source}");
    for part in list(&plan, "spilled") {
        let line = format!("//   {} {}\n", text(part, "op"), text(part, "first"));
        assert!(source.contains(&line), "{line} in {source}");
    }
    let source = folder.run(&["plan", "--emit", "c", "spill.toml"]).code(0).out;
    assert_eq!(source.matches("{ 0x277, 0x277, SPILL_PASS, ").count(), 2, "{source}");
    // It is what the policy says, and what was refused: to who reads policies, and to who reads plans.
    folder.write("plan.json", folder.run(&["plan", "--json", "spill.toml"]).code(0).out);
    for other in ["refuse.toml", "plan.json"] {
        folder.run(&["diff", "spill.toml", other]).code(0);
    }

    let profiled = ["plan", "--profile", "boot.jsonl", "--json", "spill.toml"];
    let plan = folder.run(&profiled).code(0).json();
    let exits: Vec<u64> = list(&plan, "spilled").iter().map(|part| count(part, "exits")).collect();
    assert_eq!(exits, [2, 1]);
    let note = "2 accesses that are left to the kernel do not fit into 16 ranges";
    folder
        .run(&["check", "spill.toml"])
        .code(0)
        .shows(&["note N009", note, "a profile would tell"]);
    let ran = folder.run(&["check", "--profile", "boot.jsonl", "spill.toml"]).code(0);
    ran.shows(&[note, "3 exits in the profile"]);
    let ran = folder.run(&["plan", "--profile", "boot.jsonl", "spill.toml"]).code(0);
    ran.shows(&["spilled: left to the kernel", "2 in the profile"]);
    let explained = ["explain", "--profile", "boot.jsonl", "spill.toml", "IA32_PAT", "read"];
    folder.run(&explained).code(0).shows(&[
        "action   allow",
        "which user space passes on",
        "leaves the kernel",
        "profile  2 times, an exit each",
    ]);
    let replayed = [
        "replay",
        "--backend",
        "engine",
        "--json",
        "-p",
        "spill.toml",
        "boot.jsonl",
    ];
    let replayed = folder.run(&replayed).code(0).json();
    assert_eq!((count(&replayed, "changed"), count(&replayed, "accesses")), (0, 4));
}

#[test]
fn what_is_not_faithful_is_not_spilled_but_named() {
    let folder = Folder::new();
    let head = "version = 1\ndefault = \"deny\"\nspill = \"user-space\"\n";
    let rule = "[[rule]]\nmsr = \"IA32_LSTAR\"\nread = \"allow\"\nwrite = \"allow\"\n";
    // The far MSRs have two accesses each of which nothing is known, LSTAR has one.
    let far_both = far() + "write = \"allow\"\n";
    folder.write("lstar.toml", format!("{head}{far_both}{rule}"));
    let ran = folder.run(&["check", "--json", "lstar.toml"]).code(1).json();
    let finding = &list(&ran, "findings")[0];
    assert_eq!(finding["code"], "E023");
    assert!(
        text(finding, "message").contains("wrmsr 0xc0000082 (IA32_LSTAR)"),
        "{finding:#}"
    );
    folder.write("apart.toml", format!("{head}unknown = \"ignore\"\n{}{PASSED}", far()));
    folder
        .run(&["check", "apart.toml"])
        .code(1)
        .says(&["error[E023]", "`unknown` and of `invalid`"]);
    folder.write("no.jsonl", "{\"op\":1}\n");
    folder
        .run(&["plan", "--profile", "no.jsonl", "apart.toml"])
        .code(2)
        .says(&["no.jsonl"]);
    folder
        .run(&["plan", "--profile", "gone.jsonl", "apart.toml"])
        .code(2)
        .says(&["gone.jsonl"]);
}

#[test]
fn a_profile_from_which_accesses_are_missing_is_taken_and_told() {
    let folder = Folder::furnished();
    let event = "{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n";
    folder.write("whole.jsonl", format!("{{\"msrgate_trace\":1}}\n{event}"));
    folder.write("gap.jsonl", format!("{{\"msrgate_trace\":1}}\n{event}{{\"lost\":3}}\n"));
    let policy = "policies/linux-microvm.toml";
    let whole = folder.run(&["plan", "--profile", "whole.jsonl", policy]).code(0);
    let gap = folder.run(&["plan", "--profile", "gap.jsonl", policy]).code(0);
    assert_eq!((whole.out, whole.err.as_str()), (gap.out.clone(), ""));
    gap.says(&["gap.jsonl: 3 accesses are missing from it"]);
}

#[test]
fn the_ranges_that_a_profile_visits_most_stand_first() {
    let folder = Folder::new();
    let rules = "[[rule]]\nmsr = [0x10, 0x10000, 0x277]\nread = \"allow\"\n";
    folder.write("two.toml", format!("version = 1\ndefault = \"deny\"\n{rules}"));
    folder.write("boot.jsonl", TRACE.replace("0x277", "0x10000"));
    let of = |arguments: &[&str]| -> Vec<(u64, serde_json::Value)> {
        let plan = folder.run(arguments).code(0).json();
        let ranges = list(&plan, "ranges").iter();
        ranges
            .map(|range| (command::hex(range, "base"), range["visits"].clone()))
            .collect()
    };
    let plain = of(&["plan", "--json", "two.toml"]);
    assert_eq!(
        plain,
        [(0x10, serde_json::Value::Null), (0x10000, serde_json::Value::Null)]
    );
    let profiled = of(&["plan", "--json", "--profile", "boot.jsonl", "two.toml"]);
    // A write finds its range too, where it holds for both directions.
    let bases: Vec<u64> = profiled.iter().map(|(base, _)| *base).collect();
    assert_eq!(bases, [0x10000, 0x10]);
    assert_eq!(profiled[1].1, 0);
    assert!(profiled[0].1.as_u64().unwrap() >= 3);
    folder
        .run(&["plan", "--profile", "boot.jsonl", "two.toml"])
        .code(0)
        .shows(&["visits"]);
}
