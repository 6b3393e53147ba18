//! Random calls on the live kernel and on the engine.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use msrgate_core::Access;

use crate::VerifyError;
use crate::case::{Call, CallResult, Case, Descriptor, RawFilter, Step, Target};
use crate::generate;
use crate::pair::{Both, Compared, Pair, Relation};
use crate::rng::Rng;
use crate::shrink::{StepResult, case, shrink};
use crate::unfiltered::Unfiltered;
use crate::{Disagreement, Report};
use crate::{Machine, Progress};

/// Candidates of one VM, which starts without a filter.
const BLOCK: u64 = 250;
/// Accesses after a call that was refused.
const AFTER_REFUSAL: usize = 6;
/// Disagreements that are shrunk and told.
const TOLD: usize = 5;
/// An accepted filter is waited for, by sleeping, far longer than it is worked on: so many VMs take turns.
const THREADS: usize = 8;

impl Machine {
    /// Makes up random calls, most of them wrong, and compares what they give and, by up to so many accesses under each
    /// filter that is accepted, what they do. The same seed gives the same calls.
    pub fn random(
        &self,
        seed: u64,
        candidates: u64,
        accesses: usize,
        progress: Progress<'_>,
    ) -> Result<Report, VerifyError> {
        let blocks = candidates.div_ceil(BLOCK);
        let (next, done, found) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let worker = || {
            let mut unfiltered = Unfiltered::new(self)?;
            let mut ran = Vec::new();
            // Blocks that were begun are finished, so that what is found does not depend on who is faster.
            while !found.load(Ordering::Relaxed) {
                let block = next.fetch_add(1, Ordering::Relaxed);
                if block >= blocks {
                    break;
                }
                let first = block * BLOCK;
                let last = candidates.min(first + BLOCK);
                let block = Block::run(self, &mut unfiltered, seed, first..last, accesses)?;
                found.fetch_or(block.found.is_some(), Ordering::Relaxed);
                progress(
                    done.fetch_add(last - first, Ordering::Relaxed) + last - first,
                    candidates,
                );
                ran.push(block);
            }
            Ok::<Vec<Block>, VerifyError>(ran)
        };
        let threads = THREADS.min(usize::try_from(blocks).unwrap_or(THREADS));
        let mut ran: Vec<Block> = Vec::new();
        let results = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
        });
        for result in results {
            let result = result.unwrap_or(Err(VerifyError::Panicked));
            ran.extend(result?);
        }
        ran.sort_by_key(|block| block.first);
        let mut report = Report::default();
        let mut unfiltered = Unfiltered::new(self)?;
        for block in ran {
            report.add(block.report);
            if let Some((candidate, steps)) = block.found
                && report.disagreements.len() < TOLD
            {
                let disagreement = explain(self, &mut unfiltered, steps, candidate, seed)?;
                report.disagreements.push(disagreement);
            }
        }
        Ok(report)
    }
}

/// What [`Machine::random`] of the same seed makes up for these candidates, as a case that expects nothing: for implementations
/// that have no live KVM beside them. Writes keep to bits that every register of the suite's machine holds.
pub fn random_case(seed: u64, candidates: Range<u64>, accesses: usize) -> Case {
    let mut steps = Vec::new();
    for candidate in candidates.clone() {
        let mut rng = Rng::of(seed, candidate);
        let mask = (candidate == candidates.start).then(|| generate::mask(&mut rng));
        for call in mask.into_iter().chain([generate::call(&mut rng)]) {
            let chosen = generate::accesses(&mut rng, filter_of(&call), accesses);
            steps.push(Step::Call(call));
            for access in chosen {
                let value = generate::value(&mut rng) & 0x0404;
                steps.push(generate::access(access, value).into());
            }
        }
    }
    Case {
        name: format!("seed {seed}, candidates {candidates:?}"),
        policy: None,
        cpuid: None,
        process: None,
        ignore_msrs: false,
        steps,
    }
}

/// Candidates that follow one another in one VM, and what was run of them.
struct Block {
    first: u64,
    report: Report,
    /// The first candidate at which the two differ, and what led to it.
    found: Option<(u64, Vec<Step>)>,
}

impl Block {
    fn run(
        machine: &Machine,
        unfiltered: &mut Unfiltered,
        seed: u64,
        candidates: Range<u64>,
        accesses: usize,
    ) -> Result<Block, VerifyError> {
        let mut block = Block {
            first: candidates.start,
            report: Report::default(),
            found: None,
        };
        let mut run = Run {
            pair: Pair::new(machine, unfiltered)?,
            in_force: Vec::new(),
        };
        for candidate in candidates {
            block.report.candidates += 1;
            let mut rng = Rng::of(seed, candidate);
            let mask = (candidate == block.first).then(|| generate::mask(&mut rng));
            for call in mask.into_iter().chain([generate::call(&mut rng)]) {
                if let Some(steps) = run.candidate(&call, &mut rng, &mut block.report, accesses)? {
                    block.found = Some((candidate, steps));
                    return Ok(block);
                }
            }
        }
        Ok(block)
    }
}

/// One VM's run.
struct Run<'a> {
    pair: Pair<'a>,
    /// The calls that made what is in force: a mask, a filter.
    in_force: Vec<Call>,
}

impl Run<'_> {
    /// Makes a call and looks at what it did. Gives what led to a disagreement.
    fn candidate(
        &mut self,
        call: &Call,
        rng: &mut Rng,
        report: &mut Report,
        most: usize,
    ) -> Result<Option<Vec<Step>>, VerifyError> {
        let gives = self.pair.call(call);
        report.calls += 1;
        if gives.live != gives.engine {
            return Ok(Some(self.steps(call, None)));
        }
        let accepted = gives.live == CallResult::OK;
        let filter = match &call.target {
            Target::SetMsrFilter(filter) => Some(filter),
            Target::EnableCap { .. } => None,
        };
        report.filters += u64::from(accepted && filter.is_some());
        // Boundaries of what was refused tell as much as those of what is still in force.
        let old = self.in_force.iter().find_map(filter_of).filter(|_| rng.chance(50));
        let (boundaries, most) = match accepted {
            true => (filter, most),
            false => (old.or(filter), AFTER_REFUSAL),
        };
        let chosen = generate::accesses(rng, boundaries, most);
        let mut accesses: Vec<Access> = Vec::with_capacity(chosen.len());
        for (msr, op) in chosen {
            if let Some(value) = self.pair.value(msr, op, generate::value(rng)) {
                accesses.push(generate::access((msr, op), value));
            }
        }
        let compared = self.pair.accesses(&accesses)?;
        report.accesses += compared.len() as u64;
        for one in &compared {
            match one.relation {
                Relation::Same => {}
                Relation::Bypass => report.bypasses += 1,
                Relation::Differ => return Ok(Some(self.steps(call, Some(one)))),
            }
        }
        if accepted {
            // What a call of one kind sets, the next one of that kind replaces.
            self.in_force.retain(|old| filter_of(old).is_some() != filter.is_some());
            self.in_force.push(call.clone());
        }
        Ok(None)
    }

    fn steps(&self, call: &Call, access: Option<&Compared>) -> Vec<Step> {
        let calls = self.in_force.iter().chain([call]).cloned().map(Step::Call);
        calls.chain(access.map(|one| Step::from(one.access))).collect()
    }
}

fn filter_of(call: &Call) -> Option<&RawFilter> {
    match &call.target {
        Target::SetMsrFilter(filter) if call.on == Descriptor::Vm => Some(filter),
        _ => None,
    }
}

/// What the steps come to in fresh VMs, up to the first at which the two differ.
fn play(
    machine: &Machine,
    unfiltered: &mut Unfiltered,
    steps: &[Step],
) -> Result<(Vec<Both<StepResult>>, bool), VerifyError> {
    let mut pair = Pair::new(machine, unfiltered)?;
    let mut all = Vec::new();
    for step in steps {
        let (both, differ) = match step {
            Step::Call(call) => {
                let Both { live, engine } = pair.call(call);
                let both = Both {
                    live: StepResult::Call(live),
                    engine: StepResult::Call(engine),
                };
                (both, live != engine)
            }
            Step::Access(step) => {
                let Some(one) = pair.accesses(&[step.access])?.pop() else {
                    return Ok((all, false));
                };
                let both = Both {
                    live: StepResult::Access(one.got.live),
                    engine: StepResult::Access(one.got.engine),
                };
                (both, one.relation == Relation::Differ)
            }
            Step::Replace(_) | Step::Kill => continue,
        };
        all.push(both);
        if differ {
            return Ok((all, true));
        }
    }
    Ok((all, false))
}

/// Shrinks steps and says what differs.
fn explain(
    machine: &Machine,
    unfiltered: &mut Unfiltered,
    steps: Vec<Step>,
    candidate: u64,
    seed: u64,
) -> Result<Disagreement, VerifyError> {
    // It counts as the same disagreement where the last step is the one that differs.
    let small = shrink(steps, |smaller| {
        let (came, differ) = play(machine, unfiltered, smaller)?;
        Ok::<bool, VerifyError>(differ && came.len() == smaller.len())
    })?;
    let (came, differ) = play(machine, unfiltered, &small)?;
    let (live, engine): (Vec<StepResult>, Vec<StepResult>) =
        came.into_iter().map(|both| (both.live, both.engine)).unzip();
    let name = format!("found by verify, seed {seed}, candidate {candidate}");
    let last = |came: &[StepResult]| came.last().map(ToString::to_string).unwrap_or_default();
    let step = small.last().map(|step| match step {
        Step::Call(_) => "the last call".to_owned(),
        Step::Access(step) => format!("{} {}", step.op(), step.msr()),
        Step::Replace(_) | Step::Kill => String::new(),
    });
    let mut what = step.unwrap_or_default();
    if !differ {
        what.push_str(" (not again in a fresh VM)");
    }
    Ok(Disagreement {
        what,
        live: last(&live),
        engine: last(&engine),
        candidate: Some(candidate),
        case: Some(case(name, small, &live).to_string()),
    })
}
