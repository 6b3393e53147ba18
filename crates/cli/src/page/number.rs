//! Numbers with their thousands apart, and times in the unit that suits them.

/// A number with its thousands apart.
pub(crate) fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(crate) fn counted(count: u64, one: &str, more: &str) -> String {
    format!("{} {}", number(count), if count == 1 { one } else { more })
}

/// How much of the whole, in percent.
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 * 100.0 / whole as f64
}

/// A time since something, in nanoseconds: three digits of the unit that suits it, and beyond a minute two units.
pub(crate) fn since(nanoseconds: f64) -> String {
    const UNITS: [(&str, f64); 4] = [("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)];
    let seconds = nanoseconds / 1e9;
    if nanoseconds < 0.5 {
        return "0 s".to_owned();
    }
    if seconds >= 59.95 {
        let seconds = seconds.round() as u64;
        return match seconds {
            0..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
            3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
            _ => format!("{} d {} h", number(seconds / 86_400), seconds / 3_600 % 24),
        };
    }
    // The largest unit of which there is one, also after rounding.
    let unit = UNITS.iter().rev().find(|(_, size)| nanoseconds >= 0.9995 * size);
    let (name, size) = unit.unwrap_or(&UNITS[0]);
    let count = nanoseconds / size;
    match count {
        _ if *size == 1.0 => format!("{count:.0} {name}"),
        ..9.995 => format!("{count:.2} {name}"),
        ..99.95 => format!("{count:.1} {name}"),
        _ => format!("{count:.0} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_its_thousands_apart() {
        let shown = [0, 999, 1_000, 12_345, 1_234_567].map(number);
        assert_eq!(shown, ["0", "999", "1,000", "12,345", "1,234,567"]);
    }

    #[test]
    fn a_time_has_three_digits_of_the_unit_that_suits_it() {
        let times = [
            0.0,
            7.0,
            820.0,
            999.7,
            9_020.0,
            228_000.0,
            999_900_000.0,
            10_796_000_000.0,
        ];
        let shown = times.map(since);
        assert_eq!(
            shown,
            [
                "0 s", "7 ns", "820 ns", "1.00 µs", "9.02 µs", "228 µs", "1.00 s", "10.8 s"
            ]
        );
        let long = [59.94e9, 59.96e9, 125e9, 3_600e9, 90_061e9, u64::MAX as f64].map(since);
        assert_eq!(
            long,
            [
                "59.9 s",
                "1 min 0 s",
                "2 min 5 s",
                "1 h 0 min",
                "1 d 1 h",
                "213,503 d 23 h"
            ]
        );
    }
}
