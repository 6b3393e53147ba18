use super::*;

fn event(t: u64, msr: u32, op: Op) -> Event {
    Event {
        t: Nanos(t),
        vm: 0,
        vcpu: 0,
        op,
        msr: Msr(msr),
        value: 0,
        reason: None,
        did: Disposition::Allow,
        why: None,
        would: None,
        rule: None,
        rip: None,
        within: None,
        cost: None,
    }
}

#[test]
fn a_row_tells_how_often_when_by_whom_and_what_it_got() {
    let mut report = Report::default();
    report.begin(Header::default());
    let read = event(1000, 0x8b, Op::Read);
    report.add(&Event {
        value: 7,
        reason: Some(Reason::Filter),
        did: Disposition::Value,
        rule: Some(2),
        rip: Some(0xffff),
        cost: Some(Nanos(300)),
        ..read
    });
    report.add(&Event {
        t: Nanos(1500),
        vcpu: 1,
        reason: Some(Reason::Unknown),
        did: Disposition::Fault,
        why: Some(FaultCause::NoRule),
        would: None,
        cost: Some(Nanos(500)),
        ..read
    });
    // A vCPU's events may be written before the earlier ones of another.
    report.add(&Event {
        t: Nanos(900),
        value: 9,
        ..read
    });
    report.add(&event(1200, 0x10, Op::Write));
    let rows: Vec<&Row> = report.rows().collect();
    let [tsc, row] = rows[..] else { panic!("{rows:?}") };
    assert_eq!((tsc.msr.0, tsc.op, tsc.values.each()), (0x10, Op::Write, &[(0, 1)][..]));
    assert_eq!((row.count, row.kinds, row.exits), (3, [1, 1, 1], 2));
    let (first, last) = (report.first(row).t, report.last(row).t);
    assert_eq!((first, last), (0, 600), "from the earliest event on");
    assert_eq!(report.first(tsc).t, 300);
    assert_eq!(report.traces()[0].duration(), 600);
    let cost = Cost {
        count: 2,
        sum: 800,
        most: 500,
    };
    assert_eq!((row.cost, report.cost(), row.cost.mean()), (cost, cost, Some(400)));
    assert_eq!(tsc.cost.mean(), None, "the trace does not tell");
    assert_eq!(
        row.values.each(),
        [(7, 1), (9, 1)],
        "the read that faulted has no value"
    );
    assert_eq!(row.vcpus.each(), [(0, 2), (1, 1)]);
    assert_eq!(row.rips.each(), [(0xffff, 1)]);
    assert_eq!(row.got.each().len(), 3);
    assert_eq!(row.got.each()[0].0.rule, Some(2));
    assert_eq!((report.accesses(), report.kinds(), report.exits()), (4, [2, 1, 1], 2));
    assert_eq!((report.vcpus()[0].count, report.vcpus()[1].count), (3, 1));
    let timed: u64 = report.timeline().buckets().flatten().sum();
    assert!(
        timed == 4 && report.timeline().start() <= -100,
        "{:?}",
        report.timeline()
    );
}

#[test]
fn traces_are_laid_over_each_other_from_their_first_events_on() {
    let mut report = Report::default();
    for start in [1_000_000_000_000, 5] {
        report.begin(Header::default());
        report.add(&event(start, 1, Op::Read));
        report.add(&event(start + 10, 1, Op::Read));
    }
    let row = report.rows().next().unwrap();
    assert_eq!(report.first(row), Moment { trace: 0, t: 0 });
    assert_eq!(report.last(row), Moment { trace: 1, t: 10 });
    assert_eq!(report.vcpus().len(), 2, "each trace has its own vCPUs");
    let counts: Vec<u64> = report.timeline().buckets().map(|[allowed, ..]| *allowed).collect();
    assert_eq!((counts.len(), counts[0], counts[10]), (11, 2, 2));
}

#[test]
fn gaps_are_added_up_for_each_vcpu_of_each_trace() {
    let gap = |t, vcpu, events| Gap {
        t: Nanos(t),
        vm: 0,
        vcpu,
        events,
    };
    let mut report = Report::default();
    report.begin(Header::default());
    report.add_gap(&gap(50, 1, 7));
    report.add(&event(100, 1, Op::Read));
    report.add_gap(&gap(130, 0, 2));
    report.add_gap(&gap(110, 0, 3));
    report.begin(Header::default());
    report.add_gap(&gap(5, 0, u64::MAX));
    let lost = |trace, vcpu, events, first, last| Lost {
        trace,
        vm: 0,
        vcpu,
        events,
        first,
        last,
    };
    let found: Vec<Lost> = report.lost_by_vcpu().collect();
    let expected = [lost(0, 1, 7, 0, 0), lost(0, 0, 5, 10, 30), lost(1, 0, u64::MAX, 0, 0)];
    assert_eq!(found, expected);
    assert_eq!(report.traces()[0].lost, 12);
    assert_eq!((report.lost(), report.accesses()), (u64::MAX, 1));
    assert_eq!((report.traces()[0].duration(), report.traces()[1].duration()), (0, 0));
}

#[test]
fn what_there_is_no_room_for_is_counted_all_the_same() {
    let mut report = Report::default();
    let most = u32::try_from(MOST_ROWS).unwrap();
    for index in 0..most + 5 {
        report.add(&Event {
            vcpu: index,
            ..event(u64::from(index) << 40, index, Op::Read)
        });
    }
    report.add(&event(u64::MAX, 0, Op::Read));
    for vcpu in 0..most {
        report.add_gap(&Gap {
            t: Nanos(0),
            vm: 0,
            vcpu,
            events: 1,
        });
    }
    assert_eq!(
        (report.lost(), report.lost_by_vcpu().count()),
        (u64::from(most), MOST_VCPUS)
    );
    assert_eq!((report.rows().len(), report.unlisted()), (MOST_ROWS, 5));
    assert_eq!(report.vcpus().len(), MOST_VCPUS);
    assert!(report.timeline().buckets().len() <= MOST_BUCKETS);
    let timed: u64 = report.timeline().buckets().flatten().sum();
    assert_eq!((report.accesses(), timed), (u64::from(most) + 6, u64::from(most) + 6));
}

#[test]
fn each_thing_that_is_done_is_of_one_kind() {
    for did in Disposition::ALL {
        assert_eq!(Kind::of(did) == Kind::Faulted, did.is_fault(), "{did}");
    }
    assert!(Kind::ALL.iter().zip(0..).all(|(kind, number)| *kind as usize == number));
}
