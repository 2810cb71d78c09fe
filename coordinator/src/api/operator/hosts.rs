//! Hosts: what they are, whether they are there, and whether new instances go to them.

use crate::api::attributes::time_text;
use crate::api::context::{Body, Caller};
use crate::api::fault::Answer;
use crate::app::{App, Shared};
use crate::config::Config;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::ledger::now;
use crate::liveness::Liveness;
use crate::{drain, reconcile, verbs};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use godwit_protocol::host::Inventory;
use godwit_protocol::reservation::Reservation;
use serde::Deserialize;
use serde_json::{Value, json};

/// The host that an id or a name means.
fn find<'a>(fleet: &'a Fleet, key: &str) -> Result<&'a Host, Error> {
    let by_id = key.parse().ok().and_then(|id| fleet.hosts.get(&id));
    by_id.or_else(|| fleet.host_by_name(key)).ok_or_else(|| Error::not_found("Host", key))
}

/// What instances hold on a host.
fn held<'a>(fleet: &'a Fleet, host: &'a Host) -> impl Iterator<Item = &'a Reservation> {
    let here = fleet.instances.values().filter(move |instance| instance.host == Some(host.id));
    here.filter_map(|instance| instance.reservation.as_ref())
}

/// A host in short, as lists and the status show it.
pub(super) fn summary(fleet: &Fleet, config: &Config, host: &Host) -> Value {
    let state = reconcile::liveness(fleet, host.id, config.heartbeat_ms, now());
    let observed = fleet.observed.get(&host.id);
    let inventory = host.inventory.as_ref();
    let sum = |figure: fn(&Inventory) -> u64| inventory.map(figure);
    json!({
        "id": host.id,
        "name": host.name,
        "state": state.as_str(),
        "connected": observed.is_some_and(|o| o.connected),
        "enabled": host.enabled,
        "disabled_reason": host.disabled_reason,
        "draining": host.drain.is_some(),
        "address": inventory.map(|i| i.underlay.address),
        "instances": fleet.instances.values().filter(|i| i.host == Some(host.id)).count(),
        "vcpus": sum(|i| i.cells.iter().map(|cell| cell.cpus.len() as u64).sum()),
        "vcpus_used": held(fleet, host).map(|r| u64::from(r.vcpus)).sum::<u64>(),
        "memory_bytes": sum(|i| i.cells.iter().map(|cell| cell.memory_bytes).sum()),
        "memory_used_bytes": held(fleet, host).map(|r| r.memory_bytes).sum::<u64>(),
        "cells": inventory.map(|i| i.cells.len()),
        "hypervisor": inventory.map(|i| {
            let how = if i.hypervisor.kvm { "KVM" } else { "emulated" };
            format!("{} {} ({how})", i.hypervisor.kind, i.hypervisor.version)
        }),
        "agent_version": inventory.map(|i| &i.agent_version),
        "joined_at": time_text(host.joined_at),
        "seen_at": observed.map(|o| time_text(o.seen_at)),
    })
}

/// A host with all that it reports.
fn whole(fleet: &Fleet, config: &Config, host: &Host) -> Value {
    let mut body = summary(fleet, config, host);
    let report = fleet.observed.get(&host.id).and_then(|o| o.report.as_ref());
    if let Some(inventory) = &host.inventory {
        body["cells"] = json!(inventory.cells);
        body["inventory"] = json!({
            "kernel": inventory.kernel,
            "architecture": inventory.architecture,
            "cpu_model": inventory.cpu_model,
            "libvirt_version": inventory.hypervisor.libvirt_version,
            "reserved_memory_bytes": inventory.reserved_memory_bytes,
            "links": inventory.links,
            "underlay": inventory.underlay,
            "physical_networks": inventory.physical_networks,
            "migration_address": inventory.migration_address,
            "pools": inventory.pools,
        });
    }
    body["generation"] = json!(report.map(|r| r.generation));
    body["reservations"] = json!(held(fleet, host).collect::<Vec<_>>());
    body["reported_instances"] = json!(report.map(|r| &r.instances));
    body
}

/// GET /hosts.
pub(super) async fn list(State(app): State<Shared>, caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let hosts = app.ledger.read(|fleet| {
        let mut hosts: Vec<&Host> = fleet.hosts.values().collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        hosts.into_iter().map(|host| summary(fleet, &app.config, host)).collect::<Vec<_>>()
    });
    Ok(Json(json!({ "hosts": hosts })))
}

/// GET /hosts/{host}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    answer(&app, &key).await
}

/// The host, with what is left on it when it is drained.
async fn answer(app: &App, key: &str) -> Answer<Json<Value>> {
    let (host, mut body) = app
        .ledger
        .read(|fleet| find(fleet, key).map(|host| (host.clone(), whole(fleet, &app.config, host))))?;
    body["drain"] = match host.drain {
        Some(drain) => {
            let left = drain::left(app, host.id, &drain).await;
            json!({ "since": time_text(drain.since), "at_once": drain.at_once, "left": left })
        }
        None => Value::Null,
    };
    Ok(Json(json!({ "host": body })))
}

/// What may be changed of a host.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Update {
    enabled: bool,
    #[serde(default)]
    reason: Option<String>,
}

/// PUT /hosts/{host}.
pub(super) async fn update(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
    Body(update): Body<Update>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger
        .change(|fleet| verbs::host::set_enabled(fleet, find(fleet, &key)?.id, update.enabled, update.reason))
        .await?;
    answer(&app, &key).await
}

/// How a host is emptied.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DrainRequest {
    #[serde(default = "one")]
    at_once: u32,
}

fn one() -> u32 {
    1
}

/// PUT /hosts/{host}/drain.
pub(super) async fn drain(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
    Body(request): Body<DrainRequest>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let begin =
        |fleet: &Fleet| verbs::host::drain(fleet, find(fleet, &key)?.id, request.at_once, caller.user, now());
    app.ledger.change(begin).await?;
    answer(&app, &key).await
}

/// DELETE /hosts/{host}/drain.
pub(super) async fn undrain(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.change(|fleet| verbs::host::undrain(fleet, find(fleet, &key)?.id)).await?;
    answer(&app, &key).await
}

/// DELETE /hosts/{host}: its certificate is worth nothing from now on.
pub(super) async fn remove(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<StatusCode> {
    caller.require_admin()?;
    let host = app
        .ledger
        .change(|fleet| {
            let id = find(fleet, &key)?.id;
            let lost = reconcile::liveness(fleet, id, app.config.heartbeat_ms, now()) == Liveness::Lost;
            verbs::host::remove(fleet, id, lost).map(|(changes, ())| (changes, id))
        })
        .await?;
    app.ledger.observe(|fleet| fleet.observed.remove(&host));
    app.agents.disconnect(host);
    app.events.forget(host);
    tracing::info!(%host, "a host is removed");
    Ok(StatusCode::NO_CONTENT)
}
