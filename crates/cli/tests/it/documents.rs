//! What the documents show exists, builds and runs.

#[rustfmt::skip]
#[path = "../readme/engine.rs"]
#[allow(missing_docs, unreachable_pub, reason = "as the README shows it")]
mod engine;
#[rustfmt::skip]
#[path = "../readme/kvm.rs"]
#[allow(missing_docs, unreachable_pub, dead_code, reason = "as the README shows it; a live test runs it")]
mod kvm;

use std::fs;
use std::path::{Path, PathBuf};

use msrgate_core::{FaultCause, Msr, MsrBackend};
use msrgate_engine::{Completion, Msrs, Refusal, Written};
use msrgate_plan::Plan;
use msrgate_policy::Policy;

use crate::command::{Folder, count, list, text};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("a README")
}

/// The blocks of a document that are marked as this language.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let mut parts = document.split("```");
    let mut blocks = Vec::new();
    // Text and code take turns.
    while let (Some(_), Some(code)) = (parts.next(), parts.next()) {
        if let Some(code) = code.strip_prefix(language).and_then(|code| code.strip_prefix('\n')) {
            blocks.push(code.to_owned());
        }
    }
    blocks
}

/// All documents of the project.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            // A crate's package holds some of the documents by a link, and not what they link to.
            if path.is_symlink() {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && !name.starts_with("target") {
                folders.push(path);
            } else if name.ends_with(".md") {
                found.push(path);
            }
        }
    }
    found
}

/// The name by which a heading is linked to.
fn anchor(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().trim().to_lowercase().replace(' ', "-")
}

#[test]
fn each_relative_link_leads_to_a_file_and_each_anchor_to_a_heading() {
    let documents = documents();
    assert!(documents.len() >= 8, "{documents:?}");
    let mut links = 0;
    for document in &documents {
        let text = fs::read_to_string(document).expect("UTF-8");
        for rest in text.split("](").skip(1) {
            let target = rest.split(')').next().unwrap_or_default();
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            links += 1;
            let (path, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = match path {
                "" => document.clone(),
                path => document.parent().expect("a folder").join(path),
            };
            assert!(file.exists(), "{}: `{target}` leads nowhere", document.display());
            if !heading.is_empty() {
                let linked = fs::read_to_string(&file).expect("UTF-8");
                let headings = linked.lines().filter(|line| line.starts_with('#'));
                let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#')));
                assert!(
                    anchors.any(|it| it == heading),
                    "{}: `{target}`: no such heading",
                    document.display()
                );
            }
        }
    }
    assert!(links > 20, "{links}");
}

#[test]
fn the_rust_in_the_readme_is_the_rust_that_is_built_here() {
    let kept = [include_str!("../readme/kvm.rs"), include_str!("../readme/engine.rs")];
    assert_eq!(blocks(&readme(), "rust"), kept);
}

/// Knows no MSR.
struct Nothing;

impl Msrs for Nothing {
    fn read(&mut self, _: Msr) -> Result<u64, Refusal> {
        Err(Refusal::Unknown)
    }

    fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> {
        Err(Refusal::Unknown)
    }
}

impl MsrBackend for Nothing {
    fn kernel_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::KernelRefused)
    }

    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::NoHandler)
    }

    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::NoHandler)
    }
}

#[test]
fn the_engine_in_the_readme_answers() {
    let text = "version = 1\ndefault = \"allow\"\n[[rule]]\nmsr = 0x8b\nread = { value = 0x1234 }\n";
    let policy = Policy::parse("policy.toml", text).expect("a policy");
    let plan = Plan::compile(&policy.decision_map(None).expect("no CPUID")).expect("a plan");
    let answered = engine::rdmsr(&plan, 0x8b, &mut Nothing);
    let value = Written::RaxRdx { rax: 0x1234, rdx: 0 };
    assert!(
        matches!(answered, Some(Completion::Done { written, .. }) if written == value),
        "{answered:?}"
    );
    assert!(matches!(
        engine::rdmsr(&plan, 0x8c, &mut Nothing),
        Some(Completion::Fault)
    ));
}

#[test]
fn the_policy_in_the_readme_has_no_findings() {
    let folder = Folder::furnished();
    let policies = blocks(&readme(), "toml");
    assert_eq!(policies.len(), 1);
    // It stands beside those that it may extend.
    folder.write("policies/example.toml", &policies[0]);
    folder.run(&["check", "policies/example.toml"]).code(0).shows(&["ok"]);
}

#[test]
fn the_output_in_the_readme_is_what_the_command_prints() {
    let folder = Folder::furnished();
    let shown = blocks(&readme(), "console").remove(0);
    let command = "$ cargo run --release -- replay -p policies/linux-microvm.toml traces/linux-6.1-microvm.jsonl --all";
    let mut lines = shown.lines();
    assert_eq!(lines.next(), Some(command));
    let arguments: Vec<&str> = command.split(" -- ").nth(1).expect("arguments").split(' ').collect();
    // What a host answers by itself differs; registers, counts and actions do not.
    let words = |line: &str| line.split_whitespace().take(5).map(str::to_owned).collect::<Vec<_>>();
    let printed = folder
        .run(&[&arguments[..], &["--backend", "engine"]].concat())
        .code(0)
        .out;
    let rows: Vec<Vec<String>> = printed.lines().map(words).collect();
    let mut compared = 0;
    for line in lines.filter(|line| line.starts_with("0x") && !line.contains('…')) {
        assert!(rows.contains(&words(line)), "{line}");
        compared += 1;
    }
    assert!(compared > 5, "{compared}");
    for line in ["564 accesses by", "the policy changed nothing for the guest"] {
        assert!(shown.contains(line) && printed.contains(line), "{line}");
    }
    let json = folder
        .run(&[&arguments[..], &["--backend", "engine", "--json"]].concat())
        .code(0)
        .json();
    let deadline = list(&json, "by_msr")
        .iter()
        .find(|row| text(row, "msr") == "0x6e0")
        .expect("a row");
    assert_eq!(count(deadline, "count"), 397);
}

/// The keys that docs/json.md names under a heading: what stands in backticks in the first column of its tables.
fn documented(heading: &str) -> Vec<String> {
    let document = fs::read_to_string(root().join("docs/json.md")).expect("docs/json.md");
    let section = document
        .split(&format!("\n## {heading}\n"))
        .nth(1)
        .unwrap_or_else(|| panic!("no heading {heading}"));
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.filter_map(|line| line.split('|').nth(1));
    cells
        .flat_map(|cell| {
            cell.split('`')
                .skip(1)
                .step_by(2)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// All keys within a value, as paths: `ranges[].base`.
fn paths(value: &serde_json::Value, at: &str, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(object) => {
            for (key, value) in object {
                let path = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                found.push(path.clone());
                paths(value, &path, found);
            }
        }
        serde_json::Value::Array(items) => {
            let path = format!("{at}[]");
            items.iter().for_each(|item| paths(item, &path, found));
        }
        _ => {}
    }
}

#[test]
fn each_key_that_a_command_prints_is_documented() {
    let folder = Folder::furnished();
    folder.write("bad.toml", "version = 1\ndefault = 5\n");
    folder.write(
        "cut.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n{\"lost\":2}\ngarbage\n",
    );
    folder.write(
        "emulated.jsonl",
        "{\"msrgate_trace\":1}\n{\"op\":\"rdmsr\",\"msr\":\"0x10\",\"did\":\"mask\"}\n",
    );
    folder.write("list", "0x10 0x0\n");
    folder.write(
        "filter.json",
        "{\"default\":\"allow\",\"ranges\":[{\"base\":\"0x8b\",\"nmsrs\":1,\"flags\":1,\"bitmap\":\"0000000000000000\"}]}",
    );
    let microvm = "policies/linux-microvm.toml";
    let runs: &[(&str, &[&str])] = &[
        ("check", &["check", "--json", microvm]),
        ("check", &["check", "--json", "bad.toml"]),
        ("check", &["check", "--json", microvm, "policies/qemu.toml"]),
        ("plan", &["plan", "--json", microvm]),
        ("plan", &["plan", "--json", "policies/crosvm-itmt.toml"]),
        ("plan", &["plan", "--json", "policies/qemu-rapl.toml"]),
        (
            "plan --state",
            &["plan", "--state", "--json", "policies/qemu-rapl.toml"],
        ),
        (
            "plan --state",
            &["plan", "--state", "--json", "policies/hvmi-guard.toml"],
        ),
        ("explain", &["explain", "--json", microvm, "IA32_EFER", "read"]),
        ("explain", &["explain", "--json", microvm, "IA32_EFER"]),
        (
            "replay",
            &["replay", "--json", "--backend", "engine", "-p", microvm, "cut.jsonl"],
        ),
        ("report", &["report", "--json", "-p", microvm, "cut.jsonl"]),
        ("report", &["report", "--json", "traces/linux-6.1-pc-smp2.jsonl"]),
        ("diff", &["diff", "--json", microvm, "policies/ignore-unknown.toml"]),
        ("decompile", &["decompile", "--json", "filter.json"]),
        ("import", &["import", "--json", "--from", "msr-safe", "list"]),
        ("msr", &["msr", "--json", "@tsc"]),
        (
            "learn",
            &[
                "learn",
                "--json",
                "--widen",
                "classes",
                "traces/linux-6.1-microvm.jsonl",
            ],
        ),
        ("learn", &["learn", "--json", "emulated.jsonl"]),
    ];
    for &(heading, arguments) in runs {
        let documented = documented(heading);
        let mut found = Vec::new();
        paths(&folder.run(arguments).json(), "", &mut found);
        for path in found {
            let path = path.trim_start_matches("[].").trim_start_matches("policies[].");
            let path = path.trim_start_matches("read.").trim_start_matches("write.");
            let known = documented.iter().any(|key| key == path);
            assert!(
                known,
                "docs/json.md, {heading}: `{path}` is not there; it has {documented:?}"
            );
        }
    }
}

#[test]
fn each_command_and_each_of_its_options_is_documented() {
    let document = fs::read_to_string(root().join("docs/cli.md")).expect("docs/cli.md");
    let folder = Folder::new();
    let commands = folder.subcommands();
    assert!(commands.len() >= 8, "{commands:?}");
    // An option of all commands is described once, before them.
    let (of_all, _) = document.split_once("\n## `").expect("a first command");
    let global = |option: &str| option == "--color" && of_all.contains(option);
    for command in commands {
        let section = document.split("\n## `").find(|section| {
            let name = section.split(['`', ' ']).next();
            name == Some(command.as_str())
        });
        let section = section.unwrap_or_else(|| panic!("docs/cli.md has no heading for {command}"));
        let help = folder.run(&[&command, "--help"]).code(0).out;
        let options = help
            .split_whitespace()
            .filter(|word| word.starts_with("--") && word.len() > 2);
        for option in options.map(|word| word.trim_end_matches([',', '.', ']'])) {
            assert!(
                option == "--help" || global(option) || section.contains(option),
                "docs/cli.md does not name {option} of {command}"
            );
        }
    }
}
