//! Policy to text.

use std::fmt;

use msrgate_core::{Argument, ArgumentKey, Disposition, Log, ReadAction, WriteAction};
use toml::Value;
use toml::map::Map;

use crate::policy::When;
use crate::written::is_flag;
use crate::{Acceptance, Policy, Provider, Rule, Spill, Validity};

/// So many of a thing: `1 access`, `2 accesses`.
pub fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

/// How wide a line gets.
const WIDTH: usize = 100;

/// As a file that reads back as an equal policy, with what it extends written out.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "version = 1")?;
        writeln!(f, "name = {}", text(&self.name))?;
        writeln!(f, "default = {}", text(self.default.name()))?;
        if self.valid == Validity::CpuModel {
            writeln!(f, "valid = {}", text("cpu-model"))?;
        }
        accepted(f, &self.accept)?;
        if self.spill == Spill::UserSpace {
            writeln!(f, "spill = {}", text("user-space"))?;
        }
        if !self.providers.is_empty() {
            let providers = self.providers.iter().map(|(name, one)| (&**name, provider(one)));
            writeln!(f, "handlers = {}", table(providers))?;
        }
        fallbacks(f, &self.unknown, &self.invalid)?;
        self.rules.iter().try_for_each(|rule| rule.fmt(f))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n[[rule]]")?;
        match self.msrs.as_slice() {
            [one] => writeln!(f, "msr = {}", text(&one.to_string()))?,
            several => writeln!(f, "msr = {}", list(several.iter().map(|msr| text(&msr.to_string()))))?,
        }
        if let Some(read) = &self.read {
            writeln!(f, "read = {}", read_action(read))?;
        }
        if let Some(write) = &self.write {
            writeln!(f, "write = {}", write_action(write))?;
        }
        if !self.when.is_always() {
            writeln!(f, "when = {}", when(&self.when))?;
        }
        match self.log {
            Log::None => {}
            Log::All => writeln!(f, "log = {}", text("all"))?,
            Log::First => writeln!(f, "log = {}", text("first"))?,
            Log::PerSecond(n) => writeln!(f, "log = {{ per_second = {n} }}")?,
        }
        if let Some(why) = &self.why {
            writeln!(f, "why = {}", text(why))?;
        }
        accepted(f, &self.accept)
    }
}

fn accepted(f: &mut fmt::Formatter<'_>, accept: &[Acceptance]) -> fmt::Result {
    if accept.is_empty() {
        return Ok(());
    }
    let entries = accept.iter().map(|one| (one.code.code(), text(&one.reason)));
    writeln!(f, "accept = {}", table(entries))
}

/// What accesses get that the kernel declines, where that is not its own #GP.
pub(crate) fn fallbacks(
    f: &mut fmt::Formatter<'_>,
    unknown: &(ReadAction, WriteAction),
    invalid: &(ReadAction, WriteAction),
) -> fmt::Result {
    for (key, (read, write)) in [("unknown", unknown), ("invalid", invalid)] {
        if (read, write) != (&ReadAction::Deny, &WriteAction::Deny) {
            writeln!(
                f,
                "{key} = {{ read = {}, write = {} }}",
                read_action(read),
                write_action(write)
            )?;
        }
    }
    Ok(())
}

/// A rule with its keys aligned and its MSRs, as they are spelled, on as many lines as they take.
pub fn rule(
    f: &mut fmt::Formatter<'_>,
    msrs: &[String],
    read: Option<&ReadAction>,
    write: Option<&WriteAction>,
    why: Option<&str>,
) -> fmt::Result {
    writeln!(f, "\n[[rule]]")?;
    let quoted: Vec<String> = msrs.iter().map(|msr| text(msr).to_string()).collect();
    let line = quoted.join(", ");
    match quoted.as_slice() {
        [one] => writeln!(f, "msr   = {one}")?,
        _ if line.len() + 10 <= WIDTH => writeln!(f, "msr   = [{line}]")?,
        several => {
            writeln!(f, "msr   = [")?;
            let mut column = 0;
            for item in several {
                if column > 0 && column + item.len() + 2 > WIDTH {
                    writeln!(f)?;
                    column = 0;
                }
                let space = if column == 0 { "    " } else { " " };
                write!(f, "{space}{item},")?;
                column += space.len() + item.len() + 1;
            }
            writeln!(f, "\n]")?;
        }
    }
    if let Some(read) = read {
        writeln!(f, "read  = {}", read_action(read))?;
    }
    if let Some(write) = write {
        writeln!(f, "write = {}", write_action(write))?;
    }
    match why {
        Some(why) => writeln!(f, "why   = {}", text(why)),
        None => Ok(()),
    }
}

/// A paragraph as comment lines.
pub fn comment(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let mut column = 0;
    // A name of a file may hold anything, and a control character is no part of a TOML comment.
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
    {
        let width = word.chars().count();
        if column > 0 && column + width + 1 > WIDTH {
            writeln!(f)?;
            column = 0;
        }
        let lead = if column == 0 { "# " } else { " " };
        write!(f, "{lead}{word}")?;
        column += lead.len() + width;
    }
    writeln!(f)
}

pub(crate) fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

/// A value of 64 bits, which TOML's integers may not hold.
fn value(value: u64) -> Value {
    text(&format!("{value:#x}"))
}

fn list(items: impl Iterator<Item = Value>) -> Value {
    Value::Array(items.collect())
}

fn table<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    Value::Table(
        entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect::<Map<_, _>>(),
    )
}

fn provider(provider: &Provider) -> Value {
    table([match provider {
        Provider::Command(words) => ("command", list(words.iter().map(|word| text(word)))),
        Provider::Socket(path) => ("socket", text(&path.to_string_lossy())),
    }])
}

pub(crate) fn read_action(action: &ReadAction) -> Value {
    action_of(action.did(), action.arguments())
}

pub(crate) fn write_action(action: &WriteAction) -> Value {
    action_of(action.did(), action.arguments())
}

/// The word of an action; with what it is given, if it is given anything.
fn action_of<'a>(did: Disposition, given: impl Iterator<Item = (ArgumentKey, Argument<'a>)>) -> Value {
    let given = given.filter_map(|(key, argument)| Some((key.name, argument_of(argument)?)));
    let mut given: Vec<(&str, Value)> = given.collect();
    match given.len() {
        0 if is_flag(did) => table([(did.name(), Value::Boolean(true))]),
        0 => text(did.name()),
        1 => table(given.pop().map(|(_, only)| (did.name(), only))),
        _ => table([(did.name(), table(given))]),
    }
}

/// `None` where the action's word says it.
fn argument_of(argument: Argument<'_>) -> Option<Value> {
    Some(match argument {
        Argument::Implied(_) => return None,
        Argument::Number(number) => value(number),
        Argument::Numbers(numbers) => list(numbers.iter().map(|number| value(*number))),
        Argument::Name(name) => text(name),
        Argument::OnLockedBits(otherwise) => text(otherwise.name()),
    })
}

fn when(when: &When) -> Value {
    let ranges = |ranges: &[(u32, u32)]| {
        list(
            ranges
                .iter()
                .map(|(first, last)| text(&format!("{first:#x}..={last:#x}"))),
        )
    };
    let entries = [
        (
            "vendor",
            list(when.vendor.iter().map(|vendor| text(&vendor.to_string()))),
        ),
        ("family", ranges(&when.family)),
        ("model", ranges(&when.model)),
        ("features", list(when.features.iter().map(|feature| text(feature)))),
    ];
    table(
        entries
            .into_iter()
            .filter(|(_, values)| values.as_array().is_some_and(|values| !values.is_empty())),
    )
}
