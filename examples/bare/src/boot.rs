//! From `boot.s` to the loop: what is booted, on which processors, by which hardware.

#![expect(unsafe_code, reason = "names that boot.s calls, and where other processors start")]

use alloc::boxed::Box;
use core::arch::x86_64::__cpuid;

use msrgate_engine::Vcpu;
use spin::Once;

use crate::hypervisor::Hypervisor;
use crate::linux::{self, Entry};
use crate::machine::{self, Serial};
use crate::processor::{Guest, Registers};
use crate::svm::Svm;
use crate::vmx::Vmx;
use crate::{cases, heap, memory, msrs, run, say};

/// Set before a second processor starts.
static HYPERVISOR: Once<Hypervisor> = Once::new();

unsafe extern "C" {
    static other_start: u8;
    static other_start_end: u8;
}

/// Where the code is copied to that other processors start with: the page that a start-up IPI names.
const OTHER_START: u64 = 0x8000;

/// The first processor. `info` is what the loader gives.
#[unsafe(no_mangle)]
extern "sysv64" fn start(info: u64) -> ! {
    heap::set_up();
    Serial::set_up();
    machine::catch_faults();
    let amd = __cpuid(0).ebx == u32::from_le_bytes(*b"Auth");
    let boot = linux::find(info);
    let hypervisor = HYPERVISOR.call_once(|| Hypervisor::new(&boot.processors, amd, boot.port, &boot.command_line));
    if hypervisor.options.cases {
        let port = hypervisor.port;
        cases::serve(&mut guest(hypervisor, &linux::cases()), amd, boot.record(), || {
            machine::outw(port, machine::SLEEP)
        });
    }
    let entry = boot.place(hypervisor.cpus.len() > 1);
    start_others(hypervisor);
    say!("processors {} svm {}", hypervisor.cpus.len(), u8::from(amd));
    run(hypervisor, 0, &mut guest(hypervisor, &entry))
}

/// Every other one; `number` counts from 1, in the order in which they start.
#[unsafe(no_mangle)]
extern "sysv64" fn start_other(number: u32) -> ! {
    machine::catch_faults();
    let number = number as usize;
    let hypervisor = HYPERVISOR.get().expect("the first processor made it");
    run(
        hypervisor,
        number,
        &mut guest(hypervisor, &linux::waiting(hypervisor.cpus[number].id)),
    )
}

/// Starts the others one after the other, each by INIT and start-up.
fn start_others(hypervisor: &Hypervisor) {
    const INIT: u32 = 0x4500;
    const START_UP: u32 = 0x4600;
    // SAFETY: labels of boot.s, where code lies.
    let code = unsafe { (&other_start, &other_start_end) };
    for cpu in hypervisor.cpus.iter().skip(1) {
        memory::write(OTHER_START, memory::code(code.0, code.1));
        machine::interprocessor(cpu.id, INIT);
        machine::pause(20_000_000);
        machine::interprocessor(cpu.id, START_UP | (OTHER_START >> 12) as u32);
        while !cpu.is_ready() {
            core::hint::spin_loop();
        }
    }
}

/// Makes this processor a guest's, which starts at `entry`.
fn guest(hypervisor: &Hypervisor, entry: &Entry) -> Guest {
    let mut registers = Registers::new();
    (registers.rsi, registers.rdi) = (entry.rsi, entry.rdi);
    Guest {
        processor: match hypervisor.amd {
            true => Box::new(Svm::new(entry, hypervisor.port)),
            false => Box::new(Vmx::new(entry, hypervisor.port)),
        },
        vcpu: Vcpu::new(hypervisor.vm.clone(), msrs::intercepts(hypervisor.amd)),
        registers,
    }
}
