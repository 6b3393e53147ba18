//! What a policy lets an access get.

use alloc::sync::Arc;
use core::fmt;

use crate::Did;

/// What a read gets.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ReadAction {
    /// The kernel's own answer.
    Allow,
    /// #GP(0).
    Deny,
    /// This value. `zero` in a policy is the value 0.
    Value(u64),
    /// What the guest last wrote on this vCPU, and this value before it has written.
    Shadow(u64),
    /// The kernel's value, `keep` bits of it, with the bits of `set` added. The kernel's value is read as the host would
    /// (KVM_GET_MSRS), which is not always what the guest would have got.
    Mask {
        /// Bits that show through.
        keep: u64,
        /// Bits that are always one.
        set: u64,
    },
    /// The physical CPU's value.
    Host,
    /// What the handler of this name answers.
    Handler(Arc<str>),
}

/// What a write gets.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum WriteAction {
    /// The kernel carries it out.
    Allow,
    /// #GP(0).
    Deny,
    /// Nothing happens, and the guest goes on.
    Ignore,
    /// Kept for reads with [`ReadAction::Shadow`], on this vCPU.
    Shadow,
    /// Only the bits of `may_change` reach the kernel's register (KVM_SET_MSRS).
    Mask {
        /// Bits that the guest may change.
        may_change: u64,
        /// What a write gets that would change another bit.
        otherwise: Otherwise,
    },
    /// These values reach the kernel's register (KVM_SET_MSRS); another faults.
    Only(Arc<[u64]>),
    /// The first write on each vCPU reaches the kernel's register (KVM_SET_MSRS); later ones fault.
    Once,
    /// What the handler of this name does.
    Handler(Arc<str>),
}

/// What a write through a mask gets that would change a bit it may not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Otherwise {
    /// #GP(0), and nothing is written.
    Deny,
    /// The other bits are written, these keep their value.
    Drop,
}

impl ReadAction {
    /// The action's word in a policy.
    pub const fn name(&self) -> &'static str {
        self.did().name()
    }

    /// What an event says when the action was carried out.
    pub const fn did(&self) -> Did {
        match self {
            ReadAction::Allow => Did::Allow,
            ReadAction::Deny => Did::Deny,
            ReadAction::Value(0) => Did::Zero,
            ReadAction::Value(_) => Did::Value,
            ReadAction::Shadow(_) => Did::Shadow,
            ReadAction::Mask { .. } => Did::Mask,
            ReadAction::Host => Did::Host,
            ReadAction::Handler(_) => Did::Handler,
        }
    }

    /// Whether user space must answer it, rather than the kernel.
    pub const fn needs_exit(&self) -> bool {
        !matches!(self, ReadAction::Allow | ReadAction::Deny)
    }
}

impl WriteAction {
    /// The action's word in a policy.
    pub const fn name(&self) -> &'static str {
        self.did().name()
    }

    /// What an event says when the action was carried out.
    pub const fn did(&self) -> Did {
        match self {
            WriteAction::Allow => Did::Allow,
            WriteAction::Deny => Did::Deny,
            WriteAction::Ignore => Did::Ignore,
            WriteAction::Shadow => Did::Shadow,
            WriteAction::Mask { .. } => Did::Mask,
            WriteAction::Only(_) => Did::Only,
            WriteAction::Once => Did::Once,
            WriteAction::Handler(_) => Did::Handler,
        }
    }

    /// Whether user space must answer it, rather than the kernel.
    pub const fn needs_exit(&self) -> bool {
        !matches!(self, WriteAction::Allow | WriteAction::Deny)
    }
}

/// As a sentence for people: `value 0x1`.
impl fmt::Display for ReadAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadAction::Value(value) if *value != 0 => write!(f, "value {value:#x}"),
            ReadAction::Shadow(initial) => write!(f, "shadow, {initial:#x} at first"),
            ReadAction::Mask { keep, set } => write!(f, "mask keep {keep:#x} set {set:#x}"),
            ReadAction::Handler(name) => write!(f, "handler {name}"),
            _ => f.write_str(self.name()),
        }
    }
}

/// As a sentence for people: `only 0x0, 0x2`.
impl fmt::Display for WriteAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteAction::Mask { may_change, otherwise } => {
                let otherwise = match otherwise {
                    Otherwise::Deny => "deny",
                    Otherwise::Drop => "drop",
                };
                write!(f, "mask may change {may_change:#x}, else {otherwise}")
            }
            WriteAction::Only(values) => {
                f.write_str("only")?;
                for (i, value) in values.iter().enumerate() {
                    write!(f, "{} {value:#x}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            WriteAction::Handler(name) => write!(f, "handler {name}"),
            _ => f.write_str(self.name()),
        }
    }
}
