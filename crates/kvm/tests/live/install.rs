//! What can be installed, and what the kernel makes of it.

use std::os::fd::AsRawFd;

use msrgate_core::{Disposition, Msr, Nanos, Op, Outcome, ReadAction, Reason, WriteAction, abi};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Dispatch, Handlers, InstallError};

use crate::{MICROCODE, UNKNOWN, did, gated, kvm, map, outcomes, plan, read, run, write};

#[test]
fn what_cannot_be_installed_leaves_the_vm_as_it_was() {
    let Some((kvm, probed)) = kvm() else { return };
    let handled = plan(&map(&[(MICROCODE, ReadAction::Handler("nobody".into()))], &[]));
    let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let error = probed
        .install(guest.vm(), handled.clone(), Handlers::new())
        .unwrap_err();
    assert!(matches!(&error, InstallError::UnknownHandler { name } if &**name == "nobody"));
    let seen = guest.run(0, &[read(MICROCODE)], &mut |_| {}).unwrap();
    assert_eq!(seen[0].exit, None);

    let (mut guest, gate, vcpu) = gated(
        &kvm,
        probed,
        Mode::Real,
        plan(&map(&[(MICROCODE, ReadAction::Value(4))], &[])),
        Handlers::new(),
    );
    assert!(matches!(
        gate.replace(handled),
        Err(InstallError::UnknownHandler { .. })
    ));
    let seen = run(&mut guest, &vcpu, &[read(MICROCODE)]);
    assert_eq!(outcomes(&seen), [Outcome::Value(4)]);

    let plan = plan(&map(&[], &[]));
    let null = std::fs::File::open("/dev/null").unwrap();
    let install = |fd: &dyn AsRawFd| probed.install(&fd.as_raw_fd(), plan.clone(), Handlers::new());
    assert!(matches!(install(&null), Err(InstallError::Kernel { .. })));
    assert!(matches!(install(&kvm), Err(InstallError::Kernel { .. })));
    assert!(matches!(install(&-1), Err(InstallError::Io { .. })));
}

#[test]
fn a_vcpu_is_given_by_the_descriptor_of_a_vcpu_alone() {
    let Some((kvm, probed)) = kvm() else { return };
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let gate = probed
        .install(guest.vm(), plan(&map(&[], &[])), Handlers::new())
        .unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for other in [guest.vm().as_raw_fd(), kvm.as_raw_fd(), null.as_raw_fd()] {
        let error = gate.vcpu(&other, 0).unwrap_err();
        assert!(matches!(error, InstallError::NotAVcpu { .. }), "{error:?}");
    }
    // With CPUID entries and without.
    let bare = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
    assert!(gate.vcpu(&bare, 0).is_ok());
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    bare.set_cpuid2(&cpuid).unwrap();
    assert!(gate.vcpu(&bare, 0).is_ok());
}

#[test]
fn a_host_action_needs_the_msr_device() {
    let Some((kvm, probed)) = kvm() else { return };
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let plan = plan(&map(&[(Msr(0x10), ReadAction::Host)], &[]));
    let installed = probed.install(guest.vm(), plan, Handlers::new());
    match std::fs::File::open("/dev/cpu/0/msr") {
        Ok(_) => {
            let gate = installed.unwrap();
            let mut guest = guest;
            let vcpu = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap();
            let seen = run(&mut guest, &vcpu, &[read(Msr(0x10))]);
            assert_eq!(did(&seen[0]), (Disposition::Host, None));
        }
        Err(_) => {
            let error = installed.unwrap_err();
            assert!(matches!(&error, InstallError::HostMsrs { path, .. } if path.ends_with("cpu/0/msr")));
            assert!(error.to_string().contains("modprobe msr"));
        }
    }
}

#[test]
fn the_capability_takes_three_bits_and_nothing_else() {
    let Some((kvm, _)) = kvm() else { return };
    let guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let enable = |mask: u64, flags: u32| {
        let cap = kvm_bindings::kvm_enable_cap {
            cap: abi::CAP_X86_USER_SPACE_MSR,
            flags,
            args: [mask, u64::MAX, u64::MAX, u64::MAX],
            ..Default::default()
        };
        guest.vm().enable_cap(&cap).map_err(|error| error.errno())
    };
    for bit in 0..64 {
        let expected = if bit < 3 { Ok(()) } else { Err(22) };
        assert_eq!(enable(1 << bit, 0), expected, "bit {bit}");
    }
    for mask in 0..8 {
        assert_eq!(enable(mask, 0), Ok(()));
    }
    assert_eq!(enable(0, 1), Err(22));
}

#[test]
fn the_upper_half_of_rcx_does_not_reach_the_filter() {
    // In long mode the guest's program leaves bits there with each access.
    let Some((kvm, probed)) = kvm() else { return };
    let reads = [(MICROCODE, ReadAction::Value(1))];
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Long, plan(&map(&reads, &[])), Handlers::new());
    let seen = guest
        .run(0, &[read(MICROCODE)], &mut |pending| {
            let regs = pending.fd().get_regs().unwrap();
            assert_eq!(regs.rcx as u32, MICROCODE.0);
            assert_ne!(regs.rcx >> 32, 0);
            assert_eq!(pending.access(), read(MICROCODE));
            pending.dispatch(&vcpu).unwrap();
        })
        .unwrap();
    assert_eq!(outcomes(seen), [Outcome::Value(1)]);
}

#[test]
fn x2apic_registers_and_other_exits_are_not_ours() {
    let Some((kvm, probed)) = kvm() else { return };
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan(&map(&[], &[])), Handlers::new());
    let fd = guest.vcpu(0).unwrap().fd_mut();
    for exit in 0..64 {
        fd.get_kvm_run().exit_reason = exit;
        let mine = exit == abi::EXIT_X86_RDMSR || exit == abi::EXIT_X86_WRMSR;
        assert_eq!(vcpu.dispatch_vcpu(fd) != Dispatch::NotAnMsrExit, mine, "exit {exit}");
        assert_eq!(fd.get_kvm_run().exit_reason, if mine { abi::EXIT_INTR } else { exit });
    }
}

#[test]
fn an_event_tells_what_the_guest_gave_or_got() {
    let Some((kvm, probed)) = kvm() else { return };
    let plan = plan(&map(
        &[(MICROCODE, ReadAction::Value(1)), (UNKNOWN, ReadAction::Deny)],
        &[(UNKNOWN, WriteAction::Ignore)],
    ));
    let (mut guest, _gate, vcpu) = gated(&kvm, probed, Mode::Real, plan, Handlers::new());
    let mut events = Vec::new();
    guest
        .run(
            0,
            &[read(MICROCODE), read(UNKNOWN), write(UNKNOWN, 9)],
            &mut |pending| {
                let rip = pending.rip();
                let answered = pending.dispatch(&vcpu).unwrap();
                events.push(answered.event(Nanos(5), Some(rip)));
            },
        )
        .unwrap();
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.op, event.msr, event.value, event.did, event.rule))
        .collect();
    assert_eq!(
        told,
        [
            (Op::Read, MICROCODE, 1, Disposition::Value, Some(0)),
            (Op::Read, UNKNOWN, 0, Disposition::Deny, Some(1)),
            (Op::Write, UNKNOWN, 9, Disposition::Ignore, Some(0)),
        ]
    );
    for event in &events {
        assert_eq!((event.t, event.vm, event.vcpu), (Nanos(5), 6, 7));
        assert_eq!((event.reason, event.why), (Some(Reason::Filter), None));
        assert!(event.rip.is_some());
    }
}
