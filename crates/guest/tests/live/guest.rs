//! A guest, and what it sees of its accesses.

use msrgate_core::{Access, Fault, Msr, Op, Outcome, Reason};
use msrgate_guest::{Guest, GuestDied, GuestError, Mode, Options};

use crate::kvm;

const READ_OF_UNKNOWN: Access = Access::Read { msr: Msr(0xdead_beef) };
const APIC_BASE: Msr = Msr(0x1b);
const SYSENTER_CS: Msr = Msr(0x174);
const PAT: Msr = Msr(0x277);
const EFER: Msr = Msr(0xc000_0080);

fn outcomes(guest: &mut Guest, accesses: &[Access]) -> Vec<Outcome> {
    let seen = guest.run(0, accesses, &mut |_| {}).unwrap();
    seen.iter().map(|seen| seen.outcome).collect()
}

fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
}

#[test]
fn a_guest_reads_writes_and_faults_in_both_modes() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut guest = Guest::new(&kvm, mode, &Options::default()).unwrap();
        let accesses = [
            read(APIC_BASE),
            READ_OF_UNKNOWN,
            write(SYSENTER_CS, 0x1234),
            read(SYSENTER_CS),
            write(EFER, 1 << 40),
            read(PAT),
            write(PAT, 0x0006_0406_0007_0406),
            read(PAT),
        ];
        let expected = [
            Outcome::Value(0xfee0_0900),
            Outcome::Fault,
            Outcome::Done,
            Outcome::Value(0x1234),
            Outcome::Fault,
            Outcome::Value(0x0007_0406_0007_0406),
            Outcome::Done,
            Outcome::Value(0x0006_0406_0007_0406),
        ];
        assert_eq!(outcomes(&mut guest, &accesses), expected, "{mode:?}");
        // And again, from where it stands.
        assert_eq!(outcomes(&mut guest, &accesses[..4]), expected[..4], "{mode:?}");
    }
}

#[test]
fn a_read_that_faults_leaves_eax_and_edx_alone_and_the_guest_goes_on() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut guest = Guest::new(&kvm, mode, &Options::default()).unwrap();
        let mut accesses = vec![READ_OF_UNKNOWN; 10_000];
        accesses.push(read(APIC_BASE));
        let seen = guest.run(0, &accesses, &mut |_| {}).unwrap();
        let (last, faults) = seen.split_last().unwrap();
        assert_eq!(faults.len(), 10_000);
        assert!(faults.iter().all(|seen| seen.outcome == Outcome::Fault));
        assert_eq!(last.outcome, Outcome::Value(0xfee0_0900));
    }
}

/// Hands accesses that the kernel does not know to user space.
fn hand_over_unknown(guest: &Guest) {
    let cap = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR,
        args: [Reason::Unknown as u64, 0, 0, 0],
        ..Default::default()
    };
    guest.vm().enable_cap(&cap).unwrap();
}

#[test]
fn a_closure_sees_the_exit_where_it_happens_and_answers_it() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut guest = Guest::new(&kvm, mode, &Options::default()).unwrap();
        hand_over_unknown(&guest);
        let unknown = Msr(0xdead_beef);
        let accesses = [
            read(APIC_BASE),
            read(unknown),
            write(unknown, 0x1234_5678_9abc_def0),
            read(SYSENTER_CS),
            read(unknown),
            write(unknown, 1),
            read(unknown),
        ];
        let mut exits = Vec::new();
        let seen = guest
            .run(0, &accesses, &mut |pending| {
                exits.push((pending.position(), pending.access(), pending.rip()));
                match pending.position() {
                    1 | 2 => pending.answer(|_| Ok(0x0102_0304_0506_0708), |_, _| Ok(())),
                    4 | 5 => pending.answer(|_| Err(Fault), |_, _| Err(Fault)),
                    // What gets no answer faults too.
                    _ => {}
                }
            })
            .unwrap();
        let outcomes: Vec<Outcome> = seen.iter().map(|seen| seen.outcome).collect();
        assert_eq!(
            outcomes,
            [
                Outcome::Value(0xfee0_0900),
                Outcome::Value(0x0102_0304_0506_0708),
                Outcome::Done,
                Outcome::Value(0),
                Outcome::Fault,
                Outcome::Fault,
                Outcome::Fault,
            ]
        );
        let reasons: Vec<Option<u32>> = seen.iter().map(|seen| seen.exit.map(|exit| exit.reason_bits)).collect();
        assert_eq!(reasons, [None, Some(2), Some(2), None, Some(2), Some(2), Some(2)]);
        let positions: Vec<usize> = exits.iter().map(|(position, ..)| *position).collect();
        assert_eq!(positions, [1, 2, 4, 5, 6]);
        for (position, access, rip) in &exits {
            assert_eq!(*access, accesses[*position]);
            // All reads are made by one instruction, all writes by another.
            let same = exits.iter().find(|(_, other, _)| other.op() == access.op()).unwrap();
            assert_eq!(*rip, same.2);
        }
        let rip = |op| exits.iter().find(|(_, access, _)| access.op() == op).unwrap().2;
        assert!(rip(Op::Read) < rip(Op::Write));
    }
}

#[test]
fn an_access_that_breaks_the_guest_is_an_error_and_the_guest_is_as_new() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let options = Options {
            irqchip: true,
            ..Options::default()
        };
        let mut guest = Guest::new(&kvm, mode, &options).unwrap();
        // x2APIC on, and INIT to itself: the vCPU starts over where there is no memory.
        let accesses = [
            write(APIC_BASE, 0xfee0_0d00),
            write(Msr(0x80f), 0x1ff),
            write(Msr(0x830), 0x4500),
        ];
        let mut runs = (0..2).map(|_| guest.run(0, &accesses, &mut |_| {}).map(<[_]>::len));
        // A kernel may act on INIT at its next entry only.
        let error = runs.find_map(Result::err).expect("INIT breaks the guest");
        let GuestError::GuestDied { how, .. } = error else {
            panic!("{error:?}")
        };
        assert!(!matches!(how, GuestDied::Exception), "{how:?}");
        assert_eq!(
            outcomes(&mut guest, &[write(SYSENTER_CS, 1), read(SYSENTER_CS)]),
            [Outcome::Done, Outcome::Value(1)]
        );
    }
}

#[test]
fn writes_that_move_what_the_guest_stands_on_do_not_break_it() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        for irqchip in [false, true] {
            let options = Options {
                irqchip,
                ..Options::default()
            };
            let mut guest = Guest::new(&kvm, mode, &options).unwrap();
            let registers = [
                0x10,
                0x11,
                0x12,
                0x1b,
                0x3a,
                0x3b,
                0x79,
                0x8b,
                0x9e,
                0x174,
                0x175,
                0x176,
                0x1a0,
                0x1d9,
                0x200,
                0x201,
                0x250,
                0x277,
                0x2ff,
                0x38f,
                0x6e0,
                0xda0,
                0x4000_0000,
                0x4000_0001,
                0x4b56_4d00,
                0x4b56_4d01,
                0x4b56_4d02,
                0x4b56_4d03,
                0x4b56_4d04,
                0x4b56_4d05,
                0xc000_0080,
                0xc000_0081,
                0xc000_0082,
                0xc000_0084,
                0xc000_0100,
                0xc000_0101,
                0xc000_0102,
                0xc000_0103,
                0xc001_0015,
                0xc001_0117,
            ];
            let values = [
                0,
                1,
                u64::MAX,
                0x0010_f001,
                0xd000_0001,
                0xd001_0003,
                0xfee0_0c00,
                0x500,
                0xd01,
                1 << 63,
            ];
            let accesses: Vec<Access> = values
                .iter()
                .flat_map(|value| registers.map(|msr| write(Msr(msr), *value)))
                .collect();
            guest.run(0, &accesses, &mut |_| {}).unwrap();
            assert_eq!(
                outcomes(&mut guest, &[write(SYSENTER_CS, 2), read(SYSENTER_CS)]),
                [Outcome::Done, Outcome::Value(2)]
            );
        }
    }
}

#[test]
fn vcpus_run_at_once_each_with_its_own_registers() {
    let Some(kvm) = kvm() else { return };
    for (mode, irqchip) in [(Mode::Real, false), (Mode::Long, true)] {
        let options = Options {
            vcpus: 4,
            irqchip,
            ..Options::default()
        };
        let mut guest = Guest::new(&kvm, mode, &options).unwrap();
        std::thread::scope(|scope| {
            for (vcpu, value) in guest.vcpus().iter_mut().zip(1..) {
                scope.spawn(move || {
                    let accesses = [write(SYSENTER_CS, value), read(SYSENTER_CS)].repeat(1000);
                    let seen = vcpu.run(&accesses, &mut |_| {}).unwrap();
                    assert_eq!(seen.len(), 2000);
                    for pair in seen.chunks(2) {
                        assert_eq!(pair[1].outcome, Outcome::Value(value));
                    }
                });
            }
        });
    }
}

#[test]
fn the_exits_statistic_counts_accesses_that_leave_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    hand_over_unknown(&guest);
    outcomes(&mut guest, &[read(APIC_BASE)]);
    let before = guest.exits(0).unwrap();
    outcomes(&mut guest, &[READ_OF_UNKNOWN; 100]);
    let counted = guest.exits(0).unwrap() - before;
    assert!(counted >= 100, "{counted}");
}

#[test]
fn a_vcpu_that_is_not_there_is_an_error() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    assert!(matches!(
        guest.run(1, &[], &mut |_| {}),
        Err(GuestError::NoVcpu { vcpu: 1 })
    ));
    assert_eq!(guest.run(0, &[], &mut |_| {}).unwrap(), []);
    let options = Options {
        vcpus: 257,
        ..Options::default()
    };
    assert!(matches!(
        Guest::new(&kvm, Mode::Real, &options),
        Err(GuestError::NoVcpu { vcpu: 257 })
    ));
}

/// The accesses of a recorded guest, by vCPU.
fn trace(name: &str) -> Vec<Vec<Access>> {
    let path = format!("{}/../../traces/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut vcpus: Vec<Vec<Access>> = Vec::new();
    for line in text.lines().skip(1) {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        let number =
            |key: &str| u64::from_str_radix(event[key].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
        let msr = Msr(number("msr").try_into().unwrap());
        let vcpu: usize = event["vcpu"].as_u64().unwrap().try_into().unwrap();
        if vcpus.len() <= vcpu {
            vcpus.resize(vcpu + 1, Vec::new());
        }
        vcpus[vcpu].push(match event["op"].as_str() {
            Some("rdmsr") => read(msr),
            Some("wrmsr") => write(msr, number("value")),
            other => panic!("{other:?}"),
        });
    }
    vcpus
}

#[test]
fn recorded_linux_guests_run_to_their_end_in_both_modes() {
    let Some(kvm) = kvm() else { return };
    for name in ["linux-6.1-microvm.jsonl", "linux-6.1-pc-smp2.jsonl"] {
        let vcpus = trace(name);
        for (mode, irqchip) in [(Mode::Real, true), (Mode::Real, false), (Mode::Long, true)] {
            let options = Options {
                vcpus: vcpus.len(),
                irqchip,
                ..Options::default()
            };
            let mut guest = Guest::new(&kvm, mode, &options).unwrap();
            let mut made = 0;
            for (vcpu, accesses) in vcpus.iter().enumerate() {
                made += guest.run(vcpu, accesses, &mut |_| {}).unwrap().len();
            }
            let all = vcpus.iter().map(Vec::len).sum::<usize>();
            assert_eq!(made, all, "{name}, {mode:?}, irqchip {irqchip}");
        }
    }
}
