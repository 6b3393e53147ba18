//! What is behind the lines of logs, for people and for programs.

use std::io::{self, Write};

use msrgate_core::Op;
use msrgate_trace::log::Speaker;

use super::case::{Access, Case, Remedy};
use super::logs::{Logs, Times};
use crate::json::{Printed, object};
use crate::stream::{Stream, Tone};
use crate::words;

/// How much of a line is shown.
const SHOWN: usize = 200;

pub(super) fn text(out: &mut Stream<impl Write>, logs: &Logs, cases: &[Case<'_>]) -> io::Result<()> {
    let remedied = cases
        .iter()
        .filter(|case| matches!(case.remedy(), Remedy::Rule(..)))
        .count();
    let verdict = format!(
        "{} in {}: {}",
        words::counted(cases.len() as u64, "MSR", "MSRs"),
        words::counted(logs.about, "line about MSRs", "lines about MSRs"),
        match (remedied, cases.len()) {
            (0, _) => no_rule(cases),
            (1, 1) => "a rule helps".to_owned(),
            (some, all) if some == all => "a rule helps with each".to_owned(),
            (some, _) => format!("a rule helps with {some} of them"),
        }
    );
    let is_good = cases.iter().all(Case::is_harmless) || remedied == cases.len();
    out.say(if is_good { Tone::Good } else { Tone::Odd }, &verdict)?;
    for note in notes(logs) {
        writeln!(out, "note: {note}")?;
    }
    let mut elsewhere: Vec<Speaker> = Vec::new();
    for access in cases.iter().flat_map(|case| &case.accesses) {
        if access.is_elsewhere() && !elsewhere.contains(&access.by) {
            elsewhere.push(access.by);
        }
    }
    for by in elsewhere {
        let there = match by {
            Speaker::Xen => "; on Xen, `msr_relaxed = 1` in the domain's configuration, from 4.15 on",
            Speaker::Bhyve => "; under bhyve, `bhyve -w`, in libvirt `<features><msrs unknown='ignore'/></features>`",
            _ => "",
        };
        let by = by.name();
        writeln!(
            out,
            "note: lines are of {by}, and rules are for a guest that runs on KVM{there}"
        )?;
    }
    for case in cases {
        writeln!(out)?;
        one(out, case)?;
    }
    Ok(())
}

/// What helps where no rule does.
fn no_rule(cases: &[Case<'_>]) -> String {
    let mut properties = Vec::new();
    for property in cases.iter().flat_map(Case::qemu) {
        if !properties.contains(&property) {
            properties.push(property);
        }
    }
    let switches = words::switches(&properties);
    match (cases.iter().all(Case::is_harmless), switches.is_empty()) {
        (true, true) => "nothing is to be mended".to_owned(),
        (true, false) => format!("nothing is to be mended; `-cpu MODEL,{switches}` ends QEMU's warnings"),
        (false, true) if cases.iter().all(Case::is_elsewhere) => "a guest on KVM needs no rule".to_owned(),
        (false, true) => "no rule helps".to_owned(),
        (false, false) => format!("no rule helps, QEMU's `-cpu MODEL,{switches}` does"),
    }
}

/// What a reader has to know of the logs.
fn notes(logs: &Logs) -> Vec<String> {
    let passed = logs.lines.saturating_sub(logs.about);
    let mut notes = Vec::new();
    if passed > 0 {
        notes.push(format!(
            "{} nothing of an MSR that is understood here",
            words::counted(passed, "other line says", "other lines say")
        ));
    }
    if logs.suppressed > 0 {
        notes.push(format!(
            "the kernel left out {} like these, maybe of other MSRs: callbacks suppressed",
            words::counted(logs.suppressed, "message", "messages")
        ));
    }
    if logs.unlisted > 0 {
        notes.push(format!(
            "{} of further MSRs, for which there is no room",
            words::counted(logs.unlisted, "line is", "lines are")
        ));
    }
    if logs.ignores() {
        notes.push(
            "the host has `kvm.ignore_msrs`, which covers all its guests; `msrgate run --ignore-unknown` does the same for one".to_owned(),
        );
    }
    notes
}

fn one(out: &mut Stream<impl Write>, case: &Case<'_>) -> io::Result<()> {
    let name = case.entry.map_or("(not in the database)", |entry| entry.name());
    out.say(Tone::Title, &format!("{} {name}", case.msr))?;
    let mut line = |key: &str, value: &str| writeln!(out, "  {key:<12}{}", words::plain(value));
    for access in &case.accesses {
        let times = words::counted(access.times.count, "time", "times");
        line("seen", &format!("{}, {times}, by {}", op(access), access.by.name()))?;
        line("", &shown(&access.times.line))?;
        for (value, count) in &access.times.values {
            let bits = words::bits(case.msr, *value);
            // A 0 in place of a value that nobody has says nothing.
            if *value == 0 && bits.is_empty() {
                continue;
            }
            let often = match access.times.values.len() {
                1 if access.times.others == 0 => String::new(),
                _ => format!(", {}", words::counted(*count, "time", "times")),
            };
            let bits = if bits.is_empty() { bits } else { format!(": {bits}") };
            line("value", &format!("{value:#x}{often}{bits}"))?;
        }
        line("why", &case.why(access))?;
        for need in case.needs(access) {
            line(
                "needed by",
                &format!("{}, {}: {} ({})", need.system, need.op, need.why, need.source),
            )?;
        }
        if let Some(then) = case.then(access) {
            line("then", then)?;
        }
    }
    if let Some(entry) = case.entry
        && entry.is_secret()
    {
        line("of the host", &entry.host.to_string())?;
    }
    match case.remedy() {
        Remedy::None(why) => line("rule", &format!("none: {why}")),
        Remedy::Rule(rule, but) => {
            if let Some(but) = but {
                line("rule", &format!("of other directions than the log, since {but}"))?;
            }
            writeln!(out, "\n{}", rule.trim_end())
        }
    }
}

fn op(access: &Access<'_>) -> &'static str {
    access.op.map_or("rdmsr or wrmsr", Op::name)
}

fn shown(line: &str) -> String {
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line.to_owned(),
    }
}

pub(crate) fn printed(logs: &Logs, cases: &[Case<'_>]) -> impl Printed {
    object! {
        /// How many lines were read, but for blank ones.
        lines: logs.lines,
        /// How many of them say something of an MSR that is understood.
        about_msrs: logs.about,
        /// How many have a log's words and not the register or the value that these are about.
        broken: logs.broken,
        /// How many messages the kernel left out, as far as it says (`callbacks suppressed`).
        suppressed: logs.suppressed,
        /// How many lines are of accesses for which there is no room: there are 16384 rows at most.
        unlisted: logs.unlisted,
        /// True where a line shows that the host has `kvm.ignore_msrs`; null elsewhere.
        ignore_msrs: logs.ignores().then_some(true),
        /// By MSR.
        registers: cases.iter().map(register).collect::<Vec<_>>(),
    }
}

fn register(case: &Case<'_>) -> impl Printed {
    let (rule, no_rule) = match case.remedy() {
        Remedy::Rule(rule, but) => (Some(rule), but),
        Remedy::None(why) => (None, Some(why)),
    };
    let access = |access: &Access<'_>| {
        let Times {
            count,
            values,
            others,
            line,
        } = access.times;
        object! {
            /// The direction; null where the line does not say it.
            op: access.op.map(Op::name),
            /// Who says it: `"KVM"`, `"Linux"` (of its own accesses), `"the msr driver"`, `"QEMU"`, `"Cloud Hypervisor"`,
            /// `"Firecracker"`, `"Xen"`, `"VirtualBox"`, `"bhyve"`, `"VMware"`, `"a dump of registers"`; `"another program"` of a line whose form is not known.
            by: access.by.name(),
            /// `"ignored"`: the hypervisor does not know the register, and gave 0 or dropped the write. `"dropped"`: it has
            /// the register, and dropped the write. `"unknown"`: it does not know the register, #GP. `"refused"`: it has the
            /// register and refuses the access, #GP. `"fault"`: #GP, and the line does not say why. `"vmm"`: the kernel
            /// refused the VMM, no guest. `"lacking"`: the host lacks bits of the VMM's CPU model. `"program"`: a program wrote it through the kernel's driver.
            /// `"crash"`: a guest reports its crash. `"privileged"`: the same, since a privileged instruction got #GP.
            cause: access.cause.name(),
            /// Whether `kvm.ignore_msrs`, and `unknown` in a policy, cover the access; null where neither the line nor the
            /// database tells.
            ignorable: case.is_unknown(access),
            /// How many lines say it.
            count: *count,
            /// What was written or read, eight values at most; of `"lacking"` all bits in one.
            values: values.iter().map(|(value, count)| object! {
                /// The value.
                value: format!("{value:#x}"),
                /// How often.
                count: *count,
                /// What its bits mean.
                bits: words::bits_printed(case.msr, *value),
            }).collect::<Vec<_>>(),
            /// How many lines have further values.
            other_values: *others,
            /// The first of the lines, or its first 500 characters.
            line: line.clone(),
            /// Why it ended so, in words.
            why: case.why(access),
            /// What the guest does then, in words; null where there is nothing to say, or where `needs` says it.
            then: case.then(access),
            /// Which systems need it.
            needs: case.needs(access).map(|need| object! {
                /// The operating system.
                system: need.system.to_string(),
                /// The direction.
                op: need.op.name(),
                /// What it is for, and what becomes of the system without.
                why: need.why,
                /// Where that can be read.
                source: need.source,
            }).collect::<Vec<_>>(),
        }
    };
    object! {
        /// The MSR.
        msr: case.msr.to_string(),
        /// Its name; null if it is not known.
        name: case.entry.map(|entry| entry.name()),
        /// As of `msr`.
        host: case.entry.and_then(|entry| entry.host.name()),
        /// What lines alike say of it.
        accesses: case.accesses.iter().map(access).collect::<Vec<_>>(),
        /// A rule in TOML that `check` takes; null where none helps.
        rule: rule,
        /// Properties for QEMU's `-cpu` to turn off; empty where none helps.
        qemu: case.qemu(),
        /// Why no rule helps and what does, or why the rule is of other directions than the log; null elsewhere.
        no_rule: no_rule,
    }
}
