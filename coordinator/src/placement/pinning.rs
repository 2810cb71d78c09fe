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
        for core in &cell.cores {
            let free = core.intersection(&rest);
            if !free.is_empty() {
                rest.subtract(&free);
                cores.push(free);
            }
        }
        cores.extend(rest.iter().map(|cpu| CpuSet::from_iter([cpu])));
        Self { threads_per_core: cell.threads_per_core(), cores }
    }

    fn with_at_least(&self, threads: u32) -> u32 {
        self.cores.iter().filter(|core| core.len() >= threads).count() as u32
    }

    fn threads(&self) -> u32 {
        self.cores.iter().map(CpuSet::len).sum()
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
    let free = FreeCores::of(cell);
    if wanted > u64::from(free.threads()) {
        return Err(Shortfall::new(Rule::CpuDedicatedFree, Quantity::Cpus(wanted), needs(free.threads())));
    }
    match guest.thread_policy {
        None | Some(ThreadPolicy::Prefer) if vcpus == 0 && emulator > 0 => {
            // The emulator's own CPU goes with pinned vCPUs; this cell has none to go with.
            Err(Shortfall::new(Rule::EmulatorCpusFree, needs(emulator), needs(0)))
        }
        None | Some(ThreadPolicy::Prefer) => Ok(()),
        Some(ThreadPolicy::Require) => check_require(&free, vcpus, emulator),
        Some(ThreadPolicy::Isolate) => check_isolate(cell, &free, vcpus, emulator),
    }
}

fn check_require(free: &FreeCores, vcpus: u32, emulator: u32) -> Result<(), Shortfall> {
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

fn check_isolate(cell: &Cell, free: &FreeCores, vcpus: u32, emulator: u32) -> Result<(), Shortfall> {
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

/// Chooses the CPUs, given that [`check`] said they are there. Whole sibling groups are left to others where
/// that is possible, and the choice depends on nothing but its arguments.
pub(super) fn choose(cell: &Cell, guest: &GuestCell, emulator: u32) -> Pinning {
    if !guest.pins() || guest.dedicated.is_empty() {
        return Pinning::default();
    }
    let FreeCores { threads_per_core, mut cores } = FreeCores::of(cell);
    let vcpus = guest.dedicated.len();
    let mut pinning = Pinning::default();
    let chosen = match guest.thread_policy {
        Some(ThreadPolicy::Isolate) => {
            cores.sort_by_key(|core| core.len() != threads_per_core);
            let taken: Vec<CpuSet> = cores.drain(..(vcpus as usize).min(cores.len())).collect();
            let first: Vec<u32> = taken.iter().filter_map(|core| core.iter().next()).collect();
            for (core, cpu) in taken.iter().zip(&first) {
                pinning.idle_cpus.extend(core.iter().filter(|other| other != cpu));
            }
            // The emulator's core is taken whole as well where there is a whole one.
            cores.sort_by_key(|core| core.len() != threads_per_core);
            first
        }
        Some(ThreadPolicy::Require) => {
            let (mut siblings, lone): (Vec<_>, Vec<_>) = cores.into_iter().partition(|core| core.len() >= 2);
            let chosen = pack(&mut siblings, vcpus, true);
            siblings.extend(lone);
            cores = siblings;
            cores.sort_by_key(CpuSet::len);
            chosen
        }
        None | Some(ThreadPolicy::Prefer) => {
            let chosen = pack(&mut cores, vcpus, false);
            cores.sort_by_key(CpuSet::len);
            chosen
        }
    };
    pinning.emulator_cpus = cores.iter().flat_map(CpuSet::iter).take(emulator as usize).collect();
    pinning.pins = guest.dedicated.iter().zip(chosen).collect();
    pinning
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
