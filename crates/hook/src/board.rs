//! What a VMM's process writes down and the command reads, in memory that both have.
//!
//! ```text
//! page 0    what is asked for, how many vCPUs there have been, which slates are a vCPU's
//! slate 0   a vCPU's: counts by MSR and direction, and a ring of events
//! slate 1   …
//! desk      where the policy for a CPUID is asked for
//! ```
//!
//! A vCPU's thread is the only one that writes to its slate, and never waits: where the ring is full the event is
//! counted as lost. Where the vCPU is gone the next one goes on with its slate.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use msrgate_core::{Did, Event, Log, Msr, Op, Reason, Why};

use crate::board::event::{decode, decode_answer, encode, encode_answer};
use crate::board::taken::Taken;
use crate::desk::Desk;
use crate::mapping::{Mapping, get, set, word};

const PAGE: usize = 4096;
/// vCPUs that have a slate at a time; of further ones it is only counted how many accesses they made.
pub const SLATES: usize = 512;

/// Words of page 0.
mod head {
    pub(super) const MAGIC: usize = 0;
    pub(super) const WANTED: usize = 1;
    pub(super) const VCPUS: usize = 2;
    pub(super) const VMS: usize = 3;
    pub(super) const REFUSED: usize = 4;
    pub(super) const WITHOUT_SLATE: usize = 5;
    /// How many slates there is something on.
    pub(super) const SLATES: usize = 6;
    /// From here on a bit for each slate, which is 1 while a vCPU has it.
    pub(super) const TAKEN: usize = 8;
}

const MAGIC: u64 = u64::from_le_bytes(*b"msrgateB");

/// Words of a slate.
mod slate {
    pub(super) const WRITTEN: usize = 0;
    pub(super) const READ: usize = 1;
    pub(super) const LOST: usize = 2;
    pub(super) const UNCOUNTED: usize = 3;
    /// After a page, so that the words that both processes write are apart from the rest.
    pub(super) const TALLIES: usize = super::PAGE / 8;
    pub(super) const EVENTS: usize = TALLIES + super::TALLIES * super::TALLY;
}

/// MSRs and directions that a vCPU's accesses are counted for.
const TALLIES: usize = 1024;
/// Words of a tally: key, count, value, what was done, ticks that it took.
const TALLY: usize = 5;
/// How far from its place a tally is looked for.
const PROBES: usize = 32;
/// Events that a ring holds.
const EVENTS: usize = 4096;
/// Words of an event.
const EVENT: usize = 8;
const SLATE_BYTES: usize = (slate::EVENTS + EVENTS * EVENT) * 8;
const _: () = assert!(SLATE_BYTES.is_multiple_of(PAGE));

/// What becomes of what the policy decides.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Mode {
    /// It is in force.
    #[default]
    Enforce,
    /// Nothing: the first touch of each MSR that the policy does not leave to the kernel is written down, with what the
    /// policy would do, and the guest gets what it gets without a policy.
    Audit,
    /// Nothing: the first touch of every MSR is written down.
    Learn,
    /// Every access is written down, and passed on to the kernel's register as the host would read and write it: that is
    /// not always what the guest would have got.
    LearnAll,
}

/// What is to be done, and written down beside the counts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Wanted {
    /// Whether the policy is in force.
    pub mode: Mode,
    /// Every access, whatever its rule says of logging.
    pub events: bool,
    /// The guest's instruction pointer, which takes a system call for each access.
    pub rip: bool,
    /// The policy depends on the guest's CPUID: what it is, the [`Desk`] tells, and the map that is handed over is in
    /// force until then.
    pub by_cpuid: bool,
}

impl Wanted {
    fn bits(self) -> u64 {
        let flags = [self.events, self.rip, self.by_cpuid].into_iter().zip(0..);
        flags.fold((self.mode as u64) << 3, |bits, (flag, at)| bits | u64::from(flag) << at)
    }

    fn from_bits(bits: u64) -> Wanted {
        Wanted {
            mode: match bits >> 3 {
                0 => Mode::Enforce,
                1 => Mode::Audit,
                2 => Mode::Learn,
                _ => Mode::LearnAll,
            },
            events: bits & 1 != 0,
            rip: bits & 2 != 0,
            by_cpuid: bits & 4 != 0,
        }
    }
}

/// Where the desk begins.
const DESK: u64 = (PAGE + SLATES * SLATE_BYTES) as u64;

/// The shared memory as a whole.
#[derive(Debug)]
pub struct Board {
    file: File,
    /// A VMM may close all descriptors that it does not know, and then the number is another file's.
    inode: u64,
    head: Arc<Mapping>,
}

impl Board {
    /// Bytes of the file.
    pub(crate) const BYTES: u64 = DESK + Desk::BYTES as u64;

    /// On an empty file of [`Board::BYTES`] bytes.
    pub(crate) fn new(file: File, wanted: Wanted) -> io::Result<Board> {
        let board = Board::map(file)?;
        set(board.head.words(), head::WANTED, wanted.bits());
        set(board.head.words(), head::MAGIC, MAGIC);
        Ok(board)
    }

    /// On a file that the command has made.
    pub(crate) fn open(file: File) -> io::Result<Board> {
        let board = Board::map(file)?;
        if get(board.head.words(), head::MAGIC) != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(board)
    }

    fn map(file: File) -> io::Result<Board> {
        let head = Arc::new(Mapping::new(&file, 0, PAGE)?);
        let inode = file.metadata()?.ino();
        Ok(Board { file, inode, head })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn wanted(&self) -> Wanted {
        Wanted::from_bits(get(self.head.words(), head::WANTED))
    }

    /// Counts a VM, and gives its number.
    pub(crate) fn new_vm(&self) -> u32 {
        word(self.head.words(), head::VMS).fetch_add(1, Ordering::Relaxed) as u32
    }

    /// Counts a VM or vCPU that the VMM did not get.
    pub fn refused(&self) {
        word(self.head.words(), head::REFUSED).fetch_add(1, Ordering::Relaxed);
    }

    /// The slate of a new vCPU; `None` where there are no more, or the file was closed.
    pub(crate) fn slate(&self) -> Option<Slate> {
        self.file.metadata().ok().filter(|file| file.ino() == self.inode)?;
        let taken = Taken::any(&self.head)?;
        let slate = Slate::map(&self.file, taken.number, Some(taken)).ok()?;
        // Touched here, so that no access of the guest waits for the page.
        set(slate.words(), slate::LOST, get(slate.words(), slate::LOST));
        Some(slate)
    }

    /// Counts a vCPU.
    pub(crate) fn new_vcpu(&self) {
        word(self.head.words(), head::VCPUS).fetch_add(1, Ordering::Relaxed);
    }

    /// Where the policy for a CPUID is asked for and told.
    ///
    /// # Errors
    /// The kernel's, where it does not map it.
    pub fn desk(&self) -> io::Result<Desk> {
        Mapping::new(&self.file, DESK, Desk::BYTES).map(Desk::new)
    }

    /// Counts an access of a vCPU that has no slate.
    pub(crate) fn without_slate(&self) {
        word(self.head.words(), head::WITHOUT_SLATE).fetch_add(1, Ordering::Relaxed);
    }

    /// How many VMs a policy was put in force on.
    pub fn vms(&self) -> u64 {
        get(self.head.words(), head::VMS)
    }

    /// How many VMs and vCPUs the VMM did not get, since nothing could be put in force on them.
    pub fn refusals(&self) -> u64 {
        get(self.head.words(), head::REFUSED)
    }

    /// How many vCPUs there have been.
    pub fn vcpus(&self) -> u64 {
        get(self.head.words(), head::VCPUS)
    }

    /// Reads what is on the slates.
    pub fn reader(&self) -> Reader<'_> {
        Reader {
            board: self,
            slates: Vec::new(),
        }
    }
}

/// One vCPU's part.
#[derive(Debug)]
pub(crate) struct Slate {
    mapping: Mapping,
    /// Nothing for who only reads it.
    _taken: Option<Taken>,
}

impl Slate {
    fn map(file: &File, number: usize, taken: Option<Taken>) -> io::Result<Slate> {
        let mapping = Mapping::new(file, (PAGE + number * SLATE_BYTES) as u64, SLATE_BYTES)?;
        Ok(Slate { mapping, _taken: taken })
    }

    fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    /// Counts an access, which took so many ticks. The one thread that has the vCPU calls it, so plain stores will do.
    pub(crate) fn count(&self, event: &Event, ticks: u64) {
        let words = self.words();
        let key = 1 << 63 | u64::from(event.msr.0) << 1 | (event.op == Op::Write) as u64;
        let place = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize;
        for probe in 0..PROBES {
            let at = slate::TALLIES + (place + probe) % TALLIES * TALLY;
            let found = get(words, at);
            if found != key && found != 0 {
                continue;
            }
            set(words, at + 1, get(words, at + 1).wrapping_add(1));
            set(words, at + 2, event.value);
            set(words, at + 3, encode_answer(event));
            set(words, at + 4, get(words, at + 4).wrapping_add(ticks));
            // Who sees the key sees the rest.
            word(words, at).store(key, Ordering::Release);
            return;
        }
        set(words, slate::UNCOUNTED, get(words, slate::UNCOUNTED).wrapping_add(1));
    }

    /// Puts an event into the ring. The same thread's.
    pub(crate) fn push(&self, event: &Event, log: Log) {
        let words = self.words();
        let written = get(words, slate::WRITTEN);
        let read = word(words, slate::READ).load(Ordering::Acquire);
        if written.wrapping_sub(read) >= EVENTS as u64 {
            set(words, slate::LOST, get(words, slate::LOST).wrapping_add(1));
            return;
        }
        let at = slate::EVENTS + (written % EVENTS as u64) as usize * EVENT;
        for (at, value) in (at..).zip(encode(event, log)) {
            set(words, at, value);
        }
        word(words, slate::WRITTEN).store(written.wrapping_add(1), Ordering::Release);
    }
}

/// How often an MSR was accessed in one direction, and what the last access got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tally {
    /// How often.
    pub count: u64,
    /// What all of them took between the guest's exit and the answer, in ticks of a [`crate::Clock`].
    pub ticks: u64,
    /// What the last read got or the last write gave.
    pub value: u64,
    /// What was done.
    pub did: Did,
    /// Why it faulted where the policy does not say `deny`.
    pub why: Option<Why>,
    /// Why the kernel handed it to user space.
    pub reason: Option<Reason>,
}

/// What was not written down.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Missing {
    /// Events that found their ring full.
    pub events: u64,
    /// Accesses that are in no tally.
    pub accesses: u64,
}

/// The command's view. There is one for a board.
#[derive(Debug)]
pub struct Reader<'a> {
    board: &'a Board,
    slates: Vec<Slate>,
}

impl Reader<'_> {
    /// Maps the slates of vCPUs that are new.
    fn refresh(&mut self) {
        let count = get(self.board.head.words(), head::SLATES);
        let count = usize::try_from(count).unwrap_or(SLATES).min(SLATES);
        while self.slates.len() < count {
            match Slate::map(&self.board.file, self.slates.len(), None) {
                Ok(slate) => self.slates.push(slate),
                // Next time, perhaps.
                Err(_) => return,
            }
        }
    }

    /// Takes the events that are there, each vCPU's in their order, and gives how many there were.
    pub fn drain(&mut self, take: &mut dyn FnMut(Event, Log)) -> usize {
        self.refresh();
        let mut count = 0;
        for slate in &self.slates {
            let words = slate.words();
            let written = word(words, slate::WRITTEN).load(Ordering::Acquire);
            let mut read = get(words, slate::READ);
            // More than a ring holds is what no vCPU's thread wrote.
            for _ in 0..written.wrapping_sub(read).min(EVENTS as u64) {
                let at = slate::EVENTS + (read % EVENTS as u64) as usize * EVENT;
                let (event, log) = decode(std::array::from_fn(|word| get(words, at + word)));
                take(event, log);
                count += 1;
                read = read.wrapping_add(1);
                word(words, slate::READ).store(read, Ordering::Release);
            }
        }
        count
    }

    /// The counts by MSR and direction, of all vCPUs together.
    pub fn tallies(&mut self) -> BTreeMap<(Msr, Op), Tally> {
        self.refresh();
        let mut tallies: BTreeMap<(Msr, Op), Tally> = BTreeMap::new();
        for slate in &self.slates {
            let words = slate.words();
            for at in (slate::TALLIES..slate::EVENTS).step_by(TALLY) {
                let key = word(words, at).load(Ordering::Acquire);
                if key == 0 {
                    continue;
                }
                let op = if key & 1 == 0 { Op::Read } else { Op::Write };
                let (count, value) = (get(words, at + 1), get(words, at + 2));
                let (did, why, reason) = decode_answer(get(words, at + 3));
                let ticks = get(words, at + 4);
                tallies
                    .entry((Msr((key >> 1) as u32), op))
                    .and_modify(|tally| {
                        tally.count = tally.count.wrapping_add(count);
                        tally.ticks = tally.ticks.wrapping_add(ticks);
                    })
                    .or_insert(Tally {
                        count,
                        ticks,
                        value,
                        did,
                        why,
                        reason,
                    });
            }
        }
        tallies
    }

    /// What was not written down.
    pub fn missing(&mut self) -> Missing {
        self.refresh();
        let sum = |at| {
            self.slates
                .iter()
                .map(|slate| get(slate.words(), at))
                .fold(0, u64::wrapping_add)
        };
        Missing {
            events: sum(slate::LOST),
            accesses: sum(slate::UNCOUNTED).wrapping_add(get(self.board.head.words(), head::WITHOUT_SLATE)),
        }
    }
}

mod event;
mod taken;
#[cfg(test)]
mod tests;
