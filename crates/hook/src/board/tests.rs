use super::*;

fn board(wanted: Wanted) -> Board {
    Board::new(crate::handover::memfd(c"test", Board::BYTES).unwrap(), wanted).unwrap()
}

fn event(msr: u32) -> Event {
    Event {
        t: 1,
        vm: 2,
        vcpu: 3,
        op: Op::Write,
        msr: Msr(msr),
        value: u64::MAX,
        reason: Some(Reason::Invalid),
        did: Did::Fault,
        why: Some(Why::ShadowFull),
        rule: Some(4),
        rip: Some(5),
        cost: Some(6),
    }
}

#[test]
fn words_of_what_was_done_are_the_numbers_of_the_types() {
    for (number, did) in Did::ALL.iter().enumerate() {
        assert_eq!(*did as usize, number);
    }
    for (number, why) in Why::ALL.iter().enumerate() {
        assert_eq!(*why as usize, number);
    }
}

#[test]
fn events_are_read_as_they_were_written() {
    let bare = Event {
        op: Op::Read,
        reason: None,
        why: None,
        rule: None,
        rip: None,
        cost: None,
        did: Did::Allow,
        ..event(0xffff_ffff)
    };
    for log in [Log::None, Log::All, Log::First, Log::PerSecond(u32::MAX)] {
        for event in [event(7), bare] {
            assert_eq!(decode(encode(&event, log)), (event, log));
        }
    }
    // What nobody wrote is still an event.
    let _ = decode([u64::MAX; EVENT]);
}

#[test]
fn what_finds_the_ring_full_is_counted_and_the_rest_kept_in_order() {
    let board = board(Wanted::default());
    let slate = board.slate().unwrap();
    let mut reader = board.reader();
    let full = EVENTS as u32;
    for round in 0..3 {
        (0..full + 10).for_each(|msr| slate.push(&event(msr), Log::None));
        let mut seen = Vec::new();
        assert_eq!(reader.drain(&mut |event, _| seen.push(event.msr.0)), EVENTS);
        assert_eq!(seen, (0..full).collect::<Vec<u32>>());
        assert_eq!(reader.missing().events, 10 * (round + 1));
    }
    assert_eq!(reader.drain(&mut |_, _| ()), 0);
}

#[test]
fn accesses_are_counted_by_msr_and_direction_over_all_vcpus() {
    let board = board(Wanted::default());
    let slates = [board.slate().unwrap(), board.slate().unwrap()];
    for slate in &slates {
        slate.count(&event(0x8b), 10);
        let read = Event {
            op: Op::Read,
            ..event(0x8b)
        };
        slate.count(&read, 1);
        slate.count(&event(0x8b), 20);
    }
    let tallies = board.reader().tallies();
    let counts: Vec<_> = tallies.iter().map(|(key, tally)| (*key, tally.count)).collect();
    assert_eq!(counts, [((Msr(0x8b), Op::Read), 2), ((Msr(0x8b), Op::Write), 4)]);
    let writes = &tallies[&(Msr(0x8b), Op::Write)];
    assert_eq!((writes.why, writes.ticks), (Some(Why::ShadowFull), 60));
}

#[test]
fn what_has_no_place_is_counted_as_such() {
    let board = board(Wanted::default());
    let slate = board.slate().unwrap();
    (0..3000).for_each(|msr| slate.count(&event(msr), 1));
    let mut reader = board.reader();
    let counted: u64 = reader.tallies().values().map(|tally| tally.count).sum();
    assert!(counted <= TALLIES as u64);
    assert_eq!(counted + reader.missing().accesses, 3000);
    let others: Vec<Slate> = (1..SLATES).map(|_| board.slate().unwrap()).collect();
    assert!(board.slate().is_none());
    board.without_slate();
    assert_eq!(counted + reader.missing().accesses, 3001);
    drop(others);
    assert!(board.slate().is_some(), "who is gone needs none");
}

#[test]
fn the_slate_of_a_vcpu_that_is_gone_goes_on_with_what_is_on_it() {
    let board = board(Wanted::default());
    let mut reader = board.reader();
    let mut seen = Vec::new();
    for round in 0..2 * SLATES as u32 {
        let (slate, beside) = (board.slate().unwrap(), board.slate().unwrap());
        slate.count(&event(1), 1);
        slate.push(&event(round), Log::All);
        beside.count(&event(2), 1);
        if round % 7 == 0 {
            reader.drain(&mut |event, _| seen.push(event.msr.0));
        }
    }
    reader.drain(&mut |event, _| seen.push(event.msr.0));
    assert_eq!(seen, (0..2 * SLATES as u32).collect::<Vec<_>>());
    let counts = reader.tallies().into_values().map(|tally| tally.count);
    assert_eq!(counts.collect::<Vec<_>>(), [2 * SLATES as u64; 2]);
    assert_eq!(reader.missing(), Missing::default());
}

#[test]
fn a_writer_and_a_reader_at_once_lose_nothing_that_is_not_counted() {
    let board = board(Wanted::default());
    let slate = board.slate().unwrap();
    let total = 200_000;
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..total).for_each(|msr| slate.push(&event(msr), Log::All));
            done.store(1, Ordering::Release);
        });
        let mut reader = board.reader();
        let (mut seen, mut last) = (0, None);
        loop {
            let ended = done.load(Ordering::Acquire) == 1;
            seen += reader.drain(&mut |event, _| {
                assert!(last < Some(event.msr.0), "{last:?} {}", event.msr);
                last = Some(event.msr.0);
            });
            if ended {
                break;
            }
        }
        assert_eq!(seen as u64 + reader.missing().events, u64::from(total));
    });
}
