//! Other tools' words, and the examples of docs/formats.md.

use std::fs;
use std::path::Path;

use crate::command::{Folder, count, list, text};

/// What docs/formats.md shows under a heading, by language.
fn shown(heading: &str, language: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/formats.md");
    let document = fs::read_to_string(path).expect("docs/formats.md");
    let (_, section) = document.split_once(&format!("{heading}\n")).expect(heading);
    let (_, block) = section.split_once(&format!("```{language}\n")).expect(language);
    block.split("```").next().unwrap_or_default().to_owned()
}

#[test]
fn the_filters_in_the_document_decompile() {
    let folder = Folder::new();
    for (heading, language, wanted) in [
        (
            "## A filter in JSON",
            "json",
            &[
                "\"@sysenter\"",
                "msr   = \"@syscall\"\nread  = \"allow\"\nwrite = \"allow\"",
            ][..],
        ),
        (
            "## A capture",
            "json",
            &["default = \"allow\"", "msr   = \"@sysenter\"\nwrite = \"deny\""],
        ),
        (
            "## A filter in C",
            "c",
            &[
                "msr   = \"0x474f4f00\"\nread  = \"deny\"\nwrite = \"deny\"",
                "IA32_SYSENTER_ESP",
            ],
        ),
    ] {
        folder.write("filter", shown(heading, language));
        folder.run(&["decompile", "filter"]).code(0).shows(wanted);
    }
    // The dump in the document is cut; its end is zeros and a bitmap that denies.
    let rows = shown("### A dump", "text");
    let zeros = "00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n";
    let rest: String = (2..25).map(|row| format!("{:08x}  {zeros}", row * 16)).collect();
    folder.write("filter", format!("{rows}{rest}00000190\n"));
    let ran = folder.run(&["decompile", "filter"]).code(0);
    ran.shows(&["msr   = \"IA32_BIOS_SIGN_ID\"\nread  = \"deny\"\n"]);
}

#[test]
fn the_words_of_other_tools_in_the_document_are_imported() {
    let folder = Folder::new();
    for (tool, heading, language, wanted) in [
        (
            "crosvm",
            "### crosvm",
            "text",
            &[
                "msr   = \"IA32_HWP_CAPABILITIES\"\nread  = \"host\"",
                "write = \"ignore\"",
            ][..],
        ),
        (
            "firecracker",
            "### Firecracker",
            "json",
            &[
                "msr   = \"IA32_ARCH_CAPABILITIES\"\nread  = \"zero\"",
                "keep = \"0xfffffffffffffffe\"",
            ],
        ),
        (
            "msr-safe",
            "### msr-safe",
            "text",
            &["IA32_PERF_CTL", "may_change = \"0xffff\"", "otherwise = \"drop\""],
        ),
    ] {
        folder.write("words", shown(heading, language));
        let ran = folder.run(&["import", "--from", tool, "words"]).code(0).shows(wanted);
        folder.write("policy.toml", &ran.out);
        let found = folder
            .run(&["import", "--json", "--from", tool, "words"])
            .code(0)
            .json();
        assert_eq!(
            (text(&found, "policy"), list(&found, "remarks").len()),
            (ran.out.as_str(), 0)
        );
        folder.run(&["check", "policy.toml"]).code(0);
        if tool != "firecracker" {
            folder.write(
                "again",
                folder.run(&["plan", "--emit", tool, "policy.toml"]).code(0).out,
            );
            folder.write(
                "again.toml",
                folder.run(&["import", "--from", tool, "again"]).code(0).out,
            );
            folder.run(&["diff", "policy.toml", "again.toml"]).code(0);
        }
    }
}

#[test]
fn a_template_that_fixes_what_a_guest_writes_is_exit_1() {
    let folder = Folder::new();
    let bitmap = "0".repeat(64);
    let template = format!("{{\"msr_modifiers\":[{{\"addr\":\"0xc0000102\",\"bitmap\":\"0b{bitmap}\"}}]}}");
    folder.write("template.json", template);
    let ran = folder
        .run(&["import", "--from", "firecracker", "template.json"])
        .code(1);
    let ran = ran.says(&["template.json: IA32_KERNEL_GS_BASE: the template sets what it holds at first"]);
    folder.write("policy.toml", &ran.out);
    folder.run(&["check", "policy.toml"]).code(1).says(&["warning[W015]"]);
}

#[test]
fn what_an_import_cannot_say_is_exit_1_and_what_it_cannot_read_exit_2() {
    let folder = Folder::new();
    folder.write("flags", "0x774,type=rw,action=emu,filter=yes\n");
    let ran = folder.run(&["import", "--from", "crosvm", "flags"]).code(1);
    ran.says(&["flags: IA32_HWP_REQUEST: crosvm gives the host's value at first"])
        .shows(&["# Look at: IA32_HWP_REQUEST"]);
    folder.write("flags", "0x774,type=rw\n");
    folder
        .run(&["import", "--from", "crosvm", "flags"])
        .code(2)
        .says(&["flags: line 1", "`action` is missing"]);
    folder
        .run(&["import", "--from", "msr-safe", "missing"])
        .code(2)
        .says(&["cannot read `missing`"]);
}

#[test]
fn a_policy_that_a_tool_cannot_say_is_refused_by_rule() {
    let folder = Folder::furnished();
    let ran = folder.run(&["plan", "--emit", "crosvm", "policies/qemu.toml"]).code(1);
    assert!(ran.out.is_empty(), "{}", ran.out);
    ran.says(&[
        "policies/qemu.toml:",
        "rdmsr of 0x35 gets `value",
        "no other",
        "crosvm cannot express",
    ]);
    folder
        .run(&["plan", "--emit", "msr-safe", "policies/qemu.toml"])
        .code(1)
        .says(&["the default: rdmsr", "too many"]);
}

#[test]
fn the_tracepoints_text_is_a_trace_wherever_one_is_taken() {
    let folder = Folder::new();
    folder.write("boot.txt", shown("## The tracepoint kvm:kvm_msr", "text"));
    let report = folder.run(&["report", "--json", "boot.txt"]).code(0).json();
    assert_eq!((count(&report, "accesses"), count(&report, "faulted")), (2, 1));
    assert_eq!(list(&report, "vcpus").len(), 2);
    let policy = folder
        .run(&["learn", "boot.txt"])
        .code(0)
        .shows(&["IA32_TSC_DEADLINE", "write = \"allow\""])
        .out;
    folder.write("learned.toml", policy);
    folder
        .run(&["learn", "--since", "boot.txt", "boot.txt"])
        .code(0)
        .says(&["nothing differs"]);
    let replay = ["replay", "-p", "learned.toml", "--backend", "engine", "boot.txt"];
    folder.run(&replay).code(0).shows(&["IA32_TSC_DEADLINE"]);
    folder.write(
        "lost.txt",
        " x-1 [0] 1.0: kvm_msr: msr_read 10 = 0x0\nCPU:3 [LOST 12 EVENTS]\n",
    );
    folder.run(&["learn", "lost.txt"]).code(2).says(&["line 2", "lost"]);
}

#[test]
fn a_log_is_a_trace_that_is_partial() {
    let folder = Folder::new();
    folder.write("dmesg", shown("## Logs", "text"));
    let report = folder.run(&["report", "--json", "dmesg"]).code(0).json();
    let kinds = ["accesses", "emulated", "faulted"].map(|kind| count(&report, kind));
    assert_eq!(kinds, [3, 2, 1]);
    assert_eq!(text(&list(&report, "traces")[0], "coverage"), "logged");
    folder.run(&["report", "dmesg"]).code(0).shows(&[
        "note: dmesg is a log",
        "note: dmesg is from a host with `kvm.ignore_msrs`",
    ]);
    folder.run(&["learn", "dmesg"]).code(2).says(&["--incomplete"]);
    let learned = folder.run(&["learn", "--incomplete", "dmesg"]).code(0);
    let learned = learned.shows(&["read  = \"zero\"", "write = \"ignore\""]).out;
    folder.write("learned.toml", learned);
    let replay = ["replay", "-p", "learned.toml", "--backend", "engine", "dmesg"];
    let ran = folder.run(&replay);
    assert!(ran.out.contains("1 trace lacks"), "{}{}", ran.out, ran.err);
}
