//! The machine itself: ports, the second serial line, MSRs that may not be there, exceptions, other processors' interrupts.

#![expect(unsafe_code, reason = "instructions that Rust has no word for")]

use core::arch::{asm, global_asm};
use core::fmt;
use core::panic::PanicInfo;

use crate::memory;

global_asm!(include_str!("boot.s"));

unsafe extern "sysv64" {
    fn try_rdmsr(msr: u32, value: *mut u64) -> u32;
    fn try_wrmsr(msr: u32, value: u64) -> u32;
    fn on_gp();
    fn on_nmi();
    fn on_other();
}

/// SLP_EN of ACPI's PM1 control register: what is written with it turns the machine off.
pub(crate) const SLEEP: u16 = 1 << 13;

/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;

/// An MSR of this processor; `None` where RDMSR faults.
pub(crate) fn rdmsr(msr: u32) -> Option<u64> {
    let mut value = 0;
    // SAFETY: writes `value` alone, and a fault comes back as 1 (`on_gp` in `boot.s`).
    (unsafe { try_rdmsr(msr, &mut value) } == 0).then_some(value)
}

/// Writes an MSR of this processor; `None` where WRMSR faults. What the guest may do here is the policy's word.
pub(crate) fn wrmsr(msr: u32, value: u64) -> Option<()> {
    // SAFETY: what the hypervisor itself runs by (EFER, PAT, VM_CR, VM_HSAVE_PA) `msrs.rs` keeps from the guest; the image is
    // mapped at fixed addresses, whatever else an MSR says.
    (unsafe { try_wrmsr(msr, value) } == 0).then_some(())
}

/// Writes a byte to a port.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: ports are no memory; those that start DMA are not used here.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes 16 bits to a port.
pub(crate) fn outw(port: u16, value: u16) {
    // SAFETY: likewise.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Reads a byte from a port.
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: likewise.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Reads 16 bits from a port.
pub(crate) fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: likewise.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) }
    value
}

/// The time stamp counter.
fn rdtsc() -> u64 {
    // SAFETY: every 64-bit processor has it, and the hypervisor runs at CPL 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits.
pub(crate) fn pause(cycles: u64) {
    let start = rdtsc();
    while rdtsc() - start < cycles {
        core::hint::spin_loop();
    }
}

/// Gives the guest the processor state that it asks for. A guest that asks for what is not there never comes here: XSETBV
/// faults before it exits.
pub(crate) fn xsetbv(xcr: u32, value: u64) {
    // SAFETY: the hypervisor uses no state but x87 and SSE, which cannot be turned off.
    unsafe { asm!("xsetbv", in("ecx") xcr, in("eax") value as u32, in("edx") (value >> 32) as u32) }
}

/// Ends this processor's work.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off it waits for good.
        unsafe { asm!("cli", "hlt") }
    }
}

/// The second serial port: the first is the guest's.
pub(crate) struct Serial;

const COM2: u16 = 0x2f8;

impl Serial {
    /// 115200 baud, 8N1, FIFOs on, no interrupts.
    pub(crate) fn set_up() {
        for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7)] {
            outb(COM2 + offset, value);
        }
    }

    /// Waits until all is sent: what still waits is lost when the machine is turned off.
    pub(crate) fn flush(&self) {
        while inb(COM2 + 5) & 0x40 == 0 {
            core::hint::spin_loop();
        }
    }

    /// Sends bytes.
    pub(crate) fn send(&self, bytes: &[u8]) {
        for byte in bytes {
            while inb(COM2 + 5) & 0x20 == 0 {
                core::hint::spin_loop();
            }
            outb(COM2, *byte);
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.send(text.as_bytes());
        Ok(())
    }
}

/// A line on the second serial port.
#[macro_export]
macro_rules! say {
    ($($word:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::machine::Serial, $($word)*);
    }};
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("{info}\nhalted");
    Serial.flush();
    // A reset, by the keyboard's controller: whoever waits for the machine is not to wait for good.
    outb(0x64, 0xfe);
    halt()
}

/// Where `boot.s` ends up for an exception that nobody guards against.
#[unsafe(no_mangle)]
extern "sysv64" fn fatal_exception(vector: u64, rip: u64, error: u64) -> ! {
    panic!("exception {vector} at {rip:#x}, error {error:#x}")
}

/// One table for all processors; made once, before the second one starts.
static IDT: spin::Once<[[u64; 2]; 32]> = spin::Once::new();

/// Points this processor's exceptions to `boot.s`.
pub(crate) fn catch_faults() {
    let table = IDT.call_once(|| {
        core::array::from_fn(|vector| {
            let handler = match vector {
                2 => on_nmi as *const () as u64,
                13 => on_gp as *const () as u64,
                _ => on_other as *const () as u64,
            };
            let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            [low, handler >> 32]
        })
    });
    let mut pointer = [0; 10];
    pointer[..2].copy_from_slice(&511_u16.to_le_bytes());
    pointer[2..].copy_from_slice(&(table.as_ptr() as u64).to_le_bytes());
    // SAFETY: the table is static and holds handlers of `boot.s` that keep all registers or do not return.
    unsafe { asm!("lidt [{}]", in(reg) &pointer) }
}

/// Sends INIT, start-up or NMI to a processor. The guest may be between the two halves of a command of its own, which is
/// left as it was.
pub(crate) fn interprocessor(id: u32, command: u32) {
    const X2APIC: u64 = 1 << 10;
    let base = rdmsr(APIC_BASE).unwrap_or(0);
    if base & X2APIC != 0 {
        wrmsr(0x830, u64::from(id) << 32 | u64::from(command));
        return;
    }
    let apic = base & 0xf_ffff_f000;
    let idle = || while memory::register(apic + 0x300) & 1 << 12 != 0 {};
    let high = memory::register(apic + 0x310);
    idle();
    memory::set_register(apic + 0x310, id << 24);
    memory::set_register(apic + 0x300, command);
    idle();
    memory::set_register(apic + 0x310, high);
}
