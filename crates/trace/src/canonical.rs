//! An event in the one spelling that [`write_event`] gives it, which nearly all lines have.
//!
//! What is spelt otherwise is left to the reader of JSON, which also says what is wrong with a line. Whatever is read here
//! it reads likewise; a test compares them.

use std::io::{self, Write};

use msrgate_core::{Disposition, Event, FaultCause, Gap, Msr, Nanos, Op, Reason, Within};

/// The event of a line; `None` where it is spelt in another way.
pub(super) fn read(line: &[u8]) -> Option<Event> {
    let mut rest = Rest(line);
    rest.skip(b"{\"t\":")?;
    let t = rest.decimal()?;
    rest.skip(b",\"vm\":")?;
    let vm = rest.decimal_u32()?;
    rest.skip(b",\"vcpu\":")?;
    let vcpu = rest.decimal_u32()?;
    rest.skip(b",\"op\":\"")?;
    let op = if rest.skip(b"rdmsr\"").is_some() {
        Op::Read
    } else {
        rest.skip(b"wrmsr\"")?;
        Op::Write
    };
    rest.skip(b",\"msr\":\"0x")?;
    let msr = Msr(u32::try_from(rest.hexadecimal()?).ok()?);
    rest.skip(b",\"value\":\"0x")?;
    let value = rest.hexadecimal()?;
    let reason = match rest.skip(b",\"reason\":\"") {
        Some(()) => Some(rest.word(&Reason::ALL, Reason::name)?),
        None => None,
    };
    rest.skip(b",\"did\":\"")?;
    let did = rest.word(&Disposition::ALL, Disposition::name)?;
    let why = match rest.skip(b",\"why\":\"") {
        Some(()) => Some(rest.word(&FaultCause::ALL, FaultCause::name)?),
        None => None,
    };
    let would = match rest.skip(b",\"would\":\"") {
        Some(()) => Some(rest.word(&Disposition::ALL, Disposition::name)?),
        None => None,
    };
    let rule = match rest.skip(b",\"rule\":") {
        Some(()) => Some(rest.decimal_u32()?),
        None => None,
    };
    let rip = match rest.skip(b",\"rip\":\"0x") {
        Some(()) => Some(rest.hexadecimal()?),
        None => None,
    };
    let within = match rest.skip(b",\"in\":\"") {
        Some(()) => Some(rest.word(&Within::ALL, Within::name)?),
        None => None,
    };
    let cost = match rest.skip(b",\"cost\":") {
        Some(()) => Some(rest.decimal()?),
        None => None,
    };
    rest.skip(b"}")?;
    matches!(rest.0, b"\n" | b"").then_some(Event {
        t: Nanos(t),
        vm,
        vcpu,
        op,
        msr,
        value,
        reason,
        did,
        why,
        would,
        rule,
        rip,
        within,
        cost: cost.map(Nanos),
    })
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    /// Takes a text of a length that is known when this is compiled, and so compared a word at a time.
    #[inline(always)]
    fn skip<const N: usize>(&mut self, text: &[u8; N]) -> Option<()> {
        let (start, rest) = self.0.split_first_chunk()?;
        self.0 = (start == text).then_some(rest)?;
        Some(())
    }

    /// Digits as JSON has them: no zero before others, and no more than fit.
    fn decimal(&mut self) -> Option<u64> {
        let mut number = 0u64;
        let before = self.0;
        while let [digit @ b'0'..=b'9', rest @ ..] = self.0 {
            number = number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            self.0 = rest;
        }
        // Up to 19 digits fit.
        match (before, before.len() - self.0.len()) {
            ([b'0', ..], 1) | ([b'1'..=b'9', ..], 1..=19) => Some(number),
            _ => None,
        }
    }

    fn decimal_u32(&mut self) -> Option<u32> {
        u32::try_from(self.decimal()?).ok()
    }

    /// 1 to 16 digits, and the quotation mark behind them.
    fn hexadecimal(&mut self) -> Option<u64> {
        let mut number = 0u64;
        let before = self.0;
        while let [digit, rest @ ..] = self.0 {
            let value = digit.wrapping_sub(if *digit < b'a' { b'0' } else { b'a' - 10 });
            if value >= 16 || *digit < b'a' && value > 9 {
                break;
            }
            number = number << 4 | u64::from(value);
            self.0 = rest;
        }
        let digits = before.len() - self.0.len();
        self.skip(b"\"")?;
        (1..=16).contains(&digits).then_some(number)
    }

    /// One of some words, and the quotation mark behind it.
    fn word<T: Copy>(&mut self, words: &[T], name: impl Fn(T) -> &'static str) -> Option<T> {
        let rest = self.0;
        let found = words.iter().find_map(|word| {
            let rest = rest.strip_prefix(name(*word).as_bytes())?.strip_prefix(b"\"")?;
            Some((*word, rest))
        });
        let (word, rest) = found?;
        self.0 = rest;
        Some(word)
    }
}

/// Writes one event as a line.
pub fn write_event(event: &Event, to: &mut impl Write) -> io::Result<()> {
    let Event {
        t,
        vm,
        vcpu,
        op,
        msr,
        value,
        reason,
        did,
        why,
        would,
        rule,
        rip,
        within,
        cost,
    } = event;
    let mut line = Line::new();
    line.text("{\"t\":");
    line.decimal(t.0);
    line.text(",\"vm\":");
    line.decimal((*vm).into());
    line.text(",\"vcpu\":");
    line.decimal((*vcpu).into());
    line.text(",\"op\":\"");
    line.text(op.name());
    line.text("\",\"msr\":\"0x");
    line.hexadecimal(msr.0.into());
    line.text("\",\"value\":\"0x");
    line.hexadecimal(*value);
    if let Some(reason) = reason {
        line.text("\",\"reason\":\"");
        line.text(reason.name());
    }
    line.text("\",\"did\":\"");
    line.text(did.name());
    if let Some(why) = why {
        line.text("\",\"why\":\"");
        line.text(why.name());
    }
    if let Some(would) = would {
        line.text("\",\"would\":\"");
        line.text(would.name());
    }
    line.text("\"");
    if let Some(rule) = rule {
        line.text(",\"rule\":");
        line.decimal((*rule).into());
    }
    if let Some(rip) = rip {
        line.text(",\"rip\":\"0x");
        line.hexadecimal(*rip);
        line.text("\"");
    }
    if let Some(within) = within {
        line.text(",\"in\":\"");
        line.text(within.name());
        line.text("\"");
    }
    if let Some(cost) = cost {
        line.text(",\"cost\":");
        line.decimal(cost.0);
    }
    line.text("}\n");
    to.write_all(line.bytes())
}

/// Writes a gap as a line: at the place, between the events of its vCPU, where the lost ones would stand.
pub fn write_gap(gap: &Gap, to: &mut impl Write) -> io::Result<()> {
    let Gap { t, vm, vcpu, events } = gap;
    let mut line = Line::new();
    line.text("{\"lost\":");
    line.decimal(*events);
    line.text(",\"t\":");
    line.decimal(t.0);
    line.text(",\"vm\":");
    line.decimal((*vm).into());
    line.text(",\"vcpu\":");
    line.decimal((*vcpu).into());
    line.text("}\n");
    to.write_all(line.bytes())
}

/// Writes the line that says that the policy of a hash is in force from there on; readers pass over it.
///
/// # Errors
/// The output's.
pub fn write_policy(t: Nanos, hash: &str, to: &mut impl Write) -> io::Result<()> {
    let mut line = Line::new();
    line.text("{\"t\":");
    line.decimal(t.0);
    line.text(",\"policy\":\"");
    line.text(hash);
    line.text("\"}\n");
    to.write_all(line.bytes())
}

/// A line that is being written. The longest event takes some 300 bytes.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Line {
    fn new() -> Line {
        Line {
            bytes: [0; 512],
            len: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn text(&mut self, text: &str) {
        let end = self.len + text.len();
        if let Some(to) = self.bytes.get_mut(self.len..end) {
            to.copy_from_slice(text.as_bytes());
            self.len = end;
        }
    }

    fn decimal(&mut self, number: u64) {
        self.digits(number, number.checked_ilog10().unwrap_or(0) + 1, 10);
    }

    fn hexadecimal(&mut self, number: u64) {
        self.digits(number, number.checked_ilog2().unwrap_or(0) / 4 + 1, 16);
    }

    /// So many digits of a number, from the last one on.
    #[inline(always)]
    fn digits(&mut self, mut number: u64, count: u32, base: u64) {
        let end = self.len + count as usize;
        if let Some(to) = self.bytes.get_mut(self.len..end) {
            for digit in to.iter_mut().rev() {
                let value = (number % base) as u8;
                *digit = value + if value < 10 { b'0' } else { b'a' - 10 };
                number /= base;
            }
            self.len = end;
        }
    }
}
