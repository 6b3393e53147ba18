//! The guest's memory.
//!
//! | address | is |
//! | --- | --- |
//! | 0 – up to 3 GiB | nothing: where KVM writes when a guest tells it to (clock, steal time, …); backed only where touched |
//! | [`REAL_CODE`], one page | the real-mode program; the guest and KVM cannot write it |
//! | [`SYSTEM`] | descriptor tables, page tables, the 64-bit program |
//! | [`WINDOWS`] | for each vCPU its table of accesses and its stack |
//!
//! Real-mode code must lie where a segment reaches that a selector can name, which is below 0x10fff0; the rest is where no recorded guest keeps
//! its data.

#![expect(unsafe_code, reason = "maps memory and hands it to KVM")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::code::Program;

/// The largest selector whose lowest four bits are clear: its segment starts at 0xfff00. Bochs refuses to enter a guest
/// in real mode whose code selector has a privilege level other than 0 in them.
pub(crate) const REAL_SELECTOR: u16 = 0xfff0;
const REAL_BASE: u64 = (REAL_SELECTOR as u64) << 4;
/// The page of the real-mode program.
const REAL_CODE: u64 = 0x10_f000;
/// The offset of that page in the segment.
pub(crate) const REAL_IP: u16 = (REAL_CODE - REAL_BASE) as u16;

/// Tables and the 64-bit program.
const SYSTEM: u64 = 0xd000_0000;
/// The interrupt vector table of real mode.
pub(crate) const IVT: u64 = SYSTEM;
/// The interrupt descriptor table of long mode.
pub(crate) const IDT: u64 = SYSTEM + 0x1000;
/// The global descriptor table.
pub(crate) const GDT: u64 = SYSTEM + 0x2000;
/// The page-map level-4 table.
pub(crate) const PML4: u64 = SYSTEM + 0x3000;
const PDPT: u64 = SYSTEM + 0x4000;
const PAGE_DIRECTORY: u64 = SYSTEM + 0x5000;
/// The 64-bit program.
pub(crate) const LONG_CODE: u64 = SYSTEM + 0x6000;
/// The first vCPU's window.
const WINDOWS: u64 = SYSTEM + 0x1_0000;
/// Bytes from one vCPU's window to the next: the table and the stack.
const WINDOW: u64 = 0x1_1000;
/// Bytes of a table: what a real-mode segment spans.
const TABLE: u64 = 0x1_0000;
/// Bytes of a table's head, and of an entry.
const ENTRY: usize = 16;

/// The most entries of one table.
pub(crate) const MAX_ENTRIES: usize = TABLE as usize / ENTRY - 1;
/// The most vCPUs whose windows the page directory maps.
pub(crate) const MAX_VCPUS: usize = 256;

/// What low memory may be at most.
const LOW_MOST: u64 = 3 << 30;
/// And at least, where there is little to be had.
const LOW_LEAST: u64 = 16 << 20;
/// Bytes of a page.
const PAGE: u64 = 0x1000;

const _: () = assert!(WINDOWS + MAX_VCPUS as u64 * WINDOW < 0xe000_0000);

/// Where the table of vCPU `vcpu` lies in the guest.
pub(crate) fn table_address(vcpu: usize) -> u64 {
    WINDOWS + vcpu as u64 * WINDOW
}

/// Where its stack starts: the page behind the table.
pub(crate) fn stack_address(vcpu: usize) -> u64 {
    table_address(vcpu) + TABLE
}

/// Bytes of a stack.
pub(crate) const STACK: u64 = WINDOW - TABLE;

/// Pages from the kernel, backed only where touched, and given back when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an owned range of addresses, which belongs to no thread; who writes where is up to `Memory` and `Table`.
unsafe impl Send for Mapping {}
// SAFETY: likewise; the type itself reads and writes nothing.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: u64) -> io::Result<Mapping> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new private mapping at an address of the kernel's choice, which overlaps nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len })
    }

    /// Where `len` bytes at `offset` lie; `None` where they are not all inside.
    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset` is within the mapping, by the line above, so the result is in the same object.
        Some(unsafe { self.start.add(offset) })
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `at` found `bytes.len()` bytes there, which are mapped for writing; `bytes` is a borrow of other
        // memory, since no reference into the mapping is ever made. No vCPU runs while the guest is being set up.
        unsafe { to.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Some(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and this is its whole length; `Memory` has taken it from the VM before.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The memory slots of a VM.
#[derive(Clone, Copy)]
enum Slot {
    Low = 0,
    RealCode = 1,
    High = 2,
    System = 3,
}

impl Slot {
    const ALL: [Slot; 4] = [Slot::Low, Slot::RealCode, Slot::High, Slot::System];
}

/// The guest's memory, mapped here and in the VM.
#[derive(Debug)]
pub(crate) struct Memory {
    low: Mapping,
    system: Arc<Mapping>,
}

impl Memory {
    /// Maps memory for `vcpus` vCPUs into `vm`: all that can be had of low memory.
    pub(crate) fn new(vm: &VmFd, vcpus: usize) -> io::Result<Memory> {
        let system = Mapping::new(WINDOWS - SYSTEM + vcpus as u64 * WINDOW)?;
        let mut bytes = LOW_MOST;
        let low = loop {
            match Memory::low(vm, bytes) {
                Ok(low) => break low,
                Err(_) if bytes > LOW_LEAST => bytes = (bytes / 2).next_multiple_of(PAGE),
                Err(error) => return Err(error),
            }
        };
        map(vm, Slot::System, SYSTEM, &system, 0, system.len as u64)?;
        let memory = Memory {
            low,
            system: Arc::new(system),
        };
        memory.fill().ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(memory)
    }

    fn low(vm: &VmFd, bytes: u64) -> io::Result<Mapping> {
        let low = Mapping::new(bytes)?;
        let behind = REAL_CODE + PAGE;
        // The largest first, since it is the one that may fail, and then nothing has to be undone.
        map(vm, Slot::High, behind, &low, behind, bytes - behind)?;
        map(vm, Slot::Low, 0, &low, 0, REAL_CODE)?;
        map(vm, Slot::RealCode, REAL_CODE, &low, REAL_CODE, PAGE)?;
        Ok(low)
    }

    /// Takes the memory from the VM: other descriptors of it may outlive the mappings.
    pub(crate) fn unmap(&self, vm: &VmFd) {
        for slot in Slot::ALL {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                ..Default::default()
            };
            // SAFETY: a slot of size 0 hands over no memory; it takes the slot's away.
            let _ = unsafe { vm.set_user_memory_region(region) };
        }
    }

    /// The table of one vCPU.
    pub(crate) fn table(&self, vcpu: usize) -> Option<Table> {
        let offset = (table_address(vcpu) - SYSTEM) as usize;
        self.system.at(offset, TABLE as usize)?;
        Some(Table {
            system: Arc::clone(&self.system),
            offset,
        })
    }

    /// Programs and tables.
    fn fill(&self) -> Option<()> {
        let real = Program::real();
        self.low.write(REAL_CODE as usize, real.bytes)?;
        let write = |address: u64, bytes: &[u8]| self.system.write((address - SYSTEM) as usize, bytes);
        let long = Program::long();
        write(LONG_CODE, long.bytes)?;
        for vector in 0..256 {
            let handler = |program: Program| match vector {
                2 => program.nmi,
                13 => program.gp,
                _ => program.exception,
            };
            let ip = REAL_IP + handler(real);
            write(IVT + vector * 4, &ip.to_le_bytes())?;
            write(IVT + vector * 4 + 2, &REAL_SELECTOR.to_le_bytes())?;
            write(IDT + vector * 16, &gate(LONG_CODE + u64::from(handler(long))))?;
        }
        // Null, 64-bit code, data; marked as accessed, so that the processor has nothing to write.
        for (entry, address) in [0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff]
            .iter()
            .zip((GDT..).step_by(8))
        {
            write(address, &entry.to_le_bytes())?;
        }
        // Present, writable, accessed.
        const TABLE_BITS: u64 = 0x23;
        // And dirty, 2 MiB.
        const PAGE_BITS: u64 = 0xe3;
        write(PML4, &(PDPT | TABLE_BITS).to_le_bytes())?;
        write(PDPT + 3 * 8, &(PAGE_DIRECTORY | TABLE_BITS).to_le_bytes())?;
        // The eighth of the fourth gigabyte in which `SYSTEM` and the windows lie, each address at itself.
        for index in 128..256 {
            let page = (3 << 30) + (index << 21);
            write(PAGE_DIRECTORY + index * 8, &(page | PAGE_BITS).to_le_bytes())?;
        }
        Some(())
    }
}

/// A 64-bit interrupt gate to the code segment at selector 8.
fn gate(handler: u64) -> [u8; 16] {
    let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    (u128::from(low) | u128::from(handler >> 32) << 64).to_le_bytes()
}

fn map(vm: &VmFd, slot: Slot, address: u64, mapping: &Mapping, offset: u64, bytes: u64) -> io::Result<()> {
    let start = mapping
        .at(offset as usize, bytes as usize)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let region = kvm_userspace_memory_region {
        slot: slot as u32,
        flags: if matches!(slot, Slot::RealCode) {
            KVM_MEM_READONLY
        } else {
            0
        },
        guest_phys_addr: address,
        memory_size: bytes,
        userspace_addr: start.as_ptr().addr() as u64,
    };
    // SAFETY: `bytes` bytes at `start` are mapped, by `at`, and belong to the guest alone: this program touches them by
    // raw pointer only. The slot is taken from the VM, by `unmap` or by destroying a VM that never ran, before they are
    // unmapped.
    unsafe { vm.set_user_memory_region(region) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// An entry of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(crate) struct Entry {
    pub(crate) msr: u32,
    pub(crate) op: u16,
    pub(crate) done: u16,
    pub(crate) eax: u32,
    pub(crate) edx: u32,
}

const _: () = assert!(size_of::<Entry>() == ENTRY);

/// One vCPU's table of accesses. Only the vCPU and who runs it touch it, and never both at once.
#[derive(Debug)]
pub(crate) struct Table {
    system: Arc<Mapping>,
    offset: usize,
}

impl Table {
    fn entry(&self, index: usize) -> Option<NonNull<Entry>> {
        if index >= MAX_ENTRIES {
            return None;
        }
        Some(self.system.at(self.offset + (index + 1) * ENTRY, ENTRY)?.cast())
    }

    /// How many entries the guest is to go through.
    pub(crate) fn set_len(&mut self, entries: u16) {
        let Some(head) = self.system.at(self.offset, ENTRY) else {
            return;
        };
        // SAFETY: the head is within the mapping, by `at`, and aligned, since tables start at a page; no vCPU that uses
        // it runs, since it is the caller who runs it.
        unsafe { head.cast::<u32>().as_ptr().write_volatile(u32::from(entries)) };
    }

    pub(crate) fn set(&mut self, index: usize, entry: Entry) {
        if let Some(place) = self.entry(index) {
            // SAFETY: as in `set_len`; entries are 16 bytes from one another.
            unsafe { place.as_ptr().write_volatile(entry) };
        }
    }

    pub(crate) fn get(&self, index: usize) -> Option<Entry> {
        let place = self.entry(index)?;
        // SAFETY: as in `set`; an entry is made of integers, for which all bits are values.
        Some(unsafe { place.as_ptr().read_volatile() })
    }
}
