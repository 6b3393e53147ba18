//! What a policy lets an access get.

use alloc::sync::Arc;
use core::fmt;

/// What an action is given, beside its word ([`ReadAction::arguments`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Argument<'a> {
    /// 64 bits.
    Number(u64),
    /// Several of them.
    Numbers(&'a [u64]),
    /// The name of a handler.
    Name(&'a str),
    /// One of two words.
    OnLockedBits(OnLockedBits),
}

/// Where the arguments of an action are read from ([`ReadAction::of`]): in the order of [`ReadAction::arguments`], by
/// their keys.
pub trait Arguments {
    /// Why one cannot be read.
    type Error;
    /// [`Argument::Number`].
    fn number(&mut self, key: &'static str) -> Result<u64, Self::Error>;
    /// [`Argument::Numbers`].
    fn numbers(&mut self, key: &'static str) -> Result<Arc<[u64]>, Self::Error>;
    /// [`Argument::Name`].
    fn name(&mut self, key: &'static str) -> Result<Arc<str>, Self::Error>;
    /// [`Argument::OnLockedBits`].
    fn otherwise(&mut self, key: &'static str) -> Result<OnLockedBits, Self::Error>;
}

/// At most two arguments.
type Pair<'a> = [Option<(&'static str, Argument<'a>)>; 2];

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
        otherwise: OnLockedBits,
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
pub enum OnLockedBits {
    /// #GP(0), and nothing is written.
    Deny,
    /// The other bits are written, these keep their value.
    Drop,
}

impl OnLockedBits {
    /// Both.
    pub const ALL: [OnLockedBits; 2] = [OnLockedBits::Deny, OnLockedBits::Drop];

    /// The word in a policy and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            OnLockedBits::Deny => "deny",
            OnLockedBits::Drop => "drop",
        }
    }
}

impl ReadAction {
    /// What the action is given, each under its key in JSON. Nothing but [`ReadAction::did`] and these tells two actions
    /// apart.
    pub fn arguments(&self) -> impl Iterator<Item = (&'static str, Argument<'_>)> {
        let number = |key, value: &u64| Some((key, Argument::Number(*value)));
        let pair: Pair<'_> = match self {
            ReadAction::Allow | ReadAction::Deny | ReadAction::Host => [None, None],
            ReadAction::Value(value) => [number("value", value), None],
            ReadAction::Shadow(initial) => [number("initial", initial), None],
            ReadAction::Mask { keep, set } => [number("keep", keep), number("set", set)],
            ReadAction::Handler(name) => [Some(("handler", Argument::Name(name))), None],
        };
        pair.into_iter().flatten()
    }

    /// The action that says `did` and has these arguments; `None` where no read says so.
    pub fn of<A: Arguments>(did: Disposition, given: &mut A) -> Result<Option<ReadAction>, A::Error> {
        Ok(Some(match did {
            Disposition::Allow => ReadAction::Allow,
            Disposition::Deny => ReadAction::Deny,
            Disposition::Zero | Disposition::Value => ReadAction::Value(given.number("value")?),
            Disposition::Shadow => ReadAction::Shadow(given.number("initial")?),
            Disposition::Mask => ReadAction::Mask {
                keep: given.number("keep")?,
                set: given.number("set")?,
            },
            Disposition::Host => ReadAction::Host,
            Disposition::Handler => ReadAction::Handler(given.name("handler")?),
            _ => return Ok(None),
        }))
    }

    /// The action's word in a policy.
    pub const fn name(&self) -> &'static str {
        self.did().name()
    }

    /// What an event says when the action was carried out.
    pub const fn did(&self) -> Disposition {
        match self {
            ReadAction::Allow => Disposition::Allow,
            ReadAction::Deny => Disposition::Deny,
            ReadAction::Value(0) => Disposition::Zero,
            ReadAction::Value(_) => Disposition::Value,
            ReadAction::Shadow(_) => Disposition::Shadow,
            ReadAction::Mask { .. } => Disposition::Mask,
            ReadAction::Host => Disposition::Host,
            ReadAction::Handler(_) => Disposition::Handler,
        }
    }

    /// Whether user space must answer it, rather than the kernel.
    pub const fn needs_exit(&self) -> bool {
        !matches!(self, ReadAction::Allow | ReadAction::Deny)
    }
}

impl WriteAction {
    /// What the action is given, each under its key in JSON. Nothing but [`WriteAction::did`] and these tells two actions
    /// apart.
    pub fn arguments(&self) -> impl Iterator<Item = (&'static str, Argument<'_>)> {
        let pair: Pair<'_> = match self {
            WriteAction::Allow | WriteAction::Deny | WriteAction::Ignore | WriteAction::Shadow | WriteAction::Once => {
                [None, None]
            }
            WriteAction::Mask { may_change, otherwise } => [
                Some(("may_change", Argument::Number(*may_change))),
                Some(("otherwise", Argument::OnLockedBits(*otherwise))),
            ],
            WriteAction::Only(values) => [Some(("values", Argument::Numbers(values))), None],
            WriteAction::Handler(name) => [Some(("handler", Argument::Name(name))), None],
        };
        pair.into_iter().flatten()
    }

    /// The action that says `did` and has these arguments; `None` where no write says so.
    pub fn of<A: Arguments>(did: Disposition, given: &mut A) -> Result<Option<WriteAction>, A::Error> {
        Ok(Some(match did {
            Disposition::Allow => WriteAction::Allow,
            Disposition::Deny => WriteAction::Deny,
            Disposition::Ignore => WriteAction::Ignore,
            Disposition::Shadow => WriteAction::Shadow,
            Disposition::Mask => WriteAction::Mask {
                may_change: given.number("may_change")?,
                otherwise: given.otherwise("otherwise")?,
            },
            Disposition::Only => WriteAction::Only(given.numbers("values")?),
            Disposition::Once => WriteAction::Once,
            Disposition::Handler => WriteAction::Handler(given.name("handler")?),
            _ => return Ok(None),
        }))
    }

    /// The action's word in a policy.
    pub const fn name(&self) -> &'static str {
        self.did().name()
    }

    /// What an event says when the action was carried out.
    pub const fn did(&self) -> Disposition {
        match self {
            WriteAction::Allow => Disposition::Allow,
            WriteAction::Deny => Disposition::Deny,
            WriteAction::Ignore => Disposition::Ignore,
            WriteAction::Shadow => Disposition::Shadow,
            WriteAction::Mask { .. } => Disposition::Mask,
            WriteAction::Only(_) => Disposition::Only,
            WriteAction::Once => Disposition::Once,
            WriteAction::Handler(_) => Disposition::Handler,
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
                write!(f, "mask may change {may_change:#x}, else {}", otherwise.name())
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

/// What was done with an access: an action, or what came of it.
///
/// The numbers stand in saved plans and in the hashes of policies: a new one goes to the end.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Disposition {
    /// The kernel answered.
    Allow,
    /// The policy says to fault.
    Deny,
    /// Read as zero.
    Zero,
    /// Read as a fixed value.
    Value,
    /// Answered from, or kept in, the vCPU's shadow register.
    Shadow,
    /// Passed on to the kernel's register through a mask.
    Mask,
    /// Read from the physical CPU.
    Host,
    /// Answered by a named handler.
    Handler,
    /// The write went nowhere.
    Ignore,
    /// Written, the value being one of those allowed.
    Only,
    /// Written, for the first and last time.
    Once,
    /// Passed on to the kernel's register as the host would.
    Pass,
    /// Faulted although the policy does not say `deny`; `Event::why` tells.
    Fault,
}

impl Disposition {
    /// All of them, each at the place of its number.
    pub const ALL: [Disposition; 13] = [
        Disposition::Allow,
        Disposition::Deny,
        Disposition::Zero,
        Disposition::Value,
        Disposition::Shadow,
        Disposition::Mask,
        Disposition::Host,
        Disposition::Handler,
        Disposition::Ignore,
        Disposition::Only,
        Disposition::Once,
        Disposition::Pass,
        Disposition::Fault,
    ];

    /// The word that policies, traces and JSON use.
    pub const fn name(self) -> &'static str {
        match self {
            Disposition::Allow => "allow",
            Disposition::Deny => "deny",
            Disposition::Zero => "zero",
            Disposition::Value => "value",
            Disposition::Shadow => "shadow",
            Disposition::Mask => "mask",
            Disposition::Host => "host",
            Disposition::Handler => "handler",
            Disposition::Ignore => "ignore",
            Disposition::Only => "only",
            Disposition::Once => "once",
            Disposition::Pass => "pass",
            Disposition::Fault => "fault",
        }
    }

    /// From the word; `None` for another.
    pub fn from_name(name: &str) -> Option<Disposition> {
        Disposition::ALL.into_iter().find(|did| did.name() == name)
    }

    /// From the number; `None` for another.
    pub fn from_number(number: u8) -> Option<Disposition> {
        Disposition::ALL.get(usize::from(number)).copied()
    }

    /// Whether the guest got #GP.
    pub const fn is_fault(self) -> bool {
        matches!(self, Disposition::Deny | Disposition::Fault)
    }
}

impl fmt::Display for Disposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
