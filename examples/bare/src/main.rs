//! A thin hypervisor on `msrgate-engine`: boots Linux on real SVM or VMX, and decides each RDMSR and WRMSR of it by a policy that
//! was compiled with the hypervisor.
//!
//! ```text
//! QEMU, GRUB → boot.s → start: linux.rs finds the machine, hypervisor.rs its policies, svm.rs or vmx.rs the guest
//!                         │
//!   run ┌→ bitmap.rs: pick the filter up ─→ processor.rs: enter the guest ─ RDMSR, where the bitmap has its bit ─┐
//!       └─ registers, RIP or #GP ← engine ← the policy's table, if the filter denies; msrs.rs, if it allows ←────┘
//! ```
//!
//! The function `run` below is what a hypervisor needs of the engine. The rest is what any hypervisor needs, in as few lines as a
//! guest can live with: the guest has the machine for itself, but for the memory of the hypervisor, MSRs, CPUID, XSETBV and the
//! port that turns the machine off. `cargo xtask bare` builds and boots it in an emulator. See the README for what it is not.
#![no_std]
#![no_main]

extern crate alloc;

mod memory;
mod heap;
mod machine;
mod processor;
mod linux;
mod svm;
mod vmx;
mod counts;
mod hypervisor;
mod msrs;
mod bitmap;
mod cpuid;
mod cases;
mod boot;

use msrgate_engine::{Completion, Path, Step};

use crate::bitmap::Bitmap;
use crate::hypervisor::Hypervisor;
use crate::msrs::Machine;
use crate::processor::{Event, Exit, Guest};

/// Runs a guest on this processor.
fn run(hypervisor: &Hypervisor, number: usize, guest: &mut Guest) -> ! {
    let cpu = &hypervisor.cpus[number];
    let counts = &cpu.counts;
    let mut bitmap = Bitmap::new(hypervisor.options);
    let mut states = hypervisor.states();
    hypervisor.starts();
    loop {
        cpu.enters();
        if bitmap.follow(&mut guest.vcpu, &mut *guest.processor) {
            counts::add(&counts.bitmaps);
        }
        let exit = guest.processor.enter(&mut guest.registers);
        cpu.left();
        counts.exit(exit, guest.registers.rcx);
        match exit {
            Exit::Msr(op) => {
                let instruction = guest.instruction(op);
                let mut machine = Machine {
                    processor: &mut *guest.processor,
                    hypervisor,
                    number,
                };
                let completion = match guest.vcpu.execute(instruction, Path::VmExit, &mut machine) {
                    Ok(Step::Complete(completion)) => completion,
                    // Where KVM asks user space, this hypervisor asks the table that came with the filter.
                    Ok(Step::Exit(exit)) => {
                        counts::add(&counts.deflected);
                        let table = guest.vcpu.table().expect("filters come with tables");
                        let state = &mut states[hypervisor.which(table)];
                        let answer = table.answer(exit, state, &mut machine);
                        guest.vcpu.answer(answer.outcome).expect("it waits")
                    }
                    other => panic!("{other:?}"),
                };
                if completion == Completion::Fault {
                    counts::add(&counts.faults);
                }
                guest.complete(completion);
            }
            Exit::Cpuid => {
                cpuid::answer(&mut guest.registers, guest.processor.cr4());
                guest.processor.skip();
            }
            Exit::Port { write: true } => {
                let value = guest.registers.rax as u16;
                if value & machine::SLEEP != 0 {
                    hypervisor.report();
                }
                machine::outw(hypervisor.port, value);
                guest.processor.skip();
            }
            Exit::Port { write: false } => {
                let value = machine::inw(hypervisor.port);
                guest.registers.rax = guest.registers.rax & !0xffff | u64::from(value);
                guest.processor.skip();
            }
            Exit::Xsetbv => {
                let processor::Registers { rax, rcx, rdx, .. } = guest.registers;
                machine::xsetbv(rcx as u32, rdx << 32 | rax & 0xffff_ffff);
                guest.processor.skip();
            }
            Exit::Nmi if cpu.was_kicked() => counts::add(&counts.kicks),
            Exit::Nmi => guest.processor.inject(Event::Nmi),
            Exit::Nothing => guest.processor.skip(),
            Exit::Undefined => guest.processor.inject(Event::Undefined),
            Exit::Unexpected { .. } => {
                hypervisor.report();
                panic!("{exit:x?}");
            }
        }
    }
}
