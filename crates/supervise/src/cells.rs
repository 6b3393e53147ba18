//! Where vCPUs keep shadows.

use msrgate_core::{ActionTable, Msr, MsrRange};

/// The place of each MSR's shadow among a vCPU's cells, for all policies that are in force one after the other: an MSR that
/// is shadowed on keeps its place, and so its value.
#[derive(Clone, Default, Debug)]
pub(crate) struct Cells {
    /// In order, and disjoint; each with the cell of its first MSR.
    spans: Vec<(MsrRange, usize)>,
    count: usize,
}

impl Cells {
    /// Has a place for all that a policy keeps, and gives the MSRs that had none before.
    pub(crate) fn add(&mut self, table: &ActionTable) -> Vec<MsrRange> {
        let mut new = Vec::new();
        for (range, _) in table.cells() {
            let known = self.spans.iter().map(|(known, _)| *known);
            let known: Vec<MsrRange> = known.filter(|known| overlap(*known, range).is_some()).collect();
            let mut next = Some(range.first());
            for known in known {
                let before = known.first().0.checked_sub(1).map(Msr);
                new.extend(
                    next.zip(before)
                        .and_then(|(first, last)| MsrRange::new(first, last.min(range.last()))),
                );
                next = known.last().0.checked_add(1).map(Msr);
            }
            new.extend(next.and_then(|first| MsrRange::new(first, range.last())));
        }
        for range in &new {
            self.spans.push((*range, self.count));
            self.count += range.len() as usize;
        }
        self.spans.sort_unstable_by_key(|(range, _)| range.first());
        new
    }

    /// The parts of a range that lie together, each with its first cell.
    pub(crate) fn parts(&self, range: MsrRange) -> impl Iterator<Item = (MsrRange, usize)> {
        self.spans.iter().filter_map(move |(span, cell)| {
            let part = overlap(*span, range)?;
            Some((part, cell + (part.first().0 - span.first().0) as usize))
        })
    }

    /// How many words a vCPU needs for them.
    pub(crate) fn words(&self) -> usize {
        self.count * 2
    }
}

fn overlap(one: MsrRange, other: MsrRange) -> Option<MsrRange> {
    MsrRange::new(one.first().max(other.first()), one.last().min(other.last()))
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Entry, Log, ReadAction, WriteAction};

    use super::*;

    fn table(ranges: &[(u32, u32)]) -> ActionTable {
        let entry = |(first, last): &(u32, u32)| {
            let range = MsrRange::new(Msr(*first), Msr(*last)).unwrap();
            Entry::new(range, ReadAction::Shadow(0), None, Log::None)
        };
        let nothing = (ReadAction::Deny, WriteAction::Deny);
        ActionTable::new(ranges.iter().map(entry).collect(), vec![], nothing.clone(), nothing).unwrap()
    }

    #[test]
    fn an_msr_that_is_kept_on_keeps_its_cell_and_no_two_have_the_same() {
        let mut cells = Cells::default();
        let mut places = std::collections::BTreeMap::new();
        for ranges in [
            &[(5, 9), (20, 20)][..],
            &[(7, 7)],
            &[(0, 30)],
            &[(8, 40), (u32::MAX - 1, u32::MAX)],
        ] {
            let table = table(ranges);
            cells.add(&table);
            assert!(cells.add(&table).is_empty());
            for (first, last) in ranges {
                let range = MsrRange::new(Msr(*first), Msr(*last)).unwrap();
                let mut covered = 0;
                for (part, cell) in cells.parts(range) {
                    for (msr, cell) in part.iter().zip(cell..) {
                        assert_eq!(*places.entry(msr).or_insert(cell), cell, "{msr}");
                        covered += 1;
                    }
                }
                assert_eq!(covered, range.len());
            }
        }
        let mut used: Vec<usize> = places.values().copied().collect();
        used.sort_unstable();
        used.dedup();
        assert_eq!((used.len(), cells.words()), (places.len(), 2 * places.len()));
    }
}
