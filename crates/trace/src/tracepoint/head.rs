//! What stands before an event in a line: whose it is, and when.

/// The thread and the time of a line.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Head<'a> {
    /// Name and number of the thread, as the line has them.
    thread: &'a str,
    /// The process that the thread is of, where the line says it.
    pub(super) process: Option<&'a str>,
    /// Nanoseconds since some start.
    pub(super) t: Option<u64>,
}

impl<'a> Head<'a> {
    /// Reads what stands before the event's name.
    pub(super) fn read(head: &'a str) -> Head<'a> {
        let t = time(head);
        let (thread, process) = match since_start(head) {
            Some((_, rest)) => (after_duration(rest), None),
            None => thread(before_time(head)),
        };
        Head { thread, process, t }
    }

    /// What tells the thread from others: its number, since names may change.
    pub(super) fn id(&self) -> &'a str {
        let number = self
            .thread
            .rsplit(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap_or_default();
        let name = self.thread.strip_suffix(number).unwrap_or_default();
        match !number.is_empty() && name.ends_with(['-', ' ', '/']) {
            true => number,
            false => self.thread,
        }
    }

    /// Which vCPU the thread's name says that it is.
    pub(super) fn vcpu(&self) -> Option<u32> {
        let digits = match self.thread.strip_prefix("CPU ") {
            Some(rest) => rest.split_once('/').filter(|(_, rest)| rest.starts_with('K'))?.0,
            None => {
                let rest = self.thread.split_once("vcpu")?.1.trim_start_matches(['_', ' ']);
                let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                rest.get(..end)?
            }
        };
        digits.parse().ok()
    }
}

/// The CPU of a line, which stands in brackets.
pub(super) fn cpu(head: &str) -> Option<u32> {
    let mut words = head.split_whitespace().rev();
    words.find_map(|word| word.strip_prefix('[')?.strip_suffix(']')?.parse().ok())
}

/// When a line says that it was, in nanoseconds.
pub(super) fn time(line: &str) -> Option<u64> {
    if let Some((milliseconds, _)) = since_start(line) {
        return Some(milliseconds / 1000);
    }
    line.split_whitespace()
        .filter_map(|word| word.strip_suffix(':'))
        .filter_map(|word| decimal(word).or_else(|| latency(word)))
        .next_back()
}

/// A number with a point as `perf trace` begins its lines with, of milliseconds, in millionths; and what follows it.
fn since_start(line: &str) -> Option<(u64, &str)> {
    let (word, rest) = line.trim_start().split_once(' ')?;
    decimal(word).map(|number| (number, rest))
}

/// `123.456789`, as billionths.
fn decimal(word: &str) -> Option<u64> {
    let (whole, part) = word.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 9 {
        return None;
    }
    let billionths: u64 = format!("{part:0<9}").parse().ok()?;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(1_000_000_000)?
        .checked_add(billionths)
}

/// `5us+`, as ftrace has it with its option `latency-format`, in nanoseconds.
fn latency(word: &str) -> Option<u64> {
    let digits = word
        .trim_end_matches(['+', '!', '#', '*', '@', '$'])
        .strip_suffix("us")?;
    digits.parse::<u64>().ok()?.checked_mul(1000)
}

/// What stands behind `( 0.002 ms):`, the duration that `perf trace` leaves room for.
fn after_duration(rest: &str) -> &str {
    let rest = rest.trim();
    match rest.strip_prefix('(').and_then(|rest| rest.split_once("):")) {
        Some((_, rest)) => rest.trim(),
        None => rest,
    }
}

/// What stands before the time, whichever clock it is of.
fn before_time(head: &str) -> &str {
    let head = head.trim_end();
    if !head.ends_with(':') {
        return head;
    }
    let marks = head.trim_end_matches([':', ' ', '+', '!', '#', '*', '@', '$']);
    match marks.rsplit_once(char::is_whitespace) {
        Some((before, _)) => before.trim_end(),
        None => "",
    }
}

/// The thread, and the process that it is of, from what stands before the time: `COMM PID`, `COMM PID/TID` or `COMM-TID
/// (PID)`, and columns of the CPU behind it.
fn thread(text: &str) -> (&str, Option<&str>) {
    let thread = before_cpu(text).trim();
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    if let Some((thread, group)) = thread.strip_suffix(')').and_then(|thread| thread.rsplit_once('(')) {
        let group = group.trim();
        return (thread.trim_end(), Some(group).filter(|group| is_number(group)));
    }
    let last = thread.rsplit(' ').next().unwrap_or_default();
    let process = last
        .split_once('/')
        .filter(|(process, thread)| is_number(process) && is_number(thread));
    (thread, process.map(|(process, _)| process))
}

/// What stands before the CPU: `[007]`, or the column `7d..1` of the latency formats.
fn before_cpu(text: &str) -> &str {
    if let Some((before, column)) = text.rsplit_once(" [")
        && column
            .split_once(']')
            .is_some_and(|(cpu, _)| !cpu.is_empty() && cpu.bytes().all(|byte| byte.is_ascii_hexdigit()))
    {
        return before;
    }
    let text = text.trim_end();
    match text.rsplit_once(' ') {
        Some((before, column))
            if column.starts_with(|c: char| c.is_ascii_digit())
                && !column.contains('/')
                && column.contains(|c: char| !c.is_ascii_digit()) =>
        {
            before
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_and_times_are_found_whatever_the_tool_and_its_columns() {
        for (head, id, vcpu, process, t) in [
            (
                " CPU 2/KVM 1821755 [032] 4831258.258124: ",
                "1821755",
                Some(2),
                None,
                4_831_258_258_124_000,
            ),
            (
                " CPU 2/KVM 18/1821755 [032] 2.5: ",
                "1821755",
                Some(2),
                Some("18"),
                2_500_000_000,
            ),
            (" CPU 2/KVM 1821755 1.5: ", "1821755", Some(2), None, 1_500_000_000),
            (" CPU 2/KVM 1.5: ", "CPU 2/KVM", Some(2), None, 1_500_000_000),
            (
                " CPU 2/KVM-168   [006] .......   380.398696: ",
                "168",
                Some(2),
                None,
                380_398_696_000,
            ),
            (
                " CPU 2/KVM-168   (    160) [006] d..1.   1.5: ",
                "168",
                Some(2),
                Some("160"),
                1_500_000_000,
            ),
            (
                " CPU 2/KVM-168   (-------) [006] d..1.   1.5: ",
                "168",
                Some(2),
                None,
                1_500_000_000,
            ),
            (
                "CPU 2/KV-168   6d...   380.398696: ",
                "168",
                Some(2),
                None,
                380_398_696_000,
            ),
            ("CPU 2/KV-168   12d..1    5us+: ", "168", Some(2), None, 5000),
            ("CPU 2/KV-168   12d..1 1215us : ", "168", Some(2), None, 0),
            (
                " my vm-3 [x]-168   [006] d..2.   1.5: ",
                "168",
                None,
                None,
                1_500_000_000,
            ),
            (" <...>-168   [006] d..2.   380398696: ", "168", None, None, 0),
            (
                " fc_vcpu 2 2335220 [069] 12345.679300000: ",
                "2335220",
                Some(2),
                None,
                12_345_679_300_000,
            ),
            ("     0.012 CPU 2/KVM/1821755 ", "1821755", Some(2), None, 12_000),
            (
                "     0.012 (         ): vcpu2/1821755 ",
                "1821755",
                Some(2),
                None,
                12_000,
            ),
            (" 220.696238: ", "", None, None, 220_696_238_000),
            ("", "", None, None, 0),
        ] {
            let read = Head::read(head);
            assert_eq!(
                (read.id(), read.vcpu(), read.process, read.t.unwrap_or(0)),
                (id, vcpu, process, t),
                "{head}"
            );
        }
    }
}
