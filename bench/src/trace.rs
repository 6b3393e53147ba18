//! `trace`: reading, writing and learning, beside `serde_json` in the obvious way.

use std::hint::black_box;
use std::io::{self, BufRead, Write};

use msrgate_core::{Disposition, Event, Msr, Nanos, Op, Reason};
use msrgate_trace::learn::Summary;
use msrgate_trace::report::Report;
use msrgate_trace::{Header, Lines, Record, VERSION, write_event};
use serde::{Deserialize, Serialize};

use crate::figure::{Aim, Figure};
use crate::rounds::{nanoseconds, rounds};
use crate::{Effort, Measured};

/// Nanoseconds of an event where there are a million a second.
const MILLION: f64 = 1000.0;
const THIRD: f64 = 1.0 / 3.0;

pub(crate) fn measure(effort: Effort) -> Measured {
    let count = effort.of(200_000, 2_000);
    let events = events(count);
    let mut text = Vec::new();
    write(&events, &mut text).map_err(|error| error.to_string())?;
    if read(&text)? != events.len() || read_obvious(&text)? != events.len() {
        return Err("the events that were read are not those that were written"
            .to_owned()
            .into());
    }
    let turns = effort.of(12, 1);
    let reading = |_: &mut ()| nanoseconds(count, || read(black_box(&text)).map(drop));
    let writing = |_: &mut ()| nanoseconds(count, || write(black_box(&events), &mut Vec::with_capacity(text.len())));
    let learning = |_: &mut ()| nanoseconds(count, || Summary::read("bench", black_box(text.as_slice())).map(drop));
    let reporting = |_: &mut ()| nanoseconds(count, || reported(black_box(&text)).map(drop));
    let obvious_reading = |_: &mut ()| nanoseconds(count, || read_obvious(black_box(&text)).map(drop));
    let obvious_writing = |_: &mut ()| {
        nanoseconds(count, || {
            write_obvious(black_box(&events), &mut Vec::with_capacity(text.len()))
        })
    };
    let [reading, obvious_reading, writing, obvious_writing, learning, reporting] = rounds(
        turns,
        &mut (),
        [
            &reading,
            &obvious_reading,
            &writing,
            &obvious_writing,
            &learning,
            &reporting,
        ],
    )?
    .map(|costs| costs.least());
    Ok(vec![
        Figure::new("an event read", "ns", reading)
            .beside("serde_json", obvious_reading)
            .aim(Aim::Ratio(THIRD)),
        Figure::new("an event written", "ns", writing)
            .beside("serde_json", obvious_writing)
            .aim(Aim::Ratio(THIRD)),
        Figure::new("an event read and learned", "ns", learning)
            .beside("serde_json, read alone", obvious_reading)
            .aim(Aim::Ours(MILLION)),
        Figure::new("an event read and reported", "ns", reporting)
            .beside("serde_json, read alone", obvious_reading)
            .aim(Aim::Ours(MILLION)),
    ])
}

/// What Linux asks for, again and again, on two vCPUs.
fn events(count: usize) -> Vec<Event> {
    const MSRS: [u32; 12] = [
        0x6e0,
        0x6e0,
        0x6e0,
        0x6e0,
        0x1b,
        0x10,
        0x8b,
        0xc000_0080,
        0xc000_0103,
        0x4b56_4d01,
        0x277,
        0xc001_1029,
    ];
    let event = |number: usize| {
        let place = number.wrapping_mul(0x9e37_79b1) >> 7;
        let op = if place & 64 == 0 { Op::Read } else { Op::Write };
        let (did, reason, rule) = match place & 7 {
            0 => (Disposition::Allow, None, None),
            1 => (Disposition::Value, Some(Reason::Filter), Some(3)),
            _ => (Disposition::Pass, Some(Reason::Filter), None),
        };
        Event {
            t: Nanos(1_413_334_420 + number as u64 * 1234),
            vm: 0,
            vcpu: place as u32 & 1,
            op,
            msr: Msr(MSRS.get(place % MSRS.len()).copied().unwrap_or(0)),
            value: (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (place % 64),
            reason,
            did,
            why: None,
            would: None,
            rule,
            rip: Some(0xffff_ffff_8100_0000 + (place as u64 & 0xfff0)),
            within: None,
            cost: reason.map(|_| Nanos(place as u64 & 0xfff)),
        }
    };
    (0..count).map(event).collect()
}

fn write(events: &[Event], to: &mut impl Write) -> io::Result<()> {
    let header = Header {
        msrgate_trace: VERSION,
        ..Header::default()
    };
    header.write(to)?;
    events.iter().try_for_each(|event| write_event(event, to))
}

fn read(text: &[u8]) -> Result<usize, String> {
    let lines = Lines::new(text).map_err(|error| error.to_string())?;
    let mut count = 0;
    for record in lines {
        black_box(record.map_err(|error| error.to_string())?);
        count += 1;
    }
    Ok(count)
}

fn reported(text: &[u8]) -> Result<Report, String> {
    let lines = Lines::new(text).map_err(|error| error.to_string())?;
    let mut report = Report::default();
    report.begin(lines.header().clone());
    for record in lines {
        match record.map_err(|error| error.to_string())? {
            Record::Event(event) => report.add(&event),
            Record::Gap(gap) => return Err(format!("{gap:?}, and there was none")),
        }
    }
    Ok(report)
}

/// An event as one would write it down for serde_json.
#[derive(Serialize, Deserialize)]
struct Obvious {
    t: u64,
    vm: u32,
    vcpu: u32,
    op: String,
    msr: String,
    value: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    did: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rip: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost: Option<u64>,
}

impl Obvious {
    fn of(event: &Event) -> Obvious {
        Obvious {
            t: event.t.0,
            vm: event.vm,
            vcpu: event.vcpu,
            op: event.op.to_string(),
            msr: event.msr.to_string(),
            value: format!("{:#x}", event.value),
            reason: event.reason.map(|reason| reason.to_string()),
            did: event.did.to_string(),
            rule: event.rule,
            rip: event.rip.map(|rip| format!("{rip:#x}")),
            cost: event.cost.map(|cost| cost.0),
        }
    }

    /// The number that a text of it holds.
    fn number(text: &str) -> Option<u64> {
        u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
    }
}

fn read_obvious(text: &[u8]) -> Result<usize, String> {
    let mut count = 0;
    for line in text.lines().skip(1) {
        let line = line.map_err(|error| error.to_string())?;
        let event: Obvious = serde_json::from_str(&line).map_err(|error| error.to_string())?;
        let numbers = (Obvious::number(&event.msr), Obvious::number(&event.value));
        black_box((event, numbers));
        count += 1;
    }
    Ok(count)
}

fn write_obvious(events: &[Event], to: &mut impl Write) -> io::Result<()> {
    for event in events {
        serde_json::to_writer(&mut *to, &Obvious::of(event))?;
        to.write_all(b"\n")?;
    }
    Ok(())
}
