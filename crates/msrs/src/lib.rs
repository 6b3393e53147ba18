//! What is known of each MSR: names, classes, vendors, and the CPUID feature that says whether an MSR is there.
//!
//! The manual's name stands first, so `IA32_BIOS_SIGN_ID`; Linux's and AMD's names are aliases. A name is
//! found in any case, and with or without the `MSR_` that Linux puts before it.
//!
//! ```
//! use msrgate_msrs as msrs;
//!
//! let entry = msrs::by_name("msr_ia32_ucode_rev").unwrap();
//! assert_eq!((entry.name(), entry.msr.0), ("IA32_BIOS_SIGN_ID", 0x8b));
//! assert_eq!(msrs::glob("IA32_SYSENTER_*").count(), 3);
//! assert_eq!(msrs::nearest("IA32_EFRE"), Some("IA32_EFER"));
//! ```

#![no_std]
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod number;
pub mod cpuid;
mod wildcard;
mod class;
mod facts;
mod bypass;
mod refusal;
mod field;
mod restore;
mod entry;
mod need;
mod search;
pub mod spell;
mod lookup;
mod bits;

pub use self::bits::{Changed, Part, bits, changed};
pub use self::bypass::{Bypass, BypassKind, Linux, NoVersion, Passes};
pub use self::class::{Class, UnknownClass};
pub use self::entry::{Access, Entry, Exists, Vendor, all, bypasses, needs, restores};
pub use self::facts::{Host, Kept, State};
pub use self::field::Field;
pub use self::lookup::{by_msr, by_name, class, classes, command, glob, restore, spillable, within};
pub use self::need::{Need, System};
pub use self::refusal::Refusal;
pub use self::restore::Restore;
pub use self::search::{around, near, nearest, nearest_of, printed, search};

#[cfg(test)]
mod tests;
