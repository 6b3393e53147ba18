//! Whether a library can be put into a program.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

/// The program that a shell would start under this name.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf, Failure> {
    let file = Path::new(name);
    if name.as_encoded_bytes().contains(&b'/') {
        return Ok(file.to_path_buf());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).map(|folder| folder.join(file));
    let mut programs = candidates.filter(|file| {
        fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    });
    programs
        .next()
        .ok_or_else(|| Failure::input(format!("`{}` is not in PATH", file.display())))
}

/// Refuses, with the reason and what else works, a program that would run without the policy.
pub(crate) fn check(program: &Path) -> Result<(), Failure> {
    let name = program.display();
    let unreadable = |error: io::Error| Failure::input(format!("`{name}` cannot be started: {error}"));
    let mut file = File::open(program).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let refused = |why: &str| Err(Failure::Line(Exit::Machine, format!("`{name}` {why}")));
    if gains_rights(program, &metadata) {
        return refused(
            "gains rights when it starts (setuid, setgid or file capabilities), so the dynamic linker would leave the \
             policy out: start it as the user that it becomes, from a copy without these",
        );
    }
    match Kind::of(&mut file).map_err(unreadable)? {
        Kind::Dynamic(linker) if !is_of_glibc(&linker) => refused(&format!(
            "is linked to another C library than glibc (its dynamic linker is `{}`), and the policy's library needs \
             glibc: take a build for glibc (a -gnu one, not -musl), or link msrgate into the VMM",
            linker.display()
        )),
        Kind::Dynamic(_) | Kind::Other => Ok(()),
        Kind::Static => refused(
            "is linked statically, so no library can be put before its system calls: take a build that is linked \
             dynamically (a -gnu one, not -musl), or link msrgate into the VMM",
        ),
        Kind::Foreign => refused(
            "is a program for another kind of processor (a 32-bit one, perhaps), into which the dynamic linker would not \
             load the library: take a build for x86-64",
        ),
        Kind::Go => refused(
            "is a Go program, which makes system calls without the C library, so no library can be put before them: \
             link msrgate into the VMM through its C interface",
        ),
    }
}

/// Whether the kernel tells the dynamic linker to be careful (AT_SECURE).
fn gains_rights(program: &Path, metadata: &Metadata) -> bool {
    let (mode, user) = (metadata.mode(), nix::unistd::Uid::current());
    let setuid = mode & 0o4000 != 0 && metadata.uid() != user.as_raw();
    let setgid = mode & 0o2010 == 0o2010 && metadata.gid() != nix::unistd::Gid::current().as_raw();
    let mut empty: [u8; 0] = [];
    // With no room for it the kernel tells its length. Root's own programs gain nothing by it.
    let capabilities = !user.is_root() && rustix::fs::getxattr(program, "security.capability", &mut empty).is_ok();
    setuid || setgid || capabilities
}

/// Whether a program's dynamic linker is glibc's, wherever it is.
fn is_of_glibc(linker: &Path) -> bool {
    let name = linker.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b"ld-linux") || name.starts_with(b"ld-lsb")
}

/// How a program reaches the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Kind {
    /// By libraries that this dynamic linker loads.
    Dynamic(PathBuf),
    /// By itself.
    Static,
    /// By the Go runtime.
    Go,
    /// It is not for x86-64.
    Foreign,
    /// It is a script, or nothing that is known here.
    Other,
}

const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

impl Kind {
    /// From a file's ELF header and program headers ("Program Header" in the System V ABI).
    fn of(file: &mut (impl Read + Seek)) -> io::Result<Kind> {
        let mut header = [0; 64];
        if file.read_exact(&mut header).is_err() || !header.starts_with(b"\x7fELF") {
            return Ok(Kind::Other);
        }
        let half = |at: usize| u16::from_le_bytes(array(&header, at));
        if !header.starts_with(b"\x7fELF\x02\x01") || half(18) != EM_X86_64 {
            return Ok(Kind::Foreign);
        }
        let (table, size, count) = (u64::from_le_bytes(array(&header, 32)), half(54), half(56));
        let mut linker = None;
        for number in 0..u64::from(count) {
            let mut entry = [0; 56];
            let at = table.saturating_add(number * u64::from(size));
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut entry)?;
            match u32::from_le_bytes(array(&entry, 0)) {
                PT_INTERP => {
                    let mut path = section(file, &entry, 4096)?;
                    // A C string.
                    path.truncate(path.iter().position(|byte| *byte == 0).unwrap_or(path.len()));
                    linker = Some(PathBuf::from(OsString::from_vec(path)));
                }
                PT_NOTE => {
                    let notes = section(file, &entry, 1 << 16)?;
                    // A note's name comes after three words: a Go build's is `Go`.
                    if notes.windows(8).any(|window| window == b"\x04\0\0\0Go\0\0") {
                        return Ok(Kind::Go);
                    }
                }
                _ => {}
            }
        }
        Ok(linker.map_or(Kind::Static, Kind::Dynamic))
    }
}

/// What a program header points to, and no more than `most` of it.
fn section(file: &mut (impl Read + Seek), entry: &[u8; 56], most: u64) -> io::Result<Vec<u8>> {
    let (offset, length) = (
        u64::from_le_bytes(array(entry, 8)),
        u64::from_le_bytes(array(entry, 32)),
    );
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(length.min(most)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Bytes of a header that is longer than that.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}
