//! Where events go: a file, or standard error.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use msrgate_core::{Event, Gap, LogLimiter, Op};
use msrgate_supervise::{Entry, Mode};
use msrgate_trace::{Coverage, Header, write_event, write_gap};
use rustix::fs::{FlockOperation, flock};

use crate::exit::Failure;
use crate::{input, stream, words};

/// What `--learn=all` does, for its reader and its trace.
pub(crate) const PASSED_ON: &str = "every access is denied to the guest and passed on with KVM_GET_MSRS and \
                                    KVM_SET_MSRS, which is not always what the guest's own instruction would have got";

/// What a trace says of itself.
///
/// `whole` where the policy leaves no access to the kernel.
pub(crate) fn header(vmm: &Path, arguments: &[OsString], mode: Mode, policy: Option<String>, whole: bool) -> Header {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).ok();
    let kernel = read("/proc/sys/kernel/osrelease");
    Header {
        msrgate_trace: msrgate_trace::VERSION,
        kernel: kernel.map(|release| format!("Linux {release}")),
        vmm: Some(vmm.display().to_string()),
        name: name(arguments),
        mode: Some(
            match mode {
                Mode::Enforce => {
                    "what the policy decides, and what the kernel refuses; what the policy leaves to the kernel and the \
                     kernel carries out makes no event"
                }
                Mode::Audit => {
                    "the first touch of each MSR and direction that the policy does not leave to the kernel, with what \
                     the policy would do, and each access that faults; the guest gets the kernel's own answer, and \
                     values read are the host's view"
                }
                Mode::Learn => {
                    "the first touch of each MSR and direction, and each access that faults; the guest gets the kernel's \
                     own answer, and values read are the host's view"
                }
                Mode::LearnAll => PASSED_ON,
            }
            .to_owned(),
        ),
        coverage: Some(match (mode, whole) {
            (Mode::LearnAll, _) | (Mode::Enforce, true) => Coverage::All,
            (Mode::Learn, _) | (Mode::Audit, true) => Coverage::First,
            (Mode::Enforce | Mode::Audit, false) => Coverage::Decided,
        }),
        host: read("/proc/sys/kernel/hostname"),
        ignore_msrs: read("/sys/module/kvm/parameters/ignore_msrs").map(|value| value == "Y"),
        policy: policy.filter(|_| matches!(mode, Mode::Enforce | Mode::Audit)),
        ..Header::default()
    }
}

/// The VM's name among the VMM's arguments: `-name` of QEMU, `--name` and `--id` of others.
fn name(arguments: &[OsString]) -> Option<String> {
    let mut arguments = arguments.iter().map(|argument| argument.to_string_lossy());
    arguments.find(|argument| matches!(argument.as_ref(), "-name" | "--name" | "--id"))?;
    let value = arguments.next()?;
    // `-name guest=NAME,process=…`, or the name alone.
    let mut parts = value.split(',');
    let first = parts.clone().next()?;
    let guest = parts.find_map(|part| part.strip_prefix("guest=")).unwrap_or(first);
    Some(guest.to_owned())
}

/// Where events go.
pub(crate) struct Trace {
    to: To,
    unwritten: Option<Unwritten>,
    limiter: LogLimiter,
}

enum To {
    /// A file, in JSON Lines.
    File(Box<Lines>),
    /// Standard error, for people: all of them.
    People,
    /// Standard error: those whose rule says so.
    Logged,
}

struct Lines {
    path: PathBuf,
    file: BufWriter<File>,
    /// Until the first VM a regular file is left as it was.
    header: Option<Header>,
    /// The file was not there before.
    is_new: bool,
}

/// Events that are not in the trace.
pub(crate) struct Unwritten {
    pub(crate) events: u64,
    pub(crate) error: String,
}

impl Trace {
    /// `path` is `-` for people. A file is for its owner, since what guests do tells where their kernels are; it is not
    /// one of `inputs`, and no other run writes to it. The policy has so many `rules`.
    pub(crate) fn open(
        path: Option<&Path>,
        inputs: &[Option<&Path>],
        header: Header,
        rules: usize,
    ) -> Result<Trace, Failure> {
        let to = match path {
            None => To::Logged,
            Some(path) if path == Path::new("-") => To::People,
            Some(path) => To::File(Box::new(Lines::open(path, inputs, header)?)),
        };
        Ok(Trace {
            to,
            unwritten: None,
            limiter: LogLimiter::new(rules),
        })
    }

    /// The VMM is this process.
    pub(crate) fn of(&mut self, pid: u32) {
        if let To::File(lines) = &mut self.to
            && let Some(header) = &mut lines.header
        {
            header.pid = Some(pid);
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self.to, To::File(_))
    }

    pub(crate) fn unwritten(&self) -> Option<&Unwritten> {
        self.unwritten.as_ref()
    }

    /// There is a VM, and so there will be a trace.
    pub(crate) fn begin(&mut self) {
        if let To::File(lines) = &mut self.to
            && let Err(error) = lines.begin()
        {
            self.lose(0, Some(error));
        }
    }

    pub(crate) fn take(&mut self, entry: &Entry) {
        let written = match (&mut self.to, entry) {
            // A line that is cut short would make the rest unreadable.
            (To::File(_), _) if self.unwritten.is_some() => Ok(false),
            (To::File(lines), Entry::Access(event, _)) => write_event(event, &mut lines.file).map(|()| true),
            (To::File(lines), Entry::Gap(gap)) => write_gap(gap, &mut lines.file).map(|()| true),
            (To::Logged, Entry::Access(event, log)) if !self.limiter.admits(event, *log) => return,
            (_, Entry::Access(event, _)) => {
                // One call for a line, which the VMM's own output does not cut in two then.
                let mut text = Vec::new();
                let line = line(event, &mut text);
                line.and_then(|()| stream::err().write_all(&text)).map(|()| true)
            }
            (_, Entry::Gap(Gap { t, vm, vcpu, events })) => {
                let seconds = t.0 as f64 / 1e9;
                let events = words::counted(*events, "event is", "events are");
                let line = format!("{seconds:.6} vm {vm} vcpu {vcpu} {events} missing here\n");
                stream::err().write_all(line.as_bytes()).map(|()| true)
            }
        };
        let events = match entry {
            Entry::Access(..) => 1,
            // They are counted as missing already.
            Entry::Gap(_) => 0,
        };
        match written {
            Ok(true) => {}
            Ok(false) => self.lose(events, None),
            Err(error) => self.lose(events, Some(error)),
        }
    }

    pub(crate) fn flush(&mut self) {
        if let To::File(lines) = &mut self.to
            && self.unwritten.is_none()
            && let Err(error) = lines.file.flush()
        {
            self.lose(0, Some(error));
        }
    }

    /// No VM was made: what was not there before is not left behind.
    pub(crate) fn end(&mut self) {
        if let To::File(lines) = &self.to
            && lines.header.is_some()
            && lines.is_new
        {
            // Where it stays it is empty.
            let _ = fs::remove_file(&lines.path);
        }
    }

    fn lose(&mut self, events: u64, error: Option<io::Error>) {
        let to = &self.to;
        let unwritten = self.unwritten.get_or_insert_with(|| Unwritten {
            events: 0,
            error: match (to, error) {
                (To::File(lines), Some(error)) => format!("`{}` cannot be written: {error}", lines.path.display()),
                (_, Some(error)) => format!("standard error cannot be written: {error}"),
                (_, None) => String::new(),
            },
        });
        unwritten.events += events;
    }
}

impl Lines {
    fn open(path: &Path, inputs: &[Option<&Path>], header: Header) -> Result<Lines, Failure> {
        let failed = |error: io::Error| Failure::input(format!("cannot write `{}`: {error}", path.display()));
        let is_new = fs::symlink_metadata(path).is_err();
        let options = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .clone();
        let file = options.open(path).map_err(failed)?;
        let this = file.metadata().map_err(failed)?;
        input::refuse_overwrite(path, inputs.iter().flatten().copied())?;
        if this.is_file() && flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let line = format!(
                "another `msrgate run` writes to `{}`: give the trace another name",
                path.display()
            );
            return Err(Failure::input(line));
        }
        let mut lines = Lines {
            path: path.to_path_buf(),
            file: BufWriter::new(file),
            header: Some(header),
            is_new: is_new && this.is_file(),
        };
        // A pipe or a device has nothing that could be lost.
        if !this.is_file() {
            lines.begin().map_err(failed)?;
        }
        Ok(lines)
    }

    fn begin(&mut self) -> io::Result<()> {
        let Some(header) = self.header.take() else {
            return Ok(());
        };
        if self.file.get_ref().metadata()?.is_file() {
            self.file.get_ref().set_len(0)?;
            // One that was there may have been for others too.
            self.file.get_ref().set_permissions(Permissions::from_mode(0o600))?;
            self.file.get_mut().rewind()?;
        }
        let header = Header {
            started: Some(words::date(SystemTime::now())),
            ..header
        };
        header.write(&mut self.file)?;
        self.file.flush()
    }
}

/// As strace prints a call and, with `-T`, what it took.
fn line(event: &Event, to: &mut impl Write) -> io::Result<()> {
    let Event {
        t,
        vm,
        vcpu,
        op,
        msr,
        value,
        ..
    } = event;
    let seconds = t.0 as f64 / 1e9;
    write!(to, "{seconds:.6} vm {vm} vcpu {vcpu} {op}({msr}")?;
    if let Some(name) = words::name(*msr) {
        write!(to, " {name}")?;
    }
    match (op, event.did.is_fault()) {
        (Op::Read, true) => write!(to, ") = #GP")?,
        (Op::Read, false) => write!(to, ") = {value:#x}")?,
        (Op::Write, true) => write!(to, ", {value:#x}) = #GP")?,
        (Op::Write, false) => write!(to, ", {value:#x}) = done")?,
    }
    write!(to, " {}", event.did)?;
    if let Some(why) = event.why {
        write!(to, " {why}")?;
    }
    if let Some(would) = event.would {
        write!(to, " policy {would}")?;
    }
    if let Some(rule) = event.rule {
        write!(to, " rule {rule}")?;
    }
    if let Some(rip) = event.rip {
        write!(to, " rip {rip:#x}")?;
    }
    if let Some(cost) = event.cost {
        write!(to, " <{}>", words::duration(cost.0))?;
    }
    writeln!(to)
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Disposition, Msr, Nanos};

    use super::*;

    fn event(t: u64, msr: u32) -> Event {
        Event {
            t: Nanos(t),
            vm: 0,
            vcpu: 1,
            op: Op::Read,
            msr: Msr(msr),
            value: 5,
            reason: None,
            did: Disposition::Value,
            why: None,
            would: None,
            rule: Some(2),
            rip: None,
            cost: None,
        }
    }

    #[test]
    fn a_line_for_people_says_what_the_access_got() {
        let mut text = Vec::new();
        line(&event(1_500_000_000, 0x8b), &mut text).unwrap();
        let fault = Event {
            op: Op::Write,
            did: Disposition::Deny,
            rule: None,
            rip: Some(0x1000),
            cost: Some(Nanos(1200)),
            ..event(0, 0xdead)
        };
        line(&fault, &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "1.500000 vm 0 vcpu 1 rdmsr(0x8b IA32_BIOS_SIGN_ID) = 0x5 value rule 2\n\
             0.000000 vm 0 vcpu 1 wrmsr(0xdead, 0x5) = #GP deny rip 0x1000 <1.2 µs>\n"
        );
    }
}
