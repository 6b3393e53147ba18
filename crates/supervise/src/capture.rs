//! What a VMM asks KVM for that has to do with MSRs, and what it gets: each call is made as the VMM made it, and nothing else.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use msrgate_core::abi::{self, EnableCap, Layout, OneMsr, RawFilter, RawRange};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::seccomp::{Cookies, Listener, Waiting};
use crate::target::{self, Object};
use crate::tracee::{StopError, Tracer};

/// A call that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Call {
    /// The process that made it, as this process numbers it.
    pub process: i32,
    /// The thread that made it.
    pub thread: i32,
    /// The VM, from 1 in the order in which they are made, whatever descriptor it has; `None` where that is not known.
    pub vm: Option<u64>,
    /// The vCPU's number, of a call on one; likewise.
    pub vcpu: Option<u64>,
    /// What was asked for.
    pub request: Request,
    /// What the kernel gave; where the call was left to the kernel unseen, in one line for people why.
    pub result: Result<Result<u64, Errno>, String>,
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// KVM_CREATE_VM.
    CreateVm,
    /// KVM_CREATE_VCPU, of this number.
    CreateVcpu(u64),
    /// KVM_ENABLE_CAP of `KVM_CAP_X86_USER_SPACE_MSR`; `None` where its argument cannot be read.
    Mask(Option<EnableCap>),
    /// KVM_X86_SET_MSR_FILTER; `None` where its argument cannot be read.
    Filter(Option<Filter>),
    /// KVM_GET_MSRS, on a vCPU or on `/dev/kvm`, with what the kernel gave; `None` where its argument cannot be read, or has more
    /// entries than the kernel takes.
    GetMsrs(Option<Vec<OneMsr>>),
    /// KVM_SET_MSRS; likewise.
    SetMsrs(Option<Vec<OneMsr>>),
}

/// `struct kvm_msr_filter` as a VMM hands it over, checked by nobody.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// The filter's flags.
    pub flags: u32,
    /// The slots that are used, with their bitmaps; `None` where the bitmap is longer than the kernel takes, or cannot be read.
    pub ranges: Vec<(RawRange, Option<Box<[u64]>>)>,
}

/// Sees the calls of all processes of a VMM.
pub struct Capture {
    say: Box<dyn FnMut(Call) + Send>,
    tracer: Tracer,
    /// The tag of VM 0, which is none.
    none: u64,
    vms: u64,
    /// The VM of each VM and vCPU that was made here, and the vCPU's number, in the order of their tags.
    made: Vec<(u64, Option<u64>)>,
    tracing: Arc<Mutex<()>>,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("vms", &self.vms)
            .finish_non_exhaustive()
    }
}

impl Capture {
    /// The ioctls that have to wait.
    pub const REQUESTS: [u32; 6] = [
        abi::CREATE_VM,
        abi::CREATE_VCPU,
        abi::SET_MSR_FILTER,
        abi::ENABLE_CAP,
        abi::GET_MSRS,
        abi::SET_MSRS,
    ];

    /// `say` is given each call once it is made; the next one waits for it.
    pub fn new(cookies: Cookies, say: Box<dyn FnMut(Call) + Send>) -> Capture {
        Capture {
            say,
            tracer: Tracer::new(cookies),
            none: cookies.first_tag(),
            vms: 0,
            made: Vec::new(),
            tracing: Arc::default(),
        }
    }

    /// Locked while a thread stands still ([`Supervisor::tracing`](crate::Supervisor::tracing)).
    pub fn tracing(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.tracing)
    }

    /// Makes calls until nobody is left who could ask for one.
    ///
    /// # Errors
    /// The kernel's, where it does not say who calls.
    pub fn serve(mut self, listener: &Listener) -> io::Result<()> {
        loop {
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let events = ready[0].revents().unwrap_or(PollFlags::empty());
            if events.contains(PollFlags::POLLIN) {
                // It may have been killed meanwhile.
                if let Ok(waiting) = listener.next()
                    && let Some(call) = self.call(&waiting)
                {
                    (self.say)(call);
                }
            } else if !events.is_empty() {
                return Ok(());
            }
        }
    }

    /// Makes a call; `None` where it is none of KVM's, or was not made.
    fn call(&mut self, waiting: &Waiting<'_>) -> Option<Call> {
        let [fd, number, argument, ..] = waiting.arguments;
        let Some(mut call) = self.asked(waiting.thread, fd, number as u32, argument) else {
            waiting.allow();
            return None;
        };
        call.result = match self.make(waiting, &mut call) {
            Ok(result) => Ok(result),
            Err(StopError::Gone) => return None,
            Err(StopError::Refused(line)) => {
                waiting.allow();
                Err(line)
            }
        };
        Some(call)
    }

    /// The call that a thread is about to make; `None` where it is none that is told.
    pub(crate) fn asked(&self, thread: i32, fd: u64, number: u32, argument: u64) -> Option<Call> {
        let of_vcpu = matches!(number, abi::GET_MSRS | abi::SET_MSRS);
        let made = match Object::of(thread, fd as i32) {
            Ok(Object::Kvm) if matches!(number, abi::CREATE_VM | abi::GET_MSRS) => None,
            Ok(Object::Vm(tag)) if number != abi::CREATE_VM && !of_vcpu => self.made(tag),
            Ok(Object::Vcpu(tag)) if of_vcpu => self.made(tag),
            // Where it cannot be looked at, the number tells what the call is.
            Err(_) => None,
            Ok(_) => return None,
        };
        let request = match number {
            abi::CREATE_VM => Request::CreateVm,
            abi::CREATE_VCPU => Request::CreateVcpu(argument),
            abi::SET_MSR_FILTER => Request::Filter(filter(thread, argument)),
            abi::GET_MSRS => Request::GetMsrs(msrs(thread, argument)),
            abi::SET_MSRS => Request::SetMsrs(msrs(thread, argument)),
            _ => {
                let mut bytes = [0; EnableCap::BYTES];
                let read = target::read(thread, argument, &mut bytes);
                let cap = read.then(|| EnableCap::from_bytes(&bytes));
                if cap.is_some_and(|cap| cap.cap != abi::CAP_X86_USER_SPACE_MSR) {
                    return None;
                }
                Request::Mask(cap)
            }
        };
        Some(Call {
            process: target::process(thread),
            thread,
            vm: made.map(|(vm, _)| vm),
            vcpu: made.and_then(|(_, vcpu)| vcpu),
            request,
            result: Ok(Err(Errno::ENOSYS)),
        })
    }

    /// Tells of a call that the VMM itself has made.
    pub(crate) fn ended(&mut self, mut call: Call, argument: u64, result: Result<u64, Errno>) {
        self.given(&mut call, argument, result);
        call.result = Ok(result);
        (self.say)(call);
    }

    /// Notes what the kernel gave.
    fn given(&mut self, call: &mut Call, argument: u64, result: Result<u64, Errno>) {
        match (&mut call.request, result) {
            (Request::CreateVm, Ok(fd)) => {
                self.vms += 1;
                call.vm = self.name(call.process, fd, self.vms, None).then_some(self.vms);
            }
            (Request::CreateVcpu(id), Ok(fd)) => {
                if let Some(vm) = call.vm {
                    self.name(call.process, fd, vm, Some(*id));
                }
            }
            (Request::GetMsrs(given), Ok(_)) => *given = msrs(call.thread, argument),
            _ => {}
        }
    }

    /// Makes the call in the VMM's thread. On [`StopError::Refused`] it still waits.
    fn make(&mut self, waiting: &Waiting<'_>, call: &mut Call) -> Result<Result<u64, Errno>, StopError> {
        if waiting.number != libc::SYS_ioctl as u32 {
            let line = "it makes 32-bit system calls, of which no other is captured";
            return Err(StopError::Refused(line.to_owned()));
        }
        let tracing = Arc::clone(&self.tracing);
        let _stands_still = tracing.lock().unwrap_or_else(PoisonError::into_inner);
        let [fd, number, argument, ..] = waiting.arguments;
        let (mut tracee, ()) = self.tracer.stop(waiting, call.process, None, || ())?;
        let result = tracee.ioctl(fd, number as u32, argument);
        if result == Err(Errno::ESRCH) {
            return Err(StopError::Gone);
        }
        self.given(call, argument, result);
        tracee.give(result);
        Ok(result)
    }

    /// Gives a VM or a vCPU that was made here a tag; without one its calls are told without a number.
    fn name(&mut self, process: i32, fd: u64, vm: u64, vcpu: Option<u64>) -> bool {
        self.made.push((vm, vcpu));
        target::name(process, fd as i32, self.none + self.made.len() as u64).is_ok()
    }

    /// Gives tags to the VMs that a process has already, and to its vCPUs where there is one VM: the kernel does not say whose they are.
    pub(crate) fn find(&mut self, process: i32) {
        let found = target::objects(process);
        for fd in found
            .iter()
            .filter(|(_, object)| *object == Object::Vm(0))
            .map(|(fd, _)| *fd)
        {
            self.vms += 1;
            self.name(process, fd, self.vms, None);
        }
        if self.vms != 1 {
            return;
        }
        for (fd, _) in found.iter().filter(|(_, object)| *object == Object::Vcpu(0)) {
            self.name(process, *fd, 1, target::vcpu_number(process, *fd));
        }
    }

    /// Takes the tags away again that a process's VMs and vCPUs have from here.
    pub(crate) fn forget(&self, process: i32) {
        for (fd, object) in target::objects(process) {
            if let Object::Vm(tag) | Object::Vcpu(tag) = object
                && self.made(tag).is_some()
            {
                let _ = target::unname(process, fd as i32);
            }
        }
    }

    /// The VM of a tag, and the vCPU's number.
    fn made(&self, tag: u64) -> Option<(u64, Option<u64>)> {
        let place = tag.checked_sub(self.none)?.checked_sub(1)?;
        self.made.get(usize::try_from(place).ok()?).copied()
    }
}

/// What lies at the address of a filter.
fn filter(thread: i32, address: u64) -> Option<Filter> {
    let mut bytes = [0; Layout::NATIVE.filter_size];
    let read = target::read(thread, address, &mut bytes);
    let raw = RawFilter::from_bytes(&bytes, Layout::NATIVE).filter(|_| read)?;
    let words = |range: &RawRange| range.words(|address, to| target::read(thread, address, to)).ok();
    Some(Filter {
        flags: raw.flags,
        ranges: raw.used().map(|range| (*range, words(range))).collect(),
    })
}

/// The entries of a `struct kvm_msrs` at an address.
fn msrs(thread: i32, address: u64) -> Option<Vec<OneMsr>> {
    let mut header = [0; OneMsr::HEADER];
    let count = target::read(thread, address, &mut header).then(|| header.first_chunk().copied())?;
    let count = u32::from_le_bytes(count?);
    if count >= abi::MAX_IO_MSRS {
        return None;
    }
    let mut bytes = vec![0; count as usize * OneMsr::ENTRY];
    let entries = address.checked_add(OneMsr::HEADER as u64)?;
    let read = bytes.is_empty() || target::read(thread, entries, &mut bytes);
    read.then(|| bytes.as_chunks().0.iter().map(OneMsr::of_entry).collect())
}
