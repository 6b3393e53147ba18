//! A virtual machine by plain ioctls. The numbers are those of <linux/kvm.h>, written out here.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};

use crate::filter::{Filter, Op};

const KVM_CREATE_VM: libc::Ioctl = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::Ioctl = 0xae04;
const KVM_CREATE_VCPU: libc::Ioctl = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
const KVM_SET_TSS_ADDR: libc::Ioctl = 0xae47;
const KVM_RUN: libc::Ioctl = 0xae80;
const KVM_SET_REGS: libc::Ioctl = 0x4090_ae82;
const KVM_GET_SREGS: libc::Ioctl = 0x8138_ae83_u32 as libc::Ioctl;
const KVM_SET_SREGS: libc::Ioctl = 0x4138_ae84;
const KVM_ENABLE_CAP: libc::Ioctl = 0x4068_aea3;
const KVM_X86_SET_MSR_FILTER: libc::Ioctl = 0x4188_aec6;

const KVM_CAP_X86_USER_SPACE_MSR: u32 = 188;
const KVM_MSR_EXIT_REASON_FILTER: u32 = 4;
const KVM_EXIT_HLT: u32 = 5;
const KVM_EXIT_X86_RDMSR: u32 = 29;
const KVM_EXIT_X86_WRMSR: u32 = 30;

const MEMORY: usize = 0x10000;
/// Where the guest's code is: RDMSR and HLT; WRMSR and HLT; and the HLT that the #GP handler is.
const READ: usize = 0x1000;
const WRITE: usize = 0x1010;
const FAULT: usize = 0x1020;
const STACK: u64 = 0x8000;

/// A VM with one vCPU in real mode.
pub(crate) struct Machine {
    vm: File,
    vcpu: File,
    run: Mapping,
    /// `struct kvm_sregs` as after reset, but for CS.
    sregs: [u64; 39],
    /// The guest's, which must not go before it.
    _memory: Mapping,
}

impl Machine {
    pub(crate) fn new() -> Machine {
        let kvm = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm");
        let vm = file(ioctl(&kvm, KVM_CREATE_VM, 0).expect("KVM_CREATE_VM"));
        // Intel's processors without unrestricted guests want a place for a task state.
        ioctl(&vm, KVM_SET_TSS_ADDR, 0xfffb_d000).expect("KVM_SET_TSS_ADDR");
        let memory = Mapping::anonymous(MEMORY);
        // struct kvm_userspace_memory_region: slot and flags, guest address, size, host address.
        let region = [0, 0, MEMORY as u64, memory.at.as_ptr() as u64];
        ioctl_with(&vm, KVM_SET_USER_MEMORY_REGION, &region).expect("KVM_SET_USER_MEMORY_REGION");
        memory.write(READ, &[0x0f, 0x32, 0xf4]);
        memory.write(WRITE, &[0x0f, 0x30, 0xf4]);
        memory.write(FAULT, &[0xf4]);
        // The real-mode vector of #GP: offset, segment.
        memory.write(13 * 4, &(FAULT as u32).to_le_bytes());

        let vcpu = file(ioctl(&vm, KVM_CREATE_VCPU, 0).expect("KVM_CREATE_VCPU"));
        let size = ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0).expect("KVM_GET_VCPU_MMAP_SIZE");
        let run = Mapping::shared(&vcpu, size as usize);
        let mut sregs = [0; 39];
        ioctl_filling(&vcpu, KVM_GET_SREGS, &mut sregs).expect("KVM_GET_SREGS");
        // CS comes first: its base, its limit of 32 bits, its selector of 16.
        sregs[0] = 0;
        sregs[1] &= !(0xffff << 32);
        Machine {
            vm,
            vcpu,
            run,
            sregs,
            _memory: memory,
        }
    }

    /// Puts a filter in force, and hands what it denies to this program whatever the plan's reasons are.
    pub(crate) fn install(&self, filter: &Filter) {
        // struct kvm_enable_cap: cap and flags, four arguments, 64 bytes of padding.
        let mut cap = [0u64; 13];
        cap[0] = KVM_CAP_X86_USER_SPACE_MSR.into();
        cap[1] = KVM_MSR_EXIT_REASON_FILTER.into();
        ioctl_with(&self.vm, KVM_ENABLE_CAP, &cap).expect("KVM_ENABLE_CAP");
        // struct kvm_msr_filter: flags and padding, then 16 times flags, nmsrs, base and padding, bitmap.
        let mut raw = [0u64; 49];
        raw[0] = u64::from(!filter.default_allow);
        for (range, raw) in filter.ranges.iter().zip(raw[1..].chunks_mut(3)) {
            let flags = u64::from(range.read) | u64::from(range.write) << 1;
            raw.copy_from_slice(&[
                flags | u64::from(range.nmsrs) << 32,
                range.base.into(),
                range.bitmap.as_ptr() as u64,
            ]);
        }
        ioctl_with(&self.vm, KVM_X86_SET_MSR_FILTER, &raw).expect("KVM_X86_SET_MSR_FILTER");
    }

    /// Lets the guest try, and says whether the kernel asked this program because of the filter. Writes give 0.
    pub(crate) fn is_denied(&self, msr: u32, op: Op) -> bool {
        // struct kvm_regs: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags.
        let mut regs = [0u64; 18];
        regs[2] = msr.into();
        regs[6] = STACK;
        regs[16] = match op {
            Op::Read => READ as u64,
            Op::Write => WRITE as u64,
        };
        regs[17] = 2;
        // An access before may have changed anything.
        ioctl_with(&self.vcpu, KVM_SET_SREGS, &self.sregs).expect("KVM_SET_SREGS");
        ioctl_with(&self.vcpu, KVM_SET_REGS, &regs).expect("KVM_SET_REGS");
        let mut denied = false;
        loop {
            match ioctl(&self.vcpu, KVM_RUN, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => panic!("KVM_RUN at {} {msr:#x}: {error}", op.name()),
            }
            // struct kvm_run: exit_reason at 8; msr from 32 on: error, seven bytes of padding, reason, index, data.
            let exit = self.run.u32(8);
            match exit {
                KVM_EXIT_HLT => return denied,
                KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                    assert!(!denied, "asked twice");
                    assert_eq!(exit == KVM_EXIT_X86_RDMSR, op == Op::Read);
                    assert_eq!((self.run.u32(40), self.run.u32(44)), (KVM_MSR_EXIT_REASON_FILTER, msr));
                    self.run.write(32, &[1]);
                    denied = true;
                }
                other => panic!("exit {other} at {} {msr:#x}", op.name()),
            }
        }
    }
}

fn ioctl(file: &File, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the requests that come here take a number or nothing, so the kernel reads and writes no memory of ours but
    // the mapped `kvm_run`, to which no reference exists.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// For requests that read `argument`, whose size the request's number carries.
fn ioctl_with(file: &File, request: libc::Ioctl, argument: &[u64]) -> io::Result<()> {
    assert_eq!(request >> 16 & 0x3fff, size_of_val(argument) as libc::Ioctl);
    // SAFETY: the kernel reads as many bytes as the number says, which the assertion holds to the slice's length; what
    // the structure points to (guest memory, bitmaps of whole words) outlives the call or the VM.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_ptr()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// For requests that write `argument`.
fn ioctl_filling(file: &File, request: libc::Ioctl, argument: &mut [u64]) -> io::Result<()> {
    assert_eq!(request >> 16 & 0x3fff, size_of_val(argument) as libc::Ioctl);
    // SAFETY: the kernel writes as many bytes as the number says, which the assertion holds to the slice's length.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn file(descriptor: libc::c_int) -> File {
    // SAFETY: the kernel has just made this descriptor, and nobody else has it.
    unsafe { File::from_raw_fd(descriptor) }
}

/// Mapped memory that the kernel writes to as well, so it is only touched by volatile accesses.
struct Mapping {
    at: NonNull<u8>,
    size: usize,
}

impl Mapping {
    fn anonymous(size: usize) -> Mapping {
        Mapping::map(size, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn shared(file: &File, size: usize) -> Mapping {
        Mapping::map(size, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(size: usize, flags: libc::c_int, descriptor: libc::c_int) -> Mapping {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces none.
        let at = unsafe { libc::mmap(ptr::null_mut(), size, protection, flags, descriptor, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Mapping {
            at: NonNull::new(at.cast()).expect("no mapping is at 0"),
            size,
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size);
        for (byte, at) in bytes.iter().zip(offset..) {
            let to = self.at.as_ptr().wrapping_add(at);
            // SAFETY: within the mapping by the assertion, and mapped until `self` is dropped.
            unsafe { to.write_volatile(*byte) };
        }
    }

    fn u32(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.size);
        let from = self.at.as_ptr().wrapping_add(offset).cast::<u32>();
        // SAFETY: within the mapping and aligned, by the assertion and since mappings begin at pages.
        unsafe { from.read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and no reference to it was ever made. A VM that has it as memory does not run.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
    }
}
