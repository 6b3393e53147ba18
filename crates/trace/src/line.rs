//! An event or a gap as JSON may spell it; `canonical` is the quick way for what this crate has written.

use std::borrow::Cow;

use msrgate_core::{Disposition, Event, FaultCause, Gap, Msr, Nanos, Op, Reason, Within};
use msrgate_msrs::number;
use serde::Deserialize;

/// What a line of a trace says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// An access.
    Event(Event),
    /// Accesses are missing here, never 0: the trace is not all that the guest did.
    Gap(Gap),
}

/// A number that stands as a text (`"0x8b"`) or as itself.
#[derive(Deserialize)]
#[serde(untagged, expecting = "neither a number of 64 bits nor a string")]
enum Number<'a> {
    #[serde(borrow)]
    Text(Cow<'a, str>),
    Number(u64),
}

impl Number<'_> {
    fn get(&self, key: &str) -> Result<u64, String> {
        match self {
            Number::Number(number) => Ok(*number),
            Number::Text(text) => number::parse(text).map_err(|_| format!("`{key}` is not a 64-bit number: `{text}`")),
        }
    }
}

/// An event or a gap as its line spells it.
#[derive(Deserialize)]
#[serde(expecting = "an event or a gap")]
pub(crate) struct Line<'a> {
    #[serde(default)]
    t: u64,
    #[serde(default)]
    vm: u32,
    #[serde(default)]
    vcpu: u32,
    #[serde(borrow, default)]
    op: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    msr: Option<Number<'a>>,
    #[serde(borrow, default)]
    value: Option<Number<'a>>,
    #[serde(borrow, default)]
    reason: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    did: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    why: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    would: Option<Cow<'a, str>>,
    #[serde(default)]
    rule: Option<u32>,
    #[serde(borrow, default)]
    rip: Option<Number<'a>>,
    #[serde(borrow, default, rename = "in")]
    within: Option<Cow<'a, str>>,
    #[serde(default)]
    cost: Option<u64>,
    #[serde(default)]
    lost: Option<u64>,
    #[serde(borrow, default)]
    policy: Option<Cow<'a, str>>,
}

impl Line<'_> {
    /// `None` where the line says of which policy is in force from there on.
    pub(crate) fn record(&self) -> Result<Option<Record>, String> {
        match (&self.op, self.lost) {
            (Some(op), None) => self.event(op).map(|event| Some(Record::Event(event))),
            (None, Some(0)) => Err("`lost` is 0, and a gap has lost events".to_owned()),
            (None, Some(events)) => Ok(Some(Record::Gap(Gap {
                t: Nanos(self.t),
                vm: self.vm,
                vcpu: self.vcpu,
                events,
            }))),
            (None, None) if self.policy.is_some() => Ok(None),
            (Some(_), Some(_)) => Err("`op` and `lost` are on one line: is it an event or a gap?".to_owned()),
            (None, None) => Err("this is not an event: it has neither `op` nor, as a gap has, `lost`".to_owned()),
        }
    }

    fn event(&self, op: &str) -> Result<Event, String> {
        let op = match op {
            "rdmsr" => Op::Read,
            "wrmsr" => Op::Write,
            other => return Err(format!("`op` is `{other}`, neither `rdmsr` nor `wrmsr`")),
        };
        let Some(msr) = &self.msr else {
            return Err("an event has no `msr`".to_owned());
        };
        let index = msr.get("msr")?;
        let msr = u32::try_from(index).map_err(|_| format!("`msr` is {index:#x}, and an index has 32 bits"))?;
        let value = match (&self.value, op) {
            (Some(value), _) => value.get("value")?,
            (None, Op::Read) => 0,
            (None, Op::Write) => return Err("a `wrmsr` has no `value`".to_owned()),
        };
        let word = |text: &Option<Cow<'_, str>>, key: &str| match text {
            Some(text) => Err(format!("`{key}` is `{text}`, which is not known here")),
            None => Ok(()),
        };
        let reason = match &self.reason {
            Some(text) => Reason::ALL.into_iter().find(|reason| reason.name() == text.as_ref()),
            None => None,
        };
        if reason.is_none() {
            word(&self.reason, "reason")?;
        }
        let did = self.did.as_ref().and_then(|did| Disposition::from_name(did));
        if did.is_none() {
            word(&self.did, "did")?;
        }
        let why = self.why.as_ref().and_then(|why| FaultCause::from_name(why));
        if why.is_none() {
            word(&self.why, "why")?;
        }
        let would = self.would.as_ref().and_then(|would| Disposition::from_name(would));
        if would.is_none() {
            word(&self.would, "would")?;
        }
        let known = |text: &Cow<'_, str>| Within::ALL.into_iter().find(|within| within.name() == text.as_ref());
        let within = self.within.as_ref().and_then(known);
        if within.is_none() {
            word(&self.within, "in")?;
        }
        let rip = self.rip.as_ref().map(|rip| rip.get("rip")).transpose()?;
        Ok(Event {
            t: Nanos(self.t),
            vm: self.vm,
            vcpu: self.vcpu,
            op,
            msr: Msr(msr),
            value,
            reason,
            did: did.unwrap_or(Disposition::Allow),
            why,
            would,
            rule: self.rule,
            rip,
            within,
            cost: self.cost.map(Nanos),
        })
    }
}
