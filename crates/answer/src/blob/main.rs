//! The answerer: makes a VMM's KVM_RUN, answers the MSR exits that are the policy's, and enters the guest again.
//!
//! It runs on the VMM's thread, at the VMM's own call. It allocates nothing, takes no lock, makes no system call but
//! KVM_RUN and where it asks through memory `futex`, uses no register that `syscall` leaves alone, SSE among them, and no
//! memory but what `layout` describes.
//!
//! All of it is one function, so that the stack pointer is the same from each KVM_RUN to the next: see [`Canary`].
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

#[allow(dead_code)]
#[path = "../layout.rs"]
mod layout;

/// KVM's numbers, as `msrgate_core::abi` has them.
#[allow(dead_code)]
mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}

use abi::kvm_run as field;
use layout::{control, image, private, question, reply, slot, table, vcpu};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// A call of `entry` does what `syscall` does with EAX 16 and ESI KVM_RUN, and changes the registers that it changes.
global_asm!(
    ".section .text.entry,\"ax\"",
    ".globl entry",
    "entry: jmp 2f",
    ".ascii \"msrgate answer\"",
    "parameters: .fill 6, 8, 0",
    "2: push rdi",
    "push rsi",
    "push rdx",
    "push r10",
    "push r8",
    "push r9",
    "push rbp",
    "mov rbp, rsp",
    "and rsp, -16",
    "call {run}",
    "mov rsp, rbp",
    "pop rbp",
    "pop r9",
    "pop r8",
    "pop r10",
    "pop rdx",
    "pop rsi",
    "pop rdi",
    "ret",
    run = sym run,
);

unsafe extern "C" {
    static parameters: [u64; image::COUNT];
}

const EAGAIN: i64 = -11;
const EINTR: i64 = -4;
/// No question.
const NOTHING: u64 = 0xff;
/// `FUTEX_WAIT_PRIVATE` and `FUTEX_WAKE_PRIVATE`.
const WAIT: u64 = 0x80;
const WAKE: u64 = 0x81;
/// How often, in nanoseconds, a question that has no answer looks whether there will be one.
const LOOKS: u64 = 100_000_000;
/// What no answer is.
const NOBODY_THERE: i64 = -1;
/// What no kernel writes into `exit_reason`.
const NOBODY: u32 = 0x6d73_7267;
/// What no VMM writes into `immediate_exit`.
const OURS: u8 = 2;
/// Exits that are answered in one KVM_RUN, which then gives EINTR. A guest that does nothing but make them keeps no VMM
/// from stopping it whose signal left no trace here: its handler has a stack of its own (`sigaltstack(2)`), or the
/// thread's must not be written to.
const MOST: u32 = 1024;
/// `Disposition::Fault` with `FaultCause::NoRule`, and with `FaultCause::UnknownReason`.
const NO_RULE: u64 = 12 | 1 << 8;
const UNKNOWN_REASON: u64 = 12 | 2 << 8;

/// The address of a field of `struct kvm_run`.
#[inline(always)]
fn of(page: u64, field: usize) -> u64 {
    page.wrapping_add(field as u64)
}

#[inline(always)]
fn get<T: Copy>(address: u64) -> T {
    // SAFETY: every address here is one of the memory that the supervisor has mapped for this vCPU or process, at an
    // offset of `layout` or of the kernel's `struct kvm_run`; what lies there is integers.
    unsafe { (address as *const T).read_volatile() }
}

#[inline(always)]
fn set<T>(address: u64, value: T) {
    // SAFETY: as in `get`, and none of what is written is memory that only the supervisor writes.
    unsafe { (address as *mut T).write_volatile(value) }
}

#[inline(always)]
fn at(base: u64, word: usize) -> u64 {
    base.wrapping_add((word as u64).wrapping_mul(8))
}

#[inline(always)]
fn word(base: u64, number: usize) -> u64 {
    get(at(base, number))
}

#[inline(always)]
fn put(base: u64, number: usize, value: u64) {
    set(at(base, number), value);
}

#[inline(always)]
fn atomic(address: u64) -> &'static AtomicU64 {
    // SAFETY: as in `get`: a word that stays mapped as long as the process may get here.
    unsafe { &*(address as *const AtomicU64) }
}

#[inline(always)]
fn parameter(number: usize) -> u64 {
    // SAFETY: words of the image, written before it is mapped; `number` is one of `image`.
    unsafe { (&raw const parameters).cast::<u64>().wrapping_add(number).read_volatile() }
}

#[inline(always)]
fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let mut result = number;
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: KVM_RUN, or a question that reaches no ioctl: they write to `kvm_run` and the guest's memory, and to no
    // memory that Rust knows of. `futex` reads a word and the time that it waits.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") first, in("rsi") second, in("rdx") third, in("r10") fourth,
            in("r8") fifth, in("r9") sixth, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// `ioctl(2)` with what KVM does not look at.
#[inline(always)]
fn ioctl(fd: u64, request: u64, argument: u64, cookie: u64, fifth: u64, sixth: u64) -> i64 {
    call(16, [fd, request, argument, cookie, fifth, sixth])
}

/// `futex(2)` on a word of this process, by operations that sandboxes leave to threads.
#[inline(always)]
fn futex(word: u64, operation: u64, value: u64, time: u64) {
    call(202, [word, operation, value, time, 0, 0]);
}

/// The CPU that runs this, as the kernel tells `getcpu(2)` in the vDSO: the limit of a segment (`__CPUNODE_SEG`).
#[inline(always)]
fn cpu() -> u64 {
    let mut limit = 0_u64;
    // SAFETY: LSL changes this register, and leaves it as it is where there is no such segment.
    unsafe { asm!("lsl {0:e}, {1:e}", inout(reg) limit, in(reg) 0x7b, options(nomem, nostack)) };
    limit & 0xfff
}

/// Wakes whoever answers without a call that waits.
#[inline(always)]
fn ring(process: u64) {
    let bell = at(process, private::BELL);
    atomic(bell).fetch_add(1, Ordering::SeqCst);
    futex(bell, WAKE, 1, 0);
}

/// Asks without a call that waits: the thread that was kept in this process wakes whoever answers.
#[inline(always)]
fn ask_by_memory(process: u64, this: u64, shared: u64, fd: u64, code: u64, data: u64) -> i64 {
    let (answer, kept) = (at(this, slot::ANSWER), at(process, private::KEPT));
    let before = get::<u32>(answer);
    let number = before.wrapping_add(1);
    put(shared, vcpu::QUESTION, code);
    put(shared, vcpu::QUESTION + 1, data);
    let asked = u64::from(number) | cpu() << vcpu::CPU | fd << vcpu::FD;
    atomic(at(shared, vcpu::ASKED)).store(asked, Ordering::SeqCst);
    ring(process);
    let time = [0, LOOKS];
    loop {
        // Looked at first: the last answer comes before the end.
        let is_kept = atomic(kept).load(Ordering::SeqCst) != 0;
        let now = atomic(answer).load(Ordering::SeqCst);
        if now as u32 == number {
            return now as i64 >> 32;
        }
        if !is_kept {
            return NOBODY_THERE;
        }
        futex(answer, WAIT, u64::from(before), (&raw const time) as u64);
    }
}

/// Has whoever answers look which vCPU a descriptor is, without a call that waits, where threads may wait for that.
#[inline(always)]
fn have_it_looked(process: u64, control: u64) {
    let looked = at(control, control::LOOKED);
    let wanted = atomic(at(process, private::WANTED)).fetch_add(1, Ordering::SeqCst);
    let time = [0, LOOKS];
    loop {
        let now = atomic(looked).load(Ordering::SeqCst);
        if now > wanted || atomic(at(process, private::KEPT)).load(Ordering::SeqCst) != private::WAITS {
            return;
        }
        ring(process);
        futex(looked, WAIT, now, (&raw const time) as u64);
    }
}

#[inline(always)]
fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: RDTSC changes these two registers.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Lets go of a slot, unless whoever answers has taken it away already.
#[inline(always)]
fn release(busy: &AtomicU64, held: u64) {
    let _ = busy.compare_exchange(held, held.wrapping_add(1), Ordering::SeqCst, Ordering::SeqCst);
}

/// Has the event that waits, if there is one, seen.
#[inline(always)]
fn publish(shared: u64) {
    if word(shared, vcpu::PENDING_EVENT) != 0 {
        put(shared, vcpu::PENDING_EVENT, 0);
        let written = word(shared, vcpu::WRITTEN).wrapping_add(1);
        atomic(at(shared, vcpu::WRITTEN)).store(written, Ordering::Release);
    }
}

/// Tells whether a signal's handler ran on this stack since it was set: the kernel puts the frame of a signal below the
/// stack pointer and the red zone, and always writes `sw_reserved` of the extended state there. A VMM that stops its
/// vCPUs by a signal with a handler that does nothing wants KVM_RUN to return EINTR, whenever the signal comes.
struct Canary(u64);

impl Canary {
    #[inline(always)]
    fn new() -> Canary {
        let frame = parameter(image::FRAME);
        let stack: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
        if frame == 0 {
            return Canary(0);
        }
        // `get_sigframe`, `fpu__alloc_mathframe`; `sw_reserved` is at 464.
        Canary((stack.wrapping_sub(128 + frame) & !63).wrapping_add(464))
    }

    #[inline(always)]
    fn set(&self) {
        if self.0 != 0 {
            set(self.0, 0_u64);
        }
    }

    #[inline(always)]
    fn is_gone(&self) -> bool {
        self.0 != 0 && get::<u64>(self.0) != 0
    }
}

// Named, so that its machine code can be looked at.
#[unsafe(no_mangle)]
extern "sysv64" fn run(fd: u64, request: u64, argument: u64) -> i64 {
    let (process, control) = (parameter(image::PRIVATE), parameter(image::CONTROL));
    let (run_cookie, ask_cookie) = (parameter(image::RUN), parameter(image::ASK));
    let canary = Canary::new();
    canary.set();
    // KVM_RUN was made, on a vCPU that was not this descriptor's slot's.
    let mut ran = false;
    // Where no call waits: it was looked which vCPU the descriptor is, and the slot whose vCPU it is not.
    let (mut looked, mut other) = (false, 0);
    let (mut answered, mut held) = (0, 0);
    loop {
        let alive = fd < control::LIMIT as u64 && word(process, private::ALIVE) != 0;
        let number = if alive { word(control, control::DESCRIPTORS + fd as usize) as usize } else { 0 };
        let this = at(control, control::LIMIT + number * control::SLOT);
        let busy = atomic(at(process, private::BUSY + number));
        let mut code = if ran { question::OTHER } else { question::WHO };
        if number != 0 && number != other {
            code = question::BUSY;
            held = busy.load(Ordering::SeqCst) | 1;
            if busy.compare_exchange(held - 1, held, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                // The supervisor takes a slot away by its descriptors first, and leaves it while it is busy.
                let now = atomic(at(control, control::DESCRIPTORS + fd as usize)).load(Ordering::SeqCst);
                let is_its = now == number as u64 && word(this, slot::READY) != 0;
                code = if is_its { NOTHING } else { question::WHO };
                if !is_its {
                    release(busy, held);
                }
            }
        }
        if code != NOTHING {
            if ask_cookie == 0 {
                if !looked {
                    looked = true;
                    have_it_looked(process, control);
                    continue;
                }
                // What another thread runs is not run past the answerer. Where nobody is there who could be asked, what is left is the
                // VMM's and the kernel's.
                if code == question::BUSY && !ran {
                    return EINTR;
                }
                return if ran { 0 } else { ioctl(fd, request, argument, run_cookie, 0, 0) };
            }
            match ioctl(fd, request, argument, ask_cookie, code, 0) {
                reply::AGAIN => continue,
                EINTR if ran => continue,
                error => return error,
            }
        }
        let (page, shared, flags) = (word(this, slot::RUN), word(this, slot::VCPU), word(this, slot::FLAGS));
        let valid: u64 = get(of(page, field::VALID_REGS));
        let synchronised = flags & (slot::RIP | slot::REDO) != 0;
        // SAFETY: a byte of `kvm_run`, which other threads of the VMM write too.
        let immediate = unsafe { &*((of(page, field::IMMEDIATE_EXIT)) as *const AtomicU8) };
        let result = loop {
            let before: u32 = get(of(page, field::EXIT_REASON));
            if !ran {
                set(of(page, field::EXIT_REASON), NOBODY);
                if synchronised {
                    set(of(page, field::VALID_REGS), valid | field::SYNC_REGS);
                }
                let runs = word(shared, vcpu::RUNS) | 1;
                put(shared, vcpu::RUNS, runs);
                let result = ioctl(fd, request, argument, run_cookie, 0, 0);
                put(shared, vcpu::RUNS, runs.wrapping_add(1));
                if get::<u32>(of(page, field::EXIT_REASON)) == NOBODY {
                    set(of(page, field::EXIT_REASON), before);
                    ran = result == 0;
                    break result;
                }
                if result != 0 {
                    break result;
                }
            }
            ran = false;
            let exit: u32 = get(of(page, field::EXIT_REASON));
            let is_msr = exit == abi::EXIT_X86_RDMSR || exit == abi::EXIT_X86_WRMSR;
            let pending = word(shared, vcpu::PENDING);
            if !is_msr && pending == 0 {
                break 0;
            }
            let began = ticks();
            let write = exit == abi::EXIT_X86_WRMSR;
            let why = u64::from(get::<u32>(of(page, field::REASON)));
            let msr = u64::from(get::<u32>(of(page, field::INDEX)));
            let data: u64 = get(of(page, field::DATA));
            let key = 1 << 63 | msr << 1 | u64::from(write);
            // The guest is at the access that it is to make again where no register has changed since. That it makes it
            // again comes to an exit only where the kernel refuses it, and then the event that waits is this one's.
            let mut again = pending != 0;
            let mut open = pending == key;
            if pending != 0 {
                for register in 0..abi::REGS_BYTES / 8 {
                    again &= get::<u64>(of(page, field::REGS + register * 8)) == word(shared, vcpu::REGISTERS + register);
                }
                open &= again;
                if is_msr {
                    again &= pending == key && why != u64::from(abi::REASON_FILTER);
                }
                if !again {
                    publish(shared);
                }
                if !again || is_msr {
                    put(shared, vcpu::PENDING, 0);
                }
            }
            if !is_msr {
                break 0;
            }

            // What it gets: the entry, or the default of its reason.
            let tables = word(this, slot::TABLE);
            let mut entry = at(tables, table::DEFAULTS + usize::from(write) * table::ENTRY);
            let known = [abi::REASON_INVALID, abi::REASON_UNKNOWN, abi::REASON_FILTER].contains(&(why as u32));
            if why == u64::from(abi::REASON_FILTER) {
                let (mut low, mut high) = (0, word(tables, table::COUNTS) as usize);
                if write {
                    (low, high) = (high, high + word(tables, table::COUNTS + 1) as usize);
                }
                while low < high {
                    let middle = low + (high - low) / 2;
                    let candidate = at(tables, table::ENTRIES + middle * table::ENTRY);
                    let range = word(candidate, table::RANGE);
                    if msr < range & 0xffff_ffff {
                        high = middle;
                    } else if msr > range >> 32 {
                        low = middle + 1;
                    } else {
                        entry = candidate;
                        break;
                    }
                }
            } else {
                let pair = if why == u64::from(abi::REASON_UNKNOWN) { 2 } else { 4 };
                entry = at(tables, table::DEFAULTS + (pair + usize::from(write)) * table::ENTRY);
            }
            let mut kind = if known { word(entry, table::KIND) } else { table::FAULT };
            if kind & 0xff == table::ROUTE
                && why == u64::from(abi::REASON_FILTER)
                && word(this, slot::FLAGS) & slot::UNSETTLED != 0
            {
                kind = table::ASK | 0xffff_ffff << 32;
            }
            // Another value may be carried out, which is to be told too.
            if again && why == u64::from(abi::REASON_INVALID) {
                kind = table::ASK | 0xffff_ffff << 32;
            }
            let mut told = if known { word(entry, table::TOLD) } else { UNKNOWN_REASON };
            let mut rule = kind >> 32;
            let mut log = word(entry, table::LOG);
            let mut value = if write { data } else { 0 };
            let mut error = 0_u8;
            let mut redo = false;
            match kind & 0xff {
                table::ROUTE => {
                    if word(this, slot::MASK) & why != 0 {
                        publish(shared);
                        break 0;
                    }
                    error = 1;
                }
                table::ANSWER => value = word(entry, table::VALUE),
                table::DONE => {}
                table::LOAD | table::STORE => {
                    let first = word(entry, table::RANGE) & 0xffff_ffff;
                    let cell = word(entry, table::CELL).wrapping_add(msr - first) as usize;
                    let cell = at(shared, vcpu::CELLS + 2 * cell);
                    if write {
                        put(cell, 1, data);
                        put(cell, 0, 1);
                    } else if word(cell, 0) != 0 {
                        value = word(cell, 1);
                    } else {
                        value = word(entry, table::VALUE);
                    }
                }
                table::ASK => {
                    let code = question::EXIT | why << 8 | u64::from(write) << 12 | (number as u64) << 16 | msr << 32;
                    let answer = loop {
                        if ask_cookie == 0 {
                            break ask_by_memory(process, this, shared, fd, code, data);
                        }
                        let answer = ioctl(fd, request, argument, ask_cookie, code, data);
                        // A signal came before the supervisor saw the question; the canary tells of it.
                        if answer != EINTR && answer != EAGAIN {
                            break answer;
                        }
                    };
                    told = word(shared, vcpu::REPLY + 1);
                    rule = word(shared, vcpu::REPLY + 2);
                    log = word(shared, vcpu::REPLY + 3);
                    if !write {
                        value = word(shared, vcpu::REPLY);
                    }
                    match answer {
                        reply::ANSWERED => {}
                        reply::VMM => {
                            publish(shared);
                            break 0;
                        }
                        reply::REDO | reply::TOLD => redo = true,
                        reply::FAULTED => error = 1,
                        // Nobody is there who answers, and what was watched is open: the guest makes the access again, once.
                        NOBODY_THERE if flags & slot::LET_GO != 0 && !open => (redo, log) = (true, u64::MAX),
                        NOBODY_THERE
                            if (flags & slot::LET_GO != 0 || word(entry, table::KIND) & 0xff == table::ROUTE)
                                && word(this, slot::MASK) & why != 0 =>
                        {
                            publish(shared);
                            break 0;
                        }
                        _ => (error, told, rule, log) = (1, NO_RULE, 0xffff_ffff, 0),
                    }
                    if answer == reply::REDO {
                        log = u64::MAX;
                    }
                }
                _ => error = 1,
            }
            if error == 0 && !write && !redo {
                set(of(page, field::DATA), value);
            }
            set(of(page, field::ERROR), error);
            // So that the exit is not taken for a new one, where KVM_RUN next gives EINTR.
            set(of(page, field::EXIT_REASON), abi::EXIT_INTR);
            let rip: u64 = if synchronised { get(of(page, field::REGS + abi::REGS_RIP)) } else { 0 };

            if redo {
                // The kernel drops no pending access. It is completed without a guest instruction being executed, and the
                // registers are put back.
                for register in 0..abi::REGS_BYTES / 8 {
                    let value: u64 = get(of(page, field::REGS + register * 8));
                    put(shared, vcpu::REGISTERS + register, value);
                }
                set(of(page, field::VALID_REGS), valid);
                let wanted = immediate.swap(OURS, Ordering::SeqCst);
                ioctl(fd, request, argument, run_cookie, 0, 0);
                for register in 0..abi::REGS_BYTES / 8 {
                    let value = word(shared, vcpu::REGISTERS + register);
                    set(of(page, field::REGS + register * 8), value);
                }
                set(of(page, field::DIRTY_REGS), get::<u64>(of(page, field::DIRTY_REGS)) | field::SYNC_REGS);
                ioctl(fd, request, argument, run_cookie, 0, 0);
                let _ = immediate.compare_exchange(OURS, wanted, Ordering::SeqCst, Ordering::SeqCst);
                set(of(page, field::EXIT_REASON), abi::EXIT_INTR);
            }

            if log != u64::MAX {
                let now = ticks();
                let took = now.wrapping_sub(began);
                let (op, told) = (u64::from(write), told | why << 16);
                let would = if again { word(shared, vcpu::REPLY + 1) & 0xff << vcpu::WOULD } else { 0 };
                let told = told | would;
                if redo {
                    put(shared, vcpu::PENDING, key);
                }
                // Counted by MSR and direction.
                let place = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize;
                let mut probe = 0;
                loop {
                    if probe == vcpu::PROBES {
                        put(shared, vcpu::UNCOUNTED, word(shared, vcpu::UNCOUNTED).wrapping_add(1));
                        break;
                    }
                    let place = (place + probe) % vcpu::TALLY_COUNT;
                    let tally = at(shared, vcpu::TALLIES + place * vcpu::TALLY);
                    let found = word(tally, 0);
                    if found == key || found == 0 {
                        put(tally, 1, word(tally, 1).wrapping_add(u64::from(!again)));
                        put(tally, 2, value);
                        put(tally, 3, told);
                        put(tally, 4, word(tally, 4).wrapping_add(took));
                        if error != 0 {
                            put(tally, 5, word(tally, 5).wrapping_add(1));
                            put(tally, 6, told);
                            put(tally, 7, rip);
                        }
                        // Who sees the key sees the rest.
                        atomic(tally).store(key, Ordering::Release);
                        break;
                    }
                    probe += 1;
                }
                // An event, where it is wanted; before it, how many found no room.
                if log & 3 != 0 || flags & slot::EVENTS != 0 {
                    let mut written = word(shared, vcpu::WRITTEN);
                    let taken = atomic(at(shared, vcpu::TAKEN)).load(Ordering::Acquire);
                    let missed = word(shared, vcpu::MISSED);
                    let room = vcpu::EVENT_COUNT as u64 - written.wrapping_sub(taken);
                    if room < 1 + u64::from(missed != 0) {
                        put(shared, vcpu::MISSED, missed + 1);
                    } else {
                        let who = word(this, slot::WHO);
                        if missed != 0 {
                            let event = at(shared, vcpu::EVENTS + written as usize % vcpu::EVENT_COUNT * vcpu::EVENT);
                            put(event, 0, now);
                            put(event, 1, missed);
                            put(event, 3, who << 32);
                            put(event, 4, who >> 32);
                            put(event, 5, vcpu::GAP);
                            put(shared, vcpu::MISSED, 0);
                            written = written.wrapping_add(1);
                        }
                        let event = at(shared, vcpu::EVENTS + written as usize % vcpu::EVENT_COUNT * vcpu::EVENT);
                        put(event, 0, now);
                        put(event, 1, value);
                        put(event, 2, rip);
                        put(event, 3, msr | who << 32);
                        put(event, 4, who >> 32 | rule << 32);
                        let has_rip = if flags & slot::RIP != 0 { vcpu::HAS_RIP } else { 0 };
                        let has_cost = if redo { 0 } else { vcpu::HAS_COST };
                        // Where an access is made again no instruction was executed since.
                        let within = u64::from(get::<u16>(of(page, field::FLAGS))) << vcpu::WITHIN;
                        put(event, 5, told | op << 24 | has_rip | has_cost | within);
                        put(event, 6, log);
                        put(event, 7, took);
                        // One that waited was here. It is seen where it is known how it ends, and a gap before it at once.
                        put(shared, vcpu::PENDING_EVENT, redo.into());
                        let seen = written.wrapping_add(u64::from(!redo));
                        atomic(at(shared, vcpu::WRITTEN)).store(seen, Ordering::Release);
                    }
                }
            }
            answered += 1;
            if answered == MOST || canary.is_gone() {
                // The access is completed first, as the kernel does before it gives EINTR: the VMM may set registers.
                let wanted = immediate.swap(OURS, Ordering::SeqCst);
                let result = ioctl(fd, request, argument, run_cookie, 0, 0);
                let _ = immediate.compare_exchange(OURS, wanted, Ordering::SeqCst, Ordering::SeqCst);
                break result;
            }
        };
        if synchronised {
            set(of(page, field::VALID_REGS), valid);
        }
        release(busy, held);
        if !ran {
            return result;
        }
        if ask_cookie == 0 {
            other = number;
            continue;
        }
        match ioctl(fd, request, argument, ask_cookie, question::OTHER, 0) {
            reply::AGAIN | EINTR => {}
            error => return error,
        }
    }
}
