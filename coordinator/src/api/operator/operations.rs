//! Operations in the journal, and migrations with what was measured.

use super::only;
use crate::api::attributes::time_text;
use crate::api::context::{Caller, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::migration::Migration;
use crate::fleet::operation::Operation;
use axum::Json;
use axum::extract::{Path, State};
use godwit_protocol::id::InstanceId;
use serde_json::{Value, json};

fn body(fleet: &Fleet, app: &App, operation: &Operation) -> Value {
    let instance = fleet.instances.get(&operation.instance);
    let progress = app.operations.progress(operation.instance).filter(|_| operation.is_running());
    json!({
        "id": operation.id,
        "verb": operation.verb.name(),
        "server": operation.instance,
        "server_name": instance.map(|i| &i.name),
        "phase": operation.phase.name(),
        "step": operation.step,
        "cursor": operation.cursor,
        "cancel": operation.cancel,
        "progress": progress,
        "error": operation.error,
        "created_at": time_text(operation.created_at),
        "updated_at": time_text(operation.updated_at),
    })
}

/// GET /operations, the newest first; `server=ID` and `phase=NAME` filter.
pub(super) async fn list(State(app): State<Shared>, caller: Caller, params: Params) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let server: Option<InstanceId> = match params.get("server") {
        Some(id) => Some(id.parse().map_err(|_| Fault::bad_request(format!("{id:?} is no server's id.")))?),
        None => None,
    };
    let phase = params.get("phase");
    let operations = app.ledger.read(|fleet| {
        let wanted = |o: &&Operation| {
            server.is_none_or(|id| id == o.instance) && phase.is_none_or(|phase| phase == o.phase.name())
        };
        let mut found: Vec<&Operation> = fleet.operations.values().filter(wanted).collect();
        found.sort_by_key(|o| std::cmp::Reverse((o.created_at, o.id)));
        found.into_iter().map(|operation| body(fleet, &app, operation)).collect::<Vec<_>>()
    });
    Ok(Json(json!({ "operations": operations })))
}

/// GET /operations/{operation}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let found = app.ledger.read(|fleet| {
        let operation = key.parse().ok().and_then(|id| fleet.operations.get(&id));
        operation.map(|operation| body(fleet, &app, operation))
    });
    let operation = found.ok_or_else(|| Fault::not_found("Operation", &key))?;
    Ok(Json(json!({ "operation": operation })))
}

/// GET /migrations/{migration}, by id or by the small number that compute clients use.
pub(super) async fn migration(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    let found = app.ledger.read(|fleet| {
        let named = |m: &&Migration| m.id.to_string() == key || m.number.to_string() == key;
        let mine = fleet.migrations.values().filter(named).filter(|m| caller.sees(m.project));
        mine.map(|m| migration_body(fleet, &app, m)).collect::<Vec<_>>()
    });
    Ok(Json(json!({ "migration": only(found, "Migration", &key)? })))
}

fn migration_body(fleet: &Fleet, app: &App, migration: &Migration) -> Value {
    let name = |host| fleet.hosts.get(&host).map(|h| h.name.clone());
    let running = migration.status.is_running();
    let progress = match (app.operations.progress(migration.instance), &migration.outcome) {
        (_, Some(outcome)) => json!(outcome.progress),
        (Some(godwit_protocol::operation::Progress::Migration(progress)), None) if running => json!(progress),
        _ => Value::Null,
    };
    json!({
        "id": migration.number,
        "uuid": migration.id,
        "server": migration.instance,
        "server_name": fleet.instances.get(&migration.instance).map(|i| &i.name),
        "kind": migration.kind,
        "status": migration.status,
        "source": name(migration.source),
        "target": migration.target.and_then(name),
        "total_ms": migration.outcome.map(|o| o.total_ms),
        "downtime_ms": migration.outcome.map(|o| o.downtime_ms),
        "progress": progress,
        "old_flavor": migration.resize.as_ref().map(|r| &r.old.flavor.name),
        "new_flavor": migration.resize.as_ref().map(|r| &r.new.flavor.name),
        "switched_at": migration.switched_at.map(time_text),
        "error": migration.error,
        "created_at": time_text(migration.created_at),
        "updated_at": time_text(migration.updated_at),
    })
}
