//! The classes that MSRs are grouped in, `@pmu` and the like in a policy.

use core::fmt;
use core::str::FromStr;

macro_rules! classes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// What an MSR is for. An MSR may be of several classes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Class {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Class {
            /// Every class, in alphabetical order of their names.
            pub const ALL: &'static [Class] = &[$(Class::$variant),+];

            /// The name, as a policy spells it after the `@`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Class::$variant => $name,)+
                }
            }

            /// What its MSRs are for, in a sentence.
            pub fn about(self) -> &'static str {
                match self {
                    $(Class::$variant => concat!($($doc),+).trim(),)+
                }
            }
        }
    };
}

classes! {
    /// The local APIC: its base, its timer, paravirtual short cuts.
    Apic = "apic",
    /// Control-flow enforcement: shadow stacks and indirect branch tracking.
    Cet = "cet",
    /// Collaborative processor performance control, AMD's hardware P-states.
    Cppc = "cppc",
    /// Debugging: last branches, breakpoint masks, debug interfaces.
    Debug = "debug",
    /// The debug store: branch trace store and precise event sampling.
    Ds = "ds",
    /// Registers that tell of features, or turn features on and off.
    Feature = "feature",
    /// Flexible return and event delivery.
    Fred = "fred",
    /// Hardware-controlled P-states, Intel's.
    Hwp = "hwp",
    /// Hyper-V's synthetic MSRs.
    Hyperv = "hyperv",
    /// Instruction-based sampling, AMD's.
    Ibs = "ibs",
    /// KVM's paravirtual MSRs.
    Kvm = "kvm",
    /// KVM's paravirtual clock.
    Kvmclock = "kvmclock",
    /// Last branch records.
    Lbr = "lbr",
    /// Machine check banks and their controls.
    Mce = "mce",
    /// The memory map: top of memory, I/O ranges, protection keys, ranges set aside.
    Memory = "memory",
    /// Microcode revision, update and staging.
    Microcode = "microcode",
    /// Memory type ranges.
    Mtrr = "mtrr",
    /// The page attribute table.
    Pat = "pat",
    /// What belongs to the board and the model: straps, configuration, identification.
    Platform = "platform",
    /// Performance counters of a core, and what goes with them.
    Pmu = "pmu",
    /// Power: idle states, their residency, energy.
    Power = "power",
    /// Performance states: frequency, ratios, APERF and MPERF.
    Pstate = "pstate",
    /// Processor Trace, Intel's.
    Pt = "pt",
    /// Running average power limits and energy counters.
    Rapl = "rapl",
    /// Resource Director Technology and AMD's platform QoS: cache and bandwidth shares.
    Rdt = "rdt",
    /// Segment bases.
    Segment = "segment",
    /// Encrypted guests, AMD's.
    Sev = "sev",
    /// Enclaves, Intel's.
    Sgx = "sgx",
    /// System management mode.
    Smm = "smm",
    /// Controls of speculation, and what tells of its flaws.
    Speculation = "speculation",
    /// Virtualization, AMD's.
    Svm = "svm",
    /// SYSCALL and SYSRET.
    Syscall = "syscall",
    /// SYSENTER and SYSEXIT.
    Sysenter = "sysenter",
    /// Trust domains, Intel's.
    Tdx = "tdx",
    /// Thermal sensors, interrupts and throttling.
    Thermal = "thermal",
    /// Total memory encryption, Intel's.
    Tme = "tme",
    /// Which thread, core and node this is.
    Topology = "topology",
    /// The time stamp counter, its adjustment and deadline.
    Tsc = "tsc",
    /// User interrupts.
    Uintr = "uintr",
    /// Counters and controls outside the cores.
    Uncore = "uncore",
    /// Virtualization, Intel's.
    Vmx = "vmx",
    /// The local APIC's registers in x2APIC mode, 0x800–0x8ff. No KVM filter can stop these.
    X2apic = "x2apic",
    /// Xen's hypercall page.
    Xen = "xen",
    /// Extended processor state.
    Xsave = "xsave",
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No class has this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownClass;

impl fmt::Display for UnknownClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no class of MSRs has this name")
    }
}

impl core::error::Error for UnknownClass {}

impl FromStr for Class {
    type Err = UnknownClass;

    /// By name, in any case, without the `@`.
    fn from_str(name: &str) -> Result<Class, UnknownClass> {
        Class::ALL
            .iter()
            .copied()
            .find(|class| class.name().eq_ignore_ascii_case(name))
            .ok_or(UnknownClass)
    }
}
