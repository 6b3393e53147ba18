//! What has to be saved with a guest that runs under a plan, and what must not be.
//!
//! ```
//! use msrgate_plan::Plan;
//! use msrgate_policy::{Policy, state::State};
//!
//! let text = "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_SYSENTER_*\"\nread = \"allow\"\nwrite = \"allow\"\n";
//! let policy = Policy::parse("policy.toml", text).unwrap();
//! let plan = Plan::compile(&policy.decision_map(None).unwrap()).unwrap();
//! let state = State::of(&plan, None);
//! assert!(state.save.iter().any(|kept| kept.entry.name() == "IA32_SYSENTER_CS" && kept.written));
//! assert!(state.drop.iter().any(|entry| entry.name() == "IA32_PAT"));
//! ```

use msrgate_core::{Keeps, MsrRange, Op};
use msrgate_plan::Plan;

use msrgate_msrs::Entry;
use msrgate_msrs::cpuid::Cpuid;

/// What has to be saved with a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// Registers of the kernel whose value the guest sees or made, by MSR: the VMM saves them.
    pub save: Vec<Kept>,
    /// Registers that KVM_GET_MSRS would give and of which the guest has nothing, by MSR: the VMM leaves them out, unless it
    /// gave them a value itself.
    pub drop: Vec<&'static Entry>,
    /// What user space keeps for the guest, by MSR.
    pub emulated: Vec<Emulated>,
    /// Whether shadows are kept of MSRs that the kernel does not know, or refuses (`unknown`, `invalid`).
    pub fallback: bool,
}

/// A register of the kernel that is saved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kept {
    /// Which.
    pub entry: &'static Entry,
    /// Whether the guest's writes come to it.
    pub written: bool,
    /// Whether the guest's reads show it.
    pub read: bool,
}

/// MSRs that user space keeps something for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Emulated {
    /// Which.
    pub range: MsrRange,
    /// What.
    pub kind: Kind,
}

/// What user space keeps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// What the guest wrote, in the vCPU's gate.
    Shadow,
    /// Whether the one write has been made, in the vCPU's gate.
    Once,
    /// Whatever the VMM's handler of this name keeps.
    Handler(String),
}

impl Kind {
    /// The word that JSON uses.
    pub const fn name(&self) -> &'static str {
        match self {
            Kind::Shadow => "shadow",
            Kind::Once => "once",
            Kind::Handler(_) => "handler",
        }
    }
}

impl State {
    /// For a guest under `plan`. MSRs that `cpuid` says the guest does not have are left out; without it none are.
    pub fn of(plan: &Plan, cpuid: Option<&Cpuid>) -> State {
        let (mut save, mut drop) = (Vec::new(), Vec::new());
        let there = |entry: &&Entry| cpuid.and_then(|cpuid| entry.exists_on(cpuid)) != Some(false);
        for entry in msrgate_msrs::all().iter().filter(there) {
            let kept = Kept {
                entry,
                written: plan.reaches(entry.msr, Op::Write) && entry.access != msrgate_msrs::Access::ReadOnly,
                read: plan.reaches(entry.msr, Op::Read) && entry.access != msrgate_msrs::Access::WriteOnly,
            };
            match entry.state {
                msrgate_msrs::State::Nothing => {}
                _ if kept.written || kept.read || entry.unfiltered().is_some() => save.push(kept),
                msrgate_msrs::State::Listed | msrgate_msrs::State::Unlisted => drop.push(entry),
                // Part of a structure that is saved as a whole.
                _ => {}
            }
        }
        let table = plan.table();
        let reads = table.reads().iter();
        let reads = reads.map(|entry| (entry.range, kind(entry.action.keeps(), entry.action.handler())));
        let writes = table.writes().iter();
        let writes = writes.map(|entry| (entry.range, kind(entry.action.keeps(), entry.action.handler())));
        let kept = reads.chain(writes).filter_map(|(range, kind)| Some((range, kind?)));
        let fallbacks = [table.unknown(), table.invalid()];
        State {
            save,
            drop,
            emulated: joined(kept.collect()),
            fallback: fallbacks.iter().any(|(_, write)| write.keeps() == Some(Keeps::Shadow)),
        }
    }
}

/// What user space keeps for an action.
fn kind(keeps: Option<Keeps>, handler: Option<&str>) -> Option<Kind> {
    match keeps {
        Some(Keeps::Shadow) => Some(Kind::Shadow),
        Some(Keeps::Once) => Some(Kind::Once),
        None => handler.map(|name| Kind::Handler(name.to_owned())),
    }
}

/// By MSR, and of each kind as few ranges as there can be.
fn joined(mut kept: Vec<(MsrRange, Kind)>) -> Vec<Emulated> {
    kept.sort_by(|(a, kind), (b, other)| (key(kind), a).cmp(&(key(other), b)));
    let mut emulated: Vec<Emulated> = Vec::new();
    for (range, kind) in kept {
        match emulated.last_mut() {
            Some(last) if last.kind == kind && u64::from(range.first().0) <= u64::from(last.range.last().0) + 1 => {
                let end = last.range.last().max(range.last());
                last.range = MsrRange::new(last.range.first(), end).unwrap_or(last.range);
            }
            _ => emulated.push(Emulated { range, kind }),
        }
    }
    emulated.sort_by_key(|kept| kept.range);
    emulated
}

/// Kinds apart.
fn key(kind: &Kind) -> (&'static str, &str) {
    match kind {
        Kind::Handler(name) => (kind.name(), name),
        _ => (kind.name(), ""),
    }
}

#[cfg(test)]
mod tests {
    use msrgate_core::Msr;

    use super::*;
    use crate::Policy;

    fn state(rules: &str, cpuid: Option<&Cpuid>) -> State {
        let text = format!("version = 1\ndefault = \"deny\"\n{rules}");
        let policy = Policy::parse("policy.toml", &text).unwrap();
        let map = policy.decision_map(cpuid).unwrap();
        State::of(&Plan::compile(&map).unwrap(), cpuid)
    }

    fn rule(msr: &str, read: &str, write: &str) -> String {
        format!("[[rule]]\nmsr = {msr}\nread = {read}\nwrite = {write}\n")
    }

    /// Whether it is saved for what is written and read; `None` where it is not saved.
    fn kept(state: &State, name: &str) -> Option<(bool, bool)> {
        let found = state.save.iter().find(|kept| kept.entry.name() == name);
        found.map(|kept| (kept.written, kept.read))
    }

    fn dropped(state: &State, name: &str) -> bool {
        state.drop.iter().any(|entry| entry.name() == name)
    }

    #[test]
    fn what_the_guest_sees_or_made_in_the_kernel_is_saved_and_the_rest_is_dropped() {
        let allow = "\"allow\"";
        let rules = [
            rule("\"IA32_STAR\"", allow, allow),
            rule("\"IA32_PAT\"", allow, "\"deny\""),
            rule("\"IA32_LSTAR\"", "\"deny\"", "{ once = true }"),
            rule("\"IA32_CSTAR\"", "{ shadow = 0 }", "\"shadow\""),
            rule("\"IA32_BIOS_SIGN_ID\"", "{ value = 1 }", "\"ignore\""),
        ];
        let state = state(&rules.concat(), None);
        assert_eq!(kept(&state, "IA32_STAR"), Some((true, true)));
        assert_eq!(kept(&state, "IA32_PAT"), Some((false, true)));
        assert_eq!(kept(&state, "IA32_LSTAR"), Some((true, false)));
        for name in ["IA32_CSTAR", "IA32_BIOS_SIGN_ID", "IA32_SYSENTER_CS"] {
            assert!(kept(&state, name).is_none() && dropped(&state, name), "{name}");
        }
        // RDTSC reads it, whatever the policy says.
        assert_eq!(kept(&state, "IA32_TSC"), Some((false, false)));
        // In the structure that KVM_GET_SREGS gives, there is nothing to leave out.
        assert!(kept(&state, "IA32_APIC_BASE").is_none() && !dropped(&state, "IA32_APIC_BASE"));
        // A command has nothing to save.
        assert!(kept(&state, "IA32_PRED_CMD").is_none() && !dropped(&state, "IA32_PRED_CMD"));
        let both: Vec<Msr> = state.save.iter().map(|kept| kept.entry.msr).collect();
        assert!(both.is_sorted() && state.drop.is_sorted_by_key(|entry| entry.msr));
        assert!(state.drop.iter().all(|entry| !both.contains(&entry.msr)));
    }

    #[test]
    fn what_user_space_keeps_is_told_once_by_kind() {
        let rules = [
            rule("\"0x100..=0x10f\"", "{ shadow = 0 }", "\"shadow\""),
            rule("\"0x110..=0x11f\"", "{ shadow = 1 }", "\"shadow\""),
            rule("\"IA32_LSTAR\"", "\"allow\"", "{ once = true }"),
            rule("0x200", "{ handler = \"rtc\" }", "{ handler = \"rtc\" }"),
        ];
        let told = state(&rules.concat(), None);
        let range = |first, last| MsrRange::new(Msr(first), Msr(last)).unwrap();
        let expected = [
            (range(0x100, 0x11f), Kind::Shadow),
            (range(0x200, 0x200), Kind::Handler("rtc".to_owned())),
            (range(0xc000_0082, 0xc000_0082), Kind::Once),
        ];
        let expected = expected.map(|(range, kind)| Emulated { range, kind });
        assert_eq!(told.emulated, expected);
        assert!(!told.fallback);
        let head = "unknown = { read = { shadow = 0 }, write = \"shadow\" }\n";
        assert!(state(head, None).fallback);
    }

    #[test]
    fn what_the_guests_cpuid_rules_out_is_neither_saved_nor_dropped() {
        let cpuid = Cpuid::from_entries([(0, 0, [1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]), (1, 0, [0; 4])]);
        let told = state("", Some(&cpuid));
        assert!(dropped(&state("", None), "IA32_TSC_ADJUST"));
        assert!(!dropped(&told, "IA32_TSC_ADJUST") && kept(&told, "IA32_TSC_ADJUST").is_none());
    }
}
