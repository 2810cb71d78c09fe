//! Huge pages that other programs hold. The kernel counts what is free of a cell's pool; what is not free and not in one
//! of our guests is somebody else's, and neither placement nor the host's veto may give it out. Nothing is taken back:
//! what others take from under a reservation is told.

use crate::guest_process::GuestProcesses;
use crate::reservations::Reservations;
use godwit_protocol::host::{Cell, PagePool};
use godwit_protocol::id::InstanceId;
use godwit_protocol::reservation::{Aspect, Drift, Reservation};
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Pages by cell and size in KiB.
type Pages = BTreeMap<(u32, u64), u64>;

/// Who holds what of the pools.
pub struct HugePages {
    reservations: Arc<Reservations>,
    processes: GuestProcesses,
    /// Reservations whose pages others hold, as last looked at.
    short: Mutex<Vec<Drift>>,
    taken: IntGaugeVec,
    missing: IntGauge,
}

impl HugePages {
    /// Of the guests that hold something on this host, counted in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(
        reservations: Arc<Reservations>,
        processes: GuestProcesses,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let taken = IntGaugeVec::new(
            Opts::new("godwit_huge_pages_taken", "Huge pages that others than this host's guests hold."),
            &["cell", "size_kib"],
        )?;
        let missing = IntGauge::new(
            "godwit_huge_pages_missing",
            "Instances that hold huge pages which others have taken; they will not start.",
        )?;
        registry.register(Box::new(taken.clone()))?;
        registry.register(Box::new(missing.clone()))?;
        Ok(Self { reservations, processes, short: Mutex::default(), taken, missing })
    }

    /// Leaves in `cells`, as the kernel told them, only what others than our guests have taken.
    pub fn leave_guests_out(&self, cells: &mut [Cell]) {
        let mut pools = cells.iter().flat_map(|cell| &cell.page_pools);
        if pools.all(|pool| pool.taken == 0) {
            return;
        }
        for reservation in self.reservations.list() {
            let Some(held) = self.in_use(&reservation) else { continue };
            for ((cell, size_kib), pages) in held {
                if let Some(pool) = pool_mut(cells, cell, size_kib) {
                    pool.taken = pool.taken.saturating_sub(pages);
                }
            }
        }
    }

    /// Looks whether what is reserved is still there; returns whether that is news, or others hold another number of
    /// pages than was `told`.
    pub fn look(&self, now: &[Cell], told: &[Cell]) -> bool {
        self.taken.reset();
        for (key, pool) in pools(now) {
            let (cell, size) = (key.0.to_string(), key.1.to_string());
            self.taken.with_label_values(&[&*cell, &*size]).set(pool.taken as i64);
        }
        let mut waiting: Vec<Reservation> = self.reservations.list();
        waiting.extend(self.reservations.list_beside());
        let running: BTreeSet<InstanceId> = waiting
            .iter()
            .filter(|r| self.processes.find(r.instance).is_some())
            .map(|r| r.instance)
            .collect();
        let found = shortages(now, &waiting, &running);
        self.missing.set(found.iter().map(|drift| drift.instance).collect::<BTreeSet<_>>().len() as i64);
        let taken = |cells| pools(cells).map(|(key, pool)| (key, pool.taken)).collect::<Pages>();
        let mut short = self.short.lock().unwrap_or_else(PoisonError::into_inner);
        for drift in found.iter().filter(|drift| !short.contains(drift)) {
            let (instance, wanted, found) = (drift.instance, &drift.wanted, &drift.found);
            tracing::error!(%instance, wanted, found, "others have taken huge pages that it holds");
        }
        let news = *short != found;
        *short = found;
        news || taken(now) != taken(told)
    }

    /// Reservations whose pages others hold, as last looked at.
    pub fn list(&self) -> Vec<Drift> {
        self.short.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The huge pages that an instance's guest has now; none when it does not run, or holds none.
    fn in_use(&self, reservation: &Reservation) -> Option<Pages> {
        if reservation.cells.iter().all(|cell| cell.page_size_kib.is_none()) {
            return None;
        }
        let process = self.processes.find(reservation.instance)?;
        let Some(mappings) = process.mappings() else {
            // A kernel without cells does not tell; QEMU takes all of its pages when it starts.
            return Some(held(reservation));
        };
        let mut pages = Pages::new();
        for mapping in mappings.into_iter().filter(|mapping| mapping.huge) {
            for (cell, count) in mapping.pages {
                *pages.entry((cell, mapping.page_kib)).or_default() += count;
            }
        }
        Some(pages)
    }
}

/// What a reservation holds.
fn held(reservation: &Reservation) -> Pages {
    let mut pages = Pages::new();
    for cell in &reservation.cells {
        if let Some(size_kib) = cell.page_size_kib.filter(|size_kib| *size_kib > 0) {
            *pages.entry((cell.host, size_kib)).or_default() += cell.memory_bytes.div_ceil(size_kib * 1024);
        }
    }
    pages
}

fn pools(cells: &[Cell]) -> impl Iterator<Item = ((u32, u64), &PagePool)> {
    // The first pool is that of ordinary pages, which everybody takes.
    let huge = |cell: &Cell| cell.page_pools.iter().map(|pool| pool.size_kib).min();
    cells.iter().flat_map(move |cell| {
        let ordinary = huge(cell);
        let huge = cell.page_pools.iter().filter(move |pool| Some(pool.size_kib) != ordinary);
        huge.map(|pool| ((cell.id, pool.size_kib), pool))
    })
}

fn pool_mut(cells: &mut [Cell], cell: u32, size_kib: u64) -> Option<&mut PagePool> {
    let cell = cells.iter_mut().find(|there| there.id == cell)?;
    cell.page_pools.iter_mut().find(|pool| pool.size_kib == size_kib)
}

/// Instances that do not run, and hold pages of a pool in which fewer are left than they hold together.
fn shortages(cells: &[Cell], all: &[Reservation], running: &BTreeSet<InstanceId>) -> Vec<Drift> {
    let mut drifts = Vec::new();
    for (key, pool) in pools(cells) {
        let holders = || {
            all.iter()
                .map(|r| (r.instance, held(r).remove(&key).unwrap_or(0)))
                .filter(|(_, pages)| *pages > 0)
        };
        let (mut in_guests, mut waiting) = (0_u64, 0_u64);
        for (instance, pages) in holders() {
            let side = if running.contains(&instance) { &mut in_guests } else { &mut waiting };
            *side = side.saturating_add(pages);
        }
        let left = pool.total.saturating_sub(pool.taken).saturating_sub(in_guests);
        if waiting <= left {
            continue;
        }
        let (cell, size_kib) = key;
        drifts.extend(holders().filter(|(instance, _)| !running.contains(instance)).map(
            |(instance, pages)| Drift {
                instance,
                aspect: Aspect::HugePages { cell },
                wanted: format!("{pages} pages of {size_kib} KiB"),
                found: format!("{left} are left for {waiting} that are held, others took {}", pool.taken),
            },
        ));
    }
    drifts.sort();
    drifts
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_protocol::reservation::ReservedCell;
    use std::fs;

    fn cell(taken: u64) -> Cell {
        Cell {
            id: 0,
            cpus: vec![],
            memory_bytes: 1 << 30,
            page_pools: vec![
                PagePool { size_kib: 4, total: 1000, taken: 0 },
                PagePool { size_kib: 2048, total: 100, taken },
            ],
            distances: BTreeMap::new(),
            shared_cpus: vec![],
            dedicated_cpus: vec![],
        }
    }

    fn guest(pages: u64) -> Reservation {
        let memory_bytes = pages << 21;
        let cell = ReservedCell {
            guest: 0,
            host: 0,
            shared_vcpus: vec![0],
            pinning: BTreeMap::new(),
            memory_bytes,
            page_size_kib: Some(2048),
        };
        Reservation {
            instance: InstanceId::random(),
            vcpus: 1,
            memory_bytes,
            cells: vec![cell],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        }
    }

    /// A guest's process as the kernel and libvirt tell of it, with so many huge pages in cell 0.
    fn run(root: &std::path::Path, instance: InstanceId, pages: u64) {
        let name = crate::hypervisor::domain_xml::domain_name(instance);
        let folder = root.join("77");
        fs::create_dir_all(&folder).unwrap();
        fs::write(root.join(format!("{name}.pid")), "77").unwrap();
        fs::write(folder.join("cmdline"), format!("qemu\0-uuid\0{instance}\0")).unwrap();
        let map = format!(
            "7f00 bind:0 file=/dev/hugepages/x huge dirty={pages} N0={pages} kernelpagesize_kB=2048\n"
        );
        fs::write(folder.join("numa_maps"), format!("{map}7e00 default anon=9 N0=9 kernelpagesize_kB=4\n"))
            .unwrap();
    }

    #[test]
    fn what_is_in_no_guest_is_taken_by_others_and_told_when_it_was_held() {
        let folder = tempfile::tempdir().unwrap();
        let reservations = Arc::new(Reservations::open(folder.path()).unwrap());
        let host = crate::reservations::Capacity { cells: vec![cell(0)], reserved_memory_bytes: 0 };
        let (runs, waits) = (guest(40), guest(50));
        let mut host_with_cpus = host;
        host_with_cpus.cells[0].cpus = vec![godwit_protocol::host::Cpu { id: 0, ..Default::default() }];
        host_with_cpus.cells[0].shared_cpus = vec![0];
        for reservation in [&runs, &waits] {
            reservations.reserve(&host_with_cpus, reservation.clone()).unwrap();
        }
        run(folder.path(), runs.instance, 40);
        let processes = GuestProcesses::new(folder.path(), folder.path());
        let pages = HugePages::new(reservations, processes, &Registry::new()).unwrap();

        // The kernel says that 50 of 100 are in use: 40 of them are the guest's.
        let mut now = vec![cell(50)];
        pages.leave_guests_out(&mut now);
        assert_eq!(now[0].page_pools[1].taken, 10);
        assert!(pages.look(&now, &[cell(0)]), "that others took some is news");
        assert!(!pages.look(&now, &now), "and once");
        assert_eq!(pages.list(), [], "50 are left for 50");

        let mut now = vec![cell(51)];
        pages.leave_guests_out(&mut now);
        assert!(pages.look(&now, &[cell(10)]));
        let [told] = pages.list().try_into().unwrap();
        assert_eq!((told.instance, told.aspect), (waits.instance, Aspect::HugePages { cell: 0 }));
        assert_eq!(told.found, "49 are left for 50 that are held, others took 11");
        assert_eq!(pages.missing.get(), 1);

        assert!(pages.look(&[cell(0)], &[cell(0)]), "when they are back, that is news");
        assert_eq!((pages.list(), pages.missing.get()), (vec![], 0));
    }
}
