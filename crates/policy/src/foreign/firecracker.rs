//! The `msr_modifiers` of a CPU template of Firecracker.
//!
//! `{"addr": "0x10a", "bitmap": "0b…"}` with a character for each bit, the highest first: `0` and `1` set it, `x` leaves it
//! as KVM has it (`src/vmm/src/cpu_config/x86_64/custom_cpu_template.rs`, `deserialize_u64_bitmap`). Bits that are not
//! written are left too.

use std::collections::HashSet;

use msrgate_core::{Msr, ReadAction, Verdict};
use msrgate_msrs::number;
use serde::Deserialize;

use super::imported::{ForeignError, Format, Imported};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a template")]
struct Template {
    #[serde(default)]
    msr_modifiers: Vec<Modifier>,
    // What is not about MSRs.
    #[serde(default, rename = "kvm_capabilities")]
    _kvm_capabilities: serde::de::IgnoredAny,
    #[serde(default)]
    cpuid_modifiers: Vec<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with `addr` and `bitmap`")]
struct Modifier {
    addr: String,
    bitmap: String,
}

/// Templates that are written by hand fix a few registers that a guest writes, and dumps all of them.
const MOST_WRITTEN: usize = 16;

pub(super) fn import(text: &str) -> Result<Imported, ForeignError> {
    let template = parsed(text)?;
    let mut comments = vec![
        "From a CPU template of Firecracker. It sets what registers hold at first, which a guest's write may change; \
         here reads always get it."
            .to_owned(),
    ];
    if !template.cpuid_modifiers.is_empty() {
        comments.push("What the template does to the CPUID is not in here.".to_owned());
    }
    let mut imported = Imported {
        format: Format::Firecracker,
        default: Verdict::Allow,
        msrs: Vec::new(),
        comments,
        remarks: Vec::new(),
    };
    let mut written: Vec<&str> = Vec::new();
    for (msr, keep, set) in registers_of(&template)? {
        let read = match keep {
            0 => Some(ReadAction::Value(set)),
            u64::MAX => None,
            keep => Some(ReadAction::Mask { keep, set }),
        };
        let entry = msrgate_msrs::by_msr(msr).filter(|entry| entry.keeps_writes() && read.is_some());
        written.extend(entry.map(|entry| entry.name()));
        imported.msrs.push((msr, read, None));
    }
    imported.remarks = remarks(&written);
    Ok(imported)
}

/// The registers of a template, each with the bits that are left as they are, and the bits that are set.
pub(super) fn registers(text: &str) -> Result<Vec<(Msr, u64, u64)>, ForeignError> {
    registers_of(&parsed(text)?)
}

fn parsed(text: &str) -> Result<Template, ForeignError> {
    serde_json::from_str(text).map_err(|error| {
        let what = match text.contains("\"guest_cpu_config\"") {
            true => {
                "this is a fingerprint, and the template is in it: `jq .guest_cpu_config FILE` prints it".to_owned()
            }
            false => format!("this is not a CPU template: {error}"),
        };
        ForeignError::at(error.line(), what)
    })
}

fn registers_of(template: &Template) -> Result<Vec<(Msr, u64, u64)>, ForeignError> {
    let mut seen = HashSet::new();
    let mut registers = Vec::new();
    for Modifier { addr, bitmap } in &template.msr_modifiers {
        let index = number::parse(addr).ok().and_then(|index| u32::try_from(index).ok());
        let msr = Msr(index.ok_or_else(|| ForeignError::new(format!("the addr `{addr}` is not a number of 32 bits")))?);
        if !seen.insert(msr) {
            return Err(ForeignError::new(format!("the addr `{addr}` is there twice")));
        }
        let (keep, set) = bits(bitmap).ok_or_else(|| {
            ForeignError::new(format!(
                "the bitmap of `{addr}` is `{bitmap}`, not up to 64 of 0, 1 and x"
            ))
        })?;
        registers.push((msr, keep, set));
    }
    Ok(registers)
}

/// Of registers that a guest writes a policy says something else than a template does.
fn remarks(written: &[&str]) -> Vec<String> {
    match written {
        [first, .., last] if written.len() > MOST_WRITTEN => vec![format!(
            "this is a dump of a vCPU and no policy: it has {} registers that a guest writes, {first} to {last}, of which reads \
             would always get what is here; take them out",
            written.len()
        )],
        _ => written
            .iter()
            .map(|name| {
                format!(
                    "{name}: the template sets what it holds at first and a guest's write changes that, but here reads always \
                     get it"
                )
            })
            .collect(),
    }
}

/// Which bits are left as they are, and which are ones.
fn bits(bitmap: &str) -> Option<(u64, u64)> {
    // Underscores may stand anywhere among them.
    let digits = bitmap.strip_prefix("0b").unwrap_or(bitmap).replace('_', "");
    if digits.is_empty() || digits.len() > 64 {
        return None;
    }
    digits.chars().try_fold((u64::MAX, 0), |(keep, set), c| match c {
        '0' => Some((keep << 1, set << 1)),
        '1' => Some((keep << 1, set << 1 | 1)),
        'x' => Some((keep << 1 | 1, set << 1)),
        _ => None,
    })
}
