//! What becomes of each call.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libc::{EACCES, EBADF, EINVAL, c_int, c_uint, c_ulong};
use msrgate_core::{Reasons, abi};
use msrgate_plan::DecisionMap;

use crate::board::Board;
use crate::descriptor::{Beyond, Descriptors, Object};
use crate::hook::cpuid::{KVM_SET_CPUID, KVM_SET_CPUID2};
use crate::hook::stray::Stray;
use crate::kernel::{Gate, Kernel, errno, set_errno};
use crate::turn::{Inside, Turn};
use crate::user_filter::{self, word};
use crate::vcpu::{Body, Slots};
use crate::vm::{Policy, Shared, State, Vm, is_weaker};

/// `_IO(KVMIO, 0x01)`, as the kernel takes it: its lower 32 bits.
pub const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CREATE_VCPU: u32 = 0xae41;
/// `_IO(KVMIO, 0x80)`, likewise.
pub const KVM_RUN: u32 = 0xae80;
/// `_IOW(KVMIO, 0x99, struct kvm_mp_state)`.
const KVM_SET_MP_STATE: u32 = 0x4004_ae99;
/// `_IOWR(KVMIO, 0x88, struct kvm_msrs)`; the size is that of the header.
const KVM_GET_MSRS: u32 = 0xc008_ae88;
/// `_IOW(KVMIO, 0x89, struct kvm_msrs)`.
const KVM_SET_MSRS: u32 = 0x4008_ae89;
/// `_IOW(KVMIO, 0xab, struct kvm_one_reg)`, which newer kernels take for MSRs too.
const KVM_GET_ONE_REG: u32 = 0x4010_aeab;
/// `_IOW(KVMIO, 0xac, struct kvm_one_reg)`.
const KVM_SET_ONE_REG: u32 = 0x4010_aeac;
/// Bytes of `struct kvm_enable_cap`.
const ENABLE_CAP_SIZE: usize = 104;

const REFUSED: &str = "the VMM's call fails";

type BodyOf<K> = Body<<K as Kernel>::Gate, <<K as Kernel>::Gate as Gate>::Vcpu>;

/// One process's VMs, and what becomes of its calls. Every method is what the libc function of its name does, errno
/// included.
pub struct Hook<K: Kernel> {
    kernel: K,
    descriptors: Descriptors,
    vcpus: Slots<BodyOf<K>>,
    /// Held over every change of `objects`, and over a fork, which no mutex's guard can be.
    turn: Turn,
    objects: Mutex<Objects<K::Gate>>,
    setup: Box<dyn Fn() -> Result<Setup, String> + Send + Sync>,
    /// Whether some vCPU has presets.
    presets: AtomicBool,
    /// Whose descriptors are kept track of: the child of a `vfork` has this memory and descriptors of its own.
    process: AtomicU32,
}

/// What a hook works by.
#[derive(Debug)]
pub struct Setup {
    /// The policy.
    pub map: DecisionMap,
    /// Where accesses are written down.
    pub board: Option<Board>,
}

/// What descriptors stand for, by number.
struct Objects<G> {
    /// Read when the first VM is made.
    shared: Option<Arc<Shared>>,
    vms: Vec<Option<VmObject<G>>>,
    /// How many descriptors a vCPU's slot has.
    vcpu_descriptors: Vec<u32>,
}

struct VmObject<G> {
    vm: Arc<Vm<G>>,
    descriptors: u32,
}

impl<K: Kernel> Hook<K> {
    /// vCPUs that one process may have at a time.
    pub const VCPUS: usize = 1 << 14;

    /// `setup` is asked at the first VM; its error is one line for people.
    pub fn new(kernel: K, setup: impl Fn() -> Result<Setup, String> + Send + Sync + 'static) -> Hook<K> {
        Hook {
            kernel,
            descriptors: Descriptors::new(),
            vcpus: Slots::new(Self::VCPUS),
            turn: Turn::new(),
            objects: Mutex::new(Objects {
                shared: None,
                vms: Vec::new(),
                vcpu_descriptors: Vec::new(),
            }),
            setup: Box::new(setup),
            presets: AtomicBool::new(false),
            process: AtomicU32::new(std::process::id()),
        }
    }

    /// Whether this request may make a VM, or a vCPU of one that came by another way: until one did, there is nothing
    /// to keep track of.
    pub fn begins(request: c_ulong) -> bool {
        matches!(request as u32, KVM_CREATE_VM | KVM_CREATE_VCPU)
    }

    /// `ioctl(2)`.
    pub fn ioctl(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        // The kernel takes 32 bits of it; callers that have an int extend its sign.
        match request as u32 {
            KVM_RUN => self.run(fd, request, argument),
            KVM_SET_CPUID | KVM_SET_CPUID2 => self.managed(fd, request, argument, Self::set_cpuid),
            KVM_SET_MP_STATE => self.set_mp_state(fd, request, argument),
            KVM_GET_MSRS | KVM_SET_MSRS | KVM_GET_ONE_REG | KVM_SET_ONE_REG => self.msrs(fd, request, argument),
            KVM_CREATE_VM => self.managed(fd, request, argument, Self::create_vm),
            KVM_CREATE_VCPU => self.managed(fd, request, argument, Self::create_vcpu),
            abi::SET_MSR_FILTER => self.managed(fd, request, argument, Self::set_msr_filter),
            abi::ENABLE_CAP => self.managed(fd, request, argument, Self::enable_cap),
            _ => self.kernel.ioctl(fd, request, argument),
        }
    }

    /// A call that changes what is known: one at a time, and what it calls itself is not looked at.
    fn managed(
        &self,
        fd: c_int,
        request: c_ulong,
        argument: usize,
        call: fn(&Self, c_int, c_ulong, usize) -> c_int,
    ) -> c_int {
        let Some(_inside) = Inside::enter() else {
            return self.kernel.ioctl(fd, request, argument);
        };
        call(self, fd, request, argument)
    }

    fn create_vm(&self, kvm: c_int, request: c_ulong, argument: usize) -> c_int {
        if !self.kernel.is_kvm(kvm) {
            return self.kernel.ioctl(kvm, request, argument);
        }
        let vm = self.kernel.ioctl(kvm, request, argument);
        if vm < 0 {
            return vm;
        }
        let before = errno();
        match self.adopt_vm(kvm, vm) {
            Ok(()) => {
                set_errno(before);
                vm
            }
            Err(line) => self.refuse(vm, &format!("no VM is made: {line}")),
        }
    }

    /// Takes back a descriptor that nothing can be put in force on.
    fn refuse(&self, fd: c_int, line: &str) -> c_int {
        self.kernel.say(line);
        self.kernel.close(fd);
        self.with_objects(|objects| {
            let board = objects.shared.as_ref().and_then(|shared| shared.board.as_ref());
            board.inspect(|board| board.refused());
        });
        set_errno(EACCES);
        -1
    }

    fn adopt_vm(&self, kvm: c_int, fd: c_int) -> Result<(), String> {
        self.with_objects(|objects| {
            let shared = match &objects.shared {
                Some(shared) => Arc::clone(shared),
                None => Arc::clone(objects.shared.insert(Arc::new(self.shared()?))),
            };
            let plan = shared.policy.composed(None, Some(&BTreeSet::new()), Reasons::NONE);
            let plan = Arc::new(plan.map_err(|error| error.to_string())?);
            let gate = self.kernel.install(kvm, fd, plan)?;
            let number = objects.vms.iter().position(Option::is_none);
            let number = number.unwrap_or_else(|| {
                objects.vms.push(None);
                objects.vms.len() - 1
            });
            if let Some(place) = objects.vms.get_mut(number) {
                *place = Some(VmObject {
                    vm: Arc::new(Vm::new(gate, shared)),
                    descriptors: 0,
                });
            }
            let number = u32::try_from(number).map_err(|_| "too many VMs")?;
            self.track(objects, fd, Some(Object::Vm(number)))
                .map_err(|Beyond| beyond(fd))
        })
    }

    fn shared(&self) -> Result<Shared, String> {
        let Setup { map, board } = (self.setup)()?;
        let wanted = board.as_ref().map(Board::wanted).unwrap_or_default();
        let policy = Policy::new(map, wanted.mode).map_err(|error| error.to_string())?;
        let desk = board.as_ref().filter(|_| wanted.by_cpuid).map(Board::desk).transpose();
        Ok(Shared {
            policy: Arc::new(policy),
            desk: desk.map_err(|error| format!("the memory that is shared with `msrgate run`: {error}"))?,
            board,
        })
    }

    fn create_vcpu(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let Some(Object::Vm(number)) = self.descriptors.object(fd) else {
            return self.unknown(fd, request, argument, Stray::Vm);
        };
        let vcpu = self.kernel.ioctl(fd, request, argument);
        if vcpu < 0 {
            return vcpu;
        }
        let before = errno();
        // The kernel refuses an id that does not fit.
        let id = u32::try_from(argument).unwrap_or(u32::MAX);
        match self.adopt_vcpu(number, vcpu, id) {
            Ok(()) => {
                set_errno(before);
                vcpu
            }
            Err(line) => self.refuse(vcpu, &format!("vCPU {id} is not made: {line}")),
        }
    }

    fn adopt_vcpu(&self, number: u32, fd: c_int, id: u32) -> Result<(), String> {
        self.with_objects(|objects| {
            let object = objects.vm(number).ok_or("its VM was closed")?;
            let vm = Arc::clone(&object.vm);
            let registers = self.registers(fd, vm.shared.policy.presets())?;
            let vcpu = vm.gate.vcpu(fd, id)?;
            self.presets.fetch_or(!registers.is_empty(), Ordering::Relaxed);
            let board = vm.shared.board.as_ref();
            board.inspect(|board| board.new_vcpu());
            let slate = board.and_then(Board::slate);
            let wanted = board.map(Board::wanted).unwrap_or_default();
            let (policy, ready) = (Arc::clone(&vm.shared.policy), vm.shared.desk.is_none());
            let slot = self.vcpus.put(Body {
                vm,
                vcpu,
                id,
                registers,
                policy: RefCell::new(policy),
                ready: Cell::new(ready),
                slate,
                wanted,
            });
            let slot = slot.ok_or_else(|| format!("one process may have {} vCPUs", Self::VCPUS))?;
            self.track(objects, fd, Some(Object::Vcpu(slot))).map_err(|Beyond| {
                self.vcpus.close(slot);
                beyond(fd)
            })
        })
    }

    /// A VMM does this where it resets a vCPU or loads its state, and a guest cannot have it done.
    fn set_mp_state(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let result = self.kernel.ioctl(fd, request, argument);
        if let (0.., Some(Object::Vcpu(slot))) = (result, self.descriptors.object(fd)) {
            self.vcpus.place(slot);
        }
        result
    }

    fn set_msr_filter(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let Some(Object::Vm(number)) = self.descriptors.object(fd) else {
            return self.unknown(fd, request, argument, Stray::Vm);
        };
        let mut read = |address: u64, to: &mut [u8]| self.kernel.read(address, to);
        let filter = match user_filter::copy(argument as u64, &mut read) {
            Ok(filter) => filter,
            Err(error) => return failed(error),
        };
        self.change(number, |vm, state| {
            let weaker = state.filter.as_ref().is_some_and(|old| is_weaker(old, &filter));
            let old = state.filter.replace(filter);
            if let Err(error) = self.compose(vm, state, vm.mask(), REFUSED) {
                state.filter = old;
                return Err(error);
            }
            if weaker && !state.told {
                state.told = true;
                self.kernel
                    .say("the VMM allows MSRs that its own filter denied before; the policy stays in force");
            }
            Ok(())
        })
    }

    fn enable_cap(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let object = self.descriptors.object(fd);
        let mut bytes = [0; ENABLE_CAP_SIZE];
        let read = self.kernel.read(argument as u64, &mut bytes);
        if !read || word(&bytes, 0) != Ok(abi::CAP_X86_USER_SPACE_MSR) {
            return self.kernel.ioctl(fd, request, argument);
        }
        let Some(Object::Vm(number)) = object else {
            return self.unknown(fd, request, argument, Stray::Vm);
        };
        // In the kernel's order: `kvm_vm_ioctl_enable_cap`.
        let (flags, low, high) = (word(&bytes, 4), word(&bytes, 8), word(&bytes, 12));
        let mask = match (flags, low, high) {
            (Ok(0), Ok(low), Ok(high)) => Reasons::from_bits(u64::from(high) << 32 | u64::from(low)),
            _ => None,
        };
        let Some(mask) = mask else {
            return failed(EINVAL);
        };
        self.change(number, |vm, state| {
            self.compose(vm, state, mask, REFUSED)?;
            vm.set_mask(mask);
            Ok(())
        })
    }

    /// Puts in force what policy and VMM say together; on an error what was in force still is, and `so` is said.
    fn compose(&self, vm: &Vm<K::Gate>, state: &mut State, mask: Reasons, so: &str) -> Result<(), c_int> {
        let plan = state.composed(mask).map_err(|error| {
            let with = match &state.filter {
                Some(_) => "together with the VMM's own MSR filter ",
                None => "",
            };
            self.kernel.say(&format!("{so}: {with}{error}"));
            libc::E2BIG
        })?;
        let plan = Arc::new(plan);
        vm.gate.replace(Arc::clone(&plan)).map_err(|(error, line)| {
            self.kernel.say(&format!("{so}: {line}"));
            error
        })?;
        state.plan = Some(plan);
        Ok(())
    }

    fn change(&self, number: u32, change: impl FnOnce(&Vm<K::Gate>, &mut State) -> Result<(), c_int>) -> c_int {
        let before = errno();
        let vm = self.with_objects(|objects| objects.vm(number).map(|object| Arc::clone(&object.vm)));
        let Some(vm) = vm else {
            return failed(EBADF);
        };
        let result = change(&vm, &mut vm.state());
        match result {
            Ok(()) => {
                set_errno(before);
                0
            }
            Err(error) => failed(error),
        }
    }

    /// `close(2)` is about to close `fd`.
    pub fn closing(&self, fd: c_int) {
        if self.descriptors.object(fd).is_none() || self.is_elsewhere() {
            return;
        }
        let Some(_inside) = Inside::enter() else { return };
        let before = errno();
        // A number that is kept track of is one that can be.
        let _ = self.with_objects(|objects| self.track(objects, fd, None));
        set_errno(before);
    }

    /// `close_range(2)` without CLOSE_RANGE_CLOEXEC is about to close these.
    pub fn closing_range(&self, first: c_uint, last: c_uint) {
        let end = last.min(Descriptors::CAPACITY as c_uint - 1);
        for fd in first..=end {
            if let Ok(fd) = c_int::try_from(fd) {
                self.closing(fd);
            }
        }
    }

    /// `dup(2)` or one of its like gave `new` for `old`, or an error; what `new` was before is closed. Gives what the
    /// call is to give: -1 where `new` cannot be kept track of.
    pub fn duplicated(&self, old: c_int, new: c_int) -> c_int {
        let object = self.descriptors.object(old);
        if new < 0 || old == new || object == self.descriptors.object(new) || self.is_elsewhere() {
            return new;
        }
        let Some(_inside) = Inside::enter() else { return new };
        let before = errno();
        let tracked = self.with_objects(|objects| self.track(objects, new, object));
        if tracked.is_err() {
            return self.refuse(new, &beyond(new));
        }
        set_errno(before);
        new
    }

    fn is_elsewhere(&self) -> bool {
        std::process::id() != self.process.load(Ordering::Relaxed)
    }

    /// Before a fork, in the parent.
    pub fn forking(&self) {
        self.turn.take();
    }

    /// After a fork, in the parent.
    pub fn forked_parent(&self) {
        self.turn.leave();
    }

    /// After a fork, in the child: the VMs are the parent's, and the kernel answers EIO for them.
    pub fn forked_child(&self) {
        self.process.store(std::process::id(), Ordering::Relaxed);
        self.descriptors.clear();
        self.vcpus.forget();
        if let Ok(mut objects) = self.objects.try_lock() {
            std::mem::forget(std::mem::take(&mut objects.vms));
            objects.vcpu_descriptors.clear();
        }
        self.turn.leave();
    }

    fn with_objects<T>(&self, change: impl FnOnce(&mut Objects<K::Gate>) -> T) -> T {
        self.turn.take();
        let result = change(&mut self.objects.lock().unwrap_or_else(PoisonError::into_inner));
        self.turn.leave();
        result
    }

    /// Says what `fd` is from now on, and lets go of what it was.
    fn track(&self, objects: &mut Objects<K::Gate>, fd: c_int, object: Option<Object>) -> Result<(), Beyond> {
        objects.count(object, 1);
        let old = match self.descriptors.set(fd, object) {
            Ok(old) => old,
            Err(Beyond) => {
                self.let_go(objects, object);
                return Err(Beyond);
            }
        };
        self.let_go(objects, old);
        Ok(())
    }

    fn let_go(&self, objects: &mut Objects<K::Gate>, object: Option<Object>) {
        if objects.count(object, -1) != 0 {
            return;
        }
        match object {
            Some(Object::Vcpu(slot)) => self.vcpus.close(slot),
            Some(Object::Vm(number)) => {
                if let Some(slot) = objects.vms.get_mut(number as usize) {
                    *slot = None;
                }
            }
            None => {}
        }
    }
}

impl<G> Objects<G> {
    fn vm(&mut self, number: u32) -> Option<&mut VmObject<G>> {
        self.vms.get_mut(number as usize)?.as_mut()
    }

    /// Adds to an object's count of descriptors, and gives it.
    fn count(&mut self, object: Option<Object>, by: i32) -> u32 {
        let count = match object {
            None => return 0,
            Some(Object::Vm(number)) => self.vm(number).map(|vm| &mut vm.descriptors),
            Some(Object::Vcpu(slot)) => {
                let slot = slot as usize;
                if self.vcpu_descriptors.len() <= slot {
                    self.vcpu_descriptors.resize(slot + 1, 0);
                }
                self.vcpu_descriptors.get_mut(slot)
            }
        };
        count.map_or(0, |count| {
            *count = count.saturating_add_signed(by);
            *count
        })
    }
}

fn failed(error: c_int) -> c_int {
    set_errno(error);
    -1
}

fn beyond(fd: c_int) -> String {
    format!(
        "descriptor {fd} is too high: {} are kept track of",
        Descriptors::CAPACITY
    )
}

mod run;
mod msrs;
mod cpuid;
mod stray;
pub(crate) use msrs::Register;
#[cfg(test)]
mod tests;
