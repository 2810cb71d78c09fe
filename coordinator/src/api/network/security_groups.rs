//! Security groups.

use super::list::{Collection, answer, with_fields};
use super::{created, decide_all, items, owner, security_rules};
use crate::api::attributes::{Attributes, time_text};
use crate::api::context::{Body, Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::security::SecurityGroup;
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::verbs::security_group::{self, GroupUpdate, NewGroup, SecurityError};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Json, Response};
use godwit_protocol::id::{ProjectId, SecurityGroupId};
use serde_json::{Value, json};

const COLLECTION: Collection = Collection {
    name: "security_groups",
    attributes: &[
        "id",
        "name",
        "description",
        "tenant_id",
        "project_id",
        "stateful",
        "shared",
        "created_at",
        "updated_at",
        "revision_number",
    ],
};

impl From<SecurityError> for Fault {
    fn from(error: SecurityError) -> Self {
        use SecurityError as E;
        let (status, name) = match error {
            E::Plain(error) => return error.into(),
            E::DefaultExists => (StatusCode::CONFLICT, "SecurityGroupDefaultAlreadyExists"),
            E::DefaultStays => (StatusCode::CONFLICT, "SecurityGroupCannotRemoveDefault"),
            E::DefaultKeepsName => (StatusCode::CONFLICT, "SecurityGroupCannotUpdateDefault"),
            E::InUse { .. } => (StatusCode::CONFLICT, "SecurityGroupInUse"),
            E::OverQuota(_) => (StatusCode::CONFLICT, "OverQuota"),
            E::RuleExists(_) => (StatusCode::CONFLICT, "SecurityGroupRuleExists"),
            E::BadRule { name, .. } => (StatusCode::BAD_REQUEST, name),
        };
        Fault::new(status, error.to_string()).named(name)
    }
}

fn view(fleet: &Fleet, group: &SecurityGroup) -> Value {
    let rules = security_group::rules_of(fleet, group.id);
    json!({
        "id": group.id,
        "name": group.name,
        "description": group.description,
        "tenant_id": group.project,
        "project_id": group.project,
        "security_group_rules": rules.into_iter().map(security_rules::view).collect::<Vec<_>>(),
        "stateful": group.stateful,
        "shared": false,
        "tags": group.tags,
        "created_at": time_text(group.created_at),
        "updated_at": time_text(group.updated_at),
        "revision_number": group.revision,
    })
}

/// The group of a path or body, when the caller may see it.
pub(super) fn visible<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a SecurityGroup> {
    let found = id.parse().ok().and_then(|id: SecurityGroupId| fleet.security_groups.get(&id));
    found.filter(|g| caller.sees(g.project)).ok_or_else(|| Fault::not_found("SecurityGroup", id))
}

/// Groups of a list of ids.
pub(super) fn all(fleet: &Fleet, caller: &Caller, ids: &[String]) -> Answer<Vec<SecurityGroupId>> {
    let mut groups = Vec::with_capacity(ids.len());
    for id in ids {
        let id = visible(fleet, caller, id)?.id;
        if !groups.contains(&id) {
            groups.push(id);
        }
    }
    Ok(groups)
}

/// Makes the project's default group where there is none yet: it is there before anybody looks.
async fn ensure_default(app: &Shared, project: ProjectId) -> Answer<()> {
    let missing =
        app.ledger.read(|fleet| !security_group::ensure_default(fleet, project, now()).0.is_empty());
    if missing {
        app.ledger
            .change(|fleet| Ok::<_, Fault>((security_group::ensure_default(fleet, project, now()).0, ())))
            .await?;
    }
    Ok(())
}

/// GET /security-groups.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    ensure_default(&app, caller.project).await?;
    let views = app.ledger.read(|fleet| {
        let mut seen: Vec<&SecurityGroup> =
            fleet.security_groups.values().filter(|g| caller.sees(g.project)).collect();
        seen.sort_by_key(|g| (g.created_at, g.id));
        seen.into_iter().map(|g| view(fleet, g)).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /security-groups/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &caller, &id).map(|g| view(fleet, g)))?;
    Ok(Json(json!({ "security_group": with_fields(view, &params) })))
}

fn make(fleet: &Fleet, caller: &Caller, mut a: Attributes) -> Answer<(Vec<Change>, SecurityGroup)> {
    let new = NewGroup {
        project: owner(caller, &mut a)?,
        name: a.text("name")?.unwrap_or_default(),
        description: a.text("description")?.unwrap_or_default(),
        stateful: a.flag("stateful")?.unwrap_or(true),
    };
    a.finish()?;
    Ok(security_group::create(fleet, new, now())?)
}

/// POST /security-groups.
pub(super) async fn create(
    State(app): State<Shared>,
    caller: Caller,
    Body(body): Body<Value>,
) -> Answer<Response> {
    caller.require_member()?;
    ensure_default(&app, caller.project).await?;
    let (items, bulk) = items(body, "security_group", "security_groups")?;
    let made =
        app.ledger.change(|fleet| decide_all(fleet, items, |fleet, a| make(fleet, &caller, a))).await?;
    let views = app.ledger.read(|fleet| made.iter().map(|g| view(fleet, g)).collect());
    Ok(created(views, bulk, "security_group", "security_groups"))
}

/// PUT /security-groups/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let mut a = Attributes::inside(body, "security_group")?;
    let change = GroupUpdate {
        name: a.text("name")?,
        description: a.text("description")?,
        stateful: a.flag("stateful")?,
        tags: None,
    };
    a.finish()?;
    let changed = apply(&app, &caller, &id, change).await?;
    let view = app.ledger.read(|fleet| view(fleet, &changed));
    Ok(Json(json!({ "security_group": view })))
}

async fn apply(app: &Shared, caller: &Caller, id: &str, change: GroupUpdate) -> Answer<SecurityGroup> {
    caller.require_member()?;
    app.ledger
        .change(|fleet| {
            let id = visible(fleet, caller, id)?.id;
            security_group::update(fleet, id, change, now()).map_err(Fault::from)
        })
        .await
}

/// DELETE /security-groups/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    caller.require_member()?;
    let networks = app
        .ledger
        .change(|fleet| {
            let id = visible(fleet, &caller, &id)?.id;
            security_group::delete(fleet, id).map_err(Fault::from)
        })
        .await?;
    networks.into_iter().for_each(|network| app.l2_changed(network));
    Ok(StatusCode::NO_CONTENT)
}

/// Its labels.
pub(super) fn tags(fleet: &Fleet, caller: &Caller, id: &str) -> Answer<Vec<String>> {
    visible(fleet, caller, id).map(|g| g.tags.clone())
}

/// Gives it other labels.
pub(super) fn retag(
    fleet: &Fleet,
    caller: &Caller,
    id: &str,
    tags: Vec<String>,
) -> Answer<(Vec<Change>, Vec<String>)> {
    caller.require_member()?;
    let id = visible(fleet, caller, id)?.id;
    let change = GroupUpdate { tags: Some(tags), ..GroupUpdate::default() };
    let (changes, group) = security_group::update(fleet, id, change, now())?;
    Ok((changes, group.tags))
}
