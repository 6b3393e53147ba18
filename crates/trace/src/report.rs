//! What traces tell, added up: who asked for what, how often, when, and what it got.
//!
//! ```
//! use msrgate_trace::report::Report;
//! use msrgate_trace::{Lines, Record};
//!
//! let text = "{\"msrgate_trace\":1}\n\
//!             {\"t\":5,\"op\":\"rdmsr\",\"msr\":\"0x8b\",\"value\":\"0x1\",\"did\":\"value\",\"rule\":2}\n";
//! let mut report = Report::default();
//! let lines = Lines::new(text.as_bytes())?;
//! report.begin(lines.header().clone());
//! for record in lines {
//!     match record? {
//!         Record::Event(event) => report.add(&event),
//!         Record::Gap(gap) => report.add_gap(&gap),
//!     }
//! }
//! let row = report.rows().next().expect("a row");
//! assert_eq!((row.msr.0, row.count, row.values.each()), (0x8b, 1, &[(1, 1)][..]));
//! # Ok::<(), msrgate_trace::TraceError>(())
//! ```
//!
//! However long the traces are, the report has bounds: [`MOST_ROWS`] MSRs and directions, [`MOST_VCPUS`] vCPUs, so many
//! different values and instruction pointers of each, and [`MOST_BUCKETS`] stretches of time. What there is no room for
//! is counted and left out by name only.
//!
//! Events need not be in the order of time: times are from the earliest event of a trace on, wherever it stands.

mod counts;
mod timeline;

use std::collections::HashMap;

use msrgate_core::{Disposition, Event, FaultCause, Gap, Msr, Nanos, Op, Reason, Within};

pub use self::counts::Counts;
pub use self::timeline::Timeline;
use crate::Header;

/// How many MSRs and directions have a row of their own: more than the windows of all processors hold.
pub const MOST_ROWS: usize = 1 << 15;
/// How many vCPUs, of all traces together, are told apart; of those with gaps likewise.
pub const MOST_VCPUS: usize = 256;
/// How many stretches the time is cut into.
pub const MOST_BUCKETS: usize = 128;
/// How many stretches the time of one row or vCPU is cut into.
const FEW_BUCKETS: usize = 64;

/// What an access got, roughly.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// What the kernel's own register gave or took: `allow`, and `pass`, which is how it is recorded from user space.
    Allowed,
    /// Something that the policy put in its place.
    Emulated,
    /// #GP.
    Faulted,
}

impl Kind {
    /// All three, each at the place of its number.
    pub const ALL: [Kind; 3] = [Kind::Allowed, Kind::Emulated, Kind::Faulted];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Allowed => "allowed",
            Kind::Emulated => "emulated",
            Kind::Faulted => "faulted",
        }
    }

    /// The kind of what was done.
    pub const fn of(did: Disposition) -> Kind {
        match did {
            _ if did.is_fault() => Kind::Faulted,
            _ if did.is_kernels() => Kind::Allowed,
            _ => Kind::Emulated,
        }
    }
}

/// A time in one of the traces.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment {
    /// Which trace, from 0.
    pub trace: u32,
    /// Nanoseconds from the earliest event of the trace on.
    pub t: u64,
}

/// What accesses got, and what said so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Got {
    /// What was done.
    pub did: Disposition,
    /// Why it faulted where the policy does not say `deny`.
    pub why: Option<FaultCause>,
    /// Why the kernel handed it to user space; `None` where it did not.
    pub reason: Option<Reason>,
    /// What the policy would do, where the guest ran beside it.
    pub would: Option<Disposition>,
    /// Where the accesses were made, if not in the vCPU's own guest.
    pub within: Option<Within>,
    /// The number of the rule, in the policy that the guest ran under or beside.
    pub rule: Option<u32>,
}

/// How long accesses took between the guest's exit and the answer, as far as the traces tell.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cost {
    /// Of how many accesses they tell.
    pub count: u64,
    /// How long all of these took, in nanoseconds.
    pub sum: u64,
    /// How long the slowest took, in nanoseconds.
    pub most: u64,
}

impl Cost {
    fn add(&mut self, cost: Option<Nanos>) {
        let Some(Nanos(cost)) = cost else {
            return;
        };
        self.count += 1;
        self.sum = self.sum.saturating_add(cost);
        self.most = self.most.max(cost);
    }

    /// Nanoseconds of one access; `None` where the traces tell of none.
    pub fn mean(&self) -> Option<u64> {
        self.sum.checked_div(self.count)
    }
}

/// One of the traces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// What it says of itself.
    pub header: Header,
    /// How many events it has.
    pub events: u64,
    /// How many events are missing from it, as far as it tells.
    pub lost: u64,
    /// The earliest of its events, on its own clock.
    earliest: u64,
    /// The latest.
    latest: u64,
    /// The one that stands first: when it comes, nobody knows yet which is the earliest. Timelines are laid over each
    /// other from it on.
    anchor: u64,
}

impl Trace {
    /// Nanoseconds from its earliest event to its latest.
    pub fn duration(&self) -> u64 {
        self.since_start(self.latest)
    }

    /// A time on the trace's clock, from its earliest event on; 0 for a gap before that.
    fn since_start(&self, t: u64) -> u64 {
        t.saturating_sub(self.earliest)
    }
}

/// The events of one vCPU that are missing from a trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lost {
    /// Which trace, from 0.
    pub trace: u32,
    /// Which VM of the process.
    pub vm: u32,
    /// Which vCPU of the VM.
    pub vcpu: u32,
    /// How many are missing.
    pub events: u64,
    /// When the first gap is, in nanoseconds from the earliest event of the trace on; 0 for one before that.
    pub first: u64,
    /// When the last gap is, likewise.
    pub last: u64,
}

/// A vCPU of one of the traces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vcpu {
    /// Which trace, from 0.
    pub trace: u32,
    /// Which VM of the process.
    pub vm: u32,
    /// Which vCPU of the VM.
    pub vcpu: u32,
    /// How many accesses it made.
    pub count: u64,
    /// When.
    pub timeline: Timeline<1>,
}

/// All accesses to one MSR in one direction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The register.
    pub msr: Msr,
    /// The direction.
    pub op: Op,
    /// How many.
    pub count: u64,
    /// How many of each [`Kind`].
    pub kinds: [u64; 3],
    /// How many left the kernel for user space.
    pub exits: u64,
    /// How long that took.
    pub cost: Cost,
    /// The first of them: the trace, and when on its clock.
    first: (u32, u64),
    /// The last of them.
    last: (u32, u64),
    /// What they got.
    pub got: Counts<Got, 16>,
    /// What was read or written; the 0 of a read that faulted is no value.
    pub values: Counts<u64, 8>,
    /// Who made them, as places in [`Report::vcpus`].
    pub vcpus: Counts<u16, 16>,
    /// The guest's instruction pointers, where the traces tell them.
    pub rips: Counts<u64, 16>,
    /// When.
    pub timeline: Timeline<1>,
}

/// What traces tell, added up.
#[derive(Clone, Debug)]
pub struct Report {
    traces: Vec<Trace>,
    /// With times on the traces' own clocks.
    lost: Vec<Lost>,
    vcpus: Vec<Vcpu>,
    places: HashMap<(u32, u32, u32), u16>,
    rows: Vec<Row>,
    by_access: HashMap<(Msr, Op), usize>,
    timeline: Timeline<3>,
    kinds: [u64; 3],
    exits: u64,
    cost: Cost,
    unlisted: u64,
}

impl Default for Report {
    fn default() -> Report {
        Report {
            traces: Vec::new(),
            lost: Vec::new(),
            vcpus: Vec::new(),
            places: HashMap::new(),
            rows: Vec::new(),
            by_access: HashMap::new(),
            timeline: Timeline::new(MOST_BUCKETS),
            kinds: [0; 3],
            exits: 0,
            cost: Cost::default(),
            unlisted: 0,
        }
    }
}

impl Report {
    /// Goes on with another trace: the events and gaps after this are its.
    pub fn begin(&mut self, header: Header) {
        self.traces.push(Trace {
            header,
            events: 0,
            lost: 0,
            earliest: u64::MAX,
            latest: 0,
            anchor: 0,
        });
    }

    /// Says anew what the trace that was begun last says of itself: of a log that is known when it is read.
    pub fn end(&mut self, header: Header) {
        if let Some(trace) = self.traces.last_mut() {
            trace.header = header;
        }
    }

    /// The trace that was begun last, and its number.
    fn trace(&mut self) -> Option<(u32, &mut Trace)> {
        if self.traces.is_empty() {
            self.begin(Header::default());
        }
        let trace = self.traces.len().saturating_sub(1);
        let number = u32::try_from(trace).unwrap_or(u32::MAX);
        Some((number, self.traces.get_mut(trace)?))
    }

    /// Adds an event of the trace that was begun last.
    pub fn add(&mut self, event: &Event) {
        let Some((number, trace)) = self.trace() else {
            return;
        };
        if trace.events == 0 {
            trace.anchor = event.t.0;
        }
        trace.events += 1;
        trace.earliest = trace.earliest.min(event.t.0);
        trace.latest = trace.latest.max(event.t.0);
        let t = i128::from(event.t.0) - i128::from(trace.anchor);
        let t = i64::try_from(t).unwrap_or(if t < 0 { i64::MIN } else { i64::MAX });
        let kind = Kind::of(event.did);
        self.timeline.add(t, kind as usize);
        count(&mut self.kinds, kind);
        self.exits += u64::from(event.reason.is_some());
        self.cost.add(event.cost);
        let vcpu = self.vcpu(number, event, t);
        match self.row(event.msr, event.op, (number, event.t.0)) {
            Some(row) => row.add(event, (number, event.t.0), t, kind, vcpu),
            None => self.unlisted += 1,
        }
    }

    /// Adds a gap in the trace that was begun last.
    pub fn add_gap(&mut self, gap: &Gap) {
        let Some((number, trace)) = self.trace() else {
            return;
        };
        trace.lost = trace.lost.saturating_add(gap.events);
        let of_vcpu = |lost: &&mut Lost| (lost.trace, lost.vm, lost.vcpu) == (number, gap.vm, gap.vcpu);
        let room = self.lost.len() < MOST_VCPUS;
        match self.lost.iter_mut().find(of_vcpu) {
            Some(lost) => {
                lost.events = lost.events.saturating_add(gap.events);
                lost.first = lost.first.min(gap.t.0);
                lost.last = lost.last.max(gap.t.0);
            }
            None if room => self.lost.push(Lost {
                trace: number,
                vm: gap.vm,
                vcpu: gap.vcpu,
                events: gap.events,
                first: gap.t.0,
                last: gap.t.0,
            }),
            None => {}
        }
    }

    /// Counts the access for its vCPU, and says which that is.
    fn vcpu(&mut self, trace: u32, event: &Event, t: i64) -> Option<u16> {
        let key = (trace, event.vm, event.vcpu);
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None if self.vcpus.len() == MOST_VCPUS => return None,
            None => {
                let place = u16::try_from(self.vcpus.len()).ok()?;
                self.vcpus.push(Vcpu {
                    trace,
                    vm: event.vm,
                    vcpu: event.vcpu,
                    count: 0,
                    timeline: Timeline::new(FEW_BUCKETS),
                });
                self.places.insert(key, place);
                place
            }
        };
        let vcpu = self.vcpus.get_mut(usize::from(place))?;
        vcpu.count += 1;
        vcpu.timeline.add(t, 0);
        Some(place)
    }

    fn row(&mut self, msr: Msr, op: Op, moment: (u32, u64)) -> Option<&mut Row> {
        let place = match self.by_access.get(&(msr, op)) {
            Some(place) => *place,
            None if self.rows.len() == MOST_ROWS => return None,
            None => {
                let place = self.rows.len();
                self.by_access.insert((msr, op), place);
                self.rows.push(Row {
                    msr,
                    op,
                    count: 0,
                    kinds: [0; 3],
                    exits: 0,
                    cost: Cost::default(),
                    first: moment,
                    last: moment,
                    got: Counts::new(),
                    values: Counts::new(),
                    vcpus: Counts::new(),
                    rips: Counts::new(),
                    timeline: Timeline::new(FEW_BUCKETS),
                });
                place
            }
        };
        self.rows.get_mut(place)
    }

    /// The traces in the order in which they were begun.
    pub fn traces(&self) -> &[Trace] {
        &self.traces
    }

    /// How many events are missing from the traces, as far as they tell.
    pub fn lost(&self) -> u64 {
        self.traces.iter().fold(0, |sum, trace| sum.saturating_add(trace.lost))
    }

    /// Whose events are missing, in the order in which their first gaps came; of at most [`MOST_VCPUS`] vCPUs.
    pub fn lost_by_vcpu(&self) -> impl Iterator<Item = Lost> {
        self.lost.iter().map(|lost| Lost {
            first: self.moment((lost.trace, lost.first)).t,
            last: self.moment((lost.trace, lost.last)).t,
            ..*lost
        })
    }

    /// When the first access of a row was.
    pub fn first(&self, row: &Row) -> Moment {
        self.moment(row.first)
    }

    /// When the last access of a row was.
    pub fn last(&self, row: &Row) -> Moment {
        self.moment(row.last)
    }

    fn moment(&self, (trace, t): (u32, u64)) -> Moment {
        let of = usize::try_from(trace).ok().and_then(|trace| self.traces.get(trace));
        Moment {
            trace,
            t: of.map_or(0, |of| of.since_start(t)),
        }
    }

    /// The vCPUs in the order in which they came.
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// The rows by MSR, reads before writes.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &Row> {
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_unstable_by_key(|row| (row.msr, row.op));
        rows.into_iter()
    }

    /// How many accesses there were.
    pub fn accesses(&self) -> u64 {
        self.kinds.iter().sum()
    }

    /// How many there were of each [`Kind`].
    pub fn kinds(&self) -> [u64; 3] {
        self.kinds
    }

    /// How many left the kernel for user space.
    pub fn exits(&self) -> u64 {
        self.exits
    }

    /// How long accesses took in user space.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// How many were made of MSRs and directions that have no row, since there were [`MOST_ROWS`] before them.
    pub fn unlisted(&self) -> u64 {
        self.unlisted
    }

    /// When there were how many of each [`Kind`], all traces laid over each other from their first events on. The first
    /// bucket begins at the earliest event, or by less than its width before.
    pub fn timeline(&self) -> &Timeline<3> {
        &self.timeline
    }
}

impl Row {
    /// How many did not fault.
    pub fn served(&self) -> u64 {
        let [allowed, emulated, _] = self.kinds;
        allowed + emulated
    }

    fn add(&mut self, event: &Event, moment: (u32, u64), t: i64, kind: Kind, vcpu: Option<u16>) {
        self.count += 1;
        count(&mut self.kinds, kind);
        self.exits += u64::from(event.reason.is_some());
        self.cost.add(event.cost);
        self.first = self.first.min(moment);
        self.last = self.last.max(moment);
        self.got.add(Got {
            did: event.did,
            why: event.why,
            reason: event.reason,
            would: event.would,
            within: event.within,
            rule: event.rule,
        });
        if event.op == Op::Write || !event.did.is_fault() || event.value != 0 {
            self.values.add(event.value);
        }
        if let Some(vcpu) = vcpu {
            self.vcpus.add(vcpu);
        }
        if let Some(rip) = event.rip {
            self.rips.add(rip);
        }
        self.timeline.add(t, 0);
    }
}

fn count(kinds: &mut [u64; 3], kind: Kind) {
    let [allowed, emulated, faulted] = kinds;
    *match kind {
        Kind::Allowed => allowed,
        Kind::Emulated => emulated,
        Kind::Faulted => faulted,
    } += 1;
}

#[cfg(test)]
mod tests;
