//! Which file a command names.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::exit::Failure;

/// The program that a shell would start under this name.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf, Failure> {
    let file = Path::new(name);
    if name.as_encoded_bytes().contains(&b'/') {
        return Ok(file.to_path_buf());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).map(|directory| directory.join(file));
    let mut programs = candidates.filter(|file| {
        fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    });
    programs
        .next()
        .ok_or_else(|| Failure::input(format!("`{}` is not in PATH", file.display())))
}
