//! What a vCPU's gate remembers, as text that goes along with a saved guest.
//!
//! ```text
//! msrgate-state 1
//! policy 6be58b1a…                     64 hexadecimal digits: the policy's hash
//! once 0xc0000082                      the one write of this MSR has been made
//! shadow 0xc0010015 0x1000010          what the guest wrote to a shadow register
//! end 2 0x48debdc74d01b2fc             how many lines, and a sum of all before it
//! ```
//!
//! Lines end with a newline, and stand in order of MSR, `shadow` before `once`. Numbers are as Rust's `{:#x}` prints them.

use std::fmt::{self, Write};

use msrgate_core::{ActionTable, EmulatedState, EmulatedStateError, Msr, VcpuState};

use crate::OsError;

/// The version of the text, its first line's number.
pub const STATE_VERSION: u32 = 1;

/// The most bytes of a state: more than a table can remember.
const MOST_BYTES: usize = 32 << 20;

const NO_HASH: &str = "the plan has no hash: compile it where msrgate-plan has the feature `hash`";

/// The text of what `state` remembers.
pub(crate) fn write(policy: &[u8; 32], table: &ActionTable, state: &VcpuState) -> String {
    let mut memories: Vec<EmulatedState> = table.emulated_states(state).collect();
    memories.sort_unstable_by_key(place);
    let mut text = format!("msrgate-state {STATE_VERSION}\npolicy {}\n", hex(policy));
    for memory in &memories {
        // Writing to a string cannot fail.
        let _ = match memory {
            EmulatedState::Shadow { msr, value } => writeln!(text, "shadow {msr} {value:#x}"),
            EmulatedState::Once { msr } => writeln!(text, "once {msr}"),
        };
    }
    let sum = sum(&text);
    let _ = writeln!(text, "end {} {sum:#x}", memories.len());
    text
}

/// What the text says, if it is whole and of this policy.
pub(crate) fn read(text: &[u8], policy: &[u8; 32]) -> Result<Vec<EmulatedState>, StateError> {
    if text.len() > MOST_BYTES {
        return Err(StateError::TooLong);
    }
    let text = std::str::from_utf8(text).map_err(|_| StateError::NoState)?;
    let mut lines = text.lines();
    let version = lines.next().and_then(|line| line.strip_prefix("msrgate-state "));
    let version = version.ok_or(StateError::NoState)?;
    if version != STATE_VERSION.to_string() {
        return Err(StateError::Version {
            found: version.chars().take(20).collect(),
        });
    }
    // The last line tells whether all before it is there, and is as it was written.
    let body = text.strip_suffix('\n').ok_or(StateError::Damaged)?;
    let (body, end) = body.rsplit_once('\n').ok_or(StateError::Damaged)?;
    let body = text.get(..=body.len()).ok_or(StateError::Damaged)?;
    let (count, told) = end
        .strip_prefix("end ")
        .and_then(|end| end.split_once(' '))
        .ok_or(StateError::Damaged)?;
    let mut lines = body.lines().skip(1);
    let owner = lines.next().and_then(|line| line.strip_prefix("policy "));
    let owner = owner.ok_or(StateError::Damaged)?;
    if told != format!("{:#x}", sum(body)) {
        return Err(StateError::Damaged);
    }
    if owner != hex(policy) {
        return Err(StateError::OtherPolicy {
            found: owner.chars().take(64).collect(),
            ours: *policy,
        });
    }
    let memories = lines.map(memory).collect::<Option<Vec<EmulatedState>>>();
    let memories = memories.ok_or(StateError::Damaged)?;
    if count != memories.len().to_string() || !memories.is_sorted_by_key(place) {
        return Err(StateError::Damaged);
    }
    Ok(memories)
}

fn place(memory: &EmulatedState) -> (Msr, bool) {
    match memory {
        EmulatedState::Shadow { msr, .. } => (*msr, false),
        EmulatedState::Once { msr } => (*msr, true),
    }
}

fn memory(line: &str) -> Option<EmulatedState> {
    let mut words = line.split(' ');
    let memory = match (words.next()?, words.next()?) {
        ("shadow", msr) => EmulatedState::Shadow {
            msr: self::msr(msr)?,
            value: number(words.next()?)?,
        },
        ("once", msr) => EmulatedState::Once { msr: self::msr(msr)? },
        _ => return None,
    };
    words.next().is_none().then_some(memory)
}

fn msr(text: &str) -> Option<Msr> {
    u32::try_from(number(text)?).ok().map(Msr)
}

/// A number in its only spelling.
fn number(text: &str) -> Option<u64> {
    let value = u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
    (format!("{value:#x}") == text).then_some(value)
}

/// FNV-1a of 64 bits. It finds damage, and is no seal.
fn sum(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a state is not restored. What the gate remembered before it still does.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum StateError {
    /// The text is not a saved state.
    NoState,
    /// The text is of another version of the format.
    Version {
        /// Which.
        found: String,
    },
    /// The text is cut off, or was changed.
    Damaged,
    /// The text is longer than any state.
    TooLong,
    /// The guest ran under another policy.
    OtherPolicy {
        /// The hash of that policy, in hexadecimal.
        found: String,
        /// The hash of the one in force here.
        ours: [u8; 32],
    },
    /// It remembers what an MSR cannot under this policy: it was made by nothing that saves states.
    EmulatedState(EmulatedStateError),
    /// The vCPU is being answered for: the call came from within a handler.
    InHandler,
    /// The plan in force has no hash to compare with.
    NoHash,
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::NoState => f.write_str("this is not a state of a vCPU's gate"),
            StateError::Version { found } => write!(
                f,
                "the state has version `{found}`, and this msrgate reads version {STATE_VERSION}"
            ),
            StateError::Damaged => f.write_str("the state is cut off or was changed: save it again"),
            StateError::TooLong => write!(f, "the state has more than {MOST_BYTES} bytes"),
            StateError::OtherPolicy { found, ours } => write!(
                f,
                "the guest ran under the policy with hash {found}, and the one in force has {}: install that policy first",
                hex(ours)
            ),
            StateError::EmulatedState(error) => error.fmt(f),
            StateError::InHandler => f.write_str("a handler cannot save or restore the vCPU that waits for it"),
            StateError::NoHash => f.write_str(NO_HASH),
        }
    }
}

impl std::error::Error for StateError {}

/// Why a state is not saved.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum SaveError {
    /// An MSR exit that was not dispatched is in `kvm_run`.
    Unanswered,
    /// Completing the last exit made another, which is in `kvm_run`.
    Exit,
    /// KVM_RUN failed.
    Run(OsError),
    /// The vCPU is being answered for: the call came from within a handler.
    InHandler,
    /// The plan in force has no hash by which the state could be told.
    NoHash,
}

impl fmt::Display for SaveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SaveError::Unanswered => "an MSR exit waits for its answer: dispatch it first",
            SaveError::Exit => "another exit is in `kvm_run`: handle it, and save again",
            SaveError::Run(_) => "KVM_RUN failed",
            SaveError::InHandler => "a handler cannot save the vCPU that waits for it",
            SaveError::NoHash => NO_HASH,
        })
    }
}

impl std::error::Error for SaveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            SaveError::Run(error) => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Entry, Log, MsrRange, ReadAction, WriteAction};

    use super::*;

    const POLICY: [u8; 32] = [0xa5; 32];

    fn table() -> ActionTable {
        let entry = |first, last, action| {
            let range = MsrRange::new(Msr(first), Msr(last)).unwrap();
            Entry::new(range, action, None, Log::None)
        };
        let writes = vec![
            entry(0x20, 0x2f, WriteAction::Shadow),
            entry(0xc000_0082, 0xc000_0083, WriteAction::Once),
        ];
        let deny = (ReadAction::Deny, WriteAction::Deny);
        ActionTable::new(Vec::new(), writes, deny.clone(), deny).unwrap()
    }

    fn state(table: &ActionTable) -> VcpuState {
        let mut state = table.vcpu_state();
        let memories = [
            EmulatedState::Once { msr: Msr(0xc000_0082) },
            EmulatedState::Shadow {
                msr: Msr(0x21),
                value: 0xfedc_ba98_7654_3210,
            },
        ];
        table.restore(&mut state, memories).unwrap();
        state
    }

    /// The text of these lines, with its end.
    fn whole(lines: &[&str]) -> String {
        let mut text = format!("msrgate-state 1\npolicy {}\n", hex(&POLICY));
        for line in lines {
            let _ = writeln!(text, "{line}");
        }
        let sum = sum(&text);
        let _ = writeln!(text, "end {} {sum:#x}", lines.len());
        text
    }

    #[test]
    fn a_state_reads_back_and_is_written_as_documented() {
        let table = table();
        let text = write(&POLICY, &table, &state(&table));
        assert_eq!(text, whole(&["shadow 0x21 0xfedcba9876543210", "once 0xc0000082"]));
        let mut again = table.vcpu_state();
        table
            .restore(&mut again, read(text.as_bytes(), &POLICY).unwrap())
            .unwrap();
        assert_eq!(again, state(&table));
        let nothing = write(&POLICY, &table, &table.vcpu_state());
        assert_eq!(read(nothing.as_bytes(), &POLICY), Ok(Vec::new()));
    }

    #[test]
    fn a_state_that_is_cut_off_anywhere_or_has_any_byte_changed_is_refused() {
        let table = table();
        let text = write(&POLICY, &table, &state(&table)).into_bytes();
        for length in 0..text.len() {
            assert!(read(&text[..length], &POLICY).is_err(), "{length} bytes");
        }
        for at in 0..text.len() {
            for flip in [1, 2, 4, 8, 16, 32, 64, 128] {
                let mut changed = text.clone();
                changed[at] ^= flip;
                assert!(read(&changed, &POLICY).is_err(), "bit {flip:#x} of byte {at}");
            }
        }
        let longer = [&text[..], b"x"].concat();
        assert!(read(&longer, &POLICY).is_err());
        assert!(read(&[&text[..], &text[..]].concat(), &POLICY).is_err());
    }

    #[test]
    fn a_state_of_another_policy_or_version_or_none_at_all_is_told_apart() {
        let table = table();
        let text = write(&POLICY, &table, &state(&table));
        let found = hex(&POLICY);
        let ours = [0; 32];
        assert_eq!(
            read(text.as_bytes(), &ours),
            Err(StateError::OtherPolicy { found, ours })
        );
        let next = text.replace("msrgate-state 1", "msrgate-state 2");
        let found = "2".to_owned();
        assert_eq!(read(next.as_bytes(), &POLICY), Err(StateError::Version { found }));
        for text in [&b""[..], b"\n", b"ELF", b"\xff\xfe", b"{}"] {
            assert_eq!(read(text, &POLICY), Err(StateError::NoState));
        }
        assert_eq!(read(&vec![b' '; MOST_BYTES + 1], &POLICY), Err(StateError::TooLong));
    }

    #[test]
    fn the_document_shows_a_state() {
        let document = include_str!("../docs/migration.md");
        let shown = document.split("```text\n").nth(1).expect("an example");
        let shown = shown.split("```").next().expect("its end");
        let policy = shown.lines().nth(1).expect("a policy").trim_start_matches("policy ");
        let mut hash = [0; 32];
        for (byte, place) in hash.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&policy[place..place + 2], 16).expect("a hash");
        }
        let body = shown.split("end ").next().expect("a body");
        let memories = read(shown.as_bytes(), &hash);
        assert_eq!(memories.map(|found| found.len()), Ok(2), "the sum is {:#x}", sum(body));
    }

    #[test]
    fn lines_that_nothing_writes_are_refused_though_their_sum_is_right() {
        for line in [
            "",
            "once",
            "once 0xc0000082 ",
            "once 0xC0000082",
            "once 0x0c0000082",
            "once 3221225602",
            "once 0x1c0000082",
            "once 0x+1",
            "shadow 0x21",
            "shadow 0x21 0x1 0x1",
            "shadow 0x21 0x10000000000000000",
            "open 0xc0000082",
            "policy 0x1",
        ] {
            let text = whole(&[line]);
            assert_eq!(read(text.as_bytes(), &POLICY), Err(StateError::Damaged), "`{line}`");
        }
        let disordered = whole(&["once 0xc0000082", "shadow 0x21 0x1"]);
        assert_eq!(read(disordered.as_bytes(), &POLICY), Err(StateError::Damaged));
    }
}
