//! Servers: lists, one by itself, renaming, deletion, addresses.

use super::page::Page;
use super::view::{self, Kind};
use super::{Asked, view::status};
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::instance::Instance;
use crate::fleet::{Fleet, Time};
use crate::ledger::now;
use crate::operations::delete_instance;
use crate::verbs;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use godwit_protocol::id::InstanceId;
use regex_lite::{Regex, RegexBuilder};
use serde_json::{Value, json};
use time::format_description::well_known::Iso8601;

/// Keys of the query that shape the list.
const SHAPING: [&str; 6] = ["limit", "marker", "sort_key", "sort_dir", "all_tenants", "deleted"];

/// The server of a path, when the caller may see it. A name is no id, and so not found.
pub(super) fn visible<'a>(fleet: &'a Fleet, asked: &Asked, id: &str) -> Answer<&'a Instance> {
    let found = id.parse().ok().and_then(|id: InstanceId| fleet.instances.get(&id));
    found.filter(|i| asked.caller.sees(i.project)).ok_or_else(|| Fault::not_found("Instance", id))
}

/// The id of a server that the caller may change.
pub(super) fn changeable(app: &Shared, asked: &Asked, id: &str) -> Answer<InstanceId> {
    asked.caller.require_member()?;
    app.ledger.read(|fleet| visible(fleet, asked, id).map(|i| i.id))
}

fn pattern(text: &str) -> Answer<Regex> {
    let built = RegexBuilder::new(text).size_limit(1 << 20).build();
    built.map_err(|_| Fault::bad_request(format!("The filter '{text}' is no regular expression.")))
}

/// A point in time of a query.
pub(super) fn point(params: &Params, key: &str) -> Answer<Option<Time>> {
    let Some(text) = params.get(key) else { return Ok(None) };
    // Clients leave the zone out, and write a space for the T.
    let text = text.trim().replacen(' ', "T", 1);
    let zoned = Time::parse(&text, &Iso8601::PARSING);
    let plain = || time::PrimitiveDateTime::parse(&text, &Iso8601::PARSING).map(|t| t.assume_utc());
    let read = zoned.or_else(|_| plain());
    read.map(Some)
        .map_err(|_| Fault::bad_request(format!("{key} must be a time such as 2026-01-31T12:00:00Z.")))
}

/// Whether a server passes.
type Filter = Box<dyn Fn(&Fleet, &Instance) -> bool>;

/// One filter of a query. An unknown key passes below 2.75 and is refused from there on, as clients
/// of each expect.
fn filter(asked: &Asked, key: &str, value: &str) -> Answer<Filter> {
    let text = value.to_owned();
    let by_text = |read: fn(&Fleet, &Instance) -> String| -> Filter {
        Box::new(move |fleet, i| read(fleet, i) == text)
    };
    let host = |fleet: &Fleet, i: &Instance| {
        i.host.and_then(|id| fleet.hosts.get(&id)).map(|h| h.name.clone()).unwrap_or_default()
    };
    Ok(match key {
        "name" => {
            let pattern = pattern(value)?;
            Box::new(move |_, i| pattern.is_match(&i.name))
        }
        "description" => {
            let pattern = pattern(value)?;
            Box::new(move |_, i| pattern.is_match(i.description.as_deref().unwrap_or_default()))
        }
        "ip" | "ip6" => {
            let (pattern, v4) = (pattern(value)?, key == "ip");
            Box::new(move |fleet, i| {
                let mut ips = fleet.ports_of(i.id).into_iter().flat_map(|p| &p.fixed_ips);
                ips.any(|ip| ip.address.is_ipv4() == v4 && pattern.is_match(&ip.address.to_string()))
            })
        }
        "status" => {
            let wanted = value.to_ascii_uppercase();
            if asked.since(38) && !STATUSES.contains(&wanted.as_str()) {
                return Err(Fault::bad_request(format!("Invalid status value '{value}'.")));
            }
            Box::new(move |_, i| status(i) == wanted)
        }
        "host" | "node" | "hypervisor_hostname" => {
            asked.caller.require_admin()?;
            by_text(host)
        }
        "uuid" => by_text(|_, i| i.id.to_string()),
        "image" | "image_ref" => {
            let id = value.rsplit('/').next().unwrap_or_default().to_owned();
            Box::new(move |_, i| i.image.image.to_string() == id)
        }
        "flavor" => {
            let id = value.rsplit('/').next().unwrap_or_default().to_owned();
            Box::new(move |_, i| i.flavor.id == id)
        }
        "project_id" | "tenant_id" => by_text(|_, i| i.project.to_string()),
        "user_id" => by_text(|_, i| i.user.to_string()),
        "key_name" => by_text(|_, i| i.key.as_ref().map(|(name, _)| name.clone()).unwrap_or_default()),
        "availability_zone" => by_text(|fleet, i| view::zone(fleet, i).to_owned()),
        "vm_state" => by_text(|_, i| view::vm_state(i).to_owned()),
        "task_state" => by_text(|_, i| view::task_state(i).unwrap_or_default().to_owned()),
        "power_state" => by_text(|_, i| view::power_state(i).to_string()),
        "config_drive" => {
            let wanted = matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on");
            Box::new(move |_, _| wanted)
        }
        // Nothing is ever locked, tagged or soft-deleted here.
        "locked" => {
            let wanted = matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on");
            Box::new(move |_, _| !wanted)
        }
        "tags" | "tags-any" => Box::new(|_, _| false),
        "not-tags" | "not-tags-any" => Box::new(|_, _| true),
        "changes-since" | "changes-before" => Box::new(|_, _| true),
        _ if asked.since(75) => {
            return Err(Fault::bad_request(format!(
                "Additional query parameters are not allowed ('{key}' was unexpected)."
            )));
        }
        _ => Box::new(|_, _| true),
    })
}

const STATUSES: [&str; 11] = [
    "ACTIVE",
    "BUILD",
    "ERROR",
    "HARD_REBOOT",
    "MIGRATING",
    "PAUSED",
    "REBOOT",
    "RESIZE",
    "REVERT_RESIZE",
    "SHUTOFF",
    "VERIFY_RESIZE",
];

/// The servers of a list request, in order.
fn select(fleet: &Fleet, asked: &Asked, params: &Params) -> Answer<Page<Instance>> {
    // `nova list --all-tenants` sends 1, and `all_tenants` alone means yes.
    let everywhere = match params.get("all_tenants") {
        Some("") => true,
        _ => params.flag("all_tenants")?.unwrap_or(false),
    };
    if everywhere {
        asked.caller.require_admin()?;
    }
    let gone = params.flag("deleted")?.unwrap_or(false);
    if gone {
        asked.caller.require_admin()?;
    }
    let (since, before) = (point(params, "changes-since")?, point(params, "changes-before")?);
    let filters = params.iter().filter(|(key, _)| !SHAPING.contains(key));
    let filters = filters.map(|(key, value)| filter(asked, key, value)).collect::<Answer<Vec<_>>>()?;
    let named_project =
        params.get("project_id").or(params.get("tenant_id")).is_some() && asked.caller.is_admin();
    let passes = |i: &&Instance| {
        // A deleted server leaves no record.
        !gone
            && (everywhere || named_project || i.project == asked.caller.project)
            && since.is_none_or(|t| i.updated_at >= t)
            && before.is_none_or(|t| i.updated_at <= t)
            && filters.iter().all(|filter| filter(fleet, i))
    };
    let mut found: Vec<Instance> = fleet.instances.values().filter(passes).cloned().collect();
    found.sort_by_key(|i| std::cmp::Reverse((i.created_at, i.id)));
    sort(&mut found, params)?;
    Page::cut(found, params, |i| i.id.to_string())
}

fn sort(found: &mut [Instance], params: &Params) -> Answer<()> {
    let mut directions = params.all("sort_dir");
    let keys: Vec<(&str, bool)> =
        params.all("sort_key").map(|key| (key, directions.next().unwrap_or("desc") == "desc")).collect();
    // The last key first: a stable sort keeps what earlier keys leave equal.
    for (key, descending) in keys.into_iter().rev() {
        let read: fn(&Instance) -> String = match key {
            "created_at" | "created" => |i| super::fraction_text(i.created_at),
            "updated_at" | "updated" => |i| super::fraction_text(i.updated_at),
            "launched_at" => |i| i.launched_at.map(super::fraction_text).unwrap_or_default(),
            "display_name" | "name" => |i| i.name.clone(),
            "uuid" | "id" => |i| i.id.to_string(),
            "vm_state" | "status" => |i| view::vm_state(i).to_owned(),
            "task_state" => |i| view::task_state(i).unwrap_or_default().to_owned(),
            "power_state" => |i| view::power_state(i).to_string(),
            "host" | "node" => |i| i.host.map(|h| h.to_string()).unwrap_or_default(),
            "image_ref" => |i| i.image.image.to_string(),
            "instance_type_id" => |i| i.flavor.id.clone(),
            "key_name" => |i| i.key.as_ref().map(|(name, _)| name.clone()).unwrap_or_default(),
            "project_id" => |i| i.project.to_string(),
            "user_id" => |i| i.user.to_string(),
            "display_description" => |i| i.description.clone().unwrap_or_default(),
            _ => return Err(Fault::bad_request(format!("Servers cannot be sorted by '{key}'."))),
        };
        found.sort_by(|a, b| if descending { read(b).cmp(&read(a)) } else { read(a).cmp(&read(b)) });
    }
    Ok(())
}

/// GET /servers.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let page = app.ledger.read(|fleet| select(fleet, &asked, &params))?;
    let views = page.items.iter().map(|i| view::brief(&asked, i)).collect();
    Ok(Json(page.body(&asked, "servers", "/servers", views)))
}

/// GET /servers/detail.
pub(super) async fn detail(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let page = select(fleet, &asked, &params)?;
        let views = page.items.iter().map(|i| view::server(&app, fleet, &asked, i, Kind::Listed)).collect();
        Ok(Json(page.body(&asked, "servers", "/servers/detail", views)))
    })
}

/// GET /servers/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?;
        Ok(Json(json!({ "server": view::server(&app, fleet, &asked, instance, Kind::Shown) })))
    })
}

/// PUT /servers/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let id = changeable(&app, &asked, &id)?;
    let mut a = Attributes::inside(body, "server")?;
    let name = a.text("name")?;
    let mut description = None;
    if asked.since(19) && a.has("description") {
        description = Some(a.text("description")?);
    }
    a.inert("accessIPv4", &[json!("")])?;
    a.inert("accessIPv6", &[json!("")])?;
    a.inert("OS-DCF:diskConfig", &[json!("MANUAL")])?;
    a.finish()?;
    let change = |fleet: &Fleet| verbs::instance::describe(fleet, id, name, description, now());
    app.ledger.change(change).await?;
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id.to_string())?;
        Ok(Json(json!({ "server": view::server(&app, fleet, &asked, instance, Kind::Changed) })))
    })
}

/// DELETE /servers/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    let id = changeable(&app, &asked, &id)?;
    delete_instance::request(&app, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// GET /servers/{id}/ips.
pub(super) async fn ips(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    let addresses =
        app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|i| view::addresses(fleet, i, false)))?;
    Ok(Json(json!({ "addresses": addresses })))
}

/// GET /servers/{id}/ips/{network}.
pub(super) async fn ips_of(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, network)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    let addresses =
        app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|i| view::addresses(fleet, i, false)))?;
    match addresses.get(&network) {
        Some(list) => Ok(Json(json!({ network: list }))),
        None => {
            Err(Fault::new(StatusCode::NOT_FOUND, format!("Instance {id} has no network named '{network}'.")))
        }
    }
}
