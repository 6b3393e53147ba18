//! A case: what is installed, what is called, what the guest does, and what comes of it.

use std::fmt;

use msrgate_core::{Access, Msr, Op, Outcome, Reason, Verdict};
use serde::Deserialize;

use crate::number::{self, Number};

/// One case.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What it shows, as a sentence.
    pub name: String,
    /// The text of a policy, in force from the start.
    pub policy: Option<String>,
    /// The guest's CPUID, as `cpuid -r` prints it, for policies that ask.
    pub cpuid: Option<String>,
    /// The process that makes the calls; `None` for both in turn.
    pub process: Option<Process>,
    /// Whether KVM's parameter `ignore_msrs` is on.
    #[serde(default)]
    pub ignore_msrs: bool,
    /// In order.
    pub steps: Vec<Step>,
}

/// What happens next.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "Raw")]
pub enum Step {
    /// The guest makes an access.
    Access(AccessStep),
    /// A process makes a call.
    Call(Call),
    /// Another policy takes the place of the one in force.
    Replace(String),
    /// The VM dies (`kvm_vm_dead`).
    Kill,
}

/// An access and what comes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AccessStep {
    /// The access.
    pub access: Access,
    /// What user space answers where it is asked and no policy is in force.
    pub answer: Outcome,
    /// Calls between the exit and its completion.
    pub meanwhile: Vec<Call>,
    /// What is expected.
    pub expect: Seen,
}

/// What was seen of an access, or is expected; `None` where an implementation cannot say, or a case does not ask.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Seen {
    /// The policy's action, in the words of its `Display`.
    pub action: Option<String>,
    /// The filter's word.
    pub verdict: Option<Verdict>,
    /// Whether user space was asked, and why.
    pub exit: Option<Option<Reason>>,
    /// What the guest got.
    pub sees: Option<Outcome>,
}

/// A system call on one of KVM's descriptors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Which, with its argument.
    pub target: Target,
    /// On what.
    pub on: Descriptor,
    /// Where its argument lies.
    pub argp: Place,
    /// What is expected.
    pub gives: Option<Gives>,
}

/// A call and its argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// KVM_X86_SET_MSR_FILTER.
    SetMsrFilter(RawFilter),
    /// KVM_ENABLE_CAP.
    EnableCap {
        /// Which capability.
        cap: u32,
        /// Its flags.
        flags: u32,
        /// Its four arguments.
        args: [u64; 4],
    },
}

/// `struct kvm_msr_filter`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawFilter {
    /// Its flags.
    pub flags: u32,
    /// What each padding byte holds.
    pub pad: u8,
    /// The layout, and with it the request's number; `None` for the calling process's own.
    pub layout: Option<Process>,
    /// Whether the caller inverts its bitmaps after the call.
    pub edited: bool,
    /// The slots that are not all zeros, in order.
    pub ranges: Vec<RawRange>,
}

/// `struct kvm_msr_filter_range`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawRange {
    /// Its position among the 16.
    pub slot: usize,
    /// Its flags.
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first.
    pub base: u32,
    /// What lies where `bitmap` points.
    pub bitmap: Vec<u8>,
    /// Where that is.
    pub at: Place,
}

/// Where something lies in the caller's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Aligned; zeros follow it.
    Mapped,
    /// At an odd address.
    Unaligned,
    /// Its last byte is the last that can be read.
    PageEnd,
    /// Its last byte cannot be read.
    Short,
    /// At address 0.
    Null,
    /// At an address that cannot be read.
    Unmapped,
    /// At an address that no process can have.
    NonCanonical,
}

/// On what a call is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Descriptor {
    /// The VM.
    Vm,
    /// A vCPU of it.
    Vcpu,
    /// `/dev/kvm`.
    System,
    /// The VM, by a process that did not make it.
    AnotherProcess,
}

/// The calling process, under a 64-bit kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Process {
    /// 64-bit.
    Native,
    /// 32-bit.
    Compat,
}

/// What a call gives: an error's number, 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gives(pub i32);

impl Gives {
    /// Success.
    pub const OK: Gives = Gives(0);
    /// EINVAL.
    pub const EINVAL: Gives = Gives(22);
    /// EFAULT.
    pub const EFAULT: Gives = Gives(14);

    const NAMES: [(&'static str, Gives); 6] = [
        ("ok", Gives::OK),
        ("EIO", Gives(5)),
        ("ENOMEM", Gives(12)),
        ("EFAULT", Gives::EFAULT),
        ("EINVAL", Gives::EINVAL),
        ("ENOTTY", Gives(25)),
    ];
}

impl fmt::Display for Gives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Gives::NAMES.into_iter().find(|(_, gives)| gives == self) {
            Some((name, _)) => f.pad(name),
            None => write!(f, "error {}", self.0),
        }
    }
}

/// All keys of all kinds of steps; the one that is there says which kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    rdmsr: Option<Number>,
    wrmsr: Option<Number>,
    value: Option<Number>,
    action: Option<String>,
    verdict: Option<String>,
    exit: Option<String>,
    sees: Option<String>,
    answer: Option<String>,
    #[serde(default)]
    meanwhile: Vec<Step>,
    set_msr_filter: Option<RawFilterKeys>,
    enable_cap: Option<Number>,
    cap: Option<Number>,
    flags: Option<Number>,
    #[serde(default)]
    more_args: Vec<Number>,
    on: Option<Descriptor>,
    argp: Option<Place>,
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
    layout: Option<Process>,
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
    at: Option<Place>,
}

impl TryFrom<Raw> for Step {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Step, String> {
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
            return Ok(Step::Replace(policy));
        }
        if raw.kill {
            return Ok(Step::Kill);
        }
        if let Some(msr) = raw.rdmsr.or(raw.wrmsr) {
            let msr = Msr(msr.u32()?);
            let access = match (raw.rdmsr, raw.value) {
                (Some(_), None) => Access::Read { msr },
                (None, Some(Number(value))) => Access::Write { msr, value },
                _ => return Err(format!("a write has a `value` and a read has none: {msr}")),
            };
            let meanwhile = raw.meanwhile.into_iter().map(|step| match step {
                Step::Call(call) => Ok(call),
                _ => Err("`meanwhile` lists calls".to_owned()),
            });
            return Ok(Step::Access(AccessStep {
                access,
                answer: raw.answer.map_or(Ok(Outcome::Fault), |text| number::outcome(&text))?,
                meanwhile: meanwhile.collect::<Result<_, _>>()?,
                expect: Seen {
                    action: raw.action,
                    verdict: raw.verdict.as_deref().map(verdict).transpose()?,
                    exit: raw.exit.as_deref().map(exit).transpose()?,
                    sees: raw.sees.as_deref().map(number::outcome).transpose()?,
                },
            }));
        }
        let target = match (raw.set_msr_filter, raw.enable_cap) {
            (Some(keys), _) => Target::SetMsrFilter(keys.try_into()?),
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
        Ok(Step::Call(Call {
            target,
            on: raw.on.unwrap_or(Descriptor::Vm),
            argp: raw.argp.unwrap_or(Place::Mapped),
            gives: raw.gives.as_deref().map(gives).transpose()?,
        }))
    }
}

impl TryFrom<RawFilterKeys> for RawFilter {
    type Error = String;

    fn try_from(keys: RawFilterKeys) -> Result<RawFilter, String> {
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
                at: range.at.unwrap_or(Place::Mapped),
            });
        }
        Ok(RawFilter {
            flags: keys.flags.u32()?,
            pad: keys.pad.map_or(0, |pad| pad.0 as u8),
            layout: keys.layout,
            edited: keys.edited,
            ranges,
        })
    }
}

fn verdict(word: &str) -> Result<Verdict, String> {
    match word {
        "allow" => Ok(Verdict::Allow),
        "deny" => Ok(Verdict::Deny),
        _ => Err(format!("`{word}` is no verdict")),
    }
}

fn exit(word: &str) -> Result<Option<Reason>, String> {
    if word == "none" {
        return Ok(None);
    }
    let reason = Reason::ALL.into_iter().find(|reason| reason.name() == word);
    reason.map(Some).ok_or_else(|| format!("`{word}` is no reason"))
}

fn gives(word: &str) -> Result<Gives, String> {
    let known = Gives::NAMES.into_iter().find(|(name, _)| *name == word);
    known
        .map(|(_, gives)| gives)
        .ok_or_else(|| format!("`{word}` is no error that a call gives"))
}

impl AccessStep {
    /// An access of which nothing is expected.
    pub fn new(access: Access) -> AccessStep {
        AccessStep {
            access,
            answer: Outcome::Fault,
            meanwhile: Vec::new(),
            expect: Seen::default(),
        }
    }

    /// The register.
    pub fn msr(&self) -> Msr {
        self.access.msr()
    }

    /// The direction.
    pub fn op(&self) -> Op {
        self.access.op()
    }
}

impl Call {
    /// KVM_X86_SET_MSR_FILTER on the VM, of which nothing is expected.
    pub fn set_msr_filter(filter: RawFilter) -> Call {
        Call {
            target: Target::SetMsrFilter(filter),
            on: Descriptor::Vm,
            argp: Place::Mapped,
            gives: None,
        }
    }

    /// KVM_ENABLE_CAP of the mask of exit reasons on the VM, of which nothing is expected.
    pub fn enable_cap(mask: u64) -> Call {
        Call {
            target: Target::EnableCap {
                cap: 188,
                flags: 0,
                args: [mask, 0, 0, 0],
            },
            on: Descriptor::Vm,
            argp: Place::Mapped,
            gives: None,
        }
    }
}

/// An access of which nothing is expected.
impl From<Access> for Step {
    fn from(access: Access) -> Step {
        Step::Access(AccessStep::new(access))
    }
}
