//! What the documents show exists, builds and runs.

#[rustfmt::skip]
#[path = "../guides/engine.rs"]
#[allow(missing_docs, unreachable_pub, reason = "as the guide shows it")]
mod engine;
#[rustfmt::skip]
#[path = "../guides/kvm.rs"]
#[allow(missing_docs, unreachable_pub, dead_code, reason = "as the guide shows it; a live test runs it")]
mod kvm;

use std::fs;
use std::path::{Path, PathBuf};

use msrgate_core::{FaultCause, Msr, MsrBackend};
use msrgate_engine::{Completion, Msrs, Refusal, Written};
use msrgate_plan::Plan;
use msrgate_policy::Policy;

use crate::command::{Folder, Terminal, on_terminal, plain};

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
fn the_rust_in_the_guides_is_the_rust_that_is_built_here() {
    for (guide, kept) in [
        ("docs/guides/vmm.md", include_str!("../guides/kvm.rs")),
        ("docs/guides/hypervisor.md", include_str!("../guides/engine.rs")),
    ] {
        let text = fs::read_to_string(root().join(guide)).expect("a guide");
        assert_eq!(blocks(&text, "rust"), [kept], "{guide}");
    }
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
fn the_engine_in_the_guide_answers() {
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
    let command = "$ cargo run --release -- replay -p policies/linux-microvm.toml traces/linux-6.1-microvm.jsonl";
    let mut lines = shown.lines();
    assert_eq!(lines.next(), Some(command));
    let arguments: Vec<&str> = command.split(" -- ").nth(1).expect("arguments").split(' ').collect();
    let arguments = [&arguments[..], &["--backend", "engine"]].concat();
    // What a host answers by itself differs; registers, counts and actions do not.
    let words = |line: &str| line.split_whitespace().take(5).map(str::to_owned).collect::<Vec<_>>();
    let is_row = |line: &&str| line.starts_with("0x");
    let printed = folder.run(&[&arguments[..], &["--all"]].concat()).code(0).out;
    let rows: Vec<Vec<String>> = printed.lines().filter(is_row).map(words).collect();
    let mut compared = 0;
    for line in lines.filter(is_row) {
        assert!(rows.contains(&words(line)) && line.ends_with("host differs"), "{line}");
        compared += 1;
    }
    assert!(compared > 5, "{compared}");
    for line in ["564 accesses by", "the policy changed nothing for the guest"] {
        assert!(shown.contains(line) && printed.contains(line), "{line}");
    }
    // The verdict is first; what nothing changed of is a count, on a terminal, and the engine differs in nothing.
    assert_eq!(shown.lines().nth(1), printed.lines().next());
    let rest = format!(
        "and {} more rows, where nothing changed; --all shows all",
        rows.len() - compared
    );
    assert!(shown.lines().any(|line| line == rest), "{rest}");
    let terminal = plain(&on_terminal(folder.command(&arguments), 200, Terminal::Both));
    let rest = format!("and {} more rows, where nothing changed; --all shows all", rows.len());
    assert!(terminal.lines().any(|line| line == rest), "{rest}:\n{terminal}");
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

#[test]
fn each_command_in_the_readme_and_the_guides_has_the_options_that_it_is_shown_with() {
    let folder = Folder::new();
    let commands = folder.subcommands();
    let mut checked = 0;
    for name in [
        "README.md",
        "docs/tutorial.md",
        "docs/guides/operator.md",
        "docs/guides/vmm.md",
        "docs/guides/hypervisor.md",
        "docs/guides/auditor.md",
    ] {
        let text = fs::read_to_string(root().join(name)).expect("a document");
        let shown = text.split("msrgate ").skip(1).filter_map(|rest| {
            // What is shown as code ends with it; what stands behind ` -- ` is the VMM's.
            let line = rest.replace("\\\n", " ");
            let line = line
                .split(['`', '\n', '#', '>'])
                .next()?
                .split(" -- ")
                .next()?
                .to_owned();
            let command = line.split(' ').next()?.to_owned();
            commands.contains(&command).then_some((command, line))
        });
        for (command, line) in shown {
            let help = folder.run(&[&command, "--help"]).code(0).out;
            for option in line.split(' ').filter(|word| word.starts_with("--")) {
                let option = option
                    .split('=')
                    .next()
                    .unwrap_or_default()
                    .trim_end_matches([':', ',', ';']);
                assert!(help.contains(option), "{name}: {command} has no {option}");
                checked += 1;
            }
        }
    }
    assert!(checked > 15, "{checked}");
}
