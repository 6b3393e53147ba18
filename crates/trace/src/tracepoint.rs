//! The kernel's tracepoint `kvm:kvm_msr` as text: what `perf script`, `perf trace`, `trace-cmd report` and ftrace's `trace`
//! and `trace_pipe` print.
//!
//! ```text
//!  CPU 0/KVM 1821753 [015] 4831258.258053: kvm:kvm_msr: msr_write 6e0 = 0x10e8aebe830c9e
//!  CPU 0/KVM-16856   [007] .......   380.398695: kvm_msr: msr_read 3a = 0x0 (#GP)
//!      0.012 CPU 0/KVM/1821753 kvm:kvm_msr(write: 1, ecx: 1760, data: 4758392948)
//! ```
//!
//! The format is the kernel's, `TRACE_EVENT(kvm_msr)` in `arch/x86/kvm/trace.h`. The tracepoint sees what KVM carries
//! out: not what the hardware passes through, and not what goes to user space.
//!
//! The guest's own tracepoints `msr:read_msr` and `msr:write_msr` are read too, whose threads are CPUs:
//!
//! ```text
//!  swapper     0 [000]     1.000001: msr:read_msr: 1b, value fee00900
//!  swapper     0 [003]     1.000002: msr:write_msr: 6e0, value 1234 #GP
//! ```
//!
//! These are `DECLARE_EVENT_CLASS(msr_trace_class)` in `arch/x86/include/asm/msr-trace.h`.

mod head;

use std::collections::HashMap;

use msrgate_core::{Disposition, Event, Msr, Nanos, Op};
use msrgate_policy::print;

use self::head::Head;

/// The most threads that are told apart.
const MOST_THREADS: usize = 4096;

/// Whether a trace that begins with this line is one of the tracepoint.
pub(super) fn begins(line: &str) -> bool {
    let remark = ["#", "cpus=", "version ="].iter().any(|start| line.starts_with(start));
    remark || split(line).is_some() || head::time(line).is_some() || is_lost(line) || is_empty_cpu(line)
}

/// Whether a last line, which no newline ends, was cut short: what it is of, or its mark of a fault, is not all there.
pub(super) fn breaks_off(line: &str) -> bool {
    match split(line) {
        Some((_, _, payload)) => payload
            .split_whitespace()
            .next_back()
            .is_some_and(|word| word.starts_with('(') && !word.starts_with("(#GP)")),
        None => {
            let unfinished = |(_, word): (&str, &str)| !word.contains([' ', ':', '(']);
            head::time(line).is_some() && line.rsplit_once(": ").is_some_and(unfinished)
        }
    }
}

/// Who saw an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// The host: `kvm:kvm_msr`.
    Host,
    /// The guest, with its tracepoint of this direction.
    Guest(Op),
}

/// What stands before the event's name, which event it is, and what stands behind its name.
fn split(line: &str) -> Option<(&str, Source, &str)> {
    const EVENTS: [(&str, Source); 3] = [
        ("kvm_msr", Source::Host),
        ("read_msr", Source::Guest(Op::Read)),
        ("write_msr", Source::Guest(Op::Write)),
    ];
    EVENTS.into_iter().find_map(|(name, source)| {
        let (at, _) = line.match_indices(name).find(|(at, _)| {
            let before = line.get(..*at).and_then(|before| before.chars().next_back());
            before.is_none_or(|before| before == ':' || before.is_whitespace())
        })?;
        let payload = line.get(at + name.len()..)?.strip_prefix([':', '('])?;
        let head = line.get(..at)?.trim_end();
        Some((
            head.strip_suffix("kvm:").or(head.strip_suffix("msr:")).unwrap_or(head),
            source,
            payload,
        ))
    })
}

/// The vCPUs that were met so far.
#[derive(Default, Debug)]
pub(super) struct Threads {
    known: HashMap<String, (u32, u32)>,
    /// How many threads said of each vCPU that they are it.
    named: HashMap<u32, u32>,
    /// The VM of each process, and how many of its threads did not say which vCPU they are.
    processes: HashMap<String, (u32, u32)>,
    unnamed: u32,
    /// There was an event.
    events: bool,
}

impl Threads {
    /// Whether there was no event so far.
    pub(super) fn is_empty(&self) -> bool {
        !self.events
    }

    /// The event of a line; `None` if the line is of something else.
    pub(super) fn event(&mut self, line: &str) -> Result<Option<Event>, String> {
        let Some((head, source, payload)) = split(line) else {
            return foreign(line, !self.is_empty()).map(|()| None);
        };
        let access = match source {
            Source::Host => Access::read(payload),
            Source::Guest(op) => Access::read_in_guest(op, payload),
        }?;
        let cpu = head::cpu(head).filter(|_| source != Source::Host);
        let head = Head::read(head);
        let (vm, vcpu) = match cpu {
            Some(cpu) => (0, cpu),
            None => self.vcpu(&head)?,
        };
        self.events = true;
        Ok(Some(Event {
            t: Nanos(head.t.unwrap_or(0)),
            vm,
            vcpu,
            op: access.op,
            msr: access.msr,
            value: access.value,
            reason: None,
            did: match access.faulted {
                true => Disposition::Fault,
                false => Disposition::Allow,
            },
            why: None,
            rule: None,
            rip: None,
            would: None,
            within: None,
            cost: None,
        }))
    }

    /// Which VM, and which vCPU of it. A thread's name may say which vCPU it is (`CPU 1/KVM`, `fc_vcpu 1`), and the line
    /// of which process it is; else the second thread that says the same is of another VM. Other threads are vCPUs in the
    /// order in which they come.
    fn vcpu(&mut self, head: &Head<'_>) -> Result<(u32, u32), String> {
        if let Some(known) = self.known.get(head.id()) {
            return Ok(*known);
        }
        if self.known.len() >= MOST_THREADS {
            return Err(format!("there are more than {MOST_THREADS} vCPUs"));
        }
        let next = |count: &mut u32| {
            *count += 1;
            *count - 1
        };
        let found = match (head.process, head.vcpu()) {
            (Some(process), vcpu) => {
                let vm = u32::try_from(self.processes.len()).unwrap_or(u32::MAX);
                let (vm, unnamed) = self.processes.entry(process.to_owned()).or_insert((vm, 0));
                (*vm, vcpu.unwrap_or_else(|| next(unnamed)))
            }
            (None, Some(vcpu)) => (next(self.named.entry(vcpu).or_default()), vcpu),
            (None, None) => (0, next(&mut self.unnamed)),
        };
        self.known.insert(head.id().to_owned(), found);
        Ok(found)
    }
}

/// What an event says.
struct Access {
    op: Op,
    msr: Msr,
    value: u64,
    faulted: bool,
}

impl Access {
    /// `msr_read 3a = 0x0 (#GP)` as the kernel prints it, or the fields by their names.
    fn read(payload: &str) -> Result<Access, String> {
        let mut words = payload.split_whitespace().filter(|word| *word != "=");
        let op = match words.next() {
            Some("msr_read") => Op::Read,
            Some("msr_write") => Op::Write,
            other => return Access::fields(payload, other.unwrap_or_default()),
        };
        let mut number = |what| hexadecimal(words.next().map(|word| word.trim_end_matches(')')), what);
        let msr = index(number("index")?)?;
        let value = number("value")?;
        let faulted = words.next().is_some_and(|word| word.starts_with("(#GP)"));
        Ok(Access {
            op,
            msr,
            value,
            faulted,
        })
    }

    /// `1b, value fee00900 #GP` as the guest's kernel prints it, or the fields `msr`, `val` and `failed` by their names.
    fn read_in_guest(op: Op, payload: &str) -> Result<Access, String> {
        if payload.contains("value ") {
            let mut words = words(payload);
            let msr = index(hexadecimal(words.next(), "index")?)?;
            let value = hexadecimal(words.find(|word| *word == "value").and(words.next()), "value")?;
            let faulted = words.next() == Some("#GP");
            return Ok(Access {
                op,
                msr,
                value,
                faulted,
            });
        }
        let [Some(msr), value, failed] = named(payload, ["msr", "val", "failed"])? else {
            return Err("there is neither an index nor a value".to_owned());
        };
        Ok(Access {
            op,
            msr: index(msr)?,
            value: value.unwrap_or(0),
            faulted: failed.is_some_and(|failed| failed != 0),
        })
    }

    /// `write: 1, ecx: 1760, data: 5` of `perf trace`, which leaves out what is 0, or `write=1 ecx=0x6e0 data=0x5
    /// exception=0` of `trace-cmd report -R` and ftrace's option `fields`.
    fn fields(payload: &str, first: &str) -> Result<Access, String> {
        let fields = named(payload, ["write", "ecx", "data", "exception"])?;
        if fields.iter().all(Option::is_none) {
            return Err(format!("`{first}` is neither `msr_read` nor `msr_write`"));
        }
        let [write, ecx, data, exception] = fields.map(Option::unwrap_or_default);
        Ok(Access {
            op: match write {
                0 => Op::Read,
                _ => Op::Write,
            },
            msr: index(ecx)?,
            value: data,
            faulted: exception != 0,
        })
    }
}

fn index(number: u64) -> Result<Msr, String> {
    u32::try_from(number)
        .map(Msr)
        .map_err(|_| format!("the index is {number:#x}, and it has 32 bits"))
}

/// The keys, numbers and other words of a payload.
fn words(payload: &str) -> impl Iterator<Item = &str> {
    let words = payload.split([' ', '\t', ',', ':', '=', ')']);
    words.filter(|word| !word.is_empty())
}

/// The numbers that stand behind these keys.
fn named<const N: usize>(payload: &str, keys: [&str; N]) -> Result<[Option<u64>; N], String> {
    let mut found = [None; N];
    let mut words = words(payload);
    while let Some(key) = words.next() {
        let place = keys.iter().position(|known| *known == key);
        if let Some(field) = place.and_then(|place| found.get_mut(place)) {
            let word = words.next().unwrap_or_default();
            *field = Some(number(word).ok_or_else(|| format!("`{key}` is `{word}`, which is not a number"))?);
        }
    }
    Ok(found)
}

/// A number in hexadecimal, with `0x` or without.
fn hexadecimal(word: Option<&str>, what: &str) -> Result<u64, String> {
    let word = word.unwrap_or_default();
    let digits = word.strip_prefix("0x").unwrap_or(word);
    u64::from_str_radix(digits, 16).map_err(|_| format!("the {what} is `{word}`, which is not a number"))
}

/// A number in hexadecimal with `0x`, or in decimal, where `perf trace` prints those with bit 63 below zero.
fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok().or_else(|| word.parse().ok().map(i64::cast_unsigned)),
    }
}

/// A line without the tracepoint: another event, a comment, a stack; or one that says that events are missing. What has had
/// no event so far may be another file that begins with a comment.
fn foreign(line: &str, had_events: bool) -> Result<(), String> {
    if is_lost(line) {
        return Err(
            "events were lost here, so this is not all that the guest did: record with a larger buffer, or take the \
             line out to go on without them"
                .to_owned(),
        );
    }
    if let Some((kept, written)) = overwritten(line) {
        return Err(format!(
            "the buffer held {kept} of {}, so this is not all that the guest did: record with a larger \
             buffer (`buffer_size_kb`) or from `trace_pipe`, or take the line out to go on without them",
            print::counted(written, "event", "events")
        ));
    }
    let first = line.split_whitespace().next().unwrap_or_default();
    let stack = line.starts_with([' ', '\t']) && first.bytes().all(|byte| byte.is_ascii_hexdigit());
    if begins(line) || stack || first == "=>" {
        return Ok(());
    }
    Err(match had_events {
        true => "this is not a line of `perf script`, `perf trace`, `trace-cmd report` or ftrace",
        false => {
            "this is not a trace: neither JSON Lines (docs/trace.md) nor the text of kvm:kvm_msr (docs/formats.md)"
        }
    }
    .to_owned())
}

/// Whether a line says that events are missing.
fn is_lost(line: &str) -> bool {
    let lost = ["LOST", "DROPPED"].iter().any(|word| line.contains(word));
    lost && (head::time(line).is_none() || line.contains("PERF_RECORD_LOST"))
}

/// How many events ftrace's buffer held of how many, where the head of `trace` says that they are fewer.
fn overwritten(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.split_once("entries-in-buffer/entries-written:")?;
    let (kept, written) = counts.split_whitespace().next()?.split_once('/')?;
    let (kept, written) = (kept.parse().ok()?, written.parse().ok()?);
    (kept < written).then_some((kept, written))
}

/// `trace-cmd report`'s remark of a CPU that saw nothing.
fn is_empty_cpu(line: &str) -> bool {
    line.strip_prefix("CPU ")
        .is_some_and(|rest| rest.trim_end().ends_with(" is empty"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(line: &str) -> Event {
        Threads::default().event(line).expect(line).expect(line)
    }

    /// Of which VM and vCPU an event of a thread is.
    fn of(threads: &mut Threads, thread: &str) -> (u32, u32) {
        let line = format!(" {thread} [001] 1.0: kvm:kvm_msr: msr_read 10 = 0x0");
        let event = threads.event(&line).expect("an event").expect("an event");
        (event.vm, event.vcpu)
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
            assert_eq!((event.t, event.vcpu), (Nanos(t), vcpu), "{line}");
            assert_eq!(
                (event.op, event.msr.0, event.value, event.did),
                (Op::Write, 0xc000_0080, 0xd01, Disposition::Allow)
            );
        }
        let faulted = event(" CPU 0/KVM-1 [001] ..... 5.000001: kvm_msr: msr_read 1a6 = 0x0 (#GP)");
        assert_eq!((faulted.op, faulted.did), (Op::Read, Disposition::Fault));
    }

    #[test]
    fn the_guests_own_tracepoints_are_read_by_cpu() {
        for (line, access) in [
            (
                "         swapper     0 [000]     1.000001: msr:read_msr: 1b, value fee00900",
                (0, Op::Read, 0x1b, 0xfee0_0900, Disposition::Allow),
            ),
            (
                "  <idle>-0       [003] d..2.     1.000002: write_msr: 6e0, value 1234 #GP",
                (3, Op::Write, 0x6e0, 0x1234, Disposition::Fault),
            ),
            (
                "  systemd-1      [002] .....     2.5: read_msr: msr=0x10a val=0x0 failed=1",
                (2, Op::Read, 0x10a, 0, Disposition::Fault),
            ),
        ] {
            let event = event(line);
            assert_eq!(
                (event.vm, event.vcpu, event.op, event.msr.0, event.value, event.did),
                (0, access.0, access.1, access.2, access.3, access.4),
                "{line}"
            );
        }
    }

    #[test]
    fn fields_by_their_names_are_read() {
        for (payload, access) in [
            (
                "kvm_msr(write: 1, ecx: 1760, data: 16, exception: 0)",
                (Op::Write, 0x6e0, 16, Disposition::Allow),
            ),
            (
                "kvm_msr(ecx: 422, exception: 1)",
                (Op::Read, 0x1a6, 0, Disposition::Fault),
            ),
            (
                "kvm_msr(ecx: 422, data: -1)",
                (Op::Read, 0x1a6, u64::MAX, Disposition::Allow),
            ),
            (
                "kvm_msr:msr_write 6e0 = 0x10)",
                (Op::Write, 0x6e0, 16, Disposition::Allow),
            ),
            (
                "kvm_msr(msr_read 1a6 = 0x0 (#GP))",
                (Op::Read, 0x1a6, 0, Disposition::Fault),
            ),
            (
                "kvm_msr:   write=1 ecx=0x6e0 data=16 exception=0",
                (Op::Write, 0x6e0, 16, Disposition::Allow),
            ),
            (
                "kvm_msr: exception=0x1 (1) data=0x10 (16) ecx=0x6e0 (1760) write=0x1 (1)",
                (Op::Write, 0x6e0, 16, Disposition::Fault),
            ),
            (
                "kvm_msr: msr_read 3a = 0x0        <debug>",
                (Op::Read, 0x3a, 0, Disposition::Allow),
            ),
        ] {
            let read = event(&format!("     0.012 CPU 2/KVM/1821755 kvm:{payload}"));
            assert_eq!((read.op, read.msr.0, read.value, read.did), access, "{payload}");
            assert_eq!((read.vcpu, read.t), (2, Nanos(12_000)), "{payload}");
        }
    }

    #[test]
    fn threads_are_vcpus_and_the_second_of_a_name_is_of_another_vm() {
        let mut threads = Threads::default();
        assert_eq!(of(&mut threads, "CPU 0/KVM 100"), (0, 0));
        assert_eq!(of(&mut threads, "CPU 1/KVM 101"), (0, 1));
        assert_eq!(of(&mut threads, "CPU 1/KVM 201"), (1, 1));
        assert_eq!(of(&mut threads, "CPU 0/KVM 100"), (0, 0));
        assert_eq!(of(&mut threads, "something 7"), (0, 0));
        assert_eq!(of(&mut threads, "something 8"), (0, 1));
        assert_eq!(of(&mut threads, "renamed 8"), (0, 1));
    }

    #[test]
    fn where_lines_name_the_process_it_is_the_vm() {
        let mut threads = Threads::default();
        assert_eq!(of(&mut threads, "CPU 1/KVM 100/101"), (0, 1));
        assert_eq!(of(&mut threads, "CPU 0/KVM 200/201"), (1, 0));
        assert_eq!(of(&mut threads, "CPU 0/KVM 100/102"), (0, 0));
        assert_eq!(of(&mut threads, "qemu 300/301"), (2, 0));
        assert_eq!(of(&mut threads, "qemu 300/302"), (2, 1));
    }

    #[test]
    fn other_lines_are_passed_over_and_lost_events_are_an_error() {
        let mut threads = Threads::default();
        for line in [
            "# tracer: nop",
            "# entries-in-buffer/entries-written: 5/5   #P:8",
            "cpus=8",
            "version = 6",
            "CPU 3 is empty",
            " qemu-8397 [002] d....  1404.389510: kvm_entry: vcpu 1, rip 0xffffffff81000132",
            "\t    ffffffffc0a1 kvm_emulate_rdmsr+0x1 ([kvm])",
            " => kvm_emulate_rdmsr",
        ] {
            assert_eq!(threads.event(line), Ok(None), "{line}");
        }
        for (line, what) in [
            ("CPU:3 [LOST 123 EVENTS]", "lost"),
            ("CPU:0 [EVENTS DROPPED]", "lost"),
            (" x 1 [000] 1.0: PERF_RECORD_LOST lost 27", "lost"),
            ("# entries-in-buffer/entries-written: 10/50   #P:8", "10 of 50"),
            ("garbage", "not a trace"),
            (" x-1 [0] 1.0: kvm_msr: msr_read CTR1 = 0x0", "not a number"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 1_0000_0000 = 0x0", "not a number"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 100000000 = 0x0", "32 bits"),
            (" x-1 [0] 1.0: kvm_msr: msr_read 10 = ", "not a number"),
            (" x-1 [0] 1.0: kvm_msr: msr_peek 10 = 0x0", "neither"),
        ] {
            let error = threads.event(line).expect_err(line);
            assert!(error.contains(what), "{line}: {error}");
        }
        let _ = of(&mut threads, "CPU 0/KVM 7");
        assert!(
            threads
                .event("garbage")
                .is_err_and(|error| error.contains("not a line of"))
        );
    }

    #[test]
    fn a_line_that_breaks_off_is_told_from_one_that_ends() {
        for (line, breaks) in [
            (" x-1 [0] 1.0: kvm_m", true),
            (" x-1 [0] 1.0: kvm_entry: vcpu 1, rip 0xff", false),
            (" x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0 (#G", true),
            (" x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0 (#GP)", false),
            (" x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0", false),
            ("# tracer: nop", false),
        ] {
            assert_eq!(breaks_off(line), breaks, "{line}");
        }
    }
}
