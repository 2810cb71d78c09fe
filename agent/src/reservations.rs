//! The host's own veto: exactly which CPUs, pages and memory each instance holds here, kept durably. A placement
//! is an answer; this is the fact.

use crate::state::{StateError, read_json, write_atomic};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::Cell;
use godwit_protocol::id::InstanceId;
use godwit_protocol::reservation::{Refusal, Reservation, ReservedCell};
use prometheus::{IntGauge, Registry};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Floating vCPUs that a shared CPU may carry. The coordinator owns the ratio that is wanted; this only stops what
/// no ratio means.
const MAX_VCPUS_PER_SHARED_CPU: u64 = 64;

/// Why a reservation is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The cells are not those that it was planned for.
    #[error("the plan was made from report {planned}, and this host's cells have changed since")]
    Stale {
        /// The plan's generation.
        planned: u64,
        /// The first generation with the cells as they are, if one was told.
        changed: Option<u64>,
    },
    /// It contradicts itself.
    #[error("the reservation is wrong: {0}")]
    Malformed(&'static str),
    /// A cell that is not there.
    #[error("this host has no cell {0}")]
    NoCell(u32),
    /// A CPU that is no CPU of that cell, or not online.
    #[error("CPU {cpu} is not online in cell {cell}")]
    NoCpu {
        /// The CPU.
        cpu: u32,
        /// The cell that should have it.
        cell: u32,
    },
    /// A CPU that this host does not have at all.
    #[error("this host has no CPU {0} online")]
    NoCpuAnywhere(u32),
    /// A CPU that is not for pinning.
    #[error("CPU {0} is not one of the dedicated CPUs of this host")]
    NotDedicated(u32),
    /// A CPU that another instance has for itself.
    #[error("CPU {cpu} is pinned by instance {holder}")]
    CpuTaken {
        /// The CPU.
        cpu: u32,
        /// Who has it.
        holder: InstanceId,
    },
    /// Too many floating vCPUs.
    #[error("{} can carry {have} floating vCPUs, and {need} would be there", place(*.cell))]
    SharedCpus {
        /// The cell; none: the whole host.
        cell: Option<u32>,
        /// vCPUs with this reservation.
        need: u64,
        /// vCPUs there may be.
        have: u64,
    },
    /// A page size that the cell does not have.
    #[error("cell {cell} has no pages of {size_kib} KiB")]
    NoPageSize {
        /// The cell.
        cell: u32,
        /// The size.
        size_kib: u64,
    },
    /// Too few pages.
    #[error("cell {cell}: {need} pages of {size_kib} KiB are needed, {have} are free")]
    Pages {
        /// The cell.
        cell: u32,
        /// Page size in KiB.
        size_kib: u64,
        /// Pages needed.
        need: u64,
        /// Pages free.
        have: u64,
    },
    /// Too little memory.
    #[error("{}: {need} bytes of memory are needed, {have} are free", place(*.cell))]
    Memory {
        /// The cell; none: the whole host.
        cell: Option<u32>,
        /// Bytes needed.
        need: u64,
        /// Bytes free.
        have: u64,
    },
    /// There is nothing beside that it could be exchanged with.
    #[error("instance {0} holds no such reservation beside its own on this host")]
    NotBeside(InstanceId),
    /// It fits and cannot be kept.
    #[error("the reservation cannot be kept")]
    Keep(#[from] StateError),
}

fn place(cell: Option<u32>) -> String {
    cell.map_or_else(|| "this host".to_owned(), |cell| format!("cell {cell}"))
}

impl ReserveError {
    /// The veto as it travels; none: it is no veto.
    fn refusal(&self) -> Option<Refusal> {
        Some(match *self {
            Self::Malformed(_) | Self::NotBeside(_) | Self::Keep(_) => return None,
            Self::Stale { planned, changed } => Refusal::Stale { planned, changed },
            Self::NoCell(cell) => Refusal::NoCell { cell },
            Self::NoCpu { cpu, .. } | Self::NoCpuAnywhere(cpu) => Refusal::NoCpu { cpu },
            Self::NotDedicated(cpu) => Refusal::NotDedicated { cpu },
            Self::CpuTaken { cpu, holder } => Refusal::CpuTaken { cpu, holder },
            Self::SharedCpus { need, have, .. } => Refusal::SharedCpus { need, have },
            Self::NoPageSize { cell, size_kib } => Refusal::NoPageSize { cell, size_kib },
            Self::Pages { cell, size_kib, need, have } => Refusal::Pages { cell, size_kib, need, have },
            Self::Memory { cell, need, have } => Refusal::Memory { cell, need, have },
        })
    }
}

impl From<ReserveError> for RequestError {
    fn from(error: ReserveError) -> Self {
        let text = godwit_protocol::error::chain(&error);
        match (error.refusal(), error) {
            (Some(refusal), _) => RequestError::refused(text, refusal),
            (None, ReserveError::NotBeside(_)) => RequestError::new(ErrorKind::Conflict, text),
            (None, ReserveError::Keep(_)) => RequestError::new(ErrorKind::Unavailable, text),
            (None, _) => RequestError::new(ErrorKind::Invalid, text),
        }
    }
}

/// What there is to hold.
#[derive(Clone, Debug)]
pub struct Capacity {
    /// The host's cells.
    pub cells: Vec<Cell>,
    /// Memory kept from guests, in bytes, taken from the first cells that have it.
    pub reserved_memory_bytes: u64,
}

type Table = BTreeMap<InstanceId, Held>;

/// What an instance holds here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    /// What it runs by.
    now: Reservation,
    /// While it is resized on this host: what it is to run by, or ran by.
    beside: Option<Reservation>,
}

impl Held {
    fn all(&self) -> impl Iterator<Item = &Reservation> {
        std::iter::once(&self.now).chain(&self.beside)
    }
}

/// The reservations of this host.
#[derive(Debug)]
pub struct Reservations {
    path: PathBuf,
    table: Mutex<Table>,
    count: IntGauge,
}

impl Reservations {
    /// Reads `DIR/reservations.json`. What it holds counts even where the host has shrunk since.
    ///
    /// # Errors
    /// [`StateError::Malformed`]: a veto that forgot what it promised would be none.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let path = dir.join("reservations.json");
        let kept: Vec<Reservation> = read_json(&path)?.unwrap_or_default();
        let mut table = Table::new();
        for reservation in kept {
            // Of two, an instance runs by the first.
            match table.entry(reservation.instance) {
                Entry::Vacant(none) => drop(none.insert(Held { now: reservation, beside: None })),
                Entry::Occupied(mut first) => first.get_mut().beside = Some(reservation),
            }
        }
        // The name is right, so there is no error to tell.
        let count = IntGauge::new("godwit_reservations", "Instances that hold something on this host.")
            .map_err(|e| StateError::Malformed { path: path.clone(), source: e.into() })?;
        count.set(table.len() as i64);
        Ok(Self { path, table: Mutex::new(table), count })
    }

    /// Adds `godwit_reservations` to `registry`.
    ///
    /// # Errors
    /// When it holds such a metric already.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.count.clone()))
    }

    /// Holds `wanted`, and nothing else, for its instance. When it is refused, what the instance held before is
    /// still held. Returns whether anything changed.
    ///
    /// # Errors
    /// Each of [`ReserveError`].
    pub fn reserve(&self, host: &Capacity, wanted: Reservation) -> Result<bool, ReserveError> {
        let mut table = self.lock();
        let before = table.get(&wanted.instance);
        if before.is_some_and(|held| held.now == wanted) {
            return Ok(false);
        }
        let beside = before.and_then(|held| held.beside.clone());
        check(host, &others(&table, wanted.instance).chain(&beside).collect::<Vec<_>>(), &wanted)?;
        let mut new = table.clone();
        new.insert(wanted.instance, Held { now: wanted, beside });
        self.put(&mut table, new)?;
        Ok(true)
    }

    /// Holds `wanted` for its instance beside what that runs by, so that both are held. Returns whether anything
    /// changed.
    ///
    /// # Errors
    /// Each of [`ReserveError`].
    pub fn reserve_beside(&self, host: &Capacity, wanted: Reservation) -> Result<bool, ReserveError> {
        let mut table = self.lock();
        let mut new = table.clone();
        let Some(held) = new.get_mut(&wanted.instance) else {
            return Err(ReserveError::Malformed("its instance holds nothing that it could be beside"));
        };
        if held.beside.as_ref() == Some(&wanted) {
            return Ok(false);
        }
        check(host, &others(&table, wanted.instance).chain([&held.now]).collect::<Vec<_>>(), &wanted)?;
        held.beside = Some(wanted);
        self.put(&mut table, new)?;
        Ok(true)
    }

    /// The instance runs by `wanted` from now on, which is held beside, and what it ran by is held beside instead.
    /// Returns whether anything changed.
    ///
    /// # Errors
    /// [`ReserveError::NotBeside`], [`ReserveError::Keep`].
    pub fn exchange(&self, wanted: &Reservation) -> Result<bool, ReserveError> {
        let mut table = self.lock();
        let mut new = table.clone();
        match new.get_mut(&wanted.instance) {
            Some(held) if held.now == *wanted => return Ok(false),
            Some(Held { now, beside: Some(beside) }) if beside == wanted => std::mem::swap(now, beside),
            _ => return Err(ReserveError::NotBeside(wanted.instance)),
        }
        self.put(&mut table, new)?;
        Ok(true)
    }

    /// Lets go of what is held beside for `instance`; nothing being there is a success.
    ///
    /// # Errors
    /// [`StateError::Io`]: it is still held.
    pub fn release_beside(&self, instance: InstanceId) -> Result<bool, StateError> {
        let mut table = self.lock();
        let mut new = table.clone();
        if new.get_mut(&instance).and_then(|held| held.beside.take()).is_none() {
            return Ok(false);
        }
        self.put(&mut table, new)?;
        Ok(true)
    }

    /// Lets go of what `instance` holds; holding nothing is a success. Returns whether anything changed.
    ///
    /// # Errors
    /// [`StateError::Io`]: it is still held.
    pub fn release(&self, instance: InstanceId) -> Result<bool, StateError> {
        let mut table = self.lock();
        let mut new = table.clone();
        if new.remove(&instance).is_none() {
            return Ok(false);
        }
        self.put(&mut table, new)?;
        Ok(true)
    }

    /// What `instance` runs by.
    pub fn get(&self, instance: InstanceId) -> Option<Reservation> {
        self.lock().get(&instance).map(|held| held.now.clone())
    }

    /// What is held beside for `instance`.
    pub fn beside(&self, instance: InstanceId) -> Option<Reservation> {
        self.lock().get(&instance)?.beside.clone()
    }

    /// All that instances run by, by instance.
    pub fn list(&self) -> Vec<Reservation> {
        self.lock().values().map(|held| held.now.clone()).collect()
    }

    /// All that is held beside, by instance.
    pub fn list_beside(&self) -> Vec<Reservation> {
        self.lock().values().filter_map(|held| held.beside.clone()).collect()
    }

    /// Makes `new` the table, durably.
    fn put(&self, table: &mut Table, new: Table) -> Result<(), StateError> {
        self.save(&new)?;
        *table = new;
        Ok(())
    }

    fn save(&self, table: &Table) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(&table.values().flat_map(Held::all).collect::<Vec<_>>())
            .map_err(|e| StateError::Malformed { path: self.path.clone(), source: e.into() })?;
        write_atomic(&self.path, &bytes, 0o600)?;
        self.count.set(table.len() as i64);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that others than `instance` hold.
fn others(table: &Table, instance: InstanceId) -> impl Iterator<Item = &Reservation> {
    table.values().filter(move |held| held.now.instance != instance).flat_map(Held::all)
}

/// Whether `wanted` fits beside all of `others`.
fn check(host: &Capacity, others: &[&Reservation], wanted: &Reservation) -> Result<(), ReserveError> {
    well_formed(wanted)?;
    check_pins(host, others, wanted)?;
    check_shared_cpus(host, others, wanted)?;
    check_pages(host, others, wanted)?;
    check_memory(host, others, wanted)
}

fn well_formed(wanted: &Reservation) -> Result<(), ReserveError> {
    let wrong = |what| Err(ReserveError::Malformed(what));
    if wanted.vcpus == 0 {
        return wrong("it has no vCPU");
    }
    if wanted.memory_bytes == 0 {
        return wrong("it has no memory");
    }
    let mut cpus = BTreeSet::new();
    if !wanted.pinned_cpus().all(|cpu| cpus.insert(cpu)) {
        return wrong("it takes a CPU twice");
    }
    if wanted.cells.is_empty() {
        return Ok(());
    }
    let mut guests = BTreeSet::new();
    let mut vcpus = BTreeSet::new();
    let mut memory_bytes = 0_u64;
    for cell in &wanted.cells {
        if !guests.insert(cell.guest) {
            return wrong("two of its cells have one number");
        }
        if !cell.pinning.keys().chain(&cell.shared_vcpus).all(|vcpu| vcpus.insert(*vcpu)) {
            return wrong("a vCPU is in it twice");
        }
        if cell.page_size_kib == Some(0) {
            return wrong("it has pages of no size");
        }
        memory_bytes = memory_bytes.saturating_add(cell.memory_bytes);
    }
    if vcpus.len() != wanted.vcpus as usize || vcpus.last().is_some_and(|v| *v >= wanted.vcpus) {
        return wrong("its cells do not hold each vCPU once");
    }
    if memory_bytes != wanted.memory_bytes {
        return wrong("its cells do not add up to its memory");
    }
    Ok(())
}

fn host_cell(host: &Capacity, id: u32) -> Result<&Cell, ReserveError> {
    host.cells.iter().find(|c| c.id == id).ok_or(ReserveError::NoCell(id))
}

fn check_pins(host: &Capacity, others: &[&Reservation], wanted: &Reservation) -> Result<(), ReserveError> {
    for cell in &wanted.cells {
        let there = host_cell(host, cell.host)?;
        for cpu in cell.pinning.values().copied() {
            if !there.cpus.iter().any(|c| c.id == cpu) {
                return Err(ReserveError::NoCpu { cpu, cell: cell.host });
            }
            if !there.dedicated_cpus.contains(&cpu) {
                return Err(ReserveError::NotDedicated(cpu));
            }
        }
    }
    for cpu in wanted.emulator_cpus.iter().chain(&wanted.idle_cpus).copied() {
        if !host.cells.iter().flat_map(|c| &c.cpus).any(|c| c.id == cpu) {
            return Err(ReserveError::NoCpuAnywhere(cpu));
        }
    }
    // An idle sibling need not be dedicated: it is only kept from others' pins.
    let dedicated = |cpu: &u32| host.cells.iter().any(|c| c.dedicated_cpus.contains(cpu));
    if let Some(cpu) = wanted.emulator_cpus.iter().find(|cpu| !dedicated(cpu)) {
        return Err(ReserveError::NotDedicated(*cpu));
    }
    let taken: BTreeMap<u32, InstanceId> =
        others.iter().flat_map(|r| r.pinned_cpus().map(|cpu| (cpu, r.instance))).collect();
    for cpu in wanted.pinned_cpus() {
        if let Some(holder) = taken.get(&cpu) {
            return Err(ReserveError::CpuTaken { cpu, holder: *holder });
        }
    }
    Ok(())
}

/// vCPUs of a reservation that float: over one host cell, or with `None` over the whole host.
fn floating(reservation: &Reservation, cell: Option<u32>) -> u64 {
    match cell {
        None if reservation.cells.is_empty() => u64::from(reservation.vcpus),
        _ => reservation
            .cells
            .iter()
            .filter(|c| cell.is_none_or(|id| c.host == id))
            .map(|c| c.shared_vcpus.len() as u64)
            .sum(),
    }
}

fn check_shared_cpus(
    host: &Capacity,
    others: &[&Reservation],
    wanted: &Reservation,
) -> Result<(), ReserveError> {
    let check = |cell: Option<u32>, cpus: usize| {
        let asked = floating(wanted, cell);
        let need = others.iter().map(|r| floating(r, cell)).sum::<u64>().saturating_add(asked);
        let have = cpus as u64 * MAX_VCPUS_PER_SHARED_CPU;
        if asked > 0 && need > have { Err(ReserveError::SharedCpus { cell, need, have }) } else { Ok(()) }
    };
    for cell in &wanted.cells {
        let shared = host_cell(host, cell.host)?.shared_cpus.len();
        check(Some(cell.host), shared)?;
    }
    check(None, host.cells.iter().map(|c| c.shared_cpus.len()).sum())
}

/// The cell's ordinary page size; the smallest there is.
fn base_page_kib(cell: &Cell) -> u64 {
    cell.page_pools.iter().map(|p| p.size_kib).min().unwrap_or(4)
}

fn pages(cell: &ReservedCell, size_kib: u64) -> u64 {
    cell.memory_bytes.div_ceil(size_kib.saturating_mul(1024).max(1))
}

fn check_pages(host: &Capacity, others: &[&Reservation], wanted: &Reservation) -> Result<(), ReserveError> {
    for cell in &wanted.cells {
        let there = host_cell(host, cell.host)?;
        // Ordinary pages are ordinary memory: the memory check counts them.
        let Some(size_kib) = cell.page_size_kib.filter(|size| *size != base_page_kib(there)) else {
            continue;
        };
        let pool = there.page_pools.iter().find(|p| p.size_kib == size_kib);
        let pool = pool.ok_or(ReserveError::NoPageSize { cell: there.id, size_kib })?;
        let total = pool.total.saturating_sub(pool.taken);
        let held = |r: &Reservation| -> u64 {
            let same = |c: &&ReservedCell| c.host == there.id && c.page_size_kib == Some(size_kib);
            r.cells.iter().filter(same).map(|c| pages(c, size_kib)).sum()
        };
        let have = total.saturating_sub(others.iter().map(|r| held(r)).sum());
        let need = held(wanted);
        if need > have {
            return Err(ReserveError::Pages { cell: there.id, size_kib, need, have });
        }
    }
    Ok(())
}

/// Ordinary memory of each cell in bytes, without huge pages and without what is kept from guests.
fn ordinary_memory(host: &Capacity) -> BTreeMap<u32, u64> {
    let mut keep = host.reserved_memory_bytes;
    let mut memory = BTreeMap::new();
    for cell in &host.cells {
        let base = base_page_kib(cell);
        let huge = cell.page_pools.iter().filter(|p| p.size_kib != base);
        let huge: u64 = huge.map(|p| p.total.saturating_mul(p.size_kib).saturating_mul(1024)).sum();
        let ordinary = cell.memory_bytes.saturating_sub(huge);
        let kept = keep.min(ordinary);
        keep -= kept;
        memory.insert(cell.id, ordinary - kept);
    }
    memory
}

fn check_memory(host: &Capacity, others: &[&Reservation], wanted: &Reservation) -> Result<(), ReserveError> {
    let memory = ordinary_memory(host);
    let is_ordinary = |cell: &ReservedCell| {
        let base = host.cells.iter().find(|c| c.id == cell.host).map_or(4, base_page_kib);
        cell.page_size_kib.is_none_or(|size| size == base)
    };
    let bound = |r: &Reservation, host: Option<u32>| -> u64 {
        let here = r.cells.iter().filter(|c| host.is_none_or(|id| c.host == id) && is_ordinary(c));
        here.map(|c| c.memory_bytes).fold(0, u64::saturating_add)
    };
    for cell in wanted.cells.iter().filter(|c| is_ordinary(c)) {
        let used: u64 = others.iter().map(|r| bound(r, Some(cell.host))).sum();
        let have = memory.get(&cell.host).copied().unwrap_or(0).saturating_sub(used);
        let need = bound(wanted, Some(cell.host));
        if need > have {
            return Err(ReserveError::Memory { cell: Some(cell.host), need, have });
        }
    }
    let all = |r: &Reservation| if r.cells.is_empty() { r.memory_bytes } else { bound(r, None) };
    let used = others.iter().map(|r| all(r)).fold(0, u64::saturating_add);
    let have = memory.values().sum::<u64>().saturating_sub(used);
    match all(wanted) {
        need if need > have => Err(ReserveError::Memory { cell: None, need, have }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
