//! `check` in a pipeline: its formats, its silence, and what it changes by itself; and what a finding's code means.

use std::fs;

use serde_json::{Value, json};
use serde_sarif::sarif::Sarif;

use crate::command::{Folder, POLICIES, list, text};

/// A misspelt name, key and class, half a range, and a log that logs nothing.
const BAD: &str = r#"version = 1
default = "allow"

[[rule]]
msr   = "IA32_EFRE"   # a name
raed  = "deny"
why   = "x, y: 100%"
accept = { W008 = "no guest runs" }

[[rule]]
msr = ['@raplu', "0x1230..0x1240"]
read = "zero"
write = "ignore"

# Kept.
[[rule]]
msr = "IA32_SYSENTER_CS"
read = "allow"
log = "all"
"#;

fn folder() -> Folder {
    let folder = Folder::new();
    folder.write("a policy.toml", BAD);
    folder
}

#[test]
fn sarif_is_what_its_schema_says_and_has_each_finding_with_its_place() {
    let folder = folder();
    folder.write(
        "idle.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"deny\"\naccept = { W007 = \"why\" }\n\
         [[rule]]\nmsr = \"IA32_EFER\"\nread = \"allow\"\n",
    );
    let args = ["check", "--format", "sarif", "a policy.toml", "idle.toml"];
    let said = folder.run(&args).code(2).json();
    let typed: Sarif = serde_json::from_value(said.clone()).expect("SARIF 2.1.0");
    // A key that the schema does not have would be lost on the way.
    assert_eq!(serde_json::to_value(&typed).expect("JSON"), said);
    let run = &said["runs"][0];
    let rules: Vec<&str> = list(&run["tool"]["driver"], "rules")
        .iter()
        .map(|rule| text(rule, "id"))
        .collect();
    let results = list(run, "results");
    for result in results {
        let index = result["ruleIndex"].as_u64().expect("an index");
        assert_eq!(rules[usize::try_from(index).expect("an index")], text(result, "ruleId"));
    }
    let of = |code: &str| {
        results
            .iter()
            .find(|result| text(result, "ruleId") == code)
            .expect(code)
    };
    let name = &of("E005")["locations"][0]["physicalLocation"];
    assert_eq!(name["artifactLocation"]["uri"], "a%20policy.toml");
    assert_eq!(
        name["region"],
        json!({ "startLine": 5, "startColumn": 9, "endLine": 5, "endColumn": 20 })
    );
    assert!(text(&of("E005")["message"], "text").contains("did you mean `IA32_EFER`?"));
    // What the policy accepts is there, and suppressed.
    let accepted = results.iter().find(|result| result["suppressions"].is_array());
    assert_eq!(
        accepted.expect("an accepted warning")["suppressions"],
        json!([{ "kind": "inSource", "justification": "why" }])
    );
    let file = folder.path().join("a policy.toml").display().to_string();
    let absolute = folder.run(&["check", "--format", "sarif", &file]).code(2).json();
    let uri = &absolute["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
    assert!(uri.as_str().is_some_and(|uri| uri.starts_with("file:///")), "{uri}");
}

#[test]
fn github_marks_each_line_and_ends_no_command_early() {
    let ran = folder().run(&["check", "--format", "github", "a policy.toml"]).code(2);
    assert!(ran.err.is_empty(), "{}", ran.err);
    let lines: Vec<&str> = ran.out.lines().collect();
    assert!(lines.iter().all(|line| line.starts_with("::error ")), "{}", ran.out);
    let name = lines.iter().find(|line| line.contains("E005")).expect("a line");
    assert!(
        name.starts_with(
            "::error file=a policy.toml,line=5,col=9,endLine=5,endColumn=20,title=E005%3A no MSR has this name::no MSR is named"
        ),
        "{name}"
    );
    assert!(name.contains("%0Ahelp: did you mean"), "{name}");
}

#[test]
fn each_format_of_a_policy_that_is_right_ends_with_0() {
    let folder = Folder::furnished();
    for (name, _) in POLICIES {
        let path = format!("policies/{name}");
        let quiet = folder.run(&["check", "-q", &path]).code(0);
        assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("", ""), "{name}");
        let github = folder.run(&["check", "--format", "github", &path]).code(0);
        assert!(
            github.out.lines().all(|line| line.starts_with("::notice ")),
            "{}",
            github.out
        );
        let sarif = folder.run(&["check", "--format", "sarif", &path]).code(0).json();
        serde_json::from_value::<Sarif>(sarif).expect("SARIF 2.1.0");
        let json = folder.run(&["check", "--format", "json", &path]).code(0).json();
        assert_eq!(json, folder.run(&["check", "--json", &path]).code(0).json());
    }
}

#[test]
fn what_help_says_is_written_and_the_result_passes() {
    let folder = folder();
    let ran = folder.run(&["check", "--fix", "a policy.toml"]).code(0);
    ran.says(&[
        "a policy.toml:5: E005: `\"IA32_EFRE\"` becomes `\"IA32_EFER\"`",
        "E003: `raed` becomes `read`",
        "E006: `'@raplu'` becomes `'@rapl'`",
        "E009: `\"0x1230..0x1240\"` becomes `\"0x1230..=0x1240\"`",
        "W003: `log = \"all\"` is left out",
        "W007: the rule is left out",
        "6 changes written",
    ]);
    let fixed = fs::read_to_string(folder.path().join("a policy.toml")).expect("a policy");
    let expected = BAD
        .replace("EFRE", "EFER")
        .replace("raed", "read")
        .replace("raplu", "rapl")
        .replace("0x1230..0x1240", "0x1230..=0x1240");
    let (kept, _) = expected
        .split_once("[[rule]]\nmsr = \"IA32_SYSENTER_CS\"")
        .expect("the last rule");
    assert_eq!(fixed, kept);
    let again = folder.run(&["check", "--fix", "a policy.toml"]).code(0);
    again.says(&["nothing to change by itself"]);
    let left: Vec<_> = fs::read_dir(folder.path()).expect("a folder").collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn what_a_policy_means_is_not_changed_and_what_cannot_be_changed_is_left() {
    let folder = Folder::new();
    // Earlier rules decide all of the last one and say otherwise: its author has to say which is meant.
    let policy = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = \"0x1230..=0x123f\"\nread = \"zero\"\n\n\
                  [[rule]]\nmsr = 0x1234\nread = \"deny\"\n\n[[rule]]\nmsr = 0x1235\nread = \"zero\"\n";
    folder.write("p.toml", policy);
    let hash = |name: &str| folder.run(&["check", "--json", name]).json()["policy"]["hash"].clone();
    let before = hash("p.toml");
    let ran = folder.run(&["check", "--fix", "p.toml"]).code(1);
    ran.says(&["the rule is left out", "1 change written", "warning[W001]"]);
    assert_eq!(hash("p.toml"), before);
    let fixed = fs::read_to_string(folder.path().join("p.toml")).expect("a policy");
    assert!(fixed.contains("0x1234") && !fixed.contains("0x1235"), "{fixed}");
    // A rule that counts for some guests alone stays: what it means for others no check of one says.
    let asks = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x1234\nread = \"zero\"\nwhen = { vendor = \"intel\" }\n\n\
                [[rule]]\nmsr = 0x1235\nread = \"allow\"\n";
    folder.write("asks.toml", asks);
    folder.write(
        "cpuid",
        "   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n",
    );
    folder.run(&["check", "--fix", "--cpuid", "cpuid", "asks.toml"]);
    assert_eq!(
        fs::read_to_string(folder.path().join("asks.toml")).expect("a policy"),
        asks
    );
    folder
        .run(&["check", "--fix", "msrgate:qemu"])
        .code(2)
        .says(&["no file that can be changed"]);
    folder
        .run(&["check", "--fix", "-"])
        .code(2)
        .says(&["no file that can be changed"]);
}

#[test]
fn each_codes_text_is_that_of_the_document() {
    let folder = Folder::new();
    let document = include_str!("../../../../docs/findings.md");
    let headings = document
        .lines()
        .filter_map(|line| line.strip_prefix("## ")?.split_once(": "));
    let mut count = 0;
    for (code, title) in headings {
        let said: Value = folder.run(&["explain", "--json", code]).code(0).json();
        assert_eq!((text(&said, "code"), text(&said, "title")), (code, title));
        assert!(
            document.contains(text(&said, "text")) && text(&said, "text").len() > 80,
            "{code}"
        );
        count += 1;
    }
    assert!(count > 50, "{count}");
    let shown = folder.run(&["explain", "w009"]).code(0);
    shown.shows(&["W009: a guest reads what tells of the host", "\n    version = 1\n"]);
    folder
        .run(&["explain", "W999"])
        .code(2)
        .says(&["no finding has the code `W999`"]);
    // What is no code is a policy's file.
    folder
        .run(&["explain", "p.toml"])
        .code(2)
        .says(&["cannot read `p.toml`"]);
}
