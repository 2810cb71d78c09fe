//! Which host CPUs a guest cell's dedicated vCPUs and its emulator get inside one host cell.

use smallvec::SmallVec;

use super::cell::Cell;
use super::cpu_set::CpuSet;
use super::explain::{Quantity, Rule, Shortfall};
use super::guest::ThreadPolicy;
use super::pairs::{self, FreeCounts};

/// The host CPUs of one guest cell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pinning {
    /// vCPU to host CPU.
    pub pins: Pins,
    /// Host CPUs for the emulator's threads.
    pub emulator_cpus: CpuSet,
    /// Free siblings of pinned CPUs that must stay idle (thread policy isolate).
    pub idle_cpus: CpuSet,
}

/// vCPU to host CPU, in the order of the vCPUs. A few lie in the value itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins(SmallVec<[(u32, u32); 8]>);

impl Pins {
    /// vCPUs with their host CPUs.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().copied()
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.iter().map(|(vcpu, _)| vcpu)
    }

    /// The host CPUs, in the order of the vCPUs.
    pub fn cpus(&self) -> impl Iterator<Item = u32> + '_ {
        self.iter().map(|(_, cpu)| cpu)
    }

    /// `vcpu` is above those that are there.
    pub(super) fn push(&mut self, vcpu: u32, cpu: u32) {
        self.0.push((vcpu, cpu));
    }
}

/// Host CPUs that a guest cell wants for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// One for each dedicated vCPU.
    pub(super) vcpus: u32,
    /// For the emulator beside them.
    pub(super) emulator: u32,
    pub(super) policy: Option<ThreadPolicy>,
}

/// The free threads of the cell's cores, cores without any left out; a CPU in no core is a core of its own.
struct FreeCores {
    threads_per_core: u32,
    cores: Vec<CpuSet>,
}

impl FreeCores {
    fn of(cell: &Cell) -> Self {
        let mut rest = cell.free_cpus();
        let mut cores = Vec::with_capacity(cell.cores.len());
        for core in cell.cores.iter() {
            let free = core.intersection(&rest);
            if !free.is_empty() {
                rest.subtract(&free);
                cores.push(free);
            }
        }
        cores.extend(rest.iter().map(|cpu| CpuSet::from_iter([cpu])));
        Self { threads_per_core: cell.threads_per_core(), cores }
    }
}

/// How many cores have how many free threads: what [`check`] needs, without a set for each core.
pub(super) struct FreeThreads {
    pub(super) threads_per_core: u32,
    /// Cores by the number of their free threads.
    with: SmallVec<[u32; 4]>,
}

impl FreeThreads {
    pub(super) fn of(cell: &Cell) -> Self {
        let threads_per_core = cell.threads_per_core();
        if let Some(FreeCounts { whole, single }) = pairs::count(cell) {
            return Self { threads_per_core, with: SmallVec::from_buf_and_len([0, single, whole, 0], 3) };
        }
        let of_core = |core: &CpuSet| core.count_where(&cell.dedicated_cpus, &cell.pinned_cpus);
        let mut with = SmallVec::from_elem(0, threads_per_core as usize + 1);
        let mut in_cores = 0;
        for free in cell.cores.iter().map(of_core) {
            with[free as usize] += 1;
            in_cores += free;
        }
        match cell.free_cpu_count().checked_sub(in_cores) {
            Some(lone) => with[1] += lone,
            // Cores that overlap: count each CPU once.
            None => {
                with.fill(0);
                FreeCores::of(cell).cores.iter().for_each(|core| with[core.len() as usize] += 1);
            }
        }
        Self { threads_per_core, with }
    }

    pub(super) fn with_at_least(&self, threads: u32) -> u32 {
        self.with.iter().skip(threads as usize).sum()
    }

    fn threads(&self) -> u32 {
        self.with.iter().zip(0..).map(|(cores, threads)| cores * threads).sum()
    }

    /// vCPUs for which there is room when the same number of threads, two or more, is taken of each core.
    pub(super) fn room_with_siblings(&self) -> u64 {
        let room = |threads: u32| u64::from(threads) * u64::from(self.with_at_least(threads));
        (2..=self.threads_per_core).map(room).max().unwrap_or(0)
    }
}

/// Whether what a guest cell that pins wants fits into the free CPUs of the host cell.
///
/// The order of the checks is from the coarse to the fine, so that the shortfall named is the one to fix first.
pub(super) fn check(cell: &Cell, wanted: Wanted) -> Result<(), Shortfall> {
    let Wanted { vcpus, emulator, policy } = wanted;
    let wanted = u64::from(vcpus) + u64::from(emulator);
    let needs = |have: u32| Quantity::Cpus(u64::from(have));
    let free_cpus = cell.free_cpu_count();
    if wanted > u64::from(free_cpus) {
        let all = cell.dedicated_cpus.len();
        if wanted > u64::from(all) {
            return Err(Shortfall::new(Rule::CpuDedicatedTotal, Quantity::Cpus(wanted), needs(all)));
        }
        return Err(Shortfall::new(Rule::CpuDedicatedFree, Quantity::Cpus(wanted), needs(free_cpus)));
    }
    match policy {
        None | Some(ThreadPolicy::Prefer) if vcpus == 0 && emulator > 0 => {
            // The emulator's own CPU goes with pinned vCPUs; this cell has none to go with.
            Err(Shortfall::new(Rule::EmulatorCpusFree, needs(emulator), needs(0)))
        }
        None | Some(ThreadPolicy::Prefer) => Ok(()),
        Some(ThreadPolicy::Require) => check_require(&FreeThreads::of(cell), vcpus, emulator),
        Some(ThreadPolicy::Isolate) => check_isolate(cell, &FreeThreads::of(cell), vcpus, emulator),
    }
}

fn check_require(free: &FreeThreads, vcpus: u32, emulator: u32) -> Result<(), Shortfall> {
    let cores = |count: u32| Quantity::Cores(u64::from(count));
    if free.threads_per_core < 2 {
        let (need, have) = (Quantity::Threads(2), Quantity::Threads(u64::from(free.threads_per_core)));
        return Err(Shortfall::new(Rule::CpuThreadsPresent, need, have));
    }
    if vcpus == 0 {
        return match (emulator, free.with_at_least(2)) {
            (0, 1..) => Ok(()),
            (0, 0) => Err(Shortfall::new(Rule::CpuSiblingsFree, cores(1), cores(0))),
            _ => Err(Shortfall::new(Rule::EmulatorCpusFree, cores(emulator), cores(0))),
        };
    }
    let room = free.room_with_siblings();
    if room < u64::from(vcpus) {
        let need = Quantity::SiblingCpus(u64::from(vcpus));
        return Err(Shortfall::new(Rule::CpuSiblingsFree, need, Quantity::SiblingCpus(room)));
    }
    Ok(())
}

fn check_isolate(cell: &Cell, free: &FreeThreads, vcpus: u32, emulator: u32) -> Result<(), Shortfall> {
    let cpus = |count: u32| Quantity::Cpus(u64::from(count));
    let cores = |count: u32| Quantity::Cores(u64::from(count));
    if vcpus == 0 {
        return Err(Shortfall::new(Rule::CpuCoresFree, cores(1), cores(0)));
    }
    if free.threads_per_core > 1 && cell.dedicated_cpus != cell.shared_cpus {
        let (need, have) = (Quantity::Threads(1), Quantity::Threads(u64::from(free.threads_per_core)));
        return Err(Shortfall::new(Rule::CpuIsolateSplitSets, need, have));
    }
    let whole = free.with_at_least(free.threads_per_core);
    if whole < vcpus {
        return Err(Shortfall::new(Rule::CpuCoresFree, cores(vcpus), cores(whole)));
    }
    // At most one core a vCPU is taken, each with all its threads free.
    let left = free.threads() - vcpus * free.threads_per_core;
    if left < emulator {
        return Err(Shortfall::new(Rule::EmulatorCpusFree, cpus(emulator), cpus(left)));
    }
    Ok(())
}

/// Chooses the CPUs, given that [`check`] said they are there. The vCPUs share as few level 3 caches as can be,
/// whole sibling groups are left to others where that is possible, and the choice depends on nothing but its
/// arguments.
pub(super) fn choose(cell: &Cell, vcpus: &CpuSet, wanted: Wanted) -> Pinning {
    if vcpus.is_empty() {
        return Pinning::default();
    }
    pairs::choose(cell, vcpus, wanted).unwrap_or_else(|| choose_by_core(cell, vcpus, wanted))
}

/// The same for any cores, one by one.
fn choose_by_core(cell: &Cell, guest: &CpuSet, wanted: Wanted) -> Pinning {
    let Wanted { vcpus, emulator, policy } = wanted;
    let FreeCores { threads_per_core, cores } = FreeCores::of(cell);
    let mut pinning = Pinning::default();
    let enough = |cores: &[CpuSet]| room(cores, policy, threads_per_core) >= u64::from(vcpus);
    let (mut near, mut far) = near_cores(cell, cores, enough);
    let chosen = match policy {
        Some(ThreadPolicy::Isolate) => {
            near.sort_by_key(|core| core.len() != threads_per_core);
            let taken: Vec<CpuSet> = near.drain(..(vcpus as usize).min(near.len())).collect();
            let first: Vec<u32> = taken.iter().filter_map(|core| core.iter().next()).collect();
            for (core, cpu) in taken.iter().zip(&first) {
                pinning.idle_cpus.extend(core.iter().filter(|other| other != cpu));
            }
            // The emulator's core is taken whole as well where there is a whole one.
            near.append(&mut far);
            near.sort_by_key(|core| core.len() != threads_per_core);
            first
        }
        Some(ThreadPolicy::Require) => {
            let (mut siblings, lone): (Vec<_>, Vec<_>) = near.into_iter().partition(|core| core.len() >= 2);
            let chosen = pack(&mut siblings, vcpus, true);
            near = [siblings, lone, far].concat();
            near.sort_by_key(CpuSet::len);
            chosen
        }
        None | Some(ThreadPolicy::Prefer) => {
            let chosen = pack(&mut near, vcpus, false);
            near.append(&mut far);
            near.sort_by_key(CpuSet::len);
            chosen
        }
    };
    pinning.emulator_cpus = near.iter().flat_map(CpuSet::iter).take(emulator as usize).collect();
    pinning.pins = Pins(guest.iter().zip(chosen).collect());
    pinning
}

/// How many vCPUs these cores hold under a policy.
fn room(cores: &[CpuSet], policy: Option<ThreadPolicy>, threads_per_core: u32) -> u64 {
    let with = |least: u32| cores.iter().filter(|core| core.len() >= least).count() as u64;
    match policy {
        Some(ThreadPolicy::Isolate) => with(threads_per_core),
        Some(ThreadPolicy::Require) => {
            (2..=threads_per_core).map(|threads| u64::from(threads) * with(threads)).max().unwrap_or(0)
        }
        None | Some(ThreadPolicy::Prefer) => cores.iter().map(|core| u64::from(core.len())).sum(),
    }
}

/// Parts the free cores into those to choose from and the rest: the cores of one level 3 cache that are enough, of
/// the cache with the fewest free; else whole caches, the freest first, until they are enough.
fn near_cores(
    cell: &Cell,
    cores: Vec<CpuSet>,
    enough: impl Fn(&[CpuSet]) -> bool,
) -> (Vec<CpuSet>, Vec<CpuSet>) {
    if cell.caches.len() < 2 {
        return (cores, Vec::new());
    }
    let mut groups: Vec<Vec<CpuSet>> = vec![Vec::new(); cell.caches.len() + 1];
    for core in cores {
        let cache = cell.caches.iter().position(|cache| cache.intersection_len(&core) > 0);
        groups[cache.unwrap_or(cell.caches.len())].push(core);
    }
    let threads = |group: &Vec<CpuSet>| group.iter().map(CpuSet::len).sum::<u32>();
    groups.sort_by_key(threads);
    let mut near = match groups.iter().position(|group| enough(group)) {
        Some(one) => groups.remove(one),
        None => Vec::new(),
    };
    while !enough(&near) {
        let Some(mut freest) = groups.pop() else { break };
        near.append(&mut freest);
    }
    (near, groups.concat())
}

/// How many wholly free cores [`choose`] would break, which is to take some threads of and leave others.
pub(super) fn broken_cores(cell: &Cell, vcpus: &CpuSet, wanted: Wanted) -> u32 {
    let counted = || broken_by_count(cell, wanted);
    let counted = if vcpus.is_empty() { Some(0) } else { pairs::broken(cell, wanted).or_else(counted) };
    counted.unwrap_or_else(|| broken_by_choice(cell, &choose(cell, vcpus, wanted)))
}

fn broken_by_choice(cell: &Cell, pinning: &Pinning) -> u32 {
    let mut taken: CpuSet = pinning.pins.cpus().collect();
    taken.extend_from(&pinning.emulator_cpus);
    taken.extend_from(&pinning.idle_cpus);
    let broken = |core: &&CpuSet| {
        let held = core.intersection_len(&taken);
        held > 0
            && held < core.len()
            && core.count_where(&cell.dedicated_cpus, &cell.pinned_cpus) == core.len()
    };
    cell.cores.iter().filter(broken).count() as u32
}

/// Threads of a core that are counted by.
const COUNTED_THREADS: usize = 8;

/// The same, as [`pack`] would choose, but counted: how many cores have how many free threads is all that matters where
/// cores are of one size, under one cache, and no emulator wants a CPU. None elsewhere.
fn broken_by_count(cell: &Cell, wanted: Wanted) -> Option<u32> {
    let size =
        cell.cores.first().map(CpuSet::len).filter(|size| (2..=COUNTED_THREADS as u32).contains(size))?;
    if wanted.emulator > 0 || cell.caches.len() > 1 || cell.cores.iter().any(|core| core.len() != size) {
        return None;
    }
    // Whole cores are taken, and their idle siblings are held.
    let no_lone = match wanted.policy {
        Some(ThreadPolicy::Isolate) => return Some(0),
        Some(ThreadPolicy::Require) => true,
        None | Some(ThreadPolicy::Prefer) => false,
    };
    let mut cores = [0_u32; COUNTED_THREADS + 1];
    let mut in_cores = 0;
    for core in cell.cores.iter() {
        let free = core.count_where(&cell.dedicated_cpus, &cell.pinned_cpus);
        cores[free as usize] += 1;
        in_cores += free;
    }
    // None when cores overlap.
    cores[1] += cell.free_cpu_count().checked_sub(in_cores)?;
    let (mut wanted, mut broken) = (wanted.vcpus, 0);
    while wanted > 0 {
        let least = if no_lone { wanted.min(2) } else { 1 };
        let held = |free: &u32| cores[*free as usize] > 0;
        let whole = (least..=wanted.min(size)).rev().find(held);
        // Of a core with fewer threads than two, `require` takes none at all.
        let usable = |free: &u32| held(free) && (!no_lone || *free >= 2);
        let Some(free) = whole.filter(usable).or_else(|| (least.max(1)..=size).find(usable)) else { break };
        let mut take = free.min(wanted);
        if no_lone && wanted - take == 1 && take > 2 {
            take -= 1;
        }
        // What is left of it is too little to be taken from again.
        cores[free as usize] -= 1;
        broken += u32::from(free == size && take < free);
        wanted -= take;
    }
    Some(broken)
}

/// Takes `count` CPUs out of the free cores: whole groups as large as fit, then part of the smallest that is
/// large enough. With `no_lone`, no CPU is taken alone from a core if that can be helped.
fn pack(cores: &mut [CpuSet], count: u32, no_lone: bool) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(count as usize);
    while (chosen.len() as u32) < count {
        let wanted = count - chosen.len() as u32;
        let least = if no_lone { wanted.min(2) } else { 1 };
        let usable = |core: &&mut CpuSet| core.len() >= least;
        let fitting = cores.iter_mut().filter(usable).filter(|core| core.len() <= wanted);
        // Of equals, the first.
        let whole = fitting.reduce(|best, core| if core.len() > best.len() { core } else { best });
        let core = match whole {
            Some(core) => core,
            None => match cores.iter_mut().filter(usable).min_by_key(|core| core.len()) {
                Some(core) => core,
                None => break,
            },
        };
        let mut take = core.len().min(wanted);
        if no_lone && wanted - take == 1 && take > 2 {
            take -= 1;
        }
        let taken: CpuSet = core.iter().take(take as usize).collect();
        core.subtract(&taken);
        chosen.extend(taken.iter());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::cores::Cores;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn cores_that_would_be_broken_are_counted_as_they_are_chosen(
            size in 1..5_u32,
            cores in 1..9_u32,
            bits in (any::<u64>(), any::<u64>()),
            lone in 0..3_u32,
            wanted in wanted(),
        ) {
            let cell = cell((0..cores).map(|core| (core * size..(core + 1) * size).collect()).collect(), size * cores + lone, bits, wanted);
            if check(&cell, wanted).is_ok()
                && let Some(counted) = broken_by_count(&cell, wanted)
            {
                let vcpus = CpuSet::first_n(wanted.vcpus);
                prop_assert_eq!(counted, broken_by_choice(&cell, &choose_by_core(&cell, &vcpus, wanted)));
            }
        }

        #[test]
        fn pairs_are_chosen_at_once_as_they_are_one_by_one(
            (stride, runs) in (0..40_u32, 1..4_u32),
            (low, lone) in (0..3_u32, 0..3_u32),
            bits in (any::<u64>(), any::<u64>()),
            far in prop::sample::select(vec![0, 30, 60, 100, 200, 400]),
            cores_per_cache in 1..20_usize,
            wanted in wanted(),
        ) {
            // Runs of first threads, each followed by its run of second threads; lone CPUs below and above.
            let run = |run: u32| (0..stride.max(1)).map(move |at| low + run * 2 * stride.max(1) + at);
            let firsts: Vec<u32> = (0..runs).flat_map(run).take(15).collect();
            let core = |cpu: &u32| [far + cpu, far + cpu + stride].into_iter().collect::<CpuSet>();
            let last = firsts.last().map_or(0, |cpu| cpu + stride);
            let cell = cell(firsts.iter().map(core).collect(), far + last + 1 + lone, bits, wanted);
            prop_assert!(cell.cores.pairs().is_some());
            let vcpus = CpuSet::first_n(wanted.vcpus);
            // Under one cache, and under several, with the lone ones under none.
            let mut several = cell.clone();
            several.caches = cell.cores.chunks(cores_per_cache).map(|cores| cores.iter().flat_map(CpuSet::iter).collect()).collect();
            for (cell, always) in [(&cell, true), (&several, several.caches.len() < 2)] {
                if check(cell, wanted).is_ok() {
                    let by_core = choose_by_core(cell, &vcpus, wanted);
                    let broken = pairs::broken(cell, wanted);
                    prop_assert_eq!(broken.unwrap_or_else(|| broken_by_choice(cell, &by_core)), broken_by_choice(cell, &by_core));
                    let chosen = pairs::choose(cell, &vcpus, wanted);
                    prop_assert!(!always || (chosen.is_some() && broken.is_some()));
                    prop_assert_eq!(chosen.unwrap_or_else(|| by_core.clone()), by_core);
                }
            }
            let FreeCounts { whole, single } = pairs::count(&cell).unwrap();
            let cores = FreeCores::of(&cell).cores;
            let with = |threads: u32| cores.iter().filter(|core| core.len() == threads).count() as u32;
            prop_assert_eq!((single, whole), (with(1), with(2)));
        }
    }

    fn wanted() -> impl Strategy<Value = Wanted> {
        let policies =
            vec![None, Some(ThreadPolicy::Prefer), Some(ThreadPolicy::Require), Some(ThreadPolicy::Isolate)];
        let numbers = (1..9_u32, prop_oneof![Just(0_u32), 1..4_u32]);
        (numbers, prop::sample::select(policies)).prop_map(|((vcpus, emulator), policy)| Wanted {
            vcpus,
            emulator,
            policy,
        })
    }

    /// A cell of `cpus` CPUs, of which bits say which may be pinned and which are; `isolate` wants one common set.
    fn cell(cores: Cores, cpus: u32, (dedicated, pinned): (u64, u64), wanted: Wanted) -> Cell {
        let of = |mask: u64| (0..cpus).filter(|cpu| mask & (1 << (cpu % 64)) != 0).collect::<CpuSet>();
        let all = u64::from(wanted.policy == Some(ThreadPolicy::Isolate)).wrapping_neg();
        let dedicated = of(dedicated | all);
        Cell {
            pinned_cpus: of(pinned).intersection(&dedicated),
            shared_cpus: dedicated.clone(),
            dedicated_cpus: dedicated,
            cores,
            ..Cell::default()
        }
    }
}
