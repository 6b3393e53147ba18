//! What the answerers and the supervisor write down, and its reader.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use msrgate_answer::layout::vcpu;
use msrgate_core::{Disposition, Event, FaultCause, Gap, Log, Msr, Nanos, Op, Reason, Within};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::memory;

/// What CPUID gives: leaf, subleaf, and EAX to EDX.
pub type Leaf = (u32, u32, [u32; 4]);

/// Counts, and the memory of each vCPU that is answered for.
#[derive(Debug, Default)]
pub struct Ledger {
    vms: AtomicU64,
    vcpus: AtomicU64,
    refused: AtomicU64,
    first_run: OnceLock<Vec<Leaf>>,
    rings: Mutex<Vec<Arc<Ring>>>,
}

impl Ledger {
    /// How many VMs a policy was put in force on.
    pub fn vms(&self) -> u64 {
        self.vms.load(Ordering::Relaxed)
    }

    /// How many vCPUs there have been.
    pub fn vcpus(&self) -> u64 {
        self.vcpus.load(Ordering::Relaxed)
    }

    /// How many VMs and vCPUs the VMM did not get, since nothing could be put in force on them.
    pub fn refusals(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The CPUID that the VMM has set of the first vCPU that ran, as far as it is looked at; `None` before one does.
    pub fn first_run(&self) -> Option<&[Leaf]> {
        self.first_run.get().map(Vec::as_slice)
    }

    /// Nobody is left who could write: what is taken next is all that there is.
    pub fn end(&self) {
        self.rings().iter().for_each(|ring| ring.end());
    }

    /// Counts a VM, and gives its number.
    pub(crate) fn new_vm(&self) -> u32 {
        self.vms.fetch_add(1, Ordering::Relaxed) as u32
    }

    pub(crate) fn new_vcpu(&self) {
        self.vcpus.fetch_add(1, Ordering::Relaxed);
    }

    /// A vCPU with this CPUID is about to run.
    pub(crate) fn run(&self, cpuid: &[Leaf]) {
        self.first_run.get_or_init(|| cpuid.to_vec());
    }

    pub(crate) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, ring: Arc<Ring>) {
        self.rings().push(ring);
    }

    fn rings(&self) -> MutexGuard<'_, Vec<Arc<Ring>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Words for shadows of policies to come: the memory is taken where they are written.
const SPARE: usize = 8192;

/// A vCPU's memory ([`vcpu`]).
#[derive(Debug)]
pub(crate) struct Ring {
    words: memory::Words,
    /// Of which VM and vCPU it is.
    who: (u32, u32),
    process: i32,
    /// Nobody writes there any more.
    ended: AtomicBool,
}

impl Ring {
    /// With so many words for shadows, and some more for those of policies to come; and the file that it is.
    pub(crate) fn new(process: i32, who: (u32, u32), cells: usize) -> io::Result<(Arc<Ring>, File)> {
        let (words, file) = memory::Words::new(Ring::words(cells), false)?;
        Ok((Ring::of(words, process, who), file))
    }

    /// How many words it takes with so many for shadows.
    pub(crate) fn words(cells: usize) -> usize {
        vcpu::CELLS + cells + SPARE
    }

    /// Makes a ring of memory that is there already.
    pub(crate) fn of(words: memory::Words, process: i32, who: (u32, u32)) -> Arc<Ring> {
        Arc::new(Ring {
            words,
            who,
            process,
            ended: AtomicBool::new(false),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.words.count() * size_of::<u64>()).next_multiple_of(4096)
    }

    /// Words for shadows.
    pub(crate) fn cells(&self) -> usize {
        self.words.count() - vcpu::CELLS
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// The supervisor's answer: value, what an event says, rule, and how much is logged; `u64::MAX` for no word of it.
    pub(crate) fn reply(&self, words: [u64; 4]) {
        for (at, word) in (vcpu::REPLY..).zip(words) {
            self.words.set(at, word);
        }
    }

    /// The last question through memory ([`vcpu::ASKED`]), and what it is.
    pub(crate) fn asked(&self) -> (u64, (u64, u64)) {
        let asked = self.words.at(vcpu::ASKED).load(Ordering::SeqCst);
        let [question, data] = [0, 1].map(|word| self.words.get(vcpu::QUESTION + word));
        (asked, (question, data))
    }

    /// No shadow was written, of so many words.
    pub(crate) fn forget_shadows(&self, cells: usize) {
        (vcpu::CELLS..).take(cells).for_each(|at| self.words.set(at, 0));
    }

    /// The shadow of this cell was not written.
    pub(crate) fn forget(&self, cell: usize) {
        self.words.set(vcpu::CELLS + 2 * cell, 0);
    }

    /// What was written to a shadow.
    pub(crate) fn load(&self, cell: usize) -> Option<u64> {
        let written = self.words.get(vcpu::CELLS + 2 * cell) != 0;
        written.then(|| self.words.get(vcpu::CELLS + 2 * cell + 1))
    }

    /// Writes to a shadow.
    pub(crate) fn store(&self, cell: usize, value: u64) {
        self.words.set(vcpu::CELLS + 2 * cell + 1, value);
        self.words.set(vcpu::CELLS + 2 * cell, 1);
    }

    /// How often the answerer went into KVM_RUN and came out of it: odd where it is in there.
    pub(crate) fn runs(&self) -> u64 {
        self.words.at(vcpu::RUNS).load(Ordering::SeqCst)
    }

    /// Whether nobody writes there any more; whether the process is still there is asked where `asks`.
    fn is_over(&self, asks: bool) -> bool {
        // A process that is a zombie writes no more either, but will be gone soon.
        let is_gone = || kill(Pid::from_raw(self.process), None) == Err(nix::errno::Errno::ESRCH);
        self.ended.load(Ordering::Acquire) || asks && is_gone()
    }
}

/// A reading of the time stamp counter, or a difference of two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Ticks(u64);

/// How often an MSR was accessed in one direction, and what the last access got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters<T = Nanos> {
    /// How often.
    pub count: u64,
    /// How long all of them took between the guest's exit and the answer.
    pub cost: T,
    /// What the last read got or the last write gave.
    pub value: u64,
    /// What was done.
    pub done: Done,
    /// How many of the accesses faulted, and the last of them.
    pub faults: Option<Faults>,
}

/// What was done with an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// What the guest got.
    pub did: Disposition,
    /// Why the access faulted where the policy does not say `deny`.
    pub why: Option<FaultCause>,
    /// Why the kernel handed the access to user space.
    pub reason: Option<Reason>,
    /// What the policy would do, where the policy is not in force.
    pub would: Option<Disposition>,
}

/// Accesses that faulted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Faults {
    /// How many.
    pub count: u64,
    /// What was done with the last one.
    pub last: Done,
    /// The guest's instruction pointer at the last one, where it was asked for.
    pub rip: Option<u64>,
}

/// What a vCPU did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// An access, and how much of it is logged.
    Access(Event, Log),
    /// Events are missing here: they came faster than they were read.
    Gap(Gap),
}

/// An entry as its ring has it.
type Words = [u64; vcpu::EVENT];

/// Counts by MSR and direction.
type Counts = BTreeMap<(Msr, Op), Counters<Ticks>>;

/// Takes what was written down. There is one for a ledger.
#[derive(Debug)]
pub struct Reader {
    ledger: Arc<Ledger>,
    start: Instant,
    /// The counter at the start.
    first: Ticks,
    /// The counter and the time up to which all was taken.
    from: (Ticks, Nanos),
    /// The time of the last entry.
    last: Nanos,
    /// Of vCPUs that are gone.
    ended: Counts,
    uncounted: u64,
    lost: u64,
    /// How often was taken.
    passes: u32,
}

/// How often is asked whether processes are still there: each so many times.
const ASKS: u32 = 64;

impl Reader {
    /// Times count from here on.
    pub fn new(ledger: Arc<Ledger>) -> Reader {
        let first = ticks();
        Reader {
            ledger,
            start: Instant::now(),
            first,
            from: (first, Nanos(0)),
            last: Nanos(0),
            ended: BTreeMap::new(),
            uncounted: 0,
            lost: 0,
            passes: 0,
        }
    }

    /// Takes what there is, in the order of time, and gives how much it was.
    pub fn drain(&mut self, take: &mut dyn FnMut(Entry)) -> usize {
        let now = (ticks(), self.elapsed());
        let rings = self.ledger.rings().clone();
        self.passes = self.passes.wrapping_add(1);
        let asks = self.passes.is_multiple_of(ASKS);
        let mut taken: Vec<(Ticks, Words)> = Vec::new();
        let mut over = Vec::new();
        for ring in rings {
            // Asked before it is read: what is over is read to its end.
            let is_over = ring.is_over(asks);
            read(&ring, if is_over { Ticks(u64::MAX) } else { now.0 }, &mut taken);
            if is_over {
                let events = ring.words.get(vcpu::MISSED);
                if events > 0 {
                    taken.push((now.0, gap(ring.who, events)));
                }
                over.push(ring);
            }
        }
        for ring in over {
            self.uncounted = self.uncounted.wrapping_add(ring.words.get(vcpu::UNCOUNTED));
            count(&ring, &mut self.ended);
            self.ledger.rings().retain(|other| !Arc::ptr_eq(other, &ring));
        }
        taken.sort_by_key(|(ticks, _)| *ticks);
        let count = taken.len();
        for (ticks, words) in taken {
            // Between two looks at the clock the counter is even; a straggler of the last look is not sent back.
            self.last = between(self.from, now, ticks).max(self.last);
            let entry = decode(words, self.last, |cost| self.lasting(cost));
            if let Entry::Gap(gap) = &entry {
                self.lost = self.lost.saturating_add(gap.events);
            }
            take(entry);
        }
        self.from = now;
        count
    }

    /// The counts by MSR and direction, of all vCPUs together.
    pub fn tallies(&self) -> BTreeMap<(Msr, Op), Counters> {
        let mut counts = self.ended.clone();
        for ring in self.ledger.rings().iter() {
            count(ring, &mut counts);
        }
        let timed = |(key, tally): (_, Counters<Ticks>)| {
            let tally = Counters {
                count: tally.count,
                cost: self.lasting(tally.cost),
                value: tally.value,
                done: tally.done,
                faults: tally.faults,
            };
            (key, tally)
        };
        counts.into_iter().map(timed).collect()
    }

    /// Events that found their ring full.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Accesses that are in no tally.
    pub fn uncounted(&self) -> u64 {
        let rings = self.ledger.rings();
        let live = rings.iter().map(|ring| ring.words.get(vcpu::UNCOUNTED));
        live.fold(self.uncounted, u64::wrapping_add)
    }

    /// The time since the start.
    pub fn now(&self) -> Nanos {
        self.elapsed()
    }

    /// Counts of VMs and vCPUs.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn elapsed(&self) -> Nanos {
        Nanos(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn lasting(&self, some: Ticks) -> Nanos {
        let ticks = u128::from(ticks().0.wrapping_sub(self.first.0)).max(1);
        let nanoseconds = u128::from(some.0).saturating_mul(u128::from(self.elapsed().0)) / ticks;
        Nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// The time at which the counter was there, by two looks at both.
fn between(from: (Ticks, Nanos), to: (Ticks, Nanos), ticks: Ticks) -> Nanos {
    let (start, Nanos(time)) = from;
    let span = u128::from(to.0.0.saturating_sub(start.0)).max(1);
    let part = u128::from(ticks.0.saturating_sub(start.0)).min(span);
    let since = part.saturating_mul(u128::from(to.1.0.saturating_sub(time))) / span;
    Nanos(time.saturating_add(u64::try_from(since).unwrap_or(0)))
}

/// The time stamp counter, by which the answerer tells time too. It does not stop and counts alike on all CPUs wherever
/// KVM is of use.
fn ticks() -> Ticks {
    #![expect(unsafe_code, reason = "an instruction")]
    // SAFETY: every x86-64 processor has RDTSC, and it touches no memory.
    Ticks(unsafe { core::arch::x86_64::_rdtsc() })
}

/// Takes a ring's events up to a time.
fn read(ring: &Ring, until: Ticks, taken: &mut Vec<(Ticks, Words)>) {
    let words = &ring.words;
    let mut written = words.at(vcpu::WRITTEN).load(Ordering::Acquire);
    // Where the vCPU runs no more it is as known as it will be how the last access ended.
    if until == Ticks(u64::MAX) && words.get(vcpu::PENDING_EVENT) != 0 {
        written = written.wrapping_add(1);
    }
    let mut at = words.get(vcpu::TAKEN);
    // More than a ring holds is what no answerer wrote.
    for _ in 0..written.wrapping_sub(at).min(vcpu::EVENT_COUNT as u64) {
        let first = vcpu::EVENTS + (at % vcpu::EVENT_COUNT as u64) as usize * vcpu::EVENT;
        let event: Words = std::array::from_fn(|word| words.get(first + word));
        let t = Ticks(event[0]);
        if t > until {
            return;
        }
        taken.push((t, event));
        at = at.wrapping_add(1);
        words.at(vcpu::TAKEN).store(at, Ordering::Release);
    }
}

/// Adds a ring's counts.
fn count(ring: &Ring, counts: &mut Counts) {
    let words = &ring.words;
    for at in (vcpu::TALLIES..vcpu::EVENTS).step_by(vcpu::TALLY) {
        let key = words.at(at).load(Ordering::Acquire);
        if key == 0 {
            continue;
        }
        let op = if key & 1 == 0 { Op::Read } else { Op::Write };
        let (count, cost) = (words.get(at + 1), words.get(at + 4));
        let faults = Faults {
            count: words.get(at + 5),
            last: decode_told(words.get(at + 6)),
            rip: Some(words.get(at + 7)).filter(|rip| *rip != 0),
        };
        let faults = Some(faults).filter(|faults| faults.count > 0);
        counts
            .entry((Msr((key >> 1) as u32), op))
            .and_modify(|tally| {
                tally.count = tally.count.wrapping_add(count);
                tally.cost.0 = tally.cost.0.wrapping_add(cost);
                let before = tally.faults.map_or(0, |faults| faults.count);
                tally.faults = faults.or(tally.faults).map(|last| Faults {
                    count: before.wrapping_add(faults.map_or(0, |faults| faults.count)),
                    ..last
                });
            })
            .or_insert(Counters {
                count,
                cost: Ticks(cost),
                value: words.get(at + 2),
                done: decode_told(words.get(at + 3)),
                faults,
            });
    }
}

/// As the answerer writes a gap.
fn gap((vm, vcpu): (u32, u32), events: u64) -> Words {
    [0, events, 0, u64::from(vm) << 32, u64::from(vcpu), vcpu::GAP, 0, 0]
}

fn decode_told(bits: u64) -> Done {
    let disposition = |number: u64| Disposition::ALL.get((number & 0xff) as usize).copied();
    let why = (bits >> 8 & 0xff).checked_sub(1);
    let would = (bits >> vcpu::WOULD & 0xff).checked_sub(1);
    Done {
        did: disposition(bits).unwrap_or(Disposition::Fault),
        why: why.and_then(|why| FaultCause::ALL.get(why as usize).copied()),
        reason: Reason::from_bits((bits >> 16 & 0xff) as u32),
        would: would.and_then(disposition),
    }
}

/// Whatever the words are, they are some entry.
fn decode(words: Words, t: Nanos, lasting: impl Fn(Ticks) -> Nanos) -> Entry {
    let [_, value, rip, msr_vm, vcpu_rule, bits, log, cost] = words;
    let high = |word: u64| (word >> 32) as u32;
    if bits & vcpu::GAP != 0 {
        return Entry::Gap(Gap {
            t,
            vm: high(msr_vm),
            vcpu: vcpu_rule as u32,
            events: value,
        });
    }
    let Done {
        did,
        why,
        reason,
        would,
    } = decode_told(bits);
    let op = if bits & vcpu::WRITE == 0 { Op::Read } else { Op::Write };
    let event = Event {
        t,
        vm: high(msr_vm),
        vcpu: vcpu_rule as u32,
        op,
        msr: Msr(msr_vm as u32),
        value: if op == Op::Read && did.is_fault() { 0 } else { value },
        reason,
        did,
        why,
        would,
        rule: Some(high(vcpu_rule)).filter(|rule| *rule != u32::MAX),
        rip: (bits & vcpu::HAS_RIP != 0).then_some(rip),
        within: Within::from_flags((bits >> vcpu::WITHIN) as u16),
        cost: (bits & vcpu::HAS_COST != 0).then(|| lasting(Ticks(cost))),
    };
    let log = match log & 3 {
        0 => Log::None,
        1 => Log::All,
        2 => Log::First,
        _ => Log::PerSecond(high(log)),
    };
    Entry::Access(event, log)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the answerer writes it.
    fn push(ring: &Ring, event: [u64; vcpu::EVENT]) {
        let written = ring.words.get(vcpu::WRITTEN);
        let first = vcpu::EVENTS + (written as usize % vcpu::EVENT_COUNT) * vcpu::EVENT;
        for (at, word) in (first..).zip(event) {
            ring.words.set(at, word);
        }
        ring.words.set(vcpu::WRITTEN, written + 1);
    }

    fn access(t: u64, msr: u64, vcpu: u64) -> [u64; vcpu::EVENT] {
        [
            t,
            5,
            0,
            msr | 3 << 32,
            vcpu | 2 << 32,
            Disposition::Value as u64 | 4 << 16 | vcpu::HAS_COST,
            1,
            10,
        ]
    }

    fn rings(count: u32) -> (Reader, Vec<Arc<Ring>>) {
        let ledger = Arc::new(Ledger::default());
        let this = std::process::id().cast_signed();
        let rings: Vec<_> = (0..count).map(|id| Ring::new(this, (3, id), 0).unwrap().0).collect();
        rings.iter().for_each(|ring| ledger.add(Arc::clone(ring)));
        (Reader::new(ledger), rings)
    }

    #[test]
    fn events_of_all_vcpus_come_in_the_order_of_time_and_time_does_not_go_back() {
        let (mut reader, rings) = rings(2);
        let mut last = Nanos(0);
        for _ in 0..50 {
            let Ticks(now) = ticks();
            // A straggler, which was late to write its event down.
            push(&rings[0], access(now.wrapping_sub(1 << 40), 1, 0));
            push(&rings[1], access(now + 1, 2, 1));
            push(&rings[0], access(now + 2, 3, 0));
            let mut seen = Vec::new();
            while seen.len() < 3 {
                reader.drain(&mut |entry| {
                    let Entry::Access(event, Log::All) = entry else {
                        panic!("{entry:?}")
                    };
                    assert!(event.t >= last, "{:?} is before {last:?}", event.t);
                    last = event.t;
                    seen.push((event.vm, event.vcpu, event.msr.0, event.rule));
                });
            }
            assert_eq!(seen, [(3, 0, 1, Some(2)), (3, 1, 2, Some(2)), (3, 0, 3, Some(2))]);
        }
    }

    #[test]
    fn what_is_missing_is_told_where_it_is_missing() {
        let (mut reader, rings) = rings(1);
        let Ticks(now) = ticks();
        push(&rings[0], access(now, 1, 0));
        push(&rings[0], [now + 1, 7, 0, 3 << 32, 0, vcpu::GAP, 0, 0]);
        push(&rings[0], access(now + 2, 2, 0));
        rings[0].words.set(vcpu::MISSED, 9);
        rings[0].end();
        let mut seen = Vec::new();
        reader.drain(&mut |entry| {
            seen.push(match entry {
                Entry::Access(event, _) => u64::from(event.msr.0),
                Entry::Gap(Gap {
                    vm: 3, vcpu: 0, events, ..
                }) => 1000 + events,
                other => panic!("{other:?}"),
            });
        });
        assert_eq!(seen, [1, 1007, 2, 1009]);
        assert_eq!(reader.lost(), 16);
        assert!(reader.ledger.rings().is_empty(), "what is over is let go of");
    }

    #[test]
    fn counts_outlast_their_vcpu() {
        let (mut reader, rings) = rings(2);
        for (ring, count) in rings.iter().zip([2, 3]) {
            let tally = [1 << 63 | 0x8b << 1 | 1, count, 7, Disposition::Ignore as u64, 100];
            for (at, word) in (vcpu::TALLIES + 5 * vcpu::TALLY..).zip(tally) {
                ring.words.set(at, word);
            }
        }
        rings[0].end();
        reader.drain(&mut |_| {});
        let tallies = reader.tallies();
        assert_eq!(tallies.len(), 1);
        assert_eq!(tallies[&(Msr(0x8b), Op::Write)].count, 5);
    }
}
