//! A decision map as bytes, for handing it to another process that parses no text.
//!
//! Little-endian and without padding: a magic number, the reads, the writes, what `unknown` and `invalid` say, then what
//! the kernel holds, what may be spilled, and the profile. Reads and writes are a count and, for each interval, its first
//! MSR, rule, log and action; the others are a count and, for each MSR, its index and what is said of it; whether anything
//! may be spilled stands in a byte before that count. The last byte is followed by nothing.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use msrgate_core::{Log, Msr, MsrRange, Op, Otherwise, ReadAction, WriteAction};

use crate::{Decision, DecisionMap, Intervals, Preset, Spillable, Touched};

/// Names the format and its version.
const MAGIC: [u8; 8] = *b"msrgate3";

/// Stands for a decision that no rule made.
const NO_RULE: u32 = u32::MAX;

impl DecisionMap {
    /// The map as bytes that [`DecisionMap::from_bytes`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put_intervals(&mut bytes, &self.reads, put_read);
        put_intervals(&mut bytes, &self.writes, put_write);
        for (read, write) in [&self.unknown, &self.invalid] {
            put_read(&mut bytes, read);
            put_write(&mut bytes, write);
        }
        put_count(&mut bytes, self.held.len());
        for Preset { msr, value } in &self.held {
            bytes.extend(msr.0.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.push(u8::from(self.spill.is_some()));
        let spill = self.spill.as_deref().unwrap_or_default();
        put_count(&mut bytes, spill.len());
        for Spillable { msr, op, weight } in spill {
            bytes.extend(msr.0.to_le_bytes());
            bytes.push(*op as u8);
            bytes.extend(weight.to_le_bytes());
        }
        put_count(&mut bytes, self.profile.len());
        for Touched { msr, op, count } in &self.profile {
            bytes.extend(msr.0.to_le_bytes());
            bytes.push(*op as u8);
            bytes.extend(count.to_le_bytes());
        }
        bytes
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
        let held = presets(&mut rest)?;
        let spills = match rest.byte()? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError),
        };
        let spill = sorted(&mut rest, |rest| {
            Ok(Spillable {
                msr: Msr(rest.u32()?),
                op: op(rest)?,
                weight: rest.array().map(u16::from_le_bytes)?,
            })
        })?;
        let profile = sorted(&mut rest, |rest| {
            Ok(Touched {
                msr: Msr(rest.u32()?),
                op: op(rest)?,
                count: rest.u64()?,
            })
        })?;
        if !spills && !spill.is_empty() {
            return Err(DecodeError);
        }
        if !rest.0.is_empty() {
            return Err(DecodeError);
        }
        Ok(DecisionMap {
            reads,
            writes,
            unknown,
            invalid,
            held,
            spill: spills.then_some(spill),
            profile,
        })
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

fn put_intervals<A: Clone + Eq>(bytes: &mut Vec<u8>, map: &Intervals<Decision<A>>, put: impl Fn(&mut Vec<u8>, &A)) {
    put_count(bytes, map.len());
    for (range, decision) in map.iter() {
        bytes.extend(range.first().0.to_le_bytes());
        bytes.extend(decision.rule.unwrap_or(NO_RULE).to_le_bytes());
        let (kind, n) = match decision.log {
            Log::None => (0, 0),
            Log::All => (1, 0),
            Log::First => (2, 0),
            Log::PerSecond(n) => (3, n),
        };
        bytes.push(kind);
        bytes.extend(n.to_le_bytes());
        put(bytes, &decision.action);
    }
}

fn put_count(bytes: &mut Vec<u8>, count: usize) {
    // More than 2^32 of anything does not fit in memory.
    bytes.extend(u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_name(bytes: &mut Vec<u8>, name: &str) {
    put_count(bytes, name.len());
    bytes.extend(name.as_bytes());
}

fn put_read(bytes: &mut Vec<u8>, action: &ReadAction) {
    let mut put = |tag: u8, words: &[u64]| {
        bytes.push(tag);
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    match action {
        ReadAction::Allow => put(0, &[]),
        ReadAction::Deny => put(1, &[]),
        ReadAction::Value(value) => put(2, &[*value]),
        ReadAction::Shadow(initial) => put(3, &[*initial]),
        ReadAction::Mask { keep, set } => put(4, &[*keep, *set]),
        ReadAction::Host => put(5, &[]),
        ReadAction::Handler(name) => {
            put(6, &[]);
            put_name(bytes, name);
        }
    }
}

fn put_write(bytes: &mut Vec<u8>, action: &WriteAction) {
    let mut put = |tag: u8, words: &[u64]| {
        bytes.push(tag);
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    match action {
        WriteAction::Allow => put(0, &[]),
        WriteAction::Deny => put(1, &[]),
        WriteAction::Ignore => put(2, &[]),
        WriteAction::Shadow => put(3, &[]),
        WriteAction::Mask {
            may_change,
            otherwise: Otherwise::Deny,
        } => put(4, &[*may_change]),
        WriteAction::Mask {
            may_change,
            otherwise: Otherwise::Drop,
        } => put(5, &[*may_change]),
        WriteAction::Once => put(6, &[]),
        WriteAction::Handler(name) => {
            put(7, &[]);
            put_name(bytes, name);
        }
        WriteAction::Only(values) => {
            put(8, &[]);
            put_count(bytes, values.len());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
    }
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

    fn name(&mut self) -> Result<Arc<str>, DecodeError> {
        let count = self.count()?;
        core::str::from_utf8(self.take(count)?)
            .map(Arc::from)
            .map_err(|_| DecodeError)
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

fn presets(rest: &mut Rest<'_>) -> Result<Vec<Preset>, DecodeError> {
    let mut presets: Vec<Preset> = Vec::new();
    for _ in 0..rest.count()? {
        let preset = Preset {
            msr: Msr(rest.u32()?),
            value: rest.u64()?,
        };
        if presets.last().is_some_and(|last| last.msr >= preset.msr) {
            return Err(DecodeError);
        }
        presets.push(preset);
    }
    Ok(presets)
}

fn op(rest: &mut Rest<'_>) -> Result<Op, DecodeError> {
    let op = rest.byte()?;
    Op::ALL.into_iter().find(|known| *known as u8 == op).ok_or(DecodeError)
}

fn sorted<T: Ord>(
    rest: &mut Rest<'_>,
    one: impl Fn(&mut Rest<'_>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let mut all: Vec<T> = Vec::new();
    for _ in 0..rest.count()? {
        let next = one(rest)?;
        if all.last().is_some_and(|last| *last >= next) {
            return Err(DecodeError);
        }
        all.push(next);
    }
    Ok(all)
}

fn read(rest: &mut Rest<'_>) -> Result<ReadAction, DecodeError> {
    Ok(match rest.byte()? {
        0 => ReadAction::Allow,
        1 => ReadAction::Deny,
        2 => ReadAction::Value(rest.u64()?),
        3 => ReadAction::Shadow(rest.u64()?),
        4 => ReadAction::Mask {
            keep: rest.u64()?,
            set: rest.u64()?,
        },
        5 => ReadAction::Host,
        6 => ReadAction::Handler(rest.name()?),
        _ => return Err(DecodeError),
    })
}

fn write(rest: &mut Rest<'_>) -> Result<WriteAction, DecodeError> {
    Ok(match rest.byte()? {
        0 => WriteAction::Allow,
        1 => WriteAction::Deny,
        2 => WriteAction::Ignore,
        3 => WriteAction::Shadow,
        4 => WriteAction::Mask {
            may_change: rest.u64()?,
            otherwise: Otherwise::Deny,
        },
        5 => WriteAction::Mask {
            may_change: rest.u64()?,
            otherwise: Otherwise::Drop,
        },
        6 => WriteAction::Once,
        7 => WriteAction::Handler(rest.name()?),
        8 => {
            let count = rest.count()?;
            let bytes = rest.take(count.checked_mul(8).ok_or(DecodeError)?)?;
            WriteAction::Only(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|word| u64::from_le_bytes(*word))
                    .collect(),
            )
        }
        _ => return Err(DecodeError),
    })
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
        DecisionMap {
            reads: map(ReadAction::Allow, &reads, &logs),
            writes: map(WriteAction::Allow, &writes, &logs),
            unknown: (ReadAction::Value(0), WriteAction::Ignore),
            invalid: (ReadAction::Deny, WriteAction::Deny),
            held: [(0x8b, u64::MAX), (0x606, 0)]
                .map(|(msr, value)| Preset { msr: Msr(msr), value })
                .to_vec(),
            spill: Some(
                [(0x174, Op::Write), (0x175, Op::Read)]
                    .map(|(msr, op)| Spillable {
                        msr: Msr(msr),
                        op,
                        weight: 3,
                    })
                    .to_vec(),
            ),
            profile: [(0x10, Op::Read), (0x10, Op::Write)]
                .map(|(msr, op)| Touched {
                    msr: Msr(msr),
                    op,
                    count: 1 << 40,
                })
                .to_vec(),
        }
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
}
