//! A policy: ordered rules over a default.

use std::collections::BTreeMap;
use std::fmt;

use msrgate_core::{Log, MsrRange, ReadAction, Verdict, WriteAction};
use msrgate_msrs::Entry;
use msrgate_msrs::cpuid::{CpuVendor, Cpuid};
use msrgate_plan::{CompileOptions, Decision, DecisionMap, Intervals, Spillable};

use crate::{Acceptance, Code, Diagnostic, Pattern, PatternError, Place, Provider, Source};

/// What every access of a guest gets: the first rule that names it, else the default.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What it calls itself.
    pub name: String,
    /// What an access gets that no rule decides.
    pub default: Verdict,
    /// What a read and a write get that the filter allows and the kernel does not know.
    pub unknown: (ReadAction, WriteAction),
    /// What a read and a write get that the filter allows and the kernel refuses.
    pub invalid: (ReadAction, WriteAction),
    /// Whether MSRs that the guest's CPU model lacks are denied.
    pub valid: Validity,
    /// Warnings that may stand, wherever in the policy they are.
    pub accept: Vec<Acceptance>,
    /// Who answers for handlers that the VMM has no code of.
    pub providers: BTreeMap<String, Provider>,
    /// What becomes of what 16 ranges do not hold.
    pub spill: Spill,
    /// The rules, its own before those of the policies it extends.
    pub rules: Vec<Rule>,
    /// The files it was read from, itself first.
    pub sources: Vec<Source>,
}

/// Which MSRs exist for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Validity {
    /// All that the rules leave open.
    Any,
    /// Those that the guest's own CPUID does not rule out; the others are denied, whatever a rule says.
    CpuModel,
}

/// What becomes of a policy that needs more ranges than a filter has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spill {
    /// The policy is refused.
    Refuse,
    /// What does not fit is passed on to the kernel from user space, where that gets the guest the same.
    UserSpace,
}

/// Which MSRs, and what their accesses get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The MSRs.
    pub msrs: Vec<Pattern>,
    /// What reads get; `None` leaves them to later rules.
    pub read: Option<ReadAction>,
    /// What writes get; `None` leaves them to later rules.
    pub write: Option<WriteAction>,
    /// For which guests the rule holds.
    pub when: When,
    /// How much is logged.
    pub log: Log,
    /// Why it is there.
    pub why: Option<String>,
    /// Warnings about it that may stand.
    pub accept: Vec<Acceptance>,
    /// Where it stands.
    pub place: Place,
}

impl Rule {
    /// A rule that is built in code; it decides nothing until it is given an action.
    ///
    /// # Errors
    /// What does not name MSRs as a policy's text does: `IA32_TSC`, `@pmu`, `0x400..=0x47f`.
    pub fn new<'a>(msrs: impl IntoIterator<Item = &'a str>) -> Result<Rule, PatternError> {
        Ok(Rule {
            msrs: msrs.into_iter().map(Pattern::parse).collect::<Result<_, _>>()?,
            read: None,
            write: None,
            when: When::default(),
            log: Log::None,
            why: None,
            accept: Vec::new(),
            place: Place { source: 0, span: 0..0 },
        })
    }

    /// With what reads get.
    #[must_use]
    pub fn reads(mut self, action: ReadAction) -> Rule {
        self.read = Some(action);
        self
    }

    /// With what writes get.
    #[must_use]
    pub fn writes(mut self, action: WriteAction) -> Rule {
        self.write = Some(action);
        self
    }

    /// The MSRs that the rule names, as ranges.
    pub fn ranges(&self) -> Vec<MsrRange> {
        self.msrs.iter().flat_map(Pattern::ranges).collect()
    }
}

/// For which guests a rule holds; empty lists ask nothing.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct When {
    /// One of these vendors.
    pub vendor: Vec<CpuVendor>,
    /// A family in one of these inclusive ranges.
    pub family: Vec<(u32, u32)>,
    /// A model in one of these inclusive ranges.
    pub model: Vec<(u32, u32)>,
    /// All of these CPUID features.
    pub features: Vec<String>,
}

impl When {
    /// Whether the rule holds for every guest.
    pub fn is_always(&self) -> bool {
        *self == When::default()
    }

    /// Whether it holds for a guest with this CPUID.
    pub fn holds(&self, cpuid: &Cpuid) -> bool {
        let within = |ranges: &[(u32, u32)], value: Option<u32>| {
            ranges.is_empty()
                || value.is_some_and(|value| ranges.iter().any(|(first, last)| (*first..=*last).contains(&value)))
        };
        (self.vendor.is_empty() || cpuid.vendor().is_some_and(|vendor| self.vendor.contains(&vendor)))
            && within(&self.family, cpuid.family())
            && within(&self.model, cpuid.model())
            && self.features.iter().all(|feature| cpuid.has(feature) == Some(true))
    }
}

impl Policy {
    /// A policy that is built in code, without rules yet.
    ///
    /// ```
    /// use msrgate_core::{ReadAction, Verdict, WriteAction};
    /// use msrgate_policy::{Policy, Rule};
    ///
    /// let microcode = Rule::new(["IA32_BIOS_SIGN_ID"])?;
    /// let microcode = microcode.reads(ReadAction::Value(0x11)).writes(WriteAction::Ignore);
    /// let policy = Policy::new("microvm", Verdict::Allow).with(microcode);
    /// let text = "version = 1\nname = \"microvm\"\ndefault = \"allow\"\n[[rule]]\n\
    ///             msr = \"IA32_BIOS_SIGN_ID\"\nread = { value = \"0x11\" }\nwrite = \"ignore\"\n";
    /// assert_eq!(policy, Policy::parse("microvm.toml", text)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(name: &str, default: Verdict) -> Policy {
        let kernels = (ReadAction::Deny, WriteAction::Deny);
        Policy {
            name: name.to_owned(),
            default,
            unknown: kernels.clone(),
            invalid: kernels,
            valid: Validity::Any,
            accept: Vec::new(),
            providers: BTreeMap::new(),
            spill: Spill::Refuse,
            rules: Vec::new(),
            // Rules that are built in code stand at the beginning of it.
            sources: vec![Source::new(name.into(), String::new())],
        }
    }

    /// With a rule behind those that it has.
    #[must_use]
    pub fn with(mut self, rule: Rule) -> Policy {
        self.rules.push(rule);
        self
    }

    /// Whether what it means depends on the guest's CPUID, and where that is said.
    pub fn asks_cpuid(&self) -> bool {
        self.valid == Validity::CpuModel || self.rules.iter().any(|rule| !rule.when.is_always())
    }

    /// The names of all handlers that some rule names, whether it holds for a guest or not.
    pub fn handlers(&self) -> impl Iterator<Item = &str> {
        let rules = self.rules.iter().map(|rule| (rule.read.as_ref(), rule.write.as_ref()));
        let others = [&self.unknown, &self.invalid].map(|(read, write)| (Some(read), Some(write)));
        rules.chain(others).flat_map(|(read, write)| {
            let read = read.and_then(ReadAction::handler);
            read.into_iter().chain(write.and_then(WriteAction::handler))
        })
    }

    /// What each of the 2^32 MSRs gets from this policy, in a guest with this CPUID.
    ///
    /// Fails only where the policy depends on the guest's CPUID and none is given.
    pub fn decision_map(&self, cpuid: Option<&Cpuid>) -> Result<DecisionMap, CpuidNeeded> {
        let rules = self.rules_for(cpuid)?;
        let lacking = self.lacking(cpuid).map(|entry| MsrRange::single(entry.msr));
        let lacking: Vec<MsrRange> = lacking.collect();
        let (default_read, default_write) = self.default_actions();
        let reads = lacking
            .iter()
            .map(|range| (*range, Decision::of(ReadAction::Deny)))
            .chain(rules.iter().flat_map(|(index, rule)| {
                decisions(
                    rule,
                    rule.read.as_ref(),
                    *index,
                    rule.log_of(rule.read == Some(ReadAction::Allow)),
                )
            }));
        let writes = lacking
            .iter()
            .map(|range| (*range, Decision::of(WriteAction::Deny)))
            .chain(rules.iter().flat_map(|(index, rule)| {
                decisions(
                    rule,
                    rule.write.as_ref(),
                    *index,
                    rule.log_of(rule.write == Some(WriteAction::Allow)),
                )
            }));
        Ok(DecisionMap::new(
            Intervals::first_match(Decision::of(default_read), reads),
            Intervals::first_match(Decision::of(default_write), writes),
        )
        .with_unknown(self.unknown.clone())
        .with_invalid(self.invalid.clone()))
    }

    /// What the policy says of how its decision map is compiled: what may be passed through, if anything.
    pub fn options(&self) -> CompileOptions {
        let options = CompileOptions::default();
        let spillable = msrgate_msrs::spillable().map(|(msr, op, weight)| Spillable::new(msr, op, weight));
        match self.spill {
            Spill::UserSpace => options.spilling(spillable.collect()),
            Spill::Refuse => options,
        }
    }

    /// What a read and a write get that no rule decides.
    pub(crate) fn default_actions(&self) -> (ReadAction, WriteAction) {
        match self.default {
            Verdict::Allow => (ReadAction::Allow, WriteAction::Allow),
            Verdict::Deny => (ReadAction::Deny, WriteAction::Deny),
        }
    }

    /// The rules that hold for a guest, with their numbers.
    pub(crate) fn rules_for(&self, cpuid: Option<&Cpuid>) -> Result<Vec<(u32, &Rule)>, CpuidNeeded> {
        if self.asks_cpuid() && cpuid.is_none() {
            let conditional = self.rules.iter().find(|rule| !rule.when.is_always());
            return Err(CpuidNeeded {
                place: conditional.map(|rule| rule.place.clone()),
            });
        }
        let holds = |rule: &Rule| rule.when.is_always() || cpuid.is_some_and(|cpuid| rule.when.holds(cpuid));
        Ok((0..).zip(&self.rules).filter(|(_, rule)| holds(rule)).collect())
    }

    /// The MSRs that `valid = "cpu-model"` denies to a guest, whatever a rule says, by index.
    pub fn lacking<'a>(&self, cpuid: Option<&'a Cpuid>) -> impl Iterator<Item = &'static Entry> + use<'a> {
        let cpuid = cpuid.filter(|_| self.valid == Validity::CpuModel);
        let entries = msrgate_msrs::all().iter();
        entries.filter(move |entry| cpuid.is_some_and(|cpuid| entry.exists_on(cpuid) == Some(false)))
    }
}

impl Rule {
    /// What the kernel answers makes no exit, so nothing of it can be logged.
    pub(crate) fn log_of(&self, kernel_answers: bool) -> Log {
        if kernel_answers { Log::None } else { self.log }
    }
}

fn decisions<'a, A: Clone>(
    rule: &'a Rule,
    action: Option<&'a A>,
    index: u32,
    log: Log,
) -> impl Iterator<Item = (MsrRange, Decision<A>)> + use<'a, A> {
    action.into_iter().flat_map(move |action| {
        rule.ranges()
            .into_iter()
            .map(move |range| (range, Decision::of(action.clone()).by(index).logged(log)))
    })
}

/// The policy depends on the guest's CPUID, and none was given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CpuidNeeded {
    place: Option<Place>,
}

impl CpuidNeeded {
    /// As a finding, at the first rule that asks.
    pub fn diagnostic(&self) -> Diagnostic {
        match &self.place {
            Some(place) => Diagnostic::at(Code::CpuidNeeded, place.clone(), self.to_string()),
            None => Diagnostic::whole(Code::CpuidNeeded, self.to_string()),
        }
    }
}

impl fmt::Display for CpuidNeeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the policy depends on the guest's CPUID, and none was given")
    }
}

impl std::error::Error for CpuidNeeded {}

/// Equal in what they say, wherever it was read from.
impl PartialEq for Policy {
    fn eq(&self, other: &Policy) -> bool {
        let accepted = |accept: &[Acceptance]| -> Vec<(Code, String)> {
            let pairs = accept.iter().map(|one| (one.code, one.reason.clone()));
            pairs.collect()
        };
        let said = |rule: &Rule| {
            let Rule {
                msrs,
                read,
                write,
                when,
                log,
                why,
                accept,
                place: _,
            } = rule.clone();
            (msrs, read, write, when, log, why, accepted(&accept))
        };
        self.name == other.name
            && self.default == other.default
            && self.unknown == other.unknown
            && self.invalid == other.invalid
            && self.valid == other.valid
            && self.spill == other.spill
            && self.providers == other.providers
            && accepted(&self.accept) == accepted(&other.accept)
            && self.rules.len() == other.rules.len()
            && self.rules.iter().zip(&other.rules).all(|(a, b)| said(a) == said(b))
    }
}
