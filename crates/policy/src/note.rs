//! What no filter can do of what a policy asks for: the notes of its plan, and what the database says of its MSRs.

use std::collections::BTreeSet;

use msrgate_core::abi::{MAX_BITMAP_BYTES, MAX_RANGE_MSRS};
use msrgate_core::{Filter, Msr, MsrRange, Op};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_msrs::{Bypass, BypassKind, Entry, Linux, Passes};
use msrgate_plan::{DecisionMap, Intervals, Note, Plan};

use crate::print::counted;
use crate::{Code, Diagnostic};

/// The notes on a plan, in order of their codes. What only a guest with some feature can do is told where `guest` has it, and
/// what only some kernels let pass where `kernel` is one of them or is not known.
pub fn notes(plan: &Plan, guest: Option<&Cpuid>, kernel: Option<Linux>) -> Vec<Diagnostic> {
    let of_plan = plan.notes().iter().filter_map(of_plan);
    let there = |bypass: &&Bypass| {
        kernel.is_none_or(|kernel| bypass.is_of(kernel))
            && (bypass.guest.is_none() || guest.is_some_and(|guest| bypass.is_open_to(guest)))
    };
    let kinds = [
        BypassKind::Fastpath,
        BypassKind::Ghcb,
        BypassKind::Hardware,
        BypassKind::Instruction,
        BypassKind::Kernel,
        BypassKind::Confidential,
    ];
    let passing = kinds.into_iter().filter_map(|kind| {
        let of_kind = msrgate_msrs::bypasses().iter().filter(|bypass| bypass.kind == kind);
        let told = of_kind.filter(there).filter_map(|bypass| told(plan, bypass, kernel));
        let told: Vec<String> = told.collect();
        (!told.is_empty()).then(|| passes(kind, &told.join("; ")))
    });
    let mut notes: Vec<Diagnostic> = of_plan.chain(passing).chain(cut(plan.filter())).collect();
    notes.sort_by_key(|note| note.code);
    notes
}

/// What passes, with the registers that the policy closes; `None` if it closes none of them.
fn told(plan: &Plan, bypass: &Bypass, kernel: Option<Linux>) -> Option<String> {
    let all = || bypass.says_of(kernel, "");
    if bypass.passes == Passes::Host {
        let reached = plan
            .notes()
            .iter()
            .any(|note| matches!(note, Note::HostView | Note::Presets));
        return reached.then(all);
    }
    if bypass.of.is_empty() {
        let allowed = plan.map().allowed();
        return allowed.iter().any(|(_, both)| *both != (true, true)).then(all);
    }
    let of_all = msrgate_msrs::all().iter().filter(|entry| entry.is_reached_by(bypass));
    let closed: Vec<&str> = of_all
        .filter(|entry| closes(plan.map(), bypass, entry))
        .map(Entry::name)
        .collect();
    let names = match closed.as_slice() {
        [] => return None,
        _ if bypass.kind != BypassKind::Instruction => return Some(all()),
        [first, second, rest @ ..] if !rest.is_empty() => format!("{first}, {second} and {} more", rest.len()),
        names => names.join(" and "),
    };
    Some(bypass.says_of(kernel, &names))
}

/// Whether the policy closes of a register what passes.
fn closes(map: &DecisionMap, bypass: &Bypass, entry: &Entry) -> bool {
    let (read, write) = (map.reads().get(entry.msr), map.writes().get(entry.msr));
    let named = |rule: Option<u32>| bypass.kind != BypassKind::Kernel || rule.is_some();
    let read_closed = !map.allows(entry.msr, Op::Read) && named(read.rule);
    let write_closed = !map.allows(entry.msr, Op::Write) && named(write.rule);
    match bypass.passes {
        Passes::Read => read_closed,
        Passes::Write => write_closed,
        // RDMSR shows something else than the processor goes by.
        Passes::Use => read.action.needs_exit(),
        _ => read_closed || write_closed,
    }
}

/// The note on one kind of bypass.
fn passes(kind: BypassKind, told: &str) -> Diagnostic {
    let note = |code, message| Diagnostic::whole(code, message);
    match kind {
        BypassKind::Fastpath => note(
            Code::PassesUnseen,
            format!("a write of 0x6e0 (IA32_TSC_DEADLINE) may pass the filter unseen: {told}; reads are filtered"),
        ),
        BypassKind::Ghcb => note(
            Code::NoSevEs,
            "0xc0010130 (the GHCB MSR) is not left to the kernel: an SEV-ES guest cannot run under this policy"
                .to_owned(),
        ),
        BypassKind::Hardware => note(
            Code::NotIntercepted,
            format!("no filter sees a read of 0xc0010131 (SEV_STATUS): {told}"),
        ),
        BypassKind::Kernel => note(
            Code::KernelGap,
            format!("the kernel lets a guest pass the filter: {told}"),
        ),
        BypassKind::Confidential => note(
            Code::Confidential,
            format!("a confidential guest gets something else: {told}"),
        ),
        _ => note(
            Code::ReachedByInstructions,
            format!("no filter sees instructions that reach the kernel's registers: {told}"),
        ),
    }
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
            "user space reads or writes the kernel's register for the guest (KVM_GET_MSRS, KVM_SET_MSRS), which may differ \
             from what the guest's own instruction would have done"
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

    /// All notes but that on confidential guests, which any policy has that closes something.
    fn codes(default: &str, rules: &str) -> Vec<Code> {
        let plan = Plan::compile(&map(default, rules)).unwrap();
        let codes = notes(&plan, None, None).into_iter().map(|note| note.code);
        codes.filter(|code| *code != Code::Confidential).collect()
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
                "XRSTORS changes IA32_U_CET, IA32_PL0_SSP and 3 more",
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
            let notes = notes(&Plan::compile(&map).unwrap(), None, Some(Linux(6, 18)));
            assert!(
                notes.iter().any(|note| note.message.ends_with(&format!(": {says}"))),
                "{msr}: {notes:?}"
            );
        }
    }

    #[test]
    fn a_row_of_msrs_that_no_range_holds_is_told_with_the_place_of_the_cut() {
        let said = |default: &str, rules: &str| {
            let notes = notes(&Plan::compile(&map(default, rules)).unwrap(), None, None);
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
        let notes = notes(&plan, None, Some(Linux(6, 15)));
        let codes: Vec<Code> = notes.iter().map(|note| note.code).collect();
        assert_eq!(codes, [Code::PresetsHeld, Code::Confidential]);
        assert!(notes.iter().any(|note| note.message.contains("SEV-ES")), "{notes:?}");
    }

    /// The messages of a code, of a guest of Intel's with this bit of ECX of CPUID leaf 1.
    fn messages(rules: &str, guest: Option<u32>, kernel: Option<Linux>, code: Code) -> Vec<String> {
        let plan = Plan::compile(&map("allow", rules)).unwrap();
        let guest = guest.map(|bit| {
            Cpuid::from_entries([
                (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
                (1, 0, [0x0005_0654, 0, 1 << bit, 0]),
            ])
        });
        let notes = notes(&plan, guest.as_ref(), kernel).into_iter();
        notes
            .filter(|note| note.code == code)
            .map(|note| note.message)
            .collect()
    }

    #[test]
    fn what_some_kernels_let_pass_is_told_of_them_alone() {
        const VMX: Option<u32> = Some(5);
        let closed = "[[rule]]\nmsr = 0x8b\nread = \"zero\"\n";
        for (kernel, told) in [((5, 17), false), ((5, 18), true), ((6, 11), true), ((6, 12), false)] {
            let linux = Linux(kernel.0, kernel.1);
            let found = messages(closed, VMX, Some(linux), Code::KernelGap);
            assert_eq!(!found.is_empty(), told, "{linux}: {found:?}");
            assert!(
                messages(closed, Some(0), Some(linux), Code::KernelGap).is_empty(),
                "it has no VMX"
            );
            assert!(
                messages(closed, None, Some(linux), Code::KernelGap).is_empty(),
                "nothing is known of it"
            );
            assert!(
                messages("", VMX, Some(linux), Code::KernelGap).is_empty(),
                "nothing is closed"
            );
        }
        let any = messages(closed, VMX, None, Code::KernelGap);
        assert!(any.iter().any(|text| text.ends_with("(Linux 5.18 to 6.11)")), "{any:?}");

        let timer = "[[rule]]\nmsr = \"IA32_TSC_DEADLINE\"\nwrite = \"deny\"\n";
        for (kernel, says) in [((6, 17), "preemption timer"), ((6, 18), "kvm_amd")] {
            let found = messages(timer, None, Some(Linux(kernel.0, kernel.1)), Code::PassesUnseen);
            let others = ["preemption timer", "kvm_amd"]
                .into_iter()
                .filter(|other| found[0].contains(other));
            assert_eq!(others.collect::<Vec<_>>(), [says], "{found:?}");
        }
        let both = messages(timer, None, None, Code::PassesUnseen);
        assert!(
            both[0].contains("(up to Linux 6.17)") && both[0].contains("(from Linux 6.18)"),
            "{both:?}"
        );

        let records = "[[rule]]\nmsr = \"@lbr\"\nread = \"deny\"\n";
        assert_eq!(messages(records, None, Some(Linux(6, 18)), Code::KernelGap).len(), 1);
        let plan = Plan::compile(&map("allow", closed)).unwrap();
        let tdx = Cpuid::from_entries([
            (0, 0, [0x21, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            (0x21, 0, [0, 0x6574_6e49, 0x2020_2020, 0x5844_546c]),
        ]);
        for (kernel, told) in [((6, 15), 0), ((6, 16), 1)] {
            let linux = Some(Linux(kernel.0, kernel.1));
            let found = notes(&plan, Some(&tdx), linux).into_iter();
            let found: Vec<Diagnostic> = found.filter(|note| note.code == Code::Confidential).collect();
            assert_eq!(found.len(), told, "{found:?}");
            assert_eq!(
                messages(closed, None, linux, Code::Confidential),
                [""; 0],
                "nothing says that it is one"
            );
            assert_eq!(messages(closed, VMX, linux, Code::Confidential), [""; 0], "it is none");
        }
    }

    #[test]
    fn what_a_guest_with_vmx_loads_by_its_vmcs_is_told() {
        let efer = "[[rule]]\nmsr = \"IA32_EFER\"\nread = \"deny\"\n";
        let with = messages(efer, Some(5), Some(Linux(6, 18)), Code::ReachedByInstructions);
        assert!(
            with.iter().any(|text| text.contains("fields of a VMCS, IA32_EFER")),
            "{with:?}"
        );
        assert!(messages(efer, None, Some(Linux(6, 18)), Code::ReachedByInstructions).is_empty());
    }

    #[test]
    fn the_register_that_passes_unseen_is_the_one_that_the_engine_lets_pass() {
        let fast = |bypass: &Bypass| bypass.kind == BypassKind::Fastpath;
        let passing = msrgate_msrs::all().iter().filter(|entry| entry.bypasses().any(fast));
        assert_eq!(passing.map(|entry| entry.msr).collect::<Vec<_>>(), [Msr::TSC_DEADLINE]);
    }
}
