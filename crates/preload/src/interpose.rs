//! The functions that a VMM calls in the place of libc's.
//!
//! Each does what libc's does, tells the hook, and is as short as that. A panic ends the process.

#![expect(unsafe_code, reason = "symbols that the dynamic linker binds, and a constructor")]

use std::sync::OnceLock;

use libc::{c_int, c_long, c_uint, c_ulong};
use msrgate_hook::{Hook, Received, Setup, VARIABLE};

use crate::libc_calls;
use crate::live::Live;

/// There once the process has asked for a VM. Most processes that load this library never do.
static HOOK: OnceLock<Hook<Live>> = OnceLock::new();

/// What `msrgate run` handed over, taken before the program can close the descriptor.
static RECEIVED: OnceLock<Result<Received, String>> = OnceLock::new();

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    let received = match std::env::var(VARIABLE) {
        Ok(variable) => Received::from_variable(&variable).map_err(|error| error.to_string()),
        Err(_) => Err(format!("{VARIABLE} is not set: start the VMM by `msrgate run`")),
    };
    // The constructor runs once.
    let _ = RECEIVED.set(received);
}

fn setup() -> Result<Setup, String> {
    let received = RECEIVED.get().ok_or("the library was not initialised")?.as_ref()?;
    Ok(Setup {
        map: received.map().map_err(|error| error.to_string())?,
        board: Some(received.board().map_err(|error| error.to_string())?),
    })
}

fn hook() -> &'static Hook<Live> {
    HOOK.get_or_init(|| {
        // SAFETY: three functions that live as long as this library, which is never unloaded.
        unsafe { libc::pthread_atfork(Some(forking), Some(forked_parent), Some(forked_child)) };
        Hook::new(Live, setup)
    })
}

extern "C" fn forking() {
    HOOK.get().inspect(|hook| hook.forking());
}

extern "C" fn forked_parent() {
    HOOK.get().inspect(|hook| hook.forked_parent());
}

extern "C" fn forked_child() {
    HOOK.get().inspect(|hook| hook.forked_child());
}

/// `ioctl(2)`.
#[unsafe(no_mangle)]
extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    match HOOK.get() {
        Some(hook) => hook.ioctl(fd, request, argument),
        None if Hook::<Live>::begins(request) => hook().ioctl(fd, request, argument),
        None => libc_calls::ioctl(fd, request, argument),
    }
}

/// `close(2)`.
#[unsafe(no_mangle)]
extern "C" fn close(fd: c_int) -> c_int {
    HOOK.get().inspect(|hook| hook.closing(fd));
    libc_calls::close(fd)
}

/// `close_range(2)`.
#[unsafe(no_mangle)]
extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // With one of them nothing is closed yet, with the other not for all threads.
    if flags as c_uint & (libc::CLOSE_RANGE_CLOEXEC | libc::CLOSE_RANGE_UNSHARE) == 0 {
        HOOK.get().inspect(|hook| hook.closing_range(first, last));
    }
    libc_calls::close_range(first, last, flags)
}

/// `closefrom(3)`.
#[unsafe(no_mangle)]
extern "C" fn closefrom(first: c_int) {
    HOOK.get()
        .inspect(|hook| hook.closing_range(c_uint::try_from(first).unwrap_or(0), c_uint::MAX));
    libc_calls::closefrom(first);
}

fn duplicated(old: c_int, new: c_int) -> c_int {
    HOOK.get().map_or(new, |hook| hook.duplicated(old, new))
}

/// `dup(2)`.
#[unsafe(no_mangle)]
extern "C" fn dup(old: c_int) -> c_int {
    duplicated(old, libc_calls::dup(old))
}

/// `dup2(2)`.
#[unsafe(no_mangle)]
extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    duplicated(old, libc_calls::dup2(old, new))
}

/// `dup3(2)`.
#[unsafe(no_mangle)]
extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    duplicated(old, libc_calls::dup3(old, new, flags))
}

fn after_fcntl(fd: c_int, command: c_int, result: c_int) -> c_int {
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, result),
        _ => result,
    }
}

/// `fcntl(2)`.
#[unsafe(no_mangle)]
extern "C" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    after_fcntl(fd, command, libc_calls::fcntl(fd, command, argument))
}

/// `fcntl(2)` of programs with 64-bit file offsets.
#[unsafe(no_mangle)]
extern "C" fn fcntl64(fd: c_int, command: c_int, argument: usize) -> c_int {
    after_fcntl(fd, command, libc_calls::fcntl64(fd, command, argument))
}

/// `syscall(2)`. Who calls it with fewer arguments leaves others undefined, which the kernel does not look at.
#[unsafe(no_mangle)]
extern "C" fn syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long {
    // The kernel takes 32 bits of a descriptor, a command and flags.
    let int = |word: usize| word as c_int;
    let result = match number {
        libc::SYS_ioctl => ioctl(int(a), b as c_ulong, c),
        libc::SYS_close => close(int(a)),
        libc::SYS_close_range => close_range(a as c_uint, b as c_uint, int(c)),
        libc::SYS_dup => dup(int(a)),
        libc::SYS_dup2 => dup2(int(a), int(b)),
        libc::SYS_dup3 => dup3(int(a), int(b), int(c)),
        libc::SYS_fcntl => fcntl(int(a), int(b), c),
        _ => return libc_calls::syscall(number, a, b, c, d, e, f),
    };
    c_long::from(result)
}
