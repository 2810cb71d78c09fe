//! Of the host cells that fit, which to take.

use super::cell::Cell;
use super::fit::{self, Order};
use super::guest::{Guest, GuestCell};
use super::matching::Matching;
use super::pinning;

/// How little a host cell is liked for a guest; the smaller, the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// vCPUs that already share its CPUs, when the guest's would as well.
    crowd: i64,
    /// The distance to the cell of the underlay's device.
    underlay: u32,
    /// Wholly free cores that would be broken.
    broken_cores: u32,
    /// Huge pages that would be left: the fewest, so that another cell keeps its run whole.
    pages_left: u64,
    /// CPUs and memory in use, by the order asked for.
    usage: (i64, i128),
}

/// For each guest cell the host cell (by index) that it gets. As many get one as can.
pub(super) fn choose(hosts: &[Cell], guest: &Guest, matching: &Matching, order: Order) -> Vec<Option<usize>> {
    let guests = guest.cells.len();
    if hosts.len() == guests || guests == 0 {
        return matching.solve(0..hosts.len());
    }
    let mut ranked: Vec<usize> = (0..hosts.len()).filter(|&at| matching.is_useful(at)).collect();
    if ranked.len() > 1 {
        let underlay = hosts.iter().find(|cell| cell.has_underlay);
        ranked.sort_by_cached_key(|&at| cost(&hosts[at], underlay, matching.is_allowed(0, at), guest, order));
    }
    let first = matching.solve(ranked.iter().copied());
    if guests == 1 || first.contains(&None) || is_flat(hosts, &ranked) {
        return first;
    }
    // The cells nearest to each cell in turn; sets of equal distance go by rank.
    let mut best = (spread(hosts, &first), first);
    for &seed in &ranked {
        let mut near = ranked.clone();
        near.sort_by_key(|&at| hosts[seed].distance_to(hosts[at].id));
        let chosen = matching.solve(near);
        let spread = spread(hosts, &chosen);
        if spread < best.0 {
            best = (spread, chosen);
        }
    }
    best.1
}

/// Whether all cells are equally far from one another, so that distances decide nothing.
fn is_flat(hosts: &[Cell], ranked: &[usize]) -> bool {
    let mut pairs = ranked.iter().flat_map(|&a| ranked.iter().map(move |&b| (a, b))).filter(|(a, b)| a != b);
    let distance = |(a, b): (usize, usize)| hosts[a].distance_to(hosts[b].id);
    let Some(first) = pairs.next().map(distance) else { return true };
    pairs.all(|pair| distance(pair) == first)
}

/// The sum of the distances between the chosen cells.
fn spread(hosts: &[Cell], chosen: &[Option<usize>]) -> u64 {
    let cells: Vec<&Cell> = chosen.iter().flatten().map(|&at| &hosts[at]).collect();
    let from = |cell: &&Cell| cells.iter().map(|other| u64::from(cell.distance_to(other.id))).sum::<u64>();
    cells.iter().map(from).sum()
}

/// `fits` says whether guest cell 0 could go there.
fn cost(cell: &Cell, underlay: Option<&Cell>, fits: bool, guest: &Guest, order: Order) -> Cost {
    let first = &guest.cells[0];
    let pins = first.pins();
    let cpus = if pins { -i64::from(cell.free_cpu_count()) } else { i64::from(cell.shared_cpus_used) };
    let memory = i128::from(cell.memory_used_mib) - i128::from(cell.memory_mib);
    let usage = match order {
        Order::Spread => (cpus, memory),
        Order::Pack => (-cpus, -memory),
    };
    let breaks = pins && fits && cell.threads_per_core() > 1;
    Cost {
        crowd: if pins { 0 } else { usage.0 },
        underlay: underlay.map_or(0, |near| near.distance_to(cell.id)),
        broken_cores: if breaks { pinning::broken_cores(cell, first, guest.emulator_cpus(0)) } else { 0 },
        pages_left: pages_left(cell, first),
        usage,
    }
}

/// Free pages of the size taken that are left behind, when that size is not the smallest.
fn pages_left(cell: &Cell, guest: &GuestCell) -> u64 {
    let Some(size_kib) = guest.page_size.and_then(|_| fit::page_size(cell, guest).ok()) else { return 0 };
    if cell.smallest_pool().is_none_or(|pool| pool.size_kib == size_kib) {
        return 0;
    }
    let pool = cell.page_pools.iter().find(|pool| pool.size_kib == size_kib);
    pool.map_or(0, |pool| pool.free().saturating_sub(pool.pages_for(guest.memory_mib).unwrap_or(0)))
}
