//! The process and its KVM.

#![expect(unsafe_code, reason = "system calls, and the mapped `kvm_run`")]

use std::error::Error;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{kvm_regs, kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_23 as kvm_run_msr, kvm_sregs};
use libc::{c_int, c_ulong, c_void};
use msrgate_core::{Access, Answer, Msr, Outcome, abi};
use msrgate_hook::{Gate, KVM_CREATE_VM, KVM_RUN, Kernel, RawExit, Vcpu};
use msrgate_kvm::{Dispatch, Handlers, InstallError, VcpuGate};
use msrgate_plan::Plan;

use crate::libc_calls;

/// The device number of `/dev/kvm` (`KVM_MINOR` in `include/linux/miscdevice.h`), wherever the node is.
const KVM: libc::dev_t = libc::makedev(10, 232);

pub(crate) struct Live;

impl Kernel for Live {
    type Gate = LiveGate;

    fn ioctl(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        match request as u32 {
            KVM_CREATE_VM => libc_calls::syscall(
                libc::SYS_ioctl,
                fd as usize,
                request as usize,
                argument,
                msrgate_hook::MARK,
                0,
                0,
            ) as c_int,
            _ => libc_calls::ioctl(fd, request, argument),
        }
    }

    fn close(&self, fd: c_int) -> c_int {
        libc_calls::close(fd)
    }

    fn is_kvm(&self, fd: c_int) -> bool {
        let before = msrgate_hook::errno();
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fstat writes a `struct stat` to where it is told, and this one lives over the call.
        let result = unsafe { libc::fstat(fd, stat.as_mut_ptr()) };
        if result != 0 {
            msrgate_hook::set_errno(before);
            return false;
        }
        // SAFETY: fstat succeeded, so it filled the structure.
        let stat = unsafe { stat.assume_init() };
        stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == KVM
    }

    fn install(&self, kvm: c_int, vm: c_int, plan: Arc<Plan>) -> Result<LiveGate, String> {
        let probed = msrgate_kvm::probe(&borrowed(kvm)).map_err(|error| line(&error))?;
        let gate = probed.install(&borrowed(vm), plan, Handlers::new());
        gate.map(LiveGate).map_err(|error| line(&error))
    }

    fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let before = msrgate_hook::errno();
        let local = libc::iovec {
            iov_base: to.as_mut_ptr().cast(),
            iov_len: to.len(),
        };
        let remote = libc::iovec {
            iov_base: address as *mut c_void,
            iov_len: to.len(),
        };
        let this = std::process::id() as libc::pid_t;
        // SAFETY: the kernel writes at most `to.len()` bytes to `to`, which is borrowed for that; it checks each
        // address of the other side itself.
        let read = unsafe { libc::process_vm_readv(this, &raw const local, 1, &raw const remote, 1, 0) };
        msrgate_hook::set_errno(before);
        usize::try_from(read) == Ok(to.len())
    }

    fn say(&self, line: &str) {
        let before = msrgate_hook::errno();
        let line = format!("msrgate: {line}\n");
        // SAFETY: the kernel reads the bytes of a string that lives over the call.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
        msrgate_hook::set_errno(before);
    }
}

/// A descriptor of the VMM, for the length of a call.
fn borrowed(fd: c_int) -> BorrowedFd<'static> {
    // SAFETY: the hook is called with it by who owns it, and it is not kept.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// An error and what it comes from, in one line.
fn line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    line
}

pub(crate) struct LiveGate(msrgate_kvm::Gate);

impl Gate for LiveGate {
    type Vcpu = LiveVcpu;

    fn vcpu(&self, fd: c_int, id: u32) -> Result<LiveVcpu, String> {
        let gate = self.0.vcpu(&borrowed(fd), id).map_err(|error| line(&error))?;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let (null, size) = (std::ptr::null_mut(), size_of::<kvm_run>());
        // SAFETY: a new mapping where the kernel likes; it replaces none.
        let run = unsafe { libc::mmap(null, size, rights, libc::MAP_SHARED, fd, 0) };
        if run == libc::MAP_FAILED {
            return Err(format!("mapping kvm_run: {}", io::Error::last_os_error()));
        }
        let run = NonNull::new(run.cast()).ok_or("mapping kvm_run at address 0")?;
        Ok(LiveVcpu { gate, run })
    }

    fn replace(&self, plan: Arc<Plan>) -> Result<(), (c_int, String)> {
        self.0.replace(plan).map_err(|error| {
            let number = match &error {
                InstallError::Kernel { source, .. } | InstallError::Io { source, .. } => source.raw_os_error(),
                _ => None,
            };
            (number.unwrap_or(libc::EINVAL), line(&error))
        })
    }
}

/// A vCPU and a mapping of its `kvm_run` of its own: the same page as the VMM's.
pub(crate) struct LiveVcpu {
    gate: VcpuGate,
    run: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to the process and not to a thread; the gate is `Send` by itself.
unsafe impl Send for LiveVcpu {}

impl LiveVcpu {
    fn field<T>(&self, offset: usize) -> *const T {
        self.run.as_ptr().wrapping_byte_add(offset).cast_const().cast()
    }

    fn set<T>(&self, offset: usize, value: T) {
        // SAFETY: a field of the mapped page, of this type and aligned by the structure's own layout. The one thread that
        // uses this vCPU is here and not in KVM_RUN.
        unsafe { self.field::<T>(offset).cast_mut().write_volatile(value) };
    }
}

impl Vcpu for LiveVcpu {
    fn exit(&self) -> Option<RawExit> {
        // SAFETY: a field of the mapped page, aligned by the structure's own layout. The kernel writes it in KVM_RUN
        // alone, and the one thread that uses this vCPU is not in it.
        let reason = unsafe { self.field::<u32>(offset_of!(kvm_run, exit_reason)).read_volatile() };
        if reason != abi::EXIT_X86_RDMSR && reason != abi::EXIT_X86_WRMSR {
            return None;
        }
        let fields = self.field::<kvm_run_msr>(offset_of!(kvm_run, __bindgen_anon_1));
        // SAFETY: as above; `msr` is the field of the union that starts at this offset, and is made of integers.
        let fields = unsafe { fields.read_volatile() };
        let msr = Msr(fields.index);
        Some(RawExit {
            access: match reason {
                abi::EXIT_X86_RDMSR => Access::Read { msr },
                _ => Access::Write {
                    msr,
                    value: fields.data,
                },
            },
            reason: fields.reason,
        })
    }

    fn passes(&self, access: Access) -> bool {
        self.gate.passes(access)
    }

    fn dispatch(&self) -> Option<Answer> {
        // SAFETY: this vCPU's mapped `kvm_run`; the one thread that uses this vCPU is here and not in KVM_RUN. The VMM's
        // threads may set `immediate_exit` at any time, which is another byte than any that is read or written here.
        match unsafe { self.gate.dispatch_raw(self.run.as_ptr()) } {
            Dispatch::Answered(answered) => Some(answered.answer),
            Dispatch::NotMine => None,
        }
    }

    fn answer(&self, outcome: Outcome) {
        let fields = offset_of!(kvm_run, __bindgen_anon_1);
        if let Outcome::Value(value) = outcome {
            self.set(fields + offset_of!(kvm_run_msr, data), value);
        }
        let error = u8::from(outcome == Outcome::Fault);
        self.set(fields + offset_of!(kvm_run_msr, error), error);
        // So that it does not look like an exit beside EINTR.
        self.set(offset_of!(kvm_run, exit_reason), abi::EXIT_INTR);
    }

    /// "Processor State After Reset": CS has a base that no other state has in real mode, and RIP is at the first
    /// instruction. A guest can bring this about too, so it says something only where the VMM has just set the state.
    fn is_reset(&self, fd: c_int) -> bool {
        let before = msrgate_hook::errno();
        let mut special = kvm_sregs::default();
        let address = (&raw mut special).expose_provenance();
        let result = libc_calls::ioctl(fd, c_ulong::from(KVM_GET_SREGS), address);
        let start = (special.cs.selector, special.cs.base) == (0xf000, 0xffff_0000);
        let first = || Registers::of(fd).is_ok_and(|registers| registers.0.rip == 0xfff0);
        let reset = result == 0 && start && first();
        msrgate_hook::set_errno(before);
        reset
    }

    fn forget(&self) {
        self.gate.reset();
    }

    /// The kernel has no call that drops a pending access. So it is completed, as if user space had done it, without a
    /// guest instruction being executed, and what that changed is put back: RIP, RAX and RDX.
    fn take_back(&self, fd: c_int) -> Result<(), c_int> {
        /// No VMM's own value: one that sets `immediate_exit` meanwhile means its own, which has to stay.
        const OURS: u8 = 2;
        let registers = Registers::of(fd)?;
        // SAFETY: a byte of the mapped page that lives as long as `self`; other threads of the VMM write it too, so it
        // is an atomic here, and nothing in this library touches it otherwise.
        let immediate_exit =
            unsafe { AtomicU8::from_ptr(self.field::<u8>(offset_of!(kvm_run, immediate_exit)).cast_mut()) };
        let before = immediate_exit.swap(OURS, Ordering::Relaxed);
        self.set(
            offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run_msr, error),
            0_u8,
        );
        let result = libc_calls::ioctl(fd, c_ulong::from(KVM_RUN), 0);
        let error = msrgate_hook::errno();
        let _ = immediate_exit.compare_exchange(OURS, before, Ordering::Relaxed, Ordering::Relaxed);
        // The kernel leaves the old reason beside EINTR.
        self.set(offset_of!(kvm_run, exit_reason), abi::EXIT_INTR);
        registers.put_back(fd)?;
        match (result, error) {
            (0.., _) | (_, libc::EINTR) => Ok(()),
            (_, error) => Err(error),
        }
    }
}

/// `_IOR(KVMIO, 0x83, struct kvm_sregs)`.
const KVM_GET_SREGS: u32 = 0x8138_ae83;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`.
const KVM_GET_REGS: u32 = 0x8090_ae81;
/// `_IOW(KVMIO, 0x82, struct kvm_regs)`.
const KVM_SET_REGS: u32 = 0x4090_ae82;

/// A vCPU's general registers.
struct Registers(kvm_regs);

impl Registers {
    fn of(vcpu: c_int) -> Result<Registers, c_int> {
        let mut registers = kvm_regs::default();
        let address = (&raw mut registers).expose_provenance();
        match libc_calls::ioctl(vcpu, c_ulong::from(KVM_GET_REGS), address) {
            0 => Ok(Registers(registers)),
            _ => Err(msrgate_hook::errno()),
        }
    }

    fn put_back(&self, vcpu: c_int) -> Result<(), c_int> {
        let address = (&raw const self.0).expose_provenance();
        match libc_calls::ioctl(vcpu, c_ulong::from(KVM_SET_REGS), address) {
            0 => Ok(()),
            _ => Err(msrgate_hook::errno()),
        }
    }
}

impl Drop for LiveVcpu {
    fn drop(&mut self) {
        // SAFETY: the mapping that `vcpu` made, in its whole length; nothing refers to it but this value.
        unsafe { libc::munmap(self.run.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
