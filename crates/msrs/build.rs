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

use self::field::Field;

#[allow(dead_code, unreachable_pub, reason = "the table's readers use the rest")]
#[path = "src/field.rs"]
mod field;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    source: BTreeMap<String, String>,
    bypass: Vec<Bypass>,
    refusal: Vec<Refusal>,
    restore: Vec<Restore>,
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
    #[serde(default)]
    fields: String,
    #[serde(default)]
    fields_source: String,
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
#[serde(deny_unknown_fields)]
struct Refusal {
    refuses: String,
    of: Vec<String>,
    #[serde(default)]
    unknown: bool,
    says: String,
    source: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Restore {
    msr: String,
    #[serde(default)]
    offered: String,
    #[serde(default)]
    required: String,
    #[serde(default)]
    claims: String,
    #[serde(default)]
    weak: String,
    #[serde(default)]
    qemu: BTreeMap<String, String>,
    qemu_property: Option<String>,
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

/// The rows of what KVM_SET_MSRS takes, in order of index.
fn restores(data: &Data) -> Result<String, Box<dyn Error>> {
    let mut rows = BTreeMap::new();
    for row in &data.restore {
        let failed = |what: &str| format!("restore of {}: {what}", row.msr);
        let known = data.msr.iter().find(|(_, known)| known.name == row.msr);
        let (index, _) = known.ok_or_else(|| failed("no such MSR"))?;
        let mask = |text: &str| match text {
            "" => Ok(0),
            text => u64::from_str_radix(text.trim_start_matches("0x"), 16),
        };
        let mut qemu = Vec::new();
        for (bit, name) in &row.qemu {
            qemu.push((bit.parse::<u8>()?, name));
        }
        qemu.sort_unstable();
        let text = format!(
            "Restore {{ msr: Msr({index}), offered: {:#x}, required: {:#x}, claims: {:#x}, weak: {:#x}, qemu: &{qemu:?}, \
             qemu_property: {:?}, source: {:?} }},",
            mask(&row.offered)?,
            mask(&row.required)?,
            mask(&row.claims)?,
            mask(&row.weak)?,
            row.qemu_property,
            row.source
        );
        if rows.insert(index, text).is_some() {
            return Err(failed("it is there twice").into());
        }
    }
    Ok(rows.into_values().collect())
}

/// The place of a text in the string of all texts, which gets it.
fn place(texts: &mut String, text: &str) -> (usize, usize) {
    let from = texts.find(text).unwrap_or_else(|| {
        texts.push_str(text);
        texts.len() - text.len()
    });
    (from, text.len())
}

/// Fields as the table has them, of those that a row writes: with what `as`, `controls:`, `0..7` and `=NAME` stand for written
/// out. In order, so that none overlaps another.
fn fields(rows: &BTreeMap<String, Row>, written: &str) -> Result<String, String> {
    if let Some(name) = written.strip_prefix("as ") {
        let of = rows
            .values()
            .find(|row| row.name == name && !row.fields.starts_with("as "));
        let of = of.ok_or_else(|| format!("no row `{name}` has fields of its own"))?;
        return fields(rows, &of.fields);
    }
    let (items, controls) = match written.strip_prefix("controls: ") {
        Some(items) => (items, true),
        None => (written, false),
    };
    let mut list: Vec<(String, String, String)> = Vec::new();
    for item in items.split("; ").filter(|item| !item.is_empty()) {
        let mut words = item.split(' ');
        let (Some(bits), Some(name)) = (words.next(), words.next()) else {
            return Err(format!("the field `{item}` has no name"));
        };
        let words: Vec<&str> = words.collect();
        let words = match words.as_slice() {
            [same] if same.starts_with('=') => {
                let other = list.iter().find(|(_, name, _)| same.strip_prefix('=') == Some(name));
                other
                    .ok_or_else(|| format!("no field before `{item}` is called so"))?
                    .2
                    .clone()
            }
            words => words.join(" "),
        };
        match bits.split_once("..") {
            None => list.push((bits.to_owned(), name.to_owned(), words)),
            Some((first, last)) => {
                let number = |text: &str| text.parse::<u32>().map_err(|error| format!("`{item}`: {error}"));
                for (bit, place) in (number(first)?..=number(last)?).zip(0..) {
                    list.push((bit.to_string(), format!("{name}{place}"), words.clone()));
                }
            }
        }
    }
    if controls {
        let upper: Result<Vec<_>, String> = list
            .iter()
            .map(|(bit, name, _)| {
                let bit: u32 = bit.parse().map_err(|error| format!("the control {name}: {error}"))?;
                Ok(((bit + 32).to_string(), name.clone(), String::new()))
            })
            .collect();
        list.iter_mut().for_each(|(_, name, _)| name.insert_str(0, "must:"));
        list.extend(upper?);
    }
    let mut free = 0;
    let mut text = String::new();
    for (bits, name, words) in list {
        let item = format!("{bits} {name} {words}").trim_end().to_owned();
        let parsed = Field::parse(item.clone().leak()).ok_or_else(|| format!("`{item}` is no field"))?;
        if parsed.first < free || parsed.last < parsed.first || parsed.last > 63 {
            return Err(format!(
                "the field `{item}` overlaps the one before it, or has bits that a register has not"
            ));
        }
        let most = parsed.mask() >> parsed.first;
        let known: Vec<(u64, &str)> = parsed.words().collect();
        if known.len() != words.split_whitespace().count() || known.iter().any(|(value, _)| *value > most) {
            return Err(format!("a word of the field `{item}` is none, or too large for it"));
        }
        free = parsed.last + 1;
        text += if text.is_empty() { "" } else { "; " };
        text += &item;
    }
    Ok(text)
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
             command: {:?}, rewrite: {:?}, fields: {:?}, fields_source: {:?}, classes: {}, vendors: {}, exists: {}, source: {source} }},",
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
            place(
                &mut texts,
                &fields(&data.msr, &row.fields).map_err(|what| failed(&what))?
            ),
            place(&mut texts, &row.fields_source),
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
    let mut refusals = String::new();
    for refusal in &data.refusal {
        let ops = match refusal.refuses.as_str() {
            "any" => "&Op::ALL".to_owned(),
            word => slice("Op", &[word.to_owned()]),
        };
        let Refusal {
            of,
            unknown,
            says,
            source,
            ..
        } = refusal;
        write!(
            refusals,
            "Refusal {{ ops: {ops}, of: &{of:?}, is_unknown: {unknown}, says: {says:?}, source: {source:?} }},"
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
         static REFUSALS: &[Refusal] = &[{refusals}];\n\
         static RESTORES: &[Restore] = &[{}];\n\
         static TABLE: &[Entry] = &[{rows}];\n",
        classes.join(", "),
        vendors.join(", "),
        exists.join(", "),
        restores(&data)?,
    ))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=msrs.toml");
    let table = table(&fs::read_to_string("msrs.toml")?).map_err(|error| format!("msrs.toml: {error}"))?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("table.rs"), table)?;
    Ok(())
}
