//! A thread of msrgate's own in a process that others have started, in which calls are made while the VMM's threads run.
//!
//! One thread of the VMM stands still for as long as it takes to make two calls: `mmap` of a page for code and memory for arguments,
//! where there is none yet, and `clone` of the new thread. It makes them as a signal's handler would: below its stack is the frame by which
//! `rt_sigreturn(2)` gives all registers, signals and floating point back, and behind each call is code that goes there. So
//! whenever msrgate is killed the thread goes on as if nothing had been, but that a call which waits for a time may give EINTR.
//! The new thread ends behind the call that it is at, after those calls that are its last ([`Tracee::leave_behind`]).

#![expect(unsafe_code, reason = "system calls without a wrapper")]

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use libc::{
    CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_SYSVSEM, CLONE_THREAD, CLONE_VM, MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC,
    PROT_READ, PROT_WRITE, user_regs_struct,
};
use msrgate_core::abi;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::frame::Frame;
use crate::remote::SCRATCH;
use crate::sandbox;
use crate::target::{self, Mapping, Object, Other, PAGE};
use crate::tracee::{
    Change, GET_SIGNALS, RESTART, SET_SIGNALS, SYSCALL, Stop, StopError, Tracee, TraceeState, Tracer, changed, deliver,
    signals, wait_interrupted,
};

/// How long a thread may take until it stands still: one that waits for a device or for `vfork` does not until that is over.
pub(crate) const PATIENCE: Duration = Duration::from_millis(300);
/// How long one may that is in KVM_RUN, which gives EINTR for msrgate's sake where nobody waits for that: a busy machine may not run
/// the thread for a while.
pub(crate) const PATIENCE_WITH_RUN: Duration = Duration::from_secs(10);
/// How often threads are tried that run their own code just then, and how long is waited between.
const ROUNDS: u32 = 40;
const BETWEEN: Duration = Duration::from_millis(5);

/// What is added to the rank of a thread that is better not stopped.
const SANDBOXED: u32 = 4;

/// What the page begins with. Behind it is memory for arguments.
const NAME: &[u8; BEGIN] = b"msrgate inject 1";
/// How much of a page tells what it is.
pub(crate) const BEGIN: usize = 16;
/// Where the VMM's thread makes `clone`, where the new thread makes calls, and where the new thread ends.
const CLONE: u64 = 64;
const CALL: u64 = 96;
const EXIT: u64 = CALL + 2;

/// The page.
fn page() -> Vec<u8> {
    let exit = [0x31, 0xff, 0xb8, libc::SYS_exit as u8, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b]; // xor edi, edi; mov eax, exit; syscall; ud2
    let mut code = NAME.to_vec();
    code.resize(CLONE as usize, 0xcc);
    code.extend(SYSCALL);
    code.extend([0x85, 0xc0, 0x74, 9]); // test eax, eax; jz to the exit
    code.extend([0xb8, libc::SYS_rt_sigreturn as u8, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b]); // mov eax, rt_sigreturn; syscall; ud2
    code.extend(exit);
    code.resize(CALL as usize, 0xcc);
    code.extend(SYSCALL);
    // The calls at RBX, if it is not 0: descriptor, request, argument, up to a request of 0.
    code.extend([0x48, 0x85, 0xdb, 0x74, 26]); // test rbx, rbx; jz to the exit
    code.extend([0x8b, 0x73, 0x08, 0x85, 0xf6, 0x74, 19]); // mov esi, [rbx+8]; test esi, esi; jz to the exit
    code.extend([0x8b, 0x3b, 0x48, 0x8b, 0x53, 0x10]); // mov edi, [rbx]; mov rdx, [rbx+16]
    code.extend([0xb8, libc::SYS_ioctl as u8, 0, 0, 0, 0x0f, 0x05]); // mov eax, ioctl; syscall
    code.extend([0x48, 0x83, 0xc3, 24, 0xeb, 0xe6]); // add rbx, 24; jmp to the next
    code.extend(exit);
    code.resize(PAGE, 0xcc);
    code
}

/// What is known of a process before any of its threads stands still.
#[derive(Debug)]
pub(crate) struct InjectionPoint {
    process: i32,
    /// The page, where there is one already.
    page: Option<u64>,
    /// `syscall` with `ret`, and `pop rax` with `ret`.
    code: Option<(u64, u64)>,
    /// Where a frame may lie; below a thread's stack where it is not said.
    frame: Option<u64>,
}

/// Pages of code that is no file's and begins as `is_wanted` says, however many there are.
fn pages(process: i32, mappings: &[Mapping], is_wanted: impl Fn(&[u8]) -> bool) -> Vec<u64> {
    let unnamed = |mapping: &&Mapping| mapping.name.is_empty() && mapping.rights.starts_with("r-x");
    let unnamed = mappings.iter().filter(unnamed);
    let all: Vec<u64> = unnamed
        .flat_map(|mapping| (mapping.start..mapping.end).step_by(PAGE))
        .collect();
    let begins = target::begins::<BEGIN>(process, &all);
    let pages = all.into_iter().zip(begins);
    pages
        .filter(|(_, begin)| is_wanted(begin))
        .map(|(page, _)| page)
        .collect()
}

/// The pages of code in a process that are no file's and begin so.
pub(crate) fn code_pages(process: i32, is_wanted: impl Fn(&[u8]) -> bool) -> Vec<u64> {
    pages(process, &target::mappings(process), is_wanted)
}

/// Where these bytes are among those from `start` on.
fn find(code: &[u8], start: u64, what: &[u8]) -> Option<u64> {
    let at = code.windows(what.len()).position(|bytes| bytes == what)?;
    Some(start + at as u64)
}

impl InjectionPoint {
    /// `near` is where a thread of it is, in code that makes system calls.
    pub(crate) fn of(process: i32, near: Option<u64>) -> Result<InjectionPoint, String> {
        let mut mappings = target::mappings(process);
        let stack = mappings.iter().find(|mapping| mapping.name == "[stack]");
        // Its stacks lie in the heap, but for that of its first thread, which it hardly uses.
        let frame = stack.filter(|_| target::is_go(process)).map(|mapping| mapping.start);
        mappings.retain(|mapping| mapping.rights.starts_with("r-x"));
        let own = page();
        let is_own = |page: &u64| {
            let mut there = vec![0; PAGE];
            target::read(process, *page, &mut there) && there == own
        };
        let pages = pages(process, &mappings, |begin| begin == NAME);
        let page = pages.into_iter().find(is_own);
        let mut point = InjectionPoint {
            process,
            page,
            code: None,
            frame,
        };
        if page.is_some() {
            return Ok(point);
        }
        let holds = |mapping: &Mapping| near.is_some_and(|near| (mapping.start..mapping.end).contains(&near));
        mappings.sort_by_key(|mapping| !holds(mapping));
        let (mut call, mut pop) = (None, None);
        for mapping in &mappings {
            let mut code = vec![0; (mapping.end - mapping.start) as usize];
            if !target::read(process, mapping.start, &mut code) {
                continue;
            }
            call = call.or_else(|| find(&code, mapping.start, &[0x0f, 0x05, 0xc3]));
            pop = pop.or_else(|| find(&code, mapping.start, &[0x58, 0xc3]));
            point.code = call.zip(pop);
            if point.code.is_some() {
                return Ok(point);
            }
        }
        Err(
            "it has no code to come back by (`syscall` with `ret`), so that a thread of it cannot be stopped without \
             risk: start it by `msrgate run`"
                .to_owned(),
        )
    }
}

/// A thread that may be stopped.
struct Candidate {
    thread: i32,
    /// How little it matters that it stands still, and how soon it does: less is better.
    rank: u32,
    /// Where it is, where it makes a call.
    near: Option<u64>,
    /// How many seccomp filters of the VMM's it has.
    filters: i64,
}

impl Candidate {
    /// Than KVM_RUN.
    fn makes_another_call(&self) -> bool {
        self.rank.is_multiple_of(SANDBOXED)
    }
}

/// The threads of a process, those first that had best be stopped.
fn candidates(process: i32, tracer: &Tracer) -> Vec<Candidate> {
    let mut found = Vec::new();
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    for entry in tasks.into_iter().flatten().flatten() {
        let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let state = fs::read_to_string(format!("/proc/{thread}/stat")).unwrap_or_default();
        let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next());
        if target::is_kernels(thread) || matches!(state, None | Some('D' | 'Z' | 'X')) {
            continue;
        }
        let call = fs::read_to_string(format!("/proc/{thread}/syscall")).unwrap_or_default();
        let words: Vec<&str> = call.split_whitespace().collect();
        let number = |word: &&str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        let is_run = words
            .get(2)
            .and_then(number)
            .is_some_and(|request| request as u32 == abi::RUN);
        let filters = tracer.own_filters(sandbox::filters(thread));
        let sandboxed = filters > 0 && !tracer.suspends();
        let (rank, near) = match words.first().copied() {
            Some("16") if is_run => (1, words.last().and_then(number)),
            // In the guest, or in code of its own.
            Some("running" | "-1") | None => (2, None),
            Some(_) => (0, words.last().and_then(number)),
        };
        found.push(Candidate {
            thread,
            rank: if sandboxed { rank + SANDBOXED } else { rank },
            near,
            filters,
        });
    }
    // The new thread has the sandbox of the one that makes it, once nobody suspends it.
    found.sort_by_key(|candidate| (candidate.rank, candidate.filters));
    found
}

/// How long a thread of the VMM stood still at most: from when it was last seen not to until it went on.
pub(crate) type StopTime = Duration;

/// Does `work` with a new thread of a process, and with how long a thread of the VMM stood still for it; gives what that gives.
///
/// What traces ends with this call, so that no thread of the VMM stands still any more after it, whatever became of it.
pub(crate) fn within<T: Send>(
    tracer: &Tracer,
    process: i32,
    work: impl FnOnce(Tracee, StopTime) -> T + Send,
) -> Result<T, StopError> {
    let candidates = candidates(process, tracer);
    let near = candidates.iter().find_map(|candidate| candidate.near);
    let mut point = InjectionPoint::of(process, near).map_err(StopError::Refused)?;
    let mut work = Some(work);
    let mut last = InjectError::Stop(StopError::Gone);
    for round in 0..ROUNDS {
        if round > 0 {
            std::thread::sleep(BETWEEN);
        }
        let candidates = self::candidates(process, tracer);
        if candidates.is_empty() {
            return Err(StopError::Gone);
        }
        let mut is_busy = false;
        for candidate in candidates {
            // Where a thread does not stop in time, the end of the one that traces lets it go.
            let traced = std::thread::scope(|scope| {
                let traced = || {
                    // As long as it does not run a thread of the VMM stands still.
                    hurry(0);
                    let (own, stood) = enter(tracer, &candidate, &mut point)?;
                    Ok(work.take().map(|work| work(own, stood)))
                };
                scope.spawn(traced).join()
            });
            match traced {
                Ok(Ok(Some(done))) => return Ok(done),
                Ok(Ok(None)) | Err(_) => return Err(StopError::Gone),
                Ok(Err(InjectError::Stop(StopError::Gone))) => {}
                Ok(Err(InjectError::Busy)) => {
                    is_busy = true;
                    if matches!(last, InjectError::Stop(StopError::Gone)) {
                        last = InjectError::Busy;
                    }
                }
                Ok(Err(error)) => last = error,
            }
        }
        // What no thread lets be done is not let be done later either.
        if !is_busy && matches!(last, InjectError::Stop(StopError::Refused(_))) {
            break;
        }
    }
    Err(match last {
        InjectError::Stop(error) => error,
        InjectError::Busy => {
            StopError::Refused("no thread of it makes a system call, so that none can be stopped".to_owned())
        }
    })
}

/// Has a thread, or this one, run before others, where it may.
fn hurry(thread: i32) {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads the structure, which lives over the call. Where it refuses all goes on as before.
    unsafe { libc::sched_setscheduler(thread, libc::SCHED_RR, &raw const parameter) };
}

/// Has this thread run as others do again: no thread of the VMM stands still for it.
pub(crate) fn no_hurry() {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: as in `hurry`.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const parameter) };
}

/// Why a thread is not made use of.
enum InjectError {
    /// It does not make a system call just now, or does not come out of one.
    Busy,
    Stop(StopError),
}

impl From<StopError> for InjectError {
    fn from(error: StopError) -> InjectError {
        InjectError::Stop(error)
    }
}

fn refused(line: String) -> InjectError {
    InjectError::Stop(StopError::Refused(line))
}

/// What the kernel refuses in the process, in words.
fn failed(what: &str) -> impl Fn(Errno) -> InjectError + '_ {
    move |error| match error {
        Errno::ESRCH => InjectError::Stop(StopError::Gone),
        error => refused(format!("{what}: {}", error.desc())),
    }
}

/// Stops a thread, has it make the new one, and lets it go.
fn enter(
    tracer: &Tracer,
    candidate: &Candidate,
    point: &mut InjectionPoint,
) -> Result<(Tracee, StopTime), InjectError> {
    let (thread, process) = (Pid::from_raw(candidate.thread), point.process);
    tracer.seize(thread, Options::PTRACE_O_TRACECLONE)?;
    let told = Instant::now();
    ptrace::interrupt(thread).map_err(|_| StopError::Gone)?;
    let patience = match candidate.makes_another_call() {
        true => PATIENCE,
        false => PATIENCE_WITH_RUN,
    };
    let begin = wait_for(thread, told, patience)?;
    let mut registers = ptrace::getregs(thread).map_err(|_| StopError::Gone)?;
    // Outside of a call it may be where it must not be interrupted unseen (`rseq(2)`).
    if registers.orig_rax.cast_signed() < 0 {
        let _ = ptrace::detach(thread, None);
        return Err(InjectError::Busy);
    }
    // What the new thread does by itself, and this one where msrgate is killed.
    let alone = [libc::SYS_exit, libc::SYS_rt_sigreturn];
    if !alone
        .into_iter()
        .all(|call| sandbox::lets(thread, candidate.filters, call, 0))
    {
        go_on(thread, |_| true);
        return Err(refused(
            "the sandbox of its threads does not let one end (`exit`, `rt_sigreturn`): start it by `msrgate run`"
                .to_owned(),
        ));
    }
    if is_run(&registers) && registers.rax.cast_signed() == i64::from(-libc::EINTR) {
        registers.rax = RESTART.cast_unsigned();
    }
    let mut blocked = 0;
    signals(thread, GET_SIGNALS, &mut blocked).map_err(|_| StopError::Gone)?;
    let state = extended(thread).map_err(|_| StopError::Gone)?;
    let code = point.code.unwrap_or_default();
    let alone = by_itself(registers);
    let frame = Frame {
        registers: &alone,
        blocked,
        state: &state,
        code,
    };
    // Over the red zone; in KVM_RUN also over where the answerer sees that a signal's handler ran (`Canary`), if there is room.
    let below = |frames: u64| registers.rsp.wrapping_sub(128 + frames * (frame.room() + 64)) & !63;
    let places = match point.frame {
        Some(at) => [at, at],
        None => [below(if is_run(&registers) { 2 } else { 1 }), below(1)],
    };
    let lies = |at: &u64| target::write(process, *at, &frame.bytes(*at));
    let Some(at) = places.into_iter().find(lies) else {
        go_on(thread, |_| true);
        return Err(refused("a thread of it has no room on its stack".to_owned()));
    };
    // Behind the call is a `ret`, or what makes `rt_sigreturn(2)` at once.
    let (rip, rsp) = match point.page {
        Some(page) => (page + CLONE, at + Frame::RETURNED),
        None => (code.0, at),
    };
    let calls = user_regs_struct {
        rip,
        rsp,
        orig_rax: u64::MAX,
        ..registers
    };
    let back = (libc::SYS_rt_sigreturn, at + Frame::RETURNED);
    // First what leads back, then what would not come back by itself.
    let begin_with = user_regs_struct {
        rsp: back.1,
        rax: back.0.cast_unsigned(),
        ..calls
    };
    ptrace::setregs(thread, begin_with).map_err(|_| StopError::Gone)?;
    let mut tracee = tracer.held(TraceeState {
        thread,
        process,
        registers,
        blocked,
        calls,
        alone: Some(back),
    });
    signals(thread, SET_SIGNALS, &mut !0).map_err(|_| StopError::Gone)?;
    let page = match point.page {
        Some(page) => page,
        None => {
            let (rights, bytes) = (PROT_READ | PROT_EXEC, PAGE + SCRATCH);
            let page = tracee.map(0, bytes, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1);
            let page = page.map_err(failed("it gets no memory for code"))?;
            if let Err(error) = target::write_code(process, page, &self::page()) {
                let _ = tracee.call(libc::SYS_munmap, [page, bytes as u64, 0, 0, 0, 0]);
                return Err(refused(format!("its memory cannot be written: {error}")));
            }
            point.page = Some(page);
            page
        }
    };
    tracee.call_by(page + CLONE, at + Frame::RETURNED);
    let flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    let cloned = tracee.call(libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0]);
    cloned.map_err(failed("it gets no thread more"))?;
    // As this process numbers it, which the call's result does not.
    let new = loop {
        match waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Ok(WaitStatus::PtraceEvent(new, ..) | WaitStatus::Stopped(new, _)) if new != thread => break new,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Err(InjectError::Stop(StopError::Gone)),
        }
    };
    drop(tracee);
    let stood = begin.elapsed();
    // Where msrgate is killed, a call that it has begun with and that has not begun yet is one that the sandbox stops.
    if candidate.filters > 0 {
        hurry(new.as_raw());
    }
    let registers = ptrace::getregs(new).map_err(|_| StopError::Gone)?;
    let mut own = tracer.held(TraceeState {
        thread: new,
        process,
        registers: user_regs_struct {
            rip: page + EXIT,
            orig_rax: u64::MAX,
            rbx: 0,
            ..registers
        },
        blocked: !0,
        alone: Some((libc::SYS_exit, registers.rsp)),
        calls: user_regs_struct {
            rip: page + CALL,
            rbx: 0,
            ..registers
        },
    });
    // Whoever made the page may have been killed before this.
    let scratch = page + PAGE as u64;
    let data = (PROT_READ | PROT_WRITE) as u64;
    let writable = own.call(libc::SYS_mprotect, [scratch, SCRATCH as u64, data, 0, 0, 0]);
    writable.map_err(failed("it gets no memory for arguments"))?;
    own.scratch = Some(scratch);
    Ok((own, stood))
}

/// Threads of a VMM that stood still.
#[derive(Default)]
pub(crate) struct StopRecord {
    /// How long one did at most.
    pub(crate) longest: StopTime,
    /// Those that were told to, and did not yet: each does until it is let go.
    pub(crate) late: Vec<i32>,
    /// Why one cannot be told to.
    pub(crate) refused: Option<String>,
}

/// Has each thread that is in KVM_RUN come out of it, but for `own`. By where its instruction is it makes the call `again`, of
/// which the VMM sees nothing, or the call gives EINTR. For each it has so much patience. Gives where the instructions are.
pub(crate) fn interrupt_runs(
    tracer: &Tracer,
    own: &Tracee,
    still: &mut StopRecord,
    patience: Duration,
    mut again: impl FnMut(u64, Pid, i64) -> bool,
) -> BTreeSet<u64> {
    let mut sites = BTreeSet::new();
    still.late.retain(|thread| target::process(*thread) != 0);
    for candidate in candidates(own.process, tracer) {
        let is_told = still.late.contains(&candidate.thread);
        if candidate.makes_another_call() && !is_told || candidate.thread == own.thread().as_raw() {
            continue;
        }
        let thread = Pid::from_raw(candidate.thread);
        if !is_told && let Err(error) = tracer.seize(thread, Options::empty()) {
            if let StopError::Refused(line) = error {
                still.refused = Some(line);
            }
            continue;
        }
        let told = Instant::now();
        if !is_told && ptrace::interrupt(thread).is_err() {
            continue;
        }
        let begin = wait_for(thread, told, patience);
        still.late.retain(|late| *late != candidate.thread);
        let begin = match begin {
            Ok(begin) => begin,
            Err(InjectError::Busy) => {
                still.late.push(candidate.thread);
                continue;
            }
            Err(_) => continue,
        };
        sites.extend(go_on(thread, |site| again(site, thread, candidate.filters)));
        still.longest = still.longest.max(begin.elapsed());
    }
    sites
}

/// Whether a thread that is on a CPU runs a vCPU: it stands still for as long as it takes to see that. `is_image` knows instructions
/// that are on the way there or back.
pub(crate) fn runs(tracer: &Tracer, process: i32, thread: i32, vcpu: u64, is_image: impl Fn(u64) -> bool) -> Other {
    let thread = Pid::from_raw(thread);
    if tracer.seize(thread, Options::empty()).is_err() || ptrace::interrupt(thread).is_err() {
        return Other::May;
    }
    if wait_interrupted(thread, process).is_none() {
        return Other::None;
    }
    let Ok(registers) = ptrace::getregs(thread) else {
        return Other::None;
    };
    go_on(thread, |_| true);
    let object = || Object::of(thread.as_raw(), registers.rdi as i32);
    match () {
        () if is_run(&registers) && object().is_ok_and(|object| object == Object::Vcpu(vcpu)) => Other::Runs,
        () if !is_run(&registers) && is_image(registers.rip) => Other::May,
        () => Other::None,
    }
}

/// Lets a thread go on; gives where its KVM_RUN is, where it makes one.
fn go_on(thread: Pid, again: impl FnOnce(u64) -> bool) -> Option<u64> {
    let registers = ptrace::getregs(thread).ok();
    let site = registers.as_ref().and_then(run_site);
    if let (Some(mut registers), Some(site)) = (registers, site)
        && again(site)
        && registers.rax.cast_signed() == i64::from(-libc::EINTR)
    {
        registers.rax = RESTART.cast_unsigned();
        let _ = ptrace::setregs(thread, registers);
    }
    let _ = ptrace::detach(thread, None);
    site
}

impl StopRecord {
    /// Lets those go on that are late and stand still now.
    pub(crate) fn let_go(&mut self) {
        self.late.retain(|thread| {
            let thread = Pid::from_raw(*thread);
            match changed(thread, libc::WNOHANG) {
                Change::Nothing => true,
                Change::Stopped(Stop::Signal(signal)) => {
                    deliver(thread, signal);
                    true
                }
                Change::Stopped(_) => {
                    go_on(thread, |_| true);
                    false
                }
                Change::Gone => false,
            }
        });
    }
}

fn is_run(registers: &user_regs_struct) -> bool {
    registers.orig_rax == libc::SYS_ioctl.cast_unsigned() && registers.rsi as u32 == abi::RUN
}

/// Where the instruction is by which a thread makes KVM_RUN, if it makes one. A thread whose call the kernel restarts is before that
/// instruction already, with the number of the call in RAX, which no KVM_RUN gives.
fn run_site(registers: &user_regs_struct) -> Option<u64> {
    let len = if registers.rax == registers.orig_rax {
        0
    } else {
        SYSCALL.len()
    };
    is_run(registers).then(|| registers.rip.wrapping_sub(len as u64))
}

/// The registers of a thread that goes on by itself out of a call that was interrupted: as the kernel would set them.
fn by_itself(registers: user_regs_struct) -> user_regs_struct {
    let number = match registers.rax.cast_signed() {
        -514..=-512 => registers.orig_rax,
        -516 => libc::SYS_restart_syscall.cast_unsigned(),
        _ => return registers,
    };
    user_regs_struct {
        rax: number,
        rip: registers.rip.wrapping_sub(2),
        ..registers
    }
}

/// Waits for a thread that was told to stand still, and gives when it was last seen not to.
fn wait_for(thread: Pid, told: Instant, patience: Duration) -> Result<Instant, InjectError> {
    let mut ran = told;
    loop {
        let now = Instant::now();
        match changed(thread, libc::WNOHANG) {
            Change::Nothing if told.elapsed() > patience => return Err(InjectError::Busy),
            Change::Nothing => {
                ran = now;
                std::thread::sleep(Duration::from_micros(20));
            }
            // It came before the thread was told to stand still.
            Change::Stopped(Stop::Signal(signal)) => deliver(thread, signal),
            Change::Stopped(_) => return Ok(ran),
            Change::Gone => return Err(InjectError::Stop(StopError::Gone)),
        }
    }
}

/// The extended state of a thread.
fn extended(thread: Pid) -> Result<Vec<u8>, Errno> {
    const NT_PRFPREG: usize = 2;
    const NT_X86_XSTATE: usize = 0x202;
    let mut state = vec![0_u8; 4 * PAGE];
    for kind in [NT_X86_XSTATE, NT_PRFPREG] {
        let mut part = libc::iovec {
            iov_base: state.as_mut_ptr().cast(),
            iov_len: state.len(),
        };
        // SAFETY: the kernel writes as many bytes at most as the vector says, which live over the call, and then how many.
        let result = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, thread.as_raw(), kind, &raw mut part) };
        if result == 0 {
            state.truncate(part.iov_len);
            return Ok(state);
        }
    }
    Err(Errno::last())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::{Child, ChildStdout, Command, Stdio};

    use super::*;
    use crate::seccomp::Cookies;

    /// The process that this test's own program is to enter over and over.
    const TARGET: &str = "MSRGATE_TEST_TARGET";

    fn cat() -> (Child, BufReader<ChildStdout>) {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        (child, from)
    }

    fn tracer() -> Tracer {
        Tracer::of_others(Cookies::new().unwrap())
    }

    /// What is to be the same afterwards, but for the page: signals, and that there is one thread and it is not traced.
    fn state(process: i32) -> Vec<String> {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let kept = ["Threads:", "TracerPid:", "SigBlk:", "SigPnd:", "ShdPnd:"];
        let lines = status
            .lines()
            .filter(|line| kept.iter().any(|kept| line.starts_with(kept)));
        lines.map(str::to_owned).collect()
    }

    fn settled(process: i32, before: &[String]) {
        let begin = Instant::now();
        while state(process) != before {
            assert!(
                begin.elapsed() < Duration::from_secs(600),
                "{:?} and not {before:?}",
                state(process)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_instruction_of_a_run_is_known_before_and_after_the_kernel_restarts_it() {
        // SAFETY: the structure is numbers alone.
        let zero: user_regs_struct = unsafe { std::mem::zeroed() };
        let run = user_regs_struct {
            orig_rax: libc::SYS_ioctl.cast_unsigned(),
            rsi: u64::from(abi::RUN),
            ..zero
        };
        for (rax, rip) in [
            (0, 0x1002),
            (i64::from(-libc::EINTR), 0x1002),
            (RESTART, 0x1002),
            (libc::SYS_ioctl, 0x1000),
        ] {
            let registers = user_regs_struct {
                rax: rax.cast_unsigned(),
                rip,
                ..run
            };
            assert_eq!(run_site(&registers), Some(0x1000), "{rax}");
            assert_eq!(
                run_site(&user_regs_struct {
                    orig_rax: u64::MAX,
                    ..registers
                }),
                None
            );
        }
    }

    #[test]
    fn pages_of_code_are_found_however_many_there_are() {
        let (process, count) = (std::process::id().cast_signed(), 5000);
        let (rights, flags) = (PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS);
        // SAFETY: new memory where the kernel likes; it replaces none, and is not run.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), count * PAGE, rights, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let wanted = [70, 1023, 1024, count - 1].map(|page| start as u64 + (page * PAGE) as u64);
        for page in wanted {
            target::write_code(process, page, b"wanted").unwrap();
        }
        assert_eq!(code_pages(process, |begin| begin.starts_with(b"wanted")), wanted);
        // SAFETY: the mapping from above, to which nothing refers.
        unsafe { libc::munmap(start, count * PAGE) };
    }

    #[test]
    fn enters_for_ever() {
        let Some(process) = std::env::var(TARGET).ok().and_then(|process| process.parse().ok()) else {
            return;
        };
        let tracer = tracer();
        loop {
            // Whoever kills this process looks at what is left.
            let _ = within(&tracer, process, |mut own, _| own.call(libc::SYS_getpid, [0; 6]));
            std::io::stderr().write_all(b".").unwrap();
        }
    }

    fn reads(process: i32) {
        let begin = Instant::now();
        while !fs::read_to_string(format!("/proc/{process}/syscall"))
            .unwrap()
            .starts_with("0 0x0 ")
        {
            assert!(begin.elapsed() < Duration::from_secs(600));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_signal_that_comes_before_a_thread_is_told_to_stand_still_is_not_lost() {
        for signal in [libc::SIGUSR1, libc::SIGRTMIN()] {
            let mut shell = Command::new("sh")
                .arg("-c")
                .arg(format!(
                    "trap 'echo signal' {signal}; echo ready; while read line; do echo $line; done"
                ))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(shell.stdout.take().unwrap()).lines().map(Result::unwrap);
            assert_eq!(lines.next().unwrap(), "ready");
            let process = shell.id().cast_signed();
            // Threads are traced by the thread that seizes them, and other tests wait for theirs.
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let thread = Pid::from_raw(process);
                    tracer().seize(thread, Options::empty()).unwrap();
                    // SAFETY: a system call that takes numbers.
                    assert_eq!(unsafe { libc::kill(process, signal) }, 0);
                    let is_stopped = || {
                        fs::read_to_string(format!("/proc/{process}/stat"))
                            .unwrap()
                            .contains(") t ")
                    };
                    while !is_stopped() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    ptrace::interrupt(thread).unwrap();
                    assert!(wait_for(thread, Instant::now(), PATIENCE).is_ok());
                    go_on(thread, |_| true);
                });
            });
            drop(shell.stdin.take());
            assert_eq!(lines.collect::<Vec<_>>(), ["signal"]);
            shell.wait().unwrap();
        }
    }

    #[test]
    fn calls_are_made_in_the_process_and_nothing_else_changes() {
        let (mut child, mut from) = cat();
        let process = child.id().cast_signed();
        reads(process);
        let before = state(process);
        let pages = target::mappings(process).len();
        for _ in 0..20 {
            let done = within(&tracer(), process, |mut own, _| own.call(libc::SYS_getpid, [0; 6])).unwrap();
            assert_eq!(done, Ok(process as u64));
        }
        settled(process, &before);
        // Code, and memory for arguments.
        assert!(target::mappings(process).len() <= pages + 2);
        child.stdin.take().unwrap().write_all(b"still\n").unwrap();
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        assert_eq!(line, "still\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_process_is_stopped_though_a_thread_that_makes_calls_gets_the_signal() {
        let (mut child, mut from) = cat();
        let process = child.id().cast_signed();
        reads(process);
        for _ in 0..20 {
            let done = within(&tracer(), process, |mut own, _| {
                // SAFETY: a system call that takes numbers.
                let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, own.thread().as_raw(), libc::SIGSTOP) };
                assert_eq!(sent, 0);
                own.call(libc::SYS_getpid, [0; 6])
            });
            assert_eq!(done.unwrap(), Ok(process as u64));
            while !target::is_stopped(process) {
                std::thread::sleep(Duration::from_millis(1));
            }
            // SAFETY: a system call that takes numbers.
            assert_eq!(unsafe { libc::kill(process, libc::SIGCONT) }, 0);
            reads(process);
        }
        child.stdin.take().unwrap().write_all(b"still\n").unwrap();
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        assert_eq!(line, "still\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn whoever_is_killed_leaves_the_process_as_it_was() {
        let (mut seed, mut first) = (1_u32, Duration::ZERO);
        for round in 1..=60 {
            let (mut child, mut from) = cat();
            let process = child.id().cast_signed();
            reads(process);
            let before = state(process);
            let begin = Instant::now();
            let mut enters = Command::new(std::env::current_exe().unwrap());
            let mut enters = enters
                .args(["--exact", "inject::tests::enters_for_ever"])
                .env(TARGET, process.to_string())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // It has entered so often, and is killed some time later: the moment is chance, and what is asked for depends on none.
            let mut entered = vec![0; round % 4];
            enters.stderr.as_mut().unwrap().read_exact(&mut entered).unwrap();
            if round % 4 == 1 {
                first = begin.elapsed();
            }
            seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12345);
            std::thread::sleep(first * (seed >> 8 & 0xff) / 256);
            enters.kill().unwrap();
            enters.wait().unwrap();
            settled(process, &before);
            let mut to = child.stdin.take().unwrap();
            writeln!(to, "round {round}").unwrap();
            let mut line = String::new();
            from.read_line(&mut line).unwrap();
            assert_eq!(line, format!("round {round}\n"));
            drop(to);
            assert!(child.wait().unwrap().success());
        }
    }
}
