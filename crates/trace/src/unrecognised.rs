//! What a file most likely is that is not a trace, and what makes one of it.

use serde_json::Value;

/// What is said of a file that begins with these bytes, its first line.
pub(super) fn message(line: &[u8], error: &str) -> String {
    match known(line) {
        Some(what) => what.to_owned(),
        None => format!(
            "this is neither a trace's header, `{{\"msrgate_trace\":1,…}}`, nor text of the tracepoint kvm:kvm_msr, nor a log that says something of an MSR: \
             {error}"
        ),
    }
}

/// What a file is that is not text, and what makes text of it.
pub(super) fn binary(line: &[u8]) -> Option<&'static str> {
    let binary: [(&[u8], &str); 6] = [
        (
            b"\x1f\x8b",
            "this is compressed: `gzip -dc FILE | msrgate … -` reads it",
        ),
        (b"\xfd7zXZ", "this is compressed: `xz -dc FILE | msrgate … -` reads it"),
        (
            b"\x28\xb5\x2f\xfd",
            "this is compressed: `zstd -dc FILE | msrgate … -` reads it",
        ),
        (
            b"PERFILE2",
            "this is perf's own file: `perf script -i FILE | msrgate … -` reads it",
        ),
        (
            b"\x17\x08\x44tracing",
            "this is trace-cmd's own file: `trace-cmd report -i FILE | msrgate … -` reads it",
        ),
        (
            b"\xff\xfe",
            "this is UTF-16: `iconv -f UTF-16 -t UTF-8 FILE | msrgate … -` reads it",
        ),
    ];
    let known = binary.into_iter().find(|(start, _)| line.starts_with(start));
    known.map(|(_, what)| what)
}

fn known(line: &[u8]) -> Option<&'static str> {
    if let Some(what) = binary(line) {
        return Some(what);
    }
    let text = line.trim_ascii_start();
    let inner = text.strip_prefix(b"[").map(<[u8]>::trim_ascii_start);
    if inner.is_some_and(|inner| inner.is_empty() || inner.starts_with(b"{")) {
        return Some(
            "this is a list in JSON, and a trace has an object on each line: `jq -c '.[]' FILE | msrgate … -` reads a list of \
             them",
        );
    }
    if !text.starts_with(b"{") {
        let line = String::from_utf8_lossy(text);
        let labelled = ["MSR:", "Value:", "Mode:"].iter().all(|label| line.contains(label));
        return labelled.then_some(
            "this is what a script of bpftrace prints, and each has a form of its own: record with `perf record -e kvm:kvm_msr` \
             in its place, or let the script print a trace's lines (docs/trace.md)",
        );
    }
    let Ok(Value::Object(keys)) = serde_json::from_slice(text) else {
        let unfinished = serde_json::from_slice::<Value>(text).is_err_and(|error| error.is_eof());
        return unfinished
            .then_some("the line breaks off: a trace has a whole object on each line, as `jq -c . FILE` writes them");
    };
    if keys.contains_key("msrgate_summary") {
        return Some("this is a summary, which `learn` alone reads");
    }
    if keys.contains_key("op") {
        return Some(
            "this is an event, and a trace begins with a header: put the line `{\"msrgate_trace\":1}` before it",
        );
    }
    None
}
