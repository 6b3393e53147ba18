//! Pages for a browser: where they go, and what they say without one.

use crate::command::Folder;

const MICROVM: &str = "policies/linux-microvm.toml";

/// The first heading of a page.
fn verdict(page: &str) -> &str {
    let heading = page.split("<h1").nth(1).expect("a heading");
    let text = heading.split_once('>').expect("a heading").1;
    text.split("</h1>").next().expect("an end")
}

#[test]
fn a_plan_a_difference_and_a_report_have_a_page_that_begins_with_the_verdict() {
    let folder = Folder::furnished();
    folder.write(
        "one.toml",
        "version = 1\nname = \"one\"\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"allow\"\nwhy = \"a <b>clock</b>\"\n",
    );
    folder.write(
        "two.toml",
        "version = 1\nname = \"two\"\ndefault = \"deny\"\n[[rule]]\nmsr = \"IA32_TSC\"\nread = \"zero\"\n",
    );
    let runs: [(&[&str], i32, &str, &str); 4] = [
        (
            &["plan", "one.toml"],
            0,
            "one lets a guest read 1 MSR and write 0; every other access faults",
            "<tr id=\"rdmsr-0x10\">",
        ),
        (
            &["plan", "policies/deny-all.toml"],
            0,
            "deny-all denies every access",
            "id=\"note-0\"",
        ),
        (
            &["diff", "one.toml", "two.toml"],
            1,
            "A and B differ in 1 range, 1 of 2^33 accesses",
            "<a href=\"#rdmsr-0x10\">rdmsr IA32_TSC: allow → zero</a>",
        ),
        (
            &["report", "-p", MICROVM, "traces/linux-6.1-microvm.jsonl"],
            0,
            "linux-microvm denies nothing that the guest was served with",
            "<tr id=\"rdmsr-0x1b\"",
        ),
    ];
    for (arguments, code, text, row) in runs {
        let page = folder.run(&[arguments, &["--html", "-"]].concat()).code(code).out;
        assert_eq!(verdict(&page), text);
        assert!(page.contains(row), "{arguments:?} has no `{row}`");
        assert!(!page.contains("<b>clock"), "{arguments:?}: a reason is text");
        let ran = folder.run(&[arguments, &["--html", "page.html"]].concat()).code(code);
        assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""));
        let written = std::fs::read_to_string(folder.path().join("page.html")).expect("a page");
        assert_eq!(written, page, "{arguments:?} writes what it prints");
    }
}

#[test]
fn a_page_goes_neither_over_an_input_nor_beside_json() {
    let folder = Folder::furnished();
    for arguments in [
        &["plan", MICROVM, "--html", MICROVM][..],
        &["plan", MICROVM, "--html", "policies/base/x86-64.toml"],
        &["diff", MICROVM, "policies/qemu.toml", "--html", "policies/qemu.toml"],
        &["scan", "-p", MICROVM, "--html", MICROVM],
    ] {
        folder.run(arguments).code(2).says(&["would be overwritten"]);
    }
    for arguments in [
        &["plan", MICROVM, "--json"][..],
        &["plan", MICROVM, "--state"],
        &["plan", MICROVM, "--emit", "c"],
        &["diff", MICROVM, MICROVM, "--json"],
        &["scan", "--json"],
    ] {
        let ran = folder.run(&[arguments, &["--html", "page.html"]].concat()).code(2);
        ran.says(&["cannot be used with"]);
        assert!(!folder.path().join("page.html").exists());
    }
}
