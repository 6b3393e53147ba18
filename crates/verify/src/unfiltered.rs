//! A live VM without a filter: the MSRs behind the engine's filter.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_bindings::{Msrs as MsrList, kvm_msr_entry};
use msrgate_core::{Access, FaultCause, Msr, MsrBackend, Outcome, Reason, Reasons};
use msrgate_engine::{Errno, Msrs, Process, Refusal};
use msrgate_guest::Guest;
use msrgate_guest::raw::{Arena, Caller};

use crate::Machine;
use crate::VerifyError;
use crate::case::Call;

/// A live VM without a filter, and with a mask that tells unknown MSRs from refused accesses.
pub(crate) struct Unfiltered {
    guest: Guest,
    /// MSRs that were seen to change by themselves.
    moving: HashSet<Msr>,
    /// Whether an access since the last look got what the engine has no word for.
    unsayable: bool,
}

impl Unfiltered {
    pub(crate) fn new(machine: &Machine) -> Result<Unfiltered, VerifyError> {
        let guest = machine.guest(1)?;
        let mut arena = Arena::new(1)?;
        let reasons = Reasons::of(Reason::Unknown).union(Reasons::of(Reason::Invalid));
        let call = Call::enable_cap(reasons.bits().into());
        let (request, argp) = call.place(Process::Native, &mut arena);
        Caller::of(guest.vm()).and_then(|vm| vm.call(request, argp))?;
        Ok(Unfiltered {
            guest,
            moving: HashSet::new(),
            unsayable: false,
        })
    }

    /// What the kernel gives to an access that no filter looks at.
    fn access(&mut self, access: Access) -> Result<Outcome, Refusal> {
        let mut reason = None;
        let ran = self
            .guest
            .run(0, &[access], &mut |pending| reason = Some(pending.reason_bits()));
        let outcome = ran.ok().and_then(|seen| seen.first()).map(|seen| seen.outcome);
        match (outcome, reason.map(Reason::from_bits)) {
            (Some(Outcome::Fault), Some(Some(Reason::Unknown))) => Err(Refusal::Unknown),
            (Some(Outcome::Fault), Some(Some(Reason::Invalid))) => Err(Refusal::Invalid),
            (Some(outcome @ (Outcome::Value(_) | Outcome::Done)), None) => Ok(outcome),
            // It broke the guest, or the processor faulted it without asking the kernel.
            _ => {
                self.unsayable = true;
                Err(Refusal::Error(Errno::Eio))
            }
        }
    }

    /// Whether there was an access whose result the engine cannot be told. Starts anew.
    pub(crate) fn take_unsayable(&mut self) -> bool {
        std::mem::take(&mut self.unsayable)
    }

    /// What the MSR holds, to write it back; 0 where it cannot be read.
    pub(crate) fn value(&mut self, msr: Msr) -> u64 {
        let result = self.access(Access::Read { msr });
        self.unsayable = false;
        match result {
            Ok(Outcome::Value(value)) => value,
            _ => 0,
        }
    }

    /// Whether the MSR changes by itself, as clocks and counters do.
    pub(crate) fn moves(&mut self, msr: Msr) -> bool {
        if !self.moving.contains(&msr) && self.value(msr) != self.value(msr) {
            self.moving.insert(msr);
        }
        self.moving.contains(&msr)
    }
}

impl Msrs for Unfiltered {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        match self.access(Access::Read { msr })? {
            Outcome::Value(value) => Ok(value),
            _ => Err(Refusal::Invalid),
        }
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        self.access(Access::Write { msr, value }).map(|_| ())
    }
}

fn list(msr: Msr, data: u64) -> Result<MsrList, FaultCause> {
    let entry = kvm_msr_entry {
        index: msr.0,
        data,
        ..Default::default()
    };
    MsrList::from_entries(&[entry]).map_err(|_| FaultCause::KernelRefused)
}

/// The host's view, for a plan's actions.
impl MsrBackend for Unfiltered {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let mut list = list(msr, 0)?;
        let vcpu = self.guest.vcpu(0).map_err(|_| FaultCause::KernelRefused)?;
        match vcpu.fd().get_msrs(&mut list) {
            Ok(1) => list
                .as_slice()
                .first()
                .map(|entry| entry.data)
                .ok_or(FaultCause::KernelRefused),
            _ => Err(FaultCause::KernelRefused),
        }
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let list = list(msr, value)?;
        let vcpu = self.guest.vcpu(0).map_err(|_| FaultCause::KernelRefused)?;
        match vcpu.fd().set_msrs(&list) {
            Ok(1) => Ok(()),
            _ => Err(FaultCause::KernelRefused),
        }
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        let mut bytes = [0; 8];
        let read = File::open("/dev/cpu/0/msr").and_then(|file| file.read_exact_at(&mut bytes, u64::from(msr.0)));
        read.map(|()| u64::from_le_bytes(bytes))
            .map_err(|_| FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HandlerFault)
    }

    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Err(FaultCause::HandlerFault)
    }
}
