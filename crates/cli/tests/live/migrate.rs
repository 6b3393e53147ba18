//! What `migrate` says breaks, breaks: KVM_SET_MSRS refuses the values that it says are refused, and takes the others.

use std::collections::BTreeMap;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VmFd};
use msrgate_core::Msr;
use serde_json::{Value, json};

use crate::command::{Folder, hex, list, text};
use crate::kvm::kvm_opens;

/// Makes vCPUs, each to set one value in: for a VM of each, an emulated processor takes seconds.
struct Fresh {
    cpuid: CpuId,
    vm: VmFd,
    made: u64,
}

impl Fresh {
    fn new() -> Fresh {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().expect("a VM");
        vm.set_tss_address(0xfffb_d000).expect("KVM_SET_TSS_ADDR");
        vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("a CPUID");
        Fresh { cpuid, vm, made: 0 }
    }

    /// Whether a new vCPU takes the value.
    fn takes(&mut self, msr: u64, value: u64) -> bool {
        if self.made == 100 {
            *self = Fresh::new();
        }
        let vcpu = self.vm.create_vcpu(self.made).expect("a vCPU");
        self.made += 1;
        vcpu.set_cpuid2(&self.cpuid).expect("KVM_SET_CPUID2");
        let entry = kvm_msr_entry {
            index: u32::try_from(msr).expect("an MSR"),
            data: value,
            ..Default::default()
        };
        let one = Msrs::from_entries(&[entry]).expect("one entry");
        vcpu.set_msrs(&one).expect("KVM_SET_MSRS") == 1
    }
}

/// A scan of this host, of a few MSRs.
fn scan(folder: &Folder) -> Value {
    folder
        .run(&["scan", "--json", "--only", "--range", "@tsc"])
        .code(0)
        .json()
}

/// The MSRs that are refused, of a guest whose features have these values.
fn refused(folder: &Folder, host: &Value, values: &[(u64, u64)]) -> Vec<(u64, Vec<u64>)> {
    let mut from = host.clone();
    for feature in from["features"].as_array_mut().expect("features") {
        let msr = hex(feature, "msr");
        if let Some((_, value)) = values.iter().find(|(of, _)| *of == msr) {
            feature["value"] = json!(format!("{value:#x}"));
        }
    }
    folder.write("from.json", from.to_string());
    folder.write("to.json", host.to_string());
    let ran = folder.run(&["migrate", "--json", "from.json", "to.json"]);
    let said = ran.json();
    let obstacles = list(&said["ways"][0], "obstacles").iter();
    let refused = obstacles.filter(|found| text(found, "kind") == "refused");
    let refused: Vec<(u64, Vec<u64>)> = refused
        .map(|found| {
            let bits = list(found, "bits").iter().map(|bit| bit.as_u64().expect("a number"));
            (hex(found, "msr"), bits.collect())
        })
        .collect();
    assert!(refused.is_empty() || ran.code == Some(1), "{}", ran.out);
    refused
}

/// The features that KVM lets a VMM set, with their values.
fn features(host: &Value) -> Vec<(u64, u64)> {
    let features = list(host, "features").iter();
    let taken = features.filter(|feature| text(feature, "writes") == "taken");
    taken
        .map(|feature| (hex(feature, "msr"), hex(feature, "value")))
        .collect()
}

#[test]
fn a_value_that_migrate_says_is_refused_is_refused_and_one_that_it_lets_pass_is_taken() {
    if !kvm_opens() {
        return;
    }
    let mut fresh = Fresh::new();
    let folder = Folder::new();
    let host = scan(&folder);
    let features = features(&host);
    if features.is_empty() {
        println!("skipped: this kernel lets no VMM set a feature MSR");
        return;
    }
    let mut count = 0;
    for bit in 0..64 {
        let values: Vec<(u64, u64)> = features.iter().map(|(msr, value)| (*msr, value ^ 1 << bit)).collect();
        let not_taken = values.iter().filter(|(msr, value)| !fresh.takes(*msr, *value));
        let expected: Vec<(u64, Vec<u64>)> = not_taken.map(|(msr, _)| (*msr, vec![bit])).collect();
        assert_eq!(refused(&folder, &host, &values), expected, "bit {bit}");
        count += expected.len();
    }
    println!(
        "{} features, {count} of {} values refused",
        features.len(),
        features.len() * 64
    );
    assert_eq!(refused(&folder, &host, &features), []);
}

/// The registers for whose values the database says all: a change of one bit is enough to be refused, or not.
const EXACT: [&str; 8] = [
    "IA32_ARCH_CAPABILITIES",
    "IA32_VMX_PROCBASED_CTLS2",
    "IA32_VMX_EPT_VPID_CAP",
    "IA32_VMX_TRUE_PINBASED_CTLS",
    "IA32_VMX_TRUE_PROCBASED_CTLS",
    "IA32_VMX_TRUE_EXIT_CTLS",
    "IA32_VMX_TRUE_ENTRY_CTLS",
    "DE_CFG",
];

#[test]
fn the_database_says_of_features_what_kvm_does() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    let host = scan(&folder);
    let mut compared = 0;
    for feature in list(&host, "features") {
        let msr = Msr(u32::try_from(hex(feature, "msr")).expect("an MSR"));
        let known = feature["name"].as_str().is_some_and(|name| EXACT.contains(&name));
        if !known || text(feature, "writes") != "taken" {
            continue;
        }
        let restore = msrgate_msrs::restore(msr).expect("a row");
        let value = hex(feature, "value");
        let taken = hex(feature, "may_set") | hex(feature, "may_clear");
        let refused = (0..64)
            .map(|bit| 1 << bit)
            .filter(|bit| restore.refused(value, value ^ bit) != 0);
        assert_eq!(
            refused.fold(0, |all, bit: u64| all | bit),
            !taken,
            "{msr} of {value:#x}"
        );
        compared += 1;
    }
    println!("{compared} registers compared");
}

#[test]
fn two_scans_of_a_host_are_alike_and_a_guest_can_go() {
    if !kvm_opens() {
        return;
    }
    let folder = Folder::new();
    for name in ["a.json", "b.json"] {
        folder.write(name, scan(&folder).to_string());
    }
    folder.run(&["diff", "a.json", "b.json"]).code(0);
    let same = folder.run(&["diff", "--json", "a.json", "b.json"]).code(0).json();
    assert_eq!((&same["equal"], &same["by"]), (&json!(true), &json!("scans")));
    let yes = folder.run(&["migrate", "a.json", "b.json"]).code(0);
    yes.shows(&["yes: a guest of a.json can go to b.json"]);
}

/// Scans that `scan --json --only --range IA32_TSC` made under other KVMs: AMD's and Intel's module, of two series of Linux.
const OTHERS: [(&str, &str); 4] = [
    (
        "kvm_amd-6.1",
        include_str!("../../../../testdata/scans/kvm_amd-6.1.json"),
    ),
    (
        "kvm_amd-6.12",
        include_str!("../../../../testdata/scans/kvm_amd-6.12.json"),
    ),
    (
        "kvm_intel-6.1",
        include_str!("../../../../testdata/scans/kvm_intel-6.1.json"),
    ),
    (
        "kvm_intel-6.12",
        include_str!("../../../../testdata/scans/kvm_intel-6.12.json"),
    ),
];

/// What the scan has of MSRs that its kernel lets a VMM set, by MSR: what it offers as a feature goes before the value of a new vCPU.
fn settable(scan: &Value) -> BTreeMap<u64, u64> {
    let rows = list(scan, "listed").iter().chain(list(scan, "features"));
    let taken = rows.filter(|row| text(row, "writes") == "taken");
    taken.map(|row| (hex(row, "msr"), hex(row, "value"))).collect()
}

#[test]
fn a_guest_of_another_kernel_breaks_on_this_one_where_migrate_says_so_and_nowhere_else() {
    if !kvm_opens() {
        return;
    }
    let mut fresh = Fresh::new();
    let folder = Folder::new();
    let this = scan(&folder);
    folder.write("this.json", this.to_string());
    let mut wrong = Vec::new();
    for (name, other) in OTHERS {
        folder.write("other.json", other);
        let said = folder.run(&["migrate", "--json", "other.json", "this.json"]).json();
        let way = &said["ways"][0];
        let said = list(way, "obstacles").iter().chain(list(way, "remarks"));
        let said: BTreeMap<u64, &Value> = said.map(|found| (hex(found, "msr"), found)).collect();
        let other = serde_json::from_str(other).expect("JSON");
        let mut counts = BTreeMap::new();
        for (msr, value) in settable(&other) {
            let found = said.get(&msr);
            let kind = found.map_or("nothing", |found| text(found, "kind"));
            *counts.entry(kind).or_insert(0) += 1;
            let mut expect = |value: u64, taken: bool| {
                if fresh.takes(msr, value) != taken {
                    wrong.push(format!(
                        "{name}: {kind} of {msr:#x}, and KVM_SET_MSRS of {value:#x}: {}",
                        !taken
                    ));
                }
            };
            expect(value, !matches!(kind, "refused" | "absent"));
            let bits = found.map_or(&[][..], |found| list(found, "bits"));
            let bits = bits.iter().map(|bit| 1 << bit.as_u64().expect("a number"));
            match kind {
                "refused" => expect(bits.fold(value, |value, bit: u64| value ^ bit), true),
                "may-be-refused" => bits.for_each(|bit| expect(value ^ bit, false)),
                _ => {}
            }
        }
        println!("{name}: {counts:?}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
