//! What a VMM asks KVM for that has to do with MSRs, and what it gets: each call is made as the VMM made it, and nothing else.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use msrgate_core::abi::{self, EnableCap, Layout, RawFilter, RawRange};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::seccomp::{Listener, Marks, Waiting};
use crate::stopped::{StopError, Stopper};
use crate::target::{self, Object};

/// A call that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Call {
    /// The process that made it, as this process numbers it.
    pub process: i32,
    /// Its thread.
    pub thread: i32,
    /// The VM, from 1 in the order in which they are made, whatever descriptor it has; `None` where that is not known.
    pub vm: Option<u64>,
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
}

/// `struct kvm_msr_filter` as a VMM hands it over, checked by nobody.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Its flags.
    pub flags: u32,
    /// The slots that are used, with their bitmaps; `None` where the bitmap is longer than the kernel takes, or cannot be read.
    pub ranges: Vec<(RawRange, Option<Box<[u64]>>)>,
}

/// Sees the calls of all processes of a VMM.
pub struct Capture {
    say: Box<dyn FnMut(Call) + Send>,
    stopper: Stopper,
    /// The tag of VM 0, which is none.
    none: u64,
    vms: u64,
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
    pub const REQUESTS: [u32; 4] = [abi::CREATE_VM, abi::CREATE_VCPU, abi::SET_MSR_FILTER, abi::ENABLE_CAP];

    /// `say` is given each call once it is made; the next one waits for it.
    pub fn new(marks: Marks, say: Box<dyn FnMut(Call) + Send>) -> Capture {
        Capture {
            say,
            stopper: Stopper::new(marks),
            none: marks.first_tag(),
            vms: 0,
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
        let number = number as u32;
        let on = Object::of(waiting.thread, fd as i32);
        let vm = match on {
            Ok(Object::Kvm) if number == abi::CREATE_VM => None,
            Ok(Object::Vm(tag)) if number != abi::CREATE_VM => self.vm(tag),
            // Where it cannot be looked at, the number tells what the call is.
            Err(_) => None,
            Ok(_) => {
                waiting.allow();
                return None;
            }
        };
        let request = match number {
            abi::CREATE_VM => Request::CreateVm,
            abi::CREATE_VCPU => Request::CreateVcpu(argument),
            abi::SET_MSR_FILTER => Request::Filter(filter(waiting.thread, argument)),
            _ => {
                let mut bytes = [0; EnableCap::BYTES];
                let read = target::read(waiting.thread, argument, &mut bytes);
                let cap = read.then(|| EnableCap::from_bytes(&bytes));
                if cap.is_some_and(|cap| cap.cap != abi::CAP_X86_USER_SPACE_MSR) {
                    waiting.allow();
                    return None;
                }
                Request::Mask(cap)
            }
        };
        let mut call = Call {
            process: target::process(waiting.thread),
            thread: waiting.thread,
            vm,
            request,
            result: Ok(Err(Errno::ENOSYS)),
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

    /// Makes the call in the VMM's thread. On [`StopError::Refused`] it still waits.
    fn make(&mut self, waiting: &Waiting<'_>, call: &mut Call) -> Result<Result<u64, Errno>, StopError> {
        if waiting.number != libc::SYS_ioctl as u32 {
            let line = "it makes 32-bit system calls, of which no other is captured";
            return Err(StopError::Refused(line.to_owned()));
        }
        let tracing = Arc::clone(&self.tracing);
        let _stands_still = tracing.lock().unwrap_or_else(PoisonError::into_inner);
        let [fd, number, argument, ..] = waiting.arguments;
        let (mut stopped, ()) = self.stopper.stop(waiting, call.process, None, || ())?;
        let result = stopped.ioctl(fd, number as u32, argument);
        if result == Err(Errno::ESRCH) {
            return Err(StopError::Gone);
        }
        if let (Request::CreateVm, Ok(fd)) = (&call.request, result) {
            self.vms += 1;
            // Without a name its calls are told without a number.
            let named = target::name(call.process, fd as i32, self.none + self.vms);
            call.vm = named.ok().map(|()| self.vms);
        }
        stopped.give(result);
        Ok(result)
    }

    /// The number of a VM that was made here.
    fn vm(&self, tag: u64) -> Option<u64> {
        tag.checked_sub(self.none).filter(|vm| (1..=self.vms).contains(vm))
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
