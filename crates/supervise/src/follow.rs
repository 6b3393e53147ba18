//! The calls of a VMM that runs already, seen as `strace -f` sees them: each system call of each thread stops it twice (ptrace).
//!
//! No call waits and none is made here. Where the tracer dies, the kernel lets the threads go as they are.

#![expect(unsafe_code, reason = "signals and requests of ptrace that have no wrapper")]

use std::collections::HashMap;
use std::fs;

use libc::{c_int, c_uint};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;

use crate::capture::{Call, Capture};
use crate::target;
use crate::tracee::RESTART;

/// `PTRACE_EVENT_STOP`.
const EVENT_STOP: c_int = 128;
/// What a stop at a system call has for a signal (`PTRACE_O_TRACESYSGOOD`).
const AT_CALL: c_int = libc::SIGTRAP | 0x80;

/// A VMM whose calls are seen. All that is done with it is done in the thread that began it.
#[derive(Debug)]
pub struct Followed {
    capture: Capture,
    process: i32,
    threads: HashMap<i32, Within>,
}

/// Where a thread is.
#[derive(Debug)]
enum Within {
    /// In no call that it was seen to begin.
    Nothing,
    /// In a call that is none of KVM's.
    Other,
    /// In this one, whose argument this is.
    Call(Box<Call>, u64),
}

impl Followed {
    /// Sees the calls of a process from here on.
    ///
    /// # Errors
    /// In one line for people why it cannot.
    pub fn begin(capture: Capture, process: i32) -> Result<Followed, String> {
        let mut followed = Followed {
            capture,
            process,
            threads: HashMap::new(),
        };
        loop {
            let tasks =
                fs::read_dir(format!("/proc/{process}/task")).map_err(|_| format!("there is no process {process}"))?;
            let threads = tasks
                .flatten()
                .filter_map(|task| task.file_name().to_str()?.parse().ok());
            let new = threads.filter(|thread| !followed.threads.contains_key(thread) && !target::is_kernels(*thread));
            let new: Vec<i32> = new.collect();
            if new.is_empty() {
                break;
            }
            for thread in new {
                if let Err(line) = followed.seize(thread) {
                    followed.let_go();
                    return Err(line);
                }
            }
        }
        match followed.threads.is_empty() {
            true => Err(format!("process {process} has ended")),
            false => {
                followed.capture.find(process);
                Ok(followed)
            }
        }
    }

    fn seize(&mut self, thread: i32) -> Result<(), String> {
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        match ptrace::seize(Pid::from_raw(thread), options) {
            Ok(()) => {
                self.threads.insert(thread, Within::Nothing);
                // It goes on until its next call from where it stops now.
                let _ = ptrace::interrupt(Pid::from_raw(thread));
                Ok(())
            }
            // A new thread that came with the one that made it, or one that has ended.
            Err(Errno::ESRCH) => Ok(()),
            Err(_) if target::tracer(thread) == Some(std::process::id().cast_signed()) => {
                self.threads.insert(thread, Within::Nothing);
                Ok(())
            }
            Err(error) => Err(match target::tracer(thread) {
                Some(tracer) => format!("process {tracer} traces it, and one process can do so at a time"),
                None => format!("it cannot be traced: {}", error.desc()),
            }),
        }
    }

    /// Tells of the calls that were made since, and lets their threads go on; `false` where the VMM has ended. To be called at each
    /// SIGCHLD.
    pub fn look(&mut self) -> bool {
        while let Some((thread, status)) = changed(-1, libc::WNOHANG) {
            if !libc::WIFSTOPPED(status) {
                self.threads.remove(&thread);
                continue;
            }
            let pid = Pid::from_raw(thread);
            let within = self.threads.entry(thread).or_insert(Within::Nothing);
            let signal = libc::WSTOPSIG(status);
            match (status >> 16, signal) {
                (0, AT_CALL) => {
                    let before = std::mem::replace(within, Within::Nothing);
                    let after = self.at_call(thread, before);
                    self.threads.insert(thread, after);
                    go_on(pid, libc::PTRACE_SYSCALL, 0);
                }
                (0, signal) => go_on(pid, libc::PTRACE_SYSCALL, signal),
                // It is stopped as by a shell, and stays so until SIGCONT.
                (EVENT_STOP, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU) => {
                    go_on(pid, libc::PTRACE_LISTEN, 0);
                }
                _ => {
                    repair(pid);
                    go_on(pid, libc::PTRACE_SYSCALL, 0);
                }
            }
        }
        !self.threads.is_empty()
    }

    /// What a thread is in after its stop at the begin or the end of a call.
    fn at_call(&mut self, thread: i32, before: Within) -> Within {
        let Ok(registers) = ptrace::getregs(Pid::from_raw(thread)) else {
            return Within::Nothing;
        };
        match before {
            Within::Other => Within::Nothing,
            Within::Call(call, argument) => {
                let result = match registers.rax.cast_signed() {
                    error @ -4095..0 => Err(Errno::from_raw(-error as i32)),
                    result => Ok(result.cast_unsigned()),
                };
                self.capture.ended(*call, argument, result);
                Within::Nothing
            }
            Within::Nothing if registers.orig_rax != libc::SYS_ioctl.cast_unsigned() => Within::Other,
            Within::Nothing => {
                let (fd, number, argument) = (registers.rdi, registers.rsi as u32, registers.rdx);
                let is_kvms = Capture::REQUESTS.contains(&number);
                let call = is_kvms
                    .then(|| self.capture.asked(thread, fd, number, argument))
                    .flatten();
                call.map_or(Within::Other, |call| Within::Call(Box::new(call), argument))
            }
        }
    }

    /// Lets the VMM's threads go, wherever they are.
    pub fn let_go(self) {
        for thread in self.threads.into_keys() {
            let pid = Pid::from_raw(thread);
            let _ = ptrace::interrupt(pid);
            while let Some((_, status)) = changed(thread, 0).filter(|(_, status)| libc::WIFSTOPPED(*status)) {
                match (status >> 16, libc::WSTOPSIG(status)) {
                    // A stop at a call takes the place of the one that was asked for.
                    (0, AT_CALL) => {
                        let _ = ptrace::interrupt(pid);
                        go_on(pid, libc::PTRACE_CONT, 0);
                        continue;
                    }
                    (0, signal) => go_on(pid, libc::PTRACE_DETACH, signal),
                    _ => {
                        repair(pid);
                        go_on(pid, libc::PTRACE_DETACH, 0);
                    }
                }
                break;
            }
        }
        self.capture.forget(self.process);
    }
}

/// Has a call that a stop alone has ended made again: KVM_RUN gives EINTR then.
fn repair(thread: Pid) {
    if let Ok(mut registers) = ptrace::getregs(thread)
        && registers.orig_rax.cast_signed() >= 0
        && registers.rax.cast_signed() == i64::from(-libc::EINTR)
    {
        registers.rax = RESTART.cast_unsigned();
        let _ = ptrace::setregs(thread, registers);
    }
}

/// The next thread that stands still or has ended, and how. `thread` is -1 for any.
fn changed(thread: i32, flags: c_int) -> Option<(i32, c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes a number to the address, which lives over the call.
        let found = unsafe { libc::waitpid(thread, &raw mut status, flags | libc::__WALL) };
        match found {
            1.. => return Some((found, status)),
            0 => return None,
            _ if Errno::last() == Errno::EINTR => {}
            _ => return None,
        }
    }
}

/// Lets a thread go on, with a signal or with 0. One that was killed goes nowhere.
fn go_on(thread: Pid, request: c_uint, signal: c_int) {
    // SAFETY: these requests take numbers and touch no memory of ours.
    unsafe { libc::ptrace(request, thread.as_raw(), 0, signal) };
}
