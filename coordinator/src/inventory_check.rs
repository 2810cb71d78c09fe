//! Whether what a host says of itself can be true. An inventory that contradicts itself is not taken in: placement
//! would give out what is not there, or give it out twice.

use godwit_protocol::host::{Cell, Inventory, PagePool};
use std::collections::BTreeSet;

/// How an inventory contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// Two cells have one number.
    #[error("cell {0} is in it twice")]
    Cell(u32),
    /// A CPU is in two cells, or twice in one.
    #[error("CPU {0} is in it twice")]
    Cpu(u32),
    /// A CPU is shared or dedicated that the cell does not have.
    #[error("cell {cell} shares or dedicates CPU {cpu}, which it does not have")]
    Role {
        /// The cell.
        cell: u32,
        /// The CPU.
        cpu: u32,
    },
    /// Pages of no size, or two pools of one size.
    #[error("cell {cell} has pages of {size_kib} KiB twice, or pages of no size")]
    Pages {
        /// The cell.
        cell: u32,
        /// In KiB.
        size_kib: u64,
    },
    /// More pages in use than there are.
    #[error("cell {cell} has {total} pages of {size_kib} KiB, and others hold {taken} of them")]
    Taken {
        /// The cell.
        cell: u32,
        /// In KiB.
        size_kib: u64,
        /// Pages there are.
        total: u64,
        /// Pages in use.
        taken: u64,
    },
    /// More memory in pages than memory.
    #[error("cell {cell} has {pages_kib} KiB in pages and {memory_kib} KiB of memory")]
    Memory {
        /// The cell.
        cell: u32,
        /// In KiB.
        pages_kib: u64,
        /// In KiB.
        memory_kib: u64,
    },
    /// More is free in a pool than there is.
    #[error("pool {pool} has {free_bytes} bytes free of {total_bytes}")]
    Free {
        /// Its name.
        pool: String,
        /// In bytes.
        free_bytes: u64,
        /// In bytes.
        total_bytes: u64,
    },
}

/// Looks whether an inventory can be true.
///
/// # Errors
/// The first [`Contradiction`].
pub fn check(inventory: &Inventory) -> Result<(), Contradiction> {
    let (mut cells, mut cpus) = (BTreeSet::new(), BTreeSet::new());
    for cell in &inventory.cells {
        if !cells.insert(cell.id) {
            return Err(Contradiction::Cell(cell.id));
        }
        if let Some(twice) = cell.cpus.iter().find(|cpu| !cpus.insert(cpu.id)) {
            return Err(Contradiction::Cpu(twice.id));
        }
        check_cell(cell)?;
    }
    match inventory.pools.iter().find(|pool| pool.free_bytes > pool.total_bytes) {
        Some(pool) => Err(Contradiction::Free {
            pool: pool.name.clone(),
            free_bytes: pool.free_bytes,
            total_bytes: pool.total_bytes,
        }),
        None => Ok(()),
    }
}

fn check_cell(cell: &Cell) -> Result<(), Contradiction> {
    let own: BTreeSet<u32> = cell.cpus.iter().map(|cpu| cpu.id).collect();
    let roles = cell.shared_cpus.iter().chain(&cell.dedicated_cpus);
    if let Some(&cpu) = { roles }.find(|cpu| !own.contains(cpu)) {
        return Err(Contradiction::Role { cell: cell.id, cpu });
    }
    let mut sizes = BTreeSet::from([0]);
    let twice = cell.page_pools.iter().find(|pool| !sizes.insert(pool.size_kib));
    if let Some(pool) = twice {
        return Err(Contradiction::Pages { cell: cell.id, size_kib: pool.size_kib });
    }
    if let Some(&PagePool { size_kib, total, taken }) = cell.page_pools.iter().find(|p| p.taken > p.total) {
        return Err(Contradiction::Taken { cell: cell.id, size_kib, total, taken });
    }
    let pages_kib = cell
        .page_pools
        .iter()
        .map(|pool| pool.total.saturating_mul(pool.size_kib))
        .fold(0, u64::saturating_add);
    let memory_kib = cell.memory_bytes / 1024;
    match pages_kib > memory_kib {
        true => Err(Contradiction::Memory { cell: cell.id, pages_kib, memory_kib }),
        false => Ok(()),
    }
}
