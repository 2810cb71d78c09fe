//! Hosts as hypervisors, with what they have and what is promised of it.

use super::page::Page;
use super::view::liveness;
use super::{Asked, not_built};
use crate::api::context::Params;
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::fleet::instance::Instance;
use crate::liveness::Liveness;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::host::{Cpu, Inventory};
use godwit_protocol::id::HostId;
use godwit_protocol::instance::InstanceState;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a host has, and what is promised of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    pub(super) vcpus: u64,
    pub(super) vcpus_used: u64,
    pub(super) memory_mib: u64,
    pub(super) memory_used_mib: u64,
    pub(super) disk_gib: u64,
    pub(super) disk_free_gib: u64,
    pub(super) instances: u64,
    pub(super) operations: u64,
}

impl Sizes {
    /// Of one host.
    pub(super) fn of(fleet: &Fleet, host: &Host) -> Self {
        let mut sizes = Self::default();
        if let Some(inventory) = &host.inventory {
            sizes.vcpus = inventory.cells.iter().map(|cell| cell.cpus.len() as u64).sum();
            sizes.memory_mib = inventory.cells.iter().map(|cell| cell.memory_bytes).sum::<u64>() / MIB;
            sizes.memory_used_mib = inventory.reserved_memory_bytes / MIB;
            sizes.disk_gib = inventory.pools.iter().map(|pool| pool.total_bytes).sum::<u64>() / GIB;
        }
        // Free space changes all the time: the newest report has it, not the durable inventory.
        let report = fleet.observed.get(&host.id).and_then(|o| o.report.as_ref());
        let pools = report.map(|r| &r.inventory).or(host.inventory.as_ref()).map_or(&[][..], |i| &i.pools);
        sizes.disk_free_gib = pools.iter().map(|pool| pool.free_bytes).sum::<u64>() / GIB;
        for instance in instances(fleet, host.id) {
            sizes.vcpus_used += u64::from(instance.flavor.vcpus);
            sizes.memory_used_mib += instance.flavor.memory_mib;
            sizes.instances += u64::from(instance.power == Some(InstanceState::Running));
            sizes.operations += u64::from(fleet.running_operation(instance.id).is_some());
        }
        sizes
    }

    /// The disk space in use; at most what there is.
    pub(super) fn disk_used_gib(&self) -> u64 {
        self.disk_gib.saturating_sub(self.disk_free_gib)
    }
}

/// Instances that are placed on a host.
pub(super) fn instances(fleet: &Fleet, host: HostId) -> impl Iterator<Item = &Instance> {
    fleet.instances.values().filter(move |i| i.host == Some(host))
}

/// A host's id in the request's version: a number at first, a UUID from 2.53 on.
pub(super) fn id(asked: &Asked, host: &Host) -> Value {
    if asked.since(53) { json!(host.id) } else { host.number.into() }
}

fn brief(app: &App, fleet: &Fleet, asked: &Asked, host: &Host) -> Value {
    json!({
        "id": id(asked, host),
        "hypervisor_hostname": host.name,
        "state": if liveness(app, fleet, host.id) == Liveness::Up { "up" } else { "down" },
        "status": if host.is_open() { "enabled" } else { "disabled" },
    })
}

/// Cells, and how many of each thing one thing has: as far as the host is even.
fn cpu_info(inventory: &Inventory) -> Value {
    let cpus: Vec<&Cpu> = inventory.cells.iter().flat_map(|cell| &cell.cpus).collect();
    let sockets = cpus.iter().map(|cpu| cpu.package).collect::<BTreeSet<_>>().len().max(1);
    let cores = cpus.iter().map(|cpu| (cpu.package, cpu.die, cpu.core)).collect::<BTreeSet<_>>().len();
    let threads = cpus.iter().map(|cpu| cpu.siblings.len()).max().unwrap_or(1).max(1);
    json!({
        "arch": inventory.architecture,
        "model": inventory.cpu_model,
        "vendor": "",
        "features": [],
        "topology": {
            "cells": inventory.cells.len(),
            "sockets": sockets,
            "cores": cores / sockets,
            "threads": threads,
        },
    })
}

/// `10.0.2` as the number that clients know: 10000002.
fn version_number(text: &str) -> u64 {
    let mut parts = text.split(['.', '-', '+']).map(|part| part.parse::<u64>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0).min(999);
    next() * 1_000_000 + next() * 1_000 + next()
}

fn view(app: &App, fleet: &Fleet, asked: &Asked, host: &Host) -> Value {
    let inventory = host.inventory.as_ref();
    let info = inventory.map_or_else(|| json!({}), cpu_info);
    let sizes = Sizes::of(fleet, host);
    let mut view = brief(app, fleet, asked, host);
    let mut set = |key: &str, value: Value| view[key] = value;
    set("cpu_info", if asked.since(28) { info } else { info.to_string().into() });
    set("current_workload", sizes.operations.into());
    set("disk_available_least", Value::Null);
    set("host_ip", json!(inventory.map(|i| i.underlay.address)));
    set("free_disk_gb", sizes.disk_free_gib.into());
    set("free_ram_mb", sizes.memory_mib.saturating_sub(sizes.memory_used_mib).into());
    set("hypervisor_type", inventory.map_or("QEMU", |i| i.hypervisor.kind.as_str()).into());
    set("hypervisor_version", inventory.map_or(0, |i| version_number(&i.hypervisor.version)).into());
    set("local_gb", sizes.disk_gib.into());
    set("local_gb_used", sizes.disk_used_gib().into());
    set("memory_mb", sizes.memory_mib.into());
    set("memory_mb_used", sizes.memory_used_mib.into());
    set("running_vms", sizes.instances.into());
    set("vcpus", sizes.vcpus.into());
    set("vcpus_used", sizes.vcpus_used.into());
    let id = id(asked, host);
    set("service", json!({ "host": host.name, "id": id, "disabled_reason": host.closed_reason() }));
    view
}

/// Puts the host's instances into its view. Below 2.75 an empty list is left out.
fn with_servers(mut view: Value, fleet: &Fleet, asked: &Asked, host: &Host) -> Value {
    let servers: Vec<Value> = instances(fleet, host.id)
        .map(|i| json!({ "uuid": i.id, "name": format!("instance-{}", i.id.short()) }))
        .collect();
    if !servers.is_empty() || asked.since(75) {
        view["servers"] = servers.into();
    }
    view
}

type View = fn(&App, &Fleet, &Asked, &Host) -> Value;

fn list_with(app: &App, asked: &Asked, params: &Params, path: &str, view: View) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let wanted = params.get("hypervisor_hostname_pattern").filter(|_| asked.since(53));
    let servers = asked.since(53) && params.flag("with_servers")?.unwrap_or(false);
    app.ledger.read(|fleet| {
        let mut hosts: Vec<&Host> =
            fleet.hosts.values().filter(|h| wanted.is_none_or(|pattern| h.name.contains(pattern))).collect();
        if let Some(pattern) = wanted.filter(|_| hosts.is_empty()) {
            return Err(Fault::not_found("Hypervisor matching", pattern));
        }
        hosts.sort_by_key(|h| h.number);
        let one = |host: &&Host| {
            let view = view(app, fleet, asked, host);
            if servers { with_servers(view, fleet, asked, host) } else { view }
        };
        if !asked.since(33) || wanted.is_some() {
            return Ok(Json(json!({ "hypervisors": hosts.iter().map(one).collect::<Vec<_>>() })));
        }
        let page = Page::cut(hosts, params, |h| id(asked, h).to_string().trim_matches('"').to_owned())?;
        let views = page.items.iter().map(one).collect();
        Ok(Json(page.body(asked, "hypervisors", path, views)))
    })
}

/// GET /os-hypervisors.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    list_with(&app, &asked, &params, "/os-hypervisors", brief)
}

/// GET /os-hypervisors/detail.
pub(super) async fn detail(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    list_with(&app, &asked, &params, "/os-hypervisors/detail", view)
}

/// The host of a path, by the kind of id that the request's version has.
fn find<'a>(fleet: &'a Fleet, asked: &Asked, wanted: &str) -> Answer<&'a Host> {
    let found = if asked.since(53) {
        wanted.parse().ok().and_then(|id: HostId| fleet.hosts.get(&id))
    } else {
        fleet.hosts.values().find(|host| wanted.parse() == Ok(host.number))
    };
    found.ok_or_else(|| Fault::not_found("Hypervisor", wanted))
}

/// GET /os-hypervisors/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let servers = asked.since(53) && params.flag("with_servers")?.unwrap_or(false);
    app.ledger.read(|fleet| {
        let host = find(fleet, &asked, &id)?;
        let view = view(&app, fleet, &asked, host);
        let view = if servers { with_servers(view, fleet, &asked, host) } else { view };
        Ok(Json(json!({ "hypervisor": view })))
    })
}

/// What old versions have beside the lists: hosts whose names contain a text.
fn by_pattern(app: &App, asked: &Asked, pattern: &str, servers: bool) -> Answer<Json<Value>> {
    asked.require(1, Some(53))?;
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| {
        let mut hosts: Vec<&Host> = fleet.hosts.values().filter(|h| h.name.contains(pattern)).collect();
        if hosts.is_empty() {
            return Err(Fault::not_found("Hypervisor matching", pattern));
        }
        hosts.sort_by_key(|h| h.number);
        let one = |host: &Host| {
            let view = brief(app, fleet, asked, host);
            if servers { with_servers(view, fleet, asked, host) } else { view }
        };
        Ok(Json(json!({ "hypervisors": hosts.into_iter().map(one).collect::<Vec<_>>() })))
    })
}

/// GET /os-hypervisors/{pattern}/search, below 2.53.
pub(super) async fn search(
    State(app): State<Shared>,
    asked: Asked,
    Path(pattern): Path<String>,
) -> Answer<Json<Value>> {
    by_pattern(&app, &asked, &pattern, false)
}

/// GET /os-hypervisors/{pattern}/servers, below 2.53.
pub(super) async fn servers(
    State(app): State<Shared>,
    asked: Asked,
    Path(pattern): Path<String>,
) -> Answer<Json<Value>> {
    by_pattern(&app, &asked, &pattern, true)
}

/// GET /os-hypervisors/{id}/uptime.
pub(super) async fn uptime(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| find(fleet, &asked, &id).map(drop))?;
    Err(not_built("A host's uptime", "The host's own /metrics have it."))
}

/// GET /os-hypervisors/statistics.
pub(super) async fn statistics(State(app): State<Shared>, asked: Asked) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let all: Vec<Sizes> = app.ledger.read(|fleet| {
        fleet.hosts.values().filter(|h| h.enabled).map(|host| Sizes::of(fleet, host)).collect()
    });
    let sum = |of: fn(&Sizes) -> u64| all.iter().map(of).sum::<u64>();
    Ok(Json(json!({ "hypervisor_statistics": {
        "count": all.len(),
        "current_workload": sum(|s| s.operations),
        "disk_available_least": null,
        "free_disk_gb": sum(|s| s.disk_free_gib),
        "free_ram_mb": sum(|s| s.memory_mib.saturating_sub(s.memory_used_mib)),
        "local_gb": sum(|s| s.disk_gib),
        "local_gb_used": sum(Sizes::disk_used_gib),
        "memory_mb": sum(|s| s.memory_mib),
        "memory_mb_used": sum(|s| s.memory_used_mib),
        "running_vms": sum(|s| s.instances),
        "vcpus": sum(|s| s.vcpus),
        "vcpus_used": sum(|s| s.vcpus_used),
    } })))
}

#[cfg(test)]
mod tests {
    use super::version_number;

    #[test]
    fn a_version_is_the_number_that_clients_know() {
        for (text, number) in
            [("10.0.2", 10_000_002), ("7.2", 7_002_000), ("10.0.2+deb", 10_000_002), ("", 0)]
        {
            assert_eq!(version_number(text), number, "{text}");
        }
    }
}
