//! What a thread's own seccomp filters say of a call that it does not make yet.

#![expect(unsafe_code, reason = "a request of ptrace that has no wrapper")]

use libc::{c_long, c_uint, seccomp_data, sock_filter};
use nix::errno::Errno;
use nix::unistd::Pid;

use crate::target;

/// `PTRACE_SECCOMP_GET_FILTER`.
const GET_FILTER: c_uint = 0x420c;
/// `BPF_MAXINSNS`.
const MOST: usize = 4096;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `FUTEX_WAIT_PRIVATE` and `FUTEX_WAKE_PRIVATE`.
pub(crate) const WAIT: u64 = 0x80;
pub(crate) const WAKE: u64 = 0x81;

/// How many filters a thread has.
pub(crate) fn filters(thread: i32) -> i64 {
    target::status(thread, "Seccomp_filters").unwrap_or(0)
}

/// Whether a thread that stands still, with so many filters, may wait for another one and wake it.
pub(crate) fn lets_wait(thread: Pid, filters: i64) -> bool {
    let mut operations = [WAIT, WAKE].into_iter();
    operations.all(|operation| lets(thread, filters, libc::SYS_futex, operation))
}

/// Whether each filter of a thread that stands still, with so many filters, lets a call with this second argument through; a filter
/// that is not told lets none.
pub(crate) fn lets(thread: Pid, filters: i64, call: c_long, argument: u64) -> bool {
    let data = seccomp_data {
        nr: call as i32,
        arch: AUDIT_ARCH_X86_64,
        instruction_pointer: 0,
        args: [0, argument, 0, 0, 0, 0],
    };
    (0..filters).all(|number| {
        let program = filter(thread, number as usize).unwrap_or_default();
        let allowed = [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_LOG];
        verdict(&program, &data).is_some_and(|verdict| allowed.contains(&(verdict & libc::SECCOMP_RET_ACTION_FULL)))
    })
}

fn filter(thread: Pid, number: usize) -> Result<Vec<sock_filter>, Errno> {
    let nothing = sock_filter {
        code: 0,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let mut program = vec![nothing; MOST];
    // SAFETY: the kernel writes no more instructions than a filter has, which are `MOST` at most.
    let count = unsafe { libc::ptrace(GET_FILTER, thread.as_raw(), number, program.as_mut_ptr()) };
    program.truncate(usize::try_from(count).map_err(|_| Errno::last())?);
    Ok(program)
}

/// What a filter gives for a call (`seccomp_check_filter` has the instructions that there are); `None` for what no filter does.
fn verdict(program: &[sock_filter], data: &seccomp_data) -> Option<u32> {
    use libc::{
        BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_AND, BPF_DIV, BPF_IMM, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP,
        BPF_JSET, BPF_LD, BPF_LDX, BPF_LEN, BPF_LSH, BPF_MEM, BPF_MISC, BPF_MUL, BPF_NEG, BPF_OR, BPF_RET, BPF_RSH,
        BPF_ST, BPF_STX, BPF_SUB, BPF_TAX, BPF_X, BPF_XOR,
    };
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let mut words = vec![data.nr.cast_unsigned(), data.arch];
    words.extend(halves(data.instruction_pointer));
    words.extend(data.args.into_iter().flat_map(halves));
    let (mut a, mut x, mut memory, mut at) = (0_u32, 0_u32, [0_u32; 16], 0_usize);
    loop {
        let sock_filter { code, jt, jf, k } = *program.get(at)?;
        let (code, place) = (u32::from(code), k as usize);
        let operand = if code & 0x08 == BPF_X { x } else { k };
        at += 1;
        match code & 0x07 {
            BPF_RET => return Some(if code & 0x18 == BPF_A { a } else { k }),
            kind @ (BPF_LD | BPF_LDX) => {
                let value = match code & 0xe0 {
                    BPF_ABS => *words.get(place / 4)?,
                    BPF_IMM => k,
                    BPF_MEM => *memory.get(place)?,
                    BPF_LEN => size_of::<seccomp_data>() as u32,
                    _ => return None,
                };
                *(if kind == BPF_LD { &mut a } else { &mut x }) = value;
            }
            BPF_ST => *memory.get_mut(place)? = a,
            BPF_STX => *memory.get_mut(place)? = x,
            BPF_ALU => {
                a = match code & 0xf0 {
                    BPF_ADD => a.wrapping_add(operand),
                    BPF_SUB => a.wrapping_sub(operand),
                    BPF_MUL => a.wrapping_mul(operand),
                    BPF_DIV => a.checked_div(operand)?,
                    BPF_AND => a & operand,
                    BPF_OR => a | operand,
                    BPF_XOR => a ^ operand,
                    BPF_LSH => a.wrapping_shl(operand),
                    BPF_RSH => a.wrapping_shr(operand),
                    BPF_NEG => a.wrapping_neg(),
                    _ => return None,
                };
            }
            BPF_JMP => {
                let taken = match code & 0xf0 {
                    BPF_JA => {
                        at = at.checked_add(place)?;
                        continue;
                    }
                    BPF_JEQ => a == operand,
                    BPF_JGT => a > operand,
                    BPF_JGE => a >= operand,
                    BPF_JSET => a & operand != 0,
                    _ => return None,
                };
                at += usize::from(if taken { jt } else { jf });
            }
            BPF_MISC if code & 0xf8 == BPF_TAX => x = a,
            BPF_MISC => a = x,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
        sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        }
    }

    #[test]
    fn a_filter_gives_what_the_kernel_takes_of_it() {
        use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_LD, BPF_RET, BPF_W};
        let program = [
            instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
            instruction(BPF_JMP | BPF_JEQ, libc::SYS_futex as u32, 0, 3),
            instruction(BPF_LD | BPF_W | BPF_ABS, 24, 0, 0),
            instruction(BPF_JMP | BPF_JEQ, 0x80, 0, 1),
            instruction(BPF_RET, libc::SECCOMP_RET_ALLOW, 0, 0),
            instruction(BPF_RET, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
        ];
        let given = |call: i64, operation: u64| {
            let data = seccomp_data {
                nr: call as i32,
                arch: AUDIT_ARCH_X86_64,
                instruction_pointer: 0,
                args: [0, operation, 0, 0, 0, 0],
            };
            verdict(&program, &data)
        };
        assert_eq!(given(libc::SYS_futex, 0x80), Some(libc::SECCOMP_RET_ALLOW));
        assert_eq!(given(libc::SYS_futex, 0x81), Some(libc::SECCOMP_RET_KILL_PROCESS));
        assert_eq!(given(libc::SYS_read, 0x80), Some(libc::SECCOMP_RET_KILL_PROCESS));
        assert_eq!(
            verdict(
                &program[..1],
                &seccomp_data {
                    nr: 0,
                    arch: 0,
                    instruction_pointer: 0,
                    args: [0; 6]
                }
            ),
            None
        );
    }
}
