use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use msrgate_core::{Log, Msr, OnLockedBits, ReadAction, Verdict, WriteAction};
use msrgate_msrs::cpuid::CpuVendor;

use super::*;

/// Files of a directory that is not there.
struct Folder(HashMap<PathBuf, String>);

impl Folder {
    fn of(files: &[(&str, &str)]) -> Folder {
        Folder(
            files
                .iter()
                .map(|(path, text)| (path.into(), (*text).to_owned()))
                .collect(),
        )
    }
}

impl Files for Folder {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        let mut canonical = PathBuf::new();
        for part in path.components() {
            match part {
                std::path::Component::ParentDir => drop(canonical.pop()),
                std::path::Component::CurDir => {}
                part => canonical.push(part),
            }
        }
        let text = self.0.get(&canonical).cloned().ok_or("no such file")?;
        Ok((canonical, text))
    }
}

fn policy(rest: &str) -> Policy {
    let text = format!("version = 1\ndefault = \"deny\"\n{rest}");
    Policy::parse("p.toml", &text).unwrap_or_else(|rejected| panic!("{:#?}", rejected.diagnostics))
}

fn rule(rest: &str) -> Rule {
    policy(&format!("[[rule]]\n{rest}")).rules.remove(0)
}

/// Code and line of each finding.
fn found(text: &str) -> Vec<(&'static str, usize)> {
    let rejected = Policy::parse("p.toml", text).expect_err("the policy is fine");
    let line = |found: &Diagnostic| {
        found.place.as_ref().map_or(0, |place| {
            rejected.sources[place.source].line_column(place.span.start).0
        })
    };
    rejected
        .diagnostics
        .iter()
        .map(|found| (found.code.code(), line(found)))
        .collect()
}

fn wrong(rest: &str) -> Vec<&'static str> {
    let text = format!("version = 1\ndefault = \"deny\"\n{rest}");
    let rejected = Policy::parse("p.toml", &text).expect_err(rest);
    for diagnostic in &rejected.diagnostics {
        let no_stop = !diagnostic.message.ends_with('.');
        assert!(no_stop, "{}", diagnostic.message);
    }
    rejected.diagnostics.iter().map(|found| found.code.code()).collect()
}

#[test]
fn every_read_action_is_read() {
    let read = |text: &str| rule(&format!("msr = 0x10\nread = {text}")).read.unwrap();
    assert_eq!(read("\"allow\""), ReadAction::Allow);
    assert_eq!(read("\"deny\""), ReadAction::Deny);
    assert_eq!(read("\"zero\""), ReadAction::Value(0));
    assert_eq!(read("\"host\""), ReadAction::Host);
    assert_eq!(read("{ value = \"0x0100000000000000\" }"), ReadAction::Value(1 << 56));
    assert_eq!(read("{ value = 0xffff_ffff_ffff_ffff }"), ReadAction::Value(u64::MAX));
    assert_eq!(read("{ shadow = 5 }"), ReadAction::Shadow(5));
    assert_eq!(
        read("{ mask = { keep = 0xff, set = 0x100 } }"),
        ReadAction::Mask { keep: 0xff, set: 0x100 }
    );
    assert_eq!(
        read("{ mask = { set = 1 } }"),
        ReadAction::Mask { keep: u64::MAX, set: 1 }
    );
    assert_eq!(
        read("{ handler = \"topology\" }"),
        ReadAction::Handler("topology".into())
    );
}

#[test]
fn what_may_stand_is_read_with_its_reason() {
    let accepted = |accept: &[Acceptance]| -> Vec<(&'static str, String)> {
        accept.iter().map(|one| (one.code.code(), one.reason.clone())).collect()
    };
    let policy = policy(
        "accept = { W001 = \"a\", W007 = \"b\" }\n[[rule]]\nmsr = 1\nread = \"zero\"\naccept = { W004 = \"c\" }",
    );
    assert_eq!(
        accepted(&policy.accept),
        [("W001", "a".to_owned()), ("W007", "b".to_owned())]
    );
    assert_eq!(accepted(&policy.rules[0].accept), [("W004", "c".to_owned())]);
    let fragment =
        "version = 1\naccept = { W001 = \"a\" }\n[[rule]]\nmsr = 1\nread = \"zero\"\naccept = { W004 = \"c\" }";
    let files = Folder::of(&[
        ("p.toml", "version = 1\ndefault = \"deny\"\nextends = \"f.toml\""),
        ("f.toml", fragment),
    ]);
    let extending = Policy::load(Path::new("p.toml"), &files).unwrap();
    assert_eq!((extending.accept.len(), extending.rules[0].accept.len()), (0, 1));
}

#[test]
fn what_cannot_be_accepted_is_refused() {
    assert_eq!(wrong("accept = \"W001\""), ["E004"]);
    assert_eq!(wrong("accept = { W001 = 1 }"), ["E004"]);
    assert_eq!(wrong("accept = { W001 = \" \" }"), ["E011"]);
    for code in ["E005", "N001", "W999", "w001"] {
        assert_eq!(
            wrong(&format!("accept = {{ {code} = \"because\" }}")),
            ["E003"],
            "{code}"
        );
    }
}

#[test]
fn every_write_action_is_read() {
    let write = |text: &str| rule(&format!("msr = 0x10\nwrite = {text}")).write.unwrap();
    assert_eq!(write("\"allow\""), WriteAction::Allow);
    assert_eq!(write("\"deny\""), WriteAction::Deny);
    assert_eq!(write("\"ignore\""), WriteAction::Ignore);
    assert_eq!(write("\"shadow\""), WriteAction::Shadow);
    let mask = |otherwise| WriteAction::Mask {
        may_change: 0xf,
        otherwise,
    };
    assert_eq!(write("{ mask = { may_change = 0xf } }"), mask(OnLockedBits::Deny));
    assert_eq!(
        write("{ mask = { may_change = 0xf, otherwise = \"drop\" } }"),
        mask(OnLockedBits::Drop)
    );
    assert_eq!(write("{ only = [0, \"0x2\"] }"), WriteAction::Only(Arc::new([0, 2])));
    assert_eq!(write("{ once = true }"), WriteAction::Once);
    assert_eq!(write("{ handler = \"power\" }"), WriteAction::Handler("power".into()));
}

#[test]
fn a_rule_names_msrs_and_says_when_and_why() {
    let rule = rule(
        "msr = [\"IA32_TSC\", 0x20, \"0x30..=0x3f\", \"@mtrr\", \"IA32_MC*_CTL\"]\nread = \"deny\"\n\
         when = { vendor = \"intel\", family = 6, model = [\"0x55..=0x6a\", 0x8f], features = [\"mtrr\"] }\n\
         log = { per_second = 5 }\nwhy = \"because\"",
    );
    assert_eq!(rule.msrs.len(), 5);
    assert_eq!(rule.when.vendor, [CpuVendor::Intel]);
    assert_eq!(
        (&rule.when.family[..], &rule.when.model[..]),
        (&[(6, 6)][..], &[(0x55, 0x6a), (0x8f, 0x8f)][..])
    );
    assert_eq!((rule.log, rule.why.as_deref()), (Log::PerSecond(5), Some("because")));
    assert_eq!(rule.write, None);
}

#[test]
fn unknown_and_invalid_are_a_word_or_two_actions() {
    let policy = policy("unknown = \"ignore\"\ninvalid = { read = { value = 1 } }");
    assert_eq!(policy.unknown, (ReadAction::Value(0), WriteAction::Ignore));
    assert_eq!(policy.invalid, (ReadAction::Value(1), WriteAction::Deny));
    assert_eq!(wrong("unknown = \"allow\""), ["E010"]);
    assert_eq!(wrong("unknown = { read = \"allow\" }"), ["E017"]);
    assert_eq!(wrong("invalid = { write = { once = true } }"), ["E017"]);
}

#[test]
fn all_mistakes_are_reported_at_once_with_their_lines() {
    let text = r#"version = 1
default = "deny"
colour = "red"

[[rule]]
msr = ["IA32_TSCC", "@mtr", "NOSUCH*", "0x20..=0x10", "0x100000000"]
read = "alow"
write = { value = 1 }

[[rule]]
msr = 0x10
read = { value = "0x10000000000000000" }
wirte = "deny"

[[rule]]
msr = [0x20, "0x20"]
read = "zero"

[[rule]]
msr = 0x30
"#;
    assert_eq!(
        found(text),
        [
            ("E003", 3),
            ("E005", 6),
            ("E006", 6),
            ("E007", 6),
            ("E009", 6),
            ("E008", 6),
            ("E010", 7),
            ("E010", 8),
            ("E008", 12),
            ("E003", 13),
            ("E012", 16),
            ("E015", 19),
        ]
    );
}

#[test]
fn a_syntax_error_does_not_hide_the_mistakes_around_it() {
    let text = "version = 1\ndefault = \"deny\"\ncolour = \"red\"\nname = = \"x\"\n\n[[rule]]\nmsr = \"IA32_TSCC\"\nread = \"deny\"\n";
    let codes = found(text);
    assert!(codes.contains(&("E001", 4)), "{codes:?}");
    assert!(
        codes.contains(&("E003", 3)) && codes.contains(&("E005", 7)),
        "{codes:?}"
    );
}

#[test]
fn a_key_said_twice_is_a_duplicate() {
    assert_eq!(
        found("version = 1\ndefault = \"deny\"\ndefault = \"allow\"\n"),
        [("E012", 3)]
    );
    let rule = "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = 1\n";
    assert_eq!(
        found(&format!("{rule}read = \"zero\"\nread = \"deny\"\n")),
        [("E012", 6)]
    );
    assert_eq!(
        found(&format!("{rule}read = {{ mask = {{ keep = 1, keep = 2 }} }}\n")),
        [("E012", 5)]
    );
    // A value that would be a key elsewhere, and a key without a value.
    assert_eq!(found(&format!("{rule}read = msr\n")), [("E001", 5)]);
    assert_eq!(found(&format!("{rule}read = \"zero\"\nmsr\n")), [("E001", 6)]);
}

#[test]
fn a_second_rule_for_the_same_msrs_never_counts_and_is_refused() {
    let again = "[[rule]]\nmsr = 0x8b\nread = \"deny\"\n[[rule]]\nmsr = \"IA32_BIOS_SIGN_ID\"\nread = \"zero\"\n";
    assert_eq!(wrong(again), ["E012"]);
    policy("[[rule]]\nmsr = 0x8b\nread = \"deny\"\n[[rule]]\nmsr = 0x8b\nwrite = \"deny\"\n");
    policy("[[rule]]\nmsr = 0x8b\nread = \"deny\"\n[[rule]]\nmsr = 0x8b\nread = \"zero\"\nwrite = \"deny\"\n");
    policy(
        "[[rule]]\nmsr = 0x8b\nread = \"deny\"\nwhen = { vendor = \"amd\" }\n[[rule]]\nmsr = 0x8b\nread = \"zero\"\n",
    );
}

#[test]
fn version_and_default_are_asked_for() {
    assert_eq!(found(""), [("E002", 1), ("E011", 1)]);
    assert_eq!(found("version = 2\ndefault = \"deny\""), [("E002", 1)]);
    assert_eq!(found("version = 1\ndefault = \"maybe\""), [("E010", 2)]);
}

#[test]
fn mistaken_values_say_what_is_wanted() {
    for (rest, code) in [
        ("name = 5", "E004"),
        ("rule = 5", "E004"),
        ("[rule]\nmsr = 1", "E004"),
        ("valid = \"cpu\"", "E010"),
        ("extends = [5]", "E004"),
        ("[[rule]]\nmsr = 1.5\nread = \"deny\"", "E004"),
        ("[[rule]]\nmsr = []\nread = \"deny\"", "E011"),
        ("[[rule]]\nread = \"deny\"", "E011"),
        ("[[rule]]\nmsr = 1\nread = 5", "E004"),
        ("[[rule]]\nmsr = 1\nread = { value = \"x\" }", "E008"),
        ("[[rule]]\nmsr = 1\nread = { value = -1 }", "E008"),
        ("[[rule]]\nmsr = 1\nread = { value = 1, shadow = 1 }", "E010"),
        ("[[rule]]\nmsr = 1\nread = {}", "E010"),
        ("[[rule]]\nmsr = 1\nread = { mask = {} }", "E011"),
        ("[[rule]]\nmsr = 1\nread = { handler = \"a b\" }", "E004"),
        ("[[rule]]\nmsr = 1\nwrite = { mask = { otherwise = \"drop\" } }", "E011"),
        ("[[rule]]\nmsr = 1\nwrite = { only = [] }", "E011"),
        ("[[rule]]\nmsr = 1\nwrite = { once = false }", "E004"),
        ("[[rule]]\nmsr = 1\nread = \"deny\"\nlog = \"some\"", "E010"),
        ("[[rule]]\nmsr = 1\nread = \"deny\"\nlog = { per_second = 0 }", "E008"),
        ("[[rule]]\nmsr = 1\nread = \"deny\"\nwhen = {}", "E011"),
        (
            "[[rule]]\nmsr = 1\nread = \"deny\"\nwhen = { vendor = \"cyrix\" }",
            "E016",
        ),
        (
            "[[rule]]\nmsr = 1\nread = \"deny\"\nwhen = { features = [\"mtr\"] }",
            "E016",
        ),
        (
            "[[rule]]\nmsr = 1\nread = \"deny\"\nwhen = { model = \"9..=8\" }",
            "E009",
        ),
        ("[[rule]]\nmsr = \"1..2\"\nread = \"deny\"", "E009"),
    ] {
        assert_eq!(wrong(rest), [code], "{rest}");
    }
}

#[test]
fn extended_rules_stand_behind_and_the_own_settings_go_first() {
    let folder = Folder::of(&[
        (
            "dir/p.toml",
            "version = 1\nextends = [\"base/a.toml\", \"b.toml\"]\n[[rule]]\nmsr = 1\nread = \"zero\"",
        ),
        (
            "dir/base/a.toml",
            "version = 1\nextends = \"../c.toml\"\n[[rule]]\nmsr = 2\nread = \"zero\"",
        ),
        (
            "dir/b.toml",
            "version = 1\ndefault = \"allow\"\nspill = \"refuse\"\nextends = \"c.toml\"\n[[rule]]\nmsr = 3\nread = \"zero\"",
        ),
        (
            "dir/c.toml",
            "version = 1\nunknown = \"ignore\"\nspill = \"user-space\"\n[[rule]]\nmsr = 4\nread = \"zero\"",
        ),
    ]);
    let policy = Policy::load(Path::new("dir/p.toml"), &folder).unwrap_or_else(|r| panic!("{:#?}", r.diagnostics));
    let msrs: Vec<Msr> = policy.rules.iter().map(|rule| rule.ranges()[0].first()).collect();
    assert_eq!(msrs, [1, 2, 4, 3].map(Msr));
    assert_eq!((policy.default, policy.name.as_str()), (Verdict::Allow, "p"));
    assert_eq!(policy.unknown, (ReadAction::Value(0), WriteAction::Ignore));
    assert_eq!(policy.spill, Spill::UserSpace);
    assert_eq!(policy.sources.len(), 4);
}

#[test]
fn a_rule_that_the_policy_replaces_is_gone_and_what_is_printed_reads_back() {
    let folder = Folder::of(&[
        (
            "p.toml",
            "version = 1\ndefault = \"deny\"\nextends = \"base.toml\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"zero\"",
        ),
        (
            "base.toml",
            "version = 1\n[[rule]]\nmsr = 0x10\nread = \"allow\"\n[[rule]]\nmsr = 0x10\nwrite = \"allow\"\n\
             [[rule]]\nmsr = 0x11\nread = \"allow\"",
        ),
    ]);
    let policy = Policy::load(Path::new("p.toml"), &folder).unwrap_or_else(|r| panic!("{:#?}", r.diagnostics));
    assert_eq!(policy.rules.len(), 3);
    let again = Policy::parse("p.toml", &policy.to_string()).unwrap_or_else(|r| panic!("{:#?}", r.diagnostics));
    assert_eq!(again, policy);
}

#[test]
fn circles_and_missing_files_are_told_where_they_are_asked_for() {
    let folder = Folder::of(&[
        (
            "p.toml",
            "version = 1\ndefault = \"deny\"\nextends = [\"q.toml\", \"none.toml\"]",
        ),
        ("q.toml", "version = 1\n\nextends = \"p.toml\""),
    ]);
    let rejected = Policy::load(Path::new("p.toml"), &folder).unwrap_err();
    let codes: Vec<_> = rejected
        .diagnostics
        .iter()
        .map(|found| (found.code, found.place.as_ref().unwrap().source))
        .collect();
    assert_eq!(codes, [(Code::Unreadable, 0), (Code::Cycle, 1)]);
    let own = Folder::of(&[("p.toml", "version = 1\ndefault = \"deny\"\nextends = \"./p.toml\"")]);
    assert_eq!(
        Policy::load(Path::new("p.toml"), &own).unwrap_err().diagnostics[0].code,
        Code::Cycle
    );
    let none = Policy::load(Path::new("x.toml"), &own).unwrap_err();
    assert_eq!(
        (none.diagnostics[0].code, none.diagnostics[0].place.clone()),
        (Code::Unreadable, None)
    );
}

#[test]
fn a_printed_policy_reads_back_as_itself() {
    let policy = policy(
        "name = \"all of it\"\nvalid = \"cpu-model\"\nunknown = \"ignore\"\ninvalid = { read = { shadow = 3 }, write = \"shadow\" }\n\
         [[rule]]\nmsr = [\"IA32_TSC\", \"@pmu\", \"IA32_MC*\", \"5..=9\"]\nread = { mask = { keep = 1, set = 2 } }\n\
         write = { mask = { may_change = 3, otherwise = \"drop\" } }\nlog = \"first\"\nwhy = \"say \\\"why\\\"\\n\"\n\
         [[rule]]\nmsr = 1\nread = { handler = \"h\" }\nwrite = { only = [1, \"0xffffffffffffffff\"] }\nlog = { per_second = 2 }\n\
         when = { vendor = [\"amd\", \"hygon\"], family = \"0x17..=0x19\", features = [\"mtrr\"] }\n\
         [[rule]]\nmsr = 2\nread = { shadow = 7 }\nwrite = \"shadow\"\n[[rule]]\nmsr = 3\nread = \"host\"\nwrite = { once = true }\nlog = \"all\"\n",
    );
    let text = policy.to_string();
    let again = Policy::parse("p.toml", &text).unwrap_or_else(|r| panic!("{text}\n{:#?}", r.diagnostics));
    assert_eq!(policy, again, "{text}");
}

#[test]
fn no_text_makes_the_parser_panic() {
    // Every prefix of a policy that uses the whole language, and the same with a character put in.
    let text = "version = 1\ndefault = \"deny\"\nunknown = { read = \"zero\", write = \"ignore\" }\n[[rule]]\n\
                msr = [\"IA32_TSC\", \"0x5..=0x9\", 7]\nread = { mask = { keep = 0x1, set = \"é\" } }\nwrite = { only = [1] }\nlog = \"all\"\n";
    for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
        for extra in ["", "\"", "[", "{", "=", "\0", "é", "\n"] {
            drop(Policy::parse(
                "p.toml",
                &format!("{}{extra}{}", &text[..end], &text[end..]),
            ));
            drop(Policy::parse("p.toml", &format!("{}{extra}", &text[..end])));
        }
    }
}
