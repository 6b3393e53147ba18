//! A guest that is a hypervisor itself, by VMX: what its own guest, L2, does with MSRs, and what the lists of its VMCS do at an
//! entry and at an exit.

use kvm_bindings::kvm_regs;
use msrgate_core::{Msr, Op, Ops, Verdict};
use msrgate_engine::{Origin, Vm};
use msrgate_guest::{Mode, Options};

use super::code::{self, OUT, Pages, address};
use super::hypervisor::{EXIT_IO, FILTER, Hypervisor, KERNEL_GS_BASE, SYSENTER_ESP, denying};
use super::kernel::{Kernel, Module};
use super::live::Live;

const TSC: Msr = Msr(0x10);
const FEATURE_CONTROL: Msr = Msr(0x3a);
const STAR: Msr = Msr(0xc000_0081);
const LSTAR: Msr = Msr(0xc000_0082);
const CSTAR: Msr = Msr(0xc000_0083);

const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const RDMSR: [u8; 2] = [0x0f, 0x32];

/// Pages: L1's program, L2's, then these.
const FIELDS: usize = 2;
const ON: usize = 3;
const VMCS: usize = 4;
const BITMAP: usize = 5;
const LISTS: usize = 6;
const STACK: usize = 7;
/// Offsets of the lists, and bytes of an entry.
const ENTRY_LOAD: usize = 0;
const EXIT_STORE: usize = 0x400;
const EXIT_LOAD: usize = 0x800;
const ENTRY: usize = 16;

/// Exit reasons: L2 asks for it, an RDMSR of its, and an entry that fails at an MSR (with the bit of a failed entry).
const ASKED: u64 = 18;
const READ: u64 = 31;
const MSR_LOAD: u64 = 1 << 31 | 34;

/// What L1 gives its guest.
#[derive(Default)]
struct L1<'a> {
    entry_load: &'a [(Msr, u64)],
    exit_store: &'a [Msr],
    exit_load: &'a [(Msr, u64)],
    /// A bitmap without a bit, or with all of them; or none, so that each access exits.
    bitmap: Option<u8>,
    /// IA32_SYSENTER_ESP, which an exit loads from a field.
    sysenter_esp: u64,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Came {
    /// L2's exit, or L1's failed entry: reason and qualification.
    Exit(u64, u64),
    /// The access is handed to user space: exit, and its reason.
    Out(u32, u32),
    /// The VM shut down.
    Shutdown,
}

/// Where it runs. Fields are dropped in this order: the VM before its memory.
struct Nested {
    live: Live,
    pages: Pages,
}

impl Nested {
    /// A guest in VMX operation, about to enter `l2` with RCX as given, under a filter that denies `msrs`.
    fn new(kernel: &Kernel, l1: &L1<'_>, l2: &[u8], rcx: Msr, ops: Ops, msrs: &[Msr]) -> Nested {
        let mut live = Live::new(kernel, Mode::Long, Options::default());
        assert!(live.host_write(FEATURE_CONTROL, 5));
        let mut sregs = live.fd().get_sregs().unwrap();
        // NE, VMXE.
        (sregs.cr0, sregs.cr4) = (sregs.cr0 | 0x20, sregs.cr4 | 1 << 13);
        live.fd().set_sregs(&sregs).unwrap();

        let (program, exit) = code::l1_vmx();
        let revision = live.host_read(Msr(0x480)).unwrap() as u32 & 0x7fff_ffff;
        let mut lists = [0; 0x1000];
        let mut list = |offset: usize, entries: &mut dyn Iterator<Item = (Msr, u64)>| {
            for (number, (msr, value)) in entries.enumerate() {
                let at = offset + number * ENTRY;
                lists[at..at + 4].copy_from_slice(&msr.0.to_le_bytes());
                lists[at + 8..at + 16].copy_from_slice(&value.to_le_bytes());
            }
        };
        list(ENTRY_LOAD, &mut l1.entry_load.iter().copied());
        list(EXIT_STORE, &mut l1.exit_store.iter().map(|msr| (*msr, 0)));
        list(EXIT_LOAD, &mut l1.exit_load.iter().copied());
        let mut fields = vec![address(ON), address(VMCS)];
        fields.extend(
            control_structure(&mut live, l1, code::CODE + exit)
                .into_iter()
                .flatten(),
        );
        let fields: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        let bitmap = [l1.bitmap.unwrap_or(0); 0x1000];
        let pages = Pages::with(&[
            program,
            l2,
            &fields,
            &revision.to_le_bytes(),
            &revision.to_le_bytes(),
            &bitmap,
            &lists,
            &[],
        ]);
        pages.map(live.guest.vm());
        {
            let vm: &mut dyn Hypervisor = &mut live;
            vm.mask(7).unwrap();
            vm.deny(ops, msrs);
        }
        let regs = kvm_regs {
            rdi: address(FIELDS),
            rcx: rcx.0.into(),
            ..Default::default()
        };
        code::enter(&mut live, regs);
        Nested { live, pages }
    }

    /// One KVM_RUN.
    fn run(&mut self) -> Came {
        assert_eq!(self.live.run(), Ok(()));
        let regs = self.live.fd().get_regs().unwrap();
        match self.live.exit_reason() {
            EXIT_IO => {
                assert_ne!(regs.rbx, u64::MAX, "an instruction of VMX fails");
                Came::Exit(regs.rbx, regs.rbp)
            }
            kvm_bindings::KVM_EXIT_SHUTDOWN => Came::Shutdown,
            exit => {
                let vm: &mut dyn Hypervisor = &mut self.live;
                Came::Out(exit, vm.run_msr().reason)
            }
        }
    }
}

/// Fields and their values for an L2 in 64-bit mode, with L1's page tables.
fn control_structure(live: &mut Live, l1: &L1<'_>, exit: u64) -> Vec<[u64; 2]> {
    let sregs = live.fd().get_sregs().unwrap();
    // What must be set.
    let [pin, first, exits, entries] =
        [0x48d, 0x48e, 0x48f, 0x490].map(|msr| live.host_read(Msr(msr)).unwrap() & 0xffff_ffff);
    let list = |offset: usize| address(LISTS) + offset as u64;
    let mut fields = vec![
        [0x4000, pin],
        [0x4002, first | u64::from(l1.bitmap.is_some()) << 28],
        // 64 bits on either side.
        [0x400c, exits | 1 << 9],
        [0x4012, entries | 1 << 9],
        [0x2004, address(BITMAP)],
        [0x400e, l1.exit_store.len() as u64],
        [0x2006, list(EXIT_STORE)],
        [0x4010, l1.exit_load.len() as u64],
        [0x2008, list(EXIT_LOAD)],
        [0x4014, l1.entry_load.len() as u64],
        [0x200a, list(ENTRY_LOAD)],
        [0x2800, u64::MAX],
        // L2's registers, and L1's.
        [0x681a, 0x400],
        [0x681c, address(STACK) + 0x1000],
        [0x681e, address(1)],
        [0x6820, 2],
        [0x6c14, address(STACK) + 0x800],
        [0x6c16, exit],
        [0x6c10, l1.sysenter_esp],
        [0xc0c, 0x18],
    ];
    for side in [0x6800, 0x6c00] {
        fields.extend([[side, sregs.cr0], [side + 2, sregs.cr3], [side + 4, sregs.cr4]]);
    }
    // GDTR, IDTR.
    for (table, limit, bases) in [
        (sregs.gdt, 0x4810, [0x6816, 0x6c0c]),
        (sregs.idt, 0x4812, [0x6818, 0x6c0e]),
    ] {
        fields.push([limit, table.limit.into()]);
        fields.extend(bases.map(|base| [base, table.base]));
    }
    // ES, CS, SS, DS, FS, GS, LDTR, TR: selector, limit, access rights.
    let (data, code) = ((0x10, 0xffff_ffff, 0xc093), (8, 0xffff_ffff, 0xa09b));
    let segments = [data, code, data, data, data, data, (0, 0, 0x1_0000), (0x18, 0x67, 0x8b)];
    for (number, (selector, limit, rights)) in (0..).step_by(2).zip(segments) {
        fields.extend([
            [0x800 + number, selector],
            [0x4800 + number, limit],
            [0x4814 + number, rights],
        ]);
        // L1's: no LDTR, and TR is above.
        if number < 12 {
            fields.push([0xc00 + number, selector]);
        }
    }
    fields
}

/// Whether the kernel that runs here asks the filter about the lists, as the engine has it.
fn asked_about(kernel: &Kernel, op: Op) -> bool {
    let engine = Vm::new().with_profile(kernel.profile());
    engine.set_filter(denying(Ops::BOTH, &[LSTAR]));
    engine.allows(Origin::NestedList, LSTAR, op) == Verdict::Deny
}

#[test]
fn lists_of_allowed_msrs_are_loaded_and_stored() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        entry_load: &[(STAR, 0x11), (LSTAR, 0x22)],
        exit_store: &[STAR, LSTAR],
        exit_load: &[(LSTAR, 0x33)],
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::BOTH, &[CSTAR]);
    assert_eq!(nested.run(), Came::Exit(ASKED, 0));
    let stored = [0, 1].map(|entry| nested.pages.read(LISTS, EXIT_STORE + entry * ENTRY + 8));
    assert_eq!(stored, [0x11, 0x22]);
    assert_eq!(
        [STAR, LSTAR].map(|msr| nested.live.host_read(msr)),
        [Some(0x11), Some(0x33)]
    );
}

#[test]
fn a_vm_entry_that_loads_a_denied_msr_fails_at_it_or_loads_it_as_the_profile_says() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        entry_load: &[(STAR, 0x11), (LSTAR, 0x22), (CSTAR, 0x33)],
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::WRITE, &[LSTAR]);
    let came = nested.run();
    let held = [STAR, LSTAR, CSTAR].map(|msr| nested.live.host_read(msr).unwrap());
    println!("{came:x?}, then {held:x?}");
    match asked_about(&kernel, Op::Write) {
        // Entries before it stay applied.
        true => assert_eq!((came, held), (Came::Exit(MSR_LOAD, 2), [0x11, 0, 0])),
        false => assert_eq!((came, held), (Came::Exit(ASKED, 0), [0x11, 0x22, 0x33])),
    }
}

#[test]
fn a_vm_exit_that_stores_a_denied_msr_aborts_or_stores_it_as_the_profile_says() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        exit_store: &[LSTAR],
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::READ, &[LSTAR]);
    assert!(nested.live.host_write(LSTAR, 0x22));
    let came = nested.run();
    let stored = nested.pages.read(LISTS, EXIT_STORE + 8);
    println!("{came:x?}, stored {stored:#x}");
    match asked_about(&kernel, Op::Read) {
        true => assert_eq!((came, stored), (Came::Shutdown, 0)),
        false => assert_eq!((came, stored), (Came::Exit(ASKED, 0), 0x22)),
    }
}

#[test]
fn a_vm_exit_that_loads_a_denied_msr_aborts_or_loads_it_as_the_profile_says() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        exit_load: &[(LSTAR, 0x22)],
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::WRITE, &[LSTAR]);
    let came = nested.run();
    let held = nested.live.host_read(LSTAR).unwrap();
    println!("{came:x?}, then {held:#x}");
    match asked_about(&kernel, Op::Write) {
        true => assert_eq!((came, held), (Came::Shutdown, 0)),
        false => assert_eq!((came, held), (Came::Exit(ASKED, 0), 0x22)),
    }
}

#[test]
fn a_vm_exit_stores_the_tsc_whatever_the_filter_says() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        exit_store: &[TSC],
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::BOTH, &[TSC]);
    assert_eq!(nested.run(), Came::Exit(ASKED, 0));
    assert_ne!(nested.pages.read(LISTS, EXIT_STORE + 8), 0);
}

#[test]
fn fields_of_a_vmcs_are_loaded_whatever_the_filter_says() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l1 = L1 {
        sysenter_esp: 0x1234,
        ..L1::default()
    };
    let mut nested = Nested::new(&kernel, &l1, &VMCALL, Msr(0), Ops::BOTH, &[SYSENTER_ESP]);
    assert_eq!(nested.run(), Came::Exit(ASKED, 0));
    assert_eq!(nested.live.host_read(SYSENTER_ESP), Some(0x1234));
}

#[test]
fn an_access_of_l2_is_asked_about_where_l1_does_not_intercept_it() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l2 = [&RDMSR[..], &VMCALL].concat();
    for msr in [LSTAR, KERNEL_GS_BASE] {
        for bitmap in [Some(0), Some(0xff), None] {
            let l1 = L1 {
                bitmap,
                ..L1::default()
            };
            let mut nested = Nested::new(&kernel, &l1, &l2, msr, Ops::BOTH, &[msr]);
            if bitmap == Some(0) {
                assert_eq!(nested.run(), Came::Out(29, FILTER as u32), "{msr}");
                let vm: &mut dyn Hypervisor = &mut nested.live;
                vm.answer(0, 0x42);
                assert_eq!(nested.run(), Came::Exit(ASKED, 0), "{msr}");
                assert_eq!(nested.live.fd().get_regs().unwrap().rax, 0x42, "{msr}");
            } else {
                assert_eq!(nested.run(), Came::Exit(READ, 0), "{msr} {bitmap:?}");
            }
        }
    }
}

#[test]
fn a_filter_that_is_replaced_under_l2_holds_for_what_passes_through_when_l1_enters_l2_again() {
    let Some(kernel) = Kernel::nesting(Module::Intel) else {
        return;
    };
    let l2 = [&RDMSR[..], &OUT, &RDMSR, &VMCALL].concat();
    for (msr, passes) in [(KERNEL_GS_BASE, true), (LSTAR, false)] {
        let l1 = L1 {
            bitmap: Some(0),
            ..L1::default()
        };
        let mut nested = Nested::new(&kernel, &l1, &l2, msr, Ops::BOTH, &[CSTAR]);
        // L2's own OUT.
        assert_eq!(nested.run(), Came::Exit(0, 0), "{msr}");
        let vm: &mut dyn Hypervisor = &mut nested.live;
        vm.deny(Ops::BOTH, &[msr]);
        if passes {
            assert_eq!(nested.run(), Came::Exit(ASKED, 0), "{msr}");
        }
        assert_eq!(nested.run(), Came::Out(29, FILTER as u32), "{msr}");
    }
}
