//! The MSRs behind the filter: those that the cases leave to the kernel, as every KVM has them.

use std::collections::BTreeMap;

use msrgate_core::{Access, FaultCause, Msr, MsrBackend, MsrRange, Outcome, Reason};
use msrgate_engine::{Errno, Msrs, Refusal};

/// A new vCPU's registers.
///
/// 0x174 to 0x176 (SYSENTER), 0xc0000081 (STAR), 0xc0000100 to 0xc0000102 (bases of FS and GS) and 0x277 (PAT) hold what is
/// written, within what the cases write: values of 31 bits, and memory types; a base refuses an address that is not canonical.
/// Those of x2APIC are refused, since the guest has no local APIC in the kernel. All others are unknown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    registers: BTreeMap<Msr, u64>,
}

/// FS_BASE, GS_BASE, KERNEL_GS_BASE.
const BASES: [u32; 3] = [0xc000_0100, 0xc000_0101, 0xc000_0102];

impl Default for Machine {
    fn default() -> Machine {
        let zero = [0x174, 0x175, 0x176, 0xc000_0081]
            .into_iter()
            .chain(BASES)
            .map(|msr| (Msr(msr), 0));
        let pat = (Msr(0x277), 0x0007_0406_0007_0406);
        Machine {
            registers: zero.chain([pat]).collect(),
        }
    }
}

impl Machine {
    /// The name of the one handler that policies of cases may ask.
    pub const HANDLER: &'static str = "suite";

    /// The handler's answer to an access: a read gives the index, a write of 0 faults.
    pub fn handler(access: Access) -> Outcome {
        match access {
            Access::Read { msr } => Outcome::Value(msr.0.into()),
            Access::Write { value: 0, .. } => Outcome::Fault,
            Access::Write { .. } => Outcome::Done,
        }
    }

    /// Carries out an access that the filter allows, or says why not.
    pub fn access(&mut self, access: Access) -> Result<Outcome, Reason> {
        if MsrRange::X2APIC.contains(access.msr()) {
            return Err(Reason::Invalid);
        }
        let register = self.registers.get_mut(&access.msr()).ok_or(Reason::Unknown)?;
        match access {
            Access::Read { .. } => Ok(Outcome::Value(*register)),
            Access::Write { msr, value } if BASES.contains(&msr.0) && !is_canonical(value) => Err(Reason::Invalid),
            Access::Write { value, .. } => {
                *register = value;
                Ok(Outcome::Done)
            }
        }
    }

    fn value(&mut self, msr: Msr) -> Result<u64, Reason> {
        self.access(Access::Read { msr }).map(|outcome| match outcome {
            Outcome::Value(value) => value,
            _ => 0,
        })
    }
}

fn is_canonical(address: u64) -> bool {
    matches!(address >> 47, 0 | 0x1_ffff)
}

fn refusal(reason: Reason) -> Refusal {
    match reason {
        Reason::Unknown => Refusal::Unknown,
        Reason::Invalid => Refusal::Invalid,
        // Nothing above refuses so.
        Reason::Filter => Refusal::Error(Errno::Eio),
    }
}

impl Msrs for Machine {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        self.value(msr).map_err(refusal)
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        self.access(Access::Write { msr, value }).map(drop).map_err(refusal)
    }
}

impl MsrBackend for Machine {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        self.value(msr).map_err(|_| FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let done = self.access(Access::Write { msr, value });
        done.map(drop).map_err(|_| FaultCause::KernelRefused)
    }

    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, name: &str, msr: Msr) -> Result<u64, FaultCause> {
        match Machine::handler(Access::Read { msr }) {
            Outcome::Value(value) if name == Machine::HANDLER => Ok(value),
            _ => Err(FaultCause::NoHandler),
        }
    }

    fn handler_write(&mut self, name: &str, msr: Msr, value: u64) -> Result<(), FaultCause> {
        match Machine::handler(Access::Write { msr, value }) {
            Outcome::Done if name == Machine::HANDLER => Ok(()),
            _ => Err(FaultCause::HandlerFault),
        }
    }
}
