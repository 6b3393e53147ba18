//! What `plan` gives is what the policy says, by a reading of its own; and the source that it prints builds.

mod allows;
mod command;
mod filter;

use std::path::Path;
use std::process::Command;

use allows::Allows;
use command::{Folder, POLICIES, Ran, count, find, list, text};
use filter::{Filter, Op, boundaries};

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

/// Prints what the emitted function puts into a `struct kvm_msr_filter`, as JSON has it.
const MAIN: &str = r#"
#include <stdio.h>
int main(void)
{
	static struct kvm_msr_filter filter;
	unsigned i, byte;

	POLICY_filter(&filter);
	printf("%u %llu\n", filter.flags, (unsigned long long)REASONS);
	for (i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
		struct kvm_msr_filter_range *range = &filter.ranges[i];
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
fn the_c_that_plan_prints_builds_without_a_warning_and_fills_in_the_plans_filter() {
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
        let function = header.split("static inline void ").nth(1).expect("a function");
        let name = function.split("_filter(").next().expect("its name");
        let main = MAIN
            .replace("POLICY", name)
            .replace("REASONS", &format!("{}_REASONS", name.to_uppercase()));
        folder.write("main.c", format!("#include \"filter.h\"\n{main}"));
        let flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", "main", "main.c"];
        Ran::of(Command::new(&cc).args(flags).current_dir(folder.path())).code(0);
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
#[path = "emitted/filter.rs"]
#[allow(missing_docs, unreachable_pub, reason = "made by the command")]
mod emitted;

const EMITTED: &str = include_str!("emitted/policy.toml");

#[test]
fn the_rust_that_plan_prints_builds_against_kvm_ioctls_and_is_the_plans_filter() {
    let folder = Folder::new();
    folder.write("policy.toml", EMITTED);
    let printed = folder.run(&["plan", "--emit", "rust", "policy.toml"]).code(0).out;
    // The file is checked in so that this test's own build compiles it.
    let kept = include_str!("emitted/filter.rs");
    assert_eq!(
        printed, kept,
        "cargo run -- plan --emit rust crates/cli/tests/emitted/policy.toml makes it anew"
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
    let ran = folder.run(&["plan", "policies/sandbox.toml"]).code(0);
    ran.shows(&[
        "none: no access leaves the kernel",
        "the kernel refuses to deny all without one",
        "note N001",
    ]);
}
