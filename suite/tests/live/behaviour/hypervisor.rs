//! A VM with one vCPU as its owner sees it, whoever carries the calls out.

use msrgate_core::{Access, Filter, FilterRange, Msr, Op, Ops, Outcome, Verdict, abi};
use msrgate_guest::raw::{Arena, Request};
use msrgate_suite::{Call, RawRange};

pub(crate) use msrgate_engine::Descriptor;

use super::engine::Engine;
use super::kernel::Kernel;
use super::live::Live;
use super::raw_filter::{placed, set_filter, setting};

/// No processor has it.
pub(crate) const UNKNOWN: Msr = Msr(0xdead_beef);
/// Of x2APIC, which the guest has not: KVM refuses it as invalid.
pub(crate) const X2APIC_ID: Msr = Msr(0x802);
/// Passed through where the hardware can.
pub(crate) const SYSENTER_CS: Msr = Msr(0x174);
/// Likewise.
pub(crate) const SYSENTER_ESP: Msr = Msr(0x175);
/// Likewise.
pub(crate) const KERNEL_GS_BASE: Msr = Msr(0xc000_0102);
/// What the guest writes to where it is done: KVM_EXIT_IO.
pub(crate) const EXIT_IO: u32 = 2;
pub(crate) const EFAULT: i32 = 14;
pub(crate) const EINTR: i32 = 4;
pub(crate) const EINVAL: i32 = 22;
/// The masks of one reason.
pub(crate) const INVALID: u64 = 1;
pub(crate) const UNKNOWN_MSR: u64 = 2;
pub(crate) const FILTER: u64 = 4;
/// Fills registers and fields that are to be left alone, or to be overwritten. In the upper half of RCX its lowest two
/// bits are clear, which QEMU's emulation of SVM lets into its look into the permission map.
pub(crate) const JUNK: u64 = 0xa5a5_a5a4_5a5a_5a5a;

/// The registers that an access touches, and one that it does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Registers {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rip: u64,
}

/// `kvm_run.msr`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RunMsr {
    pub(crate) error: u8,
    pub(crate) pad: [u8; 7],
    pub(crate) reason: u32,
    pub(crate) index: u32,
    pub(crate) data: u64,
}

impl RunMsr {
    /// From the 24 bytes at offset 32 of `kvm_run`.
    pub(crate) fn from_bytes(bytes: [u8; 24]) -> RunMsr {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        RunMsr {
            error: bytes[0],
            pad: bytes[1..8].try_into().unwrap(),
            reason: word(8),
            index: word(12),
            data: u64::from(word(20)) << 32 | u64::from(word(16)),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[0] = self.error;
        bytes[1..8].copy_from_slice(&self.pad);
        bytes[8..12].copy_from_slice(&self.reason.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.index.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_le_bytes());
        bytes
    }
}

/// What became of one access after one KVM_RUN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Came {
    /// It is handed over; KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR.
    Out(u32, RunMsr),
    /// The guest went on behind it.
    Done {
        /// RAX.
        rax: u64,
        /// RDX.
        rdx: u64,
    },
    /// The guest's handler of #GP went on behind it.
    Fault,
}

impl Came {
    /// The exit's `reason`, or 0.
    pub(crate) fn reason(self) -> u32 {
        match self {
            Came::Out(_, msr) => msr.reason,
            _ => 0,
        }
    }
}

/// Makes calls from any thread.
pub(crate) trait Calls: Send + Sync {
    /// The call with `argp` for its argument, which lies in `arena` or nowhere; the error's number.
    fn call(&self, on: Descriptor, request: Request, argp: u64, arena: &Arena) -> Result<(), i32>;
}

/// What an access of a batch got, and the reason of its exit or 0.
pub(crate) type Batch = Vec<(Outcome, u32)>;

/// A VM with one vCPU.
pub(crate) trait Hypervisor {
    fn name(&self) -> &str;
    fn calls(&mut self) -> Box<dyn Calls>;
    /// KVM_CHECK_EXTENSION.
    fn check_extension(&self, on: Descriptor, capability: u32) -> u32;

    /// Puts the guest before an RDMSR or a WRMSR. Behind it, it leaves with [`EXIT_IO`]; its handler of #GP sets bit 8
    /// of RBX and goes on behind the instruction too.
    fn enter(&mut self, op: Op, rax: u64, rcx: u64, rdx: u64);
    /// KVM_RUN.
    fn run(&mut self) -> Result<(), i32>;
    /// KVM_RUN with a signal waiting that it does not block.
    fn run_into_signal(&mut self) -> Result<(), i32>;
    fn registers(&mut self) -> Registers;
    /// KVM_SET_REGS.
    fn set_registers(&mut self, registers: Registers);
    /// Number and error code of the exception that KVM_GET_VCPU_EVENTS shows.
    fn exception(&mut self) -> Option<(u8, u32)>;
    fn exit_reason(&mut self) -> u32;
    fn set_exit_reason(&mut self, exit_reason: u32);
    /// The 24 bytes at offset 32 of `kvm_run`.
    fn run_bytes(&mut self) -> [u8; 24];
    fn set_run_bytes(&mut self, bytes: [u8; 24]);
    fn set_immediate_exit(&mut self, on: bool);

    /// KVM_GET_MSRS of one.
    fn host_read(&mut self, msr: Msr) -> Option<u64>;
    /// KVM_SET_MSRS of one.
    fn host_write(&mut self, msr: Msr, value: u64) -> bool;

    /// Goes on with a new vCPU of the same VM.
    fn another_vcpu(&mut self);
    /// Makes a new VM and gives its vCPU what state ioctls save of this one's. Nothing else comes along.
    fn move_to_new_vm(&mut self);
    /// Lets the guest make many accesses; `answer` is asked at each exit.
    fn batch(&mut self, accesses: &[Access], answer: &mut dyn FnMut(Access) -> Outcome) -> Batch;
}

impl dyn Hypervisor + '_ {
    pub(crate) fn run_msr(&mut self) -> RunMsr {
        RunMsr::from_bytes(self.run_bytes())
    }

    pub(crate) fn set_run_msr(&mut self, msr: RunMsr) {
        self.set_run_bytes(msr.to_bytes());
    }

    /// Leaves an answer in `kvm_run`.
    pub(crate) fn answer(&mut self, error: u8, data: u64) {
        let msr = self.run_msr();
        self.set_run_msr(RunMsr { error, data, ..msr });
    }

    /// KVM_ENABLE_CAP of the mask of exit reasons.
    pub(crate) fn mask(&mut self, mask: u64) -> Result<(), i32> {
        self.make(Request::EnableCap, &Call::enable_cap(mask))
    }

    /// KVM_X86_SET_MSR_FILTER.
    pub(crate) fn set_filter(&mut self, flags: u32, ranges: &[RawRange]) -> Result<(), i32> {
        self.make(Request::SetMsrFilter, &set_filter(flags, ranges.iter().cloned()))
    }

    /// A call on the VM.
    pub(crate) fn make(&mut self, request: Request, call: &Call) -> Result<(), i32> {
        let (arena, argp) = placed(call);
        self.calls().call(Descriptor::Vm, request, argp, &arena)
    }

    /// Denies these and allows the rest.
    pub(crate) fn deny(&mut self, ops: Ops, msrs: &[Msr]) {
        self.install(&denying(ops, msrs));
    }

    pub(crate) fn install(&mut self, filter: &Filter) {
        self.make(Request::SetMsrFilter, &setting(filter)).unwrap();
    }

    /// One KVM_RUN with a read before it.
    pub(crate) fn read(&mut self, msr: Msr) -> Came {
        self.enter(Op::Read, JUNK, msr.0.into(), JUNK);
        self.go_on()
    }

    /// One KVM_RUN with a write before it.
    pub(crate) fn write(&mut self, msr: Msr, value: u64) -> Came {
        self.enter(Op::Write, value & 0xffff_ffff, msr.0.into(), value >> 32);
        self.go_on()
    }

    /// One KVM_RUN.
    pub(crate) fn go_on(&mut self) -> Came {
        assert_eq!(self.run(), Ok(()), "KVM_RUN");
        match self.exit_reason() {
            abi::EXIT_X86_RDMSR | abi::EXIT_X86_WRMSR => Came::Out(self.exit_reason(), self.run_msr()),
            EXIT_IO => {
                let registers = self.registers();
                match registers.rbx & 0x100 {
                    0 => Came::Done {
                        rax: registers.rax,
                        rdx: registers.rdx,
                    },
                    _ => Came::Fault,
                }
            }
            other => panic!("exit {other}"),
        }
    }

    /// A KVM_RUN with `immediate_exit`.
    pub(crate) fn drain(&mut self) {
        self.set_immediate_exit(true);
        assert_eq!(self.run(), Err(EINTR));
        self.set_immediate_exit(false);
    }
}

/// A filter that denies these and allows the rest.
pub(crate) fn denying(ops: Ops, msrs: &[Msr]) -> Filter {
    let ranges = msrs.iter().map(|msr| FilterRange::new(msr.0, 1, ops, [0]).unwrap());
    Filter::new(Verdict::Allow, ranges.collect::<Vec<_>>()).unwrap()
}

/// Runs `body` on every implementation that is here.
pub(crate) fn everywhere(body: impl Fn(&mut dyn Hypervisor)) {
    // Says first what it skips: whoever counts looks at the first line.
    let kernel = Kernel::running();
    for engine in Engine::all(kernel.as_ref()) {
        on(engine, &body);
    }
    if let Some(kernel) = &kernel {
        for live in Live::both(kernel) {
            on(live, &body);
        }
    }
}

/// Runs `body` on the kernel in both modes; for what the engine has no part in.
pub(crate) fn on_the_kernel(body: impl Fn(&mut Live)) {
    let Some(kernel) = Kernel::running() else { return };
    for mut live in Live::both(&kernel) {
        println!("on the {}", live.name());
        body(&mut live);
    }
}

fn on(mut hypervisor: impl Hypervisor, body: &impl Fn(&mut dyn Hypervisor)) {
    println!("on the {}", hypervisor.name());
    body(&mut hypervisor);
}
