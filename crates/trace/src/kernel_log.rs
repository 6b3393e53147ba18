//! The kernel's log as `dmesg`, `journalctl -k` and syslog's files have it: what KVM says of MSRs that it does not know, and
//! what a guest's own kernel says of accesses that faulted.
//!
//! ```text
//! [   44.000001] kvm [100]: vcpu0, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0
//! Sep 04 12:00:01 host1 kernel: kvm_amd: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010115) = 0x0
//! [    0.000000] unchecked MSR access error: RDMSR from 0x10a at rIP: 0xffffffff81000001 (native_read_msr+0x6/0x20)
//! ```
//!
//! The words are the kernel's: `kvm_do_msr_access` (`kvm_msr_ignored_check` before), `kvm_pr_unimpl_wrmsr`,
//! `kvm_pr_unimpl_rdmsr` and `ex_handler_msr`. All other lines of a log are passed over.

use msrgate_core::{Disposition, Event, Gap, Msr, Nanos, Op};

/// The most VMMs that are told apart.
const MOST_VMS: usize = 4096;

/// What is said of an access before its index, and what the guest got.
const SAID: [(&str, Op, Disposition); 9] = [
    ("ignored rdmsr: ", Op::Read, Disposition::Zero),
    ("ignored wrmsr: ", Op::Write, Disposition::Ignore),
    ("unhandled rdmsr: ", Op::Read, Disposition::Fault),
    ("unhandled wrmsr: ", Op::Write, Disposition::Fault),
    // `disabled perfctr`, `unimplemented perfctr`: dropped.
    ("perfctr wrmsr: ", Op::Write, Disposition::Ignore),
    ("Unhandled RDMSR(", Op::Read, Disposition::Fault),
    ("Unhandled WRMSR(", Op::Write, Disposition::Fault),
    ("MSR access error: RDMSR from ", Op::Read, Disposition::Fault),
    ("MSR access error: WRMSR to ", Op::Write, Disposition::Fault),
];

/// What a line says.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Line {
    Access(Event),
    /// So many messages were left out.
    Missing(Gap),
}

/// Whether a file that begins with this line is a log.
pub(super) fn begins(line: &str) -> bool {
    let line = line.trim_start();
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    stamp.is_some_and(|(stamp, _)| since_boot(stamp).or(clock(stamp)).is_some())
        || ["-- ", "kern "].iter().any(|start| line.starts_with(start))
        || line.contains(" kernel: ")
        || said(line).is_some()
}

/// What stands before an access, what is said of it, and what stands behind.
fn said(line: &str) -> Option<(&str, Op, Disposition, &str)> {
    SAID.into_iter().find_map(|(words, op, did)| {
        let (before, behind) = line.split_once(words)?;
        Some((before, op, did, behind))
    })
}

/// What a log said so far.
#[derive(Default, Debug)]
pub(super) struct Log {
    /// The processes that are VMMs, whose places number the VMs.
    vms: Vec<u64>,
    /// When the last line was that has a time of day, in nanoseconds since the first day began.
    last: u64,
    events: bool,
}

impl Log {
    /// Whether there was no access so far.
    pub(super) fn is_empty(&self) -> bool {
        !self.events
    }

    /// What a line says; `None` if it is about something else.
    pub(super) fn line(&mut self, line: &str) -> Result<Option<Line>, String> {
        let Some((before, op, did, behind)) = said(line) else {
            return Ok(suppressed(line).map(|events| {
                Line::Missing(Gap {
                    t: self.time(line),
                    vm: 0,
                    vcpu: 0,
                    events,
                })
            }));
        };
        let mut numbers = numbers(behind);
        let index = numbers
            .next()
            .ok_or("there is no index behind what is said of an access")?;
        let msr = u32::try_from(index).map_err(|_| format!("the index is {index:#x}, and it has 32 bits"))?;
        let value = match op {
            Op::Read => 0,
            Op::Write => numbers
                .next()
                .ok_or("the line ends before what was written; it may be folded")?,
        };
        let rip = line
            .split_once("rIP: ")
            .and_then(|(_, rest)| self::numbers(rest).next());
        let t = self.time(before);
        self.events = true;
        Ok(Some(Line::Access(Event {
            t,
            vm: self.vm(before)?,
            vcpu: vcpu(before),
            op,
            msr: Msr(msr),
            value,
            reason: None,
            did: match did {
                Disposition::Fault if op == Op::Write && is_dropped(msr) => Disposition::Ignore,
                did => did,
            },
            why: None,
            would: None,
            rule: None,
            rip,
            within: None,
            cost: None,
        })))
    }

    /// `kvm [100]: `, in older kernels `kvm: 100: `: which VM the process is.
    fn vm(&mut self, before: &str) -> Result<u32, String> {
        let process = before.rsplit_once("kvm").and_then(|(_, rest)| {
            let digits = rest.trim_start_matches([':', ' ', '[']);
            let end = digits.find(|c: char| !c.is_ascii_digit())?;
            digits.get(..end)?.parse().ok()
        });
        let Some(process) = process else { return Ok(0) };
        let known = self.vms.iter().position(|known| *known == process);
        let place = known.unwrap_or(self.vms.len());
        if place >= MOST_VMS {
            return Err(format!("there are more than {MOST_VMS} VMs"));
        }
        if known.is_none() {
            self.vms.push(process);
        }
        Ok(u32::try_from(place).unwrap_or(u32::MAX))
    }

    /// When a line was: since the kernel began, or, where that is not said, since midnight of the first day.
    fn time(&mut self, line: &str) -> Nanos {
        let stamps = line.split(['[', ']']).map(str::trim);
        if let Some(t) = stamps.filter_map(since_boot).next() {
            return Nanos(t);
        }
        const DAY: u64 = 86_400_000_000_000;
        if let Some(t) = line.split(['[', ']', ' ', 'T']).find_map(clock) {
            let today = (self.last - self.last % DAY).saturating_add(t);
            self.last = match today >= self.last {
                true => today,
                false => today.saturating_add(DAY),
            };
        }
        Nanos(self.last)
    }
}

/// Writes of which newer kernels say `Unhandled WRMSR` and which they drop (`kvm_set_msr_common`, `svm_set_msr`): counters
/// of guests without a PMU, MSR_IA32_BBL_CR_CTL3, bits of IA32_DEBUGCTL, VM_IGNNE.
fn is_dropped(msr: u32) -> bool {
    matches!(
        msr,
        0xc1 | 0xc2 | 0x11e | 0x186 | 0x187 | 0x1d9 | 0xc001_0000..=0xc001_0007 | 0xc001_0115
    )
}

/// The numbers of a text that have `0x`.
fn numbers(text: &str) -> impl Iterator<Item = u64> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok())
}

/// `vcpu3`, in older kernels `cpu3`; 0 where nothing says it.
fn vcpu(before: &str) -> u32 {
    let mut words = before.split([' ', ',']).rev();
    let number = |word: &str| word.trim_start_matches('v').strip_prefix("cpu")?.parse().ok();
    words.find_map(number).unwrap_or(0)
}

/// How many messages of MSRs the kernel left out: `kvm_msr_ignored_check: 27 callbacks suppressed`.
fn suppressed(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(" callbacks suppressed")?;
    let (function, count) = before.rsplit_once(": ")?;
    let function = function.rsplit(' ').next().filter(|function| function.contains("msr"));
    function.and_then(|_| count.parse().ok()).filter(|count| *count > 0)
}

/// `44.000001`, in nanoseconds.
fn since_boot(stamp: &str) -> Option<u64> {
    let (seconds, micros) = stamp.trim().split_once('.')?;
    let micros = micros.parse::<u64>().ok().filter(|_| micros.len() == 6)?;
    seconds
        .parse::<u64>()
        .ok()?
        .checked_mul(1_000_000)?
        .checked_add(micros)?
        .checked_mul(1000)
}

/// `12:00:01`, with a fraction or without, in nanoseconds since midnight; a day and a year may stand around it.
fn clock(text: &str) -> Option<u64> {
    let mut words = text.split(' ').filter(|word| word.matches(':').count() >= 2);
    let mut parts = words.next()?.split([':', '.', ',']);
    let mut part = |most: u64| parts.next()?.parse::<u64>().ok().filter(|number| *number <= most);
    let seconds = part(23)? * 3600 + part(59)? * 60 + part(60)?;
    Some(seconds * 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(line: &str) -> Event {
        match Log::default().line(line) {
            Ok(Some(Line::Access(event))) => event,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn what_kvm_and_a_guests_kernel_say_of_accesses_is_read() {
        let at = Some(0xffff_f800_1111_2222);
        for (line, access) in [
            (
                "[   44.000001] kvm [100]: vcpu1, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0",
                (Op::Read, 0x641, 0, Disposition::Zero, 1, at),
            ),
            (
                "[   44.000001] kvm: kvm [100]: vcpu1, guest rIP: 0xfffff80011112222 ignored wrmsr: 0x611 data 0x1f",
                (Op::Write, 0x611, 0x1f, Disposition::Ignore, 1, at),
            ),
            (
                "Sep 04 12:00:01 h kernel: kvm_intel: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled \
                 WRMSR(0xc0010015) = 0x7",
                (Op::Write, 0xc001_0015, 7, Disposition::Fault, 3, at),
            ),
            // Said to be unhandled, and dropped.
            (
                "kvm_amd: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010115) = 0x0",
                (Op::Write, 0xc001_0115, 0, Disposition::Ignore, 3, at),
            ),
            (
                "[ 280.802981] kvm [18411]: vcpu0, guest rIP: 0xfffff80011112222 disabled perfctr wrmsr: 0xc0010007 data \
                 0xffff",
                (Op::Write, 0xc001_0007, 0xffff, Disposition::Ignore, 0, at),
            ),
            (
                "kvm: 6176: cpu2 unhandled rdmsr: 0xc0010001",
                (Op::Read, 0xc001_0001, 0, Disposition::Fault, 2, None),
            ),
            (
                "kern  :err   : [592420.654337] kvm [21715]: vcpu1 Hyper-V unhandled rdmsr: 0x40000020",
                (Op::Read, 0x4000_0020, 0, Disposition::Fault, 1, None),
            ),
            (
                "[    0.000000] unchecked MSR access error: RDMSR from 0x10a at rIP: 0xfffff80011112222 (native_read_msr+0x6/0x20)",
                (Op::Read, 0x10a, 0, Disposition::Fault, 0, at),
            ),
            (
                "[ 99.9] unchecked MSR access error: WRMSR to 0x122 (tried to write 0x0000000000000002) at rIP: \
                 0xfffff80011112222 (native_write_msr+0x4/0x20)",
                (Op::Write, 0x122, 2, Disposition::Fault, 0, at),
            ),
        ] {
            let event = event(line);
            let read = (event.op, event.msr.0, event.value, event.did, event.vcpu, event.rip);
            assert_eq!(read, access, "{line}");
        }
    }

    #[test]
    fn a_time_is_since_boot_or_of_the_day_and_goes_on_behind_midnight() {
        let mut log = Log::default();
        let mut at = |stamp: &str| log.time(&format!("{stamp} kvm [1]: vcpu0 ")).0 / 1_000_000_000;
        assert_eq!(at("[   44.000001]"), 44);
        assert_eq!(at("Nov 21 23:59:59 host kernel:"), 86_399);
        assert_eq!(at("2024-11-22T00:00:01,123456+01:00"), 86_401);
        assert_eq!(at("[Fri Nov 22 00:00:03 2024]"), 86_403);
        assert_eq!(at("Nov 22 00:00:04 host kernel: [  5.500000]"), 5);
        assert_eq!(at("no time"), 86_403);
    }

    #[test]
    fn processes_are_vms_and_what_was_left_out_is_a_gap() {
        let mut log = Log::default();
        for (process, vm) in [(100, 0), (200, 1), (100, 0)] {
            let line = format!("[    1.000000] kvm [{process}]: vcpu0 ignored rdmsr: 0x35 data 0x0");
            let record = log.line(&line);
            assert!(
                matches!(record, Ok(Some(Line::Access(event))) if event.vm == vm),
                "{record:?}"
            );
        }
        let gap = |line: &str| matches!(Log::default().line(line), Ok(Some(Line::Missing(gap))) if gap.events == 27);
        assert!(gap("[  280.802976] kvm_msr_ignored_check: 27 callbacks suppressed"));
        assert!(!gap("[  280.802976] net_ratelimit: 27 callbacks suppressed"));
    }

    #[test]
    fn other_lines_are_passed_over_and_broken_ones_told() {
        for line in [
            "[    0.000000] Linux version 6.1.0",
            "-- Boot 0123 --",
            "kvm [1]: vcpu0, guest rIP: 0xfff0 vmx_set_msr: BTF|LBR in IA32_DEBUGCTLMSR 0x1, nop",
            "",
        ] {
            assert_eq!(Log::default().line(line), Ok(None), "{line}");
        }
        for (line, what) in [
            ("kvm [1]: ignored rdmsr: many", "no index"),
            ("kvm [1]: ignored rdmsr: 0x100000000", "32 bits"),
            ("kvm [1]: ignored wrmsr: 0x611 da", "before what was written"),
        ] {
            let error = Log::default().line(line).expect_err(line);
            assert!(error.contains(what), "{line}: {error}");
        }
    }

    #[test]
    fn a_log_is_told_by_its_first_line() {
        for (line, log) in [
            ("[    0.000000] Linux version 6.1.0", true),
            ("[Fri Nov 22 00:00:03 2024] x", true),
            ("Nov 21 10:00:01 host1 kernel: x", true),
            ("-- Logs begin at Mon 2024-11-18", true),
            ("ignored rdmsr: 0x641", true),
            (" CPU 0/KVM-1 [001] ..... 5.000001: kvm_msr: msr_read 1a6 = 0x0", false),
            ("[[rule]]", false),
            ("[1.5]", false),
            ("version = 1", false),
        ] {
            assert_eq!(begins(line), log, "{line}");
        }
    }
}
