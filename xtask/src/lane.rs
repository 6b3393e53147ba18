//! A lane: a Debian kernel with a real KVM in an emulator, which runs one command and powers off.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::initramfs::Archive;
use crate::job::{Job, Root, Series, quoted};
use crate::kernel::{self, Kernel, Wanted};
use crate::{bochs, intel, nested, package, process};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// `kvm_amd` inside QEMU's emulator.
    Nested,
    /// `kvm_intel` inside Bochs.
    Intel,
}

/// The script ran.
pub(crate) struct Done {
    /// What it wrote, to stdout and stderr together.
    pub(crate) output: Vec<u8>,
    /// Its exit status, or nothing where its time ran out.
    pub(crate) status: Option<u8>,
    /// What `uname -r` says in the lane.
    pub(crate) version: String,
    pub(crate) boot: Duration,
    pub(crate) wall: Duration,
}

/// The script did not run, or nobody can tell how it ended.
pub(crate) enum Failure {
    /// This machine lacks what the lane needs.
    Unavailable(String),
    /// The emulator or its kernel failed, each time.
    Broken(String),
}

/// Exits as the command did, with 124 where its time ran out and 125 where the lane failed.
pub(crate) fn main(lane: Lane, job: &Job) -> ExitCode {
    match run(lane, job) {
        Ok(done) => {
            let _ = io::stdout().write_all(&done.output);
            let ended = match done.status {
                Some(status) => format!("exit status {status}"),
                None => format!("out of time after {} s", job.timeout.as_secs()),
            };
            eprintln!(
                "{}: {}, {ended}; {:.1} s, {:.1} of them to boot",
                lane.name(),
                done.version,
                done.wall.as_secs_f64(),
                done.boot.as_secs_f64()
            );
            ExitCode::from(done.status.unwrap_or(124))
        }
        Err(Failure::Unavailable(why)) => {
            eprintln!("{}: the lane cannot run here: {why}", lane.name());
            ExitCode::from(125)
        }
        Err(Failure::Broken(why)) => {
            eprintln!("{}: the lane failed: {why}", lane.name());
            ExitCode::from(125)
        }
    }
}

/// How often a machine that fails is started.
const TRIES: u32 = 3;

/// Boots the lane's kernel, trying again where the machine fails, and runs the job's script in it.
///
/// # Errors
/// Only where the lane fails; a script that fails is a [`Done`].
pub(crate) fn run(lane: Lane, job: &Job) -> Result<Done, Failure> {
    let cache = crate::lanes();
    let kernel = prepare(lane, job.series, &cache).map_err(Failure::Unavailable)?;
    sweep(&cache);
    let folder = RunFolder::create(&cache).map_err(Failure::Unavailable)?;
    let folder = &folder.0;
    initrd(lane, job, &kernel, folder)
        .and_then(|bytes| fs::write(folder.join("initrd"), bytes).map_err(|error| unusable(folder, &error)))
        .map_err(Failure::Unavailable)?;
    persist(lane, || attempt(lane, job, &kernel, folder)).map_err(Failure::Broken)
}

/// Tries again where the machine fails: an emulator has faults of its own.
///
/// # Errors
/// Why the last one failed.
pub(crate) fn persist<T>(lane: Lane, mut attempt: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    for _ in 1..TRIES {
        match attempt() {
            Err(why) => eprintln!("{}: trying once more: {why}", lane.name()),
            done => return done,
        }
    }
    attempt()
}

fn unusable(folder: &Path, error: &io::Error) -> String {
    format!("cannot use {}: {error}", folder.display())
}

/// Brings what the lane needs and its kernel.
///
/// # Errors
/// What cannot be had, and why.
pub(crate) fn prepare(lane: Lane, series: Series, cache: &Path) -> Result<Kernel, String> {
    package::require(kernel::NEEDS)?;
    package::require(&[("/bin/busybox", "busybox-static")])?;
    package::require(lane.needs())?;
    if lane == Lane::Intel {
        bochs::program()?;
    }
    let wanted = Wanted {
        name: format!("{}-{}", lane.name(), series.name()),
        series: series.name(),
        flavour: lane.flavour(),
        lists: lane.modules(),
    };
    kernel::fetch(&wanted, cache)
}

impl Lane {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nested => "nested",
            Self::Intel => "intel",
        }
    }

    /// The name of the module that it is there for.
    pub(crate) fn vendor_module(self) -> &'static str {
        match self {
            Self::Nested => "kvm_amd",
            Self::Intel => "kvm_intel",
        }
    }

    fn needs(self) -> &'static [package::Need] {
        match self {
            Self::Nested => nested::NEEDS,
            Self::Intel => intel::NEEDS,
        }
    }

    fn flavour(self) -> &'static str {
        match self {
            Self::Nested => "amd64",
            Self::Intel => "cloud-amd64",
        }
    }

    fn modules(self) -> &'static [(&'static str, &'static [&'static str])] {
        match self {
            Self::Nested => &[
                ("kvm", &["kvm-amd", "msr"]),
                ("9p", &["virtio_pci", "9pnet_virtio", "9p", "overlay"]),
            ],
            Self::Intel => &[("kvm", &["kvm-intel", "msr"])],
        }
    }

    /// How much of a processor booting may take before the lane counts as hung.
    fn boot_limit(self) -> Duration {
        match self {
            Self::Nested => Duration::from_secs(60),
            Self::Intel => Duration::from_secs(300),
        }
    }

    /// The emulator's command, with what it reads written to `folder`, where it is run. It writes
    /// `console`, `output` and `marks` there.
    fn emulator(self, job: &Job, kernel: &Kernel, folder: &Path) -> Result<Command, String> {
        match self {
            Self::Nested => Ok(nested::emulator(job, kernel)),
            Self::Intel => intel::emulator(job, kernel, folder),
        }
    }
}

/// The kernel's arguments in either lane: no time for mitigations, entropy, audit and self-tests.
pub(crate) const KERNEL_ARGUMENTS: &str = "console=ttyS0,115200 8250.nr_uarts=4 panic=-1 quiet mitigations=off nokaslr \
     tsc=reliable no_timer_check random.trust_cpu=on audit=0 cryptomgr.notests raid=noautodetect";

/// How long a lane says nothing while it runs.
const BETWEEN_WORDS: Duration = Duration::from_secs(60);

/// One boot. What fails here is the lane.
fn attempt(lane: Lane, job: &Job, kernel: &Kernel, folder: &Path) -> Result<Done, String> {
    let failed = |error: io::Error| unusable(folder, &error);
    let began = Instant::now();
    for port in ["console", "output", "marks"] {
        File::create(folder.join(port)).map_err(failed)?;
    }
    let mut command = lane.emulator(job, kernel, folder)?;
    if job.verbose {
        eprintln!("{}: {}", lane.name(), process::shown(&command));
    }
    let log = File::create(folder.join("log")).map_err(failed)?;
    command
        .current_dir(folder)
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log);
    let mut emulator = Emulator::start(&mut command)?;

    let mut started: Option<Instant> = None;
    let (mut lived, mut last) = (0, Instant::now());
    let mut told = Instant::now();
    let status = loop {
        let ended = emulator.ended()?;
        let marks = Marks::read(&folder.join("marks"));
        if let Some(why) = marks.failure {
            return Err(why);
        }
        if marks.started && started.is_none() {
            started = Some(Instant::now());
        }
        if marks.lived > lived || started.is_none() {
            (lived, last) = (marks.lived, Instant::now());
        }
        if marks.status.is_some() && whole(&folder.join("output")) {
            // All is there: nothing is lost with what would be left to do, powering off.
            break marks.status;
        }
        if told.elapsed() > BETWEEN_WORDS {
            told = Instant::now();
            let (seconds, series) = (began.elapsed().as_secs(), job.series.name());
            let output = fs::read(folder.join("output")).unwrap_or_default();
            let output = String::from_utf8_lossy(&output);
            let line = output.lines().last().unwrap_or("no output yet");
            eprintln!("{} {series}: {seconds} s: {line}", lane.name());
        }
        if ended {
            return Err(format!(
                "the emulator ended without the command's status, or without the end of its output\n{}",
                last_words(folder)
            ));
        }
        match started {
            Some(at) if at.elapsed() > job.timeout => break None,
            Some(_) if last.elapsed() > 2 * lane.boot_limit() => {
                let limit = 2 * lane.boot_limit().as_secs();
                return Err(format!(
                    "the emulated machine has stood still for {limit} s\n{}",
                    last_words(folder)
                ));
            }
            // A busy machine leaves the emulator little time.
            None if emulator.processor_time() > Some(lane.boot_limit()) || began.elapsed() > 10 * lane.boot_limit() => {
                let limit = lane.boot_limit().as_secs();
                return Err(format!("no boot within {limit} s\n{}", last_words(folder)));
            }
            _ => thread::sleep(Duration::from_millis(20)),
        }
    };
    drop(emulator);
    if job.verbose {
        eprint!("{}", last_words(folder));
    }
    let mut output = fs::read(folder.join("output")).map_err(failed)?;
    output.truncate(end(&output).unwrap_or(output.len()));
    Ok(Done {
        output,
        status,
        version: kernel.version.clone(),
        boot: started.map_or(Duration::ZERO, |at| at - began),
        wall: began.elapsed(),
    })
}

/// What init writes to the second serial port behind the command's output.
const END: &[u8] = b"\0end\n";

/// Whether a file holds a command's output to its end.
fn whole(output: &Path) -> bool {
    fs::read(output).is_ok_and(|bytes| end(&bytes).is_some())
}

/// Where a command's output ends. What a process that it left behind writes comes after that.
fn end(output: &[u8]) -> Option<usize> {
    output.windows(END.len()).rposition(|bytes| bytes == END)
}

/// What init wrote to the third serial port; a line counts once its end is there.
#[derive(Default)]
struct Marks {
    started: bool,
    /// How often it said that it runs.
    lived: usize,
    status: Option<u8>,
    failure: Option<String>,
}

impl Marks {
    fn read(file: &Path) -> Self {
        Self::parse(&String::from_utf8_lossy(&fs::read(file).unwrap_or_default()))
    }

    fn parse(text: &str) -> Self {
        let mut marks = Self::default();
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            if line == "start" {
                marks.started = true;
            } else if line == "alive" {
                marks.lived += 1;
            } else if let Some(status) = line.strip_prefix("rc=") {
                marks.status = status.parse().ok();
            } else if let Some(why) = line.strip_prefix("fail=") {
                marks.failure = Some(why.to_string());
            }
        }
        marks
    }
}

pub(crate) fn last_words(folder: &Path) -> String {
    let mut words = String::new();
    for name in ["console", "log", "bochs.log"] {
        let text = fs::read(folder.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        for line in lines.iter().skip(lines.len().saturating_sub(12)) {
            words.push_str(&format!("    {name}: {line}\n"));
        }
    }
    words
}

/// The first root: busybox, the modules, init, the command, and what the job adds.
fn initrd(lane: Lane, job: &Job, kernel: &Kernel, folder: &Path) -> Result<Vec<u8>, String> {
    let mut archive = Archive::default();
    for directory in ["/proc", "/sys", "/dev", "/tmp", "/root"] {
        archive.directory(Path::new(directory));
    }
    archive.copy(Path::new("/bin/busybox"), Path::new("/bin/busybox"))?;
    archive.copy(&kernel.folder.join("modules"), Path::new("/modules"))?;
    archive.file(Path::new("/init"), 0o755, include_bytes!("init.sh"));

    let here = env::current_dir().map_err(|error| format!("cannot tell the current folder: {error}"))?;
    let inside = match job.root {
        Root::Host => PathBuf::from("/add"),
        Root::Initramfs => {
            archive.directory(&here);
            for name in process::output(Command::new("/bin/busybox").arg("--list"))?.lines() {
                if name != "busybox" {
                    archive.link(&Path::new("/bin").join(name), "/bin/busybox");
                }
            }
            PathBuf::from("/")
        }
    };
    let boot = kernel.folder.to_string_lossy();
    let (root, boot) = match job.root {
        Root::Host => ("9p", &*boot),
        // The folder is not in that root.
        Root::Initramfs => ("initramfs", ""),
    };
    let settings = [
        ("ROOT", root),
        ("KVM_PARAMETERS", &job.kvm_parameters),
        ("VENDOR_PARAMETERS", &job.vendor_parameters),
        ("MSRGATE_LANE", lane.name()),
        ("MSRGATE_LANE_KERNEL", job.series.name()),
        ("MSRGATE_LANE_BOOT", boot),
    ];
    let settings: String = settings
        .iter()
        .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
        .collect();
    archive.file(Path::new("/settings"), 0o644, settings.as_bytes());
    let script = format!("cd {} || exit\n{}\n", quoted(&here.to_string_lossy()), job.script);
    archive.file(Path::new("/command"), 0o644, script.as_bytes());

    let placed = |to: &Path| inside.join(to.strip_prefix("/").unwrap_or(to));
    for (from, to) in &job.add {
        archive.copy(from, &placed(to))?;
    }
    for program in &job.programs {
        let program =
            fs::canonicalize(program).map_err(|error| format!("no program {}: {error}", program.display()))?;
        if job.root == Root::Host {
            continue;
        }
        let stripped = folder.join("stripped");
        process::output(Command::new("objcopy").arg("--strip-debug").args([&program, &stripped]))?;
        archive.copy(&stripped, &program)?;
        archive.libraries(&program)?;
    }
    Ok(archive.finish())
}

/// A running emulator, which is gone when this is.
pub(crate) struct Emulator(Child);

impl Emulator {
    /// # Errors
    /// That it does not start.
    pub(crate) fn start(command: &mut Command) -> Result<Self, String> {
        let child = command.spawn();
        child
            .map(Self)
            .map_err(|error| format!("cannot run {}: {error}", process::shown(command)))
    }

    /// What it has used so far, by the 14th and 15th field of its `stat`, in hundredths of a second; nothing once it is over.
    pub(crate) fn processor_time(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).ok()?;
        let (_, fields) = stat.rsplit_once(") ")?;
        let ticks = fields
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok());
        Some(Duration::from_millis(10 * ticks.sum::<u64>()))
    }

    /// Whether it is over.
    ///
    /// # Errors
    /// That nobody can tell.
    pub(crate) fn ended(&mut self) -> Result<bool, String> {
        let ended = self.0.try_wait();
        ended
            .map(|status| status.is_some())
            .map_err(|error| format!("cannot wait for the emulator: {error}"))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder for one run, named for this process and numbered, and removed at the end.
pub(crate) struct RunFolder(PathBuf);

impl RunFolder {
    pub(crate) fn create(cache: &Path) -> Result<Self, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = cache.join(format!("run-{process}-{number}"));
        fs::create_dir_all(&folder).map_err(|error| unusable(&folder, &error))?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes the folders of runs that were killed.
fn sweep(cache: &Path) {
    let Ok(entries) = fs::read_dir(cache) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix("run-").and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_output_is_whole_once_its_end_is_there() {
        assert_eq!(end(b"1\n2"), None);
        assert_eq!(end(b"1\n2\n\0end"), None);
        assert_eq!(end(b"1\n2\n\0end\n"), Some(4));
        assert_eq!(end(b"1\n2\n\0end\nleft behind\n"), Some(4));
    }

    #[test]
    fn a_mark_counts_once_its_line_has_ended() {
        assert_eq!(Marks::parse("start\nrc=1").status, None);
        assert_eq!(Marks::parse("start\nrc=1\n").status, Some(1));
        assert!(Marks::parse("start\n").started);
        assert_eq!(Marks::parse("start\nalive\nalive\nali").lived, 2);
    }
}
