//! What KVM has and refuses to guests all the same.

use msrgate_core::Op;

/// Accesses that KVM refuses though it has the register: a row of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The directions.
    pub ops: &'static [Op],
    /// Names of registers, in which `?` and `*` stand for any characters.
    pub of: &'static [&'static str],
    /// Whether KVM then says that it does not know the register, which `kvm.ignore_msrs` and a policy's `unknown` cover, and not that
    /// the access is invalid.
    pub is_unknown: bool,
    /// When it is refused: a clause.
    pub says: &'static str,
    /// A function of KVM.
    pub source: &'static str,
}
