//! The filter that a VMM has given the kernel by itself, which the kernel does not tell: known of some, or said by the user.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use msrgate_core::{Filter, FilterRange, Ops, Reason, Reasons, Verdict};
use msrgate_plan::Plan;
use msrgate_policy::raw::RawFormat;
use serde_json::Value;

use crate::args::AttachArgs;
use crate::exit::{Exit, Failure};
use crate::{input, load};

/// What a VMM has in force.
pub(crate) struct FilterInForce {
    /// `None` where it is to be replaced, whatever it is.
    pub(crate) known: Option<FilterAndMask>,
    /// How it is known, as the end of a sentence.
    pub(crate) how: String,
}

/// A filter and a mask.
#[derive(Clone)]
pub(crate) struct FilterAndMask {
    /// `None` where there is none.
    pub(crate) filter: Option<Filter>,
    /// The exits that the VMM asked for.
    pub(crate) mask: Reasons,
}

impl FilterAndMask {
    /// Nothing.
    pub(crate) const NONE: FilterAndMask = FilterAndMask {
        filter: None,
        mask: Reasons::NONE,
    };
}

impl FilterInForce {
    /// What the command line says, or else what is known of the process's program.
    pub(crate) fn of(args: &AttachArgs) -> Result<FilterInForce, Failure> {
        if args.replace_filter {
            return Ok(FilterInForce {
                known: None,
                how: "by --replace-filter".to_owned(),
            });
        }
        match &args.vmm_filter {
            Some(none) if none == Path::new("none") => Ok(FilterInForce {
                known: Some(FilterAndMask::NONE),
                how: "by --vmm-filter".to_owned(),
            }),
            Some(file) => Ok(FilterInForce {
                known: Some(from_file(file)?),
                how: "by --vmm-filter".to_owned(),
            }),
            None => of_program(args.process),
        }
    }
}

/// A filter, and the mask where the file tells of it: a policy and a plan do by what their VMM answers.
fn from_file(path: &Path) -> Result<FilterAndMask, Failure> {
    let bytes = input::bytes(path)?;
    if RawFormat::of(&bytes) == RawFormat::Policy {
        let policy = load::unresolved_in(path, bytes)?;
        return Ok(of_plan(&load::planned_or_report(policy, None, &[])?.plan));
    }
    let captured = captured(&bytes);
    if let Some((mask, false)) = captured {
        return Ok(FilterAndMask { filter: None, mask });
    }
    let given = load::filter(path, &bytes)?;
    if let Some(map) = &given.plan {
        let plan = Plan::compile(map).map_err(|error| Failure::Line(Exit::No, error.to_string()))?;
        return Ok(of_plan(&plan));
    }
    let (mask, _) = captured.ok_or_else(|| {
        Failure::input(format!(
            "`{}` says which accesses the VMM's filter denies, and not whether they are faults or exits for the VMM: take a \
             capture of it (`msrgate capture -o FILE -- VMM`), or a policy in which `deny` is a fault and a handler an exit",
            path.display()
        ))
    })?;
    Ok(FilterAndMask {
        filter: Some(given.filter),
        mask,
    })
}

fn of_plan(plan: &Plan) -> FilterAndMask {
    FilterAndMask {
        filter: Some(plan.filter().clone()),
        mask: plan.reasons(),
    }
}

/// The last mask that the kernel took in a capture, and whether it took a filter; `None` for what is no capture.
fn captured(bytes: &[u8]) -> Option<(Reasons, bool)> {
    let calls = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    let mut found = None;
    // A VMM that goes on has not written all of the last one yet.
    for call in calls.map_while(Result::ok) {
        let name = call.get("call").and_then(Value::as_str);
        let Some(name) = name else { continue };
        let (mask, filter) = found.get_or_insert((Reasons::NONE, false));
        if call.get("errno").is_some_and(|errno| !errno.is_null()) {
            continue;
        }
        *filter |= name == "KVM_X86_SET_MSR_FILTER";
        let given = call.get("mask").and_then(Value::as_u64).and_then(Reasons::from_bits);
        *mask = given.filter(|_| name == "KVM_ENABLE_CAP").unwrap_or(*mask);
    }
    found
}

/// Programs that give the kernel neither filter nor mask, by the name of their file. Their code is looked through as well.
const WITHOUT: [&str; 4] = ["firecracker", "cloud-hypervisor", "lkvm", "kvmtool"];

/// What is known of the program that a process runs.
fn of_program(process: i32) -> Result<FilterInForce, Failure> {
    let exe = format!("/proc/{process}/exe");
    let program = fs::read_link(&exe).unwrap_or_default();
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let unknown = |why: &str| {
        Failure::input(format!(
            "it cannot be known which MSR filter `{name}` has given the kernel{why}, and a policy would take its place: its own \
             answers would become faults, and its own denials would be gone. Say `--vmm-filter none` where it has none, \
             `--vmm-filter FILE` with its filter (`msrgate capture` shows it), or `--replace-filter` to lose it"
        ))
    };
    let name_of = |known: &str| {
        name == known
            || name
                .strip_prefix(known)
                .is_some_and(|rest| rest.starts_with(['-', '.', '_']))
    };
    if name.starts_with("qemu-system-") || name == "qemu-kvm" || name == "kvm" {
        let code = contents(&exe).map_err(|_| unknown(", since its program cannot be read"))?;
        let version = qemu_version(&code).ok_or_else(|| unknown(", since its program says no version of QEMU"))?;
        let arguments = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let own = qemu(version, has_rapl(&arguments));
        let (major, minor) = version;
        let known = own.ok_or_else(|| unknown(&format!(", since msrgate knows none of QEMU {major}.{minor}")))?;
        return Ok(FilterInForce {
            known: Some(known),
            how: format!("as QEMU {major}.{minor} has it"),
        });
    }
    if WITHOUT.iter().any(|known| name_of(known)) {
        let code = contents(&exe).map_err(|_| unknown(", since its program cannot be read"))?;
        // The request, as an instruction or a table has it.
        let request = msrgate_core::abi::SET_MSR_FILTER.to_le_bytes();
        if !code.windows(request.len()).any(|bytes| bytes == request) {
            return Ok(FilterInForce {
                known: Some(FilterAndMask::NONE),
                how: format!("as `{name}` has none, and the call is not in its code"),
            });
        }
        return Err(unknown(
            ", since KVM_X86_SET_MSR_FILTER is in its code, which other versions have not",
        ));
    }
    Err(unknown(""))
}

/// All of a program, which may be large.
fn contents(path: &str) -> io::Result<Vec<u8>> {
    const MOST: u64 = 512 << 20;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Major and minor version, by the line that `--version` prints.
fn qemu_version(code: &[u8]) -> Option<(u32, u32)> {
    const LINE: &[u8] = b"QEMU emulator version ";
    let at = code.windows(LINE.len()).position(|bytes| bytes == LINE)?;
    let rest = code.get(at + LINE.len()..)?;
    let text: String = rest.iter().take(16).map(|byte| char::from(*byte)).collect();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether QEMU's `-accel kvm,rapl=on` is among the arguments.
fn has_rapl(arguments: &[u8]) -> bool {
    let text = String::from_utf8_lossy(arguments);
    ["rapl=true", "rapl=on", "rapl=yes"]
        .iter()
        .any(|word| text.contains(word))
}

/// What QEMU gives the kernel in `kvm_arch_init`: from 7.2 on reads of MSR_CORE_THREAD_COUNT are its own, from 9.1 on with RAPL
/// those of four MSRs more. `None` where nobody has looked.
fn qemu(version: (u32, u32), rapl: bool) -> Option<FilterAndMask> {
    const NEWEST: (u32, u32) = (10, 0);
    if version < (7, 2) {
        return Some(FilterAndMask::NONE);
    }
    if version > NEWEST {
        return None;
    }
    let mut read = vec![0x35];
    if rapl && version >= (9, 1) {
        read.extend([0x606, 0x610, 0x611, 0x614]);
    }
    let denied = |msr: &u32| FilterRange::new(*msr, 1, Ops::READ, vec![0]).ok();
    let filter = Filter::new(Verdict::Allow, read.iter().filter_map(denied).collect::<Vec<_>>()).ok()?;
    Some(FilterAndMask {
        filter: Some(filter),
        mask: Reasons::of(Reason::Filter),
    })
}

#[cfg(test)]
mod tests {
    use msrgate_core::{Msr, Op};

    use super::*;

    #[test]
    fn a_capture_says_the_filter_and_the_mask_that_the_kernel_took() {
        let mask = |mask: u32, errno: &str| {
            format!(r#"{{"call":"KVM_ENABLE_CAP","cap":"KVM_CAP_X86_USER_SPACE_MSR","mask":{mask},"errno":{errno}}}"#)
        };
        let filter = r#"{"call":"KVM_X86_SET_MSR_FILTER","default":"allow","ranges":[],"errno":null}"#;
        let text = [mask(4, "null"), filter.to_owned(), mask(2, "\"EINVAL\"")].join("\n");
        assert_eq!(captured(text.as_bytes()), Some((Reasons::of(Reason::Filter), true)));
        let text = r#"{"call":"KVM_CREATE_VM","errno":null}"#;
        assert_eq!(captured(text.as_bytes()), Some((Reasons::NONE, false)));
        assert_eq!(captured(br#"{"default":"deny","ranges":[]}"#), None);
    }

    #[test]
    fn what_qemu_gives_the_kernel_is_known_by_its_version() {
        let version = |text: &str| qemu_version(text.as_bytes());
        assert_eq!(
            version("..\0QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\n"),
            Some((7, 2))
        );
        assert_eq!(version("QEMU emulator version 10.0.3\n"), Some((10, 0)));
        assert_eq!(version("QEMU emulator version %s"), None);
        let reads = |version, rapl| {
            let filter = qemu(version, rapl).unwrap().filter;
            let denied = |msr: &u32| {
                filter
                    .as_ref()
                    .is_some_and(|filter| filter.verdict(Msr(*msr), Op::Read) == Verdict::Deny)
            };
            [0x35, 0x606, 0x611].iter().map(denied).collect::<Vec<_>>()
        };
        assert_eq!(reads((7, 1), false), [false, false, false]);
        assert_eq!(reads((7, 2), true), [true, false, false]);
        assert_eq!(reads((9, 1), true), [true, true, true]);
        assert_eq!(reads((10, 0), false), [true, false, false]);
        assert!(qemu((11, 0), false).is_none());
        assert!(has_rapl(b"qemu\0-accel\0kvm,rapl=true,path=x\0") && !has_rapl(b"qemu\0-accel\0kvm\0"));
    }
}
