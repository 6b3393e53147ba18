use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;

use libc::{EBUSY, EFAULT, EINTR, ENOTTY};
use msrgate_core::{
    Access, Answer, Backing, Exit, Filter, FilterRange, Log, Msr, MsrRange, Op, Ops, Outcome, ReadAction, Reason,
    Verdict, Why, WriteAction,
};
use msrgate_plan::{Decision, Intervals, Plan};

use super::stray::{KVM_CHECK_EXTENSION, KVM_GET_MP_STATE};
use super::*;
use crate::board::{Mode, Wanted};
use crate::kernel::{RawExit, Vcpu};

const KVM: c_int = 3;
const OTHER: u32 = 0x5401;
const MICROCODE: u32 = 0x8b;
const CORES: u32 = 0x35;

/// What the kernel does at one KVM_RUN.
#[derive(Clone, Copy)]
enum Ran {
    Msr(Access, Reason),
    /// An exit of the VMM's own.
    Other,
    Failed(c_int),
}

/// The kernel of a test: hands out descriptors, follows scripts, and notes what it was told.
#[derive(Default)]
struct World {
    next: c_int,
    scripts: HashMap<c_int, VecDeque<Ran>>,
    pages: HashMap<c_int, Arc<Mutex<Option<RawExit>>>>,
    answers: Vec<Outcome>,
    closed: Vec<c_int>,
    said: Vec<String>,
    plans: Vec<Arc<Plan>>,
    dropped: u32,
    refuse: bool,
    refuse_cpuid: bool,
    /// What was in force when the kernel took a CPUID.
    plans_at_cpuid: Vec<Arc<Plan>>,
    taken_back: u32,
    /// A vCPU is as a reset leaves it.
    reset: bool,
    forgotten: u32,
    memory: Vec<u8>,
    /// The MSRs that the kernel has, with what a new vCPU's hold.
    known: HashMap<u32, u64>,
    /// What those of vCPUs hold that were written, by descriptor.
    msrs: HashMap<(c_int, u32), u64>,
    /// One that keeps its value.
    stuck: Option<u32>,
    /// What the host's calls on MSRs were.
    asked: Vec<u32>,
    /// A VM and a vCPU that nobody was given.
    strays: Vec<c_int>,
}

impl World {
    /// KVM_GET_MSRS or KVM_SET_MSRS.
    #[expect(unsafe_code, reason = "a structure that the caller points to")]
    fn msrs(&mut self, fd: c_int, request: u32, address: usize) -> c_int {
        self.asked.push(request);
        let words = std::ptr::with_exposed_provenance_mut::<u64>(address);
        // SAFETY: every test and the hook give the address of a live `struct kvm_msrs`, which begins with its count.
        let count = unsafe { words.read() } as usize;
        let first = words.wrapping_add(1).cast::<[u64; 2]>();
        // SAFETY: so many entries of two words follow the first one, and nothing else refers to them over the call.
        let entries = unsafe { std::slice::from_raw_parts_mut(first, count) };
        for (done, [index, data]) in (0..).zip(entries) {
            let index = *index as u32;
            let Some(initial) = self.known.get(&index) else {
                return done;
            };
            let register = self.msrs.entry((fd, index)).or_insert(*initial);
            match request {
                KVM_GET_MSRS => *data = *register,
                _ if self.stuck == Some(index) => {}
                _ => *register = *data,
            }
        }
        count as c_int
    }

    fn register(&self, fd: c_int, msr: u32) -> u64 {
        self.msrs.get(&(fd, msr)).copied().unwrap_or(self.known[&msr])
    }
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<World>>);

impl Fake {
    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

fn fail(error: c_int) -> c_int {
    set_errno(error);
    -1
}

impl Kernel for Fake {
    type Gate = FakeGate;

    fn ioctl(&self, fd: c_int, request: c_ulong, argument: usize) -> c_int {
        let mut world = self.world();
        match request as u32 {
            request @ (KVM_GET_MSRS | KVM_SET_MSRS) => world.msrs(fd, request, argument),
            KVM_CREATE_VM | KVM_CREATE_VCPU => {
                world.next += 1;
                100 + world.next
            }
            KVM_RUN => match world.scripts.get_mut(&fd).and_then(VecDeque::pop_front) {
                Some(Ran::Msr(access, reason)) => {
                    let reason = reason as u32;
                    *world.pages.get(&fd).unwrap().lock().unwrap() = Some(RawExit { access, reason });
                    // What a successful call leaves in errno is nobody's business.
                    set_errno(ENOTTY);
                    0
                }
                Some(Ran::Other) => {
                    *world.pages.get(&fd).unwrap().lock().unwrap() = None;
                    0
                }
                Some(Ran::Failed(error)) => fail(error),
                None => fail(EBADF),
            },
            OTHER => 7,
            KVM_SET_CPUID | KVM_SET_CPUID2 if world.refuse_cpuid => fail(libc::EINVAL),
            KVM_SET_CPUID | KVM_SET_CPUID2 => {
                let plan = Arc::clone(world.plans.last().unwrap());
                world.plans_at_cpuid.push(plan);
                0
            }
            KVM_SET_MP_STATE => 0,
            // Both kinds, as the hook asks each for its own.
            KVM_CHECK_EXTENSION | KVM_GET_MP_STATE if world.strays.contains(&fd) => 1,
            _ => fail(ENOTTY),
        }
    }

    fn close(&self, fd: c_int) -> c_int {
        self.world().closed.push(fd);
        set_errno(ENOTTY);
        0
    }

    fn is_kvm(&self, fd: c_int) -> bool {
        fd == KVM
    }

    fn install(&self, _: c_int, _: c_int, plan: Arc<Plan>) -> Result<FakeGate, String> {
        let mut world = self.world();
        if world.refuse {
            return Err("the kernel does not".to_owned());
        }
        world.plans.push(Arc::clone(&plan));
        Ok(FakeGate(self.clone(), plan))
    }

    fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let world = self.world();
        let from = usize::try_from(address)
            .ok()
            .and_then(|at| world.memory.get(at..)?.get(..to.len()));
        from.inspect(|from| to.copy_from_slice(from)).is_some()
    }

    fn say(&self, line: &str) {
        self.world().said.push(line.to_owned());
    }
}

/// With the plan that it was made with.
struct FakeGate(Fake, Arc<Plan>);

impl Gate for FakeGate {
    type Vcpu = FakeVcpu;

    fn vcpu(&self, fd: c_int, _: u32) -> Result<FakeVcpu, String> {
        let page = Arc::default();
        let mut world = self.0.world();
        world.pages.insert(fd, Arc::clone(&page));
        for preset in self.1.presets() {
            world.msrs.insert((fd, preset.msr.0), preset.value);
        }
        Ok(FakeVcpu {
            kernel: self.0.clone(),
            page,
        })
    }

    fn replace(&self, plan: Arc<Plan>) -> Result<(), (c_int, String)> {
        let mut world = self.0.world();
        if world.refuse {
            return Err((EBUSY, "the kernel is busy".to_owned()));
        }
        world.plans.push(plan);
        Ok(())
    }
}

impl Drop for FakeGate {
    fn drop(&mut self) {
        self.0.world().dropped += 1;
    }
}

struct FakeVcpu {
    kernel: Fake,
    page: Arc<Mutex<Option<RawExit>>>,
}

/// What no action of these tests asks.
struct Nothing;

impl Backing for Nothing {
    fn kernel_read(&mut self, _: Msr) -> Result<u64, Why> {
        Err(Why::KernelRefused)
    }
    fn kernel_write(&mut self, _: Msr, _: u64) -> Result<(), Why> {
        Err(Why::KernelRefused)
    }
    fn host_read(&mut self, _: Msr) -> Result<u64, Why> {
        Err(Why::HostUnreadable)
    }
    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, Why> {
        Err(Why::NoHandler)
    }
    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), Why> {
        Err(Why::NoHandler)
    }
}

impl Vcpu for FakeVcpu {
    fn exit(&self) -> Option<RawExit> {
        *self.page.lock().unwrap()
    }

    fn passes(&self, access: Access) -> bool {
        let plan = Arc::clone(self.kernel.world().plans.last().unwrap());
        plan.table().passes(access.msr(), access.op())
    }

    fn dispatch(&self) -> Option<Answer> {
        let exit = self.page.lock().unwrap().take()?;
        let mut world = self.kernel.world();
        let plan = Arc::clone(world.plans.last().unwrap());
        let reason = Reason::from_bits(exit.reason)?;
        let access = exit.access;
        let mut state = plan.table().vcpu_state();
        let answer = plan.table().answer(Exit { access, reason }, &mut state, &mut Nothing);
        world.answers.push(answer.outcome);
        Some(answer)
    }

    fn answer(&self, outcome: Outcome) {
        self.page.lock().unwrap().take().unwrap();
        self.kernel.world().answers.push(outcome);
    }

    fn is_reset(&self, _: c_int) -> bool {
        self.kernel.world().reset
    }

    fn forget(&self) {
        self.kernel.world().forgotten += 1;
    }

    fn take_back(&self, _: c_int) -> Result<(), c_int> {
        self.page.lock().unwrap().take().unwrap();
        self.kernel.world().taken_back += 1;
        Ok(())
    }
}

/// The microcode revision is fixed.
fn policy() -> DecisionMap {
    let fixed = Decision {
        action: ReadAction::Value(5),
        rule: Some(0),
        log: Log::None,
    };
    DecisionMap {
        reads: Intervals::first_match(
            Decision::of(ReadAction::Allow),
            [(MsrRange::single(Msr(MICROCODE)), fixed)],
        ),
        ..DecisionMap::allow_all()
    }
}

fn hook(map: DecisionMap) -> (Hook<Fake>, Fake) {
    let fake = Fake::default();
    let setup = move || {
        let (map, board) = (map.clone(), None);
        Ok(Setup { map, board })
    };
    (Hook::new(fake.clone(), setup), fake)
}

fn mode(mode: Mode) -> Wanted {
    Wanted {
        mode,
        events: true,
        ..Wanted::default()
    }
}

/// One with a board, which is given too.
fn watching(wanted: Wanted, map: DecisionMap) -> (Hook<Fake>, Fake, Board) {
    let file = crate::handover::memfd(c"test", Board::BYTES).unwrap();
    let ours = Board::new(file.try_clone().unwrap(), wanted).unwrap();
    let fake = Fake::default();
    let setup = move || {
        let board = Board::open(file.try_clone().unwrap()).unwrap();
        let (map, board) = (map.clone(), Some(board));
        Ok(Setup { map, board })
    };
    (Hook::new(fake.clone(), setup), fake, ours)
}

fn ioctl(hook: &Hook<Fake>, fd: c_int, request: u32, argument: usize) -> c_int {
    hook.ioctl(fd, c_ulong::from(request), argument)
}

fn vm(hook: &Hook<Fake>) -> c_int {
    let vm = ioctl(hook, KVM, KVM_CREATE_VM, 0);
    assert!(vm > 0);
    vm
}

fn vcpu(hook: &Hook<Fake>, vm: c_int, fake: &Fake, script: &[Ran]) -> c_int {
    let id = fake.world().pages.len();
    let vcpu = ioctl(hook, vm, KVM_CREATE_VCPU, id);
    assert!(vcpu > 0);
    fake.world().scripts.insert(vcpu, script.iter().copied().collect());
    vcpu
}

fn read(msr: u32) -> Access {
    Access::Read { msr: Msr(msr) }
}

/// The bytes of KVM_X86_SET_MSR_FILTER, with bitmaps behind them, for memory that starts at address 0.
fn raw_filter(flags: u32, ranges: &[(u32, u32, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = flags.to_le_bytes().to_vec();
    bytes.resize(abi::Layout::NATIVE.filter_size, 0);
    for (at, (ops, base, nmsrs, bitmap)) in (8..).step_by(24).zip(ranges) {
        let address = bytes.len() as u64;
        bytes[at..at + 4].copy_from_slice(&ops.to_le_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&nmsrs.to_le_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&base.to_le_bytes());
        bytes[at + 16..at + 24].copy_from_slice(&address.to_le_bytes());
        bytes.extend(*bitmap);
    }
    bytes
}

/// As QEMU's: reads of one MSR are its own.
fn cores_denied() -> Vec<u8> {
    raw_filter(0, &[(1, CORES, 1, &[0; 8])])
}

fn set_filter(hook: &Hook<Fake>, fake: &Fake, vm: c_int, memory: Vec<u8>) -> c_int {
    fake.world().memory = memory;
    ioctl(hook, vm, abi::SET_MSR_FILTER, 0)
}

fn set_mask(hook: &Hook<Fake>, fake: &Fake, vm: c_int, mask: u64) -> c_int {
    let mut bytes = abi::CAP_X86_USER_SPACE_MSR.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(mask.to_le_bytes());
    bytes.resize(ENABLE_CAP_SIZE, 0);
    fake.world().memory = bytes;
    ioctl(hook, vm, abi::ENABLE_CAP, 0)
}

/// What one KVM_RUN gives, and what the VMM finds in `kvm_run` then, after these.
fn run(hook: &Hook<Fake>, fake: &Fake, fd: c_int, script: &[Ran]) -> (c_int, Option<RawExit>) {
    let script = script.iter().copied().collect();
    fake.world().scripts.insert(fd, script);
    let result = ioctl(hook, fd, KVM_RUN, 0);
    let page = Arc::clone(&fake.world().pages[&fd]);
    let left = *page.lock().unwrap();
    (result, left)
}

#[test]
fn the_plan_is_in_force_when_the_vmm_gets_its_vm() {
    let (hook, fake) = hook(policy());
    vm(&hook);
    let plan = Arc::clone(&fake.world().plans[0]);
    assert_eq!(plan.filter().verdict(Msr(MICROCODE), Op::Read), Verdict::Deny);
}

#[test]
fn without_a_plan_there_is_no_vm() {
    let (hook, fake) = hook(policy());
    fake.world().refuse = true;
    assert_eq!((ioctl(&hook, KVM, KVM_CREATE_VM, 0), errno()), (-1, EACCES));
    assert_eq!(fake.world().closed, [101]);
    assert!(fake.world().said[0].contains("the kernel does not"));

    let broken = Hook::new(fake.clone(), || Err("no policy".to_owned()));
    fake.world().refuse = false;
    assert_eq!((ioctl(&broken, KVM, KVM_CREATE_VM, 0), errno()), (-1, EACCES));
    assert_eq!(fake.world().closed, [101, 102]);
}

#[test]
fn other_descriptors_and_requests_go_on_to_the_kernel() {
    let (hook, fake) = hook(policy());
    assert_eq!(ioctl(&hook, 9, KVM_CREATE_VM, 0), 101, "a device with the same number");
    assert!(fake.world().plans.is_empty());
    let vm = vm(&hook);
    assert_eq!(ioctl(&hook, vm, OTHER, 0), 7);
    assert_eq!((ioctl(&hook, 9, KVM_RUN, 0), errno()), (-1, EBADF));
    assert_eq!((ioctl(&hook, 9, abi::SET_MSR_FILTER, 0), errno()), (-1, ENOTTY));
}

#[test]
fn a_vm_or_vcpu_that_came_by_another_way_is_refused() {
    let (hook, fake) = hook(policy());
    fake.world().strays = vec![50];
    let own = vm(&hook);
    for request in [KVM_CREATE_VCPU, KVM_RUN, abi::SET_MSR_FILTER] {
        assert_eq!((ioctl(&hook, 50, request, 0), errno()), (-1, EACCES));
        let said = fake.world().said.pop().unwrap();
        assert!(said.starts_with("descriptor 50 is refused: it is a "), "{said}");
    }
    assert_eq!((set_mask(&hook, &fake, 50, 4), errno()), (-1, EACCES));
    // It opens all that the policy denies.
    assert_eq!(set_filter(&hook, &fake, 50, raw_filter(0, &[])), -1);
    assert_eq!(fake.world().plans.len(), 1);
    assert_eq!(set_filter(&hook, &fake, own, raw_filter(0, &[])), 0);
}

#[test]
fn an_access_of_the_policy_is_answered_and_the_guest_goes_on() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
    set_errno(EBUSY);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, exit, Ran::Other]), (0, None));
    assert_eq!(errno(), EBUSY, "a call that succeeds leaves errno alone");
    assert_eq!(fake.world().answers, [Outcome::Value(5); 2]);
}

#[test]
fn a_request_with_an_extended_sign_is_the_same_request() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let vcpu = vcpu(
        &hook,
        vm,
        &fake,
        &[Ran::Msr(read(MICROCODE), Reason::Filter), Ran::Other],
    );
    assert_eq!(hook.ioctl(vcpu, c_ulong::MAX << 32 | c_ulong::from(KVM_RUN), 0), 0);
    assert_eq!(fake.world().answers.len(), 1);
}

#[test]
fn what_interrupts_the_vcpu_is_passed_on() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, Ran::Failed(EINTR)]), (-1, None));
    assert_eq!(errno(), EINTR);
    assert_eq!(run(&hook, &fake, vcpu, &[Ran::Failed(EFAULT)]).0, -1);
    assert_eq!(errno(), EFAULT);
}

#[test]
fn what_a_vmm_did_not_ask_for_never_reaches_it() {
    let (hook, fake) = hook(DecisionMap {
        unknown: (ReadAction::Value(0), WriteAction::Deny),
        ..policy()
    });
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let write = Access::Write { msr: Msr(1), value: 2 };
    let script = [
        Ran::Msr(read(7), Reason::Filter),
        Ran::Msr(read(7), Reason::Invalid),
        Ran::Msr(read(7), Reason::Unknown),
        Ran::Msr(write, Reason::Unknown),
        Ran::Other,
    ];
    assert_eq!(run(&hook, &fake, vcpu, &script), (0, None));
    let zero = Outcome::Value(0);
    let answers = [Outcome::Fault, Outcome::Fault, zero, Outcome::Fault];
    assert_eq!(fake.world().answers, answers);
}

#[test]
fn what_the_vmm_denies_is_its_own_where_it_asked_and_faults_where_it_did_not() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    assert_eq!(set_filter(&hook, &fake, vm, cores_denied()), 0);
    let exit = Ran::Msr(read(CORES), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Fault]);

    assert_eq!(set_mask(&hook, &fake, vm, 4), 0);
    let left = RawExit {
        access: read(CORES),
        reason: 4,
    };
    assert_eq!(run(&hook, &fake, vcpu, &[exit]), (0, Some(left)));
    // Only what it asked for, and never what the policy decides.
    let others = [
        Ran::Msr(read(CORES), Reason::Unknown),
        Ran::Msr(read(MICROCODE), Reason::Filter),
    ];
    assert_eq!(run(&hook, &fake, vcpu, &[others[0], others[1], Ran::Other]), (0, None));
    assert_eq!(
        fake.world().answers,
        [Outcome::Fault, Outcome::Fault, Outcome::Value(5)]
    );
}

#[test]
fn filters_and_masks_of_both_are_in_force_together() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    assert_eq!(set_mask(&hook, &fake, vm, 3), 0);
    assert_eq!(set_filter(&hook, &fake, vm, cores_denied()), 0);
    let plan = Arc::clone(fake.world().plans.last().unwrap());
    assert_eq!(plan.reasons(), Reasons::ALL);
    for (msr, verdict) in [(MICROCODE, Verdict::Deny), (CORES, Verdict::Deny), (7, Verdict::Allow)] {
        assert_eq!(plan.filter().verdict(Msr(msr), Op::Read), verdict, "{msr:#x}");
    }
    // Taking them away leaves the policy.
    assert_eq!(set_mask(&hook, &fake, vm, 0), 0);
    assert_eq!(set_filter(&hook, &fake, vm, raw_filter(0, &[])), 0);
    let plan = Arc::clone(fake.world().plans.last().unwrap());
    assert_eq!(plan.reasons(), Reasons::of(Reason::Filter));
    assert_eq!(plan.filter().verdict(Msr(MICROCODE), Op::Read), Verdict::Deny);
    assert_eq!(plan.filter().verdict(Msr(CORES), Op::Read), Verdict::Allow);
    let weaker = "the VMM allows MSRs that its own filter denied before; the policy stays in force";
    assert_eq!(fake.world().said, [weaker]);
    set_filter(&hook, &fake, vm, cores_denied());
    set_filter(&hook, &fake, vm, raw_filter(0, &[]));
    assert_eq!(fake.world().said.len(), 1, "it is said once");
}

#[test]
fn a_call_that_the_kernel_would_refuse_is_refused_and_changes_nothing() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let mut flags = cores_denied();
    flags[0] = 2;
    for (memory, error) in [
        (raw_filter(1, &[]), EINVAL),
        (raw_filter(0, &[(4, 0, 1, &[0; 8])]), EINVAL),
        (raw_filter(0, &[(0, 0, 1, &[0; 8])]), EINVAL),
        (raw_filter(0, &[(1, 0, 12289, &[0; 8])]), EINVAL),
        (raw_filter(0, &[(1, 0, 65, &[0; 8])]), EFAULT),
        (vec![0; 391], EFAULT),
        (flags, EINVAL),
    ] {
        assert_eq!((set_filter(&hook, &fake, vm, memory), errno()), (-1, error));
    }
    for mask in [8, 1 << 32, u64::MAX] {
        assert_eq!((set_mask(&hook, &fake, vm, mask), errno()), (-1, EINVAL));
    }
    fake.world().refuse = true;
    assert_eq!((set_filter(&hook, &fake, vm, cores_denied()), errno()), (-1, EBUSY));
    assert_eq!((set_mask(&hook, &fake, vm, 4), errno()), (-1, EBUSY));
    assert_eq!(fake.world().plans.len(), 1);
}

#[test]
fn another_capability_is_the_kernels() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    fake.world().memory = vec![0; ENABLE_CAP_SIZE];
    assert_eq!((ioctl(&hook, vm, abi::ENABLE_CAP, 0), errno()), (-1, ENOTTY));
}

#[test]
fn a_filter_that_does_not_fit_beside_the_policy_is_refused_and_the_old_one_stays() {
    let rules = (0..16).map(|slot: u32| {
        let fixed = Decision {
            action: ReadAction::Value(u64::from(slot)),
            rule: Some(slot),
            log: Log::None,
        };
        (MsrRange::single(Msr(slot << 20)), fixed)
    });
    let (hook, fake) = hook(DecisionMap {
        reads: Intervals::first_match(Decision::of(ReadAction::Allow), rules),
        ..DecisionMap::allow_all()
    });
    let vm = vm(&hook);
    let apart = raw_filter(0, &[(1, 0xc100_0000, 1, &[0; 8])]);
    assert_eq!((set_filter(&hook, &fake, vm, apart), errno()), (-1, libc::E2BIG));
    assert_eq!(fake.world().plans.len(), 1);
    assert!(
        fake.world().said[0].contains("17 filter ranges"),
        "{:?}",
        fake.world().said
    );
    let beside = raw_filter(0, &[(1, 1, 1, &[0; 8])]);
    assert_eq!(set_filter(&hook, &fake, vm, beside), 0, "what fits is taken");
}

#[test]
fn a_vcpu_that_the_vmm_resets_forgets_and_one_that_it_loads_does_not() {
    let once = Decision {
        action: WriteAction::Once,
        rule: Some(0),
        log: Log::None,
    };
    let remembers = DecisionMap {
        writes: Intervals::first_match(
            Decision::of(WriteAction::Allow),
            [(MsrRange::single(Msr(MICROCODE)), once)],
        ),
        ..DecisionMap::allow_all()
    };
    for (map, forgotten) in [(remembers, 1), (policy(), 0)] {
        let (hook, fake) = hook(map);
        let vm = vm(&hook);
        let vcpu = vcpu(&hook, vm, &fake, &[]);
        // Where the guest is makes no difference by itself.
        fake.world().reset = true;
        run(&hook, &fake, vcpu, &[Ran::Other]);
        assert_eq!(fake.world().forgotten, 0);
        // Loading: a reset, and then what was saved.
        assert_eq!(ioctl(&hook, vcpu, KVM_SET_MP_STATE, 0), 0);
        fake.world().reset = false;
        assert_eq!(ioctl(&hook, vcpu, KVM_SET_MP_STATE, 0), 0);
        run(&hook, &fake, vcpu, &[Ran::Other]);
        assert_eq!(fake.world().forgotten, 0);
        // A reset, after which it runs.
        fake.world().reset = true;
        assert_eq!(ioctl(&hook, vcpu, KVM_SET_MP_STATE, 0), 0);
        run(&hook, &fake, vcpu, &[Ran::Other]);
        run(&hook, &fake, vcpu, &[Ran::Other]);
        assert_eq!(fake.world().forgotten, forgotten);
    }
}

#[test]
fn duplicates_are_followed_and_the_last_close_lets_go() {
    let (hook, fake) = hook(policy());
    let first = vm(&hook);
    let one = vcpu(
        &hook,
        first,
        &fake,
        &[Ran::Msr(read(MICROCODE), Reason::Filter), Ran::Other],
    );
    assert_eq!(hook.duplicated(first, 50), 50);
    assert_eq!(hook.duplicated(one, 51), 51);
    hook.closing(first);
    hook.closing(one);
    assert_eq!(ioctl(&hook, 50, KVM_CREATE_VCPU, 1), 103);
    let script = fake.world().scripts.remove(&one).unwrap();
    fake.world().scripts.insert(51, script);
    // The fake keeps pages by the first descriptor.
    let page = Arc::clone(&fake.world().pages[&one]);
    fake.world().pages.insert(51, page);
    assert_eq!(ioctl(&hook, 51, KVM_RUN, 0), 0);
    assert_eq!(fake.world().answers.len(), 1);

    hook.closing_range(50, 60);
    assert_eq!(fake.world().dropped, 0, "a vCPU still has the VM");
    hook.closing(103);
    assert_eq!(fake.world().dropped, 1);
    assert_eq!(
        (ioctl(&hook, 50, KVM_CREATE_VCPU, 0), hook.descriptors.object(51)),
        (104, None)
    );
}

#[test]
fn a_descriptor_that_is_replaced_is_no_longer_what_it_was() {
    let (hook, fake) = hook(policy());
    let (first, second) = (vm(&hook), vm(&hook));
    assert_eq!(hook.duplicated(second, first), first);
    assert_eq!(fake.world().dropped, 1);
    assert_eq!(hook.duplicated(9, first), first, "something that is no VM");
    assert_eq!((hook.descriptors.object(first), fake.world().dropped), (None, 1));
    hook.closing(second);
    assert_eq!(fake.world().dropped, 2);
    let third = vm(&hook);
    assert_eq!(
        hook.descriptors.object(third),
        Some(Object::Vm(0)),
        "numbers are used again"
    );
}

#[test]
fn a_descriptor_that_cannot_be_kept_track_of_is_taken_back() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let beyond = Descriptors::CAPACITY as c_int;
    assert_eq!((hook.duplicated(vm, beyond), errno()), (-1, EACCES));
    assert_eq!(fake.world().closed, [beyond]);
    hook.closing(vm);
    assert_eq!(fake.world().dropped, 1, "the count is right");
}

#[test]
fn the_child_of_a_fork_starts_with_nothing() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    hook.forking();
    hook.forked_child();
    assert_eq!(
        (hook.descriptors.object(vm), hook.descriptors.object(vcpu)),
        (None, None)
    );
    assert_eq!(
        fake.world().dropped,
        0,
        "what a thread may have been changing is not touched"
    );
    let own = super::tests::vm(&hook);
    assert_eq!(hook.descriptors.object(own), Some(Object::Vm(0)));
}

/// In the child of a `vfork`, which has the parent's memory and descriptors of its own.
#[expect(unsafe_code, reason = "a call that Rust has no other way to make")]
fn in_the_parents_memory(mut act: impl FnMut()) {
    extern "C" fn child<F: FnMut()>(act: *mut libc::c_void) -> c_int {
        // SAFETY: the address of a closure that the parent, which waits, has borrowed for this call alone.
        unsafe { (*act.cast::<F>())() };
        0
    }
    fn entry<F: FnMut()>(_: &F) -> extern "C" fn(*mut libc::c_void) -> c_int {
        child::<F>
    }
    let entry = entry(&act);
    let mut stack = vec![0_u128; 1 << 14];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let top = stack.as_mut_ptr_range().end.cast();
    // SAFETY: a stack of its own, aligned and long enough, which lives until the child has ended: CLONE_VFORK waits.
    let pid = unsafe { libc::clone(entry, top, flags, (&raw mut act).cast()) };
    assert!(pid > 0);
    let mut status = 0;
    // SAFETY: the kernel writes the status to a variable that lives over the call.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!((ended, status), (pid, 0));
}

#[test]
fn what_the_child_of_a_vfork_closes_is_not_closed_here() {
    let (hook, fake) = hook(policy());
    let vm = vm(&hook);
    in_the_parents_memory(|| {
        hook.closing(vm);
        hook.closing_range(0, u32::MAX);
        hook.duplicated(9, vm);
    });
    assert_eq!(
        (hook.descriptors.object(vm), fake.world().dropped),
        (Some(Object::Vm(0)), 0)
    );
    hook.closing_range(vm.cast_unsigned(), u32::MAX);
    assert_eq!((hook.descriptors.object(vm), fake.world().dropped), (None, 1));
}

#[test]
fn many_threads_run_make_and_close_vcpus_at_once() {
    let (hook, fake) = hook(policy());
    let hook = &hook;
    let vm = vm(hook);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let fake = fake.clone();
            scope.spawn(move || {
                for _ in 0..50 {
                    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
                    let fd = vcpu(hook, vm, &fake, &[exit, exit, Ran::Other]);
                    assert_eq!(ioctl(hook, fd, KVM_RUN, 0), 0);
                    hook.closing(fd);
                }
            });
        }
    });
    assert_eq!(fake.world().answers, vec![Outcome::Value(5); 800]);
    hook.closing(vm);
    assert_eq!(fake.world().dropped, 1);
}

/// Differs from the engine's reading of the same bytes in nothing.
mod beside_the_engine {
    use msrgate_engine::{Fault, Origin};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_filter_is_read_as_the_engine_reads_it(
            flags in prop_oneof![9 => 0..2_u32, 1 => any::<u32>()],
            ranges in prop::collection::vec((
                prop_oneof![9 => 1..4_u32, 1 => any::<u32>()],
                prop_oneof![0..0x100_u32, any::<u32>()],
                prop_oneof![8 => 0..200_u32, 1 => 12280..12300_u32, 1 => any::<u32>()],
                prop::collection::vec(any::<u8>(), 0..40),
            ), 0..5),
            probes in prop::collection::vec(0..0x180_u32, 20),
            cut in prop_oneof![4 => Just(0_usize), 1 => 0..400_usize],
        ) {
            let ranges: Vec<(u32, u32, u32, &[u8])> = ranges
                .iter()
                .map(|(ops, base, nmsrs, bitmap)| (*ops, *base, *nmsrs, bitmap.as_slice()))
                .collect();
            let mut memory = raw_filter(flags, &ranges);
            memory.truncate(memory.len().saturating_sub(cut));
            let copy = |at: u64, to: &mut [u8]| {
                let from = memory.get(at as usize..).and_then(|rest| rest.get(..to.len()));
                from.inspect(|from| to.copy_from_slice(from)).is_some()
            };
            let ours = user_filter::copy(0, &mut { copy });
            let engine = msrgate_engine::Vm::new();
            let theirs = engine.set_msr_filter(0, abi::Layout::NATIVE, &|at, to: &mut [u8]| {
                if copy(at, to) { Ok(()) } else { Err(Fault) }
            });
            match (ours, theirs) {
                (Ok(filter), Ok(())) => {
                    let bases = ranges.iter().map(|range| range.1);
                    for msr in probes.into_iter().chain(bases).map(Msr) {
                        for op in Op::ALL {
                            let theirs = engine.allows(Origin::Instruction, msr, op);
                            prop_assert_eq!(filter.verdict(msr, op), theirs, "{} {}", op, msr);
                        }
                    }
                }
                (Err(ours), Err(theirs)) => prop_assert_eq!(ours, theirs as c_int),
                (ours, theirs) => prop_assert!(false, "{ours:?} {theirs:?}"),
            }
        }
    }
}

fn taken_back_and_answered(fake: &Fake) -> (u32, usize) {
    let world = fake.world();
    (world.taken_back, world.answers.len())
}

/// The fixed revision is one that the kernel holds; its own is 1.
fn held() -> (Hook<Fake>, Fake) {
    let writes = [(MsrRange::single(Msr(MICROCODE)), Decision::of(WriteAction::Ignore))];
    let map = DecisionMap {
        writes: Intervals::first_match(Decision::of(WriteAction::Allow), writes),
        ..policy()
    };
    let preset = map.preset(Msr(MICROCODE)).unwrap();
    let (hook, fake) = hook(map.holding(vec![preset]));
    fake.world().known = HashMap::from([(MICROCODE, 1), (9, 0)]);
    (hook, fake)
}

/// What a VMM's call gives, and the values that it finds or gives.
fn msrs<const N: usize>(hook: &Hook<Fake>, vcpu: c_int, request: u32, entries: &mut [(u32, u64); N]) -> c_int {
    let mut words = vec![N as u64];
    words.extend(entries.iter().flat_map(|(msr, value)| [u64::from(*msr), *value]));
    let result = ioctl(hook, vcpu, request, words.as_mut_ptr().expose_provenance());
    for (entry, word) in entries.iter_mut().zip(words[1..].chunks(2)) {
        entry.1 = word[1];
    }
    result
}

#[test]
fn a_preset_stays_where_it_is_and_the_vmm_sees_what_it_would_see_without_it() {
    let (hook, fake) = held();
    let vm = vm(&hook);
    let vcpus = [vcpu(&hook, vm, &fake, &[]), vcpu(&hook, vm, &fake, &[])];
    let preset = |fd| fake.world().register(fd, MICROCODE) == 5;
    let plan = Arc::clone(&fake.world().plans[0]);
    assert_eq!(plan.filter().verdict(Msr(MICROCODE), Op::Read), Verdict::Allow);
    assert!(preset(vcpus[0]) && preset(vcpus[1]));
    let sees = |fd| {
        let mut entries = [(9, 0), (MICROCODE, 0)];
        assert_eq!(msrs(&hook, fd, KVM_GET_MSRS, &mut entries), 2);
        assert!(preset(fd));
        entries.map(|(_, value)| value)
    };
    assert_eq!(sees(vcpus[0]), [0, 1], "the kernel's own");
    set_errno(EBUSY);
    // As a VMM does it where it resets a vCPU or loads its state; the last is the preset by chance.
    for value in [7, 7, 8, 5] {
        assert_eq!(
            msrs(&hook, vcpus[0], KVM_SET_MSRS, &mut [(MICROCODE, value), (9, value)]),
            2
        );
        assert!(preset(vcpus[0]));
        assert_eq!((sees(vcpus[0]), sees(vcpus[1])), ([value; 2], [0, 1]));
    }
    assert_eq!(errno(), EBUSY);
    // One that breaks off behind the register.
    assert_eq!(
        msrs(&hook, vcpus[1], KVM_SET_MSRS, &mut [(MICROCODE, 7), (99, 7), (9, 7)]),
        1
    );
    assert_eq!(sees(vcpus[1]), [0, 7]);
}

#[test]
fn calls_that_are_no_vcpus_or_meet_no_preset_go_on_as_they_came() {
    let (hook, fake) = held();
    let vm = vm(&hook);
    vcpu(&hook, vm, &fake, &[]);
    fake.world().asked.clear();
    assert_eq!(msrs(&hook, KVM, KVM_GET_MSRS, &mut [(9, 0)]), 1);
    assert_eq!(fake.world().asked, [KVM_GET_MSRS]);

    let (hook, fake) = super::tests::hook(policy());
    fake.world().known = HashMap::from([(MICROCODE, 1)]);
    let vm = super::tests::vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    assert_eq!(msrs(&hook, vcpu, KVM_SET_MSRS, &mut [(MICROCODE, 7)]), 1);
    let world = fake.world();
    assert_eq!((world.register(vcpu, MICROCODE), world.asked.len()), (7, 1));
}

#[test]
fn a_vcpu_on_which_the_kernel_no_longer_holds_a_preset_does_not_run() {
    let (hook, fake) = held();
    let vm = vm(&hook);
    let vcpus = [vcpu(&hook, vm, &fake, &[]), vcpu(&hook, vm, &fake, &[])];
    fake.world().msrs.insert((vcpus[0], MICROCODE), 7);
    fake.world().stuck = Some(MICROCODE);
    assert_eq!(
        (msrs(&hook, vcpus[0], KVM_SET_MSRS, &mut [(9, 7)]), errno()),
        (-1, EACCES)
    );
    assert!(
        fake.world().said[0].contains("no longer holds 0x5 in 0x8b"),
        "{:?}",
        fake.world().said
    );
    assert_eq!((run(&hook, &fake, vcpus[0], &[Ran::Other]).0, errno()), (-1, EACCES));
    assert_eq!(run(&hook, &fake, vcpus[1], &[Ran::Other]).0, 0);
    // Nor is one made where the kernel has no such register.
    fake.world().known.clear();
    assert_eq!((ioctl(&hook, vm, KVM_CREATE_VCPU, 0), errno()), (-1, EACCES));
}

#[test]
fn a_preset_that_does_not_fit_beside_the_vmms_filter_is_the_policys_exit() {
    let (hook, fake) = held();
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    assert_eq!(set_mask(&hook, &fake, vm, 4), 0);
    // Sixteen ranges of the VMM's, one of which the denial of both directions fits into and that of writes does not.
    let mut ranges: Vec<(u32, u32, u32, &[u8])> = (1..16).map(|i| (3, i << 20, 1, &[0_u8; 8][..])).collect();
    ranges.push((3, MICROCODE + 1, 1, &[0; 8]));
    assert_eq!(set_filter(&hook, &fake, vm, raw_filter(0, &ranges)), 0);
    let plan = Arc::clone(fake.world().plans.last().unwrap());
    assert_eq!(
        (plan.presets().len(), plan.filter().verdict(Msr(MICROCODE), Op::Read)),
        (0, Verdict::Deny)
    );
    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Value(5)]);
}

/// A hook whose policy depends on the model: of 1 the revision is fixed, of 2 all is allowed, and there is no other.
fn by_cpuid() -> (Hook<Fake>, Fake, Board) {
    let wanted = Wanted {
        by_cpuid: true,
        ..Wanted::default()
    };
    let (hook, fake, board) = watching(wanted, DecisionMap::deny_all());
    let desk = board.desk().unwrap();
    std::thread::spawn(move || {
        desk.serve(&|leaves| match leaves.iter().find(|leaf| leaf.0 == 1) {
            Some((_, 0, [1, ..])) => Ok(policy().to_bytes()),
            Some((_, 0, [2, ..])) => Ok(DecisionMap::allow_all().to_bytes()),
            other => Err(format!("no such model: {other:?}")),
        })
    });
    (hook, fake, board)
}

/// KVM_SET_CPUID2 with leaf 0 and leaf 1, and errno where it fails.
fn set_model(hook: &Hook<Fake>, fake: &Fake, vcpu: c_int, model: u32) -> Result<(), c_int> {
    // Leaf 1's index says nothing, since its flags do not say so.
    let entries = [[0, 0, 1, 9, 9, 9, 9, 0, 0, 0], [1, 77, 0, model, 0, 0, 0, 0, 0, 0]];
    let words = [2, 0].into_iter().chain(entries.into_iter().flatten());
    fake.world().memory = words.flat_map(u32::to_le_bytes).collect();
    match ioctl(hook, vcpu, KVM_SET_CPUID2, 0) {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

fn verdict(fake: &Fake) -> Verdict {
    let plan = Arc::clone(fake.world().plans.last().unwrap());
    plan.filter().verdict(Msr(MICROCODE), Op::Read)
}

#[test]
fn the_policy_for_a_cpuid_is_in_force_before_the_vcpu_has_it() {
    let (hook, fake, board) = by_cpuid();
    let vm = vm(&hook);
    let vcpus = [vcpu(&hook, vm, &fake, &[]), vcpu(&hook, vm, &fake, &[])];
    let first = Arc::clone(&fake.world().plans[0]);
    assert_eq!(first.filter().verdict(Msr(0x10), Op::Read), Verdict::Deny, "closed");
    for _ in 0..2 {
        assert_eq!((run(&hook, &fake, vcpus[0], &[Ran::Other]).0, errno()), (-1, EACCES));
    }
    assert_eq!(fake.world().said.len(), 1);
    set_errno(EBUSY);
    assert_eq!(set_model(&hook, &fake, vcpus[0], 1), Ok(()));
    assert_eq!(errno(), EBUSY);
    let at_cpuid = Arc::clone(&fake.world().plans_at_cpuid[0]);
    assert_eq!(at_cpuid.filter().verdict(Msr(0x10), Op::Read), Verdict::Allow);
    assert_eq!(at_cpuid.filter().verdict(Msr(MICROCODE), Op::Read), Verdict::Deny);
    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpus[0], &[exit, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Value(5)]);
    // Each vCPU has its own, and the same takes no plan more.
    assert_eq!(run(&hook, &fake, vcpus[1], &[Ran::Other]).0, -1);
    assert_eq!(set_model(&hook, &fake, vcpus[1], 1), Ok(()));
    assert_eq!(run(&hook, &fake, vcpus[1], &[exit, Ran::Other]), (0, None));
    assert_eq!((fake.world().plans.len(), board.refusals()), (2, 0));
    // The VMM's own filter is kept beside it, and other VMs have a policy of their own.
    assert_eq!(set_filter(&hook, &fake, vm, cores_denied()), 0);
    assert_eq!(verdict(&fake), Verdict::Deny);
    let other = super::tests::vm(&hook);
    let vcpu = vcpu(&hook, other, &fake, &[]);
    assert_eq!(set_model(&hook, &fake, vcpu, 2), Ok(()));
    assert_eq!(verdict(&fake), Verdict::Allow);
}

#[test]
fn a_vmm_may_think_better_of_a_cpuid_until_another_vcpu_has_it_too() {
    let (hook, fake, _board) = by_cpuid();
    let vm = vm(&hook);
    let vcpus = [vcpu(&hook, vm, &fake, &[]), vcpu(&hook, vm, &fake, &[])];
    for (model, expected) in [(2, Verdict::Allow), (1, Verdict::Deny), (1, Verdict::Deny)] {
        assert_eq!(set_model(&hook, &fake, vcpus[0], model), Ok(()));
        assert_eq!(verdict(&fake), expected);
    }
    assert_eq!(set_model(&hook, &fake, vcpus[1], 2), Err(EACCES));
    assert!(fake.world().said[0].starts_with("vCPU 1 does not get this CPUID: the policy means something else"));
    assert_eq!(
        (verdict(&fake), run(&hook, &fake, vcpus[1], &[Ran::Other]).0),
        (Verdict::Deny, -1)
    );
    assert_eq!(set_model(&hook, &fake, vcpus[1], 3), Err(EACCES));
    let said = fake.world().said.last().unwrap().clone();
    assert!(
        said.starts_with("vCPU 1 does not get this CPUID: no such model"),
        "{said}"
    );
    assert_eq!(set_model(&hook, &fake, vcpus[1], 1), Ok(()));
    assert_eq!(set_model(&hook, &fake, vcpus[0], 2), Err(EACCES));
    assert_eq!(run(&hook, &fake, vcpus[0], &[Ran::Other]).0, 0);
}

#[test]
fn vcpus_that_get_the_same_cpuid_at_once_get_the_same_policy() {
    let (hook, fake, _board) = by_cpuid();
    for _ in 0..20 {
        let vm = vm(&hook);
        let vcpus: Vec<c_int> = (0..4).map(|_| vcpu(&hook, vm, &fake, &[])).collect();
        assert_eq!(set_model(&hook, &fake, vcpus[0], 1), Ok(()), "the bytes are there");
        let other = super::tests::vm(&hook);
        let vcpus: Vec<c_int> = (0..4).map(|_| vcpu(&hook, other, &fake, &[])).collect();
        std::thread::scope(|scope| {
            for vcpu in &vcpus {
                scope.spawn(|| assert_eq!(ioctl(&hook, *vcpu, KVM_SET_CPUID2, 0), 0));
            }
        });
        hook.closing_range(100, u32::MAX);
    }
    assert!(fake.world().said.is_empty());
}

#[test]
fn a_cpuid_that_the_kernel_or_the_filter_refuses_changes_nothing() {
    let (hook, fake, _board) = by_cpuid();
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    fake.world().refuse_cpuid = true;
    assert_eq!(set_model(&hook, &fake, vcpu, 2), Err(libc::EINVAL));
    assert_eq!(
        (verdict(&fake), run(&hook, &fake, vcpu, &[Ran::Other]).0),
        (Verdict::Deny, -1),
        "closed"
    );
    fake.world().refuse_cpuid = false;
    fake.world().refuse = true;
    assert_eq!(set_model(&hook, &fake, vcpu, 2), Err(EBUSY));
    let said = "vCPU 0 does not get this CPUID: the kernel is busy";
    assert_eq!(fake.world().said.last().unwrap(), said);
    assert!(fake.world().plans_at_cpuid.is_empty());
    fake.world().refuse = false;
    // Bytes that cannot be read, and more leaves than there may be, are the kernel's to refuse.
    fake.world().memory = vec![2, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(ioctl(&hook, vcpu, KVM_SET_CPUID2, 0), 0);
    fake.world().memory = u32::MAX.to_le_bytes().repeat(100);
    assert_eq!(ioctl(&hook, vcpu, KVM_SET_CPUID2, 0), 0);
    assert_eq!(
        (verdict(&fake), run(&hook, &fake, vcpu, &[Ran::Other]).0),
        (Verdict::Deny, -1),
        "closed"
    );
    // What the kernel refuses leaves the vCPU the one that it has.
    assert_eq!(set_model(&hook, &fake, vcpu, 2), Ok(()));
    fake.world().refuse_cpuid = true;
    fake.world().memory = Vec::new();
    assert_eq!(ioctl(&hook, vcpu, KVM_SET_CPUID2, 0), -1);
    assert_eq!(run(&hook, &fake, vcpu, &[Ran::Other]).0, 0);
    fake.world().refuse_cpuid = false;
    // The older call has no index.
    let words = [1, 0, 1, 2, 0, 0, 0, 0_u32];
    fake.world().memory = words.into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(ioctl(&hook, vcpu, KVM_SET_CPUID, 0), 0);
    assert_eq!(
        (verdict(&fake), run(&hook, &fake, vcpu, &[Ran::Other]).0),
        (Verdict::Allow, 0)
    );
}

#[test]
fn the_first_touch_of_each_msr_and_direction_is_learned_and_then_the_kernels() {
    let (hook, fake, board) = watching(mode(Mode::Learn), DecisionMap::allow_all());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let denied = |fake: &Fake, msr, op| {
        let plan = Arc::clone(fake.world().plans.last().unwrap());
        plan.filter().verdict(Msr(msr), op) == Verdict::Deny
    };
    assert!(denied(&fake, MICROCODE, Op::Read) && denied(&fake, u32::MAX - 1, Op::Write));
    let (first, write) = (
        Ran::Msr(read(MICROCODE), Reason::Filter),
        Ran::Msr(Access::Write { msr: Msr(9), value: 3 }, Reason::Filter),
    );
    // The second is one that another vCPU made before the filter was opened.
    assert_eq!(run(&hook, &fake, vcpu, &[first, first, write, Ran::Other]), (0, None));
    assert_eq!(taken_back_and_answered(&fake), (3, 0));
    assert!(!denied(&fake, MICROCODE, Op::Read) && denied(&fake, MICROCODE, Op::Write));
    assert!(!denied(&fake, 9, Op::Write) && denied(&fake, 9, Op::Read));
    let mut events = Vec::new();
    board
        .reader()
        .drain(&mut |event, _| events.push((event.op, event.msr.0, event.value, event.did.name())));
    assert_eq!(events, [(Op::Read, MICROCODE, 0, "allow"), (Op::Write, 9, 3, "allow")]);
}

#[test]
fn an_msr_that_no_filter_can_open_faults_and_does_not_go_round_for_ever() {
    let (hook, fake, board) = watching(mode(Mode::Learn), DecisionMap::allow_all());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let exit = Ran::Msr(read(u32::MAX), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, exit, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Fault; 2]);
    let mut events = 0;
    board
        .reader()
        .drain(&mut |event, _| events += u32::from(event.did == msrgate_core::Did::Allow));
    assert_eq!(events, 1);
}

#[test]
fn what_the_vmm_denies_is_learned_once_and_then_the_vmms() {
    let (hook, fake, board) = watching(mode(Mode::Learn), DecisionMap::allow_all());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    assert_eq!(set_mask(&hook, &fake, vm, 4), 0);
    assert_eq!(set_filter(&hook, &fake, vm, cores_denied()), 0);
    let exit = Ran::Msr(read(CORES), Reason::Filter);
    let left = RawExit {
        access: read(CORES),
        reason: 4,
    };
    assert_eq!(run(&hook, &fake, vcpu, &[exit, exit]), (0, Some(left)));
    assert_eq!((fake.world().taken_back, board.reader().drain(&mut |_, _| ())), (1, 1));
    // Who asked for no exits gets the kernel's fault.
    assert_eq!(set_mask(&hook, &fake, vm, 0), 0);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Fault]);
}

#[test]
fn what_is_passed_on_is_written_down_each_time_and_the_vmms_stays_its_own() {
    let (hook, fake, board) = watching(mode(Mode::LearnAll), DecisionMap::allow_all());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let write = Access::Write { msr: Msr(9), value: 3 };
    let (read, write) = (
        Ran::Msr(read(MICROCODE), Reason::Filter),
        Ran::Msr(write, Reason::Filter),
    );
    // The fake kernel knows no MSR.
    assert_eq!(run(&hook, &fake, vcpu, &[read, write, read, Ran::Other]), (0, None));
    assert_eq!(fake.world().answers, [Outcome::Fault; 3]);
    let mut events = Vec::new();
    board
        .reader()
        .drain(&mut |event, _| events.push((event.msr.0, event.why)));
    let refused = Some(Why::KernelRefused);
    assert_eq!(events, [(MICROCODE, refused), (9, refused), (MICROCODE, refused)]);
    assert_eq!(set_mask(&hook, &fake, vm, 4), 0);
    assert_eq!(set_filter(&hook, &fake, vm, cores_denied()), 0);
    let exit = Ran::Msr(super::tests::read(CORES), Reason::Filter);
    assert!(run(&hook, &fake, vcpu, &[exit]).1.is_some());
}

#[test]
fn an_audit_watches_what_the_policy_decides_and_leaves_the_rest_alone() {
    let (hook, fake, board) = watching(mode(Mode::Audit), policy());
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let plan = Arc::clone(&fake.world().plans[0]);
    let denied = |msr, op| plan.filter().verdict(Msr(msr), op) == Verdict::Deny;
    assert!(denied(MICROCODE, Op::Read) && !denied(MICROCODE, Op::Write) && !denied(9, Op::Read));
    let exit = Ran::Msr(read(MICROCODE), Reason::Filter);
    assert_eq!(run(&hook, &fake, vcpu, &[exit, Ran::Other]), (0, None));
    assert_eq!(taken_back_and_answered(&fake), (1, 0));
    let mut seen = Vec::new();
    board
        .reader()
        .drain(&mut |event, _| seen.push((event.msr.0, event.did.name(), event.rule)));
    assert_eq!(seen, [(MICROCODE, "value", Some(0))]);
}

#[test]
fn where_there_is_no_room_to_open_one_more_all_is_opened_and_nothing_is_changed() {
    let far = |slot: u32| MsrRange::single(Msr(0x4000_0000 + (slot << 20)));
    let allowed = (0..16).map(|slot| (far(slot), Decision::of(ReadAction::Allow)));
    let map = DecisionMap {
        reads: Intervals::first_match(Decision::of(ReadAction::Deny), allowed.collect::<Vec<_>>()),
        ..DecisionMap::deny_all()
    };
    let (hook, fake, _board) = watching(mode(Mode::Audit), map);
    let vm = vm(&hook);
    let vcpu = vcpu(&hook, vm, &fake, &[]);
    let touch = |msr| [Ran::Msr(read(msr), Reason::Filter), Ran::Other];
    for _ in 0..2 {
        assert_eq!(run(&hook, &fake, vcpu, &touch(0x10)), (0, None));
    }
    assert_eq!(taken_back_and_answered(&fake), (2, 0));
    let open = Arc::clone(fake.world().plans.last().unwrap());
    assert_eq!(open.filter().verdict(Msr(0x11), Op::Read), Verdict::Allow);
    let said = fake.world().said.clone();
    assert!(
        said.len() == 1 && said[0].starts_with("what the guests touch from here on is not told: the policy needs 17"),
        "{said:?}"
    );
}

#[test]
fn a_weaker_filter_is_one_that_allows_more() {
    let filter = |bit| {
        Filter::new(
            Verdict::Allow,
            vec![FilterRange::new(7, 2, Ops::WRITE, vec![bit]).unwrap()],
        )
        .unwrap()
    };
    assert!(is_weaker(&filter(0), &filter(2)));
    assert!(!is_weaker(&filter(2), &filter(0)));
    assert!(is_weaker(&filter(1), &filter(2)), "elsewhere it is stronger");
}
