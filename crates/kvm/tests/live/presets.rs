//! Fixed answers that the kernel holds.

use std::sync::Arc;

use msrgate_core::{Access, Msr, Op, Outcome, ReadAction, Verdict, WriteAction};
use msrgate_guest::{Guest, Mode, Options, held};
use msrgate_kvm::{Handlers, InstallError, VcpuGate};
use msrgate_msrs::Kept;
use msrgate_plan::{CompileOptions, DecisionMap, Plan, Preset};

use crate::{MICROCODE, gated, kvm, map, plan, read, run};

const TSC: Msr = Msr(0x10);

/// Reads of these MSRs get these values and writes of them `write`; all else is allowed.
fn fixed(values: &[(Msr, u64)], write: WriteAction) -> DecisionMap {
    let reads: Vec<_> = values
        .iter()
        .map(|(msr, value)| (*msr, ReadAction::Value(*value)))
        .collect();
    let writes: Vec<_> = values.iter().map(|(msr, _)| (*msr, write.clone())).collect();
    map(&reads, &writes)
}

/// What each access gets, and whether it left the kernel.
fn sees(guest: &mut Guest, gate: &VcpuGate, accesses: &[Access]) -> Vec<(Outcome, bool)> {
    let seen = run(guest, gate, accesses);
    seen.iter().map(|seen| (seen.outcome, seen.exit.is_some())).collect()
}

fn with_presets(map: &DecisionMap, held: Vec<Preset>) -> Arc<Plan> {
    Arc::new(Plan::compile_for(map, &CompileOptions::default().with_presets(held)).unwrap())
}

#[test]
fn the_microcode_revision_of_a_policy_is_read_without_an_exit_whatever_the_guest_writes() {
    let Some((kvm, probed)) = kvm() else { return };
    let value = 0x1234_5678_0000_0000;
    for (write, done, exits) in [
        (WriteAction::Deny, Outcome::Fault, false),
        (WriteAction::Ignore, Outcome::Done, true),
    ] {
        let map = fixed(&[(MICROCODE, value)], write);
        let presets = held(&kvm, &map, None).unwrap();
        assert_eq!(presets, [Preset::new(MICROCODE, value)]);
        let plan = with_presets(&map, presets);
        for mode in [Mode::Real, Mode::Long] {
            let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, Arc::clone(&plan), Handlers::new());
            let accesses = [
                read(MICROCODE),
                Access::Write {
                    msr: MICROCODE,
                    value: 0,
                },
                read(MICROCODE),
            ];
            let fixed = (Outcome::Value(value), false);
            for _ in 0..2 {
                assert_eq!(sees(&mut guest, &vcpu, &accesses), [fixed, (done, exits), fixed]);
            }
        }
    }
}

/// Says for each register what was found, so that a run on another kernel shows what it holds.
#[test]
fn a_guest_gets_the_same_with_presets_as_without_and_makes_no_more_exits() {
    let Some((kvm, probed)) = kvm() else { return };
    let mut plain = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
    let of = |kept| {
        let entries = msrgate_msrs::all().iter().filter(move |entry| entry.kept == kept);
        entries.map(|entry| entry.msr)
    };
    let stored: Vec<Msr> = of(Kept::Stored).collect();
    let all: Vec<Msr> = stored.iter().copied().chain(of(Kept::Constant)).collect();
    let reads: Vec<Access> = all.iter().map(|msr| read(*msr)).collect();
    let seen = plain.run(0, &reads, &mut |_| {}).unwrap().to_vec();
    let own = seen.iter().zip(&all).map(|(seen, msr)| match seen.outcome {
        Outcome::Value(value) => (*msr, Some(value)),
        _ => (*msr, None),
    });
    let own: Vec<(Msr, Option<u64>)> = own.collect();
    // The kernel's own values, zeros, and values with high bits.
    let candidates: [fn(Option<u64>) -> u64; 4] = [|own| own.unwrap_or(1), |_| 0, |_| 2, |_| 0x1234_5678_9abc_def0];
    for candidate in candidates {
        let values: Vec<(Msr, u64)> = own.iter().map(|(msr, own)| (*msr, candidate(*own))).collect();
        let without = fixed(&values, WriteAction::Ignore);
        let presets = held(&kvm, &without, None).unwrap();
        let with = with_presets(&without, presets.clone());
        let without = plan(&without);
        for (msr, value) in &values {
            let preset = presets.iter().any(|preset| preset.msr == *msr);
            println!("{msr} = {value:#x}: {}", if preset { "held" } else { "not held" });
            let own = own.iter().find(|(other, _)| other == msr).and_then(|(_, own)| *own);
            assert!(!preset || stored.contains(msr) || own == Some(*value), "{msr}");
        }
        for mode in [Mode::Real, Mode::Long] {
            let mut accesses = reads.clone();
            for msr in &all {
                let value = 0xffff_ffff_ffff_ffff;
                accesses.extend([Access::Write { msr: *msr, value }, read(*msr)]);
            }
            let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, Arc::clone(&with), Handlers::new());
            let got = sees(&mut guest, &vcpu, &accesses);
            let (mut guest, _gate, vcpu) = gated(&kvm, probed, mode, Arc::clone(&without), Handlers::new());
            let expected = sees(&mut guest, &vcpu, &accesses);
            for ((access, got), expected) in accesses.iter().zip(&got).zip(&expected) {
                assert_eq!(got.0, expected.0, "{mode:?} {access:x?}");
                let preset = presets.iter().any(|preset| preset.msr == access.msr());
                assert_eq!(got.1, !(preset && access.op() == Op::Read), "{mode:?} {access:x?}");
            }
        }
    }
}

#[test]
fn what_changes_by_itself_or_is_not_the_kernels_is_not_held() {
    let Some((kvm, _)) = kvm() else { return };
    for msr in [TSC, Msr(0xdead_beef), Msr(0x35), Msr(0x1b), Msr(0x34)] {
        let map = fixed(&[(msr, 0)], WriteAction::Deny);
        assert_eq!(held(&kvm, &map, None).unwrap(), [], "{msr}");
    }
}

#[test]
fn a_preset_that_the_vcpu_does_not_hold_is_an_error() {
    let Some((kvm, probed)) = kvm() else { return };
    for msr in [TSC, Msr(0xdead_beef)] {
        let preset = Preset::new(msr, 5);
        let map = fixed(&[(msr, 5)], WriteAction::Deny);
        let mut guest = Guest::new(&kvm, Mode::Real, &Options::default()).unwrap();
        let plan = with_presets(&map, vec![preset]);
        let gate = probed.install(guest.vm(), plan, Handlers::new()).unwrap();
        let error = gate.vcpu(guest.vcpu(0).unwrap().fd(), 0).unwrap_err();
        assert!(
            matches!(error, InstallError::PresetNotHeld { preset: of, .. } if of == preset),
            "{error}"
        );
    }
}

#[test]
fn a_plan_that_takes_the_place_of_another_neither_brings_a_preset_nor_shows_one() {
    let Some((kvm, probed)) = kvm() else { return };
    let preset = Preset::new(MICROCODE, 7);
    let without = fixed(&[(MICROCODE, 7)], WriteAction::Deny);
    let with = with_presets(&without, vec![preset]);
    let without = plan(&without);

    let (_guest, gate, _vcpu) = gated(&kvm, probed, Mode::Real, Arc::clone(&without), Handlers::new());
    let late = gate.replace(Arc::clone(&with)).unwrap_err();
    assert!(matches!(late, InstallError::PresetTooLate { msr: MICROCODE }), "{late}");

    let (mut guest, gate, vcpu) = gated(&kvm, probed, Mode::Real, Arc::clone(&with), Handlers::new());
    let left = gate.replace(plan(&DecisionMap::allow_all())).unwrap_err();
    assert!(matches!(left, InstallError::PresetLeft { msr: MICROCODE }), "{left}");
    for (plan, exits) in [(&without, true), (&with, false)] {
        gate.replace(Arc::clone(plan)).unwrap();
        let verdict = gate.plan().filter().verdict(MICROCODE, Op::Read);
        assert_eq!(verdict == Verdict::Deny, exits);
        let seen = sees(&mut guest, &vcpu, &[read(MICROCODE)]);
        assert_eq!(seen, [(Outcome::Value(7), exits)]);
    }
}
