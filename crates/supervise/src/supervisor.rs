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
use msrgate_kvm::{Handlers, HostMsrs, InstallError};
use msrgate_plan::{CompileOptions, DecisionMap, Plan, PlanError, Preset};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::cells::Cells;
use crate::control::{Before, Commands, Control, Resolve, Unsettled};
use crate::inject;
use crate::ledger::{Leaf, Ledger};
use crate::policy::{Mode, Policy, State, is_weaker};
use crate::region::{Region, Table};
use crate::remote::RemoteCalls;
use crate::running::Attached;
use crate::seccomp::{Cookies, Listener, Waiting};
use crate::table;
use crate::target::{self, Object, Other};
use crate::tracee::{Tracee, Tracer};

mod attached;
mod cpuid;
mod exit;
mod msrs;
mod reload;
mod run;

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
    /// Who answers for the handlers that the policy names. The VMMs' calls wait meanwhile.
    pub handlers: Handlers,
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
    remote: RemoteCalls,
    /// What the next VM or vCPU is called.
    next: u64,
    vms: HashMap<u64, Vm>,
    vcpus: HashMap<u64, Vcpu>,
    regions: HashMap<u64, Region>,
    /// The newest region of each process.
    newest: HashMap<i32, u64>,
    tables: Vec<(Arc<Policy>, Arc<Table>)>,
    cells: Cells,
    /// What each vCPU's registers hold from its making on, whatever the policy is later.
    presets: Vec<Preset>,
    /// What other threads want.
    commands: Option<Commands>,
    /// After another policy was put in force.
    unsettled: Option<Unsettled>,
    host: Option<HostMsrs>,
    tracing: Arc<Mutex<()>>,
    /// From how many VMs on is looked which are gone.
    many: usize,
    /// Where the VMs ran already.
    attached: Option<Attached>,
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
    /// Of VMs that ran already: the tags and the descriptors of the others of the process, since the kernel does not tell whose a vCPU is.
    others: Vec<(u64, u64)>,
    process: i32,
    state: State,
    /// The VMM's own mask.
    mask: Reasons,
    /// What the kernel holds.
    in_force: Filter,
    reasons: Reasons,
    /// What was in force before, newest first, of which an exit may still be.
    before: Vec<Before>,
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
    pub fn new(setup: Setup, cookies: Cookies, ledger: Arc<Ledger>, say: Box<dyn Fn(Remark) + Send>) -> Supervisor {
        let policy = Policy::new(setup.plan.clone(), setup.options.clone(), setup.mode);
        Supervisor {
            presets: policy.presets().to_vec(),
            setup,
            policy: Arc::new(policy),
            ledger,
            say,
            remote: RemoteCalls::new(Tracer::new(cookies)),
            next: cookies.first_tag(),
            vms: HashMap::new(),
            vcpus: HashMap::new(),
            regions: HashMap::new(),
            newest: HashMap::new(),
            tables: Vec::new(),
            cells: Cells::default(),
            commands: None,
            unsettled: None,
            host: None,
            tracing: Arc::default(),
            many: MANY,
            attached: None,
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
        // A policy that takes the place of this one may depend on the CPUID and remember something.
        let enforces = self.setup.mode == Mode::Enforce;
        if enforces || self.setup.events {
            requests.extend([abi::SET_CPUID, abi::SET_CPUID2]);
        }
        if !self.presets.is_empty() {
            requests.extend([abi::GET_MSRS, abi::SET_MSRS, abi::GET_ONE_REG, abi::SET_ONE_REG]);
        }
        if enforces {
            requests.push(abi::SET_MP_STATE);
        }
        requests
    }

    /// Locked while a thread stands still. Whoever waits for children of this process waits for stops of theirs too, which
    /// the supervisor must not miss: it holds this lock meanwhile.
    pub fn tracing(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.tracing)
    }

    /// A way for other threads to what serves.
    ///
    /// # Errors
    /// The kernel's, where it gives no pipe.
    pub fn control(&mut self) -> io::Result<Control> {
        let (commands, control) = Commands::new()?;
        self.commands = Some(commands);
        Ok(control)
    }

    /// Answers until nobody is left who could call.
    ///
    /// # Errors
    /// The kernel's, where it does not say who calls.
    pub fn serve(mut self, listener: &Listener) -> io::Result<()> {
        let mut later: Vec<(Waiting<'_>, Instant)> = Vec::new();
        let mut commands = self.commands.take();
        loop {
            let mut ready = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            // One policy after the other.
            let holds_up = self.unsettled.as_ref().is_some_and(Unsettled::holds_up);
            if let Some(commands) = commands.as_ref().filter(|_| !holds_up) {
                ready.push(PollFd::new(commands.wake.as_fd(), PollFlags::POLLIN));
            }
            let timeout = match &self.unsettled {
                _ if !later.is_empty() => AGAIN.into(),
                Some(unsettled) => unsettled.next().into(),
                None => PollTimeout::NONE,
            };
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut events = ready.iter().map(|ready| ready.revents().unwrap_or(PollFlags::empty()));
            let (events, wanted) = (events.next().unwrap_or(PollFlags::empty()), events.next());
            let wanted = wanted.is_some_and(|events| events.contains(PollFlags::POLLIN));
            self.look_at_settling();
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
            if wanted && let Some(command) = commands.as_mut().and_then(Commands::next) {
                let tracing = Arc::clone(&self.tracing);
                let _stands_still = tracing.lock().unwrap_or_else(PoisonError::into_inner);
                self.command(command);
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
        let other = target::other_runs(target::process(waiting.thread), waiting.thread, tag, 0, |_| Other::May);
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
    fn stop(&self, waiting: &Waiting<'_>, what: &str) -> Option<Tracee> {
        let process = target::process(waiting.thread);
        match self.remote.stop(waiting, process, self.syscall(process), || ()) {
            Ok((mut tracee, ())) => {
                // They are the process's that made them. The kernel looks at that first, and next at the request, before
                // it waits for a vCPU (`kvm_vm_ioctl`, `kvm_vcpu_ioctl`).
                if tracee.ioctl(waiting.arguments[0], 0, 0) == Err(Errno::EIO) {
                    tracee.finish(i64::from(-libc::EIO));
                    return None;
                }
                Some(tracee)
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
        self.regions.get(self.newest.get(&process)?)?.trampolines.syscall()
    }

    /// Lets go of a vCPU that a region answers for where whoever ran it is lost; tells whether a thread other than this one runs it.
    fn release(&self, region: &Region, thread: i32, tag: u64) -> bool {
        region.release(tag, |answer| {
            let (tracer, process) = (&self.remote.tracer, region.process);
            let running = |other| inject::runs(tracer, process, other, tag, |at| region.is_image(at));
            let other = target::other_runs(process, thread, tag, answer, running);
            !matches!(other, Ok(Other::None))
        })
    }

    fn create_vm(&mut self, waiting: &Waiting<'_>) {
        match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Kvm) => {}
            Ok(_) => return waiting.allow(),
            Err(error) => return self.refuse_object(waiting, "no VM is made", &error.to_string()),
        }
        let process = target::process(waiting.thread);
        let mut tracee = match self.remote.stop(waiting, process, self.syscall(process), || ()) {
            Ok((tracee, ())) => tracee,
            Err(None) => return,
            Err(Some(line)) => return self.refuse_object(waiting, "no VM is made", &line),
        };
        self.collect(&mut tracee);
        let [kvm, _, kind, ..] = waiting.arguments;
        let vm = match tracee.ioctl(kvm, abi::CREATE_VM, kind) {
            Ok(vm) => vm,
            Err(error) => return tracee.give(Err(error)),
        };
        match self.adopt_vm(&mut tracee, vm) {
            Ok(()) => tracee.finish(vm.cast_signed()),
            Err(refusal) => self.take_back(tracee, vm, waiting.thread, "no VM is made", refusal),
        }
    }

    /// Closes a descriptor that nothing can be put in force on.
    fn take_back(&self, mut tracee: Tracee, fd: u64, thread: i32, what: &str, refusal: Refusal) {
        let line = match refusal {
            // It was killed.
            Refusal::Kernel(Errno::ESRCH) => return,
            Refusal::Line(line) => line,
            Refusal::Kernel(error) => format!("the kernel refuses what the policy takes: {}", error.desc()),
        };
        if self.tell(thread, what, &line) {
            self.ledger.refuse();
        }
        tracee.close(fd as i32);
        tracee.finish(i64::from(-EACCES));
    }

    fn adopt_vm(&mut self, tracee: &mut Tracee, fd: u64) -> Result<(), Refusal> {
        let line = |error: &dyn fmt::Display| Refusal::Line(error.to_string());
        self.open_host_msrs(&self.policy.clone())?;
        let plan = self.policy.composed(None, Some(&BTreeSet::new()));
        let plan = plan.map_err(|error| line(&error))?;
        let tag = self.new_tag();
        self.remote.tag(tracee, fd, tag)?;
        let mut vm = Vm {
            number: 0,
            fd: Some(fd),
            others: Vec::new(),
            process: tracee.process,
            state: State::new(Arc::clone(&self.policy)),
            mask: Reasons::NONE,
            in_force: Filter::allow_all(),
            reasons: Reasons::NONE,
            before: Vec::new(),
        };
        put_in_force(&mut self.remote, tracee, fd, &mut vm, plan.filter(), plan.reasons())?;
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
        let Some(mut tracee) = self.stop(waiting, &what) else {
            return;
        };
        let fd = match tracee.ioctl(vm, abi::CREATE_VCPU, id) {
            Ok(fd) => fd,
            Err(error) => return tracee.give(Err(error)),
        };
        match self.adopt_vcpu(&mut tracee, fd, tag, id as u32) {
            Ok(()) => tracee.finish(fd.cast_signed()),
            Err(refusal) => self.take_back(tracee, fd, waiting.thread, &what, refusal),
        }
    }

    fn adopt_vcpu(&mut self, tracee: &mut Tracee, fd: u64, vm: u64, id: u32) -> Result<(), Refusal> {
        let tag = self.new_tag();
        self.remote.tag(tracee, fd, tag)?;
        let mut registers = Vec::new();
        for preset in &self.presets {
            let vmms = self.remote.host_read(tracee, fd, preset.msr);
            let vmms = vmms.ok_or_else(|| Refusal::Line(format!("the kernel gives no value of {}", preset.msr)))?;
            registers.push(Register { preset: *preset, vmms });
            let _ = self.remote.host_write(tracee, fd, preset.msr, preset.value);
            if self.remote.host_read(tracee, fd, preset.msr) != Some(preset.value) {
                let line = format!("the kernel does not hold {:#x} in {}", preset.value, preset.msr);
                return Err(Refusal::Line(line));
            }
        }
        // The number may have been another vCPU's.
        self.regions
            .values()
            .filter(|region| region.process == tracee.process)
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
        let Some(mut tracee) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let [fd, _, address, ..] = waiting.arguments;
        match self.take_filter(&mut tracee, fd, tag, address) {
            Ok(()) => tracee.finish(0),
            Err(refusal) => self.fail(tracee, waiting.thread, "the VMM's call fails", refusal),
        }
    }

    /// Puts the VMM's own filter, which lies at this address, in force together with the policy.
    fn take_filter(&mut self, tracee: &mut Tracee, fd: u64, tag: u64, address: u64) -> Result<(), Refusal> {
        let process = tracee.process;
        let mut bytes = [0; Layout::NATIVE.filter_size];
        let read = target::read(process, address, &mut bytes);
        let raw = RawFilter::from_bytes(&bytes, Layout::NATIVE).filter(|_| read);
        let filter = raw.ok_or(abi::Errno::Efault);
        let filter = filter.and_then(|raw| raw.filter(|address, to| target::read(process, address, to)));
        let filter = filter.map_err(|error| Refusal::Kernel(Errno::from_raw(error as i32)))?;
        let vm = self.vms.get_mut(&tag).ok_or(Refusal::Kernel(Errno::EBADF))?;
        let weaker = vm.state.filter.as_ref().is_some_and(|old| is_weaker(old, &filter));
        let old = vm.state.filter.replace(filter);
        let composed = self.compose(tracee, fd, tag);
        let vm = self.vms.get_mut(&tag).ok_or(Refusal::Kernel(Errno::EBADF))?;
        if let Err(refusal) = composed {
            vm.state.filter = old;
            return Err(refusal);
        }
        if weaker && !mem::replace(&mut vm.state.told, true) {
            let line = "the VMM allows MSRs that its own filter denied before; the policy stays in force";
            (self.say)(Remark::Line(line.to_owned()));
        }
        Ok(())
    }

    fn enable_cap(&mut self, waiting: &Waiting<'_>) {
        let tag = match Object::of(waiting.thread, waiting.arguments[0] as i32) {
            Ok(Object::Vm(tag)) => tag,
            Ok(_) => return waiting.allow(),
            Err(error) => return self.refuse(waiting, "the VMM's call fails", &error.to_string()),
        };
        let mut bytes = [0; EnableCap::BYTES];
        let read = target::read(waiting.thread, waiting.arguments[2], &mut bytes);
        if !read || EnableCap::from_bytes(&bytes).cap != abi::CAP_X86_USER_SPACE_MSR {
            // Of another capability, or of none: the kernel says so.
            return waiting.allow();
        }
        if !self.vms.contains_key(&tag) {
            let line = "its VM was not made under this `msrgate run`";
            return self.refuse(waiting, "the call is refused", line);
        }
        // Not for a process whose memory is another than the VM's, as in the kernel.
        let Some(tracee) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let taken = self.take_mask(tracee.process, tag, waiting.arguments[2]);
        tracee.give(taken.map(|()| 0));
    }

    /// Has the VMM get the exits that it asks for, by the capability that lies at this address.
    fn take_mask(&mut self, process: i32, tag: u64, address: u64) -> Result<(), Errno> {
        let mut bytes = [0; EnableCap::BYTES];
        let read = target::read(process, address, &mut bytes);
        let EnableCap { flags, arg, .. } = EnableCap::from_bytes(&bytes);
        // In the kernel's order: `kvm_vm_ioctl_enable_cap`.
        let mask = Reasons::from_bits(arg).filter(|_| read && flags == 0);
        let mask = mask.ok_or(Errno::EINVAL)?;
        // The kernel hands over for all reasons already.
        if let Some(vm) = self.vms.get_mut(&tag) {
            vm.mask = mask;
        }
        self.tell_regions(tag, slot::MASK, u64::from(mask.bits()));
        Ok(())
    }

    /// Has the answerers of a VM's vCPUs know something.
    fn tell_regions(&self, vm: u64, word: usize, value: u64) {
        let of_vm = |vcpu: u64| self.vcpus.get(&vcpu).filter(|vcpu| vcpu.vm == vm).map(|_| value);
        self.regions.values().for_each(|region| region.tell(word, of_vm));
    }

    fn fail(&self, tracee: Tracee, thread: i32, what: &str, refusal: Refusal) {
        match refusal {
            Refusal::Kernel(error) => tracee.give(Err(error)),
            Refusal::Line(line) => {
                self.tell(thread, what, &line);
                tracee.finish(i64::from(-EACCES));
            }
        }
    }

    /// Puts in force what policy and VMM say together; on an error what was in force still is.
    fn compose(&mut self, tracee: &mut Tracee, fd: u64, tag: u64) -> Result<(), Refusal> {
        let vm = self.vms.get_mut(&tag).ok_or(Refusal::Kernel(Errno::EBADF))?;
        let plan = vm.state.composed().map_err(|error| {
            let with = match &vm.state.filter {
                Some(_) => "together with the VMM's own MSR filter ",
                None => "",
            };
            Refusal::Line(format!("{with}{error}"))
        })?;
        put_in_force(&mut self.remote, tracee, fd, vm, plan.filter(), plan.reasons())?;
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
        self.cells.add(policy.plan().table());
        let table = Arc::new(Table::new(table::words(policy, &self.cells))?);
        self.tables.push((Arc::clone(policy), Arc::clone(&table)));
        Ok(table)
    }

    fn set_mp_state(&mut self, waiting: &Waiting<'_>, tag: u64) {
        let vm = self.vcpus.get(&tag).and_then(|vcpu| self.vms.get(&vcpu.vm));
        if vm.is_some_and(|vm| !vm.state.policy.has_emulated_state()) {
            return waiting.allow();
        }
        let Some(mut tracee) = self.stop(waiting, "the VMM's call fails") else {
            return;
        };
        let [fd, request, address, ..] = waiting.arguments;
        let result = tracee.ioctl(fd, request as u32, address);
        if let (Ok(_), Some(vcpu)) = (&result, self.vcpus.get_mut(&tag)) {
            vcpu.placed = true;
            // It is looked at where it runs next.
            let this = |vcpu: u64| (vcpu == tag).then_some(0);
            self.regions.values().for_each(|region| region.tell(slot::READY, this));
        }
        tracee.give(result);
    }

    /// Lets go of what is no longer there: vCPUs that the process has closed, and processes that have ended.
    fn collect(&mut self, tracee: &mut Tracee) {
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
        self.remote.prune(ended);
        // Looking through a process's descriptors takes time for each: it is done seldom where there are many.
        let many = self.vms.len() >= self.many;
        let process = tracee.process;
        let region = self.newest.get(&process).and_then(|name| self.regions.get_mut(name));
        let region = region.filter(|region| region.len() > 0 && (many || region.len() <= FEW));
        if (region.is_some() || many)
            && let Ok(alive) = target::tags(process)
        {
            if let Some(region) = region {
                region.collect(tracee, &alive);
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
    remote: &mut RemoteCalls,
    tracee: &mut Tracee,
    fd: u64,
    vm: &mut Vm,
    filter: &Filter,
    reasons: Reasons,
) -> Result<(), Errno> {
    let both = vm.reasons.union(reasons);
    let fds: Vec<u64> = [fd].into_iter().chain(vm.others.iter().map(|(_, fd)| *fd)).collect();
    if both != vm.reasons {
        set_masks(remote, tracee, &fds, both)?;
    }
    if *filter != vm.in_force {
        for (count, fd) in fds.iter().enumerate() {
            let Err(error) = remote.set_filter(tracee, *fd, filter) else {
                continue;
            };
            for fd in fds.iter().take(count) {
                let _ = remote.set_filter(tracee, *fd, &vm.in_force);
            }
            if both != vm.reasons {
                // A mask that stays too wide hands over what the answerer faults, as the kernel would.
                let _ = set_masks(remote, tracee, &fds, vm.reasons);
            }
            return Err(error);
        }
    }
    vm.in_force = filter.clone();
    if both != reasons {
        let _ = set_masks(remote, tracee, &fds, reasons);
    }
    vm.reasons = reasons;
    Ok(())
}

fn set_masks(remote: &mut RemoteCalls, tracee: &mut Tracee, vms: &[u64], mask: Reasons) -> Result<(), Errno> {
    vms.iter().try_for_each(|fd| remote.set_mask(tracee, *fd, mask))
}

/// What a plan that lets nothing through is made of: for a VM whose policy cannot be kept any more.
fn closed() -> Result<Plan, PlanError> {
    Plan::compile(&DecisionMap::deny_all())
}

/// Whether a filter denies an access.
fn denies(filter: &Filter, msr: msrgate_core::Msr, op: msrgate_core::Op) -> bool {
    filter.verdict(msr, op) == Verdict::Deny
}
