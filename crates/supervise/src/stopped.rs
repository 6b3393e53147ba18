//! A VMM's thread that is stopped at a call which waits, and calls that are made in it.
//!
//! The order is: the call waits for the supervisor (seccomp); the thread is seized and told to stop; the call gets EINTR,
//! so that the thread comes out of it and stops; calls are made at the thread's own `syscall` instruction; the registers
//! get what the VMM's call is to give; the thread goes on. Before and after nothing is traced.

#![expect(unsafe_code, reason = "requests of ptrace that have no wrapper")]

use libc::{c_int, c_long, user_regs_struct};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::seccomp::{Marks, Waiting};
use crate::target;

/// `PTRACE_O_SUSPEND_SECCOMP`: no seccomp filter looks at the thread's calls while it is traced.
const SUSPEND_SECCOMP: c_int = 1 << 21;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
/// How often a call is made again that a stop interrupts.
const ATTEMPTS: u32 = 16;
/// The instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How threads are stopped on this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopper {
    pub(crate) marks: Marks,
    /// Whether the kernel lets seccomp filters be suspended: it takes CAP_SYS_ADMIN, and no filter on the supervisor.
    suspends: bool,
    /// How many seccomp filters a thread has whose VMM has none of its own.
    filters: i64,
}

/// A thread that does what it is told.
#[derive(Debug)]
pub(crate) struct Stopped {
    thread: Pid,
    pub(crate) process: i32,
    registers: user_regs_struct,
    /// Signals that were blocked.
    blocked: u64,
    /// Where the instruction of the call that waits is, or was.
    site: u64,
    /// A `syscall` instruction.
    syscall: u64,
    call_mark: u64,
    finished: bool,
}

/// Why a thread is not stopped.
#[derive(Debug)]
pub(crate) enum StopError {
    /// It no longer waits: it was killed, or a signal ended the call.
    Gone,
    /// One line for people.
    Refused(String),
}

impl Stopper {
    /// How they are on this one.
    pub(crate) fn new(marks: Marks) -> Stopper {
        let this = std::process::id().cast_signed();
        Stopper {
            marks,
            suspends: may_suspend(),
            // Its own, and the one that makes calls wait.
            filters: target::status(this, "Seccomp_filters").unwrap_or(0) + 1,
        }
    }

    /// Stops the thread of a call that waits, of a process. On [`StopError::Refused`] it still waits. `elsewhere` has a `syscall`
    /// instruction, where that of the call is no longer one. `before` does what takes a call that waits, once it is certain
    /// that the thread can be stopped; what it gives is given.
    pub(crate) fn stop<T>(
        &self,
        waiting: &Waiting<'_>,
        process: i32,
        elsewhere: Option<u64>,
        before: impl FnOnce() -> T,
    ) -> Result<(Stopped, T), StopError> {
        let refused = |line: String| Err(StopError::Refused(line));
        let thread = Pid::from_raw(waiting.thread);
        if process == 0 {
            return Err(StopError::Gone);
        }
        let site = waiting.instruction.wrapping_sub(2);
        let mut instruction = [0; 2];
        let read = target::read(process, site, &mut instruction);
        let syscall = match elsewhere {
            _ if read && instruction == SYSCALL => site,
            Some(elsewhere) => elsewhere,
            None => return refused("it makes the call by another instruction than `syscall`".to_owned()),
        };
        let suspended = Options::PTRACE_O_TRACESYSGOOD | Options::from_bits_retain(SUSPEND_SECCOMP);
        let mut seized = match self.suspends {
            true => ptrace::seize(thread, suspended),
            false => Err(Errno::EPERM),
        };
        if matches!(seized, Err(Errno::EPERM | Errno::EINVAL)) {
            if target::status(waiting.thread, "Seccomp_filters").is_none_or(|count| count > self.filters) {
                return refused(
                    "its thread has a seccomp sandbox, and it takes CAP_SYS_ADMIN, and no sandbox around msrgate, to make                      calls there: run msrgate as root, or turn the VMM's sandbox off"
                        .to_owned(),
                );
            }
            seized = ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD);
        }
        match seized {
            Ok(()) => {}
            Err(Errno::ESRCH) => return Err(StopError::Gone),
            Err(error) => {
                let tracer = target::status(waiting.thread, "TracerPid").filter(|tracer| *tracer != 0);
                return refused(match tracer {
                    Some(tracer) => format!("process {tracer} traces its thread, and one process can do so at a time"),
                    None => format!("its thread cannot be stopped: {}", error.desc()),
                });
            }
        }
        let done = before();
        // It stops when the call comes back, since it is told so before.
        let told = ptrace::interrupt(thread);
        let gone = told.is_err() || waiting.give(i64::from(-libc::EINTR)).is_err();
        if !matches!(wait(thread, process), Some(Stop::Other)) {
            return Err(StopError::Gone);
        }
        let mut blocked = 0;
        let begun = match gone {
            // A signal came first: the thread goes on as if nothing had been.
            true => Err(Errno::ENOENT),
            false => signals(thread, PTRACE_GETSIGMASK, &mut blocked)
                .and_then(|()| signals(thread, PTRACE_SETSIGMASK, &mut !0))
                .and_then(|()| ptrace::getregs(thread)),
        };
        let Ok(registers) = begun else {
            let _ = ptrace::detach(thread, None);
            return Err(StopError::Gone);
        };
        let stopped = Stopped {
            thread,
            process,
            registers,
            blocked,
            site,
            syscall,
            call_mark: self.marks.call,
            finished: false,
        };
        Ok((stopped, done))
    }
}

/// Why a thread stands still.
enum Stop {
    /// At the begin or end of a system call.
    Call,
    /// For another reason.
    Other,
}

/// Waits until a thread stands still; `None` where it has ended.
fn wait(thread: Pid, process: i32) -> Option<Stop> {
    loop {
        // The end of a process is left for its parent, which this process may be.
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
        match waitid(Id::Pid(thread), peek) {
            Err(Errno::EINTR) => continue,
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) if thread.as_raw() == process => return None,
            _ => {}
        }
        return match waitpid(thread, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(_)) => Some(Stop::Call),
            Ok(WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..)) => Some(Stop::Other),
            Err(Errno::EINTR) => continue,
            _ => None,
        };
    }
}

/// PTRACE_GETSIGMASK and PTRACE_SETSIGMASK.
fn signals(thread: Pid, request: libc::c_uint, mask: &mut u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads or writes a set of eight bytes, as the third argument says, which lives over the call.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), size_of::<u64>(), std::ptr::from_mut(mask)) };
    Errno::result(result).map(drop)
}

impl Stopped {
    /// Where the instruction of the VMM's call is, or was.
    pub(crate) fn site(&self) -> u64 {
        self.site
    }

    /// Makes a system call in the thread, and gives its result. An error of ESRCH is also the end of the thread.
    pub(crate) fn call(&mut self, number: c_long, arguments: [u64; 6]) -> Result<u64, Errno> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = user_regs_struct {
            rip: self.syscall,
            rax: number.cast_unsigned(),
            // The thread is in no call that could be restarted.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.registers
        };
        for _ in 0..ATTEMPTS {
            ptrace::setregs(self.thread, registers)?;
            let mut entered = false;
            let mut disturbed = false;
            loop {
                ptrace::syscall(self.thread, None)?;
                match wait(self.thread, self.process).ok_or(Errno::ESRCH)? {
                    Stop::Call if entered => break,
                    Stop::Call => entered = true,
                    Stop::Other => disturbed = true,
                }
            }
            let result = ptrace::getregs(self.thread)?.rax.cast_signed();
            // EINTR, and what the kernel makes of it where it restarts a call.
            if disturbed && (result == i64::from(-libc::EINTR) || (-516..=-512).contains(&result)) {
                continue;
            }
            return match result {
                -4095..0 => Err(Errno::from_raw(-result as i32)),
                result => Ok(result.cast_unsigned()),
            };
        }
        Err(Errno::EINTR)
    }

    /// `ioctl(2)`, with the mark that the kernel's filter lets through.
    pub(crate) fn ioctl(&mut self, fd: u64, request: u32, argument: u64) -> Result<u64, Errno> {
        let mark = self.call_mark;
        self.call(libc::SYS_ioctl, [fd, u64::from(request), argument, mark, 0, 0])
    }

    /// `mmap(2)`.
    pub(crate) fn map(&mut self, at: u64, bytes: usize, rights: c_int, flags: c_int, fd: c_int) -> Result<u64, Errno> {
        let flags = flags as u64;
        let arguments = [at, bytes as u64, rights as u64, flags, i64::from(fd).cast_unsigned(), 0];
        self.call(libc::SYS_mmap, arguments)
    }

    /// `close(2)`; there is nothing to be done where it fails.
    pub(crate) fn close(&mut self, fd: c_int) {
        let _ = self.call(libc::SYS_close, [i64::from(fd).cast_unsigned(), 0, 0, 0, 0, 0]);
    }

    /// Lets the thread go on as if its call had given this; less than 0 is an error.
    pub(crate) fn finish(mut self, result: i64) {
        self.registers.rax = result.cast_unsigned();
        self.go_on();
    }

    /// Lets the thread go on with what the kernel gave for its call.
    pub(crate) fn give(self, result: Result<u64, Errno>) {
        self.finish(result.map_or_else(|error| -(error as i64), u64::cast_signed));
    }

    /// Lets the thread go on at `address`, as if it had not made its call yet.
    pub(crate) fn redirect(mut self, address: u64, number: c_long) {
        self.registers.rip = address;
        self.registers.rax = number.cast_unsigned();
        self.go_on();
    }

    fn go_on(&mut self) {
        self.finished = true;
        self.registers.orig_rax = u64::MAX;
        // A thread that was killed meanwhile goes nowhere.
        let _ = ptrace::setregs(self.thread, self.registers);
        let mut blocked = self.blocked;
        let _ = signals(self.thread, PTRACE_SETSIGMASK, &mut blocked);
        let _ = ptrace::detach(self.thread, None);
    }
}

impl Drop for Stopped {
    /// Who did not say what the call gives was hindered.
    fn drop(&mut self) {
        if !self.finished {
            self.registers.rax = i64::from(-libc::EINTR).cast_unsigned();
            self.go_on();
        }
    }
}

/// Whether this process has CAP_SYS_ADMIN: for a filter that lets calls wait it takes that, or `no_new_privs`.
pub fn may_administer() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_some_and(|mask| mask & 1 << 21 != 0)
}

/// Whether this process may suspend seccomp filters of what it traces (`check_ptrace_options`).
fn may_suspend() -> bool {
    may_administer() && target::status(std::process::id().cast_signed(), "Seccomp") == Some(0)
}
