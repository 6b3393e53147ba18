//! Fixed answers in the kernel's own registers.

use std::os::fd::OwnedFd;

use msrgate_core::{Entry, Msr, Op, ReadAction, Verdict, WriteAction};
use msrgate_plan::{Plan, Preset};

use crate::{InstallError, ioctl};

/// Puts `presets` into a vCPU's registers and proves by reading that they are there.
///
/// A register that has the value already is not written: some always have it, and then the kernel refuses a write.
pub(crate) fn put(vcpu: &OwnedFd, presets: &[Preset]) -> Result<(), InstallError> {
    for preset in presets {
        if ioctl::get_msr(vcpu, preset.msr) == Some(preset.value) {
            continue;
        }
        // Whether it was taken is what reading shows.
        let _ = ioctl::set_msr(vcpu, preset.msr, preset.value);
        let holds = ioctl::get_msr(vcpu, preset.msr);
        if holds != Some(preset.value) {
            return Err(InstallError::PresetNotHeld { preset: *preset, holds });
        }
    }
    Ok(())
}

/// Whether `next` can take the place of a plan on vCPUs that hold `presets`.
pub(crate) fn replaceable(presets: &[Preset], next: &Plan) -> Result<(), InstallError> {
    if let Some(late) = next.presets().iter().find(|preset| !presets.contains(preset)) {
        return Err(InstallError::PresetTooLate { msr: late.msr });
    }
    let left = presets
        .iter()
        .find(|preset| !next.presets().contains(preset) && reaches(next, preset.msr));
    match left {
        Some(preset) => Err(InstallError::PresetLeft { msr: preset.msr }),
        None => Ok(()),
    }
}

/// Whether a guest under `plan` sees what the kernel's register holds, or changes it.
fn reaches(plan: &Plan, msr: Msr) -> bool {
    let denied = |op| plan.filter().verdict(msr, op) == Verdict::Deny;
    let read = find(plan.table().reads(), msr).is_none_or(|action| matches!(action, ReadAction::Mask { .. }));
    let write = find(plan.table().writes(), msr).is_none_or(|action| {
        !matches!(
            action,
            WriteAction::Deny | WriteAction::Ignore | WriteAction::Shadow | WriteAction::Handler(_)
        )
    });
    !denied(Op::Read) || !denied(Op::Write) || read || write
}

fn find<A>(entries: &[Entry<A>], msr: Msr) -> Option<&A> {
    let entry = entries.iter().find(|entry| entry.range.contains(msr))?;
    Some(&entry.action)
}
