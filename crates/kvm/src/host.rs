//! The physical CPUs' MSRs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use msrgate_core::{ActionTable, Msr, ReadSource};

use crate::InstallError;

/// Open files of `/dev/cpu/N/msr`, by N.
#[derive(Debug)]
pub struct HostMsrs(Vec<Option<File>>);

impl HostMsrs {
    /// Whether some action reads the physical CPU.
    pub(crate) fn are_read_by(table: &ActionTable) -> bool {
        table.read_actions().any(|action| action.source() == ReadSource::Host)
    }

    /// Opens the file of every CPU, or none; `None` where `table` reads no physical CPU.
    pub fn for_table(table: &ActionTable) -> Result<Option<HostMsrs>, InstallError> {
        if !HostMsrs::are_read_by(table) {
            return Ok(None);
        }
        // Such as "0-3": CPUs that are there or may come.
        let possible = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
        let last = possible.trim().rsplit(['-', ',']).next();
        let last = last.and_then(|last| last.parse().ok()).unwrap_or(0);
        let open = |cpu: usize| {
            let path = PathBuf::from(format!("/dev/cpu/{cpu}/msr"));
            match File::open(&path) {
                Ok(file) => Ok(Some(file)),
                // A CPU that is offline has no device; a guest cannot run there either.
                Err(source) if source.kind() == io::ErrorKind::NotFound && cpu > 0 => Ok(None),
                Err(source) => Err(InstallError::HostMsrs {
                    path,
                    source: source.into(),
                }),
            }
        };
        (0..=last).map(open).collect::<Result<_, _>>().map(HostMsrs).map(Some)
    }

    /// The value on a CPU; `None` where the CPU has no such MSR.
    pub fn read(&self, cpu: usize, msr: Msr) -> Option<u64> {
        let file = self.0.get(cpu)?.as_ref()?;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, u64::from(msr.0)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }
}
