//! Which kernel runs here.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvm_ioctls::{Kvm, VmFd};
use msrgate_engine::{Profile, Vendor};

/// The kernel, with its KVM.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// Major and minor number.
    pub(crate) version: (u32, u32),
    /// The vendor module.
    pub(crate) module: Module,
    running: msrgate_verify::Kernel,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Module {
    Intel,
    Amd,
    /// None of both: without hardware's bitmaps.
    Software,
}

/// A VM that is there from the first test to the last. With a host's first VM, and again when its last is gone, the
/// kernel patches its own scheduler (`preempt_notifier_inc`), and QEMU's emulation of several CPUs may run into the
/// breakpoint that it does this by.
static KEPT: OnceLock<VmFd> = OnceLock::new();

impl Kernel {
    /// The kernel, or `None` where the live half of a test is to be skipped; it has said so then.
    pub(crate) fn running() -> Option<Kernel> {
        let why = match Kvm::new() {
            Ok(_) if parameter("kvm", "ignore_msrs") => "kvm.ignore_msrs is on".to_owned(),
            Ok(kvm) => {
                KEPT.get_or_init(|| kvm.create_vm().unwrap());
                return Some(Kernel::detected());
            }
            Err(error) => format!("/dev/kvm does not open: {error}"),
        };
        let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
        assert!(!required, "{why}");
        println!("skipped: {why}");
        None
    }

    /// The kernel, where it has this module and a guest can be a hypervisor itself; otherwise likewise.
    pub(crate) fn nesting(module: Module) -> Option<Kernel> {
        let kernel = Kernel::running()?;
        let name = match module {
            Module::Intel => "kvm_intel",
            Module::Amd => "kvm_amd",
            Module::Software => return None,
        };
        if kernel.module == module && parameter(name, "nested") {
            return Some(kernel);
        }
        println!("skipped: no guest here is a hypervisor by {name}");
        None
    }

    fn detected() -> Kernel {
        let running = msrgate_verify::Kernel::running();
        Kernel {
            version: running.version(),
            module: match running.vendor() {
                Some(Vendor::Intel) => Module::Intel,
                Some(Vendor::Amd) => Module::Amd,
                None => Module::Software,
            },
            running,
        }
    }

    /// The engine's profile of it.
    pub(crate) fn profile(&self) -> Profile {
        self.running.profile()
    }

    pub(crate) fn vendor(&self) -> Option<Vendor> {
        self.running.vendor()
    }
}

/// A parameter of `kvm` that is on until this is dropped.
pub(crate) struct TurnedOn {
    path: PathBuf,
    before: String,
}

impl TurnedOn {
    /// Turns it on in an emulated lane, whose kernel is the test's own; else says that the test is skipped.
    pub(crate) fn in_a_lane(name: &str) -> Option<TurnedOn> {
        let path = parameter_file("kvm", name);
        let lane = std::env::var("MSRGATE_LANE").unwrap_or_default();
        if !matches!(lane.as_str(), "nested" | "intel") {
            println!("skipped: kvm.{name} is the whole host's, so it is turned on in emulated lanes alone");
            return None;
        }
        let before = fs::read_to_string(&path).unwrap();
        if !parameter("kvm", name)
            && let Err(error) = fs::write(&path, "1")
        {
            println!("skipped: kvm.{name} is off and cannot be turned on: {error}");
            return None;
        }
        Some(TurnedOn { path, before })
    }
}

impl Drop for TurnedOn {
    fn drop(&mut self) {
        // Where it was on before it may not be written; then nothing is to be undone.
        let _ = fs::write(&self.path, self.before.trim());
    }
}

/// Whether a module's parameter is on.
pub(crate) fn parameter(module: &str, name: &str) -> bool {
    fs::read_to_string(parameter_file(module, name)).is_ok_and(|value| value.starts_with(['Y', '1']))
}

fn parameter_file(module: &str, name: &str) -> PathBuf {
    Path::new("/sys/module").join(module).join("parameters").join(name)
}
