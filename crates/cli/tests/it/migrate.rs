//! Scans of two hosts, compared where neither is: `migrate` and `diff`.

use serde_json::{Value, json};

use crate::command::{Folder, Ran, list, text};

/// A row of what KVM names.
fn offer(msr: &str, value: &str, may_set: &str, may_clear: &str) -> Value {
    json!({ "msr": msr, "name": null, "value": value, "writes": "taken", "may_set": may_set, "may_clear": may_clear })
}

fn span(first: &str, last: &str) -> Value {
    json!({ "first": first, "last": last })
}

/// A scan of a host with these features, of which 0x606 reads so.
fn scan(features: &[Value], unit: &str) -> Value {
    let seen = json!({ "msr": "0x606", "name": null, "value": unit, "volatile": false });
    json!({
        "msrgate_scan": 1, "host": "A processor", "microcode": "0x1", "kernel": "6.1 kvm_intel", "cpuid": null,
        "x2apic": false, "policy": null, "ranges": [span("0x0", "0x3fff")], "readable": [seen], "written": [],
        "writable": [], "unwritten": [], "broken": [], "faults": 0,
        "listed": [offer("0x1d9", "0x0", "0x3", "0x0")], "features": features,
    })
}

/// Two hosts: the second has no VMX control 34, no MDS_NO, and another power unit.
fn hosts() -> Folder {
    let folder = Folder::new();
    let controls = |value: &str| offer("0x48b", value, "0x0", value);
    let arch = |value: &str, may_set: &str| offer("0x10a", value, may_set, value);
    let a = scan(
        &[arch("0x21", "0xffffffffffffffde"), controls("0x1582e00000000")],
        "0xa0e03",
    );
    let b = scan(
        &[arch("0x1", "0xfffffffffffffffe"), controls("0x1582a00000000")],
        "0xa0e04",
    );
    folder.write("a.json", a.to_string());
    folder.write("b.json", b.to_string());
    folder
}

fn kinds(ran: &Ran, way: usize) -> Vec<(String, String)> {
    let said = ran.json();
    let obstacles = list(&said["ways"][way], "obstacles").iter();
    obstacles
        .map(|found| (text(found, "msr").to_owned(), text(found, "kind").to_owned()))
        .collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = expected
        .iter()
        .map(|(msr, kind)| ((*msr).to_owned(), (*kind).to_owned()));
    pairs.collect()
}

#[test]
fn what_qemu_dies_of_is_told_with_the_bit_and_the_switch() {
    let folder = hosts();
    let ran = folder.run(&["migrate", "a.json", "b.json"]).code(1);
    ran.shows(&[
        "no: 3 registers stand in the way from a.json to b.json",
        "0x48b IA32_VMX_PROCBASED_CTLS2: a guest has 0x1582e00000000, the other host 0x1582a00000000: KVM_SET_MSRS refuses the value because of bit 34",
        "QEMU ends with `failed to set MSR 0x48b to 0x1582e00000000`",
        "QEMU: -cpu MODEL,-vmx-desc-exit",
        "bit 5 (MDS_NO) would tell the guest something untrue about that host",
        "all of these: -cpu MODEL,-mds-no,-vmx-desc-exit",
        "0x606",
    ]);
    let ran = folder.run(&["migrate", "--json", "a.json", "b.json"]).code(1);
    let expected = [("0x10a", "untrue"), ("0x48b", "refused"), ("0x606", "changes")];
    assert_eq!(kinds(&ran, 0), pairs(&expected));
    let said = ran.json();
    assert_eq!(said["ways"][0]["obstacles"][1]["bits"], json!([34]));
    assert_eq!(said["ways"][0]["qemu"], json!(["mds-no", "vmx-desc-exit"]));
    // The other way what the guest has is taken: more is there.
    let back = folder.run(&["migrate", "--json", "b.json", "a.json"]).code(1);
    assert_eq!(kinds(&back, 0), pairs(&[("0x606", "changes")]));
}

#[test]
fn the_line_that_qemu_died_with_is_enough_of_a_scan() {
    let folder = hosts();
    folder.write("line", "MSR_ADDR,VALUE\n0x48b,0x1582e00000000\n0x400000000,0x0\n");
    let ran = folder.run(&["migrate", "line", "b.json"]).code(1);
    ran.shows(&[
        "KVM_SET_MSRS refuses the value because of bit 34",
        "line does not say what KVM tells a VMM",
    ]);
    folder.write("less", "MSR_ADDR,VALUE\n0x48b,0x1580a00000000\n");
    folder.run(&["migrate", "less", "b.json"]).code(0);
    folder.write("torn", "MSR_ADDR,VALUE\n0x48b\n");
    folder
        .run(&["migrate", "torn", "b.json"])
        .code(2)
        .says(&["torn: line 2"]);
}

#[test]
fn a_fingerprint_of_firecrackers_is_a_scan() {
    let folder = hosts();
    let fingerprint = |value: u64| {
        json!({
            "firecracker_version": "1.0", "kernel_version": "6.1", "microcode_version": "0x1",
            "guest_cpu_config": { "kvm_capabilities": [], "cpuid_modifiers": [],
                "msr_modifiers": [{ "addr": "0x48b", "bitmap": format!("0b{value:064b}") }] },
        })
        .to_string()
    };
    folder.write("f.json", fingerprint(0x0001_582e_0000_0000));
    folder.write("g.json", fingerprint(0x0001_582a_0000_0000));
    for to in ["b.json", "g.json"] {
        let ran = folder.run(&["migrate", "--json", "f.json", to]).code(1);
        assert_eq!(kinds(&ran, 0), pairs(&[("0x48b", "refused")]), "{to}");
    }
    let differs = folder.run(&["diff", "f.json", "g.json"]).code(1);
    differs.shows(&["1 MSR differs", "0x1582e00000000 → 0x1582a00000000"]);
}

#[test]
fn what_the_guest_does_not_have_or_does_not_do_does_not_count() {
    let folder = hosts();
    // No VMX and no ARCH_CAPABILITIES.
    folder.write(
        "cpuid",
        "   0x00000000 0x00: eax=0x00000007 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n\
         \u{20}  0x00000001 0x00: eax=0x000906ea ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n",
    );
    let ran = folder
        .run(&["migrate", "--json", "--guest", "cpuid", "a.json", "b.json"])
        .code(1);
    assert_eq!(kinds(&ran, 0), pairs(&[("0x606", "changes")]));
    // It never reads 0x606, and writes what the other host takes and then what it does not.
    let wrote = |value: &str| {
        format!("{{\"msrgate_trace\":1}}\n{{\"op\":\"wrmsr\",\"msr\":\"0x1d9\",\"value\":\"{value}\"}}\n")
    };
    folder.write("calm.jsonl", wrote("0x1"));
    let ran = folder
        .run(&["migrate", "--json", "--guest", "calm.jsonl", "a.json", "b.json"])
        .code(1);
    assert_eq!(kinds(&ran, 0), pairs(&[("0x10a", "untrue"), ("0x48b", "refused")]));
    let narrow = std::fs::read_to_string(folder.path().join("b.json")).expect("a scan");
    folder.write("b.json", narrow.replace("\"may_set\":\"0x3\"", "\"may_set\":\"0x1\""));
    let any = folder.run(&["migrate", "--json", "a.json", "b.json"]).code(1).json();
    let remark = &list(&any["ways"][0], "remarks")[0];
    assert_eq!((text(remark, "msr"), &remark["bits"]), ("0x1d9", &json!([1])));
    folder.write("keen.jsonl", wrote("0x2"));
    let ran = folder
        .run(&["migrate", "--json", "--guest", "keen.jsonl", "a.json", "b.json"])
        .code(1);
    assert!(kinds(&ran, 0).contains(&("0x1d9".to_owned(), "refused".to_owned())));
}

#[test]
fn the_common_policy_passes_check_and_has_what_all_hosts_can_give() {
    let folder = hosts();
    let third = scan(&[offer("0x10a", "0x21", "0x0", "0x21")], "0xa0e03");
    folder.write("c.json", third.to_string());
    let ran = folder
        .run(&["migrate", "--policy", "fleet.toml", "a.json", "b.json", "c.json"])
        .code(1);
    ran.shows(&["from a.json to c.json", "from c.json to b.json"]);
    folder.run(&["check", "fleet.toml"]).code(0);
    let explained = |msr: &str| folder.run(&["explain", "fleet.toml", msr, "read"]).code(0).out;
    assert!(explained("0x10a").contains("0x1"), "{}", explained("0x10a"));
    assert!(explained("0x606").contains("0xa0e03"));
    assert!(explained("0x48b").contains("deny"), "{}", explained("0x48b"));
    let printed = folder.run(&["migrate", "--policy", "-", "a.json", "b.json"]).code(1);
    printed.shows(&["msr = \"IA32_VMX_PROCBASED_CTLS2\"", "0x1582a00000000"]);
    // No scan is overwritten.
    folder
        .run(&["migrate", "--policy", "a.json", "a.json", "b.json"])
        .code(2);
}

#[test]
fn an_older_scan_is_read_and_a_newer_one_is_refused() {
    let folder = hosts();
    let mut older = scan(&[], "0xa0e03");
    for key in ["msrgate_scan", "listed", "features"] {
        older.as_object_mut().expect("an object").remove(key);
    }
    folder.write("older.json", older.to_string());
    let ran = folder.run(&["migrate", "older.json", "b.json"]).code(1);
    ran.shows(&["0x606", "older.json does not say what KVM tells a VMM"]);
    folder
        .run(&["diff", "older.json", "b.json"])
        .code(1)
        .shows(&["1 MSR differs"]);
    let mut newer = scan(&[], "0xa0e03");
    newer["msrgate_scan"] = json!(2);
    folder.write("newer.json", newer.to_string());
    folder
        .run(&["migrate", "newer.json", "b.json"])
        .code(2)
        .says(&["newer.json comes from a newer msrgate"]);
}

#[test]
fn two_scans_are_compared_and_a_scan_is_no_policy() {
    let folder = hosts();
    let ran = folder.run(&["diff", "a.json", "b.json"]).code(1);
    ran.shows(&[
        "3 MSRs differ",
        "offers 0x1582e00000000 → 0x1582a00000000",
        "refuses bit 34 as 1",
        "0xa0e03 → 0xa0e04",
    ]);
    let said = folder.run(&["diff", "--json", "a.json", "b.json"]).code(1).json();
    assert_eq!(said["equal"], false);
    folder.write("p.toml", "version = 1\ndefault = \"allow\"\n");
    folder
        .run(&["diff", "a.json", "p.toml"])
        .code(2)
        .says(&["a.json is a scan, and the other input is not"]);
    folder
        .run(&["check", "a.json"])
        .code(2)
        .says(&["it is a scan and no policy"]);
    folder
        .run(&["migrate", "a.json", "p.toml"])
        .code(2)
        .says(&["p.toml is not a scan"]);
}
