//! Child processes that never outlive us.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, ExitStatus, Stdio};

/// A command whose process the kernel kills when ours dies, however that comes about.
///
/// The parent-death signal is a property of the child, set between fork and exec; util-linux's
/// `setpriv` does it there, so that no unsafe code is needed here.
pub(crate) fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.stdin(Stdio::null());
    command
}

/// Runs `command` to its end and returns what it wrote to stdout.
///
/// # Errors
/// A sentence with the command and its last words, when it cannot start or fails.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let done = command
        .output()
        .map_err(|error| format!("cannot run {}: {error}", shown(command)))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(format!(
        "{} failed ({}): {}",
        shown(command),
        done.status,
        said.trim().lines().last().unwrap_or("it said nothing")
    ))
}

thread_local! {
    /// What this thread's commands wrote, where it is kept back.
    static KEPT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps back what commands of this thread write meanwhile, so that it stands together.
pub(crate) fn kept<T>(run: impl FnOnce() -> T) -> (T, String) {
    KEPT.set(Some(String::new()));
    let result = run();
    (result, KEPT.take().unwrap_or_default())
}

/// Prints, or keeps what is to be printed.
pub(crate) fn print(text: &str) -> io::Result<()> {
    KEPT.with_borrow_mut(|kept| match kept {
        Some(kept) => {
            kept.push_str(text);
            Ok(())
        }
        None => io::stdout().write_all(text.as_bytes()),
    })
}

/// Runs `command`, passing on each line that it writes to either stream, and returns them all.
///
/// # Errors
/// That of starting it or reading from it.
pub(crate) fn watch(command: &mut Command) -> io::Result<(ExitStatus, String)> {
    let (reader, writer) = io::pipe()?;
    let mut child = command.stdout(writer.try_clone()?).stderr(writer).spawn()?;
    // The command holds the pipe's writing ends; they must be gone for the reader to see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut text = String::new();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? != 0 {
        let line_text = String::from_utf8_lossy(&line);
        print(&line_text)?;
        text.push_str(&line_text);
        line.clear();
    }
    Ok((child.wait()?, text))
}

/// The command as a person would type it, without the wrapper of [`bound`].
pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().map(OsStr::to_string_lossy));
    if words.first().is_some_and(|word| word == "setpriv") {
        words.drain(..4);
    }
    words.join(" ")
}
