//! Where events go: a file, or standard error.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use msrgate_core::{Event, Gap, LogLimiter, Nanos, Op};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_supervise::{Entry, Leaf, Mode};
use msrgate_trace::{Coverage, Header, write_event, write_gap};

use crate::exit::Failure;
use crate::journal::Journal;
use crate::run::place::{self, Place};
use crate::{stream, words};

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
    /// The journal, likewise; and what each entry says of the VMM.
    Journal(Journal, Vec<(&'static str, String)>),
}

struct Lines {
    place: Arc<Place>,
    header: Header,
    size: Option<u64>,
    /// Once there is a vCPU that runs.
    part: Option<Part>,
}

/// A file that has all of a trace, or a part.
struct Part {
    path: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    /// Where the part before this one is.
    before: Option<PathBuf>,
    line: Vec<u8>,
}

/// What a line may take at most.
const LONGEST: u64 = 512;

/// What is left free behind the header of a file with a limit, for what it says where others follow.
const PART: usize = "\"part\":1,".len();

/// Events that are not in the trace.
pub(crate) struct Unwritten {
    pub(crate) events: u64,
    pub(crate) error: String,
}

impl Trace {
    /// `name` is `-` for people, and a file has at most this `size`. The policy has so many `rules`. What is logged goes to the
    /// journal if that is given.
    pub(crate) fn open(
        name: Option<&Path>,
        journal: Option<Journal>,
        size: Option<u64>,
        inputs: &[Option<&Path>],
        header: Header,
        rules: usize,
    ) -> Result<Trace, Failure> {
        let to = match name {
            None => match journal {
                None => To::Logged,
                Some(journal) => {
                    let mut of_vmm = vec![
                        ("SYSLOG_IDENTIFIER", "msrgate".to_owned()),
                        ("VMM", header.vmm.unwrap_or_default()),
                    ];
                    of_vmm.extend(header.name.map(|name| ("VM_NAME", name)));
                    To::Journal(journal, of_vmm)
                }
            },
            Some(name) if name == Path::new("-") => match size {
                None => To::People,
                Some(_) => return Err(Failure::input("what `--trace -` prints has no size: name a file")),
            },
            Some(name) => {
                let vmm = header.vmm.as_deref().map(Path::new).and_then(Path::file_name);
                let vmm = vmm.map(|vmm| vmm.to_string_lossy().into_owned());
                let vm = header.name.clone().or(vmm).unwrap_or_default();
                let mut lines = Lines {
                    place: Arc::new(Place::new(name, vm, inputs, size.is_some())?),
                    header,
                    size,
                    part: None,
                };
                // A pipe has nothing that could be lost, and its reader may wait.
                if let Err(error) = lines.begin(&[]) {
                    return Err(Failure::input(format!("cannot write `{}`: {error}", name.display())));
                }
                To::File(Box::new(lines))
            }
        };
        Ok(Trace {
            to,
            unwritten: None,
            limiter: LogLimiter::new(rules),
        })
    }

    /// Where a file is to be claimed before the first vCPU is made.
    pub(crate) fn place(&self) -> Option<Arc<Place>> {
        match &self.to {
            To::File(lines) if lines.part.is_none() => Some(Arc::clone(&lines.place)),
            _ => None,
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self.to, To::File(_))
    }

    /// The file that is written to.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.to {
            To::File(lines) => lines.part.as_ref().map(|part| part.path.as_path()),
            To::People | To::Logged | To::Journal(..) => None,
        }
    }

    pub(crate) fn unwritten(&self) -> Option<&Unwritten> {
        self.unwritten.as_ref()
    }

    /// A vCPU runs that has this CPUID, and so there is a trace.
    pub(crate) fn begin(&mut self, cpuid: &[Leaf]) {
        if let To::File(lines) = &mut self.to
            && lines.part.is_none()
            && let Err(error) = lines.begin(cpuid)
        {
            self.lose(0, Some(error));
        }
    }

    pub(crate) fn take(&mut self, entry: &Entry) {
        let written = match (&mut self.to, entry) {
            // A line that is cut short would make the rest unreadable.
            (To::File(_), _) if self.unwritten.is_some() => Ok(false),
            (To::File(lines), entry) => lines.write(entry),
            (To::Logged | To::Journal(..), Entry::Access(event, log)) if !self.limiter.admits(event, *log) => return,
            (To::Journal(journal, of_vmm), Entry::Access(event, _)) => {
                let mut fields = fields(event);
                fields.extend(of_vmm.iter().cloned());
                journal.write(&fields).map(|()| true)
            }
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

    /// Another policy is in force from here on, with so many rules.
    pub(crate) fn another_policy(&mut self, t: Nanos, hash: &str, rules: usize) {
        self.limiter = LogLimiter::new(rules);
        let To::File(lines) = &mut self.to else { return };
        // Where a file is begun later, this policy is the first one.
        lines.header.policy = lines.header.policy.take().map(|_| hash.to_owned());
        if self.unwritten.is_none()
            && let Some(part) = &mut lines.part
            && let Err(error) = part.write_policy(t, hash)
        {
            self.lose(0, Some(error));
        }
    }

    pub(crate) fn flush(&mut self) {
        if let To::File(lines) = &mut self.to
            && let Some(part) = &mut lines.part
            && self.unwritten.is_none()
            && let Err(error) = part.file.flush()
        {
            self.lose(0, Some(error));
        }
    }

    /// Nothing ran where there is no header: what was not there before is not left behind.
    pub(crate) fn end(&mut self) {
        if let To::File(lines) = &self.to
            && let Some(claimed) = lines.place.take()
            && claimed.is_new
        {
            // Where it stays it is empty.
            let _ = fs::remove_file(&claimed.path);
        }
    }

    fn lose(&mut self, events: u64, error: Option<io::Error>) {
        let path = self.path().map(Path::to_path_buf);
        let unwritten = self.unwritten.get_or_insert_with(|| Unwritten {
            events: 0,
            error: match (path, error) {
                (Some(path), Some(error)) => format!("`{}` cannot be written: {error}", path.display()),
                (None, Some(error)) => match self.to {
                    To::Journal(..) => format!("the journal takes no more: {error}"),
                    _ => format!("standard error cannot be written: {error}"),
                },
                (_, None) => String::new(),
            },
        });
        unwritten.events += events;
    }
}

impl Lines {
    /// Writes the header into the file that is claimed.
    fn begin(&mut self, cpuid: &[Leaf]) -> io::Result<()> {
        let Some(claimed) = self.place.take() else {
            return Ok(());
        };
        self.header.started = Some(words::date(claimed.started));
        self.header.pid = claimed.process;
        self.header.cpuid = (!cpuid.is_empty()).then(|| Cpuid::from_entries(cpuid.iter().copied()).to_raw());
        let part = self.part.insert(Part {
            path: claimed.path,
            file: BufWriter::new(claimed.file),
            bytes: 0,
            before: None,
            line: Vec::new(),
        });
        let room = if self.size.is_some() { PART } else { 0 };
        part.write_header(&self.header, room)?;
        part.file.flush()
    }

    /// Whether there is a file to write to.
    fn write(&mut self, entry: &Entry) -> io::Result<bool> {
        if let (Some(size), Some(part)) = (self.size, &self.part)
            && part.bytes + LONGEST > size
        {
            self.begin_anew()?;
        }
        let Some(part) = &mut self.part else {
            return Ok(false);
        };
        part.line.clear();
        match entry {
            Entry::Access(event, _) => write_event(event, &mut part.line)?,
            Entry::Gap(gap) => write_gap(gap, &mut part.line)?,
        }
        part.bytes += part.line.len() as u64;
        part.file.write_all(&part.line)?;
        Ok(true)
    }

    /// Moves the file out of the way, in place of the one before it if there is one, and goes on with a new one.
    fn begin_anew(&mut self) -> io::Result<()> {
        let Some(part) = &mut self.part else {
            return Ok(());
        };
        if self.header.part.is_none() {
            self.header.part = Some(1);
            part.file.rewind()?;
            part.write_header(&self.header, 0)?;
        }
        part.file.flush()?;
        match &part.before {
            Some(before) => fs::rename(&part.path, before)?,
            None => part.before = Some(place::aside(&part.path)?),
        }
        let file = place::create(&part.path)?;
        if !place::lock(&file) {
            return Err(io::Error::other("another run has it"));
        }
        part.file = BufWriter::new(file);
        part.bytes = 0;
        self.header.part = self.header.part.map(|number| number + 1);
        part.write_header(&self.header, 0)
    }
}

impl Part {
    /// With `room` for more that it may have to say.
    fn write_header(&mut self, header: &Header, room: usize) -> io::Result<()> {
        self.line.clear();
        header.write(&mut self.line)?;
        let end = self.line.len().saturating_sub(1);
        self.line.splice(end..end, std::iter::repeat_n(b' ', room));
        self.bytes += self.line.len() as u64;
        self.file.write_all(&self.line)
    }
}

/// An event as the journal has it.
fn fields(event: &Event) -> Vec<(&'static str, String)> {
    let mut text = Vec::new();
    // Writing to memory does not fail.
    let _ = line(event, &mut text);
    let mut fields = vec![
        ("MESSAGE", String::from_utf8_lossy(&text).trim_end().to_owned()),
        // A warning, or information (syslog(3)).
        ("PRIORITY", if event.did.is_fault() { "4" } else { "6" }.to_owned()),
        ("MSR", event.msr.to_string()),
        ("OP", event.op.name().to_owned()),
        ("VALUE", format!("{:#x}", event.value)),
        ("DID", event.did.name().to_owned()),
        ("VM", event.vm.to_string()),
        ("VCPU", event.vcpu.to_string()),
    ];
    let more = [
        ("MSR_NAME", words::name(event.msr).map(str::to_owned)),
        ("WHY", event.why.map(|why| why.name().to_owned())),
        ("RULE", event.rule.map(|rule| rule.to_string())),
        ("RIP", event.rip.map(|rip| format!("{rip:#x}"))),
    ];
    fields.extend(more.into_iter().filter_map(|(name, value)| Some((name, value?))));
    fields
}

impl Part {
    fn write_policy(&mut self, t: Nanos, hash: &str) -> io::Result<()> {
        self.line.clear();
        msrgate_trace::write_policy(t, hash, &mut self.line)?;
        self.bytes += self.line.len() as u64;
        self.file.write_all(&self.line)?;
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
    if let Some(within) = event.within {
        write!(to, " in {within}")?;
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
            within: None,
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
            within: Some(msrgate_core::Within::L2),
            cost: Some(Nanos(1200)),
            ..event(0, 0xdead)
        };
        line(&fault, &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "1.500000 vm 0 vcpu 1 rdmsr(0x8b IA32_BIOS_SIGN_ID) = 0x5 value rule 2\n\
             0.000000 vm 0 vcpu 1 wrmsr(0xdead, 0x5) = #GP deny rip 0x1000 in l2 <1.2 µs>\n"
        );
    }

    #[test]
    fn a_file_with_a_limit_is_begun_anew_and_the_part_before_is_kept() {
        let directory = std::env::temp_dir().join(format!("msrgate-trace-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("t");
        fs::write(directory.join("t.1"), "somebody's").unwrap();
        let size = 4096;
        let header = Header {
            msrgate_trace: msrgate_trace::VERSION,
            ..Header::default()
        };
        let mut trace = Trace::open(Some(&path), None, Some(size), &[], header, 0).unwrap();
        trace.place().unwrap().claim(7).unwrap();
        trace.begin(&[(1, 0, [5; 4])]);
        let read = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).unwrap();
            assert!(text.len() as u64 <= size, "{name} has {} bytes", text.len());
            let lines = msrgate_trace::Lines::new(text.as_bytes()).unwrap();
            let header = lines.header().clone();
            assert_eq!((header.pid, header.cpuid.is_some()), (Some(7), true));
            let times = lines.map(|record| match record.unwrap() {
                msrgate_trace::Record::Event(event) => event.t.0,
                gap => panic!("{gap:?}"),
            });
            (header.part, times.collect::<Vec<u64>>())
        };
        let mut written = 0;
        let mut write = |trace: &mut Trace, more: u64| {
            for t in written..written + more {
                trace.take(&Entry::Access(event(t, 0x8b), msrgate_core::Log::None));
            }
            written += more;
            trace.flush();
        };
        write(&mut trace, 20);
        assert_eq!(read("t"), (None, (0..20).collect()));
        for _ in 0..5 {
            write(&mut trace, 20);
        }
        let ((last, new), (before, old)) = (read("t"), read("t.2"));
        assert!(before > Some(1), "{before:?}");
        assert_eq!(last, before.map(|part| part + 1));
        let kept: Vec<u64> = old.into_iter().chain(new).collect();
        assert_eq!(kept, (120 - kept.len() as u64..120).collect::<Vec<u64>>());
        assert_eq!(fs::read_to_string(directory.join("t.1")).unwrap(), "somebody's");
        assert!(!directory.join("t.3").exists() && trace.unwritten().is_none());
        fs::remove_dir_all(&directory).unwrap();
    }
}
