//! The registers that a system prints as it stops at #GP: of RDMSR and WRMSR, RCX is the MSR, and EDX and EAX are what is written.
//!
//! Linux, Xen and the BSDs print the instruction too, as bytes or by its name; firmware and macOS do not.

use msrgate_core::{Msr, Op};

use super::cause::{Cause, Found, Speaker};
use super::loose::{access, words};

/// How many lines a dump has at most, from the fault to its registers or its instruction.
const LINES: u32 = 80;

/// How Xen's dump begins, which says at its end what the fault was.
const XEN: &str = "----[ xen-";

/// A dump that is being read.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Dump {
    left: u32,
    rax: Option<u64>,
    rcx: Option<u64>,
    rdx: Option<u64>,
    op: Option<Op>,
}

impl Dump {
    /// Reads the next line of a log: what the dump says of an MSR, where this line completes it.
    pub(super) fn read(&mut self, line: &str) -> Option<Found> {
        // Most lines are of no dump.
        if self.left == 0 && !has(line, "protection") && !has(line, XEN) {
            return None;
        }
        let line = line.to_ascii_lowercase();
        let begins = ["general protection", "protection fault", XEN];
        if self.op.is_none() && begins.iter().any(|words| line.contains(words)) {
            *self = Dump {
                left: LINES,
                ..Dump::default()
            };
        }
        self.left = self.left.checked_sub(1)?;
        let words = words(&line);
        let is_code = self.instruction(&line, &words)?;
        // `RCX: 0x…,` of macOS and `RCX - …,` of firmware: no instruction follows.
        let mut is_whole = false;
        for pair in words.windows(2) {
            let [(start, name), (behind, digits)] = *pair else {
                continue;
            };
            let register = match name {
                "rax" => &mut self.rax,
                "rcx" => &mut self.rcx,
                "rdx" => &mut self.rdx,
                _ => continue,
            };
            let between = line.get(start + name.len()..behind).unwrap_or_default();
            let bare = digits.strip_prefix("0x").unwrap_or(digits);
            is_whole |= bare.len() < digits.len() && line.contains(',') || between.contains('-');
            *register = register.or(u64::from_str_radix(bare, 16).ok());
        }
        let (rax, rcx, rdx) = (self.rax?, self.rcx?, self.rdx?);
        let msr = Msr(u32::try_from(rcx & 0xffff_ffff).ok()?);
        let is_told = match self.op {
            Some(_) => true,
            None => is_whole && rcx == u64::from(msr.0) && msrgate_msrs::by_msr(msr).is_some(),
        };
        if !is_told {
            if is_whole || is_code {
                self.left = 0;
            }
            return None;
        }
        self.left = 0;
        Some(Found {
            start: 0,
            by: Speaker::Dump,
            cause: Cause::Fault,
            op: self.op,
            msr,
            value: (self.op == Some(Op::Write)).then_some((rdx & 0xffff_ffff) << 32 | rax & 0xffff_ffff),
        })
    }

    /// Whether the line has the instruction that faulted; `None` if it is another one, which ends the dump.
    fn instruction(&mut self, line: &str, words: &[(usize, &str)]) -> Option<bool> {
        let bytes = [("<0f> 32", Op::Read), ("<0f> 30", Op::Write)];
        if let Some((_, op)) = bytes.into_iter().find(|(bytes, _)| line.contains(bytes)) {
            self.op = Some(op);
            return Some(true);
        }
        if line.contains("code:") && line.contains('<') {
            self.left = 0;
            return None;
        }
        // Of a trace of calls the functions are not where the fault was.
        let is_place = line.contains("rip: ") || line.contains("stopped at");
        if is_place && self.op.is_none() {
            self.op = words
                .iter()
                .find_map(|(_, word)| access(word.trim_end_matches("_safe")))
                .flatten();
        }
        Some(false)
    }
}

fn has(line: &str, word: &str) -> bool {
    let mut windows = line.as_bytes().windows(word.len());
    windows.any(|bytes| bytes.eq_ignore_ascii_case(word.as_bytes()))
}
