//! Which CPUs a guest cell gets in a cell whose cores are regular [`Pairs`]: as [`pinning`](super::pinning) chooses for any
//! cell, but on whole sets at once. A fit on such a host, which is nearly every host, takes a tenth of the time.

use super::bits::Bits;
use super::cell::Cell;
use super::cores::Pairs;
use super::cpu_set::CpuSet;
use super::guest::ThreadPolicy;
use super::pinning::{Pinning, Wanted};

/// The free CPUs of a cell.
#[derive(Clone, Copy)]
struct FreePairs<const N: usize> {
    stride: u32,
    /// First threads of all cores, free or not.
    firsts: Bits<N>,
    /// First threads of the cores of two that are wholly free.
    whole: Bits<N>,
    /// Free CPUs whose sibling is not, or that have none.
    single: Bits<N>,
}

/// How many free cores of a cell have how many free threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FreeCounts {
    /// Two.
    pub(super) whole: u32,
    /// One.
    pub(super) single: u32,
}

/// What `method` makes of the cell's free pairs, in as many words as its CPUs need; none of a cell whose cores are not
/// regular, or whose CPUs have numbers above all bounds.
macro_rules! of_pairs {
    ($cell:expr, $method:ident($($argument:expr),*)) => {{
        let cell: &Cell = $cell;
        cell.cores.pairs().and_then(|pairs| match cell.dedicated_cpus.words().len() {
            0..=1 => Some(FreePairs::<1>::of(cell, pairs).$method($($argument),*)),
            2 => Some(FreePairs::<2>::of(cell, pairs).$method($($argument),*)),
            3..=4 => Some(FreePairs::<4>::of(cell, pairs).$method($($argument),*)),
            5..=8 => Some(FreePairs::<8>::of(cell, pairs).$method($($argument),*)),
            9..=16 => Some(FreePairs::<16>::of(cell, pairs).$method($($argument),*)),
            _ => None,
        })
    }};
}

/// How many cores are free, and how far.
pub(super) fn count(cell: &Cell) -> Option<FreeCounts> {
    of_pairs!(cell, counts())
}

/// Chooses the CPUs, given that they are there. None also where no one of several caches has them all.
pub(super) fn choose(cell: &Cell, vcpus: &CpuSet, wanted: Wanted) -> Option<Pinning> {
    if cell.caches.len() > 1 {
        return of_pairs!(cell, choose_near(&cell.caches, vcpus, wanted)).flatten();
    }
    of_pairs!(cell, choose(vcpus, wanted))
}

/// How many wholly free cores [`choose`] would break.
pub(super) fn broken(cell: &Cell, wanted: Wanted) -> Option<u32> {
    let counts = match cell.caches.len() {
        0..=1 => count(cell),
        _ => of_pairs!(cell, near_counts(&cell.caches, wanted)).flatten(),
    };
    counts.map(|counts| counts.broken(wanted))
}

impl FreeCounts {
    /// Whether all vCPUs have room here.
    fn hold(self, wanted: Wanted, has_pairs: bool) -> bool {
        let room = match wanted.policy {
            Some(ThreadPolicy::Isolate) if has_pairs => self.whole,
            Some(ThreadPolicy::Isolate) => self.single,
            Some(ThreadPolicy::Require) => 2 * self.whole,
            None | Some(ThreadPolicy::Prefer) => self.threads(),
        };
        room >= wanted.vcpus
    }

    fn threads(self) -> u32 {
        2 * self.whole + self.single
    }

    fn broken(self, wanted: Wanted) -> u32 {
        let Self { mut whole, mut single } = self;
        if wanted.policy == Some(ThreadPolicy::Isolate) {
            // Of the emulator's own cores the last may be left with a free thread.
            let left = 2 * whole.saturating_sub(wanted.vcpus);
            return if wanted.emulator < left { wanted.emulator % 2 } else { 0 };
        }
        let in_pairs = whole.min(wanted.vcpus / 2);
        whole -= in_pairs;
        let mut rest = wanted.vcpus - 2 * in_pairs;
        let mut emulator = wanted.emulator;
        let mut broken = 0;
        if wanted.policy != Some(ThreadPolicy::Require) {
            let lone = rest.min(single);
            (rest, single) = (rest - lone, single - lone);
        }
        if rest > 0 && whole > 0 {
            // Broken, and mended again when the emulator takes the other thread.
            whole -= 1;
            broken = u32::from(emulator == 0);
            emulator = emulator.saturating_sub(1);
        }
        let on_whole = emulator.saturating_sub(single);
        broken + if on_whole < 2 * whole { on_whole % 2 } else { 0 }
    }
}

impl<const N: usize> FreePairs<N> {
    fn of(cell: &Cell, pairs: &Pairs) -> Self {
        let free = Bits::of(&cell.dedicated_cpus).without(Bits::of(&cell.pinned_cpus));
        let (stride, firsts) = (pairs.stride, Bits::of(&pairs.firsts));
        let whole = match stride {
            0 => Bits::of(&CpuSet::new()),
            _ => free.and(free.down(stride)).and(firsts),
        };
        Self { stride, firsts, whole, single: free.without(whole.or(whole.up(stride))) }
    }

    fn counts(&self) -> FreeCounts {
        FreeCounts { whole: self.whole.len(), single: self.single.len() }
    }

    /// What of it lies under one cache that has room for all vCPUs: the one with the fewest free CPUs, the first of
    /// equals. None also when the emulator wants CPUs, which may come from any cache.
    fn near(&self, caches: &[CpuSet], wanted: Wanted) -> Option<Self> {
        if wanted.emulator > 0 {
            return None;
        }
        let mut rest = *self;
        let mut best: Option<(u32, Self)> = None;
        // What is under none comes last.
        let caches = caches.iter().map(Some).chain([None]);
        for cache in caches {
            let under = match cache {
                Some(cache) => {
                    let cache = Bits::of(cache);
                    let firsts = cache.or(cache.down(self.stride));
                    Self { whole: rest.whole.and(firsts), single: rest.single.and(cache), ..rest }
                }
                None => rest,
            };
            rest.whole = rest.whole.without(under.whole);
            rest.single = rest.single.without(under.single);
            let counts = under.counts();
            if counts.hold(wanted, self.stride > 0) && best.is_none_or(|(least, _)| counts.threads() < least)
            {
                best = Some((counts.threads(), under));
            }
        }
        best.map(|(_, near)| near)
    }

    fn near_counts(&self, caches: &[CpuSet], wanted: Wanted) -> Option<FreeCounts> {
        self.near(caches, wanted).map(|near| near.counts())
    }

    fn choose_near(&self, caches: &[CpuSet], vcpus: &CpuSet, wanted: Wanted) -> Option<Pinning> {
        self.near(caches, wanted).map(|near| near.choose(vcpus, wanted))
    }

    fn choose(mut self, vcpus: &CpuSet, wanted: Wanted) -> Pinning {
        let mut pinning = Pinning::default();
        let mut vcpus = vcpus.iter();
        let pins = &mut pinning.pins;
        let mut next = |cpu: u32| {
            if let Some(vcpu) = vcpus.next() {
                pins.push(vcpu, cpu);
            }
        };
        let mut left = wanted.vcpus;
        if wanted.policy == Some(ThreadPolicy::Isolate) {
            while left > 0
                && let Some((cpu, sibling)) = self
                    .take_pair()
                    .map(|(a, b)| (a, Some(b)))
                    .or_else(|| self.take_single().map(|cpu| (cpu, None)))
            {
                next(cpu);
                pinning.idle_cpus.extend(sibling);
                left -= 1;
            }
            // The emulator's core is taken whole as well where there is a whole one.
            pinning.emulator_cpus = self.take_whole_first(wanted.emulator);
            return pinning;
        }
        while left >= 2
            && let Some((cpu, sibling)) = self.take_pair()
        {
            next(cpu);
            next(sibling);
            left -= 2;
        }
        let mut beside = None;
        while left > 0 {
            let lone = if wanted.policy == Some(ThreadPolicy::Require) { None } else { self.take_single() };
            let Some(cpu) = lone.or_else(|| {
                let (cpu, sibling) = self.take_pair()?;
                beside = Some(sibling);
                Some(cpu)
            }) else {
                break;
            };
            next(cpu);
            left -= 1;
        }
        pinning.emulator_cpus = self.take_single_first(wanted.emulator, beside);
        pinning
    }

    /// Both threads of the first wholly free core.
    fn take_pair(&mut self) -> Option<(u32, u32)> {
        let cpu = self.whole.first()?;
        self.whole.remove(cpu);
        Some((cpu, cpu + self.stride))
    }

    /// The first free CPU that has no free sibling, in the order of the cores; one in no core comes last.
    fn take_single(&mut self) -> Option<u32> {
        let (own, of_sibling) = match self.stride {
            0 => (self.single.and(self.firsts), Bits::of(&CpuSet::new())),
            stride => (self.single.and(self.firsts), self.single.down(stride).and(self.firsts)),
        };
        let cpu = match own.or(of_sibling).first() {
            Some(core) if own.contains(core) => core,
            Some(core) => core + self.stride,
            None => self.single.first()?,
        };
        self.single.remove(cpu);
        Some(cpu)
    }

    fn take_whole_first(&mut self, count: u32) -> CpuSet {
        let mut taken = CpuSet::new();
        while taken.len() + 2 <= count
            && let Some((cpu, sibling)) = self.take_pair()
        {
            taken.extend([cpu, sibling]);
        }
        while taken.len() < count
            && let Some(cpu) = self.take_pair().map(|(cpu, _)| cpu).or_else(|| self.take_single())
        {
            taken.insert(cpu);
        }
        taken
    }

    /// `beside` is the free thread of a core that was broken just now: it goes first.
    fn take_single_first(&mut self, count: u32, beside: Option<u32>) -> CpuSet {
        let mut taken = CpuSet::new();
        if count > 0 {
            taken.extend(beside);
        }
        while taken.len() < count
            && let Some(cpu) = self.take_single()
        {
            taken.insert(cpu);
        }
        while taken.len() < count
            && let Some((cpu, sibling)) = self.take_pair()
        {
            taken.insert(cpu);
            if taken.len() < count {
                taken.insert(sibling);
            }
        }
        taken
    }
}
