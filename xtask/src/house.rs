//! How the house is built: which crates use which, no circle of modules, few crates of others, what is public, and how large it
//! is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::api;
use crate::modules::{Modules, Name};
use crate::process;
use crate::test::{self, Ending};

/// What each crate may use of the others, each of which stands above it.
const ARROWS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("engine", &["core"]),
    ("plan", &["core"]),
    ("msrs", &["core"]),
    ("policy", &["core", "msrs", "plan"]),
    ("trace", &["core", "msrs", "plan", "policy"]),
    ("kvm", &["core", "plan"]),
    ("msrgate", &["core", "kvm", "msrs", "plan", "policy"]),
    ("capi", &["core", "kvm", "msrs", "plan", "policy"]),
    ("guest", &["core", "kvm", "msrs", "plan"]),
    ("answer", &["core"]),
    ("supervise", &["answer", "core", "kvm", "plan"]),
    ("verify", &["core", "engine", "guest", "kvm", "msrs", "plan"]),
    (
        "cli",
        &[
            "core",
            "engine",
            "guest",
            "kvm",
            "msrs",
            "plan",
            "policy",
            "supervise",
            "trace",
            "verify",
        ],
    ),
];

/// How many crates of others `core`, `plan` and `kvm` may bring along by default.
const MOST_OTHERS: usize = 2;

/// Holds the source against what ARCHITECTURE.md says of it.
pub(crate) fn check() -> Result<Ending, String> {
    let root = crate::root();
    let mut wrong = manifests()?;
    let mut lines = BTreeMap::new();
    for directory in directories(&root.join("crates"))? {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut sum = 0;
        for file in roots(&directory.join("src"))? {
            let modules = Modules::read(&file)?;
            sum += modules.lines();
            for circle in modules.circles() {
                let circle: Vec<String> = circle.into_iter().map(shown).collect();
                wrong.push(format!("{name} has a circle of modules: {}", circle.join(" ")));
            }
            if name == "cli" {
                wrong.extend(subcommands(&modules, &file)?);
            }
        }
        lines.insert(name, sum);
    }
    let others = others()?;
    println!(
        "crates of others that core, plan and kvm bring along: {}",
        others.join(", ")
    );
    if others.len() > MOST_OTHERS {
        wrong.push(format!(
            "core, plan and kvm bring {} crates of others along, more than {MOST_OTHERS}",
            others.len()
        ));
    }
    for (name, lines) in &lines {
        println!("{lines:6} lines of {name}");
    }
    println!("{:6} lines in crates/ without tests", lines.values().sum::<usize>());
    wrong.extend(api::changes()?);
    for line in &wrong {
        println!("{line}");
    }
    Ok(test::one(
        wrong.is_empty(),
        wrong
            .first()
            .cloned()
            .unwrap_or_else(|| "no arrow up, no circle".to_owned()),
    ))
}

fn shown(module: &Name) -> String {
    match module.is_empty() {
        true => "the root".to_owned(),
        false => module.join("::"),
    }
}

fn directories(of: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", of.display());
    let entries = fs::read_dir(of)
        .map_err(failed)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let mut paths: Vec<PathBuf> = entries
        .into_iter()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    paths.sort();
    Ok(paths)
}

/// The files in a crate's source that are the roots of something that is compiled.
fn roots(source: &Path) -> Result<Vec<PathBuf>, String> {
    let mut roots = Vec::new();
    for directory in [vec![source.to_path_buf()], directories(source)?].concat() {
        roots.extend(
            ["lib.rs", "main.rs"]
                .map(|name| directory.join(name))
                .into_iter()
                .filter(|file| file.is_file()),
        );
    }
    Ok(roots)
}

/// Arrows between crates that the table does not have, in what users build, and what a crate needs to be published.
fn manifests() -> Result<Vec<String>, String> {
    let text = process::output(&mut test::cargo(&["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: Value = serde_json::from_str(&text).map_err(|error| format!("cargo metadata: {error}"))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let crates = crate::root().join("crates");
    // The directory's name is shorter than the package's.
    let place = |path: &Value| {
        Path::new(path.as_str()?)
            .strip_prefix(&crates)
            .ok()
            .map(|path| path.display().to_string())
    };
    let mut wrong = Vec::new();
    for package in list(&metadata["packages"]) {
        let Some(name) = place(&package["manifest_path"]) else {
            continue;
        };
        let name = name.trim_end_matches("/Cargo.toml");
        let shown = [
            "description",
            "keywords",
            "categories",
            "license",
            "readme",
            "rust_version",
        ];
        let lacks = |key: &&&str| package[**key].is_null() || package[**key].as_array().is_some_and(Vec::is_empty);
        let lacking = shown.iter().filter(lacks);
        wrong.extend(lacking.map(|key| format!("{name}'s page in the registry would have no {key}")));
        let licences = ["LICENSE-APACHE", "LICENSE-MIT"]
            .into_iter()
            .filter(|file| !crates.join(name).join(file).is_file());
        wrong.extend(licences.map(|file| format!("{name}'s package would have no {file}")));
        let Some(row) = ARROWS.iter().position(|(other, _)| *other == name) else {
            wrong.push(format!("{name} is not in the table of crates"));
            continue;
        };
        let (_, allowed) = ARROWS[row];
        let dependencies = list(&package["dependencies"]);
        let used = dependencies.iter().filter(|dependency| dependency["kind"] != "dev");
        for used in used.filter_map(|dependency| place(&dependency["path"])) {
            if !allowed.contains(&used.as_str()) {
                wrong.push(format!("{name} uses {used}, which the table does not allow"));
            }
            if !ARROWS[..row].iter().any(|(above, _)| *above == used) {
                wrong.push(format!("{name} uses {used}, which is not above it"));
            }
        }
    }
    Ok(wrong)
}

/// Subcommands that name items of another: a subcommand is what the arms of `main.rs` lead to.
fn subcommands(modules: &Modules, main: &Path) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(main).map_err(|error| error.to_string())?;
    let arms = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Command::")?.split_once(" => "));
    let names: BTreeSet<&str> = arms.filter_map(|(_, call)| Some(call.split_once("::")?.0)).collect();
    let mut wrong = Vec::new();
    for (from, to) in modules.edges() {
        let of = |module: &Name| module.first().filter(|first| names.contains(first.as_str())).cloned();
        let Some(own) = of(from) else { continue };
        let foreign = to.into_iter().filter(|to| of(to).is_some_and(|other| other != own));
        wrong.extend(foreign.map(|to| {
            format!(
                "cli: {} names an item of another subcommand's {}",
                shown(from),
                shown(to)
            )
        }));
    }
    match names.len() {
        0..10 => Err("cli: main.rs does not say which subcommands there are".to_owned()),
        _ => Ok(wrong),
    }
}

/// The crates of others that a VMM gets with `core`, `plan` and `kvm`.
fn others() -> Result<Vec<String>, String> {
    const TREE: [&str; 11] = [
        "tree",
        "-p",
        "msrgate-core",
        "-p",
        "msrgate-plan",
        "-p",
        "msrgate-kvm",
        "-e",
        "normal",
        "--prefix=none",
        "--format={p}",
    ];
    let text = process::output(&mut test::cargo(&TREE))?;
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("msrgate-"));
    let names: BTreeSet<String> = lines.map(|line| line.trim_end_matches(" (*)").to_owned()).collect();
    Ok(names.into_iter().collect())
}
