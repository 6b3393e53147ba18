//! Which fixed answers this kernel can give by itself.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Access, Msr, Outcome};
use msrgate_plan::{DecisionMap, Preset};

use crate::{Guest, GuestError, Mode, Options};

/// Registers that KVM stores for the guest's reads and makes no other use of, so that a value from the host changes
/// nothing else: who reads each in `arch/x86/kvm` was looked up for Linux 5.10 to 7.2.
pub const STORED: [Msr; 5] = [
    // IA32_BIOS_SIGN_ID (`microcode_version`): the guest's own writes are dropped.
    Msr(0x8b),
    // MSR_POWER_CTL (`msr_ia32_power_ctl`).
    Msr(0x1fc),
    // AMD's OSVW_ID_LENGTH and OSVW_STATUS (`osvw`): only the host can write them.
    Msr(0xc001_0140),
    Msr(0xc001_0141),
    // AMD's DE_CFG (`msr_decfg`).
    Msr(0xc001_1029),
];

/// Registers for which KVM has one answer, as long as nobody writes them. They are preset only to the value that they
/// have, since another would have effects, or is refused.
pub const CONSTANT: [Msr; 24] = [
    Msr(0x17),        // IA32_PLATFORM_ID
    Msr(0x2a),        // MSR_EBL_CR_POWERON
    Msr(0xcd),        // MSR_FSB_FREQ
    Msr(0xce),        // MSR_PLATFORM_INFO
    Msr(0x11e),       // MSR_BBL_CR_CTL3
    Msr(0x140),       // MSR_MISC_FEATURES_ENABLES
    Msr(0x198),       // IA32_PERF_STATUS
    Msr(0x199),       // IA32_PERF_CTL
    Msr(0x606),       // MSR_RAPL_POWER_UNIT
    Msr(0x611),       // MSR_PKG_ENERGY_STATUS
    Msr(0x619),       // MSR_DRAM_ENERGY_STATUS
    Msr(0x639),       // MSR_PP0_ENERGY_STATUS
    Msr(0x641),       // MSR_PP1_ENERGY_STATUS
    Msr(0xc001_0010), // SYSCFG
    Msr(0xc001_001f), // NB_CFG
    Msr(0xc001_0055), // INT_PENDING_MSG
    Msr(0xc001_0058), // MMIO_CONF_BASE
    Msr(0xc001_0112), // TSEG_ADDR
    Msr(0xc001_0113), // TSEG_MASK
    Msr(0xc001_1021), // IC_CFG
    Msr(0xc001_1022), // DC_CFG
    Msr(0xc001_1023), // TW_CFG, or BU_CFG
    Msr(0xc001_102a), // BU_CFG2
    Msr(0xc001_102c), // EX_CFG of family 15h
];

/// Those fixed answers of `map` that this kernel holds by itself, in order of MSR: for [`DecisionMap::holding`].
///
/// Each is put into the vCPUs of a VM of its own, and counts if the host reads it back and the guest's RDMSR gives it,
/// before and after the guest has run. Only registers of which it is known that nothing but a write changes them are
/// tried: [`STORED`] and [`CONSTANT`]. `cpuid` is the guest's; without it, an answer counts only if it is held with all
/// that KVM supports and with no CPUID at all.
pub fn held(kvm: &Kvm, map: &DecisionMap, cpuid: Option<&CpuId>) -> Result<Vec<Preset>, GuestError> {
    let of = |msrs: &[Msr]| -> Vec<Preset> { msrs.iter().filter_map(|msr| map.preset(*msr)).collect() };
    let (stored, constant) = (of(&STORED), of(&CONSTANT));
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
