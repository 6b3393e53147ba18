//! What a policy allows, by the definition: the first rule that names the MSR.
#![allow(dead_code, reason = "each test uses a part of this")]

use std::path::Path;

use msrgate_core::{ReadAction, Verdict, WriteAction};
use msrgate_policy::Policy;

use crate::filter::Op;

pub(crate) struct Allows {
    default: bool,
    rules: Vec<Rule>,
}

/// A stretch of a rule, and whether the rule allows reads and writes, where it says anything of them.
struct Rule {
    first: u32,
    last: u32,
    read: Option<bool>,
    write: Option<bool>,
}

impl Allows {
    pub(crate) fn load(path: &Path) -> Allows {
        let policy = Policy::from_file(path).expect("a policy");
        let mut rules = Vec::new();
        for rule in &policy.rules {
            assert!(rule.when.is_always(), "the policy depends on the guest's CPUID");
            for range in rule.ranges() {
                rules.push(Rule {
                    first: range.first().0,
                    last: range.last().0,
                    read: rule.read.as_ref().map(|action| *action == ReadAction::Allow),
                    write: rule.write.as_ref().map(|action| *action == WriteAction::Allow),
                });
            }
        }
        Allows {
            default: policy.default == Verdict::Allow,
            rules,
        }
    }

    pub(crate) fn allows(&self, msr: u32, op: Op) -> bool {
        let naming = self.rules.iter().filter(|rule| (rule.first..=rule.last).contains(&msr));
        let mut said = naming.filter_map(|rule| match op {
            Op::Read => rule.read,
            Op::Write => rule.write,
        });
        said.next().unwrap_or(self.default)
    }

    /// The MSRs around each place where the policy may change its mind.
    pub(crate) fn edges(&self) -> impl Iterator<Item = u32> {
        let edges = self.rules.iter().flat_map(|rule| [rule.first, rule.last]);
        edges.flat_map(|msr| [msr.saturating_sub(1), msr, msr.saturating_add(1)])
    }
}
