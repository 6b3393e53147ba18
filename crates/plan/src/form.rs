//! Decision maps and plans as bytes: for a program that embeds a plan, and for the hash of a policy.
//!
//! Little-endian and without padding. A map is a magic number, the reads, the writes, and what `unknown` and `invalid` say.
//! Reads and writes are a count and, for each interval, its first MSR, rule, log and action: its number ([`Disposition`]) and its
//! arguments in their order. A plan is a magic number, its map, the filter, the reasons, the presets, what is spilled, how many
//! ranges are needed, and the hash of the map, if whoever compiled it had one. The last byte is followed by nothing.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use msrgate_core::{
    Argument, ArgumentKey, Arguments, Disposition, Filter, FilterRange, Log, Msr, MsrRange, OnLockedBits, Op, Ops,
    ReadAction, Reasons, Verdict, WriteAction,
};

use crate::plan::Parts;
use crate::{CompileOptions, Decision, DecisionMap, Intervals, Minimum, Plan, PlanError, Preset, Spillable};

/// Names the format and its version.
const MAGIC: [u8; 8] = *b"msrgate4";

/// Names a plan's format and its version.
const PLAN_MAGIC: [u8; 8] = *b"msrplan2";

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
    #[cfg(feature = "hash")]
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
        <sha2::Sha256 as sha2::Digest>::digest(&bytes).into()
    }

    /// Reads a map back. Whatever the bytes hold, the answer is an error or a map that is written as these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<DecisionMap, DecodeError> {
        let map = DecisionMap::read(&mut Rest(bytes))?;
        (map.to_bytes() == bytes).then_some(map).ok_or(DecodeError)
    }

    fn read(rest: &mut Rest<'_>) -> Result<DecisionMap, DecodeError> {
        rest.magic(MAGIC)?;
        let reads = intervals(rest, read)?;
        let writes = intervals(rest, write)?;
        let unknown = (read(rest)?, write(rest)?);
        let invalid = (read(rest)?, write(rest)?);
        Ok(DecisionMap::new(reads, writes)
            .with_unknown(unknown)
            .with_invalid(invalid))
    }
}

impl Plan {
    /// The plan as bytes that [`Plan::from_bytes`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = PLAN_MAGIC.to_vec();
        bytes.extend(self.map().to_bytes());
        bytes.push(u8::from(self.filter().default_verdict() == Verdict::Allow));
        put_count(&mut bytes, self.filter().ranges().len());
        for range in self.filter().ranges() {
            bytes.extend(range.base().to_le_bytes());
            bytes.extend(range.nmsrs().to_le_bytes());
            bytes.extend(range.ops().bits().to_le_bytes());
            bytes.extend(range.bitmap().iter().flat_map(|word| word.to_le_bytes()));
        }
        bytes.extend(self.reasons().bits().to_le_bytes());
        put_count(&mut bytes, self.presets().len());
        for Preset { msr, value } in self.presets() {
            bytes.extend(msr.0.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        let spilled = self
            .spilled()
            .flat_map(|(range, op)| range.iter().map(move |msr| (msr, op)));
        put_accesses(&mut bytes, &spilled.collect::<Vec<_>>());
        let minimum = self.minimum();
        bytes.extend(minimum.ranges.to_le_bytes());
        bytes.extend(minimum.separate.to_le_bytes());
        bytes.push(u8::from(minimum.proved));
        bytes.push(u8::from(minimum.bytes_proved));
        bytes.push(u8::from(minimum.witness.is_some()));
        put_accesses(&mut bytes, minimum.witness.as_deref().unwrap_or_default());
        bytes.push(u8::from(self.hash().is_some()));
        bytes.extend(self.hash().iter().flatten());
        bytes
    }

    /// Reads a plan back, and proves again that it does what the map in the bytes says: nothing is searched. Whatever the
    /// bytes hold, the answer is an error or a plan that is right and is written as these bytes.
    ///
    /// How many ranges are needed ([`Plan::minimum`]) is as the bytes say, and so is what may be spilled; without the
    /// feature `hash` also the hash. A note on what is
    /// spilled does not tell what a profile told.
    pub fn from_bytes(bytes: &[u8]) -> Result<Plan, LoadError> {
        let mut rest = Rest(bytes);
        rest.magic(PLAN_MAGIC)?;
        let map = DecisionMap::read(&mut rest)?;
        let default = match rest.flag()? {
            true => Verdict::Allow,
            false => Verdict::Deny,
        };
        let mut ranges = Vec::new();
        for _ in 0..rest.count()? {
            let (base, nmsrs) = (rest.u32()?, rest.u32()?);
            let ops = Ops::from_bits(rest.u32()?).ok_or(DecodeError)?;
            let words = usize::try_from(nmsrs.div_ceil(64)).map_err(|_| DecodeError)?;
            let bitmap: Vec<u64> = rest.words(words)?;
            ranges.push(FilterRange::new(base, nmsrs, ops, bitmap).map_err(PlanError::from)?);
        }
        let filter = Filter::new(default, ranges).map_err(PlanError::from)?;
        let reasons = Reasons::from_bits(rest.u32()?.into()).ok_or(DecodeError)?;
        let count = rest.count()?;
        let presets = (0..count).map(|_| {
            Ok(Preset {
                msr: Msr(rest.u32()?),
                value: rest.u64()?,
            })
        });
        let presets = presets.collect::<Result<Vec<Preset>, DecodeError>>()?;
        if !presets.is_sorted_by(|one, next| one.msr < next.msr) {
            return Err(DecodeError.into());
        }
        let spilled = rest.accesses()?;
        let minimum = Minimum {
            ranges: rest.u64()?,
            separate: rest.u64()?,
            proved: rest.flag()?,
            bytes_proved: rest.flag()?,
            witness: match (rest.flag()?, rest.accesses()?) {
                (true, witness) => Some(witness),
                (false, none) if none.is_empty() => None,
                (false, _) => return Err(DecodeError.into()),
            },
        };
        let hash = match rest.flag()? {
            true => Some(rest.array()?),
            false => None,
        };
        if let Some((msr, op)) = spilled.iter().find(|(msr, op)| !map.allows(*msr, *op)) {
            return Err(PlanError::NotProven { msr: *msr, op: *op }.into());
        }
        let mut options = CompileOptions::default();
        if !spilled.is_empty() {
            let spillable = spilled.iter().map(|(msr, op)| Spillable {
                msr: *msr,
                op: *op,
                weight: 0,
            });
            options = options.spilling(spillable.collect());
        }
        let parts = Parts {
            filter,
            reasons,
            presets,
            spilled: spilled
                .into_iter()
                .map(|(msr, op)| (MsrRange::single(msr), op))
                .collect(),
            minimum,
        };
        let plan = Plan::proven(&map, &options, parts)?;
        // Compiled where there was no hash, or read where there is none.
        let own = plan.hash();
        let as_told = plan.with_hash(hash);
        if as_told.to_bytes() != bytes {
            return Err(LoadError::Malformed);
        }
        match (own, hash) {
            (Some(own), Some(told)) if own != told => Err(LoadError::Malformed),
            (None, told) => Ok(as_told.with_hash(told)),
            (own, _) => Ok(as_told.with_hash(own)),
        }
    }
}

/// Why bytes are no plan.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LoadError {
    /// They are not the bytes of a plan of this version.
    Malformed,
    /// What they say is no plan of the map that they say.
    Wrong(PlanError),
}

impl From<DecodeError> for LoadError {
    fn from(_: DecodeError) -> LoadError {
        LoadError::Malformed
    }
}

impl From<PlanError> for LoadError {
    fn from(error: PlanError) -> LoadError {
        LoadError::Wrong(error)
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoadError::Malformed => f.write_str("the bytes are not a plan of this version of msrgate"),
            LoadError::Wrong(_) => f.write_str("the bytes are not a plan of the decision map in them"),
        }
    }
}

impl core::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            LoadError::Malformed => None,
            LoadError::Wrong(error) => Some(error),
        }
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

fn put_accesses(bytes: &mut Vec<u8>, accesses: &[(Msr, Op)]) {
    put_count(bytes, accesses.len());
    for (msr, op) in accesses {
        bytes.extend(msr.0.to_le_bytes());
        bytes.push(*op as u8);
    }
}

fn put_action<'a>(bytes: &mut Vec<u8>, did: Disposition, arguments: impl Iterator<Item = (ArgumentKey, Argument<'a>)>) {
    bytes.push(did as u8);
    for (_, argument) in arguments {
        match argument {
            Argument::Number(number) | Argument::Implied(number) => bytes.extend(number.to_le_bytes()),
            Argument::Numbers(numbers) => {
                put_count(bytes, numbers.len());
                bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
            }
            Argument::Name(name) => {
                put_count(bytes, name.len());
                bytes.extend(name.as_bytes());
            }
            Argument::OnLockedBits(otherwise) => bytes.push(otherwise as u8),
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

    fn magic(&mut self, wanted: [u8; 8]) -> Result<(), DecodeError> {
        (self.array()? == wanted).then_some(()).ok_or(DecodeError)
    }

    fn flag(&mut self) -> Result<bool, DecodeError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError),
        }
    }

    fn words<C: FromIterator<u64>>(&mut self, count: usize) -> Result<C, DecodeError> {
        let bytes = self.take(count.checked_mul(8).ok_or(DecodeError)?)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    fn accesses(&mut self) -> Result<Vec<(Msr, Op)>, DecodeError> {
        let count = self.count()?;
        let one = |_| {
            let msr = Msr(self.u32()?);
            let op = usize::from(self.byte()?);
            Ok((msr, *Op::ALL.get(op).ok_or(DecodeError)?))
        };
        (0..count).map(one).collect()
    }

    fn did(&mut self) -> Result<Disposition, DecodeError> {
        Disposition::from_number(self.byte()?).ok_or(DecodeError)
    }
}

impl Arguments for Rest<'_> {
    type Error = DecodeError;

    fn number(&mut self, _: ArgumentKey) -> Result<u64, DecodeError> {
        self.u64()
    }

    fn implied(&mut self, _: ArgumentKey, _: u64) -> Result<u64, DecodeError> {
        self.u64()
    }

    fn numbers(&mut self, _: ArgumentKey) -> Result<Arc<[u64]>, DecodeError> {
        let count = self.count()?;
        self.words(count)
    }

    fn name(&mut self, _: ArgumentKey) -> Result<Arc<str>, DecodeError> {
        let count = self.count()?;
        let name = core::str::from_utf8(self.take(count)?);
        name.map(Arc::from).map_err(|_| DecodeError)
    }

    fn otherwise(&mut self, _: ArgumentKey) -> Result<OnLockedBits, DecodeError> {
        let number = usize::from(self.byte()?);
        OnLockedBits::ALL.get(number).copied().ok_or(DecodeError)
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
                otherwise: OnLockedBits::Deny,
            },
            WriteAction::Mask {
                may_change: 3,
                otherwise: OnLockedBits::Drop,
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
                    assert_eq!(map.to_bytes(), changed);
                }
            }
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        assert_eq!(DecisionMap::from_bytes(&longer), Err(DecodeError));
    }

    /// Plans with presets, with spilled accesses, and of every action.
    fn plans() -> Vec<Plan> {
        let value = Decision::of(ReadAction::Value(7));
        let preset = Preset {
            msr: Msr(0x8b),
            value: 7,
        };
        let reads = Intervals::first_match(Decision::of(ReadAction::Deny), [(MsrRange::single(Msr(0x8b)), value)]);
        let held = DecisionMap::deny_all().with_reads(reads);
        let options = CompileOptions::default().with_presets([preset].to_vec());
        let islands = (0..17).map(|i| (MsrRange::single(Msr(i << 16)), Decision::of(ReadAction::Allow)));
        let many = DecisionMap::deny_all().with_reads(Intervals::first_match(Decision::of(ReadAction::Deny), islands));
        let spillable = Spillable {
            msr: Msr(5 << 16),
            op: Op::Read,
            weight: 1,
        };
        let spilling = CompileOptions::default().spilling([spillable].to_vec());
        let plans = [
            Plan::compile(&everything()),
            Plan::compile(&DecisionMap::allow_all()),
            Plan::compile(&DecisionMap::deny_all()),
            Plan::compile_for(&held, &options),
            Plan::compile_for(&many, &spilling),
        ];
        plans.map(Result::unwrap).to_vec()
    }

    #[test]
    fn a_plan_reads_back_as_it_was() {
        let plans = plans();
        assert!(plans.iter().any(|plan| !plan.presets().is_empty()));
        assert!(plans.iter().any(|plan| plan.spilled().next().is_some()));
        for plan in plans {
            assert_eq!(Plan::from_bytes(&plan.to_bytes()), Ok(plan));
        }
    }

    #[test]
    fn cut_or_changed_bytes_are_an_error_or_a_plan_that_is_right() {
        for plan in plans() {
            let bytes = plan.to_bytes();
            for end in 0..bytes.len() {
                assert_eq!(
                    Plan::from_bytes(&bytes[..end]),
                    Err(LoadError::Malformed),
                    "cut at {end}"
                );
            }
            for at in 0..bytes.len() {
                for flip in [1, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= flip;
                    if let Ok(plan) = Plan::from_bytes(&changed) {
                        assert_eq!(plan.to_bytes(), changed);
                    }
                }
            }
        }
        let parts = Parts {
            filter: Filter::allow_all(),
            reasons: Reasons::NONE,
            presets: Vec::new(),
            spilled: Vec::new(),
            minimum: plans().swap_remove(1).minimum().clone(),
        };
        let wrong = Plan::proven(&DecisionMap::deny_all(), &CompileOptions::default(), parts);
        assert!(matches!(wrong, Err(PlanError::NotProven { .. })));
    }

    #[test]
    fn what_is_written_otherwise_is_an_error() {
        // Two intervals that are one.
        let mut map = DecisionMap::allow_all().to_bytes();
        let count = MAGIC.len();
        let interval = map[count + 4..].iter().take(4 + 4 + 5 + 1).copied();
        let mut second: Vec<u8> = interval.collect();
        second[0] = 1;
        map[count] = 2;
        let at = count + 4 + second.len();
        map.splice(at..at, second);
        assert!(DecisionMap::read(&mut Rest(&map)).is_ok());
        assert_eq!(DecisionMap::from_bytes(&map), Err(DecodeError));
        // What is spilled, twice.
        let plan = plans().pop().unwrap();
        let mut bytes = plan.to_bytes();
        let hash = 1 + plan.hash().map_or(0, |hash| hash.len());
        let tail = 8 + 8 + 3 + 4 + 5 * plan.minimum().witness.as_ref().map_or(0, Vec::len) + hash;
        let at = bytes.len() - tail;
        let access: Vec<u8> = bytes[at - 5..at].to_vec();
        assert_eq!(bytes[at - 9], 1);
        bytes[at - 9] = 2;
        bytes.splice(at..at, access);
        assert_eq!(Plan::from_bytes(&bytes), Err(LoadError::Malformed));
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

    #[test]
    fn a_plan_has_the_hash_of_its_map_whatever_its_bytes_say() {
        let plan = Plan::compile(&DecisionMap::allow_all()).unwrap();
        let bytes = plan.to_bytes();
        assert_eq!(Plan::from_bytes(&bytes).unwrap(), plan);
        let (without, hash) = bytes.split_at(bytes.len() - 33);
        assert_eq!(hash[1..], plan.hash().unwrap());
        // Compiled where there was no hash.
        assert_eq!(Plan::from_bytes(&[without, &[0]].concat()).unwrap(), plan);
        let other = [without, &[1], &[7; 32]].concat();
        assert_eq!(Plan::from_bytes(&other), Err(LoadError::Malformed));
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
            (mask(0, OnLockedBits::Deny), "d98ca382"),
            (mask(1, OnLockedBits::Deny), "64107234"),
            (mask(0, OnLockedBits::Drop), "eae9b955"),
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
