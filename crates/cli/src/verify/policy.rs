//! A policy in force on the live kernel, against the same plan on the engine.

use std::collections::BTreeSet;
use std::path::Path as FilePath;
use std::sync::Arc;

use msrgate_core::{Access, Exit as MsrExit, Msr, MsrRange, Op, Outcome, ReadAction, WriteAction, abi::MAX_RANGE_MSRS};
use msrgate_engine::Path;
use msrgate_kvm::{Fault, Handler, Handlers, InstallError};

use super::engine::{Answered, Engine};
use super::host::Host;
use super::live::{Got, Live, Machine};
use super::pair::{Both, Relation, left_alone, relation};
use super::report::{Disagreement, Report};
use super::twin::Twin;
use super::{guest_failed, progress};
use crate::exit::{Exit, Failure};
use crate::load::Loaded;
use crate::replay::with_source;

/// Which MSRs are tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reach {
    /// The ends of each range and rule and their neighbours, and the places where kernels are odd.
    Boundaries,
    /// Each MSR of them too.
    Full,
}

/// Disagreements that are told of one policy.
const TOLD: usize = 20;
/// Accesses between two looks at what they came to.
const BATCH: usize = 2000;

pub(super) fn run(
    machine: &Machine,
    host: &Host,
    report: &mut Report,
    path: &FilePath,
    loaded: Loaded,
    reach: Reach,
) -> Result<(), Failure> {
    let msrs = msrs(&loaded, reach);
    let plan = Arc::new(loaded.plan);
    let mut twin = Twin::new(machine)?;

    let mut engine = Engine::new(host.profile);
    engine
        .vm
        .install(plan.filter().clone(), plan.reasons(), plan.table().clone());
    let mut state = plan.table().vcpu_state();

    let mut live = Live::new(machine.guest(1)?);
    let refused = |error: &dyn std::error::Error| Failure::Line(Exit::Machine, with_source(error));
    let handlers = plan.table().handlers();
    let handlers = handlers.fold(Handlers::new(), |handlers, name| handlers.with(name, Nobody));
    let installed = machine.probed.install(live.guest().vm(), Arc::clone(&plan), handlers);
    let gate = match installed {
        // That is the machine's lack and not the policy's: others go on.
        Err(error @ InstallError::HostMsrs { .. }) => {
            report.skipped.push(format!("{}: {error}", path.display()));
            return Ok(());
        }
        installed => installed.map_err(|error| refused(&error))?,
    };
    let vcpu = live.guest().vcpu(0).map_err(|error| guest_failed(&error))?;
    let vcpu_gate = gate.vcpu(vcpu.fd(), 0).map_err(|error| refused(&error))?;
    report.filters += 1;

    let bar = progress(msrs.len() as u64 * 3);
    let mut told = 0;
    let before = report.bypasses;
    // Reads again after the writes: some MSRs remember.
    for op in [Op::Read, Op::Write, Op::Read] {
        let bypassed = report.bypasses > before;
        for batch in msrs.chunks(BATCH) {
            let mut made = Vec::new();
            let mut expected = Vec::new();
            let answer = &mut |exit: MsrExit, twin: &mut Twin| -> Answered {
                let answer = plan.table().answer(exit, &mut state, twin);
                (answer.outcome, Some(answer.did))
            };
            for msr in batch {
                // What the kernel took past the filter, the plan does not remember.
                if op == Op::Read && bypassed && *msr == Msr::TSC_DEADLINE {
                    continue;
                }
                for value in values(&loaded.map.writes().get(*msr).action, &mut engine, &mut twin, *msr, op) {
                    let access = match op {
                        Op::Read => Access::Read { msr: *msr },
                        Op::Write => Access::Write { msr: *msr, value },
                    };
                    if let Some(got) = engine.access(access, Path::VmExit, &mut twin, answer) {
                        made.push(access);
                        expected.push(got);
                    }
                }
            }
            let seen = live.run(&made, &mut |pending| {
                pending.dispatch(&vcpu_gate);
            })?;
            report.accesses += made.len() as u64;
            for ((access, live), engine_got) in made.into_iter().zip(seen).zip(expected) {
                let got = Both {
                    live,
                    engine: engine_got,
                };
                let relation = if by_itself(&got, access, &loaded.map.reads().get(access.msr()).action, &mut twin) {
                    Relation::Same
                } else {
                    relation(&got, access, &mut twin, |twin| {
                        let vendor = host.fastpath(access)?;
                        engine.access(access, Path::Fastpath(vendor), twin, answer)
                    })
                };
                match relation {
                    Relation::Same => {}
                    Relation::Bypass => report.bypasses += 1,
                    Relation::Differ if told < TOLD => {
                        told += 1;
                        report.disagreements.push(Disagreement {
                            what: format!("{} {} under {}", access.op(), access.msr(), path.display()),
                            live: got.live.to_string(),
                            engine: got.engine.to_string(),
                            candidate: None,
                            case: None,
                        });
                    }
                    Relation::Differ => {}
                }
            }
            bar.inc(batch.len() as u64);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// The MSRs to try, in order.
fn msrs(loaded: &Loaded, reach: Reach) -> Vec<Msr> {
    let mut msrs: BTreeSet<Msr> = BTreeSet::new();
    let mut range = |range: MsrRange| {
        let (first, last) = (range.first(), range.last());
        msrs.extend([Msr(first.0.wrapping_sub(1)), first, last, Msr(last.0.wrapping_add(1))]);
        if reach == Reach::Full && range.len() <= u64::from(MAX_RANGE_MSRS) {
            msrs.extend(range.iter());
        }
    };
    for each in loaded.plan.filter().ranges() {
        if let Some(span) = each.span() {
            range(span);
        }
    }
    // Each rule's share of the MSRs, which is at least as fine as its own ranges.
    loaded.map.reads().iter().for_each(|(each, _)| range(each));
    loaded.map.writes().iter().for_each(|(each, _)| range(each));
    // x2APIC and its neighbours; TSC_DEADLINE; what wraps; edges of the hardware's bitmaps.
    msrs.extend((0x7ff..=0x900).map(Msr));
    msrs.extend((0xffff_ffe0..=0xffff_ffff).map(Msr));
    msrs.extend(
        [
            0,
            1,
            0x6e0,
            0x1fff,
            0x2000,
            0xbfff_ffff,
            0xc000_0000,
            0xc000_2000,
            0xc001_2000,
        ]
        .map(Msr),
    );
    msrs.into_iter().collect()
}

/// The values to write to an MSR; for a read one, which does not count.
fn values(action: &WriteAction, engine: &mut Engine, twin: &mut Twin, msr: Msr, op: Op) -> Vec<u64> {
    const ANY: u64 = 0x1234_5678_9abc_def0;
    if op == Op::Read {
        return vec![0];
    }
    let reaches = matches!(
        action,
        WriteAction::Mask { .. } | WriteAction::Only(_) | WriteAction::Once
    );
    let allowed = engine.allows(msr, op);
    if (allowed || reaches) && left_alone(msr) {
        return Vec::new();
    }
    if !allowed && !reaches {
        return vec![ANY];
    }
    let held = twin.value(msr);
    match action {
        _ if allowed => vec![held],
        // What it holds, and one of the bits changed that may not be.
        WriteAction::Mask { may_change, .. } => {
            let locked = !may_change & may_change.wrapping_add(1);
            vec![held, held ^ locked]
        }
        WriteAction::Only(values) => {
            let listed = values.iter().copied().take(4);
            let unlisted = (0..).find(|value| !values.contains(value));
            listed.chain(unlisted).collect()
        }
        _ => vec![held, held],
    }
}

/// Whether a difference in value is that of a register which user space looks at and which changes by itself.
fn by_itself(got: &Both<Got>, access: Access, action: &ReadAction, twin: &mut Twin) -> bool {
    let Both { live, engine } = got;
    let (Outcome::Value(_), Outcome::Value(_)) = (live.sees, engine.sees) else {
        return false;
    };
    let same_but_value = Got {
        sees: engine.sees,
        ..live.clone()
    } == *engine;
    let follows = match action {
        // The CPU that runs this thread may be another one.
        ReadAction::Host => true,
        ReadAction::Mask { .. } => twin.moves(access.msr()),
        _ => false,
    };
    same_but_value && follows && access.op() == Op::Read
}

/// Stands for the handlers that a policy names and this command has no code for.
struct Nobody;

impl Handler for Nobody {
    fn read(&self, _: u32, _: Msr) -> Result<u64, Fault> {
        Err(Fault)
    }

    fn write(&self, _: u32, _: Msr, _: u64) -> Result<(), Fault> {
        Err(Fault)
    }
}
