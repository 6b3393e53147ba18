//! A case as it stands in a file.

use std::fmt;

use msrgate_core::{Access, Outcome, abi};

use super::{AccessStep, Call, Case, Descriptor, Place, RawFilter, Step, Target, process_name};

/// What a case file can hold; reading it again gives the same case.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[[case]]\nname = {}", quoted(&self.name))?;
        if let Some(process) = self.process {
            writeln!(f, "process = {}", quoted(process_name(process)))?;
        }
        if self.ignore_msrs {
            writeln!(f, "ignore_msrs = true")?;
        }
        for (key, text) in [("policy", &self.policy), ("cpuid", &self.cpuid)] {
            if let Some(text) = text {
                writeln!(f, "{key} = {}", lines(text))?;
            }
        }
        writeln!(f, "steps = [")?;
        for step in &self.steps {
            writeln!(f, "  {{ {step} }},")?;
        }
        writeln!(f, "]")
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Access(step) => step.fmt(f),
            Step::Call(call) => call.fmt(f),
            Step::Replace(policy) => write!(f, "replace = {}", lines(policy)),
            Step::Kill => f.write_str("kill = true"),
        }
    }
}

impl fmt::Display for AccessStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.access {
            Access::Read { msr } => write!(f, "rdmsr = {msr}")?,
            Access::Write { msr, value } => write!(f, "wrmsr = {msr}, value = \"{value:#x}\"")?,
        }
        if self.answer != Outcome::Fault {
            write!(f, ", answer = {}", outcome(self.answer))?;
        }
        if !self.meanwhile.is_empty() {
            f.write_str(", meanwhile = [")?;
            for call in &self.meanwhile {
                write!(f, " {{ {call} }},")?;
            }
            f.write_str(" ]")?;
        }
        if let Some(action) = &self.expect.action {
            write!(f, ", action = {}", quoted(action))?;
        }
        if let Some(verdict) = self.expect.verdict {
            write!(f, ", verdict = \"{}\"", verdict.name())?;
        }
        if let Some(exit) = self.expect.exit {
            write!(f, ", exit = \"{}\"", exit.map_or("none", |reason| reason.name()))?;
        }
        if let Some(sees) = self.expect.sees {
            write!(f, ", sees = {}", outcome(sees))?;
        }
        Ok(())
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::SetMsrFilter(filter) => write!(f, "set_msr_filter = {{ {filter} }}")?,
            Target::EnableCap { cap, flags, args } => {
                let [mask, more @ ..] = args;
                write!(f, "enable_cap = \"{mask:#x}\"")?;
                if *cap != abi::CAP_X86_USER_SPACE_MSR {
                    write!(f, ", cap = {cap}")?;
                }
                if *flags != 0 {
                    write!(f, ", flags = {flags:#x}")?;
                }
                if *more != [0; 3] {
                    let [a, b, c] = more;
                    write!(f, ", more_args = [\"{a:#x}\", \"{b:#x}\", \"{c:#x}\"]")?;
                }
            }
        }
        if self.on != Descriptor::Vm {
            write!(f, ", on = \"{}\"", self.on.name())?;
        }
        if self.argp != Place::Mapped {
            write!(f, ", argp = \"{}\"", self.argp.name())?;
        }
        if let Some(gives) = self.gives {
            write!(f, ", gives = \"{gives}\"")?;
        }
        Ok(())
    }
}

impl fmt::Display for RawFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "flags = {:#x}", self.flags)?;
        if self.pad != 0 {
            write!(f, ", pad = {:#x}", self.pad)?;
        }
        if let Some(layout) = self.layout {
            write!(f, ", layout = {}", quoted(process_name(layout)))?;
        }
        if self.edited {
            f.write_str(", edited = true")?;
        }
        if self.ranges.is_empty() {
            return Ok(());
        }
        f.write_str(", ranges = [")?;
        for range in &self.ranges {
            write!(
                f,
                "\n    {{ slot = {}, flags = {:#x}, nmsrs = {:#x}, base = {:#x}",
                range.slot, range.flags, range.nmsrs, range.base
            )?;
            if !range.bitmap.is_empty() {
                write!(f, ", bitmap = \"{}\"", hex(&range.bitmap))?;
            }
            if range.at != Place::Mapped {
                write!(f, ", at = \"{}\"", range.at.name())?;
            }
            f.write_str(" },")?;
        }
        f.write_str(" ]")
    }
}

impl Descriptor {
    /// The descriptor's name in a case file.
    pub const fn name(self) -> &'static str {
        match self {
            Descriptor::Vm => "vm",
            Descriptor::Vcpu => "vcpu",
            Descriptor::System => "system",
            Descriptor::AnotherProcess => "another-process",
        }
    }
}

impl Place {
    /// The place's name in a case file.
    pub const fn name(self) -> &'static str {
        match self {
            Place::Mapped => "mapped",
            Place::Unaligned => "unaligned",
            Place::PageEnd => "page-end",
            Place::Short => "short",
            Place::Null => "null",
            Place::Unmapped => "unmapped",
            Place::NonCanonical => "non-canonical",
        }
    }
}

fn outcome(outcome: Outcome) -> String {
    match outcome {
        Outcome::Value(value) => format!("\"{value:#x}\""),
        Outcome::Done => "\"done\"".into(),
        Outcome::Fault => "\"fault\"".into(),
    }
}

/// Equal bytes once, with how often.
fn hex(bytes: &[u8]) -> String {
    let runs: Vec<String> = bytes
        .chunk_by(|a, b| a == b)
        .map(|run| match run {
            [byte] => format!("{byte:02x}"),
            [byte, ..] => format!("{byte:02x}*{}", run.len()),
            [] => String::new(),
        })
        .collect();
    runs.join(" ")
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A text of several lines, as it is where that can be written.
fn lines(text: &str) -> String {
    if text.contains("'''") || text.contains('\r') || text.ends_with('\'') {
        quoted(text)
    } else {
        format!("'''\n{text}'''")
    }
}
