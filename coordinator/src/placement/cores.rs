//! The cores of a cell, and what of them is asked again and again and never changes.

use std::ops::Deref;
use std::sync::Arc;

use super::cpu_set::CpuSet;

/// The cores of a cell: the hardware threads of each. Cheap to clone; hosts of one kind share them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cores(Arc<Layout>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct Layout {
    sets: Box<[CpuSet]>,
    /// The most threads that one has.
    threads: u32,
    pairs: Option<Pairs>,
}

/// How nearly all machines number their threads: every core has two, the second a fixed way above the first; or every
/// core has one. Then what is free of each core is told by a shift of the whole set.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Pairs {
    /// From a core's first thread to its second; 0 when cores have one thread.
    pub(super) stride: u32,
    /// The first thread of each core.
    pub(super) firsts: CpuSet,
}

impl Cores {
    /// The most hardware threads that a core has; 1 when there is no core.
    pub(super) fn threads(&self) -> u32 {
        self.0.threads.max(1)
    }

    /// The cores as pairs, when they are that regular and stand in the order of their numbers.
    pub(super) fn pairs(&self) -> Option<&Pairs> {
        self.0.pairs.as_ref()
    }
}

impl Pairs {
    fn of(sets: &[CpuSet]) -> Option<Self> {
        let ends = |core: &CpuSet| {
            let mut cpus = core.iter();
            let first = cpus.next()?;
            Some((first, cpus.next().map_or(0, |second| second - first)))
        };
        let (_, stride) = sets.first().map_or(Some((0, 0)), ends)?;
        let size = if stride == 0 { 1 } else { 2 };
        let (mut seen, mut last) = (CpuSet::new(), None);
        for core in sets {
            let (first, its) = ends(core)?;
            let regular = core.len() == size && its == stride && last < Some(first);
            if !regular || core.intersection_len(&seen) > 0 {
                return None;
            }
            seen.extend_from(core);
            last = Some(first);
        }
        Some(Self { stride, firsts: sets.iter().filter_map(|core| core.iter().next()).collect() })
    }
}

impl Default for Cores {
    /// No core at all.
    fn default() -> Self {
        Self::from([])
    }
}

impl FromIterator<CpuSet> for Cores {
    fn from_iter<I: IntoIterator<Item = CpuSet>>(cores: I) -> Self {
        let sets: Box<[CpuSet]> = cores.into_iter().collect();
        let threads = sets.iter().map(CpuSet::len).max().unwrap_or(1);
        let pairs = Pairs::of(&sets);
        Self(Arc::new(Layout { sets, threads, pairs }))
    }
}

impl<const N: usize> From<[CpuSet; N]> for Cores {
    fn from(cores: [CpuSet; N]) -> Self {
        cores.into_iter().collect()
    }
}

impl Deref for Cores {
    type Target = [CpuSet];

    fn deref(&self) -> &[CpuSet] {
        &self.0.sets
    }
}
