//! `instructions`: how many the access path takes, counted by valgrind. These figures repeat.
//!
//! The program runs itself under `callgrind`, once for some accesses and once for none: the difference is theirs.

use std::env;
use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;

use clap::ValueEnum;
use kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_23 as kvm_run_msr;
use kvm_ioctls::VcpuFd;
use msrgate_core::{
    Access, ActionTable, Exit, FaultCause, Filter, FlatFilter, Msr, MsrBackend, MsrRange, Op, ReadAction, Reason,
    Reasons, abi,
};
use msrgate_engine::{Instruction, Intercepts, Msrs, Path, Refusal, Vcpu, Vm};
use msrgate_kvm::{Dispatch, VcpuGate};
use msrgate_plan::{Decision, DecisionMap, Intervals, Plan};

use crate::figure::Figure;
use crate::live::Looping;
use crate::lookup::{Linear, last_of};
use crate::{Effort, Measured, Missing};

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// The loop alone, which all others have around them.
    Nothing,
    WindowVerdict,
    PagesVerdict,
    WalkedFirst,
    WalkedLast,
    Answer,
    Dispatch,
    EngineAllowed,
    EngineDenied,
}

impl Case {
    fn what(self) -> &'static str {
        match self {
            Case::Nothing => "the loop",
            Case::WindowVerdict => "a verdict, 1 range",
            Case::PagesVerdict => "a verdict, 16 ranges",
            Case::WalkedFirst => "the walk, 1 range",
            Case::WalkedLast => "the walk, the last of 16 ranges matches",
            Case::Answer => "an answer of the table, 100 entries",
            Case::Dispatch => "a vCPU's gate, without KVM_RUN",
            Case::EngineAllowed => "the engine, an allowed read",
            Case::EngineDenied => "the engine, a denied read and its answer",
        }
    }
}

pub(crate) fn measure(effort: Effort) -> Measured {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return Err(Missing::Skipped("there is no valgrind".to_owned()));
    }
    let times = effort.of(20_000, 1_000);
    let of = |case: Case| -> Result<f64, String> {
        let [some, none] = [times, 0].map(|times| counted(case, times));
        Ok((some? - none?) / times as f64)
    };
    let nothing = of(Case::Nothing)?;
    let figure = |case: Case| of(case).map(|count| Figure::new(case.what(), "instructions", count - nothing));
    let beside = |ours: Figure, theirs: &Figure| ours.beside("the walk over the ranges", theirs.ours);
    let (first, last) = (figure(Case::WalkedFirst)?, figure(Case::WalkedLast)?);
    let mut figures = vec![
        beside(figure(Case::WindowVerdict)?, &first),
        beside(figure(Case::PagesVerdict)?, &last),
        figure(Case::Answer)?,
        figure(Case::EngineAllowed)?,
        figure(Case::EngineDenied)?,
    ];
    // Making the gate takes a VM; answering does not.
    if kvm_ioctls::Kvm::new().is_ok() {
        figures.push(figure(Case::Dispatch)?);
    }
    Ok(figures)
}

/// Instructions of this program, doing `case` so many times.
fn counted(case: Case, times: usize) -> Result<f64, String> {
    let this = env::current_exe().map_err(|error| error.to_string())?;
    let name = case
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned());
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(this);
    command.args(["--count", &name, "--times", &times.to_string()]);
    let done = command
        .output()
        .map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let told = String::from_utf8_lossy(&done.stderr);
    let count = told
        .lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    count
        .filter(|_| done.status.success())
        .ok_or_else(|| format!("{command:?}: {}\n{told}", done.status))
}

/// Does what is counted, in a process of its own.
pub(crate) fn repeat(case: Case, times: usize) -> Result<(), String> {
    let failed = |error: &dyn ToString| error.to_string();
    let last = last_of(16);
    let filter = |ranges| crate::lookup::filter(ranges).map_err(|error| failed(&error));
    match case {
        Case::Nothing => again(times, || ()),
        Case::WindowVerdict => verdicts(times, &FlatFilter::new(filter(1)?), last_of(1)),
        Case::PagesVerdict => verdicts(times, &FlatFilter::new(filter(16)?), last),
        Case::WalkedFirst => walks(times, &Linear::new(&filter(1)?), last_of(1)),
        Case::WalkedLast => walks(times, &Linear::new(&filter(16)?), last),
        Case::Answer => {
            let plan = plan()?;
            answers(times, plan.table());
        }
        Case::Dispatch => {
            let kvm = kvm_ioctls::Kvm::new().map_err(|error| failed(&error))?;
            let mut guest = Looping::new(&kvm, Effort::Quick)?;
            let gate = guest.gate(&kvm, plan()?)?;
            dispatches(times, &gate, guest.vcpu()?)?;
        }
        Case::EngineAllowed => engine(times, Filter::allow_all()),
        Case::EngineDenied => engine(times, plan()?.filter().clone()),
    }
    Ok(())
}

fn again(times: usize, mut work: impl FnMut()) {
    for _ in 0..times {
        work();
        black_box(());
    }
}

fn verdicts(times: usize, lookup: &FlatFilter, msr: Msr) {
    again(times, || _ = black_box(lookup.verdict(black_box(msr), Op::Read)));
}

fn walks(times: usize, linear: &Linear, msr: Msr) {
    again(times, || _ = black_box(linear.verdict(black_box(msr), Op::Read)));
}

/// Every second of 200 MSRs reads as its own number.
fn plan() -> Result<Plan, String> {
    let reads = (0..100).map(|rule: u32| {
        let decision = Decision::of(ReadAction::Value(rule.into())).by(rule);
        (MsrRange::single(Msr(0x4000_0000 + 2 * rule)), decision)
    });
    let map = DecisionMap::allow_all().with_reads(Intervals::first_match(Decision::of(ReadAction::Allow), reads));
    Plan::compile(&map).map_err(|error| error.to_string())
}

/// One of those.
const FIXED: Msr = Msr(0x4000_0000 + 2 * 77);

fn answers(times: usize, table: &ActionTable) {
    let mut state = table.vcpu_state();
    let exit = Exit::new(Access::Read { msr: FIXED }, Reason::Filter);
    again(times, || {
        _ = black_box(table.answer(black_box(exit), &mut state, &mut Nobody))
    });
}

fn dispatches(times: usize, gate: &VcpuGate, vcpu: &mut VcpuFd) -> Result<(), String> {
    let mut answered = 0;
    again(times, || {
        // What the kernel leaves.
        let run = vcpu.get_kvm_run();
        run.exit_reason = abi::EXIT_X86_RDMSR;
        run.__bindgen_anon_1.msr = kvm_run_msr {
            reason: Reason::Filter as u32,
            index: FIXED.0,
            ..Default::default()
        };
        answered += usize::from(matches!(gate.dispatch_vcpu(black_box(vcpu)), Dispatch::Answered(_)));
    });
    if answered == times {
        Ok(())
    } else {
        Err("the gate does not answer".to_owned())
    }
}

fn engine(times: usize, filter: Filter) {
    let vm = Arc::new(Vm::new());
    vm.set_reasons(Reasons::of(Reason::Filter));
    vm.set_filter(filter);
    let mut vcpu = Vcpu::new(vm, Intercepts::all());
    again(times, || {
        let rdmsr = Instruction::Rdmsr { rcx: FIXED.0.into() };
        _ = black_box(vcpu.execute(black_box(rdmsr), Path::VmExit, &mut Nobody));
        if vcpu.pending().is_some() {
            _ = black_box(vcpu.answer_read(Ok(1)));
        }
    });
}

/// Has an answer to everything, and asks nobody.
struct Nobody;

impl Msrs for Nobody {
    fn read(&mut self, _: Msr) -> Result<u64, Refusal> {
        Ok(1)
    }

    fn write(&mut self, _: Msr, _: u64) -> Result<(), Refusal> {
        Ok(())
    }
}

impl MsrBackend for Nobody {
    fn kernel_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Ok(1)
    }

    fn kernel_write(&mut self, _: Msr, _: u64) -> Result<(), FaultCause> {
        Ok(())
    }

    fn host_read(&mut self, _: Msr) -> Result<u64, FaultCause> {
        Ok(1)
    }

    fn handler_read(&mut self, _: &str, _: Msr) -> Result<u64, FaultCause> {
        Ok(1)
    }

    fn handler_write(&mut self, _: &str, _: Msr, _: u64) -> Result<(), FaultCause> {
        Ok(())
    }
}
