//! What the policy changed, for each MSR and direction.

use std::collections::{BTreeMap, BTreeSet};

use msrgate_core::{Disposition, Event, Gap, Msr, Op, Outcome, ReadSource};
use msrgate_plan::{DecisionMap, Preset};
use msrgate_policy::Rule;

use super::machine::{AccessResult, Backend};

/// How many different answers are kept for one MSR and direction.
const KEPT: usize = 4;

/// All that a replay found, in memory that does not grow with the trace.
pub(crate) struct Comparison {
    pub(crate) backend: Backend,
    /// The policy's rules, to name them.
    pub(crate) rules: Vec<Rule>,
    map: DecisionMap,
    /// Fixed answers that the kernel held, over all traces.
    presets: BTreeSet<Preset>,
    rows: BTreeMap<(Msr, Op), Row>,
    faults: u64,
    /// How many accesses are missing from the traces.
    lost: u64,
    /// How many of the traces lack some of what the guest was served with.
    pub(crate) partial: u64,
}

/// One MSR in one direction.
#[derive(Default)]
pub(crate) struct Row {
    pub(crate) count: u64,
    /// What the policy says, in its words.
    pub(crate) action: &'static str,
    pub(crate) sees: Answers,
    /// What the guest gets here without the policy.
    pub(crate) without: Answers,
    pub(crate) recorded: Answers,
    /// Accesses that the policy changed.
    pub(crate) changed: u64,
    /// Accesses that the policy left alone and that got another answer here than in the trace.
    pub(crate) host_differs: u64,
}

/// Different answers in the order in which they came, the first few of them.
#[derive(Default)]
pub(crate) struct Answers {
    kept: Vec<Outcome>,
    more: bool,
}

impl Answers {
    fn add(&mut self, outcome: Outcome) {
        if self.kept.contains(&outcome) {
            return;
        }
        if self.kept.len() < KEPT {
            self.kept.push(outcome);
        } else {
            self.more = true;
        }
    }

    /// For people and programs: `0x0, 0x1, …`.
    pub(crate) fn text(&self) -> String {
        let mut words: Vec<String> = self.kept.iter().map(|outcome| word(*outcome)).collect();
        if self.more {
            words.push("…".to_owned());
        }
        words.join(", ")
    }
}

fn word(outcome: Outcome) -> String {
    match outcome {
        Outcome::Value(value) => format!("{value:#x}"),
        Outcome::Done => "done".to_owned(),
        Outcome::Fault => "#GP".to_owned(),
    }
}

impl Comparison {
    pub(crate) fn new(backend: Backend, rules: Vec<Rule>) -> Comparison {
        Comparison {
            backend,
            rules,
            map: DecisionMap::allow_all(),
            presets: BTreeSet::new(),
            rows: BTreeMap::new(),
            faults: 0,
            lost: 0,
            partial: 0,
        }
    }

    /// The events that follow are judged by this map, and met these presets: a policy may mean another for the next
    /// trace's CPUID.
    pub(crate) fn next_trace(&mut self, map: DecisionMap, presets: &[Preset]) {
        self.map = map;
        self.presets.extend(presets);
    }

    pub(crate) fn presets(&self) -> impl Iterator<Item = &Preset> {
        self.presets.iter()
    }

    /// Adds one access: what it got without the policy in two runs, and under it.
    pub(crate) fn add(&mut self, event: &Event, plain: [Outcome; 2], ruled: &AccessResult) {
        let (action, live) = match event.op {
            Op::Read => {
                let action = &self.map.reads().get(event.msr).action;
                // Answers that follow the register itself, and so change as it does.
                let live = action.needs_exit() && action.source() != ReadSource::Policy;
                (action.did(), live)
            }
            Op::Write => (self.map.writes().get(event.msr).action.did(), false),
        };
        let row = self.rows.entry((event.msr, event.op)).or_default();
        row.action = action.name();
        row.count += 1;
        row.sees.add(ruled.outcome);
        plain.into_iter().for_each(|outcome| row.without.add(outcome));
        let recorded = recorded(event);
        row.recorded.add(recorded);
        if ruled.outcome == Outcome::Fault {
            self.faults += 1;
        }
        // An access that the filter allowed may still be answered by `unknown` or `invalid`.
        let left_to_kernel = action.is_kernels() && ruled.answer.is_none_or(|answer| answer.did == Disposition::Deny);
        if left_to_kernel {
            row.host_differs += u64::from(plain[0] != recorded && by_itself(plain, recorded).is_none());
        } else if differs(plain, ruled.outcome, live) {
            row.changed += 1;
        }
    }

    /// Counts what is missing from the trace: nobody knows what it would have got.
    pub(crate) fn miss(&mut self, gap: &Gap) {
        self.lost = self.lost.saturating_add(gap.events);
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    pub(crate) fn accesses(&self) -> u64 {
        self.rows.values().map(|row| row.count).sum()
    }

    pub(crate) fn changed(&self) -> u64 {
        self.rows.values().map(|row| row.changed).sum()
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = (Msr, Op, &Row)> {
        self.rows.iter().map(|((msr, op), row)| (*msr, *op, row))
    }
}

/// What the trace says that the guest got.
fn recorded(event: &Event) -> Outcome {
    match event.op {
        _ if event.did.is_fault() => Outcome::Fault,
        Op::Read => Outcome::Value(event.value),
        Op::Write => Outcome::Done,
    }
}

/// Whether the policy gave the guest something else than it would have got.
fn differs(plain: [Outcome; 2], ruled: Outcome, live: bool) -> bool {
    // A register that follows its own course is not changed by being read a little later.
    let follows = live && by_itself(plain, ruled).is_some();
    !follows && !plain.contains(&ruled)
}

/// Whether an answer may differ from the plain ones without anybody's doing: both runs gave values, and not the same.
fn by_itself(plain: [Outcome; 2], other: Outcome) -> Option<()> {
    match (plain, other) {
        ([Outcome::Value(one), Outcome::Value(two)], Outcome::Value(_)) if one != two => Some(()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Outcome::{Done, Fault, Value};

    #[test]
    fn another_value_or_a_fault_for_a_value_is_a_change() {
        assert!(differs([Value(1), Value(1)], Value(2), false));
        assert!(differs([Value(1), Value(1)], Fault, false));
        assert!(differs([Fault, Fault], Value(0), false));
        assert!(differs([Done, Done], Fault, false));
        assert!(differs([Fault, Fault], Done, false));
    }

    #[test]
    fn the_same_answer_is_none() {
        assert!(!differs([Value(1), Value(1)], Value(1), false));
        assert!(!differs([Done, Done], Done, false));
        assert!(!differs([Fault, Fault], Fault, false));
    }

    #[test]
    fn a_clock_that_is_passed_on_ticks_and_one_that_is_fixed_is_changed() {
        assert!(!differs([Value(1), Value(2)], Value(3), true));
        assert!(differs([Value(1), Value(2)], Value(0), false));
        assert!(differs([Value(1), Value(2)], Fault, true));
    }

    #[test]
    fn answers_are_kept_up_to_a_few() {
        let mut answers = Answers::default();
        for value in [1, 1, 2, 3, 4, 5] {
            answers.add(Value(value));
        }
        assert_eq!(answers.text(), "0x1, 0x2, 0x3, 0x4, …");
    }
}
