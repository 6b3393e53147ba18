//! The hypervisor: a VM, its vCPUs, and what KVM_RUN would be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use msrgate_core::{Exit, abi};
use msrgate_engine::{
    Caller, Errno, Intercepts, Interruption, Path, PickUp, Step, StillPending, UserMemory, Vcpu as EngineVcpu, Vendor,
    Vm as EngineVm,
};

use crate::msrs::{Registers, candidates};
use crate::processor::{Processor, VmExit};

/// A VM.
pub(crate) struct Vm {
    engine: Arc<EngineVm>,
    vendor: Vendor,
    doorbells: Vec<Arc<Doorbell>>,
}

/// How a vCPU that is in the guest is made to leave it.
#[derive(Default)]
pub(crate) struct Doorbell {
    /// To look at what has changed and go back in.
    kick: AtomicBool,
    /// To return to the VMM.
    pub(crate) signal: AtomicBool,
}

impl Vm {
    pub(crate) fn new(vendor: Vendor, vcpus: usize) -> Vm {
        Vm {
            engine: Arc::new(EngineVm::new()),
            vendor,
            doorbells: (0..vcpus).map(|_| Arc::default()).collect(),
        }
    }

    /// An ioctl of the VMM on the VM. The vCPUs are made to pick a new filter up.
    pub(crate) fn ioctl(&self, request: u32, argp: u64, memory: &impl UserMemory) -> Result<u32, Errno> {
        let result = self.engine.ioctl(request, argp, memory, Caller::NATIVE)?;
        if request == abi::SET_MSR_FILTER {
            for doorbell in &self.doorbells {
                doorbell.kick.store(true, Ordering::Release);
            }
        }
        Ok(result)
    }

    /// A vCPU in this state.
    pub(crate) fn vcpu(&self, number: usize, state: State) -> Vcpu {
        let intercepts = match self.vendor {
            Vendor::Intel => Intercepts::vmx(candidates()),
            Vendor::Amd => Intercepts::svm(candidates()),
        };
        Vcpu {
            engine: EngineVcpu::new(self.engine.clone(), intercepts),
            vendor: self.vendor,
            state,
            doorbell: self.doorbells[number].clone(),
            immediate_exit: false,
            error: 0,
            data: 0,
        }
    }

    pub(crate) fn doorbells(&self) -> &[Arc<Doorbell>] {
        &self.doorbells
    }
}

/// All that a vCPU is made of, but for an access that waits for the VMM.
#[derive(Clone)]
pub(crate) struct State {
    pub(crate) processor: Processor,
    pub(crate) registers: Registers,
}

/// A vCPU.
pub(crate) struct Vcpu {
    engine: EngineVcpu,
    vendor: Vendor,
    state: State,
    doorbell: Arc<Doorbell>,
    /// Return before the guest executes anything.
    pub(crate) immediate_exit: bool,
    /// The VMM's answer: anything but 0 faults.
    pub(crate) error: u8,
    /// The VMM's answer: what a read gets.
    pub(crate) data: u64,
}

/// Why [`Vcpu::run`] returned.
pub(crate) enum Stop {
    /// The VMM is to answer this access.
    Msr(Exit),
    /// EINTR.
    Interrupted,
    /// The guest is at its end.
    Halt,
}

impl Vcpu {
    /// KVM_RUN: ends the access that waits, then runs the guest until the VMM is needed.
    pub(crate) fn run(&mut self) -> Result<Stop, Errno> {
        if self.immediate_exit {
            let drained = self.engine.drain(self.error, self.data, Interruption::ImmediateExit);
            drained
                .completion
                .into_iter()
                .for_each(|done| self.state.processor.apply(done));
            return Ok(Stop::Interrupted);
        }
        if let Some(completion) = self.engine.complete(self.error, self.data) {
            self.state.processor.apply(completion);
        }
        while !self.doorbell.signal.swap(false, Ordering::Acquire) {
            // What was rung for before this is picked up below; a ring after it leaves the guest again.
            self.doorbell.kick.swap(false, Ordering::Acquire);
            let doorbell = &self.doorbell;
            let rung = || doorbell.kick.load(Ordering::Relaxed) || doorbell.signal.load(Ordering::Relaxed);
            let State { processor, registers } = &mut self.state;
            // The processor uses the bitmap where it lies, so it does not matter here whether it has changed.
            let PickUp { intercepts, .. } = self.engine.pick_up();
            match processor.enter(self.vendor, intercepts, registers, rung) {
                VmExit::Interrupt => {}
                VmExit::Halt => return Ok(Stop::Halt),
                VmExit::Msr(instruction) => {
                    // Nothing is pending here: what was is complete.
                    let step = self.engine.execute(instruction, Path::VmExit, registers);
                    match step.map_err(|StillPending| Errno::Einval)? {
                        Step::Complete(completion) => processor.apply(completion),
                        Step::Exit(exit) => return Ok(Stop::Msr(exit)),
                        Step::Failed(errno) | Step::EmulationFailed(errno) => return Err(errno),
                    }
                }
            }
        }
        Ok(Stop::Interrupted)
    }

    /// The state, unless an access waits, which would be lost.
    pub(crate) fn save(&self) -> Result<State, StillPending> {
        self.engine.ready_to_save()?;
        Ok(self.state.clone())
    }
}
