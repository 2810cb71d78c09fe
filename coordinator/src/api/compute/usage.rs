//! What projects used in a span of time, by the instances that still exist: the records of deleted ones are gone.

use super::page::Page;
use super::servers::point;
use super::{Asked, fraction_text, view::vm_state};
use crate::api::context::Params;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::instance::Instance;
use crate::fleet::{Fleet, Time};
use crate::ledger::now;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::ProjectId;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use time::Duration;

/// The span of a request: four weeks up to now unless it says.
fn span(params: &Params) -> Answer<(Time, Time)> {
    let end = point(params, "end")?.unwrap_or_else(now).min(now());
    let start = point(params, "start")?.unwrap_or(end - Duration::weeks(4));
    if start > end {
        return Err(Fault::bad_request(
            "Invalid start time. The start time cannot occur after the end time.",
        ));
    }
    Ok((start, end))
}

/// Hours of an instance inside a span.
fn hours(instance: &Instance, start: Time, end: Time) -> f64 {
    let from = instance.launched_at.unwrap_or(instance.created_at).max(start);
    if from < end { (end - from).as_seconds_f64() / 3600.0 } else { 0.0 }
}

fn one(instance: &Instance, start: Time, end: Time) -> Value {
    let since = instance.launched_at.unwrap_or(instance.created_at);
    json!({
        "instance_id": instance.id,
        "name": instance.name,
        "tenant_id": instance.project,
        "flavor": instance.flavor.name,
        "vcpus": instance.flavor.vcpus,
        "memory_mb": instance.flavor.memory_mib,
        "local_gb": instance.flavor.disk_gib,
        "state": vm_state(instance),
        "started_at": fraction_text(since),
        "ended_at": null,
        "hours": hours(instance, start, end),
        "uptime": (now() - since).whole_seconds().max(0),
    })
}

fn total(project: &str, instances: &[&Instance], (start, end): (Time, Time), detailed: bool) -> Value {
    let sum = |of: fn(&Instance) -> u64| -> f64 {
        instances.iter().map(|i| hours(i, start, end) * of(i) as f64).sum()
    };
    let mut view = json!({
        "tenant_id": project,
        "start": fraction_text(start),
        "stop": fraction_text(end),
        "total_hours": sum(|_| 1),
        "total_vcpus_usage": sum(|i| u64::from(i.flavor.vcpus)),
        "total_memory_mb_usage": sum(|i| i.flavor.memory_mib),
        "total_local_gb_usage": sum(|i| i.flavor.disk_gib),
    });
    if detailed {
        view["server_usages"] = instances.iter().map(|i| one(i, start, end)).collect();
    }
    view
}

/// The page of instances that ran in a span; clients ask for the next by the last one's id until nothing comes.
fn page(
    fleet: &Fleet,
    asked: &Asked,
    params: &Params,
    (start, end): (Time, Time),
    project: Option<ProjectId>,
) -> Answer<Page<Instance>> {
    let ran = |i: &&Instance| project.is_none_or(|p| i.project == p) && hours(i, start, end) > 0.0;
    let all: Vec<Instance> = fleet.instances.values().filter(ran).cloned().collect();
    let whole = Params::default();
    Page::cut(all, if asked.since(40) { params } else { &whole }, |i| i.id.to_string())
}

/// GET /os-simple-tenant-usage.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let span = span(&params)?;
    let detailed = params.flag("detailed")?.unwrap_or(false);
    let page = app.ledger.read(|fleet| page(fleet, &asked, &params, span, None))?;
    let mut projects: BTreeMap<ProjectId, Vec<&Instance>> = BTreeMap::new();
    for instance in &page.items {
        projects.entry(instance.project).or_default().push(instance);
    }
    let views =
        projects.iter().map(|(project, own)| total(&project.to_string(), own, span, detailed)).collect();
    Ok(Json(page.body(&asked, "tenant_usages", "/os-simple-tenant-usage", views)))
}

/// GET /os-simple-tenant-usage/{project}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(project): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    if !asked.caller.is_admin() && project != asked.caller.project.to_string() {
        return Err(Fault::forbidden("Only an administrator may see another project's usage."));
    }
    let span = span(&params)?;
    let id = project.parse().unwrap_or(ProjectId(uuid::Uuid::nil()));
    let page = app.ledger.read(|fleet| page(fleet, &asked, &params, span, Some(id)))?;
    let mut body = page.body(&asked, "tenant_usage", &format!("/os-simple-tenant-usage/{project}"), vec![]);
    // A project that used nothing has nothing to tell.
    let own: Vec<&Instance> = page.items.iter().collect();
    body["tenant_usage"] = if own.is_empty() { json!({}) } else { total(&project, &own, span, true) };
    Ok(Json(body))
}
