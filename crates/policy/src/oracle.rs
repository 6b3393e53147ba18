//! What a policy means, by definition: a loop over its rules.

use msrgate_core::{Msr, ReadAction, WriteAction};
use msrgate_msrs::cpuid::Cpuid;

use crate::policy::CpuidNeeded;
use crate::{Policy, Validity};

impl Policy {
    /// What a read gets and the number of the rule that says so.
    ///
    /// Slow and obvious: this is the definition that [`Policy::decision_map`] and every plan are held against.
    pub fn read(&self, msr: Msr, cpuid: Option<&Cpuid>) -> Result<(ReadAction, Option<u32>), CpuidNeeded> {
        let rules = self.rules_for(cpuid)?;
        if self.lacks(msr, cpuid) {
            return Ok((ReadAction::Deny, None));
        }
        for (index, rule) in rules {
            if let Some(action) = &rule.read
                && rule.names(msr)
            {
                return Ok((action.clone(), Some(index)));
            }
        }
        Ok((self.default_actions().0, None))
    }

    /// What a write gets and the number of the rule that says so; see [`Policy::read`].
    pub fn write(&self, msr: Msr, cpuid: Option<&Cpuid>) -> Result<(WriteAction, Option<u32>), CpuidNeeded> {
        let rules = self.rules_for(cpuid)?;
        if self.lacks(msr, cpuid) {
            return Ok((WriteAction::Deny, None));
        }
        for (index, rule) in rules {
            if let Some(action) = &rule.write
                && rule.names(msr)
            {
                return Ok((action.clone(), Some(index)));
            }
        }
        Ok((self.default_actions().1, None))
    }

    /// Whether `valid = "cpu-model"` denies the MSR to this guest.
    pub(crate) fn lacks(&self, msr: Msr, cpuid: Option<&Cpuid>) -> bool {
        let Some(cpuid) = cpuid else { return false };
        let entry = msrgate_msrs::by_msr(msr);
        self.valid == Validity::CpuModel && entry.is_some_and(|entry| entry.exists_on(cpuid) == Some(false))
    }
}

impl crate::Rule {
    /// Whether the rule is about the MSR.
    fn names(&self, msr: Msr) -> bool {
        self.msrs
            .iter()
            .any(|pattern| pattern.ranges().iter().any(|range| range.contains(msr)))
    }
}
