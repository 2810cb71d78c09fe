//! Agents: one a host, for the network as for everything else.

use super::list::{Collection, answer};
use crate::api::attributes::time_text;
use crate::api::context::{Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::ledger::now;
use crate::liveness::{Liveness, judge};
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::HostId;
use serde_json::{Value, json};
use std::time::Duration;

const COLLECTION: Collection = Collection {
    name: "agents",
    attributes: &["id", "agent_type", "binary", "host", "alive", "admin_state_up", "topic"],
};

fn view(app: &App, fleet: &Fleet, host: &Host) -> Value {
    let seen_at = fleet.observed.get(&host.id).map(|o| o.seen_at);
    let alive = judge(now(), seen_at, Duration::from_millis(app.config.heartbeat_ms)) == Liveness::Up;
    json!({
        "id": host.id,
        "agent_type": "Godwit agent",
        "binary": "godwit-agent",
        "host": host.name,
        "alive": alive,
        "admin_state_up": host.enabled,
        "topic": "N/A",
        "availability_zone": null,
        "description": null,
        "configurations": {},
        "resources_synced": null,
        "created_at": time_text(host.joined_at),
        "started_at": time_text(host.joined_at),
        "heartbeat_timestamp": seen_at.map(time_text),
    })
}

/// GET /agents.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let views = app.ledger.read(|fleet| {
        let mut hosts: Vec<&Host> = fleet.hosts.values().collect();
        hosts.sort_by_key(|h| h.number);
        hosts.into_iter().map(|host| view(&app, fleet, host)).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /agents/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let view = app.ledger.read(|fleet| {
        let host = id.parse().ok().and_then(|id: HostId| fleet.hosts.get(&id));
        host.map(|host| view(&app, fleet, host)).ok_or_else(|| Fault::not_found("Agent", &id))
    })?;
    Ok(Json(json!({ "agent": view })))
}
