//! Events, and what was done with an access, as words of a board.

use msrgate_core::{Did, Event, Log, Msr, Op, Reason, Why};

use super::EVENT;

/// What was done and why, as one word.
pub(super) fn encode_answer(event: &Event) -> u64 {
    let why = event.why.map_or(0, |why| why as u64 + 1);
    let reason = event.reason.map_or(0, |reason| reason as u64);
    event.did as u64 | why << 8 | reason << 16
}

pub(super) fn decode_answer(bits: u64) -> (Did, Option<Why>, Option<Reason>) {
    let did = Did::ALL.get((bits & 0xff) as usize).copied().unwrap_or(Did::Fault);
    let why = (bits >> 8 & 0xff).checked_sub(1);
    let why = why.and_then(|why| Why::ALL.get(why as usize).copied());
    (did, why, Reason::from_bits((bits >> 16 & 0xff) as u32))
}

pub(super) fn encode(event: &Event, log: Log) -> [u64; EVENT] {
    let (kind, per_second) = match log {
        Log::None => (0, 0),
        Log::All => (1, 0),
        Log::First => (2, 0),
        Log::PerSecond(n) => (3, n),
    };
    let op = (event.op == Op::Write) as u64;
    let rip = u64::from(event.rip.is_some());
    let cost = u64::from(event.cost.is_some());
    [
        event.t,
        event.value,
        event.rip.unwrap_or(0),
        u64::from(event.msr.0) | u64::from(event.vm) << 32,
        u64::from(event.vcpu) | u64::from(event.rule.unwrap_or(u32::MAX)) << 32,
        encode_answer(event) | op << 24 | rip << 32 | cost << 33,
        kind | u64::from(per_second) << 32,
        event.cost.unwrap_or(0),
    ]
}

/// Whatever the words are, they are some event.
pub(super) fn decode(words: [u64; EVENT]) -> (Event, Log) {
    let [t, value, rip, msr_vm, vcpu_rule, bits, log, cost] = words;
    let high = |word: u64| (word >> 32) as u32;
    let (did, why, reason) = decode_answer(bits);
    let event = Event {
        t,
        vm: high(msr_vm),
        vcpu: vcpu_rule as u32,
        op: if bits >> 24 & 1 == 0 { Op::Read } else { Op::Write },
        msr: Msr(msr_vm as u32),
        value,
        reason,
        did,
        why,
        rule: Some(high(vcpu_rule)).filter(|rule| *rule != u32::MAX),
        rip: (bits >> 32 & 1 == 1).then_some(rip),
        cost: (bits >> 33 & 1 == 1).then_some(cost),
    };
    let log = match log & 3 {
        0 => Log::None,
        1 => Log::All,
        2 => Log::First,
        _ => Log::PerSecond(high(log)),
    };
    (event, log)
}
