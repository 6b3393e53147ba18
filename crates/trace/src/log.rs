//! What logs say of MSRs: the kernel's and syslog's, a guest's, a VMM's, another hypervisor's.
//!
//! ```text
//! [   44.000001] kvm [100]: vcpu0, guest rIP: 0xfffff80011112222 ignored rdmsr: 0x641 data 0x0
//! Sep 04 12:00:01 host1 kernel: kvm_amd: kvm [100]: vcpu3, guest rIP: 0xfffff80011112222 Unhandled WRMSR(0xc0010115) = 0x0
//! [    0.000000] unchecked MSR access error: RDMSR from 0x10a at rIP: 0xffffffff81000001 (native_read_msr+0x6/0x20)
//! qemu-system-x86_64: error: failed to set MSR 0x48b to 0x1582e00000000
//! ```
//!
//! What stands around the words of a line does not matter: a time, a host's name, the marks of a mail or of Markdown. A line
//! that a mail folded is read with the one behind it. Of a program whose words are not known a line is read if it has an access,
//! a word of trouble and a register's number, and of a system that stops at #GP the registers that it prints. All other lines
//! are passed over.

mod cause;
mod dump;
mod forms;
mod loose;
mod stamp;

use std::borrow::Cow;

use msrgate_core::{Disposition, Event, Gap, Msr, Nanos, Op};

pub use self::cause::{Cause, Speaker};

use self::cause::Found;
use self::dump::Dump;
use self::forms::Reading;
use self::stamp::Clock;

/// Where a processor begins after a reset; the instruction there is a jump.
const RESET: u64 = 0xfff0;

/// The most VMMs that are told apart.
const MOST_VMS: usize = 4096;

/// What a line says of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Said {
    /// Who says it.
    pub by: Speaker,
    /// What became of the access.
    pub cause: Cause,
    /// The register.
    pub msr: Msr,
    /// The direction; `None` where the line does not say it.
    pub op: Option<Op>,
    /// What was written, or what a read got, where the line has it.
    pub value: Option<u64>,
    /// The instruction pointer, where the line has it.
    pub rip: Option<u64>,
    /// When: since the machine began, or, where that is not said, since midnight of the first day.
    pub t: Nanos,
    /// Which of the log's VMs, by the process that is its VMM, from 0; 0 where the line does not say it.
    pub vm: u32,
    /// Which vCPU; 0 where the line does not say it.
    pub vcpu: u32,
}

impl Said {
    /// The access as a trace has it; `None` for what is no guest's, and where the direction is not known.
    pub fn event(&self) -> Option<Event> {
        let op = self.op?;
        let did = match (self.cause, op) {
            (Cause::Ignored | Cause::Dropped, Op::Read) => Disposition::Zero,
            (Cause::Ignored | Cause::Dropped, Op::Write) => Disposition::Ignore,
            (Cause::Unknown | Cause::Refused | Cause::Fault, _) => Disposition::Fault,
            (Cause::Vmm | Cause::Lacking | Cause::Program | Cause::Crash | Cause::Privileged, _) => return None,
        };
        Some(Event {
            t: self.t,
            vm: self.vm,
            vcpu: self.vcpu,
            op,
            msr: self.msr,
            value: self.value.unwrap_or_default(),
            reason: None,
            did,
            why: None,
            would: None,
            rule: None,
            rip: self.rip,
            within: None,
            cost: None,
        })
    }
}

/// What a line is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line {
    /// An access.
    Access(Said),
    /// Messages of MSRs that the kernel left out here, never 0: `kvm_set_msr_common: 27 callbacks suppressed`.
    Missing(Gap),
}

/// A log, line by line.
#[derive(Default, Debug)]
pub struct Log {
    /// The processes that are VMMs, whose places number the VMs.
    vms: Vec<u64>,
    clock: Clock,
    /// A line that may go on in the next one, and what is wrong if it does not.
    open: Option<(String, Option<String>)>,
    dump: Dump,
}

impl Log {
    /// What a line says, without the line's end; `None` if it is about something else, or if what it says goes on in the next
    /// line.
    ///
    /// An error is about a line whose words are those of a log, and which has no register or no value. If it is the line before
    /// this one, this one is not read, and can be given again.
    pub fn line(&mut self, line: &str) -> Result<Option<Line>, String> {
        let (message, moment) = match stamp::journal(line) {
            Some((message, moment)) => (Cow::Owned(message), moment),
            None => (Cow::Borrowed(line), None),
        };
        if unquoted(&message).trim().is_empty() {
            return Ok(None); // a blank line is no next one
        }
        if let Some((before, wrong)) = self.open.take() {
            let whole = format!("{before} {}", unquoted(&message));
            if let Reading::Access(found) = forms::read(&whole)
                && found.start < before.len()
                && found.by != Speaker::Other
            {
                return self.access(&whole, moment, &found).map(Some);
            }
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
        }
        match forms::read(&message) {
            Reading::Access(found) => self.access(&message, moment, &found).map(Some),
            Reading::Missing(events) => Ok(Some(Line::Missing(Gap {
                t: self.clock.time(&message, moment),
                vm: 0,
                vcpu: 0,
                events,
            }))),
            Reading::Open(wrong) => {
                self.open = Some((message.into_owned(), wrong));
                Ok(None)
            }
            Reading::Broken(wrong) => Err(wrong),
            Reading::Other => match self.dump.read(&message) {
                Some(found) => self.access(&message, moment, &found).map(Some),
                None => Ok(None),
            },
        }
    }

    /// Ends the log: an error if its last line breaks off.
    pub fn finish(&mut self) -> Result<(), String> {
        match self.open.take() {
            Some((_, Some(wrong))) => Err(wrong),
            _ => Ok(()),
        }
    }

    fn access(&mut self, line: &str, moment: Option<Nanos>, found: &Found) -> Result<Line, String> {
        let before = line.get(..found.start).unwrap_or_default();
        let rip = forms::rip(line);
        // No guest has run yet: the VMM gives the vCPU its registers.
        let cause = match (found.cause, found.op) {
            (Cause::Unknown | Cause::Refused, Some(Op::Write)) if found.by == Speaker::Kvm && rip == Some(RESET) => {
                Cause::Vmm
            }
            (cause, _) => cause,
        };
        Ok(Line::Access(Said {
            by: found.by,
            cause,
            msr: found.msr,
            op: found.op,
            value: found.value,
            rip,
            t: self.clock.time(before, moment),
            vm: self.vm(before)?,
            vcpu: forms::vcpu(line, found.start),
        }))
    }

    /// `kvm [100]: `, in older kernels `kvm: 100: `, or Xen's `d1v0 `: which VM it is.
    fn vm(&mut self, before: &str) -> Result<u32, String> {
        let Some(process) = forms::process(before) else {
            return Ok(0);
        };
        let known = self.vms.iter().position(|known| *known == process);
        let place = known.unwrap_or(self.vms.len());
        if place >= MOST_VMS {
            return Err(format!("there are more than {MOST_VMS} VMs"));
        }
        if known.is_none() {
            self.vms.push(process);
        }
        Ok(u32::try_from(place).unwrap_or(u32::MAX))
    }
}

/// Whether a file that begins with this line is a log.
pub(crate) fn begins(line: &str) -> bool {
    stamp::begins(line) || !matches!(forms::read(line), Reading::Other | Reading::Open(None))
}

/// Whether one of these lines, or several, say something of an MSR.
pub(crate) fn is_log<'a>(mut lines: impl Iterator<Item = &'a str>) -> bool {
    let mut log = Log::default();
    lines.any(|line| !matches!(log.line(line), Ok(None)))
}

/// A line of a mail without the marks that quote it.
fn unquoted(line: &str) -> &str {
    line.trim_start_matches(['>', ' ', '\t'])
}

#[cfg(test)]
mod tests;
