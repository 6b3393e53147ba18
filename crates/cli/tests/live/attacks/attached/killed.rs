//! msrgate killed at each of its steps, while the VMM's threads are in sandboxes that end the VMM at any call which is not its own.

#![expect(unsafe_code, reason = "a call between fork and exec")]

use std::os::unix::process::CommandExt;

use libc::user_regs_struct;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::*;

const SETREGS: u64 = 13;
const SYSCALL: u64 = 24;

/// Runs `attach` and kills it where it is about to make its call of `ptrace(2)` number `step` of those after which a thread of the VMM's
/// process may be at a system call of its own; tells whether there are so many.
fn killed_at(folder: &Folder, process: &str, step: usize) -> bool {
    let mut command = folder.command(&["attach", "-p", "policy.toml"]);
    command
        .args(NONE)
        .arg(process)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    #[expect(clippy::zombie_processes, reason = "the end of all its threads is seen below")]
    let attach = command.spawn().unwrap();
    let main = Pid::from_raw(attach.id().cast_signed());
    waitpid(main, None).unwrap();
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(main, options).unwrap();
    ptrace::syscall(main, None).unwrap();
    let (mut requests, mut steps, mut is_told) = ([0, 0], 0, false);
    let mut is_there = false;
    loop {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let (thread, signal) = match waitpid(None, Some(flags)).unwrap() {
            WaitStatus::PtraceSyscall(thread) => (thread, None),
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            WaitStatus::Stopped(thread, Signal::SIGSTOP) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) if thread == main => return is_there,
            _ => continue,
        };
        let Ok(registers) = ptrace::getregs(thread) else {
            continue;
        };
        let user_regs_struct { orig_rax, rax, rdi, .. } = registers;
        let begins = rax.cast_signed() == i64::from(-libc::ENOSYS);
        if signal.is_none() && begins && orig_rax == libc::SYS_ptrace.cast_unsigned() {
            // In the second step of a call that has begun the kernel alone decides.
            let is_step = rdi == SETREGS || rdi == SYSCALL && requests[1] == SETREGS && requests[0] != SYSCALL;
            steps += usize::from(is_step);
            if is_step && steps > step {
                is_there = true;
                kill(main, Signal::SIGKILL).unwrap();
                continue;
            }
            requests = [requests[1], rdi];
        }
        // The policy is on: the rest is the end that a user asks for.
        if begins && orig_rax == libc::SYS_poll.cast_unsigned() && thread == main && steps > 0 && !is_told {
            is_told = true;
            let _ = kill(main, Signal::SIGINT);
        }
        let _ = ptrace::syscall(thread, signal);
    }
}

#[test]
fn a_vmm_of_sandboxed_threads_lives_on_at_whatever_step_msrgate_is_killed() {
    let Some(program) = vmm("running", Way::Dynamic) else {
        return;
    };
    if !super::super::users::is_root() {
        return;
    }
    for (policy, under) in [(DENIED, "rdmsr 0x174 fault"), (ANSWERED, "rdmsr 0x174 0x11")] {
        let folder = with_policy(policy);
        let mut vmm = Asked::start(&program, &["1", "1", "whole"]);
        let (mut step, mut seen) = (0, [0, 0]);
        while killed_at(&folder, &vmm.process(), step) {
            let got = vmm.ask("0 r:0x174");
            let state = ["rdmsr 0x174 0x0", under].iter().position(|state| *state == got);
            seen[state.unwrap_or_else(|| panic!("step {step}: {got}"))] += 1;
            // What was left is taken away, so that the next one begins as this one did.
            Attach::start(&folder, &NONE, &vmm.process()).unwrap().detach().code(0);
            step += 1;
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
        assert_eq!(vmm.ask("0 r:0x174"), "rdmsr 0x174 0x0");
        vmm.end();
    }
}
