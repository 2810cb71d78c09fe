//! Which host CPUs a guest cell's dedicated vCPUs and its emulator get inside one host cell.

use std::collections::BTreeMap;

use super::cell::Cell;
use super::cpu_set::CpuSet;
use super::explain::{Quantity, Rule, Shortfall};
use super::guest::{GuestCell, ThreadPolicy};

/// The host CPUs of one guest cell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pinning {
    /// vCPU to host CPU.
    pub pins: BTreeMap<u32, u32>,
    /// Host CPUs for the emulator's threads.
    pub emulator_cpus: CpuSet,
    /// Free siblings of pinned CPUs that must stay idle (thread policy isolate).
    pub idle_cpus: CpuSet,
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

/// How many threads are free of each core that has any: what [`check`] needs, without a set for each core.
pub(super) struct FreeThreads {
    pub(super) threads_per_core: u32,
    pub(super) by_core: Vec<u32>,
}

impl FreeThreads {
    pub(super) fn of(cell: &Cell) -> Self {
        let free = cell.free_cpu_count();
        let of_core = |core: &CpuSet| core.count_where(&cell.dedicated_cpus, &cell.pinned_cpus);
        let mut by_core: Vec<u32> = cell.cores.iter().map(of_core).filter(|&threads| threads > 0).collect();
        let in_cores: u32 = by_core.iter().sum();
        match free.checked_sub(in_cores) {
            Some(lone) => by_core.extend(std::iter::repeat_n(1, lone as usize)),
            // Cores that overlap: count each CPU once.
            None => by_core = FreeCores::of(cell).cores.iter().map(CpuSet::len).collect(),
        }
        Self { threads_per_core: cell.threads_per_core(), by_core }
    }

    pub(super) fn with_at_least(&self, threads: u32) -> u32 {
        self.by_core.iter().filter(|&&free| free >= threads).count() as u32
    }

    fn threads(&self) -> u32 {
        self.by_core.iter().sum()
    }
}

/// Whether the guest cell's dedicated vCPUs and `emulator` more CPUs fit into the free CPUs of the host cell.
///
/// The order of the checks is from the coarse to the fine, so that the shortfall named is the one to fix first.
pub(super) fn check(cell: &Cell, guest: &GuestCell, emulator: u32) -> Result<(), Shortfall> {
    if !guest.pins() {
        return Ok(());
    }
    let vcpus = guest.dedicated.len();
    let wanted = u64::from(vcpus) + u64::from(emulator);
    let needs = |have: u32| Quantity::Cpus(u64::from(have));
    if wanted > u64::from(cell.dedicated_cpus.len()) {
        let have = needs(cell.dedicated_cpus.len());
        return Err(Shortfall::new(Rule::CpuDedicatedTotal, Quantity::Cpus(wanted), have));
    }
    let free_cpus = cell.free_cpu_count();
    if wanted > u64::from(free_cpus) {
        return Err(Shortfall::new(Rule::CpuDedicatedFree, Quantity::Cpus(wanted), needs(free_cpus)));
    }
    match guest.thread_policy {
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
    // The same number of threads, two or more, is taken of each core.
    let room = (2..=free.threads_per_core)
        .map(|threads| u64::from(threads) * u64::from(free.with_at_least(threads)))
        .max()
        .unwrap_or(0);
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
pub(super) fn choose(cell: &Cell, guest: &GuestCell, emulator: u32) -> Pinning {
    if !guest.pins() || guest.dedicated.is_empty() {
        return Pinning::default();
    }
    let FreeCores { threads_per_core, cores } = FreeCores::of(cell);
    let vcpus = guest.dedicated.len();
    let mut pinning = Pinning::default();
    let enough = |cores: &[CpuSet]| room(cores, guest.thread_policy, threads_per_core) >= u64::from(vcpus);
    let (mut near, mut far) = near_cores(cell, cores, enough);
    let chosen = match guest.thread_policy {
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
    pinning.pins = guest.dedicated.iter().zip(chosen).collect();
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

/// How many wholly free cores the pinning breaks: takes some threads of, and leaves others.
pub(super) fn broken_cores(cell: &Cell, pinning: &Pinning) -> u32 {
    let mut taken: CpuSet = pinning.pins.values().copied().collect();
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
