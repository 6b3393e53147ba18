//! Files and standard input, as the command line names them.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::exit::Failure;

/// The most bytes that are read of an input that is held in memory as a whole. Traces are read line by line.
const MOST: u64 = msrgate_policy::Disk::MOST;

/// What standard input is called.
pub(crate) const STDIN: &str = "standard input";

/// An input as it is named in messages.
pub(crate) fn shown(path: &Path) -> String {
    match path == Path::new("-") {
        true => STDIN.to_owned(),
        false => path.display().to_string(),
    }
}

/// Opens an input; `-` is standard input, which can be read once.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    static STDIN_OPENED: AtomicBool = AtomicBool::new(false);
    if path != Path::new("-") {
        return File::open(path);
    }
    match STDIN_OPENED.swap(true, Ordering::Relaxed) {
        true => Err(io::Error::other("it is named twice, and can be read only once")),
        false => stdin(),
    }
}

fn stdin() -> io::Result<File> {
    Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?))
}

/// An input of which the beginning was read, to see what it is.
pub(crate) struct Peeked {
    /// The beginning of the input; all of a short one.
    pub(crate) head: Vec<u8>,
    rest: File,
}

/// Opens an input and reads its beginning.
pub(crate) fn peek(path: &Path) -> Result<Peeked, Failure> {
    const HEAD: u64 = 4096;
    let unreadable = |error: io::Error| Failure::input(format!("cannot read `{}`: {error}", shown(path)));
    let mut rest = open(path).map_err(unreadable)?;
    let mut head = Vec::new();
    (&mut rest).take(HEAD).read_to_end(&mut head).map_err(unreadable)?;
    Ok(Peeked { head, rest })
}

impl Peeked {
    /// All of the input.
    pub(crate) fn all(self) -> impl Read {
        Cursor::new(self.head).chain(self.rest)
    }
}

/// What a file that begins so has of guests' accesses, and which subcommands read it, where it is a trace or a summary.
pub(crate) fn recorded(head: &[u8]) -> Option<(&'static str, &'static str)> {
    let head = head.get(..4096).unwrap_or(head).trim_ascii_start();
    let has = |key: &[u8]| head.starts_with(b"{") && head.windows(key.len()).any(|part| part == key);
    match () {
        () if has(b"\"msrgate_trace\"") => Some(("a trace", "`msrgate report` and `msrgate learn` read traces")),
        () if has(b"\"msrgate_summary\"") => Some(("a summary of traces", "`msrgate learn` makes a policy of it")),
        () => None,
    }
}

/// All of an input, or in words why not; `msrgate:NAME` is a policy that comes with msrgate.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, String> {
    if let Some(text) = msrgate_policy::built_in(path) {
        return text.map(|text| text.as_bytes().to_vec());
    }
    whole(open(path).map_err(|error| error.to_string())?)
}

/// All of an input that is open, or in words why not.
pub(crate) fn whole(from: impl Read) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    from.take(MOST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    match bytes.len() as u64 > MOST {
        true => Err(format!(
            "it has more than {} MiB, and only a trace or a scan may: name the file that is meant",
            MOST >> 20
        )),
        false => Ok(bytes),
    }
}

/// All of an input.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>, Failure> {
    read(path).map_err(|error| Failure::input(format!("cannot read `{}`: {error}", shown(path))))
}

/// Refuses an output that would overwrite an input, under whatever name.
pub(crate) fn refuse_overwrite<'a>(output: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<(), Failure> {
    let same = |a: &fs::Metadata, b: &fs::Metadata| a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino());
    let Ok(written) = fs::metadata(output) else {
        return Ok(());
    };
    for input in inputs {
        let read = match input == Path::new("-") {
            true => stdin().and_then(|stdin| stdin.metadata()),
            false => fs::metadata(input),
        };
        if read.is_ok_and(|read| same(&written, &read)) {
            return Err(Failure::input(format!(
                "`{}` is the file of the input `{}`, and would be overwritten: name another output",
                output.display(),
                shown(input)
            )));
        }
    }
    Ok(())
}
