//! Plans and raw filters in JSON.

use std::sync::Arc;

use msrgate_core::abi::FILTER_DEFAULT_DENY;
use msrgate_core::{
    ArgumentKey, Arguments, Disposition, Msr, MsrRange, OnLockedBits, Op, Ops, ReadAction, WriteAction,
};
use msrgate_msrs::number;
use msrgate_plan::{By, Decision, DecisionMap, Intervals, Preset};
use serde_json::{Map, Value};

use super::bytes::hex;
use super::error::RawError;
use super::filter::{RawFilter, RawInput, RawRange, kernel_name};

type Object = Map<String, Value>;

/// Reads what `plan --json` prints, or the filter alone.
pub(super) fn read(bytes: &[u8]) -> Result<RawInput, RawError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| RawError::new(format!("this is not JSON: {error}")).at(error.line()))?;
    let object = value
        .as_object()
        .ok_or_else(|| RawError::new("this is not a JSON object"))?;
    // A plan may have keys of a later msrgate; a filter that someone wrote may have misspelt ones.
    let plan = object.contains_key("actions");
    if !plan {
        only(object, &["default", "flags", "ranges"], "")?;
    }
    let given = filter(object)?.given()?;
    if !plan {
        return Ok(given);
    }
    let (map, presets) = map(object)?;
    let filtered = with_passed_denied(&map, object)?.with_presets(&presets);
    let found = filtered.differences(&DecisionMap::of_filter(&given.filter), By::Verdicts);
    // No range covers the last MSR, so what the plan says of it the filter may not.
    let last = MsrRange::single(Msr::MAX);
    let reads = found.reads.iter().map(|(range, ..)| (*range, Op::Read));
    let writes = found.writes.iter().map(|(range, ..)| (*range, Op::Write));
    if let Some((range, op)) = reads.chain(writes).find(|(range, _)| *range != last) {
        return Err(RawError::new(format!(
            "the plan's `ranges` and its `actions` say different things of {op} {range}"
        )));
    }
    Ok(RawInput {
        plan: Some(map),
        presets,
        ..given
    })
}

/// The filter among an object's keys.
pub(super) fn filter(object: &Object) -> Result<RawFilter, RawError> {
    let flags = match (object.get("default"), object.get("flags")) {
        (Some(_), Some(_)) => return Err(RawError::new("give `default` or `flags`, not both")),
        (None, Some(flags)) => flags_of(flags, "flags")?,
        (Some(Value::String(word)), None) if word == "allow" => 0,
        (Some(Value::String(word)), None) if word == "deny" => FILTER_DEFAULT_DENY,
        (Some(_), None) => return Err(RawError::new("`default` is neither \"allow\" nor \"deny\"")),
        (None, None) => return Err(RawError::new("`default` is missing: \"allow\" or \"deny\"")),
    };
    let ranges = match object.get("ranges") {
        Some(ranges) => list(ranges, "ranges")?,
        None => {
            return Err(RawError::new(
                "`ranges` is missing; a filter without ranges has an empty list",
            ));
        }
    };
    let ranges = ranges
        .iter()
        .enumerate()
        .map(|(slot, value)| range(value, &format!("ranges[{slot}]")))
        .collect::<Result<_, _>>()?;
    Ok(RawFilter { flags, ranges })
}

fn range(value: &Value, at: &str) -> Result<RawRange, RawError> {
    let (object, empty) = (object_of(value, at)?, Value::Array(Vec::new()));
    // How often a profile visits it, a plan says too.
    only(
        object,
        &["base", "nmsrs", "flags", "read", "write", "bitmap", "visits"],
        at,
    )?;
    let number = |key| required(object, key, at).and_then(|value| u32_of(value, &format!("{at}.{key}")));
    let flags = match object.get("flags") {
        Some(_) if object.contains_key("read") || object.contains_key("write") => {
            return Err(RawError::new(format!(
                "`{at}`: give `flags`, or `read` and `write`, not both"
            )));
        }
        Some(flags) => flags_of(flags, &format!("{at}.flags"))?,
        None => {
            let set = |key, ops: Ops| match object.get(key) {
                Some(Value::Bool(true)) => Ok(ops.bits()),
                Some(Value::Bool(false)) | None => Ok(0),
                Some(_) => Err(RawError::new(format!("`{at}.{key}` is neither true nor false"))),
            };
            set("read", Ops::READ)? | set("write", Ops::WRITE)?
        }
    };
    let bitmap = match required(object, "bitmap", at)? {
        // What a capture could not read: the kernel could not either, or did not try.
        Value::Null => &empty,
        bitmap => bitmap,
    };
    Ok(RawRange {
        flags,
        nmsrs: number("nmsrs")?,
        base: number("base")?,
        bitmap: bytes_of(bitmap).ok_or_else(|| {
            RawError::new(format!(
                "`{at}.bitmap` is neither a string of pairs of hexadecimal digits, as \"0700000000000000\", nor an array of bytes"
            ))
        })?,
    })
}

/// The map as the filter is to have it: what user space passes on to the kernel the filter denies.
fn with_passed_denied(map: &DecisionMap, object: &Object) -> Result<DecisionMap, RawError> {
    let mut passed: [Vec<(MsrRange, bool)>; 2] = [Vec::new(), Vec::new()];
    for (i, value) in list(required(object, "actions", "")?, "actions")?.iter().enumerate() {
        let at = format!("actions[{i}]");
        let action = object_of(value, &at)?;
        if action.get("action").and_then(Value::as_str) == Some("pass") {
            let write = action.get("op").and_then(Value::as_str) == Some("wrmsr");
            let range = range_of(action, &at)?;
            passed
                .iter_mut()
                .skip(usize::from(write))
                .take(1)
                .for_each(|of| of.push((range, true)));
        }
    }
    let [reads, writes] = passed.map(|of| Intervals::first_match(false, of));
    Ok(map
        .clone()
        .with_reads(map.reads().zip(&reads, |said, passed| match passed {
            true => Decision::of(ReadAction::Deny),
            false => said.clone(),
        }))
        .with_writes(map.writes().zip(&writes, |said, passed| match passed {
            true => Decision::of(WriteAction::Deny),
            false => said.clone(),
        })))
}

fn range_of(action: &Object, at: &str) -> Result<MsrRange, RawError> {
    let msr = |key| {
        required(action, key, at)
            .and_then(|value| u32_of(value, &format!("{at}.{key}")))
            .map(Msr)
    };
    MsrRange::new(msr("first")?, msr("last")?).ok_or_else(|| RawError::new(format!("`{at}` ends before it begins")))
}

/// What a plan says of each access: its actions and presets, and `allow` for the rest; and the presets.
fn map(object: &Object) -> Result<(DecisionMap, Vec<Preset>), RawError> {
    let mut reads: Vec<(MsrRange, Decision<ReadAction>)> = Vec::new();
    let mut writes: Vec<(MsrRange, Decision<WriteAction>)> = Vec::new();
    let mut held = Vec::new();
    if let Some(presets) = object.get("presets") {
        for (i, value) in list(presets, "presets")?.iter().enumerate() {
            let at = format!("presets[{i}]");
            let object = object_of(value, &at)?;
            let msr = Msr(u32_of(required(object, "msr", &at)?, &format!("{at}.msr"))?);
            let value = u64_of(required(object, "value", &at)?, &format!("{at}.value"))?;
            reads.push((MsrRange::single(msr), Decision::of(ReadAction::Value(value))));
            held.push(Preset::new(msr, value));
        }
    }
    for (i, value) in list(required(object, "actions", "")?, "actions")?.iter().enumerate() {
        let at = format!("actions[{i}]");
        let object = object_of(value, &at)?;
        let range = range_of(object, &at)?;
        let rule = match object.get("rule") {
            None | Some(Value::Null) => None,
            Some(rule) => Some(u32_of(rule, &format!("{at}.rule"))?),
        };
        let word = text(required(object, "action", &at)?, &format!("{at}.action"))?;
        match text(required(object, "op", &at)?, &format!("{at}.op"))? {
            "rdmsr" => reads.push((range, decision(read_action(word, object, &at)?, rule))),
            "wrmsr" => writes.push((range, decision(write_action(word, object, &at)?, rule))),
            other => {
                return Err(RawError::new(format!(
                    "`{at}.op` is `{other}`, neither `rdmsr` nor `wrmsr`"
                )));
            }
        }
    }
    disjoint(&reads, Op::Read)?;
    disjoint(&writes, Op::Write)?;
    held.sort_unstable();
    Ok((
        DecisionMap::new(
            Intervals::first_match(Decision::of(ReadAction::Allow), reads),
            Intervals::first_match(Decision::of(WriteAction::Allow), writes),
        )
        .with_unknown(fallback(object, "unknown")?)
        .with_invalid(fallback(object, "invalid")?),
        held,
    ))
}

fn decision<A>(action: A, rule: Option<u32>) -> Decision<A> {
    Decision::of(action).by(rule)
}

fn disjoint<A>(entries: &[(MsrRange, Decision<A>)], op: Op) -> Result<(), RawError> {
    let mut ranges: Vec<MsrRange> = entries.iter().map(|(range, _)| *range).collect();
    ranges.sort_unstable();
    for (range, next) in ranges.iter().zip(ranges.iter().skip(1)) {
        if range.last() >= next.first() {
            return Err(RawError::new(format!(
                "the plan says two things of {op} {}",
                next.first()
            )));
        }
    }
    Ok(())
}

fn fallback(object: &Object, key: &str) -> Result<(ReadAction, WriteAction), RawError> {
    let object = object_of(required(object, key, "")?, key)?;
    let word = |op: &str| text(required(object, op, key)?, &format!("{key}.{op}"));
    // What a word is given stands beside it, as in `actions`.
    let none = Object::new();
    let arguments = |op: &str| match object.get(op) {
        Some(Value::Object(arguments)) => Ok(arguments),
        Some(_) => Err(RawError::new(format!("`{key}.{op}` is not an object"))),
        None => Ok(&none),
    };
    let read = read_action(
        word("read")?,
        arguments("read_arguments")?,
        &format!("{key}.read_arguments"),
    )?;
    let write = write_action(
        word("write")?,
        arguments("write_arguments")?,
        &format!("{key}.write_arguments"),
    )?;
    Ok((read, write))
}

/// What stands beside the word of an action, and where.
struct Beside<'a>(&'a Object, &'a str);

impl Arguments for Beside<'_> {
    type Error = RawError;

    fn number(&mut self, key: ArgumentKey) -> Result<u64, RawError> {
        let Beside(given, at) = self;
        u64_of(required(given, key.name, at)?, &format!("{at}.{}", key.name))
    }

    fn numbers(&mut self, key: ArgumentKey) -> Result<Arc<[u64]>, RawError> {
        let Beside(given, at) = self;
        let at = format!("{at}.{}", key.name);
        let values = list(required(given, key.name, self.1)?, &at)?;
        values.iter().map(|value| u64_of(value, &at)).collect()
    }

    fn name(&mut self, key: ArgumentKey) -> Result<Arc<str>, RawError> {
        let Beside(given, at) = self;
        text(required(given, key.name, at)?, &format!("{at}.{}", key.name)).map(Arc::from)
    }

    fn otherwise(&mut self, key: ArgumentKey) -> Result<OnLockedBits, RawError> {
        let Beside(given, at) = self;
        let word = text(required(given, key.name, at)?, &format!("{at}.{}", key.name))?;
        let found = OnLockedBits::ALL.into_iter().find(|otherwise| otherwise.name() == word);
        found.ok_or_else(|| RawError::new(format!("`{at}.{}` is `{word}`, neither `deny` nor `drop`", key.name)))
    }
}

/// What an event says of this word; what is passed on to the kernel is allowed.
fn did(word: &str) -> Option<Disposition> {
    Disposition::from_name(word).map(Disposition::action)
}

fn read_action(word: &str, given: &Object, at: &str) -> Result<ReadAction, RawError> {
    let action = did(word).map(|did| ReadAction::of(did, &mut Beside(given, at)));
    let none = || RawError::new(format!("`{at}`: no read gets `{word}`"));
    action.transpose()?.flatten().ok_or_else(none)
}

fn write_action(word: &str, given: &Object, at: &str) -> Result<WriteAction, RawError> {
    let action = did(word).map(|did| WriteAction::of(did, &mut Beside(given, at)));
    let none = || RawError::new(format!("`{at}`: no write gets `{word}`"));
    action.transpose()?.flatten().ok_or_else(none)
}

fn only(object: &Object, known: &[&str], at: &str) -> Result<(), RawError> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) if at.is_empty() => Err(RawError::new(format!(
            "`{key}` is not a key of a filter; it has {}",
            known.join(", ")
        ))),
        Some(key) => Err(RawError::new(format!("`{at}.{key}`: a range has {}", known.join(", ")))),
        None => Ok(()),
    }
}

fn required<'a>(object: &'a Object, key: &str, at: &str) -> Result<&'a Value, RawError> {
    object.get(key).ok_or_else(|| {
        let path = if at.is_empty() {
            key.to_owned()
        } else {
            format!("{at}.{key}")
        };
        RawError::new(format!("`{path}` is missing"))
    })
}

fn object_of<'a>(value: &'a Value, at: &str) -> Result<&'a Object, RawError> {
    value
        .as_object()
        .ok_or_else(|| RawError::new(format!("`{at}` is not an object")))
}

fn list<'a>(value: &'a Value, at: &str) -> Result<&'a [Value], RawError> {
    let list = value.as_array().map(Vec::as_slice);
    list.ok_or_else(|| RawError::new(format!("`{at}` is no list")))
}

fn text<'a>(value: &'a Value, at: &str) -> Result<&'a str, RawError> {
    value
        .as_str()
        .ok_or_else(|| RawError::new(format!("`{at}` is not a string")))
}

fn u64_of(value: &Value, at: &str) -> Result<u64, RawError> {
    let number = match value {
        Value::String(text) => number::parse(text).ok(),
        value => value.as_u64(),
    };
    number.ok_or_else(|| RawError::new(format!("`{at}` is not a number of 64 bits: {value}")))
}

fn bytes_of(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::String(text) => hex(text),
        Value::Array(bytes) => {
            let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
            bytes.iter().map(byte).collect()
        }
        _ => None,
    }
}

/// Flags as a number, or by the kernel's names with `|` between them.
fn flags_of(value: &Value, at: &str) -> Result<u32, RawError> {
    let named = value.as_str().and_then(|text| {
        let mut names = text.split('|');
        let flags = names.try_fold(0, |flags, name| Some(flags | kernel_name(name.trim())?))?;
        u32::try_from(flags).ok()
    });
    named.map_or_else(|| u32_of(value, at), Ok)
}

fn u32_of(value: &Value, at: &str) -> Result<u32, RawError> {
    let number = u64_of(value, at)?;
    u32::try_from(number).map_err(|_| RawError::new(format!("`{at}` is {number:#x}, which has more than 32 bits")))
}
