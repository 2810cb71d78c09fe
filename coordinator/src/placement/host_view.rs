//! A host as placement sees it: its state, its cells with what is in use, and what floats over all of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_protocol::host::Inventory;
use godwit_protocol::id::HostId;
use godwit_protocol::reservation::{Reservation, ReservedCell};

use super::cell::{Cell, KIB_PER_MIB, PagePool};
use super::cpu_set::CpuSet;
use super::labels::Labels;

const BYTES_PER_MIB: u64 = 1 << 20;

/// Whether a host takes new instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostState {
    /// It does.
    Up,
    /// Its heartbeat is late: not until it is heard of again.
    Late,
    /// It has been silent too long.
    Lost,
    /// An operator said no.
    Disabled,
    /// An operator wants it empty.
    Draining,
}

impl HostState {
    /// `up`, `late`, `lost`, `disabled` or `draining`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Late => "late",
            Self::Lost => "lost",
            Self::Disabled => "disabled",
            Self::Draining => "draining",
        }
    }
}

/// A host as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostView {
    /// Which.
    pub id: HostId,
    /// Its name, for people and to break ties.
    pub name: String,
    /// Whether it takes new instances.
    pub state: HostState,
    /// Its cells with what is in use of each.
    pub cells: Vec<Cell>,
    /// vCPUs of instances without a NUMA topology, which float over the shared CPUs of all cells.
    pub floating_vcpus: u64,
    /// Memory in MiB of instances without a NUMA topology, which may lie in any cell.
    pub floating_memory_mib: u64,
    /// Free space for disks in bytes; none when no pool is reachable.
    pub disk_free_bytes: Option<u64>,
    /// What it is, beside its cells.
    pub machine: Machine,
    /// What its aggregates say of it.
    pub labels: Arc<Labels>,
}

/// What a host is, beside its cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `x86_64`, …
    pub architecture: String,
    /// The kernel's name of the processor.
    pub cpu_model: String,
    /// Whether guests run on the processor itself, and are not emulated.
    pub kvm: bool,
    /// Whether the underlay's device is up.
    pub underlay_up: bool,
    /// The underlay's MTU in bytes.
    pub underlay_mtu: u32,
    /// Whether the underlay speaks IPv6.
    pub underlay_v6: bool,
    /// MTU in bytes of the link of each physical network it has.
    pub physical_networks: BTreeMap<String, u32>,
}

impl Machine {
    fn of(inventory: &Inventory) -> Self {
        let underlay = &inventory.underlay;
        let link = inventory.links.iter().find(|link| link.name == underlay.link);
        Self {
            architecture: inventory.architecture.clone(),
            cpu_model: inventory.cpu_model.clone(),
            kvm: inventory.hypervisor.kvm,
            underlay_up: link.is_none_or(|link| link.up),
            underlay_mtu: underlay.mtu,
            underlay_v6: underlay.address.is_ipv6(),
            physical_networks: inventory.physical_networks.iter().map(|p| (p.name.clone(), p.mtu)).collect(),
        }
    }
}

/// What a host has of something, and how much is in use. Counted over the cells that have CPUs: memory of a cell
/// without CPUs (HBM, CXL, a device's) is nothing that a guest gets unasked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) total: u64,
    pub(super) used: u64,
}

impl HostView {
    /// Builds the view from the host's own report and from all that is reserved on it.
    ///
    /// Whatever the report says, the view is sound: a CPU counts once, a pinned CPU is never free, and what is
    /// reserved on a cell that is not there counts as floating.
    pub fn new<'r>(
        id: HostId,
        state: HostState,
        inventory: &Inventory,
        reservations: impl IntoIterator<Item = &'r Reservation>,
    ) -> Self {
        let mut cells: Vec<Cell> = inventory.cells.iter().map(cell_view).collect();
        let underlay = inventory.links.iter().find(|link| link.name == inventory.underlay.link);
        let underlay = underlay.and_then(|link| link.cell);
        cells.iter_mut().for_each(|cell| cell.has_underlay = Some(cell.id) == underlay);
        keep_reserve(&mut cells, inventory.reserved_memory_bytes.div_ceil(BYTES_PER_MIB));
        let pools = inventory.pools.iter().filter(|pool| pool.reachable);
        let mut view = Self {
            id,
            name: inventory.hostname.clone(),
            state,
            cells,
            floating_vcpus: 0,
            floating_memory_mib: 0,
            disk_free_bytes: pools.map(|pool| pool.free_bytes).max(),
            machine: Machine::of(inventory),
            labels: Arc::default(),
        };
        for reservation in reservations {
            view.add(reservation);
        }
        view
    }

    /// Takes everything off it that was counted in; `cells` are its own with nothing on them.
    pub(super) fn clear(&mut self, cells: &[Cell]) {
        self.cells.clear();
        self.cells.extend_from_slice(cells);
        (self.floating_vcpus, self.floating_memory_mib) = (0, 0);
    }

    /// Counts a reservation in; whether none of its CPUs was held before, so that [`Self::take_off`] undoes it.
    pub fn add(&mut self, reservation: &Reservation) -> bool {
        let held: CpuSet = reservation.pinned_cpus().collect();
        let mut alone = true;
        if !held.is_empty() {
            for cell in &mut self.cells {
                alone &= held.intersection_len(&cell.pinned_cpus) == 0;
                cell.pinned_cpus.extend_from(&held.intersection(&cell.dedicated_cpus));
            }
        }
        let (mut vcpus, mut memory_mib) = (u64::from(reservation.vcpus), mib_up(reservation.memory_bytes));
        for reserved in &reservation.cells {
            if let Some(cell) = self.cells.iter_mut().find(|cell| cell.id == reserved.host) {
                vcpus = vcpus.saturating_sub((reserved.shared_vcpus.len() + reserved.pinning.len()) as u64);
                memory_mib = memory_mib.saturating_sub(mib_up(reserved.memory_bytes));
                occupy(cell, reserved);
            }
        }
        self.floating_vcpus = self.floating_vcpus.saturating_add(vcpus);
        self.floating_memory_mib = self.floating_memory_mib.saturating_add(memory_mib);
        alone
    }

    /// Takes a reservation off, as if it had never been counted in: when no CPU is held twice.
    pub(super) fn take_off(&mut self, reservation: &Reservation) {
        let held: CpuSet = reservation.pinned_cpus().collect();
        self.cells.iter_mut().for_each(|cell| cell.pinned_cpus.subtract(&held));
        let (mut vcpus, mut memory_mib) = (u64::from(reservation.vcpus), mib_up(reservation.memory_bytes));
        for reserved in &reservation.cells {
            if let Some(cell) = self.cells.iter_mut().find(|cell| cell.id == reserved.host) {
                vcpus = vcpus.saturating_sub((reserved.shared_vcpus.len() + reserved.pinning.len()) as u64);
                memory_mib = memory_mib.saturating_sub(mib_up(reserved.memory_bytes));
                vacate(cell, reserved);
            }
        }
        self.floating_vcpus = self.floating_vcpus.saturating_sub(vcpus);
        self.floating_memory_mib = self.floating_memory_mib.saturating_sub(memory_mib);
    }

    /// Shared CPUs, and vCPUs that float over them.
    pub(super) fn vcpus(&self) -> Share {
        let mut share = Share { total: 0, used: self.floating_vcpus };
        for cell in &self.cells {
            share.total += u64::from(cell.shared_cpus.len());
            share.used = share.used.saturating_add(u64::from(cell.shared_cpus_used));
        }
        share
    }

    /// Memory in MiB on pages of the smallest size.
    pub(super) fn memory(&self) -> Share {
        let mut share = Share { total: 0, used: self.floating_memory_mib };
        let with_cpus = |cell: &&Cell| !(cell.shared_cpus.is_empty() && cell.dedicated_cpus.is_empty());
        for cell in self.cells.iter().filter(with_cpus) {
            let (total, used) = match cell.smallest_pool() {
                Some(pool) => {
                    let mib = |pages: u64| pages.saturating_mul(pool.size_kib) / KIB_PER_MIB;
                    (mib(pool.total.saturating_sub(pool.reserved)), mib(pool.used))
                }
                None => (cell.memory_mib, cell.memory_used_mib),
            };
            share.total = share.total.saturating_add(total);
            share.used = share.used.saturating_add(used);
        }
        share
    }
}

fn cell_view(cell: &godwit_protocol::host::Cell) -> Cell {
    let mut cores: BTreeMap<Vec<u32>, CpuSet> = BTreeMap::new();
    let mut seen = CpuSet::new();
    for cpu in &cell.cpus {
        let core: CpuSet =
            cpu.siblings.iter().copied().chain([cpu.id]).filter(|&cpu| !seen.contains(cpu)).collect();
        if !core.is_empty() {
            seen.extend_from(&core);
            cores.insert(core.iter().collect(), core);
        }
    }
    let online: CpuSet = cell.cpus.iter().map(|cpu| cpu.id).collect();
    let known = |cpus: &[u32]| cpus.iter().copied().collect::<CpuSet>().intersection(&online);
    let pools = cell.page_pools.iter().filter(|pool| pool.size_kib > 0);
    Cell {
        id: cell.id,
        memory_mib: cell.memory_bytes / BYTES_PER_MIB,
        memory_used_mib: 0,
        dedicated_cpus: known(&cell.dedicated_cpus),
        pinned_cpus: CpuSet::new(),
        shared_cpus: known(&cell.shared_cpus),
        shared_cpus_used: 0,
        cores: cores.into_values().collect(),
        caches: caches(cell),
        distances: cell.distances.iter().map(|(to, distance)| (*to, *distance)).collect(),
        has_underlay: false,
        page_pools: pools
            .map(|pool| PagePool {
                size_kib: pool.size_kib,
                total: pool.total,
                used: 0,
                reserved: pool.taken,
            })
            .collect(),
    }
}

/// The CPUs under each level 3 cache; none unless every CPU tells of one.
fn caches(cell: &godwit_protocol::host::Cell) -> Arc<[CpuSet]> {
    let mut caches: BTreeMap<u32, CpuSet> = BTreeMap::new();
    for cpu in &cell.cpus {
        let Some(cache) = cpu.l3 else { return Arc::default() };
        caches.entry(cache).or_default().insert(cpu.id);
    }
    caches.into_values().collect()
}

/// Keeps the host's own memory out of the first cell that has it; out of the largest when none has.
fn keep_reserve(cells: &mut [Cell], reserve_mib: u64) {
    let ordinary_mib = |cell: &Cell| match cell.smallest_pool() {
        Some(pool) => pool.total.saturating_mul(pool.size_kib) / KIB_PER_MIB,
        None => cell.memory_mib,
    };
    let first = cells.iter().position(|cell| ordinary_mib(cell) >= reserve_mib);
    let largest = || (0..cells.len()).max_by_key(|&at| ordinary_mib(&cells[at]));
    let Some(at) = first.or_else(largest) else { return };
    let cell = &mut cells[at];
    cell.memory_mib = cell.memory_mib.saturating_sub(reserve_mib);
    if let Some(pool) = cell.page_pools.iter_mut().min_by_key(|pool| pool.size_kib) {
        pool.reserved = reserve_mib.saturating_mul(KIB_PER_MIB).div_ceil(pool.size_kib).min(pool.total);
    }
}

fn occupy(cell: &mut Cell, reserved: &ReservedCell) {
    cell.shared_cpus_used = cell.shared_cpus_used.saturating_add(reserved.shared_vcpus.len() as u32);
    cell.memory_used_mib = cell.memory_used_mib.saturating_add(mib_up(reserved.memory_bytes));
    let size_kib = reserved.page_size_kib.or_else(|| cell.smallest_pool().map(|pool| pool.size_kib));
    if let Some(pool) = cell.page_pools.iter_mut().find(|pool| Some(pool.size_kib) == size_kib) {
        pool.used = pool.used.saturating_add(reserved.memory_bytes.div_ceil(1024).div_ceil(pool.size_kib));
    }
}

fn vacate(cell: &mut Cell, reserved: &ReservedCell) {
    cell.shared_cpus_used = cell.shared_cpus_used.saturating_sub(reserved.shared_vcpus.len() as u32);
    cell.memory_used_mib = cell.memory_used_mib.saturating_sub(mib_up(reserved.memory_bytes));
    let size_kib = reserved.page_size_kib.or_else(|| cell.smallest_pool().map(|pool| pool.size_kib));
    if let Some(pool) = cell.page_pools.iter_mut().find(|pool| Some(pool.size_kib) == size_kib) {
        pool.used = pool.used.saturating_sub(reserved.memory_bytes.div_ceil(1024).div_ceil(pool.size_kib));
    }
}

fn mib_up(bytes: u64) -> u64 {
    bytes.div_ceil(BYTES_PER_MIB)
}
