//! On live KVM. Skipped where /dev/kvm does not open, unless MSRGATE_LANE_REQUIRE is 1.

use kvm_ioctls::Kvm;
use msrgate_core::{Access, Msr, Outcome};
use msrgate_guest::{Broke, Guest, GuestError, Mode, Options};

const READ_OF_UNKNOWN: Access = Access::Read { msr: Msr(0xdead_beef) };
const APIC_BASE: Msr = Msr(0x1b);
const SYSENTER_CS: Msr = Msr(0x174);
const PAT: Msr = Msr(0x277);
const EFER: Msr = Msr(0xc000_0080);

/// KVM, or `None` where the test is to be skipped.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let required = std::env::var("MSRGATE_LANE_REQUIRE").is_ok_and(|value| value == "1");
            assert!(!required, "/dev/kvm does not open: {error}");
            println!("skipped: /dev/kvm does not open: {error}");
            None
        }
    }
}

fn outcomes(guest: &mut Guest, accesses: &[Access]) -> Vec<Outcome> {
    let seen = guest.run(0, accesses, &mut |_| {}).unwrap();
    seen.iter().map(|seen| seen.outcome).collect()
}

fn read(msr: Msr) -> Access {
    Access::Read { msr }
}

fn write(msr: Msr, value: u64) -> Access {
    Access::Write { msr, value }
}

#[test]
fn a_guest_reads_writes_and_faults_in_both_modes() {
    let Some(kvm) = kvm() else { return };
    for mode in [Mode::Real, Mode::Long] {
        let mut guest = Guest::new(&kvm, mode, &Options::default()).unwrap();
        let accesses = [
            read(APIC_BASE),
            READ_OF_UNKNOWN,
            write(SYSENTER_CS, 0x1234),
            read(SYSENTER_CS),
            write(EFER, 1 << 40),
            read(PAT),
            write(PAT, 0x0006_0406_0007_0406),
            read(PAT),
        ];
        let expected = [
            Outcome::Value(0xfee0_0900),
            Outcome::Fault,
            Outcome::Done,
            Outcome::Value(0x1234),
            Outcome::Fault,
            Outcome::Value(0x0007_0406_0007_0406),
            Outcome::Done,
            Outcome::Value(0x0006_0406_0007_0406),
        ];
        assert_eq!(outcomes(&mut guest, &accesses), expected, "{mode:?}");
        // And again, from where it stands.
        assert_eq!(outcomes(&mut guest, &accesses[..4]), expected[..4], "{mode:?}");
    }
}
