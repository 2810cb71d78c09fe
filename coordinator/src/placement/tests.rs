//! Placement's tests: requests, fits against brute force, whole hosts.

mod brute_force;
mod hosts;
mod preferences;
mod requests;
mod rosters;
mod suggestions;
mod wishes;

use super::cell::{Cell, PagePool};
use super::cpu_set::CpuSet;
use super::guest::{CpuPolicy, Guest, GuestCell};

fn cpus(text: &str) -> CpuSet {
    CpuSet::parse(text).unwrap()
}

/// A cell of dedicated CPUs in cores of two threads (0-1, 2-3, …), with 4 GiB on ordinary pages.
fn smt_cell(id: u32, dedicated: &str) -> Cell {
    let dedicated_cpus = cpus(dedicated);
    let cores = dedicated_cpus.iter().map(|cpu| cpu / 2).collect::<CpuSet>();
    Cell {
        id,
        memory_mib: 4096,
        dedicated_cpus,
        cores: cores.iter().map(|core| CpuSet::from_iter([2 * core, 2 * core + 1])).collect(),
        page_pools: vec![PagePool { size_kib: 4, total: 1 << 20, used: 0, reserved: 0 }],
        ..Cell::default()
    }
}

/// A guest cell of dedicated vCPUs.
fn pinned_cell(vcpus: &str, memory_mib: u64) -> GuestCell {
    GuestCell {
        shared: CpuSet::new(),
        dedicated: cpus(vcpus),
        memory_mib,
        page_size: None,
        cpu_policy: Some(CpuPolicy::Dedicated),
        thread_policy: None,
    }
}

fn guest(cells: Vec<GuestCell>) -> Guest {
    Guest { cells, emulator_policy: None, isolated_emulator_cpus: 1 }
}
