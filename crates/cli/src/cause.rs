//! What of a policy decides an access, for people and for programs.

use msrgate_core::{Msr, MsrRange, Verdict};
use msrgate_msrs::cpuid::places;
use msrgate_msrs::{Entry, Exists};
use msrgate_policy::{Cause, Explanation};

use crate::json::{Printed, object};
use crate::load::Loaded;

/// How many reasons a line for people names.
const FEW: usize = 2;

/// The word of programs for what decides an access.
pub(crate) fn name(explained: &Explanation<'_>) -> &'static str {
    let allowed = (explained.verdict == Verdict::Allow, explained.action.did().is_kernels());
    match explained.cause {
        _ if MsrRange::X2APIC.contains(explained.msr) => "x2apic",
        // No range covers it, so that the filter's default has the word.
        _ if explained.msr == Msr::MAX && allowed.0 != allowed.1 => "last-msr",
        Cause::Rule(..) => "rule",
        Cause::Valid(_) => "valid",
        _ => "default",
    }
}

/// What of its CPUID says that a guest lacks an MSR.
pub(crate) fn lacks(entry: &'static Entry) -> impl Printed {
    let features = entry.exists().features().iter().map(|feature| {
        let places = places(feature).iter().map(|place| {
            object! {
                /// The leaf, for a hypervisor as if it began at 0x40000000.
                leaf: format!("{:#x}", place.leaf),
                /// The subleaf.
                subleaf: format!("{:#x}", place.subleaf),
                /// `"EAX"` to `"EDX"`.
                register: place.register.to_string(),
                /// The lowest bit of the field.
                bit: place.bit,
                /// How many bits it has.
                width: place.width,
                /// The least value that says yes; 0 where it is enough that the leaf is there.
                at_least: place.at_least,
            }
        });
        object! {
            /// The feature's name.
            name: feature,
            /// Where CPUID would tell of it: any of these.
            places: places.collect::<Vec<_>>(),
        }
    });
    object! {
        /// The features of which one would have to be there; empty where the vendor says it.
        features: features.collect::<Vec<_>>(),
        /// Whose processors have the MSR; empty where features say it.
        vendors: vendors(entry),
    }
}

/// What a guest's CPUID lacks for an MSR, in words: `CPUID lacks `mtrr` (CPUID.0x1:EDX[12])`.
pub(crate) fn lacks_in_words(entry: &Entry) -> String {
    let vendors = vendors(entry);
    if !vendors.is_empty() {
        return format!("CPUID.0x0 names another vendor than {}", vendors.join(" and "));
    }
    let features = entry.exists().features().iter().map(|feature| {
        let places: Vec<String> = places(feature).iter().map(ToString::to_string).collect();
        format!("`{feature}` ({})", places.join(", "))
    });
    let features: Vec<String> = features.collect();
    let features = match features.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        _ => features.concat(),
    };
    format!("CPUID lacks {features}")
}

/// What decides all accesses of a range that no rule does: the word for programs, and words for people.
pub(crate) fn without_rule(loaded: &Loaded, range: MsrRange) -> (&'static str, String) {
    let entries = msrgate_msrs::within(range);
    let lacking = loaded.policy.lacking(loaded.cpuid.as_ref());
    let lacking: Vec<&Entry> = lacking.filter(|entry| range.contains(entry.msr)).collect();
    if lacking.is_empty() || (lacking.len() as u64) < range.len() {
        return ("default", "default".to_owned());
    }
    let mut whys: Vec<String> = Vec::new();
    for entry in entries {
        let features = entry.exists().features();
        let why = match vendors(entry).as_slice() {
            [] => format!("no {}", features.join(" or ")),
            vendors => format!("not of {}", vendors.join(" or ")),
        };
        if !whys.contains(&why) {
            whys.push(why);
        }
    }
    let more = match whys.len().saturating_sub(FEW) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    whys.truncate(FEW);
    ("valid", format!("valid: {}{more}", whys.join(", ")))
}

/// The vendors that have the MSR, where CPUID tells by the vendor and by no feature.
fn vendors(entry: &Entry) -> Vec<String> {
    match entry.exists() {
        Exists::Always | Exists::Model => entry.vendors().iter().map(ToString::to_string).collect(),
        Exists::Feature(_) | Exists::AnyFeature(_) => Vec::new(),
    }
}
