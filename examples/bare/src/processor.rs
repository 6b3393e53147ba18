//! What SVM and VMX have in common: a guest is entered, and leaves for one of a few reasons.

use alloc::boxed::Box;
use core::ops::Range;

use msrgate_core::Op;
use msrgate_engine::{Completion, Instruction, Vcpu, Written};

/// A processor with a guest.
pub(crate) trait Processor {
    /// Lets the hardware read its MSR bitmap at this address from now on.
    fn set_bitmap(&mut self, address: u64);
    /// Runs the guest until it leaves.
    fn enter(&mut self, registers: &mut Registers) -> Exit;
    /// Past the instruction that left the guest.
    fn skip(&mut self);
    /// Gives the guest an exception or an NMI instead.
    fn inject(&mut self, event: Event);
    /// The guest's value of an MSR that the processor holds apart from its own.
    fn held(&self, msr: u32) -> Option<u64>;
    /// Gives the guest such an MSR's value; `None` for any other.
    fn hold(&mut self, msr: u32, value: u64) -> Option<()>;
    /// The guest's CR4.
    fn cr4(&self) -> u64;
}

/// Why the guest left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// RDMSR or WRMSR, where the bitmap has its bit set.
    Msr(Op),
    Cpuid,
    /// The power-off port, 16 bits wide.
    Port {
        write: bool,
    },
    Xsetbv,
    /// Another processor's kick, or an NMI of the guest's.
    Nmi,
    /// An instruction that the guest has not.
    Undefined,
    /// An instruction without an effect on this guest.
    Nothing,
    /// Something that this hypervisor has no answer to.
    Unexpected {
        reason: u64,
        details: [u64; 2],
        rip: u64,
    },
}

/// What can be injected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    Nmi,
    Undefined,
    /// #GP(0).
    GeneralProtection,
}

impl Event {
    /// The word that a VMCB and a VMCS take alike: vector, type, whether there is an error code, valid.
    pub(crate) const fn word(self) -> u64 {
        const VALID: u64 = 1 << 31;
        match self {
            Event::Nmi => VALID | 2 << 8 | 2,
            Event::Undefined => VALID | 3 << 8 | 6,
            Event::GeneralProtection => VALID | 1 << 11 | 3 << 8 | 13,
        }
    }
}

/// The guest's registers that no VMCB or VMCS has, as `boot.s` loads and stores them; `rax` is among them on VMX alone, and RSP
/// on neither.
#[repr(C, align(16))]
pub(crate) struct Registers {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rbp: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    r11_to_r15: [u64; 5],
    _unused: u64,
    /// x87 and SSE, which the hypervisor's own code uses too. It does not touch the upper halves of AVX.
    fx: [u8; 512],
}

impl Registers {
    /// All 0, the control words as after a reset.
    pub(crate) fn new() -> Registers {
        let mut fx = [0; 512];
        fx[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        fx[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Registers {
            rax: 0,
            rbx: 0,
            rcx: 0,
            rdx: 0,
            rsi: 0,
            rdi: 0,
            rbp: 0,
            r8: 0,
            r9: 0,
            r10: 0,
            r11_to_r15: [0; 5],
            _unused: 0,
            fx,
        }
    }
}

/// One processor's guest.
pub(crate) struct Guest {
    pub(crate) processor: Box<dyn Processor>,
    pub(crate) vcpu: Vcpu,
    pub(crate) registers: Registers,
}

impl Guest {
    /// The instruction that left the guest by an exit for an MSR.
    pub(crate) fn instruction(&self, op: Op) -> Instruction {
        let Registers { rax, rcx, rdx, .. } = self.registers;
        match op {
            Op::Read => Instruction::Rdmsr { rcx },
            Op::Write => Instruction::Wrmsr { rcx, rax, rdx },
        }
    }

    /// Ends it.
    pub(crate) fn complete(&mut self, completion: Completion) {
        match completion {
            Completion::Done { written, .. } => {
                if let Written::RaxRdx { rax, rdx } = written {
                    (self.registers.rax, self.registers.rdx) = (rax, rdx);
                }
                self.processor.skip();
            }
            Completion::Fault => self.processor.inject(Event::GeneralProtection),
        }
    }
}

/// Pages that the hardware reads, for good.
#[repr(C, align(4096))]
pub(crate) struct Pages<const N: usize>(pub(crate) [[u64; 512]; N]);

impl<const N: usize> Pages<N> {
    /// Zeros.
    pub(crate) fn new() -> &'static mut Pages<N> {
        Box::leak(Box::new(Pages([[0; 512]; N])))
    }

    /// All words.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        self.0.as_flattened_mut()
    }

    /// The physical address.
    pub(crate) fn address(&self) -> u64 {
        (&raw const self.0) as u64
    }
}

/// Sets the bits of the power-off port: every other port is the guest's.
pub(crate) fn intercept_port(words: &mut [u64], port: u16) {
    for port in [usize::from(port), usize::from(port) + 1] {
        words[port / 64] |= 1 << (port % 64);
    }
}

/// Maps pages of 2 MiB from 0 on at their own addresses, but not what is `hidden`.
pub(crate) fn map_all_but(hidden: &Range<u64>, entries: &mut [u64], bits: u64) {
    for (address, entry) in (0..).step_by(2 << 20).zip(entries) {
        *entry = if hidden.contains(&address) { 0 } else { address | bits };
    }
}
