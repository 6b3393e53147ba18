//! A VM with two owners: the policy and the VMM.

use std::collections::BTreeSet;
use std::sync::Arc;

use msrgate_core::{
    Access, Disposition, Entry, Filter, Log, Msr, MsrRange, Op, ReadAction, Reason, Reasons, Verdict, WriteAction,
};
use msrgate_plan::{CompileOptions, Decision, DecisionMap, Intervals, Plan, PlanError, Preset};

/// What becomes of what the policy decides.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Mode {
    /// The policy decides.
    #[default]
    Enforce,
    /// Nothing: the first touch of each MSR that the policy does not leave to the kernel is written down, with what the
    /// policy would do, and the guest gets what it gets without a policy.
    Audit,
    /// Nothing: the first touch of every MSR is written down.
    Learn,
    /// Every access is written down, and passed on to the kernel's register as the host would read and write it: that is
    /// not always what the guest would have got.
    LearnAll,
}

/// A policy, and what is to become of it.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Policy {
    plan: Plan,
    options: CompileOptions,
    mode: Mode,
}

impl Policy {
    /// The policy of a plan that was compiled with these options.
    pub(crate) fn new(plan: Plan, options: CompileOptions, mode: Mode) -> Policy {
        Policy {
            // A vCPU cannot be given a preset later, so that other plans of this policy have none but these.
            options: options.with_presets(plan.presets().to_vec()),
            plan,
            mode,
        }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan that holds for the policy and for a VMM with this filter and mask, where this was touched; `None` stands
    /// for all.
    pub(crate) fn composed(
        &self,
        filter: Option<&Filter>,
        open: Option<&BTreeSet<(Msr, Op)>>,
    ) -> Result<Plan, PlanError> {
        let watched;
        let unplanned = CompileOptions::default();
        let (map, options) = match self.mode {
            Mode::Enforce => (self.plan.map(), &self.options),
            Mode::Audit | Mode::Learn | Mode::LearnAll => {
                watched = open.map_or_else(DecisionMap::allow_all, |open| self.watched(open));
                (&watched, &unplanned)
            }
        };
        let plan = match (filter, self.mode) {
            (None, Mode::Enforce) => self.plan.clone(),
            (None, _) => Plan::compile_for(map, options)?,
            (Some(filter), _) => Plan::compile_for(&map.restricted_by(filter), options)?,
        };
        // What the kernel refuses is handed over too, so that it is known; it faults as it would have. So is what the VMM
        // asked for.
        Ok(plan.with_exit_reasons(Reasons::ALL))
    }

    /// What each vCPU is given.
    pub(crate) fn presets(&self) -> &[Preset] {
        match self.mode {
            Mode::Enforce => self.plan.presets(),
            Mode::Audit | Mode::Learn | Mode::LearnAll => &[],
        }
    }

    /// Whether what does not fit is passed on from user space.
    pub(crate) fn spills(&self) -> bool {
        self.options.spillable().is_some()
    }

    /// Whether vCPUs remember something.
    pub(crate) fn has_emulated_state(&self) -> bool {
        self.plan.table().has_emulated_state()
    }

    /// Whether it says by itself what such an exit gets.
    fn decides(&self, access: Access, reason: Reason) -> bool {
        let (table, msr, op) = (self.plan.table(), access.msr(), access.op());
        let by = |pair: &(ReadAction, WriteAction)| match op {
            Op::Read => pair.0 != ReadAction::Deny,
            Op::Write => pair.1 != WriteAction::Deny,
        };
        match (reason, op) {
            // Beside the VMM's filter a preset may not fit, and then it is an exit.
            (Reason::Filter, Op::Read) => {
                names(table.reads(), msr, &ReadAction::Allow)
                    || self.plan.presets().iter().any(|preset| preset.msr == msr)
            }
            (Reason::Filter, Op::Write) => names(table.writes(), msr, &WriteAction::Allow),
            (Reason::Unknown, _) => by(table.unknown()),
            (Reason::Invalid, _) => by(table.invalid()),
        }
    }

    /// Whose an exit is, under a VMM that asked for `mask`. Neither locks nor allocates.
    ///
    /// What the policy decides is the policy's. The rest is there because the VMM denies it, or because the mask is
    /// wider than one of the two asked for: it is the VMM's only where the VMM asked for such exits, since a VMM may
    /// abort on one that it did not, and else gets the fault that the kernel would have given.
    pub(crate) fn owner(&self, access: Access, reason: Reason, mask: Reasons) -> Owner {
        match (self.mode, reason) {
            (Mode::Enforce, _) if self.decides(access, reason) => Owner::Policy,
            (Mode::Audit | Mode::Learn | Mode::LearnAll, Reason::Filter) => Owner::Watch,
            _ => Owner::of_rest(reason, mask),
        }
    }

    /// Whether the first touch of an MSR is waited for.
    fn watches(&self, msr: Msr, op: Op) -> bool {
        match self.mode {
            Mode::Enforce => false,
            // What is spilled makes an exit, though it is allowed.
            Mode::Audit => self.plan.filter().verdict(msr, op) == Verdict::Deny,
            Mode::Learn | Mode::LearnAll => true,
        }
    }

    /// All that is watched is handed over, but for what was touched before.
    fn watched(&self, open: &BTreeSet<(Msr, Op)>) -> DecisionMap {
        DecisionMap::new(
            self.watched_of(open, Op::Read, ReadAction::Allow, ReadAction::Deny),
            self.watched_of(open, Op::Write, WriteAction::Allow, WriteAction::Deny),
        )
    }

    fn watched_of<A: Clone + Eq>(
        &self,
        open: &BTreeSet<(Msr, Op)>,
        op: Op,
        allow: A,
        deny: A,
    ) -> Intervals<Decision<A>> {
        // A denial that is logged is handed over, where another would stay in the kernel.
        let handed = Decision::of(deny).logged(Log::All);
        let open = open.iter().filter(|(_, touched)| *touched == op);
        let open = open.map(|(msr, _)| (MsrRange::single(*msr), Decision::of(allow.clone())));
        let kernels = |(range, verdict): (MsrRange, &Verdict)| {
            (*verdict == Verdict::Allow).then(|| (range, Decision::of(allow.clone())))
        };
        let untouched = match self.mode {
            Mode::Audit => Intervals::of_filter(self.plan.filter(), op)
                .iter()
                .filter_map(kernels)
                .collect(),
            _ => Vec::new(),
        };
        let parts: Vec<_> = open.chain(untouched).collect();
        Intervals::first_match(handed.clone(), parts)
    }

    /// What the policy would do, and by which rule; `None` where there is none.
    pub(crate) fn would(&self, msr: Msr, op: Op) -> Option<(Disposition, Option<u32>)> {
        if self.mode != Mode::Audit {
            return None;
        }
        let (did, rule) = match op {
            Op::Read => {
                let decision = self.plan.map().reads().get(msr);
                (decision.action.did(), decision.rule)
            }
            Op::Write => {
                let decision = self.plan.map().writes().get(msr);
                (decision.action.did(), decision.rule)
            }
        };
        let spilled = self.plan.table().passes(msr, op);
        Some((if spilled { Disposition::Pass } else { did }, rule))
    }
}

/// Whose an exit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// The policy's, or nobody's: it is answered here.
    Policy,
    /// The VMM's, which asked for it.
    Vmm,
    /// Nobody's yet: the guest touched what is watched.
    Watch,
}

impl Owner {
    /// Whose an exit is that the policy does not decide.
    pub(crate) fn of_rest(reason: Reason, mask: Reasons) -> Owner {
        if mask.contains(reason) {
            Owner::Vmm
        } else {
            Owner::Policy
        }
    }
}

/// What changes while a VM runs.
#[derive(Debug)]
pub(crate) struct State {
    /// What is in force, beside the VMM's own filter.
    pub(crate) policy: Arc<Policy>,
    /// The vCPUs for whose CPUIDs it is what it is.
    pub(crate) resolved: BTreeSet<u32>,
    /// It was said that a vCPU has no CPUID.
    pub(crate) told_of_cpuid: bool,
    /// The VMM's own filter.
    pub(crate) filter: Option<Filter>,
    /// It was said that the VMM weakens its filter.
    pub(crate) told: bool,
    /// What was touched.
    pub(crate) open: BTreeSet<(Msr, Op)>,
    /// There is no room in a filter to go on watching, so that all is open.
    pub(crate) blind: bool,
    /// What was put in force last; `None` for what the VM began with.
    pub(crate) plan: Option<Arc<Plan>>,
}

impl State {
    pub(crate) fn new(policy: Arc<Policy>) -> State {
        State {
            policy,
            resolved: BTreeSet::new(),
            told_of_cpuid: false,
            filter: None,
            told: false,
            open: BTreeSet::new(),
            blind: false,
            plan: None,
        }
    }

    /// The plan that holds for the policy and for a VMM with this filter and mask.
    pub(crate) fn composed(&self) -> Result<Plan, PlanError> {
        let open = (!self.blind).then_some(&self.open);
        self.policy.composed(self.filter.as_ref(), open)
    }

    /// What a touch is.
    pub(crate) fn touch(&self, msr: Msr, op: Op) -> Touch {
        let denied = |filter: &Filter| filter.verdict(msr, op) == Verdict::Deny;
        let denied = self.filter.as_ref().is_some_and(denied);
        // What is spilled has no room where it was touched either.
        let spilled = self.policy.mode == Mode::Audit && self.policy.plan.table().passes(msr, op);
        if self.policy.mode == Mode::LearnAll || spilled && !self.blind {
            if denied { Touch::Denied } else { Touch::Pass }
        } else if self.policy.watches(msr, op) && !self.blind && !self.open.contains(&(msr, op)) {
            Touch::First
        } else if denied {
            Touch::Denied
        } else {
            Touch::Open
        }
    }
}

/// What a touch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Touch {
    /// The first one.
    First,
    /// One of those that are passed on.
    Pass,
    /// Another vCPU was first, and meanwhile it is open.
    Open,
    /// The VMM denies it.
    Denied,
}

/// Whether an entry decides it; one that passes it on leaves it to the kernel.
fn names<A: PartialEq>(entries: &[Entry<A>], msr: Msr, allow: &A) -> bool {
    let after = entries.partition_point(|entry| entry.range.first() <= msr);
    let entry = after.checked_sub(1).and_then(|at| entries.get(at));
    entry.is_some_and(|entry| entry.range.contains(msr) && entry.action != *allow)
}

/// Whether `new` allows something that `old` denies.
pub(crate) fn is_weaker(old: &Filter, new: &Filter) -> bool {
    Op::ALL.into_iter().any(|op| {
        let weaker = Intervals::of_filter(old, op).zip(&Intervals::of_filter(new, op), |old, new| {
            *old == Verdict::Deny && *new == Verdict::Allow
        });
        weaker.iter().any(|(_, weaker)| *weaker)
    })
}
