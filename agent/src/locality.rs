//! Where guests are, for `/metrics`: memory by cell, near its vCPUs or far from them, huge pages, the cells that vCPUs
//! ran on last, and how long they wanted to run and could not. All of it is read from `/proc` at the scrape.
//!
//! Threads are read at each scrape. Memory is not: for `numa_maps` the kernel walks every page of a guest. A scrape
//! reads the guests whose figures are oldest, within [`MEMORY_BUDGET`], and no guest more often than
//! [`MEMORY_EVERY`]; a series tells how old the figures are.

use crate::guest_process::{GuestProcess, GuestProcesses};
use crate::reservations::Reservations;
use godwit_protocol::host::Cell;
use godwit_protocol::id::InstanceId;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, IntGaugeVec, Opts};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a scrape may spend on memory. One guest is always read, so that every guest's turn comes.
const MEMORY_BUDGET: Duration = Duration::from_millis(20);

/// How old a guest's figures must be before they are read again.
const MEMORY_EVERY: Duration = Duration::from_secs(60);

/// The host's cells, read when they are asked for.
pub type Cells = Arc<dyn Fn() -> Vec<Cell> + Send + Sync>;

/// Collects the series.
pub struct Locality {
    reservations: Arc<Reservations>,
    processes: GuestProcesses,
    cells: Cells,
    memory: Mutex<BTreeMap<InstanceId, Memory>>,
    memory_bytes: GaugeVec,
    memory_age: GaugeVec,
    huge_pages: IntGaugeVec,
    vcpus: IntGaugeVec,
    steal: CounterVec,
}

/// A guest's memory when it was read.
#[derive(Clone, Debug, PartialEq)]
struct Memory {
    read_at: Instant,
    process: u32,
    bytes: BTreeMap<u32, u64>,
    /// By cell and page size in KiB.
    huge_pages: BTreeMap<(u32, u64), u64>,
}

impl Memory {
    fn read(process: &GuestProcess, now: Instant) -> Option<Self> {
        let mut memory = Self {
            read_at: now,
            process: process.main_thread(),
            bytes: BTreeMap::new(),
            huge_pages: BTreeMap::new(),
        };
        for mapping in process.mappings()? {
            for (&cell, &pages) in &mapping.pages {
                *memory.bytes.entry(cell).or_default() += pages * mapping.page_kib * 1024;
                if mapping.huge {
                    *memory.huge_pages.entry((cell, mapping.page_kib)).or_default() += pages;
                }
            }
        }
        Some(memory)
    }
}

impl Locality {
    /// Of the guests that hold something on this host.
    ///
    /// # Errors
    /// Never, for these names are right.
    pub fn new(
        reservations: Arc<Reservations>,
        processes: GuestProcesses,
        cells: Cells,
    ) -> Result<Self, prometheus::Error> {
        let gauge = |name: &str, help: &str, labels: &[&str]| GaugeVec::new(Opts::new(name, help), labels);
        let count = |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        Ok(Self {
            reservations,
            processes,
            cells,
            memory: Mutex::default(),
            memory_bytes: gauge(
                "godwit_instance_memory_bytes",
                "Memory of a guest's process by cell: local where one of its vCPUs ran last, else remote.",
                &["instance", "cell", "locality"],
            )?,
            memory_age: gauge(
                "godwit_instance_memory_age_seconds",
                "How long ago a guest's memory was read.",
                &["instance"],
            )?,
            huge_pages: count(
                "godwit_instance_huge_pages",
                "Huge pages of a guest by cell and size.",
                &["instance", "cell", "size_kib"],
            )?,
            vcpus: count(
                "godwit_instance_vcpus",
                "vCPUs of a guest by the cell that they ran on last.",
                &["instance", "cell"],
            )?,
            steal: CounterVec::new(
                Opts::new(
                    "godwit_instance_steal_seconds_total",
                    "How long a guest's vCPUs wanted to run and could not, since it was started.",
                ),
                &["instance"],
            )?,
        })
    }

    fn fill(&self, now: Instant) {
        let cell_of: BTreeMap<u32, u32> = (self.cells)()
            .iter()
            .flat_map(|cell| cell.cpus.iter().map(|cpu| (cpu.id, cell.id)).collect::<Vec<_>>())
            .collect();
        let holders = self.reservations.list().into_iter().map(|r| r.instance);
        let guests: BTreeMap<InstanceId, GuestProcess> =
            holders.filter_map(|instance| Some((instance, self.processes.find(instance)?))).collect();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest that was started again has other memory.
        memory.retain(|id, old| guests.get(id).is_some_and(|process| process.main_thread() == old.process));
        read_memory(&mut memory, &guests, now);
        for (instance, process) in &guests {
            let name = instance.to_string();
            let near = self.fill_threads(&name, process, &cell_of);
            if let Some(memory) = memory.get(instance) {
                self.fill_memory(&name, memory, &near, now);
            }
        }
    }

    /// Returns the cells that the vCPUs ran on last.
    fn fill_threads(
        &self,
        name: &str,
        process: &GuestProcess,
        cell_of: &BTreeMap<u32, u32>,
    ) -> BTreeSet<u32> {
        let mut near = BTreeSet::new();
        let mut delay_ns = 0;
        for thread in process.vcpu_threads().into_values() {
            delay_ns += process.run_delay_ns(thread).unwrap_or(0);
            if let Some(cell) = process.last_cpu(thread).and_then(|cpu| cell_of.get(&cpu)) {
                self.vcpus.with_label_values(&[name, &cell.to_string()]).inc();
                near.insert(*cell);
            }
        }
        // Made anew for each scrape: the kernel counts, not we.
        self.steal.with_label_values(&[name]).inc_by(delay_ns as f64 / 1e9);
        near
    }

    fn fill_memory(&self, name: &str, memory: &Memory, near: &BTreeSet<u32>, now: Instant) {
        for (cell, bytes) in &memory.bytes {
            let locality = if near.contains(cell) { "local" } else { "remote" };
            let labels = [name, &cell.to_string(), locality];
            self.memory_bytes.with_label_values(&labels).set(*bytes as f64);
        }
        for ((cell, size_kib), pages) in &memory.huge_pages {
            let labels = [name, &cell.to_string(), &size_kib.to_string()];
            self.huge_pages.with_label_values(&labels).set(i64::try_from(*pages).unwrap_or(i64::MAX));
        }
        let age = now.saturating_duration_since(memory.read_at);
        self.memory_age.with_label_values(&[name]).set(age.as_secs_f64());
    }
}

/// Reads the memory of those guests that have waited longest, as the budget allows.
fn read_memory(
    memory: &mut BTreeMap<InstanceId, Memory>,
    guests: &BTreeMap<InstanceId, GuestProcess>,
    now: Instant,
) {
    let mut due: Vec<(Option<Instant>, InstanceId)> =
        guests.keys().map(|id| (memory.get(id).map(|memory| memory.read_at), *id)).collect();
    due.retain(|(read_at, _)| read_at.is_none_or(|at| now.saturating_duration_since(at) >= MEMORY_EVERY));
    // Those that were never read first, then the oldest.
    due.sort();
    let began = Instant::now();
    for (_, instance) in due {
        if let Some(read) = guests.get(&instance).and_then(|process| Memory::read(process, now)) {
            memory.insert(instance, read);
        }
        if began.elapsed() >= MEMORY_BUDGET {
            return;
        }
    }
}

impl Collector for Locality {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = [&self.memory_bytes, &self.memory_age];
        let counts = [&self.huge_pages, &self.vcpus];
        gauges
            .into_iter()
            .flat_map(Collector::desc)
            .chain(counts.into_iter().flat_map(Collector::desc))
            .chain(self.steal.desc())
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let gauges = [&self.memory_bytes, &self.memory_age];
        let counts = [&self.huge_pages, &self.vcpus];
        gauges.iter().for_each(|gauge| gauge.reset());
        counts.iter().for_each(|count| count.reset());
        self.steal.reset();
        self.fill(Instant::now());
        let families = gauges.into_iter().flat_map(Collector::collect);
        let families = families.chain(counts.into_iter().flat_map(Collector::collect));
        families.chain(self.steal.collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_process::tests::{processes, write_guest};
    use crate::reservations::Capacity;
    use godwit_protocol::host::Cpu;
    use godwit_protocol::reservation::Reservation;
    use prometheus::TextEncoder;

    /// Two cells of two CPUs.
    fn cells() -> Vec<Cell> {
        let cell = |id: u32| Cell {
            id,
            cpus: (id * 2..id * 2 + 2).map(|id| Cpu { id, ..Cpu::default() }).collect(),
            memory_bytes: 1 << 40,
            page_pools: vec![],
            distances: BTreeMap::new(),
            shared_cpus: (id * 2..id * 2 + 2).collect(),
            dedicated_cpus: vec![],
        };
        vec![cell(0), cell(1)]
    }

    /// A host with these guests that all hold a place.
    fn host(root: &std::path::Path, instances: &[InstanceId]) -> Locality {
        let reservations = Arc::new(Reservations::open(root).unwrap());
        let capacity = Capacity { cells: cells(), reserved_memory_bytes: 0 };
        for &instance in instances {
            let reservation = Reservation {
                instance,
                vcpus: 1,
                memory_bytes: 1,
                cells: vec![],
                emulator_cpus: vec![],
                idle_cpus: vec![],
            };
            reservations.reserve(&capacity, reservation).unwrap();
        }
        Locality::new(reservations, processes(root), Arc::new(cells)).unwrap()
    }

    fn text(locality: &Locality) -> String {
        TextEncoder::new().encode_to_string(&locality.collect()).unwrap()
    }

    #[test]
    fn a_guest_is_shown_by_cell_near_and_far() {
        let root = tempfile::tempdir().unwrap();
        let (here, away) = (InstanceId::random(), InstanceId::random());
        let maps = "7f00 bind:1 huge anon=3 N1=3 kernelpagesize_kB=2048\n7f01 default anon=5 N0=5 kernelpagesize_kB=4\n";
        write_guest(root.path(), here, 100, &[(0, 2, "2"), (1, 3, "3")], maps);
        let text = text(&host(root.path(), &[here, away]));
        for line in [
            format!(
                "godwit_instance_memory_bytes{{cell=\"1\",instance=\"{here}\",locality=\"local\"}} 6291456"
            ),
            format!(
                "godwit_instance_memory_bytes{{cell=\"0\",instance=\"{here}\",locality=\"remote\"}} 20480"
            ),
            format!("godwit_instance_huge_pages{{cell=\"1\",instance=\"{here}\",size_kib=\"2048\"}} 3"),
            format!("godwit_instance_vcpus{{cell=\"1\",instance=\"{here}\"}} 2"),
            format!("godwit_instance_steal_seconds_total{{instance=\"{here}\"}} 4"),
            format!("godwit_instance_memory_age_seconds{{instance=\"{here}\"}} 0"),
        ] {
            assert!(text.contains(&line), "{line} is missing from\n{text}");
        }
        assert!(!text.contains(&away.to_string()), "it does not run here");
    }

    #[test]
    fn memory_is_read_seldom_and_again_when_the_guest_was_started_anew() {
        let root = tempfile::tempdir().unwrap();
        let one = InstanceId::random();
        let maps = |pages: u32| format!("7f00 default anon=5 N0={pages} kernelpagesize_kB=4\n");
        let locality = host(root.path(), &[one]);
        let bytes = |now: Instant| {
            locality.memory_bytes.reset();
            locality.fill(now);
            locality.memory_bytes.with_label_values(&[&one.to_string(), "0", "local"]).get()
        };
        let began = Instant::now();
        write_guest(root.path(), one, 100, &[(0, 0, "0")], &maps(1));
        assert_eq!(bytes(began), 4096.0);
        write_guest(root.path(), one, 100, &[(0, 0, "0")], &maps(2));
        assert_eq!(bytes(began + MEMORY_EVERY / 2), 4096.0);
        assert_eq!(locality.memory_age.with_label_values(&[&one.to_string()]).get(), 30.0);
        assert_eq!(bytes(began + MEMORY_EVERY), 8192.0);
        write_guest(root.path(), one, 200, &[(0, 0, "0")], &maps(3));
        assert_eq!(bytes(began + MEMORY_EVERY), 12288.0);
    }
}
