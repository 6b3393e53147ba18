//! Whoever asks for a VM, the kernel lets it wait until the command has looked whether the call is the library's.
//!
//! A seccomp filter that the VMM and all that it starts inherit, whatever becomes of their environment and however they
//! are linked. It looks at KVM_CREATE_VM alone. The library's calls have a mark, where `ioctl` has no argument.

#![expect(unsafe_code, reason = "system calls")]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_ulong, seccomp_data, seccomp_notif, seccomp_notif_resp, sock_filter};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::hook::KVM_CREATE_VM;

/// The fourth argument of KVM_CREATE_VM, which the kernel does not look at.
pub const MARK: usize = u64::from_le_bytes(*b"msrgate!") as usize;

/// `_IOWR('!', 0, struct seccomp_notif)`.
const RECEIVE: c_ulong = 0xc050_2100;
/// `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SEND: c_ulong = 0xc018_2101;
const _: () = assert!(size_of::<seccomp_notif>() == 0x50 && size_of::<seccomp_notif_resp>() == 0x18);
/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`.
const CONTINUE: u32 = 1;
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`.
const WAIT_KILLABLE: c_ulong = 1 << 5;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `ioctl` of 32-bit programs.
const IOCTL_32: u32 = 54;

/// Where a command's child-to-be sends what the kernel gives it.
#[derive(Debug)]
pub struct Expected(UnixDatagram);

/// Has the command's child, and all that it starts, wait where it asks for a VM.
///
/// # Errors
/// The kernel's, where it gives no sockets.
pub fn notify(command: &mut Command) -> io::Result<Expected> {
    let (ours, theirs) = UnixDatagram::pair()?;
    let before_exec = move || {
        // Where it cannot be had, the VMM starts without: see `Expected::notifier`.
        if let Ok(listener) = listen() {
            let descriptors = [listener.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
            sendmsg(&theirs, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls, takes no lock and allocates nothing: its errors are plain numbers.
    unsafe { command.pre_exec(before_exec) };
    Ok(Expected(ours))
}

/// The listener of a new filter on this thread.
fn listen() -> io::Result<OwnedFd> {
    let (load, jump, end) = (
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        (libc::BPF_RET | libc::BPF_K) as u16,
    );
    let step = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    // The lower half: the kernel takes 32 bits of a request.
    let request = offset_of!(seccomp_data, args) + 8;
    let mut program = [
        step(load, offset_of!(seccomp_data, arch) as u32, 0, 0),
        step(jump, AUDIT_ARCH_X86_64, 0, 2),
        step(load, offset_of!(seccomp_data, nr) as u32, 0, 0),
        step(jump, libc::SYS_ioctl as u32, 2, 4),
        step(load, offset_of!(seccomp_data, nr) as u32, 0, 0),
        step(jump, IOCTL_32, 0, 2),
        step(load, request as u32, 0, 0),
        step(jump, KVM_CREATE_VM, 1, 0),
        step(end, libc::SECCOMP_RET_ALLOW, 0, 0),
        step(end, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
    ];
    // A filter is not to make the VMM slower by mitigations that it had not, and a signal is to wait while the command
    // looks.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    match install(&mut program, flags | WAIT_KILLABLE) {
        // Linux 5.19 has it.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => install(&mut program, flags),
        result => result,
    }
}

fn install(program: &mut [sock_filter], flags: c_ulong) -> io::Result<OwnedFd> {
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program, so many steps at the address, which live over the call.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const filter,
        )
    };
    match c_int::try_from(listener) {
        // SAFETY: a descriptor that the kernel just made, and nobody else knows of it.
        Ok(listener) if listener >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(listener) }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Expected {
    /// What tells who waits, once the child has started. `None` where the kernel has no such filters or gives none: to who
    /// may not administer the system it gives them only with `no_new_privs`, which would take rights from what a VMM starts.
    pub fn notifier(self) -> Option<Notifier> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).ok()?;
        ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next().map(Notifier),
            _ => None,
        })
    }
}

/// Tells who waits for a VM. It hangs up when there is nobody left who could.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

/// A thread that waits for a VM.
#[derive(Debug)]
pub struct Asking<'a> {
    notifier: &'a Notifier,
    id: u64,
    /// The thread, as this process numbers it.
    pub thread: u32,
    /// What it believes to be `/dev/kvm`.
    pub descriptor: c_int,
    /// The call is the library's.
    pub marked: bool,
}

impl Notifier {
    /// The next one. Waits where there is none.
    ///
    /// # Errors
    /// The kernel's; ENOENT where it no longer waits.
    pub fn next(&self) -> io::Result<Asking<'_>> {
        // SAFETY: integers, of which 0 is one; the kernel wants them so.
        let mut asked: seccomp_notif = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: the kernel writes a structure to where it is told, and this one lives over the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), RECEIVE, &raw mut asked) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Asking {
            notifier: self,
            id: asked.id,
            thread: asked.pid,
            // The kernel takes 32 bits of it.
            descriptor: asked.data.args[0] as c_int,
            marked: asked.data.args[3] == MARK as u64,
        })
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Asking<'_> {
    /// Lets the call go on.
    pub fn allow(self) {
        self.respond(0, CONTINUE);
    }

    /// Has the call fail.
    pub fn refuse(self) {
        self.respond(-libc::EACCES, 0);
    }

    fn respond(self, error: c_int, flags: u32) {
        let response = seccomp_notif_resp {
            id: self.id,
            val: 0,
            error,
            flags,
        };
        // It fails where nobody waits for it any more.
        // SAFETY: the kernel reads a structure that lives over the call.
        unsafe { libc::ioctl(self.notifier.0.as_raw_fd(), SEND, &raw const response) };
    }
}
