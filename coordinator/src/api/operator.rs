//! The operator API: hosts and how they join, operations, forwarding tables, explanations: what OpenStack's API
//! cannot say. docs/operator-api.yaml describes it; a test keeps the two together.

mod drifts;
mod events;
mod hosts;
mod join;
mod l2;
mod operations;
mod placement;
mod pools;
mod status;

use crate::api::context::Links;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use axum::routing::{MethodRouter, get, post, put};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Every path with what answers there.
fn routes() -> Vec<(&'static str, MethodRouter<Shared>)> {
    vec![
        ("/status", get(status::show)),
        ("/hosts", get(hosts::list)),
        ("/hosts/{host}", get(hosts::show).put(hosts::update).delete(hosts::remove)),
        ("/hosts/{host}/drain", put(hosts::drain).delete(hosts::undrain)),
        ("/drifts", get(drifts::list)),
        ("/events", get(events::list)),
        ("/join-tokens", post(join::create_token)),
        ("/join", post(join::join)),
        ("/operations", get(operations::list)),
        ("/operations/{operation}", get(operations::show)),
        ("/migrations/{migration}", get(operations::migration)),
        ("/networks/{network}/l2", get(l2::show)),
        ("/pools", get(pools::list)),
        ("/pools/{pool}", get(pools::show)),
        ("/placement/explain", post(placement::explain)),
        ("/placement/simulate", post(placement::simulate)),
    ]
}

/// Its routes, below `/operator/v1`.
pub fn router() -> Router<Shared> {
    routes().into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods))
}

/// What is served here, for people who open the address.
pub async fn roots(links: Links) -> Json<Value> {
    let services = ["identity/v3", "image", "compute/v2.1", "network", "placement", "operator/v1"];
    let services = services.map(|path| (path, links.to(&format!("/{path}"))));
    Json(json!({ "name": "godwit", "services": BTreeMap::from(services) }))
}

/// The one thing that an id or a name means.
///
/// # Errors
/// 404 for none, 409 for a name that several have.
fn only<T>(found: Vec<T>, noun: &'static str, key: &str) -> Answer<T> {
    let count = found.len();
    let mut found = found.into_iter();
    match (found.next(), count) {
        (Some(one), 1) => Ok(one),
        (None, _) => Err(Fault::not_found(noun, key)),
        _ => Err(Fault::new(
            axum::http::StatusCode::CONFLICT,
            format!("{count} have the name {key}; use an id."),
        )),
    }
}

#[cfg(test)]
mod tests;
