//! Memory by its physical address, which is the hypervisor's address for it too (`host_pml4` in `boot.s`).
//!
//! Everything that Rust knows of lies within the image: code, statics, stacks, heap. What is done here to an address outside
//! of it touches no Rust object, and an address inside is refused.

#![expect(unsafe_code, reason = "memory that is no Rust object")]

use alloc::vec::Vec;
use core::ops::Range;

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
}

/// The image, in whole pages of 2 MiB: what the guest is kept from.
pub(crate) fn image() -> Range<u64> {
    (&raw const image_start) as u64..(&raw const image_end) as u64
}

fn outside(address: u64, size: usize) -> *mut u8 {
    let end = address.checked_add(size as u64).expect("an address");
    let image = image();
    assert!(
        end <= image.start || image.end <= address,
        "{address:#x} is the hypervisor's"
    );
    assert!(address > 0 && end <= 512 << 30, "{address:#x} is not mapped");
    core::ptr::with_exposed_provenance_mut(address as usize)
}

/// The bytes at an address.
pub(crate) fn read<const N: usize>(address: u64) -> [u8; N] {
    let from = outside(address, N).cast::<[u8; N]>();
    // SAFETY: `outside` gives an address that is mapped; bytes have no alignment, and any of them is a value.
    unsafe { from.read_volatile() }
}

/// So many bytes from an address on.
pub(crate) fn bytes(address: u64, size: usize) -> Vec<u8> {
    let mut bytes = alloc::vec![0; size];
    let from = outside(address, size);
    // SAFETY: `outside` gives memory that is mapped and no Rust object, so `bytes` is none of it.
    unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), size) }
    bytes
}

/// A byte.
pub(crate) fn u8(address: u64) -> u8 {
    u8::from_le_bytes(read(address))
}

/// A word of 16 bits.
pub(crate) fn u16(address: u64) -> u16 {
    u16::from_le_bytes(read(address))
}

/// A word of 32 bits.
pub(crate) fn u32(address: u64) -> u32 {
    u32::from_le_bytes(read(address))
}

/// A word of 64 bits.
pub(crate) fn u64(address: u64) -> u64 {
    u64::from_le_bytes(read(address))
}

/// Puts bytes to an address.
pub(crate) fn write(address: u64, bytes: &[u8]) {
    let to = outside(address, bytes.len());
    // SAFETY: `outside` gives memory that is mapped and no Rust object, so `bytes` is none of it.
    unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
}

/// A device's register of 32 bits, which takes accesses of that width alone.
pub(crate) fn register(address: u64) -> u32 {
    let from = outside(address, 4).cast::<u32>();
    assert!(from.is_aligned(), "{address:#x}");
    // SAFETY: `outside` gives an address that is mapped; it is aligned, and any bits are a value.
    unsafe { from.read_volatile() }
}

/// Writes such a register.
pub(crate) fn set_register(address: u64, value: u32) {
    let to = outside(address, 4).cast::<u32>();
    assert!(to.is_aligned(), "{address:#x}");
    // SAFETY: `outside` gives an address that is mapped and no Rust object, and it is aligned.
    unsafe { to.write_volatile(value) }
}

/// Copies memory; both places may overlap.
pub(crate) fn copy(from: u64, to: u64, size: u64) {
    let (from, to) = (outside(from, size as usize), outside(to, size as usize));
    // SAFETY: both are mapped, and neither is a Rust object.
    unsafe { to.copy_from(from, size as usize) }
}

/// Fills memory with zeros.
pub(crate) fn clear(address: u64, size: u64) {
    let to = outside(address, size as usize);
    // SAFETY: it is mapped, and no Rust object.
    unsafe { to.write_bytes(0, size as usize) }
}

/// Code of `boot.s` that is copied elsewhere.
pub(crate) fn code(start: &'static u8, end: &'static u8) -> &'static [u8] {
    let (start, end) = (&raw const *start, &raw const *end);
    // SAFETY: labels of one section, in this order.
    let size = unsafe { end.offset_from_unsigned(start) };
    // SAFETY: all between them is code of the image, which nobody writes.
    unsafe { core::slice::from_raw_parts(start, size) }
}
