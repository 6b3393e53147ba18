use msrgate_core::{Disposition, Event, FaultCause, Gap, Msr, Nanos, Op, Reason, Within};

use super::*;
use crate::{is_trace, write_event, write_gap, write_policy};

const HEADER: &str = "{\"msrgate_trace\":1}\n";

fn read(text: &str) -> (Vec<Record>, Option<TraceError>) {
    let mut lines = match Lines::new(text.as_bytes()) {
        Ok(lines) => lines,
        Err(error) => return (Vec::new(), Some(error)),
    };
    let mut records = Vec::new();
    for record in &mut lines {
        match record {
            Ok(record) => records.push(record),
            Err(error) => return (records, Some(error)),
        }
    }
    (records, None)
}

fn event() -> Event {
    Event {
        t: Nanos(7),
        vm: 1,
        vcpu: 2,
        op: Op::Write,
        msr: Msr(0xc000_0082),
        value: u64::MAX,
        reason: Some(Reason::Filter),
        did: Disposition::Fault,
        why: Some(FaultCause::AlreadyWritten),
        would: None,
        rule: Some(3),
        rip: Some(0xffff_ffff_8100_0000),
        within: Some(Within::L2),
        cost: Some(Nanos(1200)),
    }
}

#[test]
fn events_and_gaps_read_back_as_they_were_written() {
    let bare = Event {
        reason: None,
        why: None,
        would: None,
        rule: None,
        rip: None,
        within: None,
        cost: None,
        did: Disposition::Allow,
        ..event()
    };
    let mut text = HEADER.as_bytes().to_vec();
    let gap = Gap {
        t: Nanos(u64::MAX),
        vm: 3,
        vcpu: u32::MAX,
        events: u64::MAX,
    };
    write_event(&event(), &mut text).unwrap();
    write_gap(&gap, &mut text).unwrap();
    write_event(&bare, &mut text).unwrap();
    let (records, error) = read(std::str::from_utf8(&text).unwrap());
    assert!(error.is_none());
    assert_eq!(records, [Record::Event(event()), Record::Gap(gap), Record::Event(bare)]);
}

#[test]
fn a_gap_is_a_line_that_says_how_many_events_are_missing() {
    let mut line = Vec::new();
    let gap = Gap {
        t: Nanos(5),
        vm: 0,
        vcpu: 1,
        events: 15_369,
    };
    write_gap(&gap, &mut line).unwrap();
    assert_eq!(line, b"{\"lost\":15369,\"t\":5,\"vm\":0,\"vcpu\":1}\n");
    // As events, in any order, and 0 for what is left out.
    let (records, error) = read(&format!("{HEADER}{{\"vcpu\": 1, \"lost\": 2, \"cause\": \"room\"}}\n"));
    let short = Gap {
        t: Nanos(0),
        events: 2,
        ..gap
    };
    assert!(error.is_none(), "{error:?}");
    assert_eq!(records, [Record::Gap(short)]);
}

#[test]
fn a_line_that_says_which_policy_is_in_force_from_there_on_is_passed_over() {
    let mut text = HEADER.as_bytes().to_vec();
    write_policy(Nanos(7), "a8c4", &mut text).unwrap();
    assert!(
        text.ends_with(b"\n{\"t\":7,\"policy\":\"a8c4\"}\n"),
        "{}",
        text.escape_ascii()
    );
    write_event(&event(), &mut text).unwrap();
    let (records, error) = read(std::str::from_utf8(&text).unwrap());
    assert!(error.is_none(), "{error:?}");
    assert_eq!(records, [Record::Event(event())]);
    // A line that says nothing is an error as before.
    let (_, error) = read(&format!("{HEADER}{{\"t\":7}}\n"));
    assert!(error.is_some());
}

#[test]
fn the_usual_spelling_is_read_as_the_reader_of_json_reads_it() {
    let mut seed = 1u64;
    let mut roll = |n: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % n
    };
    const BYTES: &[u8] = b"0123456789abcdefxX{}[]\",:-+._ \n\\e";
    let (mut usual, mut others) = (0, 0);
    for _ in 0..20_000 {
        let some = |event: Event, number: usize| Event {
            t: Nanos(u64::MAX >> (1 + number % 63)),
            op: Op::ALL[number % 2],
            msr: Msr(u32::MAX >> (number % 32)),
            value: u64::MAX >> (number / 7 % 64),
            reason: Some(Reason::ALL[number % 3]).filter(|_| number & 3 > 0),
            did: Disposition::ALL[number % Disposition::ALL.len()],
            why: Some(FaultCause::ALL[number % FaultCause::ALL.len()]).filter(|_| number % 11 > 5),
            would: None,
            rule: event.rule.filter(|_| number & 4 > 0),
            rip: event.rip.filter(|_| number & 8 > 0),
            within: Some(Within::ALL[number % 3]).filter(|_| number % 7 > 4),
            cost: event.cost.filter(|_| number % 9 > 4),
            ..event
        };
        let event = some(event(), roll(1 << 20));
        let mut line = Vec::new();
        write_event(&event, &mut line).unwrap();
        assert_eq!(canonical::read(&line), Some(event));
        // And with a byte changed, left out or put in.
        let at = roll(line.len());
        let byte = BYTES[roll(BYTES.len())];
        match roll(3) {
            0 => line[at] = byte,
            1 => line.insert(at, byte),
            _ => _ = line.remove(at),
        }
        let mut lines = Lines::new(HEADER.as_bytes()).unwrap();
        lines.line = line;
        match canonical::read(&lines.line) {
            Some(event) => {
                usual += 1;
                let any = lines.any_record().ok();
                assert_eq!(any, Some(Some(Record::Event(event))), "{}", lines.line.escape_ascii());
            }
            None => others += 1,
        }
    }
    assert!(usual > 1000 && others > 1000, "{usual} {others}");
}

#[test]
fn what_is_wrong_is_told_with_its_line_and_what_came_before_is_kept() {
    let good = "{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n";
    for (bad, what) in [
        ("{\"op\":\"rdmsr\",\"msr\":\"0x1", "breaks off"),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x1\n", "not an event"),
        ("garbage\n", "not an event"),
        ("\u{0}\u{1}\n", "not an event"),
        ("[]\n", "not an event"),
        ("{\"op\":\"rdtsc\",\"msr\":\"0x10\"}\n", "neither"),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x1_0000_0000\"}\n", "32 bits"),
        ("{\"op\":\"rdmsr\",\"msr\":\"TSC\"}\n", "not a 64-bit number"),
        ("{\"op\":\"wrmsr\",\"msr\":\"0x10\"}\n", "no `value`"),
        ("{\"op\":\"rdmsr\",\"msr\":16,\"did\":\"slept\"}\n", "not known"),
        ("{\"op\":\"rdmsr\",\"msr\":16,\"reason\":\"mood\"}\n", "not known"),
        ("{\"op\":\"rdmsr\"}\n", "no `msr`"),
        ("{\"t\":5}\n", "neither `op` nor"),
        ("{\"lost\":0}\n", "`lost` is 0"),
        ("{\"lost\":-1}\n", "not an event"),
        ("{\"lost\":\"many\"}\n", "not an event"),
        ("{\"lost\":18446744073709551616}\n", "not an event"),
        ("{\"lost\":5,\"vcpu\":4294967296}\n", "not an event"),
        ("{\"lost\":5,\"op\":\"rdmsr\",\"msr\":16}\n", "`op` and `lost`"),
        ("{\"lost\":5,\"t\":1", "breaks off"),
    ] {
        let after = if bad.ends_with('\n') { good } else { "" };
        let (events, error) = read(&format!("{HEADER}{good}\n{good}{bad}{after}"));
        let error = error.unwrap_or_else(|| panic!("{bad:?} was read"));
        assert!(error.to_string().contains(what), "{bad:?}: {error}");
        assert_eq!((error.line, events.len()), (5, 2), "{bad:?}");
    }
}

#[test]
fn a_trace_begins_with_a_header_of_a_known_version() {
    for (text, what) in [
        ("", "empty"),
        ("garbage\n", "neither a trace's header"),
        ("{\"hello\":1}\n", "neither a trace's header"),
        ("{\"op\":\"rdmsr\",\"msr\":\"0x10\"}\n", "put the line"),
        ("{\n", "a whole object on each line"),
        ("[{\"msrgate_trace\":1}]\n", "jq -c '.[]'"),
        ("{\"msrgate_summary\":1}\n", "`learn` alone"),
        ("\u{1f}\u{8b}", "neither a trace's header"),
        ("PERFILE2 and bytes", "perf script -i"),
        ("[package]\n", "neither a trace's header"),
        ("{\"msrgate_trace\":2}\n", "version 2"),
        ("{\"msrgate_trace\":\"new\"}\n", "version \"new\""),
        ("{\"msrgate_trace\":1,\"guest\":5}\n", "malformed"),
    ] {
        let error = read(text).1.unwrap();
        assert_eq!(error.line, 1);
        assert!(error.to_string().contains(what), "{text:?}: {error}");
    }
}

#[test]
fn other_files_are_told_by_what_they_begin_with() {
    for (bytes, what) in [
        (b"\x1f\x8b\x08\0".as_slice(), "gzip -dc"),
        (b"\x17\x08\x44tracing6\0", "trace-cmd report -i"),
        (b"\xff\xfe{\0\"\0", "iconv"),
        (
            b"*[Time:  12 ms]  MSR: 0x0000001b  Value: 0x00000000fee00900  Mode: READ   Result: OK\n",
            "bpftrace",
        ),
    ] {
        let error = Lines::new(bytes).expect_err("no trace").to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_trace_is_told_from_a_policy() {
    for (head, trace) in [
        (HEADER, true),
        ("{\"msrgate_summary\":1,", true),
        ("# tracer: nop\n#\n", true),
        (" CPU 0/KVM 18 [015] 4831258.258053: kvm:kvm_msr: msr_write 6e0", true),
        ("# what a guest needs\nversion = 1\n", false),
        ("version = 1\n", false),
        ("# of a log\n[   44.000001] kvm [1]: x\n", true),
        ("> > {\"msrgate_trace\":1}\n", true),
        ("", false),
    ] {
        assert_eq!(is_trace(head.as_bytes()), trace, "{head}");
    }
}

#[test]
fn a_byte_order_mark_is_passed_over() {
    let (events, error) = read(&format!("\u{feff}{HEADER}{{\"op\":\"rdmsr\",\"msr\":\"0x10\"}}\n"));
    assert!(error.is_none() && events.len() == 1, "{error:?}");
    let (events, error) = read("\u{feff} x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0\n");
    assert!(error.is_none() && events.len() == 1, "{error:?}");
}

#[test]
fn what_a_mail_quotes_is_read() {
    for text in [
        format!("> > {HEADER}> > {{\"op\":\"rdmsr\",\"msr\":\"0x10\"}}\n>\n"),
        "> > # tracer: nop\n> >\n> >  x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0\n".to_owned(),
        ">> [    0.000000] Linux\n>>\n>> [    0.000001] kvm [1]: vcpu0 ignored rdmsr: 0x10 data 0x0\n".to_owned(),
    ] {
        let (records, error) = read(&text);
        assert!(error.is_none(), "{text}: {error:?}");
        assert!(
            matches!(records.as_slice(), [Record::Event(event)] if event.msr.0 == 0x10),
            "{text}: {records:?}"
        );
    }
}

#[test]
fn a_kernels_log_is_a_trace_that_lacks_what_was_served() {
    let line = "[   44.000001] kvm [100]: vcpu0, guest rIP: 0x5 ignored rdmsr: 0x641 data 0x0\n";
    let lines = Lines::new(line.as_bytes()).unwrap();
    assert!(lines.header().is_partial());
    assert_eq!(read(&format!("[    0.000000] Linux\n\n{line}")).0.len(), 1);
    let (_, error) = read("[    0.000000] Linux\n");
    assert!(error.is_some_and(|error| error.to_string().contains("about an MSR")));
    let (_, error) = read("[    0.000000] kvm [1]: ignored wrmsr: 0x641 da");
    assert!(error.is_some_and(|error| error.to_string().contains("breaks off")));
    let (_, error) = read("[    0.000000] kvm [1]: ignored wrmsr: 0x641 da\n");
    let error = error.expect("what was written is missing");
    assert!(
        error.line == 1 && error.to_string().contains("what was written"),
        "{error}"
    );
}

#[test]
fn whole_logs_of_all_kinds_are_traces() {
    for (text, accesses) in [
        (
            "{\"MESSAGE\":\"x\"}\n{\"MESSAGE\":\"kvm [1]: vcpu0 ignored rdmsr: 0x35 data 0x0\"}\n",
            1,
        ),
        ("VirtualBox VM\n00:00:01.000000 CPUM: Unknown MSR 0x641 -> #GP(0)\n", 1),
        (
            "Welcome\n(XEN) d1v0 RDMSR 0x00000150 unimplemented\n(XEN) d1v0 WRMSR 0x00000150 val 0x1 unimplemented\n",
            2,
        ),
        (
            "fbuf frame buffer base: 0xcfa36000000 [sz 33554432]\nwrmsr to register 0x140(0) on vcpu 0\n",
            1,
        ),
    ] {
        let (records, error) = read(text);
        assert!(error.is_none(), "{text}: {error:?}");
        assert_eq!(records.len(), accesses, "{text}");
    }
    // What KVM ignored it did not deny.
    let mut lines = Lines::new("kvm [1]: ignored rdmsr: 0x35 data 0x0\n".as_bytes()).unwrap();
    assert_eq!((lines.by_ref().count(), lines.header().ignore_msrs), (1, Some(true)));
    // What a VMM sets is no access of a guest's.
    let (records, error) = read("qemu-system-x86_64: error: failed to set MSR 0x48b to 0x1582e00000000\n");
    assert!(records.is_empty() && error.is_some_and(|error| error.to_string().contains("a guest accessed")));
}

#[test]
fn a_second_trace_behind_the_first_is_told() {
    let (_, error) = read(&format!("{HEADER}{HEADER}"));
    assert!(error.is_some_and(|error| error.line == 2 && error.to_string().contains("csplit")));
}

#[test]
fn a_cut_line_of_the_tracepoint_is_told() {
    let whole = " x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0 (#GP)";
    assert!(read(whole).1.is_none());
    for length in [whole.len() - 1, whole.len() - 9, 20, 8] {
        let (events, error) = read(&format!("{whole}\n{}", &whole[..length]));
        let error = error.unwrap_or_else(|| panic!("{length} bytes were read"));
        assert!(error.to_string().contains("breaks off"), "{length}: {error}");
        assert_eq!(events.len(), 1);
    }
}

#[test]
fn an_endless_line_is_an_error_and_not_a_full_memory() {
    let text = format!("{HEADER}{}", "x".repeat(LONGEST as usize + 1));
    assert!(read(&text).1.unwrap().to_string().contains("longer than"));
}
