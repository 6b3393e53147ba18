//! VMX: the control structure (Intel SDM vol. 3, appendix B), extended pages, ports.
//!
//! A guest that owns nearly all of CR0 and CR4 ("unrestricted guest"). What the hardware loads and stores at an entry and an exit
//! by itself is SYSENTER, FS, GS, EFER and PAT; the other MSRs are the guest's for good, since the hypervisor uses none of them.
//! An NMI makes the guest leave, and one that comes while the hypervisor runs is lost.

#![expect(unsafe_code, reason = "the instructions of VMX")]

use core::arch::asm;

use msrgate_core::Op;

use crate::linux::Entry;
use crate::machine::{rdmsr, wrmsr};
use crate::memory;
use crate::processor::{Event, Exit, Pages, Processor, Registers, intercept_port, map_all_but};

unsafe extern "sysv64" {
    fn enter_vmx(again: u32, registers: *mut Registers) -> u32;
    static gdt: [u64; 3];
}

/// Fields of the control structure.
mod field {
    pub(super) const PORTS: [u64; 2] = [0x2000, 0x2002];
    pub(super) const BITMAP: u64 = 0x2004;
    pub(super) const EXTENDED_PAGES: u64 = 0x201a;
    pub(super) const GUEST_PHYSICAL: u64 = 0x2400;
    pub(super) const LINK: u64 = 0x2800;
    pub(super) const PAT: u64 = 0x2804;
    pub(super) const EFER: u64 = 0x2806;
    pub(super) const HOST_PAT: u64 = 0x2c00;
    pub(super) const HOST_EFER: u64 = 0x2c02;
    pub(super) const PIN_CONTROLS: u64 = 0x4000;
    pub(super) const FIRST_CONTROLS: u64 = 0x4002;
    pub(super) const EXIT_CONTROLS: u64 = 0x400c;
    pub(super) const ENTRY_CONTROLS: u64 = 0x4012;
    pub(super) const INJECT: u64 = 0x4016;
    pub(super) const INJECT_CODE: u64 = 0x4018;
    pub(super) const SECOND_CONTROLS: u64 = 0x401e;
    pub(super) const ERROR: u64 = 0x4400;
    pub(super) const EXIT_REASON: u64 = 0x4402;
    pub(super) const LENGTH: u64 = 0x440c;
    pub(super) const SHADOW: u64 = 0x4824;
    pub(super) const CR0_KEPT: u64 = 0x6000;
    pub(super) const CR4_KEPT: u64 = 0x6002;
    pub(super) const CR0_SHOWN: u64 = 0x6004;
    pub(super) const CR4_SHOWN: u64 = 0x6006;
    pub(super) const QUALIFICATION: u64 = 0x6400;
    pub(super) const CR0: u64 = 0x6800;
    pub(super) const CR3: u64 = 0x6802;
    pub(super) const CR4: u64 = 0x6804;
    pub(super) const RIP: u64 = 0x681e;
    /// Those that start as 0.
    pub(super) const ZERO: [u64; 19] = [
        INJECT, SHADOW, CR4_SHOWN, 0x2802, 0x4004, 0x400a, 0x400e, 0x4010, 0x4014, 0x4810, 0x4812, 0x4826, 0x482a,
        0x6816, 0x6818, 0x681c, 0x6822, 0x6824, 0x6826,
    ];
}

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;
const LMA: u64 = 1 << 10;
const VMXE: u64 = 1 << 13;
/// Of the pin-based controls. The guest's own NMIs are injected, and its IRET ends them.
const NMI_EXITING: u64 = 1 << 3;
const VIRTUAL_NMIS: u64 = 1 << 5;
const OSXSAVE: u64 = 1 << 18;

fn get(field: u64) -> u64 {
    let value;
    // SAFETY: reads the current control structure; the processor is in VMX operation since `Vmx::new`.
    unsafe { asm!("vmread {}, {}", out(reg) value, in(reg) field, options(nostack)) }
    value
}

fn set(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: likewise. What the fields of this file may hold keeps the image from the guest, and leads back to `boot.s`.
    unsafe { asm!("vmwrite {}, {}", "setbe {}", in(reg) field, in(reg) value, out(reg_byte) failed, options(nostack)) }
    assert!(failed == 0, "the processor has no field {field:#x}");
}

/// Controls as near to `wanted` as the processor's capability MSR allows.
fn controls(capability: u32, wanted: u64) -> u64 {
    let allowed = rdmsr(capability).expect("a capability of VMX");
    (wanted | allowed & 0xffff_ffff) & allowed >> 32
}

/// A processor in VMX root operation.
pub(crate) struct Vmx {
    /// Whether the guest was entered before.
    again: bool,
}

impl Vmx {
    /// Turns VMX on, with a guest that is about to start at `entry`; `port` is the power-off port.
    pub(crate) fn new(entry: &Entry, port: u16) -> Vmx {
        if rdmsr(0x3a).is_some_and(|control| control & 1 == 0) {
            wrmsr(0x3a, 5).expect("IA32_FEATURE_CONTROL is not locked");
        }
        let capability = |msr| rdmsr(msr).expect("VMX");
        let revision = capability(0x480) & 0x7fff_ffff;
        let (mut cr0, mut cr4, cr3): (u64, u64, u64);
        // SAFETY: reads.
        unsafe { asm!("mov {}, cr0", "mov {}, cr4", "mov {}, cr3", out(reg) cr0, out(reg) cr4, out(reg) cr3) }
        cr0 |= capability(0x486);
        cr4 |= capability(0x488) | VMXE | OSXSAVE;
        // SAFETY: bits that VMX wants, and XSAVE for XSETBV; no paging mode changes.
        unsafe { asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4) }
        let [on, structure] = [0; 2].map(|_| {
            let page = Pages::<1>::new();
            page.words()[0] = revision;
            page.address()
        });
        let failed: u8;
        // SAFETY: both pages are the hardware's for good.
        unsafe {
            asm!("vmxon [{0}]", "vmclear [{1}]", "vmptrld [{1}]", "setbe {2}", in(reg) &on, in(reg) &structure, out(reg_byte) failed)
        }
        assert!(failed == 0, "the processor does not enter VMX operation");

        let ports = Pages::<2>::new();
        intercept_port(ports.words(), port);
        set(field::PORTS[0], ports.address());
        set(field::PORTS[1], ports.address() + 4096);
        // The capabilities that let CR3 be the guest's own. I/O and MSR bitmaps; EPT, RDTSCP, unrestricted guest, INVPCID, XSAVES.
        set(field::PIN_CONTROLS, controls(0x48d, NMI_EXITING | VIRTUAL_NMIS));
        set(field::FIRST_CONTROLS, controls(0x48e, 1 << 25 | 1 << 28 | 1 << 31));
        set(
            field::SECOND_CONTROLS,
            controls(0x48b, 1 << 1 | 1 << 3 | 1 << 7 | 1 << 12 | 1 << 20),
        );
        // 64-bit host; PAT and EFER stored and loaded.
        set(field::EXIT_CONTROLS, controls(0x48f, 1 << 2 | 1 << 9 | 0xf << 18));
        set(
            field::ENTRY_CONTROLS,
            controls(0x490, 1 << 2 | 1 << 9 | 1 << 14 | 1 << 15),
        );
        for field in field::ZERO {
            set(field, 0);
        }
        set(field::LINK, u64::MAX);
        set(field::EXTENDED_PAGES, extended_pages() | 6 | 3 << 3);
        guest(entry, capability(0x486));
        host([cr0, cr3, cr4]);
        Vmx { again: false }
    }
}

/// The guest's state: ES, CS, SS, DS, FS, GS, LDTR and TR, then the rest.
fn guest(entry: &Entry, fixed: u64) {
    const DATA: (u64, u64) = (0x18, 0xc093);
    const NONE: (u64, u64) = (0, 0x1_0000);
    let segments = [DATA, (0x10, 0xa09b), DATA, DATA, NONE, NONE, NONE, (0x20, 0x8b)];
    for (i, (selector, rights)) in (0..).step_by(2).zip(segments) {
        set(0x800 + i, selector);
        set(0x4800 + i, if i == 14 { 0x67 } else { 0xffff_ffff });
        set(0x4814 + i, rights);
        set(0x6806 + i, 0);
    }
    // The guest owns all but CR0.NE and CR4.VMXE: PE and PG may be 0 in it.
    let fixed = fixed & !0x8000_0001;
    for (field, value) in [
        (field::EFER, 0x500),
        (field::PAT, 0x0007_0406_0007_0406),
        (field::CR0, 0x8000_0033 | fixed),
        (field::CR0_KEPT, fixed),
        (field::CR0_SHOWN, 0x8000_0033),
        (field::CR3, entry.cr3),
        (field::CR4, 0x20 | VMXE),
        (field::CR4_KEPT, VMXE),
        (field::RIP, entry.rip),
        // DR7, RFLAGS.
        (0x681a, 0x400),
        (0x6820, 2),
    ] {
        set(field, value);
    }
}

/// The host's state after an exit: as it is now. RSP and RIP `boot.s` sets.
fn host([cr0, cr3, cr4]: [u64; 3]) {
    let mut table = [0_u8; 10];
    // SAFETY: stores ten bytes.
    unsafe { asm!("sidt [{}]", in(reg) &mut table) }
    let idt = u64::from_le_bytes(core::array::from_fn(|i| table[2 + i]));
    // ES, CS, SS, DS, FS, GS, and a TR that nothing uses and that must not be 0.
    for (field, selector) in (0xc00..).step_by(2).zip([16, 8, 16, 16, 0, 0, 0x18]) {
        set(field, selector);
    }
    for (field, value) in [
        (field::HOST_PAT, rdmsr(PAT).expect("PAT")),
        (field::HOST_EFER, rdmsr(EFER).expect("EFER")),
        (0x6c00, cr0),
        (0x6c02, cr3),
        (0x6c04, cr4),
        (0x6c0c, (&raw const gdt) as u64),
        (0x6c0e, idt),
    ] {
        set(field, value);
    }
    // SYSENTER, and the bases of FS, GS and TR.
    for field in [0x4c00, 0x6c06, 0x6c08, 0x6c0a, 0x6c10, 0x6c12] {
        set(field, 0);
    }
}

impl Processor for Vmx {
    fn set_bitmap(&mut self, address: u64) {
        set(field::BITMAP, address);
    }

    fn enter(&mut self, registers: &mut Registers) -> Exit {
        // SAFETY: the control structure is whole, its extended pages keep the image from the guest, and nothing refers to
        // `registers` meanwhile but this call.
        let failed = unsafe { enter_vmx(self.again.into(), registers) };
        assert!(failed == 0, "VM entry: error {}", get(field::ERROR));
        self.again = true;
        set(field::INJECT, 0);
        match get(field::EXIT_REASON) {
            // Nothing but NMIs: no exception makes this guest leave.
            0 => {
                // SAFETY: comes to `on_nmi`, which returns by IRET: until then further ones would be held back.
                unsafe { asm!("int 2") }
                Exit::Nmi
            }
            31 => Exit::Msr(Op::Read),
            32 => Exit::Msr(Op::Write),
            10 => Exit::Cpuid,
            30 => Exit::Port {
                write: get(field::QUALIFICATION) & 8 == 0,
            },
            55 => Exit::Xsetbv,
            // INVD, which the guest does not miss.
            13 => Exit::Nothing,
            18..=27 | 50 | 53 => Exit::Undefined,
            reason => Exit::Unexpected {
                reason,
                details: [get(field::QUALIFICATION), get(field::GUEST_PHYSICAL)],
                rip: get(field::RIP),
            },
        }
    }

    fn skip(&mut self) {
        set(field::RIP, get(field::RIP) + get(field::LENGTH));
        // No shadow of STI or MOV SS lasts over an instruction.
        set(field::SHADOW, get(field::SHADOW) & !3);
    }

    fn inject(&mut self, event: Event) {
        set(field::INJECT, event.word());
        set(field::INJECT_CODE, 0);
    }

    fn held(&self, msr: u32) -> Option<u64> {
        match msr {
            EFER => Some(get(field::EFER)),
            PAT => Some(get(field::PAT)),
            _ => sysenter(msr).map(get),
        }
    }

    fn hold(&mut self, msr: u32, value: u64) -> Option<()> {
        let (field, value) = match msr {
            // LMA follows LME and CR0.PG, not the guest.
            EFER => (field::EFER, value & !LMA | get(field::EFER) & LMA),
            PAT => (field::PAT, value),
            _ => (sysenter(msr)?, value),
        };
        set(field, value);
        Some(())
    }

    fn cr4(&self) -> u64 {
        get(field::CR4)
    }
}

/// The field that holds the guest's IA32_SYSENTER_CS, ESP or EIP, or its FS or GS base.
fn sysenter(msr: u32) -> Option<u64> {
    Some(match msr {
        0x174 => 0x482a,
        0x175 => 0x6824,
        0x176 => 0x6826,
        0xc000_0100 => 0x680e,
        0xc000_0101 => 0x6810,
        _ => return None,
    })
}

/// 4 GiB at their own addresses, in pages of 2 MiB, but for the hypervisor.
fn extended_pages() -> u64 {
    let (root, gigabytes, pages) = (Pages::<1>::new(), Pages::<1>::new(), Pages::<4>::new());
    map_all_but(&memory::image(), pages.words(), 0xb7);
    for (page, entry) in (pages.address()..).step_by(4096).zip(&mut gigabytes.words()[..4]) {
        *entry = page | 7;
    }
    root.words()[0] = gigabytes.address() | 7;
    root.address()
}
