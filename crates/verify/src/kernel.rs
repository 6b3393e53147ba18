//! Which kernel this is, and which behaviour is expected of it.

use std::fmt;
use std::fs;

use msrgate_core::{Access, Msr};
use msrgate_engine::{Profile, Vendor};
use msrgate_msrs::Linux;

/// The engine's profiles by name, and the first version of Linux that each is of.
const PROFILES: [(&str, (u32, u32), Profile); 9] = [
    // No kernel's: one without its known gaps.
    ("newest", (u32::MAX, 0), Profile::NEWEST),
    ("6.18", (6, 18), Profile::V6_18),
    ("6.12", (6, 12), Profile::V6_12),
    ("6.1", (6, 1), Profile::V6_1),
    ("5.19", (5, 19), Profile::V5_19),
    ("5.18", (5, 18), Profile::V5_18),
    ("5.13", (5, 13), Profile::V5_13),
    ("5.12", (5, 12), Profile::V5_12),
    ("5.10", (1, 0), Profile::V5_10),
];

/// What is known of this machine's kernel without trying.
#[derive(Clone, Debug)]
pub struct Kernel {
    release: String,
    module: String,
    profile: (&'static str, Profile),
    /// Whether the fast path of TSC_DEADLINE can be taken here.
    fastpath: bool,
}

impl Kernel {
    /// The kernel that runs here.
    pub fn running() -> Kernel {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease");
        let release = release.map_or_else(|_| "unknown".into(), |text| text.trim().to_owned());
        let loaded = fs::read_dir("/sys/module").into_iter().flatten();
        let names = loaded.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let module = names.filter(|name| name.starts_with("kvm_")).min();
        let version = version(&release);
        let mut kernel = Kernel {
            profile: profile(version),
            module: module.unwrap_or_else(|| "kvm".into()),
            release,
            fastpath: true,
        };
        if kernel.vendor() == Some(Vendor::Intel) && version < (6, 18) {
            let timer = "/sys/module/kvm_intel/parameters/preemption_timer";
            kernel.fastpath = fs::read_to_string(timer).is_ok_and(|on| on.trim() == "Y");
        }
        kernel
    }

    /// This machine's kernel, with an engine that takes after the kernel of this name, which is one of [`Kernel::profiles`].
    pub fn with_profile(self, name: &str) -> Option<Kernel> {
        let (name, _, profile) = PROFILES.into_iter().find(|(known, ..)| *known == name)?;
        Some(Kernel {
            profile: (name, profile),
            ..self
        })
    }

    /// The names of the profiles, the newest first.
    pub fn profiles() -> [&'static str; 9] {
        PROFILES.map(|(name, ..)| name)
    }

    /// The kernel's release, as `uname -r` prints it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Major and minor number; 0.0 where the release says nothing.
    pub fn version(&self) -> (u32, u32) {
        version(&self.release)
    }

    /// The module that drives the processor's virtualization.
    pub fn module(&self) -> &str {
        &self.module
    }

    /// Whose processor the module drives; `None` for neither vendor's.
    pub fn vendor(&self) -> Option<Vendor> {
        match self.module.as_str() {
            "kvm_intel" => Some(Vendor::Intel),
            "kvm_amd" => Some(Vendor::Amd),
            _ => None,
        }
    }

    /// The name of the profile.
    pub fn profile_name(&self) -> &'static str {
        self.profile.0
    }

    /// The behaviour that is expected.
    pub fn profile(&self) -> Profile {
        self.profile.1
    }

    /// Whose fast path may complete the access ahead of the filter, if any does: a write of TSC_DEADLINE.
    pub(crate) fn fastpath(&self, access: Access) -> Option<Vendor> {
        match access {
            Access::Write {
                msr: Msr::TSC_DEADLINE, ..
            } if self.fastpath => self.vendor(),
            _ => None,
        }
    }
}

/// Release and module.
impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.release, self.module)
    }
}

/// The first two numbers of a release; 0.0 where there are none.
fn version(release: &str) -> (u32, u32) {
    release.parse().map_or((0, 0), |Linux(major, minor)| (major, minor))
}

/// Where the release says nothing, the newest is more likely than the oldest.
fn profile(version: (u32, u32)) -> (&'static str, Profile) {
    let found = PROFILES.into_iter().find(|(_, first, _)| version >= *first);
    found.map_or(("6.18", Profile::V6_18), |(name, _, profile)| (name, profile))
}

#[cfg(test)]
mod tests {
    use msrgate_engine::{Coverage, TscDeadline};
    use msrgate_msrs::BypassKind;

    use super::*;

    #[test]
    fn the_profiles_let_pass_what_the_database_says() {
        for (name, (major, minor), profile) in PROFILES.into_iter().filter(|(name, ..)| *name != "newest") {
            let linux = Linux(major, minor);
            let passing = || msrgate_msrs::bypasses().iter().filter(|bypass| bypass.is_of(linux));
            let lists = passing().any(|bypass| bypass.kind == BypassKind::Kernel && bypass.of.is_empty());
            assert_eq!(lists, profile.nested_lists == Coverage::Exempt, "{name}: lists");
            let mut fast = passing().filter(|bypass| bypass.kind == BypassKind::Fastpath);
            let amd = fast.any(|bypass| bypass.says.contains("kvm_amd"));
            assert_eq!(
                amd,
                profile.tsc_deadline == TscDeadline::Bypassed,
                "{name}: the fast path"
            );
        }
    }

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
            assert_eq!(profile(version(release)).0, expected, "{release}");
        }
    }
}
