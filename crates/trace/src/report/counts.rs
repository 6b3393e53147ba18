//! How often each of a few different things came.

/// How often each of the first `MOST` different things came, in the order in which they came; the others together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counts<T, const MOST: usize> {
    each: Vec<(T, u64)>,
    others: u64,
}

impl<T: PartialEq, const MOST: usize> Counts<T, MOST> {
    pub(super) const fn new() -> Self {
        Counts {
            each: Vec::new(),
            others: 0,
        }
    }

    pub(super) fn add(&mut self, thing: T) {
        if let Some((_, count)) = self.each.iter_mut().find(|(known, _)| *known == thing) {
            *count += 1;
        } else if self.each.len() < MOST {
            self.each.push((thing, 1));
        } else {
            self.others += 1;
        }
    }

    /// Each thing and how often it came.
    pub fn each(&self) -> &[(T, u64)] {
        &self.each
    }

    /// How often something else came, for which there was no room.
    pub fn others(&self) -> u64 {
        self.others
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_no_room_for_is_counted_together() {
        let mut counts: Counts<char, 2> = Counts::new();
        "abcbda".chars().for_each(|thing| counts.add(thing));
        assert_eq!((counts.each(), counts.others()), (&[('a', 2), ('b', 2)][..], 2));
    }
}
