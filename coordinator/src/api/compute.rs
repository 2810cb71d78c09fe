//! The compute API, v2.1 with microversions up to 2.87: instances as servers, hosts as hypervisors and services.
//! What is not built is refused with what to do instead, never taken and ignored.

mod actions;
mod aggregates;
mod attachments;
mod create;
mod flavors;
mod groups;
mod hypervisors;
mod instance_actions;
mod keypairs;
mod limits;
mod metadata;
mod migrations;
mod page;
mod servers;
mod services;
#[cfg(test)]
pub(in crate::api) mod tests;
mod usage;
mod view;

use crate::api::context::{Caller, Links};
use crate::api::fault::{Answer, Fault};
use crate::api::microversion::{COMPUTE_MAX, Microversion};
use crate::app::Shared;
use crate::fleet::Time;
use axum::Router;
use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Json;
use axum::routing::{get, post, put};
use serde_json::{Value, json};

/// Who asks, in which version of the shapes, and where links point.
pub(super) struct Asked {
    caller: Caller,
    version: Microversion,
    links: Links,
}

impl Asked {
    /// Whether the request is of microversion `2.<minor>` or newer.
    fn since(&self, minor: u32) -> bool {
        self.version.at_least(minor)
    }

    /// That a path exists in the request's microversion.
    fn require(&self, from: u32, below: Option<u32>) -> Answer<()> {
        if self.since(from) && !below.is_some_and(|below| self.since(below)) {
            return Ok(());
        }
        Err(Fault::of_status(StatusCode::NOT_FOUND))
    }
}

impl FromRequestParts<Shared> for Asked {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Answer<Self> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let Ok(version) = Microversion::from_request_parts(parts, app).await;
        let Ok(links) = Links::from_request_parts(parts, app).await;
        Ok(Self { caller, version, links })
    }
}

/// Its routes.
pub fn router() -> Router<Shared> {
    let v2_1 = Router::new()
        .route("/", get(version_2_1))
        .merge(servers_router())
        .route("/flavors", get(flavors::list).post(flavors::create))
        .route("/flavors/detail", get(flavors::detail))
        .route("/flavors/{id}", get(flavors::show).put(flavors::update).delete(flavors::delete))
        .route("/flavors/{id}/action", post(flavors::act))
        .route("/flavors/{id}/os-flavor-access", get(flavors::access))
        .route("/flavors/{id}/os-extra_specs", get(flavors::specs).post(flavors::set_specs))
        .route(
            "/flavors/{id}/os-extra_specs/{key}",
            get(flavors::spec).put(flavors::set_spec).delete(flavors::unset_spec),
        )
        .route("/os-keypairs", get(keypairs::list).post(keypairs::create))
        .route("/os-keypairs/{name}", get(keypairs::show).delete(keypairs::delete))
        .route("/os-hypervisors", get(hypervisors::list))
        .route("/os-hypervisors/detail", get(hypervisors::detail))
        .route("/os-hypervisors/statistics", get(hypervisors::statistics))
        .route("/os-hypervisors/{id}", get(hypervisors::show))
        .route("/os-hypervisors/{id}/uptime", get(hypervisors::uptime))
        .route("/os-hypervisors/{id}/search", get(hypervisors::search))
        .route("/os-hypervisors/{id}/servers", get(hypervisors::servers))
        .route("/os-services", get(services::list))
        .route("/os-services/{id}", put(services::update).delete(services::delete))
        .route("/os-hosts", get(services::hosts))
        .route("/os-hosts/{name}", get(services::host))
        .route("/os-availability-zone", get(services::zones))
        .route("/os-availability-zone/detail", get(services::zones_detail))
        .route("/os-aggregates", get(aggregates::list).post(aggregates::create))
        .route(
            "/os-aggregates/{id}",
            get(aggregates::show).put(aggregates::update).delete(aggregates::delete),
        )
        .route("/os-aggregates/{id}/action", post(aggregates::act))
        .route("/os-server-groups", get(groups::list).post(groups::create))
        .route("/os-server-groups/{id}", get(groups::show).delete(groups::delete))
        .route("/os-migrations", get(migrations::list_all))
        .route("/limits", get(limits::show))
        .route("/os-quota-sets/{project}", get(limits::quota).put(limits::no_quota))
        .route("/os-quota-sets/{project}/defaults", get(limits::quota))
        .route("/os-quota-sets/{project}/detail", get(limits::quota_detail))
        .route("/os-simple-tenant-usage", get(usage::list))
        .route("/os-simple-tenant-usage/{project}", get(usage::show));
    Router::new().route("/", get(versions)).route("/v2.0", get(version_2_0)).nest("/v2.1", v2_1)
}

fn servers_router() -> Router<Shared> {
    Router::new()
        .route("/servers", get(servers::list).post(create::create))
        .route("/servers/detail", get(servers::detail))
        .route("/servers/{id}", get(servers::show).put(servers::update).delete(servers::delete))
        .route("/servers/{id}/action", post(actions::act))
        .route("/servers/{id}/ips", get(servers::ips))
        .route("/servers/{id}/ips/{network}", get(servers::ips_of))
        .route("/servers/{id}/metadata", get(metadata::list).post(metadata::merge).put(metadata::replace))
        .route("/servers/{id}/metadata/{key}", get(metadata::show).put(metadata::set).delete(metadata::unset))
        .route("/servers/{id}/migrations", get(migrations::list))
        .route("/servers/{id}/migrations/{migration}", get(migrations::show).delete(migrations::abort))
        .route("/servers/{id}/migrations/{migration}/action", post(migrations::act))
        .route("/servers/{id}/os-instance-actions", get(instance_actions::list))
        .route("/servers/{id}/os-instance-actions/{request}", get(instance_actions::show))
        .route("/servers/{id}/os-interface", get(attachments::interfaces).post(attachments::no_hotplug))
        .route(
            "/servers/{id}/os-interface/{port}",
            get(attachments::interface).delete(attachments::no_hotplug),
        )
        .route("/servers/{id}/os-volume_attachments", get(attachments::volumes).post(attachments::no_volumes))
        .route("/servers/{id}/remote-consoles", post(attachments::no_consoles))
}

/// The document of one version; 2.0 is 2.1 without microversions.
fn document(links: &Links, id: &str, media: bool) -> Value {
    let current = id == "v2.1";
    let mut document = json!({
        "id": id,
        "status": if current { "CURRENT" } else { "SUPPORTED" },
        "version": if current { format!("2.{COMPUTE_MAX}") } else { String::new() },
        "min_version": if current { "2.1" } else { "" },
        "updated": if current { "2013-07-23T11:33:21Z" } else { "2011-01-21T11:33:21Z" },
        "links": [{ "rel": "self", "href": links.to(&format!("/compute/{id}/")) }],
    });
    if media {
        document["media-types"] = json!([{
            "base": "application/json",
            "type": format!("application/vnd.openstack.compute+json;version={}", &id[1..]),
        }]);
    }
    document
}

async fn versions(links: Links) -> Json<Value> {
    let versions = ["v2.0", "v2.1"].map(|id| document(&links, id, false));
    Json(json!({ "versions": versions }))
}

async fn version_2_0(links: Links) -> Json<Value> {
    Json(json!({ "version": document(&links, "v2.0", true) }))
}

async fn version_2_1(links: Links) -> Json<Value> {
    Json(json!({ "version": document(&links, "v2.1", true) }))
}

/// A time with its fraction and without a zone, as some of compute's tables print it.
fn fraction_text(time: Time) -> String {
    let (date, clock) = (time.date(), time.time());
    let (hour, minute, second) = clock.as_hms();
    format!("{date}T{hour:02}:{minute:02}:{second:02}.{:06}", clock.microsecond())
}

/// The refusal of something that the API knows and Godwit does not do; `instead` says what to do.
fn not_built(what: &str, instead: &str) -> Fault {
    Fault::new(StatusCode::NOT_IMPLEMENTED, format!("{what} is not supported here. {instead}"))
}
