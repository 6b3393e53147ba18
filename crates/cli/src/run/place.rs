//! The file that a trace goes to: what it is called, that no other run has it, and what stood there before.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::mem;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::{Access, FlockOperation, access, flock};

use crate::exit::Failure;
use crate::{input, words};

/// How often a file is looked at that others make and move meanwhile.
const TRIES: usize = 16;

/// Where a trace is to go.
pub(crate) struct Place {
    /// As the command line has it.
    name: PathBuf,
    /// What `%n` stands for.
    vm: String,
    /// What a relative name is relative to: the process that stays in the background is elsewhere.
    directory: PathBuf,
    claimed: Mutex<Option<Claimed>>,
}

/// A file that is this run's to write.
pub(crate) struct Claimed {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// It was not there before.
    pub(crate) is_new: bool,
    /// Who makes the first vCPU.
    pub(crate) process: Option<u32>,
    pub(crate) started: SystemTime,
}

impl Place {
    /// Says what can be said before the VMM is started. A file is neither made nor changed yet; what is none by its own
    /// name, such as a pipe, is opened, and can have no limit of its size. The trace is not one of `inputs`.
    pub(crate) fn new(name: &Path, vm: String, inputs: &[Option<&Path>], limited: bool) -> Result<Place, Failure> {
        let place = Place {
            name: name.to_path_buf(),
            vm,
            directory: std::env::current_dir().unwrap_or_default(),
            claimed: Mutex::default(),
        };
        // Some process's number stands for the VMM's.
        let path = place
            .path(std::process::id(), SystemTime::now())
            .map_err(Failure::input)?;
        input::refuse_overwrite(&path, inputs.iter().flatten().copied())?;
        let open = || {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
        };
        let usable = match fs::symlink_metadata(&path) {
            Ok(there) if there.is_file() || there.is_dir() => OpenOptions::new().write(true).open(&path).map(drop),
            Ok(_) if limited => {
                let line = format!(
                    "`{}` is no file that can be begun anew: leave --trace-size out",
                    path.display()
                );
                return Err(Failure::input(line));
            }
            Ok(_) => open().and_then(|file| place.hold(path.clone(), file)),
            Err(_) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                access(parent.unwrap_or(Path::new(".")), Access::WRITE_OK | Access::EXEC_OK).map_err(Into::into)
            }
        };
        usable.map_err(|error| Failure::input(cannot(&path, &error)))?;
        Ok(place)
    }

    /// Goes on with a pipe, a device or what a link leads to.
    fn hold(&self, path: PathBuf, file: File) -> io::Result<()> {
        let there = file.metadata()?;
        if there.is_file() && (there.len() > 0 || !lock(&file)) {
            return Err(io::Error::other(
                "it leads to a file that is not empty, or another run's",
            ));
        }
        if there.is_file() {
            file.set_permissions(Permissions::from_mode(0o600))?;
        }
        *self.claimed() = Some(Claimed {
            path,
            file,
            is_new: false,
            process: None,
            started: SystemTime::now(),
        });
        Ok(())
    }

    /// Makes the file for the first vCPU, which `process` makes. A file that another run has is left alone, which is an
    /// error; one that nobody has is moved out of the way, and what is to be said of that is given.
    pub(crate) fn claim(&self, process: u32) -> Result<Option<String>, String> {
        let started = SystemTime::now();
        let shown = self.path(process, started)?;
        let path = self.directory.join(&shown);
        let cannot = |error: io::Error| cannot(&shown, &error);
        let mut moved = None;
        for _ in 0..TRIES {
            let file = match create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                created => Some(created.map_err(cannot)?),
            };
            let is_new = file.is_some();
            let file = match file.map_or_else(|| OpenOptions::new().write(true).open(&path), Ok) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.map_err(cannot)?,
            };
            if !lock(&file) {
                return Err(format!(
                    "another `msrgate run` writes to `{}`: name the trace otherwise, by `%p` say, which is each VMM's own",
                    shown.display()
                ));
            }
            let of = |there: fs::Metadata| (there.dev(), there.ino());
            let there = file.metadata().map_err(cannot)?;
            // It may have been another run's, which has moved it meanwhile.
            if fs::metadata(&path).map(of).ok() != Some(of(there.clone())) {
                continue;
            }
            if there.len() > 0 {
                let to = aside(&path).map_err(cannot)?;
                moved = Some(format!(
                    "what was in `{}` is in `{}` now",
                    shown.display(),
                    to.display()
                ));
                continue;
            }
            // One that was there may have been for others too.
            let owners = file.set_permissions(Permissions::from_mode(0o600));
            owners.map_err(cannot)?;
            *self.claimed() = Some(Claimed {
                path,
                file,
                is_new,
                process: Some(process),
                started,
            });
            return Ok(moved);
        }
        Err(format!(
            "`{}` is made and moved by others all the time",
            shown.display()
        ))
    }

    /// The file, where it is claimed: once.
    pub(crate) fn take(&self) -> Option<Claimed> {
        mem::take(&mut *self.claimed())
    }

    fn claimed(&self) -> MutexGuard<'_, Option<Claimed>> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the name comes to.
    fn path(&self, process: u32, started: SystemTime) -> Result<PathBuf, String> {
        let mut path = Vec::new();
        let mut bytes = self.name.as_os_str().as_bytes().iter();
        while let Some(byte) = bytes.next() {
            match (byte, if *byte == b'%' { bytes.next() } else { None }) {
                (b'%', Some(b'%')) => path.push(b'%'),
                // The name of a VM names no directory.
                (b'%', Some(b'n')) => path.extend(self.vm.replace('/', "_").bytes()),
                (b'%', Some(b'p')) => path.extend(process.to_string().bytes()),
                (b'%', Some(b't')) => path.extend(words::date(started).bytes().filter(|byte| !b"-:".contains(byte))),
                (b'%', _) => {
                    return Err(format!(
                        "`{}` is not a name for a trace: `%n` is the VM's name, `%p` the VMM's process, `%t` the time, and `%%` \
                         a percent sign",
                        self.name.display()
                    ));
                }
                _ => path.push(*byte),
            }
        }
        Ok(PathBuf::from(std::ffi::OsString::from_vec(path)))
    }
}

/// A file that is not there yet, for its owner: what guests do tells where their kernels are.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Whether no other run has it; none has from here on.
pub(crate) fn lock(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Moves a file to the first of `PATH.1`, `PATH.2`, … that is free.
pub(crate) fn aside(path: &Path) -> io::Result<PathBuf> {
    let numbered = |number: u32| {
        let mut to = path.as_os_str().to_owned();
        to.push(format!(".{number}"));
        PathBuf::from(to)
    };
    let free = (1..).map(numbered).find(|to| fs::symlink_metadata(to).is_err());
    let to = free.ok_or(io::ErrorKind::AlreadyExists)?;
    fs::rename(path, &to)?;
    Ok(to)
}

fn cannot(path: &Path, error: &io::Error) -> String {
    format!("cannot write `{}`: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A directory that is gone at the end.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("msrgate-place-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn place(&self, name: &str) -> Result<Place, String> {
            let place = Place::new(&self.0.join(name), "vm".to_owned(), &[], false);
            place.map_err(|failure| failure.to_string())
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_name_has_the_vm_the_process_and_the_time_in_it() {
        let place = Place {
            name: PathBuf::from("a/%n-%p-%t-100%%"),
            vm: "../b/c".to_owned(),
            directory: PathBuf::new(),
            claimed: Mutex::default(),
        };
        let started = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_981_965);
        let path = place.path(7, started).unwrap();
        assert_eq!(path, Path::new("a/.._b_c-7-20261129T195245Z-100%"));
    }

    #[test]
    fn what_is_there_is_moved_out_of_the_way_and_what_another_has_is_left_alone() {
        let directory = Directory::new("moved");
        let path = |name: &str| directory.0.join(name);
        for text in ["one", "two"] {
            fs::write(path("t"), text).unwrap();
            assert!(directory.place("t").unwrap().claim(1).unwrap().is_some());
        }
        let read = |name: &str| fs::read_to_string(path(name)).unwrap();
        assert_eq!([read("t.1"), read("t.2"), read("t")], ["one", "two", ""]);

        // An empty one is nobody's.
        let place = directory.place("t").unwrap();
        assert_eq!(place.claim(1), Ok(None));
        let claimed = place.take().unwrap();
        assert!(!claimed.is_new);
        assert_eq!(claimed.file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for text in ["", "three"] {
            fs::write(path("t"), text).unwrap();
            let error = directory.place("t").unwrap().claim(2).unwrap_err();
            assert!(error.contains("another `msrgate run` writes to"), "{error}");
        }
        drop(claimed);
        assert_eq!(read("t"), "three");
        assert!(directory.place("t").unwrap().claim(2).unwrap().is_some());
        let place = directory.place("new").unwrap();
        assert!(!path("new").exists());
        assert_eq!(place.claim(1), Ok(None));
        assert!(place.take().unwrap().is_new);
    }

    #[test]
    fn what_a_link_leads_to_is_never_moved() {
        let directory = Directory::new("link");
        let path = |name: &str| directory.0.join(name);
        std::os::unix::fs::symlink("target", path("link")).unwrap();
        fs::write(path("target"), "text").unwrap();
        let error = directory.place("link").err().unwrap();
        assert!(error.contains("leads to a file that is not empty"), "{error}");
        fs::write(path("target"), "").unwrap();
        let claimed = directory.place("link").unwrap().take().unwrap();
        assert_eq!(claimed.path, path("link"));
        assert_eq!(claimed.file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}
