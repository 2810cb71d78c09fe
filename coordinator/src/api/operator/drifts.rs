//! What does not run where it was reserved.

use crate::api::context::Caller;
use crate::api::fault::Answer;
use crate::app::Shared;
use crate::drift;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

/// GET /drifts.
pub(super) async fn list(State(app): State<Shared>, caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let drifts: Vec<Value> = app.ledger.read(|fleet| {
        let view = |(host, drift): (_, godwit_protocol::reservation::Drift)| {
            json!({
                "host": fleet.hosts.get(&host).map(|host| &host.name),
                "host_id": host,
                "server": drift.instance,
                "server_name": fleet.instances.get(&drift.instance).map(|instance| &instance.name),
                "kind": drift.aspect.name(),
                "aspect": drift.aspect,
                "wanted": drift.wanted,
                "found": drift.found,
            })
        };
        drift::list(fleet).into_iter().map(view).collect()
    });
    Ok(Json(json!({ "drifts": drifts })))
}
