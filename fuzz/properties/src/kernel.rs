//! A second reading of what the kernel does with MSR filters, as slow and plain as can be.
//!
//! It shares no code, no table and no number with the engine, so that the two go wrong apart.

use crate::memory::Memory;

pub(crate) const EIO: i32 = 5;
pub(crate) const EFAULT: i32 = 14;
pub(crate) const EINVAL: i32 = 22;
pub(crate) const ENOTTY: i32 = 25;

pub(crate) const SET_MSR_FILTER: u32 = 0x4188_AEC6;
pub(crate) const SET_MSR_FILTER_COMPAT: u32 = 0x4104_AEC6;
pub(crate) const ENABLE_CAP: u32 = 0x4068_AEA3;

/// Which descriptor a call is made on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum On {
    System,
    Vm,
    Vcpu,
}

/// What the kernel keeps of one VM.
pub(crate) struct Kernel {
    /// Major and minor.
    version: (u32, u32),
    dead: bool,
    filter: Option<Filter>,
    mask: u32,
}

struct Filter {
    deny_by_default: bool,
    ranges: Vec<Range>,
}

struct Range {
    flags: u32,
    nmsrs: u32,
    base: u32,
    bitmap: Vec<u8>,
}

impl Kernel {
    pub(crate) fn new(version: (u32, u32)) -> Kernel {
        Kernel {
            version,
            dead: false,
            filter: None,
            mask: 0,
        }
    }

    pub(crate) fn kill(&mut self) {
        self.dead = true;
    }

    /// The reasons that accesses are handed to user space for.
    pub(crate) fn mask(&self) -> u32 {
        self.mask & 7
    }

    pub(crate) fn ioctl(
        &mut self,
        on: On,
        process_is_32_bit: bool,
        request: u32,
        argp: u64,
        memory: &Memory,
    ) -> Result<(), i32> {
        if on == On::System {
            return Err(EINVAL);
        }
        if self.dead {
            return Err(EIO);
        }
        if on == On::Vcpu {
            if request == ENABLE_CAP {
                memory.copy(argp, 104).ok_or(EFAULT)?;
            }
            return Err(EINVAL);
        }
        if request == SET_MSR_FILTER {
            return self.set_msr_filter(argp, 392, 8, 24, 16, memory);
        }
        if request == SET_MSR_FILTER_COMPAT && process_is_32_bit && self.version >= (6, 1) {
            return self.set_msr_filter(argp, 260, 4, 16, 12, memory);
        }
        if request == ENABLE_CAP {
            return self.enable_cap(argp, memory);
        }
        Err(ENOTTY)
    }

    fn set_msr_filter(
        &mut self,
        argp: u64,
        size: u64,
        first_range: usize,
        range_size: usize,
        pointer: usize,
        memory: &Memory,
    ) -> Result<(), i32> {
        let bytes = memory.copy(argp, size).ok_or(EFAULT)?;
        let flags = number(&bytes[0..4]) as u32;
        if self.version >= (5, 19) && flags > 1 {
            return Err(EINVAL);
        }
        let slot = |i: usize| &bytes[first_range + i * range_size..first_range + (i + 1) * range_size];
        let nmsrs = |i: usize| number(&slot(i)[4..8]);
        let all_empty = (0..16).all(|i| nmsrs(i) == 0);
        if all_empty && flags % 2 == 1 {
            return Err(EINVAL);
        }
        let mut filter = Filter {
            deny_by_default: flags % 2 == 1,
            ranges: Vec::new(),
        };
        let mut result = Ok(());
        for i in (0..16).filter(|i| nmsrs(*i) != 0) {
            let address = number(&slot(i)[pointer..range_size]);
            result = self.add_range(&mut filter, slot(i), address, memory);
            if result.is_err() {
                break;
            }
        }
        // Up to 5.11 the ranges were added to the filter in force.
        if self.version < (5, 12) || result.is_ok() {
            // And one without ranges was not asked.
            filter.deny_by_default &= !filter.ranges.is_empty();
            self.filter = Some(filter);
        }
        result
    }

    fn add_range(&self, filter: &mut Filter, slot: &[u8], address: u64, memory: &Memory) -> Result<(), i32> {
        let flags = number(&slot[0..4]) as u32;
        let nmsrs = number(&slot[4..8]);
        let flags_are_bad = flags == 0 || flags > 3;
        if self.version >= (5, 13) && flags_are_bad {
            return Err(EINVAL);
        }
        let longs = nmsrs.div_ceil(64);
        if longs * 8 > 1536 {
            return Err(EINVAL);
        }
        let bitmap = memory.copy(address, longs * 8).ok_or(EFAULT)?;
        if flags_are_bad {
            return Err(EINVAL);
        }
        filter.ranges.push(Range {
            flags,
            nmsrs: nmsrs as u32,
            base: number(&slot[8..12]) as u32,
            bitmap,
        });
        Ok(())
    }

    fn enable_cap(&mut self, argp: u64, memory: &Memory) -> Result<(), i32> {
        let bytes = memory.copy(argp, 104).ok_or(EFAULT)?;
        if number(&bytes[4..8]) != 0 {
            return Err(EINVAL);
        }
        if number(&bytes[0..4]) != 188 {
            return Err(EINVAL);
        }
        let mask = number(&bytes[8..16]);
        if self.version >= (5, 19) && mask > 7 {
            return Err(EINVAL);
        }
        self.mask = mask as u32;
        Ok(())
    }

    /// Whether a guest's RDMSR or WRMSR is the kernel's to answer.
    pub(crate) fn allowed(&self, index: u32, write: bool) -> bool {
        if index / 256 == 8 {
            return true;
        }
        let Some(filter) = &self.filter else {
            return true;
        };
        for range in &filter.ranges {
            let direction = if write { 2 } else { 1 };
            let end = ((u64::from(range.base) + u64::from(range.nmsrs)) % (1 << 32)) as u32;
            if range.flags & direction != 0 && index >= range.base && index < end {
                let bit = (index - range.base) as usize;
                return range.bitmap[bit / 8] & (1 << (bit % 8)) != 0;
            }
        }
        !filter.deny_by_default
    }

    /// Whether an entry of a nested VMX MSR list is allowed.
    pub(crate) fn allowed_in_nested_list(&self, index: u32, write: bool) -> bool {
        let filtered = self.version < (5, 18) || self.version >= (6, 12);
        !filtered || self.allowed(index, write)
    }

    /// Whether the emulator is allowed what it looks at in carrying out another instruction.
    pub(crate) fn allowed_as_side_effect(&self, index: u32, write: bool) -> bool {
        self.version >= (5, 18) || self.allowed(index, write)
    }
}

fn number(little_endian: &[u8]) -> u64 {
    little_endian
        .iter()
        .rev()
        .fold(0, |sum, byte| sum * 256 + u64::from(*byte))
}
