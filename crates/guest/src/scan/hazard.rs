//! Which MSRs are not written back, and why.

use msrgate_core::Msr;

/// Why a scan does not write an MSR back; `None` where it does.
///
/// These are commands: what is written acts, and is not kept. Registers that change with a write of what they hold are
/// none of these: setting a guest's clock back harms nobody but a guest that is thrown away.
pub fn hazard(msr: Msr) -> Option<&'static str> {
    let found = HAZARDS.iter().find(|(hazard, _)| *hazard == msr);
    found.map(|(_, why)| *why)
}

const HAZARDS: [(Msr, &str); 14] = [
    // IA32_PRED_CMD
    (Msr(0x49), "a command to the physical processor's branch predictors"),
    // IA32_BIOS_UPDT_TRIG
    (Msr(0x79), "loads a microcode update from the address that is written"),
    // IA32_FLUSH_CMD
    (Msr(0x10b), "a command to the physical processor's caches"),
    // IA32_X2APIC_EOI, IA32_X2APIC_ICR, IA32_X2APIC_INIT_COUNT, IA32_X2APIC_SELF_IPI
    (Msr(0x80b), "ends an interrupt"),
    (Msr(0x830), "sends an interrupt, INIT among them"),
    (Msr(0x838), "starts the timer"),
    (Msr(0x83f), "sends an interrupt"),
    // HV_X64_MSR_HYPERCALL, HV_X64_MSR_RESET
    (Msr(0x4000_0001), "lays a page of code over the guest's memory"),
    (Msr(0x4000_0003), "resets the machine"),
    // HV_X64_MSR_EOI, HV_X64_MSR_ICR, HV_X64_MSR_EOM
    (Msr(0x4000_0070), "ends an interrupt"),
    (Msr(0x4000_0071), "sends an interrupt, INIT among them"),
    (Msr(0x4000_0084), "ends a message"),
    // HV_X64_MSR_CRASH_CTL
    (Msr(0x4000_0105), "tells the VMM that the guest has crashed"),
    // GHCB
    (Msr(0xc001_0130), "a request of a confidential guest to its hypervisor"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_a_hazard_and_a_register_has_none() {
        assert!(hazard(Msr(0x4000_0003)).is_some_and(|why| why.contains("reset")));
        assert_eq!(hazard(Msr(0x10)), None);
        assert!(HAZARDS.is_sorted_by_key(|(msr, _)| *msr));
    }
}
