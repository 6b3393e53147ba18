//! The processor's modes.

/// What the guest's instructions run in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Real mode.
    Real,
    /// 64-bit mode.
    Long,
}
