//! The cells of a machine's sysfs tree, as the vectors want them.

use std::collections::BTreeSet;
use std::path::Path;

use godwit_agent::inventory::{ORDINARY_PAGE_KIB, read_cells};
use godwit_protocol::host::{Cell, Cpu};
use serde_json::{Value, json};

pub(crate) fn answer(root: &Path) -> Result<Value, String> {
    let cells =
        read_cells(root, ORDINARY_PAGE_KIB).map_err(|error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })?;
    let online: BTreeSet<u32> = cells.iter().flat_map(|cell| &cell.cpus).map(|cpu| cpu.id).collect();
    let cpus = cells.iter().flat_map(|cell| cell.cpus.iter().map(|cpu| cpu_json(cpu, cell.id)));
    Ok(json!({
        "nodes": cells.iter().map(node_json).collect::<Vec<_>>(),
        "cpus": cpus.collect::<Vec<_>>(),
        "online_cpus": online,
    }))
}

fn node_json(cell: &Cell) -> Value {
    let huge = cell.page_pools.iter().filter(|pool| pool.size_kib != ORDINARY_PAGE_KIB);
    json!({
        "id": cell.id,
        "cpus": cell.cpus.iter().map(|cpu| cpu.id).collect::<Vec<_>>(),
        "memory_kib": cell.memory_bytes / 1024,
        "hugepages": huge.map(|pool| json!({"size_kib": pool.size_kib, "total": pool.total})).collect::<Vec<_>>(),
        "distances": if cell.distances.is_empty() { Value::Null } else { json!(cell.distances) },
    })
}

fn cpu_json(cpu: &Cpu, node: u32) -> Value {
    // The kernel writes -1 for a number it does not know.
    let told = |number: i64| if number < 0 { Value::Null } else { number.into() };
    json!({
        "id": cpu.id,
        "package": told(cpu.package),
        "die": told(cpu.die),
        "core": told(cpu.core),
        "siblings": cpu.siblings,
        "node": node,
    })
}
