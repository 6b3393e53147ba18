//! SVM: the control block (AMD APM vol. 2, appendix B), nested pages, ports.
//!
//! The hardware keeps most of the guest's state in its own registers while the hypervisor runs: FS, GS, TR, LDTR and the MSRs of
//! SYSCALL and SYSENTER are loaded by the guest, and the hypervisor, which uses none of them, leaves them there. So RDMSR of one of
//! them gives the guest's. Interrupts are the guest's too: GIF stays 0 while the hypervisor runs, and they wait.

#![expect(unsafe_code, reason = "the instructions of SVM")]

use core::arch::asm;
use core::arch::x86_64::__cpuid;

use msrgate_core::Op;

use crate::linux::Entry;
use crate::machine::{rdmsr, wrmsr};
use crate::memory;
use crate::processor::{Event, Exit, Pages, Processor, Registers, intercept_port, map_all_but};

unsafe extern "sysv64" {
    fn enter_svm(vmcb: u64, registers: *mut Registers);
}

/// Byte offsets in the control block.
mod at {
    /// Exceptions, and from the upper half on the instructions of the third word.
    pub(super) const INTERCEPT_3: usize = 0x8;
    pub(super) const INTERCEPT_4: usize = 0x10;
    pub(super) const IOPM: usize = 0x40;
    pub(super) const MSRPM: usize = 0x48;
    pub(super) const ASID: usize = 0x58;
    pub(super) const SHADOW: usize = 0x68;
    pub(super) const EXIT_CODE: usize = 0x70;
    pub(super) const EXIT_INFO_1: usize = 0x78;
    pub(super) const EXIT_INFO_2: usize = 0x80;
    pub(super) const NESTED: usize = 0x90;
    pub(super) const INJECT: usize = 0xa8;
    pub(super) const NESTED_CR3: usize = 0xb0;
    pub(super) const NEXT_RIP: usize = 0xc8;
    pub(super) const ES: usize = 0x400;
    pub(super) const CS: usize = 0x410;
    pub(super) const SS: usize = 0x420;
    pub(super) const DS: usize = 0x430;
    pub(super) const LDTR: usize = 0x470;
    pub(super) const TR: usize = 0x490;
    pub(super) const EFER: usize = 0x4d0;
    pub(super) const CR4: usize = 0x548;
    pub(super) const CR3: usize = 0x550;
    pub(super) const CR0: usize = 0x558;
    pub(super) const DR7: usize = 0x560;
    pub(super) const DR6: usize = 0x568;
    pub(super) const RFLAGS: usize = 0x570;
    pub(super) const RIP: usize = 0x578;
    pub(super) const RAX: usize = 0x5f8;
    pub(super) const PAT: usize = 0x668;
}

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;
const SVME: u64 = 1 << 12;
const LMA: u64 = 1 << 10;

/// A processor in SVM's host mode.
pub(crate) struct Svm {
    vmcb: &'static mut Pages<1>,
    /// Whether the hardware says where the next instruction is.
    next_rip_saved: bool,
    /// RIP after the instruction that left the guest.
    next: u64,
}

impl Svm {
    /// Turns SVM on, with a guest that is about to start at `entry`; `port` is the power-off port.
    pub(crate) fn new(entry: &Entry, port: u16) -> Svm {
        let efer = rdmsr(EFER).expect("EFER");
        wrmsr(EFER, efer | SVME).expect("SVM is there and the firmware allows it");
        wrmsr(0xc001_0117, Pages::<1>::new().address()).expect("VM_HSAVE_PA");
        let mut svm = Svm {
            vmcb: Pages::new(),
            next_rip_saved: __cpuid(0x8000_000a).edx & 1 << 3 != 0,
            next: 0,
        };
        // NMI; CPUID, INVD no, ports, MSRs, shutdown.
        svm.set(at::INTERCEPT_3, (1 << 1 | 1 << 18 | 1 << 27 | 1 << 28 | 1 << 31) << 32);
        // VMRUN and its kin.
        svm.set(at::INTERCEPT_4, 0x7f);
        svm.set(at::IOPM, ports(port));
        svm.set(at::ASID, 1);
        svm.set(at::NESTED, 1);
        svm.set(at::NESTED_CR3, nested_pages());
        svm.segment(at::CS, 0x10, 0xa9b, 0xffff_ffff);
        for segment in [at::DS, at::ES, at::SS] {
            svm.segment(segment, 0x18, 0xc93, 0xffff_ffff);
        }
        svm.segment(at::TR, 0, 0x8b, 0x67);
        svm.segment(at::LDTR, 0, 0x82, 0);
        let state = [
            (at::EFER, SVME | 0x500),
            (at::CR0, 0x8000_0033),
            (at::CR3, entry.cr3),
            (at::CR4, 0x20),
            (at::DR6, 0xffff_0ff0),
            (at::DR7, 0x400),
            (at::RFLAGS, 2),
            (at::RIP, entry.rip),
            (at::PAT, 0x0007_0406_0007_0406),
        ];
        for (offset, value) in state {
            svm.set(offset, value);
        }
        // SAFETY: the control block is whole, and what VMLOAD loads the hypervisor does not use: FS, GS, TR, LDTR, SYSCALL.
        unsafe { asm!("clgi", "vmload rax", in("rax") svm.vmcb.address()) }
        svm
    }

    fn get(&self, offset: usize) -> u64 {
        self.vmcb.0[0][offset / 8]
    }

    fn set(&mut self, offset: usize, value: u64) {
        self.vmcb.0[0][offset / 8] = value;
    }

    fn segment(&mut self, offset: usize, selector: u64, attributes: u64, limit: u64) {
        self.set(offset, selector | attributes << 16 | limit << 32);
    }
}

impl Processor for Svm {
    fn set_bitmap(&mut self, address: u64) {
        self.set(at::MSRPM, address);
    }

    fn enter(&mut self, registers: &mut Registers) -> Exit {
        self.set(at::RAX, registers.rax);
        let vmcb = (&raw mut self.vmcb.0).expose_provenance() as u64;
        // SAFETY: the control block is whole, its nested pages keep the image from the guest, and nothing refers to it or to
        // `registers` meanwhile but this call.
        unsafe { enter_svm(vmcb, registers) }
        registers.rax = self.get(at::RAX);
        self.set(at::INJECT, 0);
        let rip = self.get(at::RIP);
        // Without NRIPS: all of these are two bytes long where nobody puts a prefix before them, and no compiler does.
        self.next = if self.next_rip_saved {
            self.get(at::NEXT_RIP)
        } else {
            rip + 2
        };
        let info = self.get(at::EXIT_INFO_1);
        match self.get(at::EXIT_CODE) {
            0x7c if info & 1 == 0 => Exit::Msr(Op::Read),
            0x7c => Exit::Msr(Op::Write),
            0x72 => Exit::Cpuid,
            0x61 => {
                // SAFETY: the NMI still waits; it comes to `on_nmi` between the two, which returns.
                unsafe { asm!("stgi", "nop", "clgi") }
                Exit::Nmi
            }
            0x7b => {
                self.next = self.get(at::EXIT_INFO_2);
                Exit::Port { write: info & 1 == 0 }
            }
            0x80..=0x86 => Exit::Undefined,
            reason => Exit::Unexpected {
                reason,
                details: [info, self.get(at::EXIT_INFO_2)],
                rip,
            },
        }
    }

    fn skip(&mut self) {
        self.set(at::RIP, self.next);
        // No shadow of STI or MOV SS lasts over an instruction.
        self.set(at::SHADOW, 0);
    }

    fn inject(&mut self, event: Event) {
        self.set(at::INJECT, event.word());
    }

    fn held(&self, msr: u32) -> Option<u64> {
        match msr {
            EFER => Some(self.get(at::EFER) & !SVME),
            PAT => Some(self.get(at::PAT)),
            _ => None,
        }
    }

    fn hold(&mut self, msr: u32, value: u64) -> Option<()> {
        match msr {
            // LMA follows LME and CR0.PG, not the guest.
            EFER => self.set(at::EFER, value & !LMA | self.get(at::EFER) & LMA | SVME),
            PAT => self.set(at::PAT, value),
            _ => return None,
        }
        Some(())
    }

    fn cr4(&self) -> u64 {
        self.get(at::CR4)
    }
}

/// 512 GiB at their own addresses, in pages of 1 GiB, but for the first, where the hypervisor is.
fn nested_pages() -> u64 {
    let (root, gigabytes, first) = (Pages::<1>::new(), Pages::<1>::new(), Pages::<1>::new());
    map_all_but(&memory::image(), first.words(), 0x87);
    for (address, entry) in (0..).step_by(1 << 30).zip(gigabytes.words()) {
        *entry = address | 0x87;
    }
    gigabytes.words()[0] = first.address() | 7;
    root.words()[0] = gigabytes.address() | 7;
    root.address()
}

fn ports(port: u16) -> u64 {
    let map = Pages::<3>::new();
    intercept_port(map.words(), port);
    map.address()
}
