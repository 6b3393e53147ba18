//! A decision map as bytes, for handing it to another process that parses no text.
//!
//! Little-endian and without padding: a magic number, the reads, the writes, and what `unknown` and `invalid` say. Reads and
//! writes are a count and, for each interval, its first MSR, rule, log and action. The last byte is followed by nothing.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use msrgate_core::{Argument, Arguments, Did, Log, Msr, MsrRange, Otherwise, ReadAction, WriteAction};
use sha2::{Digest, Sha256};

use crate::{Decision, DecisionMap, Intervals};

/// Names the format and its version.
const MAGIC: [u8; 8] = *b"msrgate4";

/// Stands for a decision that no rule made.
const NO_RULE: u32 = u32::MAX;

impl DecisionMap {
    /// The map as bytes that [`DecisionMap::from_bytes`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put_intervals(&mut bytes, self.reads(), |bytes, decision| {
            put_source(bytes, decision);
            put_read(bytes, &decision.action);
        });
        put_intervals(&mut bytes, self.writes(), |bytes, decision| {
            put_source(bytes, decision);
            put_write(bytes, &decision.action);
        });
        self.put_fallbacks(&mut bytes);
        bytes
    }

    fn put_fallbacks(&self, bytes: &mut Vec<u8>) {
        for (read, write) in [self.unknown(), self.invalid()] {
            put_read(bytes, read);
            put_write(bytes, write);
        }
    }

    /// A name for what the map means: equal for maps that give every access the same, whatever rules say so and whatever
    /// the kernel holds.
    ///
    /// SHA-256 over the bytes of the map without its rules and logs.
    pub fn hash(&self) -> [u8; 32] {
        let mut bytes = b"msrgate decision map 2\n".to_vec();
        put_intervals(
            &mut bytes,
            &self.reads().map(|decision| decision.action.clone()),
            put_read,
        );
        put_intervals(
            &mut bytes,
            &self.writes().map(|decision| decision.action.clone()),
            put_write,
        );
        self.put_fallbacks(&mut bytes);
        Sha256::digest(&bytes).into()
    }

    /// Reads a map back. Whatever the bytes hold, the answer is a whole map or an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<DecisionMap, DecodeError> {
        let mut rest = Rest(bytes);
        if rest.array::<8>()? != MAGIC {
            return Err(DecodeError);
        }
        let reads = intervals(&mut rest, read)?;
        let writes = intervals(&mut rest, write)?;
        let unknown = (read(&mut rest)?, write(&mut rest)?);
        let invalid = (read(&mut rest)?, write(&mut rest)?);
        if !rest.0.is_empty() {
            return Err(DecodeError);
        }
        Ok(DecisionMap::new(reads, writes)
            .with_unknown(unknown)
            .with_invalid(invalid))
    }
}

/// The bytes are not a decision map of this version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DecodeError;

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes are not a decision map of this version of msrgate")
    }
}

impl core::error::Error for DecodeError {}

fn put_intervals<A: Clone + Eq>(bytes: &mut Vec<u8>, map: &Intervals<A>, put: impl Fn(&mut Vec<u8>, &A)) {
    put_count(bytes, map.len());
    for (range, value) in map.iter() {
        bytes.extend(range.first().0.to_le_bytes());
        put(bytes, value);
    }
}

fn put_source<A>(bytes: &mut Vec<u8>, decision: &Decision<A>) {
    bytes.extend(decision.rule.unwrap_or(NO_RULE).to_le_bytes());
    let (kind, n) = match decision.log {
        Log::None => (0, 0),
        Log::All => (1, 0),
        Log::First => (2, 0),
        Log::PerSecond(n) => (3, n),
    };
    bytes.push(kind);
    bytes.extend(n.to_le_bytes());
}

fn put_count(bytes: &mut Vec<u8>, count: usize) {
    // More than 2^32 of anything does not fit in memory.
    bytes.extend(u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_action<'a>(bytes: &mut Vec<u8>, did: Did, arguments: impl Iterator<Item = (&'static str, Argument<'a>)>) {
    bytes.push(did as u8);
    for (_, argument) in arguments {
        match argument {
            Argument::Number(number) => bytes.extend(number.to_le_bytes()),
            Argument::Numbers(numbers) => {
                put_count(bytes, numbers.len());
                bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Argument::Name(name) => {
                put_count(bytes, name.len());
                bytes.extend(name.as_bytes());
            }
            Argument::Otherwise(otherwise) => bytes.push(otherwise as u8),
        }
    }
}

fn put_read(bytes: &mut Vec<u8>, action: &ReadAction) {
    put_action(bytes, action.did(), action.arguments());
}

fn put_write(bytes: &mut Vec<u8>, action: &WriteAction) {
    put_action(bytes, action.did(), action.arguments());
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(DecodeError)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(DecodeError)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self) -> Result<usize, DecodeError> {
        usize::try_from(self.u32()?).map_err(|_| DecodeError)
    }

    fn did(&mut self) -> Result<Did, DecodeError> {
        Did::from_number(self.byte()?).ok_or(DecodeError)
    }
}

impl Arguments for Rest<'_> {
    type Error = DecodeError;

    fn number(&mut self, _: &'static str) -> Result<u64, DecodeError> {
        self.u64()
    }

    fn numbers(&mut self, _: &'static str) -> Result<Arc<[u64]>, DecodeError> {
        let count = self.count()?;
        let bytes = self.take(count.checked_mul(8).ok_or(DecodeError)?)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    fn name(&mut self, _: &'static str) -> Result<Arc<str>, DecodeError> {
        let count = self.count()?;
        let name = core::str::from_utf8(self.take(count)?);
        name.map(Arc::from).map_err(|_| DecodeError)
    }

    fn otherwise(&mut self, _: &'static str) -> Result<Otherwise, DecodeError> {
        let number = usize::from(self.byte()?);
        Otherwise::ALL.get(number).copied().ok_or(DecodeError)
    }
}

fn intervals<A: Clone + Eq>(
    rest: &mut Rest<'_>,
    action: impl Fn(&mut Rest<'_>) -> Result<A, DecodeError>,
) -> Result<Intervals<Decision<A>>, DecodeError> {
    let mut starts: Vec<(Msr, Decision<A>)> = Vec::new();
    for _ in 0..rest.count()? {
        let first = Msr(rest.u32()?);
        let rule = Some(rest.u32()?).filter(|rule| *rule != NO_RULE);
        let log = match (rest.byte()?, rest.u32()?) {
            (0, 0) => Log::None,
            (1, 0) => Log::All,
            (2, 0) => Log::First,
            (3, n) => Log::PerSecond(n),
            _ => return Err(DecodeError),
        };
        let in_order = starts.last().map_or(first == Msr::MIN, |(last, _)| *last < first);
        if !in_order {
            return Err(DecodeError);
        }
        starts.push((
            first,
            Decision {
                action: action(rest)?,
                rule,
                log,
            },
        ));
    }
    let ends: Vec<Msr> = starts
        .iter()
        .skip(1)
        .map(|(next, _)| Msr(next.0 - 1))
        .chain([Msr::MAX])
        .collect();
    let (_, default) = starts.first().cloned().ok_or(DecodeError)?;
    let ranges = starts.into_iter().zip(ends);
    Ok(Intervals::first_match(
        default,
        ranges.filter_map(|((first, decision), last)| Some((MsrRange::new(first, last)?, decision))),
    ))
}

fn read(rest: &mut Rest<'_>) -> Result<ReadAction, DecodeError> {
    let did = rest.did()?;
    let action = ReadAction::of(did, rest)?;
    action.filter(|action| action.did() == did).ok_or(DecodeError)
}

fn write(rest: &mut Rest<'_>) -> Result<WriteAction, DecodeError> {
    let did = rest.did()?;
    let action = WriteAction::of(did, rest)?;
    action.filter(|action| action.did() == did).ok_or(DecodeError)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map with every action and every log.
    fn everything() -> DecisionMap {
        let reads = [
            ReadAction::Deny,
            ReadAction::Value(7),
            ReadAction::Shadow(8),
            ReadAction::Mask { keep: 1, set: 2 },
            ReadAction::Host,
            ReadAction::Handler("é".into()),
        ];
        let writes = [
            WriteAction::Deny,
            WriteAction::Ignore,
            WriteAction::Shadow,
            WriteAction::Mask {
                may_change: 3,
                otherwise: Otherwise::Deny,
            },
            WriteAction::Mask {
                may_change: 3,
                otherwise: Otherwise::Drop,
            },
            WriteAction::Once,
            WriteAction::Handler("power".into()),
            WriteAction::Only(Arc::new([1, u64::MAX])),
        ];
        let logs = [Log::None, Log::All, Log::First, Log::PerSecond(9)];
        fn map<A: Clone + Eq>(default: A, actions: &[A], logs: &[Log]) -> Intervals<Decision<A>> {
            let ranges = actions
                .iter()
                .zip(0u32..)
                .zip(logs.iter().cycle())
                .map(|((action, i), log)| {
                    let range = MsrRange::single(Msr(i * 16));
                    (
                        range,
                        Decision {
                            action: action.clone(),
                            rule: Some(i),
                            log: *log,
                        },
                    )
                });
            Intervals::first_match(Decision::of(default), ranges)
        }
        DecisionMap::new(
            map(ReadAction::Allow, &reads, &logs),
            map(WriteAction::Allow, &writes, &logs),
        )
        .with_unknown((ReadAction::Value(0), WriteAction::Ignore))
        .with_invalid((ReadAction::Deny, WriteAction::Deny))
    }

    #[test]
    fn a_map_reads_back_as_it_was() {
        for map in [everything(), DecisionMap::allow_all()] {
            assert_eq!(DecisionMap::from_bytes(&map.to_bytes()), Ok(map));
        }
    }

    #[test]
    fn cut_or_changed_bytes_are_an_error_or_a_whole_map() {
        let bytes = everything().to_bytes();
        for end in 0..bytes.len() {
            assert_eq!(DecisionMap::from_bytes(&bytes[..end]), Err(DecodeError), "cut at {end}");
        }
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                if let Ok(map) = DecisionMap::from_bytes(&changed) {
                    assert_eq!(DecisionMap::from_bytes(&map.to_bytes()), Ok(map));
                }
            }
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        assert_eq!(DecisionMap::from_bytes(&longer), Err(DecodeError));
    }

    #[test]
    fn the_hash_names_the_meaning_and_not_the_rules() {
        let map = |rule, value| {
            DecisionMap::allow_all().with_reads(Intervals::first_match(
                Decision::of(ReadAction::Allow),
                [(
                    MsrRange::single(Msr(0x8b)),
                    Decision {
                        action: ReadAction::Value(value),
                        rule: Some(rule),
                        log: Log::None,
                    },
                )],
            ))
        };
        assert_eq!(map(0, 1).hash(), map(1, 1).hash());
        assert_ne!(map(0, 1).hash(), map(0, 2).hash());
        assert_ne!(map(0, 1).hash(), DecisionMap::allow_all().hash());
    }

    /// Each action and each of its fields by the first bytes of the hash of a map that has it, which is what a saved vCPU
    /// is told by: a change here refuses every state that was saved before.
    #[test]
    fn each_action_and_each_of_its_fields_has_the_hash_that_it_always_had() {
        let reads = [
            (ReadAction::Allow, "bbc586c8"),
            (ReadAction::Deny, "20caba68"),
            (ReadAction::Value(0), "7c810346"),
            (ReadAction::Value(1), "e2cec2e2"),
            (ReadAction::Shadow(0), "d996d15d"),
            (ReadAction::Shadow(1), "32c7abdf"),
            (ReadAction::Mask { keep: 0, set: 0 }, "36379342"),
            (ReadAction::Mask { keep: 1, set: 0 }, "fecae20e"),
            (ReadAction::Mask { keep: 0, set: 1 }, "d2278441"),
            (ReadAction::Host, "f31cad95"),
            (ReadAction::Handler("a".into()), "1febb63d"),
            (ReadAction::Handler("b".into()), "ce90a1e5"),
        ];
        let mask = |may_change, otherwise| WriteAction::Mask { may_change, otherwise };
        let writes = [
            (WriteAction::Allow, "84f3af37"),
            (WriteAction::Deny, "1d61e7bf"),
            (WriteAction::Ignore, "22a5b3b6"),
            (WriteAction::Shadow, "3a40c42e"),
            (mask(0, Otherwise::Deny), "d98ca382"),
            (mask(1, Otherwise::Deny), "64107234"),
            (mask(0, Otherwise::Drop), "eae9b955"),
            (WriteAction::Only(Arc::new([])), "798743d2"),
            (WriteAction::Only(Arc::new([1])), "1bd5ebf9"),
            (WriteAction::Only(Arc::new([1, 2])), "1ad166b8"),
            (WriteAction::Once, "db4f0947"),
            (WriteAction::Handler("a".into()), "e2922869"),
            (WriteAction::Handler("b".into()), "72e582e3"),
        ];
        let mut hashes = Vec::new();
        let mut check = |map: &DecisionMap, what: &dyn fmt::Debug, golden: &str| {
            let [a, b, c, d, ..] = map.hash();
            let hash = alloc::format!("{:08x}", u32::from_be_bytes([a, b, c, d]));
            assert_eq!(hash, golden, "{what:?}");
            hashes.push(hash);
        };
        let msr = MsrRange::single(Msr(0x10));
        for (action, golden) in reads {
            let map = DecisionMap::allow_all();
            let reads =
                Intervals::first_match(map.reads().get(Msr::MIN).clone(), [(msr, Decision::of(action.clone()))]);
            let map = map
                .with_reads(reads)
                .with_unknown((ReadAction::Host, WriteAction::Deny));
            check(&map, &action, golden);
        }
        for (action, golden) in writes {
            let map = DecisionMap::allow_all();
            let writes = Intervals::first_match(
                map.writes().get(Msr::MIN).clone(),
                [(msr, Decision::of(action.clone()))],
            );
            let map = map.with_writes(writes);
            check(&map, &action, golden);
        }
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), 25, "two actions have one hash");
    }
}
