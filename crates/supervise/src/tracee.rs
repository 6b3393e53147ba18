//! A VMM's thread that is stopped at a call which waits, and calls that are made in it.
//!
//! The order is: the call waits for the supervisor (seccomp); the thread is seized and told to stop; the call gets EINTR,
//! so that the thread comes out of it and stops; calls are made at the thread's own `syscall` instruction; the registers
//! get what the VMM's call is to give; the thread goes on. Before and after nothing is traced.

#![expect(unsafe_code, reason = "requests of ptrace that have no wrapper")]

use libc::{c_int, c_long, user_regs_struct};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::seccomp::{Cookies, Waiting};
use crate::target;

/// `PTRACE_O_SUSPEND_SECCOMP`: no seccomp filter looks at the thread's calls while it is traced.
const SUSPEND_SECCOMP: c_int = 1 << 21;
pub(crate) const GET_SIGNALS: libc::c_uint = 0x420a;
pub(crate) const SET_SIGNALS: libc::c_uint = 0x420b;
/// How often a call is made again that a stop interrupts.
const ATTEMPTS: u32 = 16;
/// The instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How threads are stopped on this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracer {
    pub(crate) cookies: Cookies,
    /// Whether the kernel lets seccomp filters be suspended: it takes CAP_SYS_ADMIN, and no filter on the supervisor.
    suspends: bool,
    /// How many seccomp filters a thread has whose VMM has none of its own.
    filters: i64,
}

/// What a thread is while it makes calls.
pub(crate) struct TraceeState {
    pub(crate) thread: Pid,
    pub(crate) process: i32,
    /// With what it goes on, and which signals it blocks then.
    pub(crate) registers: user_regs_struct,
    pub(crate) blocked: u64,
    /// With what it makes calls, but for their numbers and arguments: RIP is at a `syscall` instruction.
    pub(crate) calls: user_regs_struct,
    /// The call that it makes where msrgate is killed before another one has begun, and RSP for that; `None` where it makes that one.
    pub(crate) alone: Option<(c_long, u64)>,
}

/// A thread that does what it is told.
#[derive(Debug)]
pub(crate) struct Tracee {
    thread: Pid,
    pub(crate) process: i32,
    /// With what it goes on.
    registers: user_regs_struct,
    /// With what it makes calls, but for their numbers and arguments: RIP is at a `syscall` instruction.
    calls: user_regs_struct,
    /// Signals that were blocked.
    blocked: u64,
    /// The call that it makes where msrgate is killed before another one has begun, and RSP for that.
    alone: Option<(c_long, u64)>,
    /// It makes other calls before that one.
    leaves: bool,
    /// Where the instruction of the call that waits is, or was.
    site: u64,
    call_cookie: u64,
    /// Where a thread of msrgate's own has memory for arguments.
    pub(crate) scratch: Option<u64>,
    finished: bool,
}

/// Why a thread's accesses are not answered that may not read the TSC.
pub(crate) const NO_TSC: &str = "its threads may not read the TSC (PR_SET_TSC), by which answers are timed, and would end by \
                                 SIGSEGV: leave that out of the VMM";

/// `ERESTARTNOHAND`: the kernel makes the call again where no handler runs, as if nothing had been.
pub(crate) const RESTART: i64 = -514;

/// Why a thread is not stopped.
#[derive(Debug)]
pub(crate) enum StopError {
    /// It no longer waits: it was killed, or a signal ended the call.
    Gone,
    /// One line for people.
    Refused(String),
}

impl Tracer {
    /// How they are on this one, under VMMs that this process starts.
    pub(crate) fn new(cookies: Cookies) -> Tracer {
        let this = std::process::id().cast_signed();
        Tracer {
            // Its own, and the one that makes calls wait.
            filters: target::status(this, "Seccomp_filters").unwrap_or(0) + 1,
            ..Tracer::of_others(cookies)
        }
    }

    /// Likewise, under VMMs that others have started.
    pub(crate) fn of_others(cookies: Cookies) -> Tracer {
        Tracer {
            cookies,
            suspends: may_suspend(),
            filters: 0,
        }
    }

    /// Whether calls can be made in a thread in spite of a sandbox of its own.
    pub(crate) fn suspends(&self) -> bool {
        self.suspends
    }

    /// How many of so many filters of a thread are the VMM's own.
    pub(crate) fn own_filters(&self, filters: i64) -> i64 {
        (filters - self.filters).max(0)
    }

    /// A thread that stands still already.
    pub(crate) fn held(&self, held: TraceeState) -> Tracee {
        Tracee {
            thread: held.thread,
            process: held.process,
            registers: held.registers,
            calls: held.calls,
            blocked: held.blocked,
            alone: held.alone,
            leaves: false,
            site: held.registers.rip.wrapping_sub(2),
            call_cookie: self.cookies.call,
            scratch: None,
            finished: false,
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
    ) -> Result<(Tracee, T), StopError> {
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
        self.seize(thread, Options::empty())?;
        let done = before();
        // It stops when the call comes back, since it is told so before.
        let told = ptrace::interrupt(thread);
        let gone = told.is_err() || waiting.give(i64::from(-libc::EINTR)).is_err();
        if wait_interrupted(thread, process).is_none() {
            return Err(StopError::Gone);
        }
        let mut blocked = 0;
        let begun = match gone {
            // A signal came first: the thread goes on as if nothing had been.
            true => Err(Errno::ENOENT),
            false => signals(thread, GET_SIGNALS, &mut blocked)
                .and_then(|()| signals(thread, SET_SIGNALS, &mut !0))
                .and_then(|()| ptrace::getregs(thread)),
        };
        let Ok(registers) = begun else {
            let _ = ptrace::detach(thread, None);
            return Err(StopError::Gone);
        };
        let tracee = Tracee {
            thread,
            process,
            // Who does not say what the call gives was hindered.
            registers: user_regs_struct {
                rax: i64::from(-libc::EINTR).cast_unsigned(),
                orig_rax: u64::MAX,
                ..registers
            },
            calls: user_regs_struct {
                rip: syscall,
                ..registers
            },
            blocked,
            alone: None,
            leaves: false,
            site,
            call_cookie: self.cookies.call,
            scratch: None,
            finished: false,
        };
        Ok((tracee, done))
    }

    /// Traces a thread, with seccomp filters suspended where it can be; `more` is what else it is to tell of.
    pub(crate) fn seize(&self, thread: Pid, more: Options) -> Result<(), StopError> {
        let options = Options::PTRACE_O_TRACESYSGOOD | more;
        let mut seized = match self.suspends {
            true => ptrace::seize(thread, options | Options::from_bits_retain(SUSPEND_SECCOMP)),
            false => Err(Errno::EPERM),
        };
        if matches!(seized, Err(Errno::EPERM | Errno::EINVAL)) {
            if target::status(thread.as_raw(), "Seccomp_filters").is_none_or(|count| count > self.filters) {
                return Err(StopError::Refused(
                    "its thread has a seccomp sandbox, and it takes CAP_SYS_ADMIN, and no sandbox around msrgate, to make \
                     calls there: run msrgate as root, or turn the VMM's sandbox off"
                        .to_owned(),
                ));
            }
            seized = ptrace::seize(thread, options);
        }
        match seized {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(StopError::Gone),
            Err(error) => Err(StopError::Refused(match target::tracer(thread.as_raw()) {
                Some(tracer) => format!("process {tracer} traces its thread, and one process can do so at a time"),
                None => format!("its thread cannot be stopped: {}", error.desc()),
            })),
        }
    }
}

/// What `PTRACE_O_TRACESYSGOOD` makes of SIGTRAP.
const AT_CALL: c_int = libc::SIGTRAP | 0x80;

/// Why a thread stands still.
pub(crate) enum Stop {
    /// At the begin or end of a system call.
    Call,
    /// Before a signal, which is lost unless the thread goes on with it.
    Signal(c_int),
    /// For another reason.
    Other,
}

/// Waits until a thread stands still; `None` where it has ended.
pub(crate) fn wait(thread: Pid, process: i32) -> Option<Stop> {
    loop {
        // The end of a process is left for its parent, which this process may be.
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
        match waitid(Id::Pid(thread), peek) {
            Err(Errno::EINTR) => continue,
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) if thread.as_raw() == process => return None,
            _ => {}
        }
        return match changed(thread, 0) {
            Change::Stopped(stop) => Some(stop),
            _ => None,
        };
    }
}

/// What became of a thread that is traced.
pub(crate) enum Change {
    /// Nothing yet.
    Nothing,
    Stopped(Stop),
    /// It has ended.
    Gone,
}

/// What became of a thread, by the flags of `waitpid(2)`. A signal is a number here: nix knows no real-time signals.
pub(crate) fn changed(thread: Pid, flags: c_int) -> Change {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes a number to the address, which lives over the call.
        let found = unsafe { libc::waitpid(thread.as_raw(), &raw mut status, flags | libc::__WALL) };
        return match found {
            0 => Change::Nothing,
            1.. if !libc::WIFSTOPPED(status) => Change::Gone,
            1.. => Change::Stopped(match (status >> 16, libc::WSTOPSIG(status)) {
                (0, AT_CALL) => Stop::Call,
                (0, signal) => Stop::Signal(signal),
                _ => Stop::Other,
            }),
            _ if Errno::last() == Errno::EINTR => continue,
            _ => Change::Gone,
        };
    }
}

/// Has a thread go on until its next system call begins or ends; a signal that it stands still before is delivered, which 0 is not.
fn go_to_call(thread: Pid, signal: c_int) -> Result<(), Errno> {
    // SAFETY: the request takes numbers and touches no memory of ours.
    Errno::result(unsafe { libc::ptrace(libc::PTRACE_SYSCALL, thread.as_raw(), 0, signal) }).map(drop)
}

/// Has a thread go on that stands still before a signal, which is delivered.
pub(crate) fn deliver(thread: Pid, signal: c_int) {
    // SAFETY: the request takes numbers and touches no memory of ours. A thread that was killed goes nowhere.
    unsafe { libc::ptrace(libc::PTRACE_CONT, thread.as_raw(), 0, signal) };
}

/// Reads or sets which signals a thread blocks: [`GET_SIGNALS`] is PTRACE_GETSIGMASK, [`SET_SIGNALS`] PTRACE_SETSIGMASK.
pub(crate) fn signals(thread: Pid, request: libc::c_uint, mask: &mut u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads or writes a set of eight bytes, as the third argument says, which lives over the call.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), size_of::<u64>(), std::ptr::from_mut(mask)) };
    Errno::result(result).map(drop)
}

/// Waits until a thread stands still that was told to; signals that came first are delivered. `None` where it has ended.
pub(crate) fn wait_interrupted(thread: Pid, process: i32) -> Option<()> {
    loop {
        match wait(thread, process)? {
            Stop::Signal(signal) => deliver(thread, signal),
            Stop::Other => return Some(()),
            Stop::Call => return None,
        }
    }
}

impl Tracee {
    /// Has calls made from here on with other registers.
    pub(crate) fn call_by(&mut self, rip: u64, rsp: u64) {
        (self.calls.rip, self.calls.rsp) = (rip, rsp);
    }

    /// Has a thread of msrgate's own make the calls that lie there before it ends, whatever becomes of msrgate; 0 stands for
    /// none.
    pub(crate) fn leave_behind(&mut self, calls: u64) {
        (self.calls.rbx, self.registers.rbx) = (calls, calls);
        self.leaves = calls != 0;
    }

    /// Which thread it is.
    pub(crate) fn thread(&self) -> Pid {
        self.thread
    }

    /// Where the instruction of the VMM's call is, or was.
    pub(crate) fn site(&self) -> u64 {
        self.site
    }

    /// Makes a system call in the thread, and gives its result. An error of ESRCH is also the end of the thread.
    pub(crate) fn call(&mut self, number: c_long, arguments: [u64; 6]) -> Result<u64, Errno> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let registers = user_regs_struct {
            rax: number.cast_unsigned(),
            // The thread is in no call that could be restarted.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.calls
        };
        // What the thread makes where msrgate is killed before the call has begun: a sandbox that nobody suspends any more would do to
        // the VMM what it does for the call.
        let first = self.alone.filter(|_| !self.leaves);
        for _ in 0..ATTEMPTS {
            let (rax, rsp) = first.map_or((registers.rax, registers.rsp), |(call, rsp)| {
                (call.cast_unsigned(), rsp)
            });
            ptrace::setregs(self.thread, user_regs_struct { rax, rsp, ..registers })?;
            let mut entered = false;
            let mut disturbed = false;
            let mut signal = 0;
            loop {
                // SIGSTOP is all threads': it is not lost, and this thread goes on all the same. All else is blocked.
                go_to_call(self.thread, std::mem::take(&mut signal))?;
                match wait(self.thread, self.process).ok_or(Errno::ESRCH)? {
                    Stop::Call if entered => break,
                    Stop::Call => {
                        entered = true;
                        if first.is_some() {
                            let begun = user_regs_struct {
                                rax: i64::from(-libc::ENOSYS).cast_unsigned(),
                                orig_rax: number.cast_unsigned(),
                                rip: registers.rip.wrapping_add(2),
                                ..registers
                            };
                            ptrace::setregs(self.thread, begun)?;
                        }
                    }
                    Stop::Signal(libc::SIGSTOP) => (disturbed, signal) = (true, libc::SIGSTOP),
                    Stop::Signal(_) | Stop::Other => disturbed = true,
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

    /// Whether the thread may read the TSC (PR_SET_TSC), by which the answerer tells when an access was: else it would get SIGSEGV.
    /// At `at` is memory for the answer.
    pub(crate) fn may_time(&mut self, at: u64) -> bool {
        let mut mode = [0; 4];
        let asked = self.call(libc::SYS_prctl, [libc::PR_GET_TSC as u64, at, 0, 0, 0, 0]);
        asked.is_err() || !target::read(self.process, at, &mut mode) || i32::from_le_bytes(mode) != libc::PR_TSC_SIGSEGV
    }

    /// `ioctl(2)`, with the cookie that the kernel's filter lets through.
    pub(crate) fn ioctl(&mut self, fd: u64, request: u32, argument: u64) -> Result<u64, Errno> {
        let cookie = self.call_cookie;
        self.call(libc::SYS_ioctl, [fd, u64::from(request), argument, cookie, 0, 0])
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
        let mut blocked = self.blocked;
        // A thread that was killed meanwhile goes nowhere.
        let _ = signals(self.thread, SET_SIGNALS, &mut blocked);
        let _ = ptrace::setregs(self.thread, self.registers);
        let _ = ptrace::detach(self.thread, None);
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.finished {
            self.go_on();
        }
    }
}

/// Whether this process has CAP_SYS_ADMIN: for a filter that lets calls wait it takes that, or `no_new_privs`.
pub fn may_administer() -> bool {
    has_capability(CAP_SYS_ADMIN)
}

const CAP_SYS_ADMIN: u32 = 21;
pub(crate) const CAP_SYS_PTRACE: u32 = 19;

/// Whether this process has a capability.
pub(crate) fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_some_and(|mask| mask >> number & 1 != 0)
}

/// Whether this process may suspend seccomp filters of what it traces (`check_ptrace_options`).
fn may_suspend() -> bool {
    may_administer() && target::status(std::process::id().cast_signed(), "Seccomp") == Some(0)
}
