//! The guest's CPUID, as the command line names it and as KVM takes it.

use std::io::{self, BufRead, BufReader};
use std::path::Path;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_trace::Lines;

use crate::args::CpuidArgs;
use crate::exit::{Exit, Failure};
use crate::input;

/// The guest's CPUID that the command line names.
pub(crate) fn given(args: &CpuidArgs) -> Result<Option<Cpuid>, Failure> {
    match &args.cpuid {
        None => Ok(None),
        Some(path) if path == Path::new("host") => host().map(Some),
        Some(path) => file_cpuid(path).map(Some),
    }
}

/// What `cpuid -r` printed, or what the header of a trace says; the rest of the trace is not read.
fn file_cpuid(path: &Path) -> Result<Cpuid, Failure> {
    let name = input::shown(path);
    let unreadable = |error: io::Error| Failure::input(format!("cannot read `{name}`: {error}"));
    let malformed = |error: &dyn std::fmt::Display| Failure::input(format!("{name}: {error}"));
    let mut file = BufReader::new(input::open(path).map_err(unreadable)?);
    if file
        .fill_buf()
        .map_err(unreadable)?
        .trim_ascii_start()
        .starts_with(b"{")
    {
        let lines = Lines::new(file).map_err(|error| malformed(&error))?;
        let cpuid = lines.header().parse_cpuid();
        let cpuid =
            cpuid.ok_or_else(|| malformed(&"the trace's header has no `cpuid`, so give `cpuid -r -1`'s output"))?;
        return cpuid.map_err(|error| malformed(&error));
    }
    of_text(&name, file)
}

/// What a text that `cpuid -r` printed says.
pub(crate) fn of_text(name: &str, text: impl io::Read) -> Result<Cpuid, Failure> {
    let malformed = |error: &dyn std::fmt::Display| Failure::input(format!("{name}: {error}"));
    let text = input::whole(text)
        .and_then(msrgate_policy::text_of)
        .map_err(|error| malformed(&error))?;
    Cpuid::parse_raw(&text).map_err(|error| malformed(&error))
}

/// What KVM on this machine offers a guest.
pub(crate) fn host() -> Result<Cpuid, Failure> {
    let machine = |line: String| Failure::Line(Exit::Machine, line);
    msrgate_kvm::open().map_err(|error| machine(format!("{error}; without KVM give `--cpuid FILE`")))?;
    let kvm = kvm_ioctls::Kvm::new().map_err(|error| machine(format!("/dev/kvm does not open: {error}")))?;
    let supported = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| machine(format!("KVM_GET_SUPPORTED_CPUID failed: {error}")))?;
    let entries = supported.as_slice().iter().map(|entry| {
        let values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        (entry.function, entry.index, values)
    });
    Ok(Cpuid::from_entries(entries))
}

/// A CPUID as KVM_SET_CPUID2 takes it.
pub(crate) fn to_kvm(cpuid: &Cpuid) -> Result<CpuId, Failure> {
    /// The subleaf counts.
    const SIGNIFICANT_INDEX: u32 = 1;
    let several = |leaf: u32| cpuid.entries().filter(|(other, ..)| *other == leaf).count() > 1;
    let entries: Vec<kvm_cpuid_entry2> = cpuid
        .entries()
        .map(|(function, index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index,
            flags: if several(function) { SIGNIFICANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| Failure::input("the CPUID has more leaves than KVM takes"))
}
