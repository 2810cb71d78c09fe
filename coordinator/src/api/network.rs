//! The network API, v2.0: networks, subnets, ports and security groups in the shapes of OpenStack's network service.
//! What is not built (routers, floating addresses, QoS) is refused where it would ask for something.

mod agents;
mod extensions;
mod list;
mod networks;
mod ports;
mod quotas;
mod security_groups;
mod security_rules;
mod subnets;
mod tags;
#[cfg(test)]
mod tests;

use crate::api::attributes::Attributes;
use crate::api::context::{Caller, Links};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::{Change, Fleet};
use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get};
use godwit_protocol::id::ProjectId;
use serde_json::{Value, json};

/// Its routes.
pub fn router() -> Router<Shared> {
    let v2 = Router::new()
        .route("/", get(resources))
        .route("/extensions", get(extensions::list))
        .route("/extensions/{alias}", get(extensions::show))
        .route("/networks", get(networks::list).post(networks::create))
        .route("/networks/{id}", get(networks::show).put(networks::update).delete(networks::delete))
        .route("/networks/{id}/tags", tags::routes(networks::tags, networks::retag))
        .route("/subnets", get(subnets::list).post(subnets::create))
        .route("/subnets/{id}", get(subnets::show).put(subnets::update).delete(subnets::delete))
        .route("/subnets/{id}/tags", tags::routes(subnets::tags, subnets::retag))
        .route("/ports", get(ports::list).post(ports::create))
        .route("/ports/{id}", get(ports::show).put(ports::update).delete(ports::delete))
        .route("/ports/{id}/tags", tags::routes(ports::tags, ports::retag))
        .route("/security-groups", get(security_groups::list).post(security_groups::create))
        .route(
            "/security-groups/{id}",
            get(security_groups::show).put(security_groups::update).delete(security_groups::delete),
        )
        .route("/security-groups/{id}/tags", tags::routes(security_groups::tags, security_groups::retag))
        .route("/security-group-rules", get(security_rules::list).post(security_rules::create))
        .route("/security-group-rules/{id}", get(security_rules::show).delete(security_rules::delete))
        .route("/agents", get(agents::list))
        .route("/agents/{id}", get(agents::show))
        .route("/quotas/{project}", get(quotas::show))
        .route("/quotas/{project}/default", get(quotas::show))
        .route("/quotas/{project}/details", get(quotas::details))
        .route("/{*path}", any(absent));
    Router::new().route("/", get(versions)).nest("/v2.0", v2)
}

async fn versions(links: Links) -> Json<Value> {
    let href = links.to("/network/v2.0/");
    Json(json!({ "versions": [{
        "id": "v2.0",
        "status": "CURRENT",
        "links": [{ "rel": "self", "href": href }],
    }] }))
}

/// What the network service does not have, told by the name its clients ask by.
async fn absent(Path(path): Path<String>) -> Fault {
    let kind = path.split('/').next().unwrap_or_default().replace('-', " ");
    let text = format!(
        "There are no {kind} here: networks, subnets, ports and security groups are what this service has."
    );
    Fault::new(StatusCode::NOT_FOUND, text)
}

async fn resources(links: Links) -> Json<Value> {
    let resource = |collection: &str| {
        let path = collection.replace('_', "-");
        json!({
            "name": collection.trim_end_matches('s'),
            "collection": collection,
            "links": [{ "rel": "self", "href": links.to(&format!("/network/v2.0/{path}")) }],
        })
    };
    let resources = ["networks", "subnets", "ports", "security_groups", "security_group_rules"].map(resource);
    Json(json!({ "resources": resources }))
}

/// The objects of a POST: one under its name, or several under the plural.
fn items(body: Value, one: &str, many: &str) -> Answer<(Vec<Attributes>, bool)> {
    let mut outer = Attributes::of(body.clone(), "the request's body")?;
    match outer.list(many) {
        Ok(Some(items)) if !items.is_empty() => {
            outer.finish()?;
            let items = items.into_iter().map(|item| match item {
                // Bulk bodies may wrap each object once more.
                Value::Object(ref map) if map.len() == 1 && map.contains_key(one) => {
                    Attributes::inside(item, one)
                }
                item => Attributes::of(item, one),
            });
            Ok((items.collect::<Answer<_>>()?, true))
        }
        Ok(Some(_)) => Err(Fault::bad_request(format!("Resources required: '{many}' is empty."))),
        _ => Ok((vec![Attributes::inside(body, one)?], false)),
    }
}

/// Decides on several objects as on one: each sees those before it, and an error changes nothing at all.
fn decide_all<T>(
    fleet: &Fleet,
    items: Vec<Attributes>,
    mut decide: impl FnMut(&Fleet, Attributes) -> Answer<(Vec<Change>, T)>,
) -> Answer<(Vec<Change>, Vec<T>)> {
    if items.len() == 1 {
        let only = items.into_iter().map(|item| decide(fleet, item)).collect::<Answer<Vec<_>>>()?;
        let (changes, made): (Vec<_>, Vec<_>) = only.into_iter().unzip();
        return Ok((changes.concat(), made));
    }
    let mut scratch = Fleet {
        hosts: fleet.hosts.clone(),
        networks: fleet.networks.clone(),
        subnets: fleet.subnets.clone(),
        ports: fleet.ports.clone(),
        security_groups: fleet.security_groups.clone(),
        security_rules: fleet.security_rules.clone(),
        ..Fleet::default()
    };
    let (mut all, mut made) = (Vec::new(), Vec::new());
    for item in items {
        let (changes, one) = decide(&scratch, item)?;
        changes.iter().cloned().for_each(|change| scratch.apply(change));
        all.extend(changes);
        made.push(one);
    }
    Ok((all, made))
}

/// The answer to a POST.
fn created(mut views: Vec<Value>, bulk: bool, one: &str, many: &str) -> Response {
    let body = match views.pop() {
        Some(view) if !bulk => json!({ one: view }),
        last => {
            views.extend(last);
            json!({ many: views })
        }
    };
    (StatusCode::CREATED, Json(body)).into_response()
}

/// The project of a new object: the caller's, or the one an administrator names.
fn owner(caller: &Caller, attributes: &mut Attributes) -> Answer<ProjectId> {
    let must = "a project's id";
    let (old, new) = (attributes.parsed("tenant_id", must)?, attributes.parsed("project_id", must)?);
    let project = new.or(old).unwrap_or(caller.project);
    if caller.sees(project) {
        return Ok(project);
    }
    Err(Fault::forbidden("Only an administrator may make things for another project."))
}

/// The labels in the body of a PUT on `…/tags`.
fn tags_of(body: Value) -> Answer<Vec<String>> {
    let mut attributes = Attributes::of(body, "the request's body")?;
    let tags = attributes.parsed_list("tags", "a string")?;
    attributes.finish()?;
    tags.ok_or_else(|| Fault::bad_request("'tags' is a required property."))
}

/// That only administrators set an attribute.
fn admin_only(caller: &Caller, attributes: &Attributes, keys: &[&str]) -> Answer<()> {
    match keys.iter().find(|key| attributes.has(key)) {
        Some(key) if !caller.is_admin() => {
            Err(Fault::forbidden(format!("Only an administrator may set {key}.")))
        }
        _ => Ok(()),
    }
}
