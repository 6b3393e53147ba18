//! When a line of a log was, and by what a log is known.

use msrgate_core::Nanos;
use serde_json::{Map, Value};

const DAY: u64 = 86_400_000_000_000;

/// How far a log has come that tells the time of day alone.
#[derive(Default, Debug)]
pub(super) struct Clock {
    /// When the last line was that has a time of day, in nanoseconds since the first day began.
    last: u64,
}

impl Clock {
    /// When a line was: since the machine began, or, where that is not said, since midnight of the first day.
    pub(super) fn time(&mut self, line: &str, moment: Option<Nanos>) -> Nanos {
        let stamps = line.split(['[', ']']).map(str::trim);
        if let Some(t) = moment.or_else(|| stamps.filter_map(since_boot).next().map(Nanos)) {
            return t;
        }
        if let Some(t) = line.split(['[', ']', ' ', 'T']).find_map(clock) {
            let today = (self.last - self.last % DAY).saturating_add(t);
            self.last = match today >= self.last {
                true => today,
                false => today.saturating_add(DAY),
            };
        }
        Nanos(self.last)
    }
}

/// A line of `journalctl -o json`: the message, and when it was since the machine began.
pub(super) fn journal(line: &str) -> Option<(String, Option<Nanos>)> {
    let line = line.trim_start_matches(['>', ' ', '\t', '\u{feff}']);
    if !line.starts_with('{') || !line.contains("\"MESSAGE\"") {
        return None;
    }
    let object: Map<String, Value> = serde_json::from_str(line).ok()?;
    let message = match object.get("MESSAGE")? {
        Value::String(message) => message.clone(),
        // What is not a string is a list of its bytes.
        Value::Array(bytes) => {
            let bytes = bytes
                .iter()
                .map(|byte| byte.as_u64().and_then(|byte| u8::try_from(byte).ok()));
            String::from_utf8_lossy(&bytes.collect::<Option<Vec<u8>>>()?).into_owned()
        }
        _ => return None,
    };
    let micros = ["_SOURCE_MONOTONIC_TIMESTAMP", "__MONOTONIC_TIMESTAMP"].into_iter();
    let micros = micros
        .filter_map(|key| object.get(key)?.as_str()?.parse::<u64>().ok())
        .next();
    Some((message, micros.map(|micros| Nanos(micros.saturating_mul(1000)))))
}

/// Whether a log may begin with this line.
pub(super) fn begins(line: &str) -> bool {
    let line = line.trim_start();
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let dated = || {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        let first = words.next().unwrap_or_default();
        // `12:00:01`, `2024-11-22T12:00:01`, `Nov 22 12:00:01`.
        let time = first.rsplit('T').next().unwrap_or_default();
        clock(time).is_some()
            || words
                .nth(1)
                .is_some_and(|third| clock(third).is_some() && !third.ends_with(':'))
    };
    stamp.is_some_and(|(stamp, _)| since_boot(stamp).or(clock(stamp)).is_some())
        || ["-- ", "kern ", "(XEN) ", "qemu-system-"]
            .iter()
            .any(|start| line.starts_with(start))
        || line.contains(" kernel: ")
        || journal(line).is_some()
        || dated()
}

/// `44.000001`, in nanoseconds.
fn since_boot(stamp: &str) -> Option<u64> {
    let (seconds, micros) = stamp.trim().split_once('.')?;
    let micros = micros.parse::<u64>().ok().filter(|_| micros.len() == 6)?;
    seconds
        .parse::<u64>()
        .ok()?
        .checked_mul(1_000_000)?
        .checked_add(micros)?
        .checked_mul(1000)
}

/// `12:00:01`, with a fraction or without, in nanoseconds since midnight; a day and a year may stand around it.
fn clock(text: &str) -> Option<u64> {
    let mut words = text.split(' ').filter(|word| word.matches(':').count() >= 2);
    let mut parts = words.next()?.split([':', '.', ',']);
    let mut part = |most: u64| parts.next()?.parse::<u64>().ok().filter(|number| *number <= most);
    let seconds = part(23)? * 3600 + part(59)? * 60 + part(60)?;
    Some(seconds * 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_since_boot_or_of_the_day_and_goes_on_behind_midnight() {
        let mut clock = Clock::default();
        let mut at = |stamp: &str| clock.time(&format!("{stamp} kvm [1]: vcpu0 "), None).0 / 1_000_000_000;
        assert_eq!(at("[   44.000001]"), 44);
        assert_eq!(at("Nov 21 23:59:59 host kernel:"), 86_399);
        assert_eq!(at("2024-11-22T00:00:01,123456+01:00"), 86_401);
        assert_eq!(at("[Fri Nov 22 00:00:03 2024]"), 86_403);
        assert_eq!(at("Nov 22 00:00:04 host kernel: [  5.500000]"), 5);
        assert_eq!(at("no time"), 86_403);
    }

    #[test]
    fn a_line_of_the_journal_in_json_is_its_message() {
        let line = r#"{"__MONOTONIC_TIMESTAMP":"44000001","PRIORITY":"6","MESSAGE":"kvm [1]: x","_HOSTNAME":"h"}"#;
        assert_eq!(
            journal(line),
            Some(("kvm [1]: x".to_owned(), Some(Nanos(44_000_001_000))))
        );
        let bytes = r#"{"MESSAGE":[107,118,109]}"#;
        assert_eq!(journal(bytes), Some(("kvm".to_owned(), None)));
        for other in [
            r#"{"MESSAGE":null}"#,
            r#"{"MESSAGE":[300]}"#,
            r#"{"MESSAGE":"#,
            "MESSAGE",
            "{\"a\":1}",
        ] {
            assert_eq!(journal(other), None, "{other}");
        }
    }

    #[test]
    fn a_log_is_told_by_its_first_line() {
        for (line, log) in [
            ("[    0.000000] Linux version 6.1.0", true),
            ("[Fri Nov 22 00:00:03 2024] x", true),
            ("Nov 21 10:00:01 host1 kernel: x", true),
            ("Nov  1 10:00:01 host1 libvirtd[5]: x", true),
            ("2024-11-22T00:00:01,123456+01:00 h kernel: x", true),
            ("00:00:01.000000 VirtualBox VM 7.0.10 linux.amd64", true),
            ("-- Logs begin at Mon 2024-11-18", true),
            ("(XEN) Xen version 4.17", true),
            ("{\"MESSAGE\":\"x\"}", true),
            ("{\"msrgate_trace\":1}", false),
            (" CPU 0/KVM-1 [001] ..... 5.000001: kvm_msr: msr_read 1a6 = 0x0", false),
            ("[[rule]]", false),
            ("[1.5]", false),
            ("version = 1", false),
            ("garbage", false),
        ] {
            assert_eq!(begins(line), log, "{line}");
        }
    }
}
