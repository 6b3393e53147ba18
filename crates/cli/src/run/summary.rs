//! What the VMM's guests did, summed up.

use std::collections::BTreeMap;

use msrgate_core::{Disposition, FaultCause, Msr, Nanos, Op, Reason};
use msrgate_plan::Preset;
use msrgate_supervise::{Counters, Done, Faults, Mode, Reader};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::json::{self, Printed, object};
use crate::render::Table;
use crate::run::killed::Killed;
use crate::run::trace::Trace;
use crate::words::counted;
use crate::{stream, words};

/// What another subcommand has to say besides the counts.
pub(crate) struct Besides {
    /// Lines for people.
    pub(crate) text: String,
    /// More keys of the object.
    pub(crate) json: serde_json::Map<String, Value>,
}

/// What there is to say besides the counts.
pub(crate) struct Summary {
    mode: Mode,
    presets: Vec<Preset>,
    json: bool,
    /// What there is from here on is told to nobody but the trace.
    background: bool,
    /// Policies that took the place of another, and when, since the start.
    policies: Vec<(Nanos, String)>,
    pub(crate) besides: Option<Besides>,
}

impl Summary {
    pub(crate) fn new(mode: Mode, presets: &[Preset], json: bool) -> Summary {
        Summary {
            mode,
            presets: presets.to_vec(),
            json,
            background: false,
            policies: Vec::new(),
            besides: None,
        }
    }

    pub(crate) fn background(&mut self) {
        self.background = true;
    }

    /// Another policy is in force from here on.
    pub(crate) fn another_policy(&mut self, t: Nanos, hash: String) {
        self.policies.push((t, hash));
    }

    /// The policy that took the place of the first, where one did.
    pub(crate) fn policy(&self) -> Option<&str> {
        self.policies.last().map(|(_, hash)| hash.as_str())
    }

    /// Tells what there was so far; `killed` is what ended the VMM where a signal did.
    pub(crate) fn print(&self, reader: &Reader, trace: &Trace, killed: Option<Killed>) {
        let tallies = reader.tallies();
        match self.json {
            true => stream::tell_programs(&self.json(reader, trace, killed.as_ref())),
            false => stream::tell(&self.text(reader, trace, &tallies, killed.as_ref())),
        }
    }

    /// The summary as JSON, for programs.
    pub(crate) fn json(&self, reader: &Reader, trace: &Trace, killed: Option<&Killed>) -> Value {
        let mut summary = json::value(&self.printed(reader, trace, killed));
        if let (Value::Object(summary), Some(besides)) = (&mut summary, &self.besides) {
            summary.extend(besides.json.clone());
        }
        summary
    }

    /// The counts.
    pub(crate) fn printed(&self, reader: &Reader, trace: &Trace, killed: Option<&Killed>) -> impl Printed {
        let tallies = &reader.tallies();
        let rows = tallies.iter().map(|((msr, op), tally)| {
            object! {
                /// The MSR.
                msr: msr.to_string(),
                /// The MSR's name; null if it is not known.
                name: words::name(*msr),
                /// The direction.
                op: op.name(),
                /// How often.
                count: tally.count,
                /// How long all of these took, in nanoseconds.
                cost_ns: tally.cost.0,
                /// Why the kernel handed the last one over: `"filter"`, `"unknown"` or `"invalid"`.
                reason: tally.done.reason.map(|reason| reason.name()),
                /// What the last one got; see [trace.md](trace.md).
                did: tally.done.did.name(),
                /// Why it faulted; null if there is nothing to say.
                why: tally.done.why.map(|why| why.name()),
                /// With `--audit`: what the policy would have done; null else.
                would: tally.done.would.map(|would| would.name()),
                /// How many of the accesses were #GP.
                faulted: tally.faults.map_or(0, |faults| faults.count),
                /// With `--rip`: the guest's instruction pointer at the last of these; null else.
                fault_rip: tally.faults.and_then(|faults| faults.rip).map(|rip| format!("{rip:#x}")),
                /// What the last read got or the last write gave.
                value: format!("{:#x}", tally.value),
            }
        });
        object! {
            /// How many VMs the VMM made.
            vms: reader.ledger().vms(),
            /// How many vCPUs.
            vcpus: reader.ledger().vcpus(),
            /// How many VMs and vCPUs it did not get, since the policy could not be put on them.
            refused: reader.ledger().refusals(),
            /// Whether what the VMM started goes on in the background, so that this is not all.
            background: self.background,
            /// The file that the trace is written to; null without one, and where no vCPU ran.
            trace: trace.path().map(|path| path.to_string_lossy()),
            /// Where the VMM's own seccomp sandbox killed it, a line that says so, with the thread and the call if the
            /// kernel's log has them; null else.
            killed: killed.filter(|killed| killed.signal == Signal::SIGSYS).map(|killed| &killed.line),
            /// The name of the signal that ended the VMM, `"SIGSEGV"`; null where none did.
            signal: killed.map(|killed| killed.signal.as_str()),
            /// How long all accesses in `by_msr` took between the guest's exit and its answer, in nanoseconds; the way out
            /// of the guest and back is not in it.
            cost_ns: cost(tallies),
            /// As of `plan --host`: fixed answers that the kernel holds, so that their reads make no exit and are not in
            /// `by_msr`. Empty with `--trace`, `--audit` and `--learn`.
            presets: words::presets(&self.presets),
            /// Policies that took the place of another, in the order of time.
            reloads: self.policies.iter().map(|(t, hash)| object! {
                /// When, in nanoseconds since the start.
                t: t.0,
                /// The hash of the policy that is in force from there on; of one that depends on the CPUID, what it is for
                /// the first VM.
                policy: hash,
            }).collect::<Vec<_>>(),
            /// What the policy decided and what the kernel refused, by MSR, reads before writes. With `--audit` and
            /// `--learn`: what was touched, each once, and what the kernel refused.
            by_msr: rows.collect::<Vec<_>>(),
            /// What is not told.
            lost: object! {
                /// Events that came faster than they were written.
                events: reader.lost(),
                /// Events that could not be written to the trace.
                unwritten: trace.unwritten().map_or(0, |unwritten| unwritten.events),
                /// Accesses that are not in `by_msr` for want of room.
                uncounted: reader.uncounted(),
            },
        }
    }

    fn text(
        &self,
        reader: &Reader,
        trace: &Trace,
        tallies: &BTreeMap<(Msr, Op), Counters>,
        killed: Option<&Killed>,
    ) -> String {
        let mut table = Table::new(&["MSR", "name", "op", "count", "got", "each", "last value"]);
        let (mut accesses, mut faulted): (u64, u64) = (0, 0);
        for ((msr, op), tally) in tallies {
            accesses = accesses.saturating_add(tally.count);
            faulted = faulted.saturating_add(tally.faults.map_or(0, |faults| faults.count));
            table.add_row([
                msr.to_string(),
                words::name(*msr).unwrap_or_default().to_owned(),
                op.to_string(),
                tally.count.to_string(),
                got(tally),
                words::duration(tally.cost.0 / tally.count.max(1)),
                format!("{:#x}", tally.value),
            ]);
        }
        // Each is one access, and the table has not room for all.
        let touched = accesses.saturating_add(reader.uncounted());
        let (vms, vcpus) = (reader.ledger().vms(), reader.ledger().vcpus());
        let took = words::duration(cost(tallies));
        let mut before = killed
            .map(|killed| format!("msrgate: {}\n", killed.line))
            .unwrap_or_default();
        match reader.ledger().refusals() {
            0 => {}
            count => before.push_str(&format!(
                "msrgate: not made, since the policy could not be put on them: {}\n",
                counted(count, "VM or vCPU", "VMs or vCPUs")
            )),
        }
        let background = match (self.background, trace.is_file()) {
            (false, _) => "",
            (true, true) => {
                "msrgate: what the VMM started goes on in the background, under the policy, and so does the trace\n"
            }
            (true, false) => {
                "msrgate: what the VMM started goes on in the background, under the policy; with `--trace FILE` there is a \
                 trace of it\n"
            }
        };
        if vms == 0 && self.background {
            return format!("{before}msrgate: no VM was made so far\n{background}");
        }
        if vms == 0 {
            let why = match msrgate_kvm::open() {
                Ok(_) => String::new(),
                Err(error) => format!(" ({error})"),
            };
            return match reader.ledger().refusals() {
                0 => format!("{before}msrgate: no VM was made, so the policy was put on none{why}\n"),
                _ => before,
            };
        }
        let mut text = format!(
            "{before}msrgate: {} and {}, {}\n",
            counted(vms, "VM", "VMs"),
            counted(vcpus, "vCPU", "vCPUs"),
            match (self.mode, accesses) {
                (Mode::Enforce, 0) => "no access answered".to_owned(),
                (Mode::Enforce, _) => format!("{} answered in {took}", counted(accesses, "access", "accesses")),
                (Mode::Audit, _) => format!("{touched} of the policy's MSRs and directions touched, nothing changed"),
                (Mode::LearnAll, _) => format!(
                    "{} passed on in {took}, not faithfully",
                    counted(accesses, "access", "accesses")
                ),
                (Mode::Learn, _) => format!(
                    "{} touched, nothing changed",
                    counted(touched, "MSR and direction", "MSRs and directions")
                ),
            }
        );
        if faulted > 0 {
            text.push_str(&format!(
                "msrgate: the guests got #GP {}:\n",
                counted(faulted, "time", "times")
            ));
            for ((msr, op), tally) in tallies {
                if let Some(faults) = tally.faults {
                    text.push_str(&fault(*msr, *op, &faults));
                }
            }
        }
        if accesses > 0 {
            text.push_str(&table.text(stream::err().width, false));
        }
        if !self.presets.is_empty() && self.policies.is_empty() {
            let presets: Vec<String> = self.presets.iter().map(|preset| preset.msr.to_string()).collect();
            text.push_str(&format!(
                "msrgate: the kernel holds the policy's fixed answers of {}: reads of these make no exit and are not \
                 counted\n",
                presets.join(", ")
            ));
        }
        if let Some((t, hash)) = self.policies.last() {
            text.push_str(&format!(
                "msrgate: another policy took the place of the first {}, the last one {} after the start: {hash}\n",
                counted(self.policies.len() as u64, "time", "times"),
                words::duration(t.0)
            ));
        }
        if reader.uncounted() > 0 {
            text.push_str(&format!(
                "msrgate: {} not in the table: it has room for some 1000 MSRs of each vCPU\n",
                counted(reader.uncounted(), "access more is", "accesses more are")
            ));
        }
        if reader.lost() > 0 {
            text.push_str(&format!(
                "msrgate: {} missing, for want of time to write: the trace says where\n",
                counted(reader.lost(), "event is", "events are")
            ));
        }
        if let Some(unwritten) = trace.unwritten() {
            text.push_str(&format!(
                "msrgate: {} lost: {}\n",
                counted(unwritten.events, "event is", "events are"),
                unwritten.error
            ));
        }
        text.push_str(background);
        text.push_str(self.besides.as_ref().map_or("", |besides| &besides.text));
        text
    }
}

/// What the accesses of an MSR got: the last one, and how many faulted where some did not.
fn got(tally: &Counters) -> String {
    let Done {
        did,
        why,
        reason,
        would,
    } = tally.done;
    let last = words::outcome(did, why, reason, would);
    match tally.faults {
        Some(faults) if faults.count != tally.count => format!("{last}; {} faulted", faults.count),
        _ => last,
    }
}

/// A line of the MSRs that faulted.
fn fault(msr: Msr, op: Op, faults: &Faults) -> String {
    let name = words::name(msr).map(|name| format!(" {name}")).unwrap_or_default();
    let cause = match (faults.last.did, faults.last.reason) {
        (Disposition::Deny, _) => "the policy denies it".to_owned(),
        _ if faults.last.why == Some(FaultCause::VmmFilter) => "the VMM's own filter denies it".to_owned(),
        (_, Some(Reason::Unknown)) => "KVM does not know the MSR".to_owned(),
        (_, Some(Reason::Invalid)) if op == Op::Write => "KVM refuses the value".to_owned(),
        (_, Some(Reason::Invalid)) => "KVM refuses the read".to_owned(),
        (did, _) => faults.last.why.map_or(did.to_string(), |why| why.to_string()),
    };
    let rip = faults
        .rip
        .map(|rip| format!(", the last at RIP {rip:#x}"))
        .unwrap_or_default();
    format!(
        "    {op} {msr}{name}: {}, {cause}{rip}\n",
        counted(faults.count, "time", "times")
    )
}

/// What all accesses took together.
fn cost(tallies: &BTreeMap<(Msr, Op), Counters>) -> u64 {
    tallies.values().fold(0, |sum, tally| sum.saturating_add(tally.cost.0))
}
