//! Files that the command writes at once or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What becomes of a file that is there already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It stays, and writing fails.
    Kept,
    /// The new one takes its place.
    Replaced,
}

/// Writes a text into a file with these permissions, or those of any new file. Whoever opens the file meanwhile finds all of the old one or all of the new.
pub(crate) fn put(path: &Path, text: &str, permissions: Option<Permissions>, existing: Existing) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(name);
    let mut file = File::create_new(&new)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| permissions.map_or(Ok(()), |permissions| file.set_permissions(permissions)))
        .and_then(|()| file.sync_all())
        .and_then(|()| match existing {
            Existing::Replaced => fs::rename(&new, path),
            // A link fails where the name is taken.
            Existing::Kept => fs::hard_link(&new, path).and_then(|()| fs::remove_file(&new)),
        });
    if written.is_err() {
        // What is left over is nobody's; the error that is told is the first.
        let _ = fs::remove_file(&new);
    }
    written
}
