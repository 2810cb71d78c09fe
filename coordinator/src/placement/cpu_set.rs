//! A set of CPU numbers as a bitmask, and the text form users write it in.

use std::fmt;

use smallvec::SmallVec;
use thiserror::Error;

/// The highest CPU number a set may hold. Eight times what Linux can be built for, so only nonsense is refused.
pub const MAX_CPU: u32 = 65_535;

/// A set of CPU numbers (host CPUs or virtual CPUs), one bit each.
///
/// The last word is never zero, so equal sets are equal values.
#[derive(Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuSet {
    words: Words,
}

impl Clone for CpuSet {
    fn clone(&self) -> Self {
        // Words are copied at once; the derived clone goes one by one.
        Self { words: Words::from_slice(&self.words) }
    }
}

/// Sets of up to 256 CPUs lie in the value itself: placement makes and drops thousands of them for an answer.
type Words = SmallVec<[u64; 4]>;

impl CpuSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { words: Words::new_const() }
    }

    /// The set `0..count`; a count above [`MAX_CPU`] + 1 is cut there.
    pub fn first_n(count: u32) -> Self {
        let count = count.min(MAX_CPU + 1);
        let mut words = Words::from_elem(u64::MAX, (count / 64) as usize);
        if !count.is_multiple_of(64) {
            words.push((1 << (count % 64)) - 1);
        }
        Self { words }
    }

    /// Adds a CPU; false when it was there already, or is above [`MAX_CPU`] and so was not added.
    pub fn insert(&mut self, cpu: u32) -> bool {
        if cpu > MAX_CPU || self.contains(cpu) {
            return false;
        }
        let word = (cpu / 64) as usize;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (cpu % 64);
        true
    }

    /// Takes a CPU out; false when it was not there.
    pub fn remove(&mut self, cpu: u32) -> bool {
        if !self.contains(cpu) {
            return false;
        }
        self.words[(cpu / 64) as usize] &= !(1 << (cpu % 64));
        self.trim();
        true
    }

    /// Whether the CPU is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        self.words.get((cpu / 64) as usize).is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }

    /// How many CPUs the set holds.
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether the set holds no CPU.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let mut words = self.words.iter();
        let mut word = words.next().copied().unwrap_or(0);
        let mut base = 0;
        std::iter::from_fn(move || {
            while word == 0 {
                word = *words.next()?;
                base += 64;
            }
            let cpu = base + word.trailing_zeros();
            word &= word - 1;
            Some(cpu)
        })
    }

    /// The set's words, CPU 0 in the lowest bit of the first; the last is not zero.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// The CPUs in both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        let mut set = self.clone();
        set.words.truncate(other.words.len());
        set.words.iter_mut().zip(&other.words).for_each(|(a, b)| *a &= b);
        set.trim();
        set
    }

    /// The CPUs of this set that are not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        let mut set = self.clone();
        set.subtract(other);
        set
    }

    /// How many CPUs are in both sets, without building their intersection.
    pub fn intersection_len(&self, other: &Self) -> u32 {
        self.words.iter().zip(&other.words).map(|(a, b)| (a & b).count_ones()).sum()
    }

    /// How many CPUs of this set are not in the other, without building their difference.
    pub fn difference_len(&self, other: &Self) -> u32 {
        let words = self.words.iter().enumerate();
        words.map(|(at, word)| (word & !other.words.get(at).unwrap_or(&0)).count_ones()).sum()
    }

    /// How many CPUs of this set are in `also` and not in `except`, without building a set.
    pub fn count_where(&self, also: &Self, except: &Self) -> u32 {
        let words = self.words.iter().zip(&also.words).enumerate();
        words.map(|(at, (a, b))| (a & b & !except.words.get(at).unwrap_or(&0)).count_ones()).sum()
    }

    /// Adds all CPUs of the other set.
    pub fn extend_from(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    /// Takes all CPUs of the other set out.
    pub fn subtract(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
        self.trim();
    }

    /// Whether every CPU of this set is in the other.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.intersection_len(other) == self.len()
    }

    /// Reads Nova's list form: numbers and ranges separated by commas, `^` before one takes it out of all the rest.
    ///
    /// White space around numbers and empty items are allowed: `" 1 - 3, ^2,,5"` is 1, 3 and 5.
    pub fn parse(text: &str) -> Result<Self, CpuListError> {
        let (mut included, mut excluded) = (Self::new(), Self::new());
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let (set, range) = match item.strip_prefix('^') {
                Some(range) => (&mut excluded, range),
                None => (&mut included, item),
            };
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let first = parse_cpu(first, item)?;
            let last = parse_cpu(last, item)?;
            if first > last {
                return Err(CpuListError::Backwards { item: item.to_owned() });
            }
            for cpu in first..=last {
                set.insert(cpu);
            }
        }
        included.subtract(&excluded);
        Ok(included)
    }

    /// The list form without ranges: `1,2,3,7`. (`Display` writes ranges: `1-3,7`.)
    pub fn to_plain_list(&self) -> String {
        self.iter().map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",")
    }

    fn trim(&mut self) {
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }
}

fn parse_cpu(text: &str, item: &str) -> Result<u32, CpuListError> {
    let digits = text.trim();
    // `u32::from_str` alone would take a leading `+`.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CpuListError::NotANumber { item: item.to_owned() });
    }
    match digits.parse::<u32>() {
        Ok(cpu) if cpu <= MAX_CPU => Ok(cpu),
        _ => Err(CpuListError::TooLarge { item: item.to_owned() }),
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut set = Self::new();
        set.extend(cpus);
        set
    }
}

impl Extend<u32> for CpuSet {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, cpus: I) {
        for cpu in cpus {
            self.insert(cpu);
        }
    }
}

impl fmt::Display for CpuSet {
    /// Writes `1-3,7`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last {
                last if last == first => write!(f, "{separator}{first}")?,
                last => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

/// Why a text is not a CPU list.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CpuListError {
    /// An item is neither a number nor a range of two numbers.
    #[error("`{item}` is neither a CPU number nor a range")]
    NotANumber {
        /// The item as written.
        item: String,
    },
    /// A range ends before it starts.
    #[error("the range `{item}` runs backwards")]
    Backwards {
        /// The item as written.
        item: String,
    },
    /// A number is above [`MAX_CPU`].
    #[error("`{item}` is above the highest CPU number, {MAX_CPU}")]
    TooLarge {
        /// The item as written.
        item: String,
    },
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_exclusion_counts_wherever_it_stands() {
        for text in ["^2,1-3", "1-3,^2", " 1 - 3 ,, ^ 2 ,"] {
            assert_eq!(CpuSet::parse(text).unwrap().to_plain_list(), "1,3", "{text}");
        }
        assert!(CpuSet::parse("^0-9").unwrap().is_empty());
        assert!(CpuSet::parse("").unwrap().is_empty());
    }

    #[test]
    fn a_list_with_a_bad_item_is_refused_and_the_item_named() {
        for item in
            ["-1", "1-", "3-1", "a", "1-2-3", "^", "+1", "0x1", "1.0", "٣", "1 2", "65536", "0-99999999999"]
        {
            let error = CpuSet::parse(&format!("4,{item}")).unwrap_err();
            assert!(error.to_string().contains(item), "{error}");
        }
    }

    #[test]
    fn the_first_cpus_end_where_they_should() {
        for count in [0, 1, 63, 64, 65, 128, 65_536] {
            let set = CpuSet::first_n(count);
            assert_eq!(set.len(), count);
            assert_eq!(set, (0..count).collect());
        }
        assert_eq!(CpuSet::first_n(u32::MAX).len(), MAX_CPU + 1);
    }

    proptest! {
        #[test]
        fn a_cpu_set_behaves_as_a_set(a in cpus(), b in cpus()) {
            let (left, right): (CpuSet, CpuSet) = (a.iter().copied().collect(), b.iter().copied().collect());
            prop_assert_eq!(left.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(left.len() as usize, a.len());
            prop_assert_eq!(left.is_subset(&right), a.is_subset(&b));
            prop_assert_eq!(left.intersection_len(&right) as usize, a.intersection(&b).count());
            prop_assert_eq!(left.difference_len(&right) as usize, a.difference(&b).count());
            prop_assert_eq!(left.intersection(&right), a.intersection(&b).copied().collect());
            prop_assert_eq!(left.difference(&right), a.difference(&b).copied().collect());
            let low: CpuSet = (0..100).collect();
            let expected = a.intersection(&b).filter(|cpu| **cpu >= 100).count();
            prop_assert_eq!(left.count_where(&right, &low) as usize, expected);
            let mut both = left.clone();
            both.extend_from(&right);
            prop_assert_eq!(both, a.union(&b).copied().collect());
            let mut emptied = left;
            for cpu in &a {
                prop_assert!(emptied.remove(*cpu) && !emptied.remove(*cpu));
            }
            prop_assert_eq!(emptied, CpuSet::new());
        }

        #[test]
        fn what_is_written_is_read_back(a in cpus()) {
            let set: CpuSet = a.into_iter().collect();
            prop_assert_eq!(&CpuSet::parse(&set.to_string()).unwrap(), &set);
            prop_assert_eq!(&CpuSet::parse(&set.to_plain_list()).unwrap(), &set);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            let _ = CpuSet::parse(&text);
        }
    }

    fn cpus() -> impl Strategy<Value = BTreeSet<u32>> {
        proptest::collection::btree_set(0..200u32, 0..40)
    }
}
