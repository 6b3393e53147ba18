//! Which fixed answers this kernel can give by itself.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Msr, Outcome};
use msrgate_msrs::Kept;
use msrgate_plan::{DecisionMap, Preset};

use crate::{Guest, GuestError, Mode, Options};

/// Those fixed answers of `map` that this kernel holds by itself, in order of MSR: for [`msrgate_plan::CompileOptions::with_presets`].
///
/// Each is put into the vCPUs of a VM of its own, and counts if the host reads it back and the guest's RDMSR gives it,
/// before and after the guest has run. Only registers of which it is known that nothing but a write changes them are
/// tried: [`Kept::Stored`] and [`Kept::Constant`]. `cpuid` is the guest's; without it, an answer counts only if it is held with all
/// that KVM supports and with no CPUID at all.
pub fn held(kvm: &Kvm, map: &DecisionMap, cpuid: Option<&CpuId>) -> Result<Vec<Preset>, GuestError> {
    let of = |kept| -> Vec<Preset> {
        let entries = msrgate_msrs::all().iter().filter(|entry| entry.kept == kept);
        entries.filter_map(|entry| map.preset(entry.msr)).collect()
    };
    let (stored, constant) = (of(Kept::Stored), of(Kept::Constant));
    if stored.is_empty() && constant.is_empty() {
        return Ok(Vec::new());
    }
    let cpuids = match cpuid {
        Some(cpuid) => vec![Some(cpuid.clone())],
        None => vec![None, CpuId::new(0).ok()],
    };
    let mut held: Vec<Preset> = stored.iter().chain(&constant).copied().collect();
    held.sort_unstable();
    // A vCPU for each CPUID: a VM of its own for each would take twice as long.
    let options = Options {
        vcpus: cpuids.len(),
        ..Options::default()
    };
    let mut guest = Guest::new(kvm, Mode::Real, &options)?;
    for (vcpu, cpuid) in guest.vcpus().iter_mut().zip(cpuids) {
        if let Some(cpuid) = cpuid {
            let done = vcpu.fd().set_cpuid2(&cpuid);
            done.map_err(GuestError::of("KVM_SET_CPUID2"))?;
        }
        for preset in &stored {
            if get(vcpu.fd(), preset.msr) != Some(preset.value) {
                // Whether it was taken is what reading shows.
                let _ = set(vcpu.fd(), preset.msr, preset.value);
            }
        }
        let reads: Vec<Access> = held.iter().map(|preset| Access::Read { msr: preset.msr }).collect();
        for _ in 0..2 {
            held.retain(|preset| get(vcpu.fd(), preset.msr) == Some(preset.value));
            let seen = vcpu.run(&reads, &mut |_| {})?;
            let read = |preset: &Preset| {
                let position = reads.iter().position(|read| read.msr() == preset.msr);
                let outcome = position
                    .and_then(|position| seen.get(position))
                    .map(|seen| seen.outcome);
                outcome == Some(Outcome::Value(preset.value))
            };
            held.retain(read);
        }
    }
    Ok(held)
}

fn one(msr: Msr, data: u64) -> Option<Msrs> {
    let entry = kvm_msr_entry {
        index: msr.0,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).ok()
}

/// As the host does; `None` where the kernel does not.
pub(crate) fn set(fd: &VcpuFd, msr: Msr, value: u64) -> Option<()> {
    let put = fd.set_msrs(&one(msr, value)?).ok()?;
    (put == 1).then_some(())
}

/// As the host does; `None` where the kernel does not.
pub(crate) fn get(fd: &VcpuFd, msr: Msr) -> Option<u64> {
    let mut list = one(msr, 0)?;
    let read = fd.get_msrs(&mut list).ok()?;
    list.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
}
