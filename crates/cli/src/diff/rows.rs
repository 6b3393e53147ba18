//! What differs, in words.

use std::fmt::Display;

use msrgate_core::{MsrRange, Op, ReadAction};
use msrgate_plan::Differences;

use crate::words;

/// A range in a direction and what each gives, in words.
pub(super) struct Row {
    pub(super) range: MsrRange,
    pub(super) op: Op,
    pub(super) a: String,
    pub(super) b: String,
    /// By which bits two values of one register differ.
    pub(super) bits: Option<(u64, u64)>,
}

impl Row {
    /// What B gives, and by which bits that is otherwise.
    pub(super) fn b(&self) -> String {
        let changed = self.bits.map(|(a, b)| words::changed(self.range.first(), a, b));
        match changed.filter(|changed| !changed.is_empty()) {
            Some(changed) => format!("{} ({changed})", self.b),
            None => self.b.clone(),
        }
    }
}

/// The differences by MSR, reads before writes.
pub(super) fn rows(found: &Differences) -> Vec<Row> {
    fn each<'a, A: Display>(op: Op, ranges: &'a [(MsrRange, A, A)]) -> impl Iterator<Item = Row> + 'a {
        ranges.iter().map(move |(range, a, b)| Row {
            range: *range,
            op,
            a: a.to_string(),
            b: b.to_string(),
            bits: None,
        })
    }
    let values = |(range, a, b): &(MsrRange, ReadAction, ReadAction)| match (a, b) {
        (ReadAction::Value(a), ReadAction::Value(b)) if range.len() == 1 => Some((*a, *b)),
        _ => None,
    };
    let reads = each(Op::Read, &found.reads).zip(&found.reads);
    let reads = reads.map(|(row, read)| Row {
        bits: values(read),
        ..row
    });
    let mut rows: Vec<Row> = reads.chain(each(Op::Write, &found.writes)).collect();
    rows.sort_by_key(|row| (row.range.first(), row.op));
    rows
}

/// The differences in what accesses get that the kernel declines: when, direction, and what each gives.
pub(super) fn fallbacks(found: &Differences) -> Vec<(&'static str, Op, String, String)> {
    let mut rows = Vec::new();
    for (when, fallback) in [("unknown", &found.unknown), ("invalid", &found.invalid)] {
        if let Some((a, b)) = &fallback.read {
            rows.push((when, Op::Read, a.to_string(), b.to_string()));
        }
        if let Some((a, b)) = &fallback.write {
            rows.push((when, Op::Write, a.to_string(), b.to_string()));
        }
    }
    rows
}
