//! What a policy lets an access get.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::convert::Infallible;
use core::fmt;

use crate::Op;

/// What an action is given, beside its word ([`ReadAction::arguments`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Argument<'a> {
    /// 64 bits.
    Number(u64),
    /// 64 bits that the action's word implies, so that a policy does not spell them.
    Implied(u64),
    /// Several of them.
    Numbers(&'a [u64]),
    /// The name of a handler.
    Name(&'a str),
    /// One of two words.
    OnLockedBits(OnLockedBits),
}

/// What names an argument, and says what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArgumentKey {
    /// The argument's key in JSON, and in a policy where the action takes several arguments.
    pub name: &'static str,
    /// What it is, for people.
    pub meaning: &'static str,
}

impl ArgumentKey {
    const fn new(name: &'static str, meaning: &'static str) -> ArgumentKey {
        ArgumentKey { name, meaning }
    }
}

const VALUE: ArgumentKey = ArgumentKey::new("value", "the value");
const INITIAL: ArgumentKey = ArgumentKey::new("initial", "what a read gets before the vCPU has written");
const KEEP: ArgumentKey = ArgumentKey::new("keep", "the bits that show through, all by default");
const SET: ArgumentKey = ArgumentKey::new("set", "the bits that are always one, none by default");
const HANDLER: ArgumentKey = ArgumentKey::new("handler", "the handler's name");
const MAY_CHANGE: ArgumentKey = ArgumentKey::new("may_change", "the bits that the guest may change");
const OTHERWISE: ArgumentKey = ArgumentKey::new(
    "otherwise",
    "what a write gets that would change another bit, `deny` by default",
);
const VALUES: ArgumentKey = ArgumentKey::new("values", "the values");

/// Where the arguments of an action are read from ([`ReadAction::of`]), in the order of [`ReadAction::arguments`].
pub trait Arguments {
    /// Why one cannot be read.
    type Error;
    /// [`Argument::Number`].
    fn number(&mut self, key: ArgumentKey) -> Result<u64, Self::Error>;
    /// [`Argument::Number`], which is `default` where a policy leaves it out.
    fn number_or(&mut self, key: ArgumentKey, default: u64) -> Result<u64, Self::Error> {
        let _ = default;
        self.number(key)
    }
    /// [`Argument::Implied`].
    fn implied(&mut self, key: ArgumentKey, number: u64) -> Result<u64, Self::Error> {
        let _ = key;
        Ok(number)
    }
    /// [`Argument::Numbers`].
    fn numbers(&mut self, key: ArgumentKey) -> Result<Arc<[u64]>, Self::Error>;
    /// [`Argument::Name`].
    fn name(&mut self, key: ArgumentKey) -> Result<Arc<str>, Self::Error>;
    /// [`Argument::OnLockedBits`], which a policy may leave out: [`OnLockedBits::Deny`].
    fn otherwise(&mut self, key: ArgumentKey) -> Result<OnLockedBits, Self::Error>;
}

/// What an action takes, as a policy has it ([`ReadAction::forms`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ActionForm {
    /// The action's word.
    pub did: Disposition,
    /// What the guest gets, for people.
    pub meaning: &'static str,
    /// What it is given, but for what the word says already.
    pub parameters: Vec<Parameter>,
}

/// An argument that an action takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameter {
    /// The parameter's name.
    pub key: ArgumentKey,
    /// What it is made of.
    pub kind: ArgumentKind,
    /// Whether it must be said.
    pub required: bool,
}

/// What an argument is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ArgumentKind {
    /// 64 bits.
    Number,
    /// Several of them.
    Numbers,
    /// The name of a handler.
    Name,
    /// A word of [`OnLockedBits`].
    OnLockedBits,
}

/// Notes what an action asks for, and gives it something.
struct Asked(Vec<Parameter>);

impl Asked {
    fn note<T>(&mut self, key: ArgumentKey, kind: ArgumentKind, required: bool, some: T) -> Result<T, Infallible> {
        self.0.push(Parameter { key, kind, required });
        Ok(some)
    }
}

impl Arguments for Asked {
    type Error = Infallible;

    fn number(&mut self, key: ArgumentKey) -> Result<u64, Infallible> {
        // 0 has a word of its own.
        self.note(key, ArgumentKind::Number, true, 1)
    }

    fn number_or(&mut self, key: ArgumentKey, default: u64) -> Result<u64, Infallible> {
        self.note(key, ArgumentKind::Number, false, default)
    }

    fn numbers(&mut self, key: ArgumentKey) -> Result<Arc<[u64]>, Infallible> {
        self.note(key, ArgumentKind::Numbers, true, Arc::new([]))
    }

    fn name(&mut self, key: ArgumentKey) -> Result<Arc<str>, Infallible> {
        self.note(key, ArgumentKind::Name, true, Arc::from(""))
    }

    fn otherwise(&mut self, key: ArgumentKey) -> Result<OnLockedBits, Infallible> {
        self.note(key, ArgumentKind::OnLockedBits, false, OnLockedBits::Deny)
    }
}

/// The forms of the actions of one direction.
fn forms<A>(
    of: impl Fn(Disposition, &mut Asked) -> Result<Option<A>, Infallible>,
    meaning: impl Fn(&A) -> &'static str,
) -> Vec<ActionForm> {
    let form = |did| {
        let mut asked = Asked(Vec::new());
        let Ok(action) = of(did, &mut asked);
        Some(ActionForm {
            did,
            meaning: meaning(&action?),
            parameters: asked.0,
        })
    };
    Disposition::ALL.into_iter().filter_map(form).collect()
}

/// At most two arguments.
type Pair<'a> = [Option<(ArgumentKey, Argument<'a>)>; 2];

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
    /// Both variants.
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
    /// What the action is given, each under its key. Nothing but [`ReadAction::did`] and these tells two actions
    /// apart.
    pub fn arguments(&self) -> impl Iterator<Item = (ArgumentKey, Argument<'_>)> {
        let number = |key, value: &u64| Some((key, Argument::Number(*value)));
        let pair: Pair<'_> = match self {
            ReadAction::Allow | ReadAction::Deny | ReadAction::Host => [None, None],
            ReadAction::Value(0) => [Some((VALUE, Argument::Implied(0))), None],
            ReadAction::Value(value) => [number(VALUE, value), None],
            ReadAction::Shadow(initial) => [number(INITIAL, initial), None],
            ReadAction::Mask { keep, set } => [number(KEEP, keep), number(SET, set)],
            ReadAction::Handler(name) => [Some((HANDLER, Argument::Name(name))), None],
        };
        pair.into_iter().flatten()
    }

    /// The action that says `did` and has these arguments; `None` where no read says so.
    pub fn of<A: Arguments>(did: Disposition, given: &mut A) -> Result<Option<ReadAction>, A::Error> {
        Ok(Some(match did {
            Disposition::Allow => ReadAction::Allow,
            Disposition::Deny => ReadAction::Deny,
            Disposition::Zero => ReadAction::Value(given.implied(VALUE, 0)?),
            Disposition::Value => ReadAction::Value(given.number(VALUE)?),
            Disposition::Shadow => ReadAction::Shadow(given.number(INITIAL)?),
            Disposition::Mask => ReadAction::Mask {
                keep: given.number_or(KEEP, u64::MAX)?,
                set: given.number_or(SET, 0)?,
            },
            Disposition::Host => ReadAction::Host,
            Disposition::Handler => ReadAction::Handler(given.name(HANDLER)?),
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

    /// What each action that a read may get takes.
    pub fn forms() -> Vec<ActionForm> {
        forms(ReadAction::of, ReadAction::meaning)
    }

    /// What the guest gets, for people.
    pub const fn meaning(&self) -> &'static str {
        match self {
            ReadAction::Allow => "the kernel's own answer",
            ReadAction::Deny => "#GP(0)",
            ReadAction::Value(0) => "0x0",
            ReadAction::Value(_) => "this value",
            ReadAction::Shadow(_) => "what this vCPU last wrote",
            ReadAction::Mask { .. } => "the kernel's value through a mask",
            ReadAction::Host => "the physical CPU's value",
            ReadAction::Handler(_) => "what the named handler answers",
        }
    }

    /// Where the value comes from.
    pub const fn source(&self) -> ReadSource {
        match self {
            ReadAction::Allow | ReadAction::Mask { .. } => ReadSource::Register,
            ReadAction::Deny => ReadSource::Nowhere,
            ReadAction::Value(_) | ReadAction::Shadow(_) => ReadSource::Policy,
            ReadAction::Host => ReadSource::Host,
            ReadAction::Handler(_) => ReadSource::Handler,
        }
    }

    /// What the vCPU remembers for it.
    pub const fn keeps(&self) -> Option<Keeps> {
        match self {
            ReadAction::Shadow(_) => Some(Keeps::Shadow),
            _ => None,
        }
    }

    /// The handler that answers.
    pub fn handler(&self) -> Option<&str> {
        match self {
            ReadAction::Handler(name) => Some(name),
            _ => None,
        }
    }
}

impl WriteAction {
    /// What the action is given, each under its key. Nothing but [`WriteAction::did`] and these tells two actions
    /// apart.
    pub fn arguments(&self) -> impl Iterator<Item = (ArgumentKey, Argument<'_>)> {
        let pair: Pair<'_> = match self {
            WriteAction::Allow | WriteAction::Deny | WriteAction::Ignore | WriteAction::Shadow | WriteAction::Once => {
                [None, None]
            }
            WriteAction::Mask { may_change, otherwise } => [
                Some((MAY_CHANGE, Argument::Number(*may_change))),
                Some((OTHERWISE, Argument::OnLockedBits(*otherwise))),
            ],
            WriteAction::Only(values) => [Some((VALUES, Argument::Numbers(values))), None],
            WriteAction::Handler(name) => [Some((HANDLER, Argument::Name(name))), None],
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
                may_change: given.number(MAY_CHANGE)?,
                otherwise: given.otherwise(OTHERWISE)?,
            },
            Disposition::Only => WriteAction::Only(given.numbers(VALUES)?),
            Disposition::Once => WriteAction::Once,
            Disposition::Handler => WriteAction::Handler(given.name(HANDLER)?),
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

    /// What each action that a write may get takes.
    pub fn forms() -> Vec<ActionForm> {
        forms(WriteAction::of, WriteAction::meaning)
    }

    /// What the guest gets, for people.
    pub const fn meaning(&self) -> &'static str {
        match self {
            WriteAction::Allow => "the kernel carries the write out",
            WriteAction::Deny => "#GP(0)",
            WriteAction::Ignore => "the write goes nowhere, and the guest goes on",
            WriteAction::Shadow => "kept for this vCPU's reads; the hardware never sees it",
            WriteAction::Mask { .. } => "only the bits of the mask reach the kernel's register",
            WriteAction::Only(_) => "the listed values reach the kernel's register; another is #GP(0)",
            WriteAction::Once => "the first write of each vCPU reaches the kernel's register; later ones are #GP(0)",
            WriteAction::Handler(_) => "what the named handler answers",
        }
    }

    /// Where the value goes.
    pub const fn target(&self) -> WriteTarget {
        match self {
            WriteAction::Allow | WriteAction::Mask { .. } | WriteAction::Only(_) | WriteAction::Once => {
                WriteTarget::Register
            }
            WriteAction::Deny | WriteAction::Ignore | WriteAction::Shadow => WriteTarget::Elsewhere,
            WriteAction::Handler(_) => WriteTarget::Handler,
        }
    }

    /// What the vCPU remembers for it.
    pub const fn keeps(&self) -> Option<Keeps> {
        match self {
            WriteAction::Shadow => Some(Keeps::Shadow),
            WriteAction::Once => Some(Keeps::Once),
            _ => None,
        }
    }

    /// The handler that is told.
    pub fn handler(&self) -> Option<&str> {
        match self {
            WriteAction::Handler(name) => Some(name),
            _ => None,
        }
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

/// Where the value of a read comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadSource {
    /// The kernel's register.
    Register,
    /// The physical CPU.
    Host,
    /// The policy, or the vCPU's own writes.
    Policy,
    /// A handler.
    Handler,
    /// There is none: the read faults.
    Nowhere,
}

/// Where the value of a write goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteTarget {
    /// The kernel's register, if the action lets it.
    Register,
    /// A handler, which may do anything.
    Handler,
    /// Never to the kernel's register.
    Elsewhere,
}

/// What a vCPU remembers of an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keeps {
    /// What was written last.
    Shadow,
    /// Whether the one write has been made.
    Once,
}

/// What an access gets, in either direction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// A read.
    Read(ReadAction),
    /// A write.
    Write(WriteAction),
}

impl Action {
    /// The direction's action of two.
    pub fn either((read, write): &(ReadAction, WriteAction), op: Op) -> Action {
        match op {
            Op::Read => Action::Read(read.clone()),
            Op::Write => Action::Write(write.clone()),
        }
    }

    /// What an event says when the action was carried out.
    pub const fn did(&self) -> Disposition {
        match self {
            Action::Read(action) => action.did(),
            Action::Write(action) => action.did(),
        }
    }

    /// The action's word in a policy.
    pub const fn name(&self) -> &'static str {
        self.did().name()
    }

    /// What the guest gets, for people.
    pub const fn meaning(&self) -> &'static str {
        match self {
            Action::Read(action) => action.meaning(),
            Action::Write(action) => action.meaning(),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Read(action) => action.fmt(f),
            Action::Write(action) => action.fmt(f),
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
    /// All dispositions, each at the place of its number.
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

    /// The action of a policy for which an event says it: what is passed on is allowed.
    #[must_use]
    pub const fn action(self) -> Disposition {
        match self {
            Disposition::Pass => Disposition::Allow,
            did => did,
        }
    }

    /// From the number; `None` for another.
    pub fn from_number(number: u8) -> Option<Disposition> {
        Disposition::ALL.get(usize::from(number)).copied()
    }

    /// Whether the kernel answered as it does without a policy.
    pub const fn is_kernels(self) -> bool {
        matches!(self, Disposition::Allow | Disposition::Pass)
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
