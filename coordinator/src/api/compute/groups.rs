//! Groups of servers that lie to one another by a policy.

use super::Asked;
use super::page::Page;
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use crate::fleet::group::ServerGroup;
use crate::placement::GroupPolicy;
use crate::verbs;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde_json::{Value, json};

/// The version from which a group has one policy with rules, and no list of policies.
const ONE_POLICY: u32 = 64;

fn view(fleet: &Fleet, asked: &Asked, group: &ServerGroup) -> Value {
    let mut view = json!({ "id": group.id, "name": group.name, "members": fleet.members_of(group) });
    if asked.since(ONE_POLICY) {
        view["policy"] = group.policy.name().into();
        view["rules"] = match group.max_per_host {
            Some(most) => json!({ "max_server_per_host": most }),
            None => json!({}),
        };
    } else {
        view["policies"] = json!([group.policy.name()]);
        view["metadata"] = json!({});
    }
    if asked.since(13) {
        view["project_id"] = json!(group.project);
        view["user_id"] = json!(group.user);
    }
    view
}

fn find<'a>(fleet: &'a Fleet, asked: &Asked, id: &str) -> Answer<&'a ServerGroup> {
    let found = id.parse().ok().and_then(|id| fleet.server_groups.get(&id));
    found
        .filter(|group| asked.caller.sees(group.project))
        .ok_or_else(|| Fault::not_found("Instance group", id))
}

/// GET /os-server-groups.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let all = params.get("all_projects").is_some() && asked.caller.is_admin();
    app.ledger.read(|fleet| {
        let mut groups: Vec<&ServerGroup> =
            fleet.server_groups.values().filter(|g| all || g.project == asked.caller.project).collect();
        let offset = params.number::<usize>("offset")?.unwrap_or(0).min(groups.len());
        groups.drain(..offset);
        let page = Page::cut(groups, &params, |group| group.id.to_string())?;
        let views: Vec<Value> = page.items.iter().map(|group| view(fleet, &asked, group)).collect();
        Ok(Json(json!({ "server_groups": views })))
    })
}

/// GET /os-server-groups/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let group = find(fleet, &asked, &id)?;
        Ok(Json(json!({ "server_group": view(fleet, &asked, group) })))
    })
}

/// POST /os-server-groups.
pub(super) async fn create(
    State(app): State<Shared>,
    asked: Asked,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_member()?;
    let mut a = Attributes::inside(body, "server_group")?;
    let name = a.required_text("name")?;
    let (policy, max_per_host) = policy(&asked, &mut a)?;
    a.finish()?;
    let owner = (asked.caller.project, asked.caller.user);
    let group = app.ledger.change(|_| verbs::group::create(owner, name, policy, max_per_host)).await?;
    Ok(Json(json!({ "server_group": app.ledger.read(|fleet| view(fleet, &asked, &group)) })))
}

fn policy(asked: &Asked, a: &mut Attributes) -> Answer<(GroupPolicy, Option<u32>)> {
    let name = if asked.since(ONE_POLICY) {
        a.required_text("policy")?
    } else {
        let policies = a.list("policies")?.unwrap_or_default();
        match policies.as_slice() {
            [Value::String(name)] => name.clone(),
            _ => return Err(Fault::bad_request("policies must be a list of one policy.")),
        }
    };
    let policy = GroupPolicy::from_name(&name).filter(|policy| asked.since(15) || !policy.is_soft());
    let policy = policy.ok_or_else(|| {
        let soft = if asked.since(15) { ", soft-affinity, soft-anti-affinity" } else { "" };
        Fault::bad_request(format!("The policy must be one of affinity, anti-affinity{soft}; not {name}."))
    })?;
    let mut max_per_host = None;
    if asked.since(ONE_POLICY)
        && let Some(rules) = a.take("rules")
    {
        let mut rules = Attributes::of(rules, "rules")?;
        max_per_host = rules.number("max_server_per_host")?;
        rules.finish()?;
    }
    let max_per_host = max_per_host.map(|most| u32::try_from(most).unwrap_or(u32::MAX));
    Ok((policy, max_per_host))
}

/// DELETE /os-server-groups/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    asked.caller.require_member()?;
    app.ledger
        .change(|fleet| {
            let group = find(fleet, &asked, &id)?;
            verbs::group::delete(fleet, group.id).map_err(Fault::from)
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
