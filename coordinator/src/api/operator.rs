//! The operator API: what OpenStack's API cannot say.

use crate::api::context::Links;
use crate::app::Shared;
use axum::{Json, Router};
use serde_json::{Value, json};

/// Its routes, below `/operator/v1`.
pub fn router() -> Router<Shared> {
    Router::new()
}

/// What is served here, for people who open the address.
pub async fn roots(links: Links) -> Json<Value> {
    let services = ["identity/v3", "image", "compute/v2.1", "network", "placement", "operator/v1"];
    let services = services.map(|path| (path, links.to(&format!("/{path}"))));
    Json(json!({ "name": "godwit", "services": services.into_iter().collect::<std::collections::BTreeMap<_, _>>() }))
}
