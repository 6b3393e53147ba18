//! The first line of a trace.

use std::io::{self, Write};

use msrgate_msrs::cpuid::Cpuid;
use serde::{Deserialize, Serialize};

use crate::error::TraceError;

/// The version of the format that is read and written here.
pub const VERSION: u64 = 1;

/// Which of the guest's accesses a trace has, where none is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Coverage {
    /// Every access that the filter can stop.
    All,
    /// The first access of each VM to an MSR in a direction, and each that faulted.
    First,
    /// What a policy decided, and each access that faulted: not what the policy left to the kernel.
    Decided,
    /// What a log says of MSRs: not what guests were served with, and of what it says often not all.
    Logged,
}

/// What a trace says of itself in its first line. All but the version may be missing.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(expecting = "a trace's header")]
pub struct Header {
    /// [`VERSION`].
    pub msrgate_trace: u64,
    /// Kernel and CPU that the guest ran on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The host's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// What the guest was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// What ran the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// How the accesses were seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Which accesses the trace has; all where it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<Coverage>,
    /// Which part of a trace this is, from 1; `None` where it is not cut into parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<u64>,
    /// When the trace was begun: date and time in UTC, as RFC 3339 spells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<String>,
    /// What the VMM calls the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The process that was the VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Whether the host's KVM answered for MSRs that it does not know (`kvm.ignore_msrs`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_msrs: Option<bool>,
    /// The guest's CPU model, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// The guest's CPUID as `cpuid -r -1` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuid: Option<String>,
    /// The hash of the policy that the guest ran under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

impl Header {
    /// The guest's CPUID, where the header carries one.
    pub fn parse_cpuid(&self) -> Option<Result<Cpuid, TraceError>> {
        let text = self.cpuid.as_deref()?;
        Some(Cpuid::parse_raw(text).map_err(|error| TraceError::at(1, format!("its CPUID is malformed: {error}"))))
    }

    /// Whether accesses with which the guest was served are not in the trace.
    pub fn is_partial(&self) -> bool {
        matches!(self.coverage, Some(Coverage::Decided | Coverage::Logged)) || self.part.is_some()
    }

    /// Writes the first line of a trace.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *to, self)?;
        to.write_all(b"\n")
    }
}
