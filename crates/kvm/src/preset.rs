//! Fixed answers in the kernel's own registers.

use std::os::fd::OwnedFd;

use msrgate_core::Op;
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
    let reached = |msr| Op::ALL.into_iter().any(|op| next.reaches(msr, op));
    let left = presets
        .iter()
        .find(|preset| !next.presets().contains(preset) && reached(preset.msr));
    match left {
        Some(preset) => Err(InstallError::PresetLeft { msr: preset.msr }),
        None => Ok(()),
    }
}
