//! Which kernel this is, and which behaviour is expected of it.

use std::fs;

use msrgate_core::{Access, Msr};
use msrgate_engine::{Profile, Vendor};

use crate::args::ProfileArg;
use crate::machine;

/// What is known of this machine's kernel without trying.
#[derive(Debug)]
pub(super) struct Host {
    /// Its release, as `uname -r` prints it.
    pub(super) release: String,
    /// The module that drives the processor's virtualization.
    pub(super) module: String,
    /// Whose processor it drives; `None` for neither.
    pub(super) vendor: Option<Vendor>,
    /// The profile's name.
    pub(super) profile_name: &'static str,
    /// The kernel that the engine takes after.
    pub(super) profile: Profile,
    /// Whether the fast path of TSC_DEADLINE can be taken here.
    fastpath: bool,
}

impl Host {
    pub(super) fn look(profile: Option<ProfileArg>) -> Host {
        let (release, module) = (machine::release(), machine::module());
        let vendor = match module.as_str() {
            "kvm_intel" => Some(Vendor::Intel),
            "kvm_amd" => Some(Vendor::Amd),
            _ => None,
        };
        let version = version(&release);
        let (profile_name, profile) = match profile {
            Some(ProfileArg::V5_10) => ("5.10", Profile::V5_10),
            Some(ProfileArg::V5_12) => ("5.12", Profile::V5_12),
            Some(ProfileArg::V5_13) => ("5.13", Profile::V5_13),
            Some(ProfileArg::V5_18) => ("5.18", Profile::V5_18),
            Some(ProfileArg::V5_19) => ("5.19", Profile::V5_19),
            Some(ProfileArg::V6_1) => ("6.1", Profile::V6_1),
            Some(ProfileArg::V6_12) => ("6.12", Profile::V6_12),
            Some(ProfileArg::V6_18) => ("6.18", Profile::V6_18),
            Some(ProfileArg::Newest) => ("newest", Profile::NEWEST),
            None => of_version(version),
        };
        let timer = "/sys/module/kvm_intel/parameters/preemption_timer";
        let fastpath = match vendor {
            Some(Vendor::Intel) if version < (6, 18) => fs::read_to_string(timer).is_ok_and(|on| on.trim() == "Y"),
            Some(_) => true,
            None => false,
        };
        Host {
            release,
            module,
            vendor,
            profile_name,
            profile,
            fastpath,
        }
    }

    /// Whose fast path may complete the access ahead of the filter, if any does: a write of TSC_DEADLINE.
    pub(super) fn fastpath(&self, access: Access) -> Option<Vendor> {
        match access {
            Access::Write {
                msr: Msr::TSC_DEADLINE, ..
            } if self.fastpath => self.vendor,
            _ => None,
        }
    }
}

/// The first two numbers of a release; 0.0 where there are none.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|text| text.parse().ok());
    let mut next = || numbers.next().flatten().unwrap_or(0);
    (next(), next())
}

fn of_version(version: (u32, u32)) -> (&'static str, Profile) {
    match version {
        // Where the release says nothing, the newest is more likely than the oldest.
        (0, _) | (6, 18..) | (7.., _) => ("6.18", Profile::V6_18),
        (6, 12..) => ("6.12", Profile::V6_12),
        (6, 1..) => ("6.1", Profile::V6_1),
        (6, 0) | (5, 19..) => ("5.19", Profile::V5_19),
        (5, 18) => ("5.18", Profile::V5_18),
        (5, 13..) => ("5.13", Profile::V5_13),
        (5, 12..) => ("5.12", Profile::V5_12),
        _ => ("5.10", Profile::V5_10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_names_the_profile() {
        for (release, expected) in [
            ("6.1.0-32-amd64", "6.1"),
            ("6.12.117+deb13-cloud-amd64", "6.12"),
            ("6.18.44", "6.18"),
            ("7.3.0-rc1", "6.18"),
            ("6.0.6", "5.19"),
            ("5.19.0", "5.19"),
            ("5.18.19", "5.18"),
            ("5.15.0-91-generic", "5.13"),
            ("5.13.0", "5.13"),
            ("5.12.19", "5.12"),
            ("5.10.0-28-amd64", "5.10"),
            ("unknown", "6.18"),
        ] {
            assert_eq!(of_version(version(release)).0, expected, "{release}");
        }
    }
}
