//! What a review asks: an access that guests made, and all that speaks for an answer.

use std::collections::BTreeSet;

use msrgate_core::{Msr, MsrRange, Op};
use msrgate_msrs::{Entry, Host, Need};
use msrgate_policy::Cause;
use msrgate_trace::learn::{Summary, Usage};

use crate::json::{Printed, object};
use crate::load::Loaded;
use crate::words;

/// One access.
pub(super) struct Question<'a> {
    pub(super) msr: Msr,
    pub(super) op: Op,
    entry: Option<&'static Entry>,
    seen: Option<&'a Usage>,
    faults: u64,
    history: String,
}

/// What is asked of these traces, by MSR, and how many accesses are not, since a rule denies them.
pub(super) fn questions<'a>(loaded: &Loaded, summary: &'a Summary, denied: bool) -> (Vec<Question<'a>>, usize) {
    let made: BTreeSet<(Msr, Op)> = summary.seen.keys().chain(summary.faulted.keys()).copied().collect();
    let filtered = made
        .into_iter()
        .filter(|(msr, _)| !MsrRange::X2APIC.contains(*msr) && *msr != Msr::MAX);
    let mut left = 0;
    let asked = filtered.filter(|(msr, op)| {
        let explained = loaded.explain(*msr, *op);
        match explained.cause {
            Cause::Rule(..) if explained.action.did().is_fault() => {
                left += usize::from(!denied);
                denied
            }
            // No rule changes what `valid` denies.
            Cause::Rule(..) | Cause::Valid(_) => false,
            _ => true,
        }
    });
    let questions = asked.map(|(msr, op)| Question {
        msr,
        op,
        entry: msrgate_msrs::by_msr(msr),
        seen: summary.seen.get(&(msr, op)),
        faults: summary.faulted.get(&(msr, op)).copied().unwrap_or_default(),
        history: summary.history(&[(msr, op)]),
    });
    (questions.collect(), left)
}

impl Question<'_> {
    pub(super) fn served(&self) -> u64 {
        self.seen.map(Usage::count).unwrap_or_default()
    }

    pub(super) fn times(&self) -> u64 {
        self.served().saturating_add(self.faults)
    }

    pub(super) fn needs(&self) -> impl Iterator<Item = &'static Need> {
        let needs = self.entry.into_iter().flat_map(|entry| entry.needs());
        needs.filter(|need| need.op == self.op)
    }

    /// Whether a read tells of the host's other guests, or which host it is.
    pub(super) fn is_leak(&self) -> bool {
        self.op == Op::Read && self.entry.is_some_and(Entry::is_secret)
    }

    fn tells(&self) -> Option<Host> {
        let host = self.entry.filter(|_| self.op == Op::Read)?.host;
        Some(host).filter(|host| *host != Host::Nothing)
    }

    /// What a guest read first of a register that kept what it wrote, where that is known.
    pub(super) fn initial(&self) -> Option<u64> {
        self.seen.and_then(|seen| seen.values.only().copied())
    }

    /// Direction, index and name.
    pub(super) fn named(&self) -> String {
        let name = words::name(self.msr).map(|name| format!(" {name}")).unwrap_or_default();
        format!("{} {}{name}", self.op, self.msr)
    }

    /// The lines between the title and the prompt, each with its key.
    pub(super) fn lines(&self, loaded: &Loaded) -> Vec<(&'static str, String)> {
        let explained = loaded.explain(self.msr, self.op);
        let by = match explained.cause {
            Cause::Rule(number, _) => format!("the rule at {}", loaded.policy.rule_place(number).unwrap_or_default()),
            _ => "the default; no rule names it".to_owned(),
        };
        let mut lines = vec![("seen", self.history.clone())];
        lines.push(("now", format!("{}, by {by}", explained.action)));
        let needs: Vec<String> = self
            .needs()
            .map(|need| format!("{}: {} ({})", need.system, need.why, need.source))
            .collect();
        lines.push((
            "need",
            match needs.is_empty() {
                true => "no system is known to do it unguarded".to_owned(),
                false => needs.join("; "),
            },
        ));
        let mut risks = Vec::new();
        if let Some(host) = self.tells() {
            risks.push(format!("the hardware's value tells of the host {host}"));
        }
        if let Some(entry) = self.entry {
            if entry.is_essential() && self.op == Op::Write {
                risks.push(
                    "the processor works by it: a write that only seems done leaves the guest unprotected".to_owned(),
                );
            }
            if let Some(command) = entry.command().filter(|_| self.op == Op::Write) {
                risks.push(format!("a write is a command: {command}"));
            }
        } else {
            risks.push("the database does not know it".to_owned());
        }
        lines.push((
            "risk",
            match risks.is_empty() {
                true => "none is known".to_owned(),
                false => risks.join("; "),
            },
        ));
        let hot = match self.entry.is_some_and(Entry::is_hot) {
            true => ", and guests do it while they run",
            false => "",
        };
        let times = words::counted(self.times(), "exit", "exits");
        lines.push((
            "cost",
            format!(
                "{times} in the traces where user space answers{hot}; {} of 16 ranges are free",
                free(loaded)
            ),
        ));
        lines
    }

    pub(super) fn printed(&self, answer: String, refused: Option<&str>) -> impl Printed {
        object! {
            /// The MSR.
            msr: self.msr.to_string(),
            /// The MSR's name; null if it is not known.
            name: words::name(self.msr),
            /// The direction.
            op: self.op.name(),
            /// How often it was served in the traces.
            served: self.served(),
            /// How often it faulted there.
            faults: self.faults,
            /// The systems that make it unguarded.
            needs: self.needs().map(|need| object! {
                /// The operating system.
                system: need.system.to_string(),
                /// What it is for, and what becomes of the system without.
                why: need.why,
                /// Where that can be read.
                source: need.source,
            }).collect::<Vec<_>>(),
            /// What a read's value tells of the host, as of `msr`; null if nothing.
            host: self.tells().and_then(Host::name),
            /// Whether that is what a tenant must not see.
            leak: self.is_leak(),
            /// Whether the processor or KVM works by the MSR.
            essential: self.entry.is_some_and(Entry::is_essential),
            /// Whether guests access it while they run.
            hot: self.entry.is_some_and(Entry::is_hot),
            /// The answer, as `--answers` takes it; `"skip"` too where none was given.
            answer: answer,
            /// Why the answer was taken back; null where it was not.
            refused: refused,
        }
    }
}

/// How many ranges of the filter are left.
pub(super) fn free(loaded: &Loaded) -> usize {
    16usize.saturating_sub(loaded.plan.filter().ranges().len())
}
