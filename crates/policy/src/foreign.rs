//! What other tools say of MSRs, as policies; and policies in their words, where these can say all of it.
//!
//! ```
//! use msrgate_policy::Policy;
//! use msrgate_policy::foreign::{Format, import};
//!
//! let list = "0x00000010 0x0000000000000000 # time stamp\n0x00000199 0x000000000000ffff # P-state\n";
//! let policy = import(Format::MsrSafe, list)?.to_string();
//! assert_eq!(Policy::parse("msr-safe.toml", &policy).expect("a policy").rules.len(), 2);
//! # Ok::<(), msrgate_policy::foreign::ForeignError>(())
//! ```

mod crosvm;
mod firecracker;
mod msr_safe;
mod imported;
mod unsayable;

use msrgate_core::{Msr, MsrRange, Op, ReadAction, WriteAction};
use msrgate_plan::DecisionMap;

pub use imported::{ForeignError, Format, Imported};
pub use unsayable::Unsupported;

/// Makes a policy from another tool's words.
pub fn import(format: Format, text: &str) -> Result<Imported, ForeignError> {
    match format {
        Format::Crosvm => crosvm::import(text),
        Format::Firecracker => firecracker::import(text),
        Format::MsrSafe => msr_safe::import(text),
    }
}

/// The registers of a CPU template of Firecracker, each with the bits that it leaves as KVM has them, and the others' values.
pub fn registers(template: &str) -> Result<Vec<(Msr, u64, u64)>, ForeignError> {
    firecracker::registers(template)
}

/// What a policy means in another tool's words; or all accesses for which it has none. There are none for Firecracker's
/// templates: they set what a register holds at first, and a guest's write is not theirs to decide.
pub fn export(format: Format, map: &DecisionMap) -> Result<String, Vec<Unsupported>> {
    let (text, mut unsayable) = match format {
        Format::Crosvm => crosvm::export(map),
        Format::MsrSafe => msr_safe::export(map),
        Format::Firecracker => {
            let why = "a template of Firecracker sets what registers hold at first, and decides no access";
            let all = Unsupported {
                range: MsrRange::ALL,
                op: Op::Read,
                action: "any".to_owned(),
                rule: None,
                why,
            };
            (String::new(), vec![all])
        }
    };
    for (when, (read, write)) in [("unknown", map.unknown()), ("invalid", map.invalid())] {
        let of = |op, action: String| Unsupported {
            range: MsrRange::ALL,
            op,
            action: format!("{when} {action}"),
            rule: None,
            why: "what the kernel declines cannot be answered in these words",
        };
        if *read != ReadAction::Deny {
            unsayable.push(of(Op::Read, read.to_string()));
        }
        if *write != WriteAction::Deny {
            unsayable.push(of(Op::Write, write.to_string()));
        }
    }
    match unsayable.is_empty() {
        true => Ok(text),
        false => Err(unsayable),
    }
}

#[cfg(test)]
mod tests;
