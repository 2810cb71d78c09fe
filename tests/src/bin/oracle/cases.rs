//! The vectors' JSON to and from the product's own types. What does not fit a type is a bad request.

use std::collections::BTreeMap;

use godwit_coordinator::placement::cell::{Cell, CellUsage, PagePool};
use godwit_coordinator::placement::cpu_set::{CpuSet, MAX_CPU};
use godwit_coordinator::placement::fit::{Limits, PlacedCell};
use godwit_coordinator::placement::guest::{
    CpuPolicy, EmulatorPolicy, Guest, GuestCell, PageSize, ThreadPolicy,
};
use serde_json::{Map, Value, json};

/// A value that does not fit its type, by the key it stands at.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) &'static str);

type Read<T> = Result<T, BadInput>;

/// A flavor and an image, as the product takes them.
pub(crate) struct Flavor {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) extra_specs: BTreeMap<String, String>,
    pub(crate) image_properties: BTreeMap<String, String>,
}

/// The vectors' keys and the names of the extra specs behind `hw:`.
const SPECS: [(&str, &str); 16] = [
    ("numa_nodes", "numa_nodes"),
    ("cpu_policy", "cpu_policy"),
    ("cpu_thread_policy", "cpu_thread_policy"),
    ("mem_page_size", "mem_page_size"),
    ("dedicated_cpu_mask", "cpu_dedicated_mask"),
    ("realtime", "cpu_realtime"),
    ("realtime_mask", "cpu_realtime_mask"),
    ("emulator_threads_policy", "emulator_threads_policy"),
    ("cpu_sockets", "cpu_sockets"),
    ("cpu_cores", "cpu_cores"),
    ("cpu_threads", "cpu_threads"),
    ("cpu_max_sockets", "cpu_max_sockets"),
    ("cpu_max_cores", "cpu_max_cores"),
    ("cpu_max_threads", "cpu_max_threads"),
    ("locked_memory", "locked_memory"),
    ("pci_numa_affinity_policy", "pci_numa_affinity_policy"),
];

pub(crate) fn flavor(request: &Value) -> Read<Flavor> {
    let mut extra_specs = specs(request, "hw:");
    for (key, spec) in [
        ("explicit_vcpus", "resources:VCPU"),
        ("explicit_pcpus", "resources:PCPU"),
        ("hyperthreading_trait", "trait:HW_CPU_HYPERTHREADING"),
    ] {
        extra_specs.extend(text(&request[key]).map(|text| (spec.to_owned(), text)));
    }
    let image = &request["image"];
    let mut image_properties = specs(image, "hw_");
    let image_trait = text(&image["hyperthreading_trait"]);
    image_properties.extend(image_trait.map(|text| ("trait:HW_CPU_HYPERTHREADING".to_owned(), text)));
    Ok(Flavor {
        vcpus: number(request, "vcpus")?,
        memory_mib: number(request, "memory_mib")?,
        extra_specs,
        image_properties,
    })
}

fn specs(source: &Value, prefix: &str) -> BTreeMap<String, String> {
    let mut specs = BTreeMap::new();
    for (key, name) in SPECS {
        specs.extend(text(&source[key]).map(|text| (format!("{prefix}{name}"), text)));
    }
    for (key, name) in [("numa_cpus", "numa_cpus"), ("numa_mem_mib", "numa_mem")] {
        for (cell, value) in source[key].as_object().into_iter().flatten() {
            specs.extend(text(value).map(|text| (format!("{prefix}{name}.{cell}"), text)));
        }
    }
    specs
}

/// A value as a user would have typed it.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(items) => Some(items.iter().filter_map(text).collect::<Vec<_>>().join(",")),
        other => Some(other.to_string()),
    }
}

pub(crate) fn number<T: TryFrom<u64>>(object: &Value, key: &'static str) -> Read<T> {
    object[key].as_u64().and_then(|number| T::try_from(number).ok()).ok_or(BadInput(key))
}

fn number_or<T: TryFrom<u64>>(object: &Value, key: &'static str, default: T) -> Read<T> {
    if object[key].is_null() { Ok(default) } else { number(object, key) }
}

fn list<'v>(object: &'v Value, key: &'static str) -> Read<&'v [Value]> {
    match &object[key] {
        Value::Null => Ok(&[]),
        Value::Array(items) => Ok(items),
        _ => Err(BadInput(key)),
    }
}

fn cpu_set(items: &[Value], key: &'static str) -> Read<CpuSet> {
    let cpu = |item: &Value| item.as_u64().filter(|&cpu| cpu <= u64::from(MAX_CPU)).map(|cpu| cpu as u32);
    items.iter().map(|item| cpu(item).ok_or(BadInput(key))).collect()
}

pub(crate) fn cpus(object: &Value, key: &'static str) -> Read<CpuSet> {
    cpu_set(list(object, key)?, key)
}

fn named<T>(object: &Value, key: &'static str, from_name: fn(&str) -> Option<T>) -> Read<Option<T>> {
    match &object[key] {
        Value::Null => Ok(None),
        Value::String(name) => from_name(name).map(Some).ok_or(BadInput(key)),
        _ => Err(BadInput(key)),
    }
}

pub(crate) fn limits(case: &Value) -> Read<Option<Limits>> {
    let limits = &case["limits"];
    if limits.is_null() {
        return Ok(None);
    }
    let ratio = |key: &'static str| limits[key].as_f64().ok_or(BadInput(key));
    Ok(Some(Limits {
        cpu_ratio: ratio("cpu_allocation_ratio")?,
        memory_ratio: ratio("ram_allocation_ratio")?,
    }))
}

pub(crate) fn host(case: &Value) -> Read<Vec<Cell>> {
    list(&case["host"], "cells")?.iter().map(host_cell).collect()
}

pub(crate) fn host_cell(cell: &Value) -> Read<Cell> {
    let pool = |pool: &Value| {
        Ok(PagePool {
            size_kib: number(pool, "size_kib")?,
            total: number(pool, "total")?,
            used: number_or(pool, "used", 0)?,
            reserved: number_or(pool, "reserved", 0)?,
        })
    };
    let core = |core: &Value| cpu_set(core.as_array().ok_or(BadInput("siblings"))?, "siblings");
    Ok(Cell {
        id: number(cell, "id")?,
        memory_mib: number(cell, "memory_mib")?,
        memory_used_mib: number_or(cell, "memory_used_mib", 0)?,
        dedicated_cpus: cpus(cell, "dedicated_cpus")?,
        pinned_cpus: cpus(cell, "pinned_cpus")?,
        shared_cpus: cpus(cell, "shared_cpus")?,
        shared_cpus_used: number_or(cell, "shared_cpus_used", 0)?,
        cores: list(cell, "siblings")?.iter().map(core).collect::<Read<_>>()?,
        page_pools: list(cell, "page_pools")?.iter().map(pool).collect::<Read<_>>()?,
        ..Cell::default()
    })
}

pub(crate) fn guest(case: &Value) -> Read<Guest> {
    let guest = &case["guest"];
    Ok(Guest {
        cells: list(guest, "cells")?.iter().map(guest_cell).collect::<Read<_>>()?,
        emulator_policy: named(guest, "emulator_threads_policy", EmulatorPolicy::from_name)?,
        isolated_emulator_cpus: number_or(guest, "reserve_cpus", 1)?,
    })
}

pub(crate) fn guest_cell(cell: &Value) -> Read<GuestCell> {
    let page_size = match &cell["page_size"] {
        Value::Null => None,
        Value::String(name) => Some(match name.as_str() {
            "small" => PageSize::Small,
            "large" => PageSize::Large,
            "any" => PageSize::Any,
            _ => return Err(BadInput("page_size")),
        }),
        _ => Some(PageSize::Kib(number(cell, "page_size")?)),
    };
    Ok(GuestCell {
        shared: cpus(cell, "shared_vcpus")?,
        dedicated: cpus(cell, "dedicated_vcpus")?,
        memory_mib: number(cell, "memory_mib")?,
        page_size,
        cpu_policy: named(cell, "cpu_policy", CpuPolicy::from_name)?,
        thread_policy: named(cell, "cpu_thread_policy", ThreadPolicy::from_name)?,
    })
}

pub(crate) fn usage(case: &Value) -> Read<Vec<CellUsage>> {
    let one = |usage: &Value| {
        Ok(CellUsage {
            host_cell: number(usage, "host")?,
            shared_vcpus: list(usage, "shared_vcpus")?.len() as u32,
            memory_mib: number(usage, "memory_mib")?,
            page_size_kib: (!usage["page_size_kib"].is_null())
                .then(|| number(usage, "page_size_kib"))
                .transpose()?,
            pinned: cpus(usage, "pinned")?,
            emulator_cpus: cpus(usage, "emulator_cpus")?,
            cpu_policy: named(usage, "cpu_policy", CpuPolicy::from_name)?,
            thread_policy: named(usage, "cpu_thread_policy", ThreadPolicy::from_name)?,
        })
    };
    list(case, "usage")?.iter().map(one).collect()
}

pub(crate) fn cpu_json(cpus: &CpuSet) -> Value {
    cpus.iter().collect::<Vec<_>>().into()
}

pub(crate) fn page_size_json(size: Option<PageSize>) -> Value {
    match size {
        None => Value::Null,
        Some(PageSize::Small) => "small".into(),
        Some(PageSize::Large) => "large".into(),
        Some(PageSize::Any) => "any".into(),
        Some(PageSize::Kib(kib)) => kib.into(),
    }
}

pub(crate) fn guest_json(guest: &Guest) -> Value {
    let cell = |(id, cell): (usize, &GuestCell)| {
        json!({
            "id": id,
            "shared_vcpus": cpu_json(&cell.shared),
            "dedicated_vcpus": cpu_json(&cell.dedicated),
            "memory_mib": cell.memory_mib,
            "page_size": page_size_json(cell.page_size),
            "cpu_policy": cell.cpu_policy.map(CpuPolicy::name),
            "cpu_thread_policy": cell.thread_policy.map(ThreadPolicy::name),
        })
    };
    json!({
        "cells": guest.cells.iter().enumerate().map(cell).collect::<Vec<_>>(),
        "emulator_threads_policy": guest.emulator_policy.map(EmulatorPolicy::name),
    })
}

pub(crate) fn host_json(cells: &[Cell]) -> Value {
    let pool = |pool: &PagePool| json!({"size_kib": pool.size_kib, "total": pool.total, "used": pool.used, "reserved": pool.reserved});
    let cell = |cell: &Cell| {
        json!({
            "id": cell.id,
            "memory_mib": cell.memory_mib,
            "memory_used_mib": cell.memory_used_mib,
            "dedicated_cpus": cpu_json(&cell.dedicated_cpus),
            "shared_cpus": cpu_json(&cell.shared_cpus),
            "shared_cpus_used": cell.shared_cpus_used,
            "pinned_cpus": cpu_json(&cell.pinned_cpus),
            "siblings": cell.cores.iter().map(cpu_json).collect::<Vec<_>>(),
            "page_pools": cell.page_pools.iter().map(pool).collect::<Vec<_>>(),
        })
    };
    json!({ "cells": cells.iter().map(cell).collect::<Vec<_>>() })
}

pub(crate) fn placed_json(cells: &[PlacedCell]) -> Value {
    let cell = |cell: &PlacedCell| {
        let pins = cell.pinning.pins.iter().map(|(vcpu, cpu)| (vcpu.to_string(), Value::from(cpu)));
        json!({
            "guest": cell.guest,
            "host": cell.host,
            "page_size_kib": cell.page_size_kib,
            "pinning": pins.collect::<Map<_, _>>(),
            "emulator_cpus": cpu_json(&cell.pinning.emulator_cpus),
        })
    };
    cells.iter().map(cell).collect::<Vec<_>>().into()
}
