//! What becomes of an access that is denied, unknown, invalid or failing, with its mask bit set and clear; and how an
//! access that exits ends.

use std::sync::Arc;

use msrgate_core::{Access, Exit, Fault, Filter, FilterRange, Msr, Op, Ops, Outcome, Reason, Reasons, Verdict};
use msrgate_engine::{
    Advance, Completion, Errno, Instruction, Intercepts, Interruption, KvmRunMsr, Path, Step, StillPending,
    UnknownMsrs, Vcpu, Vm, Written,
};

use crate::machine::{BROKEN, INVALID, Machine, UNKNOWN, VALUE};

const DENIED: u32 = 0x400;
const KNOWN: u32 = 0x500;
const EMULATOR: Path = Path::Emulator { next_rip: 0x1002 };

fn vm(reasons: Reasons) -> Vm {
    let vm = Vm::new();
    vm.set_reasons(reasons);
    let denied = FilterRange::new(DENIED, 1, Ops::BOTH, [0]).unwrap();
    vm.set_filter(Filter::new(Verdict::Allow, [denied]).unwrap());
    vm
}

fn vcpu(reasons: Reasons) -> Vcpu {
    Vcpu::new(Arc::new(vm(reasons)), Intercepts::all())
}

fn rdmsr(msr: u32) -> Instruction {
    Instruction::Rdmsr { rcx: msr.into() }
}

fn wrmsr(msr: u32) -> Instruction {
    Instruction::Wrmsr {
        rcx: msr.into(),
        rax: 0xffff_ffff_0000_0002,
        rdx: 0xffff_ffff_0000_0001,
    }
}

/// What [`wrmsr`] writes: the upper halves of RAX and RDX are dropped.
const WRITTEN: u64 = 0x0000_0001_0000_0002;

fn all_but(reason: Reason) -> Reasons {
    Reasons::from_bits(7 & !(reason as u64)).unwrap()
}

const FAULT: Step = Step::Complete(Completion::Fault);

fn done(written: Written, advance: Advance) -> Step {
    Step::Complete(Completion::Done { written, advance })
}

fn rax_rdx(value: u64) -> Written {
    Written::RaxRdx {
        rax: value & 0xffff_ffff,
        rdx: value >> 32,
    }
}

/// One row of the table of outcomes: with nothing but `reason` in the mask the access exits, with everything else in the
/// mask it gives `clear`, for both instructions on every path.
#[track_caller]
fn check_row(msr: u32, reason: Reason, clear: impl Fn(Op, Path) -> Step) {
    for path in [Path::VmExit, EMULATOR] {
        for instruction in [rdmsr(msr), wrmsr(msr)] {
            let access = instruction.access();
            let step = vcpu(Reasons::of(reason)).execute(instruction, path, &mut Machine::default());
            assert_eq!(step, Ok(Step::Exit(Exit::new(access, reason))), "{path:?}");
            for mask in [all_but(reason), Reasons::NONE] {
                let mut vcpu = vcpu(mask);
                let step = vcpu.execute(instruction, path, &mut Machine::default());
                assert_eq!(step, Ok(clear(access.op(), path)), "{path:?} {mask:?}");
                assert_eq!(vcpu.pending(), None);
            }
        }
    }
}

#[test]
fn a_denied_access_exits_with_filter_or_faults() {
    check_row(DENIED, Reason::Filter, |_, _| FAULT);
}

#[test]
fn an_unknown_msr_exits_with_unknown_or_faults() {
    check_row(UNKNOWN, Reason::Unknown, |_, _| FAULT);
}

#[test]
fn an_invalid_access_exits_with_invalid_or_faults() {
    check_row(INVALID, Reason::Invalid, |_, _| FAULT);
}

#[test]
fn a_failing_msr_exits_with_invalid_and_else_faults_a_read_and_fails_kvm_run_for_a_write() {
    for (instruction, clear) in [(rdmsr(BROKEN), FAULT), (wrmsr(BROKEN), Step::Failed(Errno::Enomem))] {
        let exit = Exit::new(instruction.access(), Reason::Invalid);
        for (mask, expected) in [
            (Reasons::of(Reason::Invalid), Step::Exit(exit)),
            (all_but(Reason::Invalid), clear),
        ] {
            let mut vcpu = vcpu(mask);
            assert_eq!(
                vcpu.execute(instruction, Path::VmExit, &mut Machine::default()),
                Ok(expected)
            );
        }
    }
}

#[test]
fn a_failing_msr_is_never_deflected_by_the_emulator() {
    for mask in [Reasons::ALL, Reasons::NONE] {
        for instruction in [rdmsr(BROKEN), wrmsr(BROKEN)] {
            let step = vcpu(mask).execute(instruction, EMULATOR, &mut Machine::default());
            assert_eq!(step, Ok(Step::EmulationFailed(Errno::Enomem)));
        }
    }
}

#[test]
fn a_denied_access_never_reaches_the_hypervisors_msrs() {
    for mask in [Reasons::ALL, Reasons::NONE] {
        for instruction in [rdmsr(DENIED), wrmsr(DENIED)] {
            let mut machine = Machine::default();
            let _ = vcpu(mask).execute(instruction, Path::VmExit, &mut machine);
            assert!(machine.reads.is_empty() && machine.writes.is_empty());
        }
    }
}

#[test]
fn ignored_unknown_msrs_read_zero_drop_writes_and_never_exit() {
    for mask in [Reasons::ALL, Reasons::NONE] {
        let vm = Arc::new(vm(mask).with_unknown_msrs(UnknownMsrs::Ignored));
        for (path, advance) in [(Path::VmExit, Advance::Skip), (EMULATOR, Advance::To(0x1002))] {
            let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
            let step = vcpu.execute(rdmsr(UNKNOWN), path, &mut Machine::default());
            assert_eq!(step, Ok(done(rax_rdx(0), advance)));
            let step = vcpu.execute(wrmsr(UNKNOWN), path, &mut Machine::default());
            assert_eq!(step, Ok(done(Written::Nothing, advance)));
        }
    }
}

#[test]
fn ignoring_unknown_msrs_neither_hides_denials_nor_invalid_accesses() {
    let vm = Arc::new(vm(Reasons::ALL).with_unknown_msrs(UnknownMsrs::Ignored));
    for (msr, reason) in [(DENIED, Reason::Filter), (INVALID, Reason::Invalid)] {
        let mut vcpu = Vcpu::new(vm.clone(), Intercepts::all());
        let step = vcpu.execute(rdmsr(msr), Path::VmExit, &mut Machine::default());
        assert_eq!(step, Ok(Step::Exit(Exit::new(Access::Read { msr: Msr(msr) }, reason))));
    }
}

#[test]
fn unknown_msrs_are_deflected_without_any_filter() {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::ALL);
    let step = Vcpu::new(vm, Intercepts::all()).execute(rdmsr(UNKNOWN), Path::VmExit, &mut Machine::default());
    assert!(matches!(step, Ok(Step::Exit(_))));
}

#[test]
fn an_allowed_read_gives_the_hypervisors_value() {
    let read = Instruction::RdmsrImmediate {
        msr: KNOWN,
        register: 9,
    };
    for (instruction, path, expected) in [
        (rdmsr(KNOWN), Path::VmExit, done(rax_rdx(VALUE), Advance::Skip)),
        (rdmsr(KNOWN), EMULATOR, done(rax_rdx(VALUE), Advance::To(0x1002))),
        (
            read,
            Path::VmExit,
            done(
                Written::Register {
                    register: 9,
                    value: VALUE,
                },
                Advance::Skip,
            ),
        ),
    ] {
        let step = vcpu(Reasons::NONE).execute(instruction, path, &mut Machine::default());
        assert_eq!(step, Ok(expected));
    }
}

#[test]
fn an_allowed_write_gives_the_value_of_the_instruction() {
    let immediate = Instruction::WrmsrImmediate { msr: KNOWN, value: !0 };
    for (instruction, value) in [(wrmsr(KNOWN), WRITTEN), (immediate, !0)] {
        let mut machine = Machine::default();
        let step = vcpu(Reasons::NONE).execute(instruction, Path::VmExit, &mut machine);
        assert_eq!(step, Ok(done(Written::Nothing, Advance::Skip)));
        assert_eq!(machine.writes, [(KNOWN, value)]);
    }
}

// What user space sees of an exit.

#[test]
fn an_exit_fills_kvm_run_with_the_index_the_reason_and_the_value() {
    let immediate = Instruction::WrmsrImmediate { msr: DENIED, value: !0 };
    let register = Instruction::RdmsrImmediate {
        msr: DENIED,
        register: 3,
    };
    for (instruction, exit_reason, data) in [
        (rdmsr(DENIED), 29, 0),
        (register, 29, 0),
        (wrmsr(DENIED), 30, WRITTEN),
        (immediate, 30, !0),
    ] {
        let step = vcpu(Reasons::ALL).execute(instruction, Path::VmExit, &mut Machine::default());
        let Ok(Step::Exit(exit)) = step else { panic!("{step:?}") };
        let run = KvmRunMsr::from(exit);
        assert_eq!(
            run,
            KvmRunMsr {
                exit_reason,
                error: 0,
                reason: 4,
                index: DENIED,
                data
            }
        );
    }
}

#[test]
fn kvm_run_has_the_kernels_offsets() {
    let run = KvmRunMsr {
        exit_reason: 29,
        error: 1,
        reason: 2,
        index: 0x1122_3344,
        data: VALUE,
    };
    let mut expected = [0; 24];
    expected[0] = 1;
    expected[8] = 2;
    expected[12..16].copy_from_slice(&[0x44, 0x33, 0x22, 0x11]);
    expected[16..].copy_from_slice(&VALUE.to_le_bytes());
    assert_eq!(run.to_bytes(), expected);
}

// How a pending access ends.

/// A vCPU with `instruction` pending.
fn pending(instruction: Instruction, path: Path) -> Vcpu {
    let mut vcpu = vcpu(Reasons::ALL);
    let step = vcpu.execute(instruction, path, &mut Machine::default());
    assert!(matches!(step, Ok(Step::Exit(_))));
    vcpu
}

#[track_caller]
fn check_completion(instruction: Instruction, path: Path, error: u8, data: u64, expected: Step) {
    let mut vcpu = pending(instruction, path);
    assert_eq!(vcpu.complete(error, data).map(Step::Complete), Some(expected));
    assert_eq!(vcpu.pending(), None);
    assert_eq!(vcpu.complete(error, data), None, "it is complete");
}

#[test]
fn a_read_gets_data_zero_extended_in_both_halves() {
    check_completion(
        rdmsr(DENIED),
        Path::VmExit,
        0,
        VALUE,
        done(rax_rdx(VALUE), Advance::Skip),
    );
    check_completion(rdmsr(DENIED), Path::VmExit, 0, !0, done(rax_rdx(!0), Advance::Skip));
    assert_eq!(
        rax_rdx(!0),
        Written::RaxRdx {
            rax: 0xffff_ffff,
            rdx: 0xffff_ffff
        }
    );
}

#[test]
fn an_immediate_read_gets_all_of_data_in_its_register() {
    let instruction = Instruction::RdmsrImmediate {
        msr: DENIED,
        register: 15,
    };
    let written = Written::Register {
        register: 15,
        value: VALUE,
    };
    check_completion(instruction, Path::VmExit, 0, VALUE, done(written, Advance::Skip));
}

#[test]
fn a_write_is_skipped_and_edits_of_data_are_ignored() {
    let immediate = Instruction::WrmsrImmediate { msr: DENIED, value: 1 };
    for instruction in [wrmsr(DENIED), immediate] {
        for data in [0, WRITTEN, !0] {
            check_completion(
                instruction,
                Path::VmExit,
                0,
                data,
                done(Written::Nothing, Advance::Skip),
            );
        }
    }
}

#[test]
fn any_error_faults() {
    let immediate = Instruction::RdmsrImmediate {
        msr: DENIED,
        register: 1,
    };
    for error in 1..=u8::MAX {
        for instruction in [rdmsr(DENIED), wrmsr(DENIED), immediate] {
            check_completion(instruction, Path::VmExit, error, VALUE, FAULT);
            check_completion(instruction, EMULATOR, error, VALUE, FAULT);
        }
    }
}

#[test]
fn fields_left_alone_let_a_read_give_zero_and_a_write_succeed() {
    for (instruction, written) in [(rdmsr(DENIED), rax_rdx(0)), (wrmsr(DENIED), Written::Nothing)] {
        let exit = Exit::new(instruction.access(), Reason::Filter);
        let run = KvmRunMsr::from(exit);
        check_completion(
            instruction,
            Path::VmExit,
            run.error,
            run.data,
            done(written, Advance::Skip),
        );
    }
}

#[test]
fn an_emulated_instruction_ends_where_its_decoding_did() {
    let advance = Advance::To(0x1002);
    check_completion(rdmsr(DENIED), EMULATOR, 0, 7, done(rax_rdx(7), advance));
    check_completion(wrmsr(DENIED), EMULATOR, 0, 7, done(Written::Nothing, advance));
}

#[test]
fn an_answer_to_the_other_direction_ends_nothing() {
    let mut vcpu = pending(rdmsr(DENIED), Path::VmExit);
    assert_eq!(vcpu.answer_write(Ok(())), None);
    assert_eq!(vcpu.answer_write(Err(Fault)), None);
    let read = vcpu.answer_read(Ok(VALUE)).map(Step::Complete);
    assert_eq!(read, Some(done(rax_rdx(VALUE), Advance::Skip)));
    assert_eq!(vcpu.answer_read(Ok(VALUE)), None, "it is complete");
    let mut vcpu = pending(wrmsr(DENIED), Path::VmExit);
    assert_eq!(vcpu.answer_read(Ok(VALUE)), None);
    let write = vcpu.answer_write(Ok(())).map(Step::Complete);
    assert_eq!(write, Some(done(Written::Nothing, Advance::Skip)));
    let fault = pending(rdmsr(DENIED), Path::VmExit).answer_read(Err(Fault));
    assert_eq!(fault.map(Step::Complete), Some(FAULT));
    let fault = pending(wrmsr(DENIED), Path::VmExit).answer_write(Err(Fault));
    assert_eq!(fault.map(Step::Complete), Some(FAULT));
}

#[test]
fn an_outcome_that_fits_is_what_the_access_got_and_any_other_faults() {
    let (read, write) = (
        Access::Read { msr: Msr(DENIED) },
        Access::Write {
            msr: Msr(DENIED),
            value: VALUE,
        },
    );
    for access in [read, write] {
        for outcome in [Outcome::Value(VALUE), Outcome::Done, Outcome::Fault] {
            let fits = matches!(
                (access, outcome),
                (Access::Read { .. }, Outcome::Value(_)) | (Access::Write { .. }, Outcome::Done)
            );
            let mut vcpu = pending(access.into(), Path::VmExit);
            assert_eq!(vcpu.pending().map(|exit| exit.access), Some(access));
            let got = vcpu.answer(outcome).map(|completion| completion.outcome());
            assert_eq!(
                got,
                Some(if fits { outcome } else { Outcome::Fault }),
                "{access:?}, {outcome:?}"
            );
            assert_eq!(vcpu.answer(outcome), None, "it is complete");
        }
    }
}

#[test]
fn a_pending_vcpu_executes_nothing_and_keeps_what_is_pending() {
    let mut vcpu = pending(rdmsr(DENIED), Path::VmExit);
    let mut machine = Machine::default();
    assert_eq!(
        vcpu.execute(rdmsr(KNOWN), Path::VmExit, &mut machine),
        Err(StillPending)
    );
    assert_eq!(vcpu.execute(wrmsr(DENIED), EMULATOR, &mut machine), Err(StillPending));
    assert!(machine.reads.is_empty() && machine.writes.is_empty());
    assert_eq!(
        vcpu.pending().map(|exit| exit.access),
        Some(Access::Read { msr: Msr(DENIED) })
    );
    assert_eq!(
        vcpu.complete(0, 7).map(Step::Complete),
        Some(done(rax_rdx(7), Advance::Skip))
    );
    assert!(vcpu.execute(rdmsr(KNOWN), Path::VmExit, &mut machine).is_ok());
}

#[test]
fn neither_a_new_filter_nor_a_new_mask_cancels_what_is_pending() {
    let mut vcpu = pending(rdmsr(DENIED), Path::VmExit);
    vcpu.vm().set_filter(Filter::allow_all());
    vcpu.vm().set_reasons(Reasons::NONE);
    assert_eq!(vcpu.verdict(Msr(DENIED), Op::Read), Verdict::Allow);
    assert_eq!(
        vcpu.complete(0, 7).map(Step::Complete),
        Some(done(rax_rdx(7), Advance::Skip))
    );
}

#[test]
fn a_new_mask_counts_from_the_next_failing_access() {
    let mut vcpu = vcpu(Reasons::NONE);
    let mut step = || {
        vcpu.execute(rdmsr(DENIED), Path::VmExit, &mut Machine::default())
            .unwrap()
    };
    assert_eq!(step(), FAULT);
    let vm = vcpu.vm().clone();
    vm.set_reasons(Reasons::ALL);
    let mut step = || {
        vcpu.execute(rdmsr(DENIED), Path::VmExit, &mut Machine::default())
            .unwrap()
    };
    assert!(matches!(step(), Step::Exit(_)));
}

// Draining before a vCPU's state is saved.

#[test]
fn a_drain_completes_and_executes_nothing() {
    for (error, expected) in [(0, done(rax_rdx(7), Advance::Skip)), (1, FAULT)] {
        let mut vcpu = pending(rdmsr(DENIED), Path::VmExit);
        assert_eq!(vcpu.ready_to_save(), Err(StillPending));
        let drained = vcpu.drain(error, 7, Interruption::ImmediateExit);
        assert_eq!(drained.completion.map(Step::Complete), Some(expected));
        assert_eq!(vcpu.ready_to_save(), Ok(()));
    }
}

#[test]
fn a_second_drain_does_nothing() {
    let mut vcpu = pending(wrmsr(DENIED), Path::VmExit);
    let _ = vcpu.drain(0, 0, Interruption::ImmediateExit);
    for _ in 0..2 {
        let drained = vcpu.drain(1, 7, Interruption::ImmediateExit);
        assert_eq!((drained.completion, drained.exit_reason), (None, None));
    }
}

#[test]
fn immediate_exit_leaves_a_stale_exit_reason_and_a_signal_replaces_it() {
    for (interruption, exit_reason) in [(Interruption::ImmediateExit, None), (Interruption::Signal, Some(10))] {
        let mut vcpu = pending(rdmsr(DENIED), Path::VmExit);
        assert_eq!(vcpu.drain(0, 0, interruption).exit_reason, exit_reason);
    }
}
