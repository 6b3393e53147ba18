//! The documents that describe the language: each example is run, and each finding is described.
//!
//! A block that begins with ```` ```toml ```` is a policy without findings that compiles. More can be said behind it:
//! `part`, it is rules of a policy; `fragment`, it is for others to extend; `fail=E005`, it is refused for that;
//! `warn=W001` and `note=N001`, it is used and has that finding. A line `# file: NAME` names it, for `extends`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use msrgate_core::Msr;
use msrgate_msrs::BypassKind;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_policy::{Code, Files, Policy, check, notes};

/// One example of a document.
struct Block {
    /// Document and line, for who must mend it.
    place: String,
    /// The document's heading above it.
    heading: String,
    /// What stands behind `toml`.
    tags: Vec<String>,
    name: PathBuf,
    text: String,
}

impl Block {
    fn tag(&self, key: &str) -> Option<&str> {
        let tags = self.tags.iter().map(String::as_str);
        tags.filter_map(|tag| tag.strip_prefix(key)).next()
    }

    /// The code of the finding that it is to have.
    fn finding(&self) -> Option<&str> {
        ["fail=", "warn=", "note="].iter().find_map(|key| self.tag(key))
    }
}

/// The named examples of a document.
struct Examples(HashMap<PathBuf, String>);

impl Files for Examples {
    fn read(&self, path: &Path) -> Result<(PathBuf, String), String> {
        let text = self.0.get(path).cloned().ok_or("no such file")?;
        Ok((path.to_path_buf(), text))
    }
}

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn blocks(document_name: &str) -> Vec<Block> {
    let text = document(document_name);
    let mut blocks = Vec::new();
    let mut heading = String::new();
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            heading = title.to_owned();
        }
        let Some(info) = line.strip_prefix("```") else {
            continue;
        };
        let lines = lines.by_ref().map(|(_, line)| line);
        let body: Vec<&str> = lines.take_while(|line| *line != "```").collect();
        let mut tags = info.split(',').map(str::to_owned);
        assert_eq!(tags.next().as_deref(), Some("toml"), "{document_name}:{number}");
        let tags: Vec<String> = tags.collect();
        let name = body.iter().find_map(|line| line.strip_prefix("# file: "));
        let head = if tags.iter().any(|tag| tag == "part") {
            "version = 1\ndefault = \"allow\"\n"
        } else {
            ""
        };
        blocks.push(Block {
            place: format!("{document_name}:{number}"),
            heading: heading.clone(),
            tags,
            name: name.unwrap_or("example.toml").into(),
            text: format!("{head}{}\n", body.join("\n")),
        });
    }
    blocks
}

/// An Intel processor, for examples that ask.
fn cpuid() -> Cpuid {
    Cpuid::from_entries([
        (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (1, 0, [0x0005_0654, 0, 1 << 5, u32::MAX]),
    ])
}

/// The codes of what is found about an example: errors alone, or warnings and notes.
fn findings(name: &Path, wanted: Option<&str>, files: &Examples) -> Vec<String> {
    let policy = match Policy::load(name, files) {
        Ok(policy) => policy,
        Err(rejected) => {
            return rejected
                .diagnostics
                .iter()
                .map(|found| found.code.to_string())
                .collect();
        }
    };
    let asked = policy.asks_cpuid() && wanted != Some("E018") || matches!(wanted, Some("W011" | "W012" | "N024"));
    let cpuid = Some(cpuid()).filter(|_| asked);
    let map = match policy.decision_map(cpuid.as_ref()) {
        Ok(map) => map,
        Err(found) => return vec![found.diagnostic().code.to_string()],
    };
    // As on a kernel that holds the example's answer.
    let options = match wanted {
        Some("N008") => policy
            .options()
            .with_presets(map.preset(Msr(0x8b)).into_iter().collect()),
        _ => policy.options(),
    };
    let warnings = check(&policy, &map, cpuid.as_ref())
        .into_iter()
        .filter(|found| found.accepted.is_none());
    let warnings = warnings.map(|found| found.code.to_string());
    match Plan::compile_for(&map, &options) {
        Ok(plan) => warnings
            .chain(
                notes(&plan, cpuid.as_ref(), None)
                    .iter()
                    .map(|note| note.code.to_string()),
            )
            .collect(),
        Err(error) => vec![policy.explain_error(&error, None).code.to_string()],
    }
}

fn run(document_name: &str) {
    let blocks = blocks(document_name);
    assert!(blocks.len() > 10, "{document_name}");
    for block in &blocks {
        let named = blocks.iter().filter(|other| other.name != Path::new("example.toml"));
        let named = named.map(|other| (other.name.clone(), other.text.clone()));
        let mut files = Examples(named.collect());
        let mut name = block.name.as_path();
        if block.tag("fragment").is_some() {
            name = Path::new("example.toml");
            let text = format!("version = 1\ndefault = \"deny\"\nextends = {:?}\n", block.name);
            files.0.insert(name.into(), text);
        } else {
            files.0.insert(name.into(), block.text.clone());
        }
        let found = findings(name, block.finding(), &files);
        // Notes say what no filter can do, of which an example may have any.
        let mut serious: Vec<&str> = found
            .iter()
            .map(String::as_str)
            .filter(|code| !code.starts_with('N'))
            .collect();
        // One slip can be two errors of TOML.
        serious.dedup();
        match block.finding() {
            Some(note) if note.starts_with('N') => {
                assert!(found.iter().any(|code| code == note), "{}: {found:?}", block.place)
            }
            Some(code) => assert_eq!(serious, [code], "{}", block.place),
            None => assert!(serious.is_empty(), "{}: {serious:?}", block.place),
        }
    }
}

#[test]
fn the_examples_of_the_language_are_policies() {
    run("policy.md");
}

#[test]
fn the_examples_of_the_findings_have_those_findings() {
    run("findings.md");
    for block in blocks("findings.md") {
        let code = block
            .finding()
            .unwrap_or_else(|| panic!("{}: an example of nothing", block.place));
        assert!(
            block.heading.starts_with(code),
            "{}: {code} under {}",
            block.place,
            block.heading
        );
    }
}

#[test]
fn every_finding_has_its_paragraph_and_its_example() {
    let text = document("findings.md");
    let headings: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    let wanted: Vec<String> = Code::all().map(|code| format!("{code}: {}", code.title())).collect();
    assert_eq!(headings, wanted);
    let blocks = blocks("findings.md");
    for heading in headings {
        let shown = blocks.iter().any(|block| block.heading == heading);
        // A bug of the planner has no example, and one of too many ranges would be too long.
        let none = ["E022", "E024"].iter().any(|code| heading.starts_with(code));
        assert_eq!(shown, !none, "{heading}");
    }
}

#[test]
fn the_language_is_described_whole() {
    let text = document("policy.md");
    let keys = [
        "version", "name", "default", "unknown", "invalid", "valid", "extends", "accept",
    ];
    let rule = [
        "msr", "read", "write", "when", "log", "why", "vendor", "family", "model", "features",
    ];
    for key in keys.iter().chain(&rule) {
        assert!(text.contains(&format!("`{key}`")), "{key}");
    }
}

/// The database's ways past the filter, as the document shows them.
fn bypasses() -> String {
    let mut table = "| what passes | registers | Linux | note | source |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for bypass in msrgate_msrs::bypasses() {
        let of: Vec<String> = bypass.of.iter().map(|of| format!("`{of}`")).collect();
        let of = if of.is_empty() { "any".to_owned() } else { of.join(", ") };
        let guest = bypass.guest.map(|feature| format!("; of a guest that has `{feature}`"));
        let note = match bypass.kind {
            BypassKind::Exempt => "N001",
            BypassKind::Fastpath => "N002",
            BypassKind::Ghcb => "N004",
            BypassKind::Hardware => "N005",
            BypassKind::Instruction => "N006",
            BypassKind::Kernel => "N024",
            BypassKind::Confidential => "N025",
            kind => panic!("{kind:?} has no note"),
        };
        let versions = bypass.versions().unwrap_or_else(|| "all".to_owned());
        let (says, source) = (bypass.says.trim_end_matches([',', ':']), bypass.source);
        let guest = guest.unwrap_or_default();
        table += &format!("| {says}{guest} | {of} | {versions} | {note} | {source} |\n");
    }
    table
}

#[test]
fn the_ways_past_the_filter_are_those_of_the_database() {
    let table = bypasses();
    assert!(
        document("policy.md").contains(&table),
        "docs/policy.md is to have\n{table}"
    );
}

#[test]
fn a_way_past_the_filter_is_to_registers_that_are_known() {
    for bypass in msrgate_msrs::bypasses() {
        for of in bypass.of {
            let known = match of.strip_prefix('@') {
                Some(class) => msrgate_msrs::class(class).is_some(),
                None => msrgate_msrs::glob(of).next().is_some(),
            };
            assert!(known, "{of} of {}", bypass.says);
        }
        let features = bypass.guest.into_iter();
        assert!(
            features.clone().all(msrgate_msrs::cpuid::is_feature),
            "{:?}",
            bypass.guest
        );
        assert!(
            bypass.from.zip(bypass.to).is_none_or(|(from, to)| from <= to),
            "{}",
            bypass.says
        );
    }
}
