//! The memory of the process that makes the calls.

use msrgate_engine::{Fault, UserMemory};

/// A few mappings, and nothing between them.
#[derive(Default)]
pub(crate) struct Memory(Vec<(u64, Vec<u8>)>);

impl Memory {
    pub(crate) fn map(&mut self, address: u64, bytes: Vec<u8>) {
        self.0.push((address, bytes));
    }

    /// Everything from `address` on, or nothing where one byte of it is missing.
    pub(crate) fn copy(&self, address: u64, length: u64) -> Option<Vec<u8>> {
        let whole = self.0.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..)?.get(..usize::try_from(length).ok()?)
        });
        match whole {
            Some(bytes) => Some(bytes.to_vec()),
            None => (0..length).map(|i| self.byte(address.wrapping_add(i))).collect(),
        }
    }

    fn byte(&self, address: u64) -> Option<u8> {
        self.0.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset).copied()
        })
    }
}

impl UserMemory for Memory {
    fn read(&self, address: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let bytes = self.copy(address, buf.len() as u64).ok_or(Fault)?;
        buf.copy_from_slice(&bytes);
        Ok(())
    }
}
