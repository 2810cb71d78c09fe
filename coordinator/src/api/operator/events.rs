//! What hosts told of rare things: conflicts, spoofs, stale packets, strange networks, pools that stand still;
//! and damaged images, which the coordinator itself has found.

use crate::api::attributes::time_text;
use crate::api::context::{Caller, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::events::COORDINATOR;
use crate::fleet::{Fleet, Time};
use axum::Json;
use axum::extract::State;
use godwit_protocol::event::{EventKind, HostEvent};
use godwit_protocol::id::HostId;
use serde_json::{Value, json};
use std::time::Duration;

/// Events in one answer unless the caller says otherwise.
const LIMIT: usize = 1000;

/// GET /events, the newest first; `host`, `kind` and `vni` filter, `limit` bounds.
pub(super) async fn list(State(app): State<Shared>, caller: Caller, params: Params) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let kind = params.get("kind").map(kind).transpose()?;
    let vni: Option<u32> = params.number("vni")?;
    let limit = params.number("limit")?.unwrap_or(LIMIT);
    let answer = app.ledger.read(|fleet| {
        let host = params.get("host").map(|key| find_host(fleet, key)).transpose()?;
        let wanted = |of: HostId, event: &HostEvent| {
            host.is_none_or(|host| host == of)
                && kind.is_none_or(|kind| kind == event.kind)
                && vni.is_none_or(|vni| vni == event.vni)
        };
        let found = app.events.list(limit, wanted);
        Ok::<_, Fault>(found.iter().map(|(host, event)| body(fleet, *host, event)).collect::<Vec<_>>())
    })?;
    Ok(Json(json!({ "events": answer, "dropped": app.events.dropped() })))
}

fn kind(text: &str) -> Answer<EventKind> {
    EventKind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
        let names = EventKind::ALL.map(EventKind::as_str).join(", ");
        Fault::bad_request(format!("kind must be one of {names}, not {text:?}."))
    })
}

fn find_host(fleet: &Fleet, key: &str) -> Answer<HostId> {
    let id = key.parse().ok();
    let found = fleet.hosts.values().find(|host| Some(host.id) == id || host.name == key);
    found.map(|host| host.id).ok_or_else(|| Fault::not_found("Host", key))
}

fn body(fleet: &Fleet, host: HostId, event: &HostEvent) -> Value {
    let at = Time::UNIX_EPOCH + Duration::from_millis(event.at_ms);
    let name = match fleet.hosts.get(&host) {
        Some(host) => host.name.clone(),
        None if host == COORDINATOR => "coordinator".to_owned(),
        None => host.to_string(),
    };
    let network = fleet.networks.values().find(|network| network.vni == event.vni);
    let port = event
        .tap
        .as_ref()
        .and_then(|tap| fleet.ports.keys().find(|port| godwit_protocol::port::tap_name(**port) == *tap));
    json!({
        "at": time_text(at),
        "host": name,
        "kind": event.kind,
        "vni": (event.vni != 0).then_some(event.vni),
        "network": network.map(|network| network.id),
        "port": port,
        "tap": event.tap,
        "mac": event.mac,
        "owner": event.owner,
        "address": event.address,
        "peer": event.peer,
        "reason": event.reason,
        "pool": event.pool,
    })
}
