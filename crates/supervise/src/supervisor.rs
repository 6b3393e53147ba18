//! What becomes of each call that waits.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libc::EACCES;
use msrgate_answer::layout::slot;
use msrgate_core::abi::{self, EnableCap, Layout, RawFilter};
use msrgate_core::{Filter, Reasons, VcpuState, Verdict};
use msrgate_kvm::{HostMsrs, InstallError};
use msrgate_plan::{CompileOptions, DecisionMap, Plan, PlanError, Preset};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::hands::Hands;
use crate::ledger::{Leaf, Ledger};
use crate::policy::{Mode, Policy, State, is_weaker};
use crate::region::{Region, Table};
use crate::seccomp::{Listener, Marks, Waiting};
use crate::stopped::{Stopped, Stopper};
use crate::table;
use crate::target::{self, Object, Other};

mod cpuid;
mod exit;
mod msrs;
mod run;

/// Says what a policy is for a guest with these leaves, without presets, which would come too late; an error is one line for
/// people.
pub type Resolve = Box<dyn Fn(Vec<Leaf>) -> Result<(Plan, CompileOptions), String> + Send>;

/// Asked for the process that makes the first vCPU, before there is one: an error is one line for people, and then there is
/// none.
pub type Claim = Box<dyn FnMut(i32) -> Result<(), String> + Send>;

/// How long a call waits for a vCPU that another thread runs: the VMM's thread would wait for it in the kernel.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often is looked whether it still does, in milliseconds.
const AGAIN: u8 = 1;

/// How many vCPUs a process may have whose descriptors are looked for at each new VM.
const FEW: usize = 16;
/// From how many VMs on it is looked which are gone.
const MANY: usize = 64;

/// What is to be enforced, and what is to be written down.
pub struct Setup {
    /// The policy; where it depends on the guest's CPUID, what is in force until that is known.
    pub plan: Plan,
    /// How it was compiled.
    pub options: CompileOptions,
    /// What becomes of what it decides.
    pub mode: Mode,
    /// Every access that the policy decides makes an event, whatever its rule says of logging.
    pub events: bool,
    /// Events have the guest's RIP.
    pub rip: bool,
    /// What the policy is for a guest's CPUID, where it depends on that.
    pub resolve: Option<Resolve>,
    /// What has to be there before the first vCPU is.
    pub claim: Option<Claim>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup")
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// What whoever runs the VMM is to know.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Remark {
    /// The policy depends on the guest's CPUID, and the VMM runs a vCPU of which it has not set it.
    NoCpuid,
    /// A line for people.
    Line(String),
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Remark::NoCpuid => "no vCPU runs whose CPUID the VMM has not set, since the policy depends on it",
            Remark::Line(line) => line,
        })
    }
}

/// Keeps a policy in force on the VMs of all processes of a VMM.
pub struct Supervisor {
    setup: Setup,
    policy: Arc<Policy>,
    ledger: Arc<Ledger>,
    say: Box<dyn Fn(Remark) + Send>,
    hands: Hands,
    /// What the next VM or vCPU is called.
    next: u64,
    vms: HashMap<u64, Vm>,
    vcpus: HashMap<u64, Vcpu>,
    regions: HashMap<u64, Region>,
    /// The newest region of each process.
    newest: HashMap<i32, u64>,
    tables: Vec<(Arc<Policy>, Arc<Table>)>,
    host: Option<HostMsrs>,
    tracing: Arc<Mutex<()>>,
    /// From how many VMs on is looked which are gone.
    many: usize,
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervisor")
            .field("setup", &self.setup)
            .finish_non_exhaustive()
    }
}

struct Vm {
    number: u32,
    /// The descriptor by which it was found last.
    fd: Option<u64>,
    process: i32,
    state: State,
    /// The VMM's own mask.
    mask: Reasons,
    /// What the kernel holds.
    in_force: Filter,
    reasons: Reasons,
}

struct Vcpu {
    vm: u64,
    id: u32,
    /// Registers that hold presets.
    registers: Vec<Register>,
    /// Whether something is in force that it may run under.
    ready: bool,
    /// The VMM has put it into a state, and it did not run since.
    placed: bool,
    /// What its MSRs remember, apart from shadows that the answerer keeps.
    state: Option<VcpuState>,
    /// What the VMM has set, until some vCPU runs.
    cpuid: Vec<Leaf>,
}

/// A register of a vCPU that holds a preset.
struct Register {
    preset: Preset,
    /// What it would hold without msrgate: the kernel's own value, or what the VMM has put there.
    vmms: u64,
}

/// Why a call does not come about.
enum Refusal {
    /// The kernel's error, for the VMM.
    Kernel(Errno),
    /// One line for people; the VMM gets EACCES.
    Line(String),
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Refusal {
        Refusal::Kernel(error)
    }
}

impl Supervisor {
    /// `say` must not wait.
    ///
    pub fn new(setup: Setup, marks: Marks, ledger: Arc<Ledger>, say: Box<dyn Fn(Remark) + Send>) -> Supervisor {
        let policy = Policy::new(setup.plan.clone(), setup.options.clone(), setup.mode);
        Supervisor {
            setup,
            policy: Arc::new(policy),
            ledger,
            say,
            hands: Hands::new(Stopper::new(marks)),
            next: marks.first_tag(),
            vms: HashMap::new(),
            vcpus: HashMap::new(),
            regions: HashMap::new(),
            newest: HashMap::new(),
            tables: Vec::new(),
            host: None,
            tracing: Arc::default(),
            many: MANY,
        }
    }

    /// The ioctls that have to wait.
    pub fn requests(&self) -> Vec<u32> {
        // KVM_RUN is led to an answerer: what the kernel refuses is an exit, of which the VMM knows nothing.
        let mut requests = vec![
            abi::CREATE_VM,
            abi::CREATE_VCPU,
            abi::SET_MSR_FILTER,
            abi::ENABLE_CAP,
            abi::RUN,
        ];
        if self.setup.resolve.is_some() || self.setup.events {
            requests.extend([abi::SET_CPUID, abi::SET_CPUID2]);
        }
        if !self.policy.presets().is_empty() {
            requests.extend([abi::GET_MSRS, abi::SET_MSRS, abi::GET_ONE_REG, abi::SET_ONE_REG]);
        }
        if self.setup.resolve.is_some() || self.policy.has_emulated_state() {
            requests.push(abi::SET_MP_STATE);
        }
        requests
    }

    /// Locked while a thread stands still. Whoever waits for children of this process waits for stops of theirs too, which
    /// the supervisor must not miss: it holds this lock meanwhile.
    pub fn tracing(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.tracing)
    }

    /// Answers until nobody is left who could call.
    ///
    /// # Errors
    /// The kernel's, where it does not say who calls.
    pub fn serve(mut self, listener: &Listener) -> io::Result<()> {
        let mut later: Vec<(Waiting<'_>, Instant)> = Vec::new();
        loop {
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let timeout = if later.is_empty() {
                PollTimeout::NONE
            } else {
                AGAIN.into()
            };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let events = ready[0].revents().unwrap_or(PollFlags::empty());
            for (waiting, until) in mem::take(&mut later) {
                if self.must_wait(&waiting) && Instant::now() < until {
                    later.push((waiting, until));
                } else {
                    self.answer(&waiting);
                }
            }
            if events.contains(PollFlags::POLLIN) {
                // It may have been killed meanwhile.
                let Ok(waiting) = listener.next() else { continue };
                if self.must_wait(&waiting) {
                    later.push((waiting, Instant::now() + PATIENCE));
                } else {
                    self.answer(&waiting);
                }
            } else if !events.is_empty() {
                return Ok(());
            }
        }
    }

    /// Whether the call is on a vCPU that another thread runs.
    fn must_wait(&self, waiting: &Waiting<'_>) -> bool {
        let on_vcpu = matches!(
            waiting.arguments[1] as u32,
            abi::SET_CPUID
                | abi::SET_CPUID2
                | abi::GET_MSRS
                | abi::SET_MSRS
                | abi::GET_ONE_REG
                | abi::SET_ONE_REG
                | abi::SET_MP_STATE
        );
        let Ok(Object::Vcpu(tag)) = (match on_vcpu {
            true => Object::of(waiting.thread, waiting.arguments[0] as i32),
            false => Ok(Object::Other),
        }) else {
            return false;
        };
        let other = target::other_runs(target::process(waiting.thread), waiting.thread, tag);
        matches!(other, Ok(Other::Runs))
    }

    fn answer(&mut self, waiting: &Waiting<'_>) {
        let tracing = Arc::clone(&self.tracing);
        let _stands_still = tracing.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.number != libc::SYS_ioctl as u32 {
            return self.foreign(waiting);
        }
        match waiting.arguments[1] as u32 {
            abi::RUN => self.run(waiting),
            abi::CREATE_VM => self.create_vm(waiting),
            abi::CREATE_VCPU => self.on_vm(waiting, Self::create_vcpu),
            abi::SET_MSR_FILTER => self.on_vm(waiting, Self::set_msr_filter),
            abi::ENABLE_CAP => self.enable_cap(waiting),
            abi::SET_CPUID | abi::SET_CPUID2 => self.on_vcpu(waiting, Self::set_cpuid),
            abi::GET_MSRS | abi::SET_MSRS | abi::GET_ONE_REG | abi::SET_ONE_REG => self.on_vcpu(waiting, Self::msrs),
            abi::SET_MP_STATE => self.on_vcpu(waiting, Self::set_mp_state),
            _ => waiting.allow(),
        }
    }

    /// A call of a program that is not for x86-64.
    fn foreign(&self, waiting: &Waiting<'_>) {
        match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Other) => waiting.allow(),
            _ => {
                let line = "it makes 32-bit system calls: take a build of the VMM for x86-64";
                self.refuse_object(waiting, "no VM is made", line);
            }
        }
    }

    /// Has the VMM go without a VM or vCPU.
    fn refuse_object(&self, waiting: &Waiting<'_>, what: &str, line: &str) {
        if self.tell(waiting.thread, what, line) {
            self.ledger.refuse();
        }
        let _ = waiting.give(i64::from(-EACCES));
    }

    fn refuse(&self, waiting: &Waiting<'_>, what: &str, line: &str) {
        self.tell(waiting.thread, what, line);
        // Who no longer waits needs no answer.
        let _ = waiting.give(i64::from(-EACCES));
    }

    /// Tells of a thread, unless it was killed meanwhile: then that is why its call failed.
    fn tell(&self, thread: i32, what: &str, line: &str) -> bool {
        let program = target::program(thread);
        if let Some(program) = &program {
            (self.say)(Remark::Line(format!("{what}: {line} (`{program}`, thread {thread})")));
        }
        program.is_some()
    }

    /// Stops the thread of a call on a VM or a vCPU; where it cannot be, `what` is refused.
    fn stop(&self, waiting: &Waiting<'_>, what: &str) -> Option<Stopped> {
        let process = target::process(waiting.thread);
        match self.hands.stop(waiting, process, self.syscall(process), || ()) {
            Ok((mut stopped, ())) => {
                // They are the process's that made them. The kernel looks at that first, and next at the request, before
                // it waits for a vCPU (`kvm_vm_ioctl`, `kvm_vcpu_ioctl`).
                if stopped.ioctl(waiting.arguments[0], 0, 0) == Err(Errno::EIO) {
                    stopped.finish(i64::from(-libc::EIO));
                    return None;
                }
                Some(stopped)
            }
            Err(None) => None,
            Err(Some(line)) => {
                self.refuse(waiting, what, &line);
                None
            }
        }
    }

    /// A `syscall` instruction in a process.
    fn syscall(&self, process: i32) -> Option<u64> {
        self.regions.get(self.newest.get(&process)?)?.syscall()
    }

    fn create_vm(&mut self, waiting: &Waiting<'_>) {
        match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Kvm) => {}
            Ok(_) => return waiting.allow(),
            Err(error) => return self.refuse_object(waiting, "no VM is made", &error.to_string()),
        }
        let process = target::process(waiting.thread);
        let mut stopped = match self.hands.stop(waiting, process, self.syscall(process), || ()) {
            Ok((stopped, ())) => stopped,
            Err(None) => return,
            Err(Some(line)) => return self.refuse_object(waiting, "no VM is made", &line),
        };
        self.collect(&mut stopped);
        let [kvm, _, kind, ..] = waiting.arguments;
        let vm = match stopped.ioctl(kvm, abi::CREATE_VM, kind) {
            Ok(vm) => vm,
            Err(error) => return stopped.give(Err(error)),
        };
        match self.adopt_vm(&mut stopped, vm) {
            Ok(()) => stopped.finish(vm.cast_signed()),
            Err(refusal) => self.take_back(stopped, vm, waiting.thread, "no VM is made", refusal),
        }
    }

    /// Closes a descriptor that nothing can be put in force on.
    fn take_back(&self, mut stopped: Stopped, fd: u64, thread: i32, what: &str, refusal: Refusal) {
        let line = match refusal {
            // It was killed.
            Refusal::Kernel(Errno::ESRCH) => return,
            Refusal::Line(line) => line,
            Refusal::Kernel(error) => format!("the kernel refuses what the policy takes: {}", error.desc()),
        };
        if self.tell(thread, what, &line) {
            self.ledger.refuse();
        }
        stopped.close(fd as i32);
        stopped.finish(i64::from(-EACCES));
    }

    fn adopt_vm(&mut self, stopped: &mut Stopped, fd: u64) -> Result<(), Refusal> {
        let line = |error: &dyn fmt::Display| Refusal::Line(error.to_string());
        self.open_host_msrs(&self.policy.clone())?;
        let plan = self.policy.composed(None, Some(&BTreeSet::new()));
        let plan = plan.map_err(|error| line(&error))?;
        let tag = self.new_tag();
        self.hands.tag(stopped, fd, tag)?;
        let mut vm = Vm {
            number: 0,
            fd: Some(fd),
            process: stopped.process,
            state: State::new(Arc::clone(&self.policy)),
            mask: Reasons::NONE,
            in_force: Filter::allow_all(),
            reasons: Reasons::NONE,
        };
        put_in_force(&mut self.hands, stopped, fd, &mut vm, plan.filter(), plan.reasons())?;
        vm.state.plan = Some(Arc::new(plan));
        vm.number = self.ledger.new_vm();
        self.vms.insert(tag, vm);
        Ok(())
    }

    fn new_tag(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn open_host_msrs(&mut self, policy: &Policy) -> Result<(), Refusal> {
        if self.host.is_none() {
            let line = |error: InstallError| match error.source() {
                Some(source) => Refusal::Line(format!("{error}: {source}")),
                None => Refusal::Line(error.to_string()),
            };
            self.host = HostMsrs::for_table(policy.plan().table()).map_err(line)?;
        }
        Ok(())
    }

    /// A call on a VM that is known.
    fn on_vm(&mut self, waiting: &Waiting<'_>, call: fn(&mut Self, &Waiting<'_>, u64)) {
        match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Vm(tag)) if self.vms.contains_key(&tag) => call(self, waiting, tag),
            Ok(Object::Vm(_)) => self.refuse(
                waiting,
                "the call is refused",
                "its VM was not made under this `msrgate run`",
            ),
            Ok(_) => waiting.allow(),
            Err(error) => self.refuse(waiting, "the call is refused", &error.to_string()),
        }
    }

    /// A call on a vCPU that is known.
    fn on_vcpu(&mut self, waiting: &Waiting<'_>, call: fn(&mut Self, &Waiting<'_>, u64)) {
        match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Vcpu(tag)) if self.vcpus.contains_key(&tag) => call(self, waiting, tag),
            Ok(Object::Vcpu(_)) => {
                self.refuse(
                    waiting,
                    "the call is refused",
                    "its vCPU was not made under this `msrgate run`",
                );
            }
            Ok(_) => waiting.allow(),
            Err(error) => self.refuse(waiting, "the call is refused", &error.to_string()),
        }
    }

    fn create_vcpu(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let [vm, _, id, ..] = waiting.arguments;
        let what = format!("vCPU {id} is not made");
        if let Some(claim) = &mut self.setup.claim {
            if let Err(line) = claim(target::process(waiting.thread)) {
                return self.refuse_object(waiting, &what, &line);
            }
            self.setup.claim = None;
        }
        let Some(mut stopped) = self.stop(waiting, &what) else {
            return;
        };
        let fd = match stopped.ioctl(vm, abi::CREATE_VCPU, id) {
            Ok(fd) => fd,
            Err(error) => return stopped.give(Err(error)),
        };
        match self.adopt_vcpu(&mut stopped, fd, tag, id as u32) {
            Ok(()) => stopped.finish(fd.cast_signed()),
            Err(refusal) => self.take_back(stopped, fd, waiting.thread, &what, refusal),
        }
    }

    fn adopt_vcpu(&mut self, stopped: &mut Stopped, fd: u64, vm: u64, id: u32) -> Result<(), Refusal> {
        let tag = self.new_tag();
        self.hands.tag(stopped, fd, tag)?;
        let mut registers = Vec::new();
        for preset in self.policy.presets() {
            let vmms = self.hands.host_read(stopped, fd, preset.msr);
            let vmms = vmms.ok_or_else(|| Refusal::Line(format!("the kernel gives no value of {}", preset.msr)))?;
            registers.push(Register { preset: *preset, vmms });
            let _ = self.hands.host_write(stopped, fd, preset.msr, preset.value);
            if self.hands.host_read(stopped, fd, preset.msr) != Some(preset.value) {
                let line = format!("the kernel does not hold {:#x} in {}", preset.value, preset.msr);
                return Err(Refusal::Line(line));
            }
        }
        // The number may have been another vCPU's.
        self.regions
            .values()
            .filter(|region| region.process == stopped.process)
            .for_each(|region| region.forget(fd));
        self.ledger.new_vcpu();
        self.vcpus.insert(
            tag,
            Vcpu {
                vm,
                id,
                registers,
                ready: self.setup.resolve.is_none(),
                placed: false,
                state: None,
                cpuid: Vec::new(),
            },
        );
        Ok(())
    }

    fn set_msr_filter(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let Some(mut stopped) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let [fd, _, address, ..] = waiting.arguments;
        let process = stopped.process;
        let mut bytes = [0; Layout::NATIVE.filter_size];
        let read = target::read(process, address, &mut bytes);
        let raw = RawFilter::from_bytes(&bytes, Layout::NATIVE).filter(|_| read);
        let filter = raw.ok_or(abi::Errno::Efault);
        let filter = filter.and_then(|raw| raw.filter(|address, to| target::read(process, address, to)));
        let filter = match filter {
            Ok(filter) => filter,
            Err(error) => return stopped.finish(-i64::from(error as i32)),
        };
        let Some(vm) = self.vms.get_mut(&tag) else { return };
        let weaker = vm.state.filter.as_ref().is_some_and(|old| is_weaker(old, &filter));
        let old = vm.state.filter.replace(filter);
        match self.compose(&mut stopped, fd, tag) {
            Ok(()) => stopped.finish(0),
            Err(refusal) => {
                if let Some(vm) = self.vms.get_mut(&tag) {
                    vm.state.filter = old;
                }
                return self.fail(stopped, waiting.thread, "the VMM's call fails", refusal);
            }
        }
        if weaker
            && let Some(vm) = self.vms.get_mut(&tag)
            && !mem::replace(&mut vm.state.told, true)
        {
            let line = "the VMM allows MSRs that its own filter denied before; the policy stays in force";
            (self.say)(Remark::Line(line.to_owned()));
        }
    }

    fn enable_cap(&mut self, waiting: &Waiting<'_>) {
        let tag = match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Vm(tag)) => tag,
            Ok(_) => return waiting.allow(),
            Err(error) => return self.refuse(waiting, "the VMM's call fails", &error.to_string()),
        };
        let mut bytes = [0; EnableCap::BYTES];
        let read = target::read(waiting.thread, waiting.arguments[2], &mut bytes);
        let EnableCap { cap, flags, arg } = EnableCap::from_bytes(&bytes);
        if !read || cap != abi::CAP_X86_USER_SPACE_MSR {
            // Of another capability, or of none: the kernel says so.
            return waiting.allow();
        }
        if !self.vms.contains_key(&tag) {
            let line = "its VM was not made under this `msrgate run`";
            return self.refuse(waiting, "the call is refused", line);
        }
        // Not for a process whose memory is another than the VM's, as in the kernel.
        let Some(stopped) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        // In the kernel's order: `kvm_vm_ioctl_enable_cap`.
        let Some(mask) = Reasons::from_bits(arg).filter(|_| flags == 0) else {
            return stopped.finish(i64::from(-libc::EINVAL));
        };
        // The kernel hands over for all reasons already.
        if let Some(vm) = self.vms.get_mut(&tag) {
            vm.mask = mask;
        }
        self.tell_regions(tag, slot::MASK, u64::from(mask.bits()));
        stopped.finish(0);
    }

    /// Has the answerers of a VM's vCPUs know something.
    fn tell_regions(&self, vm: u64, word: usize, value: u64) {
        let of_vm = |vcpu: u64| self.vcpus.get(&vcpu).filter(|vcpu| vcpu.vm == vm).map(|_| value);
        self.regions.values().for_each(|region| region.tell(word, of_vm));
    }

    fn fail(&self, stopped: Stopped, thread: i32, what: &str, refusal: Refusal) {
        match refusal {
            Refusal::Kernel(error) => stopped.give(Err(error)),
            Refusal::Line(line) => {
                self.tell(thread, what, &line);
                stopped.finish(i64::from(-EACCES));
            }
        }
    }

    /// Puts in force what policy and VMM say together; on an error what was in force still is.
    fn compose(&mut self, stopped: &mut Stopped, fd: u64, tag: u64) -> Result<(), Refusal> {
        let vm = self.vms.get_mut(&tag).ok_or(Refusal::Kernel(Errno::EBADF))?;
        let plan = vm.state.composed().map_err(|error| {
            let with = match &vm.state.filter {
                Some(_) => "together with the VMM's own MSR filter ",
                None => "",
            };
            Refusal::Line(format!("{with}{error}"))
        })?;
        put_in_force(&mut self.hands, stopped, fd, vm, plan.filter(), plan.reasons())?;
        let plan = Arc::new(plan);
        let old = vm.state.plan.replace(Arc::clone(&plan));
        if let Some(old) = old.filter(|old| old.table() != plan.table()) {
            let of_vm = self.vcpus.values_mut().filter(|vcpu| vcpu.vm == tag);
            for vcpu in of_vm {
                vcpu.state = vcpu.state.take().map(|state| state.carried(old.table(), plan.table()));
            }
        }
        Ok(())
    }

    /// The table for a policy, made once.
    fn table(&mut self, policy: &Arc<Policy>) -> io::Result<Arc<Table>> {
        if let Some((_, table)) = self.tables.iter().find(|(known, _)| Arc::ptr_eq(known, policy)) {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(Table::new(table::words(policy))?);
        self.tables.push((Arc::clone(policy), Arc::clone(&table)));
        Ok(table)
    }

    fn set_mp_state(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let Some(mut stopped) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let [fd, request, address, ..] = waiting.arguments;
        let result = stopped.ioctl(fd, request as u32, address);
        if let (Ok(_), Some(vcpu)) = (&result, self.vcpus.get_mut(&tag)) {
            vcpu.placed = true;
            // It is looked at where it runs next.
            let this = |vcpu: u64| (vcpu == tag).then_some(0);
            self.regions.values().for_each(|region| region.tell(slot::READY, this));
        }
        stopped.give(result);
    }

    /// Lets go of what is no longer there: vCPUs that the process has closed, and processes that have ended.
    fn collect(&mut self, stopped: &mut Stopped) {
        let ended = |process: i32| nix::sys::signal::kill(Pid::from_raw(process), None) == Err(Errno::ESRCH);
        self.regions.retain(|_, region| {
            let over = ended(region.process);
            if over {
                region.end();
            }
            !over
        });
        let regions = &self.regions;
        self.newest.retain(|_, name| regions.contains_key(name));
        self.hands.prune(ended);
        // Looking through a process's descriptors takes time for each: it is done seldom where there are many.
        let many = self.vms.len() >= self.many;
        let process = stopped.process;
        let region = self.newest.get(&process).and_then(|name| self.regions.get_mut(name));
        let region = region.filter(|region| region.len() > 0 && (many || region.len() <= FEW));
        if (region.is_some() || many)
            && let Ok(alive) = target::tags(process)
        {
            if let Some(region) = region {
                region.collect(stopped, &alive);
            }
            let gone = |tag: &u64, of: i32| of == process && !alive.contains(tag);
            if many {
                let vms = &self.vms;
                let of = |vcpu: &Vcpu| vms.get(&vcpu.vm).map_or(process, |vm| vm.process);
                self.vcpus.retain(|tag, vcpu| !gone(tag, of(vcpu)));
                let vcpus = &self.vcpus;
                self.vms
                    .retain(|tag, vm| !gone(tag, vm.process) || vcpus.values().any(|vcpu| vcpu.vm == *tag));
            }
        }
        if many {
            self.vms.retain(|_, vm| !ended(vm.process));
            let vms = &self.vms;
            self.vcpus.retain(|_, vcpu| vms.contains_key(&vcpu.vm));
            self.many = (self.vms.len() * 2).max(MANY);
        }
    }
}

/// Widens the mask, then swaps the filter, then narrows the mask: an access that either filter denies is handed over if
/// its plan says so. On an error what was in force still is.
fn put_in_force(
    hands: &mut Hands,
    stopped: &mut Stopped,
    fd: u64,
    vm: &mut Vm,
    filter: &Filter,
    reasons: Reasons,
) -> Result<(), Errno> {
    let both = vm.reasons.union(reasons);
    if both != vm.reasons {
        hands.set_mask(stopped, fd, both)?;
    }
    if *filter != vm.in_force
        && let Err(error) = hands.set_filter(stopped, fd, filter)
    {
        if both != vm.reasons {
            // A mask that stays too wide hands over what the answerer faults, as the kernel would.
            let _ = hands.set_mask(stopped, fd, vm.reasons);
        }
        return Err(error);
    }
    vm.in_force = filter.clone();
    if both != reasons {
        let _ = hands.set_mask(stopped, fd, reasons);
    }
    vm.reasons = reasons;
    Ok(())
}

/// What a plan that lets nothing through is made of: for a VM whose policy cannot be kept any more.
fn closed() -> Result<Plan, PlanError> {
    Plan::compile(&DecisionMap::deny_all())
}

/// Whether a filter denies an access.
fn denies(filter: &Filter, msr: msrgate_core::Msr, op: msrgate_core::Op) -> bool {
    filter.verdict(msr, op) == Verdict::Deny
}
