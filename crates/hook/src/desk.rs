//! Where a VMM's process asks the command what the policy is for a guest's CPUID, in memory that both have.
//!
//! ```text
//! page 0    how often was asked
//! place 0   the guest's CPUID; the decision map, or why there is none
//! place 1   …
//! ```
//!
//! Who asks takes a place that is free, and gives it back. One that dies meanwhile keeps its place.

#![expect(unsafe_code, reason = "a futex")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libc::c_int;

use crate::mapping::{Mapping, get, set, word};

/// What CPUID gives: leaf, subleaf, and EAX to EDX.
pub type Leaf = (u32, u32, [u32; 4]);

/// Leaves that a guest may have (`KVM_MAX_CPUID_ENTRIES`).
pub(crate) const LEAVES: usize = 256;

const PAGE: usize = 4096;
const PLACES: usize = 16;
/// Words of page 0.
const ASKED_SO_OFTEN: usize = 0;
/// Words of a place.
const STATE: usize = 0;
const LENGTH: usize = 1;
const QUESTION: usize = 2;
const ANSWER: usize = 2 * PAGE / 8;
/// Words of a leaf.
const LEAF: usize = 3;
const _: () = assert!(QUESTION + LEAVES * LEAF <= ANSWER);
/// Bytes of the longest answer.
const MOST: usize = 1 << 20;
const PLACE_BYTES: usize = 2 * PAGE + MOST;

/// States of a place.
const FREE: u64 = 0;
const TAKEN: u64 = 1;
const ASKED: u64 = 2;
const ANSWERED: u64 = 3;
const REFUSED: u64 = 4;

/// How long is waited for an answer: the command may be slow, or no longer there.
const PATIENCE: Duration = Duration::from_secs(20);

/// A part of a board.
#[derive(Debug)]
pub struct Desk(Mapping);

impl Desk {
    pub(crate) const BYTES: usize = PAGE + PLACES * PLACE_BYTES;

    pub(crate) fn new(mapping: Mapping) -> Desk {
        Desk(mapping)
    }

    fn bell(&self) -> &AtomicU64 {
        word(self.0.words(), ASKED_SO_OFTEN)
    }

    /// The words of each place.
    fn places(&self) -> impl Iterator<Item = &[AtomicU64]> {
        let places = self.0.words().get(PAGE / 8..).unwrap_or_default();
        places.chunks_exact(PLACE_BYTES / 8)
    }

    /// The answer for a guest with these leaves; an error is one line for people. Waits for it.
    pub(crate) fn ask(&self, leaves: &[Leaf]) -> Result<Vec<u8>, String> {
        let taken = |place: &&[AtomicU64]| {
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            word(place, STATE)
                .compare_exchange(FREE, TAKEN, success, failure)
                .is_ok()
        };
        let place = self.places().find(taken).ok_or("too many ask at once")?;
        let state = word(place, STATE);
        for (at, leaf) in (QUESTION..).step_by(LEAF).zip(leaves.iter().take(LEAVES)) {
            let (function, index, [eax, ebx, ecx, edx]) = *leaf;
            for (at, pair) in (at..).zip([(function, index), (eax, ebx), (ecx, edx)]) {
                set(place, at, u64::from(pair.0) | u64::from(pair.1) << 32);
            }
        }
        set(place, LENGTH, leaves.len().min(LEAVES) as u64);
        state.store(ASKED, Ordering::Release);
        self.bell().fetch_add(1, Ordering::Release);
        wake(self.bell());

        let start = Instant::now();
        loop {
            let answer = state.load(Ordering::Acquire);
            if answer == ANSWERED || answer == REFUSED {
                let bytes = bytes(place);
                state.store(FREE, Ordering::Release);
                return match answer {
                    ANSWERED => Ok(bytes),
                    _ => Err(String::from_utf8_lossy(&bytes).into_owned()),
                };
            }
            if start.elapsed() > PATIENCE {
                // The place is lost, since the answer may yet come.
                return Err(format!("`msrgate run` gives no answer within {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Answers for ever: with a decision map's bytes, or with why there is none.
    pub fn serve(&self, answer: &dyn Fn(Vec<Leaf>) -> Result<Vec<u8>, String>) -> ! {
        loop {
            let rung = self.bell().load(Ordering::Acquire);
            for place in self.places() {
                let state = word(place, STATE);
                if state.load(Ordering::Acquire) != ASKED {
                    continue;
                }
                let answer = answer(leaves(place)).and_then(|bytes| match bytes.len() {
                    ..=MOST => Ok(bytes),
                    len => Err(format!("the policy takes {len} bytes, and {MOST} can be handed over")),
                });
                let (answer, next) = match answer {
                    Ok(bytes) => (bytes, ANSWERED),
                    Err(line) => (line.into_bytes(), REFUSED),
                };
                let answer = answer.get(..MOST).unwrap_or(&answer);
                for (at, chunk) in (ANSWER..).zip(answer.chunks(8)) {
                    let mut bytes = [0; 8];
                    bytes.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
                    set(place, at, u64::from_le_bytes(bytes));
                }
                set(place, LENGTH, answer.len() as u64);
                state.store(next, Ordering::Release);
            }
            wait(self.bell(), rung);
        }
    }
}

/// The question's leaves, whatever the words are.
fn leaves(place: &[AtomicU64]) -> Vec<Leaf> {
    let count = usize::try_from(get(place, LENGTH)).unwrap_or(LEAVES).min(LEAVES);
    let halves = |at| {
        let word = get(place, at);
        (word as u32, (word >> 32) as u32)
    };
    let leaf = |at| {
        let ((function, index), (eax, ebx), (ecx, edx)) = (halves(at), halves(at + 1), halves(at + 2));
        (function, index, [eax, ebx, ecx, edx])
    };
    (QUESTION..).step_by(LEAF).take(count).map(leaf).collect()
}

/// The answer's bytes, whatever the words are.
fn bytes(place: &[AtomicU64]) -> Vec<u8> {
    let len = usize::try_from(get(place, LENGTH)).unwrap_or(MOST).min(MOST);
    let words = (ANSWER..).take(len.div_ceil(8));
    let mut bytes: Vec<u8> = words.flat_map(|at| get(place, at).to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// Lets those go on that wait for the word to change.
fn wake(word: &AtomicU64) {
    // SAFETY: an aligned word that lives over the call, which reads and writes nothing there.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, c_int::MAX) };
}

/// Waits while the word's lower half is `known`'s, or shorter.
fn wait(word: &AtomicU64, known: u64) {
    let forever = std::ptr::null::<libc::timespec>();
    // SAFETY: an aligned word, of which the kernel reads the lower half, and no time; both live over the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, known as u32, forever) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn desk() -> Arc<Desk> {
        let file = crate::handover::memfd(c"test", Desk::BYTES as u64).unwrap();
        Arc::new(Desk::new(Mapping::new(&file, 0, Desk::BYTES).unwrap()))
    }

    fn served(answer: impl Fn(Vec<Leaf>) -> Result<Vec<u8>, String> + Send + 'static) -> Arc<Desk> {
        let desk = desk();
        let served = Arc::clone(&desk);
        std::thread::spawn(move || served.serve(&answer));
        desk
    }

    #[test]
    fn who_asks_gets_the_answer_to_his_own_question_also_where_many_ask() {
        let desk = served(|leaves| match leaves.last() {
            Some((7, index, [eax, ..])) => Ok(vec![*index as u8; *eax as usize]),
            other => Err(format!("{} leaves, {other:?}", leaves.len())),
        });
        std::thread::scope(|scope| {
            for index in 0..PLACES as u32 {
                let desk = &desk;
                scope.spawn(move || {
                    for len in [0, 1, 8, 9, 4099] {
                        let leaves = [(0, 0, [1, 2, 3, 4]), (7, index, [len, u32::MAX, 0, 5])];
                        assert_eq!(desk.ask(&leaves), Ok(vec![index as u8; len as usize]));
                    }
                });
            }
        });
        let full = vec![(u32::MAX, 1, [2, 3, 4, 5]); LEAVES];
        let line = "256 leaves, Some((4294967295, 1, [2, 3, 4, 5]))";
        assert_eq!(desk.ask(&full), Err(line.to_owned()));
    }

    #[test]
    fn an_answer_that_has_no_room_is_a_refusal() {
        let desk = served(|_| Ok(vec![0; MOST + 1]));
        assert!(desk.ask(&[]).unwrap_err().contains("can be handed over"));
    }

    #[test]
    fn places_of_the_dead_are_lost_and_then_nobody_is_answered() {
        let desk = desk();
        for place in desk.places() {
            word(place, STATE).store(TAKEN, Ordering::Relaxed);
        }
        assert_eq!(desk.ask(&[]), Err("too many ask at once".to_owned()));
    }
}
