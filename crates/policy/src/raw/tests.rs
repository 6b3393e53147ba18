use msrgate_core::{Msr, Op};

use super::*;

fn verdict(filter: &Filter, msr: u32, op: Op) -> Verdict {
    filter.verdict(Msr(msr), op)
}

/// What the text is refused with.
fn refused(text: &str) -> String {
    match read(text.as_bytes()) {
        Ok(given) => panic!("{text} was read: {given:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_filter_in_json_is_read_as_the_kernel_reads_it() {
    let text = r#"{ "flags": 1, "ranges": [
        { "base": "0x10", "nmsrs": 2, "read": true, "write": false, "bitmap": "0200000000000000" },
        { "base": 16, "nmsrs": "0x3", "flags": "3", "bitmap": "FFffffffffffffff0000" },
        { "base": 0, "nmsrs": 0, "flags": 9, "bitmap": "" }
    ] }"#;
    let filter = read(text.as_bytes()).expect("a filter").filter;
    assert_eq!(filter.ranges().len(), 2);
    assert_eq!(verdict(&filter, 0x10, Op::Read), Verdict::Deny);
    assert_eq!(verdict(&filter, 0x10, Op::Write), Verdict::Allow);
    assert_eq!(verdict(&filter, 0x11, Op::Read), Verdict::Allow);
    assert_eq!(verdict(&filter, 0x13, Op::Read), Verdict::Deny);
}

#[test]
fn what_the_kernel_refuses_is_told_with_its_error_number() {
    let range = |base: &str, nmsrs: &str, flags: &str, bitmap: &str| {
        format!("{{\"base\":{base},\"nmsrs\":{nmsrs},\"flags\":{flags},\"bitmap\":\"{bitmap}\"}}")
    };
    let filter = |flags: &str, ranges: &[String]| format!("{{\"flags\":{flags},\"ranges\":[{}]}}", ranges.join(","));
    let word = "00".repeat(8);
    let good = range("0", "1", "3", &word);
    for (text, what, errno) in [
        (filter("2", std::slice::from_ref(&good)), "flags 0x2", Some("EINVAL")),
        (filter("1", &[]), "deny by default", Some("EINVAL")),
        (
            filter("1", &[range("0", "0", "0", "")]),
            "deny by default",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "1", "0", &word)]),
            "range 0: its flags are 0x0",
            Some("EINVAL"),
        ),
        (
            filter("0", &[good.clone(), range("0", "1", "4", &word)]),
            "range 1: its flags are 0x4",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "12289", "1", &word)]),
            "12289 MSRs",
            Some("EINVAL"),
        ),
        (
            filter("0", &[range("0", "65", "1", &word)]),
            "has 8 bytes, and the kernel copies 16",
            Some("EFAULT"),
        ),
        (
            filter("0", &[range("0", "1", "1", "00")]),
            "has 1 bytes, and the kernel copies 8",
            Some("EFAULT"),
        ),
        (filter("0", &vec![good.clone(); 17]), "17 ranges", None),
    ] {
        let error = read(text.as_bytes()).expect_err(&text);
        assert!(error.to_string().contains(what), "{text}: {error}");
        assert_eq!(error.kernel_errno(), errno, "{text}: {error}");
    }
    assert!(read(filter("0", &vec![good; 16]).as_bytes()).is_ok());
}

#[test]
fn what_the_kernel_takes_for_something_else_is_remarked() {
    let text = r#"{ "default": "allow", "ranges": [
        { "base": "0xfffffff0", "nmsrs": 16, "flags": 3, "bitmap": "0000000000000000" },
        { "base": "0x7f0", "nmsrs": 32, "flags": 3, "bitmap": "0000000000000000" }
    ] }"#;
    let given = read(text.as_bytes()).expect("the kernel takes it");
    assert_eq!(given.remarks.len(), 2);
    assert!(
        given.remarks[0].contains("range 0 ends behind 0xffffffff"),
        "{:?}",
        given.remarks
    );
    assert!(
        given.remarks[1].contains("range 1 denies MSRs of 0x800..=0x8ff"),
        "{:?}",
        given.remarks
    );
    assert_eq!(verdict(&given.filter, u32::MAX - 3, Op::Read), Verdict::Allow);
    assert_eq!(verdict(&given.filter, 0x800, Op::Read), Verdict::Allow);
}

#[test]
fn json_that_is_no_filter_says_what_is_wrong_and_where() {
    for (text, what) in [
        ("{", "line 1: this is no JSON"),
        ("{}", "`default` is missing"),
        ("{\"default\":\"allow\"}", "`ranges` is missing"),
        (
            "{\"default\":\"maybe\",\"ranges\":[]}",
            "neither \"allow\" nor \"deny\"",
        ),
        ("{\"default\":\"deny\",\"flags\":1,\"ranges\":[]}", "not both"),
        ("{\"default\":\"allow\",\"ranges\":[5]}", "`ranges[0]` is no object"),
        ("{\"default\":\"allow\",\"ranges\":[{\"bse\":1}]}", "`ranges[0].bse`"),
        ("{\"default\":\"allow\",\"rages\":[]}", "`rages` is no key"),
        (
            "{\"default\":\"allow\",\"ranges\":[{\"base\":1,\"nmsrs\":1,\"flags\":1,\"bitmap\":\"0\"}]}",
            "`ranges[0].bitmap` is not made of pairs",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[{\"base\":\"0x1_0000_0000\",\"nmsrs\":1,\"flags\":1,\"bitmap\":\"\"}]}",
            "more than 32 bits",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[],\"actions\":[{\"first\":1,\"last\":0}]}",
            "`actions[0]` ends before it begins",
        ),
        (
            "{\"default\":\"allow\",\"ranges\":[],\"unknown\":{\"read\":\"deny\",\"write\":\"deny\"},\
             \"invalid\":{\"read\":\"deny\",\"write\":\"deny\"},\
             \"actions\":[{\"first\":1,\"last\":1,\"op\":\"rdmsr\",\"action\":\"deny\"}]}",
            "say different things of rdmsr 0x1",
        ),
    ] {
        assert!(refused(text).contains(what), "{text}: {}", refused(text));
    }
}
