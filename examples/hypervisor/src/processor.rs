//! The processor: interprets the guest and asks the bitmap which accesses leave it.

use msrgate_core::Op;
use msrgate_engine::{Advance, Completion, Instruction as MsrInstruction, Intercepts, Vendor, Written};

use crate::guest::{Instruction, Notes, PROGRAM, Register};
use crate::msrs::Registers;

/// What a vCPU's execution consists of; all of it is saved and restored.
#[derive(Clone, Default)]
pub(crate) struct Processor {
    rax: u64,
    rcx: u64,
    rdx: u64,
    rbx: u64,
    rip: usize,
    pub(crate) notes: Notes,
    pub(crate) faults: u64,
    pub(crate) passed_through: u64,
}

/// Why the guest was left.
pub(crate) enum VmExit {
    /// An RDMSR or WRMSR that the bitmap intercepts; RIP still points at it.
    Msr(MsrInstruction),
    /// The hypervisor wants the processor.
    Interrupt,
    Halt,
}

impl Processor {
    /// Executes the guest until something leaves it.
    pub(crate) fn enter(
        &mut self,
        vendor: Vendor,
        intercepts: &Intercepts,
        registers: &mut Registers,
        interrupted: impl Fn() -> bool,
    ) -> VmExit {
        while !interrupted() {
            match PROGRAM.get(self.rip) {
                Some(Instruction::Load(to, value)) => *self.register(*to) = *value,
                Some(Instruction::Move(to, from)) => *self.register(*to) = *self.register(*from),
                Some(Instruction::Note(site)) => self.notes.add(*site, self.rax),
                Some(Instruction::JumpIfZero(register, target)) => {
                    if *self.register(*register) == 0 {
                        self.rip = *target;
                        continue;
                    }
                }
                Some(Instruction::Rdmsr) => {
                    let index = self.rcx as u32;
                    match registers.physical(index) {
                        Some(register) if !intercepted(vendor, intercepts, index, Op::Read) => {
                            (self.rax, self.rdx) = (*register & 0xffff_ffff, *register >> 32);
                            self.passed_through += 1;
                        }
                        _ => return VmExit::Msr(MsrInstruction::Rdmsr { rcx: self.rcx }),
                    }
                }
                Some(Instruction::Wrmsr) => {
                    let index = self.rcx as u32;
                    match registers.physical(index) {
                        Some(register) if !intercepted(vendor, intercepts, index, Op::Write) => {
                            *register = self.rdx << 32 | self.rax & 0xffff_ffff;
                            self.passed_through += 1;
                        }
                        _ => {
                            let (rcx, rax, rdx) = (self.rcx, self.rax, self.rdx);
                            return VmExit::Msr(MsrInstruction::Wrmsr { rcx, rax, rdx });
                        }
                    }
                }
                Some(Instruction::Halt) | None => return VmExit::Halt,
            }
            self.rip += 1;
        }
        VmExit::Interrupt
    }

    /// Does to the guest what ends its RDMSR or WRMSR. Its handler of #GP goes on with the next instruction.
    pub(crate) fn apply(&mut self, completion: Completion) {
        match completion {
            Completion::Done { written, advance } => {
                if let Written::RaxRdx { rax, rdx } = written {
                    (self.rax, self.rdx) = (rax, rdx);
                }
                match advance {
                    Advance::Skip => self.rip += 1,
                    // Only instructions of an emulator know where the next one is; this hypervisor has none.
                    Advance::To(_) => {}
                }
            }
            Completion::Fault => {
                self.faults += 1;
                self.rip += 1;
            }
        }
    }

    fn register(&mut self, register: Register) -> &mut u64 {
        match register {
            Register::Rax => &mut self.rax,
            Register::Rcx => &mut self.rcx,
            Register::Rdx => &mut self.rdx,
            Register::Rbx => &mut self.rbx,
        }
    }
}

/// What the silicon does: one bit of the page, or of the two pages, that it was given the address of.
///
/// Intel SDM, "MSR-Bitmap Address"; AMD APM vol. 2, "MSR Intercepts".
fn intercepted(vendor: Vendor, intercepts: &Intercepts, index: u32, op: Op) -> bool {
    let write = usize::from(op == Op::Write);
    let offset = (index & 0x1fff) as usize;
    let (words, bit) = match (vendor, index) {
        (Vendor::Intel, 0..=0x1fff) => (intercepts.vmx_bitmap().map(|b| &b.words()[..]), write * 0x4000 + offset),
        (Vendor::Intel, 0xc000_0000..=0xc000_1fff) => (
            intercepts.vmx_bitmap().map(|b| &b.words()[..]),
            write * 0x4000 + 0x2000 + offset,
        ),
        (Vendor::Amd, 0..=0x1fff) => (
            intercepts.svm_permission_map().map(|m| &m.words()[..]),
            2 * offset + write,
        ),
        (Vendor::Amd, 0xc000_0000..=0xc000_1fff) => (
            intercepts.svm_permission_map().map(|m| &m.words()[..]),
            0x4000 + 2 * offset + write,
        ),
        (Vendor::Amd, 0xc001_0000..=0xc001_1fff) => (
            intercepts.svm_permission_map().map(|m| &m.words()[..]),
            0x8000 + 2 * offset + write,
        ),
        _ => return true,
    };
    words.is_none_or(|words| words[bit / 64] >> (bit % 64) & 1 == 1)
}
