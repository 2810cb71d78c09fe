//! Hosts as services, zones and (for the oldest clients) hosts. A host is in the zone `nova` unless an aggregate puts
//! it into another.

use super::hypervisors::{Sizes, id, instances};
use super::view::liveness;
use super::{Asked, fraction_text, not_built};
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::liveness::Liveness;
use crate::verbs;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::ProjectId;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// The service that a host's agent is to clients.
const BINARY: &str = "nova-compute";

fn is_up(app: &App, fleet: &Fleet, host: &Host) -> bool {
    liveness(app, fleet, host.id) == Liveness::Up
}

fn seen(fleet: &Fleet, host: &Host) -> Value {
    json!(fleet.observed.get(&host.id).map(|o| fraction_text(o.seen_at)))
}

fn view(app: &App, fleet: &Fleet, asked: &Asked, host: &Host) -> Value {
    let mut view = json!({
        "id": id(asked, host),
        "binary": BINARY,
        "host": host.name,
        "zone": fleet.zone_of(host.id),
        "status": if host.is_open() { "enabled" } else { "disabled" },
        "state": if is_up(app, fleet, host) { "up" } else { "down" },
        "updated_at": seen(fleet, host),
        "disabled_reason": host.closed_reason(),
    });
    if asked.since(11) {
        view["forced_down"] = false.into();
    }
    view
}

fn sorted(fleet: &Fleet) -> Vec<&Host> {
    let mut hosts: Vec<&Host> = fleet.hosts.values().collect();
    hosts.sort_by_key(|h| h.number);
    hosts
}

/// GET /os-services.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let wanted = params.get("binary").is_none_or(|binary| binary == BINARY);
    let views: Vec<Value> = app.ledger.read(|fleet| {
        let hosts = sorted(fleet)
            .into_iter()
            .filter(|h| wanted && params.get("host").is_none_or(|name| h.name == name));
        hosts.map(|host| view(&app, fleet, &asked, host)).collect()
    });
    Ok(Json(json!({ "services": views })))
}

/// PUT /os-services/{id} from 2.53 on; below, the path says what is done and the body to which host.
pub(super) async fn update(
    State(app): State<Shared>,
    asked: Asked,
    Path(path): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    if !asked.since(53) {
        return update_by_name(&app, &path, body).await;
    }
    let mut a = Attributes::of(body, "the request's body")?;
    let status = a.text("status")?;
    let reason = a.text("disabled_reason")?;
    refuse_forced_down(&mut a)?;
    a.finish()?;
    let enabled = match status.as_deref() {
        Some("enabled") => true,
        Some("disabled") => false,
        Some(other) => {
            return Err(Fault::bad_request(format!("status must be enabled or disabled, not {other}.")));
        }
        None => {
            return Err(Fault::bad_request(
                "status is needed, enabled or disabled; nothing else can be changed.",
            ));
        }
    };
    if enabled && reason.is_some() {
        return Err(Fault::bad_request("Specifying disabled_reason when status is enabled is not allowed."));
    }
    let host = app
        .ledger
        .change(|fleet| {
            let host = path.parse().ok().and_then(|id| fleet.hosts.get(&id));
            let host = host.ok_or_else(|| Fault::not_found("Service", &path))?;
            verbs::host::set_enabled(fleet, host.id, enabled, reason).map_err(Fault::from)
        })
        .await?;
    let view = app.ledger.read(|fleet| view(&app, fleet, &asked, &host));
    Ok(Json(json!({ "service": view })))
}

fn refuse_forced_down(a: &mut Attributes) -> Answer<()> {
    if a.flag("forced_down")?.unwrap_or(false) {
        return Err(not_built(
            "forced_down",
            "A host that is silent counts as lost by itself; remove it with the operator API when it will not return.",
        ));
    }
    Ok(())
}

async fn update_by_name(app: &Shared, path: &str, body: Value) -> Answer<Json<Value>> {
    let mut a = Attributes::of(body, "the request's body")?;
    let (name, binary) = (a.required_text("host")?, a.required_text("binary")?);
    let reason = match path {
        "disable-log-reason" => Some(a.required_text("disabled_reason")?),
        "enable" | "disable" => None,
        "force-down" => {
            refuse_forced_down(&mut a)?;
            return Err(Fault::bad_request("The service is not forced down; nothing is."));
        }
        _ => return Err(Fault::not_found("Action", path)),
    };
    a.finish()?;
    let told = reason.clone();
    let host = app
        .ledger
        .change(|fleet| {
            let host = fleet.host_by_name(&name).filter(|_| binary == BINARY);
            let host = host.ok_or_else(|| Fault::not_found("Service", format!("{binary} on host {name}")))?;
            verbs::host::set_enabled(fleet, host.id, path == "enable", reason).map_err(Fault::from)
        })
        .await?;
    let status = if host.enabled { "enabled" } else { "disabled" };
    let mut view = json!({ "host": name, "binary": binary, "status": status });
    if let Some(reason) = told {
        view["disabled_reason"] = reason.into();
    }
    Ok(Json(json!({ "service": view })))
}

/// DELETE /os-services/{id}.
pub(super) async fn delete(asked: Asked) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    Err(not_built(
        "Deleting a service",
        "Remove the host: `godwit host remove`, or DELETE /operator/v1/hosts/{id}.",
    ))
}

/// GET /os-availability-zone.
pub(super) async fn zones(State(app): State<Shared>, _: Asked) -> Json<Value> {
    app.ledger.read(|fleet| zone_infos(&app, fleet, |_| Value::Null))
}

/// Each zone, and whether an instance could be placed there.
fn zone_infos(app: &App, fleet: &Fleet, hosts: impl Fn(&[&Host]) -> Value) -> Json<Value> {
    let info = |zone: &str| {
        let its: Vec<&Host> = sorted(fleet).into_iter().filter(|h| fleet.zone_of(h.id) == zone).collect();
        let available = its.iter().any(|h| h.is_open() && is_up(app, fleet, h));
        json!({ "zoneName": zone, "zoneState": { "available": available }, "hosts": hosts(&its) })
    };
    let zones: Vec<Value> = fleet.zones().into_iter().map(info).collect();
    Json(json!({ "availabilityZoneInfo": zones }))
}

/// GET /os-availability-zone/detail.
pub(super) async fn zones_detail(State(app): State<Shared>, asked: Asked) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    Ok(app.ledger.read(|fleet| {
        let service = |host: &Host| {
            let (active, available) = (host.is_open(), is_up(&app, fleet, host));
            json!({ BINARY: { "active": active, "available": available, "updated_at": seen(fleet, host) } })
        };
        let services = |hosts: &[&Host]| {
            let services = hosts.iter().map(|h| (h.name.clone(), service(h)));
            Value::Object(services.collect::<Map<String, Value>>())
        };
        zone_infos(&app, fleet, services)
    }))
}

/// GET /os-hosts, below 2.43.
pub(super) async fn hosts(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    asked.require(1, Some(43))?;
    asked.caller.require_admin()?;
    let wanted = params.get("service").is_none_or(|s| s == "compute");
    let views: Vec<Value> = app.ledger.read(|fleet| {
        let hosts = sorted(fleet).into_iter().map(|h| (h, fleet.zone_of(h.id)));
        let hosts = hosts.filter(|(_, zone)| wanted && params.get("zone").is_none_or(|z| z == *zone));
        hosts.map(|(h, zone)| json!({ "host_name": h.name, "service": "compute", "zone": zone })).collect()
    });
    Ok(Json(json!({ "hosts": views })))
}

/// GET /os-hosts/{name}, below 2.43.
pub(super) async fn host(
    State(app): State<Shared>,
    asked: Asked,
    Path(name): Path<String>,
) -> Answer<Json<Value>> {
    asked.require(1, Some(43))?;
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| {
        let host = fleet.host_by_name(&name).ok_or_else(|| Fault::not_found("Host", &name))?;
        let sizes = Sizes::of(fleet, host);
        let resource = |project: &str, cpu: u64, memory_mb: u64, disk_gb: u64| {
            json!({ "resource": {
                "host": name, "project": project, "cpu": cpu, "memory_mb": memory_mb, "disk_gb": disk_gb,
            } })
        };
        let promised = |of: Option<ProjectId>| {
            let own = instances(fleet, host.id).filter(|i| of.is_none_or(|project| i.project == project));
            own.fold((0, 0, 0), |(cpu, memory, disk), i| {
                (cpu + u64::from(i.flavor.vcpus), memory + i.flavor.memory_mib, disk + i.flavor.disk_gib)
            })
        };
        let (cpu, memory, disk) = promised(None);
        let mut views = vec![
            resource("(total)", sizes.vcpus, sizes.memory_mib, sizes.disk_gib),
            resource("(used_now)", sizes.vcpus_used, sizes.memory_used_mib, sizes.disk_used_gib()),
            resource("(used_max)", cpu, memory, disk),
        ];
        let projects: BTreeSet<ProjectId> = instances(fleet, host.id).map(|i| i.project).collect();
        views.extend(projects.into_iter().map(|project| {
            let (cpu, memory, disk) = promised(Some(project));
            resource(&project.to_string(), cpu, memory, disk)
        }));
        Ok(Json(json!({ "host": views })))
    })
}
