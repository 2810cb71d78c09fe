//! How much room a host has at most, and how much a request needs at least: numbers that tell quickly, and for many
//! hosts at once, where it is not worth looking. What they let pass may still not fit; what they do not cannot.

use super::cell::{Cell, KIB_PER_MIB};
use super::fit::Limits;
use super::guest::{Guest, GuestCell, PageSize, ThreadPolicy};
use super::host_view::{HostState, HostView};
use super::pinning::FreeThreads;
use super::request::Request;

/// Cells that are told apart; of a guest with more, the most demanding count.
const RANKS: usize = 8;

/// Page sizes in KiB that are counted by themselves.
const SIZES_KIB: [u64; 2] = [2048, 1_048_576];

/// Room or need. Arrays are by rank: a host's best cell first, a guest's most demanding first. A guest fits into a
/// host only if, rank by rank, the host has what the guest needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Reach {
    /// 1 of a host that takes instances, and of every request.
    open: u64,
    /// Ordinary memory of the whole host in MiB.
    memory_mib: u64,
    /// Floating vCPUs of the whole host.
    vcpus: u64,
    /// Disk space in bytes.
    disk_bytes: u64,
    /// Cells.
    cells: u64,
    /// Dedicated CPUs.
    cpus: [u32; RANKS],
    /// Wholly free cores.
    cores: [u32; RANKS],
    /// Dedicated CPUs that have free siblings, for guests that want no CPU without.
    siblings: [u32; RANKS],
    /// Ordinary memory of one cell in MiB, for guests that may not overcommit it.
    cell_memory_mib: [u32; RANKS],
    /// Memory of one cell in MiB in pages of one size that is not the smallest, for guests that take any such.
    large_mib: [u32; RANKS],
    /// Pages of each of [`SIZES_KIB`].
    pages: [[u32; RANKS]; SIZES_KIB.len()],
}

impl Reach {
    /// The room on a host.
    pub(super) fn of_host(host: &HostView, limits: &Limits) -> Self {
        if host.state != HostState::Up {
            return Self::default();
        }
        let (vcpus, memory) = (host.vcpus(), host.memory());
        let mut reach = Self {
            open: 1,
            memory_mib: Limits::capacity(memory.total, limits.memory_ratio).saturating_sub(memory.used),
            vcpus: Limits::capacity(vcpus.total, limits.cpu_ratio).saturating_sub(vcpus.used),
            disk_bytes: host.disk_free_bytes.unwrap_or(0),
            cells: host.cells.len() as u64,
            ..Self::default()
        };
        // A cell without free dedicated CPUs has nothing for a pinned guest cell.
        let pinnable: Vec<&Cell> = host.cells.iter().filter(|cell| cell.free_cpu_count() > 0).collect();
        reach.cpus = ranked(pinnable.iter().map(|cell| u64::from(cell.free_cpu_count())));
        let threads: Vec<FreeThreads> = pinnable.iter().map(|cell| FreeThreads::of(cell)).collect();
        let whole = |free: &FreeThreads| free.with_at_least(free.threads_per_core);
        reach.cores = ranked(threads.iter().map(|free| u64::from(whole(free))));
        reach.siblings = ranked(threads.iter().map(FreeThreads::room_with_siblings));
        reach.large_mib = ranked(host.cells.iter().map(large_mib));
        reach.cell_memory_mib = ranked(pinnable.iter().map(|cell| free_memory_mib(cell)));
        for (size_kib, pages) in SIZES_KIB.into_iter().zip(&mut reach.pages) {
            *pages = ranked(host.cells.iter().map(|cell| free_pages(cell, size_kib)));
        }
        reach
    }

    /// What a request needs anywhere. Without `same_limits` the room was reckoned by another overcommit, and what
    /// depends on it is left out.
    pub(super) fn of_request(request: &Request, same_limits: bool) -> Self {
        let mut need = Self::of_guest(request);
        if !same_limits {
            (need.memory_mib, need.vcpus) = (0, 0);
        }
        need
    }

    fn of_guest(request: &Request) -> Self {
        let mut reach = Self { open: 1, disk_bytes: request.disk_bytes, ..Self::default() };
        let Some(guest) = &request.guest else {
            (reach.memory_mib, reach.vcpus) = (request.memory_mib, u64::from(request.vcpus));
            return reach;
        };
        reach.cells = guest.cells.len() as u64;
        reach.vcpus = guest.cells.iter().map(|cell| u64::from(cell.shared.len())).sum();
        let pins = |cell: &GuestCell| cell.pins() && !cell.dedicated.is_empty();
        let pinned = || guest.cells.iter().enumerate().filter(|(_, cell)| pins(cell));
        let wanted = |(index, cell): (usize, &GuestCell)| cell.dedicated.len() + guest.emulator_cpus(index);
        reach.cpus = ranked(pinned().map(|at| u64::from(wanted(at))));
        let isolated = |(_, cell): &(usize, &GuestCell)| cell.thread_policy == Some(ThreadPolicy::Isolate);
        reach.cores = ranked(pinned().filter(isolated).map(|(_, cell)| u64::from(cell.dedicated.len())));
        let siblings = |(_, cell): &(usize, &GuestCell)| cell.thread_policy == Some(ThreadPolicy::Require);
        reach.siblings = ranked(pinned().filter(siblings).map(|(_, cell)| u64::from(cell.dedicated.len())));
        let large = guest.cells.iter().filter(|cell| cell.page_size == Some(PageSize::Large));
        reach.large_mib = ranked(large.map(|cell| cell.memory_mib));
        reach.cell_memory_mib = ranked(ordinary(guest).filter(|cell| pins(cell)).map(|cell| cell.memory_mib));
        reach.memory_mib = ordinary(guest).map(|cell| cell.memory_mib).fold(0, u64::saturating_add);
        for (size_kib, pages) in SIZES_KIB.into_iter().zip(&mut reach.pages) {
            let asking = guest.cells.iter().filter(|cell| cell.page_size == Some(PageSize::Kib(size_kib)));
            *pages = ranked(asking.map(|cell| cell.memory_mib.saturating_mul(KIB_PER_MIB) / size_kib));
        }
        reach
    }

    /// Whether a host with this room may be worth looking at.
    pub(super) fn covers(&self, need: &Self) -> bool {
        let ranks = |have: &[u32; RANKS], need: &[u32; RANKS]| have.iter().zip(need).all(|(h, n)| h >= n);
        self.open >= need.open
            && self.memory_mib >= need.memory_mib
            && self.vcpus >= need.vcpus
            && self.disk_bytes >= need.disk_bytes
            && self.cells >= need.cells
            && ranks(&self.cpus, &need.cpus)
            && ranks(&self.cores, &need.cores)
            && ranks(&self.siblings, &need.siblings)
            && ranks(&self.large_mib, &need.large_mib)
            && ranks(&self.cell_memory_mib, &need.cell_memory_mib)
            && self.pages.iter().zip(&need.pages).all(|(have, need)| ranks(have, need))
    }

    /// The most of two.
    pub(super) fn max(&self, other: &Self) -> Self {
        let ranks = |a: &[u32; RANKS], b: &[u32; RANKS]| std::array::from_fn(|rank| a[rank].max(b[rank]));
        Self {
            open: self.open.max(other.open),
            memory_mib: self.memory_mib.max(other.memory_mib),
            vcpus: self.vcpus.max(other.vcpus),
            disk_bytes: self.disk_bytes.max(other.disk_bytes),
            cells: self.cells.max(other.cells),
            cpus: ranks(&self.cpus, &other.cpus),
            cores: ranks(&self.cores, &other.cores),
            siblings: ranks(&self.siblings, &other.siblings),
            large_mib: ranks(&self.large_mib, &other.large_mib),
            cell_memory_mib: ranks(&self.cell_memory_mib, &other.cell_memory_mib),
            pages: std::array::from_fn(|size| ranks(&self.pages[size], &other.pages[size])),
        }
    }
}

/// Guest cells whose memory can only be ordinary: those that ask for no page size.
fn ordinary(guest: &Guest) -> impl Iterator<Item = &GuestCell> {
    guest.cells.iter().filter(|cell| cell.page_size.is_none())
}

/// The largest first, as many as there are ranks. What is too large for the field counts as its maximum, on both sides.
fn ranked(values: impl Iterator<Item = u64>) -> [u32; RANKS] {
    let mut ranked = [0; RANKS];
    for value in values {
        let mut value = u32::try_from(value).unwrap_or(u32::MAX);
        for place in &mut ranked {
            if value > *place {
                std::mem::swap(place, &mut value);
            }
        }
    }
    ranked
}

/// The most free memory in pages of one size that is not the smallest.
fn large_mib(cell: &Cell) -> u64 {
    let smallest = cell.smallest_pool().map(|pool| pool.size_kib);
    let large = cell.page_pools.iter().filter(|pool| Some(pool.size_kib) != smallest);
    large.map(|pool| pool.free().saturating_mul(pool.size_kib) / KIB_PER_MIB).max().unwrap_or(0)
}

fn free_memory_mib(cell: &Cell) -> u64 {
    match cell.smallest_pool() {
        Some(pool) => pool.free().saturating_mul(pool.size_kib) / KIB_PER_MIB,
        None => cell.memory_mib.saturating_sub(cell.memory_used_mib),
    }
}

fn free_pages(cell: &Cell, size_kib: u64) -> u64 {
    cell.page_pools.iter().filter(|pool| pool.size_kib == size_kib).map(|pool| pool.free()).max().unwrap_or(0)
}
