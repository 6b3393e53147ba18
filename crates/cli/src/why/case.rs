//! What there is to say of a register that logs name: from their lines and from the database.

use msrgate_core::{Msr, Op};
use msrgate_msrs::{Class, Entry, Kept, Need, Refusal, State};
use msrgate_policy::{Diagnostic, Policy};
use msrgate_trace::log::{Cause, Speaker};

use super::logs::{Logs, Times};
use crate::words;

/// A register, and what logs say of it.
pub(crate) struct Case<'a> {
    pub(super) msr: Msr,
    pub(super) entry: Option<&'static Entry>,
    pub(super) accesses: Vec<Access<'a>>,
}

/// What logs say of accesses alike.
pub(super) struct Access<'a> {
    /// The direction, where it is said.
    pub(super) op: Option<Op>,
    pub(super) cause: Cause,
    pub(super) by: Speaker,
    pub(super) times: &'a Times,
}

/// What to do.
pub(super) enum Remedy {
    /// A rule in a policy's language, which `check` takes; and, if it is of other directions than the logs, what there is
    /// against one of those.
    Rule(String, Option<String>),
    /// No rule helps, for this reason.
    None(String),
}

impl Access<'_> {
    /// The directions that it may be.
    fn ops(&self) -> &'static [Op] {
        match self.op {
            Some(Op::Read) => &[Op::Read],
            Some(Op::Write) => &[Op::Write],
            None => &Op::ALL,
        }
    }

    /// Whether it was made on another hypervisor than KVM.
    pub(super) fn is_elsewhere(&self) -> bool {
        matches!(
            self.by,
            Speaker::Xen | Speaker::VirtualBox | Speaker::Bhyve | Speaker::Vmware | Speaker::Other
        )
    }

    /// Whether somebody did not get what was asked for.
    fn is_refused(&self) -> bool {
        self.is_missed() || self.cause == Cause::Vmm
    }

    /// Whether a guest was refused something, or got what the register does not hold.
    fn is_missed(&self) -> bool {
        !matches!(
            self.cause,
            Cause::Dropped | Cause::Vmm | Cause::Lacking | Cause::Program | Cause::Crash | Cause::Privileged
        )
    }
}

impl Case<'_> {
    /// What logs say, by register.
    pub(super) fn all(logs: &Logs) -> Vec<Case<'_>> {
        let mut cases: Vec<Case<'_>> = Vec::new();
        for ((msr, op, cause, by), times) in &logs.said {
            if cases.last().is_none_or(|case| case.msr != *msr) {
                cases.push(Case {
                    msr: *msr,
                    entry: msrgate_msrs::by_msr(*msr),
                    accesses: Vec::new(),
                });
            }
            if let Some(case) = cases.last_mut() {
                case.accesses.push(Access {
                    op: *op,
                    cause: *cause,
                    by: *by,
                    times,
                });
            }
        }
        cases
    }

    /// When KVM refuses an access though it has the register, by the database.
    fn refusals(&self, access: &Access<'_>) -> Vec<&'static Refusal> {
        let refusals = access
            .ops()
            .iter()
            .flat_map(|op| self.entry.into_iter().flat_map(|entry| entry.refusals(*op)));
        let mut refusals: Vec<&'static Refusal> = refusals.collect();
        refusals.dedup();
        refusals
    }

    /// Whether `kvm.ignore_msrs`, and `unknown` in a policy, cover the access: what the line or the database says; `None` where
    /// neither tells, or it is no guest's access on KVM.
    pub(super) fn is_unknown(&self, access: &Access<'_>) -> Option<bool> {
        match (access.by, access.cause) {
            (Speaker::Kvm, Cause::Ignored | Cause::Unknown) => Some(true),
            (Speaker::Kvm, Cause::Refused | Cause::Dropped) => Some(false),
            (Speaker::Linux | Speaker::MsrDriver | Speaker::Dump, Cause::Fault) => {
                let refusals = self.refusals(access);
                let is_unknown = refusals.iter().all(|refusal| refusal.is_unknown);
                (!refusals.is_empty()).then_some(is_unknown)
            }
            _ => None,
        }
    }

    /// Why it ended as it did.
    pub(super) fn why(&self, access: &Access<'_>) -> String {
        let by = access.by.name();
        let got = match access.op {
            Some(Op::Read) => "the read got 0",
            Some(Op::Write) => "the write went nowhere",
            None => "a read got 0, and a write went nowhere",
        };
        let mut text = match (access.cause, access.by) {
            (Cause::Ignored, Speaker::Kvm) => {
                format!("KVM does not know the register; the host has `kvm.ignore_msrs`, so {got}")
            }
            (Cause::Ignored, _) => format!("{by} does not know the register, and {got}"),
            (Cause::Dropped, Speaker::Linux) => {
                "the guest wrote a counter and read something else: the VM has no such counter, and the guest goes without".to_owned()
            }
            (Cause::Dropped, _) => format!("{by} has the register and drops what is written; the guest goes on"),
            (Cause::Unknown, Speaker::Other) => {
                "the program that says so does not know the register; whether the guest gets #GP or a 0 is not said".to_owned()
            }
            (Cause::Unknown, _) => format!("{by} does not know the register: #GP"),
            (Cause::Refused, _) => format!("{by} has the register and refuses this access: #GP"),
            (Cause::Fault, Speaker::Dump) if access.op.is_none() => {
                "a system stopped at #GP with this register in RCX, from which RDMSR and WRMSR take it; the dump does not have the instruction"
                    .to_owned()
            }
            (Cause::Fault, Speaker::Dump) => "#GP at which a system stopped: RCX of its dump is the register".to_owned(),
            (Cause::Fault, Speaker::Other) => "the access failed, and the line does not say more of it".to_owned(),
            (Cause::Fault, _) => format!("#GP, as {by} tells of its own access"),
            (Cause::Vmm, Speaker::Xen) => {
                "Xen does not take it from the state of a guest that it is to restore: it does not know the register".to_owned()
            }
            (Cause::Vmm, Speaker::Kvm) => {
                "KVM did not take it, and no guest has run (its rIP is that of a reset): the VMM sets it when a guest starts"
                    .to_owned()
            }
            (Cause::Vmm, _) if access.op == Some(Op::Read) => {
                format!("the host's kernel did not give the value that {by} asked for, of a guest that is saved or moves")
            }
            (Cause::Vmm, _) => {
                format!("the host's kernel did not take the value that {by} set, for a guest that starts, moves or is restored")
            }
            (Cause::Lacking, _) => {
                format!("this host lacks bits that the CPU model has, and {by} leaves them out")
            }
            (Cause::Program, _) => "a program wrote it through /dev/cpu/N/msr".to_owned(),
            (Cause::Crash, _) => "a Windows guest reports its crash: the bug check is in P0, its parameters are in P1 to P4".to_owned(),
            (Cause::Privileged, _) => {
                "a Windows guest reports its crash, of exception 0xc0000096: a privileged instruction got #GP, of which RDMSR and WRMSR are the likeliest".to_owned()
            }
            // A cause that is new.
            (other, _) => other.name().to_owned(),
        };
        if !access.is_elsewhere() && access.is_refused() {
            let unknown = self.is_unknown(access);
            for refusal in self.refusals(access) {
                if unknown.is_none_or(|unknown| unknown == refusal.is_unknown) {
                    text += &format!("; {}", refusal.says);
                }
            }
            match unknown {
                Some(false) => text += ". `kvm.ignore_msrs` and a policy's `unknown` do not cover it",
                Some(true) => text += &self.versions(),
                None if access.cause == Cause::Fault => text += &self.guess(access),
                None => {}
            }
        }
        text
    }

    /// Which KVM has the register after all.
    fn versions(&self) -> String {
        let kept = self.entry.is_some_and(|entry| entry.kept != Kept::Not);
        match kept {
            true => ". KVM of Linux 5.10 to 7.2 has it: the host's kernel is another, or its KVM module is".to_owned(),
            false => String::new(),
        }
    }

    /// What is likely of a fault of which a guest tells alone.
    fn guess(&self, access: &Access<'_>) -> String {
        match self.entry {
            Some(entry) if entry.is_known_to_kvm() && !access.ops().iter().any(|op| is_answered(entry, *op)) => {
                ". KVM answers reads of the register, and is not known to take writes".to_owned()
            }
            Some(entry) if entry.is_known_to_kvm() => {
                let features = entry.exists().features();
                let shown = match features {
                    [] => String::new(),
                    features => format!("the guest's CPUID does not show `{}`, or ", features.join("` or `")),
                };
                format!(". KVM has the register: {shown}it refuses this access, or a policy denies it")
            }
            Some(_) => ". KVM is not known to have the register".to_owned(),
            None => ". The database has no such register".to_owned(),
        }
    }

    /// What the guest does then.
    pub(super) fn then(&self, access: &Access<'_>) -> Option<&'static str> {
        match (access.cause, access.by) {
            (Cause::Ignored | Cause::Dropped | Cause::Program | Cause::Crash | Cause::Privileged, _) => None,
            (Cause::Lacking, _) => Some("the guest goes on without; with `enforce` QEMU ends"),
            (Cause::Vmm, _) => Some("the VMM ends, or the guest goes on without the register's value"),
            (Cause::Fault, Speaker::Linux) if access.op == Some(Op::Read) => {
                Some("Linux goes on with 0, and warns where it did not expect the fault")
            }
            (Cause::Fault, Speaker::Linux) => Some("Linux goes on, and warns where it did not expect the fault"),
            (Cause::Fault, Speaker::MsrDriver) => Some("the tool fails, and the guest goes on"),
            (Cause::Fault, Speaker::Dump) => None,
            _ if self.needs(access).next().is_some() => None,
            _ => Some(
                "a system that expects the fault goes on; one that does not stops: Windows with a bug check, FreeBSD with a panic. Linux warns",
            ),
        }
    }

    /// Who needs it in this direction.
    pub(super) fn needs(&self, access: &Access<'_>) -> impl Iterator<Item = &'static Need> {
        let ops = access.ops();
        let needs = self.entry.into_iter().flat_map(|entry| entry.needs());
        needs.filter(move |need| ops.contains(&need.op))
    }

    /// The rule that helps.
    pub(super) fn remedy(&self) -> Remedy {
        let ops: Vec<Op> = Op::ALL
            .into_iter()
            .filter(|op| {
                self.accesses
                    .iter()
                    .any(|access| access.is_missed() && access.ops().contains(op) && !self.is_kvms(access, *op))
            })
            .collect();
        if ops.is_empty() {
            return Remedy::None(self.elsewhere());
        }
        if let Some(entry) = self.entry.filter(|entry| !entry.is_filterable()) {
            let why = entry
                .unfiltered()
                .unwrap_or_else(|| "no KVM filter can stop it".to_owned());
            return Remedy::None(format!("no rule reaches it: {why}"));
        }
        let why = match self.checked(&ops) {
            Ok(rule) => return Remedy::Rule(rule, None),
            Err(why) => why,
        };
        // The other direction too may be what is missing, or one too many.
        let others = [Op::ALL.as_slice(), &[Op::Read], &[Op::Write]].into_iter();
        let mut others = others.filter(|other| *other != ops && (other.len() > 1 || ops.len() > 1));
        match others.find_map(|other| self.checked(other).ok()) {
            Some(rule) => Remedy::Rule(rule, Some(why)),
            None => Remedy::None(why),
        }
    }

    /// Whether another hypervisor says it, and KVM answers such an access itself.
    fn is_kvms(&self, access: &Access<'_>, op: Op) -> bool {
        let entry = self.entry.filter(|entry| entry.refusals(op).next().is_none());
        access.is_elsewhere() && entry.is_some_and(|entry| is_answered(entry, op))
    }

    /// Whether other hypervisors alone refused it.
    pub(super) fn is_elsewhere(&self) -> bool {
        let is_needless = |access: &Access<'_>| access.is_elsewhere() && access.is_refused();
        self.accesses.iter().all(is_needless)
    }

    /// Whether nothing was refused, neither a guest nor a VMM.
    pub(super) fn is_harmless(&self) -> bool {
        let mut accesses = self.accesses.iter();
        accesses.all(|access| !access.is_refused()) && !self.is_crash(Cause::Crash) && !self.is_crash(Cause::Privileged)
    }

    /// Whether a guest tells of its end, for this cause.
    fn is_crash(&self, cause: Cause) -> bool {
        self.accesses.iter().any(|access| access.cause == cause)
    }

    /// Properties for QEMU's `-cpu` to turn off, so that it does not set what it could not, or not ask for what the host lacks.
    pub(super) fn qemu(&self) -> Vec<&'static str> {
        let mut properties = Vec::new();
        // Of a VMM of which KVM alone tells, QEMU is the likeliest.
        let qemu = |access: &&Access<'_>| matches!(access.by, Speaker::Qemu | Speaker::Kvm);
        for access in self.accesses.iter().filter(qemu) {
            match access.cause {
                Cause::Vmm => properties.extend(self.entry.and_then(Entry::qemu_property)),
                Cause::Lacking => {
                    let lacking = access.times.values.iter().fold(0, |all, (value, _)| all | value);
                    let bits = (0..64).filter(|bit| lacking >> bit & 1 == 1);
                    let restore = msrgate_msrs::restore(self.msr);
                    properties.extend(bits.filter_map(|bit| restore?.property(bit)));
                }
                _ => {}
            }
        }
        properties
    }

    /// What there is to do where no rule is: about the VMM, or nothing.
    fn elsewhere(&self) -> String {
        let switches = words::switches(&self.qemu());
        let Some(access) = self.accesses.iter().find(|access| access.cause == Cause::Vmm) else {
            return match switches.as_str() {
                _ if self.is_crash(Cause::Privileged) => {
                    "the line does not name the register. `msrgate run --ignore-unknown --trace - -- QEMU…` does, and answers it".to_owned()
                }
                _ if self.is_crash(Cause::Crash) => "the line does not say that the guest was refused a register".to_owned(),
                _ if !self.is_harmless() => "KVM has the register: a guest on KVM needs no rule".to_owned(),
                "" => "nothing is to be mended: no guest was refused anything".to_owned(),
                _ => format!("nothing is to be mended; with `-cpu MODEL,{switches}` QEMU does not ask for it"),
            };
        };
        let of = |class| self.entry.is_some_and(|entry| entry.classes().contains(&class));
        let is_listed = self.entry.is_some_and(|entry| entry.state == State::Listed);
        let said = access.times.values.first().map(|(value, _)| *value);
        let (by, vmm) = match access.by {
            Speaker::Kvm => (Speaker::Qemu, "the VMM"),
            by => (by, by.name()),
        };
        let mend = match said.filter(|_| by == Speaker::Qemu) {
            Some(0) if of(Class::Vmx) => format!(
                "; this host's KVM has no VMX for guests: on an Intel processor load kvm_intel with `nested=1`, or where the guest runs no guests, `-cpu MODEL,{switches}`",
            ),
            Some(value) if of(Class::Vmx) => format!(
                "; this host lacks a bit of the value. `msrgate scan --json > here.json` and `printf 'MSR_ADDR,VALUE\\n{},{value:#x}\\n' | msrgate migrate - here.json` say which, and QEMU's switch; where the guest runs no guests, `-cpu MODEL,{switches}` does",
                self.msr,
            ),
            Some(_) if of(Class::Mtrr) => "; the guest is to have as many bits of physical addresses as where it comes from: `-cpu MODEL,phys-bits=N`, or `host-phys-bits=on` on both hosts".to_owned(),
            _ if !switches.is_empty() => format!("; `-cpu MODEL,{switches}` gives the guest no such register"),
            Some(0) if is_listed => "; it does so wherever KVM lists it, whatever the CPU model, and this KVM lists what it does not take. A newer kernel helps; if the host is itself a VM, the hypervisor below answers for registers that it does not have (`kvm.ignore_msrs`)".to_owned(),
            _ => ": give the guest a CPU model without what the bits stand for, or a host that has it".to_owned(),
        };
        format!("{vmm} sets the register, and no filter is asked{mend}")
    }

    /// A rule for accesses in these directions, or what `check` has against it.
    fn checked(&self, ops: &[Op]) -> Result<String, String> {
        let rule = self.rule(ops);
        let text = format!("version = 1\nname = \"why\"\ndefault = \"allow\"\n\n{rule}");
        let first = |found: &[Diagnostic]| found.first().map(|found| found.message.clone()).unwrap_or_default();
        let policy = Policy::parse("why.toml", &text).map_err(|errors| first(&errors.diagnostics))?;
        let map = policy.decision_map(None).map_err(|needed| needed.to_string())?;
        let findings = msrgate_policy::check(&policy, &map, None);
        match findings.iter().find(|found| found.is_open()) {
            Some(found) => Err(found.message.clone()),
            None => Ok(rule),
        }
    }

    fn rule(&self, ops: &[Op]) -> String {
        let msr = match self.entry {
            Some(entry) => format!("\"{}\"", entry.name()),
            None => self.msr.to_string(),
        };
        let mut rule = format!("[[rule]]\nmsr   = {msr}\n");
        for op in ops {
            rule += match op {
                Op::Read => "read  = \"zero\"\n",
                Op::Write => "write = \"ignore\"\n",
            };
        }
        let some = |causes: &[Cause]| self.accesses.iter().any(|access| causes.contains(&access.cause));
        let refused = self
            .accesses
            .iter()
            .any(|access| access.cause != Cause::Dropped && self.is_unknown(access) == Some(false));
        let why = match () {
            () if refused => "KVM refuses it",
            () if some(&[Cause::Ignored, Cause::Unknown]) => "the hypervisor does not know it",
            () => "gets #GP",
        };
        format!("{rule}why   = \"the guest uses it, and {why}\"\n")
    }
}

/// Whether KVM is known to have the register in this direction: of some it only reads a constant to a guest.
fn is_answered(entry: &Entry, op: Op) -> bool {
    match op {
        Op::Read => entry.is_known_to_kvm(),
        Op::Write => entry.holds_guest_state(),
    }
}
