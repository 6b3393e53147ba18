//! What `msrgate capture` writes: a VMM's calls on KVM, each a JSON object, of which the last filter is read.

use serde_json::{Deserializer, Map, Value};

use super::error::RawError;
use super::filter::RawInput;
use super::json;

/// How many lines with other filters are named.
const NAMED: usize = 8;

/// A call that sets a filter.
struct Set {
    line: usize,
    call: Map<String, Value>,
}

/// Reads a capture; `None` where the bytes are none.
pub(super) fn read(bytes: &[u8]) -> Option<Result<RawInput, RawError>> {
    let mut calls = Deserializer::from_slice(bytes).into_iter::<Value>();
    let is_call = |value: &Value| value.get("call").is_some_and(Value::is_string);
    match calls.next() {
        Some(Ok(first)) if is_call(&first) => {}
        _ => return None,
    }
    Some(sets(bytes).and_then(last))
}

fn sets(bytes: &[u8]) -> Result<Vec<Set>, RawError> {
    let mut sets = Vec::new();
    let mut calls = Deserializer::from_slice(bytes).into_iter::<Value>();
    let (mut line, mut counted) = (1, 0);
    loop {
        let rest = bytes.get(calls.byte_offset()..).unwrap_or_default();
        let begin = bytes.len() - rest.trim_ascii_start().len();
        let passed = bytes.get(counted..begin).unwrap_or_default();
        line += passed.iter().filter(|byte| **byte == b'\n').count();
        counted = begin;
        match calls.next() {
            Some(Ok(Value::Object(call))) if call.get("call").is_some_and(|call| call == "KVM_X86_SET_MSR_FILTER") => {
                sets.push(Set { line, call });
            }
            Some(Ok(Value::Object(call))) if call.contains_key("call") => {}
            // A VMM that goes on has written no more yet.
            Some(Err(error)) if error.is_eof() => return Ok(sets),
            Some(_) => {
                let message = "this is not a call among those that `msrgate capture` wrote: the VMM's own output may stand between \
                    them, which `-o FILE` keeps apart";
                return Err(RawError::new(message).at(line));
            }
            None => return Ok(sets),
        }
    }
}

/// The last filter that the kernel took, or of which it is not known whether it did.
fn last(sets: Vec<Set>) -> Result<RawInput, RawError> {
    let refused = |set: &Set| set.call.get("errno").and_then(Value::as_str).map(str::to_owned);
    let given = |set: &Set| {
        if !set.call.contains_key("ranges") {
            return Err(RawError::new("msrgate could not read this filter in the VMM's memory").at(set.line));
        }
        let filter = json::filter(&set.call).and_then(|filter| filter.given());
        filter.map_err(|error| error.at(set.line))
    };
    let mut taken: Vec<&Set> = sets.iter().filter(|set| refused(set).is_none()).collect();
    let Some(last) = taken.pop() else {
        let Some(last) = sets.last() else {
            let message =
                "this VMM gave the kernel no filter: each MSR is left to the kernel, as by `default = \"allow\"`";
            return Err(RawError::new(message));
        };
        // In the kernel's words, where what was captured shows it.
        let why = given(last).err().filter(|error| error.kernel_errno().is_some());
        let errno = refused(last).unwrap_or_default();
        return Err(why.unwrap_or_else(|| {
            let message = format!("the kernel took no filter of this VMM, and refused this one with {errno}");
            RawError::new(message).at(last.line)
        }));
    };
    let mut input = given(last)?;
    let others = taken
        .into_iter()
        .filter(|set| given(set).is_ok_and(|other| other.filter != input.filter));
    let lines: Vec<String> = others.map(of).collect();
    if !lines.is_empty() {
        let more = match lines.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named: Vec<&str> = lines.iter().take(NAMED).map(String::as_str).collect();
        input.remarks.insert(
            0,
            format!(
                "this is the last one of the capture, of {}; others that the kernel took are in {}{more}",
                of(last),
                named.join(", ")
            ),
        );
    }
    Ok(input)
}

/// Where a call is, in words.
fn of(set: &Set) -> String {
    match set.call.get("vm").and_then(Value::as_u64) {
        Some(vm) => format!("line {} (VM {vm})", set.line),
        None => format!("line {}", set.line),
    }
}
