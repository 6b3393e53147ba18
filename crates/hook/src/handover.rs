//! What the command hands to the VMM's process: the policy, ready to compile, in a file without a name.

#![expect(unsafe_code, reason = "system calls on descriptors")]

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use msrgate_plan::DecisionMap;

/// The environment variable that says where the policy is: `PID:FD:INODE`.
pub const VARIABLE: &str = "MSRGATE_RUN";

/// The lowest descriptor that is used: a VMM's arguments name low ones.
const LOWEST: libc::c_int = 500;

/// A policy on its way into a VMM. The descriptor is inherited by children.
#[derive(Debug)]
pub struct Handover {
    file: File,
}

impl Handover {
    /// Encodes the map into a sealed memfd.
    ///
    /// # Errors
    /// The kernel's, where it gives no memfd.
    pub fn new(map: &DecisionMap) -> io::Result<Handover> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string that lives for ever; the call touches no other memory.
        let fd = owned(unsafe { libc::memfd_create(c"msrgate-policy".as_ptr(), flags) })?;
        let mut file = File::from(fd);
        file.write_all(&map.to_bytes())?;
        let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: F_ADD_SEALS takes a number and touches no memory of ours.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Handover {
            file: inherited(&file)?.into(),
        })
    }

    /// The value of [`VARIABLE`].
    ///
    /// # Errors
    /// The kernel's, where it does not tell of its own file.
    pub fn variable(&self) -> io::Result<String> {
        let inode = self.file.metadata()?.ino();
        Ok(format!("{}:{}:{inode}", std::process::id(), self.file.as_raw_fd()))
    }

    /// The policy that `variable` names, as encoded bytes. Where the descriptor was closed on the way it is taken from
    /// the command, which lives as long as the VMM does.
    ///
    /// # Errors
    /// There is nothing of that name, or something else.
    pub fn receive(variable: &str) -> Result<Vec<u8>, HandoverError> {
        let mut parts = variable.split(':');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (Some(pid), Some(fd), Some(inode)) = (number(), number(), number()) else {
            return Err(HandoverError::Malformed);
        };
        let fd = RawFd::try_from(fd).map_err(|_| HandoverError::Malformed)?;
        // SAFETY: the descriptor is only looked at, never closed; where it is another file, or none, that shows.
        let ours = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
        if let Ok(bytes) = bytes(&ours, inode) {
            return Ok(bytes);
        }
        let theirs = File::open(format!("/proc/{pid}/fd/{fd}"));
        theirs
            .and_then(|file| bytes(&file, inode))
            .map_err(HandoverError::Unreadable)
    }
}

/// The whole file, if it is that inode.
fn bytes(file: &File, inode: u64) -> io::Result<Vec<u8>> {
    let metadata = file.metadata()?;
    if metadata.ino() != inode || !metadata.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let len = usize::try_from(metadata.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel just made, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A duplicate that children inherit, out of the way of descriptors that a command line may name.
fn inherited(file: &File) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD takes a number and touches no memory of ours.
    let high = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, LOWEST) };
    if high >= 0 {
        return owned(high);
    }
    // The limit on descriptors is lower than that.
    // SAFETY: as above.
    owned(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, 3) })
}

/// Why there is no policy.
#[derive(Debug)]
#[non_exhaustive]
pub enum HandoverError {
    /// The variable does not say what [`Handover::variable`] says.
    Malformed,
    /// The descriptor was closed and the command is gone or out of reach.
    Unreadable(io::Error),
}

impl fmt::Display for HandoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandoverError::Malformed => write!(f, "{VARIABLE} does not name a policy: start the VMM by `msrgate run`"),
            HandoverError::Unreadable(error) => {
                write!(f, "the policy that {VARIABLE} names cannot be read: {error}")
            }
        }
    }
}

impl std::error::Error for HandoverError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            HandoverError::Malformed => None,
            HandoverError::Unreadable(error) => Some(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_received_as_it_was_handed_over() {
        let map = DecisionMap::allow_all();
        let handover = Handover::new(&map).unwrap();
        let bytes = Handover::receive(&handover.variable().unwrap()).unwrap();
        assert_eq!(DecisionMap::from_bytes(&bytes), Ok(map));
    }

    #[test]
    fn another_file_at_the_descriptor_is_not_taken_for_the_policy() {
        let handover = Handover::new(&DecisionMap::allow_all()).unwrap();
        let variable = handover.variable().unwrap();
        let fd = variable.split(':').nth(1).unwrap();
        let wrong = [
            format!("1:{fd}:1"),
            "1:0:1".into(),
            "1:2".into(),
            "x".into(),
            String::new(),
        ];
        for wrong in wrong {
            assert!(Handover::receive(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_policy_cannot_be_changed_on_its_way() {
        let handover = Handover::new(&DecisionMap::allow_all()).unwrap();
        assert!(handover.file.write_at(b"msrgate9", 0).is_err());
        assert!(handover.file.set_len(0).is_err());
    }
}
