//! The lists of msr-safe, which opens chosen MSRs of the host to users.
//!
//! `0x00000199 0x000000000000ffff # comment`: an MSR that may be read, and the bits that may be written; what a write has
//! in other bits is dropped, and with no bits at all it fails (`msr_write`, `parse_next_allowlist_entry`). What is not listed fails.

use std::collections::{BTreeMap, HashSet};

use msrgate_core::{Msr, OnLockedBits, Op, ReadAction, Verdict, WriteAction};
use msrgate_plan::DecisionMap;

use super::imported::{ForeignError, Format, Imported};
use super::unsayable::{Unsupported, each, unsayable};

pub(super) fn import(text: &str) -> Result<Imported, ForeignError> {
    let mut imported = Imported {
        format: Format::MsrSafe,
        default: Verdict::Deny,
        msrs: Vec::new(),
        comments: vec![
            "From a list of msr-safe: what it opens of the host's registers to users is here opened of the guest's own."
                .to_owned(),
        ],
        remarks: Vec::new(),
    };
    let mut seen = HashSet::new();
    let mut index = None;
    for (line, text) in (1..).zip(text.lines()) {
        for word in text.split_whitespace() {
            if word.starts_with('#') {
                break;
            }
            let number =
                number(word).ok_or_else(|| ForeignError::at(line, format!("`{word}` is not a number of 64 bits")))?;
            let Some(msr) = index.take() else {
                let msr = u32::try_from(number).map(Msr);
                let msr =
                    msr.map_err(|_| ForeignError::at(line, format!("an MSR index has 32 bits, and not `{word}`")))?;
                if !seen.insert(msr) {
                    return Err(ForeignError::at(
                        line,
                        format!("{msr} was listed before, which msr-safe refuses"),
                    ));
                }
                index = Some(msr);
                continue;
            };
            let write = match number {
                0 => None,
                u64::MAX => Some(WriteAction::Allow),
                may_change => Some(WriteAction::Mask {
                    may_change,
                    otherwise: OnLockedBits::Drop,
                }),
            };
            imported.msrs.push((msr, Some(ReadAction::Allow), write));
        }
    }
    match index {
        Some(msr) => Err(ForeignError::new(format!(
            "the list ends before the write mask of {msr}"
        ))),
        None if imported.msrs.is_empty() => Err(ForeignError::new(match hidden(text) {
            0 => "no MSR is listed here".to_owned(),
            count => format!(
                "no MSR is listed but behind `#`, where {count} are: take it away from the lines of those that are to be opened"
            ),
        })),
        None => Ok(imported),
    }
}

/// How many lines would list an MSR without the `#` that they begin with: so msr-safe's own lists are shipped.
fn hidden(text: &str) -> usize {
    let lists = |line: &&str| {
        let mut words = line.trim_start().trim_start_matches('#').split_whitespace();
        line.trim_start().starts_with('#')
            && [words.next(), words.next()]
                .iter()
                .all(|word| word.and_then(number).is_some())
    };
    text.lines().filter(lists).count()
}

/// As `kstrtoull` with base 0 reads it.
fn number(word: &str) -> Option<u64> {
    let lower = word.to_ascii_lowercase();
    match lower.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => match lower.strip_prefix('0') {
            Some(octal) if !octal.is_empty() => u64::from_str_radix(octal, 8).ok(),
            _ => lower.parse().ok(),
        },
    }
}

pub(super) fn export(map: &DecisionMap) -> (String, Vec<Unsupported>) {
    let mut listed: BTreeMap<Msr, u64> = BTreeMap::new();
    let mut unsaid = unsayable(Op::Read, map.reads(), |range, action| match action {
        ReadAction::Deny => Ok(()),
        ReadAction::Allow => {
            listed.extend(each(range)?.map(|msr| (msr, 0)));
            Ok(())
        }
        _ => Err("msr-safe opens reads or does not"),
    });
    unsaid.extend(unsayable(Op::Write, map.writes(), |range, action| {
        let mask = match action {
            WriteAction::Deny => return Ok(()),
            WriteAction::Allow => u64::MAX,
            WriteAction::Mask {
                may_change,
                otherwise: OnLockedBits::Drop,
            } if *may_change != 0 => *may_change,
            _ => return Err("msr-safe opens writes, closes them, or drops bits of them"),
        };
        for msr in each(range)? {
            *listed.get_mut(&msr).ok_or("what msr-safe lists can be read")? = mask;
        }
        Ok(())
    }));
    let mut text = "# MSR     write mask\n".to_owned();
    for (msr, mask) in &listed {
        text.push_str(&format!(
            "{:#010x} {mask:#018x} # {}\n",
            msr.0,
            msrgate_msrs::spell::name(*msr)
        ));
    }
    (text, unsaid)
}
