//! A fleet that nobody has yet, as a file describes it: for simulations.

use std::collections::BTreeMap;

use godwit_protocol::host::{Cell, Cpu, HypervisorInfo, Inventory, PagePool, PoolReport, Underlay};
use godwit_protocol::id::HostId;
use serde::Deserialize;
use thiserror::Error;

use super::cpu_set::CpuSet;
use super::fit::Limits;
use super::host_view::{HostState, HostView};
use super::roster::Roster;

/// Hosts that one description makes at most.
pub const MAX_HOSTS: u64 = 100_000;

/// CPUs that a described host has at most.
const MAX_CPUS: u64 = 8192;

const GIB: u64 = 1 << 30;

/// A fleet: kinds of hosts, and how many of each.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribedFleet {
    /// At least one.
    pub hosts: Vec<DescribedHosts>,
}

/// Hosts of one kind: as `godwit-agent inventory --json` prints one, or in a few numbers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribedHosts {
    /// Its name; with a count, the beginning of their names.
    pub name: String,
    /// How many; 1 unless told.
    #[serde(default = "one")]
    pub count: u64,
    /// A whole inventory; then nothing else is said.
    #[serde(default)]
    pub inventory: Option<Inventory>,
    /// NUMA cells.
    #[serde(default = "one")]
    pub cells: u64,
    /// Cores of each cell.
    #[serde(default)]
    pub cores_per_cell: u64,
    /// Hardware threads of each core.
    #[serde(default = "one")]
    pub threads_per_core: u64,
    /// Memory of each cell in GiB.
    #[serde(default)]
    pub memory_gib_per_cell: u64,
    /// Huge pages of each cell: size in KiB and how many.
    #[serde(default)]
    pub huge_pages_per_cell: BTreeMap<u64, u64>,
    /// CPUs to pin; CPUs are numbered core by core. Without both lists, all CPUs serve for both.
    #[serde(default)]
    pub dedicated_cpus: Option<String>,
    /// CPUs to share.
    #[serde(default)]
    pub shared_cpus: Option<String>,
    /// Disk space in GiB.
    #[serde(default = "thousand")]
    pub disk_gib: u64,
}

fn one() -> u64 {
    1
}

fn thousand() -> u64 {
    1000
}

/// What is wrong with a description.
#[derive(Debug, Error)]
pub enum DescriptionError {
    /// There is no host in it, or more than can be.
    #[error("{0} hosts are described; there must be 1 to {MAX_HOSTS}")]
    Hosts(u64),
    /// A number that no host has.
    #[error("host {name}: {key} = {value}: {rule}")]
    Value {
        /// The kind of host.
        name: String,
        /// Which.
        key: &'static str,
        /// As it is there.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
}

impl DescribedFleet {
    /// The fleet, empty.
    ///
    /// # Errors
    /// See [`DescriptionError`].
    pub fn roster(&self, limits: Limits) -> Result<Roster, DescriptionError> {
        let total = self.hosts.iter().map(|kind| kind.count).fold(0, u64::saturating_add);
        if total == 0 || total > MAX_HOSTS {
            return Err(DescriptionError::Hosts(total));
        }
        let mut views = Vec::new();
        for kind in &self.hosts {
            let inventory = kind.inventory()?;
            let view = HostView::new(HostId(uuid::Uuid::nil()), HostState::Up, &inventory, []);
            for number in 1..=kind.count {
                let name =
                    if kind.count == 1 { kind.name.clone() } else { format!("{}-{number:05}", kind.name) };
                let id = HostId(uuid::Uuid::from_u128(views.len() as u128 + 1));
                views.push((HostView { id, name, ..view.clone() }, Vec::new()));
            }
        }
        Ok(Roster::new(views, limits))
    }
}

impl DescribedHosts {
    fn inventory(&self) -> Result<Inventory, DescriptionError> {
        if let Some(inventory) = &self.inventory {
            return Ok(inventory.clone());
        }
        let wrong =
            |key, value: String, rule| DescriptionError::Value { name: self.name.clone(), key, value, rule };
        let refuse = |key, value: String, rule| Err(wrong(key, value, rule));
        let cpus =
            self.cores_per_cell.saturating_mul(self.threads_per_core).saturating_mul(self.cells.max(1));
        if cpus == 0 || cpus > MAX_CPUS || self.cells == 0 || self.cells > 128 {
            let value = format!("{} x {} x {}", self.cells, self.cores_per_cell, self.threads_per_core);
            let rule = "cells x cores_per_cell x threads_per_core are 1 to 8192 CPUs, in 1 to 128 cells";
            return refuse("cells", value, rule);
        }
        let huge = self
            .huge_pages_per_cell
            .iter()
            .fold(0, |sum: u64, (kib, count)| sum.saturating_add(kib.saturating_mul(*count)));
        let memory_kib = self.memory_gib_per_cell.saturating_mul(GIB / 1024);
        if self.memory_gib_per_cell == 0 || self.memory_gib_per_cell > 1 << 20 {
            let value = self.memory_gib_per_cell.to_string();
            return refuse("memory_gib_per_cell", value, "from 1 to 1048576");
        }
        if huge > memory_kib || self.huge_pages_per_cell.contains_key(&0) {
            let value = format!("{} MiB", huge / 1024);
            return refuse(
                "huge_pages_per_cell",
                value,
                "sizes in KiB, together no more than the cell's memory",
            );
        }
        let set = |key, text: &Option<String>| {
            let read = |text: &String| {
                CpuSet::parse(text).map_err(|_| wrong(key, text.clone(), "a list such as 0-3,8"))
            };
            text.as_ref().map(read).transpose()
        };
        let (dedicated, shared) =
            (set("dedicated_cpus", &self.dedicated_cpus)?, set("shared_cpus", &self.shared_cpus)?);
        let all = CpuSet::first_n(cpus as u32);
        let (dedicated, shared) = match (dedicated, shared) {
            (None, None) => (all.clone(), all),
            (dedicated, shared) => (dedicated.unwrap_or_default(), shared.unwrap_or_default()),
        };
        Ok(self.inventory_of(&dedicated, &shared, memory_kib - huge))
    }

    fn inventory_of(&self, dedicated: &CpuSet, shared: &CpuSet, small_kib: u64) -> Inventory {
        let threads = self.threads_per_core as u32;
        let per_cell = self.cores_per_cell as u32 * threads;
        let cell = |id: u32| {
            let cpus = id * per_cell..(id + 1) * per_cell;
            let cpu = |cpu: u32| Cpu {
                id: cpu,
                package: i64::from(id),
                die: 0,
                core: i64::from(cpu / threads),
                siblings: (cpu / threads * threads..(cpu / threads + 1) * threads).collect(),
                ..Cpu::default()
            };
            let mut page_pools = vec![PagePool { size_kib: 4, total: small_kib / 4, taken: 0 }];
            let huge = self.huge_pages_per_cell.iter();
            page_pools.extend(huge.map(|(&size_kib, &total)| PagePool { size_kib, total, taken: 0 }));
            Cell {
                id,
                cpus: cpus.clone().map(cpu).collect(),
                memory_bytes: self.memory_gib_per_cell * GIB,
                page_pools,
                distances: BTreeMap::new(),
                shared_cpus: cpus.clone().filter(|cpu| shared.contains(*cpu)).collect(),
                dedicated_cpus: cpus.filter(|cpu| dedicated.contains(*cpu)).collect(),
            }
        };
        let disk = self.disk_gib.saturating_mul(GIB);
        Inventory {
            hostname: self.name.clone(),
            agent_version: String::new(),
            kernel: String::new(),
            architecture: String::new(),
            cpu_model: String::new(),
            hypervisor: HypervisorInfo {
                kind: "QEMU".to_owned(),
                libvirt_version: String::new(),
                version: String::new(),
                kvm: true,
            },
            cells: (0..self.cells as u32).map(cell).collect(),
            reserved_memory_bytes: 0,
            physical_networks: Vec::new(),
            links: Vec::new(),
            underlay: Underlay { link: String::new(), address: [127, 0, 0, 1].into(), mtu: 9000 },
            migration_address: None,
            pools: vec![PoolReport {
                name: "described".to_owned(),
                path: String::new(),
                total_bytes: disk,
                free_bytes: disk,
                reachable: true,
                ..Default::default()
            }],
        }
    }
}
