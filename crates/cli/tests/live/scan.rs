//! What a guest sees, on this machine's KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use msrgate_core::{Msr, MsrRange, OnLockedBits, ReadAction, WriteAction};
use msrgate_guest::scan::{Scan, Scanner, WINDOWS, Writes};
use msrgate_guest::{Guest, Mode, Options};
use msrgate_kvm::{Fault, Handler, Handlers, VcpuId};
use msrgate_msrs::cpuid::Cpuid;
use msrgate_plan::{CompileOptions, Decision, DecisionMap, Plan};
use msrgate_policy::{Pattern, Policy};
use serde_json::Value;

use crate::command::{Folder, POLICIES, Ran, Terminal, count, fits_any_terminal, hex, list, text};
use crate::kvm::kvm_opens;

/// Whether all of the windows is scanned: emulators take too long over it.
fn whole() -> bool {
    std::env::var("MSRGATE_LANE").map_or(true, |lane| lane == "host")
}

/// The command, of all windows where that does not take long, else of what is known.
fn scan_of(folder: &Folder, arguments: &[&str]) -> Ran {
    let less: &[&str] = if whole() { &[] } else { &["--only", "--range", "*"] };
    folder.run(&[&["scan"], less, arguments].concat())
}

/// The keys of an object, in order.
#[track_caller]
fn keys(value: &Value, wanted: &[&str]) {
    let found: Vec<&str> = value
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(found, wanted);
}

/// What the MSR of a list reads.
fn value(scan: &Value, msr: u64) -> Option<u64> {
    let found = list(scan, "readable").iter().find(|seen| hex(seen, "msr") == msr);
    found.map(|seen| hex(seen, "value"))
}

fn writable(scan: &Value, msr: u64) -> bool {
    list(scan, "writable").iter().any(|seen| hex(seen, "msr") == msr)
}

#[test]
fn a_scan_is_json_with_documented_keys_and_the_next_one_sees_the_same() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let ran = scan_of(&folder, &["--json", "--all-known"]).code(0);
    let scan = ran.json();
    assert_eq!(count(&scan, "msrgate_scan"), 1);
    let facts = [
        "msrgate_scan",
        "host",
        "microcode",
        "kernel",
        "cpuid",
        "x2apic",
        "policy",
    ];
    let lists = [
        "ranges",
        "readable",
        "written",
        "writable",
        "unwritten",
        "broken",
        "faults",
        "listed",
        "unlisted",
        "features",
    ];
    keys(&scan, &[&facts[..], &lists].concat());
    assert!(!text(&scan, "kernel").is_empty());
    for range in list(&scan, "ranges").iter().chain(list(&scan, "written")) {
        keys(range, &["first", "last"]);
        assert!(hex(range, "first") <= hex(range, "last"));
    }
    let mut last = None;
    for seen in list(&scan, "readable") {
        keys(seen, &["msr", "name", "value", "bits", "volatile"]);
        hex(seen, "value");
        assert!(last < Some(hex(seen, "msr")), "in order");
        last = Some(hex(seen, "msr"));
    }
    for seen in list(&scan, "writable") {
        keys(seen, &["msr", "name"]);
    }
    for seen in list(&scan, "unwritten") {
        keys(seen, &["msr", "name", "why"]);
    }
    for offer in list(&scan, "listed").iter().chain(list(&scan, "features")) {
        keys(offer, &["msr", "name", "value", "writes", "may_set", "may_clear"]);
        let taken = text(offer, "writes") == "taken";
        assert_eq!(
            (taken, taken),
            (offer["may_set"].is_string(), offer["may_clear"].is_string())
        );
        assert!(
            !taken || hex(offer, "may_set") & hex(offer, "may_clear") == 0,
            "{offer}"
        );
    }
    // What every kernel saves of every guest, and takes back.
    let star = list(&scan, "listed")
        .iter()
        .find(|offer| hex(offer, "msr") == 0xc000_0081);
    assert_eq!(star.map(|star| text(star, "writes")), Some("taken"));
    assert!(list(&scan, "broken").is_empty());
    let read: u64 = list(&scan, "ranges")
        .iter()
        .map(|range| hex(range, "last") - hex(range, "first") + 1)
        .sum();
    assert_eq!(list(&scan, "readable").len() as u64 + count(&scan, "faults"), read);
    // What every kernel gives every guest.
    assert_eq!(value(&scan, 0x1b), Some(0xfee0_0900));
    assert!(writable(&scan, 0x174) && !writable(&scan, 0xfe));
    let tsc = list(&scan, "readable")
        .iter()
        .find(|seen| hex(seen, "msr") == 0x10)
        .expect("a TSC");
    assert_eq!(tsc["volatile"], true);

    folder.write("before.json", &ran.out);
    let same = folder
        .run(&["scan", "--json", "--against", "before.json"])
        .code(0)
        .json();
    keys(&same, &[&facts[..], &lists, &["against", "differences"]].concat());
    keys(&same["against"], &facts[1..]);
    assert_eq!(same["differences"], serde_json::json!([]));
    let shown = scan_of(&folder, &["--against", "before.json"]).code(0);
    shown.shows(&["a guest sees what it saw before", "MSRs read by a real guest: "]);
}

#[test]
fn doctor_names_the_features_that_a_scan_finds_offered_and_refused() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let scan = folder.run(&["scan", "--json", "--only", "--range", "0x10a"]).json();
    let refused = list(&scan, "features")
        .iter()
        .filter(|offer| text(offer, "writes") == "refused");
    let refused: Vec<&str> = refused.map(|offer| text(offer, "msr")).collect();
    let doctor = folder.run(&["doctor", "--json"]).json();
    let check = list(&doctor, "checks")
        .iter()
        .find(|check| text(check, "check") == "features");
    let check = check.expect("a check of features");
    let expected = if refused.is_empty() { "pass" } else { "warn" };
    assert_eq!(text(check, "status"), expected, "{check}");
    for msr in refused {
        assert!(text(check, "says").contains(&format!("{msr} ")), "{msr}: {check}");
    }
}

#[test]
fn what_a_policy_changed_is_told_and_ends_with_1() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let before = scan_of(&folder, &["--json"]).code(0);
    folder.write("before.json", &before.out);
    folder.write(
        "policy.toml",
        "version = 1\ndefault = \"allow\"\n\
         [[rule]]\nmsr = 0x8b\nread = { value = 0x7700000000 }\nwrite = \"deny\"\n\
         [[rule]]\nmsr = 0x1b\nread = \"deny\"\nwrite = \"deny\"\n\
         [[rule]]\nmsr = 0x35\nread = { value = 0x20004 }\nwrite = \"ignore\"\n\
         [[rule]]\nmsr = 0xfe\nwrite = \"ignore\"\n",
    );
    let against = ["--json", "-p", "policy.toml", "--against", "before.json"];
    let after = scan_of(&folder, &against).code(1).json();
    keys(&after["policy"], &["name", "hash"]);
    assert_eq!(after["against"]["policy"], Value::Null);
    let differences: Vec<(u64, &str, &Value, &Value)> = list(&after, "differences")
        .iter()
        .map(|found| {
            keys(found, &["msr", "name", "what", "before", "after", "bits"]);
            (
                hex(found, "msr"),
                text(found, "what"),
                &found["before"],
                &found["after"],
            )
        })
        .collect();
    let microcode = format!("{:#x}", value(&before.json(), 0x8b).expect("a revision"));
    let none = &Value::Null;
    let expected = [
        (0x1b, "unreadable", &"0xfee00900".into(), none),
        (0x1b, "unwritable", none, none),
        (0x35, "readable", none, &"0x20004".into()),
        (0x8b, "value", &microcode.into(), &"0x7700000000".into()),
        (0x8b, "unwritable", none, none),
        (0xfe, "writable", none, none),
    ];
    assert_eq!(differences, expected);
    let shown = scan_of(&folder, &against[1..]).code(1);
    shown.shows(&[
        "none → policy (",
        "IA32_APIC_BASE",
        "0xfee00900 → #GP",
        "#GP → done",
        "4 MSRs differ",
    ]);
}

#[test]
fn what_a_guest_reads_that_tells_of_the_host_is_listed_with_what_it_tells() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    folder.write(
        "p.toml",
        "version = 1\ndefault = \"deny\"\n[[rule]]\nmsr = [\"MSR_PKG_ENERGY_STATUS\", \"IA32_SYSENTER_CS\"]\n\
         read = { value = 0x1234 }\n",
    );
    let scan = ["scan", "--leaks", "--only", "--range", "*", "-p", "p.toml"];
    let ran = folder.run(&scan).code(0).shows(&[
        "0x611  MSR_PKG_ENERGY_STATUS  0x1234  what it and its other guests do now",
        "Intel SDM",
    ]);
    assert!(!ran.out.contains("IA32_SYSENTER_CS"), "{}", ran.out);
    folder.write("p.toml", "version = 1\ndefault = \"deny\"\n");
    folder
        .run(&scan)
        .code(0)
        .shows(&["no MSR that a guest reads is known to tell of the host"]);
}

#[test]
fn in_x2apic_mode_no_policy_keeps_the_local_apic_from_the_guest() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let args = ["--only", "--range", "0x800..=0x8ff", "-p", "policies/deny-all.toml"];
    let seen = |more: &[&str]| {
        let scan = folder
            .run(&[&["scan", "--json"], &args[..], more].concat())
            .code(0)
            .json();
        let unwritten = list(&scan, "unwritten").iter().map(|left| hex(left, "msr")).collect();
        (
            value(&scan, 0x802),
            value(&scan, 0x803),
            writable(&scan, 0x80f),
            unwritten,
        )
    };
    let (id, version, written, unwritten): (_, _, _, Vec<u64>) = seen(&["--x2apic"]);
    assert_eq!((id, version.map(|version| version & 0xff)), (Some(0), Some(0x14)));
    assert!(written);
    assert!(
        unwritten.contains(&0x830) && unwritten.contains(&0x838),
        "{unwritten:x?}"
    );
    assert_eq!(seen(&[]), (None, None, false, Vec::new()));
}

#[test]
fn more_than_a_scan_takes_is_refused_and_more_than_the_windows_is_read() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let many = folder.run(&["scan", "--range", "0..=0xffffffff"]).code(2);
    many.says(&["4294967296 MSRs", "in parts"]);
    let args = ["--json", "--write", "none", "--range", "0xdeadbee0..=0xdeadbeef"];
    let scan = scan_of(&folder, &args).code(0).json();
    let last = list(&scan, "ranges").last().expect("a range");
    assert_eq!((hex(last, "first"), hex(last, "last")), (0xdead_bee0, 0xdead_beef));
    assert_eq!(
        (&scan["written"], &scan["writable"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
}

/// KVM_GET_MSRS of one MSR.
fn host_reads(vcpu: &VcpuFd, msr: Msr) -> Option<u64> {
    let entry = kvm_msr_entry {
        index: msr.0,
        ..Default::default()
    };
    let mut one = Msrs::from_entries(&[entry]).expect("one entry");
    let read = vcpu.get_msrs(&mut one).expect("KVM_GET_MSRS");
    (read == 1).then(|| one.as_slice()[0].data)
}

/// A row of docs/kvm-behaviour.md: its MSRs, who reads them, and where, as far as the document knows without asking.
struct Row {
    ranges: Vec<MsrRange>,
    by: String,
    kernels: Vec<(String, Option<bool>)>,
}

impl Row {
    /// The guest's CPUID decides.
    const BY_CPUID: &str = "host by CPUID";
    /// What KVM lists and does not have.
    const AS_ZERO: &str = "host as 0";

    /// Whether the machine says if the row holds.
    fn asks(&self) -> bool {
        self.by == Row::BY_CPUID || self.by == Row::AS_ZERO
    }

    fn names(&self, msr: Msr) -> bool {
        self.ranges.iter().any(|range| range.contains(msr))
    }
}

fn rows() -> Vec<Row> {
    let document = include_str!("../../../../docs/kvm-behaviour.md");
    let section = document
        .split("\n## What a guest reads and the host does not")
        .nth(1)
        .expect("a section");
    let section = section.split("\n## ").next().expect("its text");
    let mut lines = section.lines().filter(|line| line.starts_with('|'));
    let cells = |line: &str| -> Vec<String> {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    let header = cells(lines.next().expect("a header"));
    let rows = lines.skip(1).map(cells);
    rows.map(|row| {
        let names = row[0].split('`').skip(1).step_by(2);
        // Functions of the kernel are no MSRs.
        let names = names.filter(|name| name.starts_with("0x"));
        let ranges = names.flat_map(|name| Pattern::parse(name).expect("MSRs").ranges());
        let seen = row[2..].iter().map(|cell| match cell.as_str() {
            "yes" => Some(true),
            "no" => Some(false),
            "–" | "asked" => None,
            cell => panic!("`{cell}` is neither yes, no, asked nor –"),
        });
        Row {
            ranges: ranges.collect(),
            by: row[1].clone(),
            kernels: header[2..].iter().cloned().zip(seen).collect(),
        }
    })
    .collect()
}

/// The document's column of this lane, whose processor is always the same, or of `kvm_pvm`, which holds on any.
fn column() -> Option<String> {
    let lane = |name: &str| std::env::var(name).unwrap_or_default();
    let kernel = lane("MSRGATE_LANE_KERNEL");
    match lane("MSRGATE_LANE").as_str() {
        "nested" => return Some(format!("{kernel} amd")),
        "intel" => return Some(format!("{kernel} intel")),
        _ => {}
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let software = Path::new("/sys/module/kvm_pvm").exists() && release.starts_with("6.18.");
    software.then(|| "6.18 pvm".to_owned())
}

/// The CPUID of guests that have all that KVM supports.
fn supported(kvm: &Kvm) -> Cpuid {
    let entries = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    let entries = entries.expect("a CPUID");
    Cpuid::from_entries(entries.as_slice().iter().map(|entry| {
        let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        (entry.function, entry.index, registers)
    }))
}

#[test]
fn a_guest_reads_what_the_host_reads_but_for_what_the_document_explains() {
    if !kvm_opens() {
        return;
    }
    let kvm = Kvm::new().expect("/dev/kvm");
    let mut ranges: Vec<MsrRange> = msrgate_msrs::all()
        .iter()
        .map(|known| MsrRange::single(known.msr))
        .collect();
    let listed = kvm.get_msr_index_list().expect("a list");
    let listed: BTreeSet<Msr> = listed.as_slice().iter().map(|msr| Msr(*msr)).collect();
    ranges.extend(listed.iter().map(|msr| MsrRange::single(*msr)));
    if whole() {
        ranges.extend(WINDOWS);
    }
    let scan = Scanner::new(&kvm)
        .writes(Writes::None)
        .scan(&ranges, &mut |_, _| {})
        .expect("a scan");
    let options = Options {
        irqchip: true,
        ..Options::default()
    };
    let mut guest = Guest::new(&kvm, Mode::Real, &options).expect("a guest");
    let vcpu = guest.vcpu(0).expect("a vCPU").fd();
    let cpuid = supported(&kvm);
    // Whether CPUID has a say, and says no.
    let lacks = |msr: Msr| {
        let features = msrgate_msrs::by_msr(msr).map_or(&[][..], |known| known.exists().features());
        !features.is_empty() && features.iter().all(|feature| cpuid.has(feature) == Some(false))
    };
    // Other vendor modules give some of them in spite of CPUID: `kvm_pvm` SPEC_CTRL, as 0.
    let asks_cpuid = ["kvm_intel", "kvm_amd"];
    let asks_cpuid = asks_cpuid.map(|module| std::path::Path::new("/sys/module").join(module).exists());
    let rows = rows();
    let mut seen = vec![false; rows.len()];
    let mut both = 0;
    for msr in scan.ranges.iter().flat_map(|range| range.iter()) {
        let (host, guest) = (host_reads(vcpu, msr), read_of(&scan, msr));
        let hidden = rows.iter().any(|row| row.by == Row::BY_CPUID && row.names(msr)) && lacks(msr);
        assert!(
            !hidden || guest.is_none() || asks_cpuid == [false, false],
            "CPUID lacks {msr}, and a guest reads {guest:x?}"
        );
        let by = match (host, guest) {
            (None, None) => continue,
            (Some(host), Some(guest)) if host == guest => {
                both += 1;
                continue;
            }
            (Some(_), Some(_)) => "both, otherwise",
            (Some(_), None) => "host",
            (None, Some(_)) => "guest",
        };
        let explained = by == "host" && (lacks(msr) || listed.contains(&msr) && host == Some(0));
        let row = rows
            .iter()
            .position(|row| row.names(msr) && if row.asks() { explained } else { row.by == by });
        match row {
            Some(row) => seen[row] = true,
            None if explained => println!("{msr}: the host alone reads {host:x?}, as CPUID or the list says"),
            None => panic!("the document does not say why {msr} is read by {by}: host {host:x?}, guest {guest:x?}"),
        }
    }
    assert!(both > 100, "{both} MSRs are read by both");
    let vendor = cpuid.vendor().expect("a vendor");
    let Some(column) = column() else {
        println!("the document has no column of this kernel on this processor, of {vendor}");
        return;
    };
    println!("{column}, on a processor of {vendor}");
    for (row, seen) in rows.iter().zip(seen) {
        let (_, told) = row
            .kernels
            .iter()
            .find(|(kernel, _)| *kernel == column)
            .expect("a column");
        assert_eq!(seen, told.unwrap_or(seen), "{column}: {:?} by {}", row.ranges, row.by);
    }
}

/// Actions that no policy of ours has.
const OTHERS: &str = r#"version = 1
default = "allow"

[[rule]]
msr   = "IA32_APIC_BASE"
read  = { mask = { keep = 0xffff, set = 0x70000 } }
write = { mask = { may_change = 0x800, otherwise = "deny" } }

[[rule]]
msr   = "IA32_SYSENTER_CS"
read  = { mask = { keep = 0xffff, set = 0 } }
write = { mask = { may_change = 0xff, otherwise = "drop" } }

[[rule]]
msr   = "IA32_SYSENTER_EIP"
write = { only = [0, 1] }

[[rule]]
msr   = "IA32_SYSENTER_ESP"
write = { only = [1, 2] }
"#;

/// What stands for the physical CPU's registers, which the test may not read.
const HOST: u64 = 0x5eed;
/// What stands for a handler of the VMM.
const HANDLED: u64 = 0xfeed;

struct Answers;

impl Handler for Answers {
    fn read(&self, _: VcpuId, _: Msr) -> Result<u64, Fault> {
        Ok(HANDLED)
    }

    fn write(&self, _: VcpuId, _: Msr, _: u64) -> Result<(), Fault> {
        Ok(())
    }
}

/// What the kernel does without a policy, and where it says that it does not know an MSR or refuses it.
struct Kernel {
    plain: Scan,
    reasons: Scan,
}

/// What [`Kernel::reasons`] reads in place of #GP.
const UNKNOWN: u64 = 0xdead_0001;
const INVALID: u64 = 0xdead_0002;

fn read_of(scan: &Scan, msr: Msr) -> Option<u64> {
    let found = scan.readable.binary_search_by_key(&msr, |seen| seen.msr).ok()?;
    Some(scan.readable[found].value)
}

fn moves(scan: &Scan, msr: Msr) -> bool {
    let found = scan.readable.binary_search_by_key(&msr, |seen| seen.msr);
    found.is_ok_and(|found| scan.readable[found].volatile)
}

fn wrote(scan: &Scan, msr: Msr) -> Option<bool> {
    let tried = scan.written.iter().any(|range| range.contains(msr));
    tried.then(|| scan.writable.binary_search(&msr).is_ok())
}

/// What an action gives that does not ask the kernel.
fn given(action: &ReadAction) -> Option<u64> {
    match action {
        ReadAction::Value(value) | ReadAction::Shadow(value) => Some(*value),
        ReadAction::Handler(_) => Some(HANDLED),
        _ => None,
    }
}

/// What a read gets by the policy, `None` for #GP.
fn expected_read(map: &DecisionMap, msr: Msr, kernel: &Kernel) -> Option<u64> {
    let plain = read_of(&kernel.plain, msr);
    match &map.reads().get(msr).action {
        // The kernel answers before it asks the filter.
        _ if MsrRange::X2APIC.contains(msr) => plain,
        ReadAction::Allow => plain.or_else(|| match read_of(&kernel.reasons, msr) {
            Some(UNKNOWN) => given(&map.unknown().0),
            Some(INVALID) => given(&map.invalid().0),
            _ => None,
        }),
        ReadAction::Mask { keep, set } => plain.map(|value| value & keep | set),
        ReadAction::Host => Some(HOST),
        action => given(action),
    }
}

/// Whether the write of `value` is done by the policy; `None` where that is the kernel's to say.
fn expected_write(map: &DecisionMap, msr: Msr, value: u64, kernel: &Kernel) -> Option<bool> {
    let same = read_of(&kernel.plain, msr) == Some(value);
    let plain = wrote(&kernel.plain, msr).filter(|_| same);
    match &map.writes().get(msr).action {
        _ if MsrRange::X2APIC.contains(msr) => plain,
        // Some kernels carry this write out before they ask the filter.
        _ if msr == Msr::TSC_DEADLINE => None,
        // Where the kernel fails, the fallbacks may do it.
        WriteAction::Allow if map.unknown().1 != WriteAction::Deny || map.invalid().1 != WriteAction::Deny => {
            plain.filter(|done| *done)
        }
        WriteAction::Allow => plain,
        WriteAction::Deny => Some(false),
        WriteAction::Ignore | WriteAction::Shadow | WriteAction::Handler(_) => Some(true),
        WriteAction::Only(values) if !values.contains(&value) => Some(false),
        WriteAction::Mask { may_change, otherwise } => {
            let old = read_of(&kernel.plain, msr)?;
            let locked = *otherwise == OnLockedBits::Deny && (old ^ value) & !may_change != 0;
            if locked { Some(false) } else { plain }
        }
        WriteAction::Only(_) | WriteAction::Once => plain,
    }
}

/// The MSRs at which a policy can be held to its word: those that it names, and those that are known.
fn of_interest(map: &DecisionMap) -> Vec<MsrRange> {
    let long = if whole() { 0x1000 } else { 0x100 };
    let mut ranges: Vec<MsrRange> = msrgate_msrs::all()
        .iter()
        .map(|known| MsrRange::single(known.msr))
        .collect();
    let intervals = map.reads().iter().map(|(range, _)| range);
    for range in intervals.chain(map.writes().iter().map(|(range, _)| range)) {
        if range.len() <= long {
            ranges.push(range);
            continue;
        }
        let (first, last) = (range.first(), range.last());
        ranges.extend(MsrRange::new(first, Msr(first.0 + 0x3f)));
        ranges.extend(MsrRange::new(Msr(last.0 - 0x3f), last));
    }
    ranges
}

#[test]
fn a_guest_under_each_policy_gets_what_the_policy_says_of_every_msr_that_it_names() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::furnished();
    let kvm = Kvm::new().expect("/dev/kvm");
    let probed = msrgate_kvm::probe(&kvm).expect("filters");
    let cpuid = supported(&kvm);
    folder.write("policies/others.toml", OTHERS);
    let names = POLICIES.iter().map(|(name, _)| *name).chain(["others.toml"]);
    let maps: Vec<(&str, DecisionMap, CompileOptions)> = names
        .map(|name| {
            let path = folder.path().join("policies").join(name);
            let policy = Policy::from_file(&path).expect("a policy");
            let map = policy.decision_map(Some(&cpuid)).expect("has a CPUID");
            let reads = map.reads().map(|decision| match decision.action {
                ReadAction::Host => Decision::of(ReadAction::Value(HOST))
                    .by(decision.rule)
                    .logged(decision.log),
                _ => decision.clone(),
            });
            let map = map.with_reads(reads);
            let held = msrgate_guest::held(&kvm, &map, None).expect("a guest");
            (name, map, policy.options().with_presets(held))
        })
        .collect();

    let scanned = |scanner: Scanner<'_>, ranges: &[MsrRange]| scanner.scan(ranges, &mut |_, _| {}).expect("a scan");
    let under = |map: &DecisionMap, options: &CompileOptions| {
        let plan = Arc::new(Plan::compile_for(map, options).expect("a plan"));
        let names: Vec<&str> = plan.table().handlers().collect();
        let handlers = names
            .iter()
            .fold(Handlers::new(), |handlers, name| handlers.with(name, Answers));
        Scanner::new(&kvm).under(&probed, Arc::clone(&plan), handlers)
    };
    let reasons = DecisionMap::allow_all()
        .with_unknown((ReadAction::Value(UNKNOWN), WriteAction::Deny))
        .with_invalid((ReadAction::Value(INVALID), WriteAction::Deny));
    let all: Vec<MsrRange> = maps.iter().flat_map(|(_, map, _)| of_interest(map)).collect();
    let kernel = Kernel {
        plain: scanned(Scanner::new(&kvm), &all),
        reasons: scanned(under(&reasons, &CompileOptions::default()).writes(Writes::None), &all),
    };
    let mut answered: BTreeSet<&str> = BTreeSet::new();
    for (name, map, options) in &maps {
        let ruled = scanned(under(map, options), &of_interest(map));
        assert!(ruled.broken.is_empty(), "{name}: {:?}", ruled.broken);
        for msr in ruled.ranges.iter().flat_map(|range| range.iter()) {
            let (read, write) = (&map.reads().get(msr).action, &map.writes().get(msr).action);
            let (got, expected) = (read_of(&ruled, msr), expected_read(map, msr, &kernel));
            let clock = moves(&kernel.plain, msr) && *read == ReadAction::Allow;
            assert!(
                got == expected || clock && got.is_some(),
                "{name}: the read of {msr} by {read} is {got:x?} and not {expected:x?}"
            );
            answered.insert(read.name());
            let Some(done) = wrote(&ruled, msr) else {
                assert!(
                    got.is_none() || msrgate_msrs::command(msr).is_some(),
                    "{name}: {msr} was not written"
                );
                continue;
            };
            let value = got.unwrap_or(0);
            if let Some(expected) = expected_write(map, msr, value, &kernel) {
                assert_eq!(done, expected, "{name}: the write of {value:#x} to {msr} by {write}");
                answered.insert(write.name());
            }
        }
    }
    for action in [
        "allow", "deny", "value", "mask", "handler", "ignore", "shadow", "once", "only",
    ] {
        assert!(answered.contains(action), "no policy has shown {action}: {answered:?}");
    }
}

#[test]
fn what_breaks_the_guest_is_told_and_a_new_one_goes_on() {
    if !kvm_opens() {
        return;
    }
    const RESET: Msr = Msr(0x4000_0003);
    const SYSENTER: MsrRange = match MsrRange::new(Msr(0x174), Msr(0x176)) {
        Some(range) => range,
        None => MsrRange::ALL,
    };
    let kvm = Kvm::new().expect("/dev/kvm");
    let probed = msrgate_kvm::probe(&kvm).expect("filters");
    if !kvm.get_msr_index_list().expect("a list").as_slice().contains(&RESET.0) {
        println!("this kernel has no Hyper-V, by which a guest could be reset");
        return;
    }
    // The guest takes KVM for Hyper-V, and reads a 1 that resets the machine where it is written back.
    let mut cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .expect("a CPUID");
    let entries = cpuid.as_mut_slice().iter_mut();
    for entry in entries.filter(|entry| entry.function == 0x4000_0001) {
        entry.eax = u32::from_le_bytes(*b"Hv#1");
    }
    let one = Decision::of(ReadAction::Value(1));
    let last = Decision::of(ReadAction::Value(2));
    let reads = [
        (MsrRange::single(RESET), one),
        (MsrRange::single(Msr(0x4000_0100)), last),
    ];
    let map = DecisionMap::allow_all().with_reads(msrgate_plan::Intervals::first_match(
        Decision::of(ReadAction::Allow),
        reads,
    ));
    let plan = Arc::new(Plan::compile(&map).expect("a plan"));
    let scanner = Scanner::new(&kvm).cpuid(cpuid).under(&probed, plan, Handlers::new());
    let ranges = [SYSENTER, MsrRange::single(RESET), MsrRange::single(Msr(0x4000_0100))];
    let scan = |scanner: &Scanner<'_>| scanner.scan(&ranges, &mut |_, _| {}).expect("a scan");

    let safe = scan(&scanner);
    assert!(safe.broken.is_empty() && wrote(&safe, RESET).is_none());
    let all = scan(&scanner.writes(Writes::All));
    let broken: Vec<String> = all.broken.iter().map(|broken| format!("{:?}", broken.access)).collect();
    assert_eq!(
        broken,
        [format!("{:?}", msrgate_core::Access::Write { msr: RESET, value: 1 })]
    );
    assert_eq!(read_of(&all, RESET), Some(1));
    // Before it and behind it all went on.
    assert_eq!(all.writable, [0x174, 0x175, 0x176, 0x4000_0100].map(Msr));
}

#[test]
fn what_a_guest_sees_fits_any_terminal() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let scan = [
        "scan",
        "--only",
        "--range",
        "0x170..=0x17f",
        "--range",
        "0xc0000080..=0xc0000104",
    ];
    fits_any_terminal(|| folder.command(&scan), Terminal::Output);
    let json = folder.run(&[&scan[..], &["--json"]].concat()).code(0).out;
    // Another host, and another value.
    folder.write(
        "before.json",
        json.replace(
            "\"kernel\": \"",
            "\"kernel\": \"another kernel, which had a long name, or ",
        ),
    );
    fits_any_terminal(
        || folder.command(&[&scan[..], &["--against", "before.json"]].concat()),
        Terminal::Output,
    );
}

#[test]
fn a_scan_and_what_differs_from_another_have_a_page() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let tsc = ["scan", "--only", "--range", "IA32_TSC", "--range", "0xdead0000"];
    let under = |policy: &str, options: &[&str]| {
        folder.write("policy.toml", policy);
        folder.run(&[&tsc[..], &["-p", "policy.toml"], options].concat())
    };
    let open = "version = 1\nname = \"open\"\ndefault = \"allow\"\n";
    let shut = "version = 1\nname = \"shut\"\ndefault = \"deny\"\n";
    let page = under(open, &["--html", "-"]).code(0).out;
    for text in [
        "<h1 class=\"verdict even\">A guest can read 1 of 2 MSRs here, and write 1 back</h1>",
        "<tr id=\"rdmsr-0x10\">",
        ", under open",
    ] {
        assert!(page.contains(text), "the page has no `{text}`: {page}");
    }
    let before = under(open, &["--json"]).code(0).out;
    folder.write("before.json", &before);
    let page = under(shut, &["--against", "before.json", "--html", "-"]).code(1).out;
    let after = under(shut, &["--json"]).code(0).out;
    folder.write("after.json", &after);
    let diff = |a, b| folder.run(&["diff", a, b, "--html", "-"]);
    for page in [page, diff("before.json", "after.json").code(1).out] {
        assert!(page.contains("<h1 class=\"verdict odd\">1 MSR differs</h1>"), "{page}");
        assert!(page.contains("<a href=\"#rdmsr-0x10\">IA32_TSC: read "), "{page}");
    }
    let page = diff("after.json", "after.json").code(0).out;
    assert!(
        page.contains("<h1 class=\"verdict good\">A guest sees what it saw before</h1>"),
        "{page}"
    );
}
