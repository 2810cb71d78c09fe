//! A host's NUMA cell with what is in use of it, and how usage is added and taken back.

use std::sync::Arc;

use thiserror::Error;

use super::cores::Cores;
use super::cpu_set::CpuSet;
use super::distances::Distances;
use super::guest::{CpuPolicy, ThreadPolicy};

/// KiB in a MiB.
pub(super) const KIB_PER_MIB: u64 = 1024;

/// Pages of one size in a cell. Free are those neither used nor reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PagePool {
    /// Page size in KiB.
    pub size_kib: u64,
    /// Pages there are.
    pub total: u64,
    /// Pages that guests hold.
    pub used: u64,
    /// Pages kept from guests.
    pub reserved: u64,
}

impl PagePool {
    /// Pages that a guest can still have.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.used).saturating_sub(self.reserved)
    }

    /// How many pages hold exactly this memory; none when it does not come out even.
    pub(super) fn pages_for(&self, memory_mib: u64) -> Option<u64> {
        let kib = memory_mib.checked_mul(KIB_PER_MIB)?;
        // Pages are powers of two everywhere; a shift costs a tenth of a division.
        if self.size_kib.is_power_of_two() {
            let pages = kib >> self.size_kib.trailing_zeros();
            return (kib & (self.size_kib - 1) == 0).then_some(pages);
        }
        (self.size_kib > 0 && kib.is_multiple_of(self.size_kib)).then(|| kib / self.size_kib)
    }
}

/// A NUMA cell of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Cell {
    /// The kernel's number; numbers may be sparse.
    pub id: u32,
    /// Memory in MiB, huge pages included.
    pub memory_mib: u64,
    /// Memory in MiB that guests hold.
    pub memory_used_mib: u64,
    /// CPUs that may be pinned one to one.
    pub dedicated_cpus: CpuSet,
    /// Those of them that are in use.
    pub pinned_cpus: CpuSet,
    /// CPUs over which vCPUs float. Equal to the dedicated ones on a host that has one common set.
    pub shared_cpus: CpuSet,
    /// vCPUs that float there already; may be more than there are CPUs.
    pub shared_cpus_used: u32,
    /// Cores: the hardware threads of each. A CPU in none is a core of its own.
    pub cores: Cores,
    /// CPUs under each level 3 cache; empty when the host does not tell.
    pub caches: Arc<[CpuSet]>,
    /// Distances to the host's cells.
    pub distances: Distances,
    /// Whether the host's packets leave from here: the underlay's device hangs on this cell.
    pub has_underlay: bool,
    /// Page pools by size; empty when the host tells no page sizes.
    pub page_pools: Vec<PagePool>,
}

impl Cell {
    /// The distance to another cell, by the kernel's convention for hosts that tell none.
    pub fn distance_to(&self, other: u32) -> u32 {
        self.distances.between(self.id, other)
    }

    /// Whether it has CPUs at all. Memory of a cell without any (HBM, CXL, a device's) is nothing that a guest gets
    /// unasked.
    pub fn has_cpus(&self) -> bool {
        !(self.shared_cpus.is_empty() && self.dedicated_cpus.is_empty() && self.cores.is_empty())
    }

    /// How many dedicated CPUs are not in use.
    pub fn free_cpu_count(&self) -> u32 {
        self.dedicated_cpus.difference_len(&self.pinned_cpus)
    }

    /// Dedicated CPUs that are not in use.
    pub fn free_cpus(&self) -> CpuSet {
        self.dedicated_cpus.difference(&self.pinned_cpus)
    }

    /// The most hardware threads that a core of this cell has; 1 when it has no core.
    pub fn threads_per_core(&self) -> u32 {
        self.cores.threads()
    }

    /// The pool of the smallest pages, from which memory without a page size comes.
    pub fn smallest_pool(&self) -> Option<&PagePool> {
        self.page_pools.iter().min_by_key(|pool| pool.size_kib)
    }

    /// The CPUs given and all the other threads of their cores. CPUs in no core are left out.
    fn whole_cores_of(&self, cpus: &CpuSet) -> CpuSet {
        let mut whole = CpuSet::new();
        for core in self.cores.iter().filter(|core| core.intersection_len(cpus) > 0) {
            whole.extend_from(core);
        }
        whole
    }
}

/// What one guest cell uses of one host cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellUsage {
    /// The host's cell.
    pub host_cell: u32,
    /// vCPUs that float there.
    pub shared_vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Page size in KiB; none takes the smallest.
    pub page_size_kib: Option<u64>,
    /// Host CPUs that vCPUs are pinned to.
    pub pinned: CpuSet,
    /// Host CPUs for the emulator's threads.
    pub emulator_cpus: CpuSet,
    /// The guest cell's CPU policy.
    pub cpu_policy: Option<CpuPolicy>,
    /// The guest cell's thread policy: isolate takes whole cores.
    pub thread_policy: Option<ThreadPolicy>,
}

impl CellUsage {
    fn held_cpus(&self, cell: &Cell) -> CpuSet {
        if !matches!(self.cpu_policy, Some(CpuPolicy::Dedicated | CpuPolicy::Mixed)) {
            return CpuSet::new();
        }
        let mut held = self.pinned.clone();
        held.extend_from(&self.emulator_cpus);
        match self.thread_policy {
            Some(ThreadPolicy::Isolate) => cell.whole_cores_of(&held),
            _ => held,
        }
    }
}

/// Why usage does not match a cell.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UsageError {
    /// CPUs to pin are not among the dedicated ones.
    #[error("CPUs {cpus} of cell {cell} cannot be pinned: they are not dedicated")]
    PinUnknownCpu {
        /// The host's cell.
        cell: u32,
        /// The CPUs in question.
        cpus: CpuSet,
    },
    /// CPUs to pin are in use.
    #[error("CPUs {cpus} of cell {cell} cannot be pinned: they are in use")]
    PinAlreadyUsed {
        /// The host's cell.
        cell: u32,
        /// The CPUs in question.
        cpus: CpuSet,
    },
    /// CPUs to unpin are not among the dedicated ones.
    #[error("CPUs {cpus} of cell {cell} cannot be unpinned: they are not dedicated")]
    UnpinUnknownCpu {
        /// The host's cell.
        cell: u32,
        /// The CPUs in question.
        cpus: CpuSet,
    },
    /// CPUs to unpin are not in use.
    #[error("CPUs {cpus} of cell {cell} cannot be unpinned: they are not in use")]
    UnpinNotPinned {
        /// The host's cell.
        cell: u32,
        /// The CPUs in question.
        cpus: CpuSet,
    },
}

/// Adds usage to a host's cells, all or nothing. Usage of a cell that the host does not have counts nowhere.
pub fn apply(cells: &[Cell], usage: &[CellUsage]) -> Result<Vec<Cell>, UsageError> {
    change(cells, usage, |cell, usage| {
        let cpus = usage.held_cpus(cell);
        let unknown = cpus.difference(&cell.dedicated_cpus);
        if !unknown.is_empty() {
            return Err(UsageError::PinUnknownCpu { cell: cell.id, cpus: unknown });
        }
        let taken = cpus.intersection(&cell.pinned_cpus);
        if !taken.is_empty() {
            return Err(UsageError::PinAlreadyUsed { cell: cell.id, cpus: taken });
        }
        cell.pinned_cpus.extend_from(&cpus);
        cell.memory_used_mib = cell.memory_used_mib.saturating_add(usage.memory_mib);
        cell.shared_cpus_used = cell.shared_cpus_used.saturating_add(usage.shared_vcpus);
        let kib = usage.memory_mib.saturating_mul(KIB_PER_MIB);
        if let Some(pool) = pool_of(cell, usage.page_size_kib) {
            pool.used = pool.used.saturating_add(kib / pool.size_kib);
        }
        Ok(())
    })
}

/// Takes usage back, all or nothing. Counts stop at 0.
pub fn release(cells: &[Cell], usage: &[CellUsage]) -> Result<Vec<Cell>, UsageError> {
    change(cells, usage, |cell, usage| {
        let cpus = usage.held_cpus(cell);
        let unknown = cpus.difference(&cell.dedicated_cpus);
        if !unknown.is_empty() {
            return Err(UsageError::UnpinUnknownCpu { cell: cell.id, cpus: unknown });
        }
        let idle = cpus.difference(&cell.pinned_cpus);
        if !idle.is_empty() {
            return Err(UsageError::UnpinNotPinned { cell: cell.id, cpus: idle });
        }
        cell.pinned_cpus.subtract(&cpus);
        cell.memory_used_mib = cell.memory_used_mib.saturating_sub(usage.memory_mib);
        cell.shared_cpus_used = cell.shared_cpus_used.saturating_sub(usage.shared_vcpus);
        let kib = usage.memory_mib.saturating_mul(KIB_PER_MIB);
        if let Some(pool) = pool_of(cell, usage.page_size_kib) {
            pool.used = pool.used.saturating_sub(kib.div_ceil(pool.size_kib));
        }
        Ok(())
    })
}

fn change(
    cells: &[Cell],
    usage: &[CellUsage],
    mut one: impl FnMut(&mut Cell, &CellUsage) -> Result<(), UsageError>,
) -> Result<Vec<Cell>, UsageError> {
    let mut changed = cells.to_vec();
    for cell in &mut changed {
        let id = cell.id;
        for usage in usage.iter().filter(|usage| usage.host_cell == id) {
            one(cell, usage)?;
        }
    }
    Ok(changed)
}

fn pool_of(cell: &mut Cell, size_kib: Option<u64>) -> Option<&mut PagePool> {
    let size_kib = size_kib.or_else(|| cell.smallest_pool().map(|pool| pool.size_kib))?;
    cell.page_pools.iter_mut().find(|pool| pool.size_kib == size_kib && size_kib > 0)
}
