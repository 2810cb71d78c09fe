//! Whether a fleet is sound, counted from the records alone: nothing of placement's own book-keeping is asked.

use std::collections::{BTreeMap, BTreeSet};

use godwit_coordinator::fleet::Fleet;
use godwit_coordinator::fleet::instance::Instance;
use godwit_protocol::host::Inventory;
use godwit_protocol::id::HostId;
use godwit_protocol::reservation::Reservation;

/// vCPUs that may float over each shared CPU in these fleets.
const RATIO: u64 = 16;

/// No CPU is held twice, no cell or host gives more than it has, and every instance holds what its flavor says.
pub(crate) fn fleet(fleet: &Fleet) -> Result<(), String> {
    let mut by_host: BTreeMap<HostId, Vec<&Instance>> = BTreeMap::new();
    for instance in fleet.instances.values() {
        let Some(host) = instance.host else { continue };
        by_host.entry(host).or_default().push(instance);
    }
    for (host, instances) in by_host {
        let record = fleet.hosts.get(&host).ok_or("an instance is on a host that is not there")?;
        let inventory = record.inventory.as_ref().ok_or("an instance is on a host that never reported")?;
        of_host(inventory, &instances).map_err(|wrong| format!("{}: {wrong}", record.name))?;
    }
    Ok(())
}

fn of_host(inventory: &Inventory, instances: &[&Instance]) -> Result<(), String> {
    let mut pinned = BTreeSet::new();
    let mut pages: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    let (mut floating, mut ordinary) = (0, 0);
    for instance in instances {
        let held = instance.reservation.as_ref().ok_or("an instance holds nothing")?;
        of_instance(inventory, instance, held)?;
        for cpu in held.pinned_cpus() {
            if !pinned.insert(cpu) {
                return Err(format!("CPU {cpu} is held twice"));
            }
        }
        let on_cells: u64 = held.cells.iter().map(|cell| cell.memory_bytes).sum();
        for cell in &held.cells {
            let size = cell.page_size_kib.unwrap_or(4);
            *pages.entry((cell.host, size)).or_default() += (cell.memory_bytes / 1024).div_ceil(size);
            ordinary += if size == 4 { cell.memory_bytes } else { 0 };
        }
        ordinary += held.memory_bytes - on_cells;
        let pins: u64 = held.cells.iter().map(|cell| cell.pinning.len() as u64).sum();
        floating += u64::from(held.vcpus) - pins;
    }
    for ((cell, size), used) in pages {
        let its = inventory.cells.iter().find(|c| c.id == cell).ok_or("no such cell")?;
        let total = its.page_pools.iter().find(|pool| pool.size_kib == size).map_or(0, |pool| pool.total);
        if size != 4 && used > total {
            return Err(format!("cell {cell} gives {used} of {total} pages of {size} KiB"));
        }
    }
    let shared: u64 = inventory.cells.iter().map(|cell| cell.shared_cpus.len() as u64).sum();
    let small: u64 = inventory.cells.iter().map(|cell| cell.page_pools[0].total * 4096).sum();
    if floating > shared * RATIO || ordinary > small {
        return Err(format!("{floating} vCPUs on {shared} CPUs, {ordinary} of {small} bytes"));
    }
    Ok(())
}

fn of_instance(inventory: &Inventory, instance: &Instance, held: &Reservation) -> Result<(), String> {
    let specs = &instance.flavor.extra_specs;
    let spec = |key: &str| specs.get(key).map(String::as_str);
    let vcpus = u64::from(instance.flavor.vcpus);
    let wanted = match spec("hw:cpu_policy") {
        Some("dedicated") => vcpus,
        Some("mixed") => 2,
        _ => 0,
    };
    let pins: u64 = held.cells.iter().map(|cell| cell.pinning.len() as u64).sum();
    let emulator = usize::from(spec("hw:emulator_threads_policy") == Some("isolate"));
    let cells = match (spec("hw:numa_nodes"), wanted) {
        (Some(nodes), _) => nodes.parse().unwrap_or(0),
        (None, 0) => 0,
        (None, _) => 1,
    };
    let hosts: BTreeSet<u32> = held.cells.iter().map(|cell| cell.host).collect();
    let right = pins == wanted
        && held.emulator_cpus.len() == emulator
        && (held.cells.len(), hosts.len()) == (cells, cells)
        && u64::from(held.vcpus) == vcpus
        && held.memory_bytes == instance.flavor.memory_mib << 20;
    if !right {
        return Err(format!("{} holds {held:?}", instance.flavor.name));
    }
    for cell in &held.cells {
        let its = inventory.cells.iter().find(|c| c.id == cell.host).ok_or("no such cell")?;
        if let Some(cpu) = cell.pinning.values().find(|cpu| !its.dedicated_cpus.contains(cpu)) {
            return Err(format!("CPU {cpu} is not one to pin in cell {}", cell.host));
        }
        let huge = spec("hw:mem_page_size").is_some();
        if huge != (cell.page_size_kib == Some(2048)) {
            return Err(format!("{} has pages of {:?} KiB", instance.flavor.name, cell.page_size_kib));
        }
        let pairs = spec("hw:cpu_thread_policy") == Some("require");
        let siblings = |cpu: &u32| cell.pinning.values().any(|other| *other == cpu ^ 1);
        if pairs && !cell.pinning.values().all(siblings) {
            return Err(format!("{:?} are no siblings", cell.pinning));
        }
    }
    Ok(())
}
