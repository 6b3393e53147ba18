//! A policy in force on the live kernel, against the same plan on the engine.

use std::collections::BTreeSet;
use std::sync::Arc;

use msrgate_core::{
    Access, Exit as MsrExit, Msr, MsrRange, Op, Outcome, ReadAction, ReadSource, WriteAction, WriteTarget,
    abi::MAX_RANGE_MSRS,
};
use msrgate_engine::Path;
use msrgate_kvm::{Handlers, InstallError};
use msrgate_plan::{DecisionMap, Plan};

use crate::VerifyError;
use crate::engine::{Answered, Engine};
use crate::live::{AccessResult, Live};
use crate::pair::{Both, Relation, left_alone, relation};
use crate::unfiltered::Unfiltered;
use crate::{Disagreement, Report};
use crate::{Machine, Progress};

/// Which MSRs are tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// The ends of each range and rule and their neighbours, and the places where kernels are odd.
    Boundaries,
    /// Each MSR of them too.
    Full,
}

/// Disagreements that are told of one policy.
const TOLD: usize = 20;
/// Accesses between two looks at what they came to.
const BATCH: usize = 2000;

impl Machine {
    /// Puts a policy in force and compares the accesses around its boundaries. Reports call it `name`; `plan` is that of
    /// `map`.
    pub fn policy(
        &self,
        name: &str,
        map: &DecisionMap,
        plan: Arc<Plan>,
        reach: Reach,
        progress: Progress<'_>,
    ) -> Result<Report, VerifyError> {
        let mut report = Report::default();
        let msrs = msrs(map, &plan, reach);
        let mut unfiltered = Unfiltered::new(self)?;

        let mut engine = Engine::new(self.kernel.profile());
        engine
            .vm
            .install(plan.filter().clone(), plan.reasons(), plan.table().clone());
        let mut state = plan.table().vcpu_state();

        let mut live = Live::new(self.guest(1)?);
        let handlers = Handlers::faulting(plan.table().handlers());
        let gate = match self.probed.install(live.guest().vm(), Arc::clone(&plan), handlers) {
            // That is the machine's lack and not the policy's: others go on.
            Err(error @ InstallError::HostMsrs { .. }) => {
                report.skipped.push(format!("{name}: {error}"));
                return Ok(report);
            }
            installed => installed?,
        };
        let vcpu = live.guest().vcpu(0)?;
        let vcpu_gate = gate.vcpu(vcpu.fd(), 0)?;
        report.filters += 1;

        let (all, mut done) = (msrs.len() as u64 * 3, 0);
        let mut told = 0;
        // Reads again after the writes: some MSRs remember.
        for op in [Op::Read, Op::Write, Op::Read] {
            let bypassed = report.bypasses > 0;
            for batch in msrs.chunks(BATCH) {
                let mut made = Vec::new();
                let mut expected = Vec::new();
                let answer = &mut |exit: MsrExit, unfiltered: &mut Unfiltered| -> Answered {
                    let answer = plan.table().answer(exit, &mut state, unfiltered);
                    (answer.outcome, Some(answer.did))
                };
                for msr in batch {
                    // What the kernel took past the filter, the plan does not remember.
                    if op == Op::Read && bypassed && *msr == Msr::TSC_DEADLINE {
                        continue;
                    }
                    for value in values(&map.writes().get(*msr).action, &mut engine, &mut unfiltered, *msr, op) {
                        let access = match op {
                            Op::Read => Access::Read { msr: *msr },
                            Op::Write => Access::Write { msr: *msr, value },
                        };
                        if let Some(got) = engine.access(access, Path::VmExit, &mut unfiltered, answer) {
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
                    let relation = if by_itself(&got, access, &map.reads().get(access.msr()).action, &mut unfiltered) {
                        Relation::Same
                    } else {
                        relation(&got, access, &mut unfiltered, |unfiltered| {
                            let vendor = self.kernel.fastpath(access)?;
                            engine.access(access, Path::Fastpath(vendor), unfiltered, answer)
                        })
                    };
                    match relation {
                        Relation::Same => {}
                        Relation::Bypass => report.bypasses += 1,
                        Relation::Differ if told < TOLD => {
                            told += 1;
                            report.disagreements.push(Disagreement::new(
                                format!("{} {} under {}", access.op(), access.msr(), name),
                                got.live.to_string(),
                                got.engine.to_string(),
                            ));
                        }
                        Relation::Differ => {}
                    }
                }
                done += batch.len() as u64;
                progress(done, all);
            }
        }
        Ok(report)
    }
}

/// The MSRs to try, in order.
fn msrs(map: &DecisionMap, plan: &Plan, reach: Reach) -> Vec<Msr> {
    let mut msrs: BTreeSet<Msr> = BTreeSet::new();
    let mut range = |range: MsrRange| {
        let (first, last) = (range.first(), range.last());
        msrs.extend([Msr(first.0.wrapping_sub(1)), first, last, Msr(last.0.wrapping_add(1))]);
        if reach == Reach::Full && range.len() <= u64::from(MAX_RANGE_MSRS) {
            msrs.extend(range.iter());
        }
    };
    for each in plan.filter().ranges() {
        if let Some(span) = each.span() {
            range(span);
        }
    }
    // Each rule's share of the MSRs, which is at least as fine as its own ranges.
    map.reads().iter().for_each(|(each, _)| range(each));
    map.writes().iter().for_each(|(each, _)| range(each));
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
fn values(action: &WriteAction, engine: &mut Engine, unfiltered: &mut Unfiltered, msr: Msr, op: Op) -> Vec<u64> {
    const ANY: u64 = 0x1234_5678_9abc_def0;
    if op == Op::Read {
        return vec![0];
    }
    let reaches = action.needs_exit() && action.target() == WriteTarget::Register;
    let allowed = engine.allows(msr, op);
    if (allowed || reaches) && left_alone(msr) {
        return Vec::new();
    }
    if !allowed && !reaches {
        return vec![ANY];
    }
    let held = unfiltered.value(msr);
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
fn by_itself(got: &Both<AccessResult>, access: Access, action: &ReadAction, unfiltered: &mut Unfiltered) -> bool {
    let Both { live, engine } = got;
    let (Outcome::Value(_), Outcome::Value(_)) = (live.sees, engine.sees) else {
        return false;
    };
    let same_but_value = AccessResult {
        sees: engine.sees,
        ..live.clone()
    } == *engine;
    let follows = match action.source() {
        // The CPU that runs this thread may be another one.
        ReadSource::Host => true,
        ReadSource::Register => action.needs_exit() && unfiltered.moves(access.msr()),
        _ => false,
    };
    same_but_value && follows && access.op() == Op::Read
}
