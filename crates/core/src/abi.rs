//! Numbers and structures of the kernel's interface (`include/uapi/linux/kvm.h`, `arch/x86/include/uapi/asm/kvm.h`), each
//! written and read here alone.

mod errno;
mod exit;
mod filter;
mod numbers;

pub use errno::Errno;
pub use exit::{KvmRunMsr, RawExit};
pub use filter::{Layout, RawFilter, RawRange};
pub use numbers::*;

use crate::{Msr, Reasons};

/// The source of all numbers, for code that is built without this crate.
pub const NUMBERS: &str = include_str!("abi/numbers.rs");

const _: () = assert!(MAX_RANGE_MSRS == 12288);

/// What KVM_ENABLE_CAP takes, `struct kvm_enable_cap`, as far as capabilities of MSRs look at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EnableCap {
    /// Which capability.
    pub cap: u32,
    /// 0.
    pub flags: u32,
    /// The first of four arguments.
    pub arg: u64,
}

impl EnableCap {
    /// Bytes of the structure.
    pub const BYTES: usize = 104;

    /// For a mask of exit reasons.
    pub const fn mask(reasons: Reasons) -> EnableCap {
        EnableCap {
            cap: CAP_X86_USER_SPACE_MSR,
            flags: 0,
            arg: reasons.bits() as u64,
        }
    }

    /// Reads the structure.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> EnableCap {
        EnableCap {
            cap: word(bytes, 0),
            flags: word(bytes, 4),
            arg: long(bytes, 8),
        }
    }

    /// The structure, its other arguments 0.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &self.cap.to_le_bytes());
        put(&mut bytes, 4, &self.flags.to_le_bytes());
        put(&mut bytes, 8, &self.arg.to_le_bytes());
        bytes
    }
}

/// `struct kvm_msrs` with one entry, which KVM_GET_MSRS and KVM_SET_MSRS take. Both give 1 where they took it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OneMsr {
    /// The MSR.
    pub msr: Msr,
    /// The MSR's value.
    pub value: u64,
}

impl OneMsr {
    /// Bytes of the structure.
    pub const BYTES: usize = 24;

    /// Bytes of the header of a `struct kvm_msrs` of any length, which begins with the number of entries.
    pub const HEADER: usize = 8;
    /// Bytes of an entry, `struct kvm_msr_entry`.
    pub const ENTRY: usize = Self::BYTES - Self::HEADER;

    /// Reads an entry of a `struct kvm_msrs` of any length.
    pub fn of_entry(bytes: &[u8; Self::ENTRY]) -> OneMsr {
        OneMsr {
            msr: Msr(word(bytes, 0)),
            value: long(bytes, 8),
        }
    }

    /// Reads the structure.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> OneMsr {
        OneMsr {
            msr: Msr(word(bytes, 8)),
            value: long(bytes, 16),
        }
    }

    /// The structure.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(&mut bytes, 0, &1_u32.to_le_bytes());
        put(&mut bytes, 8, &self.msr.0.to_le_bytes());
        put(&mut bytes, 16, &self.value.to_le_bytes());
        bytes
    }
}

/// The little-endian number at `at`, which lies within `bytes` for every structure here.
fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

/// Eight bytes at a place as a number; 0 beyond the end.
fn long(bytes: &[u8], at: usize) -> u64 {
    let long = bytes.get(at..).and_then(<[u8]>::first_chunk);
    long.map_or(0, |long| u64::from_le_bytes(*long))
}

/// Puts a field into a structure that is long enough for it.
fn put(structure: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = structure.get_mut(at..at + field.len()) {
        place.copy_from_slice(field);
    }
}
