//! The MSRs behind the filter: the machine's own, but for those that the processor holds apart for the guest, and those that the
//! hypervisor keeps for itself.

use alloc::vec::Vec;
use core::arch::x86_64::__cpuid;

use msrgate_core::{FaultCause, Msr, MsrBackend, MsrRange, Ops, PassthroughMsr};
use msrgate_engine::{Intercepts, Msrs, Refusal};

use crate::hypervisor::Hypervisor;
use crate::machine::{rdmsr, wrmsr};
use crate::processor::Processor;

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;

/// What the guest may reach without an exit, where the filter allows it: the hypervisor uses none of them.
fn candidates() -> Vec<PassthroughMsr> {
    let candidate =
        |first, last, ops| MsrRange::new(Msr(first), Msr(last)).map(|range| PassthroughMsr::new(range, ops));
    let all = [
        candidate(0x10, 0x10, Ops::READ),
        candidate(0x174, 0x176, Ops::BOTH),
        candidate(0xc000_0081, 0xc000_0084, Ops::BOTH),
        candidate(0xc000_0100, 0xc000_0103, Ops::BOTH),
    ];
    all.into_iter().flatten().collect()
}

/// A vCPU's bitmap, with every bit set so far.
pub(crate) fn intercepts(amd: bool) -> Intercepts {
    match amd {
        true => Intercepts::svm(candidates()),
        false => Intercepts::vmx(candidates()),
    }
}

/// Whether all MSRs are there that RDMSR reads. QEMU's emulator answers any: for it there is a list.
fn may_exist(msr: u32) -> bool {
    let emulator = __cpuid(0x4000_0000).ebx == u32::from_le_bytes(*b"TCGT");
    !emulator || matches!(msr, 0..=0x8ff | 0xc000_0080..=0xc000_0110 | 0xc001_0000..=0xc001_1fff)
}

/// One access's way to the machine.
pub(crate) struct Machine<'a> {
    pub(crate) processor: &'a mut dyn Processor,
    pub(crate) hypervisor: &'a Hypervisor,
    /// Of the processor that it comes from.
    pub(crate) number: usize,
}

impl Msrs for Machine<'_> {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        match msr.0 {
            // The guest has no VMX.
            0x480..=0x493 => Err(Refusal::Unknown),
            msr if !may_exist(msr) => Err(Refusal::Unknown),
            msr => self.processor.held(msr).or_else(|| rdmsr(msr)).ok_or(Refusal::Unknown),
        }
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        match msr.0 {
            // A processor does not enter a guest with values that it would refuse itself.
            EFER if value & !0x4d01 != 0 => return Err(Refusal::Invalid),
            PAT if value.to_le_bytes().iter().any(|kind| !matches!(kind, 0 | 1 | 4..=7)) => {
                return Err(Refusal::Invalid);
            }
            // SVM's VM_CR and VM_HSAVE_PA, VMX's IA32_FEATURE_CONTROL.
            0xc001_0114 | 0xc001_0117 | 0x3a => return Err(Refusal::Invalid),
            msr if !may_exist(msr) => return Err(Refusal::Unknown),
            _ => {}
        }
        let written = self.processor.hold(msr.0, value).or_else(|| wrmsr(msr.0, value));
        // A write that faults does not say whether the MSR is there; a read does.
        written.ok_or_else(|| match rdmsr(msr.0) {
            Some(_) => Refusal::Invalid,
            None => Refusal::Unknown,
        })
    }
}

impl MsrBackend for Machine<'_> {
    fn kernel_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        self.read(msr).map_err(|_| FaultCause::KernelRefused)
    }

    fn kernel_write(&mut self, msr: Msr, value: u64) -> Result<(), FaultCause> {
        self.write(msr, value).map_err(|_| FaultCause::KernelRefused)
    }

    fn host_read(&mut self, msr: Msr) -> Result<u64, FaultCause> {
        rdmsr(msr.0).ok_or(FaultCause::HostUnreadable)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Err(FaultCause::NoHandler)
    }

    /// The one handler of both policies: replaces the one by the other.
    fn handler_write(&mut self, name: &str, _: Msr, value: u64) -> Result<(), FaultCause> {
        match (name, value) {
            ("replace", 1) => self.hypervisor.replace(self.number, 0),
            ("replace", 2) => self.hypervisor.replace(self.number, 1),
            _ => return Err(FaultCause::HandlerFault),
        }
        Ok(())
    }
}
