//! crosvm's flag `--userspace-msr`.
//!
//! `index=0x771,type=r,action=pass,from=cpu0,filter=yes`; older versions have the index alone in front
//! (`parse_userspace_msr_options`). `pass` reads and writes the host's register in `/dev/cpu/N/msr`
//! (`MsrPassthroughHandler`), `emu` a copy of it that each vCPU keeps (`MsrEmulateHandler`). With `filter=yes` KVM is told
//! to deny the directions of `type` (`get_override_msr_list`), so that crosvm answers; without, it answers what KVM does not
//! know or refuses.

use std::collections::{BTreeMap, HashSet};

use msrgate_core::{Msr, Op, ReadAction, Verdict, WriteAction};
use msrgate_msrs::number;
use msrgate_msrs::spell;
use msrgate_plan::DecisionMap;

use super::imported::{ForeignError, Format, Imported};
use super::unsayable::{Unsupported, each, unsayable};

const FLAG: &str = "--userspace-msr";

/// A whole command line, or the values of the flags alone.
pub(super) fn import(text: &str) -> Result<Imported, ForeignError> {
    let mut imported = Imported {
        format: Format::Crosvm,
        default: Verdict::Allow,
        msrs: Vec::new(),
        comments: vec!["From crosvm's flags. What they do not name is KVM's own.".to_owned()],
        remarks: Vec::new(),
    };
    let mut seen = HashSet::new();
    let flags = text.contains(FLAG);
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.split(" #").next().unwrap_or_default();
        if text.trim_start().starts_with('#') {
            continue;
        }
        let mut awaited = !flags;
        for word in text.split_whitespace() {
            let word = word.trim_matches(['"', '\'']);
            let value = match word.strip_prefix(FLAG) {
                Some("") => {
                    awaited = true;
                    continue;
                }
                Some(value) => value.strip_prefix('='),
                None if awaited && word != "\\" => Some(word),
                None => None,
            };
            if let Some(value) = value {
                awaited = !flags;
                one(value, &mut seen, &mut imported)
                    .map_err(|message| ForeignError::at(line, format!("`{value}`: {message}")))?;
            }
        }
        if flags && awaited {
            return Err(ForeignError::at(line, format!("`{FLAG}` has no value on its line")));
        }
    }
    if imported.msrs.is_empty() {
        return Err(ForeignError::new(format!(
            "no `{FLAG} index=…,type=…,action=…` is here"
        )));
    }
    Ok(imported)
}

/// The value of one flag.
fn one(value: &str, seen: &mut HashSet<Msr>, to: &mut Imported) -> Result<(), String> {
    let mut keys: BTreeMap<&str, &str> = BTreeMap::new();
    for (at, part) in value.split(',').enumerate() {
        let (key, value) = match part.split_once('=') {
            Some(pair) => pair,
            None if at == 0 => ("index", part),
            None => return Err(format!("`{part}` has no value")),
        };
        let known: &[&str] = match key {
            "index" => &[],
            "type" => &["r", "w", "rw", "wr"],
            "action" => &["pass", "emu"],
            "from" => &["cpu0"],
            "filter" => &["yes", "no"],
            _ => {
                return Err(format!(
                    "there is no `{key}`; there are index, type, action, from and filter"
                ));
            }
        };
        if !known.is_empty() && !known.contains(&value) {
            return Err(format!("`{key}` is {}, not `{value}`", known.join(" or ")));
        }
        if keys.insert(key, value).is_some() {
            return Err(format!("`{key}` stands here twice"));
        }
    }
    let wanted = |key: &str| keys.get(key).copied().ok_or_else(|| format!("`{key}` is missing"));
    let index = wanted("index")?;
    let index = number::parse(index).ok().and_then(|index| u32::try_from(index).ok());
    let msr = Msr(index.ok_or("`index` is not a number of 32 bits")?);
    if !seen.insert(msr) {
        return Err("the index was given before".to_owned());
    }
    let kind = wanted("type")?;
    let (reads, writes) = (kind.contains('r'), kind.contains('w'));
    let name = spell::name(msr);
    let mut remark = |text: &str| to.remarks.push(format!("{name}: {text}"));
    let (read, write) = match wanted("action")? {
        "pass" => {
            if writes {
                remark("crosvm writes the host's register, which no action does; here writes fault");
            }
            (reads.then_some(ReadAction::Host), writes.then_some(WriteAction::Deny))
        }
        _ if reads && writes => {
            remark("crosvm gives the host's value at first; put it in place of 0");
            (Some(ReadAction::Shadow(0)), Some(WriteAction::Shadow))
        }
        _ if reads => {
            remark("crosvm reads the host's value once, and here it is read each time");
            (Some(ReadAction::Host), None)
        }
        _ => (None, Some(WriteAction::Ignore)),
    };
    if keys.get("filter") != Some(&"yes") {
        remark(
            "crosvm answers only what KVM does not know or refuses, since `filter=yes` is not there; here it is \
                always answered so",
        );
    }
    if keys.contains_key("from") && read == Some(ReadAction::Host) {
        remark("crosvm reads CPU 0, and `host` the CPU that runs");
    }
    to.msrs.push((msr, read, write));
    Ok(())
}

/// Reads from the host and writes that go nowhere are what crosvm can do just so; each MSR in one direction.
pub(super) fn export(map: &DecisionMap) -> (String, Vec<Unsupported>) {
    let mut flags: BTreeMap<Msr, &str> = BTreeMap::new();
    let mut unsaid = unsayable(Op::Read, map.reads(), |range, action| match action {
        ReadAction::Allow => Ok(()),
        ReadAction::Host => {
            flags.extend(each(range)?.map(|msr| (msr, "type=r,action=pass")));
            Ok(())
        }
        ReadAction::Deny => Err("crosvm answers what it takes from KVM, and denies nothing"),
        _ => Err("crosvm answers reads with the host's value, and with no other"),
    });
    unsaid.extend(unsayable(Op::Write, map.writes(), |range, action| match action {
        WriteAction::Allow => Ok(()),
        WriteAction::Ignore => match each(range)?.any(|msr| flags.insert(msr, "type=w,action=emu").is_some()) {
            true => Err("crosvm has one action for an MSR, and its reads have another"),
            false => Ok(()),
        },
        WriteAction::Deny => Err("crosvm answers what it takes from KVM, and denies nothing"),
        _ => Err("crosvm drops writes, or passes them to the host's register"),
    }));
    let text = flags
        .iter()
        .map(|(msr, what)| format!("{FLAG} index={msr},{what},filter=yes\n"))
        .collect();
    (text, unsaid)
}
