//! What has to be saved with a guest that runs under a plan.

use std::io::{self, Write};

use msrgate_core::MsrRange;
use msrgate_msrs::Entry;
use msrgate_policy::state::{Emulated, Kept, Kind, State};

use crate::json::{Printed, object};
use crate::load::Loaded;
use crate::render::Table;
use crate::stream::Stream;
use crate::words;

pub(crate) fn printed(loaded: &Loaded, state: &State) -> impl Printed {
    let save = state.save.iter().map(|kept| {
        object! {
            /// The MSR.
            msr: kept.entry.msr.to_string(),
            /// The MSR's name.
            name: kept.entry.name(),
            /// How it is saved, as of `msr`.
            state: kept.entry.state.name(),
            /// Whether writes of the guest come to the kernel's register.
            written: kept.written,
            /// Whether its reads show it.
            read: kept.read,
            /// What else reads or changes it, in words; null if nothing is known to.
            passes: kept.entry.unfiltered(),
        }
    });
    let drop = state.drop.iter().map(|entry| {
        object! {
            /// The MSR.
            msr: entry.msr.to_string(),
            /// The MSR's name.
            name: entry.name(),
            /// How it would be saved, as of `msr`.
            state: entry.state.name(),
        }
    });
    let emulated = state.emulated.iter().map(|emulated| {
        object! {
            /// The first MSR.
            first: emulated.range.first().to_string(),
            /// The last MSR.
            last: emulated.range.last().to_string(),
            /// `"shadow"`: what the guest wrote. `"once"`: whether the one write has been made. `"handler"`: what the VMM's
            /// handler keeps.
            kind: emulated.kind.name(),
            /// The handler's name; null for the others.
            handler: handler(emulated),
        }
    });
    object! {
        /// Which policy.
        policy: object! {
            /// The policy's name.
            name: &loaded.policy.name,
            /// The hash, as of `check`.
            hash: words::hex(&loaded.plan.map().hash()),
        },
        /// What KVM keeps and the guest sees or made, by MSR.
        save: save.collect::<Vec<_>>(),
        /// What `KVM_GET_MSRS` gives and the guest has nothing of: to be left out, unless the VMM gave it a value itself.
        drop: drop.collect::<Vec<_>>(),
        /// What user space keeps for the guest.
        emulated: emulated.collect::<Vec<_>>(),
        /// Whether shadows are kept of MSRs that the kernel does not know or refuses.
        fallback: state.fallback,
        /// As of `plan`.
        presets: words::presets(loaded.plan.presets()),
    }
}

fn handler(emulated: &Emulated) -> Option<&str> {
    match &emulated.kind {
        Kind::Handler(name) => Some(name),
        Kind::Shadow | Kind::Once => None,
    }
}

pub(super) fn print(out: &mut Stream<impl Write>, loaded: &Loaded, state: &State) -> io::Result<()> {
    writeln!(
        out,
        "policy   {}, hash {}\n",
        loaded.policy.name,
        words::hex(&loaded.plan.map().hash())
    )?;
    if state.emulated.is_empty() && !state.fallback {
        writeln!(out, "no vCPU has emulated state to save\n")?;
    } else {
        writeln!(
            out,
            "state that user space emulates, which the VMM saves with VcpuGate::save:"
        )?;
        let mut table = Table::new(&["MSR", "what"]);
        for emulated in &state.emulated {
            let what = match &emulated.kind {
                Kind::Shadow => "shadow: what the guest wrote".to_owned(),
                Kind::Once => "once: whether the one write has been made".to_owned(),
                Kind::Handler(name) => format!("handler {name}: the VMM's own"),
            };
            table.add_row([emulated.range.to_string(), what]);
        }
        if state.fallback {
            table.add_row([
                "any",
                "shadow: what the guest wrote that the kernel does not know or refuses",
            ]);
        }
        table.print(out)?;
        writeln!(out)?;
    }

    writeln!(
        out,
        "state that KVM keeps and the guest reads or writes, which the VMM saves (unlisted: KVM_GET_MSR_INDEX_LIST does not name it):"
    )?;
    let mut table = Table::new(&["MSR", "name", "by", "since"]);
    let rows = state
        .save
        .iter()
        .map(|kept| (kept.entry, [by(kept.entry.state).to_owned(), since(kept)]));
    for (range, name, cells) in grouped(rows) {
        table.add_row([range.to_string(), name].into_iter().chain(cells));
    }
    table.print(out)?;
    writeln!(out)?;

    if state.drop.is_empty() {
        writeln!(out, "the guest uses every MSR that KVM_GET_MSRS gives")?;
    } else {
        writeln!(
            out,
            "MSRs that KVM_GET_MSRS gives and the guest does not use, which the VMM leaves out unless it set them itself:"
        )?;
        let mut table = Table::new(&["MSR", "name"]);
        for (range, name, []) in grouped(state.drop.iter().map(|entry| (*entry, []))) {
            table.add_row([range.to_string(), name]);
        }
        table.print(out)?;
    }
    if !loaded.plan.presets().is_empty() {
        let presets: Vec<String> = loaded
            .plan
            .presets()
            .iter()
            .map(|preset| preset.msr.to_string())
            .collect();
        let presets = presets.join(", ");
        writeln!(
            out,
            "\npresets, which the gate of each vCPU puts into the kernel anew: {presets}"
        )?;
    }
    Ok(())
}

/// The call that gives it.
fn by(state: msrgate_msrs::State) -> &'static str {
    match state {
        msrgate_msrs::State::Unlisted => "KVM_GET_MSRS, unlisted",
        msrgate_msrs::State::Sregs => "KVM_GET_SREGS",
        msrgate_msrs::State::Lapic => "KVM_GET_LAPIC",
        _ => "KVM_GET_MSRS",
    }
}

/// Why a register is saved.
fn since(kept: &Kept) -> String {
    match (kept.written, kept.read, kept.entry.unfiltered()) {
        (true, true, _) => "the guest reads and writes it".to_owned(),
        (true, false, _) => "the guest writes it".to_owned(),
        (false, true, _) => "the guest reads it".to_owned(),
        (false, false, passes) => passes.unwrap_or_default().to_owned(),
    }
}

/// MSRs in a row with the same cells, and their names.
fn grouped<const N: usize>(
    rows: impl Iterator<Item = (&'static Entry, [String; N])>,
) -> impl Iterator<Item = (MsrRange, String, [String; N])> {
    let mut groups: Vec<(MsrRange, [String; N])> = Vec::new();
    for (entry, cells) in rows {
        match groups.last_mut() {
            Some((range, before)) if *before == cells && range.last().0.checked_add(1) == Some(entry.msr.0) => {
                *range = MsrRange::new(range.first(), entry.msr).unwrap_or(*range);
            }
            _ => groups.push((MsrRange::single(entry.msr), cells)),
        }
    }
    let named = groups.into_iter();
    named.map(|(range, cells)| (range, words::names(range), cells))
}
