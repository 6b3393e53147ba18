//! A case: what is installed, what is called, what the guest does, and what comes of it.
//!
//! Its text is the format of `testdata/cases`, which the suite reads. What `verify` finds is written so.

mod memory;
mod print;

use std::fmt;
use std::io;

use msrgate_core::{Access, Msr, Op, Ops, Outcome, Reason, Verdict, abi};
use msrgate_engine::{Caller, Errno, Process, Vm};
use msrgate_guest::raw::{Arena, Request};

pub use memory::{PAGES, memory};

/// One case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Case {
    /// What it shows, as a sentence.
    pub name: String,
    /// The text of a policy, in force from the start.
    pub policy: Option<String>,
    /// The guest's CPUID, as `cpuid -r` prints it, for policies that ask.
    pub cpuid: Option<String>,
    /// The process that makes the calls; `None` for both in turn.
    pub process: Option<Process>,
    /// Whether KVM's parameter `ignore_msrs` is on.
    pub ignore_msrs: bool,
    /// In order.
    pub steps: Vec<Step>,
}

/// What happens next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// The guest makes an access.
    Access(AccessStep),
    /// A process makes a call.
    Call(Call),
    /// Another policy takes the place of the one in force.
    Replace(String),
    /// The VM dies (`kvm_vm_dead`).
    Kill,
}

/// An access and what comes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AccessStep {
    /// The access.
    pub access: Access,
    /// What user space answers where it is asked and no policy is in force.
    pub answer: Outcome,
    /// Calls between the exit and its completion.
    pub meanwhile: Vec<Call>,
    /// What is expected.
    pub expect: Seen,
}

/// What was seen of an access, or is expected; `None` where an implementation cannot say, or a case does not ask.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Seen {
    /// The policy's action, in the words of its `Display`.
    pub action: Option<String>,
    /// The filter's word.
    pub verdict: Option<Verdict>,
    /// Whether user space was asked, and why.
    pub exit: Option<Option<Reason>>,
    /// What the guest got.
    pub sees: Option<Outcome>,
}

/// A system call on one of KVM's descriptors.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Which, with its argument.
    pub target: Target,
    /// On what.
    pub on: Descriptor,
    /// Where its argument lies.
    pub argp: Place,
    /// What is expected.
    pub gives: Option<CallResult>,
}

/// A call and its argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// KVM_X86_SET_MSR_FILTER.
    SetMsrFilter(RawFilter),
    /// KVM_ENABLE_CAP.
    EnableCap {
        /// Which capability.
        cap: u32,
        /// The capability's flags.
        flags: u32,
        /// The capability's four arguments.
        args: [u64; 4],
    },
}

/// `struct kvm_msr_filter`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawFilter {
    /// The filter's flags.
    pub flags: u32,
    /// What each padding byte holds.
    pub pad: u8,
    /// The layout, and with it the request's number; `None` for the calling process's own.
    pub layout: Option<Process>,
    /// Whether the caller inverts its bitmaps after the call.
    pub edited: bool,
    /// The slots that are not all zeros, in order.
    pub ranges: Vec<RawRange>,
}

/// `struct kvm_msr_filter_range`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RawRange {
    /// The range's position among the 16.
    pub slot: usize,
    /// The range's flags.
    pub flags: u32,
    /// How many MSRs.
    pub nmsrs: u32,
    /// The first.
    pub base: u32,
    /// What lies where `bitmap` points.
    pub bitmap: Vec<u8>,
    /// Where that is.
    pub at: Place,
}

/// Where something lies in the caller's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Aligned; zeros follow it.
    Mapped,
    /// At an odd address.
    Unaligned,
    /// The bitmap's last byte is the last that can be read.
    PageEnd,
    /// The bitmap's last byte cannot be read.
    Short,
    /// At address 0.
    Null,
    /// At an address that cannot be read.
    Unmapped,
    /// At an address that no process can have.
    NonCanonical,
}

impl Place {
    /// All places.
    pub const ALL: [Place; 7] = [
        Place::Mapped,
        Place::Unaligned,
        Place::PageEnd,
        Place::Short,
        Place::Null,
        Place::Unmapped,
        Place::NonCanonical,
    ];
}

/// On what a call is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Descriptor {
    /// The VM.
    Vm,
    /// A vCPU of it.
    Vcpu,
    /// `/dev/kvm`.
    System,
    /// The VM, by a process that did not make it.
    AnotherProcess,
}

impl Descriptor {
    /// All descriptors.
    pub const ALL: [Descriptor; 4] = [
        Descriptor::Vm,
        Descriptor::Vcpu,
        Descriptor::System,
        Descriptor::AnotherProcess,
    ];

    /// The engine's word for it; `None` for what the engine cannot tell apart, since it knows no process by itself.
    pub const fn in_engine(self) -> Option<msrgate_engine::Descriptor> {
        match self {
            Descriptor::Vm => Some(msrgate_engine::Descriptor::Vm),
            Descriptor::Vcpu => Some(msrgate_engine::Descriptor::Vcpu),
            Descriptor::System => Some(msrgate_engine::Descriptor::System),
            Descriptor::AnotherProcess => None,
        }
    }
}

/// A process's name in a case file.
pub const fn process_name(process: Process) -> &'static str {
    match process {
        Process::Native => "native",
        Process::Compat => "compat",
    }
}

/// What a call gives: an error's number, 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CallResult(pub i32);

impl CallResult {
    /// Success.
    pub const OK: CallResult = CallResult(0);
    /// EINVAL.
    pub const EINVAL: CallResult = CallResult(22);
    /// EFAULT.
    pub const EFAULT: CallResult = CallResult(14);

    /// Those that a case file can expect, by name.
    pub const NAMES: [(&'static str, CallResult); 7] = [
        ("ok", CallResult::OK),
        ("EINTR", CallResult(4)),
        ("EIO", CallResult(5)),
        ("ENOMEM", CallResult(12)),
        ("EFAULT", CallResult::EFAULT),
        ("EINVAL", CallResult::EINVAL),
        ("ENOTTY", CallResult(25)),
    ];
}

/// What the kernel gives.
impl From<io::Result<()>> for CallResult {
    fn from(result: io::Result<()>) -> CallResult {
        match result {
            Ok(()) => CallResult::OK,
            Err(error) => CallResult(error.raw_os_error().unwrap_or(-1)),
        }
    }
}

/// What the engine gives.
impl From<Result<u32, Errno>> for CallResult {
    fn from(result: Result<u32, Errno>) -> CallResult {
        result.map_or_else(|errno| CallResult(errno as i32), |_| CallResult::OK)
    }
}

impl fmt::Display for CallResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match CallResult::NAMES.into_iter().find(|(_, gives)| gives == self) {
            Some((name, _)) => f.pad(name),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl AccessStep {
    /// An access of which nothing is expected.
    pub fn new(access: Access) -> AccessStep {
        AccessStep {
            access,
            answer: Outcome::Fault,
            meanwhile: Vec::new(),
            expect: Seen::default(),
        }
    }

    /// The register.
    pub fn msr(&self) -> Msr {
        self.access.msr()
    }

    /// The direction.
    pub fn op(&self) -> Op {
        self.access.op()
    }
}

impl Call {
    /// KVM_X86_SET_MSR_FILTER on the VM, of which nothing is expected.
    pub fn set_msr_filter(filter: RawFilter) -> Call {
        Call {
            target: Target::SetMsrFilter(filter),
            on: Descriptor::Vm,
            argp: Place::Mapped,
            gives: None,
        }
    }

    /// Makes it on a VM of the engine as [`Call::place`] put it into `arena`; `None` where the engine has no such
    /// descriptor.
    pub fn on_engine(
        &self,
        vm: &Vm,
        process: Process,
        (request, argp): (Request, u64),
        arena: &Arena,
    ) -> Option<CallResult> {
        let caller = Caller::new(process, self.on.in_engine()?);
        Some(vm.ioctl(request.number(), argp, &memory(arena), caller).into())
    }

    /// KVM_ENABLE_CAP of the mask of exit reasons on the VM, of which nothing is expected.
    pub fn enable_cap(mask: u64) -> Call {
        Call {
            target: Target::EnableCap {
                cap: abi::CAP_X86_USER_SPACE_MSR,
                flags: 0,
                args: [mask, 0, 0, 0],
            },
            on: Descriptor::Vm,
            argp: Place::Mapped,
            gives: None,
        }
    }
}

/// An access of which nothing is expected.
impl From<Access> for Step {
    fn from(access: Access) -> Step {
        Step::Access(AccessStep::new(access))
    }
}

impl RawFilter {
    /// Allows what no range denies.
    pub fn allowing(ranges: Vec<RawRange>) -> RawFilter {
        RawFilter {
            flags: 0,
            pad: 0,
            layout: None,
            edited: false,
            ranges,
        }
    }

    /// The ranges that the kernel looks at.
    pub fn used(&self) -> impl Iterator<Item = &RawRange> {
        self.ranges.iter().filter(|range| range.nmsrs != 0)
    }
}

impl RawRange {
    /// One MSR, denied in these directions.
    pub fn denying(slot: usize, msr: Msr, ops: Ops) -> RawRange {
        RawRange {
            slot,
            flags: ops.bits(),
            nmsrs: 1,
            base: msr.0,
            bitmap: vec![0; 8],
            at: Place::Mapped,
        }
    }
}
