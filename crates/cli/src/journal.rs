//! The journal of systemd, by its native protocol ("JOURNAL_NATIVE_PROTOCOL" in systemd's documentation).

use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Where it listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// A way to the journal. It never waits: what finds no room is an error.
#[derive(Debug)]
pub(crate) struct Journal(UnixDatagram);

/// Fields of an entry, in order.
pub(crate) type Fields<'a> = [(&'a str, String)];

impl Journal {
    /// The journal of this machine.
    ///
    /// # Errors
    /// The kernel's, where there is none.
    pub(crate) fn open() -> io::Result<Journal> {
        Journal::at(Path::new(SOCKET))
    }

    fn at(path: &Path) -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Journal(socket))
    }

    /// Writes an entry.
    ///
    /// # Errors
    /// The kernel's: nobody listens, or has no time.
    pub(crate) fn write(&self, fields: &Fields<'_>) -> io::Result<()> {
        self.0.send(&entry(fields)).map(drop)
    }
}

/// Whether standard error is the journal's already: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)).
pub(crate) fn is_standard_error() -> bool {
    let Some(named) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|stderr| named == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// `FIELD=value` a line; a value of several lines has its length before it.
fn entry(fields: &Fields<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.extend(name.as_bytes());
        match value.contains('\n') {
            false => bytes.push(b'='),
            true => {
                bytes.push(b'\n');
                bytes.extend((value.len() as u64).to_le_bytes());
            }
        }
        bytes.extend(value.as_bytes());
        bytes.push(b'\n');
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_gets_fields_and_one_that_does_not_read_holds_up_nobody() {
        let directory = std::env::temp_dir().join(format!("msrgate-journal-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("socket");
        assert!(Journal::at(&path).is_err());
        let fake = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        let fields = [
            ("MESSAGE", "an access".to_owned()),
            ("MSR", "0x8b".to_owned()),
            ("VM_NAME", "a\nb".to_owned()),
        ];
        journal.write(&fields).unwrap();
        let mut bytes = [0; 256];
        let length = fake.recv(&mut bytes).unwrap();
        assert_eq!(
            bytes[..length],
            *b"MESSAGE=an access\nMSR=0x8b\nVM_NAME\n\x03\0\0\0\0\0\0\0a\nb\n"
        );
        let refused = (0..100_000).find_map(|_| journal.write(&fields).err());
        assert_eq!(refused.map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
