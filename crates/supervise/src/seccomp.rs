//! Which calls of a VMM the kernel lets wait for the supervisor.
//!
//! A seccomp filter with a listener, which the VMM and all that it starts inherit, and which nothing can shed.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_ulong, seccomp_data, seccomp_notif, seccomp_notif_addfd, seccomp_notif_resp, sock_filter};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// `_IOWR('!', 0, struct seccomp_notif)`.
const RECEIVE: c_ulong = 0xc050_2100;
/// `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SEND: c_ulong = 0xc018_2101;
/// `_IOW('!', 3, struct seccomp_notif_addfd)`.
const ADD_DESCRIPTOR: c_ulong = 0x4018_2103;
const _: () = assert!(size_of::<seccomp_notif>() == 0x50 && size_of::<seccomp_notif_resp>() == 0x18);
const _: () = assert!(size_of::<seccomp_notif_addfd>() == 0x18);
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, from Linux 5.19 on.
const WAIT_KILLABLE: c_ulong = 1 << 5;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `ioctl` of 32-bit programs.
pub(crate) const IOCTL_32: u32 = 54;
/// `ioctl` of x32 programs, `__X32_SYSCALL_BIT` included.
pub(crate) const IOCTL_X32: u32 = 0x4000_0000 | 514;

/// Values that nothing but this run knows, which calls have as their fourth argument: KVM looks at three.
#[derive(Clone, Copy, Debug)]
pub struct Cookies {
    /// A KVM_RUN of the answerer.
    pub(crate) run: u64,
    /// A call that the supervisor makes on a VMM's thread.
    pub(crate) call: u64,
    /// A question of the answerer: the kernel's filter does not know it, so that it waits.
    pub(crate) ask: u64,
}

impl Cookies {
    /// New ones.
    ///
    /// # Errors
    /// The kernel's, which gives no random numbers.
    pub fn new() -> io::Result<Cookies> {
        let mut bytes = [0; 24];
        let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        if got != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let cookie = |number: usize| {
            let bytes = bytes.as_chunks().0.get(number).copied().unwrap_or_default();
            // Neither half is 0, which is what most calls have there.
            u64::from_le_bytes(bytes) | 1 << 63 | 1
        };
        Ok(Cookies {
            run: cookie(0),
            call: cookie(1),
            ask: cookie(2),
        })
    }

    /// The cookies for a VMM in which nobody can be asked.
    pub(crate) fn alone(self) -> Cookies {
        Cookies { ask: 0, ..self }
    }

    /// In tags of VMs that ran already.
    pub(crate) const ATTACHED: u64 = 1 << 61;

    /// Likewise, where the kernel alone carries out what is in force on them.
    pub(crate) const IN_KERNEL: u64 = 1 << 62;

    /// The first tag of VMs that ran already.
    pub(crate) fn attached_tag(&self) -> u64 {
        self.first_tag() & (Cookies::ATTACHED - 1) | Cookies::ATTACHED
    }

    /// Likewise, where the kernel alone carries out what is in force on them.
    pub(crate) fn in_kernel_tag(&self) -> u64 {
        self.first_tag() & (Cookies::ATTACHED - 1) | Cookies::IN_KERNEL
    }

    /// The first of this run's tags: locks of other supervisors are elsewhere.
    pub(crate) fn first_tag(&self) -> u64 {
        self.call >> 4 & !0xffff | 1 << 40
    }
}

/// Where a command's child-to-be sends what the kernel gives it.
#[derive(Debug)]
pub struct Expected(UnixDatagram);

/// Has the command's child, and all that it starts, wait where it makes one of these ioctls; KVM_RUN waits where it is
/// among them and has no cookie.
///
/// Without the right to administer the system the kernel gives such a filter only where `no_new_privs` is set, which
/// then is.
///
/// # Errors
/// The kernel's, where it gives no sockets.
pub fn notify(command: &mut Command, requests: &[u32], cookies: &Cookies, no_new_privs: bool) -> io::Result<Expected> {
    let (ours, theirs) = UnixDatagram::pair()?;
    let mut program = program(requests, cookies);
    let before_exec = move || {
        if no_new_privs {
            nix::sys::prctl::set_no_new_privs()?;
        }
        // Where it cannot be had, there is no VMM: who waits for it learns the error.
        let listener = listen(&mut program);
        let error = listener.as_ref().err().and_then(io::Error::raw_os_error).unwrap_or(0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors: Option<[BorrowedFd<'_>; 1]> = listener.as_ref().ok().map(|listener| [listener.as_fd()]);
        if let Some(descriptors) = &descriptors {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let bytes = error.to_le_bytes();
        sendmsg(&theirs, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty())?;
        listener.map(drop)
    };
    // SAFETY: the closure makes system calls, takes no lock and allocates nothing: its errors are plain numbers.
    unsafe { command.pre_exec(before_exec) };
    Ok(Expected(ours))
}

/// The filter's program. `requests` are few, so that no jump is too long.
fn program(requests: &[u32], cookies: &Cookies) -> Vec<sock_filter> {
    let (load, equal, end) = (
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        (libc::BPF_RET | libc::BPF_K) as u16,
    );
    let step = |code, k, jt: usize, jf: usize| sock_filter {
        code,
        jt: jt as u8,
        jf: jf as u8,
        k,
    };
    let at = |field| u32::try_from(field).unwrap_or(u32::MAX);
    let (number, arch) = (at(offset_of!(seccomp_data, nr)), at(offset_of!(seccomp_data, arch)));
    // The kernel takes the lower half of a request.
    let request = at(offset_of!(seccomp_data, args) + 8);
    let (mark_low, mark_high) = (request + 16, request + 20);
    let run = msrgate_core::abi::RUN;
    let managed: Vec<u32> = requests.iter().copied().filter(|request| *request != run).collect();
    let runs = managed.len() != requests.len();

    let (allow, wait) = (
        step(end, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(end, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
    );
    // Waits but for a cookie.
    let marked = |cookie: u64| {
        [
            step(load, mark_low, 0, 0),
            step(equal, cookie as u32, 0, 3),
            step(load, mark_high, 0, 0),
            step(equal, (cookie >> 32) as u32, 0, 1),
            allow,
            wait,
        ]
    };
    let mut program = vec![
        step(load, arch, 0, 0),
        step(equal, AUDIT_ARCH_X86_64, 3, 0),
        step(load, number, 0, 0),
        step(equal, IOCTL_32, 4, 0),
        allow,
        step(load, number, 0, 0),
        step(equal, libc::SYS_ioctl as u32, 5, 0),
        step(equal, IOCTL_X32, 0, 3),
        // Programs of another kind than x86-64's get no VM.
        step(load, request, 0, 0),
        step(equal, msrgate_core::abi::CREATE_VM, 0, 1),
        wait,
        allow,
    ];
    program.push(step(load, request, 0, 0));
    let calls = marked(cookies.call);
    for (at, request) in managed.iter().enumerate() {
        // Over the other requests, KVM_RUN and `allow`.
        let rest = managed.len() - at - 1;
        program.push(step(equal, *request, rest + usize::from(runs) + 1, 0));
    }
    if runs {
        program.push(step(equal, run, 1 + calls.len(), 0));
    }
    program.push(allow);
    program.extend(calls);
    if runs {
        program.extend(marked(cookies.run));
    }
    program
}

/// The listener of a new filter on this thread.
fn listen(program: &mut [sock_filter]) -> io::Result<OwnedFd> {
    // A filter is not to make the VMM slower by mitigations that it had not, and a signal is to wait while the supervisor
    // works.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    match install(program, flags | WAIT_KILLABLE) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(program, flags),
        result => result,
    }
}

fn install(program: &mut [sock_filter], flags: c_ulong) -> io::Result<OwnedFd> {
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let set = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads the program, so many steps at the address, which live over the call.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, set, flags, &raw const filter) };
    match c_int::try_from(listener) {
        // SAFETY: a descriptor that the kernel just made, and nobody else knows of it.
        Ok(listener) if listener >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(listener) }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Expected {
    /// What tells which calls wait, once the child has started or failed to.
    ///
    /// # Errors
    /// The kernel's, where it gives the child no such filter: EBUSY where another supervisor has one already, as
    /// container runtimes may.
    pub fn listener(self) -> io::Result<Listener> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?;
        let listener = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next().map(Listener),
            _ => None,
        });
        listener.ok_or_else(|| io::Error::from_raw_os_error(i32::from_le_bytes(bytes)))
    }
}

/// Tells which calls wait. It hangs up when nobody is left who could make one.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// A call that waits.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    listener: &'a Listener,
    id: u64,
    /// The thread, as this process numbers it.
    pub(crate) thread: c_int,
    /// The number of the system call.
    pub(crate) number: u32,
    /// The call's arguments.
    pub(crate) arguments: [u64; 6],
    /// Behind the instruction that makes it.
    pub(crate) instruction: u64,
}

impl Listener {
    /// The next one. Waits where there is none.
    ///
    /// # Errors
    /// The kernel's; ENOENT where it no longer waits.
    pub(crate) fn next(&self) -> io::Result<Waiting<'_>> {
        // The kernel wants zeros.
        let mut asked = seccomp_notif {
            id: 0,
            pid: 0,
            flags: 0,
            data: seccomp_data {
                nr: 0,
                arch: 0,
                instruction_pointer: 0,
                args: [0; 6],
            },
        };
        self.ioctl(RECEIVE, &mut asked)?;
        Ok(Waiting {
            listener: self,
            id: asked.id,
            thread: asked.pid.cast_signed(),
            number: asked.data.nr.cast_unsigned(),
            arguments: asked.data.args,
            instruction: asked.data.instruction_pointer,
        })
    }

    fn ioctl<T>(&self, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
        // SAFETY: each of the three requests reads and writes one structure of its own, whose size the asserts above
        // compare, and every caller gives that one.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(result)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Waiting<'_> {
    /// Lets the kernel carry the call out.
    pub(crate) fn allow(&self) {
        // Nobody waits for it any more where it fails.
        let _ = self.respond(0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32);
    }

    /// Gives the call's result; less than 0 is an error.
    ///
    /// # Errors
    /// ENOENT where it no longer waits.
    pub(crate) fn give(&self, result: i64) -> io::Result<()> {
        match result {
            0.. => self.respond(result, 0, 0),
            error => self.respond(0, error as c_int, 0),
        }
    }

    fn respond(&self, val: i64, error: c_int, flags: u32) -> io::Result<()> {
        let mut response = seccomp_notif_resp {
            id: self.id,
            val,
            error,
            flags,
        };
        self.listener.ioctl(SEND, &mut response).map(drop)
    }

    /// Puts a file into the thread's descriptors, and gives its number there.
    pub(crate) fn hand_over(&self, file: &File) -> io::Result<c_int> {
        let mut added = seccomp_notif_addfd {
            id: self.id,
            flags: 0,
            srcfd: file.as_raw_fd().cast_unsigned(),
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC.cast_unsigned(),
        };
        self.listener.ioctl(ADD_DESCRIPTOR, &mut added)
    }
}
