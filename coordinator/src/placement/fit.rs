//! Whether a guest's cells fit into a host's cells, and exactly where: each guest cell into a host cell of its own.
//!
//! Whether one guest cell fits one host cell does not depend on the others, so the map is a bipartite matching:
//! exact, and polynomial where trying permutations is not.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::cell::{Cell, PagePool};
use super::cpu_set::CpuSet;
use super::explain::{CellPair, FitError, Quantity, Rule, Shortfall};
use super::guest::{Guest, GuestCell, PageSize};
use super::matching::{MAX_CELLS, Matching};
use super::needs::Needs;
use super::pinning::{self, Pinning};
use super::prefer;

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

/// Which hosts and host cells to prefer, of those that fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
///
/// Of all right answers it takes one whose cells are near one another and near the underlay's device, then one that
/// breaks the fewest sibling groups and runs of huge pages, then the least used cells (or the most used). Guests that
/// share CPUs go to the least used cells first.
pub fn fit(
    hosts: &[Cell],
    guest: &Guest,
    limits: Option<&Limits>,
    order: Order,
) -> Result<Vec<PlacedCell>, FitError> {
    let count = |cells: usize| Quantity::Cells(cells as u64);
    let guests = guest.cells.len();
    if hosts.len().min(MAX_CELLS) < guests {
        let have = count(hosts.len().min(MAX_CELLS));
        return Err(Shortfall::new(Rule::CellCount, count(guests), have).into());
    }
    let needs: SmallVec<[Needs; 2]> = (0..guests).map(|index| Needs::of(guest, index)).collect();
    let mut matching = Matching::new(guests, hosts.len());
    for (index, its) in needs.iter().enumerate() {
        match needs[..index].iter().position(|twin| twin == its) {
            Some(twin) => matching.allow_as(twin, index),
            None => allow_fitting(&mut matching, hosts, index, its, limits)?,
        }
    }
    let chosen = prefer::choose(hosts, guest, &needs, &matching, order);
    let matched = chosen.iter().flatten().count();
    if matched < guests {
        return Err(Shortfall::new(Rule::CellMatching, count(guests), count(matched)).into());
    }
    let mut placed = Vec::with_capacity(guests);
    for (index, host) in chosen.iter().flatten().enumerate() {
        placed.push(place_cell(&hosts[*host], index, &guest.cells[index], &needs[index]));
    }
    Ok(placed)
}

fn place_cell(host: &Cell, index: usize, cell: &GuestCell, needs: &Needs) -> PlacedCell {
    PlacedCell {
        guest: index as u32,
        host: host.id,
        memory_mib: cell.memory_mib,
        page_size_kib: needs.page_size.and_then(|wish| Some(serving(host, wish, needs.memory_mib)?.size_kib)),
        shared_vcpus: cell.shared.clone(),
        pinning: if needs.pins() {
            pinning::choose(host, &cell.dedicated, needs.wanted)
        } else {
            Pinning::default()
        },
    }
}

/// Allows guest cell `index` the host cells that could hold it alone; else says why the nearest of them cannot.
fn allow_fitting(
    matching: &mut Matching,
    hosts: &[Cell],
    index: usize,
    needs: &Needs,
    limits: Option<&Limits>,
) -> Result<(), FitError> {
    let mut fits = false;
    let mut nearest: Option<(Shortfall, u32)> = None;
    for (at, host) in hosts.iter().enumerate() {
        match check_cell(host, needs, limits) {
            Ok(()) => {
                fits = true;
                matching.allow(index, at);
            }
            Err(_) if fits => {}
            Err(shortfall) if nearest.as_ref().is_none_or(|(best, _)| shortfall.rule > best.rule) => {
                nearest = Some((shortfall, host.id));
            }
            Err(_) => {}
        }
    }
    match nearest {
        Some((shortfall, host)) if !fits => {
            Err(FitError { shortfall, cells: Some(CellPair { guest: index as u32, host }) })
        }
        _ => Ok(()),
    }
}

/// Whether one guest cell fits into one host cell.
fn check_cell(host: &Cell, needs: &Needs, limits: Option<&Limits>) -> Result<(), Shortfall> {
    let vcpus = u64::from(needs.shared) + u64::from(needs.wanted.vcpus);
    if vcpus > 0 && !host.has_cpus() {
        return Err(Shortfall::new(Rule::CellCpus, Quantity::Vcpus(vcpus), Quantity::Cpus(0)));
    }
    check_memory(host, needs)?;
    if needs.floats() {
        check_shared_total(host, needs)?;
    }
    if needs.pins() {
        pinning::check(host, needs.wanted)?;
    }
    match limits {
        Some(limits) if needs.floats() => check_overcommit(host, needs, limits),
        _ => Ok(()),
    }
}

fn check_memory(host: &Cell, needs: &Needs) -> Result<(), Shortfall> {
    if let Some(wish) = needs.page_size {
        return match serving(host, wish, needs.memory_mib) {
            Some(_) => Ok(()),
            None => Err(no_pages(host, wish, needs.memory_mib)),
        };
    }
    // Ordinary memory may be overcommitted, but no guest against itself; pinned guests not at all.
    let Some(pool) = host.smallest_pool() else {
        let (rule, have) = match needs.pins() {
            true => (Rule::CellMemoryFree, host.memory_mib.saturating_sub(host.memory_used_mib)),
            false => (Rule::CellMemoryTotal, host.memory_mib),
        };
        let (need, had) = (Quantity::MemoryMib(needs.memory_mib), Quantity::MemoryMib(have));
        return if needs.memory_mib <= have { Ok(()) } else { Err(Shortfall::new(rule, need, had)) };
    };
    let size_kib = pool.size_kib;
    let pages = |count| Quantity::Pages { count, size_kib };
    let Some(need) = pool.pages_for(needs.memory_mib) else {
        let need = Quantity::MemoryMib(needs.memory_mib);
        return Err(Shortfall::new(Rule::PageAlignment, need, pages(pool.total)));
    };
    let have = if needs.pins() { pool.free() } else { pool.total };
    if need > have {
        return Err(Shortfall::new(Rule::PagesFree, pages(need), pages(have)));
    }
    Ok(())
}

/// The page size in KiB that serves the guest cell's request here: the largest that does.
pub fn page_size(host: &Cell, guest: &GuestCell) -> Result<u64, Shortfall> {
    let wish = guest.page_size.unwrap_or(PageSize::Any);
    let pool = serving(host, wish, guest.memory_mib);
    pool.map(|pool| pool.size_kib).ok_or_else(|| no_pages(host, wish, guest.memory_mib))
}

/// The pool of pages as wished that has this memory free; the one with the largest pages.
pub(super) fn serving(host: &Cell, wish: PageSize, memory_mib: u64) -> Option<&PagePool> {
    let serves = |pool: &&PagePool| pool.pages_for(memory_mib).is_some_and(|need| need <= pool.free());
    asked(host, wish).filter(serves).max_by_key(|pool| pool.size_kib)
}

fn asked(host: &Cell, wish: PageSize) -> impl Iterator<Item = &PagePool> {
    let smallest = host.smallest_pool().map(|pool| pool.size_kib);
    host.page_pools.iter().filter(move |pool| match wish {
        PageSize::Kib(kib) => pool.size_kib == kib,
        PageSize::Small => Some(pool.size_kib) == smallest,
        PageSize::Large => Some(pool.size_kib) != smallest,
        PageSize::Any => true,
    })
}

/// Why no pool serves: of those that came nearest, the largest.
fn no_pages(host: &Cell, wish: PageSize, memory_mib: u64) -> Shortfall {
    let need = |pool: &PagePool| pool.pages_for(memory_mib);
    let nearest = asked(host, wish).max_by_key(|pool| (need(pool).is_some(), pool.size_kib));
    let shortfall = |pool: &PagePool| {
        let pages = |count| Quantity::Pages { count, size_kib: pool.size_kib };
        match need(pool) {
            Some(need) => Shortfall::new(Rule::PagesFree, pages(need), pages(pool.free())),
            None => {
                let need = Quantity::MemoryMib(memory_mib);
                Shortfall::new(Rule::PageAlignment, need, pages(pool.free()))
            }
        }
    };
    let none = || Shortfall::new(Rule::PageSizeSupported, Quantity::PageSize(wish), Quantity::Pools(0));
    nearest.map_or_else(none, shortfall)
}

fn check_shared_total(host: &Cell, needs: &Needs) -> Result<(), Shortfall> {
    let (need, have) = (needs.shared, host.shared_cpus.len());
    if need > have {
        let (need, have) = (Quantity::Vcpus(u64::from(need)), Quantity::Cpus(u64::from(have)));
        return Err(Shortfall::new(Rule::CpuSharedTotal, need, have));
    }
    Ok(())
}

fn check_overcommit(host: &Cell, needs: &Needs, limits: &Limits) -> Result<(), Shortfall> {
    let need = u64::from(needs.shared);
    let used = u64::from(host.shared_cpus_used);
    let capacity = Limits::capacity(u64::from(host.shared_cpus.len()), limits.cpu_ratio);
    if used + need > capacity {
        let have = Quantity::Vcpus(capacity.saturating_sub(used));
        return Err(Shortfall::new(Rule::CpuSharedFree, Quantity::Vcpus(need), have));
    }
    let need = needs.memory_mib;
    let capacity = Limits::capacity(host.memory_mib, limits.memory_ratio);
    if host.memory_used_mib.saturating_add(need) > capacity {
        let have = Quantity::MemoryMib(capacity.saturating_sub(host.memory_used_mib));
        return Err(Shortfall::new(Rule::CellMemoryOvercommit, Quantity::MemoryMib(need), have));
    }
    Ok(())
}
