//! The permission bitmaps that the hardware asks: which accesses leave the guest at all.
//!
//! Both start with every bit set, which intercepts. A bit is cleared only where the hypervisor wants the guest to reach
//! the hardware's own register (a [`PassthroughMsr`]) *and* the filter allows it: a filter adds intercepts, it never takes
//! one away.

use crate::{Filter, Msr, MsrRange, Op, Ops, Verdict};

/// MSRs that the hypervisor passes through to the hardware where no filter forbids it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct PassthroughMsr {
    /// The MSRs.
    pub range: MsrRange,
    /// The directions that are passed through.
    pub ops: Ops,
}

impl PassthroughMsr {
    /// Passes `range` through in the directions `ops`.
    pub const fn new(range: MsrRange, ops: Ops) -> PassthroughMsr {
        PassthroughMsr { range, ops }
    }

    /// The accesses of the candidate that `allows` allows and that lie in `window`.
    fn allowed<'a>(
        &'a self,
        allows: &'a impl Fn(Msr, Op) -> bool,
        window: MsrRange,
    ) -> impl Iterator<Item = (Msr, Op)> + 'a {
        self.range.intersection(window).into_iter().flat_map(move |range| {
            range.iter().flat_map(move |msr| {
                Op::ALL
                    .into_iter()
                    .filter(move |op| self.ops.contains(*op) && allows(msr, *op))
                    .map(move |op| (msr, op))
            })
        })
    }
}

/// MSRs of one window of a bitmap.
const WINDOW: u32 = 0x2000;

/// The offset of `msr` in the window that starts at `first`.
fn offset(first: u32, msr: Msr) -> Option<usize> {
    let offset = msr.0.checked_sub(first)?;
    (offset < WINDOW).then_some(offset as usize)
}

/// VMX's MSR bitmap: one page (Intel SDM, "MSR-Bitmap Address").
///
/// Four areas of 1 KiB: reads of 0–0x1fff, reads of 0xc0000000–0xc0001fff, then the writes of each. Every other MSR
/// always exits.
///
/// Lies in memory as the hardware reads it, at a page's boundary: its physical address is a VMCS's MSR-bitmap address.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(C, align(4096))]
pub struct VmxBitmap([u64; 512]);

impl VmxBitmap {
    const WINDOWS: [u32; 2] = [0, 0xc000_0000];

    /// Every access exits.
    pub const fn intercept_all() -> VmxBitmap {
        VmxBitmap([u64::MAX; 512])
    }

    /// Opens what a candidate asks for and the filter allows.
    pub fn derive(filter: &Filter, candidates: &[PassthroughMsr]) -> VmxBitmap {
        let mut bitmap = VmxBitmap::intercept_all();
        bitmap.recompute(filter, candidates);
        bitmap
    }

    /// Derives the bitmap in place: no allocation, and no state left over from what was before.
    pub fn recompute(&mut self, filter: &Filter, candidates: &[PassthroughMsr]) {
        self.recompute_by(|msr, op| filter.verdict(msr, op) == Verdict::Allow, candidates);
    }

    /// Recomputes from anything that allows accesses, such as a decision map that has more ranges than a filter.
    pub fn recompute_by(&mut self, allows: impl Fn(Msr, Op) -> bool, candidates: &[PassthroughMsr]) {
        open(&mut self.0, &Self::WINDOWS, Self::bit, &allows, candidates);
    }

    /// Whether the access exits.
    pub fn intercepts(&self, msr: Msr, op: Op) -> bool {
        Self::bit(msr, op).is_none_or(|bit| is_set(&self.0, bit))
    }

    /// The page as the hardware reads it, in little-endian words.
    pub fn words(&self) -> &[u64; 512] {
        &self.0
    }

    fn bit(msr: Msr, op: Op) -> Option<usize> {
        let area = match op {
            Op::Read => 0,
            Op::Write => 2,
        };
        let [low, high] = Self::WINDOWS;
        let bits = WINDOW as usize;
        offset(low, msr)
            .map(|bit| area * bits + bit)
            .or_else(|| offset(high, msr).map(|bit| (area + 1) * bits + bit))
    }
}

/// SVM's MSR permissions map: two pages (AMD APM vol. 2, "MSR Intercepts").
///
/// Two bits an MSR, reads in the even one, for the windows at 0, 0xc0000000 and 0xc0010000 of 0x2000 MSRs each; the
/// last 2 KiB are reserved. Every other MSR always exits.
///
/// Lies in memory as the hardware reads it, at a page's boundary: its physical address is a VMCB's MSRPM_BASE_PA, where
/// both pages follow each other in physical memory.
#[derive(Clone, PartialEq, Eq, Debug)]
#[repr(C, align(4096))]
pub struct SvmPermissionMap([u64; 1024]);

impl SvmPermissionMap {
    const WINDOWS: [u32; 3] = [0, 0xc000_0000, 0xc001_0000];

    /// Every access exits.
    pub const fn intercept_all() -> SvmPermissionMap {
        SvmPermissionMap([u64::MAX; 1024])
    }

    /// Opens what a candidate asks for and the filter allows.
    pub fn derive(filter: &Filter, candidates: &[PassthroughMsr]) -> SvmPermissionMap {
        let mut map = SvmPermissionMap::intercept_all();
        map.recompute(filter, candidates);
        map
    }

    /// Derives the map in place: no allocation, and no state left over from what was before.
    pub fn recompute(&mut self, filter: &Filter, candidates: &[PassthroughMsr]) {
        self.recompute_by(|msr, op| filter.verdict(msr, op) == Verdict::Allow, candidates);
    }

    /// Recomputes from anything that allows accesses, such as a decision map that has more ranges than a filter.
    pub fn recompute_by(&mut self, allows: impl Fn(Msr, Op) -> bool, candidates: &[PassthroughMsr]) {
        open(&mut self.0, &Self::WINDOWS, Self::bit, &allows, candidates);
    }

    /// Whether the access exits.
    pub fn intercepts(&self, msr: Msr, op: Op) -> bool {
        Self::bit(msr, op).is_none_or(|bit| is_set(&self.0, bit))
    }

    /// The map as the hardware reads it, in little-endian words.
    pub fn words(&self) -> &[u64; 1024] {
        &self.0
    }

    fn bit(msr: Msr, op: Op) -> Option<usize> {
        let direction = match op {
            Op::Read => 0,
            Op::Write => 1,
        };
        Self::WINDOWS
            .iter()
            .zip(0..)
            .find_map(|(first, window)| offset(*first, msr).map(|o| window * 2 * WINDOW as usize + 2 * o + direction))
    }
}

fn window(first: u32) -> MsrRange {
    // A window neither wraps nor is empty, so the fallback is never taken.
    MsrRange::new(Msr(first), Msr(first + (WINDOW - 1))).unwrap_or(MsrRange::single(Msr(first)))
}

/// Sets every bit, then clears those of what a candidate asks for and `allows` allows.
fn open(
    words: &mut [u64],
    windows: &[u32],
    bit: fn(Msr, Op) -> Option<usize>,
    allows: &impl Fn(Msr, Op) -> bool,
    candidates: &[PassthroughMsr],
) {
    words.fill(u64::MAX);
    for window in windows.iter().map(|first| window(*first)) {
        for (msr, op) in candidates
            .iter()
            .flat_map(|candidate| candidate.allowed(allows, window))
        {
            if let Some(bit) = bit(msr, op) {
                clear(words, bit);
            }
        }
    }
}

fn clear(words: &mut [u64], bit: usize) {
    if let Some(word) = words.get_mut(bit / 64) {
        *word &= !(1 << (bit % 64));
    }
}

fn is_set(words: &[u64], bit: usize) -> bool {
    words.get(bit / 64).is_none_or(|word| word >> (bit % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use alloc::boxed::Box;
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::FilterRange;

    fn filters() -> Vec<Filter> {
        let pattern = |seed: u64| {
            (0..192u64)
                .map(|i| (i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17))
                .collect::<Vec<_>>()
        };
        let range = |base, ops, seed| FilterRange::new(base, 12288, ops, pattern(seed)).unwrap();
        vec![
            Filter::allow_all(),
            Filter::new(Verdict::Deny, vec![FilterRange::new(0, 1, Ops::BOTH, vec![0]).unwrap()]).unwrap(),
            // Spans more than one window of 0x2000, with directions apart and an overlap.
            Filter::new(
                Verdict::Deny,
                vec![
                    range(0x100, Ops::READ, 1),
                    range(0, Ops::BOTH, 2),
                    range(0xbfff_f000, Ops::WRITE, 3),
                    range(0xc000_0000, Ops::BOTH, 4),
                    range(0xc001_0000, Ops::BOTH, 5),
                ],
            )
            .unwrap(),
        ]
    }

    fn candidates() -> Vec<PassthroughMsr> {
        let range = |first, last| MsrRange::new(Msr(first), Msr(last)).unwrap();
        vec![
            PassthroughMsr::new(range(0x10, 0x10), Ops::READ),
            PassthroughMsr::new(range(0x174, 0x176), Ops::BOTH),
            PassthroughMsr::new(range(0x1ff0, 0x2010), Ops::BOTH),
            PassthroughMsr::new(range(0x800, 0x83f), Ops::READ),
            PassthroughMsr::new(range(0xc000_0081, 0xc000_0102), Ops::BOTH),
            PassthroughMsr::new(range(0xc001_0000, 0xc001_ffff), Ops::WRITE),
        ]
    }

    /// Every MSR in and around every window, both directions.
    fn everywhere() -> impl Iterator<Item = (Msr, Op)> {
        [
            0u32..0x2100,
            0xbfff_ff00..0xc000_2100,
            0xc000_ff00..0xc001_2100,
            0xffff_ff00..u32::MAX,
        ]
        .into_iter()
        .flatten()
        .flat_map(|msr| Op::ALL.map(|op| (Msr(msr), op)))
    }

    fn expected(filter: &Filter, windows: &[u32], msr: Msr, op: Op) -> bool {
        let covered = windows.iter().any(|first| offset(*first, msr).is_some());
        let wanted = candidates().iter().any(|c| c.range.contains(msr) && c.ops.contains(op));
        !(covered && wanted && filter.verdict(msr, op) == Verdict::Allow)
    }

    #[test]
    fn a_vmx_bit_is_clear_only_where_a_candidate_is_allowed() {
        for filter in filters() {
            let bitmap = VmxBitmap::derive(&filter, &candidates());
            for (msr, op) in everywhere() {
                let expected = expected(&filter, &VmxBitmap::WINDOWS, msr, op);
                assert_eq!(bitmap.intercepts(msr, op), expected, "{op} {msr}");
            }
        }
    }

    #[test]
    fn an_svm_bit_is_clear_only_where_a_candidate_is_allowed() {
        for filter in filters() {
            let map = SvmPermissionMap::derive(&filter, &candidates());
            for (msr, op) in everywhere() {
                let expected = expected(&filter, &SvmPermissionMap::WINDOWS, msr, op);
                assert_eq!(map.intercepts(msr, op), expected, "{op} {msr}");
            }
        }
    }

    #[test]
    fn the_hardware_can_use_a_bitmap_where_it_lies() {
        let page = 4096;
        assert_eq!((align_of::<VmxBitmap>(), size_of::<VmxBitmap>()), (page, page));
        assert_eq!(
            (align_of::<SvmPermissionMap>(), size_of::<SvmPermissionMap>()),
            (page, 2 * page)
        );
        let bitmap = Box::new(VmxBitmap::intercept_all());
        let map = Box::new(SvmPermissionMap::intercept_all());
        for (itself, words) in [
            (&raw const *bitmap as usize, bitmap.words().as_ptr() as usize),
            (&raw const *map as usize, map.words().as_ptr() as usize),
        ] {
            assert_eq!((itself % page, words), (0, itself));
        }
    }

    #[test]
    fn vmx_bits_lie_where_the_manual_puts_them() {
        let one = |msr, ops| {
            VmxBitmap::derive(
                &Filter::allow_all(),
                &[PassthroughMsr::new(MsrRange::single(Msr(msr)), ops)],
            )
        };
        let byte = |bitmap: &VmxBitmap, at: usize| bitmap.words()[at / 8].to_le_bytes()[at % 8];
        assert_eq!(byte(&one(0x10, Ops::READ), 0x2), !1);
        assert_eq!(byte(&one(0xc000_0101, Ops::READ), 0x400 + 0x20), !2);
        assert_eq!(byte(&one(0x1fff, Ops::WRITE), 0xbff), 0x7f);
        assert_eq!(byte(&one(0xc000_1fff, Ops::WRITE), 0xfff), 0x7f);
    }

    #[test]
    fn svm_bits_lie_where_the_manual_puts_them() {
        let one = |msr, ops| {
            SvmPermissionMap::derive(
                &Filter::allow_all(),
                &[PassthroughMsr::new(MsrRange::single(Msr(msr)), ops)],
            )
        };
        let byte = |map: &SvmPermissionMap, at: usize| map.words()[at / 8].to_le_bytes()[at % 8];
        assert_eq!(byte(&one(0x174, Ops::READ), 0x5d), !1);
        assert_eq!(byte(&one(0xc000_0082, Ops::WRITE), 0x800 + 0x20), !0x20);
        assert_eq!(byte(&one(0xc001_1fff, Ops::BOTH), 0x17ff), 0x3f);
        assert!(one(0xc001_2000, Ops::BOTH) == SvmPermissionMap::intercept_all());
    }

    #[test]
    fn recomputing_leaves_nothing_of_the_filter_before() {
        let all = filters();
        let mut bitmap = VmxBitmap::derive(&all[0], &candidates());
        bitmap.recompute(&all[1], &candidates());
        assert_eq!(bitmap, VmxBitmap::derive(&all[1], &candidates()));
    }
}
