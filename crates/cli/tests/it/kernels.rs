//! What passes a filter on the kernel that runs here, and on another.

use crate::command::{Folder, list, text};

const VMX: &str = "CPU:\n   0x00000000 0x00: eax=0x00000016 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n   \
                   0x00000001 0x00: eax=0x00050654 ebx=0x00000000 ecx=0x00000020 edx=0x00000000\n";

/// The notes of `check` by code.
fn notes(folder: &Folder, arguments: &[&str]) -> Vec<(String, String)> {
    let arguments = [&["check", "--json", "p.toml"], arguments].concat();
    let found = folder.run(&arguments).code(0).json();
    let findings = list(&found, "findings").iter();
    let notes = findings.filter(|found| text(found, "severity") == "note");
    notes
        .map(|note| (text(note, "code").to_owned(), text(note, "message").to_owned()))
        .collect()
}

#[test]
fn check_tells_what_passes_on_the_kernel_that_is_named() {
    let folder = Folder::new();
    let rule = "[[rule]]\nmsr = \"IA32_TSC_DEADLINE\"\nwrite = \"deny\"\n";
    folder.write("p.toml", format!("version = 1\ndefault = \"allow\"\n{rule}"));
    folder.write("vmx.txt", VMX);
    let message = |kernel: &str, code: &str| {
        let notes = notes(&folder, &["--cpuid", "vmx.txt", "--kernel", kernel]);
        notes
            .into_iter()
            .find_map(|(of, message)| (of == code).then_some(message))
    };
    assert!(message("6.17", "N002").is_some_and(|text| text.contains("preemption timer")));
    assert!(message("6.18.44", "N002").is_some_and(|text| !text.contains("preemption timer")));
    assert!(message("6.1.0-48-amd64", "N024").is_some_and(|text| text.contains("lists of MSRs")));
    assert_eq!(message("6.12", "N024"), None);
    // It is no guest of TDX; one that is says so in CPUID.
    assert_eq!(message("7.2", "N025"), None);
    let tdx = "   0x00000021 0x00: eax=0x00000000 ebx=0x65746e49 ecx=0x20202020 edx=0x5844546c\n";
    folder.write("tdx.txt", format!("{VMX}{tdx}"));
    let of_tdx = |kernel: &str| {
        let notes = notes(&folder, &["--cpuid", "tdx.txt", "--kernel", kernel]).into_iter();
        notes
            .filter(|(code, _)| code == "N025")
            .map(|(_, message)| message)
            .collect::<String>()
    };
    assert_eq!(of_tdx("6.15"), "");
    assert!(of_tdx("7.2").contains("TDVMCALL"), "{}", of_tdx("7.2"));

    folder
        .run(&["check", "--kernel", "newest", "p.toml"])
        .code(2)
        .says(&["uname -r"]);
}

#[test]
fn without_a_version_check_goes_by_the_kernel_that_runs_here_and_plan_names_the_versions() {
    let folder = Folder::new();
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"deny\"\naccept = { W016 = \"a test\" }\n",
    );
    if let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") {
        assert_eq!(notes(&folder, &[]), notes(&folder, &["--kernel", release.trim()]));
    }
    folder
        .run(&["plan", "p.toml"])
        .code(0)
        .shows(&["(up to Linux 6.17)", "(from Linux 6.18)"]);
}
