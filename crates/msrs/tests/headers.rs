//! The database beside the headers of a Linux kernel: the names that the kernel gives to MSRs, and their indices.
//!
//! `cargo xtask test --only headers` fetches Debian's package of headers and names its folder in MSRGATE_HEADERS.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Where the kernel names MSRs.
const HEADERS: [&str; 4] = [
    "arch/x86/include/asm/msr-index.h",
    "arch/x86/include/asm/perf_event.h",
    "arch/x86/include/uapi/asm/kvm_para.h",
    "arch/x86/include/asm/hyperv-tlfs.h",
];

/// Names that stand among those of MSRs, and are bits or reserved bits of one.
const NO_MSRS: [&str; 4] = [
    "MSR_IA32_BNDCFGS_RSVD",
    "HV_X64_MSR_HYPERCALL_ENABLE",
    "HV_X64_MSR_VP_ASSIST_PAGE_ENABLE",
    "HV_X64_MSR_TSC_REFERENCE_ENABLE",
];

/// Names that the kernel gives to another MSR than the manual does. The manual's counts.
const OTHERWISE: [(&str, u32); 1] = [("MSR_IA32_PMC0", 0x4c1)];

/// The MSRs that a header defines. What is defined by an expression other than a sum is a bit or a mask.
fn defined(text: &str, known: &mut HashMap<String, u32>) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("#define") {
            continue;
        }
        let Some(name) = words
            .next()
            .filter(|name| name.starts_with("MSR_") || name.starts_with("HV_X64_MSR_"))
        else {
            continue;
        };
        let value: Vec<&str> = words.take_while(|word| !word.starts_with("/*")).collect();
        let value = value.join(" ");
        let value = value.trim_matches(['(', ')']);
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => None,
        };
        let sum = || {
            let (base, offset) = value.split_once('+')?;
            let offset = offset.trim();
            Some(known.get(base.trim())? + number(offset).or_else(|| offset.parse().ok())?)
        };
        if let Some(msr) = number(value).or_else(|| known.get(value).copied()).or_else(sum) {
            known.insert(name.to_owned(), msr);
            found.push((name.to_owned(), msr));
        }
    }
    found
}

#[test]
#[ignore = "needs the kernel's headers, which `cargo xtask test --only headers` fetches"]
fn every_msr_that_linux_names_is_known_by_that_name_and_index() {
    let folder: PathBuf = env::var_os("MSRGATE_HEADERS").expect("MSRGATE_HEADERS").into();
    let read =
        |header: &Path| fs::read_to_string(header).unwrap_or_else(|error| panic!("{}: {error}", header.display()));
    let mut known = HashMap::new();
    let mut names = Vec::new();
    for header in HEADERS {
        let found = defined(&read(&folder.join(header)), &mut known);
        println!("{header}: {} names", found.len());
        names.extend(found);
    }
    assert!(names.len() > 500, "{}", names.len());
    let mut wrong = Vec::new();
    for (name, msr) in &names {
        let entry = msrgate_msrs::by_name(name);
        match entry {
            _ if NO_MSRS.contains(&name.as_str()) || OTHERWISE.contains(&(name.as_str(), *msr)) => {}
            None => wrong.push(format!("{name} ({msr:#x}) is missing")),
            Some(entry) if entry.msr.0 != *msr => {
                wrong.push(format!("{name} is {msr:#x} in the header and {} here", entry.msr));
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // An exception that is none hides what becomes of the name.
    for name in NO_MSRS.iter().chain(OTHERWISE.iter().map(|(name, _)| name)) {
        assert!(known.contains_key(*name), "{name} is in no header");
    }
    let of_linux = msrgate_msrs::all()
        .iter()
        .filter(|entry| entry.source().ends_with("msr-index.h"));
    for entry in of_linux.filter(|entry| !known.values().any(|msr| *msr == entry.msr.0)) {
        println!("{} {} is not in these headers", entry.msr, entry.name());
    }
}

#[test]
fn numbers_names_and_sums_are_msrs_and_expressions_are_bits() {
    let header = "#define MSR_A\t\t0x10\n#define MSR_B MSR_A /* the same */\n#define MSR_C (MSR_A + 2)\n#define MSR_A_BIT 3\n\
                  #define MSR_A_ON BIT(3)\n#define MSR_D(x) (MSR_A + 4*(x))\n# define OTHER 0x11\n#define MSR_E 0xc0000080 /* far */\n";
    let found = defined(header, &mut HashMap::new());
    let found: Vec<(&str, u32)> = found.iter().map(|(name, msr)| (name.as_str(), *msr)).collect();
    assert_eq!(
        found,
        [
            ("MSR_A", 0x10),
            ("MSR_B", 0x10),
            ("MSR_C", 0x12),
            ("MSR_E", 0xc000_0080)
        ]
    );
}
