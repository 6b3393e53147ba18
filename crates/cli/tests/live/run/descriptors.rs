//! A VMM that makes VMs, runs none, and lets go of each in another way.

#![expect(unsafe_code, reason = "calls that Rust has no other way to make")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::{c_int, c_uint, c_ulong};
use msrgate_core::abi;

const KVM_CREATE_VM: c_ulong = 0xae01;
/// So that what is closed from there on is nothing else's.
const HIGH: c_int = 300;

unsafe extern "C" {
    // glibc 2.34 and later.
    fn closefrom(first: c_int);
}

/// For each way, prints whether its descriptor stands for a VM before and after.
pub(crate) fn close_in_every_way() {
    let kvm = File::open("/dev/kvm").unwrap();
    type Close = fn(c_int);
    let ways: [(&str, Close); 4] = [
        ("close", |fd| {
            // SAFETY: the caller owns the descriptor and gives it up.
            unsafe { libc::close(fd) };
        }),
        ("syscall", |fd| {
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_close, fd) };
        }),
        ("close_range", |fd| {
            // SAFETY: as above; the range is this one descriptor.
            unsafe { libc::syscall(libc::SYS_close_range, fd, fd, 0 as c_uint) };
        }),
        ("closefrom", |fd| {
            // SAFETY: as above; nothing here has a descriptor that is higher, but the policy's library, which is not to
            // need its own any more.
            unsafe { closefrom(fd) };
        }),
    ];
    for (name, close) in ways {
        // SAFETY: makes a descriptor, and touches no memory.
        let made = unsafe { libc::syscall(libc::SYS_ioctl, kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
        let made = c_int::try_from(made).unwrap();
        assert!(made > 0, "{}", io::Error::last_os_error());
        // SAFETY: as above.
        let vm = unsafe { libc::fcntl(made, libc::F_DUPFD, HIGH) };
        assert!(vm >= HIGH, "{}", io::Error::last_os_error());
        // SAFETY: made here, and not used again.
        unsafe { libc::close(made) };
        let before = accepts_a_mask(vm);
        close(vm);
        println!("{name} {before} {}", accepts_a_mask(vm));
    }
}

/// Has this VMM make its VM without libc.
pub(crate) const PAST: &str = "past";

/// Asks for a VM by an instruction of its own, and prints what it gets.
pub(crate) fn make_past_libc() {
    let kvm = File::open("/dev/kvm").unwrap();
    let mut result = libc::SYS_ioctl;
    // SAFETY: `ioctl(2)` with an argument that is a number: it touches no memory, and the kernel changes RAX, RCX and
    // R11 alone.
    unsafe {
        std::arch::asm!("syscall", inout("rax") result, in("rdi") kvm.as_raw_fd(), in("rsi") KVM_CREATE_VM, in("rdx") 0,
            out("rcx") _, out("r11") _, options(nostack));
    }
    match c_int::try_from(-result) {
        Ok(error) if error > 0 => println!("{}", io::Error::from_raw_os_error(error)),
        _ => println!("a VM"),
    }
}

/// Whether KVM_ENABLE_CAP of KVM_CAP_X86_USER_SPACE_MSR succeeds.
fn accepts_a_mask(fd: c_int) -> bool {
    let mut cap = [0_u8; 104];
    cap[..4].copy_from_slice(&abi::CAP_X86_USER_SPACE_MSR.to_le_bytes());
    // SAFETY: the kernel reads a `struct kvm_enable_cap`, which is this long.
    unsafe { libc::ioctl(fd, c_ulong::from(abi::ENABLE_CAP), cap.as_ptr()) == 0 }
}
