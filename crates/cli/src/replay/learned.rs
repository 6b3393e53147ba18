//! What is learned of a guest changes nothing for that guest, tried on random policies and guests.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use msrgate_core::{
    Disposition, Event, FaultCause, Msr, MsrRange, Nanos, Op, Outcome, ReadAction, Reason, WriteAction,
};
use msrgate_plan::Plan;
use msrgate_policy::Policy;
use msrgate_trace::learn::{Generalize, Learned, Summary};
use msrgate_trace::{Coverage, Header, VERSION, write_event};

use super::compare::Comparison;
use super::engine;
use super::machine::{AccessResult, Backend, Machine};

/// The first is one that no filter stops, the last two are none that the kernel knows.
const MSRS: [u32; 10] = [
    0x802,
    0x10,
    0x8b,
    0x174,
    0x175,
    0x176,
    0xc000_0080,
    0xc000_0103,
    0xdead_0000,
    0xdead_0001,
];
const VCPUS: u32 = 2;

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, count: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % count
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A policy of every action that needs no code of a VMM.
    fn policy(&mut self) -> Policy {
        loop {
            let mut text = format!(
                "version = 1\nname = \"random\"\ndefault = \"{}\"\n",
                self.of(&["allow", "deny"])
            );
            for key in ["unknown", "invalid"] {
                text += &format!("{key} = \"{}\"\n", self.of(&["kernel", "ignore", "deny"]));
            }
            for _ in 0..self.below(9) {
                let (first, count) = (self.of(&MSRS), self.of(&[0, 0, 1, 2]));
                let last = first + count;
                text += &format!("[[rule]]\nmsr = \"{first:#x}..={last:#x}\"\n");
                let mask = "{ mask = { keep = 0xff, set = 0x100 } }";
                let read = [
                    "\"allow\"",
                    "\"deny\"",
                    "\"zero\"",
                    "{ value = 7 }",
                    "{ shadow = 3 }",
                    "\"host\"",
                    mask,
                ];
                text += &format!("read = {}\n", self.of(&read));
                let write = [
                    "\"allow\"",
                    "\"deny\"",
                    "\"ignore\"",
                    "\"shadow\"",
                    "{ only = [1, 2] }",
                    "{ once = true }",
                    mask,
                ];
                text += &format!("write = {}\n", self.of(&write));
            }
            let policy = Policy::parse("random.toml", &text);
            // What contradicts itself, or needs more ranges than there are, is refused.
            if let Some(policy) = policy.ok().filter(|policy| plan(policy).is_ok()) {
                return policy;
            }
        }
    }

    /// What a guest does, and what its kernel gives it without a policy.
    fn guest(&mut self) -> Vec<Event> {
        let mut held = HashMap::new();
        let each = |t| {
            let (vcpu, msr, op) = (self.below(VCPUS.into()) as u32, Msr(self.of(&MSRS)), self.of(&Op::ALL));
            let written = self.below(5);
            let reason = match (msr.0, op, written) {
                (0xdead_0000.., ..) => Some(Reason::Unknown),
                (0xc000_0103, Op::Write, 4) => Some(Reason::Invalid),
                _ => None,
            };
            let register = held.entry((vcpu, msr)).or_insert(u64::from(msr.0) & 0xf);
            if op == Op::Write && reason.is_none() {
                *register = written;
            }
            Event {
                t: Nanos(t),
                vm: 0,
                vcpu,
                op,
                msr,
                value: match (op, reason) {
                    (Op::Write, _) => written,
                    (Op::Read, None) => *register,
                    (Op::Read, Some(_)) => 0,
                },
                reason,
                did: reason.map_or(Disposition::Allow, |_| Disposition::Fault),
                why: reason.map(|_| FaultCause::KernelRefused),
                would: None,
                rule: None,
                rip: None,
                within: None,
                cost: None,
            }
        };
        (0..200).map(each).collect()
    }
}

fn plan(policy: &Policy) -> Result<Arc<Plan>, String> {
    let map = policy.decision_map(None).map_err(|error| error.to_string())?;
    Plan::compile(&map).map(Arc::new).map_err(|error| error.to_string())
}

/// What each access gets on the engine.
fn run(events: &[Event], plan: Option<&Arc<Plan>>) -> Vec<AccessResult> {
    let mut vcpus: Vec<_> = (0..VCPUS).map(|_| engine::Guest::new(plan)).collect();
    let mut got = Vec::new();
    for event in events {
        vcpus[event.vcpu as usize]
            .run(std::slice::from_ref(event), &mut got)
            .unwrap();
    }
    got
}

/// What is written down of a guest under a policy.
fn recorded(event: &Event, got: &AccessResult) -> Event {
    let value = match (event.op, got.outcome) {
        (Op::Read, Outcome::Value(value)) => value,
        (Op::Read, _) => 0,
        (Op::Write, _) => event.value,
    };
    match got.answer {
        Some(answer) => Event {
            value,
            reason: Some(event.reason.unwrap_or(Reason::Filter)),
            did: answer.did,
            why: answer.why,
            rule: answer.rule,
            ..*event
        },
        None => Event { value, ..*event },
    }
}

/// What a run with `--learn` writes down: what is served once, and what faults each time.
fn first(events: &[Event]) -> Vec<Event> {
    let mut served = BTreeSet::new();
    let is_new = |event: &&Event| event.did.is_fault() || served.insert((event.msr, event.op));
    events.iter().filter(is_new).copied().collect()
}

/// The policy that is learned of a trace, and whether the trace says that it is all.
fn learned(events: &[Event], coverage: Coverage) -> (Policy, bool) {
    let header = Header {
        msrgate_trace: VERSION,
        coverage: Some(coverage),
        ..Header::default()
    };
    let mut text = Vec::new();
    header.write(&mut text).unwrap();
    events.iter().for_each(|event| write_event(event, &mut text).unwrap());
    let summary = Summary::read("random.jsonl", text.as_slice()).unwrap();
    let learned = Learned::from(&summary, &Generalize::default()).to_string();
    (Policy::parse("learned.toml", &learned).unwrap(), summary.is_complete())
}

/// How many accesses a policy changes for a guest.
fn changed(events: &[Event], policy: &Policy) -> u64 {
    let plan = plan(policy).unwrap();
    let mut seen = Comparison::new(Backend::Engine, policy.rules.clone());
    seen.next_trace(plan.map().clone(), plan.presets());
    let (plain, ruled) = (run(events, None), run(events, Some(&plan)));
    for ((event, plain), ruled) in events.iter().zip(plain).zip(ruled) {
        seen.add(event, [plain.outcome; 2], &ruled);
    }
    assert_eq!(seen.accesses(), events.len() as u64);
    seen.changed()
}

#[test]
fn what_is_learned_of_a_guest_changes_nothing_for_it_and_denies_nothing_that_it_was_served() {
    let mut random = Random(12);
    let mut kinds = BTreeSet::new();
    for number in 0..200 {
        let (policy, guest) = (random.policy(), random.guest());
        let ruled = run(&guest, Some(&plan(&policy).unwrap()));
        let whole: Vec<Event> = guest
            .iter()
            .zip(&ruled)
            .map(|(event, got)| recorded(event, got))
            .collect();
        kinds.extend(whole.iter().map(|event| event.did.name()));
        let context = |learned: &Policy| format!("{number}: {:#?}\nlearned: {:#?}", policy.rules, learned.rules);

        let (of_whole, complete) = learned(&whole, Coverage::All);
        assert!(complete);
        assert_eq!(changed(&whole, &of_whole), 0, "{}", context(&of_whole));

        let (of_first, complete) = learned(&first(&guest), Coverage::First);
        assert!(complete);
        assert_eq!(changed(&guest, &of_first), 0, "{}", context(&of_first));

        let decided: Vec<Event> = whole
            .iter()
            .filter(|event| event.did != Disposition::Allow)
            .copied()
            .collect();
        let (of_decided, complete) = learned(&decided, Coverage::Decided);
        assert!(!complete, "what is missing would be denied");
        let map = of_decided.decision_map(None).unwrap();
        for event in decided.iter().filter(|event| !event.did.is_fault()) {
            let denied = match event.op {
                Op::Read => map.reads().get(event.msr).action == ReadAction::Deny,
                Op::Write => map.writes().get(event.msr).action == WriteAction::Deny,
            };
            let unfiltered = MsrRange::X2APIC.contains(event.msr);
            assert!(!denied || unfiltered, "{event:?}\n{}", context(&of_decided));
        }
    }
    for kind in Disposition::ALL.map(Disposition::name) {
        let cannot = ["pass", "handler", "host"].contains(&kind);
        assert_eq!(kinds.contains(kind), !cannot, "{kind} of {kinds:?}");
    }
}
