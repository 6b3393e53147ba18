//! The physical CPUs' MSRs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use msrgate_core::{ActionTable, Msr, ReadAction};

/// Open files of `/dev/cpu/N/msr`, by N.
#[derive(Debug)]
pub(crate) struct HostMsrs(Vec<Option<File>>);

impl HostMsrs {
    /// Whether a table reads them.
    pub(crate) fn are_read_by(table: &ActionTable) -> bool {
        let entries = table.reads().iter().map(|entry| &entry.action);
        let mut actions = entries.chain([&table.unknown().0, &table.invalid().0]);
        actions.any(|action| matches!(action, ReadAction::Host))
    }

    /// All of them; an error is one line for people.
    pub(crate) fn open() -> Result<HostMsrs, String> {
        let mut files = Vec::new();
        // Such as "0-3": CPUs that are there or may come.
        let possible = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
        let last = possible
            .trim()
            .rsplit(['-', ','])
            .next()
            .and_then(|last| last.parse().ok())
            .unwrap_or(0);
        for cpu in 0..=last {
            let path = format!("/dev/cpu/{cpu}/msr");
            match File::open(&path) {
                Ok(file) => files.push(Some(file)),
                // A CPU that is offline has no device; a guest cannot run there either.
                Err(error) if error.kind() == io::ErrorKind::NotFound && cpu > 0 => files.push(None),
                Err(error) => {
                    return Err(format!(
                        "{path} does not open, which `host` reads: load the msr module (`modprobe msr`) and run with \
                         CAP_SYS_RAWIO: {error}"
                    ));
                }
            }
        }
        Ok(HostMsrs(files))
    }

    /// The value on the CPU that runs a thread, or ran it last.
    pub(crate) fn read(&self, thread: i32, msr: Msr) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{thread}/stat")).ok()?;
        // The 39th field; the second may have blanks in it, and ends at the last parenthesis.
        let cpu: usize = stat.rsplit(')').next()?.split_whitespace().nth(36)?.parse().ok()?;
        let file = self.0.get(cpu)?.as_ref()?;
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, u64::from(msr.0)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }
}
