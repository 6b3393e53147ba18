//! Archives that the kernel unpacks as its first root: cpio, in the "newc" format of the kernel's
//! "initramfs buffer format".

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_777;

/// An archive being written. A later file takes the place of an earlier one at the same path.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    libraries: BTreeSet<PathBuf>,
    inodes: u32,
}

impl Archive {
    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &Path) {
        let inside = path.strip_prefix("/").unwrap_or(path);
        if inside.as_os_str().is_empty() || !self.directories.insert(inside.to_path_buf()) {
            return;
        }
        if let Some(above) = inside.parent() {
            self.directory(above);
        }
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file with these permissions.
    pub(crate) fn file(&mut self, path: &Path, permissions: u32, content: &[u8]) {
        self.directory(path.parent().unwrap_or(Path::new("/")));
        self.entry(path, REGULAR | (permissions & 0o7777), content);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &Path, target: &str) {
        self.directory(path.parent().unwrap_or(Path::new("/")));
        self.entry(path, LINK, target.as_bytes());
    }

    /// Adds a file or a folder with all in it, following links.
    ///
    /// # Errors
    /// What could not be read, and why.
    pub(crate) fn copy(&mut self, from: &Path, to: &Path) -> Result<(), String> {
        let failed = |error| format!("cannot read {}: {error}", from.display());
        let about = fs::metadata(from).map_err(failed)?;
        if about.is_dir() {
            self.directory(to);
            for entry in fs::read_dir(from).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                self.copy(&entry.path(), &to.join(entry.file_name()))?;
            }
            return Ok(());
        }
        let content = fs::read(from).map_err(failed)?;
        self.file(to, about.permissions().mode(), &content);
        Ok(())
    }

    /// Adds a program's shared libraries and its loader, each at the path where it is here.
    ///
    /// # Errors
    /// What could not be read, and why.
    pub(crate) fn libraries(&mut self, program: &Path) -> Result<(), String> {
        let said = Command::new("ldd")
            .arg(program)
            .output()
            .map_err(|error| format!("cannot run ldd: {error}"))?;
        let said = String::from_utf8_lossy(&said.stdout);
        for word in said.split_whitespace().filter(|word| word.starts_with('/')) {
            let library = Path::new(word);
            if library.is_file() && self.libraries.insert(library.to_path_buf()) {
                self.copy(library, library)?;
            }
        }
        Ok(())
    }

    /// The archive's bytes, ended so that another archive may follow.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) {
        use std::os::unix::ffi::OsStrExt;

        let name = path.strip_prefix("/").unwrap_or(path).as_os_str().as_bytes();
        self.inodes += 1;
        // inode, mode, uid, gid, links, mtime, size, four device numbers, name with its NUL, checksum
        let fields = [
            self.inodes,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).unwrap_or(u32::MAX),
            0,
            0,
            0,
            0,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_content_each_padded_to_four_bytes() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a"), 0o644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081A4");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..120], b"a\0hello\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_only_once() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/c"), 0o644, b"");
        archive.file(Path::new("/a/b/d"), 0o644, b"");
        let text = String::from_utf8(archive.finish()).expect("the archive is ASCII");
        let at = |name: &str| text.find(name).expect("the entry is there");
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0"));
        assert_eq!(text.matches("a/b\0").count(), 1);
    }
}
