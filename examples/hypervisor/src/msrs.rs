//! The MSRs that this hypervisor gives its guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use msrgate_core::{Msr, MsrRange, Ops, PassthroughMsr};
use msrgate_engine::{Msrs, Refusal};

/// IA32_BIOS_SIGN_ID.
pub(crate) const MICROCODE_REVISION: u32 = 0x8b;
/// IA32_APIC_BASE.
pub(crate) const APIC_BASE: u32 = 0x1b;
/// IA32_SYSENTER_CS.
pub(crate) const SYSENTER_CS: u32 = 0x174;
/// An MSR of this hypervisor's own making, among those that no processor has: whether the guest may end.
pub(crate) const GO: u32 = 0x4000_0100;
/// An MSR that there is not.
pub(crate) const NOWHERE: u32 = 0xdead;

/// The MSRs that the processor keeps for the guest, so that it may reach them without an exit.
pub(crate) fn candidates() -> Vec<PassthroughMsr> {
    vec![PassthroughMsr::new(MsrRange::single(Msr(SYSENTER_CS)), Ops::BOTH)]
}

/// One vCPU's registers.
#[derive(Clone)]
pub(crate) struct Registers {
    sysenter_cs: u64,
    apic_base: u64,
    go: Arc<AtomicBool>,
}

impl Registers {
    pub(crate) fn new(go: Arc<AtomicBool>) -> Registers {
        Registers {
            sysenter_cs: 0x8,
            apic_base: 0xfee0_0900,
            go,
        }
    }

    /// The processor's own register, where the MSR is a candidate.
    pub(crate) fn physical(&mut self, msr: u32) -> Option<&mut u64> {
        (msr == SYSENTER_CS).then_some(&mut self.sysenter_cs)
    }
}

impl Msrs for Registers {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        match msr.0 {
            SYSENTER_CS => Ok(self.sysenter_cs),
            APIC_BASE => Ok(self.apic_base),
            GO => Ok(self.go.load(Ordering::Relaxed).into()),
            _ => Err(Refusal::Unknown),
        }
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        match msr.0 {
            SYSENTER_CS => self.sysenter_cs = value,
            APIC_BASE if value & 0xff != 0 => return Err(Refusal::Invalid),
            APIC_BASE => self.apic_base = value,
            _ => return Err(Refusal::Unknown),
        }
        Ok(())
    }
}
