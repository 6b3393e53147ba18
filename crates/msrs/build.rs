//! Makes the table of MSRs from `msrs.toml`.
//!
//! A row has no pointers: its texts are places in one string, so that a position-independent program has nothing to
//! relocate. A word of the data file is a variant of the enum of its key, in lower case; rustc refuses one that is none.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    source: BTreeMap<String, String>,
    bypass: Vec<Bypass>,
    // By index, which all keys write with the same width.
    msr: BTreeMap<String, Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    #[serde(default)]
    also: Vec<String>,
    class: Vec<String>,
    vendor: Vec<String>,
    when: Option<When>,
    access: Option<String>,
    state: Option<String>,
    host: Option<String>,
    kept: Option<String>,
    #[serde(default)]
    passthrough: String,
    #[serde(default)]
    hot: bool,
    #[serde(default)]
    hardware: bool,
    #[serde(default)]
    essential: bool,
    #[serde(default)]
    changed_in_place: bool,
    #[serde(default)]
    command: String,
    #[serde(default)]
    rewrite: String,
    source: String,
    #[serde(default)]
    needs: Vec<Need>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bypass {
    kind: String,
    passes: String,
    #[serde(default)]
    of: Vec<String>,
    says: String,
    from: Option<String>,
    to: Option<String>,
    guest: Option<String>,
    source: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum When {
    One(String),
    Any(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Need {
    by: String,
    access: String,
    why: String,
    source: String,
}

/// The variant that a word names: `ReadOnly` for `read-only`.
fn variant(word: &str) -> String {
    let capital =
        |part: &str| part.get(..1).unwrap_or_default().to_ascii_uppercase() + part.get(1..).unwrap_or_default();
    word.split('-').map(capital).collect()
}

/// A slice of the variants that words name.
fn slice(kind: &str, words: &[String]) -> String {
    let variants = words.iter().map(|word| format!("{kind}::{}", variant(word)));
    format!("&[{}]", variants.collect::<Vec<_>>().join(", "))
}

/// `Some(Linux(5, 18))` for `5.18`.
fn linux(version: &Option<String>) -> Result<String, Box<dyn Error>> {
    let Some(version) = version else {
        return Ok("None".to_owned());
    };
    let (major, minor) = version
        .split_once('.')
        .ok_or_else(|| format!("{version} is no version"))?;
    Ok(format!(
        "Some(Linux({}, {}))",
        major.parse::<u32>()?,
        minor.parse::<u32>()?
    ))
}

/// The place of a text in the string of all texts, which gets it.
fn place(texts: &mut String, text: &str) -> (usize, usize) {
    let from = texts.find(text).unwrap_or_else(|| {
        texts.push_str(text);
        texts.len() - text.len()
    });
    (from, text.len())
}

/// The number of an item in a list, which gets it if it is new.
fn number(items: &mut Vec<String>, item: String) -> usize {
    items.iter().position(|known| *known == item).unwrap_or_else(|| {
        items.push(item);
        items.len() - 1
    })
}

fn table(text: &str) -> Result<String, Box<dyn Error>> {
    let data: Data = toml::from_str(text)?;
    let in_order = text.lines().filter(|line| line.starts_with("0x"));
    if !in_order.map(|line| line.split(' ').next()).is_sorted() {
        return Err("a row is out of order".into());
    }
    let (mut texts, mut rows, mut needs) = (String::new(), String::new(), String::new());
    let (mut classes, mut vendors, mut exists) = (Vec::new(), Vec::new(), Vec::new());
    let mut names = BTreeMap::new();
    for (position, (index, row)) in data.msr.iter().enumerate() {
        let failed = |what: &str| format!("{index} ({}): {what}", row.name);
        if index.len() != 10 {
            return Err(failed("the index is not written with eight digits").into());
        }
        let mut own = row.name.clone();
        row.also.iter().for_each(|name| own.extend([" ", name]));
        // Names are unique, so that this finds no other place.
        let own = place(&mut texts, &own);
        let mut from = own.0;
        for name in [&row.name].into_iter().chain(&row.also) {
            let key = name.to_ascii_uppercase();
            let key = key.strip_prefix("MSR_").unwrap_or(&key).to_owned();
            if names.insert(key, (from, name.len(), position)).is_some() {
                return Err(failed(&format!("the name {name} is taken")).into());
            }
            from += name.len() + 1;
        }
        let when = match &row.when {
            None => "Exists::Model".to_owned(),
            Some(When::One(word)) if word == "always" => "Exists::Always".to_owned(),
            Some(When::One(feature)) => format!("Exists::Feature({feature:?})"),
            Some(When::Any(features)) => format!("Exists::AnyFeature(&{features:?})"),
        };
        let source = data.source.keys().position(|key| *key == row.source);
        let source = source.ok_or_else(|| failed(&format!("the source {} is not known", row.source)))?;
        if row.passthrough.contains(|letter| letter != 'r' && letter != 'w') {
            return Err(failed("passthrough is made of r and w").into());
        }
        let word = |word: &Option<String>, otherwise: &str| variant(word.as_deref().unwrap_or(otherwise));
        writeln!(
            rows,
            "Entry {{ msr: Msr({index}), access: Access::{}, state: State::{}, host: Host::{}, kept: Kept::{}, \
             passthrough: {:?}, hot: {}, hardware: {}, essential: {}, changed_in_place: {}, names: {own:?}, \
             command: {:?}, rewrite: {:?}, classes: {}, vendors: {}, exists: {}, source: {source} }},",
            word(&row.access, "read-write"),
            word(&row.state, "nothing"),
            word(&row.host, "nothing"),
            word(&row.kept, "not"),
            ['r', 'w'].map(|letter| row.passthrough.contains(letter)),
            row.hot,
            row.hardware,
            row.essential,
            row.changed_in_place,
            place(&mut texts, &row.command),
            place(&mut texts, &row.rewrite),
            number(&mut classes, slice("Class", &row.class)),
            number(&mut vendors, slice("Vendor", &row.vendor)),
            number(&mut exists, when),
        )?;
        for need in &row.needs {
            writeln!(
                needs,
                "Need {{ msr: Msr({index}), op: Op::{}, system: System::{}, why: {:?}, source: {:?} }},",
                variant(&need.access),
                variant(&need.by),
                need.why,
                need.source
            )?;
        }
    }
    let mut bypasses = String::new();
    for bypass in &data.bypass {
        write!(
            bypasses,
            "Bypass {{ kind: BypassKind::{}, passes: Passes::{}, of: &{:?}, says: {:?}, from: {}, to: {}, guest: {:?}, source: {:?} }},",
            variant(&bypass.kind),
            variant(&bypass.passes),
            bypass.of,
            bypass.says,
            linux(&bypass.from)?,
            linux(&bypass.to)?,
            bypass.guest,
            bypass.source
        )?;
    }
    let sources: Vec<&String> = data.source.values().collect();
    let names: Vec<_> = names.values().collect();
    Ok(format!(
        "static TEXTS: &str = {texts:?};\n\
         static SOURCES: &[&str] = &{sources:?};\n\
         static CLASSES: &[&[Class]] = &[{}];\n\
         static VENDORS: &[&[Vendor]] = &[{}];\n\
         static EXISTS: &[Exists] = &[{}];\n\
         static BY_NAME: &[(u32, u8, u16)] = &{names:?};\n\
         static NEEDS: &[Need] = &[{needs}];\n\
         static BYPASSES: &[Bypass] = &[{bypasses}];\n\
         static TABLE: &[Entry] = &[{rows}];\n",
        classes.join(", "),
        vendors.join(", "),
        exists.join(", "),
    ))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=msrs.toml");
    let table = table(&fs::read_to_string("msrs.toml")?).map_err(|error| format!("msrs.toml: {error}"))?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("table.rs"), table)?;
    Ok(())
}
