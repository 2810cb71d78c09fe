//! Quotas: there are none, so every limit is -1, and what is used is counted.

use crate::api::context::Caller;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::ProjectId;
use serde_json::{Value, json};

/// GET /quotas/{project}.
pub(super) async fn show(caller: Caller, Path(project): Path<String>) -> Answer<Json<Value>> {
    check(&caller, &project)?;
    Ok(Json(json!({ "quota": { "network": -1, "subnet": -1, "port": -1 } })))
}

/// GET /quotas/{project}/details.
pub(super) async fn details(
    State(app): State<Shared>,
    caller: Caller,
    Path(project): Path<String>,
) -> Answer<Json<Value>> {
    check(&caller, &project)?;
    let used = |used: usize| json!({ "limit": -1, "used": used, "reserved": 0 });
    let id: Option<ProjectId> = project.parse().ok();
    let quota = app.ledger.read(|fleet| {
        json!({
            "network": used(fleet.networks.values().filter(|n| Some(n.project) == id).count()),
            "subnet": used(fleet.subnets.values().filter(|s| Some(s.project) == id).count()),
            "port": used(fleet.ports.values().filter(|p| Some(p.project) == id).count()),
        })
    });
    Ok(Json(json!({ "quota": quota })))
}

fn check(caller: &Caller, project: &str) -> Answer<()> {
    if caller.is_admin() || project == caller.project.to_string() {
        return Ok(());
    }
    Err(Fault::forbidden("Only an administrator may see another project's quota."))
}
