//! Migrations: the live one that runs on one server, and the history of all, cold ones and resizes included.

use super::page::Page;
use super::servers::{changeable, point, visible};
use super::{Asked, fraction_text, not_built};
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::instance::Flavor;
use crate::fleet::migration::{Migration, MigrationKind, MigrationStatus};
use crate::operations::live_migrate;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use godwit_protocol::id::HostId;
use godwit_protocol::operation::Progress;
use serde_json::{Value, json};

/// What `os-migrations` may be filtered by.
const FILTERS: [&str; 13] = [
    "host",
    "status",
    "source_compute",
    "instance_uuid",
    "migration_type",
    "hidden",
    "limit",
    "marker",
    "changes-since",
    "changes-before",
    "user_id",
    "project_id",
    "cell_name",
];

fn status(migration: &Migration) -> &'static str {
    let live = migration.kind == MigrationKind::Live;
    match migration.status {
        MigrationStatus::Queued => "queued",
        MigrationStatus::Preparing if live => "preparing",
        MigrationStatus::Preparing => "pre-migrating",
        MigrationStatus::Running if live => "running",
        MigrationStatus::Running if migration.switched_at.is_none() => "migrating",
        MigrationStatus::Running => "post-migrating",
        MigrationStatus::Finished => "finished",
        MigrationStatus::Confirming => "confirming",
        MigrationStatus::Confirmed => "confirmed",
        MigrationStatus::Reverting => "reverting",
        MigrationStatus::Reverted => "reverted",
        MigrationStatus::Completed => "completed",
        // Nova has no word for a resize that a deletion has stopped.
        MigrationStatus::Cancelled if live => "cancelled",
        MigrationStatus::Failed | MigrationStatus::Cancelled => "error",
    }
}

fn kind(migration: &Migration) -> &'static str {
    match migration.kind {
        MigrationKind::Live => "live-migration",
        MigrationKind::Cold => "migration",
        MigrationKind::Resize => "resize",
    }
}

/// A flavor by its id: a number where it is one, as Nova has numbers here.
fn flavor_id(flavor: &Flavor) -> Value {
    flavor.id.parse::<u64>().map_or_else(|_| flavor.id.clone().into(), Value::from)
}

/// What both kinds of views tell.
fn common(fleet: &Fleet, asked: &Asked, m: &Migration) -> Value {
    let host = |id: HostId| fleet.hosts.get(&id);
    let source = host(m.source).map(|h| h.name.clone());
    let target = m.target.and_then(host);
    let address = target.and_then(|h| h.inventory.as_ref()).map(|i| i.underlay.address);
    let mut view = json!({
        "id": m.number,
        "status": status(m),
        "source_node": source,
        "source_compute": source,
        "dest_node": target.map(|h| h.name.clone()),
        "dest_compute": target.map(|h| h.name.clone()),
        "dest_host": address,
        "created_at": fraction_text(m.created_at),
        "updated_at": fraction_text(m.updated_at),
    });
    if asked.since(59) {
        view["uuid"] = json!(m.id);
    }
    if asked.since(80) {
        view["user_id"] = json!(m.user);
        view["project_id"] = json!(m.project);
    }
    view
}

/// A migration as part of its server.
fn of_server(app: &App, fleet: &Fleet, asked: &Asked, m: &Migration) -> Value {
    let progress = match app.operations.progress(m.instance) {
        Some(Progress::Migration(progress)) => Some(progress),
        _ => None,
    };
    let mut view = common(fleet, asked, m);
    view["server_uuid"] = json!(m.instance);
    view["memory_total_bytes"] = json!(progress.map(|p| p.memory_total_bytes));
    view["memory_processed_bytes"] = json!(progress.map(|p| p.memory_processed_bytes));
    view["memory_remaining_bytes"] = json!(progress.map(|p| p.memory_remaining_bytes));
    // Disks stay where they are, on the pool.
    for key in ["disk_total_bytes", "disk_processed_bytes", "disk_remaining_bytes"] {
        view[key] = 0.into();
    }
    view
}

/// A migration in the history.
fn of_history(fleet: &Fleet, asked: &Asked, m: &Migration) -> Value {
    let mut view = common(fleet, asked, m);
    view["instance_uuid"] = json!(m.instance);
    view["old_instance_type_id"] = json!(m.resize.as_ref().map(|r| flavor_id(&r.old.flavor)));
    view["new_instance_type_id"] = json!(m.resize.as_ref().map(|r| flavor_id(&r.new.flavor)));
    if asked.since(23) {
        view["migration_type"] = kind(m).into();
        if runs_live(m) {
            let path = format!("servers/{}/migrations/{}", m.instance, m.number);
            view["links"] = json!([
                { "rel": "self", "href": asked.links.to(&format!("/compute/v2.1/{path}")) },
                { "rel": "bookmark", "href": asked.links.to(&format!("/compute/{path}")) },
            ]);
        }
    }
    view
}

/// Whether it is one of those that a server shows as its own while they run: live ones only.
fn runs_live(migration: &Migration) -> bool {
    migration.kind == MigrationKind::Live && migration.status.is_running()
}

/// The running migration of a path.
fn running<'a>(fleet: &'a Fleet, asked: &Asked, id: &str, number: &str) -> Answer<&'a Migration> {
    let instance = visible(fleet, asked, id)?.id;
    let mut all = fleet.migrations.values().filter(|m| m.instance == instance);
    let found = all.find(|m| m.number.to_string() == number && runs_live(m));
    found.ok_or_else(|| {
        Fault::new(
            StatusCode::NOT_FOUND,
            format!("In-progress live migration {number} is not found for server {id}."),
        )
    })
}

/// GET /servers/{id}/migrations.
pub(super) async fn list(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    asked.require(23, None)?;
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?.id;
        let running = fleet
            .running_migration(instance)
            .filter(|m| runs_live(m))
            .map(|m| of_server(&app, fleet, &asked, m));
        Ok(Json(json!({ "migrations": running.into_iter().collect::<Vec<_>>() })))
    })
}

/// GET /servers/{id}/migrations/{migration}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, number)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    asked.require(23, None)?;
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| {
        let migration = running(fleet, &asked, &id, &number)?;
        Ok(Json(json!({ "migration": of_server(&app, fleet, &asked, migration) })))
    })
}

/// DELETE /servers/{id}/migrations/{migration}.
pub(super) async fn abort(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, number)): Path<(String, String)>,
) -> Answer<StatusCode> {
    asked.require(24, None)?;
    asked.caller.require_admin()?;
    changeable(&app, &asked, &id)?;
    let migration = app.ledger.read(|fleet| running(fleet, &asked, &id, &number).map(|m| m.id))?;
    live_migrate::cancel(&app, migration).await?;
    Ok(StatusCode::ACCEPTED)
}

/// POST /servers/{id}/migrations/{migration}/action.
pub(super) async fn act(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, number)): Path<(String, String)>,
    Body(body): Body<Value>,
) -> Answer<StatusCode> {
    asked.require(22, None)?;
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| running(fleet, &asked, &id, &number).map(drop))?;
    let mut a = Attributes::of(body, "the request's body")?;
    let wanted = a.has("force_complete");
    a.inert("force_complete", &[])?;
    a.finish()?;
    if !wanted {
        return Err(Fault::bad_request("'force_complete' is a required property."));
    }
    Err(not_built(
        "force_complete",
        "A migration ends by itself within max_downtime_ms of coordinator.toml, or is aborted with DELETE.",
    ))
}

/// GET /os-migrations.
pub(super) async fn list_all(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    if let Some((key, _)) = params.iter().find(|(key, _)| asked.since(59) && !FILTERS.contains(key)) {
        return Err(Fault::bad_request(format!(
            "Additional query parameters are not allowed ('{key}' was unexpected)."
        )));
    }
    let (since, before) = (point(&params, "changes-since")?, point(&params, "changes-before")?);
    app.ledger.read(|fleet| {
        let named =
            |id: Option<HostId>| id.and_then(|id| fleet.hosts.get(&id)).map_or("", |h| h.name.as_str());
        let is = |key: &str, value: &str| params.get(key).is_none_or(|wanted| wanted == value);
        let on = |m: &Migration| {
            params.get("host").is_none_or(|host| named(Some(m.source)) == host || named(m.target) == host)
        };
        let passes = |m: &&Migration| {
            on(m)
                && is("status", status(m))
                && is("source_compute", named(Some(m.source)))
                && is("instance_uuid", &m.instance.to_string())
                && is("migration_type", kind(m))
                && is("user_id", &m.user.to_string())
                && is("project_id", &m.project.to_string())
                && since.is_none_or(|t| m.updated_at >= t)
                && before.is_none_or(|t| m.updated_at <= t)
        };
        let mut found: Vec<&Migration> = fleet.migrations.values().filter(passes).collect();
        found.sort_by_key(|m| std::cmp::Reverse(m.number));
        if !asked.since(59) {
            let views: Vec<Value> = found.into_iter().map(|m| of_history(fleet, &asked, m)).collect();
            return Ok(Json(json!({ "migrations": views })));
        }
        let page = Page::cut(found, &params, |m| m.id.to_string())?;
        let views = page.items.iter().map(|m| of_history(fleet, &asked, m)).collect();
        Ok(Json(page.body(&asked, "migrations", "/os-migrations", views)))
    })
}
