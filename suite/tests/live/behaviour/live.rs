//! Live KVM, with a guest of `msrgate-guest` whose registers are set by hand.

#![expect(
    unsafe_code,
    reason = "the mapped `kvm_run` is a union, and signals are the system's"
)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVMIO, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Msr, Op, Outcome};
use msrgate_guest::raw::{Arena, Caller, Request};
use msrgate_guest::{Guest, Mode, Options};

use super::hypervisor::{Batch, Calls, Descriptor, Hypervisor, Registers, UNKNOWN, UNKNOWN_MSR};
use super::kernel::Kernel;

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`.
const KVM_SET_SIGNAL_MASK: u32 = 1 << 30 | 4 << 16 | KVMIO << 8 | 0x8b;
/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: u32 = KVMIO << 8 | 0xce;
/// Where the union with `msr` starts in `kvm_run`.
const UNION: usize = 32;

pub(crate) struct Live {
    pub(crate) kvm: Kvm,
    pub(crate) kernel: Kernel,
    /// A vCPU that was made later. It uses the memory of the first, which stands still.
    other: Option<VcpuFd>,
    pub(crate) guest: Guest,
    pub(crate) mode: Mode,
    options: Options,
    /// Whether the guest stands elsewhere than behind a list of accesses.
    astray: bool,
    /// The registers before the guest's RDMSR and before its WRMSR, for the last access of its list.
    pub(crate) before: [kvm_regs; 2],
}

impl Live {
    /// A new VM in each mode.
    pub(crate) fn both(kernel: &Kernel) -> impl Iterator<Item = Live> {
        [Mode::Real, Mode::Long]
            .into_iter()
            .map(|mode| Live::new(kernel, mode, Options::default()))
    }

    pub(crate) fn new(kernel: &Kernel, mode: Mode, options: Options) -> Live {
        let kvm = Kvm::new().unwrap();
        let mut guest = Guest::new(&kvm, mode, &options).unwrap();
        let mask = |mask: u64| kvm_bindings::kvm_enable_cap {
            cap: kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR,
            args: [mask, 0, 0, 0],
            ..Default::default()
        };
        guest.vm().enable_cap(&mask(UNKNOWN_MSR)).unwrap();
        let accesses = [Access::Read { msr: UNKNOWN }, Access::Write { msr: UNKNOWN, value: 0 }];
        let mut before = Vec::new();
        guest
            .run(0, &accesses, &mut |pending| {
                let regs = pending.fd().get_regs().unwrap();
                before.push(kvm_regs { rbp: 1, rbx: 0, ..regs });
            })
            .unwrap();
        guest.vm().enable_cap(&mask(0)).unwrap();
        Live {
            kvm,
            kernel: kernel.clone(),
            other: None,
            guest,
            mode,
            options,
            astray: false,
            before: before.try_into().unwrap(),
        }
    }

    pub(crate) fn fd(&mut self) -> &mut VcpuFd {
        match &mut self.other {
            Some(fd) => fd,
            None => self.guest.vcpu(0).unwrap().fd_mut(),
        }
    }

    fn kvm_run(&mut self) -> &mut kvm_run {
        self.fd().get_kvm_run()
    }

    /// The names of the vCPU's statistics (KVM_GET_STATS_FD).
    pub(crate) fn statistics(&mut self) -> Vec<String> {
        let vcpu = self.fd().as_raw_fd();
        // SAFETY: takes no argument and touches no memory of ours.
        let fd = unsafe { libc::ioctl(vcpu, libc::c_ulong::from(KVM_GET_STATS_FD)) };
        assert!(fd >= 0);
        // SAFETY: the descriptor that the kernel just made, and nobody else knows of it.
        let mut file = unsafe { File::from_raw_fd(fd) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        // `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset; then of each
        // `struct kvm_stats_desc` the name is at byte 16.
        let (name, count, first) = (word(4), word(8), word(16));
        let names = (0..count).map(|index| first + index * (16 + name) + 16);
        names
            .map(|at| {
                let name = bytes[at..at + name].split(|byte| *byte == 0).next().unwrap();
                String::from_utf8(name.to_vec()).unwrap()
            })
            .collect()
    }

    /// What state ioctls tell of the vCPU.
    pub(crate) fn saved(&mut self) -> Saved {
        let irqchip = self.options.irqchip;
        let list = self.kvm.get_msr_index_list().unwrap();
        let fd = self.fd();
        let msrs = list.as_slice().iter().filter_map(|index| {
            let mut one = Msrs::from_entries(&[kvm_msr_entry {
                index: *index,
                ..Default::default()
            }])
            .unwrap();
            (fd.get_msrs(&mut one) == Ok(1)).then(|| one.as_slice()[0])
        });
        Saved {
            msrs: msrs.collect(),
            mp_state: fd.get_mp_state().unwrap(),
            regs: fd.get_regs().unwrap(),
            sregs: fd.get_sregs().unwrap(),
            xsave: fd.get_xsave().unwrap(),
            xcrs: fd.get_xcrs().unwrap(),
            debugregs: fd.get_debug_regs().unwrap(),
            lapic: irqchip.then(|| fd.get_lapic().unwrap()),
            events: fd.get_vcpu_events().unwrap(),
        }
    }

    /// A new VM with this state.
    pub(crate) fn restored(&self, saved: &Saved) -> Live {
        let mut live = Live::new(&self.kernel, self.mode, self.options.clone());
        saved.restore(live.fd());
        live.astray = true;
        live
    }
}

/// A vCPU's state, as far as KVM saves it.
pub(crate) struct Saved {
    pub(crate) msrs: Vec<kvm_msr_entry>,
    mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: Option<kvm_lapic_state>,
    events: kvm_vcpu_events,
}

impl Saved {
    fn restore(&self, fd: &mut VcpuFd) {
        fd.set_sregs(&self.sregs).unwrap();
        for entry in &self.msrs {
            // Some can be read and not written.
            let _ = fd.set_msrs(&Msrs::from_entries(&[*entry]).unwrap());
        }
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(lapic).unwrap();
        }
        fd.set_xcrs(&self.xcrs).unwrap();
        // SAFETY: no feature was asked for by arch_prctl whose state would lie behind the 4096 bytes of the structure.
        unsafe { fd.set_xsave(&self.xsave) }.unwrap();
        fd.set_debug_regs(&self.debugregs).unwrap();
        fd.set_regs(&self.regs).unwrap();
        fd.set_mp_state(self.mp_state).unwrap();
        fd.set_vcpu_events(&self.events).unwrap();
    }
}

/// Duplicates of the three descriptors.
struct LiveCalls {
    system: Caller,
    vm: Caller,
    vcpu: Caller,
}

impl Calls for LiveCalls {
    fn call(&self, on: Descriptor, request: Request, argp: u64, _: &Arena) -> Result<(), i32> {
        let caller = match on {
            Descriptor::System => &self.system,
            Descriptor::Vm => &self.vm,
            Descriptor::Vcpu => &self.vcpu,
        };
        caller
            .call(request, argp)
            .map_err(|error| error.raw_os_error().unwrap())
    }
}

impl Hypervisor for Live {
    fn name(&self) -> &str {
        match self.mode {
            Mode::Real => "kernel, real mode",
            Mode::Long => "kernel, 64-bit mode",
        }
    }

    fn calls(&mut self) -> Box<dyn Calls> {
        Box::new(LiveCalls {
            system: Caller::of(&self.kvm).unwrap(),
            vm: Caller::of(self.guest.vm()).unwrap(),
            vcpu: Caller::of(self.fd()).unwrap(),
        })
    }

    fn check_extension(&self, on: Descriptor, capability: u32) -> u32 {
        let answer = match on {
            Descriptor::System => self.kvm.check_extension_raw(capability.into()),
            Descriptor::Vm => self.guest.vm().check_extension_raw(capability.into()),
            Descriptor::Vcpu => panic!("a vCPU has no such call"),
        };
        u32::try_from(answer).unwrap()
    }

    fn enter(&mut self, op: Op, rax: u64, rcx: u64, rdx: u64) {
        let before = match op {
            Op::Read => self.before[0],
            Op::Write => self.before[1],
        };
        self.astray = true;
        let fd = self.fd();
        // What waits would be completed into the new registers.
        fd.set_kvm_immediate_exit(1);
        let _ = fd.run();
        fd.set_kvm_immediate_exit(0);
        fd.set_vcpu_events(&kvm_vcpu_events::default()).unwrap();
        fd.set_regs(&kvm_regs {
            rax,
            rcx,
            rdx,
            ..before
        })
        .unwrap();
    }

    fn run(&mut self) -> Result<(), i32> {
        match self.fd().run() {
            Ok(_) => Ok(()),
            Err(error) => Err(error.errno()),
        }
    }

    fn run_into_signal(&mut self) -> Result<(), i32> {
        let signal = libc::SIGUSR1;
        // SAFETY: all of it is integers, for which zero is a value.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a set of signals that may be written.
        unsafe { libc::sigemptyset(&raw mut set) };
        // SAFETY: likewise.
        unsafe { libc::sigaddset(&raw mut set, signal) };
        // SAFETY: reads `set`, and writes nothing where the third argument is null.
        let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        assert_eq!(blocked, 0);
        // SAFETY: the signal is blocked, so it waits.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
        // `struct kvm_signal_mask`: 8 bytes of a set, in which nothing is blocked.
        let mask: [u32; 3] = [8, 0, 0];
        let fd = self.fd();
        let raw = fd.as_raw_fd();
        // SAFETY: the kernel reads a length of 4 bytes and as many bytes behind it, 8 of them, which `mask` holds.
        let result = unsafe { libc::ioctl(raw, libc::c_ulong::from(KVM_SET_SIGNAL_MASK), mask.as_ptr()) };
        assert_eq!(result, 0);
        let result = match fd.run() {
            Ok(_) => Ok(()),
            Err(error) => Err(error.errno()),
        };
        // SAFETY: a null pointer takes the mask away; nothing is read.
        let over = unsafe { libc::ioctl(raw, libc::c_ulong::from(KVM_SET_SIGNAL_MASK), 0) };
        assert_eq!(over, 0);
        let mut caught = 0;
        // SAFETY: takes the signal that waits; `set` is read and `caught` written, and both live over the call.
        unsafe { libc::sigwait(&raw const set, &raw mut caught) };
        // SAFETY: as above.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
        assert_eq!(caught, signal);
        result
    }

    fn registers(&mut self) -> Registers {
        let regs = self.fd().get_regs().unwrap();
        Registers {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rip: regs.rip,
        }
    }

    fn set_registers(&mut self, registers: Registers) {
        let regs = self.fd().get_regs().unwrap();
        let Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rip,
        } = registers;
        let regs = kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rip,
            ..regs
        };
        self.fd().set_regs(&regs).unwrap();
    }

    fn exception(&mut self) -> Option<(u8, u32)> {
        let exception = self.fd().get_vcpu_events().unwrap().exception;
        // `pending` counts only with a capability that is off; without it such an exception is told as `injected`.
        (exception.injected != 0).then_some((exception.nr, exception.error_code))
    }

    fn exit_reason(&mut self) -> u32 {
        self.kvm_run().exit_reason
    }

    fn set_exit_reason(&mut self, exit_reason: u32) {
        self.kvm_run().exit_reason = exit_reason;
    }

    fn run_bytes(&mut self) -> [u8; 24] {
        let start: *const u8 = ptr::from_ref(self.kvm_run()).cast();
        // SAFETY: `kvm_run` is more than 56 bytes long.
        let at = unsafe { start.add(UNION) };
        // SAFETY: bytes of a shared page that the kernel writes in KVM_RUN alone, which this thread is not in.
        unsafe { at.cast::<[u8; 24]>().read() }
    }

    fn set_run_bytes(&mut self, bytes: [u8; 24]) {
        let start: *mut u8 = ptr::from_mut(self.kvm_run()).cast();
        // SAFETY: as above.
        let at = unsafe { start.add(UNION) };
        // SAFETY: as above; any bytes are values of that union of integers.
        unsafe { at.cast::<[u8; 24]>().write(bytes) };
    }

    fn set_immediate_exit(&mut self, on: bool) {
        self.fd().set_kvm_immediate_exit(on.into());
    }

    fn host_read(&mut self, msr: Msr) -> Option<u64> {
        let mut one = Msrs::from_entries(&[kvm_msr_entry {
            index: msr.0,
            ..Default::default()
        }])
        .unwrap();
        (self.fd().get_msrs(&mut one) == Ok(1)).then(|| one.as_slice()[0].data)
    }

    fn host_write(&mut self, msr: Msr, value: u64) -> bool {
        let one = Msrs::from_entries(&[kvm_msr_entry {
            index: msr.0,
            data: value,
            ..Default::default()
        }])
        .unwrap();
        self.fd().set_msrs(&one) == Ok(1)
    }

    fn another_vcpu(&mut self) {
        let fd = self.guest.vm().create_vcpu(self.options.vcpus as u64).unwrap();
        let first = self.guest.vcpu(0).unwrap().fd();
        let cpuid = first.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        fd.set_cpuid2(&cpuid).unwrap();
        fd.set_sregs(&first.get_sregs().unwrap()).unwrap();
        fd.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        })
        .unwrap();
        self.other = Some(fd);
    }

    fn move_to_new_vm(&mut self) {
        let saved = self.saved();
        *self = self.restored(&saved);
    }

    fn batch(&mut self, accesses: &[Access], answer: &mut dyn FnMut(Access) -> Outcome) -> Batch {
        assert!(self.other.is_none());
        let vcpu = self.guest.vcpu(0).unwrap();
        if self.astray {
            vcpu.reset().unwrap();
            self.astray = false;
        }
        let seen = vcpu.run(accesses, &mut |pending| {
            let outcome = answer(pending.access());
            msrgate_suite::answer(pending, outcome);
        });
        let seen = seen.unwrap().iter();
        seen.map(|seen| (seen.outcome, seen.exit.map_or(0, |exit| exit.reason_bits)))
            .collect()
    }
}
