//! The traces that come with msrgate, and the policies that are for their guests.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::PathBuf;

use msrgate_core::{Msr, Op};
use msrgate_msrs::cpuid::CpuVendor;
use msrgate_policy::Policy;
use msrgate_trace::{Lines, Record};

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// Each access of a trace, once.
fn accesses(trace: &str) -> BTreeSet<(Msr, Op)> {
    let file = File::open(root().join("traces").join(trace)).expect(trace);
    let lines = Lines::new(BufReader::new(file)).expect("a trace");
    let seen: BTreeSet<(Msr, Op)> = lines
        .map(|record| match record.expect("a record") {
            Record::Event(event) => (event.msr, event.op),
            Record::Gap(gap) => panic!("{gap:?}"),
        })
        .collect();
    assert!(seen.len() > 100, "{trace}");
    seen
}

#[test]
fn linux_finds_every_access_of_its_boot_allowed() {
    for (policy, traces) in [
        ("linux-microvm", &["linux-6.1-microvm.jsonl"][..]),
        ("linux-pc", &["linux-6.1-pc-smp2.jsonl", "linux-6.1-microvm.jsonl"]),
    ] {
        let path = root().join("policies").join(format!("{policy}.toml"));
        let loaded = Policy::from_file(&path).expect("a policy");
        let map = loaded.decision_map(None).expect("needs no CPUID");
        for trace in traces {
            let denied: Vec<(Msr, Op)> = accesses(trace)
                .into_iter()
                .filter(|(msr, op)| !map.allows(*msr, *op))
                .collect();
            assert_eq!(denied, [], "{policy}, {trace}");
        }
    }
}

#[test]
fn each_trace_has_its_guests_cpuid() {
    for trace in fs::read_dir(root().join("traces")).expect("traces") {
        let path = trace.expect("an entry").path();
        let lines = Lines::new(BufReader::new(File::open(&path).expect("a trace"))).expect("a header");
        let cpuid = lines
            .header()
            .parse_cpuid()
            .expect("a CPUID")
            .expect("as it is written");
        assert_eq!(cpuid.vendor(), Some(CpuVendor::Amd), "{}", path.display());
        assert!(!lines.header().is_partial(), "{}", path.display());
    }
}
