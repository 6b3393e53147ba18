//! Which of the process's descriptors are VMs and vCPUs.

use std::sync::atomic::{AtomicU32, Ordering};

use libc::c_int;

/// What a descriptor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Object {
    /// A VM, by its number.
    Vm(u32),
    /// A vCPU, by its slot.
    Vcpu(u32),
}

const VM: u32 = 1 << 30;
const VCPU: u32 = 2 << 30;
const NUMBER: u32 = VM - 1;

impl Object {
    fn encode(this: Option<Object>) -> u32 {
        match this {
            None => 0,
            Some(Object::Vm(number)) => VM | number & NUMBER,
            Some(Object::Vcpu(slot)) => VCPU | slot & NUMBER,
        }
    }

    fn decode(word: u32) -> Option<Object> {
        match word & !NUMBER {
            VM => Some(Object::Vm(word & NUMBER)),
            VCPU => Some(Object::Vcpu(word & NUMBER)),
            _ => None,
        }
    }
}

/// A word for each descriptor, asked without a lock.
#[derive(Debug)]
pub struct Descriptors(Box<[AtomicU32]>);

impl Descriptors {
    /// Descriptors from this number on are not kept track of.
    pub const CAPACITY: usize = 1 << 16;

    pub(crate) fn new() -> Descriptors {
        Descriptors((0..Self::CAPACITY).map(|_| AtomicU32::new(0)).collect())
    }

    fn word(&self, fd: c_int) -> Option<&AtomicU32> {
        self.0.get(usize::try_from(fd).ok()?)
    }

    /// What `fd` is; `None` for all that is neither VM nor vCPU.
    pub(crate) fn object(&self, fd: c_int) -> Option<Object> {
        Object::decode(self.word(fd)?.load(Ordering::Acquire))
    }

    /// Says what `fd` is from now on, and gives what it was; false where it cannot be kept track of.
    pub(crate) fn set(&self, fd: c_int, object: Option<Object>) -> Result<Option<Object>, Beyond> {
        let word = self.word(fd).ok_or(Beyond)?;
        Ok(Object::decode(word.swap(Object::encode(object), Ordering::AcqRel)))
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}

/// The descriptor's number is [`Descriptors::CAPACITY`] or more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Beyond;
