//! Case files, read.

use msrgate_core::{Access, Msr, Outcome, Reason, Verdict};
use msrgate_verify::case::process_name;
use serde::Deserialize;

use crate::number::{self, Number};
use crate::{AccessStep, Call, CallResult, Case, Descriptor, Place, Process, RawFilter, RawRange, Seen, Step, Target};

/// The cases of one file's text.
pub fn parse(text: &str) -> Result<Vec<Case>, toml::de::Error> {
    toml::from_str(text).map(|file: FileKeys| file.case.into_iter().map(|ReadCase(case)| case).collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileKeys {
    case: Vec<ReadCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CaseKeys {
    name: String,
    policy: Option<String>,
    cpuid: Option<String>,
    process: Option<String>,
    #[serde(default)]
    ignore_msrs: bool,
    steps: Vec<ReadStep>,
}

/// A case, whose errors the reader of the file gives a place.
#[derive(Deserialize)]
#[serde(try_from = "CaseKeys")]
struct ReadCase(Case);

impl TryFrom<CaseKeys> for ReadCase {
    type Error = String;

    fn try_from(keys: CaseKeys) -> Result<ReadCase, String> {
        Ok(ReadCase(Case {
            name: keys.name,
            policy: keys.policy,
            cpuid: keys.cpuid,
            process: keys.process.as_deref().map(process).transpose()?,
            ignore_msrs: keys.ignore_msrs,
            steps: keys.steps.into_iter().map(|ReadStep(step)| step).collect(),
        }))
    }
}

/// A step, likewise.
#[derive(Deserialize)]
#[serde(try_from = "StepKeys")]
struct ReadStep(Step);

/// All keys of all kinds of steps; the one that is there says which kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StepKeys {
    rdmsr: Option<Number>,
    wrmsr: Option<Number>,
    value: Option<Number>,
    action: Option<String>,
    verdict: Option<String>,
    exit: Option<String>,
    sees: Option<String>,
    answer: Option<String>,
    #[serde(default)]
    meanwhile: Vec<ReadStep>,
    set_msr_filter: Option<RawFilterKeys>,
    enable_cap: Option<Number>,
    cap: Option<Number>,
    flags: Option<Number>,
    #[serde(default)]
    more_args: Vec<Number>,
    on: Option<String>,
    argp: Option<String>,
    gives: Option<String>,
    replace: Option<String>,
    #[serde(default)]
    kill: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFilterKeys {
    flags: Number,
    pad: Option<Number>,
    layout: Option<String>,
    #[serde(default)]
    edited: bool,
    #[serde(default)]
    ranges: Vec<RawRangeKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRangeKeys {
    slot: Option<usize>,
    flags: Number,
    nmsrs: Number,
    base: Number,
    bitmap: Option<String>,
    at: Option<String>,
}

impl TryFrom<StepKeys> for ReadStep {
    type Error = String;

    fn try_from(raw: StepKeys) -> Result<ReadStep, String> {
        let kinds = [
            raw.rdmsr.is_some(),
            raw.wrmsr.is_some(),
            raw.set_msr_filter.is_some(),
            raw.enable_cap.is_some(),
            raw.replace.is_some(),
            raw.kill,
        ];
        if kinds.into_iter().filter(|kind| *kind).count() != 1 {
            return Err("a step has one of `rdmsr`, `wrmsr`, `set_msr_filter`, `enable_cap`, `replace`, `kill`".into());
        }
        if let Some(policy) = raw.replace {
            return Ok(ReadStep(Step::Replace(policy)));
        }
        if raw.kill {
            return Ok(ReadStep(Step::Kill));
        }
        if let Some(msr) = raw.rdmsr.or(raw.wrmsr) {
            let msr = Msr(msr.u32()?);
            let access = match (raw.rdmsr, raw.value) {
                (Some(_), None) => Access::Read { msr },
                (None, Some(Number(value))) => Access::Write { msr, value },
                _ => return Err(format!("a write has a `value` and a read has none: {msr}")),
            };
            let meanwhile = raw.meanwhile.into_iter().map(|ReadStep(step)| match step {
                Step::Call(call) => Ok(call),
                _ => Err("`meanwhile` lists calls".to_owned()),
            });
            return Ok(ReadStep(Step::Access(AccessStep {
                access,
                answer: raw.answer.map_or(Ok(Outcome::Fault), |text| number::outcome(&text))?,
                meanwhile: meanwhile.collect::<Result<_, _>>()?,
                expect: Seen {
                    action: raw.action,
                    verdict: raw.verdict.as_deref().map(verdict).transpose()?,
                    exit: raw.exit.as_deref().map(exit).transpose()?,
                    sees: raw.sees.as_deref().map(number::outcome).transpose()?,
                },
            })));
        }
        let target = match (raw.set_msr_filter, raw.enable_cap) {
            (Some(keys), _) => Target::SetMsrFilter(filter(keys)?),
            (None, mask) => {
                let mut args = [mask.map_or(0, |mask| mask.0), 0, 0, 0];
                for (arg, given) in args.iter_mut().skip(1).zip(&raw.more_args) {
                    *arg = given.0;
                }
                Target::EnableCap {
                    cap: raw.cap.map_or(Ok(188), Number::u32)?,
                    flags: raw.flags.map_or(Ok(0), Number::u32)?,
                    args,
                }
            }
        };
        Ok(ReadStep(Step::Call(Call {
            target,
            on: raw.on.map_or(Ok(Descriptor::Vm), |word| {
                named(Descriptor::ALL, Descriptor::name, &word)
            })?,
            argp: place(raw.argp)?,
            gives: raw.gives.as_deref().map(gives).transpose()?,
        })))
    }
}

fn filter(keys: RawFilterKeys) -> Result<RawFilter, String> {
    let mut next = 0;
    let mut ranges = Vec::new();
    for range in keys.ranges {
        let slot = range.slot.unwrap_or(next);
        if slot < next || slot >= 16 {
            return Err(format!("slot {slot} is out of order, or not one of the 16"));
        }
        next = slot + 1;
        ranges.push(RawRange {
            slot,
            flags: range.flags.u32()?,
            nmsrs: range.nmsrs.u32()?,
            base: range.base.u32()?,
            bitmap: number::bytes(&range.bitmap.unwrap_or_default())?,
            at: place(range.at)?,
        });
    }
    Ok(RawFilter {
        flags: keys.flags.u32()?,
        pad: keys.pad.map_or(0, |pad| pad.0 as u8),
        layout: keys.layout.as_deref().map(process).transpose()?,
        edited: keys.edited,
        ranges,
    })
}

/// The one of these that is called so.
fn named<T: Copy>(all: impl IntoIterator<Item = T>, name: fn(T) -> &'static str, word: &str) -> Result<T, String> {
    let found = all.into_iter().find(|one| name(*one) == word);
    found.ok_or_else(|| format!("`{word}` is none of the words that may stand here"))
}

fn process(word: &str) -> Result<Process, String> {
    named([Process::Native, Process::Compat], process_name, word)
}

fn place(word: Option<String>) -> Result<Place, String> {
    word.map_or(Ok(Place::Mapped), |word| named(Place::ALL, Place::name, &word))
}

fn verdict(word: &str) -> Result<Verdict, String> {
    match word {
        "allow" => Ok(Verdict::Allow),
        "deny" => Ok(Verdict::Deny),
        _ => Err(format!("`{word}` is no verdict")),
    }
}

fn exit(word: &str) -> Result<Option<Reason>, String> {
    match word {
        "none" => Ok(None),
        _ => named(Reason::ALL, Reason::name, word).map(Some),
    }
}

fn gives(word: &str) -> Result<CallResult, String> {
    named(CallResult::NAMES, |(name, _)| name, word).map(|(_, gives)| gives)
}
