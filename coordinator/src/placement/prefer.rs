//! Of the host cells that fit, which to take.

use smallvec::SmallVec;

use super::cell::Cell;
use super::fit::{self, Order};
use super::guest::Guest;
use super::matching::{HostOf, Matching};
use super::needs::Needs;
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
    usage: (i64, i64),
}

/// Host cells by index.
type Indexes = SmallVec<[usize; 16]>;

/// For each guest cell the host cell (by index) that it gets. As many get one as can.
pub(super) fn choose(
    hosts: &[Cell],
    guest: &Guest,
    needs: &[Needs],
    matching: &Matching,
    order: Order,
) -> HostOf {
    let guests = needs.len();
    if hosts.len() == guests || guests == 0 {
        return matching.solve(0..hosts.len());
    }
    let underlay = hosts.iter().find(|cell| cell.has_underlay);
    let cost = |at: usize| {
        let fits = matching.is_allowed(0, at);
        cost(&hosts[at], underlay, fits, guest, &needs[0], order)
    };
    let useful = (0..hosts.len()).filter(|&at| matching.is_useful(at));
    if guests == 1 {
        return HostOf::from_elem(cheapest(useful, cost), 1);
    }
    let mut costs: SmallVec<[(Cost, usize); 16]> = useful.map(|at| (cost(at), at)).collect();
    costs.sort_unstable();
    let ranked: Indexes = costs.iter().map(|&(_, at)| at).collect();
    let first = matching.solve(ranked.iter().copied());
    if first.contains(&None) {
        return first;
    }
    // The cells nearest to each cell in turn; sets of equal distance go by rank.
    let least = least_spread(hosts, &ranked, guests);
    let mut best = (spread(hosts, &first), first);
    for &seed in &ranked {
        if best.0 <= least {
            break;
        }
        let mut near: SmallVec<[(u32, usize); 16]> =
            (0..ranked.len()).map(|rank| (hosts[seed].distance_to(hosts[ranked[rank]].id), rank)).collect();
        near.sort_unstable();
        let chosen = matching.solve(near.iter().map(|&(_, rank)| ranked[rank]));
        let spread = spread(hosts, &chosen);
        if spread < best.0 {
            best = (spread, chosen);
        }
    }
    best.1
}

/// The one of least cost, the first of equals. The cost of an only one is not asked for.
fn cheapest(mut hosts: impl Iterator<Item = usize>, cost: impl Fn(usize) -> Cost) -> Option<usize> {
    let first = hosts.next()?;
    let Some(second) = hosts.next() else { return Some(first) };
    let mut best = (cost(first), first);
    for at in std::iter::once(second).chain(hosts) {
        let its = cost(at);
        if its < best.0 {
            best = (its, at);
        }
    }
    Some(best.1)
}

/// A spread that no choice of so many cells can be below.
fn least_spread(hosts: &[Cell], ranked: &[usize], guests: usize) -> u64 {
    let dense = hosts.iter().zip(0..).all(|(cell, number)| cell.id == number);
    let row = |&at: &usize| {
        let (own, other) = hosts[at].distances.least(hosts.len(), dense);
        u64::from(own) + (guests as u64 - 1) * u64::from(other)
    };
    ranked.iter().map(row).min().unwrap_or(0) * guests as u64
}

/// The sum of the distances between the chosen cells.
fn spread(hosts: &[Cell], chosen: &[Option<usize>]) -> u64 {
    let cells = || chosen.iter().flatten().map(|&at| &hosts[at]);
    let from = |cell: &Cell| cells().map(|other| u64::from(cell.distance_to(other.id))).sum::<u64>();
    cells().map(from).sum()
}

/// `fits` says whether guest cell 0, whose needs these are, could go there.
fn cost(
    cell: &Cell,
    underlay: Option<&Cell>,
    fits: bool,
    guest: &Guest,
    needs: &Needs,
    order: Order,
) -> Cost {
    let pins = needs.pins();
    let cpus = if pins { -i64::from(cell.free_cpu_count()) } else { i64::from(cell.shared_cpus_used) };
    let mib = |mib: u64| i64::try_from(mib).unwrap_or(i64::MAX);
    let memory = mib(cell.memory_used_mib) - mib(cell.memory_mib);
    let usage = match order {
        Order::Spread => (cpus, memory),
        Order::Pack => (-cpus, -memory),
    };
    let breaks = pins && fits && cell.threads_per_core() > 1;
    let vcpus = &guest.cells[0].dedicated;
    Cost {
        crowd: if pins { 0 } else { usage.0 },
        underlay: underlay.map_or(0, |near| near.distance_to(cell.id)),
        broken_cores: if breaks { pinning::broken_cores(cell, vcpus, needs.wanted) } else { 0 },
        pages_left: pages_left(cell, needs),
        usage,
    }
}

/// Free pages of the size taken that are left behind, when that size is not the smallest.
fn pages_left(cell: &Cell, needs: &Needs) -> u64 {
    let serving = |wish| fit::serving(cell, wish, needs.memory_mib);
    let Some(pool) = needs.page_size.and_then(serving) else { return 0 };
    if cell.smallest_pool().is_none_or(|smallest| smallest.size_kib == pool.size_kib) {
        return 0;
    }
    pool.free().saturating_sub(pool.pages_for(needs.memory_mib).unwrap_or(0))
}
