//! Where and under what a scan was made.

use msrgate_verify::Kernel;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::machine;

/// Where and under what a scan was made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Facts {
    /// The processor's name; null if the kernel does not tell it.
    pub(crate) host: Option<String>,
    /// The revision of its microcode; null likewise.
    pub(crate) microcode: Option<String>,
    /// Release and module.
    pub(crate) kernel: Option<String>,
    /// The guest's CPUID as the command line named it; null if it is all that KVM supports.
    pub(crate) cpuid: Option<String>,
    /// Whether its local APIC was in x2APIC mode.
    pub(crate) x2apic: bool,
    /// The policy that the guest ran under; null without one.
    pub(crate) policy: Option<ScanPolicy>,
}

/// The policy that the guest ran under.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(expecting = "an object with `name` and `hash`")]
pub(crate) struct ScanPolicy {
    /// The policy's name.
    pub(crate) name: String,
    /// The hash, as of `check`.
    pub(crate) hash: String,
}

impl Facts {
    /// Nothing is known.
    pub(super) fn none() -> Facts {
        Facts {
            host: None,
            microcode: None,
            kernel: None,
            cpuid: None,
            x2apic: false,
            policy: None,
        }
    }

    pub(crate) fn of_this_machine() -> Facts {
        let (host, microcode) = machine::processor();
        Facts {
            host,
            microcode,
            kernel: Some(Kernel::running().to_string()),
            cpuid: None,
            x2apic: false,
            policy: None,
        }
    }
}
