//! The guest's program: a loop over the table of accesses that the host wrote.
//!
//! The table starts with the number of entries, in 16 bytes. An entry is 16 bytes:
//!
//! | offset | size | before | after |
//! | --- | --- | --- | --- |
//! | 0 | 4 | the MSR | the same |
//! | 4 | 2 | 0 to read, [`WRITE`] to write | the same |
//! | 6 | 2 | [`NOT_DONE`] | what offset 4 holds, and [`FAULTED`] where #GP came |
//! | 8 | 4 | EAX | EAX |
//! | 12 | 4 | EDX | EDX |
//!
//! At the end it tells the host with OUT rather than HLT, which an in-kernel interrupt controller would keep to itself,
//! and goes back to the start. Interrupts stay off. The only exceptions that it survives are #GP, after which it skips
//! the two bytes of RDMSR or WRMSR, and NMI.

#![expect(unsafe_code, reason = "assembly, and the symbols around it")]

use std::arch::global_asm;

/// Offset 4 of an entry that writes. In long mode it is part of the upper half of RCX, of which QEMU's emulation of SVM
/// lets the lowest two bits into its look into the permission map (`cpu_svm_check_intercept_param`): they stay clear.
pub(crate) const WRITE: u16 = 0x80;
/// Offset 6 of an entry that the guest has not finished.
pub(crate) const NOT_DONE: u16 = 0xffff;
/// Set at offset 6 where the access faulted.
pub(crate) const FAULTED: u16 = 0x100;
/// The OUT port that says that the table is done.
pub(crate) const PORT_DONE: u16 = 0xf4;
/// The OUT port that says that an exception came which the guest cannot go on from.
pub(crate) const PORT_EXCEPTION: u16 = 0xf5;

global_asm!(
    ".pushsection .rodata.msrgate_guest, \"a\"",
    ".code16",
    ".globl msrgate_guest_real, msrgate_guest_real_gp, msrgate_guest_real_nmi",
    ".globl msrgate_guest_real_exception, msrgate_guest_real_end",
    "msrgate_guest_real:",
    "    mov bp, word ptr [0]",
    "    mov si, 16",
    "2:",
    "    mov ecx, dword ptr [si]",
    "    mov bx, word ptr [si + 4]",
    "    mov eax, dword ptr [si + 8]",
    "    mov edx, dword ptr [si + 12]",
    "    test bl, {write}",
    "    jnz 3f",
    "    rdmsr",
    "    jmp 4f",
    "3:  wrmsr",
    "4:",
    "    mov dword ptr [si + 8], eax",
    "    mov dword ptr [si + 12], edx",
    "    mov word ptr [si + 6], bx",
    "    add si, 16",
    "    dec bp",
    "    jnz 2b",
    "    out {done}, al",
    "    jmp msrgate_guest_real",
    "msrgate_guest_real_gp:",
    // On the stack: IP, CS, FLAGS.
    "    push bp",
    "    mov bp, sp",
    "    add word ptr [bp + 2], 2",
    "    pop bp",
    "    mov bh, 1",
    "msrgate_guest_real_nmi:",
    "    iret",
    "msrgate_guest_real_exception:",
    "    out {exception}, al",
    "    jmp msrgate_guest_real_exception",
    "msrgate_guest_real_end:",
    ".code64",
    ".globl msrgate_guest_long, msrgate_guest_long_gp, msrgate_guest_long_nmi",
    ".globl msrgate_guest_long_exception, msrgate_guest_long_end",
    // RDI points to the table.
    "msrgate_guest_long:",
    "    mov ebp, dword ptr [rdi]",
    "    lea rsi, [rdi + 16]",
    "2:",
    // The upper halves of RCX and RAX get what lies behind: the processor ignores them.
    "    mov rcx, qword ptr [rsi]",
    "    mov ebx, dword ptr [rsi + 4]",
    "    mov rax, qword ptr [rsi + 8]",
    "    mov edx, dword ptr [rsi + 12]",
    "    test bl, {write}",
    "    jnz 3f",
    "    rdmsr",
    "    jmp 4f",
    "3:  wrmsr",
    "4:",
    "    mov dword ptr [rsi + 8], eax",
    "    mov dword ptr [rsi + 12], edx",
    "    mov word ptr [rsi + 6], bx",
    "    add rsi, 16",
    "    dec ebp",
    "    jnz 2b",
    "    out {done}, al",
    "    jmp msrgate_guest_long",
    "msrgate_guest_long_gp:",
    // On the stack: the error code, RIP, CS, RFLAGS, RSP, SS.
    "    add qword ptr [rsp + 8], 2",
    "    mov bh, 1",
    "    add rsp, 8",
    "msrgate_guest_long_nmi:",
    "    iretq",
    "msrgate_guest_long_exception:",
    "    out {exception}, al",
    "    jmp msrgate_guest_long_exception",
    "msrgate_guest_long_end:",
    ".popsection",
    write = const WRITE,
    done = const PORT_DONE,
    exception = const PORT_EXCEPTION,
);

unsafe extern "C" {
    static msrgate_guest_real: u8;
    static msrgate_guest_real_gp: u8;
    static msrgate_guest_real_nmi: u8;
    static msrgate_guest_real_exception: u8;
    static msrgate_guest_real_end: u8;
    static msrgate_guest_long: u8;
    static msrgate_guest_long_gp: u8;
    static msrgate_guest_long_nmi: u8;
    static msrgate_guest_long_exception: u8;
    static msrgate_guest_long_end: u8;
}

/// A program and the offsets of its exception handlers. It starts at its first byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    pub(crate) bytes: &'static [u8],
    pub(crate) gp: u16,
    pub(crate) nmi: u16,
    pub(crate) exception: u16,
}

impl Program {
    pub(crate) fn real() -> Program {
        Program::between(
            &raw const msrgate_guest_real,
            [
                &raw const msrgate_guest_real_gp,
                &raw const msrgate_guest_real_nmi,
                &raw const msrgate_guest_real_exception,
                &raw const msrgate_guest_real_end,
            ],
        )
    }

    pub(crate) fn long() -> Program {
        Program::between(
            &raw const msrgate_guest_long,
            [
                &raw const msrgate_guest_long_gp,
                &raw const msrgate_guest_long_nmi,
                &raw const msrgate_guest_long_exception,
                &raw const msrgate_guest_long_end,
            ],
        )
    }

    fn between(start: *const u8, symbols: [*const u8; 4]) -> Program {
        // The symbols lie behind `start`, within some hundred bytes.
        let [gp, nmi, exception, end] = symbols.map(|symbol| symbol.addr().wrapping_sub(start.addr()) as u16);
        Program {
            // SAFETY: `start` and the end symbol bound one run of bytes in a read-only section of this program, which
            // lives as long as it does and which nothing writes.
            bytes: unsafe { std::slice::from_raw_parts(start, usize::from(end)) },
            gp,
            nmi,
            exception,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_lie_within_their_program_in_order() {
        for program in [Program::real(), Program::long()] {
            assert!(program.bytes.len() < 256);
            assert!(0 < program.gp && program.gp < program.nmi && program.nmi < program.exception);
            assert!(usize::from(program.exception) < program.bytes.len());
        }
    }

    #[test]
    fn an_access_is_two_bytes_long_in_both_programs() {
        for program in [Program::real(), Program::long()] {
            for instruction in [[0x0f, 0x32], [0x0f, 0x30]] {
                let found = program.bytes.windows(2).filter(|bytes| *bytes == instruction).count();
                assert_eq!(found, 1);
            }
        }
    }
}
