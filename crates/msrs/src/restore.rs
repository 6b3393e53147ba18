//! What KVM_SET_MSRS takes of the registers by which a VMM tells a guest what its processor can do.

use msrgate_core::Msr;

/// A register that tells a guest what its processor can do, and which values a host takes of it: a row of the database.
///
/// ```
/// # use msrgate_msrs::{self as msrs, by_name};
/// let controls = msrs::restore(by_name("IA32_VMX_PROCBASED_CTLS2").unwrap().msr).unwrap();
/// let host = 0x0001_582a_0000_0000;
/// assert_eq!(controls.refused(host, 0x0001_582e_0000_0000), 1 << 34, "the host lacks bit 34");
/// assert_eq!(controls.refused(host, 0x0000_0002_0000_0000), 0, "less than the host has is taken");
/// assert_eq!(controls.property(34), Some("vmx-desc-exit"));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restore {
    /// The register.
    pub msr: Msr,
    /// The bits that a host must have for a value to have them.
    pub offered: u64,
    /// The bits that a value must have where the host has them.
    pub required: u64,
    /// The bits of which KVM takes any value, and which tell a guest of the hardware.
    pub claims: u64,
    /// The bits of `claims` that tell of a weakness.
    pub weak: u64,
    /// The property of QEMU's that sets the whole register.
    pub qemu_property: Option<&'static str>,
    /// The function that decides.
    pub source: &'static str,
    pub(crate) qemu: &'static [(u8, &'static str)],
}

impl Restore {
    /// The bits for which a host that itself offers `host` refuses `value`.
    pub const fn refused(&self, host: u64, value: u64) -> u64 {
        (value & !host & self.offered) | (host & !value & self.required)
    }

    /// The bits of `value` that KVM takes, and that are not true on a host that itself offers `host`.
    pub const fn untrue(&self, host: u64, value: u64) -> u64 {
        let strong = self.claims & !self.weak;
        (value & !host & strong) | (host & !value & self.weak)
    }

    /// What both of two hosts take, and what is true on both, where they offer `a` and `b`. `None` where there is none.
    pub const fn common(&self, a: u64, b: u64) -> Option<u64> {
        let all = (self.offered | self.claims) & !self.required & !self.weak;
        let any = (self.required | self.weak) & !self.offered;
        let rest = !(all | any);
        let differs = (a ^ b) & rest;
        if differs & self.offered & self.required != 0 {
            return None;
        }
        // Of what KVM does not look at, the smaller value: of revisions it is the one that promises less.
        let smaller = if a & rest < b & rest { a } else { b };
        Some((a & b & all) | ((a | b) & any) | (smaller & rest))
    }

    /// Whether the register holds VMX controls: the low half says which must be 1, the high half which may be.
    pub const fn is_control(&self) -> bool {
        self.required == 0xffff_ffff
    }

    /// The property of QEMU's CPU models that has the bit. The low half of a VMX control says which must be 1, and goes by the
    /// property of the same control in the high half.
    pub fn property(&self, bit: u32) -> Option<&'static str> {
        let find = |bit: u32| self.qemu.iter().find(|(of, _)| u32::from(*of) == bit);
        let (_, name) = find(if self.is_control() && bit < 32 { bit + 32 } else { bit })?;
        Some(name)
    }
}

/// Properties of QEMU's CPU models, and the features of CPUID that each stands for: QEMU sets the registers of a feature only where
/// the guest has the property, or sets 0 without it (`kvm_init_msrs`, `kvm_put_msrs`).
const QEMU: &[(&str, &[&str])] = &[
    ("arch-capabilities", &["arch_capabilities"]),
    ("arch-lbr", &["arch_lbr"]),
    ("core-capability", &["core_capabilities"]),
    ("fred", &["fred"]),
    ("hv-crash", &["hv_crash"]),
    ("hv-reenlightenment", &["hv_reenlightenment"]),
    ("hv-stimer", &["hv_stimer"]),
    ("hv-synic", &["hv_synic"]),
    ("intel-pt", &["intel_pt"]),
    ("kvm-asyncpf", &["kvm_async_pf"]),
    ("kvm-asyncpf-int", &["kvm_async_pf_int"]),
    ("kvm-poll-control", &["kvm_poll_control"]),
    ("kvm-pv-eoi", &["kvm_pv_eoi"]),
    ("kvm-steal-time", &["kvm_steal_time"]),
    ("kvmclock", &["kvm_clocksource", "kvm_clocksource2"]),
    ("mce", &["mca", "mce"]),
    ("pdcm", &["pdcm"]),
    ("sgxlc", &["sgx_lc"]),
    ("vmx", &["vmx"]),
    ("xfd", &["xfd"]),
];

/// The property of QEMU's CPU models that stands for a feature of CPUID.
pub(crate) fn qemu_property(feature: &str) -> Option<&'static str> {
    if feature.starts_with("arch_perfmon") {
        return Some("pmu");
    }
    let mut properties = QEMU.iter().filter(|(_, of)| of.contains(&feature));
    properties.next().map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use crate::{by_name, restore};

    fn of(name: &str) -> super::Restore {
        *restore(by_name(name).unwrap().msr).unwrap()
    }

    #[test]
    fn a_host_takes_controls_that_it_can_turn_both_ways_as_asked() {
        // The low half: must be 1. The high half: may be 1.
        let controls = of("IA32_VMX_TRUE_PINBASED_CTLS");
        let host = 0x0000_007f_0000_0016;
        assert_eq!(controls.refused(host, host), 0);
        assert_eq!(controls.refused(host, 0x0000_003f_0000_0016), 0, "less may be 1");
        assert_eq!(controls.refused(host, 0x0000_003f_0000_0036), 0, "more must be 1");
        assert_eq!(controls.refused(host, 0x0000_00ff_0000_0016), 1 << 39);
        assert_eq!(controls.refused(host, 0x0000_007f_0000_0006), 1 << 4);
        assert_eq!(controls.property(39), Some("vmx-posted-intr"));
        assert_eq!(controls.property(6), Some("vmx-preemption-timer"));
        assert_eq!(controls.property(4), None);
    }

    #[test]
    fn the_property_of_a_register_is_that_of_its_feature() {
        for (name, property) in [
            ("IA32_ARCH_CAPABILITIES", Some("arch-capabilities")),
            ("IA32_PERF_CAPABILITIES", Some("pdcm")),
            ("IA32_FIXED_CTR_CTRL", Some("pmu")),
            ("IA32_PMC0", Some("pmu")),
            ("IA32_VMX_BASIC", Some("vmx")),
            ("MSR_KVM_ASYNC_PF_EN", Some("kvm-asyncpf")),
            ("MSR_KVM_SYSTEM_TIME_NEW", Some("kvmclock")),
            // QEMU sets them wherever KVM lists them.
            ("IA32_UMWAIT_CONTROL", None),
            ("IA32_XSS", None),
        ] {
            assert_eq!(by_name(name).unwrap().qemu_property(), property, "{name}");
        }
        for (_, features) in super::QEMU {
            for feature in *features {
                assert!(!crate::cpuid::places(feature).is_empty(), "{feature}");
            }
        }
    }

    #[test]
    fn any_capability_is_taken_and_the_untrue_ones_are_named() {
        let arch = of("IA32_ARCH_CAPABILITIES");
        assert_eq!(arch.refused(0, u64::MAX), 0);
        // RDCL_NO and MDS_NO are promises, RSBA is a warning.
        assert_eq!(arch.untrue(0b1, 0b10_0001), 0b10_0000);
        assert_eq!(arch.untrue(0b101, 0b001), 0b100);
        assert_eq!(arch.untrue(0b001, 0b101), 0);
        assert_eq!(arch.common(0b10_0001, 0b101), Some(0b101));
    }

    #[test]
    fn what_is_common_is_taken_by_both_and_true_on_both() {
        let values = [
            0,
            1,
            0x16,
            0x0000_007f_0000_0016,
            0x0001_582e_0000_0000,
            u64::MAX,
            0x8000_0000_0000_0001,
        ];
        for restore in crate::restores() {
            for a in values {
                for b in values {
                    let Some(common) = restore.common(a, b) else {
                        assert_ne!((a ^ b) & restore.offered & restore.required, 0);
                        continue;
                    };
                    for host in [a, b] {
                        assert_eq!(
                            restore.refused(host, common),
                            0,
                            "{restore:?} {a:#x} {b:#x} {common:#x}"
                        );
                        assert_eq!(restore.untrue(host, common), 0, "{restore:?} {a:#x} {b:#x} {common:#x}");
                    }
                    assert_eq!(restore.common(b, a), Some(common));
                }
            }
        }
    }
}
