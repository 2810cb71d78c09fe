//! Flavors and their extra specs.

use super::metadata::pairs;
use super::page::Page;
use super::{Asked, not_built};
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use crate::fleet::instance::Flavor;
use crate::verbs::flavor;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use uuid::Uuid;

fn brief(asked: &Asked, flavor: &Flavor) -> Value {
    let path = format!("flavors/{}", flavor.id);
    let mut view = json!({
        "id": flavor.id,
        "name": flavor.name,
        "links": [
            { "rel": "self", "href": asked.links.to(&format!("/compute/v2.1/{path}")) },
            { "rel": "bookmark", "href": asked.links.to(&format!("/compute/{path}")) },
        ],
    });
    if asked.since(55) {
        view["description"] = json!(flavor.description);
    }
    view
}

fn view(asked: &Asked, flavor: &Flavor) -> Value {
    let mut view = brief(asked, flavor);
    view["ram"] = flavor.memory_mib.into();
    view["disk"] = flavor.disk_gib.into();
    view["vcpus"] = flavor.vcpus.into();
    // None is told as an empty text by old versions.
    view["swap"] = if asked.since(75) { 0.into() } else { "".into() };
    view["OS-FLV-EXT-DATA:ephemeral"] = 0.into();
    view["OS-FLV-DISABLED:disabled"] = false.into();
    view["os-flavor-access:is_public"] = flavor.public.into();
    view["rxtx_factor"] = 1.0.into();
    if asked.since(61) {
        view["extra_specs"] = json!(flavor.extra_specs);
    }
    view
}

/// The flavor of a path, when the caller may see it.
fn visible<'a>(fleet: &'a Fleet, asked: &Asked, id: &str) -> Answer<&'a Flavor> {
    let found = fleet.flavors.get(id).filter(|flavor| flavor.public || asked.caller.is_admin());
    found.ok_or_else(|| Fault::not_found("Flavor", id))
}

fn select(fleet: &Fleet, asked: &Asked, params: &Params) -> Answer<Page<Flavor>> {
    // Administrators may ask for private ones, or for all with `None`; others always get the public ones.
    let public = match params.get("is_public") {
        _ if !asked.caller.is_admin() => Some(true),
        Some(word) if word.eq_ignore_ascii_case("none") => None,
        None => Some(true),
        Some(_) => params.flag("is_public")?,
    };
    let least_disk = params.number::<u64>("minDisk")?.unwrap_or(0);
    let least_memory = params.number::<u64>("minRam")?.unwrap_or(0);
    let passes = |f: &&Flavor| {
        public.is_none_or(|public| f.public == public)
            && f.disk_gib >= least_disk
            && f.memory_mib >= least_memory
    };
    let mut found: Vec<Flavor> = fleet.flavors.values().filter(passes).cloned().collect();
    let key = params.get("sort_key").unwrap_or("flavorid");
    match key {
        "flavorid" | "id" => {}
        "name" => found.sort_by(|a, b| a.name.cmp(&b.name)),
        "memory_mb" | "ram" => found.sort_by_key(|f| f.memory_mib),
        "root_gb" | "disk" => found.sort_by_key(|f| f.disk_gib),
        "vcpus" => found.sort_by_key(|f| f.vcpus),
        "created_at" | "updated_at" | "swap" | "ephemeral_gb" | "rxtx_factor" | "is_public" | "disabled" => {}
        other => return Err(Fault::bad_request(format!("Flavors cannot be sorted by '{other}'."))),
    }
    if params.get("sort_dir") == Some("desc") {
        found.reverse();
    }
    Page::cut(found, params, |f| f.id.clone())
}

/// GET /flavors.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let page = app.ledger.read(|fleet| select(fleet, &asked, &params))?;
    let views = page.items.iter().map(|f| brief(&asked, f)).collect();
    Ok(Json(page.body(&asked, "flavors", "/flavors", views)))
}

/// GET /flavors/detail.
pub(super) async fn detail(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let page = app.ledger.read(|fleet| select(fleet, &asked, &params))?;
    let views = page.items.iter().map(|f| view(&asked, f)).collect();
    Ok(Json(page.body(&asked, "flavors", "/flavors/detail", views)))
}

/// GET /flavors/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|f| view(&asked, f)))?;
    Ok(Json(json!({ "flavor": view })))
}

/// POST /flavors.
pub(super) async fn create(
    State(app): State<Shared>,
    asked: Asked,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let mut a = Attributes::inside(body, "flavor")?;
    let id = match a.take("id") {
        None => None,
        Some(Value::Number(id)) => Some(id.to_string()),
        Some(Value::String(id)) if id.is_empty() => None,
        Some(Value::String(id)) => Some(id),
        Some(other) => return Err(Fault::bad_request(format!("A flavor's id is a text, not {other}."))),
    };
    let mut figure = |key: &'static str| {
        a.number(key)?.ok_or_else(|| Fault::bad_request(format!("'{key}' is a required property.")))
    };
    let (vcpus, memory_mib, disk_gib) = (figure("vcpus")?, figure("ram")?, figure("disk")?);
    let new = Flavor {
        id: id.unwrap_or_else(|| Uuid::new_v4().to_string()),
        name: a.required_text("name")?,
        vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
        memory_mib,
        disk_gib,
        public: a.flag("os-flavor-access:is_public")?.unwrap_or(true),
        extra_specs: BTreeMap::new(),
        description: if asked.since(55) { a.text("description")? } else { None },
    };
    let none = [json!(0), json!("0"), json!("")];
    a.inert("swap", &none)?;
    a.inert("OS-FLV-EXT-DATA:ephemeral", &none)?;
    a.inert("rxtx_factor", &[json!(1), json!(1.0), json!("1"), json!("1.0")])?;
    a.finish()?;
    let made = app.ledger.change(|fleet| flavor::create(fleet, new)).await?;
    Ok(Json(json!({ "flavor": view(&asked, &made) })))
}

/// PUT /flavors/{id}: its description, from 2.55 on.
pub(super) async fn update(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.require(55, None)?;
    asked.caller.require_admin()?;
    let mut a = Attributes::inside(body, "flavor")?;
    if !a.has("description") {
        return Err(Fault::bad_request("'description' is a required property."));
    }
    let description = a.text("description")?;
    a.finish()?;
    let changed = app.ledger.change(|fleet| flavor::describe(fleet, &id, description)).await?;
    Ok(Json(json!({ "flavor": view(&asked, &changed) })))
}

/// DELETE /flavors/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    asked.caller.require_admin()?;
    app.ledger.change(|fleet| flavor::delete(fleet, &id)).await?;
    Ok(StatusCode::ACCEPTED)
}

/// POST /flavors/{id}/action.
pub(super) async fn act(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    asked.caller.require_admin()?;
    app.ledger.read(|fleet| visible(fleet, &asked, &id).map(drop))?;
    Err(not_built("Giving a flavor to single projects", "A flavor is public, or administrators' alone."))
}

/// GET /flavors/{id}/os-flavor-access: whom a private flavor was given to, which is nobody.
pub(super) async fn access(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    let public = app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|f| f.public))?;
    if public {
        let text = "Access list not available for public flavors.";
        return Err(Fault::new(StatusCode::NOT_FOUND, text));
    }
    Ok(Json(json!({ "flavor_access": [] })))
}

/// GET /flavors/{id}/os-extra_specs.
pub(super) async fn specs(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    let specs = app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|f| f.extra_specs.clone()))?;
    Ok(Json(json!({ "extra_specs": specs })))
}

/// POST /flavors/{id}/os-extra_specs.
pub(super) async fn set_specs(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let specs = texts(Attributes::inside(body, "extra_specs")?)?;
    app.ledger.change(|fleet| flavor::set_specs(fleet, &id, specs.clone())).await?;
    Ok(Json(json!({ "extra_specs": specs })))
}

/// Extra specs of a body: texts, or figures that stand for them.
fn texts(attributes: Attributes) -> Answer<BTreeMap<String, String>> {
    let mut map = attributes.into_map();
    for value in map.values_mut().filter(|value| value.is_number()) {
        *value = value.to_string().into();
    }
    pairs(Attributes::of(Value::Object(map), "extra_specs")?, "extra_specs")
}

/// GET /flavors/{id}/os-extra_specs/{key}.
pub(super) async fn spec(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    let value =
        app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|f| f.extra_specs.get(&key).cloned()))?;
    let value = value.ok_or_else(|| Fault::not_found("FlavorExtraSpec", format!("{key} of flavor {id}")))?;
    Ok(Json(json!({ key: value })))
}

/// PUT /flavors/{id}/os-extra_specs/{key}.
pub(super) async fn set_spec(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    asked.caller.require_admin()?;
    let specs = texts(Attributes::of(body, "the request's body")?)?;
    if specs.len() != 1 || !specs.contains_key(&key) {
        return Err(Fault::bad_request(format!("The body must hold '{key}' and nothing else.")));
    }
    app.ledger.change(|fleet| flavor::set_specs(fleet, &id, specs.clone())).await?;
    Ok(Json(json!(specs)))
}

/// DELETE /flavors/{id}/os-extra_specs/{key}.
pub(super) async fn unset_spec(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
) -> Answer<StatusCode> {
    asked.caller.require_admin()?;
    app.ledger.change(|fleet| flavor::unset_spec(fleet, &id, &key)).await?;
    Ok(StatusCode::OK)
}
