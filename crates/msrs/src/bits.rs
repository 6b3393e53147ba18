//! What the bits of a value mean: one form for people, `SCE LME LMA NXE`, and its parts for programs.

use alloc::vec::Vec;
use core::fmt;

use msrgate_core::Msr;

use crate::entry::Entry;
use crate::field::Field;
use crate::lookup::by_msr;

/// A field that is not zero, or whose zero has a word; or bits in a row that are set and have no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Part {
    /// The lowest bit.
    pub first: u32,
    /// The highest bit.
    pub last: u32,
    /// The field's name; `None` of bits that the table does not know.
    pub name: Option<&'static str>,
    /// The field's value, as [`Field::of`] has it.
    pub value: u64,
    /// The manual's word for the value.
    pub word: Option<&'static str>,
}

impl Part {
    fn of(field: &Field, value: u64) -> Part {
        let value = field.of(value);
        Part {
            first: field.first,
            last: field.last,
            name: Some(field.name),
            value,
            word: field.word(value),
        }
    }

    fn is_bit(&self) -> bool {
        self.first == self.last
    }

    /// The field without its value.
    fn subject(&self) -> Subject {
        Subject(*self)
    }

    /// The value without its field.
    fn content(&self) -> Content {
        Content(*self)
    }
}

struct Subject(Part);

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Part { name: Some(name), .. } => f.write_str(name),
            Part { first, last, .. } if first == last => write!(f, "[{first}]"),
            Part { first, last, .. } => write!(f, "[{first}-{last}]"),
        }
    }
}

struct Content(Part);

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Part { word: Some(word), .. } => f.write_str(word),
            Part { value: 0..10, .. } => write!(f, "{}", self.0.value),
            Part { value, .. } => write!(f, "{value:#x}"),
        }
    }
}

/// `LME`, `VCNT=8`, `TYPE=WB`; bits without a name by number: `[13]`, `[16-18]`.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = self.name.is_none() || self.is_bit() && self.word.is_none();
        match plain {
            true => write!(f, "{}", self.subject()),
            false => write!(f, "{}={}", self.subject(), self.content()),
        }
    }
}

/// A field that two values of a register have otherwise, or bits without a name in which they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Changed {
    /// What it was.
    pub before: Part,
    /// What it is.
    pub after: Part,
}

/// `+LME`, `-LME`, `TYPE=UC→WB`; bits without a name by number: `+[13]`.
impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Changed { before, after } = self;
        let plain = before.name.is_none() || before.is_bit() && before.word.or(after.word).is_none();
        match (plain, after.value) {
            (true, 0) => write!(f, "-{}", before.subject()),
            (true, _) => write!(f, "+{}", after.subject()),
            (false, _) => write!(f, "{}={}→{}", before.subject(), before.content(), after.content()),
        }
    }
}

impl Entry {
    /// What the bits of a value mean, from the lowest up; nothing for a register of which no fields are known.
    pub fn bits(&self, value: u64) -> Vec<Part> {
        let mut known = 0;
        let mut parts = Vec::new();
        for field in self.fields() {
            known |= field.mask();
            let part = Part::of(&field, value);
            if part.value != 0 || part.word.is_some() {
                parts.push(part);
            }
        }
        if known != 0 {
            parts.extend(nameless(value & !known));
            parts.sort_unstable_by_key(|part| part.first);
        }
        parts
    }

    /// By which bits a value differs from an earlier one, from the lowest up; nothing for a register of which no fields are
    /// known.
    pub fn changed(&self, before: u64, after: u64) -> Vec<Changed> {
        let mut known = 0;
        let mut changes = Vec::new();
        for field in self.fields() {
            known |= field.mask();
            let (before, after) = (Part::of(&field, before), Part::of(&field, after));
            if before.value != after.value {
                changes.push(Changed { before, after });
            }
        }
        if known != 0 {
            let without = |part: Part, value: u64| Part { value, ..part };
            let added = nameless(after & !before & !known);
            changes.extend(added.map(|after| Changed {
                before: without(after, 0),
                after,
            }));
            let taken = nameless(before & !after & !known);
            changes.extend(taken.map(|before| Changed {
                before,
                after: without(before, 0),
            }));
            changes.sort_unstable_by_key(|changed| changed.before.first);
        }
        changes
    }
}

/// The bits that are set, those in a row together.
fn nameless(mut value: u64) -> impl Iterator<Item = Part> {
    core::iter::from_fn(move || {
        let first = value.trailing_zeros();
        let run = value.checked_shr(first)?.trailing_ones();
        let last = first.saturating_add(run).saturating_sub(1);
        let mask = u64::MAX
            .checked_shr(64u32.saturating_sub(run))
            .and_then(|ones| ones.checked_shl(first))
            .unwrap_or_default();
        value &= !mask;
        Some(Part {
            first,
            last,
            name: None,
            value: mask.checked_shr(first).unwrap_or_default(),
            word: None,
        })
    })
}

/// What the bits of a register's value mean ([`Entry::bits`]).
pub fn bits(msr: Msr, value: u64) -> Vec<Part> {
    by_msr(msr).map(|entry| entry.bits(value)).unwrap_or_default()
}

/// By which bits a register's value differs from an earlier one ([`Entry::changed`]).
pub fn changed(msr: Msr, before: u64, after: u64) -> Vec<Changed> {
    by_msr(msr)
        .map(|entry| entry.changed(before, after))
        .unwrap_or_default()
}
