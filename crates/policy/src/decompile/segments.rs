//! The MSR space in parts that are treated alike, and rules for them.

use std::collections::{BTreeSet, HashMap};
use std::sync::LazyLock;

use msrgate_core::{Msr, MsrRange, ReadAction, WriteAction};
use msrgate_msrs::spell;
use msrgate_plan::{DecisionMap, Intervals};

use super::rule::DecompiledRule;

/// Names for several MSRs at once, with the MSRs in order.
static GROUPS: LazyLock<Vec<(String, Vec<Msr>)>> = LazyLock::new(spell::groups);

/// What reads and writes are to get; `None` is left to the default.
pub(super) type Want = (Option<ReadAction>, Option<WriteAction>);

/// All MSRs, as ranges in order. Neighbours differ in what they get, or in whether a filter stops them.
pub(super) struct Segments {
    parts: Vec<Part>,
    /// Names for several MSRs at once: classes and globs.
    groups: Vec<Group>,
}

struct Part {
    range: MsrRange,
    read: ReadAction,
    write: WriteAction,
    /// Whether nothing is asked for here: no filter decides it.
    free: bool,
}

struct Group {
    spelt: &'static str,
    /// The parts in which it has members.
    touches: Vec<usize>,
    /// The parts whose MSRs are all members.
    fills: Vec<usize>,
}

impl Segments {
    /// `exact` if the x2APIC's registers are to get what the map says, though no filter decides it.
    pub(super) fn of(map: &DecisionMap, exact: bool) -> Segments {
        let free = match exact {
            true => Intervals::uniform(false),
            false => Intervals::first_match(false, [(MsrRange::X2APIC, true)]),
        };
        let actions = map
            .reads()
            .zip(map.writes(), |read, write| (read.action.clone(), write.action.clone()));
        let all = actions.zip(&free, |(read, write), free| (read.clone(), write.clone(), *free));
        let parts: Vec<Part> = all
            .iter()
            .map(|(range, (read, write, free))| Part {
                range,
                read: read.clone(),
                write: write.clone(),
                free: *free,
            })
            .collect();
        let groups = GROUPS.iter().map(|(spelt, members)| Group::of(spelt, members, &parts));
        let groups = groups.collect();
        Segments { parts, groups }
    }

    pub(super) fn len(&self) -> usize {
        self.parts.len()
    }

    /// What the parts want beyond a default, each once, the most frequent last, so that what is special goes before it.
    pub(super) fn wants(&self, defaults: &(ReadAction, WriteAction)) -> Vec<Want> {
        let mut wants: Vec<(Want, usize)> = Vec::new();
        let mut places: HashMap<Want, usize> = HashMap::new();
        for part in self.parts.iter().filter(|part| !part.free) {
            let want = part.want(defaults, (true, true));
            if want == (None, None) {
                continue;
            }
            let place = *places.entry(want.clone()).or_insert(wants.len());
            match wants.get_mut(place) {
                Some((_, count)) => *count += 1,
                None => wants.push((want, 1)),
            }
        }
        wants.sort_by_key(|(_, count)| *count);
        wants.into_iter().map(|(want, _)| want).collect()
    }

    /// How many gaps of at most so many MSRs get what the default says.
    pub(super) fn gaps(&self, defaults: &(ReadAction, WriteAction), ops: (bool, bool), longest: u64) -> usize {
        self.parts
            .iter()
            .filter(|part| part.is_gap(defaults, ops, longest))
            .count()
    }

    /// A rule for each of `wants` that names its parts one by one: no search, for what would take long.
    pub(super) fn plain(&self, defaults: &(ReadAction, WriteAction), wants: &[Want]) -> Vec<DecompiledRule> {
        let mut msrs: HashMap<Want, Vec<String>> = HashMap::new();
        for part in self.parts.iter().filter(|part| !part.free) {
            let spelt = spell::range(part.range);
            msrs.entry(part.want(defaults, (true, true))).or_default().extend(spelt);
        }
        let rules = wants.iter().map(|want| DecompiledRule {
            msrs: msrs.remove(want).unwrap_or_default(),
            read: want.0.clone(),
            write: want.1.clone(),
        });
        rules.collect()
    }

    /// Rules in the order of `wants`, which are of the directions `ops`. With `holes` a rule before them closes, or opens,
    /// each gap of at most so many MSRs as the default would, so that the others can span it.
    pub(super) fn rules(
        &self,
        defaults: &(ReadAction, WriteAction),
        holes: Option<u64>,
        ops: (bool, bool),
        wants: &[Want],
    ) -> Vec<DecompiledRule> {
        let mut decided = vec![(false, false); self.parts.len()];
        let mut rules = Vec::new();
        if let Some(longest) = holes {
            let want = (ops.0.then(|| defaults.0.clone()), ops.1.then(|| defaults.1.clone()));
            let needed: Vec<bool> = self
                .parts
                .iter()
                .map(|part| part.is_gap(defaults, ops, longest))
                .collect();
            rules.extend(self.rule(&want, &needed, &mut decided));
        }
        for want in wants {
            let needed: Vec<bool> = self
                .parts
                .iter()
                .zip(&decided)
                .map(|(part, decided)| {
                    let open = want.0.is_some() && !decided.0 || want.1.is_some() && !decided.1;
                    !part.free && open && part.want(defaults, ops) == *want
                })
                .collect();
            rules.extend(self.rule(want, &needed, &mut decided));
        }
        rules
    }

    /// The rule that gives the needed parts what is wanted, and says nothing new of others.
    fn rule(&self, want: &Want, needed: &[bool], decided: &mut [(bool, bool)]) -> Option<DecompiledRule> {
        if !needed.contains(&true) {
            return None;
        }
        let allowed: Vec<bool> = self
            .parts
            .iter()
            .zip(decided.iter())
            .map(|(part, decided)| part.admits(want, *decided))
            .collect();
        let spelling = self.spell(needed, &allowed);
        for (decided, covered) in decided.iter_mut().zip(&spelling.covered) {
            decided.0 |= *covered && want.0.is_some();
            decided.1 |= *covered && want.1.is_some();
        }
        Some(DecompiledRule {
            msrs: spelling.msrs,
            read: want.0.clone(),
            write: want.1.clone(),
        })
    }

    /// Spells the needed parts, with others that are allowed where that is shorter.
    fn spell(&self, needed: &[bool], allowed: &[bool]) -> Spelling {
        let mut left = needed.to_vec();
        let mut covered = vec![false; needed.len()];
        let mut msrs: Vec<(Msr, String)> = Vec::new();
        let mut pieces = self.pieces(&left, allowed);
        let usable = self
            .groups
            .iter()
            .filter(|group| group.touches.iter().all(|part| allowed.get(*part) == Some(&true)))
            .filter(|group| group.fills.iter().any(|part| needed.get(*part) == Some(&true)));
        let mut usable: Vec<(usize, &Group)> = usable.map(|group| (self.saved(group, &pieces, &left), group)).collect();
        // What a group saves hardly ever grows when another was taken, so only the best is looked at again. Of equals the
        // first, which are classes before globs.
        usable.reverse();
        usable.sort_by_key(|(saved, _)| *saved);
        while let Some((before, group)) = usable.pop() {
            let saved = self.saved(group, &pieces, &left);
            if saved == 0 {
                continue;
            }
            if saved < before && usable.last().is_some_and(|(next, _)| saved < *next) {
                let at = usable.partition_point(|(other, _)| *other < saved);
                usable.insert(at, (saved, group));
                continue;
            }
            let first = group.touches.first().and_then(|part| self.parts.get(*part));
            msrs.push((
                first.map_or(Msr::MIN, |part| part.range.first()),
                group.spelt.to_owned(),
            ));
            for part in &group.fills {
                if let (Some(left), Some(covered)) = (left.get_mut(*part), covered.get_mut(*part)) {
                    *left = false;
                    *covered = true;
                }
            }
            pieces = self.pieces(&left, allowed);
        }
        for piece in pieces {
            for covered in covered.iter_mut().take(piece.last + 1).skip(piece.first) {
                *covered = true;
            }
            msrs.extend(
                piece
                    .range
                    .into_iter()
                    .flat_map(|range| spell::range(range).into_iter().map(move |spelt| (range.first(), spelt))),
            );
        }
        msrs.sort_by_key(|(first, _)| *first);
        Spelling {
            msrs: msrs.into_iter().map(|(_, spelt)| spelt).collect(),
            covered,
        }
    }

    /// How much shorter a rule gets with a group: what the pieces cost that it makes shorter or needless, less its own
    /// cost.
    fn saved(&self, group: &Group, pieces: &[Piece], left: &[bool]) -> usize {
        let mut affected: BTreeSet<usize> = BTreeSet::new();
        for part in group.fills.iter().filter(|part| left.get(**part) == Some(&true)) {
            let at = pieces.partition_point(|piece| piece.last < *part);
            affected.extend(pieces.get(at).filter(|piece| piece.first <= *part).map(|_| at));
        }
        let mut saved = 0;
        for piece in affected.iter().filter_map(|at| pieces.get(*at)) {
            let mut rest =
                (piece.first..=piece.last).filter(|part| left.get(*part) == Some(&true) && !group.fills(*part));
            let shorter = match rest.next() {
                Some(first) => self.piece(first, rest.next_back().unwrap_or(first)).cost,
                None => 0,
            };
            saved += piece.cost.saturating_sub(shorter);
        }
        saved.saturating_sub(cost(group.spelt))
    }

    /// The fewest ranges of allowed parts that hold the needed ones.
    fn pieces(&self, needed: &[bool], allowed: &[bool]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut open: Option<(usize, usize)> = None;
        for (part, (needed, allowed)) in needed.iter().zip(allowed).enumerate() {
            open = match open {
                Some((first, last)) if !allowed => {
                    pieces.push(self.piece(first, last));
                    None
                }
                Some((first, _)) if *needed => Some((first, part)),
                None if *needed => Some((part, part)),
                unchanged => unchanged,
            };
        }
        pieces.extend(open.map(|(first, last)| self.piece(first, last)));
        pieces
    }

    fn piece(&self, first: usize, last: usize) -> Piece {
        let ends = self.parts.get(first).zip(self.parts.get(last));
        let range = ends.and_then(|(from, to)| MsrRange::new(from.range.first(), to.range.last()));
        let cost = range.map_or(0, |range| spell::range(range).iter().map(|spelt| cost(spelt)).sum());
        Piece {
            first,
            last,
            range,
            cost,
        }
    }
}

impl Part {
    /// What it wants beyond the default, of the directions `ops`.
    fn want(&self, defaults: &(ReadAction, WriteAction), ops: (bool, bool)) -> Want {
        (
            (ops.0 && self.read != defaults.0).then(|| self.read.clone()),
            (ops.1 && self.write != defaults.1).then(|| self.write.clone()),
        )
    }

    fn is_gap(&self, defaults: &(ReadAction, WriteAction), ops: (bool, bool), longest: u64) -> bool {
        !self.free && self.range.len() <= longest && self.want(defaults, ops) == (None, None)
    }

    /// Whether a rule for `want` may name it: an earlier rule has decided, or it says what is wanted. Where no filter
    /// decides, a rule may open and never close.
    fn admits(&self, want: &Want, decided: (bool, bool)) -> bool {
        if self.free {
            return want.0.as_ref().is_none_or(|read| *read == ReadAction::Allow)
                && want.1.as_ref().is_none_or(|write| *write == WriteAction::Allow);
        }
        want.0.as_ref().is_none_or(|read| decided.0 || self.read == *read)
            && want.1.as_ref().is_none_or(|write| decided.1 || self.write == *write)
    }
}

impl Group {
    fn of(spelt: &'static str, members: &[Msr], parts: &[Part]) -> Group {
        let mut touches: Vec<usize> = Vec::new();
        let mut fills = Vec::new();
        let mut inside = 0;
        for msr in members {
            let part = parts.partition_point(|part| part.range.last() < *msr);
            if touches.last() != Some(&part) {
                touches.push(part);
                inside = 0;
            }
            inside += 1;
            if parts.get(part).is_some_and(|part| part.range.len() == inside) {
                fills.push(part);
            }
        }
        Group { spelt, touches, fills }
    }

    /// Whether all MSRs of a part are members.
    fn fills(&self, part: usize) -> bool {
        self.fills.binary_search(&part).is_ok()
    }
}

/// A range of a rule, from part to part.
struct Piece {
    first: usize,
    last: usize,
    range: Option<MsrRange>,
    cost: usize,
}

struct Spelling {
    msrs: Vec<String>,
    /// The parts that are named whole.
    covered: Vec<bool>,
}

/// How much of a line a pattern takes, with its quotes and the comma.
fn cost(spelt: &str) -> usize {
    spelt.len() + 4
}
