//! Linux's 64-bit boot protocol ("The Linux/x86 Boot Protocol"), from what QEMU (PVH) or GRUB (Multiboot 2) gives; and what ACPI
//! says of the machine: its processors, and the port that turns it off.
//!
//! Linux starts other processors by INIT and start-up IPIs, which SVM cannot hold back and which would drop a processor out of
//! the guest. So the hypervisor starts them itself, and each waits within the guest for a word in a mailbox: a copy of ACPI's
//! tables tells Linux so ("Multiprocessor Wakeup Structure").

#![expect(unsafe_code, reason = "labels of boot.s")]

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use crate::memory::{self, clear, copy, read, write};

/// What the guest is kept from of its own memory: what follows, down to `TABLES_OF_ACPI`.
const KEPT: Range<u64> = 0x1_0000..0x1_8000;
const BOOT_PARAMS: u64 = 0x1_0000;
const PAGE_TABLES: u64 = 0x1_1000;
const COMMAND_LINE: u64 = 0x1_3000;
/// Code of `boot.s` that the guest executes.
const STUB: u64 = 0x1_4000;
const MAILBOX: u64 = 0x1_5000;
const TABLES_OF_ACPI: u64 = 0x1_6000;
/// Where Linux lies and starts if it comes as an ELF.
const LINUX: u64 = 0x100_0000;
/// Where the initial file system goes that GRUB left in Linux's way.
const INITRD: u64 = 0x1000_0000;

/// Where a processor of the guest starts.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) rip: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) cr3: u64,
}

/// What is to be booted, and on what.
pub(crate) struct Boot {
    pub(crate) command_line: String,
    /// Local APIC numbers; the first is the one that runs.
    pub(crate) processors: Vec<u32>,
    /// PM1a_CNT: the power-off port.
    pub(crate) port: u16,
    given: Given,
}

/// From either loader.
struct Given {
    /// A bzImage; none where Linux lies at `LINUX` already.
    image: Option<Range<u64>>,
    initrd: Range<u64>,
    command_line: Vec<u8>,
    rsdp: u64,
    /// Start, size and kind of memory ranges.
    memory: Vec<(u64, u64, u32)>,
}

/// Reads what the loader gave. Nothing of memory is changed yet.
pub(crate) fn find(info: u64) -> Boot {
    const PVH: u32 = 0x336e_c578;
    let given = if memory::u32(info) == PVH {
        from_pvh(info)
    } else {
        from_multiboot(info)
    };
    let text = given.command_line.split(|byte| *byte == 0).next().unwrap_or_default();
    let (processors, port) = machine(given.rsdp);
    Boot {
        command_line: String::from_utf8_lossy(text).into_owned(),
        processors,
        port,
        given,
    }
}

fn text(address: u64) -> Vec<u8> {
    let mut text: Vec<u8> = (address..)
        .map(memory::u8)
        .take(2047)
        .take_while(|byte| *byte != 0)
        .collect();
    text.push(0);
    text
}

fn range(at: u64) -> (u64, u64, u32) {
    (memory::u64(at), memory::u64(at + 8), memory::u32(at + 16))
}

/// `struct hvm_start_info`.
fn from_pvh(info: u64) -> Given {
    let modules = memory::u64(info + 16);
    let initrd = match memory::u32(info + 12) {
        0 => 0..0,
        _ => memory::u64(modules)..memory::u64(modules) + memory::u64(modules + 8),
    };
    let map = memory::u64(info + 40);
    let ranges = u64::from(memory::u32(info + 48));
    Given {
        image: None,
        initrd,
        command_line: text(memory::u64(info + 24)),
        rsdp: memory::u64(info + 32),
        memory: (0..ranges).map(|i| range(map + 24 * i)).collect(),
    }
}

/// Multiboot 2's tags. The modules are Linux as a bzImage and the initial file system.
fn from_multiboot(info: u64) -> Given {
    let mut given = Given {
        image: None,
        initrd: 0..0,
        command_line: Vec::from([0]),
        rsdp: 0,
        memory: Vec::new(),
    };
    let mut tag = info + 8;
    while memory::u32(tag) != 0 {
        let end = tag + u64::from(memory::u32(tag + 4));
        match memory::u32(tag) {
            1 => given.command_line = text(tag + 8),
            3 => {
                let [start, end] = [8, 12].map(|at| u64::from(memory::u32(tag + at)));
                match given.image {
                    None => given.image = Some(start..end),
                    Some(_) => given.initrd = start..end,
                }
            }
            6 => given.memory = (tag + 16..end).step_by(24).map(range).collect(),
            14 | 15 => given.rsdp = tag + 8,
            _ => {}
        }
        tag = end.next_multiple_of(8);
    }
    given
}

/// The addresses of ACPI's tables, and where each stands in the root table.
fn tables(rsdp: u64) -> impl Iterator<Item = (u64, u64)> {
    let root = u64::from(memory::u32(rsdp + 16));
    let entries = (root + 36..root + u64::from(memory::u32(root + 4))).step_by(4);
    entries.map(move |entry| (u64::from(memory::u32(entry)), entry - root))
}

/// Processors and power-off port.
fn machine(rsdp: u64) -> (Vec<u32>, u16) {
    let (mut processors, mut port) = (Vec::new(), 0);
    for (table, _) in tables(rsdp) {
        let end = table + u64::from(memory::u32(table + 4));
        match &read(table) {
            b"FACP" => port = memory::u16(table + 64),
            b"APIC" => {
                let mut entry = table + 44;
                while entry < end {
                    let [kind, size, _, id, enabled] = read(entry);
                    if kind == 0 && enabled & 1 == 1 {
                        processors.push(id.into());
                    }
                    entry += u64::from(size);
                }
            }
            _ => {}
        }
    }
    (processors, port)
}

/// Copies ACPI's tables with a mailbox in them. Gives the copy's root.
fn with_mailbox(rsdp: u64) -> u64 {
    let (root, list, madt) = (TABLES_OF_ACPI, TABLES_OF_ACPI + 64, TABLES_OF_ACPI + 1024);
    let old = u64::from(memory::u32(rsdp + 16));
    copy(rsdp, root, 20);
    copy(old, list, memory::u32(old + 4).into());
    write(root + 16, &(list as u32).to_le_bytes());
    for (table, entry) in tables(rsdp) {
        if &read(table) == b"APIC" {
            let size = memory::u32(table + 4);
            copy(table, madt, size.into());
            write(madt + u64::from(size), &[0x10, 16, 0, 0, 0, 0, 0, 0]);
            write(madt + u64::from(size) + 8, &MAILBOX.to_le_bytes());
            write(madt + 4, &(size + 16).to_le_bytes());
            sum_up(madt, size + 16, 9);
            write(list + entry, &(madt as u32).to_le_bytes());
        }
    }
    sum_up(list, memory::u32(list + 4), 9);
    // Revision 0: the copy has no 64-bit root table.
    write(root + 15, &[0]);
    sum_up(root, 20, 8);
    root
}

/// Sets the byte that makes a table's sum 0.
fn sum_up(table: u64, size: u32, at: u64) {
    write(table + at, &[0]);
    let sum = (table..table + u64::from(size)).fold(0_u8, |sum, byte| sum.wrapping_add(memory::u8(byte)));
    write(table + at, &[sum.wrapping_neg()]);
}

unsafe extern "C" {
    static waiting_guest: u8;
    static waiting_guest_end: u8;
    static case_guest: u8;
    static case_guest_end: u8;
}

/// The first 4 GiB at their own addresses: what a guest starts with.
fn page_tables() {
    clear(PAGE_TABLES, 0x2000);
    write(PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes());
    for gigabyte in 0..4_u64 {
        write(
            PAGE_TABLES + 0x1000 + 8 * gigabyte,
            &(gigabyte << 30 | 0x83).to_le_bytes(),
        );
    }
}

/// Where the guest of the cases starts.
pub(crate) fn cases() -> Entry {
    page_tables();
    // SAFETY: labels of boot.s, where code lies.
    let code = unsafe { (&case_guest, &case_guest_end) };
    write(STUB, memory::code(code.0, code.1));
    Entry {
        rip: STUB,
        rsi: 0,
        rdi: 0,
        cr3: PAGE_TABLES,
    }
}

/// Where another processor of the guest waits.
pub(crate) fn waiting(id: u32) -> Entry {
    Entry {
        rip: STUB,
        rsi: MAILBOX,
        rdi: id.into(),
        cr3: PAGE_TABLES,
    }
}

impl Boot {
    /// The first module, in place of Linux, where there is one.
    pub(crate) fn record(&self) -> Option<Range<u64>> {
        self.given.image.clone()
    }

    /// Puts Linux, the initial file system and the boot parameters where they belong. Gives where the guest starts.
    pub(crate) fn place(&self, mailbox: bool) -> Entry {
        let given = &self.given;
        let mut initrd = given.initrd.clone();
        // All that is to be copied is known by now, so it does not matter what is overwritten: the file system first, which
        // may lie where Linux goes.
        if given.image.is_some() {
            copy(initrd.start, INITRD, initrd.end - initrd.start);
            initrd = INITRD..INITRD + (initrd.end - initrd.start);
        }
        clear(BOOT_PARAMS, 0x1000);
        let put = |at: u64, bytes: &[u8]| write(BOOT_PARAMS + at, bytes);
        let rip = match &given.image {
            Some(image) => unpack(image.start),
            None => {
                put(0x202, b"HdrS");
                put(0x206, &0x20f_u16.to_le_bytes());
                put(0x1fe, &0xaa55_u16.to_le_bytes());
                put(0x230, &(LINUX as u32).to_le_bytes());
                put(0x238, &2047_u32.to_le_bytes());
                LINUX
            }
        };
        if mailbox {
            // SAFETY: labels of boot.s, where code lies.
            let code = unsafe { (&waiting_guest, &waiting_guest_end) };
            write(STUB, memory::code(code.0, code.1));
            clear(MAILBOX, 0x1000);
            put(0x70, &with_mailbox(given.rsdp).to_le_bytes());
        }
        // A loader without a number, and a kernel that is loaded high.
        put(0x210, &[0xff, 1]);
        put(0x218, &(initrd.start as u32).to_le_bytes());
        put(0x21c, &((initrd.end - initrd.start) as u32).to_le_bytes());
        write(COMMAND_LINE, &given.command_line);
        put(0x228, &(COMMAND_LINE as u32).to_le_bytes());
        let ranges = self.memory();
        for (range, at) in ranges.iter().zip((0x2d0..).step_by(20)) {
            put(at, &range.0.start.to_le_bytes());
            put(at + 8, &(range.0.end - range.0.start).to_le_bytes());
            put(at + 16, &range.1.to_le_bytes());
        }
        put(0x1e8, &[ranges.len() as u8]);
        page_tables();
        Entry {
            rip,
            rsi: BOOT_PARAMS,
            rdi: 0,
            cr3: PAGE_TABLES,
        }
    }

    /// The guest's memory: the machine's, but for what is kept from it.
    fn memory(&self) -> Vec<(Range<u64>, u32)> {
        const RESERVED: u32 = 2;
        let mut ranges = Vec::new();
        for (start, size, kind) in &self.given.memory {
            let (mut start, end) = (*start, start + size);
            for kept in [KEPT, memory::image()] {
                if start <= kept.start && kept.end <= end {
                    ranges.push((start..kept.start, *kind));
                    ranges.push((kept.clone(), RESERVED));
                    start = kept.end;
                }
            }
            ranges.push((start..end, *kind));
        }
        ranges
    }
}

/// A bzImage's protected-mode part to where it wants to be, its header to the boot parameters. Gives its 64-bit entry.
fn unpack(image: u64) -> u64 {
    let sectors = match memory::u8(image + 0x1f1) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (sectors + 1) * 512;
    let size = u64::from(memory::u32(image + 0x1f4)) * 16;
    let preferred = memory::u64(image + 0x258);
    copy(
        image + 0x1f1,
        BOOT_PARAMS + 0x1f1,
        0x11 + u64::from(memory::u8(image + 0x201)),
    );
    copy(image + start, preferred, size);
    preferred + 0x200
}
