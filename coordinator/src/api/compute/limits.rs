//! Limits and quotas: there are none, so every limit is -1, and what is used is counted.

use super::{Asked, not_built};
use crate::api::context::Params;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use axum::extract::{Path, State};
use axum::response::Json;
use godwit_protocol::id::ProjectId;
use serde_json::{Map, Value, json};

/// Items of metadata of a server at most.
const METADATA: u64 = 128;

/// What a project's instances use: instances, vCPUs, memory in MiB.
fn used(fleet: &Fleet, project: Option<ProjectId>) -> (u64, u64, u64) {
    let own = fleet.instances.values().filter(|i| Some(i.project) == project);
    own.fold((0, 0, 0), |(count, vcpus, memory), i| {
        (count + 1, vcpus + u64::from(i.flavor.vcpus), memory + i.flavor.memory_mib)
    })
}

/// GET /limits.
pub(super) async fn show(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let project = match params.get("tenant_id") {
        Some(id) => {
            check(&asked, id)?;
            id.parse().ok()
        }
        None => Some(asked.caller.project),
    };
    let (instances, vcpus, memory) = app.ledger.read(|fleet| used(fleet, project));
    let mut absolute = json!({
        "maxServerMeta": METADATA,
        "maxTotalInstances": -1,
        "maxTotalCores": -1,
        "maxTotalRAMSize": -1,
        "maxTotalKeypairs": -1,
        "maxServerGroups": 0,
        "maxServerGroupMembers": 0,
        "totalInstancesUsed": instances,
        "totalCoresUsed": vcpus,
        "totalRAMUsed": memory,
        "totalServerGroupsUsed": 0,
    });
    let mut set = |keys: &[&str], value: i64| {
        for key in keys {
            absolute[*key] = value.into();
        }
    };
    if !asked.since(36) {
        set(&["maxTotalFloatingIps", "totalFloatingIpsUsed", "totalSecurityGroupsUsed"], 0);
        set(&["maxSecurityGroups", "maxSecurityGroupRules"], 0);
    }
    if !asked.since(39) {
        set(&["maxImageMeta"], -1);
    }
    if !asked.since(57) {
        set(&["maxPersonality", "maxPersonalitySize"], 0);
    }
    Ok(Json(json!({ "limits": { "rate": [], "absolute": absolute } })))
}

fn check(asked: &Asked, project: &str) -> Answer<()> {
    if asked.caller.is_admin() || project == asked.caller.project.to_string() {
        return Ok(());
    }
    Err(Fault::forbidden("Only an administrator may see another project's limits."))
}

/// Names, limits and use of a quota set in the request's version.
fn quotas(fleet: &Fleet, asked: &Asked, project: &str) -> Vec<(&'static str, i64, u64)> {
    let (instances, vcpus, memory) = used(fleet, project.parse().ok());
    let mut all = vec![
        ("instances", -1, instances),
        ("cores", -1, vcpus),
        ("ram", -1, memory),
        ("metadata_items", METADATA as i64, 0),
        ("key_pairs", -1, 0),
        ("server_groups", -1, 0),
        ("server_group_members", -1, 0),
    ];
    if !asked.since(36) {
        all.extend(
            ["fixed_ips", "floating_ips", "security_groups", "security_group_rules"].map(|name| (name, 0, 0)),
        );
    }
    if !asked.since(57) {
        all.extend(
            ["injected_files", "injected_file_content_bytes", "injected_file_path_bytes"]
                .map(|name| (name, 0, 0)),
        );
    }
    all
}

/// GET /os-quota-sets/{project} and …/defaults.
pub(super) async fn quota(
    State(app): State<Shared>,
    asked: Asked,
    Path(project): Path<String>,
) -> Answer<Json<Value>> {
    check(&asked, &project)?;
    let mut set: Map<String, Value> = app.ledger.read(|fleet| {
        quotas(fleet, &asked, &project)
            .into_iter()
            .map(|(name, limit, _)| (name.to_owned(), limit.into()))
            .collect()
    });
    set.insert("id".into(), project.into());
    Ok(Json(json!({ "quota_set": set })))
}

/// GET /os-quota-sets/{project}/detail.
pub(super) async fn quota_detail(
    State(app): State<Shared>,
    asked: Asked,
    Path(project): Path<String>,
) -> Answer<Json<Value>> {
    check(&asked, &project)?;
    let mut set: Map<String, Value> = app.ledger.read(|fleet| {
        let one = |(name, limit, used): (&str, i64, u64)| {
            (name.to_owned(), json!({ "limit": limit, "in_use": used, "reserved": 0 }))
        };
        quotas(fleet, &asked, &project).into_iter().map(one).collect()
    });
    set.insert("id".into(), project.into());
    Ok(Json(json!({ "quota_set": set })))
}

/// PUT /os-quota-sets/{project}.
pub(super) async fn no_quota(asked: Asked) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    Err(not_built("A quota", "Projects may use all that there is."))
}
