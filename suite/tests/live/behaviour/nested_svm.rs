//! A guest that is a hypervisor itself, by SVM: what its own guest, L2, does with MSRs, and what L1's VMLOAD does.

use kvm_bindings::kvm_regs;
use msrgate_core::{Msr, Ops};
use msrgate_guest::{Mode, Options};

use super::code::{self, OUT, Pages, address};
use super::hypervisor::{EXIT_IO, FILTER, Hypervisor, KERNEL_GS_BASE, denying};
use super::kernel::{Kernel, Module};
use super::live::Live;

const VM_HSAVE_PA: Msr = Msr(0xc001_0117);
const STAR: Msr = Msr(0xc000_0081);
const LSTAR: Msr = Msr(0xc000_0082);

const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
const VMLOAD: [u8; 3] = [0x0f, 0x01, 0xda];
const RDMSR: [u8; 2] = [0x0f, 0x32];

/// Pages: L1's program, L2's, then these.
const VMCB: usize = 2;
const SAVED: usize = 3;
/// Two of them.
const MAP: usize = 4;

/// Exit codes: L2 asks for it, and an access of an MSR.
const ASKED: u64 = 0x81;
const MSR: u64 = 0x7c;

/// What L1 does about its guest's MSRs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Intercepts {
    /// It has a map with all bits like this.
    Map(u8),
    /// It does not intercept them.
    None,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Came {
    /// L1 has left the guest by its OUT: its guest's exit code.
    Exit(u64),
    /// The access is handed to user space: exit, and its reason.
    Out(u32, u32),
}

/// Where it runs. Fields are dropped in this order: the VM before its memory.
struct Nested {
    live: Live,
    _pages: Pages,
}

impl Nested {
    /// A guest that runs `l1` with RAX and RDI at a VMCB, by which it may enter `l2` with RCX as given, while `denied` is.
    fn new(kernel: &Kernel, l1: &[u8], l2: &[u8], intercepts: Intercepts, msr: Msr, denied: &[Msr]) -> Nested {
        let mut live = Live::new(kernel, Mode::Long, Options::default());
        let mut sregs = live.fd().get_sregs().unwrap();
        // SVME.
        sregs.efer |= 1 << 12;
        live.fd().set_sregs(&sregs).unwrap();
        assert!(live.host_write(VM_HSAVE_PA, address(SAVED)));

        let mut vmcb = [0_u8; 0x1000];
        let mut set = |at: usize, value: u64| vmcb[at..at + 8].copy_from_slice(&value.to_le_bytes());
        // MSRs from the upper half on; VMRUN and VMMCALL.
        set(0x8, u64::from(intercepts != Intercepts::None) << (32 + 28));
        set(0x10, 3);
        set(0x48, address(MAP));
        set(0x58, 1);
        // ES, CS, SS, DS: selector, attributes, limit.
        for (at, segment) in [
            (0x400, 0xc93_0010),
            (0x410, 0xa9b_0008),
            (0x420, 0xc93_0010),
            (0x430, 0xc93_0010),
        ] {
            set(at, 0xffff_ffff << 32 | segment);
        }
        for (at, table) in [(0x460, sregs.gdt), (0x480, sregs.idt)] {
            set(at, u64::from(table.limit) << 32);
            set(at + 8, table.base);
        }
        let state = [
            (0x4d0, sregs.efer),
            (0x548, sregs.cr4),
            (0x550, sregs.cr3),
            (0x558, sregs.cr0),
            (0x560, 0x400),
            (0x568, 0xffff_0ff0),
            (0x570, 2),
            // What VMLOAD loads: STAR, LSTAR, kernel GS base.
            (0x600, 0x11),
            (0x608, 0x22),
            (0x620, 0x33),
        ];
        for (at, value) in state {
            set(at, value);
        }
        let map = match intercepts {
            Intercepts::Map(byte) => [byte; 0x1000],
            Intercepts::None => [0; 0x1000],
        };
        let pages = Pages::with(&[l1, l2, &vmcb, &[], &map, &map]);
        pages.map(live.guest.vm());
        {
            let vm: &mut dyn Hypervisor = &mut live;
            vm.mask(7).unwrap();
            vm.install(&denying(Ops::BOTH, denied));
        }
        let regs = kvm_regs {
            rax: address(VMCB),
            rdi: address(VMCB),
            rsi: address(1),
            rcx: msr.0.into(),
            ..Default::default()
        };
        code::enter(&mut live, regs);
        Nested { live, _pages: pages }
    }

    /// One KVM_RUN.
    fn run(&mut self) -> Came {
        assert_eq!(self.live.run(), Ok(()));
        match self.live.exit_reason() {
            EXIT_IO => Came::Exit(self.live.fd().get_regs().unwrap().rbx),
            exit => {
                let vm: &mut dyn Hypervisor = &mut self.live;
                Came::Out(exit, vm.run_msr().reason)
            }
        }
    }
}

#[test]
fn an_access_of_l2_is_asked_about_where_l1_s_map_does_not_intercept_it() {
    let Some(kernel) = Kernel::nesting(Module::Amd) else {
        return;
    };
    let l2 = [&RDMSR[..], &VMMCALL].concat();
    for msr in [LSTAR, KERNEL_GS_BASE, VM_HSAVE_PA] {
        for intercepts in [Intercepts::Map(0), Intercepts::None, Intercepts::Map(0xff)] {
            let mut nested = Nested::new(&kernel, code::l1_svm(), &l2, intercepts, msr, &[msr]);
            if intercepts == Intercepts::Map(0xff) {
                assert_eq!(nested.run(), Came::Exit(MSR), "{msr}");
                continue;
            }
            assert_eq!(nested.run(), Came::Out(29, FILTER as u32), "{msr} {intercepts:?}");
            let vm: &mut dyn Hypervisor = &mut nested.live;
            vm.answer(0, 0x42);
            assert_eq!(nested.run(), Came::Exit(ASKED), "{msr} {intercepts:?}");
            assert_eq!(nested.live.fd().get_regs().unwrap().rax, 0x42, "{msr} {intercepts:?}");
        }
    }
}

#[test]
fn vmload_loads_msrs_whatever_the_filter_says() {
    let Some(kernel) = Kernel::nesting(Module::Amd) else {
        return;
    };
    let msrs = [STAR, LSTAR, KERNEL_GS_BASE];
    let l1 = [&VMLOAD[..], &OUT].concat();
    let mut nested = Nested::new(&kernel, &l1, &[], Intercepts::None, Msr(0), &msrs);
    assert_eq!(nested.run(), Came::Exit(0));
    assert_eq!(msrs.map(|msr| nested.live.host_read(msr)), [0x11, 0x22, 0x33].map(Some));
}

#[test]
fn a_filter_that_is_replaced_under_l2_holds_for_what_passes_through_when_l1_enters_l2_again() {
    let Some(kernel) = Kernel::nesting(Module::Amd) else {
        return;
    };
    let l2 = [&RDMSR[..], &OUT, &RDMSR, &VMMCALL].concat();
    for (msr, intercepts, passes) in [
        (KERNEL_GS_BASE, Intercepts::Map(0), true),
        (VM_HSAVE_PA, Intercepts::Map(0), false),
        // Then the map is L1's own, which follows the filter.
        (KERNEL_GS_BASE, Intercepts::None, false),
    ] {
        let mut nested = Nested::new(&kernel, code::l1_svm(), &l2, intercepts, msr, &[STAR]);
        // L2's own OUT.
        assert_eq!(nested.run(), Came::Exit(0), "{msr}");
        let vm: &mut dyn Hypervisor = &mut nested.live;
        vm.deny(Ops::BOTH, &[msr]);
        if passes {
            assert_eq!(nested.run(), Came::Exit(ASKED), "{msr}");
        }
        assert_eq!(nested.run(), Came::Out(29, FILTER as u32), "{msr} {intercepts:?}");
    }
}
