//! The kernel's tracepoint `kvm:kvm_msr` as text: what `perf script`, `trace-cmd report` and ftrace's `trace` and
//! `trace_pipe` print.
//!
//! ```text
//!  CPU 0/KVM 1821753 [015] 4831258.258053: kvm:kvm_msr: msr_write 6e0 = 0x10e8aebe830c9e
//!  CPU 0/KVM-16856   [007] .......   380.398695: kvm_msr: msr_read 3a = 0x0 (#GP)
//! ```
//!
//! The format is the kernel's, `TRACE_EVENT(kvm_msr)` in `arch/x86/kvm/trace.h`. The tracepoint sees what KVM carries
//! out: not what the hardware passes through, and not what goes to user space.

use std::collections::HashMap;

use msrgate_core::{Did, Event, Msr, Op};

/// The most threads that are told apart.
const MOST_THREADS: usize = 4096;

/// Whether a trace that begins with this line is one of the tracepoint.
pub(super) fn begins(line: &str) -> bool {
    line.starts_with('#') || line.starts_with("cpus=") || seconds(line).is_some()
}

/// The vCPUs that were met so far.
#[derive(Default, Debug)]
pub(super) struct Threads {
    known: HashMap<String, (u32, u32)>,
    unnamed: u32,
}

impl Threads {
    /// The event of a line; `None` if the line is of something else.
    pub(super) fn event(&mut self, line: &str) -> Result<Option<Event>, String> {
        let Some((head, tail)) = line.split_once("kvm_msr:") else {
            return foreign(line).map(|()| None);
        };
        let head = head.trim_end().trim_end_matches("kvm:");
        let mut words = tail.split_whitespace();
        let op = match words.next() {
            Some("msr_read") => Op::Read,
            Some("msr_write") => Op::Write,
            other => {
                let other = other.unwrap_or_default();
                return Err(format!("`{other}` is neither `msr_read` nor `msr_write`"));
            }
        };
        let mut number = |what: &str| {
            let word = words
                .next()
                .filter(|word| *word != "=")
                .or_else(|| words.next())
                .unwrap_or_default();
            let digits = word.strip_prefix("0x").unwrap_or(word);
            u64::from_str_radix(digits, 16).map_err(|_| format!("the {what} is `{word}`, which is no number"))
        };
        let index = number("index")?;
        let msr = u32::try_from(index)
            .map(Msr)
            .map_err(|_| format!("the index is {index:#x}, and it has 32 bits"))?;
        let value = number("value")?;
        let (vm, vcpu) = self.vcpu(head)?;
        Ok(Some(Event {
            t: seconds(&format!("{head} ")).unwrap_or(0),
            vm,
            vcpu,
            op,
            msr,
            value,
            reason: None,
            did: match words.next() {
                Some("(#GP)") => Did::Fault,
                _ => Did::Allow,
            },
            why: None,
            rule: None,
            rip: None,
            cost: None,
        }))
    }

    /// Which VM, and which vCPU of it. A thread's name may say which vCPU it is (`CPU 1/KVM`, `fc_vcpu 1`); the second thread
    /// that says the same is of another VM. Other threads are vCPUs in the order in which they come.
    fn vcpu(&mut self, head: &str) -> Result<(u32, u32), String> {
        // Name and number of the thread stand before the CPU.
        let thread = head.split(" [").next().unwrap_or_default().trim();
        if let Some(known) = self.known.get(thread) {
            return Ok(*known);
        }
        if self.known.len() >= MOST_THREADS {
            return Err(format!("there are more than {MOST_THREADS} vCPUs"));
        }
        let found = match named(thread) {
            Some(vcpu) => {
                let others = self
                    .known
                    .iter()
                    .filter(|(name, (_, other))| *other == vcpu && named(name) == Some(vcpu));
                (u32::try_from(others.count()).unwrap_or(u32::MAX), vcpu)
            }
            None => {
                self.unnamed += 1;
                (0, self.unnamed - 1)
            }
        };
        self.known.insert(thread.to_owned(), found);
        Ok(found)
    }
}

/// Which vCPU a thread says that it is.
fn named(thread: &str) -> Option<u32> {
    let digits = match thread.strip_prefix("CPU ") {
        Some(rest) => rest.split_once("/KVM")?.0,
        None => {
            let rest = thread.split_once("vcpu")?.1.trim_start_matches(['_', ' ']);
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            rest.get(..end)?
        }
    };
    digits.parse().ok()
}

/// When a line says that it was, in nanoseconds: the last word of the form `123.456789:`, or at the end without its colon.
fn seconds(line: &str) -> Option<u64> {
    let stamp = |word: &str| {
        let (whole, part) = word.strip_suffix(':').unwrap_or(word).split_once('.')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 9 {
            return None;
        }
        let nanoseconds: u64 = format!("{part:0<9}").parse().ok()?;
        whole
            .parse::<u64>()
            .ok()?
            .checked_mul(1_000_000_000)?
            .checked_add(nanoseconds)
    };
    line.split_whitespace()
        .filter(|word| word.ends_with(':'))
        .filter_map(stamp)
        .next_back()
}

/// A line without the tracepoint: another event, a comment, a stack; or one that says that events are missing.
fn foreign(line: &str) -> Result<(), String> {
    let lost = ["LOST", "DROPPED"].iter().any(|word| line.contains(word));
    if lost && seconds(line).is_none() {
        return Err(
            "events were lost here, so this is not all that the guest did: record with a larger buffer, or take the \
             line out to go on without them"
                .to_owned(),
        );
    }
    let first = line.split_whitespace().next().unwrap_or_default();
    let stack = line.starts_with([' ', '\t']) && first.bytes().all(|byte| byte.is_ascii_hexdigit());
    if begins(line) || stack || first == "=>" {
        return Ok(());
    }
    Err("this is no line of `perf script`, `trace-cmd report` or ftrace".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(line: &str) -> Event {
        Threads::default().event(line).expect(line).expect(line)
    }

    #[test]
    fn each_tools_line_is_read() {
        for (line, t, vcpu) in [
            (
                "       CPU 2/KVM 1821755 [032] 4831258.258124: kvm:kvm_msr: msr_write c0000080 = 0xd01",
                4_831_258_258_124_000,
                2,
            ),
            (
                " CPU 2/KVM-16858   [006] .......   380.398696: kvm_msr: msr_write c0000080 = 0xd01",
                380_398_696_000,
                2,
            ),
            (
                " qemu-system-x86-8397    [002] .....  1404.389509: kvm_msr:              msr_write c0000080 = 0xd01",
                1_404_389_509_000,
                0,
            ),
            (
                " fc_vcpu 2 2335220 [069] 12345.679300000: kvm:kvm_msr: msr_write c0000080 = 0xd01",
                12_345_679_300_000,
                2,
            ),
        ] {
            let event = event(line);
            assert_eq!((event.t, event.vcpu), (t, vcpu), "{line}");
            assert_eq!(
                (event.op, event.msr.0, event.value, event.did),
                (Op::Write, 0xc000_0080, 0xd01, Did::Allow)
            );
        }
        let faulted = event(" CPU 0/KVM-1 [001] ..... 5.000001: kvm_msr: msr_read 1a6 = 0x0 (#GP)");
        assert_eq!((faulted.op, faulted.did), (Op::Read, Did::Fault));
    }

    #[test]
    fn threads_are_vcpus_and_the_second_of_a_name_is_of_another_vm() {
        let mut threads = Threads::default();
        let mut of = |thread: &str| {
            let line = format!(" {thread} [001] 1.0: kvm:kvm_msr: msr_read 10 = 0x0");
            let event = threads.event(&line).expect("an event").expect("an event");
            (event.vm, event.vcpu)
        };
        assert_eq!(of("CPU 0/KVM 100"), (0, 0));
        assert_eq!(of("CPU 1/KVM 101"), (0, 1));
        assert_eq!(of("CPU 1/KVM 201"), (1, 1));
        assert_eq!(of("CPU 0/KVM 100"), (0, 0));
        assert_eq!(of("something 7"), (0, 0));
        assert_eq!(of("something 8"), (0, 1));
    }

    #[test]
    fn other_lines_are_passed_over_and_lost_events_are_an_error() {
        let mut threads = Threads::default();
        for line in [
            "# tracer: nop",
            "cpus=8",
            " qemu-8397 [002] d....  1404.389510: kvm_entry: vcpu 1, rip 0xffffffff81000132",
            "\t    ffffffffc0a1 kvm_emulate_rdmsr+0x1 ([kvm])",
            " => kvm_emulate_rdmsr",
        ] {
            assert_eq!(threads.event(line), Ok(None), "{line}");
        }
        for (line, what) in [
            ("CPU:3 [LOST 123 EVENTS]", "lost"),
            ("CPU:0 [EVENTS DROPPED]", "lost"),
            ("garbage", "no line of"),
            (" x-1 [0] 1.0: kvm_msr: msr_read CTR1 = 0x0", "no number"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 1_0000_0000 = 0x0", "no number"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 100000000 = 0x0", "32 bits"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 10 = ", "no number"),
            (" x-1 [0] 1.0: kvm_msr: msr_peek 10 = 0x0", "neither"),
        ] {
            let error = threads.event(line).expect_err(line);
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
