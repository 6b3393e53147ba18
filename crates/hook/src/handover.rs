//! What the command hands to the VMM's process: the policy, ready to compile, and a board to write on, each in a file
//! without a name.

#![expect(unsafe_code, reason = "system calls on descriptors")]

use std::ffi::CStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use msrgate_plan::DecisionMap;

use crate::board::{Board, Wanted};

/// The environment variable that says where both are: `PID:FD:INODE:FD:INODE`, the policy first.
pub const VARIABLE: &str = "MSRGATE_RUN";

/// The lowest descriptor that is used: a VMM's arguments name low ones.
const LOWEST: libc::c_int = 500;

/// A policy on its way into a VMM. Its descriptors are inherited by children.
#[derive(Debug)]
pub struct Handover {
    policy: File,
    board: Board,
}

impl Handover {
    /// Encodes the map into a sealed memfd, and makes a board.
    ///
    /// # Errors
    /// The kernel's, where it gives no memfd.
    pub fn new(map: &DecisionMap, wanted: Wanted) -> io::Result<Handover> {
        let mut policy = memfd(c"msrgate-policy", 0)?;
        policy.write_all(&map.to_bytes())?;
        seal(&policy, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE)?;
        Ok(Handover {
            policy: inherited(&policy)?.into(),
            board: Board::new(inherited(&memfd(c"msrgate-board", Board::BYTES)?)?.into(), wanted)?,
        })
    }

    /// What the VMM writes on.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The value of [`VARIABLE`].
    ///
    /// # Errors
    /// The kernel's, where it does not tell of its own files.
    pub fn variable(&self) -> io::Result<String> {
        let mut variable = std::process::id().to_string();
        for file in [&self.policy, self.board.file()] {
            let inode = file.metadata()?.ino();
            variable = format!("{variable}:{}:{inode}", file.as_raw_fd());
        }
        Ok(variable)
    }
}

/// What a VMM's process finds in its environment.
#[derive(Debug)]
pub struct Received {
    policy: Vec<u8>,
    board: Place,
}

impl Received {
    /// What `variable`, the value of [`VARIABLE`], names. Where a descriptor was closed on the way its file is taken
    /// from the command, which lives as long as the VMM does.
    ///
    /// # Errors
    /// There is nothing of that name, or something else.
    pub fn from_variable(variable: &str) -> Result<Received, HandoverError> {
        let mut parts = variable.split(':');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let command = number().ok_or(HandoverError::Malformed)?;
        let mut place = || {
            Some(Place {
                command,
                fd: RawFd::try_from(number()?).ok()?,
                inode: number()?,
            })
        };
        let (Some(policy), Some(board)) = (place(), place()) else {
            return Err(HandoverError::Malformed);
        };
        let policy = policy.open().and_then(|file| {
            let len = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        });
        Ok(Received {
            policy: policy.map_err(HandoverError::Unreadable)?,
            board,
        })
    }

    /// The policy.
    ///
    /// # Errors
    /// The bytes are none, such as those of another version.
    pub fn map(&self) -> Result<DecisionMap, HandoverError> {
        DecisionMap::from_bytes(&self.policy).map_err(|_| HandoverError::Malformed)
    }

    /// The board, mapped.
    ///
    /// # Errors
    /// It is out of reach.
    pub fn board(&self) -> Result<Board, HandoverError> {
        self.board
            .open()
            .and_then(Board::open)
            .map_err(HandoverError::Unreadable)
    }
}

/// Where a file is that the command has open.
#[derive(Debug)]
struct Place {
    command: u64,
    fd: RawFd,
    inode: u64,
}

impl Place {
    fn open(&self) -> io::Result<File> {
        // SAFETY: the descriptor is borrowed to be duplicated and for nothing else; where it is another file, or none,
        // that shows.
        let inherited = unsafe { BorrowedFd::borrow_raw(self.fd) };
        if let Ok(fd) = inherited.try_clone_to_owned()
            && let Ok(file) = self.checked(fd.into())
        {
            return Ok(file);
        }
        let path = format!("/proc/{}/fd/{}", self.command, self.fd);
        let readable = || File::open(&path);
        let theirs = OpenOptions::new().read(true).write(true).open(&path);
        self.checked(theirs.or_else(|_| readable())?)
    }

    fn checked(&self, file: File) -> io::Result<File> {
        let metadata = file.metadata()?;
        if metadata.ino() != self.inode || !metadata.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(file)
    }
}

/// A file without a name, of this many bytes that nobody can take away.
pub(crate) fn memfd(name: &CStr, bytes: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string that lives over the call, which touches no other memory.
    let file = File::from(owned(unsafe { libc::memfd_create(name.as_ptr(), flags) })?);
    if bytes > 0 {
        file.set_len(bytes)?;
        seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
    }
    Ok(file)
}

fn seal(file: &File, seals: libc::c_int) -> io::Result<()> {
    let seals = seals | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes a number and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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
                write!(f, "what {VARIABLE} names cannot be read: {error}")
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

    fn handover() -> (Handover, String) {
        let handover = Handover::new(&DecisionMap::allow_all(), Wanted::default()).unwrap();
        let variable = handover.variable().unwrap();
        (handover, variable)
    }

    #[test]
    fn a_policy_and_a_board_are_received_as_they_were_handed_over() {
        let (handover, variable) = handover();
        let received = Received::from_variable(&variable).unwrap();
        assert_eq!(received.map().unwrap(), DecisionMap::allow_all());
        received.board().unwrap().new_vm();
        assert_eq!(handover.board().vms(), 1);
    }

    #[test]
    fn what_was_closed_on_the_way_is_taken_from_the_command() {
        let (_handover, variable) = handover();
        let parts: Vec<&str> = variable.split(':').collect();
        let elsewhere = Place {
            command: parts[0].parse().unwrap(),
            fd: parts[1].parse().unwrap(),
            inode: parts[2].parse().unwrap(),
        };
        // As if nothing were inherited.
        let path = format!("/proc/{}/fd/{}", elsewhere.command, elsewhere.fd);
        assert!(elsewhere.checked(File::open(path).unwrap()).is_ok());
        assert!(elsewhere.open().is_ok());
    }

    #[test]
    fn another_file_at_the_descriptor_is_not_taken_for_the_policy() {
        let (_handover, variable) = handover();
        let fd = variable.split(':').nth(1).unwrap();
        let wrong = [format!("1:{fd}:1:{fd}:1"), "1:2".into(), "x".into(), String::new()];
        for wrong in wrong {
            assert!(Received::from_variable(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_policy_cannot_be_changed_on_its_way_nor_a_board_cut_short() {
        let (handover, _) = handover();
        assert!(handover.policy.write_at(b"msrgate9", 0).is_err());
        assert!(handover.policy.set_len(0).is_err());
        assert!(handover.board.file().set_len(0).is_err());
    }
}
