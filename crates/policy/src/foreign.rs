//! What other tools say of MSRs, as policies; and policies in their words, where these can say all of it.
//!
//! ```
//! use msrgate_policy::Policy;
//! use msrgate_policy::foreign::{Format, import};
//!
//! let list = "0x00000010 0x0000000000000000 # time stamp\n0x00000199 0x000000000000ffff # P-state\n";
//! let policy = import(Format::MsrSafe, list)?.to_string();
//! assert_eq!(Policy::parse("msr-safe.toml", &policy).expect("a policy").rules.len(), 2);
//! # Ok::<(), msrgate_policy::foreign::ForeignError>(())
//! ```

mod crosvm;
mod firecracker;
mod msr_safe;

use std::collections::HashMap;
use std::fmt;

use msrgate_core::{Msr, MsrRange, Op, ReadAction, Verdict, WriteAction};
use msrgate_msrs::spell;
use msrgate_plan::{Decision, DecisionMap, Intervals};

use crate::print;

/// The most MSRs that are named one by one.
const MOST: u64 = 4096;

/// Whose words they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Format {
    /// crosvm's flag `--userspace-msr`, which it had in 2022 and 2023.
    Crosvm,
    /// The `msr_modifiers` of a custom CPU template of Firecracker.
    Firecracker,
    /// A list for msr-safe's `/dev/cpu/msr_allowlist`.
    MsrSafe,
}

impl Format {
    /// The tool's name.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Crosvm => "crosvm",
            Format::Firecracker => "firecracker",
            Format::MsrSafe => "msr-safe",
        }
    }
}

/// A policy made from another tool's words.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Whose words they were.
    pub format: Format,
    /// What an access gets that no rule decides.
    pub default: Verdict,
    /// For each MSR what reads and writes get; `None` is left to the default.
    pub msrs: Vec<(Msr, Option<ReadAction>, Option<WriteAction>)>,
    /// What its reader should know, in sentences.
    pub comments: Vec<String>,
    /// Where the policy is not just what was said, in sentences.
    pub remarks: Vec<String>,
}

/// Makes a policy from another tool's words.
pub fn import(format: Format, text: &str) -> Result<Imported, ForeignError> {
    match format {
        Format::Crosvm => crosvm::import(text),
        Format::Firecracker => firecracker::import(text),
        Format::MsrSafe => msr_safe::import(text),
    }
}

/// What a policy means in another tool's words; or all accesses for which it has none. There are none for Firecracker's
/// templates: they set what a register holds at first, and a guest's write is not theirs to decide.
pub fn export(format: Format, map: &DecisionMap) -> Result<String, Vec<Unsayable>> {
    let (text, mut unsayable) = match format {
        Format::Crosvm => crosvm::export(map),
        Format::MsrSafe => msr_safe::export(map),
        Format::Firecracker => {
            let why = "a template of Firecracker sets what registers hold at first, and decides no access";
            let all = Unsayable {
                range: MsrRange::ALL,
                op: Op::Read,
                action: "any".to_owned(),
                rule: None,
                why,
            };
            (String::new(), vec![all])
        }
    };
    for (when, (read, write)) in [("unknown", map.unknown()), ("invalid", map.invalid())] {
        let of = |op, action: String| Unsayable {
            range: MsrRange::ALL,
            op,
            action: format!("{when} {action}"),
            rule: None,
            why: "what the kernel declines cannot be answered in these words",
        };
        if *read != ReadAction::Deny {
            unsayable.push(of(Op::Read, read.to_string()));
        }
        if *write != WriteAction::Deny {
            unsayable.push(of(Op::Write, write.to_string()));
        }
    }
    match unsayable.is_empty() {
        true => Ok(text),
        false => Err(unsayable),
    }
}

/// Accesses for which a tool has no words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsayable {
    /// Which MSRs.
    pub range: MsrRange,
    /// In which direction.
    pub op: Op,
    /// What the policy gives them, in words.
    pub action: String,
    /// The rule that does; `None` for the default.
    pub rule: Option<u32>,
    /// Why the tool cannot.
    pub why: &'static str,
}

/// As a policy that a person can go on from: MSRs with the same actions share a rule.
impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for text in &self.comments {
            print::comment(f, text)?;
        }
        for remark in &self.remarks {
            print::comment(f, &format!("Look at: {remark}."))?;
        }
        writeln!(f, "version = 1")?;
        writeln!(f, "name    = \"{}\"", self.format.name())?;
        let default = match self.default {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
        };
        writeln!(f, "default = \"{default}\"")?;
        let mut msrs: Vec<_> = self
            .msrs
            .iter()
            .filter(|(_, read, write)| read.is_some() || write.is_some())
            .collect();
        msrs.sort_by_key(|(msr, ..)| *msr);
        // In the order of the first MSR of each.
        let mut groups: Vec<(&_, &_, Vec<Msr>)> = Vec::new();
        let mut places = HashMap::new();
        for (msr, read, write) in msrs {
            let place = *places.entry((read, write)).or_insert(groups.len());
            match groups.get_mut(place) {
                Some((.., group)) => group.push(*msr),
                None => groups.push((read, write, vec![*msr])),
            }
        }
        for (read, write, group) in groups {
            print::rule(f, &spell::patterns(&group), read.as_ref(), write.as_ref(), None)?;
        }
        Ok(())
    }
}

/// Why a text is not in another tool's words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForeignError {
    message: String,
    line: Option<usize>,
}

impl ForeignError {
    fn new(message: impl Into<String>) -> ForeignError {
        ForeignError {
            message: message.into(),
            line: None,
        }
    }

    fn at(line: usize, message: impl Into<String>) -> ForeignError {
        ForeignError {
            line: Some(line),
            ..ForeignError::new(message)
        }
    }
}

impl fmt::Display for ForeignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ForeignError {}

/// What a tool cannot say of one direction of a map; `say` does so, or tells why not.
fn unsayable<A: fmt::Display + Clone + Eq>(
    op: Op,
    decisions: &Intervals<Decision<A>>,
    mut say: impl FnMut(MsrRange, &A) -> Result<(), &'static str>,
) -> Vec<Unsayable> {
    let unsaid = decisions.iter().filter_map(|(range, decision)| {
        let why = say(range, &decision.action).err()?;
        Some(Unsayable {
            range,
            op,
            action: decision.action.to_string(),
            rule: decision.rule,
            why,
        })
    });
    unsaid.collect()
}

/// Each MSR of a range, if they are few enough to be named; else why not.
fn each(range: MsrRange) -> Result<impl Iterator<Item = Msr>, &'static str> {
    match range.len() {
        0..=MOST => Ok(range.iter()),
        _ => Err("these are too many MSRs to name each"),
    }
}

#[cfg(test)]
mod tests;
