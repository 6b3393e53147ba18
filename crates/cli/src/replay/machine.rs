//! Where a replay runs, and what an access got there.

use msrgate_core::{Answer, Event, Outcome};

use crate::exit::Failure;

/// What an access got in one of the runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessResult {
    pub(crate) outcome: Outcome,
    /// What user space answered; `None` where the access did not leave the kernel.
    pub(crate) answer: Option<Answer>,
}

/// Where a replay runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Backend {
    Kvm,
    Engine,
}

impl Backend {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Backend::Kvm => "kvm",
            Backend::Engine => "engine",
        }
    }
}

/// One vCPU of one of the runs.
pub(crate) trait Machine {
    /// Lets the guest make the accesses of these events in order.
    fn run(&mut self, events: &[Event], got: &mut Vec<AccessResult>) -> Result<(), Failure>;
}
