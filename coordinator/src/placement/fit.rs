//! Whether a guest's cells fit into a host's cells, and exactly where: each guest cell into a host cell of its own.
//!
//! Whether one guest cell fits one host cell does not depend on the others, so the map is a bipartite matching:
//! exact, and polynomial where trying permutations is not.

use super::cell::Cell;
use super::cpu_set::CpuSet;
use super::explain::{CellPair, FitError, Quantity, Rule, Shortfall};
use super::guest::{Guest, GuestCell, PageSize};
use super::pinning::{self, Pinning};

/// How far shared CPUs and memory may be overcommitted. A ratio that is no number allows nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Floating vCPUs for each shared CPU.
    pub cpu_ratio: f64,
    /// Memory of guests for each byte of ordinary memory.
    pub memory_ratio: f64,
}

impl Default for Limits {
    /// 16 vCPUs a CPU, and no more memory than there is.
    fn default() -> Self {
        Self { cpu_ratio: 16.0, memory_ratio: 1.0 }
    }
}

impl Limits {
    /// The most that `total` may be used under `ratio`, whole units.
    pub(super) fn capacity(total: u64, ratio: f64) -> u64 {
        // A float too large, negative or not a number saturates: u64::MAX, 0 and 0.
        (total as f64 * ratio) as u64
    }
}

/// Which host cells to prefer, of those that fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// The least used first.
    #[default]
    Spread,
    /// The most used first.
    Pack,
}

/// Where one guest cell goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedCell {
    /// The guest's cell, counted from 0.
    pub guest: u32,
    /// The host's cell.
    pub host: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Page size in KiB, when the guest asked for one.
    pub page_size_kib: Option<u64>,
    /// vCPUs that float over the host cell's shared CPUs.
    pub shared_vcpus: CpuSet,
    /// Pinned vCPUs and the emulator's CPUs.
    pub pinning: Pinning,
}

/// Fits a guest into a host's cells. The same arguments always give the same answer.
pub fn fit(
    hosts: &[Cell],
    guest: &Guest,
    limits: Option<&Limits>,
    order: Order,
) -> Result<Vec<PlacedCell>, FitError> {
    let count = |cells: usize| Quantity::Cells(cells as u64);
    if hosts.len() < guest.cells.len() {
        return Err(Shortfall::new(Rule::CellCount, count(guest.cells.len()), count(hosts.len())).into());
    }
    let hosts = in_order(hosts, guest, order);
    let mut candidates = Vec::with_capacity(guest.cells.len());
    for index in 0..guest.cells.len() {
        candidates.push(candidates_of(&hosts, guest, index, limits)?);
    }
    let chosen = Matching::new(&candidates).solve();
    let matched = chosen.iter().flatten().count();
    if matched < guest.cells.len() {
        return Err(Shortfall::new(Rule::CellMatching, count(guest.cells.len()), count(matched)).into());
    }
    let placed = guest.cells.iter().enumerate().zip(chosen.into_iter().flatten());
    Ok(placed.map(|((index, cell), host)| place_cell(hosts[host], guest, index, cell)).collect())
}

fn place_cell(host: &Cell, guest: &Guest, index: usize, cell: &GuestCell) -> PlacedCell {
    PlacedCell {
        guest: index as u32,
        host: host.id,
        memory_mib: cell.memory_mib,
        page_size_kib: cell.page_size.and_then(|_| page_size(host, cell).ok()),
        shared_vcpus: cell.shared.clone(),
        pinning: pinning::choose(host, cell, guest.emulator_cpus(index)),
    }
}

/// The host's cells in the order of preference. It only matters when the guest leaves some cells free.
fn in_order<'h>(hosts: &'h [Cell], guest: &Guest, order: Order) -> Vec<&'h Cell> {
    let mut ordered: Vec<&Cell> = hosts.iter().collect();
    if hosts.len() > guest.cells.len() {
        let pinned = guest.cells.first().is_some_and(GuestCell::pins);
        // The smaller, the less used.
        let usage = |cell: &&Cell| {
            let memory = i128::from(cell.memory_used_mib) - i128::from(cell.memory_mib);
            match pinned {
                true => (-i64::from(cell.free_cpus().len()), memory),
                false => (i64::from(cell.shared_cpus_used), memory),
            }
        };
        match order {
            Order::Spread => ordered.sort_by_cached_key(usage),
            Order::Pack => ordered.sort_by_cached_key(|cell| std::cmp::Reverse(usage(cell))),
        }
    }
    ordered
}

/// The host cells (by index) that could hold guest cell `index` alone; else why the nearest of them cannot.
fn candidates_of(
    hosts: &[&Cell],
    guest: &Guest,
    index: usize,
    limits: Option<&Limits>,
) -> Result<Vec<usize>, FitError> {
    let cell = &guest.cells[index];
    let mut fitting = Vec::new();
    let mut nearest: Option<FitError> = None;
    for (at, host) in hosts.iter().enumerate() {
        match check_cell(host, cell, guest.emulator_cpus(index), limits) {
            Ok(()) => fitting.push(at),
            Err(shortfall) if nearest.is_none_or(|best| shortfall.rule > best.shortfall.rule) => {
                let cells = Some(CellPair { guest: index as u32, host: host.id });
                nearest = Some(FitError { shortfall, cells });
            }
            Err(_) => {}
        }
    }
    match nearest {
        Some(error) if fitting.is_empty() => Err(error),
        _ => Ok(fitting),
    }
}

/// Whether one guest cell fits into one host cell, with `emulator` CPUs beside its pinned vCPUs.
pub fn check_cell(
    host: &Cell,
    guest: &GuestCell,
    emulator: u32,
    limits: Option<&Limits>,
) -> Result<(), Shortfall> {
    check_memory(host, guest)?;
    if guest.floats() {
        check_shared_total(host, guest)?;
    }
    pinning::check(host, guest, emulator)?;
    match limits {
        Some(limits) if guest.floats() => check_overcommit(host, guest, limits),
        _ => Ok(()),
    }
}

fn check_memory(host: &Cell, guest: &GuestCell) -> Result<(), Shortfall> {
    if guest.page_size.is_some() {
        return page_size(host, guest).map(drop);
    }
    // Ordinary memory may be overcommitted, but no guest against itself; pinned guests not at all.
    let Some(pool) = host.smallest_pool() else {
        let (rule, have) = match guest.pins() {
            true => (Rule::CellMemoryFree, host.memory_mib.saturating_sub(host.memory_used_mib)),
            false => (Rule::CellMemoryTotal, host.memory_mib),
        };
        let (need, had) = (Quantity::MemoryMib(guest.memory_mib), Quantity::MemoryMib(have));
        return if guest.memory_mib <= have { Ok(()) } else { Err(Shortfall::new(rule, need, had)) };
    };
    let size_kib = pool.size_kib;
    let pages = |count| Quantity::Pages { count, size_kib };
    let Some(need) = pool.pages_for(guest.memory_mib) else {
        let need = Quantity::MemoryMib(guest.memory_mib);
        return Err(Shortfall::new(Rule::PageAlignment, need, pages(pool.total)));
    };
    let have = if guest.pins() { pool.free() } else { pool.total };
    if need > have {
        return Err(Shortfall::new(Rule::PagesFree, pages(need), pages(have)));
    }
    Ok(())
}

/// The page size in KiB that serves the guest cell's request here: the largest that does.
pub fn page_size(host: &Cell, guest: &GuestCell) -> Result<u64, Shortfall> {
    let wish = guest.page_size.unwrap_or(PageSize::Any);
    let mut pools = host.page_pools.clone();
    pools.sort_by_key(|pool| std::cmp::Reverse(pool.size_kib));
    let asked = match wish {
        PageSize::Small => &pools[pools.len().saturating_sub(1)..],
        PageSize::Large => &pools[..pools.len().saturating_sub(1)],
        PageSize::Any => &pools[..],
        PageSize::Kib(kib) => {
            pools.retain(|pool| pool.size_kib == kib);
            &pools[..]
        }
    };
    let mut nearest = None;
    for pool in asked {
        let pages = |count| Quantity::Pages { count, size_kib: pool.size_kib };
        let shortfall = match pool.pages_for(guest.memory_mib) {
            Some(need) if need <= pool.free() => return Ok(pool.size_kib),
            Some(need) => Shortfall::new(Rule::PagesFree, pages(need), pages(pool.free())),
            None => {
                let need = Quantity::MemoryMib(guest.memory_mib);
                Shortfall::new(Rule::PageAlignment, need, pages(pool.free()))
            }
        };
        if nearest.is_none_or(|best: Shortfall| shortfall.rule > best.rule) {
            nearest = Some(shortfall);
        }
    }
    let none = || Shortfall::new(Rule::PageSizeSupported, Quantity::PageSize(wish), Quantity::Pools(0));
    Err(nearest.unwrap_or_else(none))
}

fn check_shared_total(host: &Cell, guest: &GuestCell) -> Result<(), Shortfall> {
    let (need, have) = (guest.shared.len(), host.shared_cpus.len());
    if need > have {
        let (need, have) = (Quantity::Vcpus(u64::from(need)), Quantity::Cpus(u64::from(have)));
        return Err(Shortfall::new(Rule::CpuSharedTotal, need, have));
    }
    Ok(())
}

fn check_overcommit(host: &Cell, guest: &GuestCell, limits: &Limits) -> Result<(), Shortfall> {
    let need = u64::from(guest.shared.len());
    let used = u64::from(host.shared_cpus_used);
    let capacity = Limits::capacity(u64::from(host.shared_cpus.len()), limits.cpu_ratio);
    if used + need > capacity {
        let have = Quantity::Vcpus(capacity.saturating_sub(used));
        return Err(Shortfall::new(Rule::CpuSharedFree, Quantity::Vcpus(need), have));
    }
    let need = guest.memory_mib;
    let capacity = Limits::capacity(host.memory_mib, limits.memory_ratio);
    if host.memory_used_mib.saturating_add(need) > capacity {
        let have = Quantity::MemoryMib(capacity.saturating_sub(host.memory_used_mib));
        return Err(Shortfall::new(Rule::CellMemoryOvercommit, Quantity::MemoryMib(need), have));
    }
    Ok(())
}

/// A maximum matching of guest cells to host cells by augmenting paths.
struct Matching<'c> {
    /// For each guest cell, the host cells that fit, the preferred first.
    candidates: &'c [Vec<usize>],
    /// For each host cell, the guest cell it has.
    guest_of: Vec<Option<usize>>,
}

impl<'c> Matching<'c> {
    fn new(candidates: &'c [Vec<usize>]) -> Self {
        let hosts = candidates.iter().flatten().max().map_or(0, |last| last + 1);
        Self { candidates, guest_of: vec![None; hosts] }
    }

    /// For each guest cell the host cell it gets, as many as can have one.
    fn solve(mut self) -> Vec<Option<usize>> {
        for guest in 0..self.candidates.len() {
            let mut tried = vec![false; self.guest_of.len()];
            self.assign(guest, &mut tried);
        }
        let mut host_of = vec![None; self.candidates.len()];
        for (host, guest) in self.guest_of.iter().enumerate() {
            if let Some(guest) = guest {
                host_of[*guest] = Some(host);
            }
        }
        host_of
    }

    /// Gives the guest cell a host cell, moving others if need be. Depth is bounded by the number of guest cells.
    fn assign(&mut self, guest: usize, tried: &mut [bool]) -> bool {
        let candidates = &self.candidates[guest];
        if let Some(&host) = candidates.iter().find(|&&host| self.guest_of[host].is_none()) {
            self.guest_of[host] = Some(guest);
            return true;
        }
        for &host in candidates {
            if std::mem::replace(&mut tried[host], true) {
                continue;
            }
            let moved = self.guest_of[host].is_none_or(|other| self.assign(other, tried));
            if moved {
                self.guest_of[host] = Some(guest);
                return true;
            }
        }
        false
    }
}
