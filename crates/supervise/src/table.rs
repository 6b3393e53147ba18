//! What exits get, as words for the answerer.

use msrgate_answer::layout::table;
use msrgate_core::{Disposition, Entry, FaultCause, Log, MsrRange, ReadAction, WriteAction};

use crate::cells::Cells;
use crate::policy::{Mode, Policy};

/// What the answerer does by itself, and what it asks for.
#[derive(Clone, Copy)]
enum Kind {
    /// What the entry says, on a read: this value.
    Answer(u64),
    Done,
    Fault(Option<FaultCause>),
    /// A shadow, and a read's value before it was written.
    Load(u64),
    Store,
    Ask,
    /// The policy has nothing to say.
    Route,
}

/// How many words of its own a vCPU keeps for shadows, and the table ([`msrgate_answer::layout::table`]); `cells` has a place
/// for all that the policy keeps.
pub(crate) fn words(policy: &Policy, cells: &Cells) -> (usize, Vec<u64>) {
    let (map, table) = (policy.plan().map(), policy.plan().table());
    let asks = policy.mode() != Mode::Enforce;
    // What is passed on there depends on the VMM's own filter too.
    let filter = if asks || policy.spills() {
        Kind::Ask
    } else {
        Kind::Route
    };
    let fallback = |action: &ReadAction| match action {
        ReadAction::Deny => Kind::Route,
        _ if asks => Kind::Route,
        // Shadows of MSRs that no entry names have no place of their own.
        ReadAction::Shadow(_) => Kind::Ask,
        ReadAction::Allow => Kind::Fault(Some(FaultCause::NoRule)),
        action => read(action),
    };
    let fallback_write = |action: &WriteAction| match action {
        WriteAction::Deny => Kind::Route,
        _ if asks => Kind::Route,
        WriteAction::Shadow => Kind::Ask,
        WriteAction::Allow => Kind::Fault(Some(FaultCause::NoRule)),
        action => write(action),
    };
    let all = MsrRange::ALL;
    let mut words = Vec::new();
    let default = |kind, did| entry(all, kind, did, None, Log::None, 0);
    let (unknown, invalid) = (table.unknown(), table.invalid());
    // What the policy leaves to the kernel is in its filter only where the VMM's own denies it.
    let vmms = told(Disposition::Fault, Some(FaultCause::VmmFilter));
    words.extend(default(filter, vmms));
    words.extend(default(filter, vmms));
    for (reads, writes) in [unknown, invalid] {
        for (kind, did) in [(fallback(reads), reads.did()), (fallback_write(writes), writes.did())] {
            // What the policy leaves to the kernel the kernel has refused.
            let said = match kind {
                Kind::Route => told(Disposition::Fault, Some(FaultCause::KernelRefused)),
                _ => did as u64,
            };
            words.extend(default(kind, said));
        }
    }
    let mut reads = Vec::new();
    let mut writes = Vec::new();
    if matches!(filter, Kind::Route) {
        for Entry {
            range,
            action,
            rule,
            log,
            ..
        } in table.reads()
        {
            for (range, cell) in parts(cells, *range, matches!(action, ReadAction::Shadow(_))) {
                reads.push(entry(range, read(action), action.did() as u64, *rule, *log, cell));
            }
        }
        // Beside the VMM's filter a preset may not fit, and then it is an exit.
        for preset in policy.plan().presets() {
            let decision = map.reads().get(preset.msr);
            let did = decision.action.did() as u64;
            let range = MsrRange::single(preset.msr);
            reads.push(entry(
                range,
                Kind::Answer(preset.value),
                did,
                decision.rule,
                decision.log,
                0,
            ));
        }
        reads.sort_unstable_by_key(|entry| entry.first().map(|range| *range as u32));
        for Entry {
            range,
            action,
            rule,
            log,
            ..
        } in table.writes()
        {
            for (range, cell) in parts(cells, *range, *action == WriteAction::Shadow) {
                writes.push(entry(range, write(action), action.did() as u64, *rule, *log, cell));
            }
        }
    }
    words.extend([reads.len() as u64, writes.len() as u64]);
    words.extend(reads.into_iter().chain(writes).flatten());
    (cells.words(), words)
}

/// A range as a whole, or where it keeps a state the parts that lie together.
fn parts(cells: &Cells, range: MsrRange, keeps: bool) -> Vec<(MsrRange, u64)> {
    match keeps {
        false => vec![(range, 0)],
        true => cells.parts(range).map(|(part, cell)| (part, cell as u64)).collect(),
    }
}

/// What is not known here is asked for.
fn read(action: &ReadAction) -> Kind {
    match action {
        ReadAction::Deny => Kind::Fault(None),
        ReadAction::Value(value) => Kind::Answer(*value),
        ReadAction::Shadow(initial) => Kind::Load(*initial),
        _ => Kind::Ask,
    }
}

fn write(action: &WriteAction) -> Kind {
    match action {
        WriteAction::Deny => Kind::Fault(None),
        WriteAction::Ignore => Kind::Done,
        WriteAction::Shadow => Kind::Store,
        _ => Kind::Ask,
    }
}

fn entry(range: MsrRange, kind: Kind, did: u64, rule: Option<u32>, log: Log, cell: u64) -> [u64; table::ENTRY] {
    let (number, value) = match kind {
        Kind::Route => (table::ROUTE, 0),
        Kind::Answer(value) => (table::ANSWER, value),
        Kind::Done => (table::DONE, 0),
        Kind::Fault(_) => (table::FAULT, 0),
        Kind::Load(initial) => (table::LOAD, initial),
        Kind::Store => (table::STORE, 0),
        Kind::Ask => (table::ASK, 0),
    };
    let told = match kind {
        Kind::Fault(Some(why)) => told(Disposition::Fault, Some(why)),
        _ => did,
    };
    let mut words = [0; table::ENTRY];
    words[table::RANGE] = u64::from(range.first().0) | u64::from(range.last().0) << 32;
    words[table::KIND] = number | u64::from(rule.unwrap_or(u32::MAX)) << 32;
    words[table::VALUE] = value;
    words[table::TOLD] = told;
    words[table::LOG] = log_word(log);
    words[table::CELL] = cell;
    words
}

/// What was done and why, as an event has it.
pub(crate) fn told(did: Disposition, why: Option<FaultCause>) -> u64 {
    did as u64 | why.map_or(0, |why| why as u64 + 1) << 8
}

pub(crate) fn log_word(log: Log) -> u64 {
    match log {
        Log::None => 0,
        Log::All => 1,
        Log::First => 2,
        Log::PerSecond(most) => 3 | u64::from(most) << 32,
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Access, Answer, Disposition, Exit, Msr, MsrBackend, Op, Outcome, Reason, VcpuState};
    use msrgate_plan::{CompileOptions, Decision, DecisionMap, Intervals, Plan};
    use proptest::prelude::*;

    use super::*;

    /// Nothing is asked of the kernel where the answerer answers.
    struct Nobody;

    impl MsrBackend for Nobody {
        fn kernel_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
            panic!("the kernel is asked")
        }
        fn kernel_write(&mut self, _: Msr, _: u64) -> Result<(), FaultCause> {
            panic!("the kernel is asked")
        }
        fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
            panic!("the host is asked")
        }
        fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
            panic!("a handler is asked")
        }
        fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
            panic!("a handler is asked")
        }
    }

    /// What the answerer does with an entry, on a vCPU's cells.
    fn carried_out(words: &[u64], exit: Exit, cells: &mut [u64]) -> Option<(Outcome, u64)> {
        let (msr, write) = (exit.access.msr().0, usize::from(exit.access.op() == Op::Write));
        let entry = |at: usize| &words[at..at + table::ENTRY];
        let default = match exit.reason {
            Reason::Filter => 0,
            Reason::Unknown => 2,
            Reason::Invalid => 4,
        };
        let mut found = entry(table::DEFAULTS + (default + write) * table::ENTRY);
        if exit.reason == Reason::Filter {
            let (reads, writes) = (words[table::COUNTS] as usize, words[table::COUNTS + 1] as usize);
            let numbers = if write == 1 { reads..reads + writes } else { 0..reads };
            let entries = numbers.map(|number| entry(table::ENTRIES + number * table::ENTRY));
            let mut covering = entries.filter(|entry| (entry[0] as u32..=(entry[0] >> 32) as u32).contains(&msr));
            found = covering.next().unwrap_or(found);
            assert!(covering.next().is_none(), "two entries cover {msr:#x}");
        }
        let cell = || 2 * (found[table::CELL] as usize + (msr - found[table::RANGE] as u32) as usize);
        let outcome = match (found[table::KIND] & 0xff, exit.access) {
            (table::ANSWER, Access::Read { .. }) => Outcome::Value(found[table::VALUE]),
            (table::DONE, Access::Write { .. }) => Outcome::Done,
            (table::FAULT, _) => Outcome::Fault,
            (table::LOAD, Access::Read { .. }) => match cells[cell()] {
                0 => Outcome::Value(found[table::VALUE]),
                _ => Outcome::Value(cells[cell() + 1]),
            },
            (table::STORE, Access::Write { value, .. }) => {
                cells[cell()..cell() + 2].copy_from_slice(&[1, value]);
                Outcome::Done
            }
            (table::ASK | table::ROUTE, _) => return None,
            (kind, access) => panic!("{kind} for {access:?}"),
        };
        Some((outcome, found[table::TOLD]))
    }

    fn reads() -> impl Strategy<Value = ReadAction> {
        prop_oneof![
            Just(ReadAction::Allow),
            Just(ReadAction::Deny),
            (0..3_u64).prop_map(ReadAction::Value),
            (0..3_u64).prop_map(ReadAction::Shadow),
            Just(ReadAction::Mask { keep: 1, set: 2 }),
        ]
    }

    fn writes() -> impl Strategy<Value = WriteAction> {
        prop_oneof![
            Just(WriteAction::Allow),
            Just(WriteAction::Deny),
            Just(WriteAction::Ignore),
            Just(WriteAction::Shadow),
            Just(WriteAction::Once),
        ]
    }

    proptest! {
        /// Where the answerer answers by itself, it answers as the policy's own table does.
        #[test]
        fn the_answerers_table_says_what_the_policys_says(
            parts in prop::collection::vec((0..30_u32, 1..8_u32, reads(), writes()), 1..5),
            unknown in (reads(), writes()),
            exits in prop::collection::vec((0..40_u32, any::<bool>(), 0..3_usize, 0..4_u64), 1..60),
        ) {
            let range = |first: u32, count: u32| MsrRange::new(Msr(first), Msr(first + count)).unwrap();
            let log = |action, rule: u32| Decision::of(action).by(rule);
            let map = DecisionMap::new(Intervals::first_match(
                    Decision::of(ReadAction::Allow),
                    parts.iter().zip(0..).map(|((first, count, read, _), rule)| (range(*first, *count), log(read.clone(), rule))),
                ), Intervals::first_match(
                    Decision::of(WriteAction::Allow),
                    parts.iter().zip(0..).map(|((first, count, _, write), rule)| {
                        (range(*first, *count), Decision::of(write.clone()).by(rule))
                    }),
                )).with_unknown(unknown);
            let policy = Policy::new(Plan::compile(&map).unwrap(), CompileOptions::default(), Mode::Enforce);
            let mut places = Cells::default();
            places.add(policy.plan().table());
            let (cells, words) = words(&policy, &places);
            let mut cells = vec![0; cells];
            let table = policy.plan().table();
            let mut state: VcpuState = table.vcpu_state();
            for (msr, write, reason, value) in exits {
                let msr = Msr(msr);
                let access = if write { Access::Write { msr, value } } else { Access::Read { msr } };
                let exit = Exit::new(access, [Reason::Filter, Reason::Unknown, Reason::Invalid][reason]);
                let Some((outcome, told)) = carried_out(&words, exit, &mut cells) else { continue };
                let answer: Answer = table.answer(exit, &mut state, &mut Nobody);
                prop_assert_eq!(outcome, answer.outcome, "{:?}", exit);
                prop_assert_eq!(told, super::told(answer.did, answer.why), "{:?}", exit);
            }
        }
    }

    #[test]
    fn the_answerers_numbers_are_these() {
        // As the image has them.
        assert_eq!(told(Disposition::Fault, Some(FaultCause::NoRule)), 12 | 1 << 8);
        assert_eq!(told(Disposition::Fault, Some(FaultCause::UnknownReason)), 12 | 2 << 8);
    }
}
