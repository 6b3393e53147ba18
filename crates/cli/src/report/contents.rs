//! What a report says, in whatever form.

use msrgate_core::{Disposition, Msr, Op, Verdict};
use msrgate_msrs::Entry;
use msrgate_policy::Explanation;
use msrgate_trace::report::{Kind, Lost, MOST_ROWS, MOST_VCPUS, Report, Row, Trace};
use msrgate_trace::{Coverage, TraceError};

use crate::load::Loaded;
use crate::words;

/// How many vCPUs or MSRs a note names.
const FEW: usize = 3;

/// The traces added up, and the policy that they are held against.
pub(crate) struct Contents {
    pub(super) report: Report,
    /// For each trace its name, and what ended it early.
    pub(super) files: Vec<(String, Option<TraceError>)>,
    pub(super) policy: Option<Loaded>,
}

impl Contents {
    /// What the policy says of an access, where there is a policy.
    pub(super) fn explain(&self, msr: Msr, op: Op) -> Option<Explanation<'_>> {
        self.policy.as_ref().map(|loaded| loaded.explain(msr, op))
    }

    /// What the policy gives the accesses of a row, as far as a filter can; all is allowed where there is no policy.
    pub(super) fn decides(&self, row: &Row) -> Kind {
        match self.explain(row.msr, row.op) {
            Some(explained) if explained.verdict == Verdict::Deny => Kind::of(explained.action.did()),
            _ => Kind::Allowed,
        }
    }

    /// Whether the policy denies what the guest was served with.
    pub(super) fn breaks(&self, row: &Row) -> bool {
        self.decides(row) == Kind::Faulted && row.served() > 0
    }

    /// How many accesses the policy denies that the guest was served with.
    pub(super) fn broken(&self) -> u64 {
        let broken = self.report.rows().filter(|row| self.breaks(row));
        broken.map(Row::served).sum()
    }

    /// How many accesses each rule of the policy decides, by its number.
    pub(super) fn decided(&self) -> Vec<u64> {
        let rules = self.policy.as_ref().map_or(0, |loaded| loaded.policy.rules.len());
        let mut counts = vec![0; rules];
        for row in self.report.rows() {
            let rule = self
                .explain(row.msr, row.op)
                .and_then(|explained| explained.cause.rule());
            let place = rule.and_then(|(number, _)| usize::try_from(number).ok());
            if let Some(count) = place.and_then(|place| counts.get_mut(place)) {
                *count += row.count;
            }
        }
        counts
    }

    /// What the traces do not have of what the guests did.
    pub(super) fn missing(&self) -> Vec<String> {
        let traces = self.files.iter().zip(self.report.traces());
        let notes = traces.flat_map(|((name, _), trace)| {
            let coverage = match trace.header.coverage {
                None | Some(Coverage::All) => None,
                Some(Coverage::First) => Some(format!(
                    "{name} has the first access to each MSR in each direction, and each that faulted: it does not tell how often \
                     the guests were served"
                )),
                Some(Coverage::Decided) => Some(format!(
                    "{name} has what the policy decided, and each access that faulted: what the policy left to the kernel is \
                     missing"
                )),
                Some(Coverage::Logged) => Some(format!(
                    "{name} is a log, which has what a hypervisor did not know or refused and often not all of that: what the \
                     guests were served with is missing"
                )),
            };
            let ignored = (trace.header.ignore_msrs == Some(true)).then(|| {
                format!(
                    "{name} is from a host with `kvm.ignore_msrs`: the guests were served with MSRs that KVM does not know, \
                     and fault there on other hosts"
                )
            });
            let part = trace.header.part.map(|part| {
                format!("{name} is part {part} of a trace that was cut by its size: what the other parts have is missing")
            });
            coverage.into_iter().chain(part).chain(ignored)
        });
        notes.chain(self.gaps()).collect()
    }

    /// What looks as if a host had `kvm.ignore_msrs`, where the traces do not say whether it has: reads that got 0 and no fault, of
    /// registers that KVM is not known to have.
    fn maybe_ignored(&self) -> Option<String> {
        let silent = |trace: &Trace| {
            let header = &trace.header;
            header.ignore_msrs.is_none() && header.coverage != Some(Coverage::Logged)
        };
        if !self.report.traces().iter().any(silent) {
            return None;
        }
        let unknown = self.report.rows().filter(|row| {
            let of_kvm = msrgate_msrs::by_msr(row.msr).is_some_and(Entry::is_known_to_kvm);
            let allowed = row.got.each().iter().all(|(got, _)| got.did == Disposition::Allow);
            let zero = matches!(row.values.each(), [(0, _)]) && row.values.others() == 0;
            row.op == Op::Read && allowed && zero && !of_kvm
        });
        let unknown: Vec<String> = unknown.map(|row| row.msr.to_string()).collect();
        let few = unknown
            .get(..FEW)
            .map_or(unknown.join(", "), |few| format!("{}, …", few.join(", ")));
        (!unknown.is_empty()).then(|| {
            format!(
                "reads of {} that KVM is not known to have got 0 and no fault, {few}: the host may have `kvm.ignore_msrs`, and \
                 then they fault on others",
                words::counted(unknown.len() as u64, "MSR", "MSRs")
            )
        })
    }

    /// How many accesses are missing from each trace that says so, whose, and when they were lost.
    fn gaps(&self) -> Vec<String> {
        let traces = (0..).zip(&self.files).zip(self.report.traces());
        let gaps = traces.filter(|(_, trace)| trace.lost > 0);
        gaps.map(|((number, (name, _)), trace)| self.gap(number, name, trace.lost))
            .collect()
    }

    fn gap(&self, trace: u32, name: &str, all: u64) -> String {
        let lost = self.report.lost_by_vcpu().filter(|lost| lost.trace == trace);
        let mut lost: Vec<Lost> = lost.collect();
        lost.sort_by_key(|lost| std::cmp::Reverse(lost.events));
        lost.truncate(FEW);
        let named = lost.iter().fold(0, |sum: u64, lost| sum.saturating_add(lost.events));
        let whose = lost.iter().map(|lost| {
            let seconds = |t: u64| format!("{:.6} s", t as f64 / 1e9);
            let (first, last) = (seconds(lost.first), seconds(lost.last));
            let until = if first == last {
                String::new()
            } else {
                format!(" to {last}")
            };
            format!("{} of VM {} vCPU {} at {first}{until}", lost.events, lost.vm, lost.vcpu)
        });
        format!(
            "{} missing from {name}, so this is not all that the guests did: {}{}",
            words::counted(all, "access is", "accesses are"),
            whose.collect::<Vec<_>>().join(", "),
            if named < all { ", and of more vCPUs" } else { "" }
        )
    }

    /// What a reader of the report has to know of it.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.maybe_ignored().into_iter().collect();
        let traces = self.report.traces();
        for ((name, error), trace) in self.files.iter().zip(traces) {
            if let Some(error) = error {
                notes.push(format!("{name}: {error}; what came before it is in the report"));
            }
            if let (Some(loaded), Some(hash)) = (&self.policy, &trace.header.policy)
                && *hash != words::hex(&loaded.plan.map().hash())
            {
                notes.push(format!(
                    "{name} was made under another policy: its numbers of rules are not those of `{}`",
                    loaded.policy.name
                ));
            }
        }
        let cpuids = || traces.iter().filter_map(|trace| trace.header.cpuid.as_deref());
        if self.policy.as_ref().is_some_and(|loaded| loaded.policy.asks_cpuid())
            && cpuids().any(|cpuid| cpuids().next() != Some(cpuid))
        {
            notes.push(
                "the traces' guests have different CPUIDs, and the policy depends on it: what it decides is told for one"
                    .to_owned(),
            );
        }
        if self.report.unlisted() > 0 {
            notes.push(format!(
                "{} of MSRs that are not listed, since there is room for {MOST_ROWS}",
                words::counted(self.report.unlisted(), "access is", "accesses are")
            ));
        }
        if self.report.vcpus().len() == MOST_VCPUS {
            notes.push(format!("no more than {MOST_VCPUS} vCPUs are told apart"));
        }
        if self.report.accesses() > 1 && traces.iter().all(|trace| trace.duration() == 0) {
            notes.push("the traces have no times".to_owned());
        }
        notes
    }
}
