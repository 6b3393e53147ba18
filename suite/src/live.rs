//! The live kernel: plans through `msrgate-kvm`, raw calls as they lie in memory, accesses by a guest of `msrgate-guest`.

#![expect(unsafe_code, reason = "the system calls that make a process")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_ioctls::Kvm;
use msrgate_core::{Outcome, Reason, Reasons, Verdict};
use msrgate_guest::raw::{Arena, Caller, Request};
use msrgate_guest::{Guest, Mode, Options, Pending};
use msrgate_kvm::Capabilities;
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::Plan;
use msrgate_verify::case::PAGES;

use crate::compiled::{compile, cpuid};
use crate::engine::edit;
use crate::library::{Descriptors, Given, Holder, Library};
use crate::plan::action;
use crate::{
    AccessStep, Call, CallResult, Case, Descriptor, Implementation, Process, Seen, Stop, Subject, Target, perform,
};

/// Whether the kernel hides MSRs that it does not know.
const IGNORE_MSRS: &str = "/sys/module/kvm/parameters/ignore_msrs";

/// This machine's KVM.
pub struct Live {
    kvm: Kvm,
    probed: Capabilities,
    mode: Mode,
    library: Library,
    name: String,
}

impl Live {
    /// Opens KVM, or says why the cases cannot be run on it.
    pub fn open(mode: Mode, library: Library) -> Result<Live, String> {
        let file = msrgate_kvm::open().map_err(|error| error.to_string())?;
        let probed = msrgate_kvm::probe(&file).map_err(|error| error.to_string())?;
        let kvm = Kvm::new().map_err(|error| error.to_string())?;
        if fs::read_to_string(IGNORE_MSRS).is_ok_and(|value| value.starts_with(['Y', '1'])) {
            return Err(format!("{IGNORE_MSRS} is on"));
        }
        Ok(Live {
            kvm,
            probed,
            mode,
            library,
            name: match mode {
                Mode::Real => format!("live kernel, real mode, {library:?}"),
                Mode::Long => format!("live kernel, 64-bit mode, {library:?}"),
            },
        })
    }
}

impl Implementation for Live {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self, case: &Case, process: Process) -> Result<Box<dyn Subject + '_>, Stop> {
        if process == Process::Compat {
            return Err(Stop::skip(
                "this process is 64-bit, and the kernel gives it ENOTTY for the compat number",
            ));
        }
        if case.ignore_msrs {
            return Err(Stop::skip("kvm.ignore_msrs is the whole host's"));
        }
        let mut guest = Guest::new(&self.kvm, self.mode, &Options::default()).map_err(Stop::fail)?;
        let calls = Calls {
            system: Caller::of(&self.kvm).map_err(Stop::fail)?,
            vm: Caller::of(guest.vm()).map_err(Stop::fail)?,
            vcpu: Caller::of(guest.vcpu(0).map_err(Stop::fail)?.fd()).map_err(Stop::fail)?,
        };
        let mut running = Running {
            probed: self.probed,
            kvm: self.kvm.as_raw_fd(),
            library: self.library,
            cpuid: cpuid(case)?,
            guest,
            calls,
            reasons: Reasons::NONE,
            holder: None,
        };
        if let Some(policy) = &case.policy {
            running.replace(policy)?;
        }
        Ok(Box::new(running))
    }
}

/// A VM, and what is in force on it.
struct Running {
    probed: Capabilities,
    kvm: RawFd,
    library: Library,
    cpuid: Option<Cpuid>,
    guest: Guest,
    calls: Calls,
    reasons: Reasons,
    /// What holds the policy, and the plan of it.
    holder: Option<(Holder, Arc<Plan>)>,
}

/// Answers as a case says; what is no answer to the access leaves the fault that stands ready.
pub fn answer(pending: &mut Pending<'_>, outcome: Outcome) {
    let read = match outcome {
        Outcome::Value(value) => Ok(value),
        _ => Err(msrgate_core::Fault),
    };
    let write = match outcome {
        Outcome::Done => Ok(()),
        _ => Err(msrgate_core::Fault),
    };
    pending.answer(|_| read, |_, _| write);
}

impl Subject for Running {
    fn access(&mut self, step: &AccessStep) -> Result<Seen, Stop> {
        let Running {
            guest, calls, holder, ..
        } = self;
        let mut wrong: Option<Stop> = None;
        let seen = guest
            .run(0, &[step.access], &mut |pending| {
                if pending.access() != step.access {
                    wrong = Some(Stop::fail(format!("it exits with {:?}", pending.access())));
                }
                for call in &step.meanwhile {
                    wrong = wrong.take().or(perform(call, |call| calls.make(call).map(Some)).err());
                }
                match holder {
                    Some((holder, _)) if holder.dispatch(pending) => {}
                    Some(_) => wrong = Some(Stop::fail("the gate takes no notice of the exit")),
                    None => answer(pending, step.answer),
                }
            })
            .map_err(Stop::fail)?;
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let seen = *seen.first().ok_or(Stop::fail("the guest made no access"))?;
        let exit = match seen.exit {
            None => None,
            Some(exit) => match Reason::from_bits(exit.reason_bits) {
                Some(reason) => Some(reason),
                None => return Err(Stop::fail(format!("it exits for reason {:#x}", exit.reason_bits))),
            },
        };
        let verdict = if exit == Some(Reason::Filter) {
            Verdict::Deny
        } else {
            Verdict::Allow
        };
        let action = |(_, plan): &(Holder, Arc<Plan>)| action(plan, step.msr(), step.op());
        Ok(Seen {
            action: self.holder.as_ref().map(action),
            // Without the reason a denial looks like any other fault.
            verdict: self.reasons.contains(Reason::Filter).then_some(verdict),
            exit: Some(exit),
            sees: Some(seen.outcome),
        })
    }

    fn call(&mut self, call: &Call) -> Result<Option<CallResult>, Stop> {
        let gives = self.calls.make(call)?;
        if let (Target::EnableCap { args: [mask, ..], .. }, CallResult::OK) = (&call.target, gives) {
            self.reasons = Reasons::from_bits(*mask).unwrap_or(Reasons::NONE);
        }
        Ok(Some(gives))
    }

    fn replace(&mut self, policy: &str) -> Result<(), Stop> {
        let plan = Arc::new(compile(policy, self.cpuid.as_ref())?.plan);
        self.reasons = plan.reasons();
        let given = Given {
            text: policy,
            cpuid: self.cpuid.as_ref(),
            plan: Arc::clone(&plan),
        };
        match &self.holder {
            Some((holder, _)) => holder.replace(&given)?,
            None => {
                let fds = Descriptors {
                    kvm: self.kvm,
                    vm: self.guest.vm().as_raw_fd(),
                    vcpu: self.guest.vcpu(0).map_err(Stop::fail)?.fd().as_raw_fd(),
                };
                let holder = Holder::install(self.library, self.probed, fds, &given)?;
                self.holder = Some((holder, Arc::clone(&plan)));
            }
        }
        if let Some((_, in_force)) = &mut self.holder {
            *in_force = plan;
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Stop> {
        Err(Stop::skip("nothing kills a VM of this kernel on purpose"))
    }
}

/// The descriptors that calls are made on.
struct Calls {
    system: Caller,
    vm: Caller,
    vcpu: Caller,
}

impl Calls {
    fn make(&self, call: &Call) -> Result<CallResult, Stop> {
        let mut arena = Arena::new(PAGES).map_err(Stop::fail)?;
        let (request, argp) = call.place(Process::Native, &mut arena);
        let gives = match call.on {
            Descriptor::Vm => self.vm.call(request, argp).into(),
            Descriptor::Vcpu => self.vcpu.call(request, argp).into(),
            Descriptor::System => self.system.call(request, argp).into(),
            Descriptor::AnotherProcess => call_of_child(&self.vm, request, argp).map_err(Stop::fail)?,
        };
        edit(call, &mut arena);
        Ok(gives)
    }
}

/// The call from a process with another address space, where the same bytes lie at the same addresses.
fn call_of_child(vm: &Caller, request: Request, argp: u64) -> io::Result<CallResult> {
    // SAFETY: the child makes two system calls and ends, without allocating, taking a lock or unwinding, so it does not
    // matter what other threads held when it was made.
    let child = unsafe { libc::fork() };
    match child {
        0 => {
            let CallResult(number) = vm.call(request, argp).into();
            // SAFETY: ends the child at once, without what the parent registered to be run at exit.
            unsafe { libc::_exit(number) }
        }
        child if child > 0 => {
            let mut status = 0;
            // SAFETY: `status` may be written and lives over the call.
            if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
                return Err(io::Error::last_os_error());
            }
            if !libc::WIFEXITED(status) {
                return Err(io::Error::other("the child was killed"));
            }
            Ok(CallResult(libc::WEXITSTATUS(status)))
        }
        _ => Err(io::Error::last_os_error()),
    }
}
