//! A hypervisor's MSRs, some of which refuse.

use msrgate_core::Msr;
use msrgate_engine::{Errno, Msrs, Refusal};

pub(crate) const UNKNOWN: u32 = 0x100;
pub(crate) const INVALID: u32 = 0x200;
pub(crate) const BROKEN: u32 = 0x300;
/// What every other MSR reads.
pub(crate) const VALUE: u64 = 0x1122_3344_5566_7788;

/// Records what was asked.
#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) reads: Vec<u32>,
    pub(crate) writes: Vec<(u32, u64)>,
}

fn refusal(msr: Msr) -> Option<Refusal> {
    match msr.0 {
        UNKNOWN => Some(Refusal::Unknown),
        INVALID => Some(Refusal::Invalid),
        BROKEN => Some(Refusal::Error(Errno::Enomem)),
        _ => None,
    }
}

impl Msrs for Machine {
    fn read(&mut self, msr: Msr) -> Result<u64, Refusal> {
        self.reads.push(msr.0);
        refusal(msr).map_or(Ok(VALUE), Err)
    }

    fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refusal> {
        self.writes.push((msr.0, value));
        refusal(msr).map_or(Ok(()), Err)
    }
}
