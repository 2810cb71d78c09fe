//! Groups of hosts, with metadata and perhaps a zone of their own.

use super::{Asked, fraction_text};
use crate::api::attributes::Attributes;
use crate::api::context::Body;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use crate::fleet::group::Aggregate;
use crate::ledger::now;
use crate::verbs::{self, Decision};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use godwit_protocol::id::HostId;
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn view(fleet: &Fleet, asked: &Asked, aggregate: &Aggregate) -> Value {
    let hosts = aggregate.hosts.iter().filter_map(|host| fleet.hosts.get(host));
    let mut hosts: Vec<&str> = hosts.map(|host| host.name.as_str()).collect();
    hosts.sort_unstable();
    let mut view = json!({
        "id": aggregate.number,
        "name": aggregate.name,
        "availability_zone": aggregate.zone(),
        "hosts": hosts,
        "metadata": aggregate.metadata,
        "created_at": fraction_text(aggregate.created_at),
        "updated_at": aggregate.updated_at.map(fraction_text),
        "deleted": false,
        "deleted_at": null,
    });
    if asked.since(41) {
        view["uuid"] = json!(aggregate.uuid);
    }
    view
}

fn number(id: &str) -> Answer<u64> {
    id.parse().map_err(|_| Fault::not_found("Aggregate", id))
}

/// The host of that name. It is part of a request, but clients expect 404.
fn host(fleet: &Fleet, name: &str) -> Answer<HostId> {
    let found = fleet.host_by_name(name).map(|host| host.id);
    found.ok_or_else(|| Fault::not_found("Compute host", name))
}

async fn change(
    app: &Shared,
    asked: &Asked,
    decide: impl FnOnce(&Fleet) -> Answer<Decision<Aggregate>>,
) -> Answer<Json<Value>> {
    let aggregate = app.ledger.change(|fleet| decide(fleet)?.map_err(Fault::from)).await?;
    let mut view = app.ledger.read(|fleet| view(fleet, asked, &aggregate));
    if aggregate.updated_at.is_none()
        && let Some(view) = view.as_object_mut()
    {
        // A new one has neither hosts nor metadata in its answer.
        view.retain(|key, _| !matches!(key.as_str(), "hosts" | "metadata"));
    }
    Ok(Json(json!({ "aggregate": view })))
}

/// GET /os-aggregates.
pub(super) async fn list(State(app): State<Shared>, asked: Asked) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let views: Vec<Value> =
        app.ledger.read(|fleet| fleet.aggregates.values().map(|a| view(fleet, &asked, a)).collect());
    Ok(Json(json!({ "aggregates": views })))
}

/// GET /os-aggregates/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| {
        let found = number(&id).ok().and_then(|number| fleet.aggregates.get(&number));
        let aggregate = found.ok_or_else(|| Fault::not_found("Aggregate", &id))?;
        Ok(Json(json!({ "aggregate": view(fleet, &asked, aggregate) })))
    })
}

/// POST /os-aggregates.
pub(super) async fn create(
    State(app): State<Shared>,
    asked: Asked,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let mut a = Attributes::inside(body, "aggregate")?;
    let (name, zone) = (a.required_text("name")?, a.text("availability_zone")?);
    a.finish()?;
    change(&app, &asked, |fleet| Ok(verbs::aggregate::create(fleet, name, zone, now()))).await
}

/// PUT /os-aggregates/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let number = number(&id)?;
    let mut a = Attributes::inside(body, "aggregate")?;
    let (name, zone) = (a.text("name")?, a.text("availability_zone")?);
    a.finish()?;
    if name.is_none() && zone.is_none() {
        return Err(Fault::bad_request("name or availability_zone is needed."));
    }
    change(&app, &asked, |fleet| Ok(verbs::aggregate::update(fleet, number, name, zone, now()))).await
}

/// DELETE /os-aggregates/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    asked.caller.require_admin()?;
    let number = number(&id)?;
    app.ledger.change(|fleet| verbs::aggregate::delete(fleet, number)).await?;
    Ok(StatusCode::OK)
}

/// POST /os-aggregates/{id}/action.
pub(super) async fn act(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let number = number(&id)?;
    let actions = Attributes::of(body, "the request's body")?.into_map();
    let mut actions = actions.into_iter();
    let (Some((action, body)), None) = (actions.next(), actions.next()) else {
        return Err(Fault::bad_request("The body must hold one action."));
    };
    let mut a = Attributes::of(body, &action)?;
    match action.as_str() {
        "add_host" | "remove_host" => {
            let name = a.required_text("host")?;
            a.finish()?;
            let verb =
                if action == "add_host" { verbs::aggregate::add_host } else { verbs::aggregate::remove_host };
            change(&app, &asked, |fleet| Ok(verb(fleet, number, host(fleet, &name)?, now()))).await
        }
        "set_metadata" => {
            let metadata =
                a.take("metadata").ok_or_else(|| Fault::bad_request("'metadata' is a required property."))?;
            a.finish()?;
            let metadata = metadata_of(metadata)?;
            change(&app, &asked, |fleet| Ok(verbs::aggregate::set_metadata(fleet, number, metadata, now())))
                .await
        }
        other => Err(Fault::bad_request(format!("There is no such action: {other}"))),
    }
}

/// Keys with their texts; null takes a key away.
fn metadata_of(value: Value) -> Answer<BTreeMap<String, Option<String>>> {
    let read = |(key, value): (String, Value)| match value {
        Value::Null => Ok((key, None)),
        Value::String(text) => Ok((key, Some(text))),
        other => Err(Fault::bad_request(format!("metadata {key} must be a text or null, not {other}."))),
    };
    Attributes::of(value, "metadata")?.into_map().into_iter().map(read).collect()
}
