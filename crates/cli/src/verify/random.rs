//! Random calls on the live kernel and on the engine.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use msrgate_core::Access;
use msrgate_engine::Descriptor;

use super::call::{Call, RawFilter, Target};
use super::host::Host;
use super::live::Machine;
use super::pair::{Both, Compared, Gives, Pair, Relation};
use super::report::{Disagreement, Report};
use super::rng::Rng;
use super::shrink::{Came, CaseFile, Scenario, Step, shrink};
use super::twin::Twin;
use super::{progress, wild};
use crate::exit::{Exit, Failure};

/// Candidates of one VM, which starts without a filter.
const BLOCK: u64 = 250;
/// Accesses after a call that was refused.
const AFTER_REFUSAL: usize = 6;
/// Disagreements that are shrunk and told.
const TOLD: usize = 5;
/// An accepted filter is waited for, by sleeping, far longer than it is worked on: so many VMs take turns.
const THREADS: usize = 8;

pub(super) fn run(
    machine: &Machine,
    host: &Host,
    report: &mut Report,
    seed: u64,
    candidates: u64,
    accesses: usize,
) -> Result<(), Failure> {
    let bar = progress(candidates);
    let blocks = candidates.div_ceil(BLOCK);
    let (next, found) = (AtomicU64::new(0), AtomicBool::new(false));
    let worker = || {
        let mut twin = Twin::new(machine)?;
        let mut ran = Vec::new();
        // Blocks that were begun are finished, so that what is found does not depend on who is faster.
        while !found.load(Ordering::Relaxed) {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                break;
            }
            let first = block * BLOCK;
            let last = candidates.min(first + BLOCK);
            let done = Block::run(machine, host, &mut twin, seed, first..last, accesses)?;
            found.fetch_or(done.found.is_some(), Ordering::Relaxed);
            bar.inc(last - first);
            ran.push(done);
        }
        Ok::<Vec<Block>, Failure>(ran)
    };
    let threads = THREADS.min(usize::try_from(blocks).unwrap_or(THREADS));
    let mut ran: Vec<Block> = Vec::new();
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
    });
    for result in results {
        let result = result.unwrap_or_else(|_| Err(Failure::Line(Exit::Guest, "a thread of verify panicked".into())));
        ran.extend(result?);
    }
    bar.finish_and_clear();
    ran.sort_by_key(|block| block.candidates.start);
    let mut twin = Twin::new(machine)?;
    for block in ran {
        report.candidates += block.candidates.end - block.candidates.start;
        report.filters += block.filters;
        report.errnos += block.errnos;
        report.accesses += block.accesses;
        report.bypasses += block.bypasses;
        if let Some((candidate, scenario)) = block.found
            && report.disagreements.len() < TOLD
        {
            let disagreement = explain(machine, host, &mut twin, scenario, candidate, seed)?;
            report.disagreements.push(disagreement);
        }
    }
    Ok(())
}

/// Candidates that follow one another in one VM, and what was run of them.
struct Block {
    candidates: Range<u64>,
    filters: u64,
    errnos: u64,
    accesses: u64,
    bypasses: u64,
    /// The first candidate at which the two differ, and what led to it.
    found: Option<(u64, Scenario)>,
}

impl Block {
    fn run(
        machine: &Machine,
        host: &Host,
        twin: &mut Twin,
        seed: u64,
        candidates: Range<u64>,
        accesses: usize,
    ) -> Result<Block, Failure> {
        let mut block = Block {
            candidates: candidates.clone(),
            filters: 0,
            errnos: 0,
            accesses: 0,
            bypasses: 0,
            found: None,
        };
        let mut run = Run {
            pair: Pair::new(machine, host, twin)?,
            in_force: Vec::new(),
        };
        for candidate in candidates {
            let mut rng = Rng::of(seed, candidate);
            let mask = (candidate == block.candidates.start).then(|| wild::mask(&mut rng));
            for call in mask.into_iter().chain([wild::call(&mut rng)]) {
                if let Some(scenario) = run.candidate(&call, &mut rng, &mut block, accesses)? {
                    block.found = Some((candidate, scenario));
                    block.candidates.end = candidate + 1;
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
        block: &mut Block,
        most: usize,
    ) -> Result<Option<Scenario>, Failure> {
        let gives = self.pair.call(call);
        block.errnos += 1;
        if gives.live != gives.engine {
            return Ok(Some(self.scenario(call, None)));
        }
        let accepted = gives.live == Gives(0);
        let filter = match &call.target {
            Target::Filter(filter) => Some(filter),
            Target::Cap { .. } => None,
        };
        block.filters += u64::from(accepted && filter.is_some());
        // Boundaries of what was refused tell as much as those of what is still in force.
        let old = self.in_force.iter().find_map(filter_of).filter(|_| rng.chance(50));
        let (boundaries, most) = match accepted {
            true => (filter, most),
            false => (old.or(filter), AFTER_REFUSAL),
        };
        let chosen = wild::accesses(rng, boundaries, most);
        let mut accesses: Vec<Access> = Vec::with_capacity(chosen.len());
        for (msr, op) in chosen {
            if let Some(value) = self.pair.value(msr, op, wild::value(rng)) {
                accesses.push(wild::access((msr, op), value));
            }
        }
        let compared = self.pair.accesses(&accesses)?;
        block.accesses += compared.len() as u64;
        for one in &compared {
            match one.relation {
                Relation::Same => {}
                Relation::Bypass => block.bypasses += 1,
                Relation::Differ => return Ok(Some(self.scenario(call, Some(one)))),
            }
        }
        if accepted {
            // What a call of one kind sets, the next one of that kind replaces.
            self.in_force.retain(|old| filter_of(old).is_some() != filter.is_some());
            self.in_force.push(call.clone());
        }
        Ok(None)
    }

    fn scenario(&self, call: &Call, access: Option<&Compared>) -> Scenario {
        let calls = self.in_force.iter().chain([call]).cloned().map(Step::Call);
        Scenario {
            steps: calls.chain(access.map(|one| Step::Access(one.access))).collect(),
        }
    }
}

fn filter_of(call: &Call) -> Option<&RawFilter> {
    match &call.target {
        Target::Filter(filter) if call.on == Descriptor::Vm => Some(filter),
        _ => None,
    }
}

/// What the steps of a scenario come to in fresh VMs, up to the first at which the two differ.
fn play(
    machine: &Machine,
    host: &Host,
    twin: &mut Twin,
    scenario: &Scenario,
) -> Result<(Vec<Both<Came>>, bool), Failure> {
    let mut pair = Pair::new(machine, host, twin)?;
    let mut all = Vec::new();
    for step in &scenario.steps {
        let (both, differ) = match step {
            Step::Call(call) => {
                let Both { live, engine } = pair.call(call);
                let both = Both {
                    live: Came::Gives(live),
                    engine: Came::Gives(engine),
                };
                (both, live != engine)
            }
            Step::Access(access) => {
                let Some(one) = pair.accesses(&[*access])?.pop() else {
                    return Ok((all, false));
                };
                let both = Both {
                    live: Came::Got(one.got.live),
                    engine: Came::Got(one.got.engine),
                };
                (both, one.relation == Relation::Differ)
            }
        };
        all.push(both);
        if differ {
            return Ok((all, true));
        }
    }
    Ok((all, false))
}

/// Shrinks a scenario and says what differs.
fn explain(
    machine: &Machine,
    host: &Host,
    twin: &mut Twin,
    scenario: Scenario,
    candidate: u64,
    seed: u64,
) -> Result<Disagreement, Failure> {
    // It counts as the same disagreement where the last step is the one that differs.
    let small = shrink(scenario, |smaller| {
        let (came, differ) = play(machine, host, twin, smaller)?;
        Ok::<bool, Failure>(differ && came.len() == smaller.steps.len())
    })?;
    let (came, differ) = play(machine, host, twin, &small)?;
    let (live, engine): (Vec<Came>, Vec<Came>) = came.into_iter().map(|both| (both.live, both.engine)).unzip();
    let name = format!("found by verify, seed {seed}, candidate {candidate}");
    let last = |came: &[Came]| came.last().map(ToString::to_string).unwrap_or_default();
    let step = small.steps.last().map(|step| match step {
        Step::Call(_) => "the last call".to_owned(),
        Step::Access(access) => format!("{} {}", access.op(), access.msr()),
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
        case: Some(
            CaseFile {
                name: &name,
                scenario: &small,
                live: &live,
            }
            .to_string(),
        ),
    })
}
