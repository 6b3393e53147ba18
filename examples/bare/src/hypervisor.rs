//! What all processors share: the engine's VM, the two policies, and how a filter is replaced while other processors run the
//! guest.
//!
//! A processor says that it goes into the guest *before* it picks up a filter, and says that it left *after* it left. Whoever
//! replaces a filter installs it first, then looks at the others: one that is out will pick the new filter up; one that is in
//! gets NMIs, which make a guest leave, until that processor has left. So when the guest's write is over, no processor runs under
//! an older filter. A processor that waits is out of the guest itself, so two that replace at
//! once wait for each other's exits, never for each other's end.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use msrgate_core::{ActionTable, FlatFilter, Reasons, VcpuState};
use msrgate_engine::Vm;
use msrgate_plan::Plan;

use crate::counts::Counts;
use crate::{heap, machine, say};

/// What `build.rs` made of `policy.toml` and `second.toml`.
const PLANS: [&[u8]; 2] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/policy")),
    include_bytes!(concat!(env!("OUT_DIR"), "/second")),
];

/// The delivery mode and trigger of an NMI, in a local APIC's command.
const NMI: u32 = 0x4400;

/// Rounds of waiting until another NMI is sent: far more than one takes, some tenths of a second in all.
const LATE: u64 = 50_000;

/// The machine under the guest.
pub(crate) struct Hypervisor {
    pub(crate) vm: Arc<Vm>,
    rules: [Rules; 2],
    pub(crate) cpus: Vec<Cpu>,
    pub(crate) amd: bool,
    pub(crate) port: u16,
    pub(crate) options: Options,
    /// Heap allocations before the guest started, and those that replacing a filter took since.
    allocations: [AtomicU64; 2],
}

/// What the command line asks for: among it, ways of going wrong that a test is to notice.
#[derive(Clone, Copy, Default)]
pub(crate) struct Options {
    /// The hardware reads a copy of the engine's bitmap.
    pub(crate) copy: bool,
    /// WRONG: the copy follows only what `pick_up` itself found, as if nothing told of what `execute` took over.
    pub(crate) untold: bool,
    /// WRONG: nobody kicks processors that run the guest.
    pub(crate) no_kick: bool,
    /// No Linux: somebody outside of the machine says what the guest does.
    pub(crate) cases: bool,
}

/// What a plan puts a VM under.
struct Rules {
    filter: Arc<FlatFilter>,
    reasons: Reasons,
    table: Arc<ActionTable>,
}

/// One processor.
pub(crate) struct Cpu {
    /// Of its local APIC.
    pub(crate) id: u32,
    /// Odd while it may be in the guest.
    turns: AtomicU64,
    /// A kick is on its way to it.
    kicked: AtomicBool,
    pub(crate) counts: Counts,
}

impl Hypervisor {
    pub(crate) fn new(processors: &[u32], amd: bool, port: u16, command_line: &str) -> Hypervisor {
        let rules = PLANS.map(|bytes| {
            let plan = Plan::from_bytes(bytes).expect("a plan of this version");
            Rules {
                filter: plan.filter().clone().into(),
                reasons: plan.reasons(),
                table: Arc::new(plan.table().clone()),
            }
        });
        let asks = |option: &str| command_line.split(' ').any(|word| word == option);
        let options = Options {
            copy: asks("bare.copy") || asks("bare.untold"),
            untold: asks("bare.untold"),
            no_kick: asks("bare.no_kick"),
            cases: asks("bare.cases"),
        };
        let cpus = processors.iter().map(|id| Cpu {
            id: *id,
            turns: AtomicU64::new(0),
            kicked: AtomicBool::new(false),
            counts: Counts::new(),
        });
        let hypervisor = Hypervisor {
            vm: Arc::new(Vm::new()),
            rules,
            cpus: cpus.collect(),
            amd,
            port,
            options,
            allocations: Default::default(),
        };
        hypervisor.install(0);
        hypervisor
    }

    fn install(&self, which: usize) {
        let Rules { filter, reasons, table } = &self.rules[which];
        self.vm.install(Arc::clone(filter), *reasons, Arc::clone(table));
    }

    /// What a vCPU's actions remember, for either table.
    pub(crate) fn states(&self) -> [VcpuState; 2] {
        [0, 1].map(|which: usize| self.rules[which].table.vcpu_state())
    }

    /// Whose state a table goes with.
    pub(crate) fn which(&self, table: &Arc<ActionTable>) -> usize {
        usize::from(Arc::ptr_eq(table, &self.rules[1].table))
    }

    /// Puts the VM under the other policy, for processor `number`, whose guest asked for it.
    pub(crate) fn replace(&self, number: usize, which: usize) {
        let before = heap::allocations();
        self.install(which);
        self.allocations[1].fetch_add(heap::allocations() - before, SeqCst);
        if self.options.no_kick {
            return;
        }
        for cpu in self
            .cpus
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != number)
            .map(|(_, cpu)| cpu)
        {
            let turn = cpu.turns.load(SeqCst);
            if turn % 2 == 0 {
                continue;
            }
            for round in 0_u64.. {
                if cpu.turns.load(SeqCst) != turn {
                    break;
                }
                // On SVM one that is on its way will come to an exit; what did not come in so long is lost, which no processor
                // does, but QEMU. On VMX it may have come before the entry, and be gone.
                let late = round % LATE == LATE - 1;
                if !cpu.kicked.swap(true, SeqCst) || !self.amd || late {
                    machine::interprocessor(cpu.id, NMI);
                }
                machine::pause(20_000);
            }
        }
    }

    /// From here on allocations count; the last processor that starts says so.
    pub(crate) fn starts(&self) {
        self.allocations[0].store(heap::allocations(), SeqCst);
    }

    /// The summary, on the second serial line.
    pub(crate) fn report(&self) {
        let [before, replacing] = self.allocations.each_ref().map(|count| count.load(SeqCst));
        let since = heap::allocations() - before;
        // Linux has looked at the line meanwhile.
        machine::Serial::set_up();
        for (number, cpu) in self.cpus.iter().enumerate() {
            cpu.counts.report(number);
        }
        say!("allocations {} replacing {replacing}", since - replacing);
        say!("end");
        machine::Serial.flush();
    }
}

impl Cpu {
    /// Whether it has gone into the guest yet.
    pub(crate) fn is_ready(&self) -> bool {
        self.turns.load(SeqCst) > 0
    }

    /// It may be in the guest from now on.
    pub(crate) fn enters(&self) {
        self.turns.fetch_add(1, SeqCst);
    }

    /// It is out.
    pub(crate) fn left(&self) {
        self.turns.fetch_add(1, SeqCst);
    }

    /// Whether an NMI is the kick that was on its way, and not the guest's.
    pub(crate) fn was_kicked(&self) -> bool {
        self.kicked.swap(false, SeqCst)
    }
}
