//! Which MSRs a rule is about.

use std::fmt;

use msrgate_core::{Msr, MsrRange};

use msrgate_msrs::number::{self, NumberError};

/// What an author writes to name MSRs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// A name or an alias.
    Name(String, Msr),
    /// `*` and `?` over names and aliases.
    Glob(String, Vec<MsrRange>),
    /// `@class`.
    Class(String, Vec<MsrRange>),
    /// A number, or an inclusive range of numbers or names.
    Range(MsrRange),
}

impl Pattern {
    /// From what stands in a policy: `IA32_TSC`, `IA32_MC*`, `@pmu`, `0x8b`, `0x400..=0x47f`.
    pub fn parse(text: &str) -> Result<Pattern, PatternError> {
        let text = text.trim();
        if let Some(name) = text.strip_prefix('@') {
            let entries = msrgate_msrs::class(name).ok_or_else(|| PatternError::UnknownClass(name.to_owned()))?;
            return Ok(Pattern::Class(
                name.to_ascii_lowercase(),
                joined(entries.map(|entry| entry.msr)),
            ));
        }
        if let Some((first, last)) = text.split_once("..") {
            let Some(last) = last.strip_prefix('=') else {
                return Err(PatternError::NotInclusive {
                    first: first.trim().to_owned(),
                    last: last.trim().to_owned(),
                });
            };
            let (first, last) = (one(first.trim())?, one(last.trim())?);
            return MsrRange::new(first, last)
                .map(Pattern::Range)
                .ok_or(PatternError::Reversed { first, last });
        }
        if text.contains(['*', '?']) {
            let ranges = joined(msrgate_msrs::glob(text).map(|entry| entry.msr));
            return if ranges.is_empty() {
                Err(PatternError::NoMatch(text.to_owned()))
            } else {
                Ok(Pattern::Glob(text.to_owned(), ranges))
            };
        }
        let msr = one(text)?;
        Ok(if text.starts_with(|c: char| c.is_ascii_digit()) {
            Pattern::Range(MsrRange::single(msr))
        } else {
            Pattern::Name(text.to_owned(), msr)
        })
    }

    /// The MSRs, as ranges in order that do not touch.
    pub fn ranges(&self) -> Vec<MsrRange> {
        match self {
            Pattern::Name(_, msr) => vec![MsrRange::single(*msr)],
            Pattern::Range(range) => vec![*range],
            Pattern::Glob(_, ranges) | Pattern::Class(_, ranges) => ranges.clone(),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pattern::Name(text, _) | Pattern::Glob(text, _) => f.write_str(text),
            Pattern::Class(name, _) => write!(f, "@{name}"),
            Pattern::Range(range) => range.fmt(f),
        }
    }
}

/// A number or a name.
fn one(text: &str) -> Result<Msr, PatternError> {
    if text.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+') {
        let value = number::parse(text).map_err(|error| match error {
            NumberError::Malformed => PatternError::Malformed(text.to_owned()),
            NumberError::TooLarge => PatternError::TooLarge(text.to_owned()),
        })?;
        return u32::try_from(value)
            .map(Msr)
            .map_err(|_| PatternError::TooLarge(text.to_owned()));
    }
    msrgate_msrs::by_name(text)
        .map(|entry| entry.msr)
        .ok_or_else(|| PatternError::UnknownName(text.to_owned()))
}

/// MSRs as the fewest ranges.
fn joined(msrs: impl Iterator<Item = Msr>) -> Vec<MsrRange> {
    let mut msrs: Vec<Msr> = msrs.collect();
    msrs.sort_unstable();
    msrs.dedup();
    let mut ranges: Vec<MsrRange> = Vec::new();
    for msr in msrs {
        let grown = ranges
            .last()
            .filter(|range| range.last().0.checked_add(1) == Some(msr.0))
            .and_then(|range| MsrRange::new(range.first(), msr));
        match (grown, ranges.last_mut()) {
            (Some(grown), Some(range)) => *range = grown,
            _ => ranges.push(MsrRange::single(msr)),
        }
    }
    ranges
}

/// Why a text names no MSRs.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PatternError {
    /// No MSR has the name.
    UnknownName(String),
    /// There is no such class.
    UnknownClass(String),
    /// A glob that matches no name.
    NoMatch(String),
    /// Neither a number nor a name.
    Malformed(String),
    /// An index has 32 bits.
    TooLarge(String),
    /// The range ends before it begins.
    Reversed {
        /// Where it begins.
        first: Msr,
        /// Where it ends.
        last: Msr,
    },
    /// A range written with `..`.
    NotInclusive {
        /// Where it begins.
        first: String,
        /// What stands behind the dots.
        last: String,
    },
}

impl PatternError {
    /// What is most likely meant, where that can be told.
    pub fn meant(&self) -> Option<String> {
        match self {
            PatternError::UnknownName(name) => msrgate_msrs::nearest(name).map(str::to_owned),
            PatternError::UnknownClass(name) => {
                msrgate_msrs::nearest_of(name, msrgate_msrs::classes()).map(|near| format!("@{near}"))
            }
            PatternError::Reversed { first, last } => Some(format!("{last}..={first}")),
            PatternError::NotInclusive { first, last } => Some(format!("{first}..={last}")),
            PatternError::NoMatch(_) | PatternError::Malformed(_) | PatternError::TooLarge(_) => None,
        }
    }

    /// What to write instead, where that can be told.
    pub fn help(&self) -> Option<String> {
        match self {
            PatternError::UnknownName(_) => Some(match self.meant() {
                Some(near) => {
                    format!("did you mean `{near}`? `msrgate msr TEXT` searches the names; an index works too: `0x8b`")
                }
                None => "`msrgate msr TEXT` searches the names; an index works too: `0x8b`".to_owned(),
            }),
            PatternError::UnknownClass(_) => {
                let near = self.meant();
                let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
                let all: Vec<&str> = msrgate_msrs::classes().collect();
                Some(format!("{near}the classes are {}", all.join(", ")))
            }
            PatternError::NoMatch(_) => {
                Some("`*` and `?` match over known names; every MSR there is: `0..=0xffffffff`".to_owned())
            }
            PatternError::Malformed(_) => Some("write an index as `0x8b` or `139`".to_owned()),
            PatternError::TooLarge(_) => Some("an MSR index has 32 bits: `0` to `0xffffffff`".to_owned()),
            PatternError::Reversed { first, last } => Some(format!("write `{last}..={first}`")),
            PatternError::NotInclusive { first, last } => {
                Some(format!("both ends belong to a range: `{first}..={last}`"))
            }
        }
    }
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PatternError::UnknownName(name) => write!(f, "no MSR is named `{name}`"),
            PatternError::UnknownClass(name) => write!(f, "there is no class `@{name}`"),
            PatternError::NoMatch(glob) => write!(f, "`{glob}` matches no name"),
            PatternError::Malformed(text) => write!(f, "`{text}` is not a number"),
            PatternError::TooLarge(text) => write!(f, "`{text}` is too large for an MSR index"),
            PatternError::Reversed { first, last } => write!(f, "the range `{first}..={last}` ends before it begins"),
            PatternError::NotInclusive { first, last } => write!(f, "`{first}..{last}` leaves its end out"),
        }
    }
}

impl std::error::Error for PatternError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(text: &str) -> Vec<(u32, u32)> {
        let pattern = Pattern::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        pattern
            .ranges()
            .iter()
            .map(|range| (range.first().0, range.last().0))
            .collect()
    }

    #[test]
    fn msrs_are_named_in_every_way_that_the_language_has() {
        assert_eq!(ranges("0x8b"), [(0x8b, 0x8b)]);
        assert_eq!(ranges("139"), [(0x8b, 0x8b)]);
        assert_eq!(ranges("IA32_BIOS_SIGN_ID"), [(0x8b, 0x8b)]);
        assert_eq!(ranges("ia32_bios_sign_id"), [(0x8b, 0x8b)]);
        assert_eq!(ranges("0xc0000080..=0xc0000084"), [(0xc000_0080, 0xc000_0084)]);
        assert_eq!(ranges("IA32_SYSENTER_*"), [(0x174, 0x176)]);
        assert_eq!(ranges("IA32_SYSENTER_CS ..= IA32_SYSENTER_EIP"), [(0x174, 0x176)]);
        assert!(ranges("@mtrr").contains(&(0x277, 0x277)) || ranges("@mtrr").contains(&(0x2ff, 0x2ff)));
    }

    #[test]
    fn what_names_no_msr_says_what_to_write() {
        for (text, help) in [
            ("IA32_BIOS_SIGN", "IA32_BIOS_SIGN_ID"),
            ("@mtr", "mtrr"),
            ("NOSUCH*", "0..=0xffffffff"),
            ("0x8q", "0x8b"),
            ("0x100000000", "32 bits"),
            ("0x20..=0x10", "`0x10..=0x20`"),
            ("0x10..0x20", "`0x10..=0x20`"),
            ("-1", "0x8b"),
        ] {
            let error = Pattern::parse(text).unwrap_err();
            assert!(error.help().unwrap().contains(help), "{text}: {:?}", error.help());
        }
    }
}
