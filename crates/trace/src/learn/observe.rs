//! A trace, event by event, or a summary of traces.

use std::collections::{HashMap, HashSet};
use std::io::{self, BufRead, Read};

use msrgate_core::{Disposition, Event, Gap, Msr, MsrRange, Nanos, Op};

use super::summary::{self, LONGEST, LearnError, Summary, Usage};
use crate::{Lines, Record};

/// How many shadow registers, of all vCPUs together, a trace may tell of.
const SHADOWS: usize = 1 << 20;

/// Counts the events of one trace.
#[derive(Default)]
pub(super) struct Observer {
    /// Counts alone; what was served is put into it at the end.
    summary: Summary,
    served: HashMap<(Msr, Op), Served>,
    /// The shadow registers that were written, by VM, vCPU and MSR.
    written: HashSet<(u32, u32, Msr)>,
    /// The smallest time: vCPUs may be written down out of order.
    start: Option<Nanos>,
}

/// As [`Usage`], in a form that an event is quickly added to.
#[derive(Default)]
struct Served {
    did: [u64; Disposition::ALL.len()],
    values: Usage,
    first: Nanos,
    last: Nanos,
}

impl Observer {
    pub(super) fn see(&mut self, event: &Event) -> Result<(), LearnError> {
        self.summary.events += 1;
        self.start = Some(self.start.map_or(event.t, |start| start.min(event.t)));
        let key = (event.msr, event.op);
        if MsrRange::X2APIC.contains(event.msr) {
            self.summary.unfiltered += 1;
            return Ok(());
        }
        if event.did.is_fault() {
            self.summary.faults += 1;
            self.summary.fault(key, 1);
            return Ok(());
        }
        let served = self.served.entry(key).or_insert_with(|| Served {
            first: event.t,
            ..Served::default()
        });
        if let Some(count) = served.did.get_mut(event.did as usize) {
            *count += 1;
        }
        served.first = served.first.min(event.t);
        served.last = served.last.max(event.t);
        let shadow = (event.vm, event.vcpu, event.msr);
        match (event.did, event.op) {
            (Disposition::Value | Disposition::Only, _) => served.values.values.insert(event.value),
            (Disposition::Shadow, Op::Read) if !self.written.contains(&shadow) => {
                served.values.values.insert(event.value)
            }
            (Disposition::Shadow, Op::Write) => _ = self.written.insert(shadow),
            _ => {}
        }
        if self.written.len() > SHADOWS {
            return Err(LearnError::whole(format!(
                "more than {SHADOWS} shadow registers of vCPUs were written"
            )));
        }
        summary::check_size(self.served.len())
    }

    pub(super) fn miss(&mut self, gap: &Gap) {
        self.summary.lost = self.summary.lost.saturating_add(gap.events);
    }

    pub(super) fn finish(mut self, name: &str) -> Result<Summary, LearnError> {
        let start = self.start.unwrap_or_default();
        let mut summary = std::mem::take(&mut self.summary);
        summary.traces = 1;
        summary.names.insert(name.to_owned());
        for (key, served) in self.served {
            let mut seen = Usage {
                traces: 1,
                first: served.first.0.saturating_sub(start.0),
                last: served.last.0.saturating_sub(start.0),
                ..served.values
            };
            let counts = Disposition::ALL.into_iter().zip(served.did);
            seen.did.extend(counts.filter(|(_, count)| *count > 0));
            seen.names.insert(name.to_owned());
            summary.seen.insert(key, seen);
        }
        Ok(summary)
    }
}

impl Summary {
    /// Reads a trace, or a summary that was written before; they are told apart by their first line. `name` is what the
    /// trace is called in reasons.
    pub fn read(name: &str, mut from: impl BufRead) -> Result<Summary, LearnError> {
        let mut head = Vec::new();
        while head.trim_ascii().is_empty() {
            let before = head.len();
            let mut limited = Read::take(&mut from, LONGEST.saturating_sub(before as u64));
            limited.read_until(b'\n', &mut head).map_err(LearnError::io)?;
            if head.len() == before {
                break;
            }
        }
        let is_summary = head
            .trim_ascii_start()
            .strip_prefix(b"{")
            .is_some_and(|rest| rest.trim_ascii_start().starts_with(b"\"msrgate_summary\""));
        let whole = io::Cursor::new(head).chain(from);
        if is_summary {
            Summary::read_rows(whole)
        } else {
            let lines = Lines::new(whole)?;
            let mut observer = Observer::default();
            let header = lines.header();
            observer.summary.partial = header.is_partial().into();
            observer.summary.ignoring = (header.ignore_msrs == Some(true)).into();
            for record in lines {
                match record? {
                    Record::Event(event) => observer.see(&event)?,
                    Record::Gap(gap) => observer.miss(&gap),
                }
            }
            observer.finish(name)
        }
    }
}
