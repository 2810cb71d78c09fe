//! The placement API, to look at: hosts as resource providers, what they have, and what instances hold of it.

use crate::api::context::{Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::api::microversion::{Microversion, PLACEMENT_MAX};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::fleet::instance::{Flavor, Instance};
use crate::fleet::migration::{Migration, MigrationKind};
use axum::Router;
use axum::extract::{Path, State};
use axum::response::Json;
use axum::routing::get;
use godwit_protocol::id::{HostId, InstanceId, MigrationId};
use godwit_protocol::reservation::Reservation;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Its routes.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/", get(versions))
        .route("/resource_providers", get(list))
        .route("/resource_providers/{id}", get(show))
        .route("/resource_providers/{id}/inventories", get(inventories))
        .route("/resource_providers/{id}/usages", get(usages))
        .route("/resource_providers/{id}/allocations", get(provider_allocations))
        .route("/resource_providers/{id}/aggregates", get(aggregates))
        .route("/resource_providers/{id}/traits", get(provider_traits))
        .route("/allocations/{instance}", get(allocations))
        .route("/resource_classes", get(classes))
        .route("/traits", get(traits))
}

async fn versions(links: Links) -> Json<Value> {
    Json(json!({ "versions": [{
        "id": "v1.0",
        "status": "CURRENT",
        "min_version": "1.0",
        "max_version": format!("1.{PLACEMENT_MAX}"),
        "links": [{ "rel": "self", "href": links.to("/placement/") }],
    }] }))
}

/// Resources that are counted, in the names of placement.
const CLASSES: [&str; 4] = ["VCPU", "PCPU", "MEMORY_MB", "DISK_GB"];

/// Amounts by class.
type Amounts = BTreeMap<&'static str, u64>;

/// A host as a provider. Its generation is that of its newest report.
fn provider(fleet: &Fleet, version: Microversion, host: &Host) -> Value {
    let path = format!("/placement/resource_providers/{}", host.id);
    let link = |rel: &str| {
        let end = if rel == "self" { String::new() } else { format!("/{rel}") };
        json!({ "rel": rel, "href": format!("{path}{end}") })
    };
    let mut relations = vec!["self", "inventories", "usages"];
    for (since, relation) in [(1, "aggregates"), (6, "traits"), (11, "allocations")] {
        if version.at_least(since) {
            relations.push(relation);
        }
    }
    let mut view = json!({
        "uuid": host.id,
        "name": host.name,
        "generation": generation(fleet, host),
        "links": relations.into_iter().map(link).collect::<Vec<_>>(),
    });
    if version.at_least(14) {
        view["root_provider_uuid"] = json!(host.id);
        view["parent_provider_uuid"] = Value::Null;
    }
    view
}

fn generation(fleet: &Fleet, host: &Host) -> u64 {
    let report = fleet.observed.get(&host.id).and_then(|o| o.report.as_ref());
    report.map_or(0, |report| report.generation)
}

/// What a host has, and what of it is kept back.
fn totals(host: &Host) -> (Amounts, Amounts) {
    let Some(inventory) = &host.inventory else { return Default::default() };
    let count = |cpus: fn(&godwit_protocol::host::Cell) -> &Vec<u32>| {
        inventory.cells.iter().flat_map(cpus).collect::<BTreeSet<_>>().len() as u64
    };
    let memory = inventory.cells.iter().map(|cell| cell.memory_bytes).sum::<u64>() / MIB;
    let disk = inventory.pools.iter().map(|pool| pool.total_bytes).sum::<u64>() / GIB;
    let all = [count(|c| &c.shared_cpus), count(|c| &c.dedicated_cpus), memory, disk];
    let kept = Amounts::from([("MEMORY_MB", inventory.reserved_memory_bytes / MIB)]);
    (CLASSES.into_iter().zip(all).filter(|(_, amount)| *amount > 0).collect(), kept)
}

/// What an instance holds: its reservation where there is one.
fn held(instance: &Instance) -> Amounts {
    amounts(&instance.flavor, instance.disk_bytes, instance.reservation.as_ref())
}

fn amounts(flavor: &Flavor, disk_bytes: u64, reservation: Option<&Reservation>) -> Amounts {
    let pinned = reservation.map_or(0, |r| r.pinned_cpus().count() as u64);
    let dedicated =
        reservation.map_or(0, |r| r.cells.iter().map(|cell| cell.pinning.len() as u64).sum::<u64>());
    let memory = reservation.map_or(flavor.memory_mib, |r| r.memory_bytes / MIB);
    let shared = u64::from(flavor.vcpus).saturating_sub(dedicated);
    let all = [shared, pinned, memory, disk_bytes.div_ceil(GIB)];
    CLASSES.into_iter().zip(all).filter(|(_, amount)| *amount > 0).collect()
}

/// What a resize holds beside its instance, and where: as in Nova, its migration is the consumer of that. The disk lies
/// on the pool once and is the instance's.
fn held_by_resize(migration: &Migration) -> Option<(HostId, Amounts)> {
    let resize = migration.resize.as_ref().filter(|_| migration.status.is_running())?;
    let (host, shape, reservation) = match migration.switched_at {
        Some(_) => (migration.source, &resize.old, Some(&resize.old_reservation)),
        None => (migration.target?, &resize.new, migration.reservation.as_ref()),
    };
    Some((host, amounts(&shape.flavor, 0, reservation)))
}

/// Consumers with something on a host: instances that are there, those on their way, and resizes.
fn holders(fleet: &Fleet, host: HostId) -> Vec<(String, Amounts)> {
    let arrives = |i: &Instance| {
        let migration = fleet.running_migration(i.id).filter(|m| m.kind == MigrationKind::Live);
        migration.is_some_and(|m| m.target == Some(host))
    };
    let instances = fleet.instances.values().filter(|i| i.host == Some(host) || arrives(i));
    let resizes = fleet.migrations.values().filter_map(|m| Some((m.id, held_by_resize(m)?)));
    let resizes = resizes.filter(|(_, (on, _))| *on == host);
    let resizes = resizes.map(|(id, (_, amounts))| (id.to_string(), amounts));
    instances.map(|i| (i.id.to_string(), held(i))).chain(resizes).collect()
}

fn find<'a>(fleet: &'a Fleet, id: &str) -> Answer<&'a Host> {
    let found = id.parse().ok().and_then(|id: HostId| fleet.hosts.get(&id));
    found.ok_or_else(|| Fault::not_found("Resource provider", id))
}

/// GET /resource_providers.
async fn list(
    State(app): State<Shared>,
    caller: Caller,
    version: Microversion,
    params: Params,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    if let Some((key, _)) = params.iter().find(|(key, _)| !matches!(*key, "name" | "uuid" | "in_tree")) {
        return Err(Fault::bad_request(format!(
            "Invalid query string parameters: '{key}' is not supported here."
        )));
    }
    let views: Vec<Value> = app.ledger.read(|fleet| {
        let passes = |host: &&Host| {
            let id = host.id.to_string();
            params.get("name").is_none_or(|name| host.name == name)
                && ["uuid", "in_tree"].iter().all(|key| params.get(key).is_none_or(|wanted| wanted == id))
        };
        let mut hosts: Vec<&Host> = fleet.hosts.values().filter(passes).collect();
        hosts.sort_by_key(|h| h.number);
        hosts.into_iter().map(|host| provider(fleet, version, host)).collect()
    });
    Ok(Json(json!({ "resource_providers": views })))
}

/// GET /resource_providers/{id}.
async fn show(
    State(app): State<Shared>,
    caller: Caller,
    version: Microversion,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| Ok(Json(provider(fleet, version, find(fleet, &id)?))))
}

fn inventory_view(app: &App, host: &Host) -> Map<String, Value> {
    let (totals, kept) = totals(host);
    let view = |class: &str, total: u64| {
        let ratio = match class {
            "VCPU" => app.config.overcommit.cpu,
            "MEMORY_MB" => app.config.overcommit.memory,
            _ => 1.0,
        };
        json!({
            "total": total,
            "reserved": kept.get(class).copied().unwrap_or(0),
            "min_unit": 1,
            "max_unit": total,
            "step_size": 1,
            "allocation_ratio": ratio,
        })
    };
    totals.into_iter().map(|(class, total)| (class.to_owned(), view(class, total))).collect()
}

/// GET /resource_providers/{id}/inventories.
async fn inventories(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = find(fleet, &id)?;
        let inventories = inventory_view(&app, host);
        Ok(Json(json!({
            "resource_provider_generation": generation(fleet, host),
            "inventories": inventories,
        })))
    })
}

/// GET /resource_providers/{id}/usages.
async fn usages(State(app): State<Shared>, caller: Caller, Path(id): Path<String>) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = find(fleet, &id)?;
        let mut sums: Amounts = totals(host).0.into_keys().map(|class| (class, 0)).collect();
        for (class, amount) in holders(fleet, host.id).into_iter().flat_map(|(_, held)| held) {
            *sums.entry(class).or_default() += amount;
        }
        Ok(Json(json!({ "resource_provider_generation": generation(fleet, host), "usages": sums })))
    })
}

/// GET /resource_providers/{id}/allocations.
async fn provider_allocations(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = find(fleet, &id)?;
        let allocations: Map<String, Value> = holders(fleet, host.id)
            .into_iter()
            .map(|(consumer, held)| (consumer, json!({ "resources": held })))
            .collect();
        Ok(Json(json!({
            "resource_provider_generation": generation(fleet, host),
            "allocations": allocations,
        })))
    })
}

/// GET /allocations/{consumer}, an instance or a resize: empty for one that holds nothing, and for one that is not.
async fn allocations(
    State(app): State<Shared>,
    caller: Caller,
    version: Microversion,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let instance = id.parse().ok().and_then(|id: InstanceId| fleet.instances.get(&id));
        let mut allocations = Map::new();
        if let Some(instance) = instance {
            let live = fleet.running_migration(instance.id).filter(|m| m.kind == MigrationKind::Live);
            let target = live.and_then(|m| m.target);
            for host in instance.host.into_iter().chain(target).filter_map(|id| fleet.hosts.get(&id)) {
                let held = json!({ "generation": generation(fleet, host), "resources": held(instance) });
                allocations.insert(host.id.to_string(), held);
            }
        }
        let resize = id.parse().ok().and_then(|id: MigrationId| fleet.migrations.get(&id));
        if let Some((host, held)) = resize.and_then(held_by_resize)
            && let Some(host) = fleet.hosts.get(&host)
        {
            let held = json!({ "generation": generation(fleet, host), "resources": held });
            allocations.insert(host.id.to_string(), held);
        }
        let mut view = json!({ "allocations": allocations });
        if let Some(instance) = instance.filter(|i| version.at_least(12) && i.host.is_some()) {
            view["project_id"] = json!(instance.project);
            view["user_id"] = json!(instance.user);
            if version.at_least(28) {
                view["consumer_generation"] = 1.into();
            }
        }
        Ok(Json(view))
    })
}

/// GET /resource_providers/{id}/aggregates.
async fn aggregates(
    State(app): State<Shared>,
    caller: Caller,
    version: Microversion,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = find(fleet, &id)?;
        let its = fleet.aggregates.values().filter(|aggregate| aggregate.hosts.contains(&host.id));
        let mut view = json!({ "aggregates": its.map(|aggregate| aggregate.uuid).collect::<Vec<_>>() });
        if version.at_least(19) {
            view["resource_provider_generation"] = generation(fleet, host).into();
        }
        Ok(Json(view))
    })
}

/// The trait of hosts whose cores have several threads.
const HYPERTHREADING: &str = "HW_CPU_HYPERTHREADING";

fn traits_of(host: &Host) -> Vec<&'static str> {
    let cpus = host.inventory.iter().flat_map(|inventory| &inventory.cells).flat_map(|cell| &cell.cpus);
    if cpus.map(|cpu| cpu.siblings.len()).max() > Some(1) { vec![HYPERTHREADING] } else { vec![] }
}

/// GET /resource_providers/{id}/traits.
async fn provider_traits(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = find(fleet, &id)?;
        let (generation, traits) = (generation(fleet, host), traits_of(host));
        Ok(Json(json!({ "resource_provider_generation": generation, "traits": traits })))
    })
}

/// GET /resource_classes.
async fn classes(caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let view = |name: &str| {
        let path = format!("/placement/resource_classes/{name}");
        json!({ "name": name, "links": [{ "rel": "self", "href": path }] })
    };
    let classes = CLASSES.map(view);
    Ok(Json(json!({ "resource_classes": classes })))
}

/// GET /traits.
async fn traits(State(app): State<Shared>, caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let traits: BTreeSet<&str> = app.ledger.read(|fleet| fleet.hosts.values().flat_map(traits_of).collect());
    Ok(Json(json!({ "traits": traits })))
}

#[cfg(test)]
mod tests;
