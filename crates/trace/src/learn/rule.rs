//! The rules of a learned policy.

use std::collections::HashMap;

use msrgate_core::{Msr, MsrRange, Op, ReadAction, WriteAction};
use msrgate_msrs::Class;
use msrgate_msrs::spell::{classes, patterns, runs};

use super::summary::{Least, Summary, Usage};
use super::want::{Generalize, Remark, Want, Wants, class, wants, widen};

/// A policy that denies by default and serves what guests did.
#[derive(Clone, Debug)]
pub struct Learned {
    /// The policy's rules: each access is decided by one of them at most.
    pub rules: Vec<LearnedRule>,
    /// What traces do not tell.
    pub remarks: Vec<Remark>,
    /// What it was learned from.
    pub summary: Summary,
}

/// A rule, and what speaks for it.
#[derive(Clone, Debug)]
pub struct LearnedRule {
    /// The MSRs, as a policy spells them.
    pub msrs: Vec<String>,
    /// What reads get.
    pub read: Option<ReadAction>,
    /// What writes get.
    pub write: Option<WriteAction>,
    /// The class that the MSRs have in common; `None` for those that the database does not know.
    pub class: Option<Class>,
    /// What was seen of it.
    pub facts: Facts,
    /// What it allows beyond that, as ranges in order.
    pub unseen: Vec<(MsrRange, Op)>,
    /// What it serves that was seen.
    pub(super) served: Vec<(Msr, Op)>,
    /// The first MSR, by which rules are ordered.
    first: Msr,
}

/// What was seen of a rule's accesses.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Facts {
    /// How many reads.
    pub reads: u64,
    /// In how many traces the access is that is in the fewest.
    pub writes: u64,
    /// In how many traces the access is that is in the most.
    pub fewest: u64,
    /// The access that is in the most traces: in how many.
    pub most: u64,
    /// Some of these traces.
    pub names: Least<String, 4>,
    /// When the first access was, in nanoseconds since the first access of its trace.
    pub first: u64,
    /// When the last access was, likewise.
    pub last: u64,
}

impl Facts {
    pub(super) fn add(&mut self, op: Op, seen: &Usage) {
        let count = match op {
            Op::Read => &mut self.reads,
            Op::Write => &mut self.writes,
        };
        *count = count.saturating_add(seen.count());
        let none = self.most == 0;
        self.fewest = if none {
            seen.traces
        } else {
            self.fewest.min(seen.traces)
        };
        self.most = self.most.max(seen.traces);
        self.first = if none { seen.first } else { self.first.min(seen.first) };
        self.last = self.last.max(seen.last);
        seen.names.iter().for_each(|name| self.names.insert(name.clone()));
    }
}

impl Learned {
    /// The smallest policy that serves what was seen, as far as `further` goes beyond it.
    pub fn from(summary: &Summary, further: &Generalize) -> Learned {
        let (mut wanted, remarks) = wants(summary);
        let whole = widen(&mut wanted, further);
        Learned {
            rules: rules(wanted, &whole, summary),
            remarks,
            summary: summary.clone(),
        }
    }
}

/// Rules that give each access what it is to get, and no two of which decide the same. A class is named where it is
/// just what is wanted: its MSRs get the same in both directions, or a direction is `whole` by widening.
fn rules(mut left: Wants, whole: &[(Class, Op)], summary: &Summary) -> Vec<LearnedRule> {
    let mut rules = Vec::new();
    for (class, members) in classes() {
        let all = |op| {
            members
                .iter()
                .all(|msr| left.get(msr).is_some_and(|want| want.allows(op)))
        };
        let none = |op| {
            members
                .iter()
                .all(|msr| left.get(msr).is_some_and(|want| !want.decides(op)))
        };
        let (read, write) = (all(Op::Read), all(Op::Write));
        let just = match (read, write) {
            (true, true) => true,
            (true, false) => whole.contains(&(class, Op::Read)) || none(Op::Write),
            (false, true) => whole.contains(&(class, Op::Write)) || none(Op::Read),
            (false, false) => false,
        };
        if !just {
            continue;
        }
        let want = Want {
            read: read.then_some(ReadAction::Allow),
            write: write.then_some(WriteAction::Allow),
        };
        rules.push(rule(&members, vec![format!("@{class}")], want, Some(class), summary));
        for msr in &members {
            if let Some(want) = left.get_mut(msr) {
                want.read = want.read.take().filter(|_| !read);
                want.write = want.write.take().filter(|_| !write);
            }
        }
    }
    // By class, so that a reader finds together what belongs together, and by what they get.
    let mut groups: HashMap<(Option<Class>, Want), Vec<Msr>> = HashMap::new();
    for (msr, want) in left {
        if want != Want::default() {
            groups.entry((class(msr), want)).or_default().push(msr);
        }
    }
    for ((class, want), msrs) in groups {
        rules.push(rule(&msrs, patterns(&msrs), want, class, summary));
    }
    // A class that is read whole may stand beside a rule for its writes, with the same first MSR.
    rules.sort_by_key(|rule| (rule.first, rule.read.is_none()));
    rules
}

/// A rule for MSRs in order.
fn rule(msrs: &[Msr], patterns: Vec<String>, want: Want, class: Option<Class>, summary: &Summary) -> LearnedRule {
    let mut facts = Facts::default();
    let mut unseen = Vec::new();
    let mut served = Vec::new();
    for op in Op::ALL {
        if !want.decides(op) {
            continue;
        }
        let mut beyond = Vec::new();
        for msr in msrs {
            match summary.seen.get(&(*msr, op)) {
                Some(seen) => {
                    facts.add(op, seen);
                    served.push((*msr, op));
                }
                None => beyond.push(*msr),
            }
        }
        unseen.extend(runs(&beyond).into_iter().map(|range| (range, op)));
    }
    LearnedRule {
        msrs: patterns,
        read: want.read,
        write: want.write,
        class,
        facts,
        unseen,
        served,
        first: msrs.first().copied().unwrap_or(Msr::MIN),
    }
}
