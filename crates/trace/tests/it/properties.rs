//! What holds for every trace and all that is learned, tried on random ones.

use std::collections::BTreeSet;

use msrgate_core::{
    Disposition, Event, FaultCause, Gap, Msr, MsrRange, Nanos, Op, ReadAction, Reason, Within, WriteAction,
};
use msrgate_plan::DecisionMap;
use msrgate_policy::Policy;
use msrgate_trace::learn::{Baseline, Change, Generalize, Kind, Learned, Summary};
use msrgate_trace::{Header, Lines, Record, write_event, write_gap};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Any text; proptest's own leaves control characters out.
fn text() -> impl Strategy<Value = String> {
    "(?s).{0,40}"
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), any::<u64>()]
}

fn event() -> impl Strategy<Value = Event> {
    let dids = [
        "allow", "deny", "zero", "value", "shadow", "mask", "host", "handler", "ignore", "only", "once", "pass",
        "fault",
    ];
    let dids = dids.map(|name| Disposition::from_name(name).expect(name));
    let whys = [
        "no-rule",
        "unknown-reason",
        "kernel-refused",
        "host-unreadable",
        "bits-locked",
        "value-not-listed",
        "vmm-filter",
    ];
    let whys = whys.map(|name| FaultCause::from_name(name).expect(name));
    let access = (select(Op::ALL.to_vec()), any::<u32>(), value());
    let answer = (
        select(dids.to_vec()),
        option::of(select(whys.to_vec())),
        option::of(select(dids.to_vec())),
        option::of(any::<u32>()),
    );
    let from = (any::<u64>(), any::<u32>(), any::<u32>());
    let known = (option::of(any::<u64>()), option::of(any::<u64>()));
    let kernels = (
        option::of(select(Reason::ALL.to_vec())),
        option::of(select(Within::ALL.to_vec())),
    );
    (access, answer, from, known, kernels).prop_map(
        |((op, msr, value), (did, why, would, rule), (t, vm, vcpu), (rip, cost), (reason, within))| Event {
            t: Nanos(t),
            vm,
            vcpu,
            op,
            msr: Msr(msr),
            value,
            reason,
            did,
            why,
            would,
            rule,
            rip,
            within,
            cost: cost.map(Nanos),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_trace_reads_back_as_it_was_written(
        records in vec(record(), 0..20),
        guest in option::of(text()),
        policy in option::of("[0-9a-f]{64}"),
    ) {
        let header = Header { msrgate_trace: 1, guest, policy, ..Header::default() };
        let mut text = Vec::new();
        header.write(&mut text).expect("memory");
        write_records(&records, &mut text);
        let lines = Lines::new(text.as_slice()).expect("a header");
        prop_assert_eq!(lines.header(), &header);
        let again: Result<Vec<Record>, _> = lines.collect();
        prop_assert_eq!(again.expect("records"), records);
    }

    #[test]
    fn a_log_of_any_lines_ends_in_an_error_or_in_records(
        parts in vec(
            prop_oneof![
                Just("ignored rdmsr: 0x"), Just("Unhandled WRMSR("), Just("0xc0010115) = 0x0"), Just(" data 0x"), Just("\n"),
                Just("> "), Just("kvm [100]: "), Just("vcpu3, guest rIP: 0x"), Just("kvm_get_msr_common: "),
                Just(" callbacks suppressed"), Just("18446744073709551615"), Just("Nov 21 23:59:60 "), Just("00:00:01"),
                Just("[18446744073709.000001] "), Just("[    0.000001] "), Just("\u{e9}"), Just("["), Just("]"),
                Just("general protection fault"), Just("Code: "), Just("<0f> 30"), Just("RIP: native_read_msr"), Just("RAX: "),
                Just("RCX: "), Just("RDX - "), Just("unsupported wrmsr "), Just("1a0 <-("), Just(":"), Just("MSR"), Just("read 10h"),
                Just("hv crash ("), Just("0xffffffffc0000096"), Just(" "),
            ],
            0..60,
        ),
    ) {
        let text = format!("[    0.000000] x\n{}", parts.concat());
        if let Ok(lines) = Lines::new(text.as_bytes()) {
            for record in lines {
                if let Err(error) = record {
                    prop_assert!(error.line != 1, "{}", error);
                }
            }
        }
    }

    #[test]
    fn a_damaged_trace_ends_in_an_error_or_in_other_records(
        records in vec(record(), 1..4),
        damage in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut text = b"{\"msrgate_trace\":1}\n".to_vec();
        write_records(&records, &mut text);
        for (place, byte) in damage {
            let place = place.index(text.len());
            text[place] = byte;
        }
        if let Ok(lines) = Lines::new(text.as_slice()) {
            prop_assert!(lines.count() <= text.len());
        }
    }
}

proptest! {
    // Each takes several policies from their text.
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn summaries_merge_to_the_same_in_every_order_and_grouping(
        traces in vec(vec(few_msrs(), 0..40), 3),
        lost in vec(prop_oneof![Just(0), any::<u64>()], 3),
    ) {
        let [a, b, c] = [0, 1, 2].map(|number| Summary {
            lost: lost[number],
            ..summary(&format!("{number}.jsonl"), &traces[number])
        });
        let merged = |parts: &[&Summary]| {
            let mut sum = Summary::default();
            parts.iter().for_each(|part| sum.merge(part).expect("room"));
            sum
        };
        let (ab, bc) = (merged(&[&a, &b]), merged(&[&b, &c]));
        let all = merged(&[&ab, &c]);
        prop_assert_eq!(&all, &merged(&[&a, &bc]));
        prop_assert_eq!(&all, &merged(&[&c, &b, &a]));
        let bytes = written(&all);
        prop_assert_eq!(&Summary::read("all", bytes.as_slice()).expect("a summary"), &all);
        prop_assert_eq!(written(&merged(&[&c, &ab])), bytes);
        prop_assert_eq!(all.lost, lost.iter().fold(0, |sum: u64, lost| sum.saturating_add(*lost)));
        prop_assert_eq!(all.events, traces.iter().map(|events| events.len() as u64).sum::<u64>());
    }

    #[test]
    fn what_is_learned_serves_what_was_served_and_no_more_and_each_rule_is_needed(events in vec(few_msrs(), 1..40)) {
        let learned = Learned::from(&summary("one.jsonl", &events), &Generalize::default());
        let policy = Policy::parse("learned.toml", &learned.to_string()).expect("a policy");
        let map = policy.decision_map(None).expect("no condition");
        let served: BTreeSet<(Msr, Op)> = events
            .iter()
            .filter(|event| !event.did.is_fault() && !MsrRange::X2APIC.contains(event.msr))
            .map(|event| (event.msr, event.op))
            .collect();
        let denies = |map: &DecisionMap, (msr, op): (Msr, Op)| match op {
            Op::Read => map.reads().get(msr).action == ReadAction::Deny,
            Op::Write => map.writes().get(msr).action == WriteAction::Deny,
        };
        for event in &events {
            let key = (event.msr, event.op);
            prop_assert_eq!(denies(&map, key), !served.contains(&key), "{:?}", event);
        }
        for rule in 0..policy.rules.len() {
            let mut less = policy.clone();
            less.rules.remove(rule);
            let less = less.decision_map(None).expect("no condition");
            prop_assert!(served.iter().any(|key| denies(&less, *key)), "rule {} is not needed", rule);
        }
    }

    #[test]
    fn what_is_since_an_older_policy_is_all_that_differs(old in vec(few_msrs(), 0..30), new in vec(few_msrs(), 0..30)) {
        let (old, new) = (summary("old.jsonl", &old), summary("new.jsonl", &new));
        let map = |summary: &Summary| {
            let learned = Learned::from(summary, &Generalize::default());
            let policy = Policy::parse("learned.toml", &learned.to_string()).expect("a policy");
            (policy.decision_map(None).expect("no condition"), learned)
        };
        let ((before, _), (after, learned)) = (map(&old), map(&new));
        let changes = learned.since(&after, Baseline::Summary(&old, &before));
        for change in &changes {
            let key = (change.range.first(), change.op);
            let (then, now) = (old.seen.contains_key(&key), new.seen.contains_key(&key));
            let expected = match (then, now) {
                (false, true) => Kind::Added,
                (true, false) => Kind::Dropped,
                _ => Kind::Changed,
            };
            prop_assert_eq!(change.kind, expected, "{}", change);
        }
        for key in old.seen.keys().filter(|key| !new.seen.contains_key(key)) {
            let is_told = |change: &Change| change.op == key.1 && change.range.contains(key.0);
            prop_assert!(changes.iter().any(|change| change.kind == Kind::Dropped && is_told(change)));
        }
        prop_assert_eq!(map(&old).1.since(&before, Baseline::Summary(&old, &before)), []);
    }
}

/// Events of a few MSRs, so that they meet.
fn few_msrs() -> impl Strategy<Value = Event> {
    let msrs = select(vec![
        0x10,
        0x174,
        0x175,
        0x176,
        0x200,
        0x201,
        0x202,
        0x802,
        0xc000_0080,
        0xdead_0000,
    ]);
    (event(), msrs, 0..3_u64).prop_map(|(event, msr, value)| Event {
        msr: Msr(msr),
        value,
        ..event
    })
}

/// An event or a gap.
fn record() -> impl Strategy<Value = Record> {
    let gap = (any::<u64>(), any::<u32>(), any::<u32>(), 1..=u64::MAX);
    prop_oneof![
        event().prop_map(Record::Event),
        gap.prop_map(|(t, vm, vcpu, events)| Record::Gap(Gap {
            t: Nanos(t),
            vm,
            vcpu,
            events
        })),
    ]
}

fn write_records(records: &[Record], to: &mut Vec<u8>) {
    for record in records {
        match record {
            Record::Event(event) => write_event(event, to),
            Record::Gap(gap) => write_gap(gap, to),
        }
        .expect("memory");
    }
}

fn summary(name: &str, events: &[Event]) -> Summary {
    let mut text = b"{\"msrgate_trace\":1}\n".to_vec();
    for event in events {
        write_event(event, &mut text).expect("memory");
    }
    Summary::read(name, text.as_slice()).expect("a trace")
}

fn written(summary: &Summary) -> Vec<u8> {
    let mut bytes = Vec::new();
    summary.write(&mut bytes).expect("memory");
    bytes
}
