//! An access and its direction.

use core::fmt;

use crate::Msr;

/// The direction of an access.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Op {
    /// RDMSR.
    Read,
    /// WRMSR (and WRMSRNS).
    Write,
}

impl Op {
    /// Both directions, reads first.
    pub const ALL: [Op; 2] = [Op::Read, Op::Write];

    /// The instruction's name in lower case, as traces and JSON spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "rdmsr",
            Op::Write => "wrmsr",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of directions: the `flags` of a kernel filter range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ops(u8);

impl Ops {
    /// Neither direction.
    pub const NONE: Ops = Ops(0);
    /// Reads: `KVM_MSR_FILTER_READ`.
    pub const READ: Ops = Ops(1);
    /// Writes: `KVM_MSR_FILTER_WRITE`.
    pub const WRITE: Ops = Ops(2);
    /// Both directions.
    pub const BOTH: Ops = Ops(3);

    /// The set of one direction.
    pub const fn of(op: Op) -> Ops {
        match op {
            Op::Read => Ops::READ,
            Op::Write => Ops::WRITE,
        }
    }

    /// From the kernel's flag bits; `None` where a bit is set that names no direction.
    pub const fn from_bits(bits: u32) -> Option<Ops> {
        if bits <= 3 { Some(Ops(bits as u8)) } else { None }
    }

    /// The kernel's flag bits.
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }

    /// Whether `op` is in the set.
    pub const fn contains(self, op: Op) -> bool {
        self.0 & Ops::of(op).0 != 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The directions that are in either set.
    #[must_use]
    pub const fn union(self, other: Ops) -> Ops {
        Ops(self.0 | other.0)
    }
}

/// One RDMSR or WRMSR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// The guest asks for a value.
    Read {
        /// The register.
        msr: Msr,
    },
    /// The guest gives a value.
    Write {
        /// The register.
        msr: Msr,
        /// EDX:EAX.
        value: u64,
    },
}

impl Access {
    /// The register.
    pub const fn msr(self) -> Msr {
        match self {
            Access::Read { msr } | Access::Write { msr, .. } => msr,
        }
    }

    /// The direction.
    pub const fn op(self) -> Op {
        match self {
            Access::Read { .. } => Op::Read,
            Access::Write { .. } => Op::Write,
        }
    }
}
