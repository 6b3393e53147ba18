//! What the VMM's guests did, summed up.

use std::collections::BTreeMap;

use msrgate_core::{Disposition, FaultCause, Msr, Op, Reason};
use msrgate_plan::Preset;
use msrgate_supervise::{Counters, Done, Faults, Mode, Reader};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::render::Table;
use crate::run::killed::Killed;
use crate::run::trace::Trace;
use crate::words::counted;
use crate::{stream, words};

/// What there is to say besides the counts.
pub(crate) struct Summary {
    mode: Mode,
    presets: Vec<Preset>,
    json: bool,
    /// What there is from here on is told to nobody but the trace.
    background: bool,
}

impl Summary {
    pub(crate) fn new(mode: Mode, presets: &[Preset], json: bool) -> Summary {
        Summary {
            mode,
            presets: presets.to_vec(),
            json,
            background: false,
        }
    }

    pub(crate) fn background(&mut self) {
        self.background = true;
    }

    /// Tells what there was so far; `killed` is what ended the VMM where a signal did.
    pub(crate) fn print(&self, reader: &Reader, trace: &Trace, killed: Option<Killed>) {
        let tallies = reader.tallies();
        match self.json {
            true => stream::tell_programs(&self.json(reader, trace, &tallies, killed.as_ref())),
            false => stream::tell(&self.text(reader, trace, &tallies, killed.as_ref())),
        }
    }

    fn json(
        &self,
        reader: &Reader,
        trace: &Trace,
        tallies: &BTreeMap<(Msr, Op), Counters>,
        killed: Option<&Killed>,
    ) -> Value {
        let rows = tallies.iter().map(|((msr, op), tally)| {
            json!({
                "msr": msr.to_string(),
                "name": words::name(*msr),
                "op": op.name(),
                "count": tally.count,
                "cost_ns": tally.cost.0,
                "reason": tally.done.reason.map(|reason| reason.name()),
                "did": tally.done.did.name(),
                "why": tally.done.why.map(|why| why.name()),
                "would": tally.done.would.map(|would| would.name()),
                "faulted": tally.faults.map_or(0, |faults| faults.count),
                "fault_rip": tally.faults.and_then(|faults| faults.rip).map(|rip| format!("{rip:#x}")),
                "value": format!("{:#x}", tally.value),
            })
        });
        json!({
            "vms": reader.ledger().vms(),
            "vcpus": reader.ledger().vcpus(),
            "refused": reader.ledger().refusals(),
            "background": self.background,
            "trace": trace.path().map(|path| path.to_string_lossy()),
            "killed": killed.filter(|killed| killed.signal == Signal::SIGSYS).map(|killed| &killed.line),
            "signal": killed.map(|killed| killed.signal.as_str()),
            "cost_ns": cost(tallies),
            "presets": words::presets(&self.presets),
            "by_msr": rows.collect::<Vec<_>>(),
            "lost": {
                "events": reader.lost(),
                "unwritten": trace.unwritten().map_or(0, |unwritten| unwritten.events),
                "uncounted": reader.uncounted(),
            },
        })
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
        if !self.presets.is_empty() {
            let presets: Vec<String> = self.presets.iter().map(|preset| preset.msr.to_string()).collect();
            text.push_str(&format!(
                "msrgate: the kernel holds the policy's fixed answers of {}: reads of these make no exit and are not \
                 counted\n",
                presets.join(", ")
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
