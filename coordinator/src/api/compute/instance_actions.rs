//! What was done with a server: its operations, as the instance actions that clients list.

use super::page::Page;
use super::servers::{point, visible};
use super::{Asked, fraction_text, view};
use crate::api::context::Params;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use crate::fleet::instance::Instance;
use crate::fleet::operation::{Operation, Phase, Verb};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde_json::{Value, json};

fn action(verb: Verb) -> &'static str {
    match verb {
        Verb::CreateInstance => "create",
        Verb::DeleteInstance => "delete",
        Verb::StartInstance => "start",
        Verb::StopInstance => "stop",
        Verb::RebootInstance { .. } => "reboot",
        Verb::PauseInstance { paused: true } => "pause",
        Verb::PauseInstance { paused: false } => "unpause",
        Verb::LiveMigrate { .. } => "live-migration",
        Verb::MigrateInstance { .. } => "migrate",
        Verb::ResizeInstance { .. } => "resize",
        Verb::ConfirmResize { .. } => "confirmResize",
        Verb::RevertResize { .. } => "revertResize",
    }
}

/// The id by which clients ask for one action.
fn request_id(operation: &Operation) -> String {
    format!("req-{}", operation.id)
}

fn brief(asked: &Asked, instance: &Instance, operation: &Operation) -> Value {
    let mut view = json!({
        "action": action(operation.verb),
        "instance_uuid": operation.instance,
        "request_id": request_id(operation),
        "user_id": instance.user,
        "project_id": instance.project,
        "start_time": fraction_text(operation.created_at),
        "message": operation.error.as_ref().map(|_| "Error"),
    });
    if asked.since(58) {
        view["updated_at"] = fraction_text(operation.updated_at).into();
    }
    view
}

/// The one event of an action: the operation itself.
fn event(fleet: &Fleet, asked: &Asked, instance: &Instance, operation: &Operation) -> Value {
    let ended = !operation.is_running();
    let result = match operation.phase {
        Phase::Succeeded => Some("Success"),
        Phase::Failed => Some("Error"),
        Phase::Running | Phase::Undoing => None,
    };
    let host = instance.host.and_then(|id| fleet.hosts.get(&id));
    let mut view = json!({
        "event": operation.verb.name(),
        "start_time": fraction_text(operation.created_at),
        "finish_time": ended.then(|| fraction_text(operation.updated_at)),
        "result": result,
    });
    if asked.caller.is_admin() {
        view["traceback"] = json!(operation.error);
    }
    if asked.since(62) {
        view["hostId"] = view::host_id(instance, host).into();
        if asked.caller.is_admin() {
            view["host"] = host.map_or("", |h| h.name.as_str()).into();
        }
    }
    if asked.since(84) {
        view["details"] = json!(operation.error);
    }
    view
}

/// GET /servers/{id}/os-instance-actions.
pub(super) async fn list(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let (since, before) = (point(&params, "changes-since")?, point(&params, "changes-before")?);
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?;
        let passes = |o: &&Operation| {
            o.instance == instance.id
                && since.is_none_or(|t| o.updated_at >= t)
                && before.is_none_or(|t| o.updated_at <= t)
        };
        let mut found: Vec<&Operation> = fleet.operations.values().filter(passes).collect();
        found.sort_by_key(|o| std::cmp::Reverse((o.created_at, o.id)));
        if !asked.since(58) {
            let views: Vec<Value> = found.into_iter().map(|o| brief(&asked, instance, o)).collect();
            return Ok(Json(json!({ "instanceActions": views })));
        }
        let page = Page::cut(found, &params, |o| request_id(o))?;
        let views = page.items.iter().map(|o| brief(&asked, instance, o)).collect();
        let mut body =
            page.body(&asked, "instanceActions", &format!("/servers/{id}/os-instance-actions"), views);
        // Of all lists this one alone calls its links just so.
        if let Some(map) = body.as_object_mut()
            && let Some(links) = map.remove("instanceActions_links")
        {
            map.insert("links".into(), links);
        }
        Ok(Json(body))
    })
}

/// GET /servers/{id}/os-instance-actions/{request}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, request)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?;
        let mut own = fleet.operations.values().filter(|o| o.instance == instance.id);
        let operation = own.find(|o| request_id(o) == request).ok_or_else(|| {
            Fault::new(
                StatusCode::NOT_FOUND,
                format!("Action for request_id {request} on instance {id} not found"),
            )
        })?;
        let mut view = brief(&asked, instance, operation);
        if asked.since(51) || asked.caller.is_admin() {
            view["events"] = json!([event(fleet, &asked, instance, operation)]);
        }
        Ok(Json(json!({ "instanceAction": view })))
    })
}
