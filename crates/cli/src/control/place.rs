//! Where sockets are: in a directory that is its owner's alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// The socket of an msrgate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Running {
    /// The process that keeps the policy in force.
    pub(crate) process: i32,
    pub(super) path: PathBuf,
    /// Whose it is.
    pub(super) user: u32,
}

/// root's.
const ROOT: &str = "/run/msrgate";

/// Where this user's are.
fn own() -> PathBuf {
    let user = Uid::effective();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime.filter(|path| path.is_absolute() && is_of(path, user.as_raw())) {
        // A system that is no more than a kernel and a program may have none.
        _ if user.is_root() && Path::new("/run").is_dir() => PathBuf::from(ROOT),
        Some(runtime) => runtime.join("msrgate"),
        None => PathBuf::from(format!("/tmp/msrgate-{user}")),
    }
}

/// The place of this process's, in a directory that is there and that no other user can write to.
pub(super) fn socket() -> io::Result<PathBuf> {
    let directory = own();
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if !is_of(&directory, Uid::effective().as_raw()) {
        let line = format!("`{}` is not a directory of this user's alone", directory.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, line));
    }
    Ok(directory.join(std::process::id().to_string()))
}

/// Whether a path is a directory, not a link to one, that its owner alone can write to.
fn is_of(path: &Path, user: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == user && found.mode() & 0o022 == 0)
}

/// All that this user may ask.
pub(super) fn sockets() -> Vec<Running> {
    let user = Uid::effective();
    let mut directories = vec![(own(), user.as_raw())];
    if user.is_root() {
        let number = |name: Option<&str>| name.and_then(|name| name.parse::<u32>().ok());
        for entry in fs::read_dir("/run/user").into_iter().flatten().flatten() {
            if let Some(user) = number(entry.file_name().to_str()) {
                directories.push((entry.path().join("msrgate"), user));
            }
        }
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name();
            if let Some(user) = number(name.to_str().and_then(|name| name.strip_prefix("msrgate-"))) {
                directories.push((entry.path(), user));
            }
        }
    }
    directories.sort();
    directories.dedup();
    let mut found = Vec::new();
    for (directory, user) in directories {
        if !is_of(&directory, user) {
            continue;
        }
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let path = entry.path();
            let there = Path::new(&format!("/proc/{process}")).exists();
            // The number may have become another process's.
            let refused =
                || UnixStream::connect(&path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if there && !refused() {
                found.push(Running { process, path, user });
            } else if user == Uid::effective().as_raw() {
                // Another user's directory may have become a link meanwhile, and nothing is taken away by its name there.
                let _ = fs::remove_file(&path);
            }
        }
    }
    found
}
