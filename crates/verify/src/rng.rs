//! Random numbers that a seed gives again.

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The numbers of one item of a seed: they do not depend on what other items took.
    pub(crate) fn of(seed: u64, item: u64) -> Rng {
        Rng(Rng(seed).next() ^ Rng(!item).next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number less than `end`; 0 where that is 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next().checked_rem(end).unwrap_or(0)
    }

    /// A number from `first` to `last`, both included.
    pub(crate) fn within(&mut self, first: u32, last: u32) -> u32 {
        first.wrapping_add(self.below(u64::from(last.wrapping_sub(first)) + 1) as u32)
    }

    /// True in `percent` of a hundred cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub(crate) fn pick<T: Copy, const N: usize>(&mut self, of: [T; N]) -> T {
        const { assert!(N > 0) };
        let index = self.below(N as u64) as usize;
        of[index]
    }

    /// Puts the elements in a random order.
    pub(crate) fn shuffle<T>(&mut self, of: &mut [T]) {
        for last in (1..of.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            of.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_of_a_seed_has_its_own_numbers_and_always_the_same() {
        assert_eq!(Rng::of(1, 2).next(), Rng::of(1, 2).next());
        assert_ne!(Rng::of(1, 2).next(), Rng::of(1, 3).next());
        assert_ne!(Rng::of(1, 2).next(), Rng::of(2, 2).next());
        assert_ne!(Rng::of(1, 2).next(), Rng::of(2, 1).next());
    }

    #[test]
    fn numbers_stay_in_their_bounds() {
        let mut rng = Rng::of(0, 0);
        for _ in 0..1000 {
            assert!(rng.below(3) < 3);
            assert!((5..=6).contains(&rng.within(5, 6)));
        }
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.within(7, 7), 7);
    }
}
