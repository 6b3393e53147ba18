//! Which accesses are asked about at all.

use kvm_bindings::kvm_regs;
use msrgate_core::{Access, Msr, Ops, Outcome};
use msrgate_engine::{Instruction, Intercepts, Path, Step, Vcpu, Vm};
use msrgate_guest::{Mode, Options};

use super::code::{self, CODE, OUT, Pages};
use super::hypervisor::{
    Came, EXIT_IO, FILTER, Hypervisor, KERNEL_GS_BASE, RunMsr, SYSENTER_CS, denying, everywhere, on_the_kernel,
};
use super::kernel::{Kernel, Module, TurnedOn, parameter};
use super::live::Live;

const TSC: Msr = Msr(0x10);
const APIC_BASE: Msr = Msr(0x1b);
const TSC_DEADLINE: Msr = Msr(0x6e0);
const EFER: Msr = Msr(0xc000_0080);
const STAR: Msr = Msr(0xc000_0081);
const LSTAR: Msr = Msr(0xc000_0082);
const SFMASK: Msr = Msr(0xc000_0084);

#[test]
fn kvm_get_msrs_and_kvm_set_msrs_are_not_filtered() {
    everywhere(|vm| {
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[SYSENTER_CS, KERNEL_GS_BASE]);
        for msr in [SYSENTER_CS, KERNEL_GS_BASE] {
            assert!(vm.host_write(msr, 0x1234));
            assert_eq!(vm.host_read(msr), Some(0x1234));
            assert_eq!(vm.read(msr).reason(), 4);
        }
        // What user space is told of is not what the register holds.
        vm.answer(0, 5);
        assert_eq!(vm.go_on(), Came::Done { rax: 5, rdx: 0 });
    });
}

#[test]
fn kvm_get_sregs_and_kvm_set_sregs_are_not_filtered() {
    on_the_kernel(|live| {
        let vm: &mut dyn Hypervisor = live;
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[EFER, APIC_BASE, Msr(0xc000_0100), Msr(0xc000_0101)]);
        let mut sregs = live.fd().get_sregs().unwrap();
        // System calls on.
        sregs.efer |= 1;
        live.fd().set_sregs(&sregs).unwrap();
        assert_eq!(live.fd().get_sregs().unwrap().efer, sregs.efer);
    });
}

#[test]
fn efer_and_the_apic_base_are_filtered_like_any_other() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        vm.deny(Ops::BOTH, &[EFER, APIC_BASE]);
        for msr in [EFER, APIC_BASE] {
            assert_eq!(vm.read(msr).reason(), 4);
            vm.answer(0, 0x42);
            assert_eq!(vm.go_on(), Came::Done { rax: 0x42, rdx: 0 });
            assert_eq!(vm.write(msr, 0).reason(), 4);
        }
    });
}

#[test]
fn every_msr_that_is_passed_through_is_filtered() {
    everywhere(|vm| {
        vm.mask(FILTER).unwrap();
        let msrs = [
            0x174,
            0x175,
            0x176,
            0xc000_0081,
            0xc000_0082,
            0xc000_0083,
            0xc000_0084,
            0xc000_0100,
            0xc000_0101,
            0xc000_0102,
        ];
        let msrs = msrs.map(Msr);
        vm.deny(Ops::BOTH, &msrs);
        for msr in msrs {
            assert_eq!(vm.read(msr).reason(), 4, "{msr}");
            assert_eq!(vm.write(msr, 0).reason(), 4, "{msr}");
        }
    });
}

/// Runs a program of 64-bit code while `msrs` are denied, until it leaves the guest for user space.
fn run_code(program: &[u8], msrs: &[Msr], prepare: impl Fn(&mut Live) -> kvm_regs, look: impl Fn(&mut Live, u32)) {
    let Some(kernel) = Kernel::running() else { return };
    let mut live = Live::new(&kernel, Mode::Long, Options::default());
    let page = Pages::with(&[program]);
    page.map(live.guest.vm());
    let regs = prepare(&mut live);
    {
        let vm: &mut dyn Hypervisor = &mut live;
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, msrs);
    }
    code::enter(&mut live, regs);
    assert_eq!(live.run(), Ok(()));
    let exit_reason = live.exit_reason();
    look(&mut live, exit_reason);
    // The VM before its memory.
    drop(live);
    drop(page);
}

#[test]
fn rdtsc_is_not_a_read_of_the_tsc_s_msr() {
    let rdtsc = [&[0x0f, 0x31][..], &OUT].concat();
    let prepare = |_: &mut Live| kvm_regs::default();
    run_code(&rdtsc, &[TSC], prepare, |live, exit_reason| {
        assert_eq!(exit_reason, EXIT_IO);
        let regs = live.fd().get_regs().unwrap();
        assert_ne!(regs.rax | regs.rdx, 0);
    });
}

#[test]
fn syscall_is_no_read_of_the_msrs_that_it_uses() {
    // SYSCALL to the OUT behind it.
    let syscall = [&[0x0f, 0x05][..], &OUT].concat();
    let prepare = |live: &mut Live| {
        let mut sregs = live.fd().get_sregs().unwrap();
        // System calls on.
        sregs.efer |= 1;
        live.fd().set_sregs(&sregs).unwrap();
        // The guest's code segment is 8, and its data segment the next.
        assert!(live.host_write(STAR, 8 << 32));
        assert!(live.host_write(LSTAR, CODE + 2));
        assert!(live.host_write(SFMASK, 0));
        kvm_regs::default()
    };
    run_code(&syscall, &[EFER, STAR, LSTAR, SFMASK], prepare, |live, exit_reason| {
        assert_eq!(exit_reason, EXIT_IO);
        assert_eq!(live.fd().get_regs().unwrap().rcx, CODE + 2);
    });
}

#[test]
fn swapgs_is_no_access_to_the_msrs_that_it_swaps() {
    // As the host's own KVM has no hardware to do it, its emulator would have to.
    let Some(kernel) = Kernel::running() else { return };
    if kernel.module == Module::Software {
        println!("skipped: this KVM's emulator does not know SWAPGS");
        return;
    }
    let swapgs = [&[0x0f, 0x01, 0xf8][..], &OUT].concat();
    let prepare = |live: &mut Live| {
        assert!(live.host_write(KERNEL_GS_BASE, 0x1234_5000));
        kvm_regs::default()
    };
    let msrs = [KERNEL_GS_BASE, Msr(0xc000_0101)];
    run_code(&swapgs, &msrs, prepare, |live, exit_reason| {
        assert_eq!(exit_reason, EXIT_IO);
        assert_eq!(live.host_read(Msr(0xc000_0101)), Some(0x1234_5000));
        assert_eq!(live.host_read(KERNEL_GS_BASE), Some(0));
    });
}

#[test]
fn the_emulator_hands_over_the_same_exit_and_ends_behind_what_it_decoded() {
    let Some(_on) = TurnedOn::in_a_lane("force_emulation_prefix") else {
        return;
    };
    // The prefix by which a guest asks KVM to emulate, then RDMSR.
    let rdmsr = [&[0x0f, 0x0b, b'k', b'v', b'm', 0x0f, 0x32][..], &OUT].concat();
    let prepare = |_: &mut Live| kvm_regs {
        rax: 0x55,
        rcx: SYSENTER_CS.0.into(),
        ..Default::default()
    };
    run_code(&rdmsr, &[SYSENTER_CS], prepare, |live, exit_reason| {
        assert_eq!(exit_reason, 29);
        let vm: &mut dyn Hypervisor = live;
        let expected = RunMsr {
            error: 0,
            pad: [0; 7],
            reason: 4,
            index: SYSENTER_CS.0,
            data: 0,
        };
        assert_eq!(vm.run_msr(), expected);
        assert_eq!((vm.registers().rip, vm.registers().rax), (CODE + 5, 0x55));
        vm.answer(0, 0x66);
        vm.drain();
        assert_eq!((vm.registers().rip, vm.registers().rax), (CODE + 7, 0x66));
    });
}

#[test]
fn above_privilege_level_0_an_access_faults_before_anybody_is_asked() {
    on_the_kernel(|live| {
        if live.mode == Mode::Real {
            return;
        }
        // 32-bit code without paging, so that no page belongs to the supervisor. Level 0 is asked for, level 3 is not:
        // its #GP finds no handler, and the guest shuts down.
        for level in [0u8, 3] {
            let kernel = live.kernel.clone();
            let mut live = Live::new(&kernel, Mode::Long, Options::default());
            let page = Pages::with(&[&[&[0x0f, 0x32][..], &OUT].concat()]);
            page.map(live.guest.vm());
            {
                let vm: &mut dyn Hypervisor = &mut live;
                vm.mask(FILTER).unwrap();
                vm.deny(Ops::BOTH, &[SYSENTER_CS]);
            }
            let mut sregs = live.fd().get_sregs().unwrap();
            (sregs.cr0, sregs.efer) = (sregs.cr0 & !(1 << 31), 0);
            (sregs.cs.l, sregs.cs.db, sregs.cs.dpl) = (0, 1, level);
            sregs.cs.selector = 8 | u16::from(level);
            for segment in [
                &mut sregs.ss,
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
            ] {
                (segment.dpl, segment.selector) = (level, 0x10 | u16::from(level));
            }
            sregs.idt.limit = 0;
            live.fd().set_sregs(&sregs).unwrap();
            code::enter(
                &mut live,
                kvm_regs {
                    rcx: SYSENTER_CS.0.into(),
                    ..Default::default()
                },
            );
            assert_eq!(live.run(), Ok(()));
            let expected = if level == 0 {
                29
            } else {
                kvm_bindings::KVM_EXIT_SHUTDOWN
            };
            assert_eq!(live.exit_reason(), expected, "level {level}");
            drop(live);
            drop(page);
        }
    });
}

/// A guest whose local APIC is in the kernel, in x2APIC mode, with its timer in TSC-deadline mode.
fn with_apic(kernel: &Kernel, mode: Mode) -> Live {
    let kvm = kvm_ioctls::Kvm::new().unwrap();
    let mut cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            // TSC deadline, which KVM emulates without saying so there.
            entry.ecx |= 1 << 24;
        }
    }
    let options = Options {
        cpuid: Some(cpuid),
        irqchip: true,
        ..Default::default()
    };
    let mut live = Live::new(kernel, mode, options);
    let accesses = [
        (APIC_BASE, 0xfee0_0d00),
        // Spurious vector, APIC enabled.
        (Msr(0x80f), 0x1ff),
        // Timer: TSC deadline, masked, vector 0xff.
        (Msr(0x832), 0x5_00ff),
    ];
    let accesses = accesses.map(|(msr, value)| Access::Write { msr, value });
    let seen = live.batch(&accesses, &mut |_| Outcome::Fault);
    assert_eq!(seen, [(Outcome::Done, 0); 3]);
    live
}

#[test]
fn registers_of_a_local_apic_in_x2apic_mode_are_never_filtered() {
    let Some(kernel) = Kernel::running() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut live = with_apic(&kernel, mode);
        let vm: &mut dyn Hypervisor = &mut live;
        vm.mask(7).unwrap();
        vm.deny(Ops::BOTH, &[Msr(0x802), Msr(0x808), Msr(0x830), Msr(0x80b)]);
        let accesses = [
            Access::Read { msr: Msr(0x802) },
            Access::Write {
                msr: Msr(0x808),
                value: 0x20,
            },
            Access::Read { msr: Msr(0x808) },
            // A fixed interrupt to nobody.
            Access::Write {
                msr: Msr(0x830),
                value: 7 << 32 | 0xfe,
            },
            Access::Write {
                msr: Msr(0x80b),
                value: 0,
            },
        ];
        let seen = vm.batch(&accesses, &mut |access| panic!("{access:x?}"));
        assert_eq!(
            seen,
            [
                (Outcome::Value(0), 0),
                (Outcome::Done, 0),
                (Outcome::Value(0x20), 0),
                (Outcome::Done, 0),
                (Outcome::Done, 0),
            ]
        );
    }
}

#[test]
fn a_denied_write_of_tsc_deadline_is_handed_over_or_done_as_the_profile_says_and_a_read_is_handed_over() {
    let Some(kernel) = Kernel::running() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut live = with_apic(&kernel, mode);
        let vm: &mut dyn Hypervisor = &mut live;
        vm.mask(FILTER).unwrap();
        let filter = denying(Ops::BOTH, &[TSC_DEADLINE]);
        vm.install(&filter);
        // Far from now, and not so far that the difference would not fit the hardware's timer.
        let deadline = vm.host_read(TSC).unwrap() + (1 << 40);
        let write = Access::Write {
            msr: TSC_DEADLINE,
            value: deadline,
        };
        let writes = vm.batch(&[write; 50], &mut |_| Outcome::Done);
        let handed_over = writes.iter().filter(|(_, reason)| *reason == 4).count();
        assert!(writes.iter().all(|(outcome, _)| *outcome == Outcome::Done));
        let held = vm.host_read(TSC_DEADLINE).unwrap();
        let reads = vm.batch(&[Access::Read { msr: TSC_DEADLINE }; 50], &mut |_| Outcome::Value(3));
        assert_eq!(reads, [(Outcome::Value(3), 4); 50]);

        // The engine's, on the path that this kernel's accesses come by.
        let fastpath = match kernel.module {
            // From 6.18 on it needs no timer of the hardware's.
            Module::Intel => kernel.version >= (6, 18) || parameter("kvm_intel", "preemption_timer"),
            Module::Amd => parameter("kvm_amd", "nrips"),
            Module::Software => false,
        };
        let path = match kernel.vendor() {
            Some(vendor) if fastpath => Path::Fastpath(vendor),
            _ => Path::VmExit,
        };
        let engine = std::sync::Arc::new(Vm::new().with_profile(kernel.profile()));
        engine.set_reasons(msrgate_core::Reasons::of(msrgate_core::Reason::Filter));
        engine.set_filter(filter);
        let mut vcpu = Vcpu::new(engine, Intercepts::all());
        let instruction = Instruction::Wrmsr {
            rcx: TSC_DEADLINE.0.into(),
            rax: deadline & 0xffff_ffff,
            rdx: deadline >> 32,
        };
        let mut register = Register(0);
        let step = vcpu.execute(instruction, path, &mut register).unwrap();
        println!("{mode:?}: {handed_over} of 50 handed over, the register holds {held:#x}");
        match step {
            Step::Exit(_) => assert_eq!((handed_over, held), (50, 0)),
            _ => assert_eq!((handed_over, held), (0, deadline)),
        }
        assert_eq!(register.0, held);
    }
}

/// One register.
struct Register(u64);

impl msrgate_engine::Msrs for Register {
    fn read(&mut self, _: Msr) -> Result<u64, msrgate_engine::Refusal> {
        Ok(self.0)
    }

    fn write(&mut self, _: Msr, value: u64) -> Result<(), msrgate_engine::Refusal> {
        self.0 = value;
        Ok(())
    }
}
