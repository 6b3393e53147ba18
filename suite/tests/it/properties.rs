//! Properties that hold between implementations, for filters and policies that nobody wrote.
//!
//! | property | test |
//! |---|---|
//! | engine, core filter and a plain reading of the specification agree on what is a filter | `a_raw_filter_is_accepted_alike` |
//! | and on each verdict | `a_raw_filter_means_the_same_to_all` |
//! | a bitmap, the engine's too, intercepts a candidate exactly where the filter denies it, and all else always | `a_bitmap_opens_what_its_filter_allows` |
//! | oracle, decision map, plan and engine give a policy's accesses the same | `a_policy_means_the_same_to_all` |
//!
//! What fails is printed as a case, in the format of `testdata/README.md`.

use std::sync::Arc;

use msrgate_core::{Access, Msr, MsrRange, Op, Ops, PassthroughMsr, SvmPermissionMap, Verdict, VmxBitmap};
use msrgate_engine::{Intercepts, Vcpu, Vm};
use msrgate_suite::{
    Call, CallResult, Case, CoreFilter, Engine, Flat, Implementation, Map, Oracle, Place, Planned, Process, RawFilter,
    RawRange, Seen, Step, Stop, run,
};
use proptest::prelude::*;
use proptest::sample::select;

/// MSRs where something begins or ends: windows of the bitmaps, x2APIC, the whole space, and the registers that the
/// machine knows.
const PLACES: [u32; 16] = [
    0,
    0x170,
    0x174,
    0x277,
    0x7f0,
    0x800,
    0x8f0,
    0x900,
    0x1ff0,
    0x2000,
    0x4000_0000,
    0xc000_0080,
    0xc000_1ff8,
    0xc001_0000,
    0xc001_1ff8,
    0xffff_fff0,
];

fn msr() -> impl Strategy<Value = u32> {
    (select(&PLACES[..]), 0u32..24).prop_map(|(place, offset)| place.saturating_add(offset))
}

/// How many MSRs a range has; the sizes around which something changes are the likely ones.
fn nmsrs() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 1u32..40,
        4 => select(&[63u32, 64, 65, 127, 128, 129, 12287, 12288][..]),
        1 => select(&[0u32, 12289, 12351, 0xffff_ffc0, 0xffff_ffe1, 0xffff_ffff][..]),
    ]
}

fn range() -> impl Strategy<Value = RawRange> {
    let flags = prop_oneof![6 => Just(3u32), 4 => Just(1), 4 => Just(2), 1 => select(&[0u32, 4, 7, 0x8000_0003][..])];
    let at = prop_oneof![30 => Just(Place::Mapped), 3 => Just(Place::Unaligned), 1 => Just(Place::Unmapped)];
    let pattern = proptest::collection::vec(any::<u8>(), 1..9);
    (flags, nmsrs(), msr(), pattern, at).prop_map(|(flags, nmsrs, base, pattern, at)| RawRange {
        slot: 0,
        flags,
        nmsrs,
        base,
        // Shorter than what is read, now and then: zeros follow.
        bitmap: pattern
            .iter()
            .copied()
            .cycle()
            .take(nmsrs.min(12288).div_ceil(8) as usize)
            .collect(),
        at,
    })
}

fn raw_filter() -> impl Strategy<Value = RawFilter> {
    let flags = prop_oneof![8 => Just(0u32), 8 => Just(1), 1 => Just(2)];
    let slots = proptest::collection::vec(proptest::option::weighted(0.7, range()), 0..=16);
    (flags, slots, any::<u8>()).prop_map(|(flags, slots, pad)| RawFilter {
        flags,
        pad,
        layout: None,
        edited: false,
        ranges: slots
            .into_iter()
            .enumerate()
            .filter_map(|(slot, range)| range.map(|range| RawRange { slot, ..range }))
            .collect(),
    })
}

fn accesses(filter: &RawFilter, others: &[u32]) -> Vec<Access> {
    let edges = filter.ranges.iter().flat_map(|range| {
        let end = range.base.wrapping_add(range.nmsrs);
        [
            range.base.wrapping_sub(1),
            range.base,
            range.base.wrapping_add(1),
            end.wrapping_sub(1),
            end,
        ]
    });
    let msrs = edges.chain(others.iter().copied()).map(Msr);
    msrs.flat_map(|msr| [Access::Read { msr }, Access::Write { msr, value: 0 }])
        .collect()
}

/// A raw filter in force, every reason handed over, then the accesses.
fn case(filter: RawFilter, gives: CallResult, accesses: &[Access]) -> Case {
    let mut call = Call::set_msr_filter(filter);
    call.gives = Some(gives);
    let mut steps = vec![Step::Call(Call::enable_cap(7)), Step::Call(call)];
    for step in &mut steps {
        if let Step::Call(call) = step {
            call.gives = call.gives.or(Some(CallResult::OK));
        }
    }
    steps.extend(accesses.iter().copied().map(Step::from));
    Case {
        name: "a random filter".into(),
        policy: None,
        cpuid: None,
        process: None,
        ignore_msrs: false,
        steps,
    }
}

/// What KVM_X86_SET_MSR_FILTER gives, read off the specification once more.
fn plain_errno(filter: &RawFilter) -> CallResult {
    if filter.flags > 1 {
        return CallResult::EINVAL;
    }
    if filter.flags == 1 && filter.ranges.iter().all(|range| range.nmsrs == 0) {
        return CallResult::EINVAL;
    }
    for range in &filter.ranges {
        if range.nmsrs == 0 {
            continue;
        }
        if range.flags == 0 || range.flags > 3 {
            return CallResult::EINVAL;
        }
        if u64::from(range.nmsrs).div_ceil(64) * 8 > 0x600 {
            return CallResult::EINVAL;
        }
        if range.at == Place::Unmapped {
            return CallResult::EFAULT;
        }
    }
    CallResult::OK
}

/// What a filter that was accepted says, read off the specification once more.
fn plain_verdict(filter: &RawFilter, msr: u32, op: Op) -> Verdict {
    if msr >> 8 == 8 {
        return Verdict::Allow;
    }
    for range in &filter.ranges {
        let flag = match op {
            Op::Read => 1,
            Op::Write => 2,
        };
        let end = (u64::from(range.base) + u64::from(range.nmsrs)) % (1 << 32);
        if range.flags & flag != 0 && u64::from(msr) >= u64::from(range.base) && u64::from(msr) < end {
            let bit = (msr - range.base) as usize;
            let byte = range.bitmap.get(bit / 8).copied().unwrap_or(0);
            return if byte & (1 << (bit % 8)) == 0 {
                Verdict::Deny
            } else {
                Verdict::Allow
            };
        }
    }
    if filter.flags == 1 {
        Verdict::Deny
    } else {
        Verdict::Allow
    }
}

/// `None` where the implementation skips the case.
fn seen(
    case: &Case,
    process: Process,
    implementation: &dyn Implementation,
) -> Result<Option<Vec<Seen>>, TestCaseError> {
    match run(case, process, implementation) {
        Ok(seen) => Ok(Some(seen)),
        Err(Stop::Skip(_)) => Ok(None),
        Err(Stop::Fail(how)) => Err(TestCaseError::fail(format!("{}: {how}\n{case}", implementation.name()))),
    }
}

const ENGINES: [(Engine, Process); 4] = [
    (Engine::VM_EXIT, Process::Native),
    (Engine::VM_EXIT, Process::Compat),
    (Engine::EMULATOR, Process::Native),
    (Engine::EMULATOR, Process::Compat),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_filter_is_accepted_alike(filter in raw_filter()) {
        let expected = plain_errno(&filter);
        let case = case(filter, expected, &[]);
        for (engine, process) in ENGINES {
            let checked = msrgate_suite::check(&case, process, &engine);
            prop_assert_eq!(&checked, &msrgate_suite::Checked::Passed, "{:?}\n{}", process, case);
        }
        let checked = msrgate_suite::check(&case, Process::Native, &CoreFilter);
        prop_assert!(!matches!(checked, msrgate_suite::Checked::Failed(_)), "{:?}\n{}", checked, case);
    }

    #[test]
    fn a_raw_filter_means_the_same_to_all(mut filter in raw_filter(), others in proptest::collection::vec(msr(), 8)) {
        acceptable(&mut filter);
        let accesses = accesses(&filter, &others);
        let case = case(filter.clone(), CallResult::OK, &accesses);
        let expected: Vec<Verdict> =
            accesses.iter().map(|access| plain_verdict(&filter, access.msr().0, access.op())).collect();
        let mut all: Vec<(&dyn Implementation, Process)> = vec![(&CoreFilter, Process::Native), (&Flat, Process::Native)];
        all.extend(ENGINES.iter().map(|(engine, process)| (engine as &dyn Implementation, *process)));
        for (implementation, process) in all {
            let seen = seen(&case, process, implementation)?;
            let seen = seen.ok_or_else(|| TestCaseError::fail("skipped"))?;
            for ((seen, expected), access) in seen.iter().zip(&expected).zip(&accesses) {
                prop_assert_eq!(
                    seen.verdict, Some(*expected), "{:?}, {}\n{}", access, implementation.name(), case
                );
            }
        }
    }

    #[test]
    fn a_policy_means_the_same_to_all(policy in policy(), accesses in proptest::collection::vec(access(), 1..40)) {
        let case = Case {
            name: "a random policy".into(),
            policy: Some(policy),
            cpuid: None,
            process: None,
            ignore_msrs: false,
            steps: accesses.iter().copied().map(Step::from).collect(),
        };
        let oracle = seen(&case, Process::Native, &Oracle)?.unwrap_or_default();
        let all: [&dyn Implementation; 4] = [&Map, &Planned, &Engine::VM_EXIT, &Engine::EMULATOR];
        for implementation in all {
            let seen = seen(&case, Process::Native, implementation)?.unwrap_or_default();
            prop_assert_eq!(seen.len(), oracle.len());
            for ((oracle, seen), access) in oracle.iter().zip(&seen).zip(&accesses) {
                let disagree = disagreement(oracle, seen);
                prop_assert_eq!(
                    disagree, None, "{:?}, {} says {:?}, the oracle {:?}\n{}",
                    access, implementation.name(), seen, oracle, case
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_bitmap_opens_what_its_filter_allows(
        mut filter in raw_filter(),
        candidates in proptest::collection::vec((msr(), 1u32..0x400, 1u32..4), 0..6),
    ) {
        acceptable(&mut filter);
        let core = core_filter(&filter);
        let candidates: Vec<PassthroughMsr> = candidates
            .into_iter()
            .filter_map(|(first, len, ops)| {
                let range = MsrRange::new(Msr(first), Msr(first.saturating_add(len)))?;
                Some(PassthroughMsr::new(range, Ops::from_bits(ops)?))
            })
            .collect();
        let vmx = VmxBitmap::derive(&core, &candidates);
        let svm = SvmPermissionMap::derive(&core, &candidates);
        let vm = Arc::new(Vm::new());
        let mut on_vmx = Vcpu::new(Arc::clone(&vm), Intercepts::vmx(candidates.clone()));
        vm.set_filter(core.clone());
        let mut on_svm = Vcpu::new(vm, Intercepts::svm(candidates.clone()));
        // One vCPU finds the filter there, the other picks it up.
        prop_assert_eq!(on_vmx.pick_up().intercepts.vmx_bitmap(), Some(&vmx));
        prop_assert_eq!(on_svm.pick_up().intercepts.svm_permission_map(), Some(&svm));
        // Every bit that either has, and MSRs that have none.
        let windows = [0..0x2001u32, 0xbfff_ffff..0xc000_2001, 0xc000_ffff..0xc001_2001, 0xffff_fff0..0xffff_ffff];
        for msr in windows.into_iter().flatten() {
            for op in Op::ALL {
                let candidate = candidates.iter().any(|c| c.range.contains(Msr(msr)) && c.ops.contains(op));
                let wanted = candidate && plain_verdict(&filter, msr, op) == Verdict::Allow;
                let low = msr < 0x2000 || (0xc000_0000..0xc000_2000).contains(&msr);
                let amd = (0xc001_0000..0xc001_2000).contains(&msr);
                prop_assert_eq!(vmx.intercepts(Msr(msr), op), !(wanted && low), "VMX, {} {:#x}", op, msr);
                prop_assert_eq!(svm.intercepts(Msr(msr), op), !(wanted && (low || amd)), "SVM, {} {:#x}", op, msr);
                let (word, bit) = vmx_place(msr, op);
                if let Some(word) = word.and_then(|word| vmx.words().get(word)) {
                    prop_assert_eq!(word >> bit & 1 == 1, vmx.intercepts(Msr(msr), op), "VMX word, {} {:#x}", op, msr);
                }
            }
        }
    }
}

/// The 64-bit word and bit of VMX's page, by the offsets of its four areas in bytes.
fn vmx_place(msr: u32, op: Op) -> (Option<usize>, u32) {
    let area = match (msr, op) {
        (..0x2000, Op::Read) => 0,
        (0xc000_0000..0xc000_2000, Op::Read) => 1024,
        (..0x2000, Op::Write) => 2048,
        (0xc000_0000..0xc000_2000, Op::Write) => 3072,
        _ => return (None, 0),
    };
    let byte = area + (msr & 0x1fff) as usize / 8;
    (Some(byte / 8), (byte % 8) as u32 * 8 + msr % 8)
}

/// Makes of it a filter that is accepted, and leaves as much as it can.
fn acceptable(filter: &mut RawFilter) {
    filter.flags &= 1;
    for range in &mut filter.ranges {
        range.flags = if range.flags & 3 == 0 { 3 } else { range.flags & 3 };
        range.at = if range.at == Place::Unmapped {
            Place::Mapped
        } else {
            range.at
        };
        range.nmsrs = range.nmsrs.min(12288);
    }
    if plain_errno(filter) != CallResult::OK {
        filter.flags = 0;
    }
}

fn core_filter(filter: &RawFilter) -> msrgate_core::Filter {
    let used = filter.ranges.iter().filter(|range| range.nmsrs != 0);
    let ranges: Vec<msrgate_core::FilterRange> = used
        .map(|range| {
            let bytes = range.bitmap.iter().copied().chain(std::iter::repeat(0));
            let bytes: Vec<u8> = bytes.take(range.nmsrs.div_ceil(64) as usize * 8).collect();
            let words: Vec<u64> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|word| u64::from_le_bytes(*word))
                .collect();
            let ops = Ops::from_bits(range.flags).unwrap();
            msrgate_core::FilterRange::new(range.base, range.nmsrs, ops, words).unwrap()
        })
        .collect();
    let default = if filter.flags == 1 {
        Verdict::Deny
    } else {
        Verdict::Allow
    };
    msrgate_core::Filter::new(default, ranges).unwrap()
}

/// The field in which they differ, of those that both can say.
fn disagreement(a: &Seen, b: &Seen) -> Option<&'static str> {
    fn differ<T: PartialEq>(a: &Option<T>, b: &Option<T>) -> bool {
        matches!((a, b), (Some(a), Some(b)) if a != b)
    }
    [
        ("action", differ(&a.action, &b.action)),
        ("verdict", differ(&a.verdict, &b.verdict)),
        ("exit", differ(&a.exit, &b.exit)),
        ("sees", differ(&a.sees, &b.sees)),
    ]
    .into_iter()
    .find_map(|(name, differ)| differ.then_some(name))
}

/// An MSR of a policy: few, so that rules overlap and accesses meet them. The last one is in no filter's reach.
fn policy_msr() -> impl Strategy<Value = u32> {
    (
        select(
            &[
                0x172u32,
                0x277,
                0x7fe,
                0x8fe,
                0x4000_0000,
                0xc000_0081,
                0xc000_0102,
                0xffff_fff0,
            ][..],
        ),
        0u32..5,
    )
        .prop_map(|(place, offset)| place + offset)
}

fn access() -> impl Strategy<Value = Access> {
    let value = select(&[0u64, 1, 2, 0xf0, 0x1234, 1 << 63][..]);
    (policy_msr(), proptest::option::of(value)).prop_map(|(msr, value)| {
        let msr = Msr(msr);
        // What the machine stores fits every register but the one that refuses it.
        match value {
            Some(value) if msr.0 == 0x277 => Access::Write { msr, value: value % 2 },
            Some(value) => Access::Write { msr, value },
            None => Access::Read { msr },
        }
    })
}

fn read_action() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just("\"allow\"".to_owned()),
        2 => Just("\"deny\"".to_owned()),
        1 => Just("\"zero\"".to_owned()),
        1 => (1u64..9).prop_map(|value| format!("{{ value = {value} }}")),
        1 => (0u64..9).prop_map(|value| format!("{{ shadow = {value} }}")),
        1 => (0u64..255, 0u64..255).prop_map(|(keep, set)| format!("{{ mask = {{ keep = {keep}, set = {set} }} }}")),
        1 => Just("{ handler = \"suite\" }".to_owned()),
    ]
}

fn write_action() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just("\"allow\"".to_owned()),
        2 => Just("\"deny\"".to_owned()),
        1 => Just("\"ignore\"".to_owned()),
        2 => Just("\"shadow\"".to_owned()),
        1 => (0u64..255, select(&["deny", "drop"][..])).prop_map(|(bits, otherwise)| {
            format!("{{ mask = {{ may_change = {bits}, otherwise = \"{otherwise}\" }} }}")
        }),
        1 => Just("{ only = [1, 0x1234] }".to_owned()),
        2 => Just("{ once = true }".to_owned()),
        1 => Just("{ handler = \"suite\" }".to_owned()),
    ]
}

fn rule() -> impl Strategy<Value = String> {
    let actions = prop_oneof![
        3 => (read_action(), write_action()).prop_map(|(read, write)| format!("read = {read}\nwrite = {write}\n")),
        1 => read_action().prop_map(|read| format!("read = {read}\n")),
        1 => write_action().prop_map(|write| format!("write = {write}\n")),
    ];
    let log = prop_oneof![4 => Just(""), 1 => Just("log = \"all\"\n")];
    (policy_msr(), 0u32..6, actions, log).prop_map(|(first, more, actions, log)| {
        let last = first + more;
        format!("[[rule]]\nmsr = \"{first:#x}..={last:#x}\"\n{actions}{log}")
    })
}

/// The text of a policy that compiles.
fn policy() -> impl Strategy<Value = String> {
    let fallback = |key: &'static str| {
        prop_oneof![
            3 => Just(String::new()),
            1 => Just(format!("{key} = \"ignore\"\n")),
            1 => Just(format!("{key} = {{ read = {{ shadow = 7 }}, write = \"shadow\" }}\n")),
            1 => Just(format!("{key} = {{ read = {{ value = 7 }}, write = \"deny\" }}\n")),
        ]
    };
    let rules = proptest::collection::vec(rule(), 0..7);
    (
        select(&["allow", "deny"][..]),
        fallback("unknown"),
        fallback("invalid"),
        rules,
    )
        .prop_map(|(default, unknown, invalid, rules)| {
            format!(
                "version = 1\ndefault = \"{default}\"\n{unknown}{invalid}{}",
                rules.concat()
            )
        })
        .prop_filter("it compiles", |text| {
            msrgate_policy::Policy::parse("random.toml", text).is_ok()
        })
}
