//! A hypervisor that filters MSRs with msrgate's engine, small enough to read in one go.
//!
//! Everything is a toy but the engine: the processor interprets a list of instructions, the hypervisor is a few functions
//! in the same process, and the VMM above it is the main thread. What stands between them is real: the VMM hands over a
//! `struct kvm_msr_filter` of 392 bytes in its own memory, the processor looks up each RDMSR and WRMSR in the VMX MSR
//! bitmap or the SVM permissions map that the engine computes, and what the filter denies comes back to the VMM as an
//! exit, as from KVM. It runs with `cargo run -p msrgate-example-hypervisor`, anywhere, without root and without KVM.
//!
//! ```text
//! vmm.rs          set_filter, kick              answers exits, stops, saves, restores
//!                     │ ioctl                        ↑ Stop::Msr
//! hypervisor.rs   engine::Vm ──────── engine::Vcpu::execute ── msrs.rs
//!                     └ bitmap ┐                     ↑ VmExit::Msr
//! processor.rs                 └─→ intercepted? ─yes─┘ ─no─→ the processor's own register
//! ```
//!
//! To put the engine under a hypervisor of your own, look at `hypervisor.rs`: it implements `Msrs` with its registers, picks
//! the filter up before each entry to the guest, gives each intercepted instruction to `execute`, and does to the guest's
//! registers what the `Completion` says. That is all that there is to it.
#![forbid(unsafe_code)]

mod vmm;
mod hypervisor;
mod msrs;
mod processor;
mod guest;

use std::error::Error;

use msrgate_engine::Vendor;

fn main() -> Result<(), Box<dyn Error>> {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        println!("a processor of {vendor:?}");
        let report = vmm::demonstrate(vendor, &|line| println!("  {line}"))?;
        for (number, vcpu) in report.vcpus.iter().enumerate() {
            println!("  vCPU {number}: {vcpu}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Site;
    use crate::vmm::{EMULATED_CS, MICROCODE};

    fn demonstrated(vendor: Vendor) -> vmm::Report {
        vmm::demonstrate(vendor, &|_| {}).expect("the demonstration runs to its end")
    }

    const VENDORS: [Vendor; 2] = [Vendor::Intel, Vendor::Amd];

    #[test]
    fn each_denied_access_is_answered_once_across_a_saved_and_restored_vcpu() {
        for report in VENDORS.map(demonstrated) {
            for vcpu in report.vcpus {
                let revisions = vcpu.seen(Site::Microcode);
                assert_eq!(revisions, [(MICROCODE, vcpu.rounds())].into());
                assert_eq!(vcpu.answered.microcode, vcpu.rounds());
            }
        }
    }

    #[test]
    fn an_msr_shows_the_old_filter_and_then_the_new_one() {
        for report in VENDORS.map(demonstrated) {
            for vcpu in report.vcpus {
                let selectors = vcpu.seen(Site::SysenterCs);
                assert_eq!(selectors.len(), 2, "{selectors:x?}");
                assert_eq!(selectors.get(&EMULATED_CS), Some(&vcpu.answered.sysenter_cs));
                assert_eq!(vcpu.changes(Site::SysenterCs), 1, "never back to the old one");
            }
        }
    }

    #[test]
    fn what_the_new_filter_allows_reaches_the_processor_without_an_exit() {
        for report in VENDORS.map(demonstrated) {
            for vcpu in report.vcpus {
                let direct = vcpu.seen(Site::SysenterCs).values().sum::<u64>() - vcpu.answered.sysenter_cs;
                assert!(
                    vcpu.passed_through_when_saved > 0,
                    "the bitmap of a running vCPU follows"
                );
                // Between the new filter and the kick a few still leave the guest.
                assert!(vcpu.passed_through <= direct);
            }
        }
    }

    #[test]
    fn what_the_hypervisor_refuses_faults_and_what_it_does_not_know_is_asked_of_the_vmm() {
        for report in VENDORS.map(demonstrated) {
            for vcpu in report.vcpus {
                assert_eq!(vcpu.answered.unknown, vcpu.rounds());
                assert_eq!(vcpu.faults, 2 * vcpu.rounds());
            }
        }
    }
}
