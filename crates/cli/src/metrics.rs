//! What guests do, for monitoring: OpenMetrics text, in a file or for who asks by HTTP.
//!
//! The format is that of the OpenMetrics specification, "Text Format".

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::control::PATIENCE;

/// How many MSRs and directions have numbers of their own: what guests touch is for them to say. The others are one together.
const MOST: usize = 512;
/// How often a file is written.
pub(crate) const EVERY: Duration = Duration::from_secs(5);
/// The most bytes of a request.
const REQUEST: usize = 8 << 10;

/// Where metrics are to be had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Address(SocketAddr),
    File(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    /// `[ADDRESS]:PORT` and `PORT` are addresses, without one the loopback's; what else there is, is a file.
    fn from_str(text: &str) -> Result<Place, String> {
        let port = text.strip_prefix(':').unwrap_or(text);
        if let Ok(port) = port.parse::<u16>() {
            return Ok(Place::Address((Ipv4Addr::LOCALHOST, port).into()));
        }
        if let Some(port) = text
            .strip_prefix("localhost:")
            .and_then(|port| port.parse::<u16>().ok())
        {
            return Ok(Place::Address((Ipv4Addr::LOCALHOST, port).into()));
        }
        match text.parse() {
            Ok(address) => Ok(Place::Address(address)),
            Err(_) if text.is_empty() => Err("it is neither an address nor a file".to_owned()),
            Err(_) if text.parse::<IpAddr>().is_ok() => Err(format!("it has no port: `{text}:9100`, say")),
            Err(_) => Ok(Place::File(PathBuf::from(text))),
        }
    }
}

/// Which MSRs have numbers of their own, from one text to the next.
#[derive(Default, Debug)]
pub(crate) struct Metrics {
    own: BTreeMap<(String, String), ()>,
}

impl Metrics {
    /// The text for what an msrgate says of itself.
    pub(crate) fn text(&mut self, state: &Value) -> String {
        let mut to = String::new();
        let word = |key: &str| state.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = |key: &str| state.get(key).and_then(Value::as_u64).unwrap_or(0);
        // The specification lets an info metric's labels change.
        family(
            &mut to,
            "msrgate_run",
            "info",
            "",
            "The VMM and the policy that is in force.",
        );
        let labels = [
            ("vmm", word("vmm")),
            ("vm", word("name")),
            ("policy", word("policy")),
            ("mode", word("mode")),
        ];
        line(&mut to, "msrgate_run_info", &labels, 1);
        for (name, key, help) in [
            ("msrgate_vms", "vms", "VMs on which the policy was put in force."),
            ("msrgate_vcpus", "vcpus", "vCPUs that were made."),
            (
                "msrgate_refusals",
                "refused",
                "VMs and vCPUs that were not made, since the policy could not be put on them.",
            ),
        ] {
            family(&mut to, name, "counter", "", help);
            line(&mut to, &format!("{name}_total"), &[], number(key));
        }
        let reloads = state.get("reloads").and_then(Value::as_array).map_or(0, Vec::len);
        family(
            &mut to,
            "msrgate_reloads",
            "counter",
            "",
            "Policies that took the place of another.",
        );
        line(&mut to, "msrgate_reloads_total", &[], reloads as u64);
        let lost = state.get("lost").and_then(Value::as_object);
        let lost = |key: &str| lost.and_then(|lost| lost.get(key)).and_then(Value::as_u64).unwrap_or(0);
        family(
            &mut to,
            "msrgate_lost_events",
            "counter",
            "",
            "Events that are not in the trace.",
        );
        line(
            &mut to,
            "msrgate_lost_events_total",
            &[],
            lost("events").saturating_add(lost("unwritten")),
        );

        let mut rows: BTreeMap<(String, String), (String, [u64; 3])> = BTreeMap::new();
        for row in state.get("by_msr").and_then(Value::as_array).into_iter().flatten() {
            let word = |key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let number = |key: &str| row.get(key).and_then(Value::as_u64).unwrap_or(0);
            let mut key = (word("msr"), word("op"));
            if self.own.len() < MOST {
                self.own.entry(key.clone()).or_default();
            }
            let mut name = word("name");
            if !self.own.contains_key(&key) {
                key.0 = "other".to_owned();
                name.clear();
            }
            let row = rows.entry(key).or_insert((name, [0; 3]));
            for (sum, more) in row
                .1
                .iter_mut()
                .zip([number("count"), number("faulted"), number("cost_ns")])
            {
                *sum = sum.saturating_add(more);
            }
        }
        for (at, (name, unit, help)) in [
            (
                "msrgate_accesses",
                "",
                "Accesses that the kernel handed over, by MSR and direction.",
            ),
            ("msrgate_faults", "", "Those of the accesses that got #GP."),
            (
                "msrgate_answer_seconds",
                "seconds",
                "Time between exits and their answers.",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            family(&mut to, name, "counter", unit, help);
            for ((msr, op), (known, counts)) in &rows {
                let labels = [("msr", msr.as_str()), ("name", known), ("op", op)];
                let count = counts.get(at).copied().unwrap_or(0);
                match unit {
                    "" => line(&mut to, &format!("{name}_total"), &labels, count),
                    _ => line(&mut to, &format!("{name}_total"), &labels, count as f64 / 1e9),
                }
            }
        }
        to.push_str("# EOF\n");
        to
    }
}

// Writing to a string does not fail.

fn family(to: &mut String, name: &str, kind: &str, unit: &str, help: &str) {
    let _ = writeln!(to, "# TYPE {name} {kind}");
    if !unit.is_empty() {
        let _ = writeln!(to, "# UNIT {name} {unit}");
    }
    let _ = writeln!(to, "# HELP {name} {}", escaped(help));
}

fn line(to: &mut String, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
    let labels: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}=\"{}\"", escaped(value)))
        .collect();
    let _ = match labels.is_empty() {
        true => writeln!(to, "{name} {value}"),
        false => writeln!(to, "{name}{{{}}} {value}", labels.join(",")),
    };
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

/// Answers by HTTP, one after the other, in a thread that has the signals of this one. `text` gives `None` where there is none
/// now.
pub(crate) fn serve(
    listener: TcpListener,
    mut text: impl FnMut() -> Option<String> + Send + 'static,
) -> io::Result<()> {
    let serve = move || {
        for stream in listener.incoming() {
            match stream {
                // Who went away gets no answer.
                Ok(stream) => _ = respond(stream, &mut text),
                // Out of descriptors, say.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    thread::Builder::new().name("metrics".to_owned()).spawn(serve).map(drop)
}

fn respond(mut stream: TcpStream, text: &mut impl FnMut() -> Option<String>) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > REQUEST {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return Ok(()),
            read => request.extend(part.iter().take(read)),
        }
    }
    let head = String::from_utf8_lossy(&request);
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/" | "/metrics") => match text() {
            Some(text) => (
                "200 OK",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            None => (
                "503 Service Unavailable",
                "text/plain",
                "it does not answer now\n".to_owned(),
            ),
        },
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "see /metrics\n".to_owned()),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "GET alone is answered\n".to_owned(),
        ),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(msr: &str, count: u64) -> Value {
        json!({ "msr": msr, "name": null, "op": "rdmsr", "count": count, "faulted": 1, "cost_ns": 1500 })
    }

    #[test]
    fn a_place_is_an_address_or_a_file() {
        let address = |text: &str| Ok(Place::Address(text.parse().unwrap()));
        assert_eq!("9100".parse(), address("127.0.0.1:9100"));
        assert_eq!(":9100".parse(), address("127.0.0.1:9100"));
        assert_eq!("localhost:1".parse(), address("127.0.0.1:1"));
        assert_eq!("0.0.0.0:9100".parse(), address("0.0.0.0:9100"));
        assert_eq!("[::1]:9100".parse(), address("[::1]:9100"));
        assert_eq!("./9100".parse(), Ok(Place::File(PathBuf::from("./9100"))));
        assert_eq!("a:b".parse(), Ok(Place::File(PathBuf::from("a:b"))));
        assert!("".parse::<Place>().is_err() && "10.0.0.1".parse::<Place>().is_err());
    }

    #[test]
    fn labels_are_escaped_and_what_guests_touch_is_bounded() {
        let rows: Vec<Value> = (0..1000).map(|msr| row(&format!("{msr:#x}"), 2)).collect();
        let mut metrics = Metrics::default();
        let text = metrics.text(&json!({ "name": "a\"b\\c\nd", "vms": 3, "by_msr": rows }));
        assert!(text.contains(r#"vm="a\"b\\c\nd""#), "{text}");
        assert!(
            text.contains("msrgate_vms_total 3\n") && text.ends_with("# EOF\n"),
            "{text}"
        );
        let others = (1000 - MOST) * 2;
        let others = format!("msrgate_accesses_total{{msr=\"other\",name=\"\",op=\"rdmsr\"}} {others}\n");
        assert!(text.contains(&others), "{text}");
        assert!(text.contains("msrgate_answer_seconds_total{msr=\"0x0\",name=\"\",op=\"rdmsr\"} 0.0000015\n"));
        // What had numbers of its own keeps them.
        let text = metrics.text(&json!({ "by_msr": [row("0x5", 7), row("0xffff", 1)] }));
        assert!(text.contains("{msr=\"0x5\"") && !text.contains("0xffff"), "{text}");
    }

    #[test]
    fn whoever_asks_for_something_else_or_says_nothing_holds_up_nobody_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, || Some("# EOF\n".to_owned())).unwrap();
        let ask = |request: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(request).unwrap();
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer
        };
        let silent = TcpStream::connect(address).unwrap();
        let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n# EOF\n"),
            "{answer}"
        );
        drop(silent);
        assert!(ask(b"HEAD / HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(b"POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert!(ask(b"GET /etc/passwd HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert_eq!(ask(&[b'a'; 100_000]), "");
    }
}
