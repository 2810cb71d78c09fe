//! A set of CPU numbers below `64 * N` in `N` words: nothing to allocate, and no loop that the compiler cannot unroll.

use super::cpu_set::CpuSet;

/// A set of CPU numbers below `64 * N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits<const N: usize>([u64; N]);

impl<const N: usize> Bits<N> {
    /// Those of the set that are below the bound.
    pub(super) fn of(set: &CpuSet) -> Self {
        let mut words = [0; N];
        words.iter_mut().zip(set.words()).for_each(|(word, from)| *word = *from);
        Self(words)
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & other.0[at]))
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] | other.0[at]))
    }

    pub(super) fn without(self, other: Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & !other.0[at]))
    }

    /// Every number less `by`; what would be negative is left out.
    pub(super) fn down(self, by: u32) -> Self {
        let (skip, shift) = ((by / 64) as usize, by % 64);
        let word = |at: usize| self.0.get(at).copied().unwrap_or(0);
        Self(std::array::from_fn(|at| {
            let low = word(at + skip) >> shift;
            // A shift by 64 is none.
            if shift == 0 { low } else { low | word(at + skip + 1) << (64 - shift) }
        }))
    }

    /// Every number plus `by`; what would be above the bound is left out.
    pub(super) fn up(self, by: u32) -> Self {
        let (skip, shift) = ((by / 64) as usize, by % 64);
        let word = |at: usize, back: usize| at.checked_sub(back).map_or(0, |at| self.0[at]);
        Self(std::array::from_fn(|at| {
            let high = word(at, skip) << shift;
            if shift == 0 { high } else { high | word(at, skip + 1) >> (64 - shift) }
        }))
    }

    pub(super) fn len(self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub(super) fn contains(self, cpu: u32) -> bool {
        self.0.get((cpu / 64) as usize).is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }

    /// The lowest number.
    pub(super) fn first(self) -> Option<u32> {
        let at = self.0.iter().position(|&word| word != 0)?;
        Some(at as u32 * 64 + self.0[at].trailing_zeros())
    }

    pub(super) fn remove(&mut self, cpu: u32) {
        if let Some(word) = self.0.get_mut((cpu / 64) as usize) {
            *word &= !(1 << (cpu % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_behave_as_a_set(
            a in proptest::collection::btree_set(0..300_u32, 0..40),
            b in proptest::collection::btree_set(0..300_u32, 0..40),
            by in 0..300_u32,
        ) {
            let of = |cpus: Vec<u32>| Bits::<4>::of(&cpus.into_iter().collect());
            let within = |cpus: &std::collections::BTreeSet<u32>| cpus.range(..256).copied().collect::<Vec<_>>();
            let (left, right) = (of(within(&a)), of(within(&b)));
            prop_assert_eq!(of(a.iter().copied().collect()), left, "what is above the bound is cut");
            let (a, b) = (within(&a), within(&b));
            prop_assert_eq!(left.len() as usize, a.len());
            prop_assert_eq!(left.first(), a.first().copied());
            let pick = |keep: &dyn Fn(u32) -> bool| (0..256).filter(|cpu| keep(*cpu)).collect::<Vec<_>>();
            prop_assert_eq!(left.and(right), of(pick(&|cpu| a.contains(&cpu) && b.contains(&cpu))));
            prop_assert_eq!(left.or(right), of(pick(&|cpu| a.contains(&cpu) || b.contains(&cpu))));
            prop_assert_eq!(left.without(right), of(pick(&|cpu| a.contains(&cpu) && !b.contains(&cpu))));
            prop_assert_eq!(left.down(by), of(pick(&|cpu| a.contains(&(cpu + by)))));
            prop_assert_eq!(left.up(by), of(pick(&|cpu| cpu >= by && a.contains(&(cpu - by)))));
            let mut changed = left;
            b.iter().for_each(|cpu| changed.remove(*cpu));
            prop_assert_eq!(changed, left.without(right));
            prop_assert!((0..300).all(|cpu| left.contains(cpu) == a.contains(&cpu)));
        }
    }
}
