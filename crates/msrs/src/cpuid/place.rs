//! Where CPUID tells of a feature.

use core::fmt;

/// One of the four registers that CPUID fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        })
    }
}

/// Whose leaves a [`Place`] counts from.
///
/// Hypervisors share 0x4000_0000–0x4000_ffff: the one that the guest sees first sits at 0x4000_0000, the
/// next at 0x4000_0100, and so on; each is told by its signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The processor itself: the leaf is what it says.
    Processor,
    /// KVM, signature `KVMKVMKVM`.
    Kvm,
    /// A hypervisor with Microsoft's interface, `Hv#1` in leaf 0x4000_0001.
    HyperV,
    /// Xen, signature `XenVMMXenVMM`.
    Xen,
}

/// A field of CPUID: `width` bits from `bit` up, which says yes if it is `at_least` so much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Whose leaf it is.
    pub owner: Owner,
    /// The leaf; for a hypervisor as if it sat at 0x4000_0000.
    pub leaf: u32,
    /// The subleaf.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
    /// The lowest bit.
    pub bit: u8,
    /// How many bits, 1 to 32.
    pub width: u8,
    /// The least value that says yes.
    pub at_least: u32,
}

/// As Intel's manual writes it, `CPUID.0x7.1:EAX[4]`; the subleaf is left out where it is 0.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPUID.{:#x}", self.leaf)?;
        if self.subleaf != 0 {
            write!(f, ".{:#x}", self.subleaf)?;
        }
        match (self.width, self.at_least) {
            // That the leaf is there says it.
            (_, 0) => Ok(()),
            (1, _) => write!(f, ":{}[{}]", self.register, self.bit),
            (width, least) => write!(
                f,
                ":{}[{}:{}] >= {least}",
                self.register,
                self.bit + width - 1,
                self.bit
            ),
        }
    }
}

/// A named feature; it is there if any of its places says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// The name, as Linux's `/proc/cpuinfo` spells it.
    pub name: &'static str,
    /// Where CPUID tells of it.
    pub places: &'static [Place],
}
