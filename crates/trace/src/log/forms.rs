//! The forms of lines, and the reading of one.
//!
//! The words are those of the programs: of KVM `kvm_do_msr_access` (`kvm_msr_ignored_check` before), `kvm_pr_unimpl_wrmsr`,
//! `kvm_set_msr_common`, `svm_set_msr`, `vmx_set_msr`, `kvm_hv_set_msr`, `nested_vmx_load_msr`; of Linux `ex_handler_msr`,
//! `check_hw_exists`, `filter_write`, intel_rapl, msr-tools and turbostat; of QEMU `kvm_buf_set_msrs`, `kvm_get_msrs` and
//! `mark_unavailable_features`; of Xen `vmx_msr_read_intercept` and its like, `write_msr` of paravirtual guests, and viridian. illumos' KVM lacks the `0x` of values.

use msrgate_core::{Msr, Op};

use super::cause::Speaker::{
    Bhyve, CloudHypervisor, Firecracker, Kvm, Linux, MsrDriver, Qemu, VirtualBox, Vmware, Xen,
};
use super::cause::{Cause, Found, Speaker};

/// HV_X64_MSR_CRASH_P0, to which Windows writes its bug check; P1, behind it, has the exception of most.
const CRASH_P0: u32 = 0x4000_0100;
const CRASH_P1: u32 = CRASH_P0 + 1;

/// STATUS_PRIVILEGED_INSTRUCTION.
const PRIVILEGED: u32 = 0xc000_0096;

const R: Option<Op> = Some(Op::Read);
const W: Option<Op> = Some(Op::Write);

/// A form: who says it, what became of the access, the direction, and the words, in lower case.
///
/// `{m}` is the index and `{v}` the value, both with `0x`; `{M}` and `{V}` may lack it, and an `h` may stand behind `{M}`; `{d}` is the
/// value in decimal, `{b}` the number of a bit that stands for it, `{n}` a decimal number, `{p}` the parameter of a bug check, `{w}` any word. What stands behind `|` may be
/// missing. A form that has no index says which register it is about.
struct Form(Speaker, Cause, Option<Op>, &'static str, Option<u32>);

/// The first that fits a line counts.
const FORMS: &[Form] = &[
    Form(Kvm, Cause::Ignored, R, "ignored rdmsr: {m}| data {v}", None),
    Form(Kvm, Cause::Ignored, W, "ignored wrmsr: {m} data {v}", None),
    // KVM refuses what it lacks of Hyper-V's registers as if it were invalid.
    Form(Kvm, Cause::Refused, R, "hyper-v unhandled rdmsr: {m}", None),
    Form(Kvm, Cause::Refused, W, "hyper-v unhandled wrmsr: {m} data {v}", None),
    Form(Kvm, Cause::Refused, W, "hyper-v uhandled wrmsr: {m} data {v}", None),
    Form(
        Kvm,
        Cause::Refused,
        W,
        "hyper-v unimplemented wrmsr: {m} data {v}",
        None,
    ),
    Form(Kvm, Cause::Unknown, R, "unhandled rdmsr: {m}", None),
    Form(Kvm, Cause::Unknown, W, "unhandled wrmsr: {m} data {V}", None),
    Form(Kvm, Cause::Unknown, W, "unhandled wrmsr {m} data {V}", None),
    // The first KVMs had no `0x` and no value.
    Form(Kvm, Cause::Unknown, R, "kvm: unhandled rdmsr: {M}", None),
    Form(Kvm, Cause::Unknown, W, "kvm: unhandled wrmsr: {M}", None),
    Form(Kvm, Cause::Refused, R, "unhandled rdmsr({m})", None),
    Form(Kvm, Cause::Refused, W, "unhandled wrmsr({m}) = {v}", None),
    // `disabled perfctr`, `unimplemented perfctr`.
    Form(Kvm, Cause::Dropped, W, "perfctr wrmsr: {m} data {V}", None),
    Form(Kvm, Cause::Dropped, W, "unimplemented wrmsr: {m} data {v}", None),
    Form(
        Kvm,
        Cause::Refused,
        W,
        "unimplemented hwcr wrmsr: {v}",
        Some(0xc001_0015),
    ),
    Form(
        Kvm,
        Cause::Refused,
        W,
        "unimplemented mmio_conf_base wrmsr: {v}",
        Some(0xc001_0058),
    ),
    // The lists of a guest's own guests.
    Form(Kvm, Cause::Refused, W, "cannot write msr ({n}, {m}, {v})", None),
    Form(Kvm, Cause::Refused, R, "cannot read msr ({n}, {m})", None),
    Form(Kvm, Cause::Refused, R, "cannot read msr ({m})", None),
    Form(Linux, Cause::Fault, R, "msr access error: rdmsr from {m}", None),
    Form(
        Linux,
        Cause::Fault,
        W,
        "msr access error: wrmsr to {m} (tried to write {v})",
        None,
    ),
    // What was written to the counter is not read back.
    Form(
        Linux,
        Cause::Dropped,
        W,
        "failed to access perfctr msr (msr {M} is {w}",
        None,
    ),
    Form(MsrDriver, Cause::Program, W, "write to unrecognized msr {m}", None),
    // msr-tools, and miners.
    Form(MsrDriver, Cause::Fault, R, "cannot read msr {m}", None),
    Form(MsrDriver, Cause::Fault, W, "cannot set msr {m} to {v}", None),
    Form(
        MsrDriver,
        Cause::Fault,
        W,
        "wrmsr failed for reg[{m}] <- value[{v}]",
        None,
    ),
    // Without leave to read, nothing was read.
    Form(
        MsrDriver,
        Cause::Fault,
        R,
        "msr offset {m} read failed: input/output error",
        None,
    ),
    Form(Linux, Cause::Fault, R, "failed to read msr {m}", None),
    Form(Linux, Cause::Fault, W, "failed to write msr {m}", None),
    Form(Qemu, Cause::Vmm, W, "failed to set msr {m} to {v}", None),
    Form(Qemu, Cause::Vmm, R, "failed to get msr {m}", None),
    Form(Qemu, Cause::Lacking, W, "feature: msr({M}).{w} [bit {b}]", None),
    Form(
        CloudHypervisor,
        Cause::Vmm,
        W,
        "detected faulty msr {m} while setting",
        None,
    ),
    Form(
        CloudHypervisor,
        Cause::Vmm,
        W,
        "unable to set feature msr {m}, msr value={d}",
        None,
    ),
    Form(
        CloudHypervisor,
        Cause::Vmm,
        R,
        "detected faulty msr {m} while getting",
        None,
    ),
    Form(Firecracker, Cause::Vmm, R, "failed to get kvm vcpu msr: {m}", None),
    Form(Xen, Cause::Unknown, R, "rdmsr {m} unimplemented", None),
    Form(Xen, Cause::Unknown, W, "wrmsr {m} val {v} unimplemented", None),
    Form(
        Xen,
        Cause::Dropped,
        W,
        "domain attempted wrmsr {M} from {V} to {v}",
        None,
    ),
    Form(Xen, Cause::Unknown, R, "domain attempted rdmsr {M}", None),
    Form(Xen, Cause::Ignored, R, "faking rdmsr {m}", None),
    Form(Xen, Cause::Unknown, R, "read from unimplemented msr {m}", None),
    Form(Xen, Cause::Unknown, W, "write {V} to unimplemented msr {m}", None),
    Form(Xen, Cause::Unknown, W, "(xen) write to unimplemented msr {m}", None),
    Form(Xen, Cause::Unknown, W, "v{n} write to unimplemented msr {m}", None),
    Form(Xen, Cause::Unknown, W, "unimplemented msr {m} ({V})", None),
    Form(Xen, Cause::Unknown, R, "unimplemented msr {m}", None),
    Form(Xen, Cause::Vmm, W, "attempted load of unhandled msr {m}", None),
    Form(VirtualBox, Cause::Unknown, W, "cpum: unknown msr {M}, {v} -> #gp", None),
    Form(VirtualBox, Cause::Unknown, R, "cpum: unknown msr {M} -> #gp", None),
    Form(VirtualBox, Cause::Unknown, R, "cpum: unknown msr {M} read", None),
    Form(VirtualBox, Cause::Unknown, W, "cpum: unknown msr {M} write| {v}", None),
    Form(
        VirtualBox,
        Cause::Fault,
        R,
        "rdmsr {M} -> {w} / verr_cpum_raise_gp_0",
        None,
    ),
    Form(
        VirtualBox,
        Cause::Fault,
        W,
        "wrmsr {M}, {w} -> verr_cpum_raise_gp_0",
        None,
    ),
    Form(VirtualBox, Cause::Unknown, R, "unknown/invalid rdmsr {M}", None),
    Form(VirtualBox, Cause::Unknown, W, "unknown/invalid wrmsr {M}", None),
    Form(VirtualBox, Cause::Unknown, R, "unknown/invalid rdmsr ({M})", None),
    Form(VirtualBox, Cause::Unknown, W, "unknown/invalid wrmsr ({M})", None),
    Form(Bhyve, Cause::Unknown, R, "rdmsr to register {M} on vcpu", None),
    Form(Bhyve, Cause::Unknown, W, "wrmsr to register {M}({V}) on vcpu", None),
    Form(Bhyve, Cause::Unknown, W, "unknown wrmsr code {M}, val {V}", None),
    Form(Bhyve, Cause::Unknown, R, "vm exit rdmsr {M}", None),
    // `SetMSR` and, in older versions, `WRMSR`; `GetMSR` and `RDMSR`.
    Form(Vmware, Cause::Ignored, W, "msr: unknown msr[{m}]:={V}", None),
    Form(Vmware, Cause::Ignored, R, "msr: unknown msr[{m}] (read as", None),
    // A Windows guest's bug check and its parameters.
    Form(Vmware, Cause::Crash, W, "winbsod: synthetic msr[{m}] {v}", None),
    Form(Qemu, Cause::Crash, W, "hv crash parameters: ({V} {p}", Some(CRASH_P0)),
    Form(Qemu, Cause::Crash, W, "hyper-v: arg1='{v}', arg2='{p}", Some(CRASH_P0)),
    Form(Kvm, Cause::Crash, W, "hv crash ({V} {p}", Some(CRASH_P0)),
    Form(Xen, Cause::Crash, W, "viridian crash: {V} {p}", Some(CRASH_P0)),
    Form(Xen, Cause::Crash, W, "viridian guest_crash: {V} {p}", Some(CRASH_P0)),
    Form(
        VirtualBox,
        Cause::Crash,
        W,
        "guest indicates a fatal condition! p0={V} p1={p}",
        Some(CRASH_P0),
    ),
    Form(Bhyve, Cause::Unknown, R, "unhandled rdmsr {m}", None),
    Form(Bhyve, Cause::Unknown, W, "unhandled wrmsr {m}| {v}", None),
];

/// Writes of which newer kernels say `Unhandled WRMSR` and which they drop (`kvm_set_msr_common`, `svm_set_msr`): counters
/// of guests without a PMU, MSR_IA32_BBL_CR_CTL3, bits of IA32_DEBUGCTL, VM_IGNNE.
fn is_dropped(msr: u32) -> bool {
    matches!(
        msr,
        0xc1 | 0xc2 | 0x11e | 0x186 | 0x187 | 0x1d9 | 0xc001_0000..=0xc001_0007 | 0xc001_0115
    )
}

/// Words with which a line ends that a mail folded before what they are of.
const ENDS: [&str; 5] = [" ignored", " unhandled", " uhandled", " disabled", " unimplemented"];

/// What a line is.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Reading {
    Access(Found),
    /// So many messages are left out here.
    Missing(u64),
    /// It may go on in the next line; if it does not, that is wrong.
    Open(Option<String>),
    /// Its words are a log's, and what they are about is not there.
    Broken(String),
    Other,
}

/// Reads a line by itself.
pub(super) fn read(line: &str) -> Reading {
    // Most lines are about something else.
    let has = |word: &str| {
        line.as_bytes()
            .windows(word.len())
            .any(|bytes| bytes.eq_ignore_ascii_case(word.as_bytes()))
    };
    if !["msr", "crash", "hyper-v: arg1", "fatal condition"]
        .into_iter()
        .any(has)
    {
        let end = line.trim_end();
        let folded = has("guest rip: ") && ENDS.iter().any(|word| end.to_ascii_lowercase().ends_with(word));
        return if folded { Reading::Open(None) } else { Reading::Other };
    }
    // The words end in a space, which a line may lack.
    let line = line.to_ascii_lowercase() + " ";
    let mut wrong = None;
    for form in FORMS {
        match form.find(&line) {
            Fit::Whole(found) => return Reading::Access(found),
            // Of the others the words are anybody's.
            Fit::Ends | Fit::Wrong(_) if form.0 != Kvm && !form.3.starts_with("msr access error") => {}
            Fit::Ends => {
                let what = "the line ends before the register or what was written; it may be folded";
                _ = wrong.get_or_insert(Reading::Open(Some(what.to_owned())));
            }
            Fit::Wrong(what) => _ = wrong.get_or_insert(Reading::Broken(what)),
            Fit::None => {}
        }
    }
    if let Some(found) = named(&line) {
        return Reading::Access(found);
    }
    let found = match wrong {
        // What it says of the access may stand in the next line.
        Some(Reading::Open(_)) => None,
        _ => super::loose::read(&line).map(Reading::Access),
    };
    found
        .or(wrong)
        .or_else(|| suppressed(&line).map(Reading::Missing))
        .unwrap_or(Reading::Other)
}

/// How a form fits a line.
enum Fit {
    Whole(Found),
    /// So far, and there the line ends.
    Ends,
    /// In its words, and there is something else than a number behind.
    Wrong(String),
    None,
}

impl Form {
    fn find(&self, line: &str) -> Fit {
        let Form(by, cause, op, text, msr) = *self;
        let (needed, more) = text.split_once('|').unwrap_or((text, ""));
        let head = needed.split('{').next().unwrap_or_default();
        let mut fit = Fit::None;
        for (start, _) in line.match_indices(head) {
            let rest = line.get(start..).unwrap_or_default();
            let mut numbers = Numbers::default();
            let rest = match numbers.read(needed, rest) {
                Ok(rest) => rest,
                Err(other) => {
                    fit = other;
                    continue;
                }
            };
            let mut with = numbers;
            if with.read(more, rest).is_ok() {
                numbers = with;
            }
            let index = msr.map(u64::from).or(numbers.index).unwrap_or(u64::MAX);
            let Ok(index) = u32::try_from(index) else {
                fit = Fit::Wrong(format!("the index is {index:#x}, and it has 32 bits"));
                continue;
            };
            let cause = match (by, cause, op) {
                (Kvm, Cause::Refused, W) if text.starts_with("unhandled") && is_dropped(index) => Cause::Dropped,
                (_, Cause::Crash, _) if numbers.exception(index) == Some(PRIVILEGED) => Cause::Privileged,
                _ => cause,
            };
            let msr = Msr(index);
            // Of a VMX control QEMU counts the bits of the high half, which says what may be 1.
            let shift = match msrgate_msrs::restore(msr) {
                Some(restore) if restore.is_control() => 32,
                _ => 0,
            };
            return Fit::Whole(Found {
                start,
                by,
                cause,
                op,
                msr,
                value: numbers.bit.map(|bit| 1 << (bit + shift).min(63)).or(numbers.value),
            });
        }
        fit
    }
}

#[derive(Clone, Copy, Default)]
struct Numbers {
    index: Option<u64>,
    value: Option<u64>,
    bit: Option<u64>,
    parameter: Option<u64>,
}

impl Numbers {
    /// The exception of a bug check that its first parameter is, as the line has it with the bug check or by itself.
    #[expect(clippy::cast_possible_truncation, reason = "Windows extends its sign")]
    fn exception(&self, index: u32) -> Option<u32> {
        let value = self.value.filter(|_| index == CRASH_P1);
        self.parameter.or(value).map(|value| value as u32)
    }

    /// Reads what a form says from where a text begins, and gives what stands behind.
    fn read<'a>(&mut self, form: &str, text: &'a str) -> Result<&'a str, Fit> {
        let mut rest = text;
        for (place, piece) in form.split('{').enumerate() {
            let words = match piece.split_once('}') {
                Some((kind, words)) if place > 0 => {
                    rest = self.number(kind, rest)?;
                    words
                }
                _ => piece,
            };
            rest = match rest.strip_prefix(words) {
                Some(behind) => behind,
                None if words.starts_with(rest.trim_end()) => return Err(Fit::Ends),
                None => return Err(Fit::None),
            };
        }
        Ok(rest)
    }

    fn number<'a>(&mut self, kind: &str, text: &'a str) -> Result<&'a str, Fit> {
        if text.trim_end().is_empty() {
            return Err(Fit::Ends);
        }
        let word = text
            .split(|c: char| !c.is_ascii_alphanumeric())
            .next()
            .unwrap_or_default();
        let word = match kind {
            // As far as the space.
            "w" => text.split([' ', ')']).next().unwrap_or_default(),
            _ => word,
        };
        let digits = word.strip_prefix("0x");
        let hex = |digits: Option<&str>| u64::from_str_radix(digits?, 16).ok();
        let number = match kind {
            "m" | "v" => hex(digits),
            "M" => hex(Some(digits.unwrap_or(word).trim_end_matches('h'))),
            "V" | "p" => hex(digits.or(Some(word))),
            "d" | "n" => word.parse().ok(),
            "b" => word.parse().ok().filter(|bit| *bit < 64),
            _ => Some(0).filter(|_| !word.is_empty()),
        };
        // What is not a number is not quoted: it may be anything.
        let number = number
            .ok_or_else(|| Fit::Wrong("there is no index, or no value, behind what is said of an access".into()))?;
        match kind {
            "m" | "M" => self.index = Some(number),
            "v" | "V" | "d" => self.value = Some(number),
            "b" => self.bit = Some(number),
            "p" => self.parameter = Some(number),
            _ => {}
        }
        Ok(text.get(word.len()..).unwrap_or_default())
    }
}

/// Forms with a register's name: `vmx_set_msr: BTF|LBR in IA32_DEBUGCTLMSR 0x1, nop`, `MSR_X is unhandled`.
fn named(line: &str) -> Option<Found> {
    let (mut end, mut cause, mut op) = (line.find(", nop"), Cause::Dropped, W);
    let mut value = None;
    if end.is_none() {
        (end, cause, op) = (line.find(" is unhandled"), Cause::Unknown, None);
    }
    let mut words = line.get(..end?)?.rsplit(' ');
    let mut word = words.next()?;
    if cause == Cause::Dropped {
        value = Some(u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()?);
        word = words.next()?;
    }
    let word = word.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let msr = match word.strip_prefix("0x") {
        Some(digits) => Msr(u32::from_str_radix(digits, 16).ok()?),
        None => msrgate_msrs::by_name(word)?.msr,
    };
    let start = line.find(word)?;
    Some(Found {
        start,
        by: Kvm,
        cause,
        op,
        msr,
        value,
    })
}

/// How many messages of MSRs the kernel left out: `kvm_msr_ignored_check: 27 callbacks suppressed`.
fn suppressed(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(" callbacks suppressed")?;
    let (function, count) = before.rsplit_once(": ")?;
    let function = function.rsplit(' ').next().filter(|function| function.contains("msr"));
    function.and_then(|_| count.parse().ok()).filter(|count| *count > 0)
}

/// The guest's instruction pointer, by `rIP: 0x…`.
pub(super) fn rip(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("rIP: 0x")?;
    let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
    u64::from_str_radix(digits, 16).ok()
}

/// The process of `kvm [100]: `, in older kernels `kvm: 100: `; of Xen the domain of `d1v0 `.
pub(super) fn process(before: &str) -> Option<u64> {
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit())?;
        text.get(..end)?.parse().ok()
    };
    if let Some((_, rest)) = before.rsplit_once("kvm") {
        return number(rest.trim_start_matches([':', ' ', '[']));
    }
    let mut words = before.split([' ', ':']).rev();
    words.find_map(|word| domain(word).and_then(|(domain, _)| domain.parse().ok()))
}

/// The two numbers of `d1v0`.
fn domain(word: &str) -> Option<(&str, &str)> {
    let (domain, vcpu) = word.strip_prefix('d')?.split_once('v')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(domain) && digits(vcpu)).then_some((domain, vcpu))
}

/// `vcpu3`, in older kernels `cpu3`, of Xen `d1v3`, behind an access `on vcpu 3`; 0 where nothing says it.
pub(super) fn vcpu(line: &str, start: usize) -> u32 {
    let (before, behind) = line.split_at_checked(start).unwrap_or_default();
    let number = |word: &str| match domain(word) {
        Some((_, vcpu)) => vcpu.parse().ok(),
        None => word.trim_start_matches('v').strip_prefix("cpu")?.parse().ok(),
    };
    let behind = || {
        let (_, rest) = behind.split_once("on vcpu ")?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let mut words = before.split([' ', ',']).rev();
    words.find_map(number).or_else(behind).unwrap_or(0)
}
