//! Which kernel runs here.

use std::fs;
use std::path::Path;

use kvm_ioctls::Kvm;
use msrgate_engine::{Profile, Vendor};

/// The kernel, with its KVM.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// Major and minor number.
    pub(crate) version: (u32, u32),
    /// The vendor module.
    pub(crate) module: Module,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Module {
    Intel,
    Amd,
    /// None of both: without hardware's bitmaps.
    Software,
}

impl Kernel {
    /// The kernel, or `None` where the live half of a test is to be skipped; it has said so then.
    pub(crate) fn running() -> Option<Kernel> {
        let why = match Kvm::new() {
            Ok(_) if parameter("kvm", "ignore_msrs") => "kvm.ignore_msrs is on".to_owned(),
            Ok(_) => return Some(Kernel::detected()),
            Err(error) => format!("/dev/kvm does not open: {error}"),
        };
        let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
        assert!(!required, "{why}");
        println!("skipped: {why}");
        None
    }

    fn detected() -> Kernel {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-', '\n']).map_while(|number| number.parse().ok());
        let module = if loaded("kvm_intel") {
            Module::Intel
        } else if loaded("kvm_amd") {
            Module::Amd
        } else {
            Module::Software
        };
        Kernel {
            version: (numbers.next().unwrap(), numbers.next().unwrap()),
            module,
        }
    }

    /// The engine's profile of it.
    pub(crate) fn profile(&self) -> Profile {
        let since = [
            ((6, 18), Profile::V6_18),
            ((6, 12), Profile::V6_12),
            ((6, 1), Profile::V6_1),
            ((5, 18), Profile::V5_19),
        ];
        let found = since.into_iter().find(|(first, _)| self.version >= *first);
        found.map_or(Profile::V5_10, |(_, profile)| profile)
    }

    pub(crate) fn vendor(&self) -> Option<Vendor> {
        match self.module {
            Module::Intel => Some(Vendor::Intel),
            Module::Amd => Some(Vendor::Amd),
            Module::Software => None,
        }
    }
}

fn loaded(module: &str) -> bool {
    Path::new("/sys/module").join(module).join("parameters").is_dir()
}

/// Whether a module's parameter is on.
pub(crate) fn parameter(module: &str, name: &str) -> bool {
    let path = Path::new("/sys/module").join(module).join("parameters").join(name);
    fs::read_to_string(path).is_ok_and(|value| value.starts_with(['Y', '1']))
}
