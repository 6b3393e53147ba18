//! What a VMM answers itself, by a name that the policy gives.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use msrgate_core::{Fault, FaultCause, Msr, ReadOutcome, WriteOutcome};

/// What a VMM calls a vCPU: handlers and events have it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[non_exhaustive]
pub struct VcpuId {
    /// Which VM of the process, where the VMM has several; else 0.
    pub vm: u32,
    /// Which vCPU of the VM.
    pub index: u32,
    /// Whatever the VMM wants its handlers to have, such as an index or an address; else 0.
    pub opaque: u64,
}

impl VcpuId {
    /// The vCPU `index` of the VM 0.
    pub const fn new(index: u32) -> VcpuId {
        VcpuId {
            vm: 0,
            index,
            opaque: 0,
        }
    }

    /// The vCPU of the same number in another VM.
    #[must_use]
    pub const fn in_vm(mut self, vm: u32) -> VcpuId {
        self.vm = vm;
        self
    }

    /// The vCPU with a number that handlers are given, such as an address of the VMM's own data.
    #[must_use]
    pub const fn with_opaque(mut self, opaque: u64) -> VcpuId {
        self.opaque = opaque;
        self
    }
}

impl From<u32> for VcpuId {
    fn from(index: u32) -> VcpuId {
        VcpuId::new(index)
    }
}

/// Answers the accesses whose action is a handler.
///
/// Called on the vCPU's thread while the guest waits. A panic is caught where the program unwinds, and the guest gets
/// #GP(0). A handler must not run the vCPU that waits for it.
pub trait Handler: Send + Sync {
    /// What the guest reads.
    fn read(&self, vcpu: VcpuId, msr: Msr) -> ReadOutcome;
    /// The guest writes `value`; `Ok` lets it go on.
    fn write(&self, vcpu: VcpuId, msr: Msr, value: u64) -> WriteOutcome;
}

/// Handlers by name.
#[derive(Clone, Default)]
pub struct Handlers {
    by_name: BTreeMap<Arc<str>, Arc<dyn Handler>>,
}

impl Handlers {
    /// No handler.
    pub fn new() -> Handlers {
        Handlers::default()
    }

    /// Adds `handler` under `name`, in place of one that was there.
    #[must_use]
    pub fn with(mut self, name: &str, handler: impl Handler + 'static) -> Handlers {
        self.by_name.insert(name.into(), Arc::new(handler));
        self
    }

    /// Adds a handler of two functions: what the guest reads, and whether it may write a value.
    #[must_use]
    pub fn with_fns(
        self,
        name: &str,
        read: impl Fn(VcpuId, Msr) -> ReadOutcome + Send + Sync + 'static,
        write: impl Fn(VcpuId, Msr, u64) -> WriteOutcome + Send + Sync + 'static,
    ) -> Handlers {
        self.with(name, Fns { read, write })
    }

    /// A handler for each of these names that faults: for programs that have no code for what a policy names.
    pub fn faulting<'a>(names: impl IntoIterator<Item = &'a str>) -> Handlers {
        let names = names.into_iter();
        names.fold(Handlers::new(), |handlers, name| handlers.with(name, Faulting))
    }

    /// What the handler of this name answers; its panic is an answer too, where the program unwinds.
    ///
    /// # Errors
    /// What the guest's fault is due to.
    pub fn read(&self, name: &str, vcpu: VcpuId, msr: Msr) -> Result<u64, FaultCause> {
        let handler = self.find(name).ok_or(FaultCause::NoHandler)?;
        guarded(|| handler.read(vcpu, msr))
    }

    /// Asks the handler of this name for a write.
    ///
    /// # Errors
    /// What the guest's fault is due to.
    pub fn write(&self, name: &str, vcpu: VcpuId, msr: Msr, value: u64) -> Result<(), FaultCause> {
        let handler = self.find(name).ok_or(FaultCause::NoHandler)?;
        guarded(|| handler.write(vcpu, msr, value))
    }

    /// The handler of this name.
    pub(crate) fn find(&self, name: &str) -> Option<&dyn Handler> {
        self.by_name.get(name).map(|handler| &**handler)
    }
}

fn guarded<T>(ask: impl FnOnce() -> Result<T, Fault>) -> Result<T, FaultCause> {
    // Unwind safe: a handler is shared between threads, so what it holds is its own to keep whole.
    match catch_unwind(AssertUnwindSafe(ask)) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Fault)) => Err(FaultCause::HandlerFault),
        Err(_) => Err(FaultCause::HandlerPanicked),
    }
}

/// A handler that the VMM keeps a hold of.
impl<H: Handler + ?Sized> Handler for Arc<H> {
    fn read(&self, vcpu: VcpuId, msr: Msr) -> ReadOutcome {
        (**self).read(vcpu, msr)
    }

    fn write(&self, vcpu: VcpuId, msr: Msr, value: u64) -> WriteOutcome {
        (**self).write(vcpu, msr, value)
    }
}

struct Fns<R, W> {
    read: R,
    write: W,
}

impl<R, W> Handler for Fns<R, W>
where
    R: Fn(VcpuId, Msr) -> ReadOutcome + Send + Sync,
    W: Fn(VcpuId, Msr, u64) -> WriteOutcome + Send + Sync,
{
    fn read(&self, vcpu: VcpuId, msr: Msr) -> ReadOutcome {
        (self.read)(vcpu, msr)
    }

    fn write(&self, vcpu: VcpuId, msr: Msr, value: u64) -> WriteOutcome {
        (self.write)(vcpu, msr, value)
    }
}

/// Answers nothing.
struct Faulting;

impl Handler for Faulting {
    fn read(&self, _: VcpuId, _: Msr) -> ReadOutcome {
        Err(Fault)
    }

    fn write(&self, _: VcpuId, _: Msr, _: u64) -> WriteOutcome {
        Err(Fault)
    }
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.by_name.keys()).finish()
    }
}
