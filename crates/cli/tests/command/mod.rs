//! The command as a user runs it, and the files that users have.
#![allow(dead_code, reason = "each test uses a part of this")]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Compiled in, since some lanes have no files but the test itself.
macro_rules! embedded {
    ($folder:literal: $($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../../", $folder, "/", $name)))),+]
    };
}

/// Waits for what another process does. The limit is for what never comes: a busy machine may take minutes.
#[track_caller]
pub(crate) fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(600), "it does not come");
        sleep(Duration::from_millis(5));
    }
}

/// The policies that come with msrgate; their names within `policies/` and their text.
pub(crate) const POLICIES: &[(&str, &str)] = embedded!["policies":
    "bhyve-amd.toml",
    "bhyve-intel.toml",
    "crosvm-itmt.toml",
    "deny-all.toml",
    "fixed-microcode.toml",
    "hvmi-guard.toml",
    "ignore-unknown.toml",
    "linux-microvm.toml",
    "linux-pc.toml",
    "macos.toml",
    "monitoring.toml",
    "msr-safe.toml",
    "openvmm-stubs.toml",
    "qemu-rapl.toml",
    "qemu.toml",
    "windows.toml",
];

/// What those policies extend. They have no default, so they are no policies by themselves.
pub(crate) const FRAGMENTS: &[(&str, &str)] = embedded!["policies":
    "base/kvm-guest.toml",
    "base/linux-amd.toml",
    "base/linux-intel.toml",
    "base/pmu.toml",
    "base/x86-64.toml",
];

/// What real guests did.
pub(crate) const TRACES: &[(&str, &str)] = embedded!["traces":
    "linux-6.1-microvm.jsonl",
    "linux-6.1-pc-smp2.jsonl",
];

/// The program under test. Lanes bring it along.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("MSRGATE_BIN").map_or_else(|| env!("CARGO_BIN_EXE_msrgate").into(), PathBuf::from)
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// The run of a command that is ready to go.
    pub(crate) fn of(command: &mut Command) -> Ran {
        let output = command.output().expect("the program starts");
        Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("UTF-8 on stdout"),
            err: String::from_utf8(output.stderr).expect("UTF-8 on stderr"),
        }
    }

    /// Itself, if it ended with this exit code.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Ran {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    /// The one JSON value on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}:\n{}\n{}", self.out, self.err))
    }

    /// Itself, if stderr says each of these.
    #[track_caller]
    pub(crate) fn says(self, what: &[&str]) -> Ran {
        for text in what {
            assert!(self.err.contains(text), "stderr does not say `{text}`:\n{}", self.err);
        }
        self
    }

    /// Itself, if stdout shows each of these.
    #[track_caller]
    pub(crate) fn shows(self, what: &[&str]) -> Ran {
        for text in what {
            assert!(self.out.contains(text), "stdout does not show `{text}`:\n{}", self.out);
        }
        self
    }
}

/// A folder of its own for a test, gone at the end of it.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("msrgate-test-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Folder(path),
                // An earlier process of this number was killed, and left it.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }

    /// With all policies and traces in `policies/` and `traces/`.
    pub(crate) fn furnished() -> Folder {
        let folder = Folder::new();
        for (name, text) in POLICIES.iter().chain(FRAGMENTS) {
            folder.write(&format!("policies/{name}"), text);
        }
        for (name, text) in TRACES {
            folder.write(&format!("traces/{name}"), text);
        }
        folder
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        fs::write(path, text).expect("a file");
    }

    /// The command, to be run in this folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).current_dir(&self.0).stdin(Stdio::null());
        // What a developer's shell sets is no part of the test.
        for name in ["NO_COLOR", "CLICOLOR_FORCE", "CLICOLOR"] {
            command.env_remove(name);
        }
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(&mut self.command(arguments))
    }

    /// The subcommands that the help lists.
    pub(crate) fn subcommands(&self) -> Vec<String> {
        let help = self.run(&["--help"]).code(0).out;
        let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let listed = listed.take_while(|line| !line.is_empty());
        // A description that goes on in the next line stands further in.
        let names = listed.filter(|line| !line.starts_with("   "));
        names
            .filter_map(|line| line.split_whitespace().next())
            .filter(|name| *name != "help")
            .map(str::to_owned)
            .collect()
    }

    /// With `input` on standard input.
    pub(crate) fn run_with(&self, arguments: &[&str], input: &str) -> Ran {
        let mut command = self.command(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        // A program that ends before it has read all is not what is tested here.
        let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("an end");
        Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("UTF-8 on stdout"),
            err: String::from_utf8(output.stderr).expect("UTF-8 on stderr"),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Which streams of a command are a terminal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    Both,
    Output,
    Error,
}

/// What a command shows on a terminal with so many columns.
pub(crate) fn on_terminal(command: Command, columns: u16, streams: Terminal) -> String {
    at_terminal(command, columns, streams, None).0
}

/// What a person sees who has typed this ahead, and how the command ends. The terminal echoes what is typed.
pub(crate) fn typed(command: Command, columns: u16, lines: &str) -> (String, Option<i32>) {
    at_terminal(command, columns, Terminal::Both, Some(lines))
}

fn at_terminal(mut command: Command, columns: u16, streams: Terminal, lines: Option<&str>) -> (String, Option<i32>) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&terminal)
        .and_then(|()| unlockpt(&terminal))
        .expect("a terminal");
    let path = ptsname(&terminal, Vec::new())
        .expect("its path")
        .into_string()
        .expect("a path");
    let open = || {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .expect("its other end")
    };
    let size = rustix::termios::Winsize {
        ws_col: columns,
        ws_row: 24,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&terminal, size).expect("a size");
    command.env("TERM", "xterm").stdout(Stdio::null()).stderr(Stdio::null());
    if streams != Terminal::Error {
        command.stdout(open());
    }
    if streams != Terminal::Output {
        command.stderr(open());
    }
    if lines.is_some() {
        command.stdin(open());
    }
    let mut child = command.spawn().expect("the program starts");
    // Else there is no end of it.
    drop(command);
    let mut terminal = fs::File::from(terminal);
    if let Some(lines) = lines {
        terminal.write_all(lines.as_bytes()).expect("a terminal that takes it");
    }
    let mut shown = Vec::new();
    // A terminal that nobody holds any more is an error to its reader.
    let _ = terminal.read_to_end(&mut shown);
    let code = child.wait().expect("an end").code();
    (String::from_utf8(shown).expect("UTF-8").replace("\r\n", "\n"), code)
}

/// Fails where what the command shows is wider than a terminal though it could be folded, or where a name or a number is
/// broken: it is not among the words that the command writes into a pipe.
#[track_caller]
pub(crate) fn fits_any_terminal(command: impl Fn() -> Command, streams: Terminal) {
    let piped = Ran::of(&mut command());
    let wide = piped.out.clone() + &piped.err;
    let words = |text: &str| -> Vec<String> {
        // A line of a file that is cut says so.
        let cut = |word: &&str| !word.ends_with("...");
        let text: String = text.split_whitespace().filter(cut).collect::<Vec<_>>().join(" ");
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names = words.filter(|word| word.contains('_') || word.starts_with("0x"));
        names.map(str::to_owned).collect()
    };
    let known = words(&wide);
    for columns in [40, 80, 200] {
        let shown = plain(&on_terminal(command(), columns, streams));
        assert!(!shown.is_empty(), "{:?} shows nothing: {wide}", command());
        for line in shown.lines() {
            let fits = line.chars().count() <= columns.into() || !line.trim().contains(' ');
            assert!(fits, "{:?} at {columns} columns: {line:?}\n{shown}", command());
        }
        for word in words(&shown) {
            assert!(
                known.contains(&word),
                "{:?} at {columns} columns breaks `{word}`:\n{shown}",
                command()
            );
        }
    }
}

/// A text without its colours.
pub(crate) fn plain(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| {
        all + part.split_once('m').map_or("", |(_, rest)| rest)
    })
}

/// Where a program is on the search path.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(OsStr::new(program)))
        .find(|file| file.is_file())
}

/// The text of a JSON string.
#[track_caller]
pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("`{key}` is not a string in {value:#}"))
}

/// A number that JSON carries as a text in hexadecimal.
#[track_caller]
pub(crate) fn hex(value: &Value, key: &str) -> u64 {
    let text = text(value, key);
    let digits = text.strip_prefix("0x").unwrap_or_else(|| panic!("`{key}` is {text}"));
    u64::from_str_radix(digits, 16).unwrap_or_else(|error| panic!("`{key}` is {text}: {error}"))
}

/// A count.
#[track_caller]
pub(crate) fn count(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("`{key}` is no count in {value:#}"))
}

/// A list.
#[track_caller]
pub(crate) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key]
        .as_array()
        .unwrap_or_else(|| panic!("`{key}` is no list in {value:#}"))
}

/// The lines of a text, with one space between words, and without what differs from run to run: times, instruction pointers, and
/// how often something went around.
pub(crate) fn without_times(text: &str) -> Vec<String> {
    let is_unit = |word: &str| {
        matches!(
            word.trim_matches(|c: char| "<>,.;:".contains(c)),
            "ns" | "µs" | "ms" | "s"
        )
    };
    let is_time = |word: &str| {
        let digits = word.trim_matches(|c: char| "<>,.;:".contains(c));
        !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
    };
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let words = words.iter().enumerate().map(|(place, word)| {
            let before = place.checked_sub(1).and_then(|place| words.get(place));
            let after = words.get(place + 1);
            match () {
                () if is_time(word) && (after.is_some_and(|word| is_unit(word)) || word.contains('.')) => "TIME",
                () if before.is_some_and(|word| is_time(word)) && is_unit(word) => "UNIT",
                () if before == Some(&"RIP") => "RIP",
                () => word,
            }
        });
        words.collect::<Vec<_>>().join(" ")
    };
    text.lines().map(line).filter(|line| !line.is_empty()).collect()
}
