//! A policy made from another tool's words.

use std::collections::HashMap;
use std::fmt;

use msrgate_core::{Msr, ReadAction, Verdict, WriteAction};
use msrgate_msrs::spell;

use crate::print;

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
        writeln!(f, "default = \"{}\"", self.default.name())?;
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
    pub(super) fn new(message: impl Into<String>) -> ForeignError {
        ForeignError {
            message: message.into(),
            line: None,
        }
    }

    pub(super) fn at(line: usize, message: impl Into<String>) -> ForeignError {
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
