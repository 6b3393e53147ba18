//! What no filter can do of what a policy asks for: the notes of its plan, and what the database says of its MSRs.

use std::collections::{BTreeMap, BTreeSet};

use msrgate_core::abi::{MAX_BITMAP_BYTES, MAX_RANGE_MSRS};
use msrgate_core::{Filter, Msr, MsrRange, Op};
use msrgate_msrs::{Bypass, Entry};
use msrgate_plan::{DecisionMap, Intervals, Note, Plan};

use crate::print::counted;
use crate::{Code, Diagnostic};

/// The notes on a plan, in order of their codes.
pub fn notes(plan: &Plan) -> Vec<Diagnostic> {
    let of_plan = plan.notes().iter().filter_map(of_plan);
    let passing = msrgate_msrs::all().iter().filter_map(|entry| passes(plan.map(), entry));
    let of_map = instructions(plan.map()).into_iter().chain(cut(plan.filter()));
    let mut notes: Vec<Diagnostic> = of_plan.chain(passing).chain(of_map).collect();
    notes.sort_by_key(|note| note.code);
    notes.dedup_by_key(|note| note.code);
    notes
}

/// A note on what passes the filter by a property of an MSR.
fn passes(map: &DecisionMap, entry: &Entry) -> Option<Diagnostic> {
    let shown = format!("{} ({})", entry.msr, entry.name());
    let (ops, code, message): (&[Op], _, _) = match entry.bypass? {
        Bypass::Fastpath => (
            &[Op::Write],
            Code::PassesUnseen,
            format!(
                "a write of {shown} may pass the filter unseen: kvm_intel completes it ahead of the filter, before Linux 6.18 \
                 only where it uses the preemption timer, and from Linux 6.18 kvm_amd too; reads are filtered"
            ),
        ),
        Bypass::Ghcb => (
            &Op::ALL,
            Code::NoSevEs,
            format!(
                "{} (the GHCB MSR) is not left to the kernel: an SEV-ES guest cannot run under this policy",
                entry.msr
            ),
        ),
        Bypass::Hardware => (
            &[Op::Read],
            Code::NotIntercepted,
            format!("a read of {shown} is not intercepted by AMD's hardware, so no filter sees it"),
        ),
        _ => return None,
    };
    let closed = ops.iter().any(|op| !map.allows(entry.msr, *op));
    closed.then(|| Diagnostic::whole(code, message))
}

/// A note on the instructions that reach registers which the policy closes.
fn instructions(map: &DecisionMap) -> Option<Diagnostic> {
    let mut reached: BTreeMap<(Bypass, &str), Vec<&str>> = BTreeMap::new();
    for entry in msrgate_msrs::all() {
        let closed = match entry.bypass {
            Some(Bypass::Rdtsc | Bypass::Rdtscp | Bypass::Rdpmc) => !map.allows(entry.msr, Op::Read),
            // RDMSR shows something else than the instruction goes by.
            Some(Bypass::Sysenter | Bypass::Syscall) => map.reads().get(entry.msr).action.needs_exit(),
            Some(Bypass::Fsgsbase | Bypass::Swapgs | Bypass::Xsaves) => !map.allows(entry.msr, Op::Write),
            _ => false,
        };
        let instruction = |bypass: Bypass| Some((bypass, bypass.instruction()?));
        if let Some(key) = entry.bypass.filter(|_| closed).and_then(instruction) {
            reached.entry(key).or_default().push(entry.name());
        }
    }
    let parts = reached.iter().map(|((_, what), names)| match names.as_slice() {
        [first, second, rest @ ..] if !rest.is_empty() => {
            format!("{what} {first}, {second} and {} more", rest.len())
        }
        names => format!("{what} {}", names.join(" and ")),
    });
    let parts: Vec<String> = parts.collect();
    (!parts.is_empty()).then(|| {
        let message = format!(
            "no filter sees instructions that reach the kernel's registers: {}",
            parts.join("; ")
        );
        Diagnostic::whole(Code::ReachedByInstructions, message)
    })
}

/// A note on MSRs in a row that no single range of the filter can hold.
fn cut(filter: &Filter) -> Option<Diagnostic> {
    let mut rows: Vec<String> = Vec::new();
    for op in Op::ALL {
        let ranges = filter.ranges().iter().filter(|range| range.ops().contains(op));
        let begins: BTreeSet<Msr> = ranges.map(|range| Msr(range.base())).collect();
        for row in rows_of(filter, op) {
            let cuts = begins.iter().filter(|at| row.contains(**at) && **at != row.first());
            let cuts: Vec<String> = cuts.map(Msr::to_string).collect();
            let told = format!("{row} is cut before {}", cuts.join(", "));
            if row.len() > u64::from(MAX_RANGE_MSRS) && !cuts.is_empty() && !rows.contains(&told) {
                rows.push(told);
            }
        }
    }
    (!rows.is_empty()).then(|| {
        let message = format!(
            "{}: a range of the kernel's filter holds {MAX_RANGE_MSRS} MSRs, a bit each in {MAX_BITMAP_BYTES:#x} bytes",
            rows.join("; ")
        );
        Diagnostic::whole(Code::RangeCut, message)
    })
}

/// The longest rows of MSRs that get another verdict than the default. Of x2APIC there is none to get.
fn rows_of(filter: &Filter, op: Op) -> Vec<MsrRange> {
    let mut rows: Vec<MsrRange> = Vec::new();
    for (range, verdict) in Intervals::of_filter(filter, op).iter() {
        if *verdict == filter.default_verdict() && !range.is_within(MsrRange::X2APIC) {
            continue;
        }
        let before = rows.last().copied();
        let adjoins = before.filter(|before| before.last().0.checked_add(1) == Some(range.first().0));
        match adjoins.and_then(|before| MsrRange::new(before.first(), range.last())) {
            Some(whole) => {
                rows.pop();
                rows.push(whole);
            }
            None => rows.push(range),
        }
    }
    rows
}

fn of_plan(note: &Note) -> Option<Diagnostic> {
    let (code, message) = match note {
        Note::X2apic => (
            Code::NeverFiltered,
            "0x800..=0x8ff (x2APIC) are never filtered: the kernel answers them whatever the policy says".to_owned(),
        ),
        Note::LastMsr => (
            Code::LastMsr,
            "0xffffffff cannot be in a filter range, so it gets what MSRs without a rule get".to_owned(),
        ),
        Note::HostView => (
            Code::HostView,
            "`mask`, `only` and `once` reach the kernel's register as the host does (KVM_GET_MSRS, KVM_SET_MSRS), which \
             may differ from what the guest's own instruction would have done"
                .to_owned(),
        ),
        Note::Presets => (
            Code::PresetsHeld,
            "a preset holds as long as nothing on the host writes the register: a VMM that sets it by itself \
             (KVM_SET_MSRS) gives the guest another value than the policy does"
                .to_owned(),
        ),
        Note::Spilled { accesses, exits, .. } => {
            let cost = match exits {
                None => "how often the guest makes them, a profile would tell".to_owned(),
                Some(exits) => format!("that is {} in the profile", counted(*exits, "exit", "exits")),
            };
            let message = format!(
                "{} into 16 ranges: user space passes on to the kernel what does not fit, one exit each time; {cost}",
                counted(
                    *accesses,
                    "access that is left to the kernel does not fit",
                    "accesses that are left to the kernel do not fit"
                )
            );
            (Code::PassedOn, message)
        }
        _ => return None,
    };
    Some(Diagnostic::whole(code, message))
}

#[cfg(test)]
mod tests {
    use msrgate_plan::CompileOptions;

    use super::*;
    use crate::Policy;

    fn map(default: &str, rules: &str) -> DecisionMap {
        let text = format!("version = 1\ndefault = \"{default}\"\n{rules}");
        Policy::parse("p", &text).unwrap().decision_map(None).unwrap()
    }

    fn codes(default: &str, rules: &str) -> Vec<Code> {
        let plan = Plan::compile(&map(default, rules)).unwrap();
        notes(&plan).iter().map(|note| note.code).collect()
    }

    #[test]
    fn what_no_filter_can_decide_is_named() {
        let rule = |msr: &str, action: &str| format!("[[rule]]\nmsr = {msr}\n{action}\n");
        assert_eq!(codes("allow", ""), []);
        let all = [
            Code::NeverFiltered,
            Code::PassesUnseen,
            Code::NoSevEs,
            Code::NotIntercepted,
            Code::ReachedByInstructions,
        ];
        assert_eq!(codes("deny", ""), all);
        assert_eq!(codes("allow", &rule("0x830", "read = \"deny\"")), [Code::NeverFiltered]);
        assert_eq!(codes("allow", &rule("0xffffffff", "read = \"deny\"")), [Code::LastMsr]);
        for (msr, code) in [
            ("0x6e0", Code::PassesUnseen),
            ("0xc0000100", Code::ReachedByInstructions),
            ("0xc0000101", Code::ReachedByInstructions),
            ("0xc0000102", Code::ReachedByInstructions),
        ] {
            assert_eq!(codes("allow", &rule(msr, "write = \"ignore\"")), [code]);
            assert_eq!(codes("allow", &rule(msr, "read = \"zero\"")), []);
        }
        for direction in ["read", "write"] {
            let rule = rule("0xc0010130", &format!("{direction} = \"deny\""));
            assert_eq!(codes("allow", &rule), [Code::NoSevEs]);
        }
        assert_eq!(
            codes("allow", &rule("0xc0010131", "read = \"zero\"")),
            [Code::NotIntercepted]
        );
        assert_eq!(codes("allow", &rule("0xc0010131", "write = \"deny\"")), []);
        assert_eq!(codes("allow", &rule("0x10", "write = \"deny\"")), []);
    }

    #[test]
    fn each_instruction_that_reaches_a_closed_register_is_named() {
        for (msr, action, says) in [
            ("IA32_TSC", "read = { value = 0x1000 }", "RDTSC reads IA32_TSC"),
            ("TSC_AUX", "read = \"deny\"", "RDTSCP and RDPID read IA32_TSC_AUX"),
            (
                "@sysenter",
                "read = \"zero\"",
                "SYSENTER goes by IA32_SYSENTER_CS, IA32_SYSENTER_ESP and 1 more",
            ),
            ("LSTAR", "read = \"zero\"", "SYSCALL goes by IA32_LSTAR"),
            (
                "@cet",
                "write = \"deny\"",
                "XRSTORS changes IA32_U_CET, IA32_S_CET and 4 more",
            ),
            ("IA32_PMC0", "read = \"zero\"", "RDPMC reads IA32_PMC0"),
            (
                "IA32_FS_BASE",
                "write = \"deny\"",
                "WRFSBASE and WRGSBASE change IA32_FS_BASE",
            ),
            (
                "KERNEL_GS_BASE",
                "write = \"ignore\"",
                "SWAPGS changes IA32_KERNEL_GS_BASE",
            ),
        ] {
            let map = map("allow", &format!("[[rule]]\nmsr = \"{msr}\"\n{action}\n"));
            let notes = notes(&Plan::compile(&map).unwrap());
            assert!(
                notes.iter().any(|note| note.message.ends_with(says)),
                "{msr}: {notes:?}"
            );
        }
    }

    #[test]
    fn a_row_of_msrs_that_no_range_holds_is_told_with_the_place_of_the_cut() {
        let said = |default: &str, rules: &str| {
            let notes = notes(&Plan::compile(&map(default, rules)).unwrap());
            let cut = notes.into_iter().find(|note| note.code == Code::RangeCut);
            cut.map(|note| note.message.split(": ").next().unwrap().to_owned())
        };
        let row = |last: u32| format!("[[rule]]\nmsr = \"0x10000..={last:#x}\"\nread = \"deny\"\nwrite = \"zero\"\n");
        let row = |last| row(last).replace("zero", "ignore");
        let cut = |text: &str| Some(text.to_owned());
        assert_eq!(said("allow", &row(0x12fff)), None, "12288 MSRs");
        assert_eq!(
            said("allow", &row(0x13000)),
            cut("0x10000..=0x13000 is cut before 0x13000")
        );
        assert_eq!(
            said("allow", &row(0x16000)),
            cut("0x10000..=0x16000 is cut before 0x13000, 0x16000")
        );
        let low = "[[rule]]\nmsr = \"0..=0x3000\"\nread = \"allow\"\nwrite = \"allow\"\n";
        assert_eq!(
            said("deny", low),
            cut("0x0..=0x3000 is cut before 0x900"),
            "around x2APIC"
        );
        let apart = "[[rule]]\nmsr = [\"0x10000..=0x12ffe\", \"0x13000..=0x15000\"]\nread = \"deny\"\n";
        assert_eq!(said("allow", apart), None, "0x12fff is not denied");
    }

    #[test]
    fn a_preset_is_noted() {
        let rule = "[[rule]]\nmsr = 0x8b\nread = { value = 1 }\nwrite = \"ignore\"\n";
        let map = map("allow", rule);
        let options = CompileOptions::default().with_presets(map.preset(Msr(0x8b)).into_iter().collect());
        let plan = Plan::compile_for(&map, &options).unwrap();
        let codes: Vec<Code> = notes(&plan).iter().map(|note| note.code).collect();
        assert_eq!(codes, [Code::PresetsHeld]);
    }

    #[test]
    fn the_register_that_passes_unseen_is_the_one_that_the_engine_lets_pass() {
        let passing = msrgate_msrs::all()
            .iter()
            .filter(|entry| entry.bypass == Some(Bypass::Fastpath));
        assert_eq!(passing.map(|entry| entry.msr).collect::<Vec<_>>(), [Msr::TSC_DEADLINE]);
    }
}
