//! Quotas: what is bounded and what is used. A limit of -1 is none.

use crate::api::context::Caller;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::verbs::security_group::MAX_GROUPS;
use crate::verbs::security_rule::MAX_IN_GROUP;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::ProjectId;
use serde_json::{Value, json};

/// GET /quotas/{project}.
pub(super) async fn show(caller: Caller, Path(project): Path<String>) -> Answer<Json<Value>> {
    check(&caller, &project)?;
    Ok(Json(json!({ "quota": {
        "network": -1, "subnet": -1, "port": -1,
        "security_group": MAX_GROUPS, "security_group_rule": MAX_GROUPS * MAX_IN_GROUP,
    } })))
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
            "security_group": {
                "limit": MAX_GROUPS,
                "used": fleet.security_groups.values().filter(|g| Some(g.project) == id).count(),
                "reserved": 0,
            },
            "security_group_rule": {
                "limit": MAX_GROUPS * MAX_IN_GROUP,
                "used": fleet.security_rules.values().filter(|r| Some(r.project) == id).count(),
                "reserved": 0,
            },
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
