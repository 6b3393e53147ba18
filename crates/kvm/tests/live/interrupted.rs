//! What comes between an exit and its completion.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use msrgate_core::{
    Disposition, FaultCause, Filter, FilterRange, Msr, Ops, Outcome, ReadAction, Verdict, WriteAction, abi,
};
use msrgate_guest::{Guest, Mode};
use msrgate_kvm::{Dispatch, DrainStatus, Fault, Handler, Handlers, VcpuId};

use crate::{
    APIC_BASE, APIC_BASE_VALUE, MICROCODE, SYSENTER_CS, UNKNOWN, did, gated, kvm, map, outcomes, plan, read, run, write,
};

struct Counts(Arc<AtomicU64>);

impl Handler for Counts {
    fn read(&self, _vcpu: VcpuId, _msr: Msr) -> Result<u64, Fault> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn write(&self, _vcpu: VcpuId, _msr: Msr, _value: u64) -> Result<(), Fault> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn an_answered_access_is_not_answered_again_after_eintr() {
    let Some((kvm, probed)) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let asked = Arc::new(AtomicU64::new(0));
        let name: Arc<str> = "counts".into();
        let plan = plan(&map(
            &[(MICROCODE, ReadAction::Handler(name.clone()))],
            &[(MICROCODE, WriteAction::Handler(name))],
        ));
        let handlers = Handlers::new().with("counts", Counts(asked.clone()));
        let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, plan, handlers);
        let accesses = [read(MICROCODE), write(MICROCODE, 5)].repeat(50);
        let seen = guest
            .run(0, &accesses, &mut |pending| {
                let (before, position) = (pending.rip(), pending.position() as u64);
                pending.dispatch(&vcpu).unwrap();
                assert_eq!(asked.load(Ordering::Relaxed), position + 1);
                // A look that comes too often.
                assert_eq!(vcpu.dispatch_vcpu(pending.fd()), Dispatch::NotAnMsrExit);
                // The VMM is asked to leave; it looks at `kvm_run` although KVM_RUN said EINTR.
                let fd = pending.fd();
                fd.set_kvm_immediate_exit(1);
                assert_eq!(fd.run().unwrap_err().errno(), 4);
                assert_eq!(vcpu.dispatch_vcpu(fd), Dispatch::NotAnMsrExit);
                fd.set_kvm_immediate_exit(0);
                // The access is complete: the instruction is behind the guest.
                let regs = fd.get_regs().unwrap();
                assert_eq!(regs.rip, before + 2);
                if position % 2 == 0 {
                    assert_eq!(regs.rax & 0xffff_ffff, position);
                }
                assert_eq!(vcpu.drain_vcpu(fd).unwrap(), DrainStatus::Idle);
                assert_eq!(fd.get_regs().unwrap(), regs);
            })
            .unwrap();
        let expected = (0..50).flat_map(|n| [Outcome::Value(2 * n), Outcome::Done]);
        assert!(outcomes(seen).into_iter().eq(expected));
        assert_eq!(asked.load(Ordering::Relaxed), 100);
    }
}

#[test]
fn the_kernel_leaves_a_stale_exit_reason_beside_eintr() {
    // What the test above guards against: without a dispatch the old number is still there.
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, _vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &[])), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE)], &mut |pending| {
            pending.answer(|_| Ok(9), |_, _| Ok(()));
            let fd = pending.fd();
            fd.set_kvm_immediate_exit(1);
            assert_eq!(fd.run().unwrap_err().errno(), 4);
            fd.set_kvm_immediate_exit(0);
            assert_eq!(fd.get_kvm_run().exit_reason, abi::EXIT_X86_RDMSR);
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(9)]);
}

#[test]
fn draining_completes_the_answer_and_refuses_an_exit_without_one() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(0x77)), (UNKNOWN, ReadAction::Deny)];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan(&map(&reads, &[])), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE), read(UNKNOWN)], &mut |pending| {
            let before = pending.rip();
            let fd = pending.fd();
            assert_eq!(vcpu.drain_vcpu(fd).unwrap(), DrainStatus::Unanswered);
            assert_eq!(fd.get_regs().unwrap().rip, before);
            assert!(matches!(vcpu.dispatch_vcpu(fd), Dispatch::Answered(_)));
            assert_eq!(vcpu.drain_vcpu(fd).unwrap(), DrainStatus::Idle);
            assert_eq!(fd.get_kvm_run().immediate_exit, 0);
            let regs = fd.get_regs().unwrap();
            if pending.position() == 0 {
                assert_eq!((regs.rip, regs.rax), (before + 2, 0x77));
            } else {
                // #GP waits to be delivered.
                let exception = pending.fd().get_vcpu_events().unwrap().exception;
                assert_eq!((exception.nr, exception.error_code, regs.rip), (13, 0, before));
            }
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(0x77), Outcome::Fault]);
}

#[test]
fn an_exit_of_a_filter_that_is_not_ours_faults() {
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&reads, &[])), Handlers::new());
    // Somebody else replaces the filter behind our back.
    let filter = Filter::new(
        Verdict::Allow,
        vec![FilterRange::new(SYSENTER_CS.0, 1, Ops::BOTH, vec![0]).unwrap()],
    )
    .unwrap();
    set_filter(&guest, &filter);
    let seen = run(&mut guest, &vcpu, &[read(SYSENTER_CS), read(APIC_BASE)]);
    assert_eq!(outcomes(&seen), [Outcome::Fault, APIC_BASE_VALUE]);
    assert_eq!(did(&seen[0]), (Disposition::Fault, Some(FaultCause::NoRule)));
    // Nor is it answered by a plan that is over.
    let next = [(SYSENTER_CS, ReadAction::Value(2))];
    gate.replace(plan(&map(&next, &[]))).unwrap();
    assert_eq!(
        outcomes(&run(&mut guest, &vcpu, &[read(SYSENTER_CS)])),
        [Outcome::Value(2)]
    );
    set_filter(&guest, plan(&map(&reads, &[])).filter());
    let seen = run(&mut guest, &vcpu, &[read(MICROCODE)]);
    assert_eq!(did(&seen[0]), (Disposition::Fault, Some(FaultCause::NoRule)));
}

fn set_filter(guest: &Guest, filter: &Filter) {
    let ranges: Vec<_> = filter
        .ranges()
        .iter()
        .map(|range| (range, range.bitmap_bytes()))
        .collect();
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(range, bytes)| kvm_ioctls::MsrFilterRange {
            flags: kvm_ioctls::MsrFilterRangeFlags::from_bits_truncate(range.ops().bits()),
            base: range.base(),
            msr_count: range.nmsrs(),
            bitmap: bytes,
        })
        .collect();
    let default = match filter.default_verdict() {
        Verdict::Allow => kvm_ioctls::MsrFilterDefaultAction::ALLOW,
        Verdict::Deny => kvm_ioctls::MsrFilterDefaultAction::DENY,
    };
    guest.vm().set_msr_filter(default, &ranges).unwrap();
}
